/**
 * What a first visit shows: four streams already moving, whose prompts take turns, so that steering is
 * seen before it is tried. Real sessions, so it stops when nobody looks or touches anything for long.
 */

import { TOUR } from "./examples.js";
import { Status } from "./session.js";

const FIRST_TURN_MS = 5000;
const TURN_MS = 6500;
const REST_AFTER_MS = 10 * 60_000;

export class Tour {
  /** @param {(prompt: string, seed: number) => import("./tile.js").Tile} addTile @param {number} [count] of streams */
  constructor(addTile, count = TOUR.length) {
    const places = TOUR.slice(0, count);
    this.steps = places.map(() => 0);
    this.tiles = places.map(({ prompts, seed }) => addTile(prompts[0], seed));
    this.turn = 0;
    this.startedMs = performance.now();
    this.timer = window.setTimeout(() => this.#next(), FIRST_TURN_MS);
  }

  stop() {
    window.clearTimeout(this.timer);
  }

  #next() {
    this.timer = window.setTimeout(() => this.#next(), TURN_MS);
    if (document.hidden) return;
    if (performance.now() - this.startedMs > REST_AFTER_MS) {
      this.stop();
      for (const tile of this.tiles) tile.stream.pause({ auto: true });
      return;
    }
    const place = this.turn % this.tiles.length;
    this.turn += 1;
    const tile = this.tiles[place];
    if (tile.stream.status !== Status.PLAYING) return;
    this.steps[place] += 1;
    const { prompts } = TOUR[place];
    tile.stream.steer(prompts[this.steps[place] % prompts.length]);
  }
}
