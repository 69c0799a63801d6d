"""Twice the resolution: whatever grew draws and finds what it did, until the new block is trained.

pytest tests/test_grow.py
"""
# ruff: noqa: F811  (fixtures of another file)

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_generator
from test_spatial import CONFIG, LAYERS, ROWS, encoder, face, ws  # noqa: F401
from torch import Tensor

from encoder.directions import Directions
from encoder.grow import (
    grown_curvature,
    grown_directions,
    grown_encoder,
    grown_tail,
    main,
)
from encoder.model import Encoder
from encoder.options import Edit
from encoder.pipeline import Translator
from encoder.train import EncoderTrainConfig, build_encoder
from generators import checkpoint
from generators.blocks import with_resolution
from generators.curvature import measure
from generators.images import resize
from generators.latents import read_ws, write_latents
from generators.networks import build
from generators.ops import upsample2x
from generators.options import StyleGan2Options
from generators.stylegan2 import Generator
from generators.tails import tail_of


@pytest.fixture
def large(face: Generator) -> Generator:
    return with_resolution(face, 32)


def longer(ws: Tensor) -> Tensor:
    """(B, 14, 8) -> (B, 16, 8): two layers more, with other w."""
    return torch.cat([ws[:, :LAYERS], torch.randn(len(ws), 2, 8), ws[:, LAYERS:]], dim=1)


def test_a_grown_generator_enlarges_its_picture(face, large, ws):
    assert (large.resolution, large.layers, large.num_ws) == (32, 8, 16)
    assert large.config.widths == (8, 6, 4, 2) and not large.training
    small, drawn = face.synthesis(ws), large.synthesis(longer(ws))
    torch.testing.assert_close(drawn, upsample2x(small))
    z = torch.randn(2, 8)
    torch.testing.assert_close(large.mapping(z), face.mapping(z), rtol=0, atol=0)


def test_its_new_block_learns_and_is_always_the_same(face, large):
    again = with_resolution(face, 32).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in large.state_dict().items())
    block = large.synthesis.b32.requires_grad_(True)
    large.synthesis(torch.randn(1, 16, 8)).square().sum().backward()
    assert block.torgb.weight.grad.abs().max() > 0


def test_widths_by_rule_go_on_by_rule_and_by_steps(face):
    config = replace(TINY, widths=(), channel_base=64, channel_max=8)
    grown = with_resolution(make_generator(0, config), 64)
    assert grown.config.channels == {4: 8, 8: 8, 16: 4, 32: 2, 64: 1}
    with pytest.raises(ValueError, match="draws 16x16; it can grow, not shrink to 8"):
        with_resolution(face, 8)
    assert with_resolution(face, 16) is face


def test_training_grows_what_it_begins_with(face, tmp_path):
    checkpoint.save(tmp_path / "face.safetensors", face)
    options = StyleGan2Options(
        data="x", output=tmp_path / "run", init=str(tmp_path / "face.safetensors"), resolution=32,
        freeze_generator_below=32, feature_weights="random",
    )  # fmt: skip
    networks = build(options)
    learning = {n for n, p in networks["generator"].named_parameters() if p.requires_grad}
    assert learning and all(name.startswith("synthesis.b32.") for name in learning)
    assert networks["discriminator"].config.input_size == 96  # pictures of 32 are enlarged
    smaller = replace(options, resolution=8, freeze_generator_below=16)
    assert build(smaller)["generator"].resolution == 16  # as it is
    assert build(replace(smaller, resolution=None))["generator"].resolution == 16
    assert StyleGan2Options(data="x", output=tmp_path).shape.resolution == 64


def test_a_large_generator_is_looked_at_as_large_as_it_draws(face, tmp_path):
    checkpoint.save(tmp_path / "face.safetensors", face)
    options = StyleGan2Options(
        data="x", output=tmp_path / "run", init=str(tmp_path / "face.safetensors"), resolution=128,
        feature_weights="random",
    )  # fmt: skip
    assert build(options)["discriminator"].config.input_size == 128


def test_a_grown_encoder_finds_the_same_and_repeats_the_last_layer(encoder, large):
    grown = grown_encoder(encoder, large)
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    before, after = encoder(images), grown(images)
    assert after.shape == (2, 16, 8)
    assert torch.equal(after[:, :LAYERS], before[:, :LAYERS])
    assert torch.equal(after[:, LAYERS], before[:, LAYERS - 1])
    assert torch.equal(after[:, LAYERS + 1], before[:, LAYERS - 1])
    assert torch.equal(after[:, 8:], before[:, LAYERS:])
    with pytest.raises(ValueError, match="of 8 layers 8 cannot repeat another"):
        replace(grown.config, repeated=8)


def test_an_encoder_takes_pictures_of_any_side(encoder):
    large = torch.rand(2, 3, 40, 40) * 2 - 1
    assert torch.equal(encoder(large), encoder(resize(large, 16)))
    assert not torch.equal(encoder(large[:1]), encoder(large[1:]))


def test_a_grown_pair_translates(face, encoder, large):
    translator = Translator(large, large, grown_encoder(encoder, large), swap_resolution=16)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    ws = translator.encode(images, refine_steps=2)
    drawn, seen = translator.synthesise(ws, reconstruction=True)
    assert drawn.shape == (1, 3, 32, 32) and translator.crop_size == 32
    torch.testing.assert_close(drawn, seen)  # of a style that is the face generator itself


