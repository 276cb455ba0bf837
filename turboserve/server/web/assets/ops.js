/**
 * The operations page. It asks for the cluster's picture twice a second (the server makes it at most four times a
 * second, however many ask) and for the last minutes every other second.
 */

import * as api from "./api.js";
import { SessionMenu, addWorker, drain, kill, move, wordsFor } from "./commands.js";
import { Decisions } from "./decisions.js";
import { askForKey } from "./dialogs.js";
import { at, element } from "./dom.js";
import { percent } from "./figures.js";
import { lanesAt } from "./lanes.js";
import { drawLatency, drawOnTime } from "./plots.js";

const EVERY_MS = 500;
const HISTORY_EVERY_MS = 2000;
const HISTORY_S = 300;
const STATES = ["active", "idle", "queued", "suspended", "migrating", "recovering", "failed"];
const ALWAYS = new Set(["active", "suspended", "queued"]);

/** @type {any} */
let cluster = null;
const menu = new SessionMenu();
const decisions = new Decisions();
/** @type {import("./lanes.js").LaneEvents} */
const laneEvents = { open: (session) => menu.open(session, cluster, true), move, drain, kill: null };
const lanes = lanesAt(laneEvents);

/** @param {any} counts @param {any} totals */
function figures(counts, totals) {
  const share = totals.on_time_share_1m ?? null;
  return [
    element("li", [element("b", share === null ? "–" : `${percent(share)} %`), "on time, last minute"], { "data-state": "ontime", "data-some": String(share !== null && share < 0.995) }),
    ...STATES.filter((name) => counts[name] > 0 || ALWAYS.has(name)).map((name) =>
      element("li", [element("b", String(counts[name] ?? 0)), name], { "data-state": name, "data-some": String((counts[name] ?? 0) > 0) }),
    ),
    element("li", [element("b", String(totals.viewers ?? 0)), "viewers"], { "data-state": "viewers", "data-some": "false" }),
  ];
}

function draw() {
  const totals = cluster.totals ?? {};
  lanes.mayAct = true;
  laneEvents.kill = totals.may_kill ? kill : null;
  at("add-worker").hidden = false;
  at("lane-hint").hidden = false;
  at("sessions").replaceChildren(...figures(cluster.sessions ?? {}, totals));
  lanes.draw(cluster);
  at("workers-none").hidden = (cluster.workers ?? []).length > 0;
  decisions.draw(cluster);
  menu.draw(cluster);
}

async function turn() {
  let waitMs = EVERY_MS;
  if (!document.hidden) {
    try {
      cluster = await api.request("GET", "v1/cluster");
      draw();
      at("trouble").hidden = true;
      const away = cluster.totals?.controller === "away" ? "; the controller is away, this is its last picture" : "";
      at("fresh").textContent = `live, ${new Date().toLocaleTimeString()}${away}`;
    } catch (error) {
      at("trouble").textContent = `${wordsFor(error)} Trying again.`;
      at("trouble").hidden = false;
      at("fresh").textContent = cluster ? "not live: the last picture" : "";
      waitMs = 4 * EVERY_MS;
    }
  }
  window.setTimeout(turn, waitMs);
}

async function turnHistory() {
  if (!document.hidden && cluster) {
    try {
      const history = await api.request("GET", `v1/admin/history?seconds=${HISTORY_S}`, undefined, { quiet: true });
      drawLatency(/** @type {any} */ (at("latency-plot")), at("latency-text"), history, HISTORY_S);
      drawOnTime(/** @type {any} */ (at("ontime-plot")), at("ontime-text"), history, HISTORY_S);
    } catch {
      // The other turn says what is wrong.
    }
  }
  window.setTimeout(turnHistory, cluster ? HISTORY_EVERY_MS : EVERY_MS);
}

api.onKeyNeeded(askForKey);
at("add-worker").addEventListener("click", addWorker);
turn();
turnHistory();
