// From a frame to its drawing, in a thread of its own: finds the face, cuts it out, encodes, draws.
//
//     worker.postMessage({id: 0, start: {networks, models, runtime, wasm, threads}})
//     worker.postMessage({id: 1, frame, settings, still, seconds}, [frame])
//
// Each message is answered by one with its id, and what translate() promises or an `error`.
// Letters: L layers of w+, D dimension of w, S side of the crop, R of the drawing.

import { detect } from "./detector.js";
import { ffhqMatrix, warp } from "./geometry.js";
import { Tracker } from "./tracker.js";

const TRIAL = 5; // runs that WebGPU and WebAssembly are compared by, after
const WARM_UP = 2; // others
const PATIENCE = 4000; // ms that they may take together
const MOST_PIXELS = 50e6; // of a frame

let ort = null;
let networks = null; // {crop: S, resolution: R, blocks: [4, 8, … R], layers: L, dimension: D, styles}
let nets = null; // detector's networks, see detector.js
let drawing = null; // sessions: encoder, styles, face_b4, … anime_bR, and their provider
const tracker = new Tracker();

onmessage = async ({ data: { id, start: first, ...request } }) => {
  try {
    const answer = first ? await start(first) : await translate(request);
    const pictures = [answer.drawing, answer.reconstruction].filter(Boolean);
    postMessage({ id, answer }, pictures);
  } catch (error) {
    if (!error.code) console.error(error);
    postMessage({ id, error: { code: error.code, message: error.message } });
  }
};

function failure(code, message) {
  return Object.assign(new Error(message), { code });
}

// ------------------------------------------------------------------------------ the start

async function start({ networks: described, models, runtime, wasm, threads }) {
  networks = described;
  const folder = new URL("onnxruntime/", import.meta.url);
  ort = await import(new URL(runtime.script, folder).href);
  ort.env.wasm.numThreads = threads;
  ort.env.wasm.wasmBinary = wasm;
  ort.env.wasm.wasmPaths = { mjs: new URL(runtime.loader, folder).href };

  const stages = await sessions(models, ["pnet", "rnet", "onet"], "wasm");
  nets = Object.fromEntries(Object.entries(stages).map(([name, session]) => [
    name, (images, count, height, width) => session.run({ pictures: tensor(images, [count, 3, height, width]) }),
  ]));
  const names = Object.keys(models).filter((name) => !(name in stages));
  drawing = await sessions(models, names, "wasm");
  let provider = "WebAssembly";
  if (runtime.webgpu && (await faster(models, names))) provider = "WebGPU";
  return { provider, threads };
}

async function sessions(models, names, provider) {
  const result = {};
  for (const name of names) {
    const model = new Uint8Array(models[name]);
    result[name] = await ort.InferenceSession.create(model, { executionProviders: [provider] });
  }
  return result;
}

// Whether WebGPU draws faster; if so, it does from here on.
async function faster(models, names) {
  const before = drawing;
  try {
    const slow = await trial();
    drawing = await sessions(models, names, "webgpu");
    if ((await trial()) < slow) return true;
    for (const session of Object.values(drawing)) await session.release();
  } catch (error) {
    console.info("WebGPU is not used:", error.message); // a driver that lacks something
  }
  drawing = before;
  return false;
}

// The shortest time of a drawing, in ms; Infinity where the time is up before one was taken.
async function trial() {
  const side = networks.crop, grey = new Uint8ClampedArray(4 * side * side).fill(127);
  const settings = { swap: networks.swap, truncation: 1, colours: 0 };
  const until = performance.now() + PATIENCE;
  let best = Infinity;
  for (let i = 0; i < WARM_UP + TRIAL && performance.now() < until; i++) {
    const began = performance.now();
    await draw(await encode({ data: grey }), settings);
    if (i >= WARM_UP) best = Math.min(best, performance.now() - began);
  }
  return best;
}

// ----------------------------------------------------------------------------- a frame

