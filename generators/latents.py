"""Latents: the spaces as pure functions, the spread of w, and files of latents.

    ws = truncate(from_offsets(offsets, generator.ws_avg), generator.ws_avg, psi=0.7)
    ws = StyleLimit(generator, swap_resolution=16)(ws)            # near what a mapping gives
    ws = read_ws(Path("latents/"), generator)                     # of one file, or of a folder

Spaces: z (B, Z), w (B, D), w+ (B, L, D), offsets from ws_avg (B, L, D).
Shape letters: B batch, N latents of a file or samples, L rows of w+, layers first (`stylegan2`), D
dimension of w, Z of z.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from generators.command import printable
from generators.dcgan import DcganGenerator
from generators.disk import find_files, write_atomically
from generators.ops import Linear
from generators.runs import seed_of
from generators.stylegan2 import SPATIAL_SIDE, Generator
from generators.tensors import read_weights

SAMPLES = 8192  # of z, that the axes are measured with
SPATIAL_LAYER = 2 * (SPATIAL_SIDE.bit_length() - 3)  # of the convolution whose features it changes
DEVIATIONS = math.inf  # limit of styles by default: photos' codes fill the w of the bundled models
LIMIT = 1.5  # for an encoder whose w+ lie outside; see benchmarks/LOG.md, for these two
SHARED = 1 / 3  # of a late layer that is the mean over layers; more: cleaner, less like the photo


def from_offsets(offsets: Tensor, w_avg: Tensor) -> Tensor:
    """Offsets (B, L, D) from w_avg (D,) or (L, D) -> ws (B, L, D)."""
    return w_avg + offsets


def to_offsets(ws: Tensor, w_avg: Tensor) -> Tensor:
    """ws (B, L, D) -> offsets (B, L, D) from w_avg (D,) or (L, D)."""
    return ws - w_avg


def truncate(ws: Tensor, w_avg: Tensor, psi: float, cutoff: int | None = None) -> Tensor:
    """Pull ws (B, L, D) towards w_avg: psi 1 changes nothing, 0 gives w_avg.

    Only layers below `cutoff` move; None: all. Karras et al. 2019 (arXiv:1812.04948), app. B.
    """
    truncated = w_avg + psi * (ws - w_avg)
    return truncated if cutoff is None else mix(truncated, ws, cutoff)


def mix(coarse: Tensor, fine: Tensor, from_layer: int, layers: int | None = None) -> Tensor:
    """Layers below `from_layer` of one ws (B, L, D), the others of another: style mixing.

    Karras et al. 2019 (arXiv:1812.04948), sec. 3.1. Rows from `layers` on (None: L), the spatial
    code, are those of the picture whose last layer of that block is taken.
    """
    layers = coarse.shape[1] if layers is None else layers
    spatial = coarse if from_layer > SPATIAL_LAYER else fine
    return torch.cat(
        [coarse[:, :from_layer], fine[:, from_layer:layers], spatial[:, layers:]], dim=1
    )


def mix_styles(
    ws_a: Tensor, ws_b: Tensor, probability: float, rng: torch.Generator, layers: int | None = None
) -> Tensor:
    """Style mixing: ws_a (B, L, D), with ws_b's layers from a crossover on in about `probability`
    of the pictures (Karras et al. 2019, arXiv:1812.04948, section 3.1; there 0.9).

    The crossover is uniform in 1 … `layers` - 1, None: L - 1, another one for each picture. Neither
    has a spatial code.
    """
    batch, rows, _ = ws_a.shape
    crossover = torch.randint(1, layers or rows, (batch, 1), generator=rng, device=rng.device)
    mixed = torch.rand(batch, 1, generator=rng, device=rng.device) < probability
    from_b = mixed & (torch.arange(rows, device=rng.device) >= crossover)  # (B, L)
    return torch.where(from_b[:, :, None].to(ws_a.device), ws_b, ws_a)


def slerp(a: Tensor, b: Tensor, t: Tensor | float) -> Tensor:
    """The vectors (…, Z) that are part `t` in [0, 1], (…, 1) or a number, of the way from a to b:
    directions along the arc of the great circle, lengths linearly; exact at 0 and 1.

    (sin((1 - t) Ω) a + sin(t Ω) b) / sin Ω for vectors of length 1 at the angle Ω: Shoemake 1985,
    "Animating Rotation with Quaternion Curves", section 3.3. Where sin Ω vanishes the way is
    straight, which of opposite vectors leads through 0: no great circle is theirs alone.
    """
    t = torch.as_tensor(t, dtype=a.dtype, device=a.device)
    least = torch.finfo(a.dtype).eps  # a vector of no length has no direction
    length_a, length_b = (x.norm(dim=-1, keepdim=True).clamp(min=least) for x in (a, b))
    u, v = a / length_a, b / length_b
    # accurate for the smallest angles, where the arc cosine of u · v is not
    angle = 2 * torch.atan2((u - v).norm(dim=-1, keepdim=True), (u + v).norm(dim=-1, keepdim=True))
    sine = angle.sin()
    curved = sine > 1e-6
    sine = torch.where(curved, sine, 1.0)
    first = torch.where(curved, ((1 - t) * angle).sin() / sine, 1 - t)
    second = torch.where(curved, (t * angle).sin() / sine, t)
    length = torch.lerp(length_a, length_b, t)
    return first * (length / length_a) * a + second * (length / length_b) * b


def affines(generator: Generator) -> Iterator[tuple[int, Linear]]:
    """(layer of w+, map) of each affine map from w to styles."""
    for i, r in enumerate(generator.config.block_resolutions):
        block = generator.synthesis.get_submodule(f"b{r}")
        for name, layer in (("conv0", 2 * i - 1), ("conv1", 2 * i), ("torgb", 2 * i + 1)):
            if layer >= 0:  # the first block has no conv0
                affine: Any = block.get_submodule(f"{name}.affine")
                yield layer, affine


# ----------------------------------------------------------------------- the spread of w
#
# An encoder's or a search's w+ lies far from the w that any z is mapped to (Tov et al. 2021,
# arXiv:2102.02766, section 3): each layer goes too far, and the layers do not go together. The face
# generator bears that; a fine-tune has seen no such w and smears. So the w that its blocks read is
# clipped, coordinate by coordinate, along the principal axes of w (Härkönen et al. 2020,
# arXiv:2004.02546, section 2.1), then moved towards the mean of all layers, clipped as well:
# towards one w, as z gives them. The early blocks, which place the face, get the w+ as found.


@torch.no_grad()
def principal_axes(generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of w (D,), its principal axes (D, D), a column each, and the standard deviations
    along them (D,), of the w of always the same z."""
    rng = torch.Generator().manual_seed(seed_of("principal axes"))
    z = torch.randn(SAMPLES, generator.z_dim, generator=rng)
    w = generator.mapping(z.to(generator.w_avg)).cpu().double()  # (N, D)
    variances, axes = torch.linalg.eigh(torch.cov(w.T))
    spread = variances.clamp(min=0).sqrt()
    return w.mean(dim=0).to(generator.w_avg), axes.to(generator.w_avg), spread.to(generator.w_avg)


