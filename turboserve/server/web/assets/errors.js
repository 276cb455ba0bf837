/**
 * Error codes in human words: what happened, and what the viewer can do about it.
 * The server's own message is kept for codes we have no better words for.
 */

/**
 * @typedef {Object} Explanation
 * @property {string} title
 * @property {string} advice
 * @property {boolean} retry   whether "Try again" makes sense
 */

/** @type {Record<string, [string, string, boolean]>} */
const WORDS = {
  unreachable: ["The server does not answer", "Check that it is still running, then try again.", true],
  unauthenticated: ["This server asks for a key", "Enter the API key you were given.", true],
  forbidden: ["This key may not do that", "Ask for a key with the admin role.", false],
  not_found: ["The server does not know this stream any more", "Start it again here.", true],
  session_unknown: ["The server does not know this stream any more", "Start it again here.", true],
  invalid_prompt: ["This prompt cannot be used", "Write a sentence of plain text.", false],
  invalid_request: ["The server did not take this request", "Reload the page; it may be older than the server.", false],
  unknown_model: ["This model is not served here", "Reload the page to see what is.", false],
  quota_exceeded: ["A limit of your key is reached", "Stop a stream, or wait a moment, then try again.", true],
  overloaded: ["The server is full", "All places and the queue are taken. Try again in a moment.", true],
  refused: ["The server cannot take this now", "Try again in a moment.", true],
  conflict: ["That is not possible right now", "The stream has moved on; try again.", true],
  index_passed: ["That chunk has already been made", "The change was too late for it; send it again.", true],
  index_out_of_range: ["This view and the server disagree about the position", "Start a new stream.", true],
  token_refused: ["This view's ticket is no longer valid", "The stream may be open in another window. Start it again here.", true],
  attached_elsewhere: ["This stream is being watched in another window", "It plays there now.", false],
  session_expired: ["This stream has expired", "Nobody watched it for a while. Start it again.", true],
  session_failed: ["This stream failed on the server", "Other streams are not affected. Start it again.", true],
  session_poisoned: ["This stream failed on the server", "Other streams are not affected. Start it again.", true],
  worker_failed: ["The worker that made this stream is gone", "The stream continues as soon as another one is ready.", true],
  bad_messages: ["The server did not understand this page", "Reload the page; it may be older than the server.", true],
  message_too_big: ["That prompt is too long", "Use a shorter one.", true],
  flood: ["Too many messages in a short time", "Wait a moment; the stream continues by itself.", true],
  too_slow: ["This connection is slower than the video", "The stream continues where it stopped.", true],
  connection_lost: ["The connection was lost", "Check the network, then try again: the stream continues where it stopped.", true],
  decode: ["This browser cannot show the video", "Try a current Chrome, Edge, Firefox or Safari.", true],
};

/**
 * @param {string} code
 * @param {string} [message]  the server's words
 * @param {string} [hint]
 * @returns {Explanation}
 */
export function explain(code, message = "", hint = "") {
  const known = WORDS[code];
  if (known) return { title: known[0], advice: known[1], retry: known[2] };
  return { title: message || "Something went wrong", advice: hint || `The server calls it “${code}”.`, retry: true };
}
