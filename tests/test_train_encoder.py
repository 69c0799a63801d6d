"""The encoder's training: processes, accumulation, discriminators, wrong settings.

pytest tests/test_train_encoder.py
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from common import in_processes

from encoder.joint import JointOptions, Spread, energy_distance
from encoder.losses import LossNetworks, LossWeights
from encoder.model import Encoder
from encoder.train import EncoderTrainConfig, EncoderTraining, train
from generators import checkpoint, loop
from generators.command import NonFiniteLoss
from generators.data import open_dataset
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.images import to_pil
from generators.loop import make_accelerator
from generators.projected import ProjectedConfig, ProjectedDiscriminator
from generators.runs import read_checkpoint, seed_of
from generators.stylegan2 import Generator, GeneratorConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with pictures, a generator, an anime generator and a discriminator, all tiny."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "faces").mkdir()
    torch.manual_seed(1)
    for i in range(20):
        to_pil(torch.rand(3, 1, 1) + torch.randn(3, 20, 20) * 0.3 - 0.5).save(
            folder / "faces" / f"{i}.png"
        )
    generator = Generator(GeneratorConfig(16, 8, 12, 2, widths=(8, 8, 8)))
    generator.w_avg.normal_(std=0.1)
    for name in ("face", "anime"):
        checkpoint.save(folder / f"{name}.safetensors", generator)
    checkpoint.save(
        folder / "d.safetensors", Discriminator(DiscriminatorConfig(16, widths=(8, 8, 8)))
    )
    return folder


def options(world: Path, run: Path, **changes) -> dict:
    return {
        "data": str(world / "faces"),
        "output": run,
        "face_generator": str(world / "face.safetensors"),
        "backbone": "mobilenetv3_small_050",
        "width": 16,
        "depth": 1,
        "steps": 4,
        "batch_size": 8,
        "lr": 1e-3,
        "warmup": 2,
        "log_every": 1,
        "eval_every": 100,
        "save_every": 2,
        "tracker": "none",
    } | changes


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one_with_the_doubled_batch(world: Path, tmp_path: Path) -> None:
    """Same first loss to 1e-5 and same second one (after one update) to 1e-3, relatively."""
    one = options(world, tmp_path / "one", batch_size=8, steps=2)
    two = options(world, tmp_path / "two", batch_size=4, steps=2)
    train(EncoderTrainConfig(**one), cpu=True)
    in_processes(train, EncoderTrainConfig(**two), True, count=2)
    single, double = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("loss", "mse", "latent"):
        assert double[0][name] == pytest.approx(single[0][name], rel=1e-5)
        assert double[1][name] == pytest.approx(single[1][name], rel=1e-3)


def test_a_projected_discriminator_goes_on_learning(world: Path, tmp_path: Path) -> None:
    discriminator = ProjectedDiscriminator(ProjectedConfig(input_size=32, levels=(1, 2)))
    checkpoint.save(tmp_path / "d.safetensors", discriminator)
    loss = LossWeights(adversarial=0.1, feature=0.1)
    networks = LossNetworks(discriminator=str(tmp_path / "d.safetensors"))
    given = {"networks": networks, "loss": loss, "steps": 2}
    train(EncoderTrainConfig(**options(world, tmp_path / "run", **given)), cpu=True)
    assert all(line["adversarial"] > 0 < line["feature"] for line in metrics(tmp_path / "run"))
    file = tmp_path / "run" / "checkpoints" / "step-00000002.safetensors"
    tensors, _ = read_checkpoint(file)
    learnt = {name for name, value in discriminator.state_dict().items()
              if not torch.equal(value, tensors[f"discriminator/{name}"])}  # fmt: skip
    assert learnt and all(name.startswith("heads.") for name in learnt)


def test_accumulation_equals_a_larger_batch(world: Path, tmp_path: Path) -> None:
    train(EncoderTrainConfig(**options(world, tmp_path / "one", steps=2)), cpu=True)
    train(
        EncoderTrainConfig(
            **options(world, tmp_path / "two", batch_size=4, accumulation=2, steps=2)
        ),
        cpu=True,
    )
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert two[0]["loss"] == pytest.approx(one[0]["loss"], rel=1e-5)
    assert two[1]["loss"] == pytest.approx(one[1]["loss"], rel=1e-3)


def test_training_lowers_the_loss_and_fills_the_run_folder(world: Path, tmp_path: Path) -> None:
    values = options(
        world,
        tmp_path / "run",
        steps=60,
        log_every=10,
        eval_every=30,
        sample_every=30,
        save_every=20,
        lr=3e-3,
        eval_data=str(world / "faces"),
        anime_generator=str(world / "anime.safetensors"),
        swap_resolution=8,
        tracker="tensorboard",
        eval_images=20,
    )
    scores = train(EncoderTrainConfig(**values), cpu=True)
    lines = metrics(tmp_path / "run")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert scores["eval_mse"] == lines[-1]["eval_mse"] > 0
    files = {
        str(p.relative_to(tmp_path / "run")) for p in (tmp_path / "run").rglob("*") if p.is_file()
    }
    events = {f for f in files if f.startswith("tensorboard/")}
    assert events and files - events == {
        "config.json",
        "metrics.jsonl",
        "best.safetensors",
        "encoder.safetensors",
        "samples/step-00000030.png",
        "samples/step-00000060.png",
        "checkpoints/step-00000040.safetensors",
        "checkpoints/step-00000060.safetensors",
    }
    assert (
        checkpoint.read_metadata(tmp_path / "run" / "encoder.safetensors")["provenance"]["steps"]
        == "60"
    )


def joint(world: Path, run: Path, **changes) -> dict:
    """Options of a training of encoder and generator with both discriminators."""
    file = run.parent / "projected.safetensors"
    if not file.exists():
        discriminator = ProjectedDiscriminator(ProjectedConfig(input_size=32, levels=(1, 2)))
        checkpoint.save(file, discriminator)
    given = {
        "networks": LossNetworks(discriminator=str(file)),
        "loss": LossWeights(adversarial=0.3),
        "joint": JointOptions(generator_lr=1e-3, pixel_weight=0.1),
        "synthetic_fraction": 0.0,
        "input_size": 32,
        "warmup": 1,
    }
    return options(world, run, **given) | changes


def test_a_joint_step_changes_both_networks_and_their_discriminators(
    world: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(EncoderTrainConfig(**joint(world, run, steps=1, save_every=1)), cpu=True)
    (line,) = metrics(run)
    names = ("discriminator", "pixel_discriminator", "g_pixel_discriminator", "r1")
    assert all(line[name] > 0 for name in names)
    before = checkpoint.load(world / "face.safetensors", Generator)
    after = checkpoint.load(run / "generator.safetensors", Generator)
    for name, weight in before.named_parameters():
        assert not torch.equal(weight, after.get_parameter(name)), name
    assert not torch.equal(before.w_avg, after.w_avg)
    encoder = checkpoint.load(run / "encoder.safetensors", Encoder)
    assert torch.equal(encoder.w_avg, after.w_avg)
    for name, network in (
        ("discriminator", ProjectedDiscriminator),
        ("pixel_discriminator", Discriminator),
    ):
        checkpoint.load(run / f"{name}.safetensors", network)
    projected = checkpoint.load(run / "discriminator.safetensors", ProjectedDiscriminator)
    old = checkpoint.load(tmp_path / "projected.safetensors", ProjectedDiscriminator).state_dict()
    learnt = {k for k, v in projected.state_dict().items() if not torch.equal(v, old[k])}
    assert learnt and all(name.startswith("heads.") for name in learnt)


def test_frozen_blocks_of_a_joint_training_stay(world: Path, tmp_path: Path) -> None:
    learning = JointOptions(generator_lr=1e-3, freeze_generator_below=16)
    values = joint(world, tmp_path / "run", steps=1, save_every=1, joint=learning)
    train(EncoderTrainConfig(**values), cpu=True)
    before = checkpoint.load(world / "face.safetensors", Generator)
    after = checkpoint.load(tmp_path / "run" / "generator.safetensors", Generator)
    assert torch.equal(before.w_avg, after.w_avg)
    for name, weight in before.named_parameters():
        frozen = "synthesis.b16" not in name and "synthesis.b32" not in name
        assert torch.equal(weight, after.get_parameter(name)) == frozen, name


def test_a_joint_training_learns_a_spatial_code(world: Path, tmp_path: Path) -> None:
    learning = JointOptions(generator_lr=1e-3, freeze_generator_below=16, spatial=3)
    values = {"steps": 2, "save_every": 2, "joint": learning, "eval_every": 1}
    values |= {"eval_data": str(world / "faces"), "loss": LossWeights(), "networks": LossNetworks()}
    values["anime_generator"] = str(world / "anime.safetensors")  # has no code
    train(EncoderTrainConfig(**joint(world, tmp_path / "run", **values)), cpu=True)
    before = checkpoint.load(world / "face.safetensors", Generator)
    after = checkpoint.load(tmp_path / "run" / "generator.safetensors", Generator)
    encoder = checkpoint.load(tmp_path / "run" / "encoder.safetensors", Encoder)
    assert after.config.spatial == encoder.config.spatial == 3
    assert after.num_ws == encoder.config.num_ws == before.num_ws + 3 * 64 // 12
    torch.manual_seed(seed_of(0, "spatial"))
    start = Generator(after.config).synthesis.get_submodule("b8").spatial.weight
    assert not torch.equal(start, after.synthesis.get_submodule("b8").spatial.weight)
    for name, weight in before.named_parameters():
        frozen = "synthesis.b16" not in name
        assert torch.equal(weight, after.get_parameter(name)) == frozen, name
    assert [line for line in metrics(tmp_path / "run") if line["spatial"] > 0]


def test_a_joint_training_goes_on_as_if_never_interrupted(world: Path, tmp_path: Path) -> None:
    for run, stops in (("whole", [4]), ("broken", [2, 4])):
        for steps in stops:
            values = joint(world, tmp_path / run, steps=steps, save_every=1)
            train(EncoderTrainConfig(**values), cpu=True)
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert len(metrics(tmp_path / "whole")) == 4
    (whole, _), (broken, _) = (
        read_checkpoint(tmp_path / run / "checkpoints" / "step-00000004.safetensors")
        for run in ("whole", "broken")
    )
    assert whole.keys() == broken.keys()
    for network in ("encoder", "generator", "average of generator", "spread", "discriminator",
                    "pixel_discriminator", "optimiser of generator"):  # fmt: skip
        assert any(name.startswith(f"{network}/") for name in whole), network
    for name, value in whole.items():
        assert torch.equal(value, broken[name]), name


def test_two_processes_train_both_networks_like_one(world: Path, tmp_path: Path) -> None:
    """Without discriminators, whose augmentations and samples are each process's own."""
    given = {"joint": JointOptions(generator_lr=1e-3), "loss": LossWeights(), "steps": 2}
    one = joint(world, tmp_path / "one", batch_size=8, **given)
    two = joint(world, tmp_path / "two", batch_size=4, **given)
    train(EncoderTrainConfig(**one), cpu=True)
    in_processes(train, EncoderTrainConfig(**two), True, count=2)
    single, double = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("loss", "mse", "spread"):
        assert double[0][name] == pytest.approx(single[0][name], rel=1e-5)
        assert double[1][name] == pytest.approx(single[1][name], rel=1e-3)


