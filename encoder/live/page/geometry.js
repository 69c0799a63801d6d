// Pictures as typed arrays: averaged, resized, and cut to FFHQ's square. encoder/geometry.py in the
// browser's language, with Pillow's arithmetic, so that both see the same crop of a face.
//
//     const matrix = ffhqMatrix(points);               // five points [x, y] of a face
//     const crop = warp(picture, matrix, 64);          // {data: RGBA bytes, width, height}
//
// A picture is an ImageData, or anything else with its `data`, `width` and `height`. Pixel (i, j)
// covers [i, i + 1] x [j, j + 1]. A matrix [a, b, c, d, e, f] takes (x, y) of the unit square to
// (a x + b y + c, d x + e y + f) of the picture.

// Means over a box [left, top, right, bottom] of whole pixels, as torch's "area" mode takes them;
// written to `out` from `offset` on as three planes height x width of (value - 127.5) / 128.
export function area({ data, width: stride }, [left, top, right, bottom], width, height, out, offset = 0) {
  const plane = width * height;
  const columns = bins(right - left, width), rows = bins(bottom - top, height);
  for (let y = 0, at = offset; y < height; y++) {
    const [y0, y1] = rows[y];
    for (let x = 0; x < width; x++, at++) {
      const [x0, x1] = columns[x];
      let red = 0, green = 0, blue = 0;
      for (let v = top + y0; v < top + y1; v++) {
        for (let i = 4 * (v * stride + left + x0), end = i + 4 * (x1 - x0); i < end; i += 4) {
          red += data[i];
          green += data[i + 1];
          blue += data[i + 2];
        }
      }
      const gain = 1 / (128 * (y1 - y0) * (x1 - x0));
      out[at] = red * gain - 127.5 / 128;
      out[at + plane] = green * gain - 127.5 / 128;
      out[at + 2 * plane] = blue * gain - 127.5 / 128;
    }
  }
}

// [first, last + 1] of the pixels that each of `count` means is taken of
function bins(length, count) {
  return Array.from({ length: count }, (_, i) => [
    Math.floor((i * length) / count),
    Math.ceil(((i + 1) * length) / count),
  ]);
}

// ------------------------------------------------------------------------------ resizing

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
export const LANCZOS = { support: 3, at: (x) => (Math.abs(x) < 3 ? sinc(x) * sinc(x / 3) : 0) };
export const BOX = { support: 0.5, at: (x) => (x > -0.5 && x <= 0.5 ? 1 : 0) };

// The box of a picture at another size, antialiased, as Pillow's `resize(…, box, reducing_gap)`.
export function resize(picture, [left, top, right, bottom], width, height, filter, gap) {
  const scale = [(right - left) / width, (bottom - top) / height];
  const factor = scale.map((s) => Math.max(1, Math.floor(s / gap)));
  let offset = [0, 0];
  if (factor[0] > 1 || factor[1] > 1) {
    const around = scale.map((s) => (filter.support - 0.5) * s); // what the filter sees of the rest
    offset = [Math.max(0, Math.trunc(left - around[0])), Math.max(0, Math.trunc(top - around[1]))];
    const end = [
      Math.min(picture.width, Math.ceil(right + around[0])),
      Math.min(picture.height, Math.ceil(bottom + around[1])),
    ];
    picture = reduce(picture, [...offset, ...end], factor);
  }
  const columns = taps((left - offset[0]) / factor[0], scale[0] / factor[0], width, picture.width, filter);
  const rows = taps((top - offset[1]) / factor[1], scale[1] / factor[1], height, picture.height, filter);
  const first = rows[0].start, last = rows[height - 1].start + rows[height - 1].weights.length;

  const wide = new Uint8ClampedArray(4 * width * (last - first)); // columns done, rows to do
  for (let y = first, at = 0; y < last; y++) {
    for (let x = 0; x < width; x++, at += 4) {
      const { start, weights } = columns[x];
      blend(picture.data, 4 * (y * picture.width + start), 4, weights, wide, at);
    }
  }
  const data = new Uint8ClampedArray(4 * width * height);
  for (let y = 0, at = 0; y < height; y++) {
    const { start, weights } = rows[y];
    for (let x = 0; x < width; x++, at += 4) {
      blend(wide, 4 * ((start - first) * width + x), 4 * width, weights, data, at);
    }
  }
  return { data, width, height };
}

function blend(source, from, step, weights, target, at) {
  let red = 0, green = 0, blue = 0;
  for (let k = 0; k < weights.length; k++, from += step) {
    red += weights[k] * source[from];
    green += weights[k] * source[from + 1];
    blue += weights[k] * source[from + 2];
  }
  target[at] = red;
  target[at + 1] = green;
  target[at + 2] = blue;
  target[at + 3] = 255;
}

// For each of `count` results: the first source pixel and the weights from there on.
function taps(from, scale, count, length, filter) {
  const stretch = Math.max(1, scale), support = filter.support * stretch;
  return Array.from({ length: count }, (_, i) => {
    const centre = from + (i + 0.5) * scale;
    const start = Math.max(0, Math.trunc(centre - support + 0.5));
    const stop = Math.min(length, Math.trunc(centre + support + 0.5));
    const weights = Float64Array.from({ length: stop - start }, (_, k) =>
      filter.at((start + k - centre + 0.5) / stretch));
    const sum = weights.reduce((a, b) => a + b, 0);
    return { start, weights: weights.map((weight) => weight / sum) };
  });
}

