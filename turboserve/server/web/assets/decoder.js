/**
 * Encoded chunks to pictures. Two decoders, one interface: `decode(header, units)` and an `onFrame`
 * that receives pictures in order. Every chunk is a closed GOP, so a broken one never harms the next.
 */

import { NAL_SPS, codecOfSps, nalType, nalUnits } from "./protocol.js";

/**
 * @typedef {Object} Frame
 * @property {ImageBitmap} image
 * @property {number} index      chunk
 * @property {number} position   place within the chunk, from 0
 * @property {number} version    prompt version
 *
 * @typedef {(frame: Frame) => void} OnFrame
 * @typedef {(error: Error) => void} OnError
 */

export class JpegDecoder {
  /** @param {OnFrame} onFrame @param {OnError} onError */
  constructor(onFrame, onError) {
    this.onFrame = onFrame;
    this.onError = onError;
    /** @type {Promise<void>} keeps chunks in order */
    this.turn = Promise.resolve();
    this.closed = false;
  }

  /** @param {import("./protocol.js").ChunkHeader} header @param {Uint8Array[]} units */
  decode(header, units) {
    // All pictures of a chunk decode at once; they are handed on in order.
    const pictures = units.map((unit) =>
      createImageBitmap(new Blob([/** @type {BlobPart} */ (unit)], { type: "image/jpeg" })),
    );
    this.turn = this.turn.then(async () => {
      for (const [position, picture] of pictures.entries()) {
        try {
          const image = await picture;
          if (this.closed) image.close();
          else this.onFrame({ image, index: header.index, position, version: header.prompt_version });
        } catch (error) {
          if (!this.closed) this.onError(/** @type {Error} */ (error));
        }
      }
    });
  }

  close() {
    this.closed = true;
  }
}

export class H264Decoder {
  /** @param {OnFrame} onFrame @param {OnError} onError */
  constructor(onFrame, onError) {
    this.onFrame = onFrame;
    this.onError = onError;
    /** @type {VideoDecoder|null} */
    this.decoder = null;
    /** @type {Map<number, {index: number, position: number, version: number}>} by timestamp */
    this.expected = new Map();
    this.timestamp = 0;
    /** @type {Promise<void>} */
    this.turn = Promise.resolve();
    this.closed = false;
  }

  /** @param {import("./protocol.js").ChunkHeader} header @param {Uint8Array[]} units */
  decode(header, units) {
    if (this.closed) return;
    try {
      if (!this.decoder || this.decoder.state !== "configured") this.#configure(units[0]);
      const decoder = /** @type {VideoDecoder} */ (this.decoder);
      for (const [position, data] of units.entries()) {
        this.timestamp += 1;
        this.expected.set(this.timestamp, { index: header.index, position, version: header.prompt_version });
        decoder.decode(
          new EncodedVideoChunk({ type: position === 0 ? "key" : "delta", timestamp: this.timestamp, data }),
        );
      }
      // The chunk is closed: nothing in the decoder has to wait for the next one.
      decoder.flush().catch((error) => this.#failed(error, decoder));
    } catch (error) {
      this.#failed(/** @type {Error} */ (error), this.decoder);
    }
  }

  close() {
    this.closed = true;
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
    this.expected.clear();
  }

  /** @param {Uint8Array} first  the chunk's IDR access unit, parameter sets in front */
  #configure(first) {
    const sps = nalUnits(first).find((nal) => nalType(nal) === NAL_SPS);
    if (!sps) throw new Error("the first frame of the chunk carries no parameter set");
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
    this.expected.clear();
    /** @type {VideoDecoder} */
    const decoder = new VideoDecoder({
      output: (picture) => this.#output(picture),
      error: (error) => this.#failed(error, decoder),
    });
    decoder.configure({ codec: codecOfSps(sps), optimizeForLatency: true });
    this.decoder = decoder;
  }

  /** @param {VideoFrame} picture */
  #output(picture) {
    const place = this.expected.get(picture.timestamp);
    this.expected.delete(picture.timestamp);
    // A bitmap, because a decoder has only so many pictures of its own to lend.
    const bitmap = createImageBitmap(picture).finally(() => picture.close());
    this.turn = this.turn
      .then(async () => {
        const image = await bitmap;
        if (this.closed || !place) image.close();
        else this.onFrame({ image, ...place });
      })
      .catch((error) => {
        if (!this.closed) this.onError(error);
      });
  }

  /** @param {unknown} error @param {VideoDecoder|null} decoder */
  #failed(error, decoder) {
    if (this.closed || decoder !== this.decoder) return;
    this.decoder = null; // the next chunk starts a new one
    this.onError(error instanceof Error ? error : new Error(String(error)));
  }
}
