"""One client's frames to drawings: the messages, the settings they carry, and what is done to them.

    artist = Artist(translator)                          # its settings and limits are for all
    sitter = Sitter(artist)                              # one for each client: who is followed
    settings, picture = artist.read(message)             # Refused, with a code and a sentence
    answer = sitter.draw(settings, picture)              # bytes to send back

A message, either way: the length of a header (uint32, little endian), the header (JSON, UTF-8), and
the bytes of the pictures. A request's header: `id`, `still`, `reconstruction` and the settings; of
what it leaves out the default counts. An answer's header: `id` and either `error` {code, message},
or `faces`, `box` (left, top, right, bottom in 0 to 1), `ms` and `parts`, the pictures in their
order: {name, type, bytes}.

Shape letters: K blocks of a generator.
"""

from __future__ import annotations

import io
import json
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from PIL import Image
from torch import Tensor

from encoder.align import Face
from encoder.pipeline import Translator, clock
from encoder.video.track import Tracker
from generators.command import printable
from generators.images import TooManyPixels, decode, to_pil

Code = Literal["no-face", "too-large", "bad-picture", "bad-request", "busy", "gone"]

MOST_BYTES = 8 << 20  # of a picture as it comes
MOST_PIXELS = 16_000_000  # of a picture decoded: 48 MB
MOST_HEADER = 4096  # bytes
SIDE = 1600  # pixels of the longest side: what clients should send at most
MOST_STEPS = 100  # of refinement
LARGEST = 1024  # side of an enlarged drawing in pixels
WHOLE = ("swap", "refine", "size")  # settings that are whole numbers
QUALITY = 92  # of the JPEG of a live drawing; stills are PNG


class Refused(ValueError):
    """A request that is not fulfilled; the connection goes on."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Settings:
    """Of one request, checked."""

    id: int
    still: bool
    reconstruction: bool
    swap: int  # drawn blocks, 1 to K
    colours: float  # 0: the photo's, 1: the drawing's own
    truncation: float  # 1: the latent as found, 0: the average face
    refine: int  # steps, of a still
    size: int  # pixels
    style: str  # of the drawing


def pack(header: Mapping[str, Any], *pictures: bytes) -> bytes:
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    return b"".join((struct.pack("<I", len(text)), text, *pictures))


def unpack(message: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, what follows it). Refused where it is no such message."""
    length = int.from_bytes(message[:4], "little")
    if len(message) < 4 or length > min(MOST_HEADER, len(message) - 4):
        raise Refused("bad-request", "The message has no header, or one that is too long.")
    try:
        header = json.loads(message[4 : 4 + length])
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise Refused("bad-request", "The message's header is not a JSON object.")
    return header, message[4 + length :]


class Artist:
    """What all clients share: the translator, and what may be asked of it."""

    def __init__(self, translator: Translator, name: str = "") -> None:
        self.translator, self.name = translator, name
        resolutions = translator.synthesis.resolutions
        self.resolutions = resolutions[::-1]  # n drawn blocks: from the n-th of these on
        own = translator.resolution
        styles = translator.synthesis.styles
        sizes = [own, *(s for s in (2 * own, 4 * own, 8 * own) if s <= LARGEST)]
        self.offered: dict[str, dict[str, Any]] = {
            "swap": {
                "min": 1,
                "max": len(resolutions),
                "step": 1,
                "value": self.resolutions.index(translator.synthesis.swap_resolution) + 1,
            },
            "colours": {"min": 0, "max": 1, "step": 0.05, "value": 0},
            "truncation": {"min": 0, "max": 1.2, "step": 0.05, "value": translator.truncation},
            "refine": {"min": 0, "max": MOST_STEPS, "step": 5, "value": 0, "still": True},
            "size": {"choices": sizes, "value": sizes[0]},
            "style": {"choices": list(styles), "value": styles[0]},
        }
        if len(styles) == 1:
            del self.offered["style"]  # no choice
        self.limits = {"bytes": MOST_BYTES, "pixels": MOST_PIXELS, "side": SIDE}

    @property
    def greeting(self) -> bytes:
        return pack({"name": self.name, "settings": self.offered, "limits": self.limits})

    def read(self, message: bytes) -> tuple[Settings, bytes]:
        """A request's settings and picture. Refused, where something in it is not as it must be."""
        header, picture = unpack(message)
        return self.settings(header), picture

    def settings(self, given: Mapping[str, Any]) -> Settings:
        unknown = given.keys() - Settings.__dataclass_fields__.keys()
        if unknown:
            names = ", ".join(sorted(map(printable, unknown)))
            raise Refused("bad-request", f"There is no setting {names}.")
        whole = given.get("id", 0)
        if type(whole) is not int or not 0 <= whole < 2**53:
            raise Refused("bad-request", "The id must be a whole number from 0.")
        switches = {name: given.get(name, False) for name in ("still", "reconstruction")}
        for name, value in switches.items():
            if type(value) is not bool:
                raise Refused("bad-request", f"{name} must be true or false.")
        values = {name: self._value(name, given) for name in self.offered}
        if not switches["still"]:
            values["refine"] = 0
        values.setdefault("style", self.translator.synthesis.styles[0])
        return Settings(id=whole, **switches, **values)

    def _value(self, name: str, given: Mapping[str, Any]) -> Any:
        offer = self.offered[name]
        value = given.get(name, offer["value"])
        number = type(value) in (int, float)  # a comparison is never true of NaN
        if "choices" in offer:
            if not (number or type(value) is str) or value not in offer["choices"]:
                choices = ", ".join(map(str, offer["choices"]))
                raise Refused("bad-request", f"{name} must be one of {choices}.")
        elif not number or not offer["min"] <= value <= offer["max"]:
            rule = f"a number from {offer['min']} to {offer['max']}"
            raise Refused("bad-request", f"{name} must be {rule}.")
        if name in WHOLE and value != int(value):
            raise Refused("bad-request", f"{name} must be a whole number.")
        return int(value) if name in WHOLE else value


