/**
 * One viewer's socket. Attaches by token, pairs each chunk header with its binary message, acks what
 * arrived, and when the socket drops attaches again at exactly the next index.
 */

import { AfterClose, meaningOfClose } from "./protocol.js";

const RETRY_DELAYS_MS = [0, 150, 400, 1000, 2000, 4000, 5000];
const GIVE_UP_AFTER_MS = 120_000;
const ATTACH_TIMEOUT_MS = 8000;
const SILENCE_PING_MS = 10_000;
const SILENCE_DEAD_MS = 20_000;

/**
 * @typedef {Object} Handlers
 * @property {(message: any, again: boolean) => void} attached   again: after a dropped connection
 * @property {(message: any) => void} message                    every other JSON message
 * @property {(header: import("./protocol.js").ChunkHeader, payload: ArrayBuffer) => void} chunk
 * @property {(attempt: number) => void} lost                    trying to come back
 * @property {(code: string, reason: string) => void} closed     for good
 */

export class Connection {
  /**
   * @param {string} url
   * @param {string} token
   * @param {string} format
   * @param {Handlers} handlers
   */
  constructor(url, token, format, handlers) {
    this.url = url;
    this.format = format;
    this.handlers = handlers;
    this.nextIndex = 0;
    this.isAttached = false;
    this.reconnects = 0;
    this.chainHolds = true;
    /** @type {string|null} digest of the newest chunk received */
    this.digest = null;
    // The previous token stays valid until the first ack under the new one, so both are kept.
    this.tokens = [token];
    /** @type {WebSocket|null} */
    this.socket = null;
    this.finished = false;
    this.attempt = 0;
    this.wasAttached = false;
    /** @type {any} */
    this.header = null;
    this.lastHeardMs = 0;
    this.lostAtMs = 0;
    this.retryTimer = 0;
    this.watchTimer = window.setInterval(() => this.#watch(), 2500);
    this.retryNow = () => {
      if (this.retryTimer) this.#dial();
    };
    window.addEventListener("online", this.retryNow);
    this.#dial();
  }

  /** @param {object} message @returns {boolean} whether it went out */
  send(message) {
    if (!this.isAttached || this.socket?.readyState !== WebSocket.OPEN) return false;
    this.socket.send(JSON.stringify(message));
    return true;
  }

  /** Attach again in another format, from the same index. @param {string} format */
  switchFormat(format) {
    this.format = format;
    this.socket?.close(4000, "other format");
  }

  /** Leave for good. The session itself is not ended by this. */
  leave() {
    this.#finish();
    this.socket?.close(1000);
  }

  #dial() {
    window.clearTimeout(this.retryTimer);
    this.retryTimer = 0;
    const socket = new WebSocket(this.url);
    socket.binaryType = "arraybuffer";
    this.socket = socket;
    this.header = null;
    const tooLong = window.setTimeout(() => socket.close(4000, "no answer to attach"), ATTACH_TIMEOUT_MS);
    socket.onopen = () => {
      this.lastHeardMs = performance.now();
      const token = this.tokens[this.tokens.length - 1];
      socket.send(JSON.stringify({ type: "attach", token, next_index: this.nextIndex, format: this.format, pace: "live" }));
    };
    socket.onmessage = (event) => {
      if (this.socket !== socket) return;
      this.lastHeardMs = performance.now();
      if (typeof event.data === "string") this.#hear(JSON.parse(event.data), tooLong);
      else this.#take(event.data);
    };
    socket.onclose = (event) => {
      window.clearTimeout(tooLong);
      if (this.socket === socket) this.#dropped(event);
    };
  }

  /** @param {any} message @param {number} attachTimer */
  #hear(message, attachTimer) {
    if (message.type === "attached") {
      window.clearTimeout(attachTimer);
      this.isAttached = true;
      this.attempt = 0;
      this.tokens = [this.tokens[this.tokens.length - 1], message.token];
      const again = this.wasAttached;
      this.wasAttached = true;
      if (again) this.reconnects += 1;
      this.handlers.attached(message, again);
    } else if (message.type === "chunk") {
      this.header = message;
    } else if (message.type === "error" && !this.isAttached && this.nextIndex > 0) {
      // The attach itself was refused: asking the same again would not help.
      window.clearTimeout(attachTimer);
      this.#finish();
      this.socket?.close(1000);
      this.handlers.closed(message.code, message.message);
    } else {
      this.handlers.message(message);
    }
  }

  /** @param {ArrayBuffer} payload */
  #take(payload) {
    const header = this.header;
    this.header = null;
    if (!header || header.init) return;
    if (header.index > this.nextIndex) {
      // A gap cannot be repaired here; the server still holds what is missing.
      this.socket?.close(4000, "gap");
      return;
    }
    if (header.index === this.nextIndex) {
      if (this.digest !== null && (header.digest_prev ?? "") !== this.digest) this.chainHolds = false;
      this.digest = header.digest;
      this.nextIndex = header.index + 1;
      this.handlers.chunk(header, payload);
    }
    this.send({ type: "ack", index: header.index });
    this.tokens = this.tokens.slice(-1);
  }

  /** @param {CloseEvent} event */
  #dropped(event) {
    const attached = this.isAttached;
    this.isAttached = false;
    if (this.finished) return;
    const { then, code } = meaningOfClose(event.code);
    if (event.code === 4401 && this.tokens.length > 1) {
      this.tokens.pop(); // the newer token never reached its first ack: the older one still counts
    } else if (then === AfterClose.FINISHED || then === AfterClose.FAILED) {
      this.#finish();
      this.handlers.closed(code, event.reason);
      return;
    }
    const now = performance.now();
    if (attached || this.attempt === 0) this.lostAtMs = now;
    if (now - this.lostAtMs > GIVE_UP_AFTER_MS) {
      this.#finish();
      this.handlers.closed("connection_lost", event.reason);
      return;
    }
    const base = then === AfterClose.LATER ? 5000 : RETRY_DELAYS_MS[Math.min(this.attempt, RETRY_DELAYS_MS.length - 1)];
    this.attempt += 1;
    this.handlers.lost(this.attempt);
    this.retryTimer = window.setTimeout(() => this.#dial(), base * (0.8 + 0.4 * Math.random()));
  }

  #watch() {
    const silentMs = performance.now() - this.lastHeardMs;
    if (!this.isAttached || silentMs < SILENCE_PING_MS) return;
    if (silentMs < SILENCE_DEAD_MS) {
      this.send({ type: "ping" });
      return;
    }
    // A dead network can hold the closing handshake up for minutes: this socket is left behind, not waited for.
    const dead = this.socket;
    this.socket = null;
    dead?.close(4000, "silence");
    this.#dropped(new CloseEvent("close", { code: 1006 }));
  }

  #finish() {
    this.finished = true;
    this.isAttached = false;
    window.clearInterval(this.watchTimer);
    window.clearTimeout(this.retryTimer);
    this.retryTimer = 0;
    window.removeEventListener("online", this.retryNow);
  }
}
