/**
 * One stream as the page holds it: opened over HTTP, watched over a socket, steered by prompts.
 * Knows nothing of the DOM but the canvas it plays on; tells its tile by "change" events.
 */

import * as api from "./api.js";
import { Connection } from "./connection.js";
import { Figures } from "./figures.js";
import { Player } from "./player.js";
import { newEventId, preferredFormat } from "./protocol.js";
import { Recording } from "./recording.js";

/** What the viewer sees of a stream's life. */
export const Status = Object.freeze({
  OPENING: "opening",
  WAITING: "waiting",
  QUEUED: "queued",
  LOADING: "loading",
  PLAYING: "playing",
  PAUSED: "paused",
  RECONNECTING: "reconnecting",
  ENDED: "ended",
  FAILED: "failed",
});

/**
 * @typedef {Object} PromptEntry
 * @property {string} text
 * @property {string[]} ignored
 * @property {boolean} random              no word was known: the model made a scene of its own
 * @property {string} eventId
 * @property {number|null} version         null until the server accepted it
 * @property {number|null} fromIndex       the first chunk it holds for
 * @property {number|null} shownIndex      the chunk at which it came onto the screen
 * @property {number} sentMs
 */

const OPEN_TRIES = 6;
const DIGESTS_KEPT = 2000;
const RETRY_AFTER_MAX_S = 30;

let counter = 0;

export class Stream extends EventTarget {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {string} prompt
   * @param {{seed?: number, choices?: Record<string, string>, quiet?: boolean}} [options]   choices: more fields of the
   *   new session; quiet: errors and key questions stay out of sight
   */
  constructor(canvas, prompt, options = {}) {
    super();
    this.canvas = canvas;
    this.number = (counter += 1);
    this.options = options;
    /** @type {string} */
    this.status = Status.OPENING;
    /** @type {{code: string, message: string, hint: string, retryAfterS: number|null}|null} */
    this.error = null;
    /** @type {import("./protocol.js").Created|null} */
    this.created = null;
    /** @type {Connection|null} */
    this.connection = null;
    /** @type {Player|null} */
    this.player = null;
    /** @type {Recording|null} */
    this.recording = null;
    this.figures = new Figures(12);
    this.queuePosition = /** @type {number|null} */ (null);
    this.wantPaused = false;
    this.autoPaused = false;
    this.serverState = "";
    this.serverReason = "";
    this.shownIndex = -1;
    this.shownVersion = /** @type {number|null} */ (null);
    this.endReason = "";
    /** @type {any} the server's last word of trouble; says why, when the stream fails after it */
    this.lastRefusal = null;
    /** @type {any} */
    this.card = null;
    this.gone = false;
    /** @type {Map<number, string>} digest of the chain by chunk, the newest DIGESTS_KEPT */
    this.digests = new Map();
    /** @type {PromptEntry[]} */
    this.prompts = [newEntry(prompt)];
    /** @type {PromptEntry|null} newest prompt not sent yet, because the socket is down */
    this.unsent = null;
    this.startedMs = performance.now();
    this.#open(prompt);
  }

  get isOver() {
    return this.status === Status.ENDED || this.status === Status.FAILED;
  }

  /** The prompt that the picture on the screen follows. */
  get currentPrompt() {
    const shown = this.prompts.filter((entry) => entry.shownIndex !== null);
    return shown[shown.length - 1] ?? this.prompts[0];
  }

  /** The newest prompt that is on its way but not on the screen. @returns {PromptEntry|null} */
  get comingPrompt() {
    const last = this.prompts[this.prompts.length - 1];
    return last.shownIndex === null && this.prompts.length > 1 ? last : null;
  }

  /** @param {string} text */
  steer(text) {
    const entry = newEntry(text);
    // Only the newest words wait for the socket to come back.
    if (this.unsent) this.prompts = this.prompts.filter((candidate) => candidate !== this.unsent);
    this.prompts.push(entry);
    this.unsent = entry;
    this.#sendUnsent();
    this.#changed();
  }

