/**
 * Sizes of the pictures. A small picture is enlarged by a whole number of device pixels, so that every
 * one of its pixels is the same square; a picture larger than its place is shrunk to fit.
 */

const PANEL_MIN = 340;
const STAGE_GAP = 40;

/**
 * @param {{width: number, height: number}} video
 * @param {number} roomWidth @param {number} roomHeight   CSS pixels
 * @returns {{width: number, height: number, crisp: boolean}}
 */
export function fitPicture(video, roomWidth, roomHeight, pixelRatio = window.devicePixelRatio || 1) {
  const most = Math.min(roomWidth / video.width, roomHeight / video.height);
  const whole = Math.floor(most * pixelRatio);
  const scale = whole >= 1 ? whole / pixelRatio : most;
  return { width: video.width * scale, height: video.height * scale, crisp: whole >= 1 };
}

/**
 * Lays out all tiles of the page.
 * @param {HTMLElement} grid
 * @param {{element: HTMLElement, video: {width: number, height: number}}[]} tiles
 * @param {boolean} touring   small tiles without panels
 * @param {number} [share]     of the window's height that a picture may take, when less than usual
 */
export function layOut(grid, tiles, touring, share) {
  if (!tiles.length) return;
  const width = grid.clientWidth;
  const gap = width < 600 ? 12 : 16;
  const stage = tiles.length === 1 && !touring;
  grid.dataset.layout = stage ? (width >= 820 ? "stage" : "column") : "grid";
  const least = touring ? (width < 600 ? 140 : 200) : 250;
  let columns = Math.min(tiles.length, 4);
  if (tiles.length === 4 && (width - 3 * gap) / 4 < least) columns = 2;
  while (columns > 1 && (width - (columns - 1) * gap) / columns < least) columns -= 1;
  const roomHeight = Math.max(192, window.innerHeight * (share ?? (stage ? 0.75 : 0.6)));
  const roomWidth =
    grid.dataset.layout === "stage" ? width - PANEL_MIN - STAGE_GAP : (width - (columns - 1) * gap) / columns;
  let widest = 0;
  for (const { element, video } of tiles) {
    const size = fitPicture(video, roomWidth, roomHeight);
    element.style.setProperty("--picture-width", `${size.width}px`);
    element.style.setProperty("--picture-height", `${size.height}px`);
    element.classList.toggle("crisp", size.crisp);
    widest = Math.max(widest, size.width);
  }
  // What the whole-number enlargement leaves free goes between the tiles, so that both edges stay straight.
  const spare = columns > 1 && width >= 820 ? (width - columns * widest - (columns - 1) * gap) / (columns - 1) : 0;
  grid.style.setProperty("--gap", `${gap + (spare < 64 ? spare : 0)}px`);
  grid.style.setProperty("--columns", String(columns));
  // On a narrow page the text may use the width that a whole-number enlargement leaves free.
  grid.style.setProperty("--tile-width", `${width < 820 ? roomWidth : widest}px`);
}
