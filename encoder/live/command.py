"""A page for the camera: your face as a drawing, in real time, drawn by this machine.

    python -m encoder.live                                    # then open http://localhost:8000
    python -m encoder.live --host 0.0.0.0 --share-token new   # also for others, who need the link
    curl --data-binary @me.jpg 'http://localhost:8000/drawing?size=256' > me.png

Serves `encoder/live/page/`. Frames come over a WebSocket, one for each client, and drawings go back
(see `encoder.live.artist` for the messages): of a client's frames the newest counts, one is in the
works, and clients take turns, so no delay grows. Nothing is stored and nothing leaves this machine.
Ctrl-C ends it.
"""

from __future__ import annotations

import ipaddress
import itertools
import secrets
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from PIL import Image

from encoder.align import Aligner
from encoder.engines import engine_of
from encoder.live.artist import Artist
from encoder.options import STYLES, Drawing
from encoder.pipeline import Translator
from generators.bundled import companion
from generators.checkpoint import load, resolve
from generators.command import command, console, parse_device, printable
from generators.superres import SuperResolution

EXTRA = ("fastapi", "uvicorn", "websockets")
TOKEN = 16  # characters of a share token, at least


@dataclass(frozen=True, kw_only=True)
class LiveConfig(Drawing):
    styles: str | None = None  # that the page offers, as of infer.py; None: all that are bundled
    # for a bundled face generator, of another anime
    host: str = "127.0.0.1"  # address to listen on; others than this machine's need a share token
    port: int = 8000  # 0: any that is free
    share_token: str | None = None  # who opens the page must have it; "new" makes one
    clients: int = 32  # that are connected at the same time, at most

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.drawn
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be 0 to 65535, not {self.port}")
        if self.clients < 1:
            raise ValueError(f"--clients must be at least 1, not {self.clients}")
        token = self.share_token
        if token is None and not is_here(self.host):
            raise ValueError(
                f"Others could use a server on {printable(self.host)}; give --share-token new to "
                "let in only those who have the link that is printed then."
            )
        if token not in (None, "new") and (len(token) < TOKEN or not token.isascii()):
            raise ValueError(f"--share-token must have {TOKEN} plain characters or more, or be new")

    @property
    def drawn(self) -> dict[str, str]:
        """{style: bundled name or file}, the first being drawn at first."""
        usual = ",".join(STYLES) if companion(self.face_generator, "anime") else "anime"
        return self.styles_of(self.styles or usual)


def is_here(host: str) -> bool:
    """Whether only this machine reaches what listens on that address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def run(config: LiveConfig) -> int:
    """Serves until Ctrl-C or SIGTERM, which `command` answers."""
    missing = [name for name in EXTRA if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"The page needs {', '.join(missing)}; install the extra: "
            "pip install 'amortized-gan-inversion[live]'"
        )
    from encoder.live.server import application, server_of

    with listening(config.host, config.port) as listener:
        artist = artist_of(config)
        token = secrets.token_urlsafe(24) if config.share_token == "new" else config.share_token
        server = server_of(application(artist, token=token, clients=config.clients))
        console.print(f"The page: {address(config.host, listener, token)}  (Ctrl-C ends it)")
        server.run(sockets=[listener])
    return 0


def artist_of(config: LiveConfig) -> Artist:
    """The networks, once for all clients, and warm: the first frame is as fast as the others."""
    device, styles = parse_device(config.device), config.drawn
    engine = engine_of(config, device)
    how = {key: engine[key] for key in ("backend", "threads")}
    translator = Translator.load(
        config.face_generator,
        styles,
        config.encoder,
        device=device,
        aligner=Aligner(device, **how) if config.align else None,
        superres=load(resolve("superres64"), SuperResolution),
        **engine,
    )
    blank = Image.new("RGB", (64, 64))
    ws = translator.encode(translator.prepare([blank]))
    for style, reconstruction in itertools.product(styles, (True, False)):
        translator.drawings(ws, (style,), reconstruction)
    if config.align:
        translator.faces(blank)
    names = ", ".join(Path(file).stem for file in styles.values())  # no path: others may read it
    return Artist(translator, f"{names} ({device.type}, {translator.backend})")


def listening(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"Cannot listen on {printable(host)} port {port}: {reason}; give another --host or "
            "--port (0: any that is free)."
        ) from error


def address(host: str, listener: socket.socket, token: str | None) -> str:
    """Where a browser finds the page; what listens on all addresses is found by its name."""
    if is_here(host):
        host = "localhost"
    elif host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    shown = f"[{host}]" if ":" in host else host
    port = listener.getsockname()[1]
    return f"http://{shown}:{port}/" + (f"?token={token}" if token else "")


def main(argv: Sequence[str] | None = None) -> int:
    return command(LiveConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
