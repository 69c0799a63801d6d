"""The page in a browser: frames a second and delay as it shows them, and the README's pictures.

    python benchmarks/page.py --output benchmarks/results/page.json
    python benchmarks/page.py --site site/         # of `python -m encoder.web --output site/`
    python benchmarks/page.py --pictures benchmarks/results/page    # page_desktop.jpg, …_phone.jpg

Starts the server of `encoder.live` and the system's Chromium on the same machine, with a clip made
from examples/ as the camera, and watches the drawings arrive for some seconds. Browser and server
share the cores; the browser draws its own window in software.
"""

import contextlib
import io
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from browser import chromium, film, why_not
from clip import Clip
from common import Benchmark, benchmark
from PIL import Image

from encoder import web
from encoder.live import command as live
from encoder.live.server import application, server_of
from generators.disk import may_write, write_atomically
from generators.images import open_image

PHOTO = Path(__file__).parent.parent / "examples" / "astronaut.jpg"
SCREENS: dict[str, dict[str, Any]] = {
    "desktop": {"viewport": {"width": 1280, "height": 800}, "color_scheme": "light"},
    "phone": {
        "viewport": {"width": 390, "height": 844}, "color_scheme": "dark",
        "device_scale_factor": 2, "is_mobile": True, "has_touch": True,
    },
}  # fmt: skip
SMALL: dict[str, Any] = {"quality": 88, "subsampling": 0, "optimize": True}  # text stays sharp
LONG = 120_000  # ms


@dataclass(frozen=True, kw_only=True)
class Config(Benchmark):
    seconds: float = 10.0  # of drawings that are watched
    size: int | None = None  # pixels of the drawings; None: the generator's own
    reconstruction: bool = False  # ask for it, too
    backend: Literal["auto", "torch", "onnxruntime", "openvino"] = "auto"  # of the server
    site: Path | None = None  # folder of encoder.web: the browser draws by itself; None: the server
    pictures: Path | None = None  # beginning of the names of pictures of the page to write

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seconds <= 0:
            raise ValueError("--seconds is above 0")
        if self.pictures is not None:
            for screen in SCREENS:
                may_write(target(self.pictures, screen), self.overwrite)
        if self.site is not None and not (self.site / "files.json").is_file():
            raise ValueError(f"--site {self.site} holds no site; make one with encoder.web")
        if self.site is not None and self.pictures is not None:
            raise ValueError("--pictures are those of the server's page; leave out --site")
        if reason := why_not():
            raise ValueError(f"This benchmark {reason}.")


def target(beginning: Path, screen: str) -> Path:
    return beginning.with_name(f"{beginning.name}_{screen}.jpg")


def run(config: Config) -> dict[str, Any]:
    clip = Clip([open_image(PHOTO)], seconds=min(10.0, config.seconds))
    frames = [frame for _, frame in clip.frames()]
    hosted = served(config.backend) if config.site is None else site(config.site)
    with tempfile.TemporaryDirectory() as folder, hosted as address:
        with chromium(film(Path(folder) / "moving.mjpeg", frames)) as browser:
            report = measured(browser, address, config)
        if config.pictures is None:
            return report
        photo = open_image(PHOTO)
        upper = photo.resize((640, 480), box=(0, 0, photo.width, photo.width * 3 / 4))
        with chromium(film(Path(folder) / "still.mjpeg", [upper])) as browser:
            for screen, options in SCREENS.items():
                picture = shown(browser, address, options)
                save = partial(picture.save, format="JPEG", **SMALL)
                write_atomically(target(config.pictures, screen), save)
    return report


@contextlib.contextmanager
def served(backend: Any) -> Iterator[str]:
    """The server with the bundled models, in a thread of this process; its address."""
    artist = live.artist_of(live.LiveConfig(backend=backend))
    listener = live.listening("127.0.0.1", 0)
    server = server_of(application(artist))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield live.address("127.0.0.1", listener, None)
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def site(folder: Path) -> Iterator[str]:
    """The page without a server, with the headers it needs; its address."""
    with web.server(folder, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://localhost:{server.server_port}/"
        server.shutdown()


def measured(browser: Any, address: str, config: Config) -> dict[str, Any]:
    """Of the drawings that arrive in so many seconds: how many, and how old."""
    context = browser.new_context(**SCREENS["desktop"], permissions=["camera"])
    page = context.new_page()
    page.set_default_timeout(LONG)
    page.goto(address)
    if config.site is not None:
        page.click("#fetch")
    page.wait_for_selector("[data-state=ready]")
    if config.size is not None:
        choices = page.evaluate("Number(document.getElementById('set-size').max)")
        for index in range(choices + 1):
            page.fill("#set-size", str(index))
            if page.get_attribute("#set-size", "aria-valuetext") == f"{config.size} px":
                break
        else:
            raise ValueError(f"--size {config.size} is none that the page offers")
    if config.reconstruction:
        page.check("#show-reconstruction")
    page.click("#begin")
    page.wait_for_selector("body.drawn")
    page.wait_for_timeout(1000 * min(2.0, config.seconds))  # it has warmed up
    page.evaluate(
        "seen = []; document.addEventListener('drawn', ({ detail }) => seen.push(detail))"
    )
    start = time.perf_counter()
    page.wait_for_timeout(1000 * config.seconds)
    passed = time.perf_counter() - start
    seen = page.evaluate("seen")
    context.close()
    delays = [one["latency"] for one in seen]
    parts = {name: round(statistics.median(one["ms"][name] for one in seen), 2)
             for name in (seen[0]["ms"] if seen else ())}  # fmt: skip
    return {
        "frames": len(seen),
        "frames_per_second": round(len(seen) / passed, 2),
        "p50_ms": round(statistics.median(delays), 1) if delays else None,
        "p95_ms": round(statistics.quantiles(delays, n=20, method="inclusive")[-1], 1)
        if len(delays) > 1
        else None,
        "server_p50_ms": parts,
        "failed": int(not seen),
    }


def shown(browser: Any, address: str, options: dict[str, Any]) -> Image.Image:
    """The page with its camera on, as it looks on that screen."""
    context = browser.new_context(**options, permissions=["camera"])
    page = context.new_page()
    page.set_default_timeout(LONG)
    page.goto(address)
    page.wait_for_selector("[data-state=ready]")
    page.fill("#set-size", "2")
    page.click("#begin")
    page.wait_for_selector("body.drawn")
    page.wait_for_timeout(3000)
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True)))
    context.close()
    return picture.convert("RGB")


def main(argv: Sequence[str] | None = None) -> int:
    quick = {"seconds": 1.0}
    return benchmark("page", Config, run, quick, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
