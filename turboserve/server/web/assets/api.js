/**
 * HTTP to the server this page came from. URLs are relative, so the page works below any root path.
 * The API key lives in sessionStorage: it goes when the tab goes.
 */

const KEY_ITEM = "turboserve.key";

/** An answer that was not a success, in the server's own terms. */
export class ApiError extends Error {
  /**
   * @param {number} status  0 when the server could not be reached
   * @param {{code?: string, message?: string, expected?: string, hint?: string, retryable?: boolean}} body
   * @param {number|null} retryAfterS
   */
  constructor(status, body, retryAfterS = null) {
    super(body.message ?? `HTTP ${status}`);
    this.status = status;
    this.code = body.code ?? (status === 0 ? "unreachable" : `http_${status}`);
    this.hint = body.hint ?? "";
    this.expected = body.expected ?? "";
    this.retryable = body.retryable ?? status === 0;
    this.retryAfterS = retryAfterS;
  }
}

export function storedKey() {
  return sessionStorage.getItem(KEY_ITEM) ?? "";
}

/** @param {string} key  an empty string forgets the key */
export function storeKey(key) {
  if (key) sessionStorage.setItem(KEY_ITEM, key);
  else sessionStorage.removeItem(KEY_ITEM);
}

/** @type {(() => Promise<boolean>) | null} asked on a 401; answers whether a new key was given */
let askForKey = null;

/** @param {() => Promise<boolean>} ask */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/**
 * @param {string} method
 * @param {string} path    relative, e.g. "v1/sessions"
 * @param {object} [body]
 * @param {{quiet?: boolean, keepalive?: boolean}} [options]  quiet: a 401 is an error and asks nobody
 * @returns {Promise<any>}
 */
export async function request(method, path, body, options = {}) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  const key = storedKey();
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method,
      headers,
      body: body ? JSON.stringify(body) : undefined,
      keepalive: options.keepalive,
      cache: "no-store",
    });
  } catch {
    throw new ApiError(0, { code: "unreachable", message: "the server did not answer" });
  }
  const answer = await response.json().catch(() => ({}));
  if (response.ok) return answer;
  if (response.status === 401 && askForKey && !options.quiet && (await askForKey())) {
    return request(method, path, body, options);
  }
  const retryAfter = Number(response.headers.get("Retry-After"));
  throw new ApiError(response.status, answer.error ?? {}, Number.isFinite(retryAfter) && retryAfter > 0 ? retryAfter : null);
}

/**
 * @param {{prompt: string, seed?: number, format: string}} wish
 * @param {{quiet?: boolean}} [options]
 * @returns {Promise<import("./protocol.js").Created>}
 */
export const createSession = (wish, options) => request("POST", "v1/sessions", wish, options);

/** @param {string} id */
export const readCard = (id) => request("GET", `v1/sessions/${id}/card`);

/** Ends a session; used when a tile or the whole page goes away. @param {string} id */
export const endSession = (id) => request("DELETE", `v1/sessions/${id}`, undefined, { quiet: true, keepalive: true });

/** @param {string} id */
export function streamUrl(id) {
  const url = new URL(`v1/sessions/${id}/stream`, document.baseURI);
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return url.href;
}
