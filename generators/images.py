"""Pictures in and out: the only place where PIL and uint8 meet float tensors in [-1, 1].

    photo = to_tensor(open_image("me.jpg"))                       # (3, H, W) in [-1, 1]
    square = fit(open_image("me.jpg"), 64)                        # uint8 (3, R, R)
    grid(to_float(torch.stack([square] * 4))).save("four.png")

Data sets of them: `generators.data`. Letters: B batch, N pictures, H height, W width, R resolution.
"""

import errno
import io
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from generators.command import printable
from generators.disk import find_files, open_regular

MAX_PIXELS = 178_000_000  # a larger picture is refused: it would take > 0.5 GB once decoded
MAX_BYTES = 1 << 30  # a larger file is refused unread
FORMATS = ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"]  # all that are opened; MPO is JPEG
if find_spec("PIL.AvifImagePlugin"):  # Pillow 11.3 on
    FORMATS.append("AVIF")
SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .mpo .png .apng .webp .gif .bmp .tif .tiff .avif .ppm .pgm .pbm .pnm "
    ".heic .heif .jp2 .j2k .tga .ico .dib".split()  # these are not read, nor passed over unsaid
)



class TooManyPixels(ValueError):
    """A picture is larger than whoever asked for it takes."""


logging.getLogger("PIL").addHandler(logging.NullHandler())  # not to the console, if unconfigured

