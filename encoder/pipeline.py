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
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from encoder.align import Aligner, Face
from encoder.latents import truncate
from encoder.losses import LossSet
from encoder.model import Encoder
from encoder.search import Search, optimize_latent
from generators.blocks import SwappedSynthesis
from generators.checkpoint import load, resolve
from generators.curvature import Curvature, curvature_of
from generators.images import fit, grid, open_image, resize, to_float
from generators.principal import DEVIATIONS
from generators.runs import frozen, write_atomically
from generators.stylegan2 import Generator
from generators.superres import SuperResolution, upscale


@dataclass(frozen=True)
class Result:
    """One batch, fp32 on the CPU; pictures are in [-1, 1]."""

    aligned: Tensor  # (B, 3, S, S) what the encoder looked at
    ws: Tensor  # (B, L, D)
    anime: Tensor  # (B, 3, R, R)
    reconstruction: Tensor | None = (
        None  # (B, 3, R, R) by the face generator; None unless asked for
    )


class Translator:
    """Photo -> w+ -> anime. A picture's result does not depend on the others of its batch."""

    def __init__(
        self,
        face: Generator,
        anime: Generator,  # a fine-tune of `face`
        encoder: Encoder,  # trained for `face`
        *,
        swap_resolution: int = 16,  # from this block on, the weights are anime's
        device: str | torch.device = "cpu",  # the three networks are moved there
        dtype: torch.dtype = torch.float32,  # or float16, bfloat16; refinement and w+ stay float32
        aligner: Aligner | None = None,  # None: crops only, `faces` is refused
        truncation: float = 1.0,  # 1: the latent as found, 0: the average face
        style_limit: float = DEVIATIONS,  # of what anime's blocks get; see generators.principal
        refine_steps: int = 0,  # of latent optimisation, after the encoder
        curvature: Curvature | None = None,  # of `face`; refinement is faster with it
        superres: SuperResolution | None = None,  # for `enlarge`; None: bicubic
    ) -> None:
        if dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"dtype must be float32, float16 or bfloat16, not {dtype}")
        if refine_steps < 0:
            raise ValueError(f"refine_steps must be 0 or more, not {refine_steps}")
        wanted, given = (face.num_ws, face.w_dim), (encoder.config.num_ws, encoder.config.w_dim)
        if wanted != given:
            raise ValueError(
                f"The encoder gives {given[0]} layers of {given[1]} numbers, the face generator "
                f"takes {wanted[0]} of {wanted[1]}; give the encoder that was trained for it."
            )
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
        self.losses = LossSet({"mse": 1.0})
        self.curvature: Curvature | None = curvature and self._placed(curvature)

    @classmethod
    def load(
        cls, face: str | Path, anime: str | Path, encoder: str | Path, **options: Any
    ) -> Translator:
        """From files or bundled names; `options`: the constructor's. ValueError if one is unfit."""
        return cls(
            load(resolve(face), "generator"),
            load(resolve(anime), "generator"),
            load(resolve(encoder), "encoder"),
            **options,
        )

    @classmethod
    def bundled(cls, **options: Any) -> Translator:
        """The models that come with the project, and an aligner unless one is given; `superres`
        enlarges."""
        options.setdefault("aligner", Aligner(device=options.get("device", "cpu")))
        options.setdefault("superres", load(resolve("superres64"), "superres"))
        options.setdefault("curvature", curvature_of("face64"))
        return cls.load("face64", "anime64", "encoder64", **options)

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
        anime, reconstructed = self.synthesise(ws, reconstruction)
        return Result(
            images.cpu(),
            ws.cpu(),
            anime.cpu(),
            None if reconstructed is None else reconstructed.cpu(),
        )

    def prepare(self, crops: Sequence[Image.Image]) -> Tensor:
        """RGB pictures of any size -> (B, 3, S, S) in [-1, 1] on the device."""
        if not crops:
            raise ValueError("There are no crops to translate; give at least one.")
        pixels = torch.stack([fit(crop, self.crop_size) for crop in crops])
        return to_float(pixels.to(self.device, memory_format=torch.channels_last))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) in [-1, 1] -> ws (B, L, D) in fp32: encoded, refined, truncated."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            ws = self.encoder(resize(images, self.encoder.config.resolution)).float()
        target = resize(images, self.resolution)
        if self.refine_steps:
            search = Search(steps=self.refine_steps)
            found = optimize_latent(
                self.face,
                target,
                losses=self.losses,
                search=search,
                start=ws,
                curvature=self.curvature,
            )
            ws = found.latent
        return truncate(ws, self.face.w_avg, self.truncation)

    @torch.inference_mode()
    def synthesise(self, ws: Tensor, reconstruction: bool = False) -> tuple[Tensor, Tensor | None]:
        """ws (B, L, D) -> anime (B, 3, R, R) and, if asked for, the reconstruction; in [-1, 1]."""
        ws = ws.to(self.dtype)
        if not reconstruction:
            return self.synthesis(ws).float().clamp(-1, 1), None
        reconstructed, anime = self.synthesis(ws, both=True)
        return anime.float().clamp(-1, 1), reconstructed.float().clamp(-1, 1)

    @torch.inference_mode()
    def enlarge(self, images: Tensor, size: int) -> Tensor:
        """(B, 3, R, R) in [-1, 1] -> (B, 3, size, size), the same; bicubic without `superres`."""
        if self.superres is None:
            return resize(images, size).clamp(-1, 1)
        return upscale(self.superres, images.to(self.device), size).to(images.device).clamp(-1, 1)

    def _placed(self, module: Any) -> Any:
        """Frozen, on the device, convolutions' weights channels last."""
        return frozen(module).to(self.device, memory_format=torch.channels_last)


