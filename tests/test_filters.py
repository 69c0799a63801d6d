"""Drawings by filters, and a generator's last blocks that learn to draw the same.

pytest tests/test_filters.py
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from test_train_gan import config, metrics, same  # noqa: F401

from generators import filters, train
from generators.checkpoint import load, save
from generators.data import open_dataset
from generators.gan import StyleGan2Training
from generators.images import to_float
from generators.latents import read_ws, write_latents
from generators.loop import make_accelerator
from generators.stylegan2 import Generator
from generators.superres import SuperResolution, SuperResolutionConfig

pytest.importorskip("cv2")


@pytest.fixture
def picture() -> np.ndarray:
    """(128, 128, 3): a light disc on a dark ground, with a little noise."""
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    disc = np.where(np.hypot(x, y) < 0.6, 0.8, 0.25)[..., None] * np.array([1.0, 0.8, 0.7])
    noise = np.random.default_rng(0).normal(0, 0.01, disc.shape)
    return (disc + noise).astype(np.float32)


def test_a_pencil_draws_the_edge_on_white_paper(picture):
    drawn = filters.pencil(picture)
    assert drawn.shape == picture.shape and drawn.dtype == np.float32
    assert (drawn[..., 0] == drawn[..., 1]).all()  # grey
    assert drawn[0, 0].min() == 1 and drawn[64, 64].min() > 0.95  # paper: corner and light skin
    edge = drawn[64, 15:40, 0]  # across the border of the disc
    ground = drawn[64, 15:20, 0].mean()  # shaded, as hair is
    assert edge.min() < 0.5 * ground and 0.5 < ground < 0.95
    lines = drawn[:, :, 0] < 0.4
    away = np.abs(np.hypot(*np.mgrid[-1:1:128j, -1:1:128j]) - 0.6)
    assert lines.any() and away[lines].max() < 0.12  # nothing but the border is drawn


def test_gouache_is_of_few_flat_colours(picture):
    drawn = filters.gouache(picture)
    assert drawn.shape == picture.shape and drawn.min() >= 0 and drawn.max() <= 1
    inside = drawn[50:78, 50:78].reshape(-1, 3)
    assert inside.std(axis=0).max() < 0.3 * picture[50:78, 50:78].reshape(-1, 3).std(axis=0).max()
    spread = [np.ptp(p[64, 64]) for p in (picture, drawn)]
    assert spread[1] > 1.2 * spread[0]  # stronger colours
    dark, light = (filters.gouache(np.full((64, 64, 3), v, np.float32)) for v in (0.1, 0.9))
    assert dark[..., 2].mean() > dark[..., 0].mean() and light[..., 2].mean() < light[..., 0].mean()


@pytest.fixture
def pairs(face, tmp_path):
    """The folder that the command writes, of 6 samples and 4 codes."""
    save(tmp_path / "face.safetensors", face)
    network = SuperResolution(SuperResolutionConfig(width=4, blocks=1))
    save(tmp_path / "superres.safetensors", network)
    codes = torch.randn(9, face.num_ws, face.w_dim)
    write_latents(tmp_path / "codes.safetensors", {"ws": codes})
    argv = ["sketch", "--output", tmp_path / "sketch", "--samples", "6", "--codes", "4",
            "--latents", tmp_path / "codes.safetensors",
            "--face-generator", tmp_path / "face.safetensors",
            "--superres", tmp_path / "superres.safetensors"]  # fmt: skip
    assert filters.main([*map(str, argv)]) == 0
    return tmp_path / "sketch"


def test_the_command_writes_pairs_of_latent_and_drawing(face, pairs, tmp_path, capsys):
    ws = read_ws(pairs / filters.LATENTS, face)
    drawings = to_float(open_dataset(pairs / filters.DRAWINGS, 16).pictures)
    assert ws.shape == (10, 6, 8) and drawings.shape == (10, 3, 16, 16)
    assert (ws[:6] == ws[:6, :1]).all() and not (ws[6:] == ws[6:, :1]).all()  # samples, codes
    superres = load(tmp_path / "superres.safetensors", SuperResolution)
    wanted = filters.drawing("sketch", face, superres, ws[7:8])
    assert (drawings[7] - wanted[0]).abs().max() < 0.01
    argv = ["sketch", "--output", str(pairs)]
    assert filters.main(argv) == 2 and "overwrite" in capsys.readouterr().err


def test_paired_training_learns_the_drawings_and_resumes_exactly(config, pairs, tmp_path):  # noqa: F811
    config = replace(
        config, data=str(pairs / filters.DRAWINGS), latents=pairs / filters.LATENTS,
        init=str(tmp_path / "face.safetensors"), freeze_generator_below=8, paired_weight=1.0,
        reconstruction_weight=0, adversarial_weight=0, images=160, save_every=20, log_every=20,
        warmup_lr=0.02,
    )  # fmt: skip
    train.train(config, cpu=True)
    lines = metrics(config.output)
    assert lines[-1]["l1"] < 0.7 * lines[0]["l1"] and "d" not in lines[-1]
    files = config.output / "generator.safetensors", tmp_path / "face.safetensors"
    made, face = (load(file, Generator) for file in files)
    assert {n for n in face.state_dict() if ".b4." in n or "mapping" in n} <= same(face, made)
    again = replace(config, output=tmp_path / "again")
    train.train(replace(again, images=80), cpu=True)
    train.train(again, cpu=True)
    assert metrics(again.output)[-1] == lines[-1]


def test_a_share_is_paired_and_the_rest_are_samples(config, pairs, tmp_path):  # noqa: F811
    config = replace(
        config, data=str(pairs / filters.DRAWINGS), latents=pairs / filters.LATENTS, batch_size=4,
        init=str(tmp_path / "face.safetensors"), freeze_generator_below=8, paired_weight=1.0,
        reconstruction_weight=0, adversarial_weight=1.0, paired_share=0.5,
    )  # fmt: skip
    accelerator = make_accelerator(config, cpu=True)
    training = StyleGan2Training(config, accelerator)
    sides: list[tuple[int, ...]] = []
    difference = training.difference

    def watched(real, made):
        sides.append((*real.shape, *made.shape))
        return difference(real, made)

    training.difference = watched
    draw = training.draw(0)
    logs, _ = training.generator_step(draw, 0, 1.0)
    assert sides == [(2, 3, 16, 16, 2, 3, 16, 16)] and {"l1", "g"} <= logs.keys()
    draw = training.draw(0)
    _, ws, chosen = training.synthesise(draw.z(training.generator), draw)
    assert len(chosen) == 2 and torch.equal(ws[2:], training.latents[chosen])
    assert not torch.equal(ws[0], ws[1])  # samples
    training.config = replace(config, paired_share=0.01)
    assert len(training.synthesise(draw.z(training.generator), draw)[2]) == 1  # never none
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="paired-share"):
            replace(config, paired_share=wrong)


def test_what_does_not_pair_is_refused(config, pairs, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="--paired-weight needs the latents"):
        replace(config, paired_weight=1.0)
    wrong = replace(
        config, reconstruction_weight=0, paired_weight=1.0, latents=pairs / filters.LATENTS,
        init=str(tmp_path / "face.safetensors"), output=tmp_path / "wrong",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"5 pictures and .* has 10 latents, which do not pair"):
        train.train(wrong, cpu=True)
