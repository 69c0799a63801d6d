"""The site in a real browser: draws as torch does, sends nothing, works offline.

ONNXRUNTIME_WEB=onnxruntime-web-1.30.0.tgz pytest tests/test_web_site.py

Skipped without Chromium, playwright, or that package (`npm pack onnxruntime-web@1.30.0`).
"""

import base64
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, why_not
from browser import film as write_film
from PIL import Image, ImageEnhance

from encoder import web
from encoder.pipeline import Translator
from generators.images import open_image, to_pil, to_uint8

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

EXAMPLES = Path(__file__).parent.parent / "examples"
PHOTOS = ["astronaut.jpg", "grace_hopper_exif.jpg", "two_faces.jpg", "at_the_border.jpg"]
READY = "body[data-state=ready]"
DRAWN = "body.drawn"
TIMEOUT = 60_000  # ms; a busy machine takes its time


@pytest.fixture(scope="module")
def translator() -> Translator:
    return Translator.bundled()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[str]:
    """The address of a site of the bundled networks."""
    package = os.environ.get("ONNXRUNTIME_WEB")
    if not package:
        pytest.skip(
            f"ONNXRUNTIME_WEB names no {web.PACKAGE}; npm pack {web.PACKAGE}@{web.VERSION} gets it"
        )
    folder = tmp_path_factory.mktemp("web") / "site"
    assert web.main(["--output", str(folder), "--onnxruntime-web", package]) == 0
    with web.server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def film(tmp_path_factory) -> Path:
    """Two seconds of a camera, 640 x 480: a face that comes slowly nearer."""
    photo = open_image(EXAMPLES / "astronaut.jpg")
    pictures = []
    for i in range(60):
        side = photo.width / (1 + 0.6 * i / 60)
        left = (photo.width - side) / 2 * 0.85
        box = (left, 0.0, left + side, 0.75 * side)
        frame = photo.resize((640, 480), Image.Resampling.BICUBIC, box=box)
        pictures.append(ImageEnhance.Brightness(frame).enhance(1 - 0.2 * i / 60))
    return write_film(tmp_path_factory.mktemp("film") / "face.mjpeg", pictures)


@pytest.fixture(scope="module")
def page(site, film) -> Iterator[Any]:
    """The page, loaded for the first time; `page.asked` has all addresses, `page.problems` what the
    console said."""
    with chromium(film) as browser:
        page = browser.new_context().new_page()
        page.set_default_timeout(TIMEOUT)
        page.asked, page.problems = [], []
        page.context.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda m: m.type == "error" and page.problems.append(m.text))
        page.goto(site)
        page.wait_for_selector("#fetch:not([hidden])")
        assert not any(url.endswith((".wasm", ".onnx")) for url in page.asked)  # nothing unasked
        text = page.inner_text("#progress-text")
        page.megabytes = int("".join(filter(str.isdigit, text.split("MB")[0])))
        page.click("#fetch")
        page.wait_for_selector(READY)
        yield page


def encoded(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def array(answer: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer))).convert("RGB")).astype(int)


# In the page: an engine of its own, and pictures to and fro as PNG in base64.
TRANSLATE = """async ([png, settings]) => {
  window.tested ??= await (await import("./engine-device.js")).open(() => {});
  const bytes = Uint8Array.from(atob(png), (c) => c.charCodeAt(0));
  const frame = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  try {
    const result = await window.tested.translate(frame, settings, { still: true });
    const pictures = {};
    for (const name of ["drawing", "reconstruction"]) {
      if (!result[name]) continue;
      const canvas = new OffscreenCanvas(result[name].width, result[name].height);
      canvas.getContext("2d").drawImage(result[name], 0, 0);
      const blob = await canvas.convertToBlob({ type: "image/png" });
      pictures[name] = btoa(String.fromCharCode(...new Uint8Array(await blob.arrayBuffer())));
    }
    return { ...result, ...pictures };
  } catch (error) {
    return { code: error.code, message: error.message };
  }
}"""

# In the page: the detector by itself.
DETECT = """async (png) => {
  const ort = await import("./onnxruntime/ort.wasm.min.mjs");
  ort.env.wasm.numThreads = 1;
  const { detect } = await import("./detector.js");
  const nets = {};
  for (const name of ["pnet", "rnet", "onet"]) {
    const session = await ort.InferenceSession.create(`./onnx/${name}.onnx`);
    nets[name] = (images, b, h, w) =>
      session.run({ pictures: new ort.Tensor("float32", images, [b, 3, h, w]) });
  }
  const bytes = Uint8Array.from(atob(png), (c) => c.charCodeAt(0));
  const frame = await createImageBitmap(new Blob([bytes], { type: "image/png" }));
  const context = new OffscreenCanvas(frame.width, frame.height).getContext("2d");
  context.drawImage(frame, 0, 0);
  return detect(context.getImageData(0, 0, frame.width, frame.height), nets);
}"""

SETTINGS = {"swap": 4, "colours": 0, "truncation": 1, "reconstruction": True}


# ---------------------------------------------------------------------------- what it draws


