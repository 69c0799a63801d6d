"""Random pictures for the tests.

encoded(photo(seed=1, width=16, height=12), "PNG")
"""

import io

import numpy as np
from PIL import Image


def photo(seed: int = 0, width: int = 12, height: int = 12) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str = "WEBP", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()
