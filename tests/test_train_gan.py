"""GAN training end to end on 16 x 16 pictures: files, exact resume, freezing, non-finite losses.

pytest tests/test_train_gan.py
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import photo
from safetensors.torch import load_file

from generators import players, train
from generators.checkpoint import load, read_metadata
from generators.players import GanTrainConfig, build
from generators.runs import NonFiniteLoss


@pytest.fixture
def config(tmp_path: Path) -> GanTrainConfig:
    """4 steps of 4 pictures, the last two with the adversary."""
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        photo(i, 16, 16).save(tmp_path / "pictures" / f"{i}.png")
    return GanTrainConfig(
        data=str(tmp_path / "pictures"),
        output=tmp_path / "run",
        images=16,
        batch_size=4,
        resolution=16,
        latent_dim=8,
        mapping_layers=2,
        channel_base=64,
        channel_max=8,
        reconstruction_weight=1,
        perceptual_weight=0,
        warmup_images=8,
        log_every=1,
        save_every=2,
    )


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same(a: torch.nn.Module, b: torch.nn.Module) -> set[str]:
    theirs = b.state_dict()
    return {name for name, tensor in a.state_dict().items() if torch.equal(tensor, theirs[name])}


def test_a_run_leaves_these_files_and_resumes_exactly(config, tmp_path):
    train.train(config, cpu=True)
    assert sorted(str(p.relative_to(config.output)) for p in config.output.rglob("*.*")) == [
        "checkpoints/step-00000002.pt",
        "checkpoints/step-00000004.pt",
        "config.json",
        "discriminator.safetensors",
        "generator.safetensors",
        "metrics.jsonl",
        "samples/step-00000004.png",
    ]
    lines = metrics(config.output)
    assert [line["images"] for line in lines] == [4, 8, 12, 16]
    assert ["d" in line for line in lines] == [False, False, True, True]

    again = replace(config, output=tmp_path / "again")
    train.train(replace(again, images=12), cpu=True)  # stopped early
    (again.output / "checkpoints" / "step-00000003.pt").unlink()  # and killed before it was saved
    train.train(again, cpu=True)
    assert metrics(again.output) == lines
    whole, resumed = (load(run / "generator.safetensors", "generator")
                      for run in (config.output, again.output))  # fmt: skip
    assert same(whole, resumed) == set(whole.state_dict())
    metadata = read_metadata(again.output / "generator.safetensors")
    assert metadata["provenance"]["images_seen"] == "16"


def test_another_configuration_is_refused(config):
    train.train(config, cpu=True)
    with pytest.raises(ValueError, match="holds a run with another generator_lr"):
        train.train(replace(config, generator_lr=1e-4), cpu=True)


def test_frozen_blocks_stay_as_they_were(config):
    config = replace(
        config, warmup_images=0, freeze_generator_below=16, freeze_discriminator_blocks=1
    )
    generator, discriminator, _ = build(config)
    train.train(config, cpu=True)
    kept = same(generator, load(config.output / "generator.safetensors", "generator"))
    assert "mapping.w_avg" in kept and "mapping.fc0.weight" in kept
    weights = {name for name, _ in generator.named_parameters()}
    changed = weights - kept
    assert changed and all(name.startswith("synthesis.b16.") for name in changed)
    kept = same(discriminator, load(config.output / "discriminator.safetensors", "discriminator"))
    weights = {name for name, _ in discriminator.named_parameters()}
    assert {name for name in weights if name.startswith("b16.")} <= kept
    assert not any(name in kept for name in weights if name.endswith("conv0.weight")
                   and not name.startswith("b16."))  # fmt: skip


def test_a_non_finite_loss_stops_the_run_and_keeps_its_batch(config, monkeypatch):
    real_loss, calls = players.generator_loss, []

    def loss(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real_loss(logits) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(players, "generator_loss", loss)
    with pytest.raises(NonFiniteLoss, match="not finite at step 3"):
        train.train(config, cpu=True)
    assert not (config.output / "checkpoints" / "step-00000004.pt").exists()
    (file,) = config.output.glob("non-finite-*.safetensors")
    batch = load_file(file)
    assert batch["real"].shape == (4, 3, 16, 16) and batch["z"].shape == (4, 8)


def test_settings_that_train_nothing_are_refused(config):
    with pytest.raises(ValueError, match="give the reconstruction or the adversarial loss"):
        replace(config, reconstruction_weight=0, adversarial_weight=0)
    with pytest.raises(ValueError, match="at least 1"):
        replace(config, log_every=0)
