"""What a discriminator gets to see instead of the pictures, so that few of them last longer.

    diff_augment(images, rng)                      # the same strength for the whole training
    controller = AdaController()                   # ADA: as strong as overfitting asks for
    ada_augment(images, controller.p, rng)
    controller.observe(real_logits, world)         # each step
    controller.update()                            # each fourth step

Reals and fakes alike go through it, and the generator's gradient too. ADA is Karras et al. 2020,
"Training Generative Adversarial Networks with Limited Data", arXiv:2006.06676.

Shape letters: B batch, H W pixels, R resolution, N logits of one picture.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

# ------------------------------------------------------------------------ DiffAugment


def diff_augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """DiffAugment (Zhao et al. 2020, policy colour, translation 1/8, cutout 1/2), with its own draw
    per picture."""
    batch, _, height, width = images.shape

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=rng.device).to(images.device)

    brightness, saturation, contrast = (draw(batch, 1, 1, 1) for _ in range(3))
    x = images + (brightness - 0.5)
    grey = x.mean(dim=1, keepdim=True)
    x = grey + (x - grey) * (saturation * 2)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (contrast + 0.5)

    shift = (draw(2, batch) * 2 - 1) / 8  # fraction of the side
    rows = torch.arange(height, device=x.device) + (shift[0, :, None] * height).round()  # (B, H)
    columns = torch.arange(width, device=x.device) + (shift[1, :, None] * width).round()  # (B, W)
    rows, columns = rows[:, :, None], columns[:, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    index = rows.clamp(0, height - 1).long(), columns.clamp(0, width - 1).long()
    picture = torch.arange(batch, device=x.device)[:, None, None]
    moved = x.permute(0, 2, 3, 1)[picture, index[0], index[1]]  # (B, H, W, 3)
    x = moved.permute(0, 3, 1, 2) * inside[:, None]

    centre = draw(2, batch)
    away_y = torch.arange(height, device=x.device) - centre[0, :, None] * height
    away_x = torch.arange(width, device=x.device) - centre[1, :, None] * width
    far_rows, far_columns = away_y.abs() > height / 4, away_x.abs() > width / 4
    kept = far_rows[:, :, None] | far_columns[:, None, :]
    return x * kept[:, None]


# -------------------------------------------------------------------------------- ADA


@dataclass(frozen=True)
class AdaConfig:
    """Groups of transforms; the default is the paper's "bgc" (section 3, appendix B)."""

    blit: bool = True  # mirror, quarter turns, shifts by whole pixels
    geometric: bool = True  # scaling, rotation, stretching, shifts by fractions of a pixel
    colour: bool = True  # brightness, contrast, luma flip, hue, saturation


def ada_augment(
    images: Tensor, p: float | Tensor, rng: torch.Generator, config: AdaConfig | None = None
) -> Tensor:
    """Sends each picture through each transform with probability p; every draw is its own.

    images (B, 3, R, R) in [-1, 1], R >= 4; p in [0, 1], a tensor () on any device without a sync.
    Returns the same shape and dtype, in and a little outside [-1, 1]. A picture for which no
    transform was drawn comes out bit by bit as it was. The rng advances by the same number of
    draws for every p > 0.
    """
    if not isinstance(p, Tensor) and p == 0:
        return images
    config = config or AdaConfig()
    x = images if images.dtype == torch.float64 else images.float()
    batch, _, size, _ = x.shape
    if isinstance(p, Tensor):
        p = p.to(x.device)
    with torch.autocast(x.device.type, enabled=False):
        inverse = draw_geometry(batch, size, p, rng, config, x.device).to(x.dtype)
        colour = draw_colour(batch, p, rng, config, x.device).to(x.dtype)
        if config.blit or config.geometric:
            x = torch.where(is_identity(inverse), x, warp(x, inverse))
        if config.colour:
            x = torch.where(is_identity(colour), x, recolour(x, colour))
    return x.to(images.dtype)


def is_identity(matrix: Tensor) -> Tensor:
    """(B, 3, 3 or 4) -> bool (B, 1, 1, 1)."""
    same = matrix == torch.eye(*matrix.shape[1:], dtype=matrix.dtype, device=matrix.device)
    return same.all(dim=2).all(dim=1)[:, None, None, None]


