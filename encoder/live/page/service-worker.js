// The page without a network: kept at the first visit, and answered with the headers that threads
// and privacy need, whatever the host sends. The networks are kept by engine-device.js.

const VERSION = ""; // of the site; written by encoder/web.py, like
const HEADERS = {}; // its headers

const PAGE = `${registration.scope} page ${VERSION}`;
const NETWORKS = `${registration.scope} networks`;

addEventListener("install", (event) => event.waitUntil(keep().then(skipWaiting)));
addEventListener("activate", (event) => event.waitUntil(clear().then(() => clients.claim())));
addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(registration.scope)) event.respondWith(answer(event.request));
});

const fresh = (path) => new Request(path, { cache: "no-cache" });

async function keep() {
  const { version, files } = await (await fetch(fresh("files.json"))).json();
  if (version !== VERSION) throw new Error("The site is just being renewed."); // tried again later
  const own = files.filter(({ path }) => !/\.(onnx|wasm)$/.test(path));
  await (await caches.open(PAGE)).addAll(["files.json", ...own.map(({ path }) => path)].map(fresh));
}

// What an earlier version of the site has left.
async function clear() {
  const page = await caches.open(PAGE);
  const { files } = await (await page.match("files.json")).json();
  const wanted = new Set(files.map(({ path, sha256 }) => `${path}?${sha256.slice(0, 16)}`));
  const networks = await caches.open(NETWORKS);
  for (const request of await networks.keys()) {
    if (!wanted.has(request.url.slice(registration.scope.length))) await networks.delete(request);
  }
  for (const name of await caches.keys()) {
    if (name.startsWith(`${registration.scope} page `) && name !== PAGE) await caches.delete(name);
  }
}

async function answer(request) {
  const page = await caches.open(PAGE);
  const { pathname } = new URL(request.url);
  const found = await page.match(pathname.endsWith("/") ? "index.html" : pathname);
  if (!found) return fetch(request);
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(found.body, { status: found.status, headers });
}
