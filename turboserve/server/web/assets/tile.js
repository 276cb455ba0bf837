/** One stream on the page: its picture, its words, what can be done with it. */

import { announce, copyText, notice } from "./dialogs.js";
import { explain } from "./errors.js";
import { byteSize, clockTime, milliseconds, percent } from "./figures.js";
import { saveAs } from "./recording.js";
import { Status, Stream } from "./session.js";
import { Strip } from "./strip.js";
import { writeNote, writePrompt } from "./words.js";

const MOMENT_MS = 2600;

/**
 * @typedef {Object} TileEvents
 * @property {(tile: Tile) => void} close      take the tile away
 * @property {(tile: Tile) => void} adopt      a tour stream becomes the viewer's
 * @property {(tile: Tile) => void} again      start the same stream anew
 * @property {() => void} layout               sizes may have changed
 */

export class Tile {
  /**
   * @param {string} prompt
   * @param {{tour?: boolean, seed?: number, choices?: Record<string, string>}} options
   * @param {TileEvents} events
   */
  constructor(prompt, options, events) {
    const template = /** @type {HTMLTemplateElement} */ (document.getElementById("tile-template"));
    this.element = /** @type {HTMLElement} */ (template.content.firstElementChild?.cloneNode(true));
    this.events = events;
    this.tour = options.tour ?? false;
    this.canvas = /** @type {HTMLCanvasElement} */ (this.find("canvas"));
    this.steerInput = /** @type {HTMLInputElement} */ (this.find(".steer input"));
    this.stream = new Stream(this.canvas, prompt, { seed: options.seed, choices: options.choices, quiet: this.tour });
    this.strip = /** @type {Strip|null} */ (null);
    this.momentTimer = 0;
    this.lastStatus = "";
    this.element.classList.toggle("tour", this.tour);
    const label = /** @type {HTMLLabelElement} */ (this.find(".steer label"));
    label.htmlFor = this.steerInput.id = `steer-${this.stream.number}`;
    this.#listen();
    this.render();
    this.figuresTimer = window.setInterval(() => this.renderFigures(), 500);
  }

  get video() {
    return this.stream.created ?? { width: 96, height: 96 };
  }

  /** @param {string} selector @returns {HTMLElement} */
  find(selector) {
    return /** @type {HTMLElement} */ (this.element.querySelector(selector));
  }

  /** The viewer takes a tour stream over. */
  adopt() {
    this.tour = false;
    this.stream.options.quiet = false;
    this.element.classList.remove("tour");
    this.render();
  }

  dispose() {
    window.clearInterval(this.figuresTimer);
    this.stream.dispose();
    this.element.remove();
  }

  #listen() {
    const stream = this.stream;
    stream.addEventListener("change", () => this.render());
    stream.addEventListener("opened", () => {
      const { created } = stream;
      if (!created) return;
      this.strip = new Strip(this.find(".strip"), (1000 * created.chunk_frames.rest) / stream.figures.fps);
      this.events.layout();
    });
    stream.addEventListener("chunk", (event) => {
      const { header, onTime } = /** @type {CustomEvent} */ (event).detail;
      this.strip?.add(header, onTime);
    });
    stream.addEventListener("playing", (event) => this.strip?.playing(/** @type {CustomEvent} */ (event).detail.index));
    stream.addEventListener("steered", (event) => {
      const { entry, index } = /** @type {CustomEvent} */ (event).detail;
      this.#moment(`${this.tour ? "New words" : "Your words"}, from chunk ${index}`, entry.version, index);
      if (!this.tour) announce(`The picture now follows: ${entry.text}`);
    });
    stream.addEventListener("returned", (event) => {
      const { index } = /** @type {CustomEvent} */ (event).detail;
      this.strip?.continued(index);
      this.element.dataset.continuedAt = String(index);
      if (!this.tour) announce(`Connected again; the stream continues at chunk ${index}.`);
    });
    stream.addEventListener("refused", (event) => {
      const { code, message, hint } = /** @type {CustomEvent} */ (event).detail;
      const words = explain(code, message, hint);
      if (!this.tour) notice(`${words.title}. ${words.advice}`);
    });
    this.find(".steer").addEventListener("submit", (event) => {
      event.preventDefault();
      const text = this.steerInput.value.trim();
      if (!text || stream.isOver) return;
      stream.steer(text);
      if (stream.status === Status.PAUSED) stream.resume();
      this.steerInput.value = "";
    });
    this.find(".adopt").addEventListener("click", () => this.events.adopt(this));
    this.find(".veil-action").addEventListener("click", () => this.#veilAction());
    this.find(".actions").addEventListener("click", (event) => {
      const button = /** @type {Element} */ (event.target).closest("button");
      if (button) this.#act(/** @type {string} */ (button.dataset.action));
    });
  }

