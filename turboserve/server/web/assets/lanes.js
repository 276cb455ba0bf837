/**
 * The cluster as lanes: one for each worker, a shelf for suspended sessions, the queue. Sessions are chips that keep
 * their identity from one picture to the next, so that one that changed its place is seen to slide there.
 */

import { at, element, wantsStillness } from "./dom.js";
import { byteSize } from "./figures.js";

const SLIDE_MS = 600;
const LOST_SHOWN_S = 30;
/** A worker that is started again at once is still shown dead for so long. */
const DEATH_SHOWN_S = 3;

/** What stands on a chip besides its colour. @type {Record<string, string>} */
export const SIGNS = {
  active: "▶",
  idle: "‖",
  queued: "…",
  suspended: "z",
  migrating: "⇄",
  recovering: "↻",
  closed: "■",
  failed: "✕",
};
/** @type {Record<string, string>} */
const WORKER_SIGNS = { ready: "●", starting: "◐", draining: "◑", lost: "✕" };

/**
 * @typedef {Object} LaneEvents
 * @property {(session: string) => void} open                   a chip was chosen
 * @property {(session: string, worker: string) => void} move    a chip was dropped onto another worker
 * @property {(worker: string) => void} drain
 * @property {((worker: string) => void)|null} kill              null: not offered
 */

export class Lanes {
  /** @param {HTMLElement} place @param {LaneEvents} events */
  constructor(place, events) {
    this.place = place;
    this.events = events;
    /** @type {Map<string, HTMLElement>} */
    this.lanes = new Map();
    /** @type {Map<string, HTMLElement>} */
    this.chips = new Map();
    this.mayAct = false;
  }

  /** @param {any} cluster  an answer of GET /v1/cluster */
  draw(cluster) {
    const before = this.#positions();
    const lost = lostWorkers(cluster);
    const workers = [
      ...(cluster.workers ?? []).map((/** @type {any} */ worker) => {
        const death = worker.state === "starting" ? lost.get(worker.id) : undefined;
        return death && death.agoS < DEATH_SHOWN_S ? { ...death, reason: `${death.reason}; it is started again` } : worker;
      }),
    ];
    const up = new Set(workers.map((worker) => worker.id));
    for (const [id, death] of lost) if (!up.has(id)) workers.push(death);
    workers.sort((a, b) => a.id.localeCompare(b.id, "en", { numeric: true }));
    const sessions = cluster.session_list ?? [];
    const wanted = [
      ...workers.map((worker) => this.#workerLane(worker)),
      ...this.#shelves(sessions),
    ];
    const keys = wanted.map((lane) => lane.dataset.lane);
    for (const [key, lane] of this.lanes) {
      if (!keys.includes(key)) {
        lane.remove();
        this.lanes.delete(key);
      }
    }
    wanted.forEach((lane, place) => {
      if (this.place.children[place] !== lane) this.place.insertBefore(lane, this.place.children[place] ?? null);
    });
    this.#placeChips(sessions, new Set(workers.map((worker) => worker.id)));
    this.#slide(before);
  }

  // ------------------------------------------------------------------ lanes

  /** @param {string} key @param {string} kind */
  #lane(key, kind) {
    let lane = this.lanes.get(key);
    if (lane) return lane;
    const list = element("ul", [], { class: "chips-row" });
    lane = element("section", [element("div", [], { class: "lane-head" }), list], { class: "lane", "data-lane": key, "data-kind": kind });
    if (kind === "worker") this.#acceptDrops(lane, key);
    this.lanes.set(key, lane);
    return lane;
  }

