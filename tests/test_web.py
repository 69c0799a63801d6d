"""The site's builder, on tiny random networks and a stand-in for ONNX Runtime; nothing is fetched.

pytest tests/test_web.py
"""

import hashlib
import http.client
import io
import json
import re
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_generator
from pictures import photo
from processes import code_of
from test_infer import make_encoder

pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from encoder import web  # noqa: E402
from encoder.browser import Files, block_model, styles_model, write_networks  # noqa: E402
from encoder.geometry import ffhq_square, square_matrix, warp  # noqa: E402
from generators.blocks import SwappedSynthesis, swap  # noqa: E402
from generators.checkpoint import save  # noqa: E402
from generators.latents import LIMIT, truncate  # noqa: E402

CONTENT = {name: name.encode() * 9 for name in web.RUNTIME}
HASHES = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()}
NODE = shutil.which("node")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """The hashes of a package that is none."""
    monkeypatch.setattr(web, "RUNTIME", HASHES)


def make_package(folder: Path, content: dict[str, bytes] = CONTENT) -> Path:
    for name, data in content.items():
        path = folder / "package" / "dist" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def make_tgz(path: Path, content: dict[str, bytes] = CONTENT) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> list[str]:
    """The options that name tiny networks."""
    folder = tmp_path_factory.mktemp("weights")
    networks = {"face-generator": make_generator(1), "anime-generator": make_generator(2),
                "encoder": make_encoder()}  # fmt: skip
    options = ["--swap-resolution", "8"]
    for name, network in networks.items():
        save(folder / f"{name}.safetensors", network, provenance={"licence": f"of the {name}"})
        options += [f"--{name}", str(folder / f"{name}.safetensors")]
    return options


@pytest.fixture(scope="module")
def site(tmp_path_factory, weights) -> Path:
    folder = tmp_path_factory.mktemp("web")
    package = make_package(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(web, "RUNTIME", HASHES)
        argv = ["--output", str(folder / "site"), "--onnxruntime-web", str(package), *weights]
        assert web.main(argv) == 0
    return folder / "site"


def listed(site: Path) -> dict:
    return json.loads((site / "files.json").read_text())


# ------------------------------------------------------------------------------ the folder


def test_the_folder_holds_the_page_the_networks_and_the_runtime(site):
    there = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    blocks = {f"onnx/{kind}_b{r}.onnx" for kind in ("face", "anime") for r in (4, 8, 16)}
    others = {f"onnx/{name}.onnx" for name in ("encoder", "styles", "pnet", "rnet", "onet")}
    page = {path.name for path in web.PAGE.iterdir() if path.is_file()} - {"engine-socket.js"}
    assert {"index.html", "engine-device.js", "worker.js", "service-worker.js"} <= page
    runtime = {f"onnxruntime/{name}" for name in CONTENT}
    made = {"files.json", "_headers", "licences.txt"}
    assert there == page | blocks | others | runtime | made
    assert [path.name for path in site.parent.iterdir() if path.name.startswith(".")] == []


def test_the_list_has_every_file_that_is_served_with_size_and_hash(site):
    files = listed(site)["files"]
    for file in files:
        data = (site / file["path"]).read_bytes()
        assert len(data) == file["bytes"] and hashlib.sha256(data).hexdigest() == file["sha256"]
    there = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    unlisted = {"files.json", "_headers", "service-worker.js"}  # the browser looks for that itself
    assert {file["path"] for file in files} == there - unlisted
    for runtime in listed(site)["runtimes"].values():
        assert (site / runtime["wasm"]).is_file()
        assert (site / "onnxruntime" / runtime["script"]).is_file()
        assert (site / "onnxruntime" / runtime["loader"]).is_file()


def test_the_page_draws_on_the_device_and_may_load_from_its_host_only(site):
    index = (site / "index.html").read_text()
    assert 'data-engine="device"' in index and "socket" not in index
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', index)
    assert index.index("http-equiv") < index.index("<link") < index.index("<script")
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["connect-src"] == "'self'"
    sources = {source for rule in rules.values() for source in rule.split()}
    assert sources == {"'none'", "'self'", "'wasm-unsafe-eval'", "blob:"}
    for path in (path for path in site.iterdir() if path.suffix in (".html", ".css", ".js")):
        addresses = re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text())
        assert not [a for a in addresses if "www.w3.org" not in a], path.name


