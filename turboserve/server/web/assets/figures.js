/** What one viewer can measure about one stream: rates, latencies, how often the picture stood still. */

const RECENT = 60;

export class Figures {
  /** @param {number} fps  the stream's own rate */
  constructor(fps) {
    this.fps = fps;
    /** @type {number[]} wall seconds of recently shown frames */
    this.shownAt = [];
    /** @type {number[]} */
    this.latenciesMs = [];
    this.batchSize = /** @type {number|null} */ (null);
    this.chunks = 0;
    this.frames = 0;
    this.arrivedChunks = 0;
    this.onTime = 0;
    this.framesShown = 0;
    this.bytes = 0;
    this.steps = /** @type {number|null} */ (null);
    /** from "Enter" to the first frame that follows the new words */
    this.steerMs = /** @type {number|null} */ (null);
    this.firstPixelMs = /** @type {number|null} */ (null);
  }

  /** @param {import("./protocol.js").ChunkHeader} header */
  received(header) {
    this.chunks += 1;
    this.frames += header.frames;
    this.bytes += header.bytes ?? 0;
    this.steps = header.steps ?? this.steps;
    this.batchSize = header.batch_size ?? this.batchSize;
    if (Number.isFinite(header.latency_ms)) {
      this.latenciesMs.push(header.latency_ms);
      if (this.latenciesMs.length > RECENT) this.latenciesMs.shift();
    }
  }

  /** @param {boolean} onTime */
  arrived(onTime) {
    if (onTime) this.onTime += 1;
    this.arrivedChunks += 1;
  }

  /** @param {number} nowS */
  shown(nowS) {
    this.framesShown += 1;
    this.shownAt.push(nowS);
    if (this.shownAt.length > 1 && nowS - this.shownAt[0] > 4) this.shownAt.shift();
  }

  /** Frames a second over the last three seconds. @param {number} nowS */
  shownFps(nowS) {
    const recent = this.shownAt.filter((at) => nowS - at < 3);
    if (recent.length < 2) return 0;
    // A picture that stands still must not keep its old rate.
    const spanS = Math.max(recent[recent.length - 1] - recent[0], nowS - recent[0] - 1.5 / this.fps);
    return (recent.length - 1) / spanS;
  }

  /** Median of the recent chunk latencies. */
  get latencyMs() {
    if (!this.latenciesMs.length) return null;
    return [...this.latenciesMs].sort((a, b) => a - b)[this.latenciesMs.length >> 1];
  }

  get latencyP95Ms() {
    if (!this.latenciesMs.length) return null;
    const sorted = [...this.latenciesMs].sort((a, b) => a - b);
    return sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * 0.95))];
  }

  get onTimeShare() {
    return this.arrivedChunks ? this.onTime / this.arrivedChunks : null;
  }
}

/** @param {number|null} share */
export function percent(share) {
  if (share === null) return "–";
  // Never round a miss up to a perfect score.
  const value = share >= 1 ? 100 : Math.min(99.9, share * 100);
  return value === 100 || value < 10 ? `${Math.round(value)}` : value.toFixed(1);
}

/** @param {number|null} ms */
export const milliseconds = (ms) => (ms === null ? "–" : ms < 100 ? ms.toFixed(0) : `${Math.round(ms / 5) * 5}`);

/** @param {number} seconds */
export function clockTime(seconds) {
  const whole = Math.floor(seconds);
  return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")}`;
}

/** @param {number} bytes */
export function byteSize(bytes) {
  if (bytes < 1024 * 1024) return `${Math.max(1, Math.round(bytes / 1024))} KB`;
  return `${(bytes / 1024 / 1024).toFixed(1)} MB`;
}