@pytest.mark.parametrize("name", PHOTOS)
def test_faces_are_found_where_mtcnn_finds_them(page, translator, name):
    photo = open_image(EXAMPLES / name)
    found, wanted = page.evaluate(DETECT, encoded(photo)), translator.faces(photo)
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        side = (theirs.box[2:] - theirs.box[:2]).max()
        assert np.abs(np.array(ours["points"]) - theirs.points).max() < 0.01 * side
        assert np.abs(np.array(ours["box"]) - theirs.box).max() < 0.01 * side


@pytest.mark.parametrize("name", PHOTOS)
def test_the_drawing_is_torchs(page, translator, name):
    photo = open_image(EXAMPLES / name)
    answer = page.evaluate(TRANSLATE, [encoded(photo), SETTINGS])
    faces = translator.faces(photo)
    wanted = translator([translator.crop(photo, faces[0])], reconstruction=True)
    assert answer["faces"] == len(faces)
    for got, image in (("drawing", wanted.anime), ("reconstruction", wanted.reconstruction)):
        difference = np.abs(array(answer[got]) - np.asarray(to_pil(image[0])).astype(int))
        # a browser's JPEG and resizing are its own, and lines in ink are steep
        assert difference.mean() <= 3, f"{got} of {name} differs by {difference.mean():.2f} of 255"


@pytest.mark.parametrize(
    "changed", [{"swap": 1}, {"swap": 2}, {"colours": 0.7}, {"truncation": 0.5}]
)
def test_settings_do_what_they_do_in_torch(page, translator, changed):
    photo = open_image(EXAMPLES / "astronaut.jpg")
    settings = SETTINGS | changed
    answer = page.evaluate(TRANSLATE, [encoded(photo), settings])
    crop = translator.crop(photo, translator.faces(photo)[0])
    ws = translator.encode(translator.prepare([crop]), truncation=settings["truncation"])
    first = translator.resolution >> (settings["swap"] - 1)
    drawn, _ = translator.synthesise(ws, swap_resolution=first, colours=settings["colours"])
    difference = np.abs(array(answer["drawing"]) - np.asarray(to_pil(drawn[0])).astype(int))
    assert difference.mean() <= 2
    plain, _ = translator.synthesise(translator.encode(translator.prepare([crop])))
    assert (to_uint8(plain).int() - to_uint8(drawn).int()).abs().float().mean() > 4  # it is another


@pytest.mark.parametrize("size", [(300, 200), (12, 12), (1, 1)])
def test_a_picture_without_a_face_is_said_to_have_none(page, size):
    answer = page.evaluate(TRANSLATE, [encoded(Image.new("RGB", size, "green")), SETTINGS])
    assert answer["code"] == "no-face" and answer["message"].endswith(".")


# ------------------------------------------------------------------------- the page itself


def test_the_first_visit_loads_what_it_said(page, site):
    assert page.megabytes <= 40
    sizes = page.evaluate("async () => (await (await fetch('files.json')).json()).files")
    loaded = {url.split("?")[0].removeprefix(site) for url in page.asked}
    total = sum(f["bytes"] for f in sizes if f["path"] in loaded and "onnx" in f["path"])
    assert abs(total - 1e6 * page.megabytes) < 1e6


def test_a_picture_is_drawn_on_the_page(page):
    page.set_input_files("#file", str(EXAMPLES / "grace_hopper.jpg"))
    page.wait_for_selector(DRAWN)
    page.wait_for_selector("#box:not([hidden])")
    assert page.inner_text("#engine").startswith("On this device")


def test_the_camera_is_drawn_and_nothing_left_the_machine(page, site, capsys):
    page.click("#begin:visible, #camera:visible")
    page.wait_for_selector("body[data-source=camera]")
    page.wait_for_selector(DRAWN)
    page.wait_for_timeout(6000)
    figures = page.inner_text("#figures")
    with capsys.disabled():
        print(f"\nsite, camera 640 x 480: {figures} ({page.get_attribute('#figures', 'title')})")
    assert "frames/s" in figures
    page.click("#camera")
    assert {url[: len(site)] for url in page.asked if not url.startswith("blob:")} == {site}
    assert page.problems == []


def test_another_address_cannot_be_reached(page, site):
    """The policy, not only the page's good will."""
    other = site.replace("localhost", "127.0.0.1")
    for options in ("{}", "{method: 'POST', body: 'x', mode: 'no-cors'}"):
        fetched = f"fetch('{other}', {options}).then(() => 'sent', (error) => error.name)"
        assert page.evaluate(fetched) == "TypeError"
    sent = page.evaluate(
        f"navigator.sendBeacon('{other}', 'x') && new Promise((resolve) => "
        "addEventListener('securitypolicyviolation', () => resolve(false)))"
    )
    assert not sent
    page.problems.clear()  # they are about these


def test_a_reload_works_offline(page, site):
    page.evaluate("navigator.serviceWorker.ready.then(() => true)")
    page.context.set_offline(True)
    try:
        page.reload()
        page.wait_for_selector(READY)  # without asking: nothing is to be loaded
        assert page.evaluate("crossOriginIsolated")
        page.set_input_files("#file", str(EXAMPLES / "astronaut.jpg"))
        page.wait_for_selector(DRAWN)
    finally:
        page.context.set_offline(False)
