"""The models that come with the package, by name: a face generator, face128 or face64, and what
belongs to it. No torch, so that --help is answered at once.

    companion("face64", "encoder")        # "encoder64"
    companion("mine.safetensors", "encoder")     # None
"""

from pathlib import Path

SIDES = (128, 64)  # of the pictures, in pixels; the first is the default
KINDS = ("face", "anime", "sketch", "paint", "encoder", "curvature", "directions")
NAMES = (*(f"{kind}{side}" for side in SIDES for kind in KINDS), "superres64")

FACE = f"face{SIDES[0]}"  # the face generator of all commands, unless told otherwise

_WEIGHTS = Path(__file__).parent / "weights"
BUNDLED = {name: _WEIGHTS / f"{name}.safetensors" for name in NAMES}


def companion(face_generator: str | Path, kind: str) -> str | None:
    """The bundled model of a kind that belongs to a bundled face generator; None for any other."""
    name = str(face_generator).replace("face", kind, 1)
    return name if str(face_generator) in BUNDLED and name in BUNDLED else None