  /** @param {{auto?: boolean}} [options]  auto: nobody is looking */
  pause(options = {}) {
    if (this.isOver || this.wantPaused) return;
    this.wantPaused = true;
    this.autoPaused = options.auto ?? false;
    this.player?.hold();
    this.connection?.send({ type: "pause" });
    this.#settle();
  }

  resume() {
    if (this.isOver || !this.wantPaused) return;
    this.wantPaused = false;
    this.autoPaused = false;
    this.player?.release();
    this.connection?.send({ type: "resume" });
    this.#settle();
  }

  /** Ends the stream; what was made stays on the tile and can be saved. */
  stop() {
    if (this.isOver) return;
    if (!this.connection?.send({ type: "stop" })) {
      if (this.created) api.endSession(this.created.id).catch(() => {});
      this.#ended("stopped");
    }
  }

  /** The tile goes away: nothing of the stream stays, here or on the server. */
  dispose() {
    this.gone = true;
    if (this.created && !this.isOver) api.endSession(this.created.id).catch(() => {});
    this.connection?.leave();
    this.player?.close();
  }

  /** Come back to a stream whose connection was given up. */
  reconnect() {
    if (!this.created || !this.connection) return;
    const old = this.connection;
    this.error = null;
    this.status = Status.RECONNECTING;
    if (!this.wantPaused) this.player?.release();
    this.#connect(old.tokens[old.tokens.length - 1], old);
  }

  /** What `turboserve replay` takes. @returns {Promise<object>} */
  async readCard() {
    if (this.card) return this.card;
    if (!this.created) throw new api.ApiError(404, { code: "not_found" });
    return api.readCard(this.created.id);
  }

