// The camera as a square that is seen as in a mirror.
//
//   const camera = new Camera(videoElement);
//   await camera.start(deviceId, ended);      // Error with a sentence where there is none
//   const frame = await camera.grab();        // ImageBitmap, also left in camera.canvas

const SIDE = 480; // pixels of a frame, at most
const PATIENCE = 100; // ms for the next frame; a hidden page may get none

const PROBLEMS = {
  NotAllowedError:
    "The camera may not be used. Allow it in the address bar of the browser, or choose a picture.",
  NotFoundError: "There is no camera here. Plug one in, or choose a picture.",
  OverconstrainedError: "That camera is not here any more. Start again, or choose a picture.",
  NotReadableError: "The camera is in use by another program. Close it, or choose a picture.",
};
PROBLEMS.SecurityError = PROBLEMS.NotAllowedError;
const INSECURE =
  "Browsers give the camera only to https and to localhost. Open the page there, or choose a picture.";

export class Camera {
  constructor(video) {
    this.video = video;
    this.stream = null;
    this.canvas = new OffscreenCanvas(SIDE, SIDE);
    this.counts = "requestVideoFrameCallback" in video;
    this.arrived = this.taken = 0; // frames
    if (this.counts) video.requestVideoFrameCallback(() => this.count());
  }

  get ready() {
    return Boolean(this.stream) && this.video.readyState >= HTMLMediaElement.HAVE_CURRENT_DATA;
  }

  async start(id, ended) {
    if (!navigator.mediaDevices?.getUserMedia) throw new Error(INSECURE);
    this.stop();
    const which = id ? { deviceId: { exact: id } } : { facingMode: "user" };
    const size = { width: { ideal: 640 }, height: { ideal: 480 }, frameRate: { ideal: 30 } };
    let stream = null;
    try {
      stream = await navigator.mediaDevices.getUserMedia({ video: { ...which, ...size } });
    } catch (error) {
      throw new Error(PROBLEMS[error.name] ?? `The camera does not start: ${error.message}.`);
    }
    this.stop(); // of a start beside this one
    this.stream = stream;
    const [track] = stream.getVideoTracks();
    track.onended = () => {
      this.stop();
      ended();
    };
    this.mirrored = track.getSettings().facingMode !== "environment";
    this.video.classList.toggle("mirrored", this.mirrored);
    this.video.srcObject = stream;
    await this.video.play();
  }

  stop() {
    for (const track of this.stream?.getTracks() ?? []) {
      track.onended = null;
      track.stop();
    }
    this.stream = null;
    this.video.srcObject = null;
  }

  async list() {
    const devices = await navigator.mediaDevices.enumerateDevices();
    const used = this.stream?.getVideoTracks()[0].getSettings().deviceId;
    return devices
      .filter(({ kind }) => kind === "videoinput")
      .map(({ deviceId, label }, i) => ({
        id: deviceId,
        label: label || `Camera ${i + 1}`,
        used: deviceId === used,
      }));
  }

  count() {
    this.arrived += 1;
    this.wake?.();
    this.video.requestVideoFrameCallback(() => this.count());
  }

  /** Waits for a frame that was not taken yet. */
  async fresh() {
    if (this.counts && this.arrived === this.taken) {
      await new Promise((resolve) => {
        this.wake = resolve;
        setTimeout(resolve, PATIENCE);
      });
    }
    this.taken = this.arrived;
  }

  /** The middle square of what the camera shows now. */
  async grab() {
    await this.fresh();
    if (!this.ready) throw Object.assign(new Error("The camera is off."), { code: "gone" });
    const { videoWidth: width, videoHeight: height } = this.video;
    const square = Math.min(width, height);
    const side = Math.min(SIDE, square);
    if (this.canvas.width !== side) this.canvas.width = this.canvas.height = side;
    const context = this.canvas.getContext("2d", { alpha: false });
    context.setTransform(this.mirrored ? -1 : 1, 0, 0, 1, this.mirrored ? side : 0, 0);
    const [x, y] = [(width - square) / 2, (height - square) / 2];
    context.drawImage(this.video, x, y, square, square, 0, 0, side, side);
    return createImageBitmap(this.canvas);
  }
}
