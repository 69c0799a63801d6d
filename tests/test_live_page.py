"""The page in a browser: frames arrive, drawings are the translator's, settings act.

pytest tests/test_live_page.py          # skipped where there is no Chromium
"""

import base64
import io
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from browser import chromium, film, why_not
from clip import Clip
from conftest import make_generator
from PIL import Image
from test_infer import make_encoder
from test_live import Served, difference, png

from encoder.align import Aligner
from encoder.live.artist import Artist, Sitter, unpack
from encoder.pipeline import Translator
from generators.images import open_image, to_pil

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())

EXAMPLES = Path(__file__).parent.parent / "examples"
PHOTO = EXAMPLES / "astronaut.jpg"
LONG = 60_000  # ms; a busy machine is slow


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator:
    clip = Clip([open_image(PHOTO)], seconds=1)
    path = film(tmp_path_factory.mktemp("film") / "camera.mjpeg", (f for _, f in clip.frames()))
    with chromium(path) as browser:
        yield browser


@pytest.fixture(scope="module")
def artist() -> Artist:
    """Tiny networks, and the aligner that finds faces in photos."""
    networks = make_generator(1), make_generator(2), make_encoder()
    return Artist(Translator(*networks, swap_resolution=8, aligner=Aligner()), "tiny")


@pytest.fixture
def served(artist) -> Iterator[Served]:
    served = Served(artist)
    yield served
    served.stop()


@contextmanager
def opened(browser, served: Served, **options) -> Iterator:
    """The page, ready; what it asked of others, and what it complained about, fails the test."""
    context = browser.new_context(permissions=["camera"], **options)
    page = context.new_page()
    page.set_default_timeout(LONG)
    asked, said = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.messages = []  # (sent, bytes)
    page.on("websocket", lambda socket: listen(socket, page.messages))
    page.goto(f"http://{served.host}/")
    page.wait_for_selector("[data-state=ready]")
    yield page
    context.close()
    own = (f"http://{served.host}/", f"ws://{served.host}/", f"blob:http://{served.host}/")
    assert [url for url in asked if not url.startswith(own)] == []
    said = [text for text in said if "WebSocket connection to" not in text]  # while none is there
    assert said == []


def listen(socket, messages: list[tuple[bool, bytes]]) -> None:
    socket.on("framesent", lambda data: messages.append((True, data)))
    socket.on("framereceived", lambda data: messages.append((False, data)))


def last_pair(page) -> tuple[tuple[dict, bytes], tuple[dict, bytes]]:
    """The newest answer, and the request it answers."""
    answers = [unpack(data) for sent, data in page.messages if not sent]
    header, pictures = next(a for a in reversed(answers) if "parts" in a[0])
    requests = (unpack(data) for sent, data in page.messages if sent)
    return next(r for r in requests if r[0]["id"] == header["id"]), (header, pictures)


def drawn(page, count: int = 1) -> None:
    """Waits for that many drawings more."""
    have = drawings(page)
    while drawings(page) < have + count:
        page.wait_for_timeout(50)


def drawings(page) -> int:
    return sum(b'"parts":[{' in data[:4096] for sent, data in page.messages if not sent)


def upload(page, picture: Path | bytes, name: str = "picture.png") -> None:
    file = picture
    if isinstance(picture, bytes):
        file = {"name": name, "mimeType": "image/png", "buffer": picture}
    page.set_input_files("#file", file)


def canvas(page, name: str) -> Image.Image:
    """What is on a canvas of the page."""
    encoded = page.evaluate(f"document.getElementById('{name}').toDataURL()").split(",")[1]
    return Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")


def slide(page, name: str, value: float) -> None:
    page.locator(f"#set-{name}").fill(str(value))


# ------------------------------------------------------------------------ drawing


