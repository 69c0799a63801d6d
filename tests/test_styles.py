"""Several styles from one trunk: tails as files, one pass for all, and every way to ask for them.

pytest tests/test_styles.py
"""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from pictures import photo
from test_infer import files, make_encoder, models, out, pixels, run, superres  # noqa: F401

from encoder import engines
from encoder.options import InferConfig, endings_of, styles_of
from encoder.pipeline import Translator
from generators import tails
from generators.blocks import SwappedSynthesis, swap
from generators.bundled import companion
from generators.checkpoint import load, read_metadata, save
from generators.stylegan2 import Generator
from generators.tails import Tail, load_style, tail_of

BACKENDS = [name for name in engines.BACKENDS if engines.installed(name)]


@pytest.fixture
def styles(face, anime, generator_from_seed) -> dict[str, Generator]:
    return {"anime": swap(face, anime, 8), "ink": swap(face, generator_from_seed(3), 8)}


@pytest.fixture
def encoder():
    return make_encoder()


def test_all_styles_are_drawn_from_one_pass_of_the_early_blocks(face, styles, ws):
    network = SwappedSynthesis(face, styles, 8)
    calls: Counter[str] = Counter()
    for side, generator in {"face": face, **styles}.items():
        for name, block in generator.synthesis.named_children():
            block.register_forward_hook(lambda *_, key=f"{side}.{name}": calls.update([key]))
    made = network.draw(ws, None, True)
    late = {f"{side}.b{r}": 1 for side in ("face", "anime", "ink") for r in (8, 16)}
    assert calls == {"face.b4": 1} | late
    for name, generator in styles.items():
        assert torch.equal(made[name], generator.synthesis(ws))
        assert list(network.draw(ws, [name])) == [name]
    assert torch.equal(made["reconstruction"], face.synthesis(ws))
    assert torch.equal(network(ws), made["anime"]) and not torch.equal(made["ink"], made["anime"])
    with pytest.raises(ValueError, match="There is no style oil; choose from anime, ink"):
        network.draw(ws, ["oil"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_draw_the_styles_and_other_codes_as_torch_does(backend, face, styles, ws):
    network = SwappedSynthesis(face, styles, 8)
    graphs = engines.synthesis_of(network, backend, 1)
    for how in ({}, {"styles": ["ink"], "colours": 0.5, "swap_resolution": 16},
                {"reconstruction": True, "drawing_ws": ws.flip(0)}):  # fmt: skip
        wanted, got = network.draw(ws, **how), graphs.draw(ws, **how)
        assert list(got) == list(wanted)
        for name, picture in wanted.items():
            torch.testing.assert_close(got[name], picture.clamp(-1, 1) if backend != "torch"
                                       else picture, atol=1e-4, rtol=0)  # fmt: skip


# ------------------------------------------------------------------------------- tails


def test_a_tail_is_small_and_draws_on_its_own_trunk_only(face, anime, ws, tmp_path, capsys):
    tune = swap(face, anime, 8)
    save(tmp_path / "tune.safetensors", tune, provenance={"licence": "of the tune"})
    file = tmp_path / "ink.safetensors"
    assert tails.main([str(tmp_path / "tune.safetensors"), str(file), "--first", "8"]) == 0
    names = set(load(file, Tail).state_dict())
    assert names == {n for n in face.state_dict() if ".b8." in n or ".b16." in n}
    assert read_metadata(file)["provenance"]["licence"] == "of the tune"
    assert file.stat().st_size < (tmp_path / "tune.safetensors").stat().st_size / 2

    rounded = load_style(file, face)
    torch.testing.assert_close(rounded.synthesis(ws), tune.synthesis(ws), atol=0.02, rtol=0.02)
    assert torch.equal(rounded.mapping.fc0.weight, face.mapping.fc0.weight)
    later = swap(face, anime, 16)  # as a face generator whose late blocks were trained on
    assert torch.equal(load_style(file, later).synthesis(ws), rounded.synthesis(ws))
    shipped = {name: tensor.half().float() for name, tensor in face.state_dict().items()}
    again = Generator(face.config)
    again.load_state_dict(shipped)
    load_style(file, again)  # rounded for shipping, and still the same trunk
    assert torch.equal(load_style(tmp_path / "tune.safetensors", face).synthesis(ws),
                       tune.synthesis(ws))  # fmt: skip

    larger = Generator(replace(face.config, resolution=32, widths=(8, 6, 4, 4)))
    for other in (anime, larger):
        with pytest.raises(ValueError, match="tail of another face generator"):
            load_style(file, other)
    with pytest.raises(ValueError, match="choose one of 4, 8, 16"):
        tail_of(face, 64)


def test_a_tail_can_be_made_for_another_trunk(face, anime, ws, tmp_path):
    """As where the early blocks of both drifted apart and are swapped anyway."""
    file = tmp_path / "tail.safetensors"
    save(file, tail_of(anime, 8, face))
    wanted = SwappedSynthesis(face, anime, 8)(ws)
    assert torch.equal(SwappedSynthesis(face, load_style(file, face), 8)(ws), wanted)


def test_a_tail_goes_on_a_trunk_that_has_learnt_on(face, anime, ws, tmp_path, capsys):
    tail, trunk, moved = (tmp_path / f"{name}.safetensors" for name in ("tail", "trunk", "moved"))
    save(tail, tail_of(swap(face, anime, 8), 8))
    learnt = copy.deepcopy(face)
    learnt.synthesis.b4.const += 1
    save(trunk, learnt)
    with pytest.raises(ValueError, match="tail of another face generator"):
        load_style(tail, learnt)
    assert tails.main([str(tail), str(moved)]) == 2
    assert "a tail already; give --face-generator" in " ".join(capsys.readouterr().err.split())
    assert tails.main([str(tail), str(moved), "--face-generator", str(trunk)]) == 0
    drawn = SwappedSynthesis(learnt, load_style(moved, learnt), 8)(ws)
    wanted = SwappedSynthesis(learnt, anime, 8)(ws)
    torch.testing.assert_close(drawn, wanted, atol=0.02, rtol=0.02)


# ----------------------------------------------------------------------------- commands


def test_names_of_styles():
    assert styles_of("anime,sketch64, paint", "face64") == {
        "anime": "anime64", "sketch": "sketch64", "paint": "paint64"
    }  # fmt: skip
    assert styles_of("ink=a/b=c.safetensors,anime", anime_generator="own.safetensors") == {
        "ink": "a/b=c.safetensors", "anime": "own.safetensors"
    }  # fmt: skip
    assert styles_of("anime,paint") == {"anime": "anime128", "paint": "paint128"}
    assert styles_of("anime", "mine.safetensors") == styles_of("anime")  # which will not fit it
    assert endings_of({"anime": ".png", "grid": "_grid.png"}, ["anime", "ink"]) == {
        "anime": ".png", "ink": "_ink.png", "grid": "_grid.png"
    }  # fmt: skip


def test_a_family_goes_with_its_face_generator():
    small = InferConfig(input="a", output="b", face_generator="face64", styles="anime,sketch")
    assert (small.anime_generator, small.encoder) == ("anime64", "encoder64")
    assert small.styles_of(small.styles) == {"anime": "anime64", "sketch": "sketch64"}
    large = InferConfig(input="a", output="b", encoder="mine.safetensors")
    assert (large.anime_generator, large.encoder) == ("anime128", "mine.safetensors")
    assert companion("face64", "curvature") == "curvature64"
    assert companion("mine.safetensors", "encoder") is None and companion("face64", "pose") is None
    with pytest.raises(ValueError, match="detect-every"):  # its other options are checked, too
        InferConfig(input="a", output="b", detect_every=0)


def test_names_of_styles_that_are_wrong():
    for wrong, why in {
        "oil": "There is no style oil; choose from anime, sketch, paint, or give NAME=FILE",
        "": "no style without a name", "anime,": "no style without", "a/b=c": "letters and digits",
        "ink=": "letters and digits", "grid=a": "no name for a style", "anime,anime": "twice",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=why):
            styles_of(wrong)
    with pytest.raises(ValueError, match="no style oil"):
        InferConfig(input="a", output="b", styles="oil")


def test_infer_writes_a_picture_of_each_style(models, superres, out, tmp_path, face, anime, ws):  # noqa: F811
    photo(1, 24, 24).save(tmp_path / "me.png")
    tail = tmp_path / "ink.safetensors"
    save(tail, tail_of(swap(face, anime, 16), 16))
    assert run(tmp_path / "me.png", out, *models) == 0
    assert files(out) == {"me.png", "manifest.jsonl"}
    drawn = (out / "me.png").read_bytes()
    more = ["--styles", f"anime,ink={tail}", "--save", "anime,grid"]
    other = tmp_path / "more"
    assert run(tmp_path / "me.png", other, *models, *more) == 0
    assert files(other) == {"me.png", "me_ink.png", "me_grid.png", "manifest.jsonl"}
    assert (other / "me.png").read_bytes() == drawn != (other / "me_ink.png").read_bytes()
    strip = pixels(other / "me_grid.png")  # aligned, reconstruction, anime, ink
    assert strip.shape[:2] == (16, 64) and (strip[:, 48:] == pixels(other / "me_ink.png")).all()
    assert run(tmp_path / "me.png", tmp_path / "one", *models, "--styles", f"ink={tail}") == 0
    assert files(tmp_path / "one") == {"me_ink.png", "manifest.jsonl"}
    save(tail, tail_of(swap(anime, face, 16), 16))  # of another face generator
    assert run(tmp_path / "me.png", tmp_path / "no", *models, *more) == 2


def test_a_film_is_drawn_once_in_each_style(models, superres, out, tmp_path, face, anime):  # noqa: F811
    pytest.importorskip("av")
    from films import make_film

    film = make_film(tmp_path / "clip.mp4")
    tail = tmp_path / "ink.safetensors"
    save(tail, tail_of(swap(face, anime, 16), 16))
    assert run(film, out, *models, "--styles", f"anime,ink={tail}") == 0
    assert files(out) == {"clip.mp4", "clip_ink.mp4", "manifest.jsonl"}


def test_a_translator_takes_one_generator_or_several(face, styles, encoder):
    crops = [photo(2, 20, 20)]
    one = Translator(face, styles["anime"], encoder, swap_resolution=8)(crops)
    both = Translator(face, styles, encoder, swap_resolution=8)(crops, reconstruction=True)
    assert list(one.drawings) == ["anime"] and list(both.drawings) == ["anime", "ink"]
    assert torch.equal(one.anime, both.anime) and both.reconstruction is not None
