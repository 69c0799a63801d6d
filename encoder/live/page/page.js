// The page: a camera or a picture on one side, the drawing on the other.
//
//   <body data-engine="socket">      engine-socket.js draws, on the server that sent the page
//   <body data-engine="device">      engine-device.js draws, in the browser
//
// An engine module exports open(on) -> Promise<{name, settings, translate, close}>, and may export
// needs() -> Promise<bytes that open() will download>. One frame is under way at a time; the next
// one is taken when its drawing is there, so the delay does not grow.

import { Camera } from "./camera.js";
import { Recorder, save } from "./recorder.js";
import { Settings } from "./settings.js";

const SMALLEST_GAP = 1000 / 60; // ms between two frames
const LARGEST_FILE = 64e6; // bytes of a picture that is opened
const LARGEST_SIDE = 2048; // pixels of a still that is kept
const PATIENCE = 600; // ms without a face until the page says so
const HOLD = 5000; // ms that a fault of a file is shown, beside a camera that goes on

const $ = (id) => document.getElementById(id);
const video = $("video");
const camera = new Camera(video);
const recorder = new Recorder(shown);
const settings = new Settings($("sliders"), changed);

const page = {
  engine: null,
  ready: false, // the engine answers
  source: "none", // "camera" or "still"
  still: null, // ImageBitmap
  busy: false, // a frame is under way
  stale: false, // the still or its settings have changed since
  drawn: null, // the last result
  faceless: 0, // when the last face was lost, ms; 0: there is one
};

// ------------------------------------------------------------------------------ what is said

function say(text) {
  if ($("status").textContent !== text) $("status").textContent = text;
}

let noteUntil = 0; // ms; what concerns a file is not wiped away by the camera's next frame

function note(text, hold = 0) {
  if (!text && performance.now() < noteUntil) return;
  noteUntil = performance.now() + hold;
  $("note").hidden = !text;
  $("note").textContent = text;
  document.body.classList.toggle("noted", Boolean(text));
}

const STATES = {
  connecting: "Connecting",
  loading: "Loading the models",
  busy: "The server is busy",
  gone: "The server is gone",
  reconnecting: "Connecting again",
};

function engineState(state, detail) {
  page.ready = state === "ready" && Boolean(page.engine);
  document.body.dataset.state = state;
  $("engine").textContent = STATES[state] ?? page.engine?.name ?? "Ready";
  $("working").hidden = state !== "loading";
  if (state === "loading") return progress(detail);
  if (state === "ready") {
    note("");
    say("");
    page.stale = true;
    return next();
  }
  if (state === "gone" || state === "busy") {
    note(`${detail} It is tried again by itself.`);
    say(`${STATES[state]}. ${detail}`);
    meter.clear();
  }
  return undefined;
}

function progress({ loaded = 0, total = 0 } = {}) {
  $("fetch").hidden = true;
  $("progress").hidden = false;
  if (total) {
    $("progress").max = total;
    $("progress").value = loaded;
  } else $("progress").removeAttribute("value");
  const megabytes = (bytes) => (bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0);
  $("progress-text").textContent = total
    ? `Loading the models: ${megabytes(loaded)} of ${megabytes(total)} MB`
    : "Loading the models";
}

// ------------------------------------------------------------------------------ frames

/** The next frame goes to the engine, unless one is under way. */
async function next() {
  if (page.busy || !page.ready || page.source === "none") return;
  const still = page.source === "still";
  if (still ? !page.stale : !camera.ready) return;
  page.busy = true;
  page.stale = false;
  let began = performance.now();
  try {
    const frame = still ? await createImageBitmap(page.still) : await camera.grab();
    began = performance.now();
    const source = page.source;
    document.body.classList.toggle("waiting", still);
    const wanted = { ...settings.values(still), reconstruction: $("show-reconstruction").checked };
    const result = await page.engine.translate(frame, wanted, { still });
    const late = source !== page.source || !page.ready; // an answer must not hide that all is gone
    if (!late) show(result, performance.now() - began);
  } catch (error) {
    failed(error);
  } finally {
    page.busy = false;
    document.body.classList.remove("waiting");
    const rest = SMALLEST_GAP - (performance.now() - began);
    if (page.source === "camera") setTimeout(next, Math.max(0, rest));
    else if (page.stale) next();
  }
}

function show(result, latency) {
  page.drawn?.drawing.close();
  page.drawn?.reconstruction?.close();
  page.drawn = result;
  page.faceless = 0;
  document.body.classList.add("drawn");
  note("");
  paint();
  place(result.box);
  meter.add(latency, result.ms);
  document.dispatchEvent(new CustomEvent("drawn", { detail: { latency, ms: result.ms } }));
  $("seen").textContent = result.faces > 1 ? `${result.faces} faces, the largest is drawn` : "";
  $("snapshot").disabled = false;
  $("record").disabled = page.source !== "camera" || !Recorder.possible;
  recorder.frame();
  if (page.source === "still") say("Drawn.");
  else if (!recorder.running) say("");
}

