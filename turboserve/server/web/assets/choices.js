/** What a viewer may choose for a stream besides its words, where the model served here offers a choice. */

import { at, element } from "./dom.js";

/** @type {{field: string, offered: string, title: string, words: Record<string, string>}[]} */
const KINDS = [
  {
    field: "prompt_switch",
    offered: "prompt_switch",
    title: "New words",
    words: {
      swap: "at once",
      recache: "at once, the past seen anew",
      blend: "blended in over a few chunks",
    },
  },
  {
    field: "decoder",
    offered: "decoders",
    title: "Decoder",
    words: {},
  },
];

/**
 * Shows a box for everything of which the model offers more than one; its first is what it takes unasked.
 * @param {any} model  an entry of GET v1/models
 */
export function offer(model) {
  const place = at("choices");
  const boxes = KINDS.filter((kind) => (model?.[kind.offered] ?? []).length > 1).map((kind) => {
    const options = /** @type {string[]} */ (model[kind.offered]).map((value) =>
      element("option", kind.words[value] ?? value, { value }),
    );
    return element("label", [kind.title, element("select", options, { name: kind.field })]);
  });
  place.querySelector("div")?.replaceChildren(...boxes);
  place.hidden = boxes.length === 0;
}

/** What is chosen, as fields of a new session; the choice is made then. @returns {Record<string, string>} */
export function chosen() {
  at("choices").removeAttribute("open");
  const boxes = /** @type {HTMLSelectElement[]} */ ([...at("choices").querySelectorAll("select")]);
  return Object.fromEntries(boxes.map((box) => [box.name, box.value]));
}
