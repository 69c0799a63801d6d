"""Drawings of photos, retouched, to train a style on: colours, ink, eyes and mouths.

    python -m encoder.retouch pairs/ --data faces/train.parquet
    accelerate launch -m generators.train stylegan2 --init anime128 --freeze-generator-below 16 \\
        --latents pairs/latents.safetensors --pairs pairs/drawings.parquet --paired-weight 1 …

What a style does wrong in the same way in every drawing can be put right in its drawings, and
learnt from them by regression.

*Halves.* A fine-tuned style may draw one of the two eyes better than the other, always the same
one: nothing in its training asks that the drawing of a mirrored photo be the mirrored drawing. So
each photo is drawn as it is and mirrored, and its drawing gets the better half, and the same half
of the mirrored photo's drawing, mirrored back. A turned head keeps its turn, as both are drawings
of that photo.

*Colours.* Hair is moved to the colour of the photo's, the ground to its light and colours, skin as
far to brown as the photo's is dark; fair faces stay as they were drawn. Where they are is read from
the drawing: skin is what has the colour of the cheeks, with what it encloses; hair what has the
colour above the forehead; all else is ground. Some are drawn with another photo's w in the blocks
that draw, and get its hair and skin: so these are learnt from these blocks' w, which a reference
gives them, and the ground from the rest.

*Ink.* Enlarged by super-resolution (`--size`), sharpened by an unsharp mask, made flat between
lines by a bilateral filter (Tomasi & Manduchi 1998; several passes, as Winnemöller et al. 2006,
"Real-Time Video Abstraction", section 3.1), and sharpened again, as regression is soft. Needs `pip
install '.[prepare]'`, for OpenCV.

*Eyes and mouths.* Drawn anew: two eyes of a kind (`encoder.retouch.eyes`), a mouth as wide and as
open as the photo's (`encoder.retouch.mouths`). Open mouths are few, so they are written `--laughs`
times.

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

from encoder.align import Aligner
from encoder.attributes import CHEEKS as PHOTO_CHEEKS
from encoder.attributes import HAIR, median_colour, points_of
from encoder.metrics import LUMA
from encoder.options import Models
from encoder.pipeline import Translator
from encoder.retouch.eyes import DRAWN_HAIR, turns_of, with_eyes
from encoder.retouch.mouths import mouths_of, with_mouths
from generators.checkpoint import load, resolve
from generators.command import command, console
from generators.data import first_pictures, open_dataset
from generators.disk import may_write
from generators.filters import DRAWINGS, LATENTS, opencv, write_pairs
from generators.images import blurred, resize, to_float, to_uint8
from generators.latents import mix
from generators.runs import check_numbers, progress
from generators.superres import SuperResolution

BATCH = 32
Half = Literal["left", "right"]
SEAM = 3 / 16  # of the side, over which one half goes over into the other

# places of a crop, in 64ths: rows and columns; centre and half axes of an ellipse, rows first
CHEEKS = (34, 48, 22, 42)  # of drawings; HAIR is of photos
FACE, HEAD = ((36, 32), (20.5, 19)), ((31, 32), (32, 29.5))
NECK = ((58, 32), (10, 11))
PALE = 0.05  # light of cheeks, in [-1, 1], from which on skin is as the style draws it
BROWN = (0.8, 1.05, 1.25)  # how much of the darkness goes to each channel, whatever the light was
SKIN_REACH, HAIR_REACH = (0.22, 0.04), (0.30, 0.07)  # RMS of a colour's distance; its softness
CLOSED = 4  # 64ths, within which what skin encloses is face
SPREAD = 3  # 64ths, of the ground's light
LINES = 1  # 64ths, of the unsharp mask
FLAT_REACH, FLAT_WINDOW, FLAT_COLOURS = 2, 7, 35  # 64ths; pixels; of 255
OPEN = 0.5  # a mouth that is as open laughs
SEEN = 128  # side at which photos' features are looked for, at least


@dataclass(frozen=True)
class RetouchConfig(Models):
    output: Annotated[Path, tyro.conf.Positional]  # folder, made if need be
    data: str  # photos: a folder, parquet, a saved Hugging Face data set
    images: int = 4000  # of them, evenly spread
    swap_resolution: int = 16  # first block of the fine-tune
    half: Half = "right"  # of the picture, that the style draws better
    hair: float = 0.8  # share of the way of its colour to the photo's: 0 as drawn, 1 the photo's
    ground: float = 0.6  # the same of the ground's light and colours
    skin: float = 1.0  # share of the photo's darkness that it gets
    strangers: float = 0.25  # share of photos that are drawn with another's hair and skin
    size: int | None = None  # side of the drawings in pixels; None: the generator's own
    superres: str = "superres64"  # enlarges to a larger --size: a bundled name or a file
    sharpen: float = 0.6  # share of what is finer than the blur that is added once more
    flatten: int = 4  # passes of the filter that makes areas flat
    eyes: bool = True  # drawn anew; off: as the style draws them
    mouths: bool = True  # drawn anew, like the photo's; off: as the style draws them
    laughs: int = 3  # times that a drawing with an open mouth is written: few are, none is learnt
    emphasis: float = 0.3  # share as of --sharpen, at last: what is learnt by regression is softer
    overwrite: bool = False  # replace files that exist

    def __post_init__(self) -> None:
        ranges = {
            "of 1 or more": ("images", "size", "laughs"),
            "of 0 or more": ("sharpen", "flatten", "emphasis"),
            "from 0 to 1": ("hair", "ground", "skin", "strangers"),
        }
        check_numbers(self, ranges)
        super().__post_init__()


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
    change = median_colour(hair_photos, HAIR) - median_colour(drawings, DRAWN_HAIR)  # (B, 3, 1, 1)
    photos, spread = resize(photos, size), SPREAD * size / 64
    light = blurred((photos - drawings) * rest, spread) / blurred(rest, spread).clamp(min=0.05)
    return drawings + hair * locks * change + ground * rest * light


def faces_and_hair(drawings: Tensor) -> tuple[Tensor, Tensor]:
    """Drawings (B, 3, R, R) -> how much each pixel is face, and how much hair: (B, 1, R, R) each,
    together at most 1."""
    unit = drawings.shape[-1] / 64
    inside, head = ellipse(drawings, *FACE), ellipse(drawings, *HEAD)
    skin = inside * like(drawings, median_colour(drawings, CHEEKS), SKIN_REACH)
    side = 2 * round(CLOSED * unit) + 1
    skin = F.max_pool2d(skin, side, 1, side // 2)  # a closing: eyes and mouth are face
    skin = -F.max_pool2d(-skin, side, 1, side // 2)
    face = blurred(skin * inside, unit)
    colour = median_colour(drawings, DRAWN_HAIR)
    locks = like(blurred(drawings, unit), colour, HAIR_REACH) * (1 - face) * head
    return face, blurred(locks, unit).minimum(1 - face)


def like(images: Tensor, colour: Tensor, reach: tuple[float, float]) -> Tensor:
    """(B, 3, R, R), (B, 3, 1, 1) -> (B, 1, R, R): 1 at that colour, half at the reach from it."""
    distance = (images - colour).square().mean(dim=1, keepdim=True).sqrt()
    return torch.sigmoid((reach[0] - distance) / reach[1])


def ellipse(images: Tensor, centre: tuple[float, float], axes: tuple[float, float]) -> Tensor:
    """(R, R): 1 within, 0 outside, soft at its edge."""
    size = images.shape[-1]
    places = (torch.arange(size, device=images.device) + 0.5) * 64 / size
    y, x = ((places - middle) / axis for middle, axis in zip(centre, axes, strict=True))
    return torch.sigmoid(8 * (1 - y[:, None].square() - x.square()))


def with_skin(drawings: Tensor, photos: Tensor, share: float) -> Tensor:
    """Drawings (B, 3, R, R) whose skin is browner where that of photos (B, 3, S, S) is darker than
    PALE; at a share of 1 as much darker as the photo's."""
    size = drawings.shape[-1]
    weights, tints = drawings.new_tensor(LUMA), drawings.new_tensor(BROWN).view(3, 1, 1)
    light = torch.einsum("c,bcij->bij", weights, median_colour(photos, PHOTO_CHEEKS))[:, None]
    tone = ((light + 1) / (PALE + 1)).clamp(0.1, 1)
    skin = like(blurred(drawings, size / 64), median_colour(drawings, CHEEKS), SKIN_REACH)
    where = faces_and_hair(drawings)[0].maximum(skin * ellipse(drawings, *NECK))
    return drawings + (drawings + 1) * (tone.pow(share * tints * where) - 1)