def test_without_the_option_the_generator_stays_as_it_is(world: Path, tmp_path: Path) -> None:
    before = (world / "face.safetensors").read_bytes()
    train(EncoderTrainConfig(**options(world, tmp_path / "run", steps=2)), cpu=True)
    assert (world / "face.safetensors").read_bytes() == before
    assert not (tmp_path / "run" / "generator.safetensors").exists()
    file = tmp_path / "run" / "checkpoints" / "step-00000002.safetensors"
    assert not any("generator" in name for name in read_checkpoint(file)[0])


def test_the_spread_is_0_inside_and_the_pull_brings_ws_back(face: Generator) -> None:
    spread = Spread(face)
    steps = spread.deviations[:, None] * spread.axes.T  # (D, D): one deviation along each axis
    inside = spread.mean + 1.9 * steps
    assert spread(inside[None]).abs().max() < 1e-8
    far = spread.mean + 5 * steps
    share = spread.deviations.square() / spread.deviations.square().sum()
    expected = (9 * share).mean()  # three deviations too far, each axis alone
    assert spread(far[None]).item() == pytest.approx(expected.item(), rel=1e-3)

    ws = far[None].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(spread(ws).sum(), ws)
    assert spread(ws - 0.1 * gradient).item() < spread(ws).item()


