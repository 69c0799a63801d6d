"""A drawing that keeps a photo's light and colours where they are no face: hair, outline, ground.

    palette = Palette(source.synthesis, ws, drawings)    # what each photo's latents ask for
    loss = palette(fakes, chosen)                        # (B,), fakes drawn at ws[chosen]

Both are looked at as 8 x 8 colours, each of them as the number of standard deviations from its mean
over photos, or over drawings: a fair photo asks for a fair drawing, not for its own colours, which
no drawing has. The middle, where eyes and mouth are, is left to the discriminator: asked as the
rest, drawings get the photo's grey mouth. Taigman et al. 2017 (arXiv:1611.02200, eq. 3) ask for
constancy in the features of a network instead.

Shape letters: N latents, B batch, L layers of w+, D dimension of w, R resolution.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIDE = 8
FACE = (slice(3, 7), slice(2, 6))  # rows and columns of eyes, nose and mouth
BATCH = 64


class Palette(nn.Module):
    """Targets of N latents, from a source generator's pictures of them."""

    targets: Tensor
    mean: Tensor
    deviation: Tensor
    weight: Tensor

    @torch.no_grad()
    def __init__(
        self,
        source: Callable[[Tensor], Tensor],  # ws (B, L, D) -> photos (B, 3, R, R)
        ws: Tensor,  # (N, L, D)
        drawings: Tensor,  # (M, 3, R, R) in [-1, 1], some hundred or more
    ) -> None:
        super().__init__()
        photos = torch.cat([colours(source(batch)) for batch in ws.split(BATCH)])  # (N, 3, 8, 8)
        drawn = colours(drawings.to(ws.device))
        self.register_buffer("targets", (photos - photos.mean(dim=0)) / photos.std(dim=0))
        self.register_buffer("mean", drawn.mean(dim=0))  # (3, 8, 8)
        self.register_buffer("deviation", drawn.std(dim=0))
        weight = torch.ones(SIDE, SIDE, device=ws.device)
        weight[FACE] = 0
        self.register_buffer("weight", weight / weight.mean())

    def forward(self, images: Tensor, chosen: Tensor) -> Tensor:
        """Mean squared difference, in deviations, (B,), of pictures (B, 3, R, R) drawn at the
        latents of these numbers (B,)."""
        found = (colours(images.float()) - self.mean) / self.deviation
        return (self.weight * (found - self.targets[chosen]).square()).mean(dim=(1, 2, 3))


def colours(images: Tensor) -> Tensor:
    """(B, 3, R, R) -> (B, 3, 8, 8)."""
    return F.avg_pool2d(images, images.shape[-1] // SIDE)
