// Recording the photo and the drawing side by side, and saving files.
//
//   const recorder = new Recorder(() => [photo, drawing]);
//   recorder.start((film, suffix) => save(film, `drawing.${suffix}`));
//   recorder.frame();                          // whenever there is a new pair
//   recorder.stop();

const SIDE = 512; // pixels of each of the two
// VP8 first: drawing needs the processor, too
const KINDS = ["video/webm;codecs=vp8", "video/webm;codecs=vp9", "video/webm", "video/mp4"];
const BITS = 4e6; // a second

export class Recorder {
  static possible = typeof MediaRecorder !== "undefined";

  constructor(shown) {
    this.shown = shown;
    this.recording = null;
  }

  get running() {
    return Boolean(this.recording);
  }

  get seconds() {
    return (performance.now() - this.began) / 1000;
  }

  start(done) {
    this.canvas = document.createElement("canvas");
    [this.canvas.width, this.canvas.height] = [2 * SIDE, SIDE];
    this.began = performance.now();
    this.paint();
    const mimeType = KINDS.find((kind) => MediaRecorder.isTypeSupported(kind));
    const stream = this.canvas.captureStream();
    this.recording = new MediaRecorder(stream, { mimeType, videoBitsPerSecond: BITS });
    const chunks = [];
    this.recording.ondataavailable = ({ data }) => chunks.push(data);
    this.recording.onstop = () => {
      const type = mimeType.split(";")[0];
      done(new Blob(chunks, { type }), type.split("/")[1]);
    };
    this.recording.start(1000);
  }

  frame() {
    if (this.running) this.paint();
  }

  paint() {
    const context = this.canvas.getContext("2d", { alpha: false });
    context.imageSmoothingQuality = "high";
    this.shown().forEach((picture, i) => context.drawImage(picture, i * SIDE, 0, SIDE, SIDE));
  }

  stop() {
    this.recording?.stop();
    this.recording = null;
  }
}

export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
