/**
 * The wire, as the page sees it: message shapes, close codes, and the framing of binary payloads.
 * Pure functions and constants; no socket is opened here.
 *
 * @typedef {Object} Created            answer of POST v1/sessions
 * @property {string} id
 * @property {string} token
 * @property {string} state
 * @property {string} model
 * @property {number} seed
 * @property {number} fps
 * @property {number} width
 * @property {number} height
 * @property {{first: number, rest: number}} chunk_frames
 * @property {string[]} [ignored_words]
 * @property {number} [queue_position]
 * @property {number} [playback_rate]   below 1 when the server was told to make video slower than real time
 *
 * @typedef {Object} ChunkHeader        precedes every binary message
 * @property {number} index
 * @property {number} epoch
 * @property {number} frames
 * @property {number} prompt_version
 * @property {number} steps
 * @property {string} digest
 * @property {string} digest_prev
 * @property {number} latency_ms
 * @property {number} bytes
 * @property {"h264"|"jpeg"} format
 * @property {number} [batch_size]
 * @property {boolean} [init]
 */

/** What a closed socket means for the viewer: come back at once, come back later, or not at all. */
export const AfterClose = Object.freeze({ RETRY: "retry", LATER: "later", FINISHED: "finished", FAILED: "failed" });

/** @type {Record<number, {then: string, code: string}>} */
const CLOSES = {
  1000: { then: AfterClose.FINISHED, code: "ended" },
  1001: { then: AfterClose.RETRY, code: "going_away" },
  1006: { then: AfterClose.RETRY, code: "connection_lost" },
  1012: { then: AfterClose.RETRY, code: "going_away" },
  1013: { then: AfterClose.LATER, code: "overloaded" },
  1009: { then: AfterClose.FAILED, code: "message_too_big" },
  4400: { then: AfterClose.FAILED, code: "bad_messages" },
  4401: { then: AfterClose.FAILED, code: "token_refused" },
  4403: { then: AfterClose.FAILED, code: "forbidden" },
  4404: { then: AfterClose.FAILED, code: "session_unknown" },
  4409: { then: AfterClose.FAILED, code: "attached_elsewhere" },
  4410: { then: AfterClose.FAILED, code: "session_expired" },
  4413: { then: AfterClose.RETRY, code: "too_slow" },
  4429: { then: AfterClose.LATER, code: "flood" },
  4500: { then: AfterClose.FAILED, code: "session_failed" },
};

/**
 * @param {number} closeCode
 * @returns {{then: string, code: string}} codes we do not know are treated as a lost connection
 */
export function meaningOfClose(closeCode) {
  return CLOSES[closeCode] ?? { then: AfterClose.RETRY, code: "connection_lost" };
}

/**
 * Splits a binary payload into its frames: each a little-endian u32 length and that many bytes.
 * @param {ArrayBuffer} payload
 * @returns {Uint8Array[]}
 */
export function splitUnits(payload) {
  const view = new DataView(payload);
  const units = [];
  let at = 0;
  while (at < payload.byteLength) {
    if (at + 4 > payload.byteLength) throw new RangeError("payload ends inside a length field");
    const length = view.getUint32(at, true);
    at += 4;
    if (at + length > payload.byteLength) throw new RangeError("payload ends inside a frame");
    units.push(new Uint8Array(payload, at, length));
    at += length;
  }
  return units;
}

/**
 * The NAL units of one Annex B access unit, start codes removed.
 * @param {Uint8Array} unit
 * @returns {Uint8Array[]}
 */
export function nalUnits(unit) {
  /** @type {number[]} */
  const starts = [];
  for (let i = 0; i + 2 < unit.length; i += 1) {
    if (unit[i] === 0 && unit[i + 1] === 0 && unit[i + 2] === 1) {
      starts.push(i + 3);
      i += 2;
    }
  }
  return starts.map((start, n) => {
    let end = n + 1 < starts.length ? starts[n + 1] - 3 : unit.length;
    while (end > start && unit[end - 1] === 0) end -= 1; // trailing zeros belong to the next start code
    return unit.subarray(start, end);
  });
}

export const NAL_SPS = 7;
export const NAL_PPS = 8;

/** @param {Uint8Array} nal */
export const nalType = (nal) => nal[0] & 0x1f;

/**
 * The codec string that an H.264 sequence parameter set declares, e.g. "avc1.42C01E".
 * @param {Uint8Array} sps
 */
export function codecOfSps(sps) {
  const hex = (/** @type {number} */ byte) => byte.toString(16).padStart(2, "0").toUpperCase();
  return `avc1.${hex(sps[1])}${hex(sps[2])}${hex(sps[3])}`;
}

/** Whether this browser, on this origin, can take H.264 access units; JPEG works everywhere. */
export function preferredFormat() {
  const forced = new URLSearchParams(location.search).get("format");
  if (forced === "jpeg" || forced === "h264") return forced;
  return window.isSecureContext && "VideoDecoder" in window ? "h264" : "jpeg";
}

/** An identifier for one command, so that its answer can be matched. */
export function newEventId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
