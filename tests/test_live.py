"""The page's server on tiny random networks: who may ask, what is refused, turns, a clean end.

pytest tests/test_live.py
"""

import http.client
import io
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from pictures import encoded, photo
from PIL import Image
from processes import ROOT, code_of, environment
from test_infer import make_encoder

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
sync = pytest.importorskip("websockets.sync.client")
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

from encoder.align import Aligner  # noqa: E402
from encoder.live import command as live  # noqa: E402
from encoder.live.artist import MOST_BYTES, MOST_PIXELS, Artist, pack, unpack  # noqa: E402
from encoder.live.server import PAGE, Rate, application, server_of  # noqa: E402
from encoder.live.turns import Turns  # noqa: E402
from encoder.pipeline import Translator  # noqa: E402
from generators.blocks import swap  # noqa: E402
from generators.checkpoint import save  # noqa: E402
from generators.images import to_pil  # noqa: E402

TOKEN = "a-token-of-the-tests"


@pytest.fixture
def artist(face, anime) -> Artist:
    """Of 16 x 16 pixels, without an aligner: the middle of a picture is the crop."""
    return Artist(Translator(face, anime, make_encoder(), swap_resolution=8), "tiny")


class Served:
    """A server in a thread of its own, on a port that was free."""

    def __init__(self, artist: Artist, port: int = 0, **options) -> None:
        self.app = application(artist, **options)
        self.server = server_of(self.app)
        self.listener = live.listening("127.0.0.1", port)
        self.host = f"localhost:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    @contextmanager
    def connect(self, greeted: bool = True, **options) -> Iterator:
        # a client of some versions waits for ever for its own reader, once that has a full queue
        bounds = {"max_size": None, "max_queue": 1 << 20}
        with sync.connect(f"ws://{self.host}/socket", **bounds, **options) as client:
            if greeted:
                assert unpack(client.recv(timeout=60))[0]["name"] == "tiny"
            yield client

    def http(self, method: str, path: str, body=None, **headers) -> tuple[int, dict, bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.listener.close()
        assert not self.thread.is_alive()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    running: list[Served] = []

    def start(artist: Artist, **options) -> Served:
        running.append(Served(artist, **options))
        return running[-1]

    yield start
    for served in running:
        served.stop()


def ask(client, picture: bytes, **header) -> tuple[dict, list[Image.Image]]:
    """The answer to one frame: its header, and its pictures."""
    client.send(pack(header, picture))
    return answer_of(client)


def answer_of(client) -> tuple[dict, list[Image.Image]]:
    header, rest = unpack(client.recv(timeout=60))
    pictures = []
    for part in header.get("parts", []):
        pictures.append(Image.open(io.BytesIO(rest[: part["bytes"]])))
        rest = rest[part["bytes"] :]
    assert rest == b""
    return header, pictures


def png(seed: int = 0, side: int = 20) -> bytes:
    return encoded(photo(seed, side, side), "PNG")


def difference(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


def closing(client) -> tuple[int, str]:
    """Code and reason, once the server has closed the connection."""
    with pytest.raises(ConnectionClosed) as caught:
        while True:
            client.recv(timeout=60)
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code, caught.value.rcvd.reason


# ------------------------------------------------------------------------ who may ask


def test_the_page_and_its_headers(serve, artist):
    served = serve(artist)
    for path, kind in (("/", "text/html"), ("/page.js", "javascript"), ("/style.css", "text/css")):
        status, headers, body = served.http("GET", path)
        assert status == 200 and kind in headers["content-type"] and body
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "http" not in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    assert served.http("GET", "/../server.py")[0] == 404
    assert served.http("GET", "/docs")[0] == 404


def test_the_page_has_no_outside_address():
    for file in PAGE.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|url\(|@import", text), file
    html = (PAGE / "index.html").read_text()
    assert not re.search(r'(src|href)="/|<style|\sstyle=|\son[a-z]+=|<script>', html)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:99", "[::1]:8000", "localhost:1"])
def test_names_of_this_machine(serve, artist, host):
    assert serve(artist).http("GET", "/", Host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example", "", "0.0.0.0"]
)
def test_rebound_names_are_refused(serve, artist, host):
    served = serve(artist)
    status, _, body = served.http("GET", "/", Host=host)
    assert status in (400, 403) and b"drawing" not in body.lower()
    assert served.http("POST", "/drawing", png(), Host=host)[0] in (400, 403)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://localhost:1", "https://{host}", ""]
)
def test_other_sites_are_refused(serve, artist, origin):
    served = serve(artist)
    origin = origin.format(host=served.host)
    with pytest.raises(InvalidStatus) as caught, served.connect(origin=origin):
        pass
    assert caught.value.response.status_code == 403
    assert served.http("POST", "/drawing", png(), Origin=origin)[0] == 403
    with served.connect(origin=f"http://{served.host}") as client:
        assert ask(client, png())[1]


def test_the_share_token(serve, artist):
    served = serve(artist, token=TOKEN)
    own = {"Host": "studio.example"}  # any name leads here
    for path in ("/", "/page.js", "/?token=wrong", "/?token=%ff", "/?token="):
        assert served.http("GET", path, **own)[0] == 403
    assert served.http("POST", "/drawing", png(), Authorization="Bearer wrong")[0] == 403
    assert served.http("GET", "/", Cookie="share-token=wr\u00f6ng; =;")[0] == 403
    with pytest.raises(InvalidStatus), served.connect():
        pass

    status, headers, _ = served.http("GET", f"/?token={TOKEN}", **own)
    cookie = headers["set-cookie"]
    assert status == 303 and headers["location"] == "/" and TOKEN not in headers["location"]
    assert "httponly" in cookie.lower() and "samesite=strict" in cookie.lower()
    brought = {"Cookie": cookie.split(";")[0]}
    assert served.http("GET", "/", **brought, **own)[0] == 200
    with served.connect(additional_headers=brought) as client:
        assert ask(client, png())[1]
    elsewhere = served.connect(additional_headers=brought, origin="http://evil.example")
    with pytest.raises(InvalidStatus), elsewhere:  # the cookie does not help another site
        pass
    assert served.http("POST", "/drawing", png(), Authorization=f"Bearer {TOKEN}")[0] == 200


# ------------------------------------------------------------------------ drawings


def test_a_drawing_is_the_translators(serve, artist):
    crop = photo(3, 20, 20)
    result = artist.translator([crop], reconstruction=True)
    with serve(artist).connect() as client:
        header, pictures = ask(
            client, encoded(crop, "PNG"), id=7, still=True, reconstruction=True
        )
        assert header["id"] == 7 and header["faces"] == 1 and header["box"] == [0, 0, 1, 1]
        assert [part["name"] for part in header["parts"]] == ["drawing", "reconstruction"]
        assert header["ms"]["total"] == pytest.approx(
            sum(ms for name, ms in header["ms"].items() if name != "total"), abs=0.1
        )
        for picture, wanted in zip(pictures, (result.anime, result.reconstruction), strict=True):
            assert difference(picture, to_pil(wanted[0])) == 0
        header, (picture,) = ask(client, encoded(crop, "PNG"))  # a live frame: JPEG
        assert header["parts"][0]["type"] == "image/jpeg"
        assert difference(picture, to_pil(result.anime[0])) < 4


def test_settings_act(serve, artist):
    translator = artist.translator
    crop = photo(3, 20, 20)
    images = translator.prepare([crop])
    plain = translator.encode(images)
    with serve(artist).connect() as client:

        def drawn(**settings) -> Image.Image:
            return ask(client, encoded(crop, "PNG"), still=True, **settings)[1][0]

        default = drawn()
        for swap, resolution in ((1, 16), (2, 8), (3, 4)):
            wanted = translator.synthesise(plain, swap_resolution=resolution)[0]
            assert difference(drawn(swap=swap), to_pil(wanted[0])) == 0
        wanted = translator.synthesise(plain, colours=0.5)[0]
        assert difference(drawn(colours=0.5), to_pil(wanted[0])) == 0
        wanted = translator.synthesise(translator.encode(images, truncation=0.2))[0]
        assert difference(drawn(truncation=0.2), to_pil(wanted[0])) == 0
        wanted = translator.synthesise(translator.encode(images, refine_steps=5))[0]
        assert difference(drawn(refine=5), to_pil(wanted[0])) == 0
        assert drawn(size=32).size == (32, 32)
        assert difference(drawn(), default) == 0  # nothing stays behind


def test_the_page_offers_the_styles_and_a_choice_acts_at_once(serve, face, anime):
    styles = {"anime": swap(face, anime, 8), "ink": swap(anime, face, 8)}
    translator = Translator(face, styles, make_encoder(), swap_resolution=8)
    served = serve(Artist(translator, "tiny"))
    crop = photo(3, 20, 20)
    wanted = translator([crop]).drawings
    with served.connect(greeted=False) as client:
        settings = unpack(client.recv(timeout=60))[0]["settings"]
        assert settings["style"] == {"choices": ["anime", "ink"], "value": "anime"}
        for style in ("ink", "anime", None):  # none: the first
            how = {} if style is None else {"style": style}
            _, (picture,) = ask(client, encoded(crop, "PNG"), still=True, **how)
            assert difference(picture, to_pil(wanted[style or "anime"][0])) == 0
        for wrong in ("oil", 1, None):
            error = ask(client, encoded(crop, "PNG"), style=wrong)[0]["error"]
            assert error["message"] == "style must be one of anime, ink."
    status, headers, body = served.http("POST", "/drawing?style=ink", encoded(crop, "PNG"))
    assert (status, headers["content-type"]) == (200, "image/png")
    assert difference(Image.open(io.BytesIO(body)), to_pil(wanted["ink"][0])) == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"swap": 0}, {"swap": 4}, {"swap": "2"}, {"swap": True}, {"colours": 1.1}, {"size": 17},
        {"size": [16]}, {"truncation": None}, {"refine": -1}, {"still": 1}, {"id": -1},
        {"id": "a"}, {"other": 1}, {"colours": 10**400}, {"swap": 1.5},
    ],
)  # fmt: skip
def test_wrong_settings_are_answered(serve, artist, wrong):
    with serve(artist).connect() as client:
        header, _ = ask(client, png(), **{"id": 3, **wrong})
        assert header["error"]["code"] == "bad-request" and header["error"]["message"].endswith(".")
        assert ask(client, png(), id=4)[0]["faces"] == 1


