"""The projected discriminator: what is frozen, what learns, what is saved.

pytest tests/test_projected.py
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from generators.adversarial import hinge_discriminator_loss
from generators.checkpoint import load, save
from generators.projected import ProjectedConfig, ProjectedDiscriminator

CONFIG = ProjectedConfig(input_size=32, levels=(0, 1, 2, 3), width=8)


@pytest.fixture
def judge() -> ProjectedDiscriminator:
    """On a random backbone."""
    judge = ProjectedDiscriminator(CONFIG, "random")
    judge.calibrate(pictures(8, "sharp"))
    return judge


def pictures(batch: int, kind: str, side: int = 32) -> Tensor:
    """Noise (B, 3, R, R) in [-1, 1], "blurred" or "sharp", of the same mean and deviation."""
    noise = torch.randn(batch, 3, side, side)
    if kind == "blurred":
        noise = F.avg_pool2d(noise, 5, 1, 2, count_include_pad=False)
    return (noise / noise.std() / 3).clamp(-1, 1)


def step(judge: ProjectedDiscriminator, optimiser: torch.optim.Optimizer) -> None:
    optimiser.zero_grad()
    real, fake = judge(pictures(4, "sharp")), judge(pictures(4, "blurred"))
    hinge_discriminator_loss(real, fake).mean().backward()
    optimiser.step()


# ---------------------------------------------------------------------------- shapes


def test_logits_of_all_scales(judge):
    maps = judge.features(pictures(2, "sharp"))
    assert [tuple(m.shape) for m in maps] == [
        (2, 8, 16, 16), (2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)
    ]  # fmt: skip
    logits = [net(x) for net, x in zip(judge.heads, maps, strict=True)]
    assert [tuple(x.shape[1:]) for x in logits] == [(1, 4, 4), (1, 4, 4), (1, 4, 4), (1, 2, 2)]
    assert judge.eval()(pictures(2, "sharp")).shape == (2, 3 * 16 + 4)


@pytest.mark.parametrize("side", [16, 48])
def test_other_resolutions_are_resized(judge, side):
    images = pictures(2, "sharp", side)
    resized = F.interpolate(images, size=(32, 32), mode="bilinear", antialias=True)
    assert torch.equal(judge.eval()(images), judge(resized))


def test_a_logit_depends_on_its_picture_alone(judge):
    """So it is the same however a batch is split over processes."""
    images = pictures(3, "sharp")
    one_by_one = torch.cat([judge.eval()(image[None]) for image in images])
    torch.testing.assert_close(judge(images), one_by_one, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wrong", [{"levels": ()}, {"width": 12}, {"input_size": 16}])
def test_wrong_sizes_are_refused(wrong):
    with pytest.raises(ValueError, match="a projected discriminator needs"):
        ProjectedConfig(**wrong)


# ------------------------------------------------------------------ frozen and trained


def test_only_heads_learn(judge):
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    free = {name for name, p in judge.named_parameters() if p.requires_grad}
    assert free == {f"heads.{name}" for name, _ in judge.heads.named_parameters()}
    optimiser = torch.optim.Adam([p for p in judge.parameters() if p.requires_grad], 1e-3)
    for _ in range(2):
        step(judge.train(), optimiser)
    moved = {n for n, value in judge.state_dict().items() if not torch.equal(value, before[n])}
    assert free <= moved
    assert all(name.startswith("heads.") for name in moved)
    assert not any(module.training for module in judge.pyramid.modules())


def test_gradients_reach_the_picture(judge):
    images = pictures(2, "sharp", side=16).requires_grad_()
    judge(images).mean().backward()
    assert images.grad is not None and images.grad.isfinite().all()
    assert (images.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert all(p.grad is None for p in judge.pyramid.parameters())


def test_calibration_gives_each_scale_unit_rms(judge):
    real = pictures(6, "sharp", side=48)
    judge.calibrate(real)
    resized = F.interpolate(real, size=(32, 32), mode="bilinear", antialias=True)
    for level, scale in zip(judge.pyramid(resized), judge.scales, strict=True):
        assert float((level / scale).square().mean()) == pytest.approx(1, rel=1e-4)
    assert not torch.allclose(judge.scales, torch.ones(4), rtol=0.01)


def test_frozen_mixing_keeps_the_size_of_features(judge):
    for mixed in judge.features(pictures(8, "sharp")):
        assert 0.3 < float(mixed.square().mean().sqrt()) < 3


# ----------------------------------------------------------------------------- files


def test_a_state_gives_the_same_logits(judge):
    """Also to a discriminator whose random parts, the backbone included, were others."""
    step(judge, torch.optim.Adam(judge.heads.parameters(), 1e-3))
    again = ProjectedDiscriminator(CONFIG, "random")
    images = pictures(2, "sharp")
    assert not torch.allclose(again.eval()(images), judge.eval()(images))
    again.load_state_dict(judge.state_dict())
    assert torch.equal(again(images), judge(images))
    assert torch.equal(again.train()(images), judge.train()(images))


def test_a_file_stands_alone(judge, tmp_path):
    save(tmp_path / "judge.safetensors", judge)
    again = load(tmp_path / "judge.safetensors", ProjectedDiscriminator)
    images = pictures(2, "sharp")
    assert torch.equal(again(images), judge.eval()(images))
    trained = {name for name, p in again.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("heads.") for name in trained)


def test_it_moves_as_a_whole(judge):
    assert {p.dtype for p in judge.double().pyramid.parameters()} == {torch.float64}
    assert judge(pictures(2, "sharp").double()).dtype == torch.float64


# -------------------------------------------------------------------------- training


def test_20_steps_tell_blurred_from_sharp():
    """On ImageNet features; on a random backbone the loss is still above 1.5 then."""
    judge = ProjectedDiscriminator(CONFIG, "wheel")
    judge.calibrate(pictures(8, "sharp"))
    sharp, blurred = pictures(16, "sharp"), pictures(16, "blurred")

    def held_out() -> float:
        with torch.no_grad():
            real, fake = judge.eval()(sharp), judge(blurred)
        return float(hinge_discriminator_loss(real, fake).mean())

    assert held_out() > 1.8  # 2 where D says nothing
    optimiser = torch.optim.Adam(judge.heads.parameters(), 4e-3, (0.0, 0.99))
    for _ in range(20):
        step(judge.train(), optimiser)
    assert held_out() < 0.5


@pytest.mark.parametrize(
    "change", [{"width": 0}, {"width": -8}, {"input_size": 1_000_000}, {"levels": ()}]
)
def test_a_config_that_builds_nothing_is_one_sentence(change):
    with pytest.raises(ValueError, match="a projected discriminator needs"):
        ProjectedConfig(**change)
