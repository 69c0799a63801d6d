// Faces and their five points: MTCNN's cascade (Zhang et al. 2016), and O-Net alone on the last box
// from one frame to the next. The counterpart of encoder/align.py and of facenet-pytorch's MTCNN.
//
//     const faces = await detect(picture, nets);       // largest first: {box, points, score}
//     const face = await look(picture, box, nets);     // the face in about this box, or null
//
// `nets` has three functions from images, a Float32Array of (B, 3, H, W), and B, H, W to the
// outputs: pnet -> {edges (B, 4, H', W'), probabilities (B, 2, H', W')}, rnet -> {edges (B, 4),
// probabilities (B, 2)}, onet -> the same and {points (B, 10)}. A box is [left, top, right, bottom].

import { BOX, area, resize } from "./geometry.js";

const SMALLEST = 20; // pixels; MTCNN was trained on faces from 12 up, and errs much below 20
const LONGEST = 1024; // side in pixels of the copy that is searched
const MIN_FACE = 1 / 12; // of the shorter side: the smallest face to look for at first
const MIN_SCORE = 0.9; // probability of a face
const THRESHOLDS = [0.6, 0.7, 0.7]; // of the three networks
const STEP = 0.709; // from one size of the pyramid to the next
const BATCH = 512; // boxes at once

// All faces of a picture. `thorough`: down to 20 pixels where no larger one is found.
export async function detect(picture, nets, thorough = true) {
  const shrink = Math.max(1, Math.max(picture.width, picture.height) / LONGEST);
  const width = Math.max(1, Math.round(picture.width / shrink));
  const height = Math.max(1, Math.round(picture.height / shrink));
  if (Math.min(width, height) < SMALLEST) return [];
  const whole = [0, 0, picture.width, picture.height];
  const copy = shrink > 1 ? resize(picture, whole, width, height, BOX, 2) : picture;

  const smallest = Math.max(SMALLEST, Math.trunc(MIN_FACE * Math.min(width, height)));
  let faces = await cascade(copy, smallest, nets);
  if (!faces.length && thorough && smallest > SMALLEST) faces = await cascade(copy, SMALLEST, nets);

  const ratio = [picture.width / width, picture.height / height];
  return faces
    .filter(({ score }) => score >= MIN_SCORE)
    .map(({ box, points, score }) => ({
      box: box.map((value, i) => value * ratio[i % 2]),
      points: points.map(([x, y]) => [x * ratio[0], y * ratio[1]]),
      score,
    }))
    .sort((one, other) => size(other.box) - size(one.box));
}

// The face in about this box, which may lie beyond a border; null where O-Net sees none.
export async function look(picture, box, nets) {
  const [left, top, right] = square(box).map(Math.round), side = Math.max(1, right - left);
  const images = new Float32Array(3 * 48 * 48);
  area(cut(picture, left, top, side), [0, 0, side, side], 48, 48, images);
  const { edges, points, probabilities } = await nets.onet(images, 1, 48, 48);
  if (probabilities.data[1] < THRESHOLDS[2]) return null;
  const corner = [left, top, left + side, top + side];
  return {
    box: corner.map((value, i) => value + side * edges.data[i]),
    points: [0, 1, 2, 3, 4].map((k) => [left + side * points.data[k], top + side * points.data[5 + k]]),
    score: probabilities.data[1],
  };
}

// A square of the picture; grey, which the network reads as 0, where that ends.
function cut({ data: source, width, height }, left, top, side) {
  const data = new Uint8ClampedArray(4 * side * side).fill(127);
  const x0 = Math.max(0, left), x1 = Math.min(width, left + side);
  for (let y = Math.max(0, top); y < Math.min(height, top + side) && x0 < x1; y++) {
    const row = source.subarray(4 * (y * width + x0), 4 * (y * width + x1));
    data.set(row, 4 * ((y - top) * side + x0 - left));
  }
  return { data, width: side, height: side };
}

async function cascade(picture, smallest, nets) {
  let boxes = await first(picture, smallest, nets);
  boxes = await second(picture, boxes, nets);
  return third(picture, boxes, nets);
}

// ---------------------------------------------------------------------- the three stages

// P-Net on a pyramid of copies: boxes (squares) that may hold a face.
async function first(picture, smallest, nets) {
  const found = [];
  const whole = [0, 0, picture.width, picture.height];
  let scale = 12 / smallest;
  for (; Math.min(picture.width, picture.height) * scale >= 12; scale *= STEP) {
    const height = Math.trunc(picture.height * scale + 1), width = Math.trunc(picture.width * scale + 1);
    const images = new Float32Array(3 * height * width);
    area(picture, whole, width, height, images);
    const { edges, probabilities } = await nets.pnet(images, 1, height, width);
    found.push(...suppress(windows(edges, probabilities, scale), 0.5));
  }
  return suppress(found, 0.7).map(({ box, shift }) => {
    const sides = [box[2] - box[0], box[3] - box[1]];
    return square(box.map((value, i) => value + shift[i] * sides[i % 2]));
  });
}

