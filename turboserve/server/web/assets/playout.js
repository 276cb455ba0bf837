/**
 * When to show which frame. The server sends chunks in bursts, about one chunk ahead of playback; this
 * clock shows their frames at the stream's own rate and keeps just as much in hand as arrivals need.
 *
 * Pure logic on times given by the caller, in seconds: no DOM, no timer.
 *
 * For each chunk we note by how much it came before its first frame could have been due, on a scale that
 * does not depend on the clock (`offset`). The lowest of the recent offsets is the worst arrival; the
 * clock is steered so that even that one comes `cushion` early. Less would stall, more would only add
 * delay between a viewer's words and the picture.
 */

const WINDOW = 16;
const CUSHION_MIN_S = 0.045;
const CUSHION_STALL_S = 0.06;
const CUSHION_STALL_FORGET_S = 20;
const CATCH_UP = 0.22;
const FALL_BACK = 0.06;
const FALL_BACK_TO_RESERVE = 0.3;
const STALL_MIN_S = 0.03;

/**
 * @template {{index: number, position: number, version: number}} F
 */
export class Playout {
  /** @param {number} fps  frames per second of playback */
  constructor(fps) {
    this.frameS = 1 / fps;
    /** @type {{frame: F, dueS: number}[]} */
    this.queue = [];
    this.endS = 0; // media time after the last queued frame
    this.mediaS = 0;
    /** @type {number|null} */
    this.lastS = null;
    this.running = true;
    /** @type {number[]} */
    this.offsets = [];
    this.skipOffset = true;
    this.starvedSinceS = /** @type {number|null} */ (null);
    this.stalls = 0;
    this.stalledS = 0;
    this.extraS = 0;
    /** Asked for on top of what arrivals need, before a known disturbance. */
    this.reserveS = 0;
  }

  /** Media seconds in hand. */
  get bufferedS() {
    return Math.max(0, this.endS - this.mediaS);
  }

  get chunkOffsetTargetS() {
    const worst = Math.min(...this.offsets);
    const typical = this.offsets.length ? this.offsets.reduce((a, b) => a + b, 0) / this.offsets.length : worst;
    return worst - (CUSHION_MIN_S + 0.25 * Math.min(0.2, typical - worst) + this.extraS + this.reserveS);
  }

  /**
   * The first frame of a chunk is at hand. Call before pushing it.
   * @param {number} nowS
   * @returns {boolean} whether it came before it was due
   */
  chunkArrives(nowS) {
    this.#advance(nowS);
    const onTime = this.starvedSinceS === null || nowS - this.starvedSinceS < STALL_MIN_S;
    if (this.starvedSinceS !== null) {
      const gapS = nowS - this.starvedSinceS;
      if (gapS >= STALL_MIN_S) {
        this.stalls += 1;
        this.stalledS += gapS;
        this.extraS = Math.min(0.4, this.extraS + CUSHION_STALL_S);
      }
      this.starvedSinceS = null;
    }
    // The first chunk after a start comes one chunk "late" by design of the pacing: it says nothing.
    if (this.skipOffset) this.skipOffset = false;
    else {
      this.offsets.push(this.endS - nowS);
      if (this.offsets.length > WINDOW) this.offsets.shift();
    }
    return onTime;
  }

  /** @param {F} frame */
  push(frame) {
    this.queue.push({ frame, dueS: this.endS });
    this.endS += this.frameS;
  }

  /**
   * @param {number} nowS
   * @returns {{show: F|null, skipped: F[]}} the frame to put on the screen now, and those too late for it
   */
  tick(nowS) {
    this.#advance(nowS);
    const skipped = [];
    let show = null;
    while (this.running && this.queue.length && this.queue[0].dueS <= this.mediaS + 1e-6) {
      if (show) skipped.push(show);
      show = /** @type {{frame: F, dueS: number}} */ (this.queue.shift()).frame;
    }
    return { show, skipped };
  }

  /** The picture stands still from here on. @param {number} nowS */
  hold(nowS) {
    this.#advance(nowS);
    this.running = false;
    this.starvedSinceS = null;
  }

  /** Play on. Waiting before this was asked for, so it is no stall. @param {number} nowS */
  release(nowS) {
    this.lastS = nowS;
    this.running = true;
    this.restart();
  }

  /** The server's pace starts afresh (attach, resume): arrivals of before say nothing about those to come. */
  restart() {
    this.offsets = [];
    this.skipOffset = true;
  }

  /** @param {number} nowS */
  #advance(nowS) {
    if (this.lastS === null || !this.running || this.endS === 0) {
      this.lastS = nowS; // before the first frame there is nothing to play: waiting is not playing
      return;
    }
    const elapsedS = Math.max(0, nowS - this.lastS);
    this.lastS = nowS;
    this.extraS *= Math.exp(-elapsedS / CUSHION_STALL_FORGET_S);
    let stepS = elapsedS;
    if (this.offsets.length) {
      // shift = media time minus wall time; move it towards its target by bending the speed a little
      const errorS = this.chunkOffsetTargetS - (this.mediaS - (nowS - elapsedS));
      const slowest = this.reserveS > 0 ? FALL_BACK_TO_RESERVE : FALL_BACK;
      stepS += Math.max(-slowest * elapsedS, Math.min(CATCH_UP * elapsedS, errorS * Math.min(1, elapsedS * 2)));
    }
    this.mediaS += stepS;
    if (this.mediaS > this.endS) {
      if (this.starvedSinceS === null) this.starvedSinceS = nowS - (this.mediaS - this.endS);
      this.mediaS = this.endS;
    }
  }
}