def test_colours_go_from_the_photos_to_the_generators(face, anime, ws):
    """At 1 all photos are drawn in the same styles; at 0 nothing changes."""
    translator = Translator(face, anime, make_encoder(), swap_resolution=4)
    plain, none = translator.synthesise(ws)[0], translator.synthesise(ws, colours=0.0)[0]
    half, full = (translator.synthesise(ws, colours=c)[0] for c in (0.5, 1.0))
    assert (plain == none).all()
    assert full.var(dim=0).max() < 1e-9 < half.var(dim=0).mean() < plain.var(dim=0).mean()


# ------------------------------------------------------------------------ what is refused


def bomb(side: int) -> bytes:
    return encoded(Image.new("L", (side, side)), "PNG")


def test_garbage_is_answered_and_others_go_on(serve, artist):
    served = serve(artist)
    nested = b"[" * 4000
    broken = [
        b"", b"\x00", b"\xff\xff\xff\xff", len(nested).to_bytes(4, "little") + nested,
        b"\x02\x00\x00\x00[]", b"\x03\x00\x00\x00NaN", b"\x02\x00\x00\x00\xff\xff",
    ]  # fmt: skip
    with served.connect() as good, served.connect() as bad:
        for message in broken:
            bad.send(message)
            assert answer_of(bad)[0]["error"]["code"] == "bad-request"
            assert ask(good, png())[1]
        half = png()[:60]
        for picture, code in (
            (b"", "bad-picture"), (b"GIF89a", "bad-picture"), (half, "bad-picture"),
            (b"%!PS-Adobe-3.0 EPSF-3.0\n", "bad-picture"),
            (bomb(int(MOST_PIXELS**0.5) + 1), "too-large"),
        ):  # fmt: skip
            header, _ = ask(bad, picture, id=5)
            assert header["id"] == 5 and header["error"]["code"] == code
            assert ask(good, png())[1]
        assert ask(bad, png())[1]