class _Draws:
    """One batch's random numbers, (B,) each, sent to the device in two messages."""

    def __init__(
        self, uniforms: int, normals: int, batch: int, rng: torch.Generator, device: torch.device
    ) -> None:
        rows: Any = torch.rand(uniforms, batch, generator=rng, device=rng.device).to(device)
        self.uniforms: Iterator[Tensor] = iter(rows)
        rows = torch.randn(normals, batch, generator=rng, device=rng.device).to(device)
        self.normals: Iterator[Tensor] = iter(rows)

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * next(self.uniforms)

    def choice(self, count: int) -> Tensor:
        """0, …, count - 1, as floats."""
        return (next(self.uniforms) * count).floor()

    def normal(self, deviation: float) -> Tensor:
        return next(self.normals) * deviation

    def octaves(self, deviation: float) -> Tensor:
        """Log-normal: 2 to the power of a normal number."""
        return torch.exp2(self.normal(deviation))

    def sometimes(self, p: float | Tensor, neutral: float, *values: Tensor) -> tuple[Tensor, ...]:
        """The values with probability p, otherwise `neutral`: one decision for all of them."""
        chosen = next(self.uniforms) < p
        return tuple(torch.where(chosen, value, neutral) for value in values)


# ------------------------------------------------------------------------ ADA: geometry


def draw_geometry(
    batch: int,
    size: int,
    p: float | Tensor,
    rng: torch.Generator,
    config: AdaConfig,
    device: torch.device,
) -> Tensor:
    """From where in its picture each output pixel comes: (B, 3, 3), homogeneous (x, y) in pixels
    from the centre (appendix B, with its order and strengths)."""
    draws = _Draws(14, 4, batch, rng, device)
    blit, general = p * config.blit, p * config.geometric
    rotation = 1 - (1 - general) ** 0.5  # each of the two, so that p is that of any

    (mirror,) = draws.sometimes(blit, 0, draws.choice(2))
    (turns,) = draws.sometimes(blit, 0, draws.choice(4))
    whole = (draws.uniform(-1 / 8, 1 / 8) * size, draws.uniform(-1 / 8, 1 / 8) * size)
    whole_x, whole_y = draws.sometimes(blit, 0, *(shift.round() for shift in whole))
    (scale,) = draws.sometimes(general, 1, draws.octaves(0.2))
    (before,) = draws.sometimes(rotation, 0, draws.uniform(-math.pi, math.pi))
    (stretch,) = draws.sometimes(general, 1, draws.octaves(0.2))
    (after,) = draws.sometimes(rotation, 0, draws.uniform(-math.pi, math.pi))
    shift_x, shift_y = draws.sometimes(general, 0, draws.normal(size / 8), draws.normal(size / 8))
    return compose(
        scaling(1 - 2 * mirror, torch.ones_like(mirror)),
        rotating(turns * (math.pi / 2)),
        shifting(-whole_x, -whole_y),
        scaling(1 / scale, 1 / scale),
        rotating(-before),
        scaling(1 / stretch, stretch),
        rotating(-after),
        shifting(-shift_x, -shift_y),
    )


def affine(*entries: Tensor | float) -> Tensor:
    """Two rows of three entries, each (B,) or a number -> (B, 3, 3), homogeneous."""
    like = next(entry for entry in entries if isinstance(entry, Tensor))
    tensors = [
        entry if isinstance(entry, Tensor) else torch.full_like(like, entry)
        for entry in (*entries, 0.0, 0.0, 1.0)
    ]
    return torch.stack(tensors, dim=1).view(-1, 3, 3)


def scaling(x: Tensor, y: Tensor) -> Tensor:
    """Factors (B,) -> (B, 3, 3)."""
    return affine(x, 0.0, 0.0, 0.0, y, 0.0)


def rotating(angle: Tensor) -> Tensor:
    """Radians (B,), from x towards y -> (B, 3, 3)."""
    cos, sin = angle.cos(), angle.sin()
    return affine(cos, -sin, 0.0, sin, cos, 0.0)


