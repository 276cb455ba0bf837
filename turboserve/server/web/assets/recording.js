/**
 * The stream so far, as it came over the wire, for "Download". Kept encoded: a 96x96 stream is a few
 * megabytes an hour. Past the limit the oldest chunks go first, so what is left is the latest part.
 */

import { writeFilm } from "./mp4.js";
import { splitUnits } from "./protocol.js";

const LIMIT_BYTES = 192 * 1024 * 1024;

export class Recording {
  /** @param {{width: number, height: number, fps: number}} video */
  constructor(video) {
    this.video = video;
    /** @type {{index: number, format: "h264"|"jpeg", payload: ArrayBuffer}[]} */
    this.chunks = [];
    this.bytes = 0;
    this.dropped = 0;
  }

  /** @param {import("./protocol.js").ChunkHeader} header @param {ArrayBuffer} payload */
  add(header, payload) {
    // One file has one codec: a change of format (the decoder gave up) starts the recording again.
    if (this.chunks.length && this.chunks[0].format !== header.format) {
      this.dropped += this.chunks.length;
      this.chunks = [];
      this.bytes = 0;
    }
    this.chunks.push({ index: header.index, format: header.format, payload });
    this.bytes += payload.byteLength;
    while (this.bytes > LIMIT_BYTES && this.chunks.length > 1) {
      this.bytes -= /** @type {any} */ (this.chunks.shift()).payload.byteLength;
      this.dropped += 1;
    }
  }

  get isEmpty() {
    return this.chunks.length === 0;
  }

  /** @returns {{blob: Blob, extension: string}} */
  film() {
    const format = this.chunks[0].format;
    const frames = this.chunks.flatMap(({ payload }) =>
      splitUnits(payload).map((data, position) => ({ data, key: format === "jpeg" || position === 0 })),
    );
    return { blob: writeFilm({ ...this.video, format, frames }), extension: format === "h264" ? "mp4" : "mov" };
  }
}

/** @param {Blob} blob @param {string} name */
export function saveAs(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  window.setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