# ------------------------------------------------------------------------- files to files

ARTEFACTS = {"anime": ".png", "aligned": "_aligned.png", "reconstruction": "_reconstruction.png",
             "latents": "_latents.safetensors", "grid": "_grid.png"}  # fmt: skip


@dataclass(frozen=True)
class FilesConfig:
    input: str  # a picture, a folder (with its sub-folders) or a quoted glob
    output: Path  # folder, made if need be
    save: str = "anime"  # comma list of anime, aligned, reconstruction, latents, grid
    size: int | None = None  # side of the written pictures in pixels; None: the generator's own
    faces: Literal["largest", "all"] = "largest"  # of each picture
    batch_size: int = 8  # faces per pass
    overwrite: bool = False  # replace results that exist

    def __post_init__(self) -> None:
        if unknown := sorted(self.artefacts - ARTEFACTS.keys()):
            raise ValueError(
                f"--save does not know {', '.join(unknown)}; choose from {', '.join(ARTEFACTS)}."
            )
        if self.batch_size < 1 or not (self.size is None or 1 <= self.size <= 8192):
            raise ValueError("--batch-size must be at least 1, and --size from 1 to 8192.")

    @property
    def artefacts(self) -> set[str]:
        return {name.strip() for name in self.save.split(",")}


@dataclass
class Item:
    """One input picture and what has become of it."""

    path: Path
    base: Path  # OUT/sub/name, to which an artefact's ending is added
    todo: int = 0  # faces not yet written
    reason: str = ""  # why it failed
    outputs: list[str] = field(default_factory=list)  # relative to OUT
    faces: list[dict[str, Any]] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)  # ms

    def line(self) -> str:
        status: dict[str, Any] = (
            {"status": "failed", "reason": self.reason} if self.reason else {"status": "ok"}
        )
        timings = {name: round(value, 3) for name, value in self.timings.items()}
        rest = {"outputs": self.outputs, "faces": self.faces, "timings_ms": timings}
        return json.dumps({"input": str(self.path)} | status | rest)

    def files(self, config: FilesConfig, face: int = 1) -> dict[str, Path]:
        """{artefact: file} of the first, second, … face."""
        stem = self.base.name if face == 1 else f"{self.base.name}_face{face}"
        return {
            name: self.base.with_name(stem + ARTEFACTS[name])
            for name in ARTEFACTS
            if name in config.artefacts
        }


