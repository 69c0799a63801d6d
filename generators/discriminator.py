"""StyleGAN2's residual discriminator in plain torch (Karras et al. 2020), under NVIDIA's names.

    discriminator = Discriminator(DiscriminatorConfig(resolution=64))
    logits = discriminator(images)       # (B, 3, 64, 64) -> (B, 1)

Shape letters: B batch, C channels, R resolution.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.ops import LRELU_GAIN, Linear, blur, downsample2x, leaky_relu
from generators.stylegan2 import channel_widths, resolutions_up_to


@dataclass(frozen=True)
class DiscriminatorConfig:
    resolution: int = 64  # input side R in pixels, a power of two
    channel_base: int = 32768  # channels at resolution r: min(channel_base // r, channel_max)
    channel_max: int = 512  # 1 or more
    widths: tuple[int, ...] = ()  # channels at 4, 8, … R; overrides the two above
    mbstd_group_size: int = 4  # pictures compared by the minibatch standard deviation
    mbstd_channels: int = 1  # that hold it; 0: none
    conv_clamp: float | None = None  # of activations; None: not clamped

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.resolution < 8 or min(self.mbstd_group_size, *self.channels.values()) < 1:
            raise ValueError(
                "a discriminator needs a resolution of 8 or more, and channels and a group of 1"
            )
        if self.mbstd_channels < 0 or self.channels[4] % max(self.mbstd_channels, 1):
            raise ValueError("mbstd_channels must divide the channels at 4, or be 0")

    @property
    def channels(self) -> dict[int, int]:
        return channel_widths(self.resolution, self.channel_base, self.channel_max, self.widths)


class Conv(nn.Module):
    """Equalised convolution, optionally after FIR downsampling by 2.

    (B, I, H, W) -> (B, O, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        down: bool = False,
        bias: bool = True,
        clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.down, self.clamp = down, clamp
        self.weight_gain = 1 / math.sqrt(in_channels * kernel**2)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        weight = self.weight * self.weight_gain
        if self.bias is None:  # the skip connection: linear, 1x1, downsampled first
            return F.conv2d(downsample2x(x), weight * gain)
        if self.down:
            y = F.conv2d(blur(x, padding=2), weight, self.bias, stride=2)
        else:
            y = F.conv2d(x, weight, self.bias, padding=weight.shape[-1] // 2)
        return leaky_relu(y, gain * LRELU_GAIN, self.clamp)


class Block(nn.Module):
    """Residual block: (B, I, R, R) -> (B, O, R / 2, R / 2); the first one also reads RGB."""

    def __init__(self, width: int, out_channels: int, *, first: bool, clamp: float | None) -> None:
        super().__init__()
        if first:
            self.fromrgb = Conv(3, width, 1, clamp=clamp)
        self.conv0 = Conv(width, width, 3, clamp=clamp)
        self.conv1 = Conv(width, out_channels, 3, down=True, clamp=clamp)
        self.skip = Conv(width, out_channels, 1, down=True, bias=False)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.fromrgb(x.contiguous(memory_format=torch.channels_last))
        return self.skip(x, math.sqrt(0.5)) + self.conv1(self.conv0(x), math.sqrt(0.5))


class Epilogue(nn.Module):
    """Minibatch standard deviation, a convolution and two linear layers: (B, C, 4, 4) -> (B, 1)."""

    def __init__(self, channels: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.group, self.channels = config.mbstd_group_size, config.mbstd_channels
        self.conv = Conv(channels + config.mbstd_channels, channels, 3, clamp=config.conv_clamp)
        self.fc = Linear(channels * 16, channels, activate=True)
        self.out = Linear(channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.minibatch_std(x)], dim=1) if self.channels else x
        return self.out(self.fc(self.conv(x).flatten(1)))

    def minibatch_std(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, F, H, W): mean deviation over groups (Karras et al. 2018, sec. 3)."""
        batch, channels, height, width = x.shape
        # a batch that the group does not divide, at which NVIDIA's code fails, is split otherwise
        group = next(g for g in range(min(self.group, batch), 0, -1) if batch % g == 0)
        y = x.float().reshape(
            group, batch // group, self.channels, channels // self.channels, height, width
        )
        y = (y.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(2, 3, 4))  # (B / group, F)
        return y.repeat(group, 1)[:, :, None, None].expand(-1, -1, height, width).to(x.dtype)


class Discriminator(nn.Module):
    """Images (B, 3, R, R) in [-1, 1] -> logits (B, 1); children bR … b8 and b4 (epilogue)."""

    kind: ClassVar[str] = "discriminator"
    config_class: ClassVar[type] = DiscriminatorConfig

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.resolutions = resolutions_up_to(config.resolution)[:0:-1]  # [R, …, 8]
        for r in self.resolutions:
            first = r == config.resolution
            block = Block(
                config.channels[r], config.channels[r // 2], first=first, clamp=config.conv_clamp
            )
            self.add_module(f"b{r}", block)
        self.b4 = Epilogue(config.channels[4], config)

    def features(self, images: Tensor) -> list[Tensor]:
        """The maps after each residual block, R / 2 down to 4: a feature space of faces."""
        maps, x = [], images
        for r in self.resolutions:
            x = self.get_submodule(f"b{r}")(x)
            maps.append(x)
        return maps

    def forward(self, images: Tensor) -> Tensor:
        return self.b4(self.features(images)[-1])