def shifting(x: Tensor, y: Tensor) -> Tensor:
    """Pixels (B,) -> (B, 3, 3)."""
    return affine(1.0, 0.0, x, 0.0, 1.0, y)


def compose(*matrices: Tensor) -> Tensor:
    """Product of (B, 3, 3), the last one is applied first. Not by matmul: TensorFloat-32 would
    move pixels."""
    return reduce(lambda a, b: (a[:, :, :, None] * b[:, None]).sum(2), matrices)


# Filters up and down (mirror their halves). The paper takes the wavelet sym6, whose filter undoes
# itself; being lopsided by 0.4 of its samples, it moves mirrored and turned pictures by 0.4 pixels.
# These are the other split of the same product filter, Daubechies' of order 6 ("Ten Lectures on
# Wavelets", section 8.3): each undoes the other, and both are symmetric.
UP = (-0.016945655483, 0.024464076116, 0.070099429542, -0.137049591637, -0.000706636744,
      0.767245159393)  # fmt: skip
DOWN = (0.007091077946, 0.010237235779, -0.051222524779, -0.088950037672, 0.189472944903,
        0.640478085010)  # fmt: skip


def warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Resamples each picture by its matrix (B, 3, 3) of `draw_geometry`, (B, 3, R, R), R >= 4.

    Beyond their edges pictures go on mirrored, for ever. It is done at twice the resolution, so
    that little gets blurred or jagged; mirroring, quarter turns and whole pixels are exact.
    """
    size = images.shape[-1]
    x = F.pad(images, (3, 3, 3, 3), mode="reflect")
    for _ in range(2):
        x = up(x).mT  # (B, 3, 2R, 2R)

    at = torch.arange(-5, 2 * size + 5, dtype=x.dtype, device=x.device)  # as much as `down` takes
    at = (at + 0.5) / 2 - size / 2  # of the output, in pixels from the centre
    source = [
        row[:, 0, None, None] * at + row[:, 1, None, None] * at[:, None] + row[:, 2, None, None]
        for row in inverse[:, :2].unbind(1)
    ]
    grid = reflect(torch.stack(source, dim=3) + (size - 1) / 2, size)  # (B, 2R + 10, 2R + 10, 2)
    x = Sample.apply(x, (2 * grid + 1) / size - 1)

    for _ in range(2):
        x = down(x).mT
    return x


def up(x: Tensor) -> Tensor:
    """(…, R + 6) -> (…, 2R), times the root of 1/2."""
    taps = UP + UP[::-1]
    return torch.stack([fir(x[..., :-1], taps[::2]), fir(x[..., 1:], taps[1::2])], -1).flatten(-2)


def down(x: Tensor) -> Tensor:
    """(…, 2R + 10) -> (…, R), times the root of 2."""
    return fir(x, DOWN + DOWN[::-1], step=2)


def fir(x: Tensor, taps: Sequence[float], step: int = 1) -> Tensor:
    """Filters the last dimension wherever all taps fit. Faster here than a convolution, which is
    made for many channels."""
    last = x.shape[-1] - len(taps) + 1
    y = x[..., :last:step] * taps[0]
    for k, tap in enumerate(taps[1:], 1):
        y = torch.add(y, x[..., k : k + last : step], alpha=tap)
    return y


def reflect(at: Tensor, size: int) -> Tensor:
    """Pixel coordinates mirrored at the centres of the outermost pixels into [0, size - 1]."""
    last = size - 1
    within = at - 2 * last * (at / (2 * last)).floor()  # faster than remainder
    return last - (within - last).abs()


class Sample(torch.autograd.Function):
    """Bilinear F.grid_sample (B, C, H, W), (B, H', W', 2) -> (B, C, H', W'), without a gradient of
    the grid but with all higher ones of x, in which it is linear; torch's has one or two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.shape = x.shape
        return F.grid_sample(x, grid, mode="bilinear", align_corners=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (grid,) = ctx.saved_tensors
        return Spread.apply(gradients[0], grid, ctx.shape), None


class Spread(torch.autograd.Function):
    """The transpose of `Sample`: (B, C, H', W') -> (B, C, H, W)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, grid: Tensor, shape: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        unread = y.new_empty(()).expand(shape)  # x matters for the gradient of the grid only
        backward = torch.ops.aten.grid_sampler_2d_backward
        return backward(y, unread, grid, 0, 0, False, [True, False])[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grid,) = ctx.saved_tensors
        return Sample.apply(gradients[0], grid), None, None


# -------------------------------------------------------------------------- ADA: colour


def draw_colour(
    batch: int, p: float | Tensor, rng: torch.Generator, config: AdaConfig, device: torch.device
) -> Tensor:
    """What becomes of each picture's colours: (B, 3, 4), homogeneous RGB (appendix B, with its
    order and strengths)."""
    draws = _Draws(7, 3, batch, rng, device)
    p = p * config.colour
    (brightness,) = draws.sometimes(p, 0, draws.normal(0.2))
    (contrast,) = draws.sometimes(p, 1, draws.octaves(0.5))
    (flip,) = draws.sometimes(p, 0, draws.choice(2))
    (hue,) = draws.sometimes(p, 0, draws.uniform(-math.pi, math.pi))
    (saturation,) = draws.sometimes(p, 1, draws.octaves(1))
    return colour_matrix(brightness, contrast, 1 - 2 * flip, hue, saturation)


def colour_matrix(
    brightness: Tensor, contrast: Tensor, luma: Tensor, hue: Tensor, saturation: Tensor
) -> Tensor:
    """Homogeneous RGB (B, 3, 4) from, each (B,): what to add, the factor of all, the factor ±1 of
    the luma, the angle in radians of the turn about the luma's axis, and the factor of the chroma.

    The product of the paper's five matrices: its luma axis (1, 1, 1) is an eigenvector of all of
    them, and on the plane of the chroma they scale and turn.
    """
    same = torch.eye(3).to(brightness)
    grey = torch.ones_like(same) / 3  # projects on the luma's axis
    turn = same.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # by 90°
    along, across = saturation * hue.cos(), saturation * hue.sin()  # of the chroma
    linear = (
        (luma - along)[:, None, None] * grey
        + along[:, None, None] * same
        + across[:, None, None] * turn
    )
    offset = (luma * brightness)[:, None, None].expand(-1, 3, 1)
    return contrast[:, None, None] * torch.cat([linear, offset], dim=2)


def recolour(images: Tensor, matrix: Tensor) -> Tensor:
    """(B, 3, H, W) by homogeneous RGB (B, 3, 4)."""
    pixels = torch.baddbmm(matrix[:, :, 3:], matrix[:, :, :3], images.flatten(2))
    return pixels.view_as(images)


# ----------------------------------------------------------------------- ADA: its strength


class AdaController(nn.Module):
    """Finds the p at which the discriminator is right about reals as often as wanted (section 3.1).

    Its state_dict is all it knows: a training that loads it goes on exactly.
    """

    def __init__(
        self,
        target: float = 0.6,  # of r_t, the mean sign of D(real): 0 no overfitting, 1 complete
        images_to_full: int = 500_000,  # reals seen, over all processes, while p goes from 0 to 1
    ) -> None:
        super().__init__()
        self.target = target
        self.images_to_full = images_to_full
        self.p: Tensor
        self.seen: Tensor
        self.register_buffer("p", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(2))  # since the update: sum of signs, pictures

    @torch.no_grad()
    def observe(self, real_logits: Tensor, world: int = 1) -> None:
        """Logits (B, N) of this process's augmented reals; afterwards all processes know of all."""
        signs = real_logits.sign().float().mean(dim=1).sum()
        seen = torch.stack([signs, torch.full_like(signs, len(real_logits))])
        if world > 1:
            torch.distributed.all_reduce(seen)
        self.seen += seen

    @torch.no_grad()
    def update(self) -> None:
        """Moves p by what the reals since the last update say; each 4 steps in the paper.

        The step of p is their number, over all processes, in units of `images_to_full`.
        """
        signs, pictures = self.seen
        overfit = signs / pictures.clamp(min=1)
        step = (overfit - self.target).sign() * pictures / self.images_to_full
        self.p = (self.p + step).clamp(0, 1)  # a new tensor: logs may hold the old one
        self.seen.zero_()