def test_the_headers_are_written_for_hosts_and_into_the_service_worker(site):
    written = (site / "_headers").read_text()
    assert written.startswith("/*\n  ")
    assert "Cross-Origin-Opener-Policy: same-origin" in written
    assert "Cross-Origin-Embedder-Policy: require-corp" in written
    worker = (site / "service-worker.js").read_text()
    assert f'VERSION = "{listed(site)["version"]}";' in worker
    for name, value in web.HEADERS.items():
        assert f"  {name}: {value}\n" in written and json.dumps({name: value})[1:-1] in worker


def test_what_the_site_is_made_of_has_its_licence(site):
    text = (site / "licences.txt").read_text()
    for owner in ("face-generator", "anime-generator", "encoder", "Microsoft", "facenet"):
        assert owner in text


def test_a_changed_page_is_another_version(site, tmp_path):
    changed = tmp_path / "site"
    shutil.copytree(site, changed)
    (changed / "files.json").unlink()
    web.write_page(changed)
    (changed / "style.css").write_text("body {}")
    web.write_list(changed, listed(site)["networks"])
    assert listed(changed)["version"] != listed(site)["version"]


# ---------------------------------------------------------------------------- the networks


@pytest.mark.parametrize("swap_resolution", [4, 8, 16])
def test_the_files_draw_what_torch_does_for_any_number_of_blocks(site, swap_resolution):
    face, anime, encoder = make_generator(1), make_generator(2), make_encoder()
    network = SwappedSynthesis(face, anime, 8, web.DEVIATIONS)
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    found = Files(site / "onnx", [4, 8, 16])(image.numpy(), swap_resolution)
    with torch.no_grad():
        wanted = network.draw(encoder(image), None, True, swap_resolution=swap_resolution)
    assert found.keys() == wanted.keys() == {"anime", "reconstruction"}
    for name, b in wanted.items():
        np.testing.assert_allclose(found[name], b.numpy(), atol=0.01 * float(b.abs().max()))


def test_a_style_on_the_page_has_only_the_blocks_that_are_its_own(tmp_path, face, anime):
    styles = {"anime": swap(face, anime, 8), "ink": swap(face, anime, 16)}
    about = write_networks(tmp_path, face, styles, make_encoder(), 8)  # compared with torch, too
    assert about["styles"] == ["anime", "ink"]
    there = {path.stem for path in tmp_path.glob("*_b*.onnx")}
    assert there == {"face_b4", "face_b8", "face_b16", "anime_b8", "anime_b16", "ink_b16"}


def test_styles_are_truncated_limited_and_coloured_as_in_torch(face, anime, ws):
    network = SwappedSynthesis(face, anime, 4, LIMIT)
    model = styles_model(face, network, {}).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    numbers = {"truncation": np.float32([0.7]), "colours": np.float32([0.4])}
    truncated, limited = session.run(None, {"found": ws.numpy(), **numbers})
    wanted = truncate(ws, face.w_avg, 0.7)
    np.testing.assert_allclose(truncated, wanted.numpy(), atol=1e-5)
    np.testing.assert_allclose(limited, network.limit(wanted, 0.4, 4).numpy(), atol=2e-3)


def test_a_block_stores_its_weights_once_and_in_half_precision(face):
    import onnx

    config = face.config.__class__(resolution=8, z_dim=8, w_dim=64, widths=(64, 64))
    block = block_model(make_generator(1, config), 8, {})
    weights = {tuple(t.dims): t.data_type for t in block.graph.initializer if len(t.dims) == 4}
    assert weights[64, 64, 3, 3] == onnx.TensorProto.FLOAT16
    assert block.ByteSize() < 3 * 2 * 64 * 64 * 9  # two convolutions, and little else


