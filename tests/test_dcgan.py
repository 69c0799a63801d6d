"""The DCGAN pair: shapes, start values, normalisation, and a training of some seconds.

pytest tests/test_dcgan.py
"""

import pytest
import torch
from torch import Tensor, nn

from generators.adversarial import discriminator_loss, generator_loss, r1_penalty
from generators.checkpoint import load, save
from generators.dcgan import (
    DcganConfig,
    DcganDiscriminator,
    DcganDiscriminatorConfig,
    DcganGenerator,
    with_noise,
)


@pytest.fixture
def generator() -> DcganGenerator:
    return DcganGenerator(DcganConfig(16, z_dim=6, width=8))


@pytest.fixture
def judge() -> DcganDiscriminator:
    return DcganDiscriminator(DcganDiscriminatorConfig(16, width=8))


# ----------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("resolution", [8, 16, 64])
def test_shapes_and_range(resolution):
    generator = DcganGenerator(DcganConfig(resolution, z_dim=6, width=4))
    images = generator(10 * torch.randn(3, generator.z_dim))
    assert images.shape == (3, 3, resolution, resolution) and generator.resolution == resolution
    assert -1 <= images.min() < images.max() <= 1
    judge = DcganDiscriminator(DcganDiscriminatorConfig(resolution, width=4))
    assert judge(images).shape == (3, 1)


def test_channels():
    """Half of those in figure 1 of the paper, whose generator has 1024 channels at 4 x 4."""
    convs = [m for m in DcganGenerator(DcganConfig()).modules() if type(m) is nn.ConvTranspose2d]
    assert [(c.in_channels, c.out_channels) for c in convs] == [
        (100, 512), (512, 256), (256, 128), (128, 64), (64, 3)
    ]  # fmt: skip
    judge = DcganDiscriminator(DcganDiscriminatorConfig(128))
    assert [m.out_channels for m in judge.modules() if type(m) is nn.Conv2d] == [
        64, 128, 256, 512, 512, 1
    ]  # fmt: skip


@pytest.mark.parametrize("config", [DcganConfig, DcganDiscriminatorConfig])
def test_wrong_sizes_are_refused(config):
    with pytest.raises(ValueError, match="resolution of 8 or more"):
        config(resolution=4)
    with pytest.raises(ValueError, match="power of two"):
        config(resolution=48)
    with pytest.raises(ValueError, match="width of 1 or more"):
        config(width=0)
    with pytest.raises(ValueError, match="z_dim must be 1 or more"):
        DcganConfig(z_dim=0)


# -------------------------------------------------------------------------- networks


@pytest.mark.parametrize("build", [
    lambda: DcganGenerator(DcganConfig(32, width=16)),
    lambda: DcganDiscriminator(DcganDiscriminatorConfig(32, width=16)),
])  # fmt: skip
def test_start_values(build):
    network = build()
    convs = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]
    assert len(convs) == 4
    for conv in convs:
        spread = 0.02 / (2 * conv.weight.numel()) ** 0.5  # standard error of the deviation
        assert abs(float(conv.weight.detach().std()) - 0.02) < 4 * spread
        assert conv.bias is None or not conv.bias.any()


def test_gradients_reach_every_parameter(generator, judge):
    generator_loss(judge(generator(torch.randn(4, 6)))).mean().backward()
    for network in (generator, judge):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_a_logit_depends_on_its_picture_alone(judge):
    """Also in training mode: so it is the same however a batch is split over processes."""
    images = torch.randn(4, 3, 16, 16)
    one_by_one = torch.cat([judge.train()(image[None]) for image in images])
    torch.testing.assert_close(judge(images), one_by_one, rtol=1e-4, atol=1e-5)
    assert not list(judge.buffers())


def test_r1_has_second_derivatives(judge):
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    r1_penalty(judge(images), images).sum().backward()
    assert judge.out.weight.grad is not None and judge.out.weight.grad.abs().max() > 0


def test_evaluation_is_of_each_z_alone_and_changes_nothing(generator):
    z = torch.randn(4, 6)
    assert not torch.allclose(generator(z)[:2], generator(z[:2]), atol=1e-4)  # batch statistics
    before = {name: buffer.clone() for name, buffer in generator.named_buffers()}
    images = generator.eval()(z)
    torch.testing.assert_close(images[:2], generator(z[:2]), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(before[name], buffer) for name, buffer in generator.named_buffers())


def test_autocast(generator, judge):
    with torch.autocast("cpu", torch.bfloat16):
        images = generator(torch.randn(4, 6))
        logits = judge(images)
    assert images.dtype == torch.float32 and logits.isfinite().all()


def test_noise_comes_from_the_given_generator():
    images, state = torch.ones(64, 3, 8, 8), torch.get_rng_state()

    def noisy(std: float, seed: int) -> Tensor:
        return with_noise(images, std, torch.Generator().manual_seed(seed))

    assert torch.equal(noisy(0.02, 1), noisy(0.02, 1))
    assert not torch.equal(noisy(0.02, 1), noisy(0.02, 2))
    assert torch.equal(noisy(0, 1), images)
    assert float((noisy(0.02, 1) - images).std()) == pytest.approx(0.02, rel=0.05)
    assert torch.equal(state, torch.get_rng_state())


def test_a_file_gives_the_same_networks(generator, judge, tmp_path):
    generator(torch.randn(4, 6))  # moves the running statistics
    z, images = torch.randn(2, 6), torch.randn(2, 3, 16, 16)
    for kind, network, x in (("dcgan", generator, z), ("dcgan_discriminator", judge, images)):
        save(tmp_path / kind, network)
        assert torch.equal(load(tmp_path / kind, type(network))(x), network.eval()(x))


# -------------------------------------------------------------------------- training


def test_the_pair_learns_two_colours():
    """Two plain colours: after 100 steps of the whole recipe a sample is nearer to one of them than
    the untrained grey (distance 1) and their mean (1.1) are."""
    torch.manual_seed(1)
    generator = DcganGenerator(DcganConfig(8, z_dim=4, width=16))
    judge = DcganDiscriminator(DcganDiscriminatorConfig(8, width=16))
    generator_adam = torch.optim.Adam(generator.parameters(), 1e-3, (0.5, 0.999))
    judge_adam = torch.optim.Adam(judge.parameters(), 4e-3, (0.5, 0.999))
    colours = torch.tensor([[0.8, -0.4, -0.8], [-0.6, 0.2, 0.8]])
    rng = torch.Generator().manual_seed(2)

    def judged(images: Tensor) -> Tensor:
        return judge(with_noise(images, 0.02, rng))

    def distance() -> float:
        """Mean distance of samples' pixels to the nearer colour."""
        with torch.no_grad():
            images = generator(torch.randn(64, 4, generator=torch.Generator().manual_seed(3)))
        apart = images[:, None] - colours[:, :, None, None]  # (B, 2, 3, R, R)
        return float(apart.norm(dim=2).mean(dim=(2, 3)).amin(dim=1).mean())

    assert distance() > 0.9
    for _ in range(100):
        which = torch.randint(2, (16,), generator=rng)
        real = colours[which][:, :, None, None].expand(-1, -1, 8, 8)
        fake = generator(torch.randn(16, 4, generator=rng))
        judge_adam.zero_grad()
        discriminator_loss(judged(real), judged(fake.detach()), smoothing=0.1).mean().backward()
        judge_adam.step()
        generator_adam.zero_grad()
        generator_loss(judged(fake)).mean().backward()
        generator_adam.step()
    assert distance() < 0.6
