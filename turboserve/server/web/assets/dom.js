/** Making and finding elements: what several modules of the pages need. */

/** @param {string} id */
export const at = (id) => /** @type {HTMLElement} */ (document.getElementById(id));

/**
 * @param {string} tag @param {string|Node|(string|Node)[]} content @param {Record<string, string>} [attributes]
 */
export function element(tag, content, attributes = {}) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

/** A line of a description list. @param {string} name @param {string} value */
export const pair = (name, value) => element("div", [element("dt", name), element("dd", value)]);

/** Whether the viewer asked for less motion. */
export const wantsStillness = () => window.matchMedia("(prefers-reduced-motion: reduce)").matches;