_ORIENTATION = 0x0112  # the EXIF tag
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# ------------------------------------------------------------------------ one picture


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float [-1, 1], any shape."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255], rounded; values outside are clipped. Any shape."""
    return ((images.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def to_tensor(image: Image.Image) -> Tensor:
    """A picture of any mode -> (3, H, W) in [-1, 1]."""
    return to_float(_pixels(_to_rgb(image)))


def to_pil(image: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] on any device -> an RGB picture; values outside are clipped."""
    return Image.fromarray(rearrange(to_uint8(image).cpu(), "c h w -> h w c").numpy())


def open_image(source: str | Path | bytes) -> Image.Image:
    """Read a picture file, or the bytes of one, as an upright RGB picture on white ground.

    EXIF orientation is applied, transparency is composited over white, 16-bit and float pictures
    are scaled to 8 bits, and of an animation the first frame is taken.

    Raises ValueError, one sentence with the file and the reason, when it is not a whole picture
    of FORMATS or has more than MAX_PIXELS pixels or MAX_BYTES bytes.
    """
    with warnings.catch_warnings():  # not thread-safe, hence not inside `decode`
        warnings.simplefilter("ignore")
        return decode(source)


def decode(
    source: str | Path | bytes, name: str = "", most_pixels: int | None = None
) -> Image.Image:
    """`open_image` without its silence, for threads: PIL may warn. most_pixels: None: MAX_PIXELS"""
    with _opened(source, name, most_pixels) as image:
        return _to_rgb(_upright(image))


def open_opacity(source: str | Path) -> Image.Image:
    """The alpha channel of a picture file as an upright picture of mode "L"; white, 255, where the
    picture is opaque. ValueError as `open_image`."""
    with warnings.catch_warnings(), _opened(source) as image:
        warnings.simplefilter("ignore")
        return _upright(image).convert("RGBA").getchannel("A")


@contextmanager
def _opened(
    source: str | Path | bytes, name: str = "", most_pixels: int | None = None
) -> Iterator[Image.Image]:
    """The decoded picture; what goes wrong with it, also while it is used, is one ValueError."""
    most_pixels = MAX_PIXELS if most_pixels is None else most_pixels
    name = name or ("the picture" if isinstance(source, bytes) else str(source))
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            size = file.seek(0, io.SEEK_END)
            file.seek(0)
            if not 0 < size <= MAX_BYTES:
                large = f"it has more than {MAX_BYTES:,} bytes; make it smaller first"
                raise OSError(errno.EFBIG, large if size else "the file is empty")
            # the formats are listed: others start programs (EPS) or are seldom looked after
            with Image.open(file, formats=FORMATS) as image:
                if image.width * image.height > most_pixels:
                    raise Image.DecompressionBombError
                image.load()
                yield image
                return
    except Image.DecompressionBombError:
        raise TooManyPixels(
            f"Cannot read {printable(name)}: it has more than {most_pixels:,} pixels; make it "
            "smaller first."
        ) from None
    except Image.UnidentifiedImageError:
        reason = "it is not a picture in a known format; convert it to JPEG or PNG"
    except MemoryError:
        reason = "it does not fit into this machine's memory; make it smaller first"
    except Exception as error:  # PIL's decoders raise nearly every type on damaged data
        text = printable(str(error) or type(error).__name__).rstrip(".")
        reason = getattr(error, "strerror", None) or f"it is damaged ({text})"
    raise ValueError(f"Cannot read {printable(name)}: {reason}.")


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a damaged EXIF block is no reason to lose the picture."""
    try:
        method = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # as above: nearly every type
        method = None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode -> RGB: deep pictures scaled to 8 bits, transparency composited over white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.mode == "F" or image.mode.startswith("I"):
        return Image.fromarray(_scale_to_8_bits(image)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image) -> np.ndarray:
    """Deep grey (I;16, I, F) -> uint8 (H, W). White is 65535, or 1 or 255 in a float picture that
    stays below, or the brightest pixel of a picture that goes beyond."""
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    brightest = values.max()
    whites = (1, 255, 65535) if image.mode == "F" else (65535,)
    white = next((white for white in whites if brightest <= white), brightest)
    return (values / white * 255).round().clip(0, 255).astype(np.uint8)


def _pixels(image: Image.Image) -> Tensor:
    """An RGB picture -> uint8 (3, H, W)."""
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w").contiguous()


def fit(image: Image.Image, resolution: int) -> Tensor:
    """An RGB picture -> its central square, resized with antialiasing, as uint8 (3, R, R)."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return _pixels(square.resize((resolution, resolution), Image.Resampling.LANCZOS))


# ---------------------------------------------------------------------- many pictures


def resize(
    images: Tensor, size: int | tuple[int, int], mode: Literal["bicubic", "area"] = "bicubic"
) -> Tensor:
    """(3, H, W) or (B, 3, H, W) -> the same with `size` = side or (H, W); antialiased.

    "area" averages, and never overshoots; "bicubic" is sharper and may leave [-1, 1] a little.
    """
    height, width = (size, size) if isinstance(size, int) else size
    if images.shape[-2:] == (height, width):
        return images
    batch = images if images.ndim == 4 else images[None]
    antialias = mode == "bicubic"
    batch = F.interpolate(batch, (height, width), mode=mode, antialias=antialias)
    return batch if images.ndim == 4 else batch[0]


def blurred(images: Tensor, sigma: float) -> Tensor:
    """(B, C, H, W) by a Gaussian of that many pixels, mirrored at the edges."""
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(images, [2 * max(1, round(3 * sigma)) + 1] * 2, [sigma, sigma])


def grid(images: Tensor, columns: int | None = None) -> Image.Image:
    """(N, 3, H, W) in [-1, 1] -> one picture, row by row; empty places are white.

    columns: pictures per row; the default makes the grid about square.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"A grid needs pictures (N, 3, H, W), not {tuple(images.shape)}.")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    missing = -len(images) % columns
    images = torch.cat([images.detach(), images.new_ones(missing, *images.shape[1:])])
    return to_pil(rearrange(images, "(r k) c h w -> c (r h) (k w)", k=columns))


def labelled(
    picture: Image.Image, labels: Sequence[str], rows: Sequence[str] = ()
) -> Image.Image:
    """The picture with a line of text above each of len(labels) columns of equal width, in the
    largest letters of 8 to 16 px that let all of them fit, and one to the left of each row."""
    width = picture.width / len(labels)
    longest = max(1.0, *(ImageFont.load_default(16).getlength(label) for label in labels))
    size = max(8.0, min(16.0, 16 * 0.95 * width / longest))
    font = ImageFont.load_default(size)
    left = round(max((font.getlength(row) for row in rows), default=-size) + size)
    result = Image.new("RGB", (left + picture.width, picture.height + round(1.6 * size)), "white")
    result.paste(picture, (left, top := result.height - picture.height))
    draw = ImageDraw.Draw(result)
    for i, label in enumerate(labels):
        draw.text((left + (i + 0.5) * width, 0.8 * size), label, "black", font, anchor="mm")
    for i, row in enumerate(rows):
        y = top + (i + 0.5) * picture.height / len(rows)
        draw.text((left - size / 2, y), row, "black", font, anchor="rm")
    return result


def find_images(source: str | Path) -> list[tuple[Path, Path]]:
    """[(file, relative path)] of pictures, see `find_files`: results can be written under the same
    names. Folder and glob go by suffix: a damaged picture is listed, and fails when opened."""
    return find_files(source, SUFFIXES, "picture")


def result_names(inputs: Sequence[Path], ending: re.Pattern[str]) -> list[Path]:
    """Relative names of pictures -> those of their results: without the suffix, if no other
    input's results could then be called the same.

    ending: what is added to a result's name before its suffix, as a pattern up to the end.
    """
    names = [(str(name).casefold(), str(name.with_suffix("")).casefold()) for name in inputs]
    taken = Counter(name for pair in names for name in set(pair))
    result = []
    for name, (_, stem) in zip(inputs, names, strict=True):
        root = ending.sub("", stem)
        unique = taken[stem] == 1 and (root == stem or root not in taken)
        result.append(name.with_suffix("") if unique else name)
    return result