# -------------------------------------------------------------------------------- ink


def sharpened(images: Tensor, amount: float) -> Tensor:
    """Unsharp mask of (B, C, R, R); not clamped."""
    return images + amount * (images - blurred(images, LINES * images.shape[-1] / 64))


def flattened(images: Tensor, passes: int) -> Tensor:
    """(B, 3, R, R) in [-1, 1], each pass joining neighbours of like colour; on the CPU."""
    if not passes:
        return images
    cv2, reach = opencv(), FLAT_REACH * images.shape[-1] / 64
    made = []
    for picture in to_uint8(images.cpu()).permute(0, 2, 3, 1).contiguous().numpy():
        flat = picture
        for _ in range(passes):
            flat = cv2.bilateralFilter(flat, FLAT_WINDOW, FLAT_COLOURS, reach)
        made.append(torch.from_numpy(flat))
    return to_float(torch.stack(made).permute(0, 3, 1, 2)).to(images.device)


# ------------------------------------------------------------------------ the command


@torch.inference_mode()
def pairs(
    translator: Translator, photos: Tensor, strange: Tensor, config: RetouchConfig
) -> tuple[Tensor, Tensor]:
    """Photos (B, 3, R, R), and which (B) get hair, skin and the w of the blocks that draw from the
    one before them -> ws (2 B, L, D) and drawings (2 B, 3, R, R) of each photo, and mirrored;
    those that laugh several times."""
    limit, times = translator.synthesis.limit, torch.ones(len(photos), dtype=torch.long)

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
    if config.size is not None:
        drawings = translator.enlarge(drawings.clamp(-1, 1), config.size)
    drawings = flattened(sharpened(drawings, config.sharpen), config.flatten)
    drawings = with_skin(drawings, or_other(photos), config.skin)
    if translator.aligner is not None:
        found = points_of(photos, translator.aligner)
        if config.eyes:
            drawings = with_eyes(drawings, turns_of(*found))
        if config.mouths:
            mouths = mouths_of(photos, *found)
            drawings = with_mouths(drawings, mouths)
            times = 1 + (config.laughs - 1) * (mouths.open > OPEN)
    drawings = sharpened(drawings, config.emphasis).clamp(-1, 1)
    made = torch.stack([ws, mirrored_ws], dim=1), torch.stack([drawings, drawings.flip(-1)], dim=1)
    ws, drawings = (both.repeat_interleave(times, dim=0).flatten(0, 1) for both in made)
    return ws, drawings