def test_an_encoder_is_trained_on_from_one_that_grew(encoder, face, large, tmp_path):
    checkpoint.save(tmp_path / "e.safetensors", grown_encoder(encoder, large))
    config = EncoderTrainConfig(
        data="x", output=tmp_path, init=str(tmp_path / "e.safetensors"), width=16, depth=1,
        backbone="test_efficientnet",
    )  # fmt: skip
    with pytest.raises(ValueError, match="--backbone, --width or --depth"):
        build_encoder(replace(config, depth=2), large)
    begun = build_encoder(config, large)
    assert begun.config.repeated == 2 and begun.config.resolution == 16
    assert torch.equal(begun.to_offsets, encoder.to_offsets)
    sharper = build_encoder(replace(config, detail=16), large).eval()  # it looks at all 32 pixels
    assert (sharper.config.resolution, sharper.config.side) == (32, 16)
    small = torch.rand(2, 3, 16, 16) * 2 - 1
    images = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(sharper(images), begun.eval()(small), atol=1e-5, rtol=1e-4)
    translator = Translator(large, large, sharper, swap_resolution=16)
    torch.testing.assert_close(translator.encode(images), sharper(images))


def test_a_grown_curvature_leaves_new_layers_still(face, large):
    curvature = measure(face, probes=20, rank=5)
    grown = grown_curvature(curvature, large)
    u = torch.randn(2, grown.size)
    before, after = curvature.offsets(u), grown.offsets(u)
    assert torch.equal(after[:, :LAYERS], before[:, :LAYERS])
    assert torch.equal(after[:, LAYERS:8], torch.zeros(2, 2, 8))
    assert torch.equal(after[:, 8:], before[:, LAYERS:])
    one, same = curvature.of_one_w(LAYERS), grown.of_one_w(8)
    torch.testing.assert_close(one.values, same.values)
    with pytest.raises(ValueError, match="measure it anew"):
        grown_curvature(grown, with_resolution(large, 64))


def test_grown_directions_move_new_layers_with_the_last(face, large):
    steps = {"all": torch.randn(ROWS, 8), "coarse": torch.zeros(ROWS, 8)}
    steps["coarse"][:2] = 1
    directions = Directions.of(face, steps)
    grown = grown_directions(directions, large)
    grown.check(large)
    assert grown.config.last == (7, 1) and grown.config.layers == 8
    moved = grown.offset([Edit("all", 2.0)])
    assert torch.equal(moved[[6, 7]], 2 * steps["all"][[5, 5]])
    assert torch.equal(moved[8:], 2 * steps["all"][LAYERS:])
    assert torch.equal(grown.offset([Edit("coarse", 1.0)])[2:], torch.zeros(14, 8))
    with pytest.raises(ValueError, match="another face generator"):
        grown.check(face)


def test_a_grown_style_draws_the_same(face, large, ws):
    tune = make_generator(2, CONFIG)
    tail = tail_of(tune, 16, face)
    drawn = grown_tail(tail, large).on(large).synthesis(longer(ws))
    torch.testing.assert_close(drawn, upsample2x(tail.on(face).synthesis(ws)))


def test_the_command_grows_a_family(face, encoder, tmp_path: Path, capsys):
    checkpoint.save(tmp_path / "face.safetensors", face, provenance={"licence": "mine"})
    checkpoint.save(tmp_path / "encoder.safetensors", encoder)
    big, family = tmp_path / "big.safetensors", tmp_path / "big_encoder.safetensors"
    assert main([str(tmp_path / "face.safetensors"), str(big)]) == 0
    assert checkpoint.read_metadata(big)["provenance"]["licence"] == "mine"
    given = [str(tmp_path / "encoder.safetensors"), str(family)]
    assert main(given) == 2 and "give it as --face-generator" in capsys.readouterr().err
    assert main([*given, "--face-generator", str(tmp_path / "face.safetensors")]) == 2
    assert "has 14 rows of 8 numbers, the face generator 14 of 8" in capsys.readouterr().err
    assert main([*given, "--face-generator", str(big)]) == 0
    loaded = checkpoint.load(family, Encoder)
    assert loaded.config.repeated == 2 and checkpoint.load(big, Generator).resolution == 32
    assert main([*given, "--face-generator", str(big)]) == 2  # nothing is replaced unasked


def test_the_command_grows_latents(face, large, ws, tmp_path: Path, capsys):
    checkpoint.save(tmp_path / "big.safetensors", large)
    write_latents(tmp_path / "ws.safetensors", {"ws": ws})
    given = [str(tmp_path / "ws.safetensors"), str(tmp_path / "big_ws.safetensors")]
    assert main([*given, "--face-generator", str(tmp_path / "big.safetensors")]) == 0
    grown = read_ws(tmp_path / "big_ws.safetensors", large)
    assert torch.equal(grown[:, [6, 7]], ws[:, [5, 5]]) and torch.equal(grown[:, 8:], ws[:, 6:])
    torch.testing.assert_close(large.synthesis(grown), upsample2x(face.synthesis(ws)))
    write_latents(tmp_path / "z.safetensors", {"z": torch.zeros(2, 8)})
    wrong = [str(tmp_path / "z.safetensors"), str(tmp_path / "no.safetensors")]
    assert main([*wrong, "--face-generator", str(tmp_path / "big.safetensors")]) == 2
    assert "neither a network of this project nor latents" in capsys.readouterr().err