  /** @param {any} worker */
  #workerLane(worker) {
    const lane = this.#lane(worker.id, "worker");
    lane.dataset.state = worker.state;
    lane.classList.add("worker");
    lane.setAttribute("aria-label", `Worker ${worker.id}, ${worker.state}`);
    const capacity = worker.capacity ?? 0;
    const busy = worker.state === "lost" ? "" : `${worker.active ?? 0} of ${capacity} active, busy ${Math.round(100 * (worker.busy_share ?? 0))} %`;
    const latency = worker.chunk_latency_ms ? `, chunk ${Math.round(worker.chunk_latency_ms)} ms` : "";
    const where = [worker.device, worker.node, worker.pid ? `pid ${worker.pid}` : ""].filter(Boolean).join(", ");
    const head = lane.firstElementChild;
    const text = [worker.state, busy + latency, where, worker.reason ?? "", String(this.mayAct), String(Boolean(this.events.kill))].join("|");
    if (head instanceof HTMLElement && head.dataset.text !== text) {
      const hadFocus = head.contains(document.activeElement) ? /** @type {HTMLElement} */ (document.activeElement).dataset.act : "";
      head.dataset.text = text;
      head.replaceChildren(
        element("h3", [worker.id, element("span", `${WORKER_SIGNS[worker.state] ?? "?"} ${worker.state}`, { class: "badge" })]),
        element("p", worker.state === "lost" ? (worker.reason ?? "") : busy + latency),
        element("p", where, { class: "where" }),
        this.#laneActions(worker),
      );
      if (hadFocus) /** @type {HTMLElement|null} */ (head.querySelector(`[data-act="${hadFocus}"]`))?.focus();
    }
    lane.style.setProperty("--load", String(Math.min(1, capacity ? (worker.active ?? 0) / capacity : 0)));
    return lane;
  }

  /** @param {any} worker */
  #laneActions(worker) {
    const row = element("div", [], { class: "lane-actions" });
    if (!this.mayAct || worker.state === "lost") return row;
    const drain = element("button", "Drain", { type: "button", "data-act": "drain", "aria-label": `Drain worker ${worker.id}` });
    /** @type {HTMLButtonElement} */ (drain).disabled = worker.state === "draining";
    drain.addEventListener("click", () => this.events.drain(worker.id));
    row.append(drain);
    const { kill } = this.events;
    if (kill) {
      const plug = element("button", "Pull the plug", { type: "button", "data-act": "kill", "aria-label": `Kill worker ${worker.id}` });
      plug.addEventListener("click", () => kill(worker.id));
      row.append(plug);
    }
    return row;
  }

  /** @param {any[]} sessions */
  #shelves(sessions) {
    const shelves = [
      { key: "shelf:host", name: "Host memory", rows: sessions.filter((one) => one.tier === "host") },
      { key: "shelf:disk", name: "Disk", rows: sessions.filter((one) => one.tier === "disk") },
      { key: "shelf:queue", name: "Waiting for a place", rows: sessions.filter((one) => one.tier === "none") },
    ];
    // Host memory is always shown: it is where sessions go, and an empty shelf says that none has.
    return shelves
      .filter((shelf) => shelf.key === "shelf:host" || shelf.rows.length)
      .map((shelf) => {
        const lane = this.#lane(shelf.key, "shelf");
        const bytes = shelf.rows.reduce((sum, row) => sum + (row.bytes?.host ?? 0) + (row.bytes?.disk ?? 0), 0);
        lane.setAttribute("aria-label", shelf.name);
        lane.firstElementChild?.replaceChildren(
          element("h3", shelf.name),
          element("p", `${shelf.rows.length} session${shelf.rows.length === 1 ? "" : "s"}${bytes ? `, ${byteSize(bytes)}` : ""}`),
        );
        return lane;
      });
  }

  // ------------------------------------------------------------------ chips

  /** @param {any[]} sessions @param {Set<string>} workers  ids that have a lane */
  #placeChips(sessions, workers) {
    const focused = document.activeElement instanceof HTMLElement ? document.activeElement.dataset.session : undefined;
    const seen = new Set();
    for (const session of sessions) {
      const key = laneOf(session, workers);
      const list = key ? this.lanes.get(key)?.querySelector(".chips-row") : null;
      if (!list) continue;
      seen.add(session.id);
      const chip = this.#chip(session);
      if (chip.parentElement !== list) list.append(chip);
    }
    for (const [id, chip] of this.chips) {
      if (!seen.has(id)) {
        chip.remove();
        this.chips.delete(id);
      }
    }
    if (focused && document.activeElement === document.body) this.chips.get(focused)?.querySelector("button")?.focus();
  }

  /** @param {any} session */
  #chip(session) {
    let item = this.chips.get(session.id);
    if (!item) {
      const button = element("button", [element("span", "", { class: "chip-sign", "aria-hidden": "true" }), element("span", session.id.slice(0, 4), { class: "chip-name" })], { type: "button", "data-session": session.id });
      button.addEventListener("click", () => this.events.open(session.id));
      button.addEventListener("dragstart", (event) => event.dataTransfer?.setData("text/x-turboserve-session", session.id));
      item = element("li", button, { class: "session" });
      this.chips.set(session.id, item);
    }
    const button = /** @type {HTMLElement} */ (item.firstElementChild);
    item.dataset.state = session.state;
    item.dataset.worker = session.worker ?? "";
    button.draggable = this.mayAct;
    const sign = /** @type {HTMLElement} */ (button.firstElementChild);
    if (sign.textContent !== (SIGNS[session.state] ?? "?")) sign.textContent = SIGNS[session.state] ?? "?";
    const place = session.worker ? `on ${session.worker}` : session.tier === "none" ? "without a place" : `in ${session.tier} memory`;
    const late = session.late ? `, ${session.late} of ${session.on_time + session.late} chunks late` : "";
    const label = `Session ${session.id.slice(0, 4)}, ${session.state}, ${place}, chunk ${session.next_index ?? 0}${late}`;
    if (button.getAttribute("aria-label") !== label) {
      button.setAttribute("aria-label", label);
      button.title = label;
    }
    return item;
  }

  /** @param {HTMLElement} lane @param {string} worker */
  #acceptDrops(lane, worker) {
    const isOurs = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("text/x-turboserve-session");
    lane.addEventListener("dragover", (event) => {
      if (!isOurs(event)) return;
      event.preventDefault();
      lane.classList.add("target");
    });
    lane.addEventListener("dragleave", () => lane.classList.remove("target"));
    lane.addEventListener("drop", (event) => {
      lane.classList.remove("target");
      if (!isOurs(event)) return;
      event.preventDefault();
      const session = event.dataTransfer?.getData("text/x-turboserve-session") ?? "";
      if (session && this.chips.get(session)?.dataset.worker !== worker) this.events.move(session, worker);
    });
  }

  // ------------------------------------------------------------------ sliding

  #positions() {
    return new Map([...this.chips].map(([id, chip]) => [id, chip.getBoundingClientRect()]));
  }

  /** Lets what changed its place come from where it was. @param {Map<string, DOMRect>} before */
  #slide(before) {
    if (wantsStillness() || document.hidden) return;
    for (const [id, chip] of this.chips) {
      const old = before.get(id);
      const now = chip.getBoundingClientRect();
      if (!old) chip.animate([{ opacity: 0, transform: "scale(0.6)" }, { opacity: 1, transform: "none" }], { duration: 250, easing: "ease-out" });
      else if (Math.abs(old.left - now.left) > 1 || Math.abs(old.top - now.top) > 1) {
        const from = `translate(${old.left - now.left}px, ${old.top - now.top}px)`;
        chip.animate([{ transform: from, zIndex: 2 }, { transform: "none", zIndex: 2 }], { duration: SLIDE_MS, easing: "cubic-bezier(0.2, 0.8, 0.2, 1)" });
      }
    }
  }
}

/** Lane of a session, or null when it has none. @param {any} session @param {Set<string>} workers */
function laneOf(session, workers) {
  if (session.worker && workers.has(session.worker)) return session.worker;
  if (session.tier === "host" || session.tier === "disk") return `shelf:${session.tier}`;
  return session.tier === "none" ? "shelf:queue" : null;
}

/** Workers that were lost a moment ago: their lane is shown dead for a while. @param {any} cluster */
function lostWorkers(cluster) {
  const nowS = cluster.clock?.time_s ?? 0;
  /** @type {Map<string, any>} */
  const lost = new Map();
  for (const one of cluster.decisions ?? []) {
    const agoS = nowS - one.time_s;
    if (one.event === "worker_lost" && agoS < LOST_SHOWN_S) lost.set(one.worker, { id: one.worker, state: "lost", reason: one.reason, capacity: 0, agoS });
    if (one.event === "worker_release") lost.delete(one.worker);
  }
  return lost;
}

/** The lanes of a page that has a place for them. @param {LaneEvents} events */
export const lanesAt = (events) => new Lanes(at("lanes"), events);
