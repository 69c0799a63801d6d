// The largest face of a camera, followed from frame to frame: O-Net alone looks where it was, and
// the whole cascade searches once in a while, or when it is lost. encoder/video/track.py's counterpart.
//
//     const tracker = new Tracker();
//     const face = await tracker.follow(picture, seconds, nets);      // {box, points, score} or null
//     const ws = tracker.smooth(found, seconds);                      // its latent, calmed as well
//
// What moves the least is smoothed the most: Casiez et al. 2012, "1 € Filter".

import { BOX, ffhqMatrix, resize } from "./geometry.js";
import { detect, look, size } from "./detector.js";

const EVERY = 30; // frames from one full search to the next
const AGAIN = 3; // the same where there is no face
const LONGEST = 320; // side in pixels of the copy that is searched
const SAME = 0.3; // boxes that overlap by so much of their union show one face
const LARGER = 2; // times the area: then the largest face is another one
const JUMP = 0.25; // of the crop's side between two frames: nothing is smoothed
const POINTS = [1, 20]; // cutoff in Hz; Hz more per side of the crop and second
const WS = [1, 5]; // cutoff in Hz; Hz more per root mean square of w and second

export class Tracker {
  constructor() {
    this.face = null;
    this.faces = 0; // that the last search found
    this.since = EVERY; // frames since then
    this.unfound = 0; // searches in a row that did not find the face
  }

  async follow(picture, seconds, nets) {
    let face = this.face && (await look(picture, this.face.box, nets));
    this.since += 1;
    if (this.since >= (face ? EVERY : AGAIN)) face = await this.search(picture, face, nets);
    this.face = face && this.calm(face, seconds);
    return this.face;
  }

  // The face that is to be followed from here on: the same, or another one.
  async search(picture, face, nets) {
    this.since = 0;
    const found = await detect(reduced(picture, LONGEST), nets, false);
    this.faces = Math.max(found.length, face ? 1 : 0);
    const [largest] = found.map(({ box }) => scaled(box, picture));
    const seen = face && found.some(({ box }) => overlap(scaled(box, picture), face.box) > SAME);
    this.unfound = face && !seen ? this.unfound + 1 : 0;
    if (this.unfound > 1) face = null; // O-Net alone may be wrong about one place
    if (largest && (!face || size(largest) > LARGER * size(face.box))) {
      return (await look(picture, largest, nets)) ?? face;
    }
    return face;

    function scaled(box, { width, height }) {
      const ratio = Math.max(1, Math.max(width, height) / LONGEST);
      return box.map((value) => value * ratio);
    }
  }

  // The same face, its points smoothed unless it has jumped.
  calm(face, seconds) {
    const [a, , , d] = ffhqMatrix(face.points), side = Math.hypot(a, d);
    const points = face.points.flat();
    const far = this.face ? mean(points.map((value, i) => value - this.face.points.flat()[i])) : 0;
    if (!this.face || far > JUMP * side) {
      this.points = new OneEuro(...POINTS);
      this.ws = new OneEuro(...WS);
    }
    const smooth = this.points.next(points, seconds, side);
    return { ...face, points: [0, 1, 2, 3, 4].map((i) => [smooth[2 * i], smooth[2 * i + 1]]) };

    function mean(shifts) {
      const sum = (odd) => shifts.reduce((total, shift, i) => total + (i % 2 === odd ? shift : 0), 0);
      return Math.hypot(sum(0), sum(1)) / 5;
    }
  }

  smooth(ws, seconds) {
    return this.ws.next(ws, seconds, rootMeanSquare(ws) || 1);
  }
}

// A low-pass filter whose cutoff rises with speed; all values share one, so that shapes are kept.
export class OneEuro {
  constructor(cutoff, beta, speedCutoff = 1) {
    Object.assign(this, { cutoff, beta, speedCutoff, last: null });
  }

  next(raw, seconds, unit = 1) {
    const passed = this.last ? seconds - this.last.seconds : 0;
    if (!this.last) this.last = { seconds, raw, smooth: raw, speed: raw.map(() => 0) };
    if (passed <= 0) return this.last.smooth;
    const { raw: before, smooth, speed } = this.last;
    const gain = share(this.speedCutoff, passed);
    const faster = speed.map((v, i) => v + gain * ((raw[i] - before[i]) / (passed * unit) - v));
    const follow = share(this.cutoff + this.beta * rootMeanSquare(faster), passed);
    const result = smooth.map((value, i) => value + follow * (raw[i] - value));
    this.last = { seconds, raw, smooth: result, speed: faster };
    return result;
  }
}

// Of the new value, after `passed` seconds: Casiez et al. 2012, eq. 2 and 3.
function share(cutoff, passed) {
  const turn = 2 * Math.PI * cutoff * passed;
  return turn / (1 + turn);
}

function rootMeanSquare(values) {
  return Math.sqrt(values.reduce((sum, value) => sum + value * value, 0) / values.length);
}

function reduced(picture, longest) {
  const shrink = Math.max(picture.width, picture.height) / longest;
  if (shrink <= 1) return picture;
  const width = Math.max(1, Math.round(picture.width / shrink));
  const height = Math.max(1, Math.round(picture.height / shrink));
  return resize(picture, [0, 0, picture.width, picture.height], width, height, BOX, Infinity);
}

// Of two boxes: what they share, as a part of what they cover together.
function overlap(a, b) {
  const width = Math.max(0, Math.min(a[2], b[2]) - Math.max(a[0], b[0]));
  const height = Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
  return (width * height) / (size(a) + size(b) - width * height);
}