  /** @param {string} prompt */
  async #open(prompt) {
    const created = await this.#create(prompt);
    if (!created) return;
    this.created = created;
    if (this.gone) {
      api.endSession(created.id).catch(() => {});
      return;
    }
    const first = this.prompts[0];
    first.ignored = created.ignored_words ?? [];
    first.random = isRandomScene(prompt, first.ignored, created);
    first.fromIndex = 0;
    const video = { width: created.width, height: created.height, fps: created.fps * (created.playback_rate ?? 1) };
    this.figures.fps = video.fps;
    this.recording = new Recording({ ...video, fps: created.fps });
    this.player = new Player(this.canvas, video, {
      shown: (frame) => this.#shown(frame),
      arrived: (onTime, header) => {
        this.figures.arrived(onTime);
        this.dispatchEvent(new CustomEvent("chunk", { detail: { header, onTime } }));
      },
      broken: (error, inARow) => this.#broken(error, inARow),
    });
    if (this.wantPaused) this.player.hold();
    this.queuePosition = created.queue_position ?? null;
    this.dispatchEvent(new Event("opened"));
    this.#connect(created.token, null);
  }

  /**
   * Asks for the session, and asks again when the server says that there will be room soon.
   * @param {string} prompt
   * @returns {Promise<import("./protocol.js").Created|null>}
   */
  async #create(prompt) {
    const seed = this.options.seed === undefined ? {} : { seed: this.options.seed };
    const wish = { prompt, format: preferredFormat(), ...seed, ...this.options.choices };
    for (let attempt = 1; !this.gone; attempt += 1) {
      try {
        const created = await api.createSession(wish, { quiet: this.options.quiet });
        this.error = null;
        return created;
      } catch (error) {
        const waitS = error instanceof api.ApiError ? error.retryAfterS : null;
        if (this.options.quiet || waitS === null || waitS > RETRY_AFTER_MAX_S || attempt >= OPEN_TRIES) {
          this.#failedWith(error);
          return null;
        }
        this.error = known(error);
        this.status = Status.WAITING;
        this.#changed();
        await new Promise((resolve) => window.setTimeout(resolve, waitS * 1000));
      }
    }
    return null;
  }

  /** @param {string} token @param {Connection|null} before  where it left off */
  #connect(token, before) {
    const { id } = /** @type {import("./protocol.js").Created} */ (this.created);
    const connection = new Connection(api.streamUrl(id), token, before?.format ?? preferredFormat(), {
      attached: (_message, again) => this.#attached(again),
      message: (message) => this.#heard(message),
      chunk: (header, payload) => this.#chunk(header, payload),
      lost: () => this.#settle(),
      closed: (code, reason) => this.#closed(code, reason),
    });
    if (before) {
      connection.wasAttached = true;
      connection.nextIndex = before.nextIndex;
      connection.digest = before.digest;
      connection.reconnects = before.reconnects;
      connection.chainHolds = before.chainHolds;
    }
    this.connection = connection;
    this.#settle();
  }

  /** @param {boolean} again */
  #attached(again) {
    if (again) {
      this.player?.restart();
      this.dispatchEvent(new CustomEvent("returned", { detail: { index: this.connection?.nextIndex ?? 0 } }));
    }
    // What the viewer asked for while the socket was down still holds.
    if (this.wantPaused) this.connection?.send({ type: "pause" });
    else if (again && this.serverState === "idle") this.connection?.send({ type: "resume" });
    // Words whose answer was lost are said again; the server knows them by their event id.
    if (again) this.unsent ??= this.prompts.findLast((entry) => entry.version === null && entry.shownIndex === null) ?? null;
    this.#sendUnsent();
    this.#settle();
  }

  /** @param {any} message */
  #heard(message) {
    const entry = this.prompts.find((candidate) => candidate.eventId === message.event_id);
    if (message.type === "state") {
      this.queuePosition = message.state === "queued" ? (message.queue_position ?? this.queuePosition) : null;
      this.serverState = message.state;
      this.serverReason = message.reason ?? "";
      this.#settle();
    } else if (message.type === "prompt_accepted" && entry) {
      entry.version = message.prompt_version;
      entry.fromIndex = message.from_index;
      entry.ignored = message.ignored_words ?? [];
      entry.random = isRandomScene(entry.text, entry.ignored, message);
      this.#changed();
    } else if (message.type === "prompt_superseded" && entry) {
      this.prompts = this.prompts.filter((candidate) => candidate !== entry);
      this.#changed();
    } else if (message.type === "error") {
      this.#refused(message);
    } else if (message.type === "end") {
      this.#ended(message.reason ?? "");
    }
  }

  /** @param {import("./protocol.js").ChunkHeader} header @param {ArrayBuffer} payload */
  #chunk(header, payload) {
    this.figures.received(header);
    this.digests.set(header.index, header.digest);
    if (this.digests.size > DIGESTS_KEPT) this.digests.delete(/** @type {number} */ (this.digests.keys().next().value));
    this.recording?.add(header, payload);
    this.player?.take(header, payload);
  }

  /** @param {{index: number, position: number, version: number}} frame */
  #shown(frame) {
    const now = performance.now();
    this.figures.shown(now / 1000);
    if (this.figures.firstPixelMs === null) this.figures.firstPixelMs = now - this.startedMs;
    if (this.shownVersion !== frame.version) this.#versionShown(frame, now);
    if (frame.index !== this.shownIndex) {
      this.shownIndex = frame.index;
      this.dispatchEvent(new CustomEvent("playing", { detail: { index: frame.index } }));
    }
    if (this.status === Status.LOADING) this.#settle();
  }

  /** @param {{index: number, version: number}} frame @param {number} nowMs */
  #versionShown(frame, nowMs) {
    const isFirst = this.shownVersion === null;
    this.shownVersion = frame.version;
    const entry = isFirst
      ? this.prompts[0]
      : (this.prompts.find((candidate) => candidate.version === frame.version) ??
        this.prompts.find((candidate) => candidate.version === null && candidate !== this.unsent));
    if (!entry) return;
    entry.version = frame.version;
    entry.shownIndex = frame.index;
    if (!isFirst) {
      this.figures.steerMs = nowMs - entry.sentMs;
      this.dispatchEvent(new CustomEvent("steered", { detail: { entry, index: frame.index } }));
    }
    this.#changed();
  }

  #sendUnsent() {
    const entry = this.unsent;
    if (entry && this.connection?.send({ type: "prompt", text: entry.text, event_id: entry.eventId })) this.unsent = null;
  }

  /** A command was refused; the stream itself goes on. @param {any} message */
  #refused(message) {
    if (message.code === "event_id_conflict") return; // said twice, accepted once
    this.lastRefusal = message;
    const last = this.comingPrompt;
    if (last && last.version === null && (!message.event_id || message.event_id === last.eventId)) {
      this.prompts = this.prompts.filter((candidate) => candidate !== last);
      this.#changed();
    }
    this.dispatchEvent(new CustomEvent("refused", { detail: message }));
  }

  /** @param {Error} error @param {number} inARow */
  #broken(error, inARow) {
    console.warn("a frame could not be decoded", error);
    if (inARow === 3 && this.connection && this.connection.format === "h264") this.connection.switchFormat("jpeg");
    else if (inARow > 24) this.#failedWith(new api.ApiError(0, { code: "decode", message: error.message }));
  }

  /** @param {string} code @param {string} reason */
  #closed(code, reason) {
    if (this.isOver) return;
    if (code === "ended") this.#ended(reason);
    else if (code === "session_failed" && this.lastRefusal) this.#failedWith(new api.ApiError(0, this.lastRefusal));
    else this.#failedWith(new api.ApiError(0, { code, message: reason }));
  }

  /** @param {string} reason */
  #ended(reason) {
    if (this.isOver) return;
    this.endReason = reason;
    this.status = Status.ENDED;
    this.readCard().then((card) => (this.card = card), () => {});
    this.connection?.leave();
    this.#changed();
  }

  /** @param {unknown} error */
  #failedWith(error) {
    this.error = known(error);
    this.status = Status.FAILED;
    this.player?.hold();
    this.#changed();
  }

  /** Works out the status from what is known. */
  #settle() {
    if (this.isOver || this.gone) return;
    const connection = this.connection;
    if (!connection) this.status = Status.OPENING;
    else if (!connection.isAttached && connection.wasAttached) this.status = Status.RECONNECTING;
    else if (this.wantPaused) this.status = Status.PAUSED;
    else if (this.queuePosition !== null) this.status = Status.QUEUED;
    else if (this.shownIndex < 0) this.status = Status.LOADING;
    else this.status = Status.PLAYING;
    this.#changed();
  }

  #changed() {
    if (!this.gone) this.dispatchEvent(new Event("change"));
  }
}