def test_the_camera_is_drawn(browser, served, artist):
    with opened(browser, served) as page:
        page.click("#begin")
        drawn(page, 5)
        assert page.locator("#camera").inner_text() == "Stop the camera"
        page.wait_for_function(
            "() => /frames.s · \\d+ ms/.test(document.getElementById('figures').textContent)"
        )
        left, _, right, _ = last_pair(page)[1][0]["box"]
        assert 0 < left < right < 1 and page.locator("#box").is_visible()
        # the first live frame has no past that would smooth it
        sent = unpack(next(data for sent, data in page.messages if sent))
        first = next(a for a in (unpack(d) for s, d in page.messages if not s) if "parts" in a[0])
        settings = artist.settings({**sent[0]})
        wanted = unpack(Sitter(artist).draw(settings, sent[1]))
        pictures = [Image.open(io.BytesIO(data)) for _, data in (first, wanted)]
        assert difference(*pictures) < 1
        page.click("#camera")
        assert page.locator("#begin").is_visible()


def test_a_picture_is_drawn_and_settings_act(browser, served, artist):
    with opened(browser, served) as page:
        upload(page, PHOTO)
        drawn(page)
        pictures = []
        for name, value in ((None, 0), ("swap", 1), ("colours", 0.5), ("truncation", 0.4),
                            ("refine", 5), ("size", 1)):  # fmt: skip
            if name is not None:
                slide(page, name, value)
                drawn(page)
            (request, frame), (answer, picture) = last_pair(page)
            assert answer["faces"] == 1 and request["still"] is True
            wanted = unpack(Sitter(artist).draw(artist.settings(request), frame))[1]
            assert difference(*(Image.open(io.BytesIO(x)) for x in (picture, wanted))) < 0.5
            pictures.append(Image.open(io.BytesIO(picture)).convert("RGB").resize((16, 16)))
            page.wait_for_timeout(100)
            on_page = canvas(page, "drawing").resize((16, 16), Image.Resampling.BOX)
            assert difference(on_page, pictures[-1]) < 12  # enlarged, and reduced again
        for before, after in itertools.pairwise(pictures[:-1]):  # the last is only larger
            assert difference(before, after) > 0.5

        # what the browser sent is the photo within JPEG's error, and so is what is drawn of it
        translator, photo = artist.translator, open_image(PHOTO)
        face = translator.faces(photo)[0]
        crops = [translator.crop(picture, face) for picture in (photo, open_image(frame))]
        assert difference(*crops) < 2
        drawings = [to_pil(translator([crop]).anime[0]) for crop in crops]
        assert difference(*drawings) < 4

        page.check("#show-reconstruction")
        drawn(page)
        assert page.locator("#reconstruction").is_visible()
        assert np.asarray(canvas(page, "reconstruction")).std() > 1
        page.click("button[type=reset]")
        drawn(page)
        assert page.locator("#set-swap").input_value() == "2"


def test_saving(browser, served, tmp_path):
    import av

    with opened(browser, served, accept_downloads=True) as page:
        upload(page, PHOTO)
        drawn(page)
        page.wait_for_selector("#snapshot:enabled")
        with page.expect_download() as saved:
            page.click("#snapshot")
        saved.value.save_as(tmp_path / "snapshot.png")
        picture = last_pair(page)[1][1]
        assert saved.value.suggested_filename.startswith("drawing-")
        shot = Image.open(tmp_path / "snapshot.png").convert("RGB")
        assert difference(shot, Image.open(io.BytesIO(picture))) == 0

        page.click("#camera")
        page.wait_for_selector("#record:enabled")
        page.click("#record")
        drawn(page, 10)
        assert page.locator("#rec").is_visible()
        with page.expect_download() as saved:
            page.click("#record")
        saved.value.save_as(tmp_path / "film.webm")
        with av.open(tmp_path / "film.webm") as recorded:
            frames = [frame.to_image() for frame in recorded.decode(video=0)]
        assert len(frames) > 2 and frames[0].size == (1024, 512)
        assert np.asarray(frames[-1]).std() > 10


# ------------------------------------------------------------------------ what goes wrong


