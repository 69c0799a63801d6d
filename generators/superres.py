"""Super-resolution of the generators' pictures: a small residual network on top of bicubic, x2.

    network = load(resolve("superres64"), SuperResolution)             # generators.checkpoint
    large = upscale(network, images, 256)                         # (B, 3, 64, 64) -> 256 x 256

    high = patches(random_batch(data, 8, rng), 96, rng)           # one training step:
    terms = superres_terms(network, high, rng, FeaturePyramid(weights="wheel", out_indices=(0, 1)))
    terms["superres"].backward()

The same weights make every step, 64 -> 128 and 128 -> 256, photographed or drawn; the network sees
the picture only, never its size. Letters: B batch, W width, r and R = 2 r resolutions of a step.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from generators.features import FeaturePyramid, perceptual_distance
from generators.images import resize

LARGEST = 1024  # side of the largest picture the network is given; activations grow with its square
SOFTNESS = 0.5  # greatest share of a 3 x 3 mean in a training input, applied twice
NOISE = 0.03  # greatest standard deviation of the noise in a training input, of [-1, 1]
EPSILON = 1e-3  # of the Charbonnier loss: below it, the loss is square


@dataclass(frozen=True)
class SuperResolutionConfig:
    width: int = 32  # channels of all inner layers
    blocks: int = 4  # residual blocks of two 3 x 3 convolutions; a pixel sees 2 * blocks + 2 around

    def __post_init__(self) -> None:
        if self.width < 1 or self.blocks < 0:
            raise ValueError("a super-resolution network needs width >= 1 and blocks >= 0")


class Block(nn.Module):
    """x + conv(leaky(conv(x))), (B, W, r, r) -> the same: a block of EDSR, without norms
    (Lim et al. 2017, arXiv:1707.02921, section 3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(width, width, 3, padding=1)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv1(F.leaky_relu(self.conv0(x), 0.2, inplace=True))


class SuperResolution(nn.Module):
    """One x2 step: bicubic, plus what the network adds. Untrained, it is bicubic."""

    kind: ClassVar[str] = "superres"
    config_class: ClassVar[type] = SuperResolutionConfig

    def __init__(self, config: SuperResolutionConfig) -> None:
        super().__init__()
        self.config = config
        self.head = nn.Conv2d(3, config.width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(config.width) for _ in range(config.blocks)))
        self.tail = nn.Conv2d(config.width, 3 * 4, 3, padding=1)
        for parameter in self.tail.parameters():
            nn.init.zeros_(parameter)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, r, r) in [-1, 1], any dtype -> (B, 3, 2r, 2r) in fp32, about [-1, 1]."""
        height, width = images.shape[-2:]
        x = images.to(self.head.weight.dtype, memory_format=torch.channels_last)
        x = self.tail(self.blocks(self.head(x)))  # (B, 12, r, r)
        detail = F.pixel_shuffle(x, 2)  # (B, 3, 2r, 2r); Shi et al. 2016, arXiv:1609.05158
        return resize(images.float(), (2 * height, 2 * width)) + detail.float()


def upscale(network: SuperResolution, images: Tensor, size: int) -> Tensor:
    """(B, 3, r, r) in [-1, 1] -> (B, 3, size, size): x2 steps until `size` is reached, then an
    antialiased resize of what is too large.

    A `size` of r or less is that resize alone. Pictures beyond LARGEST are no longer given to the
    network but resized. ValueError for a size below 1.
    """
    if size < 1:
        raise ValueError(f"the size of a picture must be at least 1 pixel, not {size}")
    while images.shape[-1] < size and images.shape[-1] <= LARGEST:
        images = network(images)
    return resize(images, size)


# ------------------------------------------------------------------------------- training


def patches(images: Tensor, side: int, rng: torch.Generator) -> Tensor:
    """(B, 3, R, R) -> (B, 3, side, side): a random square of each picture, shrunk to `side`.

    How far is drawn once per call, evenly between the original scale and the whole picture, so
    that one data set teaches all scales below its own. ValueError if R < side.
    """
    batch, _, resolution, _ = images.shape
    if resolution < side:
        raise ValueError(
            f"patches of {side} pixels cannot be cut from pictures of {resolution}; "
            "give larger pictures or a smaller patch"
        )
    cut = int(torch.randint(side, resolution + 1, (), generator=rng))
    corners = torch.randint(resolution - cut + 1, (batch, 2), generator=rng).tolist()
    squares = [
        image[:, y : y + cut, x : x + cut] for image, (y, x) in zip(images, corners, strict=True)
    ]
    return resize(torch.stack(squares), side)


def degrade(high: Tensor, rng: torch.Generator) -> Tensor:
    """(B, 3, R, R) in [-1, 1] -> (B, 3, r, r): antialiased bicubic; a third of the pictures gets
    noise, and a third, drawn apart, is softened after it.

    Softness is what a generator's pictures have and photos shrunk by two have not: a network that
    was never shown any leaves them soft. The noise keeps it from sharpening every blemish.
    """
    height, width = high.shape[-2:]
    low = resize(high, (height // 2, width // 2))
    strengths = 3 * torch.rand(2, len(high), 1, 1, 1, generator=rng) - 2
    noise, softness = strengths.clamp(min=0).to(high.device)
    low = low + NOISE * noise * torch.randn(low.shape, generator=rng).to(high.device)
    for _ in range(2):
        mean = F.avg_pool2d(low, 3, stride=1, padding=1, count_include_pad=False)
        low = low + SOFTNESS * softness * (mean - low)
    return low


def superres_terms(
    network: SuperResolution,
    high: Tensor,
    rng: torch.Generator,
    perceptual: FeaturePyramid | None = None,
    perceptual_weight: float = 0.02,
) -> dict[str, Tensor]:
    """What one step is to lower: scalar losses and, as "superres", their weighted sum.

    Every second picture is shrunk by four and goes through the network twice, as in `upscale`: a
    network that has never seen its own result takes it for a soft photo and sharpens it again.

    high: sharp pictures (B, 3, R, R) in [-1, 1], R a multiple of 4; `degrade` makes them small
    perceptual: features for the second loss, of every third picture (of both sorts in turn): they
        cost more than the network. None: Charbonnier alone (Lai et al. 2017, arXiv:1704.03915,
        section 3.3)
    """
    low = degrade(high, rng)
    half = resize(high[1::2], high.shape[-1] // 2)
    low[1::2] = network(degrade(half, rng))
    result = network(low)
    terms = {"charbonnier": ((result - high).square() + EPSILON**2).sqrt().mean()}
    total = terms["charbonnier"]
    if perceptual is not None:
        with torch.no_grad():
            wanted = perceptual(high[::3])
        terms["perceptual"] = perceptual_distance(perceptual(result[::3]), wanted).mean()
        total = total + perceptual_weight * terms["perceptual"]
    return terms | {"superres": total}
