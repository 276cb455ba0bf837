/** The page to watch and steer: puts prompt box, tour and tiles together. */

import * as api from "./api.js";
import { chosen, offer } from "./choices.js";
import { askForKey, notice } from "./dialogs.js";
import { explain } from "./errors.js";
import { CHIPS } from "./examples.js";
import { layOut } from "./layout.js";
import { Plug } from "./plug.js";
import { Status } from "./session.js";
import { Tile } from "./tile.js";
import { Tour } from "./tour.js";

const TILES_MAX = 8;
const HIDDEN_PAUSE_MS = 20_000;
const TOUR_PATIENCE_MS = 4000;
/** While a worker is killed, lanes stand below the pictures and both are to be seen at once. */
const PLUG_SHARE = 0.36;

const grid = /** @type {HTMLElement} */ (document.getElementById("tiles"));
const promptBox = /** @type {HTMLInputElement} */ (document.getElementById("prompt"));
/** @type {Tile[]} */
let tiles = [];
/** @type {Tour|null} */
let tour = null;
let plugged = false;
const plug = new Plug({ begin: beginPlug, leave: leavePlug });

/** @type {import("./tile.js").TileEvents} */
const tileEvents = {
  close: (tile) => {
    const place = tiles.indexOf(tile);
    removeTile(tile);
    const neighbour = tiles[Math.min(place, tiles.length - 1)];
    (neighbour?.steerInput ?? promptBox).focus();
  },
  adopt: (tile) => {
    const others = tiles.filter((candidate) => candidate !== tile);
    endTour();
    tile.adopt();
    others.forEach(removeTile);
    refresh();
    tile.steerInput.focus();
  },
  again: (tile) => {
    const { prompts, created, options } = tile.stream;
    const fresh = makeTile(prompts[prompts.length - 1].text, { seed: created?.seed, choices: options.choices });
    tiles[tiles.indexOf(tile)] = fresh;
    tile.element.replaceWith(fresh.element);
    tile.dispose();
    refresh();
    fresh.steerInput.focus();
  },
  layout: () => refresh(),
};

/** @param {string} prompt @param {{tour?: boolean, seed?: number, choices?: Record<string, string>}} options */
function makeTile(prompt, options) {
  const tile = new Tile(prompt, options, tileEvents);
  tile.stream.addEventListener("opened", () => showServing(tile));
  tile.stream.addEventListener("change", () => {
    // A tour stream that finds no room is not worth a viewer's attention. A moment in the queue is usual.
    if (tile.tour && tile.stream.status === Status.FAILED) tourTileHasNoRoom(tile);
  });
  if (options.tour) {
    window.setTimeout(() => tile.tour && tile.stream.status === Status.QUEUED && tourTileHasNoRoom(tile), TOUR_PATIENCE_MS);
  }
  return tile;
}

/** @param {Tile} tile */
function removeTile(tile) {
  tiles = tiles.filter((candidate) => candidate !== tile);
  tile.dispose();
  refresh();
}

/** @param {Tile} tile */
function tourTileHasNoRoom(tile) {
  if (!tiles.includes(tile)) return;
  const { error } = tile.stream;
  // Not from within the stream's own event.
  queueMicrotask(() => {
    if (!tiles.includes(tile)) return;
    if (tiles.length > 1) return removeTile(tile);
    endTour();
    removeTile(tile);
    const words = error && explain(error.code, error.message, error.hint);
    setHint(words ? `${words.title}. ${words.advice}` : "All places are taken just now. Type a scene: it starts as soon as there is room.");
    return undefined;
  });
}

function endTour() {
  tour?.stop();
  tour = null;
}

/** Takes the tour away, so that its places on the server are free for the viewer's own streams. */
async function clearTour() {
  if (!tour) return;
  endTour();
  const old = tiles;
  tiles = [];
  const freed = old.filter((tile) => tile.stream.created).map((tile) => api.endSession(/** @type {any} */ (tile.stream.created).id));
  old.forEach((tile) => tile.dispose());
  await Promise.allSettled(freed);
}

/** Fresh streams for the show, so that their undisturbed runs are short. */
async function beginPlug() {
  await clearTour();
  for (const tile of [...tiles]) removeTile(tile);
  plugged = true;
  startTour(Math.max(1, Math.min(4, Number(new URLSearchParams(location.search).get("streams")) || 4)));
  return [...tiles];
}

function leavePlug() {
  plugged = false;
  plug.stop();
  clearTour().then(() => {
    startTour();
    promptBox.focus();
  });
}

