"""The encoder's training: resume after kill -9, processes, accumulation, non-finite losses."""

import json
from pathlib import Path

import pytest
import torch
from processes import ROOT, kill_9, run, run_two

from encoder.players import EncoderTrainConfig, LossWeights
from encoder.train import train
from generators import checkpoint
from generators.data import open_dataset
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.images import to_pil
from generators.projected import ProjectedConfig, ProjectedDiscriminator
from generators.runs import NonFiniteLoss
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


def command(values: dict) -> list[str]:
    flat = {f"--{k.replace('_', '-')}": str(v) for k, v in values.items()}
    return [str(ROOT / "train_encoder.py"), *(part for pair in flat.items() for part in pair)]


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_kill_9_and_the_same_command_again_equals_an_uninterrupted_run(
    world: Path, tmp_path: Path
) -> None:
    adversarial = {
        "discriminator": str(world / "d.safetensors"),
        "loss.adversarial": 0.1,
        "loss.feature": 0.1,
        "steps": 12,
        "save-every": 3,
    }
    whole = options(world, tmp_path / "whole", **adversarial)
    run(command(whole), tmp_path)

    broken = command(options(world, tmp_path / "broken", **adversarial))
    kill_9(broken, tmp_path, tmp_path / "broken")
    assert not (tmp_path / "broken" / "encoder.safetensors").exists()
    run(broken, tmp_path)

    assert metrics(tmp_path / "whole") == metrics(tmp_path / "broken")
    assert [line["step"] for line in metrics(tmp_path / "whole")] == list(range(1, 13))
    first, second = (
        checkpoint.load(tmp_path / run / "encoder.safetensors", "encoder")
        for run in ("whole", "broken")
    )
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_two_processes_equal_one_with_the_doubled_batch(world: Path, tmp_path: Path) -> None:
    """Same first loss to 1e-5 and same second one (after one update) to 1e-3, relatively."""
    one = options(world, tmp_path / "one", batch_size=8, steps=2)
    two = options(world, tmp_path / "two", batch_size=4, steps=2)
    train(EncoderTrainConfig(**one), cpu=True)
    run_two(command(two), tmp_path)
    single, double = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    for name in ("loss", "mse", "latent"):
        assert double[0][name] == pytest.approx(single[0][name], rel=1e-5)
        assert double[1][name] == pytest.approx(single[1][name], rel=1e-3)


def test_a_projected_discriminator_serves_as_critic(world: Path, tmp_path: Path) -> None:
    critic = ProjectedDiscriminator(ProjectedConfig(input_size=32, levels=(1, 2)))
    checkpoint.save(tmp_path / "d.safetensors", critic)
    loss = LossWeights(adversarial=0.1, feature=0.1)
    given = {"discriminator": str(tmp_path / "d.safetensors"), "loss": loss, "steps": 2}
    train(EncoderTrainConfig(**options(world, tmp_path / "run", **given)), cpu=True)
    assert all(line["adversarial"] > 0 < line["feature"] for line in metrics(tmp_path / "run"))
    state = torch.load(tmp_path / "run" / "checkpoints" / "step-00000002.pt", weights_only=True)
    learnt = {name for name, value in critic.state_dict().items()
              if not torch.equal(value, state["critic"][name])}  # fmt: skip
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
        "checkpoints/step-00000040.pt",
        "checkpoints/step-00000060.pt",
    }
    assert (
        checkpoint.read_metadata(tmp_path / "run" / "encoder.safetensors")["provenance"]["steps"]
        == "60"
    )


def test_a_non_finite_loss_stops_the_run_and_keeps_its_batch(world: Path, tmp_path: Path) -> None:
    values = options(
        world, tmp_path / "run", steps=50, lr=1e30, log_every=5, warmup=0, max_grad_norm=1e9
    )
    with pytest.raises(NonFiniteLoss, match="not finite at step"):
        train(EncoderTrainConfig(**values), cpu=True)
    (file,) = (tmp_path / "run").glob("non-finite-*.safetensors")
    from safetensors.torch import load_file

    images = load_file(file)["images_0"]
    assert images.shape == (8, 3, 16, 16) and images.isfinite().all()
    for state in (tmp_path / "run" / "checkpoints").glob("*.pt"):
        weights = torch.load(state, weights_only=True)["encoder"]
        assert all(v.isfinite().all() for v in weights.values())


def test_bfloat16_trains(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    output = run(command(options(world, tmp_path / "half")), tmp_path)
    assert "bf16 precision" in output
    assert all(0 < line["loss"] < 100 for line in metrics(tmp_path / "half"))


def test_another_configuration_in_the_same_folder_is_refused(world: Path, tmp_path: Path) -> None:
    train(EncoderTrainConfig(**options(world, tmp_path / "run")), cpu=True)
    with pytest.raises(ValueError, match="another lr"):
        train(EncoderTrainConfig(**options(world, tmp_path / "run", lr=1.0)), cpu=True)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 0}, "at least 1"),
        ({"synthetic_fraction": 2}, "between 0 and 1"),
        ({"loss": LossWeights(adversarial=1)}, "--discriminator"),
        ({"loss": LossWeights(mse=0, latent=0)}, "every loss weight is 0"),
    ],
)
def test_wrong_settings_end_in_a_sentence(
    world: Path, tmp_path: Path, changes: dict, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        EncoderTrainConfig(**options(world, tmp_path, **changes))


def test_missing_data_ends_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no file or folder"):
        open_dataset(str(tmp_path / "nothing"), 16)
