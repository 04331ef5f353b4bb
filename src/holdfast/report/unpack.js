// Texts that packed.py packed: gzip, five signs for four bytes.
"use strict";
const SIGNS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%,()*+-;.=:?@^_`{|}~";

async function unpackText(packed) {
  const values = new Uint8Array(128);
  [...SIGNS].forEach((sign, value) => { values[sign.charCodeAt(0)] = value; });
  const bytes = new DataView(new ArrayBuffer(Math.ceil(packed.length / 5) * 4));
  for (let i = 0, at = 0; i < packed.length; i += 5, at += 4) {
    let value = 0;
    for (let j = i; j < i + 5; j++) value = 85 * value + (j < packed.length ? values[packed.charCodeAt(j)] : 84);
    bytes.setUint32(at, value);
  }
  const missing = (5 - (packed.length % 5)) % 5; // signs of the last group, and as many bytes
  const whole = new Uint8Array(bytes.buffer, 0, bytes.byteLength - missing);
  const stream = new Blob([whole]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}