def test_a_message_that_is_too_large_ends_its_connection_only(serve, artist):
    served = serve(artist)
    with served.connect() as good, served.connect() as bad:
        # the head of a masked binary message, which says how much will come; RFC 6455, section 5.2
        length = MOST_BYTES + (1 << 20)
        bad.socket.sendall(b"\x82\xff" + length.to_bytes(8, "big") + bytes(4) + bytes(1000))
        assert closing(bad)[0] == 1009
        assert ask(good, png())[1]


def test_text_ends_a_connection(serve, artist):
    with serve(artist).connect() as client:
        client.send("hello")
        code, reason = closing(client)
        assert code == 1003 and "binary" in reason


def test_a_flood_ends_a_connection(serve, artist):
    served = serve(artist)
    with served.connect() as good, served.connect() as bad:
        deadline = time.monotonic() + 60
        with pytest.raises(ConnectionClosed):
            while time.monotonic() < deadline:  # it has closed before the sender hears of it
                bad.send(pack({}, b""))
        code, reason = closing(bad)
        assert code == 1008 and "second" in reason
        assert ask(good, png())[1]


def test_places_are_taken_and_free_again(serve, artist):
    served = serve(artist, clients=1)
    with served.connect(), served.connect(greeted=False) as late:
        code, reason = closing(late)
        assert code == 1013 and "taken" in reason
    deadline = time.monotonic() + 5
    while True:
        try:
            with served.connect() as client:
                assert ask(client, png())[1]
            return
        except ConnectionClosed:
            assert time.monotonic() < deadline