function failed(error) {
  if (error.code === "no-face") {
    page.faceless ||= performance.now();
    const patient = page.source === "camera" && performance.now() - page.faceless < PATIENCE;
    if (patient) return;
    place(null);
    $("seen").textContent = "";
    note(page.source === "camera" ? "No face in sight. Look into the camera." : error.message);
    say(error.message);
    meter.clear();
  } else if (error.code === "gone") {
    // engineState has said so, and takes up again where this stopped
  } else if (error.code === "busy") {
    page.stale = true; // not drawn: again
  } else {
    if (!error.code) console.error(error);
    note(error.code ? error.message : "Something went wrong; try again or reload the page.");
    say($("note").textContent);
  }
}

/** Where the face is, [left, top, right, bottom] in 0..1 of the frame, over the photo. */
function place(box) {
  $("box").hidden = !box;
  if (!box) return;
  // the photo may leave room at two of its sides
  const { width, height } = page.source === "still" ? page.still : { width: 1, height: 1 };
  const longest = Math.max(width, height);
  const [w, h] = [width / longest, height / longest];
  const [x, y] = [(1 - w) / 2, (1 - h) / 2];
  const { style } = $("box");
  style.left = `${100 * (x + w * box[0])}%`;
  style.top = `${100 * (y + h * box[1])}%`;
  style.width = `${100 * w * (box[2] - box[0])}%`;
  style.height = `${100 * h * (box[3] - box[1])}%`;
}

/** Pictures onto canvases of exactly as many pixels as the screen has for them. */
function paint() {
  if (page.still && page.source === "still") fill($("still"), page.still);
  if (!page.drawn) return;
  fill($("drawing"), page.drawn.drawing);
  if (page.drawn.reconstruction) fill($("reconstruction"), page.drawn.reconstruction);
}

function fill(canvas, picture) {
  const side = Math.round(canvas.parentElement.clientWidth * devicePixelRatio) || 1;
  if (canvas.width !== side || canvas.height !== side) canvas.width = canvas.height = side;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, side, side);
  context.imageSmoothingQuality = "high";
  const scale = side / Math.max(picture.width, picture.height);
  const [w, h] = [picture.width * scale, picture.height * scale];
  context.drawImage(picture, (side - w) / 2, (side - h) / 2, w, h);
}

/** What a recording shows: the photo and the drawing made of it. */
function shown() {
  return [camera.canvas, page.drawn.drawing];
}

/** Frames a second and the time from frame to drawing, over the last two seconds. */
const meter = {
  seen: [], // [when, latency]
  written: 0,
  add(latency, ms) {
    const now = performance.now();
    this.seen.push([now, latency]);
    while (this.seen.length > 2 && this.seen[0][0] < now - 2000) this.seen.shift();
    if (now - this.written < 400 && this.seen.length > 2) return;
    this.written = now;
    const middle = this.seen.map(([, time]) => time).sort((a, b) => a - b);
    const median = middle[middle.length >> 1];
    const rate = (this.seen.length - 1) / ((now - this.seen[0][0]) / 1000);
    const speed = page.source === "camera" && rate > 0 ? `${rate.toFixed(rate < 10 ? 1 : 0)} frames/s · ` : "";
    $("figures").textContent = `${speed}${Math.round(median)} ms`;
    $("figures").title = Object.entries(ms ?? {})
      .map(([name, time]) => `${name} ${time.toFixed(1)} ms`)
      .join(", ");
  },
  clear() {
    this.seen = [];
    $("figures").textContent = "";
  },
};

// ------------------------------------------------------------------------------ sources

function useSource(source) {
  page.source = source;
  document.body.dataset.source = source;
  video.hidden = source !== "camera";
  $("still").hidden = source !== "still";
  $("start").hidden = source !== "none";
  $("camera").setAttribute("aria-pressed", source === "camera");
  $("camera").textContent = source === "camera" ? "Stop the camera" : "Camera";
  if (source !== "camera") {
    camera.stop();
    recorder.stop();
    $("record").disabled = true;
  }
  settings.still(source === "still");
  place(null);
  noteUntil = 0;
  note("");
  meter.clear();
  $("seen").textContent = "";
  page.faceless = 0;
}

async function startCamera(id) {
  say("Waiting for the camera.");
  try {
    await camera.start(id, () => {
      useSource("none");
      prompt("The camera was taken away. Plug it in again, or choose a picture.");
    });
  } catch (error) {
    if (page.source === "camera") useSource("none");
    prompt(error.message);
    return;
  }
  useSource("camera");
  say("");
  const found = await camera.list();
  $("cameras").replaceChildren(...found.map((one) => new Option(one.label, one.id, false, one.used)));
  $("cameras").hidden = found.length < 2;
  next();
}

