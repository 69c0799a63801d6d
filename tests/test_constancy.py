"""Drawings pulled to photos in features: values by hand, whom the gradients reach, exact resume.

pytest tests/test_constancy.py
"""

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from pictures import photo
from safetensors.torch import save_file
from test_train_gan import metrics, same

from encoder.model import Encoder, EncoderConfig
from generators import train
from generators.checkpoint import load, resolve, save
from generators.constancy import constancy, feature_network, photo_source
from generators.gan import StyleGan2Training
from generators.options import StyleGan2Options
from generators.stylegan2 import Generator, GeneratorConfig

PULLED = {"constancy_weight": 1.0, "constancy_levels": (1, 2), "adaptive_weight": 1.0}


@pytest.fixture
def config(tmp_path: Path, generator_from_seed) -> StyleGan2Options:
    """4 steps of 4 pictures: a fine-tune of `face.safetensors`, which draws the photos."""
    (tmp_path / "drawings").mkdir()
    for i in range(5):
        photo(i, 16, 16).save(tmp_path / "drawings" / f"{i}.png")
    save(tmp_path / "face.safetensors", generator_from_seed(1))
    save(tmp_path / "anime.safetensors", generator_from_seed(2))
    save_file({"ws": torch.randn(8, 6, 8)}, tmp_path / "ws.safetensors")
    return StyleGan2Options(
        data=str(tmp_path / "drawings"),
        output=tmp_path / "run",
        images=16,
        batch_size=4,
        init=str(tmp_path / "anime.safetensors"),
        freeze_generator_below=8,
        latents=tmp_path / "ws.safetensors",
        source=str(tmp_path / "face.safetensors"),
        discriminator="residual",
        log_every=1,
        save_every=2,
        tracker="none",
    )


def test_the_distance_by_hand_and_its_gradient():
    def f(x: torch.Tensor) -> list[torch.Tensor]:
        return [x, 3 * x[:, :2, :, :1]]  # the second map: fewer channels, another scale, left side

    photos = torch.zeros(1, 3, 1, 2)
    photos[0, 0] = 1.0  # (1, 0, 0) at both places
    drawings = photos.clone()
    drawings[0, :, 0, 0] = torch.tensor([0.0, 2.0, 0.0])  # at a right angle, twice as long
    photos.requires_grad_(True)
    drawings.requires_grad_(True)
    loss = constancy(f, drawings, photos)
    # squared distance of unit vectors: 2 at one of two places, and 2 at the only one
    torch.testing.assert_close(loss, torch.tensor([3.0]))
    loss.sum().backward()
    assert photos.grad is None and drawings.grad is not None and drawings.grad.abs().sum() > 0
    torch.testing.assert_close(constancy(f, 5 * photos.detach(), photos), torch.zeros(1))


def test_a_file_on_a_base_has_its_backbone(tmp_path):
    encoder, file = load(resolve("encoder64"), Encoder), tmp_path / "encoder.safetensors"
    encoder.queries.data.mul_(2)  # a power of two is exact in half precision
    save(file, encoder, half=True, base="encoder64")
    assert file.stat().st_size < 100_000
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    made, base = (feature_network(name, None, (2,))(images) for name in (str(file), "encoder64"))
    assert torch.equal(made[0], base[0]) and made[0].abs().max() > 0