// Means of fx x fy pixels; the last ones of what is left.
function reduce({ data: source, width: stride }, [left, top, right, bottom], [fx, fy]) {
  const width = Math.ceil((right - left) / fx), height = Math.ceil((bottom - top) / fy);
  const data = new Uint8ClampedArray(4 * width * height);
  for (let y = 0, at = 0; y < height; y++) {
    const y0 = top + y * fy, y1 = Math.min(bottom, y0 + fy);
    for (let x = 0; x < width; x++, at += 4) {
      const x0 = left + x * fx, x1 = Math.min(right, x0 + fx);
      let red = 0, green = 0, blue = 0;
      for (let v = y0; v < y1; v++) {
        for (let i = 4 * (v * stride + x0), end = i + 4 * (x1 - x0); i < end; i += 4) {
          red += source[i];
          green += source[i + 1];
          blue += source[i + 2];
        }
      }
      const count = (y1 - y0) * (x1 - x0);
      data[at] = red / count;
      data[at + 1] = green / count;
      data[at + 2] = blue / count;
      data[at + 3] = 255;
    }
  }
  return { data, width, height };
}

// --------------------------------------------------------------------------- FFHQ's crop

// The square that FFHQ cuts around a face (Karras et al. 2019, appendix A), as a matrix. `points`:
// left eye, right eye, nose, left and right mouth corner; left in the picture.
export function ffhqMatrix([left, right, , leftMouth, rightMouth]) {
  const eyes = [(left[0] + right[0]) / 2, (left[1] + right[1]) / 2];
  const mouth = [(leftMouth[0] + rightMouth[0]) / 2, (leftMouth[1] + rightMouth[1]) / 2];
  const across = [right[0] - left[0], right[1] - left[1]];
  const down = [mouth[0] - eyes[0], mouth[1] - eyes[1]];
  const direction = [across[0] + down[1], across[1] - down[0]]; // `down` turned to point right
  const half = Math.max(2 * Math.hypot(...across), 1.8 * Math.hypot(...down));
  const x = direction.map((side) => (side / Math.hypot(...direction)) * half);
  const centre = [eyes[0] + 0.1 * down[0], eyes[1] + 0.1 * down[1]];
  const corner = [centre[0] - x[0] + x[1], centre[1] - x[1] - x[0]]; // centre - x - y
  return [2 * x[0], -2 * x[1], corner[0], 2 * x[1], 2 * x[0], corner[1]];
}

// The size x size crop that `matrix` cuts out of a picture; what lies outside is mirrored in.
export function warp(picture, matrix, size) {
  const [a, b, c, d, e, f] = matrix;
  const scale = Math.sqrt(Math.abs(a * e - b * d)) / size; // picture pixels per crop pixel

  // 1. The part of the picture that the crop shows, directly or in the mirror at a border.
  const margin = 3 * Math.max(1, scale);
  const range = (values, extent) => {
    const low = Math.floor(Math.min(...values) - margin), high = Math.ceil(Math.max(...values) + margin);
    const start = Math.max(0, Math.min(low, 2 * extent - high));
    return [start, Math.min(extent, Math.max(high, -low))];
  };
  const [left, right] = range([c, c + a, c + b, c + a + b], picture.width);
  const [top, bottom] = range([f, f + d, f + e, f + d + e], picture.height);

  // 2. Bring it to the crop's scale, antialiased.
  const width = Math.max(1, Math.round((right - left) / scale));
  const height = Math.max(1, Math.round((bottom - top) / scale));
  const part = resize(picture, [left, top, right, bottom], width, height, LANCZOS, 3);

  // 3. Turn and shift: crop pixels -> unit square -> picture -> part, in the mirror beyond it.
  const data = new Uint8ClampedArray(4 * size * size);
  const perX = width / (right - left), perY = height / (bottom - top);
  for (let j = 0, at = 0; j < size; j++) {
    for (let i = 0; i < size; i++, at += 4) {
      const u = (i + 0.5) / size, v = (j + 0.5) / size;
      bicubic(part, (a * u + b * v + c - left) * perX, (d * u + e * v + f - top) * perY, data, at);
    }
  }
  return { data, width: size, height: size };
}

function bicubic({ data, width, height }, x, y, target, at) {
  const [x0, xs] = cubic(x), [y0, ys] = cubic(y);
  let red = 0, green = 0, blue = 0;
  for (let k = 0; k < 4; k++) {
    const row = width * mirrored(y0 + k, height);
    for (let m = 0; m < 4; m++) {
      const i = 4 * (row + mirrored(x0 + m, width)), weight = ys[k] * xs[m];
      red += weight * data[i];
      green += weight * data[i + 1];
      blue += weight * data[i + 2];
    }
  }
  target[at] = Math.floor(red); // as Pillow does
  target[at + 1] = Math.floor(green);
  target[at + 2] = Math.floor(blue);
  target[at + 3] = 255;
}

// The first of four pixels around a coordinate and their weights (Keys 1981, with Pillow's a = -1).
function cubic(x) {
  const first = Math.floor(x - 0.5), t = x - 0.5 - first, far = 1 - t;
  return [first - 1, [-t * far * far, 1 - t * t * (2 - t), 1 - far * far * (2 - far), -far * t * t]];
}

// -1 -> 0, -2 -> 1, …; n -> n - 1, …
function mirrored(i, n) {
  const there = ((i % (2 * n)) + 2 * n) % (2 * n);
  return there < n ? there : 2 * n - 1 - there;
}