class Sitter:
    """One client: the face that is followed from frame to frame."""

    def __init__(self, artist: Artist) -> None:
        self.artist, self.translator = artist, artist.translator
        aligner = artist.translator.aligner
        self.tracker = None if aligner is None else Tracker(aligner)

    def draw(
        self,
        settings: Settings,
        data: bytes,  # of a picture file
        give_way: Callable[[], None] = lambda: None,  # called between two steps of refinement
    ) -> bytes:
        """The whole answer. Refused, where there is nothing to draw."""
        times = [time.perf_counter()]
        picture = read_picture(data)
        times.append(time.perf_counter())
        crop, faces, box, smooth = self.look(picture, settings.still)
        times.append(time.perf_counter())
        images = self.translator.prepare([crop])
        ws = self.translator.encode(
            images,
            truncation=settings.truncation,
            refine_steps=settings.refine,
            callback=lambda *_: give_way(),
        )
        ws = smooth(ws)
        times.append(clock(self.translator.device))
        drawn = self.synthesised(ws, settings)
        times.append(clock(self.translator.device))
        kind, options = ("PNG", {}) if settings.still else ("JPEG", {"quality": QUALITY})
        files = {name: write_picture(image, kind, options) for name, image in drawn.items()}
        times.append(time.perf_counter())

        names = ("read", "detect", "encode", "draw", "write")
        spent = {
            name: round(1e3 * (end - start), 2)
            for name, (start, end) in zip(names, pairwise(times), strict=True)
        }
        media = f"image/{kind.lower()}"
        header = {
            "id": settings.id,
            "faces": faces,
            "box": box,
            "ms": spent | {"total": round(1e3 * (times[-1] - times[0]), 2)},
            "parts": [{"name": n, "type": media, "bytes": len(f)} for n, f in files.items()],
        }
        return pack(header, *files.values())

    def look(
        self, picture: Image.Image, still: bool
    ) -> tuple[Image.Image, int, list[float], Callable[[Tensor], Tensor]]:
        """(crop of the largest face, number of faces, its box, what smooths its ws)."""
        if self.tracker is None:
            return self.translator.crop(picture), 1, [0.0, 0.0, 1.0, 1.0], lambda ws: ws
        if still:
            found = self.translator.faces(picture)
            face = _first(found)
            smooth = _as_is
        else:
            now, tracker = time.monotonic(), self.tracker
            tracks = [track for track in tracker(picture, now) if not track.lost]
            found = [track.face for track in tracks]
            face = _first(found)

            def smooth(ws: Tensor) -> Tensor:
                return tracker.smooth_ws(tracks[0], ws, now)

        size = (picture.width, picture.height) * 2
        box = [round(min(1.0, max(0.0, x / s)), 4) for x, s in zip(face.box, size, strict=True)]
        return self.translator.crop(picture, face), len(found), box, smooth

    def synthesised(self, ws: Tensor, settings: Settings) -> dict[str, Image.Image]:
        """The drawing and, if asked for, the reconstruction, of the wanted size."""
        made = self.translator.drawings(
            ws,
            (settings.style,),
            settings.reconstruction,
            swap_resolution=self.artist.resolutions[settings.swap - 1],
            colours=settings.colours,
        )
        made = {"drawing": made.pop(settings.style)} | made
        return {
            name: to_pil(self.translator.enlarge(image, settings.size)[0])
            for name, image in made.items()
        }


def error_answer(number: int, error: Refused) -> bytes:
    return pack({"id": number, "error": {"code": error.code, "message": str(error)}})


def read_picture(data: bytes) -> Image.Image:
    """Refused where the bytes are no picture, or too large a one."""
    if len(data) > MOST_BYTES:
        raise Refused("too-large", f"The picture has more than {MOST_BYTES >> 20} MiB.")
    try:
        return decode(data, most_pixels=MOST_PIXELS)
    except TooManyPixels as error:
        raise Refused("too-large", str(error)) from error
    except ValueError as error:
        raise Refused("bad-picture", str(error)) from error


def write_picture(picture: Image.Image, kind: str, options: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    # every pixel keeps its own colour: there are few of them
    picture.save(file, kind, **({"subsampling": 0} if kind == "JPEG" else {}), **options)
    return file.getvalue()


def _first(faces: list[Face]) -> Face:
    if not faces:
        raise Refused("no-face", "There is no face in the picture; choose another one.")
    return faces[0]


def _as_is(ws: Tensor) -> Tensor:
    return ws
