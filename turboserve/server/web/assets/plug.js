/**
 * "Pull the plug on a worker": kills one worker's process for real while streams play, shows where their sessions go,
 * counts whether a picture stood still, and holds every chunk against an undisturbed run of the same stream.
 */

import * as api from "./api.js";
import { wordsFor } from "./commands.js";
import { at, pair } from "./dom.js";
import { Lanes } from "./lanes.js";
import { Status } from "./session.js";
import { runTwin } from "./twin.js";

const LOOK_MS = 250;
const OFFER_AGAIN_MS = 4000;
/** Kept in hand before the plug is pulled: a stream's way from a dead worker to the next takes time. */
const RESERVE_S = 1.5;
const READY_AFTER_CHUNKS = 8;
const COMPARE_AFTER_CHUNKS = 9;
const TWIN_REST_MS = 120;
/** A second run that the scheduler moved is no undisturbed one: it is made again, so many times in all. */
const TWIN_TRIES = 3;
const GIVE_UP_MS = 60_000;
const DEAD_MS = 10_000;

/**
 * @typedef {Object} Watched          one stream during the show
 * @property {import("./tile.js").Tile} tile
 * @property {HTMLElement} label
 * @property {string} worker
 * @property {number} lastMs          when its newest chunk came
 * @property {number} longestMs       longest wait for a chunk since the plug was pulled
 * @property {number} stallsBefore
 * @property {number} indexBefore
 * @property {number} count           chunks to compare
 * @property {number} verified        chunks that were found equal
 * @property {number} verifiedAfter   of these, made after the plug was pulled
 * @property {boolean} twinMoved      every run it was compared with changed its own owner on the way
 * @property {string} wrong           what differs, if anything does
 */

