/**
 * A plain MP4 writer: encoded frames in, one playable file out, index in front. H.264 becomes .mp4;
 * JPEG pictures, which browsers' MP4 players do not take, become a QuickTime file of motion JPEG.
 */

import { NAL_PPS, NAL_SPS, nalType, nalUnits } from "./protocol.js";

/**
 * @typedef {Object} Film
 * @property {"h264"|"jpeg"} format
 * @property {number} width
 * @property {number} height
 * @property {number} fps
 * @property {{data: Uint8Array, key: boolean}[]} frames
 */

const text = new TextEncoder();
const u8 = (/** @type {number[]} */ ...bytes) => new Uint8Array(bytes);
const u16 = (/** @type {number} */ n) => u8((n >> 8) & 255, n & 255);
const u32 = (/** @type {number} */ n) => u8((n >>> 24) & 255, (n >>> 16) & 255, (n >>> 8) & 255, n & 255);
const zeros = (/** @type {number} */ n) => new Uint8Array(n);

/** @param {Uint8Array[]} parts */
function join(parts) {
  const whole = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** @param {string} type @param {...Uint8Array} parts */
function box(type, ...parts) {
  const body = join(parts);
  return join([u32(body.length + 8), text.encode(type), body]);
}

/** A box with version 0 and flags. @param {string} type @param {number} flags @param {...Uint8Array} parts */
const fullBox = (type, flags, ...parts) => box(type, u32(flags & 0xffffff), ...parts);

const MATRIX = join([u32(0x10000), zeros(12), u32(0x10000), zeros(12), u32(0x40000000)]);

/**
 * Annex B to the length-prefixed form that MP4 holds. Parameter sets stay in the samples too, so a
 * stream whose encoder was renewed after a reconnect still decodes.
 * @param {Uint8Array} unit
 */
function lengthPrefixed(unit) {
  return join(nalUnits(unit).flatMap((nal) => [u32(nal.length), nal]));
}

/** @param {Uint8Array} unit  an IDR access unit */
function avcConfiguration(unit) {
  const nals = nalUnits(unit);
  const sps = nals.find((nal) => nalType(nal) === NAL_SPS);
  const pps = nals.find((nal) => nalType(nal) === NAL_PPS);
  if (!sps || !pps) throw new Error("the stream carries no parameter sets");
  return box("avcC", u8(1, sps[1], sps[2], sps[3], 0xff, 0xe1), u16(sps.length), sps, u8(1), u16(pps.length), pps);
}

/** @param {Film} film */
function sampleEntry(film) {
  const name = film.format === "h264" ? "avc1" : "jpeg";
  const codec = film.format === "h264" ? avcConfiguration(film.frames[0].data) : zeros(0);
  return box(
    name,
    zeros(6), u16(1), // data reference
    zeros(16),
    u16(film.width), u16(film.height),
    u32(0x480000), u32(0x480000), zeros(4), // 72 dpi
    u16(1), zeros(32), u16(24), u16(0xffff),
    codec,
  );
}

/**
 * @param {Film} film
 * @returns {Blob}
 */
export function writeFilm(film) {
  if (!film.frames.length) throw new Error("there is no frame to write yet");
  const samples = film.frames.map((frame) => (film.format === "h264" ? lengthPrefixed(frame.data) : frame.data));
  const timescale = 1000 * Math.max(1, Math.round(film.fps));
  const delta = Math.round(timescale / film.fps);
  const duration = delta * samples.length;
  const brand = film.format === "h264" ? "isom" : "qt  ";
  const ftyp = box("ftyp", text.encode(brand), u32(0x200), text.encode(film.format === "h264" ? "isomiso2avc1mp41" : "qt  "));
  const keys = film.frames.flatMap((frame, n) => (frame.key ? [u32(n + 1)] : []));

  /** @param {number} dataOffset */
  const moov = (dataOffset) => {
    const table = box(
      "stbl",
      fullBox("stsd", 0, u32(1), sampleEntry(film)),
      fullBox("stts", 0, u32(1), u32(samples.length), u32(delta)),
      fullBox("stss", 0, u32(keys.length), ...keys),
      fullBox("stsc", 0, u32(1), u32(1), u32(samples.length), u32(1)),
      fullBox("stsz", 0, u32(0), u32(samples.length), ...samples.map((sample) => u32(sample.length))),
      fullBox("stco", 0, u32(1), u32(dataOffset)),
    );
    const media = box(
      "mdia",
      fullBox("mdhd", 0, zeros(8), u32(timescale), u32(duration), u16(0x55c4), u16(0)),
      fullBox("hdlr", 0, zeros(4), text.encode("vide"), zeros(12), text.encode("TurboServe\0")),
      box("minf", fullBox("vmhd", 1, zeros(8)), box("dinf", fullBox("dref", 0, u32(1), fullBox("url ", 1))), table),
    );
    const track = box(
      "trak",
      fullBox("tkhd", 3, zeros(8), u32(1), zeros(4), u32(duration), zeros(16), MATRIX, u32(film.width << 16), u32(film.height << 16)),
      media,
    );
    const header = fullBox("mvhd", 0, zeros(8), u32(timescale), u32(duration), u32(0x10000), u16(0x100), zeros(10), MATRIX, zeros(24), u32(2));
    return box("moov", header, track);
  };

  const offset = ftyp.length + moov(0).length + 8;
  const bytes = samples.reduce((sum, sample) => sum + sample.length, 0);
  const parts = [ftyp, moov(offset), u32(bytes + 8), text.encode("mdat"), ...samples];
  return new Blob(/** @type {BlobPart[]} */ (parts), { type: film.format === "h264" ? "video/mp4" : "video/quicktime" });
}
