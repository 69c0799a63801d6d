"""Eyes of drawings, drawn anew: both of one kind, the farther one of a turned head narrower.

    turns = turns_of(*points_of(photos, aligner))   # (B, 3, S, S) FFHQ crops
    drawings = with_eyes(drawings, turns)           # (B, 3, R, R), of the same people

A style that was trained on few pictures draws eyes as dark spots, and of a turned head one large
and one small. In an FFHQ crop eyes are always at the same two places, so here they are drawn there:
a white, an iris that is dark above and light below, a pupil, two lights, an upper lid that is
thicker outside, a part of the lower one. The iris goes with the hair, amber below dark, green below
brown and blue below fair: colours that follow from nothing in the photo are learnt as grey. All of
it is soft, for any resolution.

Shape letters: B batch, S side of a crop, R resolution.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from encoder.attributes import FOUND, median_colour

# in 64ths of the side; colours in [-1, 1]
APART, DOWN = 9.3, 31.0  # from the middle; from the top
HALF_WIDTH, HALF_HEIGHT = 5.0, 4.9
SKIN, DRAWN_HAIR = (34, 46, 24, 40), (4, 16, 20, 44)  # rows and columns, of drawings
NARROW, NEAR, SHIFT = 0.35, 0.18, 1.2  # of a profile: the farther eye; how both move
# an iris's hue in degrees: amber, then green and blue where hair's mean of three channels is higher
HUE, STEPS, SOFTNESS = 30.0, ((-0.45, 95.0), (-0.1, 90.0)), 0.05
CHROMA = 0.44  # of an iris: how far its channels are from their mean
INK, WHITE, SHADE = (-0.72, -0.8, -0.78), (0.93, 0.93, 0.95), 0.35  # the last below the upper lid
EDGE = 2.0  # how steep edges are, per pixel

# of an eye, in its half width and half height
WIPED = (1.5, 1.45)  # half axes
TOP, BOTTOM = (0.95, 0.55, 0.12), (0.92, 0.75, 0.04)  # lids: height, roundness, outer end lower
IRIS, PUPIL, GAZE = (0.60, 0.93), (0.27, 0.45), 0.12  # half axes; moved so much in profile
LIGHTS = ((-0.20, -0.42, 0.24, 0.26, 1.0), (0.24, 0.45, 0.14, 0.15, 0.8))  # place, axes, strength
LID, LASHES, RIM = (0.75, 1.3), 0.5, 0.5  # half widths of lines in 64ths, inner to outer end


@dataclass(frozen=True)
class Turns:
    """Of a batch of photos."""

    turn: Tensor  # (B), -1 to 1: the nose off the middle of the eyes, in half their distance
    found: Tensor  # (B), whether the photo shows a face


def turns_of(points: Tensor, scores: Tensor) -> Turns:
    """Of what `encoder.attributes.points_of` found, (B, 5, 2) and (B)."""
    left, right, nose = points[:, 0, 0], points[:, 1, 0], points[:, 2, 0]
    apart = right - left
    turn = ((2 * nose - left - right) / apart.clamp(min=1e-3)).clamp(-1, 1)
    return Turns(turn, (scores >= FOUND) & (apart > 0.1))


def with_eyes(drawings: Tensor, turns: Turns) -> Tensor:
    """Drawings (B, 3, R, R) in [-1, 1] with such eyes; of photos that show no face, as they are.
    Not clamped."""
    size = drawings.shape[-1]
    ticks = (torch.arange(size, device=drawings.device) + 0.5) * 64 / size
    y, x = ticks[:, None], ticks[None]
    turn = turns.turn.to(drawings).view(-1, 1, 1)
    iris, skin = irises(drawings), median_colour(drawings, SKIN)
    made = drawings
    for side in (-1, 1):
        far = (turn * side).clamp(0, 1)  # the nose points to this side
        half = HALF_WIDTH * (1 - NARROW * far)
        middle = 32 + side * APART * (1 - NEAR * far) + SHIFT * turn
        across, v = torch.broadcast_tensors((x - middle) / half, (y - DOWN) / HALF_HEIGHT)
        made = with_eye(made, across, v, half, side, turn, iris, skin)
    return torch.where(turns.found.to(made.device).view(-1, 1, 1, 1), made, drawings)


def with_eye(
    drawings: Tensor,
    across: Tensor,  # (B, R, R), to the right in half widths
    v: Tensor,  # (B, R, R), down in half heights
    half: Tensor,  # (B, 1, 1), the half width in 64ths
    side: int,  # -1: the left one of the picture
    turn: Tensor,  # (B, 1, 1)
    iris: Tensor,  # (B, 3, 1, 1)
    skin: Tensor,  # (B, 3, 1, 1)
) -> Tensor:
    """Drawings (B, 3, R, R) with one eye."""
    steep, u = EDGE * drawings.shape[-1] / 64, across * side  # u points outward
    ink, white = (drawings.new_tensor(rgb).view(1, 3, 1, 1) for rgb in (INK, WHITE))

    def within(distance: Tensor) -> Tensor:
        """1 where a distance in 64ths is above 0, softly."""
        return torch.sigmoid(steep * distance)

    def ellipse(x: Tensor, y: Tensor, softness: float) -> Tensor:
        return torch.sigmoid(softness * (1 - x.square() - y.square()))

    def line(distance: Tensor, width: Tensor | float) -> Tensor:
        return torch.exp(-(distance / width).square())

    def painted(picture: Tensor, paint: Tensor, where: Tensor) -> Tensor:
        return picture.lerp(paint.expand_as(picture), where[:, None])

    arch = (1 - (0.94 * u).square()).clamp(min=0)
    top = -TOP[0] * arch.pow(TOP[1]) + TOP[2] * u
    bottom = BOTTOM[0] * arch.pow(BOTTOM[1]) + BOTTOM[2] * u
    above, below = (v - top) * HALF_HEIGHT, (bottom - v) * HALF_HEIGHT  # inside, in 64ths
    opened = within(above) * within(below) * within((1 - u.abs()) * half)

    # 1. Skin, then the white, darker below the upper lid.
    made = painted(drawings, skin, ellipse(u / WIPED[0], v / WIPED[1], 5))
    shade = torch.sigmoid(steep / 2 * ((top + 0.38 - v) * HALF_HEIGHT))
    made = painted(made, white - SHADE * shade[:, None], opened)

    # 2. The iris, its rim and the pupil.
    looking = across - GAZE * turn
    radius = torch.hypot(looking / IRIS[0], (v - 0.02) / IRIS[1])
    inside = (1 - radius) * IRIS[0] * half
    depth = ((v + 0.9) / 1.75).clamp(0, 1)[:, None]
    colour = torch.lerp(0.9 * iris - 0.75, iris + 0.55, depth).clamp(-1, 1)
    made = painted(made, colour, within(inside) * opened)
    made = painted(made, ink, 0.8 * line(inside, RIM) * opened)
    made = painted(made, ink, 0.9 * ellipse(looking / PUPIL[0], v / PUPIL[1], 5) * opened)
    for x0, y0, wide, high, strength in LIGHTS:  # on the same side of both eyes
        light = ellipse((looking - x0) / wide, (v - y0) / high, 6)
        made = painted(made, torch.ones_like(ink), strength * light * opened)

    # 3. The lids.
    outer = (0.5 + 0.5 * u).clamp(0, 1)
    lid = line(above + 0.2, LID[0] + (LID[1] - LID[0]) * outer) * within((1.12 - u.abs()) * half)
    made = painted(made, ink, lid)
    outside = torch.sigmoid(1.5 * (u + 0.1) * half) * within((0.95 - u.abs()) * half)
    return painted(made, ink, 0.75 * line(below, LASHES) * outside)


def irises(drawings: Tensor) -> Tensor:
    """(B, 3, R, R) -> (B, 3, 1, 1), less their grey."""
    light = median_colour(drawings, DRAWN_HAIR).mean(dim=1, keepdim=True)
    hue = torch.full_like(light, HUE)
    for at, turn in STEPS:
        hue = hue + turn * torch.sigmoid((light - at) / SOFTNESS)
    channels = light.new_tensor((0, 120, 240)).view(3, 1, 1)
    return CHROMA * torch.cos(torch.deg2rad(hue - channels))
