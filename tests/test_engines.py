"""Backends give torch's results within 1e-4 of their range, and are built once.

pytest tests/test_engines.py
"""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import photo

from encoder import engines
from encoder.engines import (
    Synthesis,
    choose,
    encoder_of,
    engine_of,
    graph_of,
    key_of,
    synthesis_of,
    use_in,
)
from encoder.model import Encoder, EncoderConfig
from encoder.options import Drawing
from encoder.pipeline import Translator
from generators.blocks import SwappedSynthesis
from generators.checkpoint import save

EXAMPLES = Path(__file__).parents[1] / "examples"
OTHERS = [name for name in ("onnxruntime", "openvino") if engines.installed(name)]
CPU = torch.device("cpu")
need_one = pytest.mark.skipif(not OTHERS, reason="neither [onnx] nor [openvino] is installed")


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(5)
    config = EncoderConfig("test_efficientnet", 16, 6, 8, width=16, heads=2, depth=1, most_tokens=2)
    return Encoder(config).eval().requires_grad_(False)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-4 * float(b.max() - b.min())


@pytest.mark.parametrize("backend", OTHERS)
def test_a_translator_draws_the_same_with_each_backend(backend, face, anime, encoder) -> None:
    torchs, other = (
        Translator(face, anime, encoder, swap_resolution=8, backend=b) for b in ("torch", backend)
    )
    assert other.backend == backend and torchs.backend == "torch"
    for count in (1, 3):
        crops = [photo(seed).resize((40, 40)) for seed in range(count)]
        wanted, got = torchs(crops, reconstruction=True), other(crops, reconstruction=True)
        for name in ("ws", "anime", "reconstruction"):
            close(getattr(got, name), getattr(wanted, name))
        close(other(crops).anime, wanted.anime)
    how = {"swap_resolution": 16, "colours": 0.5}
    wanted_anime, _ = torchs.synthesise(wanted.ws, **how)
    close(other.synthesise(wanted.ws, **how)[0], wanted_anime)
    assert float((wanted_anime - wanted.anime).abs().max()) > 1e-3


@pytest.mark.parametrize("backend", OTHERS)
def test_each_backend_finds_the_same_faces(backend) -> None:
    facenet = pytest.importorskip("facenet_pytorch")
    from generators.images import open_image

    mtcnns = [facenet.MTCNN().eval() for _ in range(2)]
    use_in(mtcnns[1], backend, 1)
    assert type(mtcnns[1].onet) is engines.Detector
    picture = open_image(EXAMPLES / "two_faces.jpg")
    (boxes, scores, points), (boxes2, scores2, points2) = (
        mtcnn.detect(picture, landmarks=True) for mtcnn in mtcnns
    )
    assert len(boxes) == len(boxes2) >= 2
    for a, b, most in ((boxes, boxes2, 0.1), (points, points2, 0.1), (scores, scores2, 1e-3)):
        np.testing.assert_allclose(np.float64(a), np.float64(b), atol=most)


# ------------------------------------------------------------------------------ choosing


def test_auto_is_the_fastest_that_is_there(monkeypatch, capsys) -> None:
    monkeypatch.setattr(engines, "installed", lambda name: True)
    assert choose("auto", CPU) == engines.FASTEST
    assert choose("auto", CPU, torch.bfloat16) == "torch"
    assert choose("auto", torch.device("cuda")) == "torch"
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(engines, "installed", lambda name: name == "torch")
    assert choose("auto", CPU) == "torch"
    assert "pip install 'amortized-gan-inversion[onnx]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, device, dtype, sentence",
    [
        ("tensorrt", "cpu", torch.float32, "no backend tensorrt"),
        ("onnxruntime", "cuda", torch.float32, "for fp32 on a CPU"),
        ("onnxruntime", "cpu", torch.float16, "for fp32 on a CPU"),
        ("openvino", "cpu", torch.float32, "not installed"),
    ],
)
def test_what_cannot_be_is_a_sentence(asked, device, dtype, sentence, monkeypatch) -> None:
    monkeypatch.setattr(engines, "installed", lambda name: name != "openvino")
    with pytest.raises(ValueError, match=sentence):
        choose(asked, torch.device(device), dtype)


# ------------------------------------------------------------------------------- the cache


class Model:
    """As an onnx.ModelProto, as far as the cache asks."""

    def SerializeToString(self) -> bytes:
        return b"a graph"


def test_a_graph_is_built_once(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GAN_INVERT_CACHE", str(tmp_path / "new"))
    calls: list[int] = []
    for _ in range(2):
        assert graph_of("net", "k1", lambda: calls.append(1) or Model()) == b"a graph"
    assert len(calls) == 1
    graph_of("net", "k2", lambda: calls.append(1) or Model())
    assert len(calls) == 2
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["net-k1.onnx", "net-k2.onnx"]


def test_what_was_not_used_for_long_goes(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GAN_INVERT_CACHE", str(tmp_path))
    long_ago = time.time() - (engines.KEPT + 1) * 86400
    for name in ("used", "unused"):
        graph_of(name, "k", Model)
        os.utime(tmp_path / f"{name}-k.onnx", (long_ago, long_ago))
    graph_of("used", "k", Model)
    graph_of("new", "k", Model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new-k.onnx", "used-k.onnx"]


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GAN_INVERT_CACHE", str(tmp_path / "file" / "below"))
    assert graph_of("net", "k", Model) == b"a graph"


def test_other_weights_are_another_key(generator_from_seed) -> None:
    first, second = generator_from_seed(1), generator_from_seed(1)
    assert key_of(first) == key_of(second)
    assert key_of(first, 16) != key_of(first, 8)
    second.mapping.w_avg[0] += 1e-3
    assert key_of(first) != key_of(second)


@need_one
def test_few_pictures_leave_the_encoder_to_torch(encoder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("GAN_INVERT_CACHE", str(tmp_path))
    assert encoder_of(encoder, OTHERS[0], 1, export=False) is encoder
    assert "runs in torch this time" in capsys.readouterr().err
    assert encoder_of(encoder, "torch", 1) is encoder
    assert list(tmp_path.iterdir()) == []


@need_one
def test_a_damaged_graph_is_written_anew(face, anime, ws, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GAN_INVERT_CACHE", str(tmp_path))
    network = SwappedSynthesis(face, anime, 8)
    wanted = Synthesis(network, OTHERS[0], 1).draw(ws)["anime"]
    [file] = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    assert torch.equal(synthesis_of(network, OTHERS[0], 1).draw(ws)["anime"], wanted)
    assert file.stat().st_size > 1000


# --------------------------------------------------------------------------- the commands


def test_commands_wait_for_an_export_only_where_it_pays(face, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "installed", lambda name: True)
    save(tmp_path / "face.safetensors", face)
    threads = torch.get_num_threads()
    options = {"face_generator": str(tmp_path / "face.safetensors")}
    auto, asked = Drawing(**options), Drawing(**options, backend="openvino", threads=2)
    assert engine_of(auto, CPU) == {"backend": engines.FASTEST, "threads": 1, "export": True}
    assert engine_of(auto, CPU, few=True)["export"] is False
    assert engine_of(auto, CPU, torch.bfloat16, few=True)["backend"] == "torch"
    assert engine_of(asked, CPU, few=True) == {"backend": "openvino", "threads": 2, "export": True}
    torch.set_num_threads(threads)