export class Plug {
  /** @param {{begin: () => Promise<import("./tile.js").Tile[]>, leave: () => void}} page */
  constructor(page) {
    this.page = page;
    /** @type {Watched[]} */
    this.watched = [];
    this.phase = "off";
    this.victim = "";
    this.victimEpoch = 0;
    this.onVictim = 0;
    this.isDead = false;
    this.stalls = 0;
    this.pulledMs = 0;
    this.timer = 0;
    this.twinWorkers = new Set();
    this.lanes = new Lanes(at("plug-lanes"), { open: (id) => this.#show(id), move: () => {}, drain: () => {}, kill: null });
    at("plug-start").addEventListener("click", () => this.#begin());
    at("plug-pull").addEventListener("click", () => this.#pull());
    at("plug-leave").addEventListener("click", () => this.page.leave());
  }

  /** Offers the show where it can be given: a loopback server without keys. */
  async offer() {
    let cluster;
    try {
      cluster = await api.request("GET", "v1/cluster", undefined, { quiet: true });
    } catch {
      return; // keys, or no server: nothing to offer
    }
    if (!cluster.totals?.may_kill) return;
    at("plug").hidden = false;
    const ready = cluster.workers.filter((/** @type {any} */ one) => one.state === "ready").length;
    /** @type {HTMLButtonElement} */ (at("plug-start")).disabled = ready < 2;
    if (ready < 2) this.timer = window.setTimeout(() => this.phase === "off" && this.offer(), OFFER_AGAIN_MS);
    at("plug-text").textContent =
      ready < 2
        ? "It takes two ready workers; this server has one so far (--workers 2)."
        : "Kill one of this server's worker processes for real, and watch its streams go on at another one, frame for frame.";
  }

  /** The page does something else now. */
  stop() {
    window.clearTimeout(this.timer);
    this.phase = "off";
    for (const one of this.watched) {
      one.label.remove();
      if (one.tile.stream.player) one.tile.stream.player.playout.reserveS = 0;
    }
    this.watched = [];
    at("plug-stage").hidden = at("plug-pull").hidden = at("plug-leave").hidden = at("plug-badge").hidden = true;
    at("plug-start").hidden = false;
    this.offer();
  }

  async #begin() {
    at("plug-start").hidden = true;
    at("plug-leave").hidden = at("plug-stage").hidden = at("plug-pull").hidden = false;
    at("plug-badge").hidden = true;
    this.#allowPull(false);
    this.phase = "starting";
    this.twinWorkers.clear();
    this.#say("Streams are starting…");
    const tiles = await this.page.begin();
    this.watched = tiles.map((tile) => {
      const label = document.createElement("p");
      label.className = "where";
      tile.find(".screen").append(label);
      const one = { tile, label, worker: "", lastMs: 0, longestMs: 0, stallsBefore: 0, indexBefore: 0, count: 0, verified: 0, verifiedAfter: 0, twinMoved: false, wrong: "" };
      tile.stream.addEventListener("chunk", () => this.#arrived(one));
      return one;
    });
    this.#look();
  }

  /** @param {Watched} one */
  #arrived(one) {
    const now = performance.now();
    if (this.phase === "pulled" && nextIndex(one.tile) <= one.indexBefore + COMPARE_AFTER_CHUNKS) one.longestMs = Math.max(one.longestMs, now - Math.max(one.lastMs, 0));
    one.lastMs = now;
    const { player } = one.tile.stream;
    if (player) player.playout.reserveS = RESERVE_S;
  }

  async #look() {
    window.clearTimeout(this.timer);
    if (this.phase === "off") return;
    try {
      const cluster = await api.request("GET", "v1/cluster", undefined, { quiet: true });
      this.lanes.draw(cluster);
      for (const one of this.watched) {
        const row = cluster.session_list?.find((/** @type {any} */ row) => row.id === one.tile.stream.created?.id);
        one.worker = row?.worker ?? "";
        one.label.textContent = row ? `${row.id.slice(0, 4)} · ${row.worker ?? row.state}` : "";
        one.label.dataset.state = row?.state ?? "";
      }
      this.#step(cluster);
    } catch (error) {
      this.#say(wordsFor(error));
    }
    if (this.phase !== "off") this.timer = window.setTimeout(() => this.#look(), LOOK_MS);
  }

  /** @param {any} cluster */
  #step(cluster) {
    if (this.phase === "starting" || this.phase === "ready") {
      const playing = this.watched.filter(({ tile }) => tile.stream.status === Status.PLAYING && nextIndex(tile) >= READY_AFTER_CHUNKS);
      const hand = Math.min(...this.watched.map(({ tile }) => tile.stream.player?.playout.bufferedS ?? 0));
      const ready = cluster.workers.filter((/** @type {any} */ one) => one.state === "ready");
      const isReady = playing.length === this.watched.length && ready.length >= 2 && hand > RESERVE_S * 0.8;
      this.phase = isReady ? "ready" : "starting";
      this.victim = this.#busiest(ready);
      this.victimEpoch = ready.find((/** @type {any} */ one) => one.id === this.victim)?.epoch ?? 0;
      const button = at("plug-pull");
      button.textContent = `Kill worker ${this.victim}`;
      this.#allowPull(isReady);
      this.#say(
        isReady
          ? `${this.watched.length} streams play, each with ${RESERVE_S} s in hand. Kill ${this.victim}: its process gets SIGKILL, as if it had crashed.`
          : `${playing.length} of ${this.watched.length} streams play; putting ${RESERVE_S} s of video in hand…`,
      );
    } else if (this.phase === "pulled" && !this.isDead) {
      // Nothing is claimed before the controller itself has lost it.
      const victim = cluster.workers.find((/** @type {any} */ one) => one.id === this.victim);
      this.isDead = !victim || victim.state === "starting" || victim.epoch !== this.victimEpoch;
      if (this.isDead) this.#say(`${this.victim} is dead, with ${this.onVictim} of these streams on it. They go on elsewhere, from their newest recovery points.`);
      else if (performance.now() - this.pulledMs > DEAD_MS) {
        this.phase = "failed";
        this.#say(`The server did not kill ${this.victim}: it is still there.`);
      }
    } else if (this.phase === "pulled") {
      const back = this.watched.filter((one) => nextIndex(one.tile) >= one.indexBefore + COMPARE_AFTER_CHUNKS);
      this.#facts();
      if (back.length === this.watched.length) this.#compare();
      else if (performance.now() - this.pulledMs > GIVE_UP_MS) {
        this.phase = "failed";
        this.#say(`${this.watched.length - back.length} streams have not come back within a minute. The operations page says why.`);
      }
    }
  }

  /** The worker with the most of our streams. @param {any[]} ready */
  #busiest(ready) {
    const count = (/** @type {string} */ id) => this.watched.filter((one) => one.worker === id).length;
    return ready.map((one) => one.id).sort((a, b) => count(b) - count(a))[0] ?? "";
  }

