"""What the encoder sees beside its backbone's attention: branches that add to the latent, place by
place. Each begins with nothing to add, so a trained encoder that gets one goes on from what it has
learnt.

    low = Dense(channels, sides, size=64, width=32, w_dim=256)(images, maps)            # (B, 256)
    code = Spatial(channels, sides, size=64, spatial=16)(images, maps)           # (B, 16, 8, 8)
    offsets, code = Detail(128, 192, layers=10, w_dim=256, spatial=16)(large)    # both of them

Shape letters: B batch, L layers of w+, D dimension of w, R resolution, S channels of the spatial
code, C channels, H and W height and width of a feature map.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from generators.stylegan2 import SPATIAL_SIDE

FREQUENCIES = 24  # of a picture's width, and of its height, that the dense branch looks at
DENSE_SIDE = 8  # of the map that it looks at
GAIN = 0.1  # of what last layers with many inputs get
PATCH = 4  # pixels a side of a place of the detail branch's first stage
BLOCKS = 2  # of each of its stages; of its last, twice as many


class Dense(nn.Module):
    """What attention, an average, cannot tell: which pixel lies where. Images (B, 3, R, R) and the
    backbone's maps -> (B, D), linear in the picture's low frequencies and in one of the maps.

    A face's 256 principal axes, which are nearly its low frequencies, already hold it better than a
    w+ found by attention. Gradients are scaled as StyleGAN's (Karras et al. 2018, arXiv:1710.10196,
    section 4.1), the frequencies by the spectrum of pictures.
    """

    basis: Tensor
    scale: Tensor

    def __init__(
        self,
        channels: list[int],  # of the backbone's maps
        sides: list[int],  # of these
        size: int,  # R
        width: int,  # channels that the map is reduced to
        w_dim: int,  # D
    ) -> None:
        super().__init__()
        side = min(FREQUENCIES, size)
        self.register_buffer("basis", cosines(side, size), persistent=False)
        order = torch.arange(side)
        height = (order[:, None] ** 2 + order**2).sqrt()
        # pictures in [-1, 1] have a standard deviation of about R / 2 at order 0, falling as 1 / f
        self.register_buffer("scale", 2 * (1 + height) / size, persistent=False)
        large = [i for i, wide in enumerate(sides) if wide >= DENSE_SIDE]
        self.level = large[-1] if large else 0
        self.norm = nn.LayerNorm(channels[self.level])
        self.reduce = nn.Linear(channels[self.level], width)
        self.pixels = nn.Linear(3 * side**2, w_dim)
        self.places = nn.Linear(DENSE_SIDE**2 * width, w_dim, bias=False)
        for layer in (self.pixels, self.places):
            nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.pixels.bias)

    def forward(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        low = (self.basis @ images @ self.basis.T) * self.scale  # (B, 3, F, F)
        tokens = rearrange(pool(maps[self.level], (DENSE_SIDE,) * 2), "b c h w -> b h w c")
        places = self.reduce(self.norm(tokens))
        return self.pixels(GAIN * low.flatten(1)) + self.places(GAIN * places.flatten(1))


class Spatial(nn.Module):
    """What one w cannot hold, place by place: images (B, 3, R, R) and the backbone's maps -> the
    spatial code (B, S, 8, 8) of `generators.stylegan2`."""

    width = 64

    def __init__(self, channels: list[int], sides: list[int], size: int, spatial: int) -> None:
        super().__init__()
        self.levels = [i for i, side in enumerate(sides) if 4 <= side <= 4 * SPATIAL_SIDE][-3:]
        self.reduce = nn.ModuleList()
        for i in self.levels:
            step = sides[i] // SPATIAL_SIDE if sides[i] % SPATIAL_SIDE == 0 else 1
            self.reduce.append(nn.Conv2d(channels[i], self.width, step, step))
        patch = max(1, size // SPATIAL_SIDE)
        self.pixels = nn.Conv2d(3, self.width, patch, patch)
        self.norm = nn.GroupNorm(8, self.width)
        self.mix = nn.Conv2d(self.width, self.width, 3, padding=1)
        self.last = nn.Conv2d(self.width, spatial, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, images: Tensor, maps: list[Tensor]) -> Tensor:
        parts = [self.pixels(images)]
        parts += [reduce(maps[i]) for i, reduce in zip(self.levels, self.reduce, strict=True)]
        x = torch.stack([of_side(part, SPATIAL_SIDE) for part in parts]).sum(dim=0)
        x = F.silu(self.norm(x))
        return self.last(x + F.silu(self.mix(x)))


class Detail(nn.Module):
    """What a backbone that looks at fewer pixels does not see: images (B, 3, R, R) -> what is added
    to w+, (B, L, D), and to the spatial code, (B, S, 8, 8), or None where there is none.

    Blocks of ConvNeXt (Liu et al. 2022, arXiv:2201.03545) at places of 4 pixels a side, 8, … up to
    8 x 8 places; most of the work is in pointwise convolutions, which a CPU is fast at.
    """

    reduced = 32  # channels of a place that w+ is found from
    hidden = 384  # numbers between these and w+

    def __init__(self, size: int, width: int, layers: int, w_dim: int, spatial: int) -> None:
        super().__init__()
        self.shape = (layers, w_dim)
        patch = min(PATCH, max(1, size // SPATIAL_SIDE))
        count = max(1, (size // patch).bit_length() - SPATIAL_SIDE.bit_length() + 1)  # of stages
        widths = [max(16, width >> i) for i in reversed(range(count))]
        blocks = [BLOCKS] * (count - 1) + [2 * BLOCKS]
        self.begin = nn.Conv2d(3, widths[0], patch, patch)
        self.halve = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(1, a), nn.Conv2d(a, b, 2, 2)) for a, b in pairwise(widths)
        )
        self.stages = nn.ModuleList(map(convnext_stage, widths, blocks))
        self.norm = nn.LayerNorm(widths[-1])
        self.reduce = nn.Linear(widths[-1], self.reduced)
        self.gather = nn.Linear(SPATIAL_SIDE**2 * self.reduced, self.hidden)
        self.offsets = nn.Linear(self.hidden, layers * w_dim)
        self.code = nn.Linear(widths[-1], spatial) if spatial else None
        for last in (self.offsets, self.code):
            if last is not None:
                nn.init.zeros_(last.weight)
                nn.init.zeros_(last.bias)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.stages[0](self.begin(images.contiguous(memory_format=torch.channels_last)))
        for halve, stage in zip(self.halve, self.stages[1:], strict=True):
            x = stage(halve(x))
        x = self.norm(rearrange(of_side(x, SPATIAL_SIDE), "b c h w -> b h w c"))
        hidden = F.silu(self.gather(self.reduce(x).flatten(1)))
        offsets = self.offsets(GAIN * hidden).unflatten(1, self.shape)
        code = None if self.code is None else rearrange(self.code(x), "b h w s -> b s h w")
        return offsets, code


def convnext_stage(width: int, blocks: int) -> nn.Sequential:
    from timm.models.convnext import ConvNeXtBlock  # here, as timm takes a second to import

    made = (ConvNeXtBlock(width, mlp_ratio=2, ls_init_value=None) for _ in range(blocks))
    return nn.Sequential(*made)


def of_side(level: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B, C, side, side): means where it is larger, linear where smaller."""
    if min(level.shape[-2:]) >= side:
        return pool(level, (side, side))
    return F.interpolate(level, (side, side), mode="bilinear")


def cosines(count: int, size: int) -> Tensor:
    """The first rows (F, R) of the orthonormal discrete cosine transform, DCT-II (Ahmed et al.
    1974)."""
    places = (torch.arange(size) + 0.5) * torch.pi / size
    rows = (torch.arange(count)[:, None] * places).cos() * (2 / size) ** 0.5
    rows[0] *= 0.5**0.5
    return rows


def pool(level: Tensor, size: tuple[int, int]) -> Tensor:
    """Means (B, C, h, w) over parts of a map (B, C, H, W), of equal parts where they are."""
    height, width = level.shape[-2:]
    if (height, width) == size:
        return level
    if height % size[0] == 0 and width % size[1] == 0:  # which exports know
        return F.avg_pool2d(level, (height // size[0], width // size[1]))
    return F.adaptive_avg_pool2d(level, size)