function prompt(text) {
  $("prompt").textContent = text;
  document.body.dataset.problem = "camera";
  say(text);
}

async function openPicture(file) {
  if (!file) return;
  let bitmap = null;
  try {
    if (file.size > LARGEST_FILE) {
      throw new Error(`The file is larger than ${LARGEST_FILE / 1e6} MB; choose a smaller one.`);
    }
    bitmap = await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch (error) {
    const unread = "This file cannot be read as a picture; choose a JPEG, PNG or WebP.";
    const text = error instanceof DOMException || error instanceof TypeError ? unread : error.message;
    note(text, HOLD);
    return say(text);
  }
  page.still?.close();
  page.still = await reduced(bitmap);
  page.stale = true;
  useSource("still");
  paint();
  say("Drawing the picture.");
  return next();
}

async function reduced(bitmap) {
  const shrink = LARGEST_SIDE / Math.max(bitmap.width, bitmap.height);
  if (shrink >= 1) return bitmap;
  const smaller = await createImageBitmap(bitmap, {
    resizeWidth: Math.max(1, Math.round(bitmap.width * shrink)),
    resizeHeight: Math.max(1, Math.round(bitmap.height * shrink)),
    resizeQuality: "high",
  });
  bitmap.close();
  return smaller;
}

function changed() {
  page.stale = true;
  $("reconstruction-pane").hidden = !$("show-reconstruction").checked;
  document.body.classList.toggle("three", $("show-reconstruction").checked);
  paint();
  next();
}

// ------------------------------------------------------------------------------ saving

function named(kind, suffix) {
  const time = new Date(Date.now() - 60000 * new Date().getTimezoneOffset()).toISOString();
  return `${kind}-${time.slice(0, 19).replace("T", "-").replaceAll(":", "")}.${suffix}`;
}

async function snapshot() {
  const { drawing } = page.drawn;
  const canvas = new OffscreenCanvas(drawing.width, drawing.height);
  canvas.getContext("2d").drawImage(drawing, 0, 0);
  save(await canvas.convertToBlob({ type: "image/png" }), named("drawing", "png"));
  say("The drawing is saved.");
}

function record() {
  if (recorder.running) return recorder.stop();
  $("record").textContent = "Stop recording";
  $("record").setAttribute("aria-pressed", true);
  $("rec").hidden = false;
  say("Recording.");
  const clock = setInterval(() => {
    const seconds = Math.floor(recorder.seconds);
    $("rec-time").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  }, 250);
  return recorder.start((film, suffix) => {
    clearInterval(clock);
    $("rec").hidden = true;
    $("record").textContent = "Record";
    $("record").setAttribute("aria-pressed", false);
    if (film.size) save(film, named("drawing", suffix));
    say(film.size ? "The recording is saved." : "Nothing was recorded.");
  });
}

// ------------------------------------------------------------------------------ the events

$("begin").onclick = () => startCamera();
$("camera").onclick = () => {
  if (page.source !== "camera") return startCamera();
  useSource("none");
  return say("The camera is off.");
};
$("cameras").onchange = () => startCamera($("cameras").value);
for (const button of document.querySelectorAll("[data-act=choose]")) {
  button.onclick = () => $("file").click();
}
$("file").onchange = () => {
  openPicture($("file").files[0]);
  $("file").value = ""; // the same file again is a change, too
};
$("snapshot").onclick = snapshot;
$("record").onclick = record;
$("show-reconstruction").onchange = changed;
$("settings").onreset = () => setTimeout(() => settings.reset()); // after the form's own
$("settings").onsubmit = (event) => event.preventDefault();

const holdsFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
document.addEventListener("dragover", (event) => {
  if (!holdsFile(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  $("drop").hidden = true;
  if (!holdsFile(event)) return;
  event.preventDefault();
  openPicture(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) openPicture(file);
});
new ResizeObserver(paint).observe($("stage"));

// ------------------------------------------------------------------------------ the engine

async function start() {
  engineState("connecting");
  const engine = await import(`./engine-${document.body.dataset.engine}.js`);
  const bytes = (await engine.needs?.()) ?? 0;
  if (bytes > 0) await agreed(bytes);
  page.engine = await engine.open(engineState);
  settings.build(page.engine.settings);
  settings.still(page.source === "still");
  engineState("ready");
}

/** Resolved once the user has agreed to the download. */
function agreed(bytes) {
  $("engine").textContent = "Not loaded yet";
  $("working").hidden = false;
  $("progress").hidden = true;
  $("fetch").hidden = false;
  const size = `${Math.ceil(bytes / 1e6)} MB`;
  $("progress-text").textContent =
    `The models are ${size}, loaded once. Your photo stays on this device.`;
  $("fetch").textContent = `Load ${size}`;
  return new Promise((resolve) => {
    $("fetch").onclick = resolve;
  });
}

start().catch((error) => {
  console.error(error);
  $("engine").textContent = "Not available";
  note(error.message);
  say(error.message);
});