  async #pull() {
    this.#allowPull(false);
    at("plug-pull").hidden = true;
    this.onVictim = this.watched.filter((one) => one.worker === this.victim).length;
    this.isDead = false;
    for (const one of this.watched) {
      one.stallsBefore = one.tile.stream.player?.playout.stalls ?? 0;
      one.indexBefore = nextIndex(one.tile);
      one.longestMs = 0;
    }
    try {
      await api.request("POST", `v1/admin/workers/${encodeURIComponent(this.victim)}/kill`, undefined, { quiet: true });
    } catch (error) {
      this.phase = "failed";
      this.#say(`It was not killed: ${wordsFor(error)}`);
      return;
    }
    this.phase = "pulled";
    this.pulledMs = performance.now();
    this.#say(`${this.victim} gets SIGKILL…`);
  }

  /** Every stream against an undisturbed run of itself; what is watched has nearer deadlines and goes first. */
  async #compare() {
    this.phase = "comparing";
    for (const one of this.watched) one.count = nextIndex(one.tile);
    const total = this.watched.reduce((sum, one) => sum + one.count, 0);
    try {
      this.#say("All streams play again. Now each is made a second time, undisturbed, and held against what you saw.");
      await Promise.all(this.watched.map((one) => this.#compareOne(one, total)));
      if (this.phase !== "comparing") return;
      this.phase = "done";
      this.#verdict();
    } catch (error) {
      this.phase = "done";
      this.#say(`The comparison ended early, after ${this.#verified()} equal chunks: ${/** @type {Error} */ (error).message}`);
    }
  }

  /** @param {Watched} one @param {number} total */
  async #compareOne(one, total) {
    const { stream } = one.tile;
    const card = await api.readCard(/** @type {any} */ (stream.created).id);
    if (card.steps.length > 1) {
      one.wrong = "was made with fewer steps at times, which an undisturbed run would not repeat";
      return;
    }
    for (let attempt = 1; attempt <= TWIN_TRIES; attempt += 1) {
      one.verified = one.verifiedAfter = 0;
      const twin = await runTwin(card, one.count, (index, digest) => {
        if (this.phase === "off") return false;
        if (stream.digests.get(index) !== digest) {
          one.wrong = `differs from chunk ${index} on`;
          return false;
        }
        one.verified += 1;
        if (index >= one.indexBefore) one.verifiedAfter += 1;
        this.#badge(total);
        return true;
      }, TWIN_REST_MS);
      this.twinWorkers.add(twin.worker);
      one.twinMoved = twin.disturbed;
      if (!twin.disturbed || one.wrong || this.phase === "off") return;
    }
  }

  #verified() {
    return this.watched.reduce((sum, one) => sum + one.verified, 0);
  }

  /** @param {number} total */
  #badge(total) {
    const badge = at("plug-badge");
    const wrong = this.watched.some((one) => one.wrong);
    badge.hidden = false;
    badge.dataset.wrong = String(wrong);
    badge.dataset.verified = String(this.#verified());
    badge.textContent = `${wrong ? "✕" : "✓"} ${this.#verified()} of ${total} chunks identical to an undisturbed run`;
    this.#facts();
  }

  #verdict() {
    const wrong = this.watched.filter((one) => one.wrong);
    const moved = this.watched.filter((one) => one.twinMoved);
    const badge = at("plug-badge");
    const after = this.watched.reduce((sum, one) => sum + one.verifiedAfter, 0);
    badge.hidden = false;
    badge.dataset.wrong = String(wrong.length > 0);
    badge.dataset.done = "true";
    badge.textContent = wrong.length
      ? `✕ ${wrong.map((one) => `stream ${one.tile.stream.created?.id.slice(0, 4)} ${one.wrong}`).join("; ")}`
      : `✓ ${this.#verified()} chunks verified identical to ${moved.length ? "a second" : "an undisturbed"} run`;
    this.#facts();
    const names = moved.map((one) => one.tile.stream.created?.id.slice(0, 4)).join(", ");
    const aside = moved.length ? ` The scheduler moved the second run of ${names} between workers, each time it was made.` : " None of these was moved or interrupted.";
    this.#say(
      `What was compared: the SHA-256 chain over every frame of these streams, ${this.#verified()} chunks of which ${after} were made after the kill, against second sessions with the same seed, steps and words from the same chunks, made on ${[...this.twinWorkers].join(" and ")}.${aside}`,
    );
  }

  #facts() {
    // Until all were back: the second runs after that are load of our own making.
    if (this.phase === "pulled") this.stalls = this.watched.reduce((sum, one) => sum + (one.tile.stream.player?.playout.stalls ?? 0) - one.stallsBefore, 0);
    const { stalls } = this;
    const longest = Math.max(0, ...this.watched.map((one) => one.longestMs));
    at("plug-facts").dataset.stalls = String(stalls);
    at("plug-facts").replaceChildren(
      pair("pictures stood still till all were back", stalls === 0 ? "none" : String(stalls)),
      pair("longest wait for a chunk", `${(longest / 1000).toFixed(2)} s`),
      pair("streams playing", `${this.watched.filter(({ tile }) => tile.stream.status === Status.PLAYING).length} of ${this.watched.length}`),
      pair("chunks compared and equal", String(this.#verified())),
    );
  }

  /** @param {boolean} allowed */
  #allowPull(allowed) {
    /** @type {HTMLButtonElement} */ (at("plug-pull")).disabled = !allowed;
  }

  /** @param {string} text */
  #say(text) {
    const place = at("plug-text");
    if (place.textContent !== text) place.textContent = text;
    at("plug").dataset.phase = this.phase;
  }

  /** @param {string} id */
  #show(id) {
    const tile = this.watched.find((one) => one.tile.stream.created?.id === id)?.tile;
    tile?.element.focus();
    tile?.element.scrollIntoView({ block: "nearest" });
  }
}

/** @param {import("./tile.js").Tile} tile */
const nextIndex = (tile) => tile.stream.connection?.nextIndex ?? 0;