def test_faults_are_said(browser, served):
    with opened(browser, served) as page:
        note, status = page.locator("#note"), page.locator("#status")
        upload(page, b"nothing")
        note.wait_for()
        assert "cannot be read" in note.inner_text() and "cannot be read" in status.inner_text()
        upload(page, png(side=96))
        page.wait_for_function(
            "() => document.getElementById('note').textContent.includes('no face')"
        )
        upload(page, PHOTO)
        drawn(page)
        note.wait_for(state="hidden")


@pytest.mark.parametrize(
    ("name", "words"),
    [("NotAllowedError", "Allow it"), ("NotFoundError", "no camera"),
     ("NotReadableError", "another program")],
)  # fmt: skip
def test_no_camera(browser, served, name, words):
    with opened(browser, served) as page:
        page.evaluate(
            "name => { navigator.mediaDevices.getUserMedia ="
            " () => Promise.reject(new DOMException('', name)); }",
            name,
        )
        page.click("#begin")
        page.wait_for_function(
            "words => document.getElementById('prompt').textContent.includes(words)", arg=words
        )
        assert words in page.locator("#status").inner_text()
        upload(page, PHOTO)  # still possible
        drawn(page)


def test_the_server_goes_and_comes_back(browser, artist):
    first = Served(artist)
    with opened(browser, first) as page:
        page.click("#begin")
        drawn(page)
        first.stop()
        page.wait_for_selector("[data-state=gone], [data-state=reconnecting]")
        assert "gone" in page.locator("#status").inner_text()
        assert page.locator("#note").is_visible()
        second = Served(artist, port=int(first.host.split(":")[1]))
        try:
            drawn(page, 3)
            assert page.locator("body").get_attribute("data-state") == "ready"
            assert not page.locator("#note").is_visible()
        finally:
            second.stop()


def test_a_full_server_says_so(browser, artist):
    served = Served(artist, clients=1)
    try:
        with served.connect(), opened_anyhow(browser, served) as page:
            page.wait_for_selector("[data-state=busy]")
            assert "taken" in page.locator("#note").inner_text()
    finally:
        served.stop()


@contextmanager
def opened_anyhow(browser, served: Served) -> Iterator:
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(LONG)
    page.goto(f"http://{served.host}/")
    yield page
    context.close()


# ------------------------------------------------------------------------ for all who use it


def test_keyboard_and_names(browser, served):
    with opened(browser, served) as page:
        unnamed = page.evaluate(
            """() => [...document.querySelectorAll('button, input, select, canvas, video')]
                .filter((e) => e.id !== 'file')
                .filter((e) => !(e.labels?.length || e.textContent.trim() || e.ariaLabel))
                .map((e) => e.outerHTML)"""
        )
        assert unnamed == []
        reached = set()
        for _ in range(20):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("document.activeElement.id"))
        assert {"begin", "set-swap", "set-colours", "set-size", "show-reconstruction"} <= reached
        page.focus("#set-swap")
        before = page.locator("#set-swap").get_attribute("aria-valuetext")
        page.keyboard.press("ArrowRight")
        assert page.locator("#set-swap").get_attribute("aria-valuetext") != before


@pytest.mark.parametrize("width", [320, 390, 800, 1280])
def test_nothing_overflows(browser, served, width):
    with opened(browser, served, viewport={"width": width, "height": 800}) as page:
        upload(page, PHOTO)
        drawn(page)
        page.check("#show-reconstruction")
        drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        # a canvas has as many pixels as the screen gives it
        pixels, side = page.evaluate(
            "(c => [c.width, c.parentElement.clientWidth * devicePixelRatio])"
            "(document.getElementById('drawing'))"
        )
        assert pixels == round(side) and side > 200


def test_settings_of_the_greeting(browser, served, artist):
    """The sliders are what the server offers."""
    with opened(browser, served) as page:
        for name, offer in artist.offered.items():
            slider = page.locator(f"#set-{name}")
            most = len(offer["choices"]) - 1 if "choices" in offer else offer["max"]
            assert json.loads(slider.get_attribute("max")) == most
        assert page.locator("#set-refine").is_disabled()  # until there is a still
