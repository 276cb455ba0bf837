/** Light, dark, or as the system says. Loaded before the page is drawn, so that nothing flashes. */

const ITEM = "turboserve.theme";
const ORDER = ["auto", "light", "dark"];
const NAMES = { auto: "Theme: as the system", light: "Theme: light", dark: "Theme: dark" };

/** @param {string} theme */
function apply(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  for (const button of document.querySelectorAll("[data-theme-toggle]")) {
    const name = NAMES[/** @type {keyof typeof NAMES} */ (theme)];
    button.setAttribute("aria-label", name);
    button.setAttribute("title", name);
    /** @type {HTMLElement} */ (button).dataset.current = theme;
  }
}

function stored() {
  const theme = localStorage.getItem(ITEM) ?? "auto";
  return ORDER.includes(theme) ? theme : "auto";
}

apply(stored());

document.addEventListener("click", (event) => {
  const target = /** @type {Element} */ (event.target).closest?.("[data-theme-toggle]");
  if (!target) return;
  const next = ORDER[(ORDER.indexOf(stored()) + 1) % ORDER.length];
  localStorage.setItem(ITEM, next);
  apply(next);
});
