"""A w of its own for what an encoder puts into all layers: pictures stay, samples become photos'.

pytest tests/test_one_w.py
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pictures import photo

from encoder.joint import energy_distance
from encoder.model import Encoder, EncoderConfig
from encoder.one_w import OneWConfig, run
from generators import checkpoint
from generators.blocks import SwappedSynthesis
from generators.data import first_pictures, open_dataset
from generators.stylegan2 import Generator


@pytest.fixture(params=[0, 4], ids=["attention", "dense"])
def pair(tmp_path: Path, face: Generator, anime: Generator, request: pytest.FixtureRequest) -> Path:
    """A folder with three photos, whose w+ and mirrored ones do not fill a w of 8 dimensions."""
    for i in range(3):
        photo(i).save(tmp_path / f"{i}.png")
    torch.manual_seed(5)
    sizes = {"resolution": 16, "num_ws": face.num_ws, "w_dim": face.w_dim, "width": 16, "heads": 2,
             "dense": request.param}  # fmt: skip
    encoder = Encoder(EncoderConfig("mobilenetv3_small_050", depth=1, **sizes)).eval()
    with torch.no_grad():
        encoder.to_offsets.mul_(20)
        if request.param:
            encoder.dense.pixels.weight.normal_()
            encoder.dense.pixels.bias.normal_()
            encoder.dense.places.weight.normal_()
        encoder.w_avg.copy_(face.w_avg)
    for name, network in (("e", encoder), ("face", face), ("anime", anime)):
        checkpoint.save(tmp_path / f"{name}.safetensors", network)
    return tmp_path


def moved(pair: Path, **changes) -> OneWConfig:
    files = (str(pair / "e.safetensors"), str(pair / "face.safetensors"))
    given = {"data": str(pair), "also": (str(pair / "anime.safetensors"),), "fit_steps": 60,
             "style_limit": None}  # fmt: skip
    return OneWConfig(*files, pair / "out", **(given | changes))


def test_pictures_stay_and_all_layers_have_one_w(pair: Path) -> None:
    run(moved(pair))
    photos = first_pictures(open_dataset(pair, 16), 3)
    old, new = (checkpoint.load(pair / name, Encoder)
                for name in ("e.safetensors", "out/encoder.safetensors"))  # fmt: skip
    with torch.no_grad():
        before, after = old(photos), new(photos)
        torch.testing.assert_close(after, after[:, :1].expand_as(after))
        assert (before[:, 1:] - before[:, :1]).abs().max() > 0.1
        for name in ("face", "anime"):
            a = checkpoint.load(pair / f"{name}.safetensors", Generator)
            target = "generator" if name == "face" else name
            b = checkpoint.load(pair / "out" / f"{target}.safetensors", Generator)
            torch.testing.assert_close(
                b.synthesis(after), a.synthesis(before), atol=2e-3, rtol=1e-3
            )


def test_late_blocks_of_a_fine_tune_get_limited_codes(pair: Path) -> None:
    run(moved(pair, style_limit=0.5, swap_resolution=8))
    photos = first_pictures(open_dataset(pair, 16), 3)
    face, anime = (checkpoint.load(pair / f"{x}.safetensors", Generator) for x in ("face", "anime"))
    moved_face, moved_anime = (
        checkpoint.load(pair / f"out/{x}.safetensors", Generator) for x in ("generator", "anime")
    )
    with torch.no_grad():
        before = checkpoint.load(pair / "e.safetensors", Encoder)(photos)
        after = checkpoint.load(pair / "out/encoder.safetensors", Encoder)(photos)
        wanted = SwappedSynthesis(face, anime, 8, 0.5)(before)
        unlimited = SwappedSynthesis(face, anime, 8)(before)
        made = SwappedSynthesis(moved_face, moved_anime, 8)(after)
    assert (made - wanted).abs().mean() < 0.5 * (unlimited - wanted).abs().mean()


def test_w_of_random_z_is_spread_like_that_of_photos(pair: Path) -> None:
    run(moved(pair, also=(), fit_steps=1500))
    photos = first_pictures(open_dataset(pair, 16), 3)
    face = checkpoint.load(pair / "out" / "generator.safetensors", Generator)
    with torch.no_grad():
        new = checkpoint.load(pair / "out" / "encoder.safetensors", Encoder)
        codes = torch.cat([new(photos), new(photos.flip(-1))])[:, 0]
        w = face.mapping(torch.randn(2000, face.z_dim))
    assert (w.mean(0) - codes.mean(0)).norm() < 0.3 * codes.var(0).sum().sqrt()
    assert w.var(0).sum() == pytest.approx(codes.var(0).sum().item(), rel=0.5)


def test_twice_is_as_good_as_once(pair: Path) -> None:
    run(moved(pair, also=()))
    files = tuple(str(pair / "out" / f"{name}.safetensors") for name in ("encoder", "generator"))
    run(OneWConfig(*files, pair / "again", data=str(pair), fit_steps=20))
    photos = first_pictures(open_dataset(pair, 16), 3)
    pictures = []
    for folder in ("out", "again"):
        encoder = checkpoint.load(pair / folder / "encoder.safetensors", Encoder)
        generator = checkpoint.load(pair / folder / "generator.safetensors", Generator)
        with torch.no_grad():
            pictures.append(generator.synthesis(encoder(photos)))
    torch.testing.assert_close(*pictures, atol=2e-3, rtol=1e-3)


def test_the_mapping_network_alone_can_be_fitted_anew(pair: Path) -> None:
    """Of a pair whose photos have moved away from its w."""
    with pytest.raises(ValueError, match="encoder of one w"):
        run(moved(pair, mapping_only=True))
    run(moved(pair, also=()))
    files = [pair / "out" / f"{name}.safetensors" for name in ("encoder", "generator")]
    photos = first_pictures(open_dataset(pair, 16), 3)
    encoder, face = (
        checkpoint.load(f, c) for f, c in zip(files, (Encoder, Generator), strict=True)
    )
    with torch.no_grad():
        encoder.to_shared.bias.add_(2)
        checkpoint.save(files[0], encoder)
        ws = encoder(photos)
    again = pair / "again"
    run(OneWConfig(*map(str, files), again, data=str(pair), fit_steps=300, mapping_only=True))
    after = checkpoint.load(again / "encoder.safetensors", Encoder)
    fitted = checkpoint.load(again / "generator.safetensors", Generator)
    with torch.no_grad():
        torch.testing.assert_close(after(photos), ws)
        torch.testing.assert_close(fitted.synthesis(ws), face.synthesis(ws))
    torch.testing.assert_close(after.w_avg, fitted.w_avg)
    z, w = torch.randn(500, face.z_dim), ws.mean(dim=1)
    with torch.no_grad():
        distances = [energy_distance(g.mapping(z), w) for g in (face, fitted)]
    assert distances[1] < 0.7 * distances[0]


def test_files_that_exist_are_not_replaced_unasked(
    pair: Path, generator_from_seed: Callable[..., Generator]
) -> None:
    (pair / "out").mkdir()
    (pair / "out" / "generator.safetensors").write_text("mine")
    with pytest.raises(ValueError, match="generator"):
        run(moved(pair))
    assert (pair / "out" / "generator.safetensors").read_text() == "mine"
    assert not (pair / "out" / "encoder.safetensors").exists()


def test_two_files_of_one_name_are_refused(pair: Path) -> None:
    (pair / "sub").mkdir()
    other = pair / "sub" / "generator.safetensors"
    other.write_bytes((pair / "anime.safetensors").read_bytes())
    with pytest.raises(ValueError, match="a name of its own"):
        run(moved(pair, also=(str(other),)))
