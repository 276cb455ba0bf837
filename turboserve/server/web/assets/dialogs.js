/** Small things that need the viewer's attention: the key question, short notices, copied text. */

import { storeKey, storedKey } from "./api.js";

/** @type {Promise<boolean>|null} */
let asking = null;

/** Asks for the API key once, however many requests were refused. @returns {Promise<boolean>} whether one was given */
export function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = /** @type {HTMLDialogElement} */ (document.getElementById("key-dialog"));
    const field = /** @type {HTMLInputElement} */ (dialog.querySelector("input"));
    const wrong = /** @type {HTMLElement} */ (dialog.querySelector("[data-wrong]"));
    wrong.hidden = !storedKey();
    field.value = "";
    dialog.returnValue = "";
    dialog.addEventListener(
      "close",
      () => {
        asking = null;
        const key = dialog.returnValue === "use" ? field.value.trim() : "";
        if (key) storeKey(key);
        resolve(Boolean(key));
      },
      { once: true },
    );
    dialog.showModal();
    field.focus();
  });
  return asking;
}

/** Reads out a change to those who do not see it. @param {string} text */
export function announce(text) {
  const place = document.getElementById("announcer");
  if (place) place.textContent = text;
}

let noticeTimer = 0;

/** A short notice at the foot of the page. @param {string} text */
export function notice(text) {
  const place = document.getElementById("notice");
  if (!place) return;
  place.textContent = text;
  place.hidden = false;
  window.clearTimeout(noticeTimer);
  noticeTimer = window.setTimeout(() => (place.hidden = true), 5000);
}

/** @param {string} text @returns {Promise<boolean>} */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // No clipboard on an insecure origin: show the text to be copied by hand.
    const dialog = /** @type {HTMLDialogElement} */ (document.getElementById("copy-dialog"));
    const area = /** @type {HTMLTextAreaElement} */ (dialog.querySelector("textarea"));
    area.value = text;
    dialog.showModal();
    area.select();
    return false;
  }
}