/** @param {unknown} error */
function known(error) {
  const { code, message, hint, retryAfterS } =
    error instanceof api.ApiError ? error : new api.ApiError(0, { code: "internal", message: String(error) });
  return { code, message, hint, retryAfterS };
}

/** @param {string} text @returns {PromptEntry} */
function newEntry(text) {
  return {
    text,
    ignored: [],
    random: false,
    eventId: newEventId(),
    version: null,
    fromIndex: null,
    shownIndex: null,
    sentMs: performance.now(),
  };
}

const SMALL_WORDS = new Set(["a", "an", "the", "and", "on", "over", "in", "of", "with", "at", "to", "is", "are"]);

/**
 * Whether nothing in the prompt said anything to the model. The server may say so itself; else: every
 * word that carries meaning was ignored.
 * @param {string} prompt @param {string[]} ignored @param {any} answer
 */
function isRandomScene(prompt, ignored, answer) {
  if (typeof answer.random_scene === "boolean") return answer.random_scene;
  if (!ignored.length) return false;
  const unknown = new Set(ignored.map((word) => word.toLowerCase()));
  const words = prompt.toLowerCase().match(/[\p{L}\p{N}']+/gu) ?? [];
  return words.every((word) => unknown.has(word) || SMALL_WORDS.has(word));
}
