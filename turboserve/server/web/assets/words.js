/** How a prompt is written on the page: words the model did not know are struck through. */

export const SMALL_MODEL_NOTE = "this small model knows shapes and colours; real video: ";
export const REAL_VIDEO_COMMAND = "turboserve serve PATH";

/**
 * @param {HTMLElement} place
 * @param {{text: string, ignored: string[]}} prompt
 */
export function writePrompt(place, prompt) {
  const ignored = new Set(prompt.ignored.map((word) => word.toLowerCase()));
  const parts = prompt.text.split(/([\p{L}\p{N}]+(?:['’][\p{L}\p{N}]+)?)/u);
  place.replaceChildren(
    ...parts.map((part) => {
      if (!ignored.has(part.toLowerCase().replace("’", "'"))) return document.createTextNode(part);
      const struck = document.createElement("s");
      struck.textContent = part;
      struck.title = "not known to this model";
      return struck;
    }),
  );
}

/**
 * The line below a prompt that was not wholly understood; empty when it was.
 * @param {HTMLElement} place
 * @param {{ignored: string[], random: boolean}} prompt
 * @param {number} seed
 */
export function writeNote(place, prompt, seed) {
  place.hidden = prompt.ignored.length === 0 && !prompt.random;
  if (place.hidden) return place.replaceChildren();
  const code = document.createElement("code");
  code.textContent = REAL_VIDEO_COMMAND;
  const lead = prompt.random ? `No word it knows, so it made a random scene (seed ${seed}): ` : "";
  place.replaceChildren(lead + SMALL_MODEL_NOTE, code);
  return undefined;
}