  /** @param {string} action */
  async #act(action) {
    const stream = this.stream;
    if (action === "pause") stream.wantPaused ? stream.resume() : stream.pause();
    else if (action === "stop") stream.stop();
    else if (action === "close") this.events.close(this);
    else if (action === "download" && stream.recording && !stream.recording.isEmpty) {
      const { blob, extension } = stream.recording.film();
      saveAs(blob, `turboserve-${stream.created?.model ?? "stream"}-${stream.created?.seed ?? 0}.${extension}`);
      if (stream.recording.dropped) notice("The stream is longer than this page keeps: the file holds its latest part.");
    } else if (action === "card") {
      try {
        const card = await stream.readCard();
        if (await copyText(JSON.stringify(card, null, 2))) {
          notice("Card copied. Save it as card.json and check it with: turboserve replay card.json");
        }
      } catch (error) {
        const { code, message, hint } = /** @type {any} */ (error);
        const words = explain(code, message, hint);
        notice(`No card: ${words.title}. ${words.advice}`);
      }
    }
  }

  #veilAction() {
    const { stream } = this;
    if (stream.status === Status.PAUSED) stream.resume();
    else if (stream.status === Status.FAILED && stream.error?.code === "connection_lost") stream.reconnect();
    else this.events.again(this);
  }

  /** The moment of change, on the picture and in the strip. @param {string} text @param {number} version @param {number} index */
  #moment(text, version, index) {
    const place = this.find(".moment");
    place.textContent = text;
    place.dataset.version = String(version);
    place.dataset.index = String(index);
    place.hidden = false;
    this.element.classList.remove("steered");
    void this.element.offsetWidth; // the flash starts anew
    this.element.classList.add("steered");
    window.clearTimeout(this.momentTimer);
    this.momentTimer = window.setTimeout(() => {
      place.hidden = true;
      this.element.classList.remove("steered");
    }, MOMENT_MS);
  }

  render() {
    const { stream } = this;
    const { status } = stream;
    this.element.dataset.status = status;
    if (stream.created) this.element.dataset.session = stream.created.id;
    const current = stream.currentPrompt;
    writePrompt(this.find(".caption"), current);
    writeNote(this.find(".note"), current, stream.created?.seed ?? 0);
    const coming = stream.comingPrompt;
    const comingPlace = this.find(".coming");
    comingPlace.hidden = !coming || stream.isOver;
    if (coming) comingPlace.textContent = coming.fromIndex === null ? `Next: ${coming.text}` : `From chunk ${coming.fromIndex}: ${coming.text}`;
    this.canvas.setAttribute("aria-label", `Live video: ${current.text}`);
    this.element.setAttribute("aria-label", `Stream ${stream.number}: ${current.text}`);
    this.#renderState();
    this.#renderVeil();
    this.#renderActions();
    this.#renderHistory();
    if (status !== this.lastStatus && !this.tour) this.#announceStatus();
    this.lastStatus = status;
  }

  #renderState() {
    /** @type {Record<string, string>} */
    const words = {
      [Status.OPENING]: "Opening",
      [Status.WAITING]: "Waiting for room",
      [Status.QUEUED]: "In the queue",
      [Status.LOADING]: "Making the first chunk",
      [Status.PLAYING]: "Live",
      [Status.PAUSED]: "Paused",
      [Status.RECONNECTING]: "Reconnecting",
      [Status.ENDED]: "Ended",
      [Status.FAILED]: "Stopped by an error",
    };
    const text = words[this.stream.status];
    this.find(".state-text").textContent = this.#isSlow() ? `${text}, slower than real time on this machine` : text;
  }

  /** The server makes less than it takes to play: said openly, since the picture halts again and again. */
  #isSlow() {
    const { status, figures } = this.stream;
    if (status !== Status.PLAYING || figures.chunks < 8) return false;
    return figures.shownFps(performance.now() / 1000) < 0.85 * figures.fps;
  }

  /** What lies over the picture while there is nothing to see, or nothing moves. */
  #renderVeil() {
    const { stream } = this;
    let title = "";
    let text = "";
    let action = "";
    if (stream.status === Status.OPENING) title = "Opening…";
    else if (stream.status === Status.LOADING) title = "Making the first chunk…";
    else if (stream.status === Status.WAITING && stream.error) {
      title = explain(stream.error.code, stream.error.message, stream.error.hint).title;
      text = `Trying again in ${Math.ceil(stream.error.retryAfterS ?? 1)} s.`;
    } else if (stream.status === Status.QUEUED) {
      title = stream.queuePosition === null ? "In the queue" : `Number ${stream.queuePosition} in the queue`;
      text = "It starts by itself as soon as there is a place.";
    } else if (stream.status === Status.PAUSED) {
      title = "Paused";
      text = stream.autoPaused ? "Nobody was looking, so nothing was made." : "";
      action = "Resume";
    } else if (stream.status === Status.RECONNECTING) {
      title = "Reconnecting…";
      text = `It continues at chunk ${stream.connection?.nextIndex ?? 0}.`;
    } else if (stream.status === Status.ENDED) {
      title = "Ended";
      const seconds = clockTime(stream.figures.frames / stream.figures.fps);
      text = `${stream.figures.chunks} chunks, ${seconds}. ${END_WORDS[stream.endReason] ?? "It can still be saved."}`;
      action = "Start again";
    } else if (stream.status === Status.FAILED && stream.error) {
      const words = explain(stream.error.code, stream.error.message, stream.error.hint);
      title = words.title;
      text = words.advice;
      action = words.retry ? "Try again" : "";
    }
    const veil = this.find(".veil");
    veil.hidden = !title;
    this.find(".veil-title").textContent = title;
    this.find(".veil-text").textContent = text;
    const button = /** @type {HTMLButtonElement} */ (this.find(".veil-action"));
    button.textContent = action;
    button.hidden = !action;
  }

  #renderActions() {
    const { stream } = this;
    /** @param {string} name */
    const button = (name) => /** @type {HTMLButtonElement} */ (this.find(`[data-action="${name}"]`));
    const pause = button("pause");
    pause.disabled = stream.isOver || !stream.created;
    pause.querySelector("use")?.setAttribute("href", stream.wantPaused ? "#i-play" : "#i-pause");
    /** @type {HTMLElement} */ (pause.querySelector("span")).textContent = stream.wantPaused ? "Resume" : "Pause";
    button("stop").disabled = stream.isOver || !stream.created;
    button("download").disabled = !stream.recording || stream.recording.isEmpty;
    button("card").disabled = !stream.created || stream.shownIndex < 0;
    for (const control of this.element.querySelectorAll(".steer input, .steer button")) {
      /** @type {HTMLInputElement} */ (control).disabled = stream.isOver;
    }
  }

  #renderHistory() {
    const list = this.find(".history");
    const entries = this.stream.prompts.slice(-6);
    list.replaceChildren(
      ...entries.map((entry) => {
        const item = document.createElement("li");
        item.dataset.version = entry.version === null ? "" : String(entry.version);
        const from = document.createElement("span");
        from.className = "from";
        const index = entry.shownIndex ?? entry.fromIndex;
        from.textContent = index === null ? "next" : `chunk ${index}`;
        const words = document.createElement("span");
        writePrompt(words, entry);
        if (entry.shownIndex === null) item.classList.add("pending");
        item.append(from, words);
        return item;
      }),
    );
  }

  renderFigures() {
    const { stream } = this;
    const { figures } = stream;
    const moving = stream.status === Status.PLAYING;
    this.#renderState();
    /** @param {string} name @param {string} value @param {string} [unit] */
    const set = (name, value, unit = "") => {
      const place = this.find(`[data-figure="${name}"]`);
      if (unit && value !== "–") {
        const small = document.createElement("small");
        small.textContent = unit;
        place.replaceChildren(value, small);
      } else place.textContent = value;
    };
    set("fps", moving ? figures.shownFps(performance.now() / 1000).toFixed(1) : "–");
    set("latency", milliseconds(figures.latencyMs), "ms");
    set("onTime", percent(figures.onTimeShare), "%");
    set("batch", figures.batchSize === null ? "–" : figures.batchSize.toFixed(Number.isInteger(figures.batchSize) ? 0 : 1));
    if (!(/** @type {HTMLDetailsElement} */ (this.find(".more")).open)) return;
    const playout = stream.player?.playout;
    set("steer", milliseconds(figures.steerMs), "ms");
    set("firstPixel", milliseconds(figures.firstPixelMs), "ms");
    set("stalls", playout ? (playout.stalls ? `${playout.stalls}× (${playout.stalledS.toFixed(1)} s)` : "never") : "–");
    set("buffered", playout ? (playout.bufferedS * 1000).toFixed(0) : "–", "ms");
    set("received", `${byteSize(figures.bytes)} ${stream.connection?.format ?? ""}`);
    set("seed", stream.created ? String(stream.created.seed) : "–");
    set("session", stream.created?.id ?? "–");
    const { connection } = stream;
    set("chain", connection?.digest ? `${connection.digest.slice(0, 12)}… ${connection.chainHolds ? "unbroken" : "BROKEN"}` : "–");
  }

  #announceStatus() {
    const { stream } = this;
    if (stream.status === Status.QUEUED) announce(`In the queue, number ${stream.queuePosition ?? "unknown"}.`);
    else if (stream.status === Status.RECONNECTING) announce("The connection was lost; reconnecting.");
    else if (stream.status === Status.ENDED) announce("The stream has ended.");
    else if (stream.status === Status.FAILED) announce(this.find(".veil-title").textContent ?? "The stream failed.");
  }
}

/** @type {Record<string, string>} */
const END_WORDS = {
  completed: "It reached the length it was given.",
  session_limit: "It reached the longest time that a stream may take.",
  expired: "Nobody watched it for a while.",
  deleted: "It was ended elsewhere.",
  not_placed: "The server found no place for it.",
};
