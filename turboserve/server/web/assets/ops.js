/** The operations page: workers, sessions by state and the latest decisions, read again every second. */

import * as api from "./api.js";
import { askForKey } from "./dialogs.js";
import { explain } from "./errors.js";

const EVERY_MS = 1000;
const STATES = ["active", "idle", "queued", "suspended", "migrating", "recovering", "closed", "failed"];

/** @param {string} id */
const at = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/**
 * @param {string} tag @param {string|Node|(string|Node)[]} content @param {Record<string, string>} [attributes]
 */
function element(tag, content, attributes = {}) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

/** @param {any} worker */
function workerCard(worker) {
  const capacity = worker.capacity ?? 0;
  const slots = element("div", "", { class: "slots", "aria-hidden": "true" });
  const shown = Math.min(24, Math.max(capacity, worker.active ?? 0));
  for (let slot = 0; slot < shown; slot += 1) {
    const kind = slot < worker.active ? (slot < capacity ? "active" : "over") : slot < worker.resident ? "resident" : "free";
    slots.append(element("i", "", { class: kind }));
  }
  const latency = worker.chunk_latency_ms;
  return element(
    "li",
    [
      element("h3", [worker.id, element("span", worker.state ?? "", { class: "badge" })]),
      slots,
      element("dl", [
        pair("active", `${worker.active ?? 0} of ${capacity || "–"}`),
        pair("resident", String(worker.resident ?? "–")),
        pair("chunk latency", typeof latency === "number" ? `${latency.toFixed(0)} ms` : "–"),
        pair("device", worker.device ?? "–"),
        pair("node", `${worker.node ?? "–"}${worker.pid ? `, pid ${worker.pid}` : ""}`),
      ]),
    ],
    { class: "worker", "data-state": worker.state ?? "" },
  );
}

/** @param {string} name @param {string} value */
const pair = (name, value) => element("div", [element("dt", name), element("dd", value)]);

/** @param {any} sessions */
function stateCounts(sessions) {
  const names = [...STATES, ...Object.keys(sessions).filter((name) => !STATES.includes(name))];
  return names
    .filter((name) => typeof sessions[name] === "number" && (sessions[name] > 0 || name === "active" || name === "queued"))
    .map((name) => element("li", [element("b", String(sessions[name])), name], { "data-state": name, "data-some": String(sessions[name] > 0) }));
}

/** @param {any} decision @param {number} newestS */
function decisionRow(decision, newestS) {
  const { time_s: time, event, kind, worker, source, session, reason } = decision;
  const where = [source, worker].filter(Boolean).join(" → ");
  return element("tr", [
    element("td", typeof time === "number" ? when(time, newestS) : "", { class: "time" }),
    element("td", event ?? kind ?? ""),
    element("td", session ? session.slice(0, 8) : "", { class: "id", title: session ?? "" }),
    element("td", where),
    element("td", reason ?? ""),
  ]);
}

/**
 * Wall clock times are written as such. A server may count on a clock of its own; then what matters is
 * how long before the newest decision it was.
 * @param {number} seconds @param {number} newestS
 */
function when(seconds, newestS) {
  if (seconds > 1e9) return new Date(seconds * 1000).toLocaleTimeString();
  const before = newestS - seconds;
  if (before < 0.05) return "newest";
  return before < 60 ? `${before.toFixed(1)} s before` : `${Math.floor(before / 60)} min ${Math.round(before % 60)} s before`;
}

/** @param {any} cluster */
function draw(cluster) {
  const workers = cluster.workers ?? [];
  at("workers").replaceChildren(...workers.map(workerCard));
  at("workers-none").hidden = workers.length > 0;
  at("sessions").replaceChildren(...stateCounts(cluster.sessions ?? {}));
  const decisions = [...(cluster.decisions ?? [])];
  const newestFirst = decisions.sort((a, b) => (b.time_s ?? 0) - (a.time_s ?? 0)).slice(0, 100);
  at("decisions").replaceChildren(...newestFirst.map((decision) => decisionRow(decision, newestFirst[0].time_s ?? 0)));
  at("decisions-none").hidden = decisions.length > 0;
}

async function turn() {
  let waitMs = EVERY_MS;
  if (!document.hidden) {
    try {
      draw(await api.request("GET", "v1/cluster"));
      at("trouble").hidden = true;
      at("fresh").textContent = `as of ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      const { code, message, hint } = /** @type {any} */ (error);
      const words = explain(code, message, hint);
      at("trouble").textContent = `${words.title}. ${words.advice}`;
      at("trouble").hidden = false;
      waitMs = 4 * EVERY_MS;
    }
  }
  window.setTimeout(turn, waitMs);
}

api.onKeyNeeded(askForKey);
turn();
