"""The networks of a generator's training and their optimisers, by architecture.

    config = StyleGan2Options(data="faces.parquet", output=Path("runs/face64"))
    networks = build(config)                 # {"generator": …, "discriminator": …}, at step 0

What they do in a step: `generators.gan`, `generators.steps`; the loop around it: `generators.loop`.
Shape letters: B batch, Z z dimension, R resolution.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators import checkpoint
from generators.blocks import freeze_discriminator, freeze_generator, with_resolution
from generators.cyclegan import CycleGenerator, PatchDiscriminator, PatchDiscriminatorConfig
from generators.dcgan import DcganDiscriminator, DcganDiscriminatorConfig, DcganGenerator
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.features import FeaturePyramid
from generators.options import (
    CycleganOptions,
    DcganOptions,
    GeneratorOptions,
    StyleGan2Options,
    SuperresOptions,
)
from generators.projected import ProjectedConfig, ProjectedDiscriminator, learning_part
from generators.runs import seed_of
from generators.stylegan2 import Generator
from generators.superres import SuperResolution, SuperResolutionConfig

DISCRIMINATORS = ("drawing_discriminator", "photo_discriminator")  # of a CycleGAN
MOST_SEEN = 256  # side of the pictures that a projected discriminator looks at, by default


class RunningMean(nn.Module):
    """The mean path length, with a memory of about a hundred penalties; part of a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros([]))
        self.mean: Tensor

    def update(self, value: Tensor) -> None:
        self.mean.lerp_(value, 0.01)


def build(config: GeneratorOptions) -> dict[str, Any]:
    """The trained networks at step 0 by role, the same in every process."""
    torch.manual_seed(seed_of(config.seed, "weights"))  # no z of a user is a row of a weight
    builders: dict[type, Callable[[Any], dict[str, Any]]]
    builders = {
        StyleGan2Options: stylegan2,
        DcganOptions: dcgan,
        SuperresOptions: superres,
        CycleganOptions: cyclegan,
    }
    trained = builders[type(config)](config)
    for network in trained.values():
        network.train()
    return trained


def stylegan2(config: StyleGan2Options) -> dict[str, Any]:
    generator: Any = initial(config.init, Generator)
    if generator is not None and (config.resolution or 0) > generator.resolution:
        generator = with_resolution(generator, config.side, config.seed)
    elif generator is None:
        generator = Generator(config.shape)
        if config.reconstruction_weight:  # a calm start: the sum of all toRGB is within [-1, 1]
            for r in generator.config.block_resolutions:
                generator.synthesis.get_submodule(f"b{r}.torgb").weight.data.mul_(0.3)
    discriminator: Any
    if config.discriminator == "projected":
        discriminator = initial(config.init_discriminator, ProjectedDiscriminator)
        if discriminator is None:
            side = max(ProjectedConfig.input_size, min(generator.resolution, MOST_SEEN))
            shape = ProjectedConfig(input_size=side)
            discriminator = ProjectedDiscriminator(shape, config.feature_weights)
    else:
        discriminator = initial(config.init_discriminator, Discriminator)
        if discriminator is None:
            widths = tuple(generator.config.channels.values())
            discriminator = Discriminator(DiscriminatorConfig(generator.resolution, widths=widths))
    trained = {"generator": generator, "discriminator": discriminator}
    if config.reconstruction_weight:
        trained["variational"] = VariationalEncoder(generator.resolution, generator.z_dim)
    if config.freeze_generator_below:
        freeze_generator(generator, config.freeze_generator_below)
    if config.freeze_discriminator_blocks:
        freeze_discriminator(discriminator, config.freeze_discriminator_blocks)
    return trained


def dcgan(config: DcganOptions) -> dict[str, Any]:
    generator: Any = initial(config.init, DcganGenerator) or DcganGenerator(config.shape)
    discriminator = initial(config.init_discriminator, DcganDiscriminator)
    if discriminator is None:
        shape = DcganDiscriminatorConfig(generator.resolution, generator.config.width)
        discriminator = DcganDiscriminator(shape)
    return {"generator": generator, "discriminator": discriminator}


def superres(config: SuperresOptions) -> dict[str, Any]:
    network = initial(config.init, SuperResolution)
    return {"generator": network or SuperResolution(SuperResolutionConfig())}


def cyclegan(config: CycleganOptions) -> dict[str, Any]:
    generator: Any = initial(config.init, CycleGenerator) or CycleGenerator(config.shape)
    inverse: Any = initial(config.init_inverse, CycleGenerator) or CycleGenerator(generator.config)
    patches = PatchDiscriminatorConfig(config.patch_width, config.patch_halvings)
    judges = {name: PatchDiscriminator(patches) for name in DISCRIMINATORS}
    return {"generator": generator, "inverse": inverse} | judges


def initial(source: str | None, network_class: type[nn.Module]) -> Any:
    """The network to begin with, all of its weights trainable but a frozen feature net's."""
    if source is None:
        return None
    network = checkpoint.load(checkpoint.resolve(source), network_class)
    learning_part(network).requires_grad_(True)
    return network


def perceptual_network(
    config: GeneratorOptions, weight: float, levels: int, device: torch.device
) -> FeaturePyramid | None:
    """Its `levels` finest levels; None where the loss has no weight."""
    if not weight:
        return None
    return FeaturePyramid(weights=config.feature_weights, out_indices=range(levels)).to(device)


def adam(network: nn.Module, lr: float, betas: tuple[float, float]) -> torch.optim.Adam:
    """Of what is not frozen."""
    return torch.optim.Adam([p for p in network.parameters() if p.requires_grad], lr, betas)


# ------------------------------------------------------------------ the warm-up's encoder
#
# On small compute an adversarial game from scratch goes nowhere for hours. So the generator,
# mapping network included, first learns as the decoder of a small variational autoencoder (Kingma
# & Welling 2014; with an adversary on top, Larsen et al. 2016): hair, skin tone and pose are there
# after some thousand pictures, and samples of the prior are faces. The encoder is thrown away.

WIDTHS = (48, 96, 160, 224)  # of its maps from R / 2 down


class VariationalEncoder(nn.Module):
    """Images (B, 3, R, R) -> mean and log-variance of z, each (B, Z), from a 4 x 4 map."""

    def __init__(self, resolution: int, z_dim: int) -> None:
        super().__init__()
        halvings = resolution.bit_length() - 3
        widths = [3] + [WIDTHS[min(i, len(WIDTHS) - 1)] for i in range(halvings)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, b) for b in widths[1:])
        self.fc = nn.Linear(widths[-1] * 16, 512)
        self.out = nn.Linear(512, 2 * z_dim)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.contiguous(memory_format=torch.channels_last)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), 0.2)
        mean, log_variance = self.out(F.leaky_relu(self.fc(x.flatten(1)), 0.2)).chunk(2, dim=1)
        return mean, log_variance.clamp(-8, 4)


def kl_to_prior(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, var) || N(0, 1)) in nats, (B, Z) -> (B,) (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