def test_single_pictures(serve, artist):
    served = serve(artist)
    crop = photo(3, 20, 20)
    status, headers, body = served.http("POST", "/drawing?swap=1&size=32", encoded(crop, "PNG"))
    assert status == 200 and headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(body)).size == (32, 32)
    for path, body, wanted, code in (
        ("/drawing", bytes(MOST_BYTES + 1), 413, "too-large"),
        ("/drawing", bomb(int(MOST_PIXELS**0.5) + 1), 413, "too-large"),
        ("/drawing", b"nothing", 415, "bad-picture"),
        ("/drawing?swap=9", png(), 400, "bad-request"),
        ("/drawing?size=large", png(), 400, "bad-request"),
    ):
        status, _, answer = served.http("POST", path, body)
        assert (status, json.loads(answer)["code"]) == (wanted, code)
    found = [served.http("POST", "/drawing", b"nothing") for _ in range(15)]
    status, headers, answer = found[-1]
    assert status == 429 and headers["retry-after"] == "1" and json.loads(answer)["code"] == "busy"
    assert served.http("GET", "/drawing")[0] in (404, 405)


def test_no_face(serve, artist):
    artist.translator.aligner = Aligner()
    served = serve(artist)
    assert served.http("POST", "/drawing", png(side=64))[0] == 422
    with served.connect() as client:
        for still in (True, False):
            header, _ = ask(client, png(side=64), still=still)
            assert header["error"]["code"] == "no-face"


# ------------------------------------------------------------------------ turns


@contextmanager
def held(served: Served) -> Iterator[None]:
    """The worker has something else to do in the meantime."""
    release = threading.Event()
    served.app.state.turns.ask(release.wait, 20)
    try:
        yield
    finally:
        release.set()


def test_the_newest_frame_wins(serve, artist):
    served = serve(artist)
    with served.connect() as client:
        with held(served):
            client.send(pack({"id": 1}, png(1)))
            time.sleep(0.3)  # it waits for its turn now
            for number in range(2, 9):
                client.send(pack({"id": number}, png(number)))
            time.sleep(0.3)
        assert [answer_of(client)[0]["id"] for _ in range(2)] == [1, 8]
        assert ask(client, png(), id=9)[0]["id"] == 9  # and nothing else came