# -------------------------------------------------------------------------- ONNX Runtime


def test_the_package_may_be_packed_or_unpacked(tmp_path):
    assert web.runtime_files(make_tgz(tmp_path / "a.tgz")) == CONTENT
    assert web.runtime_files(make_package(tmp_path)) == CONTENT
    assert web.runtime_files(tmp_path / "package") == CONTENT
    assert web.runtime_files(tmp_path / "package" / "dist") == CONTENT


def test_the_real_hashes_are_of_an_exact_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", web.VERSION)
    needed = {str(r[key]).rpartition("/")[2] for r in web.RUNTIMES.values()
              for key in ("script", "loader", "wasm")}  # fmt: skip
    assert needed == set(CONTENT)


def fake_npm(tmp_path: Path, monkeypatch, script: str) -> None:
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")


def test_npm_is_asked_for_that_version_and_said_to_be(tmp_path, monkeypatch, capsys):
    package = make_tgz(tmp_path / "packed.tgz")
    said = tmp_path / "said"
    fake_npm(tmp_path, monkeypatch, f'echo "$@" > {said}; cp {package} ./onnxruntime-web.tgz')
    assert web.runtime_files(None) == CONTENT
    assert f"onnxruntime-web@{web.VERSION}" in said.read_text().split()
    assert "npm registry" in capsys.readouterr().err


BAD_PACKAGES = {
    "nothing there": (lambda path: path, "There is no"),
    "no package": (lambda path: path.mkdir() or path, "has no dist/"),
    "no archive": (lambda path: path.write_text("x") and path, "is not that"),
    "part of it": (lambda path: make_tgz(path, dict(list(CONTENT.items())[:2])), "is not that"),
    "cut off": (
        lambda path: path.write_bytes(make_tgz(path).read_bytes()[:99]) and path,
        "is not that",
    ),
    "another version": (
        lambda path: make_tgz(path, CONTENT | {"ort.wasm.min.mjs": b"evil"}),
        "ort.wasm.min.mjs is not that of version",
    ),
}


@pytest.mark.parametrize("case", BAD_PACKAGES)
def test_another_package_is_refused_with_a_sentence(tmp_path, capsys, case, weights):
    make, sentence = BAD_PACKAGES[case]
    package = make(tmp_path / "package.tgz")
    argv = ["--output", str(tmp_path / "site"), "--onnxruntime-web", str(package), *weights]
    assert code_of(web.main, argv) == 2
    said = capsys.readouterr().err
    assert sentence in said and f"onnxruntime-web {web.VERSION}" in said
    assert not (tmp_path / "site").exists()


def test_without_npm_or_network_a_sentence_helps(tmp_path, monkeypatch, capsys, weights):
    argv = ["--output", str(tmp_path / "site"), *weights]
    fake_npm(tmp_path, monkeypatch, "echo 'npm error network is unreachable' >&2; exit 1")
    assert code_of(web.main, argv) == 2
    said = capsys.readouterr().err
    assert "network is unreachable" in said and "--onnxruntime-web" in said
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_of(web.main, argv) == 2
    said = capsys.readouterr().err
    assert "npm is missing" in said and "Node.js" in said and "--onnxruntime-web" in said


# ---------------------------------------------------------------------- what is asked wrongly


