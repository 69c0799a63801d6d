// The engine behind a socket: frames go to `python -m encoder.live`, drawings come back.
//
//   const engine = await open((state, detail) => …);
//   const { drawing, faces, box, ms } = await engine.translate(frame, settings, { still: false });
//
// A message is: the length of a header (uint32, little endian), the header (JSON, UTF-8), pictures.
// The server greets with {name, settings, limits}; each answer carries the `id` of its request.

const PATIENCE = 30000; // ms without an answer after which the server counts as gone
const FIRST_WAIT = 500; // ms until it is tried again; doubled up to:
const LONGEST_WAIT = 4000;
const FULL = 1013; // close code "try again later": the server has as many clients as it takes
const REFUSED = 1008; // close code "policy violation": a rule was broken, or the token is wrong

export class EngineError extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

export function open(on) {
  return new Promise((resolve) => new Connection(on, resolve).connect());
}

class Connection {
  constructor(on, resolve) {
    this.on = on;
    this.resolve = resolve; // of open(); later greetings only report "ready"
    this.waiting = new Map(); // id -> {resolve, reject, timer}
    this.count = 0;
    this.tries = 0;
    this.closed = false;
    this.engine = null;
  }

  connect() {
    this.on(this.engine || this.tries ? "reconnecting" : "connecting");
    const address = new URL("socket", document.baseURI);
    address.protocol = address.protocol.replace("http", "ws");
    this.socket = new WebSocket(address);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = (event) => this.receive(event.data);
    this.socket.onclose = (event) => this.lost(event);
  }

  lost({ code, reason }) {
    this.ready = false;
    const why = reason || "The server does not answer.";
    for (const { reject, timer } of this.waiting.values()) {
      clearTimeout(timer);
      reject(new EngineError("gone", why));
    }
    this.waiting.clear();
    if (this.closed) return;
    const wait = code === FULL || code === REFUSED ? LONGEST_WAIT : FIRST_WAIT * 2 ** this.tries;
    this.on(code === FULL ? "busy" : "gone", why);
    this.tries += 1;
    this.timer = setTimeout(() => this.connect(), Math.min(LONGEST_WAIT, wait));
  }

  receive(data) {
    const length = new DataView(data).getUint32(0, true);
    const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
    if (header.settings) return this.greeted(header);
    const request = this.waiting.get(header.id);
    if (!request) return undefined;
    this.waiting.delete(header.id);
    clearTimeout(request.timer);
    if (header.error) return request.reject(new EngineError(header.error.code, header.error.message));
    return request.resolve(answer(header, data, 4 + length));
  }

  greeted(header) {
    this.ready = true;
    this.tries = 0;
    this.limits = header.limits;
    if (!this.engine) {
      this.engine = {
        name: header.name,
        settings: header.settings,
        translate: (frame, settings, { still = false } = {}) => this.translate(frame, settings, still),
        close: () => this.close(),
      };
      this.resolve(this.engine);
    }
    this.on("ready");
  }

  async translate(frame, settings, still) {
    const picture = await encode(frame, still, this.limits);
    if (!this.ready) throw new EngineError("gone", "The server does not answer.");
    if (picture.length > this.limits.bytes) {
      throw new EngineError("too-large", "The picture is too large; choose a smaller one.");
    }
    const id = (this.count += 1);
    const message = pack({ id, still, ...settings }, picture);
    return new Promise((resolve, reject) => {
      // closing a socket whose other end is silent takes long: it counts as lost at once
      const timer = setTimeout(() => this.drop(), PATIENCE);
      this.waiting.set(id, { resolve, reject, timer });
      this.socket.send(message);
    });
  }

  drop() {
    this.socket.onclose = null;
    this.socket.close();
    this.lost({ code: 1006, reason: "" });
  }

  close() {
    this.closed = true;
    clearTimeout(this.timer);
    this.socket.close();
  }
}

function pack(header, picture) {
  const text = new TextEncoder().encode(JSON.stringify(header));
  const message = new Uint8Array(4 + text.length + picture.length);
  new DataView(message.buffer).setUint32(0, text.length, true);
  message.set(text, 4);
  message.set(picture, 4 + text.length);
  return message;
}

async function encode(frame, still, limits) {
  const shrink = Math.min(1, limits.side / Math.max(frame.width, frame.height));
  const width = Math.max(1, Math.round(frame.width * shrink));
  const height = Math.max(1, Math.round(frame.height * shrink));
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { alpha: false });
  context.imageSmoothingQuality = "high";
  context.drawImage(frame, 0, 0, width, height);
  frame.close();
  const file = await canvas.convertToBlob({ type: "image/jpeg", quality: still ? 0.95 : 0.85 });
  return new Uint8Array(await file.arrayBuffer());
}

async function answer(header, data, start) {
  const { id, parts, ...rest } = header;
  const pictures = {};
  let at = start;
  for (const { name, type, bytes } of parts) {
    pictures[name] = createImageBitmap(new Blob([new Uint8Array(data, at, bytes)], { type }));
    at += bytes;
  }
  for (const name of Object.keys(pictures)) pictures[name] = await pictures[name];
  return { ...rest, ...pictures };
}
