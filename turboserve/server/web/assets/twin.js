/**
 * An undisturbed run of a stream that was disturbed: a second session with the same seed, the same steps and the same
 * prompts from the same chunks, made without a pause, to hold the digest chains of both against each other.
 *
 * The digest of chunk i is SHA-256 over the digest of chunk i-1 and the chunk's RGB frames, so that equal digests say
 * that every frame up to there is equal.
 */

import * as api from "./api.js";

const SILENCE_MS = 20_000;
/** Prompts that may wait on the server at once; the next are sent as these are reached. */
const PROMPTS_AHEAD = 12;

/**
 * @param {any} card            what GET v1/sessions/{id}/card says of the disturbed stream
 * @param {number} count        chunks to make
 * @param {(index: number, digest: string) => boolean} chunk   false: enough
 * @param {number} restMs       between chunks, so that the streams that are watched come first
 * @returns {Promise<{worker: string, disturbed: boolean}>} disturbed: it changed its owner on the way, and proves less
 */
export async function runTwin(card, count, chunk, restMs) {
  const [first, ...later] = card.inputs;
  const created = await api.createSession(
    /** @type {any} */ ({ prompt: first.prompt, seed: card.seed, steps: card.steps[0].steps, size: card.size, format: "jpeg", prompt_switch: card.prompt_switch ?? "swap", ...(card.decoder ? { decoder: card.decoder } : {}), allow_reduced_steps: false }),
    { quiet: true },
  );
  try {
    const epochs = await watch(created, later, count, chunk, restMs);
    const { worker } = await api.request("GET", `v1/sessions/${created.id}`);
    return { worker: worker ?? "", disturbed: epochs.size > 1 };
  } finally {
    await api.endSession(created.id).catch(() => {});
  }
}

/**
 * @param {any} created @param {any[]} later @param {number} count
 * @param {(index: number, digest: string) => boolean} chunk @param {number} restMs
 * @returns {Promise<Set<number>>} epochs seen
 */
function watch(created, later, count, chunk, restMs) {
  return new Promise((resolve, reject) => {
    const socket = new WebSocket(api.streamUrl(created.id));
    const epochs = new Set();
    const prompts = [...later];
    let waiting = 0;
    let header = /** @type {any} */ (null);
    let timer = 0;
    const listen = () => {
      window.clearTimeout(timer);
      timer = window.setTimeout(() => finish(new Error("the undisturbed run does not go on")), SILENCE_MS);
    };
    /** @param {Error} [error] */
    const finish = (error) => {
      window.clearTimeout(timer);
      socket.onclose = null;
      socket.close(1000);
      if (error) reject(error);
      else resolve(epochs);
    };
    const sendPrompts = () => {
      while (prompts.length && waiting < PROMPTS_AHEAD) {
        const { prompt, from_index } = prompts.shift();
        waiting += 1;
        socket.send(JSON.stringify({ type: "prompt", text: prompt, from_index, event_id: `twin-${from_index}` }));
      }
    };
    socket.onopen = () => {
      socket.send(JSON.stringify({ type: "attach", token: created.token, next_index: 0, format: "jpeg", pace: "free" }));
      sendPrompts(); // behind the attach on the same socket: bound before chunk 1 can begin
      listen();
    };
    socket.onmessage = async (event) => {
      listen();
      if (typeof event.data === "string") {
        const message = JSON.parse(event.data);
        if (message.type === "chunk") header = message;
        else if (message.type === "error") finish(new Error(message.message));
        return;
      }
      const { index, digest, epoch, prompt_version: version } = header;
      epochs.add(epoch);
      if (!chunk(index, digest) || index + 1 >= count) {
        finish();
        return;
      }
      waiting = Math.max(0, later.length - prompts.length - (version - 1));
      sendPrompts();
      await new Promise((done) => window.setTimeout(done, restMs));
      if (socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ type: "ack", index }));
    };
    socket.onclose = () => finish(new Error("the undisturbed run was cut off"));
  });
}