async function translate({ frame, settings, still, seconds }) {
  const began = performance.now();
  const picture = pixels(frame);
  const [face, faces] = await find(picture, still, seconds);
  if (!face) throw failure("no-face", "No face was found; take a picture that shows one.");
  const detected = performance.now();

  const crop = warp(picture, ffhqMatrix(face.points), networks.crop);
  let ws = await encode(crop);
  if (!still) ws = tracker.smooth(ws, seconds);
  const encoded = performance.now();

  const result = await draw(ws, settings);
  const done = performance.now();
  return {
    drawing: await bitmap(result.anime),
    reconstruction: result.reconstruction && (await bitmap(result.reconstruction)),
    faces,
    box: face.box.map((v, i) => Math.min(1, Math.max(0, v / (i % 2 ? picture.height : picture.width)))),
    ms: { detect: detected - began, encode: encoded - detected, draw: done - encoded, total: done - began },
  };
}

function pixels(frame) {
  const { width, height } = frame;
  try {
    if (width * height > MOST_PIXELS) {
      throw failure("too-large", `The picture has more than ${MOST_PIXELS / 1e6} million pixels; choose a smaller one.`);
    }
    const canvas = new OffscreenCanvas(width, height);
    const context = canvas.getContext("2d", { alpha: false, willReadFrequently: true });
    context.fillStyle = "white"; // what is transparent lies on white
    context.fillRect(0, 0, width, height);
    context.drawImage(frame, 0, 0);
    return context.getImageData(0, 0, width, height);
  } finally {
    frame.close();
  }
}

// [the face that is drawn, or null; how many there are]
async function find(picture, still, seconds) {
  if (still) {
    const faces = await detect(picture, nets);
    return [faces[0] ?? null, faces.length];
  }
  return [await tracker.follow(picture, seconds, nets), tracker.faces];
}

// ------------------------------------------------------------------------- the networks

function tensor(data, dims) {
  return new ort.Tensor("float32", data, dims);
}

// A crop S x S -> ws, L * D numbers.
async function encode({ data }) {
  const side = networks.crop, plane = side * side, images = new Float32Array(3 * plane);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) images[c * plane + i] = data[4 * i + c] / 127.5 - 1;
  }
  const { ws } = await drawing.encoder.run({ images: tensor(images, [1, 3, side, side]) });
  return ws.data;
}

// ws -> {anime, reconstruction}: (1, 3, R, R) in about [-1, 1]. The last `swap` blocks are drawn.
async function draw(found, { swap, truncation, colours, reconstruction, style }) {
  const { blocks, layers, dimension, styles: names } = networks;
  const styles = await drawing.styles.run({
    found: tensor(found, [1, layers, dimension]),
    truncation: tensor([truncation], [1]),
    colours: tensor([colours], [1]),
  });
  const shared = blocks.length - swap; // blocks of both
  const trunk = await through("face", 0, shared, {}, styles.ws);
  const drawn = style ?? names[0];
  const anime = await through(drawn, shared, blocks.length, trunk, styles.limited);
  const own = reconstruction ? await through("face", shared, blocks.length, trunk, styles.ws) : null;
  return { anime: anime.image, reconstruction: own?.image };
}

// Blocks `from` to `to` of one generator; `state`: what the block before gave.
async function through(kind, from, to, state, ws) {
  for (let i = from; i < to; i++) {
    const feeds = i ? { features: state.x, picture: state.image, ws } : { ws };
    // a style has its own late blocks, and shares the early ones
    const name = `_b${networks.blocks[i]}`;
    state = await (drawing[kind + name] ?? drawing[`face${name}`]).run(feeds);
  }
  return state;
}

// (1, 3, R, R) in [-1, 1] -> an ImageBitmap R x R.
function bitmap({ data, dims: [, , height, width] }) {
  const plane = height * width, result = new ImageData(width, height);
  for (let i = 0; i < plane; i++) {
    for (let c = 0; c < 3; c++) result.data[4 * i + c] = 127.5 * (data[c * plane + i] + 1);
    result.data[4 * i + 3] = 255;
  }
  return createImageBitmap(result);
}