@pytest.mark.parametrize("pull", ["spread", "layers", "match"])
def test_each_pull_lowers_its_distance(world: Path, tmp_path: Path, pull: str) -> None:
    ends = {}
    for weight in (0.0, 3.0):
        run = tmp_path / str(weight)
        none = {"spread_weight": 0.0, "layers_weight": 0.0, "match_weight": 0.0}
        learning = JointOptions(generator_lr=1e-3, **(none | {f"{pull}_weight": weight}))
        given = {"joint": learning, "loss": LossWeights(), "steps": 30, "lr": 3e-3}
        train(EncoderTrainConfig(**joint(world, run, **given)), cpu=True)
        ends[weight] = sum(line[pull] for line in metrics(run)[-5:])
    assert ends[3.0] < 0.7 * ends[0.0]


def test_the_energy_distance_is_0_on_average_for_one_distribution_only() -> None:
    a, b = torch.randn(2, 200, 30, 4)
    same = torch.stack([energy_distance(x, y) for x, y in zip(a, b, strict=True)])
    assert abs(same.mean()) < 3 * same.std() / 200**0.5
    for other in (b + 1, 2 * b):
        apart = torch.stack([energy_distance(x, y) for x, y in zip(a, other, strict=True)])
        assert apart.mean() > 20 * apart.std() / 200**0.5
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0], [5.0]])
    assert energy_distance(x, y).item() == pytest.approx(2 * 3.5 - 1 - 2)


