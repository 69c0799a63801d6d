"""GAN training end to end on 16 x 16 pictures: files, exact resume, freezing, non-finite losses.

pytest tests/test_train_gan.py
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from common import in_processes
from pictures import photo
from safetensors.torch import load_file, save_file

from generators import gan, train
from generators.checkpoint import load, read_metadata, save
from generators.command import NonFiniteLoss
from generators.data import first_pictures
from generators.dcgan import DcganGenerator
from generators.discriminator import Discriminator
from generators.gan import StyleGan2Training
from generators.latents import StyleLimit
from generators.networks import build
from generators.options import DcganOptions, StyleGan2Options, SuperresOptions
from generators.palette import Palette
from generators.projected import ProjectedDiscriminator
from generators.runs import read_checkpoint
from generators.steps import SuperresTraining
from generators.stylegan2 import Generator, SynthesisNetwork
from generators.superres import SuperResolution, SuperResolutionConfig


@pytest.fixture
def config(tmp_path: Path) -> StyleGan2Options:
    """4 steps of 4 pictures, the last two with the adversary."""
    (tmp_path / "pictures").mkdir()
    for i in range(5):
        photo(i, 16, 16).save(tmp_path / "pictures" / f"{i}.png")
    return StyleGan2Options(
        data=str(tmp_path / "pictures"),
        output=tmp_path / "run",
        images=16,
        batch_size=4,
        resolution=16,
        latent_dim=8,
        mapping_layers=2,
        channel_base=64,
        channel_max=8,
        discriminator="residual",
        reconstruction_weight=1,
        perceptual_weight=0,
        warmup_images=8,
        log_every=1,
        save_every=2,
        tracker="none",
    )


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def other(config: StyleGan2Options, options: type) -> DcganOptions | SuperresOptions:
    """The same sizes for another architecture."""
    common = ("output", "images", "batch_size", "resolution", "log_every", "save_every", "tracker")
    values = {name: asdict(config)[name] for name in common}
    if options is SuperresOptions:
        return SuperresOptions(data=(config.data,), **values)
    return DcganOptions(data=config.data, latent_dim=8, **values)


def same(a: torch.nn.Module, b: torch.nn.Module) -> set[str]:
    theirs = b.state_dict()
    return {name for name, tensor in a.state_dict().items() if torch.equal(tensor, theirs[name])}


def test_a_run_leaves_these_files_and_resumes_exactly(config, tmp_path):
    train.train(config, cpu=True)
    assert sorted(str(p.relative_to(config.output)) for p in config.output.rglob("*.*")) == [
        "checkpoints/step-00000002.safetensors",
        "checkpoints/step-00000004.safetensors",
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
    (again.output / "checkpoints" / "step-00000003.safetensors").unlink()  # as if killed
    train.train(again, cpu=True)
    assert metrics(again.output) == lines
    whole, resumed = (load(run / "generator.safetensors", Generator)
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
    before = build(config)
    generator, discriminator = before["generator"], before["discriminator"]
    train.train(config, cpu=True)
    kept = same(generator, load(config.output / "generator.safetensors", Generator))
    assert "mapping.w_avg" in kept and "mapping.fc0.weight" in kept
    weights = {name for name, _ in generator.named_parameters()}
    changed = weights - kept
    assert changed and all(name.startswith("synthesis.b16.") for name in changed)
    kept = same(discriminator, load(config.output / "discriminator.safetensors", Discriminator))
    weights = {name for name, _ in discriminator.named_parameters()}
    assert {name for name in weights if name.startswith("b16.")} <= kept
    assert not any(name in kept for name in weights if name.endswith("conv0.weight")
                   and not name.startswith("b16."))  # fmt: skip


def test_a_fine_tune_takes_its_generators_resolution(config, tmp_path):
    train.train(config, cpu=True)
    init = str(config.output / "generator.safetensors")
    again = replace(config, init=init, resolution=None, output=tmp_path / "fine", images=12)
    train.train(again, cpu=True)
    assert load(again.output / "generator.safetensors", Generator).resolution == 16
    assert metrics(again.output)[-1]["d"] > 0
    grown = replace(again, resolution=32, output=tmp_path / "grown")
    train.train(grown, cpu=True)
    assert load(grown.output / "generator.safetensors", Generator).resolution == 32


def test_a_fine_tune_of_another_kind_of_network_is_refused(config, tmp_path):
    save(tmp_path / "d.safetensors", SuperResolution(SuperResolutionConfig()))
    with pytest.raises(ValueError, match="holds a network of kind 'superres'"):
        train.train(replace(config, init=str(tmp_path / "d.safetensors")), cpu=True)


def test_a_non_finite_loss_stops_the_run_and_keeps_its_batch(config, monkeypatch):
    real_loss, calls = gan.generator_loss, []

    def loss(logits: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return real_loss(logits) * (float("nan") if len(calls) == 2 else 1)

    monkeypatch.setattr(gan, "generator_loss", loss)
    with pytest.raises(NonFiniteLoss, match="not finite at step 3"):
        train.train(config, cpu=True)
    assert not (config.output / "checkpoints" / "step-00000004.safetensors").exists()
    (file,) = config.output.glob("non-finite-*.safetensors")
    batch = load_file(file)
    assert batch["real"].shape == (4, 3, 16, 16)


def test_settings_that_train_nothing_are_refused(config):
    with pytest.raises(ValueError, match="Nothing is learnt"):
        replace(config, reconstruction_weight=0, adversarial_weight=0)
    with pytest.raises(ValueError, match="Nothing is learnt"):
        DcganOptions(data=config.data, output=config.output, adversarial_weight=0)


def test_the_projected_recipe_resumes_exactly_and_scores_itself(config, tmp_path):
    config = replace(
        config,
        discriminator="projected",
        augment="ada",
        style_mixing=0.5,
        reconstruction_images=12,
        eval_data=config.data,
        eval_samples=5,
        eval_every=2,
    )
    train.train(config, cpu=True)
    lines = metrics(config.output)
    assert ["l1" in line for line in lines] == [True, True, True, False]
    assert ["kid" in line for line in lines] == [False, True, False, True]
    assert all("ada_p" in line for line in lines[2:])
    scores = json.loads((config.output / "scores.json").read_text())
    best = min(line["kid"] for line in lines if "kid" in line)
    metadata = read_metadata(config.output / "best.safetensors")
    seen = {line["images"]: line.get("kid") for line in lines}
    assert seen[int(metadata["provenance"]["images_seen"])] == best
    assert [row["truncation"] for row in scores["best"]] == [0.5, 0.7, 0.8, 0.9, 1.0]

    again = replace(config, output=tmp_path / "again")
    train.train(replace(again, images=12), cpu=True)
    (again.output / "checkpoints" / "step-00000003.safetensors").unlink()
    train.train(again, cpu=True)
    assert metrics(again.output) == lines
    files = (c.output / "discriminator.safetensors" for c in (config, again))
    one, two = (load(file, ProjectedDiscriminator) for file in files)
    assert same(one, two) == set(one.state_dict())


def test_a_projected_discriminator_trains_its_heads_only(config):
    config = replace(config, discriminator="projected", reconstruction_weight=0)
    before = build(config)["discriminator"]
    train.train(config, cpu=True)
    after = load(config.output / "discriminator.safetensors", ProjectedDiscriminator)
    frozen = {name for name in before.state_dict() if not name.startswith("heads.")}
    kept = same(before, after)
    assert frozen - {"scales"} <= kept and "scales" not in kept
    assert not {n for n, _ in before.heads.named_parameters(prefix="heads")} & kept


def test_the_full_recipe_has_a_path_length(config):
    config = replace(
        config, reconstruction_weight=0, path_length_weight=2, style_mixing=0.9, augment="ada"
    )
    train.train(config, cpu=True)
    lines = metrics(config.output)
    assert lines[0]["path"] > 0 and lines[0]["r1"] > 0 and "path" not in lines[1]


@pytest.mark.parametrize("options", [DcganOptions, SuperresOptions])
def test_the_other_architectures_run_and_resume_exactly(config, tmp_path, options):
    config = other(config, options)
    train.train(config, cpu=True)
    again = replace(config, output=tmp_path / "again")
    train.train(replace(again, images=8), cpu=True)
    train.train(again, cpu=True)
    assert metrics(again.output) == metrics(config.output)
    one, two = (
        load(c.output / "generator.safetensors", DcganGenerator, SuperResolution)
        for c in (config, again)
    )
    assert same(one, two) == set(one.state_dict())


def test_super_resolution_learns_from_several_data_sets_in_turn(config, tmp_path):
    (tmp_path / "drawn").mkdir()
    photo(9, 16, 16).save(tmp_path / "drawn" / "one.png")
    data = (config.data, f"{tmp_path / 'drawn'}@12")
    config = replace(other(config, SuperresOptions), data=data)
    training = SuperresTraining(config, Accelerator(cpu=True))
    assert [d[0].shape[-1] for d in training.datasets] == [16, 12]
    drawn = first_pictures(training.datasets[1], 1)
    for step in (1, 3):
        real = training.batch(step)["real"]
        assert all(
            (picture == drawn).all() or (picture == drawn.flip(-1)).all() for picture in real
        )
    train.train(config, cpu=True)
    assert len(metrics(config.output)) == 4


def test_two_processes_equal_one_with_the_doubled_batch(config, tmp_path):
    """Losses and gradients of the first step (Adam's second step would follow the gradients' signs,
    rounding included)."""
    config = replace(
        config, discriminator="projected", reconstruction_weight=0, augment="none", images=8
    )
    one = replace(config, output=tmp_path / "one", batch_size=8)
    two = replace(config, output=tmp_path / "two", batch_size=4)
    train.train(one, cpu=True)
    in_processes(train.train, two, True, count=2)
    single, double = metrics(one.output), metrics(two.output)
    assert [line["images"] for line in double] == [8]
    for name in ("g", "d"):
        assert double[0][name] == pytest.approx(single[0][name], rel=1e-5)
    for role in ("generator", "discriminator"):
        first, second = (
            read_checkpoint(c.output / "checkpoints" / "step-00000001.safetensors")[0]
            for c in (one, two)
        )
        names = [n for n in first if n.startswith(f"optimiser of {role}/")]
        squares = [name for name in names if name.endswith("exp_avg_sq")]  # 0.01 g²
        assert squares
        for name in squares:
            if first[name].ndim:  # not of a noise strength: each process draws its own noise
                total = second[name].sum()
                torch.testing.assert_close(total, first[name].sum(), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"freeze_generator_below": 8, "path_length_weight": 2}, "--path-length-weight 0"),
        ({"palette_weight": 1.0}, "--palette-weight needs the photos. generator; give --source"),
        (
            {"discriminator": "projected", "freeze_discriminator_blocks": 1},
            "needs --discriminator residual",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(config, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(config, **changes)


def test_half_of_the_fakes_are_drawn_at_given_latents(config, tmp_path, monkeypatch):
    given = torch.full((3, 6, 8), 7.0) + torch.arange(3)[:, None, None]
    (tmp_path / "latents").mkdir()
    for i, ws in enumerate(given):
        save_file({"ws": ws.clone()}, tmp_path / "latents" / f"{i}.safetensors")
    config = replace(config, latents=tmp_path / "latents", images=12)
    seen = []
    monkeypatch.setattr(
        "generators.stylegan2.SynthesisNetwork.forward", spy(SynthesisNetwork.forward, seen)
    )
    train.train(config, cpu=True)
    *_, mixed = [ws for ws in seen if len(ws) == 4]  # half reconstructions, half samples
    is_given = (mixed[:, None] == given).all(dim=(2, 3)).any(dim=1)
    assert is_given.tolist() == [False, False, False, True]  # of two samples one


def test_given_latents_of_a_fine_tune_are_limited_as_a_translation_limits_them(config, tmp_path):
    train.train(replace(config, images=4), cpu=True)
    source = config.output / "generator.safetensors"
    ws = 30 * torch.randn(3, 6, 8)
    save_file({"ws": ws}, tmp_path / "ws.safetensors")
    tuned = replace(
        config, init=str(source), latents=tmp_path / "ws.safetensors", freeze_generator_below=8,
        style_limit=1.5,
    )  # fmt: skip
    training = StyleGan2Training(tuned, Accelerator(cpu=True))
    limited = StyleLimit(load(source, Generator), 8)(ws)
    torch.testing.assert_close(training.latents, limited)
    assert (limited - ws).abs().max() > 1
    training = StyleGan2Training(replace(tuned, style_limit=None), Accelerator(cpu=True))
    assert torch.equal(training.latents, ws)


def test_a_palette_asks_for_the_photos_colours_but_in_the_face():
    torch.manual_seed(0)
    light = torch.linspace(-0.5, 0.5, 6)[:, None, None, None]
    photos = light + 0.1 * torch.randn(6, 3, 16, 16)
    drawings = 0.5 - light + 0.1 * torch.randn(6, 3, 16, 16)  # lighter ones altogether
    palette = Palette(lambda ws: photos, torch.zeros(6, 1, 1), drawings)
    chosen = torch.arange(6)
    assert palette(drawings.flip(0), chosen).max() < 0.5 * palette(drawings, chosen).min()
    face = drawings.flip(0).clone()
    face[:, :, 6:14, 4:12] = 9.0
    assert torch.equal(palette(face, chosen), palette(drawings.flip(0), chosen))
    face[:, :, 0, 0] = 9.0
    assert (palette(face, chosen) > palette(drawings.flip(0), chosen)).all()


def test_a_fine_tune_follows_the_palette(config, tmp_path):
    train.train(replace(config, images=4), cpu=True)
    source = str(config.output / "generator.safetensors")
    save_file({"ws": torch.randn(8, 6, 8)}, tmp_path / "ws.safetensors")
    pulled = replace(
        config, output=tmp_path / "pulled", init=source, freeze_generator_below=8, images=160,
        latents=tmp_path / "ws.safetensors", palette_weight=10.0, source=source,
        reconstruction_weight=0, adversarial_weight=1e-6, generator_lr=1e-2,
    )  # fmt: skip
    train.train(pulled, cpu=True)
    lines = [line["palette"] for line in metrics(pulled.output)]
    assert sum(lines[-8:]) < 0.8 * sum(lines[:8])


def spy(forward, seen):
    def looked_at(self, ws, *rest, **options):
        seen.append(ws.detach().clone())
        return forward(self, ws, *rest, **options)

    return looked_at
