/** The decision log: what the scheduler did and why, newest first, with a filter. */

import { at, element } from "./dom.js";

const SHOWN = 100;

export class Decisions {
  constructor() {
    this.kind = /** @type {HTMLSelectElement} */ (at("filter-kind"));
    this.words = /** @type {HTMLInputElement} */ (at("filter-text"));
    /** @type {any} */
    this.cluster = null;
    this.drawn = "";
    at("filter").addEventListener("input", () => this.draw(this.cluster));
    at("filter").addEventListener("submit", (event) => event.preventDefault());
  }

  /** @param {any} cluster */
  draw(cluster) {
    if (!cluster) return;
    this.cluster = cluster;
    const all = [...(cluster.decisions ?? [])].reverse();
    this.#kinds(all);
    const wanted = all.filter((one) => this.#fits(one)).slice(0, SHOWN);
    const key = JSON.stringify([this.kind.value, this.words.value, wanted[0], wanted.length]);
    if (key === this.drawn) return;
    this.drawn = key;
    at("decisions").replaceChildren(...wanted.map((one) => row(one, cluster.clock)));
    at("decisions-none").hidden = wanted.length > 0;
  }

  /** @param {any[]} all */
  #kinds(all) {
    const known = new Set([...this.kind.options].map((option) => option.value));
    for (const kind of new Set(all.map((one) => String(one.event ?? "")))) {
      if (kind && !known.has(kind)) this.kind.append(element("option", kind.replaceAll("_", " "), { value: kind }));
    }
  }

  /** @param {any} one */
  #fits(one) {
    if (this.kind.value && one.event !== this.kind.value) return false;
    const words = this.words.value.trim().toLowerCase();
    return !words || [one.worker, one.source, one.session, one.reason, one.event].some((text) => String(text ?? "").toLowerCase().includes(words));
  }
}

/** @param {any} decision @param {{time_s: number, unix_s: number}|undefined} clock */
function row(decision, clock) {
  const { time_s: time, event, worker, source, session, reason } = decision;
  const where = [source, worker].filter(Boolean).join(" → ");
  return element("tr", [
    element("td", typeof time === "number" ? clockTimeOf(time, clock) : "", { class: "time" }),
    element("td", String(event ?? "").replaceAll("_", " "), { class: "what" }),
    element("td", session ? session.slice(0, 4) : "", { class: "id", title: session ?? "" }),
    element("td", where, { class: "where" }),
    element("td", reason ?? ""),
  ]);
}

/** Wall clock of a moment on the server's own clock. @param {number} time @param {{time_s: number, unix_s: number}|undefined} clock */
function clockTimeOf(time, clock) {
  return clock ? new Date(1000 * (clock.unix_s + time - clock.time_s)).toLocaleTimeString() : `${time.toFixed(1)} s`;
}