def test_an_encoders_backbone_is_the_network(tmp_path):
    shape = EncoderConfig("tf_efficientnet_lite0", num_ws=6, w_dim=8, width=16, heads=2, depth=1)
    encoder = Encoder(shape)
    for name, tensor in encoder.backbone.state_dict().items():
        if "running_mean" in name:
            tensor.normal_(std=0.1)  # a fold that forgets them is seen
    save(tmp_path / "encoder.safetensors", encoder)
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    wanted = encoder.eval().backbone(images * encoder.scale + encoder.shift)
    made = feature_network(str(tmp_path / "encoder.safetensors"), None, (2, 3))(images)
    assert [level.shape for level in made] == [level.shape for level in wanted[2:4]]
    for level, maps in zip(made, wanted[2:4], strict=True):
        torch.testing.assert_close(level, maps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("discriminator", ["residual", "projected"])
def test_the_pulls_reach_the_generator_alone(config, discriminator):
    config = replace(config, discriminator=discriminator)
    plain = StyleGan2Training(config, Accelerator(cpu=True))
    pulled = StyleGan2Training(replace(config, **PULLED), Accelerator(cpu=True))
    before = deepcopy(pulled.discriminator)
    logs, view = pulled.generator_step(pulled.draw(0), 0, 1.0)
    plain_logs, plain_view = plain.generator_step(plain.draw(0), 0, 1.0)
    # the discriminator is as without them: weights, power iterations, what it sees, its loss
    assert same(pulled.discriminator, plain.discriminator) == set(before.state_dict())
    assert all(parameter.grad is None for parameter in pulled.discriminator.parameters())
    for one, two in zip(view, plain_view, strict=True):
        assert torch.equal(one, two)
    assert logs.keys() - plain_logs.keys() == {"constancy", "adaptive"}
    assert logs["g"] == plain_logs["g"] and logs["constancy"] > 0 and logs["adaptive"] > 0
    assert pulled.discriminator.training
    moved = set(pulled.generator.state_dict()) - same(pulled.generator, plain.generator)
    assert moved and all(name.startswith(("synthesis.b8.", "synthesis.b16.")) for name in moved)
    source = load(Path(str(config.source)), Generator).synthesis
    assert same(pulled.source, source) == set(source.state_dict())
    assert not any(parameter.requires_grad for parameter in pulled.source.parameters())


@pytest.mark.parametrize("augment", ["diffaugment", "ada"])
def test_what_is_its_own_photo_is_not_pulled(config, augment):
    """So both are looked at with the same augmentations, at the same latents."""
    config = replace(config, init=config.source, augment=augment, **PULLED)
    training = StyleGan2Training(config, Accelerator(cpu=True))
    if augment == "ada":
        training.state.modules["ada"].p.fill_(0.8)
    for name, parameter in training.generator.named_parameters():
        if name.endswith("noise_strength"):
            parameter.data.zero_()
            training.source.get_parameter(name.removeprefix("synthesis.")).data.zero_()
    logs, _ = training.generator_step(training.draw(0), 0, 1.0)
    assert logs["constancy"] < 1e-5 and logs["adaptive"] < 1e-5


def test_a_run_with_all_pulls_resumes_exactly(config, tmp_path):
    config = replace(config, discriminator="projected", palette_weight=0.5, **PULLED)
    train.train(config, cpu=True)
    lines = metrics(config.output)
    assert all({"palette", "constancy", "adaptive"} <= line.keys() for line in lines)
    again = replace(config, output=tmp_path / "again")
    train.train(replace(again, images=12), cpu=True)
    (again.output / "checkpoints" / "step-00000003.safetensors").unlink()  # as if killed
    train.train(again, cpu=True)
    assert metrics(again.output) == lines
    one, two = (load(run / "generator.safetensors", Generator)
                for run in (config.output, again.output))  # fmt: skip
    assert same(one, two) == set(one.state_dict())


@pytest.mark.parametrize("row", ["constancy", "adaptive"])
def test_a_fine_tune_comes_nearer_to_the_photos(config, row):
    config = replace(config, images=160, adversarial_weight=1e-6, generator_lr=1e-2,
                     discriminator_lr=1e-6, constancy_levels=(1,), **{f"{row}_weight": 10.0},
                     )  # fmt: skip
    train.train(config, cpu=True)
    losses = [line[row] for line in metrics(config.output)]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_photos_are_drawn_at_latents_as_they_were_found(config, tmp_path):
    save_file({"ws": 30 * torch.randn(8, 6, 8)}, tmp_path / "far.safetensors")
    config = replace(config, latents=tmp_path / "far.safetensors", style_limit=1.5, **PULLED)
    training = StyleGan2Training(config, Accelerator(cpu=True))
    draw = training.draw(0)
    _, ws, chosen = training.synthesise(draw.z(training.generator), draw)
    assert len(chosen) == 2 and torch.equal(ws[2:], training.found[chosen])
    assert not torch.equal(training.found, training.latents)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"constancy_weight": 1.0, "source": None}, "--constancy-weight needs the ph.*--source"),
        ({"adaptive_weight": 1.0, "source": None}, "--adaptive-weight needs the ph.*--source"),
        ({"palette_weight": 1.0, "latents": None}, "--palette-weight needs the photos' latents"),
        ({"adaptive_weight": -1.0}, "--adaptive-weight is -1.0; give a number of 0 or more"),
        ({"constancy_levels": ()}, "--constancy-levels are one or more"),
        ({"constancy_weight": 1.0, "adversarial_weight": 0.0, "reconstruction_weight": 1.0},
         "--constancy-weight needs an --adversarial-weight above 0"),
    ],
)  # fmt: skip
def test_settings_without_what_they_need_are_refused(config, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(config, **changes)


def test_networks_and_sources_that_do_not_fit_are_refused(tmp_path, generator_from_seed):
    face = tmp_path / "face.safetensors"
    save(face, generator_from_seed(1))
    with pytest.raises(ValueError, match=r"face.safetensors has no backbone of timm's; give an"):
        feature_network(str(face), None, (3,))
    with pytest.raises(ValueError, match="no_such_net: no such file"):
        feature_network("no_such_net", None, (3,))
    with pytest.raises(ValueError, match="has no level 9; give lower --constancy-levels"):
        feature_network("tf_efficientnet_lite0", "wheel", (3, 9))
    larger = GeneratorConfig(resolution=32, z_dim=8, w_dim=8, widths=(8, 8, 8, 8))
    with pytest.raises(ValueError, match=r"draws 16² pixels from 6 x 8 latents, the drawings have"):
        photo_source(str(face), generator_from_seed(1, larger))
