/**
 * One canvas that plays one stream: takes encoded chunks, decodes them, and shows each frame when the
 * playout clock says so.
 */

import { H264Decoder, JpegDecoder } from "./decoder.js";
import { Playout } from "./playout.js";
import { splitUnits } from "./protocol.js";

const HIDDEN_TICK_MS = 250;

/**
 * @typedef {Object} PlayerEvents
 * @property {(frame: {index: number, position: number, version: number}) => void} shown
 * @property {(onTime: boolean, header: import("./protocol.js").ChunkHeader) => void} arrived
 * @property {(error: Error, inARow: number) => void} broken
 */

export class Player {
  /**
   * @param {HTMLCanvasElement} canvas
   * @param {{width: number, height: number, fps: number}} video
   * @param {PlayerEvents} events
   */
  constructor(canvas, video, events) {
    this.canvas = canvas;
    this.events = events;
    canvas.width = video.width;
    canvas.height = video.height;
    this.context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d", { alpha: false }));
    /** @type {Playout<import("./decoder.js").Frame>} */
    this.playout = new Playout(video.fps);
    /** @type {H264Decoder|JpegDecoder|null} */
    this.decoder = null;
    this.format = "";
    this.failuresInARow = 0;
    /** @type {Map<number, import("./protocol.js").ChunkHeader>} chunks whose first frame is still being decoded */
    this.arriving = new Map();
    this.closed = false;
    this.hiddenTimer = window.setInterval(() => document.hidden && this.#tick(), HIDDEN_TICK_MS);
    const loop = () => {
      if (this.closed) return;
      this.#tick();
      requestAnimationFrame(loop);
    };
    requestAnimationFrame(loop);
  }

  /** @param {import("./protocol.js").ChunkHeader} header @param {ArrayBuffer} payload */
  take(header, payload) {
    if (header.format !== this.format) this.#useFormat(header.format);
    this.arriving.set(header.index, header);
    if (this.arriving.size > 16) this.arriving.delete(/** @type {number} */ (this.arriving.keys().next().value));
    try {
      this.decoder?.decode(header, splitUnits(payload));
    } catch (error) {
      this.#failed(/** @type {Error} */ (error)); // a payload that is cut off
    }
  }

  hold() {
    this.playout.hold(now());
  }

  release() {
    this.playout.release(now());
  }

  /** The server starts its pace anew after an attach. */
  restart() {
    this.playout.restart();
  }

  close() {
    this.closed = true;
    window.clearInterval(this.hiddenTimer);
    this.decoder?.close();
    for (const { frame } of this.playout.queue) frame.image.close();
    this.playout.queue = [];
  }

  /** @param {string} format */
  #useFormat(format) {
    this.decoder?.close();
    this.format = format;
    const Decoder = format === "h264" ? H264Decoder : JpegDecoder;
    this.decoder = new Decoder(
      (frame) => this.#decoded(frame),
      (error) => this.#failed(error),
    );
  }

  /** @param {Error} error */
  #failed(error) {
    this.failuresInARow += 1;
    this.events.broken(error, this.failuresInARow);
  }

  /** @param {import("./decoder.js").Frame} frame */
  #decoded(frame) {
    this.failuresInARow = 0;
    const header = this.arriving.get(frame.index);
    if (header) {
      this.arriving.delete(frame.index);
      this.events.arrived(this.playout.chunkArrives(now()), header);
    }
    this.playout.push(frame);
    if (frame.index === 0 && frame.position === 0) this.#tick(); // the first picture waits for no display frame
  }

  #tick() {
    const { show, skipped } = this.playout.tick(now());
    for (const frame of skipped) {
      frame.image.close();
      this.events.shown(frame);
    }
    if (!show) return;
    this.context.drawImage(show.image, 0, 0, this.canvas.width, this.canvas.height);
    show.image.close();
    this.events.shown(show);
  }
}

const now = () => performance.now() / 1000;
