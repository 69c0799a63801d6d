"""Mouths of drawings, drawn anew: as wide as the photo's, and open where that one shows teeth.

    mouths = mouths_of(photos, *points_of(photos, aligner))     # (B, 3, S, S) FFHQ crops
    drawings = with_mouths(drawings, mouths)        # (B, 3, R, R), of the same people

A style that was trained against a discriminator draws one small mouth, whatever the photo's does.
Measured are MTCNN's corners of the mouth, and between them how much of it is light and not red; a
mouth that is very wide shows teeth in any light.
Drawn is a line, its ends up the more the mouth is wide, and below it an opening with its own lower
line. All of it is soft, so that it can be learnt at any resolution.

Shape letters: B batch, S side of a crop, R resolution, V steps along a strip.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from encoder.attributes import CHEEKS, FOUND, median_colour
from encoder.metrics import LUMA
from generators.images import blurred, resize

STRIP = (-0.2, 0.3)  # above and below the corners' line, in distances of the eyes
STEPS, MIDDLE = (15, 9), 0.25  # down and across; of the mouth's width to either side
RED = (0.06, 0.03)  # red less green, in parts of the cheeks', at which teeth end; its softness
TEETH = (0.2, 0.4)  # how light: from here on, within so much wholly
WIDE = (0.75, 0.4)  # width in distances of the eyes: the narrowest, and so much wider the widest
SMILES = (0.9, 0.04)  # a mouth with teeth is this wide; softness
GRINS = (0.55, 0.25)  # of the way to the widest: from here on open, within so much wholly

# in 64ths of the side, x first; colours in [-1, 1]
PLACE, AROUND = (32.0, 40.5), (9.0, 3.0)  # where the style draws its mouth, and how far from there
WIPED = (5.0, 3.2)  # half axes of what is wiped out
HALF_WIDTH, LIFT, DEPTH = (2.6, 5.2), (0.2, 1.8), 4.0  # narrowest and widest; of the opening
LINE = 0.55  # half width of a line
INK, INSIDE = (-0.25, -0.75, -0.75), (0.55, -0.35, -0.35)


@dataclass(frozen=True)
class Mouths:
    """Of a batch of photos."""

    wide: Tensor  # (B), 0 to 1
    open: Tensor  # (B), 0 to 1
    found: Tensor  # (B), whether the photo shows a face


@torch.no_grad()
def mouths_of(photos: Tensor, points: Tensor, scores: Tensor) -> Mouths:
    """Of FFHQ crops (B, 3, S, S) in [-1, 1], on their device, and of what
    `encoder.attributes.points_of` found in them, (B, 5, 2) and (B)."""
    images = photos.cpu().float()
    apart = (points[:, 1] - points[:, 0]).norm(dim=1)  # (B)
    across = points[:, 4] - points[:, 3]  # (B, 2)
    width = across.norm(dim=1) / apart.clamp(min=1e-3)
    down = torch.stack([-across[:, 1], across[:, 0]], dim=1)
    down = down / down.norm(dim=1, keepdim=True).clamp(min=1e-3) * apart[:, None]
    middle = (points[:, 3] + points[:, 4]) / 2
    u, v = torch.linspace(-MIDDLE, MIDDLE, STEPS[1]), torch.linspace(*STRIP, STEPS[0])
    places = middle[:, None, None] + u[:, None] * across[:, None, None]  # (B, 1, U, 2)
    places = places + v[:, None, None] * down[:, None, None]  # (B, V, U, 2)
    strip = F.grid_sample(images, 2 * places - 1, align_corners=False).mean(dim=3)  # (B, 3, V)
    cheeks = median_colour(resize(images, 64, "area"), CHEEKS)
    cheek = (cheeks[:, :, 0, 0] + 1).clamp(min=0.1)  # (B, 3)
    light = (strip + 1) / cheek[:, :, None]
    green, red = light[:, 1], light[:, 0] - light[:, 1]  # (B, V); lips are red and dark
    above = green.cummin(dim=1).values
    below = green.flip(1).cummin(dim=1).values.flip(1)
    peak = green - torch.maximum(above, below)  # light between two dark lips
    teeth = (peak * torch.sigmoid((RED[0] - red) / RED[1])).amax(dim=1)
    smiles = torch.sigmoid((width - SMILES[0]) / SMILES[1])
    wide = ((width - WIDE[0]) / WIDE[1]).clamp(0, 1)
    opened = smiles * ((teeth - TEETH[0]) / TEETH[1]).clamp(0, 1)
    opened = torch.maximum(opened, ((wide - GRINS[0]) / GRINS[1]).clamp(0, 1))
    found = (scores >= FOUND) & (apart > 0.1)
    return Mouths(*(x.to(photos.device) for x in (wide, opened, found)))


def with_mouths(drawings: Tensor, mouths: Mouths) -> Tensor:
    """Drawings (B, 3, R, R) in [-1, 1] with mouths like those of their photos; of photos that show
    no face, as they are. Not clamped."""
    size = drawings.shape[-1]
    ticks = (torch.arange(size, device=drawings.device) + 0.5) * 64 / size
    y, x = ticks[:, None], ticks[None]
    x0, y0 = (place.view(-1, 1, 1) for place in place_of(drawings))
    wide, opened = (value.view(-1, 1, 1).to(drawings) for value in (mouths.wide, mouths.open))
    half = HALF_WIDTH[0] + (HALF_WIDTH[1] - HALF_WIDTH[0]) * wide
    lift = LIFT[0] + (LIFT[1] - LIFT[0]) * wide

    # 1. The drawing's own mouth goes over into what is around it.
    wiped = 1 - ((x - x0) / WIPED[0]).square() - ((y - y0) / WIPED[1]).square()
    wiped = torch.sigmoid(3 * wiped)[:, None]  # (B, 1, R, R)
    kept = 1 - wiped + 1e-3
    spread = 3 * size / 64
    around = blurred(drawings * kept, spread) / blurred(kept, spread)
    made = drawings.lerp(around, wiped)

    # 2. The opening, then the lines.
    along = (x - x0) / half  # -1 and 1 at the ends
    within = torch.sigmoid(3 * half * (1 - along.abs()))
    upper = y0 + 0.3 - lift * (along.square() - 0.35)
    depth = DEPTH * opened * (1 - along.square()).clamp(min=0)
    is_open = (opened > 0.1).to(y0)
    inside = torch.sigmoid(5 * (y - upper)) * torch.sigmoid(5 * (upper + depth - y))
    made = made.lerp(colour(INSIDE, made), (inside * within * is_open)[:, None])
    lines = torch.maximum(
        torch.exp(-((y - upper) / LINE).square()),
        0.8 * is_open * torch.exp(-((y - upper - depth) / (0.8 * LINE)).square()),
    )
    made = made.lerp(colour(INK, made), (lines * within)[:, None])
    return torch.where(mouths.found.view(-1, 1, 1, 1), made, drawings)


def place_of(drawings: Tensor) -> tuple[Tensor, Tensor]:
    """x and y (B) of the drawn mouth, in 64ths: the middle of what is darker than what is around
    it, where mouths are."""
    size = drawings.shape[-1]
    ticks = (torch.arange(size, device=drawings.device) + 0.5) * 64 / size
    luma = (drawings * drawings.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)
    dark = (blurred(luma, 4 * size / 64) - luma).clamp(min=0)[:, 0]  # (B, R, R)
    likely = [
        torch.exp(-(((ticks - place) / reach) ** 4))
        for place, reach in zip(PLACE, AROUND, strict=True)
    ]
    weight = dark.square() * likely[0][None, :] * likely[1][:, None] + 1e-9
    weight = weight / weight.sum(dim=(1, 2), keepdim=True)
    return (weight.sum(dim=1) * ticks).sum(dim=1), (weight.sum(dim=2) * ticks).sum(dim=1)


def colour(rgb: tuple[float, float, float], like: Tensor) -> Tensor:
    """(3, 1, 1)."""
    return like.new_tensor(rgb).view(3, 1, 1)
