"""CycleGAN: networks, pool, losses, the training's exact resume, and the command that draws.

pytest tests/test_cyclegan.py
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from accelerate import Accelerator
from pictures import photo
from processes import code_of

from generators import cyclegan, train
from generators.adversarial import least_squares_discriminator_loss, least_squares_generator_loss
from generators.checkpoint import load, pack, save
from generators.cyclegan import (
    CycleGenerator,
    CycleGeneratorConfig,
    PatchDiscriminator,
    PatchDiscriminatorConfig,
    PicturePool,
)
from generators.cycles import CycleganTraining
from generators.data import named_pictures
from generators.images import open_image, to_tensor
from generators.options import CycleganOptions
from generators.runs import read_checkpoint
from generators.state import LossMeter

TINY = CycleGeneratorConfig(resolution=16, width=4, blocks=1)


@pytest.fixture
def config(tmp_path: Path) -> CycleganOptions:
    """6 steps of 2 photos and 2 drawings; pictures of several sizes, more photos than drawings."""
    for name, count in (("photos", 5), ("drawings", 3)):
        (tmp_path / name).mkdir()
        for i in range(count):
            photo(i + len(name), 14 + i, 20).save(tmp_path / name / f"{i}.png")
    return CycleganOptions(
        data=str(tmp_path / "photos"),
        drawings=str(tmp_path / "drawings"),
        output=tmp_path / "run",
        images=12,
        batch_size=2,
        resolution=16,
        width=4,
        blocks=1,
        patch_width=4,
        pool=3,
        log_every=1,
        save_every=2,
        tracker="none",
    )


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------- networks


def test_pictures_keep_their_shape_and_every_weight_has_a_gradient():
    generator = CycleGenerator(TINY)
    images = 2 * torch.rand(2, 3, 16, 16) - 1
    made = generator(images)
    assert made.shape == images.shape and made.abs().max() <= 1
    made.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in generator.parameters())
    assert generator(torch.zeros(1, 3, 20, 24)).shape == (1, 3, 20, 24)  # any multiples of 4
    alone = generator(images[:1])  # no picture sees the others of its batch
    torch.testing.assert_close(alone, made[:1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("halvings", "patch", "logits"), [(1, 16, 30**2), (2, 34, 14**2)])
def test_a_patch_is_as_large_as_it_is_said_to_be(halvings, patch, logits):
    """With an identity for instance norm, which sees the whole picture."""
    judge = PatchDiscriminator(PatchDiscriminatorConfig(width=4, halvings=halvings))
    for i, layer in enumerate(judge.layers):
        if isinstance(layer, torch.nn.InstanceNorm2d):
            judge.layers[i] = torch.nn.Identity()
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    found = judge(images)
    assert found.shape == (1, logits)
    side = round(logits**0.5)
    found[0, logits // 2 + side // 2].backward()  # of the middle
    rows = (images.grad[0].abs().sum(dim=(0, 2)) > 0).nonzero()
    assert int(rows.max() - rows.min()) + 1 == patch


def test_a_network_is_stored_in_half_precision_and_comes_back(tmp_path):
    generator = CycleGenerator(TINY).eval()
    save(tmp_path / "g.safetensors", generator)
    pack(tmp_path / "g.safetensors", tmp_path / "half.safetensors", {})
    again = load(tmp_path / "half.safetensors", CycleGenerator)
    images = torch.rand(1, 3, 16, 16)
    assert again.config == TINY
    torch.testing.assert_close(again(images), generator(images), rtol=0, atol=0.01)


# -------------------------------------------------------------------------------- pool


def test_the_pool_keeps_the_first_and_then_gives_an_old_one_half_of_the_time():
    pool = PicturePool(4, 1)
    rng = torch.Generator().manual_seed(0)
    numbered = torch.arange(2004.0)[:, None, None, None].expand(-1, 3, 1, 1)
    seen = torch.cat([pool(numbered[i : i + 4], i, rng) for i in range(0, 2004, 4)])[:, 0, 0, 0]
    assert seen[:4].tolist() == [0, 1, 2, 3]
    new = torch.arange(4.0, 2004)
    old = seen[4:] != new
    assert 0.46 < old.float().mean() < 0.54 and (seen[4:][old] < new[old]).all()
    taken = seen[4:][old].tolist()
    assert len(taken) == len(set(taken))  # what was seen has left the pool
    ages = (new - seen[4:])[old]  # of a random one of four: 8 pictures on average
    assert 6.5 < ages.mean() < 9.5
    assert set(pool.pictures[:, 0, 0, 0].tolist()).isdisjoint(taken)


def test_without_a_pool_each_picture_is_seen_as_it_comes():
    images = torch.rand(5, 3, 2, 2)
    assert torch.equal(PicturePool(0, 2)(images, 100, torch.Generator()), images)


# ------------------------------------------------------------------------------ losses


def test_least_squares_losses_by_hand():
    real, fake = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 2.0], [1.0, 1.0]])
    assert least_squares_generator_loss(fake).tolist() == [1, 0]
    assert least_squares_discriminator_loss(real, fake).tolist() == [4, 2]


def test_cycle_and_identity_weigh_what_they_are_told_to(config):
    """A generator that inverts colours and an inverse that does nothing: all terms are known."""
    training = CycleganTraining(config, Accelerator(cpu=True))
    training.generator, training.inverse = torch.neg, lambda images: images
    training.judges = [lambda images: images.flatten(1)[:, :4] * 0] * 2
    photos, drawings = torch.full((2, 3, 16, 16), 0.5), torch.full((2, 3, 16, 16), 0.25)
    terms, (drawn, made) = training.generator_terms(photos, drawings)
    assert torch.equal(drawn, -photos) and torch.equal(made, drawings)
    assert terms["adversarial"] == 2
    assert terms["cycle"] == 2 * 0.5 + 2 * 0.25
    assert terms["identity"] == 2 * 0.25 + 0
    assert terms["g"] == 2 + 10 * 1.5 + 5 * 0.5
    training.config = replace(config, identity_weight=0, cycle_weight=1)
    terms, _ = training.generator_terms(photos, drawings)
    assert "identity" not in terms and terms["g"] == 2 + 1.5


# ---------------------------------------------------------------------------- training


def test_the_rate_is_constant_and_then_falls_to_zero(config):
    config = replace(config, images=100, lr=1.0)
    rates = [config.lr_at(seen) for seen in (0, 50, 75, 100)]
    assert rates == pytest.approx([1, 1, 0.5, 0])


def test_a_run_leaves_both_networks_and_resumes_exactly(config, tmp_path):
    train.train(config, cpu=True)
    assert sorted(str(p.relative_to(config.output)) for p in config.output.rglob("*.*")) == [
        "checkpoints/step-00000004.safetensors",
        "checkpoints/step-00000006.safetensors",
        "config.json",
        "generator.safetensors",
        "inverse.safetensors",
        "metrics.jsonl",
        "samples/step-00000006.png",
    ]
    lines = metrics(config.output)
    assert [line["images"] for line in lines] == [2, 4, 6, 8, 10, 12]
    assert open_image(config.output / "samples" / "step-00000006.png").width == 6 * 16

    again = replace(config, output=tmp_path / "again")
    train.train(again, cpu=True)
    (again.output / "checkpoints" / "step-00000006.safetensors").unlink()  # as if killed
    train.train(again, cpu=True)
    assert metrics(again.output) == lines
    file = Path("checkpoints") / "step-00000006.safetensors"
    (one, _), (two, _) = (read_checkpoint(run / file) for run in (config.output, again.output))
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    assert one["pool of photo_discriminator/pictures"].abs().amax(dim=(1, 2, 3)).min() > 0
    for name in ("generator", "inverse"):
        average = load(config.output / f"{name}.safetensors", CycleGenerator).state_dict()
        assert all(torch.equal(average[k], one[f"average of {name}/{k}"]) for k in average)
        assert not torch.equal(one[f"{name}/torgb.weight"], average["torgb.weight"])


def test_a_step_moves_all_four_networks_and_fills_the_pools(config):
    training = CycleganTraining(replace(config, pool=2), Accelerator(cpu=True))
    meter, networks = LossMeter(torch.device("cpu")), training.state.modules
    before = {name: [p.clone() for p in net.parameters()] for name, net in networks.items()}
    training.step(0, meter)
    assert len([parameters for parameters in before.values() if parameters]) == 4
    assert all(
        not torch.equal(now, old)
        for name, net in networks.items()
        for now, old in zip(net.parameters(), before[name], strict=True)
    )
    first = training.pools[0].pictures.clone()
    assert (first != 0).any()
    training.pools[0].pictures.fill_(7.0)
    fakes = torch.zeros(2, 3, 16, 16)
    seen = torch.cat([training.from_pool(0, fakes, step) for step in range(1, 20)])
    assert (seen == 7).all(dim=(1, 2, 3)).sum() == 2  # each old picture once
    assert (training.pools[0].pictures == 0).all()


def test_processes_share_one_pool_and_each_takes_its_rows(config, tmp_path):
    """Two, played one after the other, draw and see what one does with the doubled batch."""
    alone = CycleganTraining(config, Accelerator(cpu=True))
    both = [CycleganTraining(replace(config, batch_size=1), Accelerator(cpu=True)) for _ in "ab"]
    for rank, training in enumerate(both):
        training.accelerator = SimpleNamespace(
            device=torch.device("cpu"), process_index=rank, num_processes=2, gather=lambda _: fakes
        )
        training.pictures = 2
    for step in range(12):
        fakes = torch.rand(2, 3, 16, 16)
        for i in range(2):
            drawn = [training.pair(step)[i] for training in both]
            assert torch.equal(torch.cat(drawn), alone.pair(step)[i])
            seen = [training.from_pool(i, fakes[:1], step) for training in both]
            assert torch.equal(torch.cat(seen), alone.from_pool(i, fakes, step))
            assert all(torch.equal(t.pools[i].pictures, alone.pools[i].pictures) for t in both)


def test_a_training_begins_with_the_networks_of_another(config, tmp_path):
    network = CycleGenerator(replace(TINY, width=6))
    save(tmp_path / "g.safetensors", network)
    training = CycleganTraining(
        replace(config, init=str(tmp_path / "g.safetensors")), Accelerator(cpu=True)
    )
    assert torch.equal(training.generator.torgb.weight, network.torgb.weight)
    assert training.inverse.config == network.config
    assert not torch.equal(training.inverse.torgb.weight, network.torgb.weight)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"drawings": None}, "--drawings"),
        ({"drawings": "nowhere"}, "There is no file or folder 'nowhere'"),
        ({"batch_size": 4}, "drawings has 3 pictures, fewer than the 4 of a step"),
        ({"resolution": 18}, "a multiple of 4, 16 or more, not 18"),
        ({"lr": 0}, "--lr is 0.0; give a number above 0"),
        ({"identity_weight": -1}, "--identity-weight is -1.0; give a number of 0 or more"),
    ],
)
def test_wrong_options_end_in_a_sentence(config, monkeypatch, capsys, changes, sentence):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = {"data": config.data, "drawings": config.drawings, "output": config.output}
    options |= {"resolution": 16, "images": 4, "tracker": "none"} | changes
    words = [
        word
        for name, value in options.items()
        if value is not None
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    assert code_of(train.main, ["cyclegan", *words]) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not config.output.exists()


# ----------------------------------------------------------------------------- command


@pytest.fixture
def network(tmp_path: Path) -> Path:
    save(tmp_path / "g.safetensors", CycleGenerator(TINY))
    return tmp_path / "g.safetensors"


def test_drawings_are_named_as_their_photos(config, network, tmp_path):
    """As `benchmarks/translation.py --outputs` asks for them."""
    out = tmp_path / "out"
    data = Path(config.data)
    (data / "a").mkdir()
    (data / "4.png").rename(data / "a" / "4.webp")
    argv = [str(network), "--input", config.data, "--output", str(out), "--batch-size", "3"]
    assert cyclegan.main(argv) == 0
    names, images = named_pictures(config.data, None, 16)
    assert names == ["0", "1", "2", "3", "a/4"]
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.png")) == [
        f"{name}.png" for name in names
    ]
    made = load(network, CycleGenerator)(images[4:])[0]
    difference = to_tensor(open_image(out / "a" / "4.png")) - made
    assert difference.abs().max() < 0.01
    assert cyclegan.main(argv) == 2  # they exist
    assert cyclegan.main([*argv, "--overwrite"]) == 0


def test_rows_of_parquet_give_their_numbers(network, tmp_path):
    rows = datasets.Dataset.from_dict(
        {"image": [photo(i, 16, 16) for i in range(6)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    rows.to_parquet(tmp_path / "test.parquet")
    argv = [str(network), "--input", str(tmp_path / "test.parquet"), "--images", "3"]
    assert cyclegan.main([*argv, "--output", str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["0.png", "2.png", "4.png"]


def test_two_photos_of_one_name_and_a_foreign_network_are_refused(
    config, network, face, tmp_path, capsys
):
    out = str(tmp_path / "out")
    photo(1, 16, 16).save(Path(config.data) / "0.webp")
    assert cyclegan.main([str(network), "--input", config.data, "--output", out]) == 2
    assert "has several pictures named 0" in capsys.readouterr().err
    save(tmp_path / "face.safetensors", face)
    argv = [str(tmp_path / "face.safetensors"), "--input", config.drawings, "--output", out]
    assert cyclegan.main(argv) == 2
    assert "give a file with a cyclegan here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
