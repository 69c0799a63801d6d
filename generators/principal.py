"""How w is spread, and keeping the w of fine-tuned blocks within that spread.

    limit = StyleLimit(face, from_resolution=16)         # of the blocks from 16 on
    ws = limit(ws)                                       # (B, L, D)

An encoder's or a search's w+ lies far from the w that any z is mapped to (Tov et al. 2021,
arXiv:2102.02766, section 3). The face generator bears that; a fine-tune has seen no such w and
smears. So the w that its blocks alone read is clipped, coordinate by coordinate, along the
principal axes of w (Härkönen et al. 2020, arXiv:2004.02546, section 2.1), while the early blocks,
which place the face, get the w+ as it was found.

Shape letters: B batch, L layers of w+, D w dimension, N samples.
"""

import math

import torch
from torch import Tensor, nn

from generators.runs import seed_of
from generators.stylegan2 import Generator

SAMPLES = 8192  # of z, that the axes are measured with
DEVIATIONS = 1.5  # see benchmarks/LOG.md


class StyleLimit(nn.Module):
    """ws (B, L, D) -> ws, those that only the blocks of resolution >= `from_resolution` read being
    within `deviations` standard deviations of the mean of w along each principal axis.

    The mean, axes and deviations are those of the generator's mapping network, of z drawn with a
    fixed seed. ValueError where `deviations` is not a number above 0.
    """

    mean: Tensor
    axes: Tensor
    bound: Tensor

    @torch.no_grad()
    def __init__(
        self, generator: Generator, from_resolution: int, deviations: float = DEVIATIONS
    ) -> None:
        super().__init__()
        if not 0 < deviations < math.inf:
            raise ValueError(f"a style limit is a number of deviations above 0, not {deviations}")
        # a block shares its first w with the toRGB of the block before it; b4 has none before it
        self.first = 2 * generator.config.block_resolutions.index(from_resolution)
        rng = torch.Generator().manual_seed(seed_of("principal axes"))
        z = torch.randn(SAMPLES, generator.z_dim, generator=rng)
        w = generator.mapping(z.to(generator.w_avg)).cpu().double()  # (N, D)
        variances, axes = torch.linalg.eigh(torch.cov(w.T))
        self.register_buffer("mean", w.mean(dim=0))  # (D)
        self.register_buffer("axes", axes)  # (D, D), a column each
        self.register_buffer("bound", deviations * variances.clamp(min=0).sqrt())  # (D)
        self.to(generator.w_avg)

    def forward(self, ws: Tensor) -> Tensor:
        mean, axes, bound = (x.to(ws.dtype) for x in (self.mean, self.axes, self.bound))
        along = (ws[:, self.first :] - mean) @ axes  # (B, L', D)
        return torch.cat([ws[:, : self.first], mean + along.clamp(-bound, bound) @ axes.T], dim=1)