def run(config: RetouchConfig) -> None:
    for name in (DRAWINGS, LATENTS):
        may_write(config.output / name, config.overwrite)
    models = config.face_generator, config.anime_generator, config.encoder
    translator = Translator.load(
        *models,
        swap_resolution=config.swap_resolution,
        aligner=Aligner() if config.eyes or config.mouths else None,
        superres=load(resolve(config.superres), SuperResolution) if config.size else None,
    )
    side = max(translator.crop_size, SEEN if translator.aligner else 0)
    data = open_dataset(config.data, side)
    photos = first_pictures(data, config.images)
    passed = (torch.arange(len(photos) + 1) * config.strangers).floor()
    strange = passed.diff() > 0  # (N), evenly spread
    made = []
    with progress(len(photos), 0, console.is_terminal, "photos") as advance:
        for batch in zip(photos.split(BATCH), strange.split(BATCH), strict=True):
            ws, drawings = pairs(translator, *batch, config)
            made.append((ws, to_uint8(drawings)))
            advance(min(len(made) * BATCH, len(photos)))
    drawn = (to_float(picture) for _, drawings in made for picture in drawings)
    write_pairs(config.output, torch.cat([ws for ws, _ in made]), drawn)


def main(argv: Sequence[str] | None = None) -> int:
    return command(RetouchConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