class StyleLimit(nn.Module):
    """ws (B, L, D) -> ws, those that the blocks of resolution >= `swap_resolution` read being
    within `deviations` standard deviations of the mean of w along each principal axis, and nearer
    to one another.

    The mean, axes and deviations are those of the generator's mapping network, of z drawn with a
    fixed seed. An infinite limit leaves ws as they are. ValueError where `deviations` is not a
    number above 0.

    A call may name another `swap_resolution`. Its `colours`, 0 to 1, move these w on towards the
    mean: at 1 every drawing has the generator's own colours, at 0 as much of the photo's as the
    limit leaves.
    """

    mean: Tensor
    axes: Tensor
    bound: Tensor

    @torch.no_grad()
    def __init__(
        self, generator: Generator, swap_resolution: int, deviations: float = LIMIT
    ) -> None:
        super().__init__()
        if not deviations > 0:
            raise ValueError(f"a style limit is a number of deviations above 0, not {deviations}")
        # a block's first w is also that of the toRGB before it; b4 has none before it
        resolutions = generator.config.block_resolutions
        self.first_of = {r: max(0, 2 * block - 1) for block, r in enumerate(resolutions)}
        self.first = self.first_of[swap_resolution]
        self.layers, self.num_ws = generator.layers, generator.num_ws  # what follows is no style
        self.infinite = deviations == math.inf
        if self.infinite:
            self.register_buffer("mean", generator.w_avg.clone())  # (D)
            return
        mean, axes, spread = principal_axes(generator)
        self.register_buffer("mean", mean)  # (D)
        self.register_buffer("axes", axes)  # (D, D), a column each
        self.register_buffer("bound", deviations * spread)  # (D)

    def forward(
        self, ws: Tensor, colours: float = 0.0, swap_resolution: int | None = None
    ) -> Tensor:
        first = self.first if swap_resolution is None else self.first_of[swap_resolution]
        mean, late = self.mean.to(ws.dtype), ws[:, first : self.layers]
        if not self.infinite:
            axes, bound = self.axes.to(ws.dtype), self.bound.to(ws.dtype)
            along = (ws[:, : self.layers] - mean) @ axes
            within = mean + along.clamp(-bound, bound) @ axes.T  # (B, layers, D)
            late = within[:, first:].lerp(within.mean(dim=1, keepdim=True), SHARED)
        if colours:
            late = late.lerp(mean.expand_as(late), colours)
        return torch.cat([ws[:, :first], late, ws[:, self.layers :]], dim=1)


# ------------------------------------------------------------------------------- files


def read_latents(path: Path, generator: Generator | DcganGenerator) -> Tensor:
    """z (N, Z) of a file that has them, else ws (N, L, D). ValueError for latents that are not this
    generator's, or not finite."""
    if isinstance(generator, Generator) and (path.is_dir() or "z" not in read_weights(path)):
        return read_ws(path, generator)
    return _read(path, "z", (generator.z_dim,))


def read_ws(path: Path, generator: Generator) -> Tensor:
    """(N, L, D) from a file of `infer.py --save latents`, or of several such, or from a folder."""
    files = find_files(path, frozenset({".safetensors"}), "latents file")
    shape = (generator.num_ws, generator.w_dim)
    return torch.cat([_read(file, "ws", shape) for file, _ in files])


def _read(path: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    found = read_weights(path).get(name)
    if found is None or found.shape[-len(shape) :] != shape or found.numel() == 0:
        what = "none" if found is None else f"one of shape {tuple(found.shape)}"
        wanted = ", ".join(map(str, shape))
        raise ValueError(
            f"{printable(path)} needs a tensor `{name}` of shape (N, {wanted}), and has {what}; "
            "give latents that were found with this generator"
        )
    return found.float().reshape(-1, *shape)


def write_latents(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A .safetensors file of `z` or `ws`, and of what else was found for that picture."""
    layout = torch.contiguous_format
    stored = {k: tensor.detach().cpu().clone(memory_format=layout) for k, tensor in tensors.items()}
    write_atomically(path, lambda file: save_file(stored, file))