def test_twenty_clients_take_turns(serve, artist):
    served = serve(artist)
    wanted = [to_pil(artist.translator([photo(i, 20, 20)]).anime[0]) for i in range(20)]
    done = [0] * 20
    begin, end = threading.Barrier(20), time.monotonic() + 3

    def use(number: int) -> None:
        with served.connect() as client:
            begin.wait(20)
            while time.monotonic() < end or done[number] == 0:
                header, (picture,) = ask(client, png(number), id=done[number], still=True)
                assert header["id"] == done[number]
                assert difference(picture, wanted[number]) == 0  # never another one's
                done[number] += 1

    threads = [threading.Thread(target=use, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert min(done) >= 1 and max(done) <= 3 * min(done) + 3, done


def test_a_refinement_gives_way(serve, artist):
    served = serve(artist)
    with served.connect() as slow, served.connect() as quick:
        slow.send(pack({"id": 1, "still": True, "refine": 100}, png(1)))
        time.sleep(0.1)
        answered = 0
        while True:
            assert ask(quick, png(2))[1]
            answered += 1
            try:
                header, _ = unpack(slow.recv(timeout=0.01))
                break
            except TimeoutError:
                pass
        assert header["id"] == 1 and "error" not in header
        assert answered > 3


def test_who_leaves_is_not_refined_for(serve, artist):
    served = serve(artist)
    with served.connect() as slow:
        slow.send(pack({"still": True, "refine": 100}, encoded(photo(1, 900, 900), "PNG")))
        time.sleep(0.2)
    with served.connect() as client:
        assert ask(client, png())[1]
    assert served.app.state.turns.waiting.qsize() == 0


def test_turns_are_in_order_and_faults_stay_with_who_asked():
    turns, done = Turns(), []
    release = threading.Event()
    first = turns.ask(release.wait, 5)
    fault = turns.ask(lambda: 1 / 0)
    dropped = turns.ask(done.append, "dropped")
    assert dropped.cancel()
    rest = [turns.ask(done.append, number) for number in range(3)]
    release.set()
    assert first.result(5) and isinstance(fault.exception(5), ZeroDivisionError)
    assert [future.result(5) for future in rest] == [None] * 3 and done == [0, 1, 2]
    turns.close()
    assert not turns.thread.is_alive()


def test_a_rate_is_kept():
    rate = Rate(100.0, 5.0)
    assert [rate.allows() for _ in range(6)] == [True] * 5 + [False]
    time.sleep(0.1)
    assert rate.allows()


# ------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "--share-token"),
        (["--host", "192.0.2.7", "--share-token", "short"], "--share-token"),
        (["--host", "192.0.2.7", "--share-token", TOKEN, "--port", "0"], "listen"),
        (["--host", "no such host", "--share-token", "new"], "listen"),
        (["--port", "70000"], "--port"),
        (["--clients", "0"], "--clients"),
    ],
)
def test_wrong_options_end_in_a_sentence(arguments, words, capsys):
    assert code_of(live.main, arguments) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_a_taken_port_is_named(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert code_of(live.main, ["--port", port]) == 2
    assert port in capsys.readouterr().err


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(live, "find_spec", lambda name: None if name == "fastapi" else 1)
    assert code_of(live.main, []) == 2
    error = capsys.readouterr().err
    assert "fastapi" in error and "[live]" in error


@pytest.fixture
def networks(tmp_path: Path, face, anime) -> list[str]:
    """The options that name tiny networks as files."""
    files = {"face-generator": face, "anime-generator": anime, "encoder": make_encoder()}
    options = ["--backend", "torch"]  # which has nothing to export first
    for name, network in files.items():
        save(tmp_path / f"{name}.safetensors", network)
        options += [f"--{name}", str(tmp_path / f"{name}.safetensors")]
    return options


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_cleanly(networks, number, code):
    command = [sys.executable, "-m", "encoder.live", "--port", "0", "--no-align", *networks]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment(), cwd=ROOT
    )
    try:
        line = process.stderr.readline()
        address = re.search(r"http://(localhost:\d+)/", line)
        assert address, line + process.stderr.read()
        with sync.connect(f"ws://{address[1]}/socket", open_timeout=60) as client:
            client.recv(timeout=60)
            assert ask(client, png())[1]
            process.send_signal(number)
            assert closing(client)[0] in (1001, 1012)
        assert process.wait(60) == code
        rest = process.stderr.read()
        assert "Traceback" not in rest and "Stopped" in rest
    finally:
        process.kill()
        process.communicate()