def test_a_training_begins_with_the_weights_of_another(world: Path, tmp_path: Path) -> None:
    train(EncoderTrainConfig(**options(world, tmp_path / "first", steps=2)), cpu=True)
    first = tmp_path / "first" / "encoder.safetensors"
    values = options(world, tmp_path / "second", init=str(first), steps=1, warmup=10**9)
    train(EncoderTrainConfig(**values), cpu=True)
    a, b = (checkpoint.load(tmp_path / run / "encoder.safetensors", Encoder)
            for run in ("first", "second"))  # fmt: skip
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, b.state_dict()[name], atol=1e-6, rtol=1e-4)
    values = options(world, tmp_path / "dense", init=str(first), dense=4, steps=1, warmup=10**9)
    train(EncoderTrainConfig(**values), cpu=True)
    dense = checkpoint.load(tmp_path / "dense" / "encoder.safetensors", Encoder).state_dict()
    for name, value in a.state_dict().items():
        torch.testing.assert_close(value, dense[name], atol=1e-6, rtol=1e-4)
    values["init"] = str(tmp_path / "dense" / "encoder.safetensors")
    values |= {"output": tmp_path / "again", "dense": 0}  # as it was
    train(EncoderTrainConfig(**values), cpu=True)
    again = checkpoint.load(tmp_path / "again" / "encoder.safetensors", Encoder)
    assert again.config.dense == 4
    values |= {"output": tmp_path / "detail", "detail": 16}  # it looks at the generator's size
    train(EncoderTrainConfig(**values), cpu=True)
    detail = checkpoint.load(tmp_path / "detail" / "encoder.safetensors", Encoder)
    assert detail.config == dataclasses.replace(again.config, detail=16)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, detail.state_dict()[name], atol=1e-6, rtol=1e-4)
    values = options(world, tmp_path / "third", init=str(first), width=24)
    with pytest.raises(ValueError, match="another --backbone, --width or --depth"):
        train(EncoderTrainConfig(**values), cpu=True)


def test_a_non_finite_loss_stops_the_run_and_keeps_its_batch(world: Path, tmp_path: Path) -> None:
    values = options(
        world, tmp_path / "run", steps=50, lr=1e30, log_every=5, warmup=0, max_grad_norm=1e9
    )
    with pytest.raises(NonFiniteLoss, match=r"not finite at step .* another run folder"):
        train(EncoderTrainConfig(**values), cpu=True)
    better = values | {"lr": 1e-3, "output": tmp_path / "another", "steps": 2}
    train(EncoderTrainConfig(**better), cpu=True)
    (file,) = (tmp_path / "run").glob("non-finite-*.safetensors")
    from safetensors.torch import load_file

    images = load_file(file)["images_0"]
    assert images.shape == (8, 3, 16, 16) and images.isfinite().all()
    for file in (tmp_path / "run" / "checkpoints").iterdir():
        tensors, _ = read_checkpoint(file)
        assert all(value.isfinite().all() for value in tensors.values())


def in_half_precision(config: EncoderTrainConfig) -> str:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    training = EncoderTraining(config, make_accelerator(config, cpu=True))
    loop.run(training)
    return training.accelerator.mixed_precision


def test_bfloat16_trains(world: Path, tmp_path: Path) -> None:
    config = EncoderTrainConfig(**options(world, tmp_path / "half"))
    assert in_processes(in_half_precision, config) == ["bf16"]
    assert all(0 < line["loss"] < 100 for line in metrics(tmp_path / "half"))


def test_another_configuration_in_the_same_folder_is_refused(world: Path, tmp_path: Path) -> None:
    train(EncoderTrainConfig(**options(world, tmp_path / "run")), cpu=True)
    with pytest.raises(ValueError, match="another lr"):
        train(EncoderTrainConfig(**options(world, tmp_path / "run", lr=1.0)), cpu=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"synthetic_fraction": 2}, "--synthetic-fraction is 2"),
        ({"loss": LossWeights(adversarial=1)}, "--discriminator"),
        ({"joint": JointOptions(generator_lr=1)}, "--synthetic-fraction 0"),
        ({"joint": JointOptions(generator_lr=1), "loss": LossWeights(feature=1)}, "frozen"),
        ({"input_size": -1}, "--input-size is -1"),
    ],
)
def test_wrong_settings_end_in_a_sentence(
    world: Path, tmp_path: Path, changes: dict, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        EncoderTrainConfig(**options(world, tmp_path, **changes))


def test_options_of_a_learning_generator_need_one(world: Path) -> None:
    with pytest.raises(ValueError, match="give --generator-lr"):
        JointOptions(pixel_weight=1.0)
    with pytest.raises(ValueError, match="--generator-lr is -1"):
        JointOptions(generator_lr=-1.0)


def test_missing_data_ends_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file or folder"):
        open_dataset(str(tmp_path / "nothing"), 16)