/** @param {string[]} prompts */
async function start(prompts) {
  if (plugged) plug.stop();
  plugged = false;
  await clearTour();
  if (tiles.length + prompts.length > TILES_MAX) {
    notice(`At most ${TILES_MAX} streams on one page: close one first.`);
    return;
  }
  const choices = chosen();
  const fresh = prompts.map((prompt) => makeTile(prompt, { choices }));
  tiles = [...fresh, ...tiles];
  grid.prepend(...fresh.map((tile) => tile.element));
  refresh();
  fresh[0].steerInput.focus({ preventScroll: true });
  // Bring the picture into view where it is below the fold.
  const bottom = fresh[0].element.getBoundingClientRect().top + 280;
  if (bottom > window.innerHeight) fresh[0].element.scrollIntoView({ block: "start" });
}

/** @param {number} [count] */
function startTour(count) {
  tour = new Tour((prompt, seed) => {
    const tile = makeTile(prompt, { tour: true, seed });
    tiles.push(tile);
    grid.append(tile.element);
    return tile;
  }, count);
  refresh();
}

function refresh() {
  const touring = tour !== null;
  document.body.dataset.mode = plugged ? "plug" : touring ? "tour" : tiles.length ? "watching" : "empty";
  grid.dataset.count = String(tiles.length);
  layOut(grid, tiles, touring, plugged ? PLUG_SHARE : undefined);
  const title = /** @type {HTMLElement} */ (document.getElementById("streams-title"));
  promptBox.placeholder = !touring && tiles.length ? "Start another stream: describe a scene" : CHIPS[0];
  title.textContent = touring ? "Being made now" : tiles.length === 1 ? "Your stream" : "Your streams";
  if (touring) setHint("Each changes its words in turn. Type your own above, or take one over.");
  else if (tiles.length) setHint("");
}

/** @param {string} text */
function setHint(text) {
  /** @type {HTMLElement} */ (document.getElementById("streams-hint")).textContent = text;
}

/** @param {Tile} tile */
function showServing(tile) {
  const { created } = tile.stream;
  if (!created) return;
  const place = /** @type {HTMLElement} */ (document.getElementById("serving"));
  const rate = created.playback_rate ?? 1;
  const speed = rate === 1 ? "" : `, played at ${rate}× speed`;
  place.textContent = `${created.model} · ${created.width}×${created.height} · ${created.fps} frames/s${speed}`;
  place.hidden = false;
  const seconds = created.chunk_frames.rest / created.fps;
  /** @type {HTMLElement} */ (document.getElementById("lede")).textContent =
    `A video model on this server makes every stream below, ${seconds.toFixed(2)} seconds at a time, as you watch. Change the words and the picture follows.`;
}

/** @param {string} typed */
function promptsForFour(typed) {
  return typed ? [typed, typed, typed, typed] : CHIPS.slice(0, 4);
}

function listen() {
  const composer = /** @type {HTMLFormElement} */ (document.getElementById("composer"));
  composer.addEventListener("submit", (event) => {
    event.preventDefault();
    const typed = promptBox.value.trim() || CHIPS[0];
    promptBox.value = "";
    start([typed]);
  });
  document.getElementById("open-four")?.addEventListener("click", () => {
    const typed = promptBox.value.trim();
    promptBox.value = "";
    start(promptsForFour(typed));
  });
  const chips = /** @type {HTMLElement} */ (document.getElementById("chips"));
  for (const text of CHIPS) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip";
    chip.textContent = text;
    chip.addEventListener("click", () => {
      promptBox.value = text;
      promptBox.focus();
    });
    chips.append(chip);
  }
  document.addEventListener("keydown", (event) => {
    const typing = /** @type {Element} */ (event.target).closest("input, textarea, dialog");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      promptBox.focus();
    }
  });
  const again = () => layOut(grid, tiles, tour !== null, plugged ? PLUG_SHARE : undefined);
  new ResizeObserver(again).observe(grid);
  window.addEventListener("resize", again);
  window.addEventListener("pagehide", () => tiles.forEach((tile) => tile.stream.dispose()));
  window.addEventListener("pageshow", (event) => event.persisted && location.reload());
}

/** Nobody looks: after a while nothing more is made. */
function watchVisibility() {
  let timer = 0;
  document.addEventListener("visibilitychange", () => {
    window.clearTimeout(timer);
    if (document.hidden) {
      timer = window.setTimeout(() => tiles.forEach((tile) => tile.stream.pause({ auto: true })), HIDDEN_PAUSE_MS);
    } else {
      for (const tile of tiles) if (tile.stream.autoPaused) tile.stream.resume();
    }
  });
}

async function begin() {
  api.onKeyNeeded(askForKey);
  listen();
  watchVisibility();
  refresh();
  const wantsTour = new URLSearchParams(location.search).get("tour") !== "off";
  try {
    const models = await api.request("GET", "v1/models");
    offer(models.data[0]);
    if (!api.storedKey()) plug.offer(); // only a server without keys lets anybody do that
    // The viewer may have begun while the answer was on its way.
    if (wantsTour && !tiles.length) startTour();
  } catch (error) {
    const { code, message, hint } = /** @type {any} */ (error);
    const words = explain(code, message, hint);
    setHint(`${words.title}. ${words.advice}`);
  }
}

begin();
