"""The spatial code: rows of w+ that are a map of 8 x 8, in every place that handles w+.

pytest tests/test_spatial.py
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_generator
from pictures import photo
from torch import Tensor

from encoder.directions import Directions, principal_axes_of
from encoder.edit import crossed
from encoder.joint import JointOptions
from encoder.losses import LossSet
from encoder.model import Encoder, EncoderConfig
from encoder.one_w import OneWConfig, run
from encoder.options import Edit
from encoder.recipes import concatenate
from encoder.search import Search, optimise_latent
from encoder.train import EncoderTrainConfig, build_encoder
from generators import checkpoint
from generators.blocks import SwappedSynthesis, check_pair, swap, with_spatial
from generators.curvature import measure
from generators.latents import StyleLimit, mix, truncate
from generators.stylegan2 import Generator
from generators.tails import load_style, moved, tail_of

CONFIG = replace(TINY, spatial=1)  # 6 layers, then 8 rows of 8 numbers
LAYERS, ROWS = 6, 14


@pytest.fixture
def face() -> Generator:
    return make_generator(1, CONFIG)


@pytest.fixture
def anime() -> Generator:
    return make_generator(2, CONFIG)


@pytest.fixture
def ws() -> Tensor:
    return torch.randn(3, ROWS, 8, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def encoder(face: Generator) -> Encoder:
    torch.manual_seed(5)
    config = EncoderConfig(
        "test_efficientnet", 16, ROWS, 8, width=16, heads=2, depth=1, most_tokens=2, shared=True,
        spatial=1,
    )  # fmt: skip
    encoder = Encoder(config).eval().requires_grad_(False)
    encoder.spatial.last.weight.normal_()
    encoder.w_avg.copy_(face.w_avg)
    return encoder


def code(ws: Tensor) -> Tensor:
    return ws[:, LAYERS:]


# ------------------------------------------------------------------------- the generator


def test_rows_follow_the_layers_and_what_does_not_fill_them_is_refused() -> None:
    assert (CONFIG.layers, CONFIG.num_ws) == (LAYERS, ROWS)
    with pytest.raises(ValueError, match="must fill rows of w_dim = 48"):
        replace(CONFIG, w_dim=48)
    with pytest.raises(ValueError, match="resolution of 8 or more"):
        replace(CONFIG, resolution=4, widths=(8,))
    with pytest.raises(ValueError, match="whole number from 0 up, not -1"):
        replace(CONFIG, spatial=-1)


def test_without_a_code_the_picture_is_that_of_the_generator_without_the_rows(face: Generator):
    plain = Generator(TINY).eval()
    plain.load_state_dict({k: v for k, v in face.state_dict().items() if "spatial" not in k})
    z = torch.randn(3, 8)
    for psi in (1.0, 0.5):
        ws = face.map(z, psi)
        assert ws.shape == (3, ROWS, 8) and not code(ws).any()
        torch.testing.assert_close(face.synthesis(ws), plain(z, psi))


def test_a_place_of_the_code_changes_the_picture_there(face: Generator) -> None:
    ws = face.map(torch.randn(1, 8))
    changed = ws.clone()
    changed[:, LAYERS].view(-1)[0] = 3  # the upper left of 8 x 8
    moved = (face.synthesis(changed) - face.synthesis(ws)).abs().amax(dim=(0, 1))  # (16, 16)
    assert moved[:2, :2].max() > 0.01
    assert not moved[12:, 12:].any()


def test_truncation_shortens_the_code(face: Generator, ws: Tensor) -> None:
    assert not code(truncate(ws, face.ws_avg, 0.0)).any()
    torch.testing.assert_close(code(truncate(ws, face.ws_avg, 0.5)), code(ws) / 2)


def test_mixing_takes_the_code_of_whose_layer_it_changes(ws: Tensor) -> None:
    a, b = ws[:1], ws[1:2]
    for split in range(LAYERS + 1):
        mixed = mix(a, b, split, LAYERS)
        torch.testing.assert_close(mixed[:, :split], a[:, :split])
        torch.testing.assert_close(mixed[:, split:LAYERS], b[:, split:LAYERS])
        torch.testing.assert_close(code(mixed), code(a if split > 2 else b))
    torch.testing.assert_close(crossed(ws, 4, LAYERS)[0, 1, LAYERS:], ws[0, LAYERS:])


def test_a_style_limit_leaves_the_code(face: Generator, ws: Tensor) -> None:
    limited = StyleLimit(face, 8, 0.5)(ws)
    torch.testing.assert_close(code(limited), code(ws))
    other = torch.cat([ws[:, :LAYERS], 9 + code(ws)], dim=1)
    torch.testing.assert_close(StyleLimit(face, 8, 0.5)(other)[:, :LAYERS], limited[:, :LAYERS])


@pytest.mark.parametrize("swap_resolution", [4, 8, 16])
def test_a_swapped_synthesis_is_that_of_the_swapped_generator(face, anime, ws, swap_resolution):
    drawn = SwappedSynthesis(face, anime, swap_resolution)(ws)
    torch.testing.assert_close(drawn, swap(face, anime, swap_resolution).synthesis(ws))


@pytest.mark.parametrize("swap_resolution", [8, 16])
def test_codes_of_a_drawing_leave_the_photos_code(face, anime, ws, swap_resolution) -> None:
    network, others = SwappedSynthesis(face, anime, swap_resolution), ws.roll(1, 0)
    drawn = network(ws, drawing_ws=others)
    same = torch.cat([others[:, :LAYERS], code(ws)], dim=1)
    torch.testing.assert_close(drawn, network(ws, drawing_ws=same))


def test_a_tail_goes_on_a_trunk_with_a_code(face: Generator, ws: Tensor, tmp_path: Path) -> None:
    tail = tail_of(face, 16)
    assert not any("spatial" in name for name in tail.state_dict())
    torch.testing.assert_close(tail.on(face).synthesis(ws), face.synthesis(ws))
    older = make_generator(3)  # a fine-tune from before the code
    on_face = tail_of(older, 16, face).on(face)
    torch.testing.assert_close(on_face.synthesis.b16.conv0.weight, older.synthesis.b16.conv0.weight)
    torch.testing.assert_close(
        on_face.synthesis.b8.spatial.weight, face.synthesis.b8.spatial.weight
    )
    checkpoint.save(tmp_path / "older.safetensors", older)
    drawn = SwappedSynthesis(face, load_style(tmp_path / "older.safetensors", face), 16)(ws)
    torch.testing.assert_close(drawn, SwappedSynthesis(face, on_face, 16)(ws))
    tail = moved(tail_of(older, 16), face)  # without its own early blocks
    torch.testing.assert_close(SwappedSynthesis(face, tail.on(face), 16)(ws), drawn)
    with pytest.raises(ValueError, match="spatial 1 and 0"):
        check_pair(face, older, 8)


# ------------------------------------------------------------------- encoder and search


def test_an_encoder_finds_a_code_by_place(encoder: Encoder) -> None:
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    ws = encoder(images)
    assert ws.shape == (2, ROWS, 8) and code(ws).std() > 0.01
    torch.testing.assert_close(encoder(images[:1]), ws[:1])
    with pytest.raises(ValueError, match="does not fill"):
        replace(encoder.config, num_ws=8)


def test_an_encoder_without_a_code_goes_on_with_none(face: Generator, tmp_path: Path) -> None:
    torch.manual_seed(6)
    plain = Encoder(EncoderConfig("test_efficientnet", 16, LAYERS, 8, width=16, depth=1)).eval()
    plain.w_avg.copy_(face.w_avg)
    checkpoint.save(tmp_path / "plain.safetensors", plain)
    config = EncoderTrainConfig(
        data="faces/",
        output=tmp_path / "run",
        init=str(tmp_path / "plain.safetensors"),
        backbone="test_efficientnet",
        width=16,
        depth=1,
    )
    encoder, images = build_encoder(config, face).eval(), torch.rand(2, 3, 16, 16) * 2 - 1
    ws = encoder(images)
    torch.testing.assert_close(ws[:, :LAYERS], plain(images))
    assert not code(ws).any()
    code(ws).sum().backward()
    assert encoder.spatial.last.weight.grad.any()


def test_a_generator_gets_a_code_once() -> None:
    plain = make_generator(7)
    made = with_spatial(plain, 1)
    z = torch.randn(2, 8)
    torch.testing.assert_close(made(z), plain(z))
    assert with_spatial(made, 1) is made
    with pytest.raises(ValueError, match="has a spatial code of 1 channels, not 2"):
        with_spatial(made, 2)
    with pytest.raises(ValueError, match="--spatial is for a generator that learns"):
        JointOptions(spatial=1)


@pytest.mark.parametrize("space", ["z", "w", "w+"])
def test_a_search_uses_the_code_in_w_plus_alone(face: Generator, space) -> None:
    target = face.synthesis(face.map(torch.randn(1, 8))).clamp(-1, 1).flip(-1)
    found = optimise_latent(
        face,
        target,
        losses=LossSet({"mse": 1}),
        search=Search(space=space, steps=12),
        start="random" if space == "z" else "mean",
        curvature=measure(face, 40, 20),
    )
    assert found.ws is not None and found.ws.shape == (1, ROWS, 8)
    assert bool(code(found.ws).any()) == (space == "w+")
    torch.testing.assert_close(face.synthesis(found.ws), found.image)


def test_a_curvature_of_w_leaves_the_code_out(face: Generator) -> None:
    curvature = measure(face, 60, 60)
    rows = curvature.basis.view(-1, ROWS, 8)
    assert code(rows).any()
    ours = curvature.of_one_w(LAYERS)
    whole = curvature.of_one_w()
    assert ours.basis.shape == (8, 8) and not torch.allclose(ours.values, whole.values)


def test_principal_axes_are_of_layers_alone(face: Generator) -> None:
    samples = face.map(torch.randn(60, 8))
    samples[:, LAYERS:] = torch.randn(60, 8, 8) * 100
    axes = principal_axes_of(samples, 3, LAYERS)
    assert axes.shape == (3, ROWS, 8) and not code(axes).any()
    torch.testing.assert_close(axes[:, 0], axes[:, LAYERS - 1])


def test_an_edit_of_some_layers_moves_the_code_with_layer_2(face: Generator) -> None:
    directions = Directions.of(face, {"x": torch.ones(ROWS, 8)})
    for first, last, moves in ((0, None, True), (0, 3, True), (3, None, False), (0, 1, False)):
        offset = directions.offset([Edit("x", 2.0, first, last)])
        end = LAYERS if last is None else last + 1
        assert (offset[first:end] == 2).all() and offset[:LAYERS].sum() == 2 * 8 * (end - first)
        assert (offset[LAYERS:] == 2 * moves).all()
    with pytest.raises(ValueError, match="layers of w\\+ are 0 to 5"):
        directions.offset([Edit("x", 2.0, 0, 6)])


def test_concatenated_layers_keep_the_code(face: Generator, anime: Generator, ws: Tensor) -> None:
    ends = concatenate(face, anime, ws, ws.roll(1, 0), (LAYERS, 0))
    torch.testing.assert_close(ends[0], face.synthesis(ws).clamp(-1, 1))
    torch.testing.assert_close(ends[1], anime.synthesis(ws.roll(1, 0)).clamp(-1, 1))


def test_one_w_leaves_the_code(encoder: Encoder, face: Generator, tmp_path: Path) -> None:
    for i in range(3):
        photo(i).save(tmp_path / f"{i}.png")
    for name, network in (("e", encoder), ("face", face)):
        checkpoint.save(tmp_path / f"{name}.safetensors", network)
    files = (str(tmp_path / "e.safetensors"), str(tmp_path / "face.safetensors"))
    run(OneWConfig(*files, tmp_path / "out", data=str(tmp_path), fit_steps=20, style_limit=None))
    new = checkpoint.load(tmp_path / "out" / "encoder.safetensors", Encoder)
    moved = checkpoint.load(tmp_path / "out" / "generator.safetensors", Generator)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(code(new(images)), code(encoder(images)))
        assert moved.synthesis(new(images)).isfinite().all()


# ------------------------------------------------------------------------ exported graphs


@pytest.mark.parametrize("limit", [1.5, float("inf")])
@pytest.mark.parametrize("swap_resolution", [4, 8, 16])
def test_exported_graphs_are_torchs(face, anime, encoder, ws, swap_resolution, limit) -> None:
    pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
    ort = pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    from encoder.graphs import encoder_model, synthesis_model

    def results(model, **inputs: Tensor) -> list[Tensor]:
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        made = session.run(None, {name: x.numpy() for name, x in inputs.items()})
        return [torch.from_numpy(x) for x in made]

    network, others = SwappedSynthesis(face, anime, swap_resolution, limit), ws.roll(1, 0)
    model = synthesis_model(network, drawing_ws=True)
    for batch in (slice(0, 1), slice(0, 3)):
        made = results(model, ws=ws[batch], drawing_ws=others[batch])
        reconstruction, anime_ = network(ws[batch], both=True, drawing_ws=others[batch])
        torch.testing.assert_close(made[0], anime_.clamp(-1, 1), atol=1e-5, rtol=0)
        torch.testing.assert_close(made[1], reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)
    if swap_resolution == 8:
        images = torch.rand(3, 3, 16, 16) * 2 - 1
        (made_ws,) = results(encoder_model(encoder), images=images)
        torch.testing.assert_close(made_ws, encoder(images), atol=1e-4, rtol=1e-4)


def test_a_page_draws_with_the_code(face, anime, encoder, tmp_path: Path) -> None:
    """`write_networks` compares what the files draw with torch."""
    pytest.importorskip("onnx", reason="the extra [onnx] is not installed")
    pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    from encoder.browser import write_networks

    about = write_networks(tmp_path, face, {"anime": anime}, encoder, 16)
    assert about["layers"] == ROWS
