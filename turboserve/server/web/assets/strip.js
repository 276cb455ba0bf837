/**
 * The chunk strip below a picture: one bar per chunk, the higher the longer it took to make (on a root
 * scale, so that small differences show; the dashed line is the chunk's own playing time), a flag where
 * the words changed, hollow bars for what is still to be shown.
 */

const BAR_PX = 8; // bar and gap, as in watch.css

export class Strip {
  /** @param {HTMLElement} list @param {number} chunkMs  playing time of a chunk */
  constructor(list, chunkMs) {
    this.list = list;
    this.chunkMs = chunkMs;
    this.lastVersion = /** @type {number|null} */ (null);
    /** @type {Map<number, HTMLElement>} */
    this.bars = new Map();
    this.playingIndex = -1;
  }

  /** @param {import("./protocol.js").ChunkHeader} header @param {boolean} onTime */
  add(header, onTime) {
    const bar = document.createElement("li");
    bar.dataset.index = String(header.index);
    bar.dataset.version = String(header.prompt_version);
    bar.style.setProperty("--height", `${barHeight(header.latency_ms / this.chunkMs)}%`);
    if (!onTime) bar.classList.add("late");
    if (this.lastVersion !== null && header.prompt_version !== this.lastVersion) bar.classList.add("changed");
    this.lastVersion = header.prompt_version;
    this.list.append(bar);
    this.bars.set(header.index, bar);
    const room = Math.max(12, Math.floor(this.list.clientWidth / BAR_PX));
    while (this.list.childElementCount > room) {
      const oldest = /** @type {HTMLElement} */ (this.list.firstElementChild);
      this.bars.delete(Number(oldest.dataset.index));
      oldest.remove();
    }
  }

  /** The picture has reached this chunk. @param {number} index */
  playing(index) {
    this.bars.get(this.playingIndex)?.classList.remove("playing");
    for (let i = this.playingIndex + 1; i <= index; i += 1) this.bars.get(i)?.classList.add("shown");
    this.bars.get(index)?.classList.add("playing");
    this.playingIndex = index;
  }

  /** The stream was cut here and continued. @param {number} index */
  continued(index) {
    this.continuedAt = index;
    const bar = this.bars.get(index - 1);
    bar?.classList.add("cut");
  }
}

/** Per cent of the strip's height; the dashed line, at 1, lies at 80. @param {number} ofPlayingTime */
function barHeight(ofPlayingTime) {
  return Math.round(Math.min(100, Math.max(10, 80 * Math.sqrt(ofPlayingTime))));
}
