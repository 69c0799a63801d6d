"""The façade: pictures in, anime faces out. Align, encode, refine, swapped synthesis.

    translator = Translator.bundled(device="cuda", dtype=torch.float16)
    crops = [translator.crop(picture, face) for face in translator.faces(picture)]
    result = translator(crops, reconstruction=True)       # aligned, ws, reconstruction, anime
    large = translator.enlarge(result.anime, 256)         # (B, 3, 256, 256)

Shape letters: B batch, L layers of w+, D dimension of w, R the generators' resolution, S side of a
crop.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from encoder.align import Aligner, Face
from encoder.directions import Directions
from encoder.engines import Backend, choose, encoder_of, synthesis_of
from encoder.losses import LossSet
from encoder.model import Encoder
from encoder.options import Edit, belonging, styles_of
from encoder.search import Callback, Search, optimise_latent
from generators.blocks import RECONSTRUCTION, SwappedSynthesis
from generators.bundled import FACE
from generators.checkpoint import load, resolve
from generators.curvature import Curvature
from generators.images import fit, resize, to_float
from generators.latents import DEVIATIONS, truncate
from generators.runs import frozen
from generators.stylegan2 import Generator
from generators.superres import SuperResolution, upscale
from generators.tails import load_styles


@dataclass(frozen=True)
class Result:
    """One batch, fp32 on the CPU; pictures are in [-1, 1]."""

    aligned: Tensor  # (B, 3, S, S) what the encoder looked at
    ws: Tensor  # (B, L, D)
    drawings: dict[str, Tensor]  # {style: (B, 3, R, R)}
    reconstruction: Tensor | None = (
        None  # (B, 3, R, R) by the face generator; None unless asked for
    )

    @property
    def anime(self) -> Tensor:
        """(B, 3, R, R), the first style's."""
        return next(iter(self.drawings.values()))