def bad_option(tmp_path: Path, site: Path, case: str) -> tuple[list[str], str]:
    """Further options, and what is said of them."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    return {
        "a file": (["--output", str(tmp_path / "file")], "is a file"),
        "something else": (["--output", str(tmp_path / "full")], "something else than a site"),
        "over something else": (
            ["--output", str(tmp_path / "full"), "--overwrite"], "something else than a site"),
        "a site": (["--output", str(site)], "--overwrite"),
        "no weights": (
            ["--output", str(tmp_path / "new"), "--encoder", "none"], "no such file"),
        "no block": (
            ["--output", str(tmp_path / "new"), "--swap-resolution", "512"], "no block"),
        "no port": (["--output", str(tmp_path / "new"), "--port", "99999"], "--port"),
    }[case]  # fmt: skip


@pytest.mark.parametrize(
    "case",
    ["a file", "something else", "over something else", "a site", "no weights", "no block",
     "no port"],
)  # fmt: skip
def test_a_mistake_is_a_sentence_and_nothing_is_lost(tmp_path, capsys, case, site, weights):
    before = (site / "files.json").read_bytes()
    options, sentence = bad_option(tmp_path, site, case)
    package = make_package(tmp_path / "runtime")
    argv = ["--onnxruntime-web", str(package), *weights, *options]
    assert code_of(web.main, argv) == 2
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "full" / "thesis.txt").exists() and not (tmp_path / "new").exists()
    assert (site / "files.json").read_bytes() == before


# --------------------------------------------------------------------------- the server


def test_the_server_sends_the_headers_to_this_machine_only(site):
    with web.server(site, 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        kinds = {"/": "text/html", "/worker.js": "text/javascript", "/nothing": "text/html",
                 "/onnxruntime/ort-wasm-simd-threaded.wasm": "application/wasm"}  # fmt: skip
        for path, kind in kinds.items():
            connection.request("GET", path)
            answer = connection.getresponse()
            answer.read()
            assert answer.status == (404 if path == "/nothing" else 200)
            assert answer.headers["Content-Type"].startswith(kind)
            assert web.HEADERS.items() <= dict(answer.headers).items()
        connection.request("GET", "/../../etc/passwd")
        assert connection.getresponse().status == 404
        server.shutdown()


def test_a_port_that_is_taken_is_a_sentence(site, capsys):
    with web.server(site, 0) as server:
        argv = ["--output", str(site), "--serve", "--port", str(server.server_port)]
        assert code_of(web.main, argv) == 2
    assert "another --port" in capsys.readouterr().err


# ------------------------------------------------------------------- the page's arithmetic

WARP = """
import { readFileSync } from "fs";
import { ffhqMatrix, warp } from "GEOMETRY";
const { width, height, data, points, size } = JSON.parse(readFileSync(0));
const picture = { width, height, data: Uint8ClampedArray.from(data) };
console.log(JSON.stringify(Array.from(warp(picture, ffhqMatrix(points), size).data)));
"""

POINTS = {
    "upright": [[30, 30], [50, 30], [40, 40], [33, 52], [47, 52]],
    "turned": [[30, 34], [48, 26], [42, 40], [38, 54], [53, 47]],
    "beyond two borders": [[6, 5], [20, 6], [12, 12], [8, 19], [18, 20]],
    "small": [[40, 40], [43, 40], [41.5, 42], [40.3, 44], [42.7, 44]],
    "as large as the picture": [[20, 20], [70, 22], [45, 45], [25, 70], [65, 72]],
}


@pytest.mark.skipif(NODE is None, reason="node is not installed")
@pytest.mark.parametrize("case", POINTS)
@pytest.mark.parametrize("size", [8, 64])
def test_the_page_cuts_a_face_out_as_pillow_does(tmp_path, case, size):
    picture = photo(3, 90, 80)
    module = tmp_path / "geometry.mjs"
    shutil.copy(web.PAGE / "geometry.js", module)
    script = tmp_path / "warp.mjs"
    script.write_text(WARP.replace("GEOMETRY", module.as_uri()))
    data = np.asarray(picture.convert("RGBA")).ravel().tolist()
    given = {"width": 90, "height": 80, "data": data, "points": POINTS[case], "size": size}
    call = [str(NODE), str(script)]
    done = subprocess.run(call, input=json.dumps(given), capture_output=True, text=True, check=True)
    got = np.array(json.loads(done.stdout)).reshape(size, size, 4)[..., :3]
    wanted = np.asarray(warp(picture, square_matrix(ffhq_square(POINTS[case])), size)).astype(int)
    difference = np.abs(got - wanted)
    assert difference.mean() < 0.3 and difference.max() <= 4
