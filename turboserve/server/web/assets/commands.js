/** What an operator can order: asked back first, sent, and what became of it said. */

import * as api from "./api.js";
import { announce, notice } from "./dialogs.js";
import { at, element, pair } from "./dom.js";
import { explain } from "./errors.js";
import { byteSize } from "./figures.js";

/** @param {string} title @param {string} text @param {string} yes  words of the button @returns {Promise<boolean>} */
export function confirm(title, text, yes) {
  const dialog = /** @type {HTMLDialogElement} */ (at("confirm-dialog"));
  at("confirm-title").textContent = title;
  at("confirm-text").textContent = text;
  at("confirm-yes").textContent = yes;
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

/** Words for a failed command; the server's own message says most. @param {any} error */
export function wordsFor(error) {
  const { code, message, hint } = error;
  if (message && code !== "unreachable") return [message, hint].filter(Boolean).join(". ");
  const words = explain(code, message, hint);
  return `${words.title}. ${words.advice}`;
}

/**
 * @param {string} done  said when it went well @param {string} path @param {object} [body]
 * @returns {Promise<string>} empty, or what went wrong
 */
export async function order(done, path, body) {
  try {
    const answer = await api.request("POST", path, body);
    const words = answer.message ? `${done} ${answer.message}.` : done;
    notice(words);
    announce(words);
    return "";
  } catch (error) {
    return wordsFor(error);
  }
}

/** @param {string} wrong */
const complain = (wrong) => wrong && notice(wrong);

/** @param {string} worker */
export async function drain(worker) {
  const text = "Nothing new is placed on it, its sessions move away, then it ends. Viewers notice nothing.";
  if (await confirm(`Drain ${worker}?`, text, "Drain")) complain(await order(`${worker} is draining.`, `v1/admin/workers/${encodeURIComponent(worker)}/drain`));
}

/** @param {string} worker */
export async function kill(worker) {
  const text = "Its process is killed at once, as a crash would. Its sessions continue elsewhere from their last recovery point.";
  if (await confirm(`Pull the plug on ${worker}?`, text, "Kill it")) complain(await order(`${worker} was killed.`, `v1/admin/workers/${encodeURIComponent(worker)}/kill`));
}

export async function addWorker() {
  const text = "It starts on this fleet's backend and takes sessions as soon as it is ready.";
  if (await confirm("Add a worker?", text, "Add")) complain(await order("A worker was asked for.", "v1/admin/workers", { add: 1 }));
}

/** @param {string} session @param {string} worker */
export async function move(session, worker) {
  const text = "It stops at a chunk boundary, moves, and goes on there; its viewer should notice nothing.";
  if (await confirm(`Move ${session.slice(0, 4)} to ${worker}?`, text, "Move")) {
    complain(await order(`${session.slice(0, 4)} is moving to ${worker}.`, `v1/admin/sessions/${session}/migrate`, { target: worker }));
  }
}

/** The menu of one session: what it is, what can be done with it, where its newest chunk's time went. */
export class SessionMenu {
  constructor() {
    this.dialog = /** @type {HTMLDialogElement} */ (at("session-dialog"));
    this.target = /** @type {HTMLSelectElement} */ (at("move-to"));
    this.session = "";
    for (const button of at("session-actions").querySelectorAll("button")) {
      button.addEventListener("click", () => this.#act(button.dataset.act ?? ""));
    }
    this.dialog.addEventListener("close", () => (this.session = ""));
  }

  /** @param {string} id @param {any} cluster @param {boolean} mayAct */
  open(id, cluster, mayAct) {
    this.session = id;
    at("session-wrong").hidden = true;
    at("session-title").textContent = `Session ${id.slice(0, 4)}`;
    at("session-actions").hidden = !mayAct;
    at("explain").hidden = true;
    const row = (cluster.session_list ?? []).find((/** @type {any} */ one) => one.id === id);
    const others = (cluster.workers ?? []).filter((/** @type {any} */ worker) => worker.id !== row?.worker && worker.state === "ready");
    this.target.replaceChildren(...others.map((/** @type {any} */ worker) => element("option", `to ${worker.id}`, { value: worker.id })));
    this.target.disabled = others.length === 0;
    this.draw(cluster);
    this.dialog.showModal();
    if (row?.next_index > 0) this.#explain(id); // before that there is no chunk to explain
  }

  /** Keeps an open menu up to date. @param {any} cluster */
  draw(cluster) {
    if (!this.session) return;
    const row = (cluster.session_list ?? []).find((/** @type {any} */ one) => one.id === this.session);
    if (!row) {
      at("session-facts").replaceChildren(pair("state", "it has ended"));
      at("session-actions").hidden = true;
      return;
    }
    const bytes = Object.entries(row.bytes ?? {}).filter(([, count]) => Number(count) > 0);
    const live = (row.on_time ?? 0) + (row.late ?? 0);
    at("session-facts").replaceChildren(
      pair("id", row.id),
      pair("state", row.stage && row.stage !== row.state ? `${row.state} (${row.stage})` : row.state),
      pair("worker", row.worker ?? "none"),
      pair("epoch", String(row.epoch ?? "–")),
      pair("next chunk", String(row.next_index ?? "–")),
      pair("late", live ? `${row.late} of ${live} live chunks` : "–"),
      pair("viewer", row.attached ? "attached" : "not attached"),
      pair("bytes", bytes.map(([tier, count]) => `${byteSize(Number(count))} ${tier}`).join(", ") || "–"),
    );
    const isShelved = row.state === "suspended";
    /** @param {string} act */
    const button = (act) => /** @type {HTMLButtonElement} */ (at("session-actions").querySelector(`[data-act="${act}"]`));
    button("migrate").disabled = isShelved || this.target.options.length === 0;
    button("suspend").disabled = isShelved;
    button("resume").disabled = !isShelved;
  }

  /** @param {string} act */
  async #act(act) {
    const id = this.session;
    const name = id.slice(0, 4);
    const base = `v1/admin/sessions/${id}`;
    let wrong = "";
    if (act === "migrate") wrong = await order(`${name} is moving to ${this.target.value}.`, `${base}/migrate`, { target: this.target.value });
    else wrong = await order(act === "suspend" ? `${name} is being suspended.` : `${name} is being resumed.`, `${base}/${act}`);
    const place = at("session-wrong");
    place.textContent = wrong;
    place.hidden = !wrong;
    if (!wrong) this.dialog.close();
  }

  /** @param {string} id */
  async #explain(id) {
    let found;
    try {
      found = await api.request("GET", `v1/sessions/${id}/explain`, undefined, { quiet: true });
    } catch {
      return; // no chunk yet, or not kept: the menu does without
    }
    if (this.session !== id) return;
    at("explain").hidden = false;
    const slack = "slack_ms" in found ? (found.on_time ? `, ${Math.round(found.slack_ms)} ms early` : `, ${Math.round(-found.slack_ms)} ms LATE`) : "";
    at("explain-head").textContent = `chunk ${found.index} on ${found.worker}: ${found.total_ms.toFixed(0)} ms${slack}`;
    const stages = Object.entries(found.stages_ms).filter(([, spent]) => Number(spent) >= 0.05);
    at("explain-stages").replaceChildren(
      ...stages.map(([stage, spent]) => {
        const item = element("li", [element("span", stage.replaceAll("_", " ")), element("i", "", { "aria-hidden": "true" }), element("b", `${Number(spent).toFixed(1)} ms`)]);
        item.style.setProperty("--share", `${(100 * Number(spent)) / Math.max(1e-9, found.total_ms)}%`);
        return item;
      }),
      ...(found.decisions ?? []).slice(-1).map((/** @type {any} */ one) => element("li", `${one.event}: ${one.reason}`, { class: "because" })),
    );
  }
}