class Translator:
    """Photo -> w+ -> anime. A picture's result does not depend on the others of its batch."""

    def __init__(
        self,
        face: Generator,
        anime: Generator | Mapping[str, Generator],  # a fine-tune of `face`, or several by style
        encoder: Encoder,  # trained for `face`
        *,
        swap_resolution: int = 16,  # from this block on, the weights are anime's
        device: str | torch.device = "cpu",  # the three networks are moved there
        dtype: torch.dtype = torch.float32,  # or float16, bfloat16; refinement and w+ stay float32
        aligner: Aligner | None = None,  # None: crops only, `faces` is refused
        truncation: float = 1.0,  # 1: the latent as found, 0: the average face
        style_limit: float = DEVIATIONS,  # of what anime's blocks get; see generators.latents
        refine_steps: int = 0,  # of latent optimisation, after the encoder
        curvature: Curvature | None = None,  # of `face`; refined closer, and less cleanly drawn
        superres: SuperResolution | None = None,  # for `enlarge`; None: bicubic
        backend: Backend = "torch",  # of encoder and synthesis, see encoder.engines
        threads: int = 1,  # of a backend other than torch, which has its own setting
        export: bool = True,  # half a minute, once; off: an encoder not exported yet stays torch's
        directions: Directions | None = None,  # of `face`, for edits
        edits: Sequence[Edit] = (),  # of every latent, after refinement and truncation
    ) -> None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype}")
        if refine_steps < 0 or not math.isfinite(truncation):
            raise ValueError("refine_steps must be 0 or more, and truncation a number")
        wanted, given = (face.num_ws, face.w_dim), (encoder.config.num_ws, encoder.config.w_dim)
        if wanted != given:
            raise ValueError(
                f"The encoder gives {given[0]} layers of {given[1]} numbers, the face generator "
                f"takes {wanted[0]} of {wanted[1]}; give the encoder that was trained for it."
            )
        # The given networks move to the device, and what is drawn with gets the precision.
        self.device, self.dtype = torch.device(device), dtype
        self.aligner, self.truncation, self.refine_steps = aligner, truncation, refine_steps
        self.resolution = face.resolution  # R
        self.crop_size = max(face.resolution, encoder.config.resolution)  # S
        self.face: Generator = self._placed(face)
        self.encoder: Encoder = self._placed(encoder)
        swapped = SwappedSynthesis(self.face, anime, swap_resolution, style_limit)
        if dtype != torch.float32:
            swapped = copy.deepcopy(swapped).to(dtype)  # the given networks keep their precision
        self.synthesis: SwappedSynthesis = self._placed(swapped)
        if superres is not None and dtype != torch.float32:
            superres = copy.deepcopy(superres).to(dtype)
        self.superres: SuperResolution | None = superres and self._placed(superres)
        # what encodes and what draws: the two networks themselves, or a backend's graphs of them
        self.backend = choose(backend, self.device, dtype)
        self.look = encoder_of(self.encoder, self.backend, threads, export)
        self.draw = synthesis_of(self.synthesis, self.backend, threads).draw
        self.losses = LossSet({"mse": 1.0})
        self.curvature: Curvature | None = curvature and self._placed(curvature)
        self.offset: Tensor | None = None  # (L, D), what the edits add
        if directions is not None:
            directions.check(face)
            self.offset = directions.offset(edits).to(self.device)

    @classmethod
    def load(
        cls,
        face: str | Path,
        anime: str | Path | Mapping[str, str | Path],  # of one style, or of several by name
        encoder: str | Path,
        **options: Any,
    ) -> Translator:
        """From files or bundled names; `options`: the constructor's. ValueError if one is unfit."""
        source = load(resolve(face), Generator)
        files = anime if isinstance(anime, Mapping) else {"anime": anime}
        styles = load_styles(files, source)
        return cls(source, styles, load(resolve(encoder), Encoder), **options)

    @classmethod
    def bundled(
        cls, styles: str = "anime", face_generator: str = FACE, **options: Any
    ) -> Translator:
        """The models that come with the project, of one style or more ("anime,sketch"), and an
        aligner unless one is given; `superres` enlarges. face_generator: face128, or face64."""
        how = {key: options[key] for key in ("device", "backend", "threads") if key in options}
        options.setdefault("aligner", Aligner(**how))
        options.setdefault("superres", load(resolve("superres64"), SuperResolution))
        encoder = belonging(face_generator, "encoder")
        return cls.load(face_generator, styles_of(styles, face_generator), encoder, **options)

    # ------------------------------------------------------------------ pictures to crops

    def faces(self, picture: Image.Image) -> list[Face]:
        """The faces of an upright picture, largest first."""
        if self.aligner is None:
            raise ValueError("This translator has no aligner; construct it with aligner=Aligner().")
        return self.aligner.detect(picture)

    def crop(self, picture: Image.Image, face: Face | None = None) -> Image.Image:
        """The FFHQ crop (S x S) of a face; without one, the picture's central square."""
        if face is None or self.aligner is None:
            side = min(picture.size)
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            box = (left, top, left + side, top + side)
            return picture.resize(
                (self.crop_size, self.crop_size), Image.Resampling.LANCZOS, box=box
            )
        return self.aligner.crop(picture, face, self.crop_size)

    # ---------------------------------------------------------------------- crops to anime

    def __call__(self, crops: Sequence[Image.Image], reconstruction: bool = False) -> Result:
        """Aligned crops of any size -> their translation, copied to the CPU."""
        images = self.prepare(crops)
        ws = self.encode(images)
        made = {name: x.cpu() for name, x in self.drawings(ws, None, reconstruction).items()}
        reconstructed = made.pop(RECONSTRUCTION, None)
        return Result(images.cpu(), ws.cpu(), made, reconstructed)

    def prepare(self, crops: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any size -> (B, 3, S, S) in [-1, 1] on the device."""
        if not crops:
            raise ValueError("There are no crops to translate; give at least one.")
        pixels = torch.stack([fit(crop, self.crop_size) for crop in crops])
        return to_float(pixels.to(self.device, memory_format=torch.channels_last))

    @torch.inference_mode()
    def encode(
        self,
        images: Tensor,
        *,
        truncation: float | None = None,  # None: the translator's own, as below
        refine_steps: int | None = None,
        callback: Callback | None = None,  # of the refinement, see `optimise_latent`
    ) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> ws (B, L, D) in fp32: encoded, refined, truncated, edited."""
        truncation = self.truncation if truncation is None else truncation
        refine_steps = self.refine_steps if refine_steps is None else refine_steps
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            ws = self.look(resize(images, self.encoder.config.resolution)).float()
        target = resize(images, self.resolution)
        if refine_steps:
            ws = optimise_latent(
                self.face,
                target,
                losses=self.losses,
                search=Search(steps=refine_steps),
                start=ws,
                curvature=self.curvature,
                callback=callback,
            ).latent
        return self.edited(truncate(ws, self.face.ws_avg, truncation))

    def edited(self, ws: Tensor) -> Tensor:
        """ws (B, L, D) on any device -> the same with the translator's edits."""
        return ws if self.offset is None else ws + self.offset.to(ws.device)

    @torch.inference_mode()
    def drawings(
        self,
        ws: Tensor,
        styles: Sequence[str] | None = None,  # None: all
        reconstruction: bool = False,
        *,
        swap_resolution: int | None = None,  # None: the translator's own
        colours: float = 0.0,  # 0: the photo's, 1: the drawing's own; see generators.latents
        drawing_ws: Tensor | None = None,  # (B, L, D) of the drawn blocks; None: `ws`
    ) -> dict[str, Tensor]:
        """ws (B, L, D) -> {style: (B, 3, R, R)} from one pass of the early blocks and, if asked
        for, "reconstruction"; in [-1, 1]. ValueError for a style that there is not."""
        made = self.draw(
            ws.to(self.dtype),
            styles,
            reconstruction,
            colours=colours,
            swap_resolution=swap_resolution,
            drawing_ws=None if drawing_ws is None else drawing_ws.to(self.dtype),
        )
        return {name: images.float().clamp(-1, 1) for name, images in made.items()}

    def synthesise(
        self, ws: Tensor, reconstruction: bool = False, **how: Any
    ) -> tuple[Tensor, Tensor | None]:
        """ws (B, L, D) -> the first style's drawing (B, 3, R, R) and, if asked for, the
        reconstruction; in [-1, 1]. how: as of `drawings`."""
        first = self.synthesis.styles[0]
        made = self.drawings(ws, (first,), reconstruction, **how)
        return made[first], made.get(RECONSTRUCTION)

    @torch.inference_mode()
    def enlarge(self, images: Tensor, size: int) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, 3, size, size), the same; bicubic without `superres`."""
        if self.superres is None:
            return resize(images, size).clamp(-1, 1)
        return upscale(self.superres, images.to(self.device), size).to(images.device).clamp(-1, 1)

    def _placed(self, module: Any) -> Any:
        """Frozen, on the device, convolutions' weights channels last."""
        return frozen(module).to(self.device, memory_format=torch.channels_last)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