def crops(
    items: list[Item], translator: Translator, config: FilesConfig, done: Callable[[Item], None]
) -> Iterator[tuple[Item, int, Image.Image]]:
    """(item, number of the face from 1, crop), one picture at a time; failures go to `done`."""
    for item in items:
        try:
            start = time.perf_counter()
            picture = open_image(item.path)
            item.timings["read"] = 1e3 * (time.perf_counter() - start)
            start = time.perf_counter()
            faces = translator.faces(picture) if translator.aligner else [None]
            if not faces:
                raise ValueError(
                    f"No face found in {item.path}; give a clearer picture, "
                    "or --no-align for an aligned crop."
                )
            faces = faces[:1] if config.faces == "largest" else faces
            cut = [translator.crop(picture, face) for face in faces]
            item.timings["align"] = 1e3 * (time.perf_counter() - start)
        except ValueError as error:
            item.reason = str(error)
            done(item)
            continue
        item.todo = len(cut)
        item.faces = [
            {"box": face.box.round(1).tolist(), "score": round(face.score, 4)}
            for face in faces
            if face
        ]
        for number, crop in enumerate(cut, 1):
            yield item, number, crop


def translate(
    items: list[Item], translator: Translator, config: FilesConfig, done: Callable[[Item], None]
) -> None:
    """Writes results batch by batch; calls `done` with each item once its last file is written.

    Only one batch of crops is held at a time. A failed picture does not keep the others.
    """
    jobs = crops(items, translator, config, done)
    wanted = bool(config.artefacts & {"reconstruction", "grid"})
    while batch := list(itertools.islice(jobs, config.batch_size)):
        start = time.perf_counter()
        images = translator.prepare([crop for _, _, crop in batch])
        ws = translator.encode(images)
        encoded = clock(translator.device)
        anime, reconstruction = translator.synthesise(ws, wanted)
        synthesised = clock(translator.device)
        results = {"aligned": images.cpu(), "latents": ws.cpu(), "anime": anime.cpu()}
        if reconstruction is not None:
            results["reconstruction"] = reconstruction.cpu()
        times = {"encode": encoded - start, "synthesise": synthesised - encoded}
        for i, (item, number, _) in enumerate(batch):
            for name, seconds in times.items():
                item.timings[name] = item.timings.get(name, 0.0) + 1e3 * seconds / len(batch)
            start = time.perf_counter()
            try:
                result = {name: value[i] for name, value in results.items()}
                write(item, number, result, translator, config)
            except (ValueError, OSError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or error
                item.reason = f"Cannot write the result of {item.path}: {reason}."
            seconds = time.perf_counter() - start
            item.timings["write"] = item.timings.get("write", 0.0) + 1e3 * seconds
            item.todo -= 1
            if item.todo == 0:
                done(item)


def write(
    item: Item, number: int, result: dict[str, Tensor], translator: Translator, config: FilesConfig
) -> None:
    """One face: pictures (3, R, R) in [-1, 1], here brought to the wanted size, and "latents"
    (L, D); each file whole or not."""
    if not result["anime"].isfinite().all():
        raise ValueError("it is not finite; try --dtype fp32")
    size = config.size or translator.resolution

    @cache
    def picture(part: str) -> Tensor:
        if part == "aligned":  # the photo as the encoder saw it: nothing is added
            return resize(result[part], size)
        return translator.enlarge(result[part][None], size)[0]

    for name, file in item.files(config, number).items():
        file.parent.mkdir(parents=True, exist_ok=True)
        if name == "latents":
            write_atomically(file, partial(save_file, {"ws": result[name].contiguous()}))
        else:
            shown = ("aligned", "reconstruction", "anime") if name == "grid" else (name,)
            strip = torch.stack([picture(part) for part in shown])
            write_atomically(file, partial(grid(strip, len(shown)).save, format="PNG"))
        item.outputs.append(file.relative_to(config.output).as_posix())


def clock(device: torch.device) -> float:
    """Seconds, once the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


__all__ = ["FilesConfig", "Item", "Result", "Translator", "translate"]
