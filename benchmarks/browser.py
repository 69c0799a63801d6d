"""A browser to try the page in: the system's Chromium, headless, with a film for its camera.

with chromium(film(folder / "camera.mjpeg", frames)) as browser: …
"""

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPTIONS = [
    "--no-sandbox",  # as root there is none
    "--disable-dev-shm-usage",  # in containers it is small
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",  # the camera is allowed without a question
]


def why_not() -> str:
    """Why there is no browser to test with; "" where there is one."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "needs playwright (pip install playwright)"
    if not executable():
        return f"needs a browser: one of {', '.join(NAMES)} (apt-get install chromium)"
    return ""


def executable() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def film(path: Path, frames: Iterable[Image.Image]) -> Path:
    """A Motion JPEG film, JPEGs in a row, which Chromium shows as its camera again and again."""
    with open(path, "wb") as file:
        for frame in frames:
            frame.save(file, "JPEG", quality=92)
    return path


@contextmanager
def chromium(camera: Path | None = None) -> Iterator[Any]:
    """A headless browser; `camera` is the film that its camera shows, None: a test picture."""
    from playwright.sync_api import sync_playwright

    options = [*OPTIONS, *([f"--use-file-for-fake-video-capture={camera}"] if camera else [])]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable(), args=options)
        try:
            yield browser
        finally:
            browser.close()