// The windows of 12 pixels, 2 apart, that P-Net takes for a face, in pixels of the picture.
function windows(edges, probabilities, scale) {
  const [, , rows, columns] = probabilities.dims, plane = rows * columns;
  const found = [];
  for (let i = 0; i < plane; i++) {
    const score = probabilities.data[plane + i];
    if (score < THRESHOLDS[0]) continue;
    const x = 2 * (i % columns), y = 2 * Math.floor(i / columns);
    const box = [x + 1, y + 1, x + 12, y + 12].map((value) => Math.floor(value / scale));
    found.push({ box, score, shift: [0, 1, 2, 3].map((k) => edges.data[k * plane + i]) });
  }
  return found;
}

async function second(picture, boxes, nets) {
  const { edges, probabilities } = await run(nets.rnet, picture, boxes, 24);
  const kept = boxes
    .map((box, i) => ({ box, score: probabilities[2 * i + 1], shift: edges.slice(4 * i, 4 * i + 4) }))
    .filter(({ score }) => score > THRESHOLDS[1]);
  return suppress(kept, 0.7).map(({ box, shift }) => square(moved(box, shift)));
}

async function third(picture, boxes, nets) {
  const { edges, points, probabilities } = await run(nets.onet, picture, boxes, 48);
  const kept = boxes.map((box, i) => {
    const width = box[2] - box[0] + 1, height = box[3] - box[1] + 1;
    const five = [0, 1, 2, 3, 4].map((k) => [
      box[0] - 1 + width * points[10 * i + k],
      box[1] - 1 + height * points[10 * i + 5 + k],
    ]);
    const shift = edges.slice(4 * i, 4 * i + 4);
    return { box: moved(box, shift), points: five, score: probabilities[2 * i + 1] };
  });
  return suppress(kept.filter(({ score }) => score > THRESHOLDS[2]), 0.7, true);
}

// A network on the boxes of a picture, each brought to side x side; its outputs, one after another.
async function run(net, picture, boxes, side) {
  const all = { edges: [], points: [], probabilities: [] };
  for (let from = 0; from < boxes.length; from += BATCH) {
    const some = boxes.slice(from, from + BATCH);
    const images = new Float32Array(some.length * 3 * side * side);
    some.forEach((box, i) => area(picture, within(box, picture), side, side, images, i * 3 * side * side));
    const outputs = await net(images, some.length, side, side);
    for (const name of Object.keys(outputs)) all[name].push(...outputs[name].data);
  }
  return all;
}

// ------------------------------------------------------------------------------- boxes

export const size = ([left, top, right, bottom]) => (right - left) * (bottom - top);

// Whole pixels of the picture, of which there is at least one.
function within(box, { width, height }) {
  const [left, top, right, bottom] = box.map(Math.trunc);
  const x = Math.min(Math.max(left, 1), width) - 1, y = Math.min(Math.max(top, 1), height) - 1;
  return [x, y, Math.max(x + 1, Math.min(right, width)), Math.max(y + 1, Math.min(bottom, height))];
}

function square([left, top, right, bottom]) {
  const width = right - left, height = bottom - top, side = Math.max(width, height);
  const x = left + (width - side) / 2, y = top + (height - side) / 2;
  return [x, y, x + side, y + side];
}

function moved(box, shift) {
  const sides = [box[2] - box[0] + 1, box[3] - box[1] + 1];
  return box.map((value, i) => value + shift[i] * sides[i % 2]);
}

// Of boxes that overlap by more than the threshold, the likeliest (non-maximum suppression): a part
// of their union, or with `least`, of the smaller one, and each a pixel larger.
export function suppress(found, threshold, least = false) {
  const grow = least ? 1 : 0;
  const extent = (box) => (box[2] - box[0] + grow) * (box[3] - box[1] + grow);
  const left = [...found].sort((one, other) => other.score - one.score);
  const kept = [];
  for (const one of left) {
    const overlaps = kept.some(({ box }) => {
      const width = Math.min(box[2], one.box[2]) - Math.max(box[0], one.box[0]) + grow;
      const height = Math.min(box[3], one.box[3]) - Math.max(box[1], one.box[1]) + grow;
      const both = Math.max(0, width) * Math.max(0, height);
      const [a, b] = [extent(box), extent(one.box)];
      return both / (least ? Math.min(a, b) : a + b - both) > threshold;
    });
    if (!overlaps) kept.push(one);
  }
  return kept;
}
