// The engine of a page without a server: everything happens on this device, in worker.js.
//
//   const bytes = await needs();             // still to be downloaded; 0 after the first visit
//   const engine = await open((state, detail) => …);
//   const { drawing, faces, box, ms } = await engine.translate(frame, settings, { still: false });
//
// The files beside this one are listed in files.json, with sizes and hashes. Networks are kept in
// the browser's cache by their hash; service-worker.js keeps the page itself.

const HERE = new URL("./", import.meta.url).href;
const SMALL = 128; // pixels: side of drawings up to which one thread does, see threads()
const MOST_THREADS = 4;

const fail = (code, message) => Object.assign(new Error(message), { code });
let listed = null; // what files.json says, and what of it this browser takes

export async function needs() {
  const { files } = await list();
  const cache = await kept();
  const there = await Promise.all(files.map((file) => cache?.match(address(file))));
  return files.reduce((sum, { bytes }, i) => sum + (there[i] ? 0 : bytes), 0);
}

export async function open(on) {
  on("connecting");
  navigator.serviceWorker?.register(new URL("service-worker.js", HERE)).catch((error) => {
    console.info("The page will not work offline:", error.message);
  });
  const { networks, runtime } = await list();
  const buffers = await load(on);
  on("loading", {}); // from here on, no bytes: the networks are prepared

  const wasm = buffers[runtime.wasm], models = {};
  for (const [path, buffer] of Object.entries(buffers)) {
    if (path.endsWith(".onnx")) models[path.slice("onnx/".length, -".onnx".length)] = buffer;
  }
  const worker = new Worker(new URL("worker.js", HERE), { type: "module" });
  const ask = requests(worker, on);
  const start = { networks, models, runtime, wasm, threads: threads(networks) };
  const { provider } = await ask({ start }, Object.values(buffers));

  const { blocks, swap, styles } = networks;
  return {
    name: `On this device, ${provider}`,
    settings: {
      swap: { min: 1, max: blocks.length, step: 1, value: swap },
      colours: { min: 0, max: 1, step: 0.05, value: 0 },
      truncation: { min: 0, max: 1.2, step: 0.05, value: 1 },
      ...(styles.length > 1 && { style: { choices: styles, value: styles[0] } }),
    },
    translate: (frame, settings, { still = false } = {}) =>
      ask({ frame, settings, still, seconds: performance.now() / 1000 }, [frame]),
    close: () => worker.terminate(),
  };
}

// Two threads draw 64 x 64 pixels at most a tenth faster, for twice the work: they spin while they
// wait for one another. And memory is shared only where the headers allow it.
function threads({ blocks }) {
  if (!self.crossOriginIsolated || blocks.at(-1) <= SMALL) return 1;
  return Math.min(MOST_THREADS, navigator.hardwareConcurrency);
}

// ask(message, what it hands over) -> the worker's answer
function requests(worker, on) {
  const waiting = new Map(); // id -> {resolve, reject}
  let count = 0, gone = null;
  worker.onmessage = ({ data: { id, answer, error } }) => {
    const { resolve, reject } = waiting.get(id);
    waiting.delete(id);
    if (error) reject(fail(error.code, error.message));
    else resolve(answer);
  };
  worker.onerror = (event) => {
    gone = fail("gone", `The drawing stopped (${event.message ?? "out of memory"}); reload the page.`);
    on("gone", gone.message);
    for (const { reject } of waiting.values()) reject(gone);
    waiting.clear();
  };
  return (message, handed) => new Promise((resolve, reject) => {
    if (gone) return reject(gone);
    waiting.set((count += 1), { resolve, reject });
    return worker.postMessage({ id: count, ...message }, handed);
  });
}

// ------------------------------------------------------------------------------- files

// {networks, runtime, files: those that this browser downloads}
async function list() {
  if (listed) return listed;
  const { networks, runtimes, files } = await (await get("files.json")).json();
  const runtime = (await webgpu()) ? runtimes.webgpu : runtimes.wasm;
  const wanted = files.filter(({ path }) => path.endsWith(".onnx") || path === runtime.wasm);
  listed = { networks, runtime, files: wanted };
  return listed;
}

// Whether it is worth a try: not where it is software; and the runtime for it needs a WebAssembly
// that may wait for promises.
async function webgpu() {
  if (!navigator.gpu || !("Suspending" in WebAssembly)) return false;
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  return Boolean(adapter) && !adapter.info?.isFallbackAdapter;
}

async function kept() {
  return self.caches ? caches.open(`${HERE} networks`) : null; // none where the page is not secure
}

const address = ({ path, sha256 }) => `${HERE}${path}?${sha256.slice(0, 16)}`;

async function get(path) {
  const response = await fetch(new URL(path, HERE)).catch(() => null);
  if (response?.ok) return response;
  const why = response ? `the answer is ${response.status}` : "no connection";
  throw fail("gone", `${path.split("?")[0].replace(HERE, "")} cannot be loaded (${why}); try again later.`);
}

// {path: ArrayBuffer} of all files, from the cache or else downloaded and put there.
async function load(on) {
  const { files } = await list();
  const cache = await kept();
  const total = await needs();
  const buffers = {};
  let loaded = 0;
  if (total) on("loading", { loaded, total });
  for (const file of files) {
    const stored = await cache?.match(address(file));
    if (stored) {
      buffers[file.path] = await stored.arrayBuffer();
      continue;
    }
    const buffer = await download(file, (bytes) => on("loading", { loaded: (loaded += bytes), total }));
    await cache?.put(address(file), new Response(buffer)).catch((error) => {
      console.info("The networks are not kept for the next visit:", error.message); // no room
    });
    buffers[file.path] = buffer;
  }
  return buffers;
}

async function download(file, progress) {
  const reader = (await get(address(file))).body.getReader();
  const whole = new Uint8Array(file.bytes);
  let at = 0;
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    if (at + part.value.length <= file.bytes) whole.set(part.value, at);
    at += part.value.length;
    progress(part.value.length);
  }
  if (at !== file.bytes || (self.crypto.subtle && (await hash(whole)) !== file.sha256)) {
    throw fail("gone", `${file.path} arrived damaged, or the site is just being renewed; reload the page.`);
  }
  return whole.buffer;
}

async function hash(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
