"""How far apart two batches of pictures are in their patches, as distributions: a judge of pixels
that is not trained.

    loss = patch_distance(fakes, real, rng)       # (), >= 0; gradients reach the fakes

Every patch is looked at through random filters; what one filter gives for all patches of a batch,
in order of size, is compared with what it gives for the other batch's: a sliced Wasserstein
distance (Rabin et al. 2012, "Wasserstein Barycenter and Its Application to Texture Mixing",
section 2). Heitz et al. 2021 (arXiv:2006.07229) use it on features, Elnekave and Weiss 2022
(arXiv:2203.12862) on patches of pixels, as here. It sees what feature networks forgive, skin burnt
out to white, no black, pale colours, and knows nothing of what a patch shows. It is taken at three
sizes, and again within windows where hair, face and eyes are, as pictures have faces in one place.

Shape letters: B batch, R resolution, K filters, S side of a filter, N patches of a batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 5  # pixels
FILTERS, FLAT = 24, 6  # in each window and size, of which so many see nothing but a colour
SHRUNK = (1, 2, 4)  # by mean
DENSE = 64  # side of larger pictures of which no more patches are looked at
# rows and columns, in shares of the side: all, face, hair above it, eyes
WINDOWS = (
    ((0, 1), (0, 1)),
    ((3 / 8, 7 / 8), (7 / 32, 25 / 32)),
    ((0, 11 / 32), (1 / 8, 7 / 8)),
    ((13 / 32, 21 / 32), (1 / 4, 3 / 4)),
)


def patch_distance(fakes: Tensor, real: Tensor, rng: torch.Generator) -> Tensor:
    """(B, 3, R, R) in [-1, 1], both -> (), the mean over filters, sizes and windows of the mean
    absolute difference; `rng` (CPU) draws the filters. ValueError for batches of two shapes."""
    if fakes.shape != real.shape:
        raise ValueError(f"pictures {tuple(fakes.shape)} and {tuple(real.shape)} are not as many")
    distances = []
    with torch.autocast(fakes.device.type, enabled=False):
        for factor in SHRUNK:
            both = F.avg_pool2d(torch.cat([fakes, real]).float(), factor)
            for window in WINDOWS:
                seen = cut(both, window)
                filters = random_filters(min(SIDE, *seen.shape[-2:]), rng).to(fakes.device)
                stride = 2 if factor == 1 and len(seen[0, 0]) > 2 * SIDE else 1
                stride *= max(1, fakes.shape[-1] // DENSE)
                found = F.conv2d(seen, filters, stride=stride).transpose(0, 1)  # (K, 2 B, h, w)
                ours, theirs = (half.flatten(1).sort(dim=1).values for half in found.chunk(2, 1))
                distances.append((ours - theirs).abs().mean())
    return torch.stack(distances).mean()


def cut(pictures: Tensor, window: tuple[tuple[float, float], tuple[float, float]]) -> Tensor:
    """The window of each, a pixel a side at least."""
    spans = []
    for size, (low, high) in zip(pictures.shape[-2:], window, strict=True):
        first = min(int(low * size), size - 1)
        spans.append(slice(first, max(int(high * size), first + 1)))
    return pictures[..., spans[0], spans[1]]


def random_filters(side: int, rng: torch.Generator) -> Tensor:
    """(K, 3, S, S) of unit norm, the first of them flat."""
    filters = torch.randn(FILTERS, 3, side, side, generator=rng)
    filters[:FLAT] = torch.randn(FLAT, 3, 1, 1, generator=rng)
    return filters / filters.flatten(1).norm(dim=1)[:, None, None, None]
