"""StyleGAN2's generator in plain torch: mapping network, skip synthesis network, truncation.

    generator = Generator(GeneratorConfig(resolution=64))
    z = torch.randn(8, generator.z_dim)
    images = generator(z, truncation=0.7)      # (8, 3, 64, 64), about [-1, 1]

Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN". Names are those of
NVIDIA's PyTorch code, per resolution: `synthesis.b64.conv0.weight`; its numbers too, to rounding.

A generator may have a spatial code: some more rows of w+ are no layer's w but together a map of
8 x 8 that its 8² block adds to its features, as in the F spaces of inversion (Kang et al. 2021,
arXiv:2108.13700; Yao et al. 2022, arXiv:2208.06105, section 3.2). It is 0 where w comes from z.

Shape letters: B batch, L rows of w+, D w dimension, Z z dimension, R resolution, C channels, S
channels of the spatial code.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.ops import LRELU_GAIN, LRELU_SLOPE, Linear, modulated_conv, upsample2x

NoiseMode = Literal["const", "random", "none"]
SPATIAL_SIDE = 8  # of the spatial code, and the resolution of the block that adds it


def resolutions_up_to(resolution: int) -> list[int]:
    """[4, 8, …, resolution]; ValueError unless resolution is a power of two from 4 to 16384."""
    if not 4 <= resolution <= 1 << 14 or resolution & (resolution - 1):
        raise ValueError(f"resolution must be a power of two, 4 to 16384, not {resolution}")
    return [2**i for i in range(2, resolution.bit_length())]


def channel_widths(
    resolution: int, base: int, most: int, widths: tuple[int, ...]
) -> dict[int, int]:
    """Channels of each resolution: the given widths (from 4 up), or min(base // r, most)."""
    all_resolutions = resolutions_up_to(resolution)
    if not widths:
        return {r: min(base // r, most) for r in all_resolutions}
    if len(widths) != len(all_resolutions):
        raise ValueError(
            f"{len(all_resolutions)} widths are needed, one for each of {all_resolutions}, "
            f"not {len(widths)}"
        )
    return dict(zip(all_resolutions, widths, strict=True))


@dataclass(frozen=True)
class GeneratorConfig:
    resolution: int = 64  # output side R in pixels, a power of two
    z_dim: int = 512  # Z, 1 or more
    w_dim: int = 512  # D, 1 or more
    mapping_layers: int = 8  # fully connected ones from z to w
    channel_base: int = 32768  # channels at resolution r: min(channel_base // r, channel_max)
    channel_max: int = 512  # 1 or more
    widths: tuple[int, ...] = ()  # channels at 4, 8, … R; overrides the two above
    conv_clamp: float | None = None  # of activations; 256 in NVIDIA's mixed-precision networks
    spatial: int = 0  # S, channels of the spatial code; 0: there is none

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # a list when read from JSON
        if min(*self.channels.values(), self.z_dim, self.w_dim, self.mapping_layers) < 1:
            raise ValueError(
                "z_dim, w_dim, mapping_layers and the channels of each resolution must be 1 or more"
            )
        if self.conv_clamp is not None and not self.conv_clamp > 0:
            raise ValueError(f"conv_clamp must be a number above 0, or none, not {self.conv_clamp}")
        if not isinstance(self.spatial, int) or self.spatial < 0:
            raise ValueError(f"spatial must be a whole number from 0 up, not {self.spatial}")
        if self.spatial and (self.resolution < SPATIAL_SIDE or self.spatial_numbers % self.w_dim):
            raise ValueError(
                f"a spatial code needs a resolution of {SPATIAL_SIDE} or more, and its "
                f"{self.spatial_numbers} numbers must fill rows of w_dim = {self.w_dim}"
            )

    @property
    def channels(self) -> dict[int, int]:
        return channel_widths(self.resolution, self.channel_base, self.channel_max, self.widths)

    @property
    def block_resolutions(self) -> list[int]:
        return resolutions_up_to(self.resolution)

    @property
    def layers(self) -> int:
        """Rows of w+ that are a layer's w: two per resolution. They come first."""
        return 2 * len(self.block_resolutions)

    @property
    def spatial_numbers(self) -> int:
        return self.spatial * SPATIAL_SIDE**2

    @property
    def num_ws(self) -> int:
        """L: the layers, then the rows of the spatial code."""
        return self.layers + self.spatial_numbers // self.w_dim


class MappingNetwork(nn.Module):
    """z (B, Z) -> w (B, D): normalised, then fully connected, at 1/100 of the learning rate."""

    def __init__(self, z_dim: int, w_dim: int, layers: int) -> None:
        super().__init__()
        self.layers = layers
        for i in range(layers):
            fc = Linear(z_dim if i == 0 else w_dim, w_dim, activate=True, lr_multiplier=0.01)
            self.add_module(f"fc{i}", fc)
        self.register_buffer("w_avg", torch.zeros(w_dim))
        self.w_avg: Tensor

    def forward(self, z: Tensor) -> Tensor:
        x = z.float()
        x = (x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)).to(z.dtype)
        for i in range(self.layers):
            x = self.get_submodule(f"fc{i}")(x)
        return x


class SynthesisLayer(nn.Module):
    """Style, modulated 3x3 convolution, noise, bias, leaky relu.

    (B, I, H, W), w (B, D) -> (B, O, H', W').
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        up: bool,
        clamp: float | None,
    ):
        super().__init__()
        self.up, self.clamp = up, clamp
        self.affine = Linear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros([]))
        self.register_buffer("noise_const", torch.randn(resolution, resolution))
        self.noise_const: Tensor

    def forward(
        self, x: Tensor, w: Tensor, noise_mode: NoiseMode, rng: torch.Generator | None
    ) -> Tensor:
        # leaky_relu(√2 y) = √2 leaky_relu(y): its gain goes into the convolution, bias and noise
        y = modulated_conv(
            x, self.weight, self.affine(w), self.bias * LRELU_GAIN, up=self.up, gain=LRELU_GAIN
        )
        if noise_mode != "none":
            noise = self.noise_const  # (R, R)
            if noise_mode == "random":
                noise = torch.randn(
                    len(y), 1, *y.shape[2:], device=y.device, dtype=y.dtype, generator=rng
                )
            y = y.add_((noise * (self.noise_strength * LRELU_GAIN)).to(y.dtype))
        y = F.leaky_relu_(y, LRELU_SLOPE)
        return y if self.clamp is None else y.clamp(-self.clamp, self.clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to RGB, not demodulated: (B, C, R, R), w (B, D) -> (B, 3, R, R)."""

    def __init__(self, in_channels: int, w_dim: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        self.affine = Linear(w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(3, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        weight = self.weight.flatten(1) * (self.affine(w) * self.weight_gain)[:, None]  # (B, 3, C)
        rgb = torch.baddbmm(
            self.bias[:, None].to(x.dtype), weight.to(x.dtype), x.flatten(2)
        ).unflatten(2, x.shape[2:])
        return rgb if self.clamp is None else rgb.clamp(-self.clamp, self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: constant or upsampling layer, a layer, toRGB added to the upsampled image;
    then what the spatial code adds to the features."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        w_dim: int,
        resolution: int,
        clamp: float | None,
        spatial: int = 0,
    ) -> None:
        super().__init__()
        if in_channels == 0:
            self.const = nn.Parameter(torch.randn(out_channels, 4, 4))
        else:
            self.conv0 = SynthesisLayer(in_channels, out_channels, w_dim, resolution, True, clamp)
        self.conv1 = SynthesisLayer(out_channels, out_channels, w_dim, resolution, False, clamp)
        self.torgb = ToRGB(out_channels, w_dim, clamp)
        if spatial:
            self.spatial = nn.Conv2d(spatial, out_channels, 1, bias=False)
            nn.init.normal_(self.spatial.weight, std=0.3 * spatial**-0.5)
        self.first, self.has_spatial = in_channels == 0, spatial > 0

    def forward(
        self,
        x: Tensor | None,
        image: Tensor | None,
        ws: Tensor,
        noise_mode: NoiseMode,
        rng: torch.Generator | None,
        code: Tensor | None = None,  # (B, S, 8, 8)
    ) -> tuple[Tensor, Tensor]:
        """ws (B, 3, D), or (B, 2, D) for the first block: one w per convolution, then toRGB's."""
        if x is None:
            x = self.const.expand(len(ws), -1, -1, -1).contiguous(memory_format=torch.channels_last)
        else:
            x = self.conv0(x, ws[:, 0], noise_mode, rng)
        x = self.conv1(x, ws[:, -2], noise_mode, rng)
        rgb = self.torgb(x, ws[:, -1]).float()
        if code is not None:
            x = x + self.spatial(code.to(x.dtype)).to(x.dtype)
        return x, rgb if image is None else upsample2x(image) + rgb


class SynthesisNetwork(nn.Module):
    """ws (B, L, D) -> images (B, 3, R, R); children b4, b8, … bR, or from `first` on."""

    def __init__(self, config: GeneratorConfig, first: int = 4) -> None:
        super().__init__()
        self.resolutions = config.block_resolutions
        self.layers, self.num_ws, self.spatial = config.layers, config.num_ws, config.spatial
        channels = {2: 0} | config.channels
        for r in (r for r in self.resolutions if r >= first):
            spatial = config.spatial if r == SPATIAL_SIDE else 0
            block = SynthesisBlock(
                channels[r // 2], channels[r], config.w_dim, r, config.conv_clamp, spatial
            )
            self.add_module(f"b{r}", block)

    def forward(
        self, ws: Tensor, noise_mode: NoiseMode = "const", rng: torch.Generator | None = None
    ) -> Tensor:
        """Images in fp32, about [-1, 1] and not clamped. `rng` is for noise_mode "random"."""
        return self.run_blocks(self.resolutions, None, None, ws, noise_mode, rng)[1]

    def run_blocks(
        self,
        resolutions: list[int],
        x: Tensor | None,
        image: Tensor | None,
        ws: Tensor,
        noise_mode: NoiseMode = "const",
        rng: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Runs consecutive blocks on features x and image, both None before the first."""
        if ws.ndim != 3 or ws.shape[1] != self.num_ws:
            raise ValueError(
                f"ws must be (B, {self.num_ws}, D) at resolution {self.resolutions[-1]}, "
                f"not {tuple(ws.shape)}"
            )
        for r in resolutions:
            # a block's toRGB shares its w with the next conv0
            first = max(2 * self.resolutions.index(r) - 1, 0)
            last = 2 * self.resolutions.index(r) + 2
            code = None
            if self.spatial and r == SPATIAL_SIDE:
                code = ws[:, self.layers :].reshape(-1, self.spatial, r, r)
            styles = ws[:, first:last]
            x, image = self.get_submodule(f"b{r}")(x, image, styles, noise_mode, rng, code)
        assert x is not None and image is not None
        return x, image


def broadcast(w: Tensor, layers: int) -> Tensor:
    """w (B, D) -> (B, layers, D): the same w at each layer."""
    return w.unsqueeze(1).expand(-1, layers, -1)


class Generator(nn.Module):
    """Mapping and synthesis. `w_avg` (D,) is the mean of w that truncation pulls towards."""

    kind: ClassVar[str] = "generator"
    config_class: ClassVar[type] = GeneratorConfig

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        self.mapping = MappingNetwork(config.z_dim, config.w_dim, config.mapping_layers)
        self.synthesis = SynthesisNetwork(config)
        self.resolution, self.num_ws, self.layers = config.resolution, config.num_ws, config.layers
        self.z_dim, self.w_dim = config.z_dim, config.w_dim

    @property
    def w_avg(self) -> Tensor:
        return self.mapping.w_avg

    @property
    def ws_avg(self) -> Tensor:
        """(L, D): w_avg at each layer, no spatial code."""
        return self.broadcast(self.w_avg[None])[0]

    def broadcast(self, w: Tensor) -> Tensor:
        """w (B, D) -> ws (B, L, D): the same w at each layer, no spatial code."""
        ws = broadcast(w, self.layers)
        return F.pad(ws, (0, 0, 0, self.num_ws - self.layers))

    def map(
        self, z: Tensor, truncation: float = 1.0, truncation_cutoff: int | None = None
    ) -> Tensor:
        """z (B, Z) -> ws (B, L, D), of which the first `truncation_cutoff` (None: all) are pulled
        to w_avg."""
        ws = self.broadcast(self.mapping(z))  # (B, L, D), a copy
        if truncation != 1:
            cutoff = (
                self.layers if truncation_cutoff is None else min(truncation_cutoff, self.layers)
            )
            ws[:, :cutoff] = self.w_avg.lerp(ws[:, :cutoff], truncation)
        return ws

    def forward(
        self,
        z: Tensor,
        truncation: float = 1.0,
        truncation_cutoff: int | None = None,
        noise_mode: NoiseMode = "const",
    ) -> Tensor:
        """z (B, Z) -> images (B, 3, R, R), about [-1, 1]."""
        return self.synthesis(self.map(z, truncation, truncation_cutoff), noise_mode)
