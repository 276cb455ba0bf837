/** Two small plots of the last minutes, drawn as SVG: no library, readable in both themes, said in words below. */

import { percent } from "./figures.js";

const WIDTH = 600;
const HEIGHT = 140;
const FOOT = 4;
const SVG = "http://www.w3.org/2000/svg";

/** @param {string} tag @param {Record<string, string|number>} attributes */
function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, String(value));
  return made;
}

/** The next round number from `value` on: 1, 2 or 5 times a power of ten. @param {number} value */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return (/** @type {number} */ ([1, 2, 5, 10].find((step) => step * power >= value - 1e-9))) * power;
}

/**
 * Points of a line; a gap where nothing was measured.
 * @param {(number|null)[]} values @param {number} top @param {number} seconds  width of the plot
 */
export function path(values, top, seconds) {
  let drawing = false;
  let text = "";
  values.forEach((value, place) => {
    if (value === null) {
      drawing = false;
      return;
    }
    const x = WIDTH - ((values.length - 1 - place) * WIDTH) / (seconds - 1);
    const y = HEIGHT - FOOT - (Math.min(value, top) / top) * (HEIGHT - 2 * FOOT);
    text += `${drawing ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    drawing = true;
  });
  return text;
}

/** @param {SVGElement} svg @param {number} top @param {string} unit */
function grid(svg, top, unit) {
  const lines = [0.5, 1].map((share) => {
    const y = HEIGHT - FOOT - share * (HEIGHT - 2 * FOOT);
    return shape("path", { d: `M0 ${y}H${WIDTH}`, class: "grid" });
  });
  svg.replaceChildren(...lines);
  svg.parentElement?.setAttribute("data-top", `${top}${unit}`);
}

/** @param {(number|null)[]} values */
const newest = (values) => [...values].reverse().find((value) => value !== null) ?? null;

/**
 * @param {SVGElement} svg @param {HTMLElement} words @param {any} history  columns @param {number} seconds
 */
export function drawLatency(svg, words, history, seconds) {
  const p50 = history.latency_p50_ms ?? [];
  const p95 = history.latency_p95_ms ?? [];
  const most = Math.max(0, ...p95.filter((/** @type {number|null} */ value) => value !== null));
  const top = roundUp(most);
  grid(svg, top, " ms");
  svg.append(shape("path", { d: path(p95, top, seconds), class: "line p95" }), shape("path", { d: path(p50, top, seconds), class: "line p50" }));
  const now = newest(p95);
  words.textContent = now === null ? "no chunk yet" : `solid: median ${newest(p50)?.toFixed(0)} ms now; dashed: 95 of 100 within ${now.toFixed(0)} ms now, ${most.toFixed(0)} ms at most`;
}

/**
 * @param {SVGElement} svg @param {HTMLElement} words @param {any} history @param {number} seconds
 */
export function drawOnTime(svg, words, history, seconds) {
  /** @type {number[]} */
  const good = history.on_time ?? [];
  /** @type {number[]} */
  const late = history.late ?? [];
  const top = roundUp(Math.max(1, ...good.map((value, place) => value + (late[place] ?? 0))));
  grid(svg, top, "/s");
  const step = WIDTH / seconds;
  const scale = (HEIGHT - 2 * FOOT) / top;
  good.forEach((value, place) => {
    const x = WIDTH - (good.length - place) * step;
    const bars = [
      { height: value * scale, from: 0, kind: "good" },
      { height: (late[place] ?? 0) * scale, from: value * scale, kind: "late" },
    ];
    for (const { height, from, kind } of bars) {
      if (height > 0) svg.append(shape("rect", { x: x.toFixed(2), y: (HEIGHT - FOOT - from - height).toFixed(2), width: Math.max(0.6, step - 0.4).toFixed(2), height: height.toFixed(2), class: kind }));
    }
  });
  const sum = (/** @type {number[]} */ values) => values.reduce((total, value) => total + value, 0);
  const all = sum(good) + sum(late);
  words.textContent = all ? `${percent(sum(good) / all)} % of ${all} chunks on time; ${sum(late)} late (outlined, on top)` : "no chunk yet";
}
