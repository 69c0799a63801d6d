"""Drawings of photos, retouched, to train a style on: two like halves, the photo's hair, lines.

    python -m encoder.retouch pairs/ --data faces/train.parquet
    accelerate launch -m generators.train stylegan2 --init anime64 --freeze-generator-below 16 \\
        --latents pairs/latents.safetensors --pairs pairs/drawings.parquet --paired-weight 1 …

What a style does wrong in the same way in every drawing can be put right in its drawings, and
learnt from them by regression.

*Halves.* A fine-tuned style may draw one of the two eyes better than the other, always the same
one: nothing in its training asks that the drawing of a mirrored photo be the mirrored drawing. So
each photo is drawn as it is and mirrored, and its drawing gets the better half, and the same half
of the mirrored photo's drawing, mirrored back. A turned head keeps its turn, as both are drawings
of that photo.

*Colours.* Hair is moved to the colour of the photo's, the ground to its light and colours; the face
stays as it was drawn. Where they are is read from the drawing: skin is what has the colour of the
cheeks, with what it encloses; hair what has the colour above the forehead; all else is ground. Some
are drawn with another photo's w in the blocks that draw, and get its hair: so hair is learnt from
these blocks' w, which a reference gives them, and the ground from the rest.

*Lines.* Sharpened by an unsharp mask, since regression is soft.

Writes OUT/drawings.parquet and OUT/latents.safetensors, as `generators.filters` does: each photo,
then the mirrored photo, whose drawing is the mirrored one.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

from encoder.attributes import HAIR
from encoder.pipeline import Translator
from generators.command import command, console
from generators.data import first_pictures, open_dataset
from generators.disk import may_write
from generators.filters import DRAWINGS, LATENTS, write_pairs
from generators.images import resize
from generators.latents import mix
from generators.runs import check_numbers, progress

BATCH = 32
Half = Literal["left", "right"]
SEAM = 3 / 16  # of the side, over which one half goes over into the other

# places of a crop, in 64ths: rows and columns; centre and half axes of an ellipse, rows first
CHEEKS, DRAWN_HAIR = (34, 48, 22, 42), (4, 16, 20, 44)  # of drawings; HAIR is of photos
FACE, HEAD = ((36, 32), (20.5, 19)), ((31, 32), (32, 29.5))
SKIN_REACH, HAIR_REACH = (0.22, 0.04), (0.30, 0.07)  # RMS of a colour's distance; its softness
CLOSED = 4  # 64ths, within which what skin encloses is face
SPREAD = 3  # 64ths, of the ground's light
LINES = 1  # 64ths, of the unsharp mask


@dataclass(frozen=True)
class RetouchConfig:
    output: Annotated[Path, tyro.conf.Positional]  # folder, made if need be
    data: str  # photos: a folder, parquet, a saved Hugging Face data set
    images: int = 4000  # of them, evenly spread
    encoder: str = "encoder64"  # a bundled name or a file
    face_generator: str = "face64"  # the encoder's: a bundled name or a file
    anime_generator: str = "anime64"  # a fine-tune of it: a bundled name or a file
    swap_resolution: int = 16  # first block of the fine-tune
    half: Half = "right"  # of the picture, that the style draws better
    hair: float = 0.8  # share of the way of its colour to the photo's: 0 as drawn, 1 the photo's
    ground: float = 0.6  # the same of the ground's light and colours
    strangers: float = 0.25  # share of photos that are drawn with another's hair
    sharpen: float = 0.7  # share of what is finer than the blur that is added once more
    overwrite: bool = False  # replace files that exist

    def __post_init__(self) -> None:
        ranges = {
            "of 1 or more": ("images",),
            "of 0 or more": ("sharpen",),
            "from 0 to 1": ("hair", "ground", "strangers"),
        }
        check_numbers(self, ranges)


# ----------------------------------------------------------------------------- halves


def joined_halves(drawings: Tensor, mirrored: Tensor, half: Half) -> Tensor:
    """Drawings (B, 3, R, R) of photos, and of the mirrored photos -> (B, 3, R, R): the named half
    of the first, and of the second, mirrored back, what then is the other half."""
    size = drawings.shape[-1]
    places = (torch.arange(size, device=drawings.device) + 0.5) / size - 0.5
    share = (places / SEAM + 0.5).clamp(0, 1)  # (R), of the right half
    share = share if half == "right" else 1 - share
    return share * drawings + (1 - share) * mirrored.flip(-1)


# ---------------------------------------------------------------------------- colours


def with_colours(
    drawings: Tensor, photos: Tensor, hair_photos: Tensor, hair: float, ground: float
) -> Tensor:
    """Drawings with those shares of the way to the hair of `hair_photos`, and to the ground of
    their photos. (B, 3, R, R) in [-1, 1], photos of any side; not clamped."""
    size = drawings.shape[-1]
    face, locks = faces_and_hair(drawings)  # (B, 1, R, R)
    rest = (1 - face - locks).clamp(0, 1)
    change = median(hair_photos, HAIR) - median(drawings, DRAWN_HAIR)  # (B, 3, 1, 1)
    photos, spread = resize(photos, size), SPREAD * size / 64
    light = blurred((photos - drawings) * rest, spread) / blurred(rest, spread).clamp(min=0.05)
    return drawings + hair * locks * change + ground * rest * light


def faces_and_hair(drawings: Tensor) -> tuple[Tensor, Tensor]:
    """Drawings (B, 3, R, R) -> how much each pixel is face, and how much hair: (B, 1, R, R) each,
    together at most 1."""
    unit = drawings.shape[-1] / 64
    inside, head = ellipse(drawings, *FACE), ellipse(drawings, *HEAD)
    skin = inside * like(drawings, median(drawings, CHEEKS), SKIN_REACH)
    side = 2 * round(CLOSED * unit) + 1
    skin = F.max_pool2d(skin, side, 1, side // 2)  # a closing: eyes and mouth are face
    skin = -F.max_pool2d(-skin, side, 1, side // 2)
    face = blurred(skin * inside, unit)
    colour = median(drawings, DRAWN_HAIR)
    locks = like(blurred(drawings, unit), colour, HAIR_REACH) * (1 - face) * head
    return face, blurred(locks, unit).minimum(1 - face)


def like(images: Tensor, colour: Tensor, reach: tuple[float, float]) -> Tensor:
    """(B, 3, R, R), (B, 3, 1, 1) -> (B, 1, R, R): 1 at that colour, half at the reach from it."""
    distance = (images - colour).square().mean(dim=1, keepdim=True).sqrt()
    return torch.sigmoid((reach[0] - distance) / reach[1])


def median(images: Tensor, place: tuple[int, int, int, int]) -> Tensor:
    """(B, 3, R, R) -> (B, 3, 1, 1), of rows and columns in 64ths."""
    top, bottom, left, right = (round(edge * images.shape[-1] / 64) for edge in place)
    return images[:, :, top:bottom, left:right].flatten(2).median(dim=2).values[:, :, None, None]


def ellipse(images: Tensor, centre: tuple[float, float], axes: tuple[float, float]) -> Tensor:
    """(R, R): 1 within, 0 outside, soft at its edge."""
    size = images.shape[-1]
    places = (torch.arange(size, device=images.device) + 0.5) * 64 / size
    y, x = ((places - middle) / axis for middle, axis in zip(centre, axes, strict=True))
    return torch.sigmoid(8 * (1 - y[:, None].square() - x.square()))


# ------------------------------------------------------------------------------ lines


def sharpened(images: Tensor, amount: float) -> Tensor:
    """Unsharp mask of (B, C, R, R); not clamped."""
    return images + amount * (images - blurred(images, LINES * images.shape[-1] / 64))


def blurred(images: Tensor, sigma: float) -> Tensor:
    """By a Gaussian of that many pixels, mirrored at the edges, (B, C, R, R)."""
    return gaussian_blur(images, [2 * max(1, round(3 * sigma)) + 1] * 2, [sigma, sigma])


# ------------------------------------------------------------------------ the command


@torch.inference_mode()
def pairs(
    translator: Translator, photos: Tensor, strange: Tensor, config: RetouchConfig
) -> tuple[Tensor, Tensor]:
    """Photos (B, 3, R, R), and which (B) get hair and the w of the blocks that draw from the one
    before them -> ws (2 B, L, D) and drawings (2 B, 3, R, R) of each photo, and mirrored."""
    limit = translator.synthesis.limit

    def or_other(x: Tensor) -> Tensor:
        return torch.where(strange.view(-1, *[1] * (x.ndim - 1)), x.roll(1, 0), x)

    def drawn(photos: Tensor) -> tuple[Tensor, Tensor]:
        own = translator.encoder(photos)
        other = or_other(own)
        drawings = translator.synthesis(own, drawing_ws=other)
        return mix(own, other, limit.first, limit.layers), drawings

    (ws, first), (mirrored_ws, second) = drawn(photos), drawn(photos.flip(-1))
    drawings = joined_halves(first, second, config.half).clamp(-1, 1)
    drawings = with_colours(drawings, photos, or_other(photos), config.hair, config.ground)
    drawings = sharpened(drawings, config.sharpen).clamp(-1, 1)
    both = torch.stack([drawings, drawings.flip(-1)], dim=1)
    return torch.stack([ws, mirrored_ws], dim=1).flatten(0, 1), both.flatten(0, 1)


def run(config: RetouchConfig) -> None:
    for name in (DRAWINGS, LATENTS):
        may_write(config.output / name, config.overwrite)
    models = config.face_generator, config.anime_generator, config.encoder
    translator = Translator.load(*models, swap_resolution=config.swap_resolution)
    data = open_dataset(config.data, translator.encoder.config.resolution)
    photos = first_pictures(data, config.images)
    passed = (torch.arange(len(photos) + 1) * config.strangers).floor()
    strange = passed.diff() > 0  # (N), evenly spread
    made = []
    with progress(len(photos), 0, console.is_terminal, "photos") as advance:
        for batch in zip(photos.split(BATCH), strange.split(BATCH), strict=True):
            made.append(pairs(translator, *batch, config))
            advance(min(len(made) * BATCH, len(photos)))
    ws, drawings = (torch.cat(parts) for parts in zip(*made, strict=True))
    write_pairs(config.output, ws, drawings)


def main(argv: Sequence[str] | None = None) -> int:
    return command(RetouchConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
