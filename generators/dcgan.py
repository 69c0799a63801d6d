"""The plain DCGAN pair (Radford et al. 2016, arXiv:1511.06434, section 3), as a baseline.

    generator = DcganGenerator(DcganConfig(resolution=64))
    discriminator = DcganDiscriminator(DcganDiscriminatorConfig(resolution=64))
    images = generator(torch.randn(8, generator.z_dim))          # (8, 3, 64, 64) in [-1, 1]
    logits = discriminator(with_noise(images, 0.02, rng))        # (8, 1)

Shape letters: B batch, Z z dimension, R resolution, C channels.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from generators.stylegan2 import resolutions_up_to


def channels(resolution: int, width: int) -> list[int]:
    """Channels at R / 2, R / 4, … 4: `width`, then doubled up to 8 times as many."""
    if resolution < 8 or width < 1:
        raise ValueError("a DCGAN needs a resolution of 8 or more and a width of 1 or more")
    return [width * min(2**i, 8) for i in range(len(resolutions_up_to(resolution)) - 1)]


@dataclass(frozen=True)
class DcganConfig:
    resolution: int = 64  # output side R in pixels, a power of two
    z_dim: int = 100  # numbers of a latent, 1 or more
    width: int = 64  # channels at R / 2; up to 8 times as many at 4

    def __post_init__(self) -> None:
        channels(self.resolution, self.width)
        if self.z_dim < 1:
            raise ValueError("z_dim must be 1 or more")


@dataclass(frozen=True)
class DcganDiscriminatorConfig:
    resolution: int = 64  # input side R in pixels, a power of two
    width: int = 64  # channels at R / 2; up to 8 times as many at 4

    def __post_init__(self) -> None:
        channels(self.resolution, self.width)


class DcganGenerator(nn.Module):
    """z (B, Z) -> images (B, 3, R, R) in [-1, 1], by transposed convolutions and batch norm.

    The running statistics of its batch norms are those of one process: they serve evaluation only,
    and training does not depend on them.
    """

    kind: ClassVar[str] = "dcgan"
    config_class: ClassVar[type] = DcganConfig

    def __init__(self, config: DcganConfig) -> None:
        super().__init__()
        self.config = config
        self.resolution, self.z_dim = config.resolution, config.z_dim
        widths = channels(config.resolution, config.width)[::-1]  # at 4, 8, … R / 2
        convs = [nn.ConvTranspose2d(config.z_dim, widths[0], 4, bias=False)]  # 1 -> 4 pixels
        convs += [nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False) for a, b in pairwise(widths)]
        self.blocks = nn.Sequential(
            *(nn.Sequential(c, nn.BatchNorm2d(c.out_channels), nn.ReLU()) for c in convs)
        )
        self.torgb = nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1)
        self.apply(init_weights)

    def forward(self, z: Tensor, truncation: float = 1.0) -> Tensor:
        """z (B, Z), towards whose mean, zero, `truncation` pulls."""
        x = self.blocks((truncation * z)[:, :, None, None])  # (B, C, R / 2, R / 2)
        return self.torgb(x).float().tanh()


class DcganDiscriminator(nn.Module):
    """Images (B, 3, R, R) in [-1, 1] -> logits (B, 1), by strided convolutions.

    Where the paper has batch norm, this has layer norm (a group norm of one group; Gulrajani et al.
    2017, arXiv:1704.00028, section 4): each picture is judged by itself. So a logit does not depend
    on how a batch is split over processes, a gradient penalty is its picture's own, and there are
    no running statistics to keep equal.
    """

    kind: ClassVar[str] = "dcgan_discriminator"
    config_class: ClassVar[type] = DcganDiscriminatorConfig

    def __init__(self, config: DcganDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        widths = channels(config.resolution, config.width)
        self.fromrgb = nn.Sequential(nn.Conv2d(3, widths[0], 4, 2, 1), nn.LeakyReLU(0.2))
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, 4, 2, 1, bias=False), nn.GroupNorm(1, b), nn.LeakyReLU(0.2)
                )
                for a, b in pairwise(widths)
            )
        )
        self.out = nn.Conv2d(widths[-1], 1, 4)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.blocks(self.fromrgb(images))).flatten(1)


def init_weights(module: nn.Module) -> None:
    """Normal(0, 0.02) for convolutions, their biases 0 (Radford et al. 2016, section 4); norms keep
    torch's scale of 1."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def with_noise(images: Tensor, std: float, rng: torch.Generator) -> Tensor:
    """Images of any shape plus Gaussian noise of this standard deviation: a discriminator's input
    in training (Sønderby et al. 2017, arXiv:1610.04490, "instance noise")."""
    noise = torch.randn(images.shape, generator=rng, device=rng.device)
    return images + std * noise.to(images)
