"""Recipes that use a face generator and its anime fine-tune together. Three commands:

    python -m encoder.recipes cross-domain --input me.jpg --output out/ --last-blocks 1 2 3 4
    python -m encoder.recipes concatenate --input me.jpg --fine other.jpg --output out/
    python -m encoder.recipes interpolate --input me.jpg you.jpg --output walk.mp4 --anime --loop

What they do is in `cross_domain`, `concatenate` and `interpolate`, on tensors; the rest opens and
writes files. Shape letters: B batch, N variants or frames, K keys, L layers of w+, D dimension of
w, Z dimension of z, R resolution, S side of a crop.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from encoder.align import Aligner
from encoder.files import Results, find_faces
from encoder.frames import check_format, write_frames
from encoder.losses import LossSet
from encoder.model import Encoder
from encoder.options import FilesConfig, Networks, check_size
from encoder.pipeline import Translator
from encoder.search import Search, optimise_latent
from generators.blocks import SwappedSynthesis
from generators.checkpoint import load, read_metadata, resolve
from generators.command import command, console, parse_device, printable
from generators.dcgan import DcganGenerator
from generators.disk import may_write, write_atomically
from generators.images import grid, labelled, open_image, resize, to_pil
from generators.latents import mix, read_latents, slerp
from generators.runs import frozen
from generators.stylegan2 import Generator
from generators.superres import SuperResolution, upscale
from generators.tails import load_style
from generators.threads import use_threads

Draw = Callable[[Tensor], Tensor]  # latents (B, …) -> images (B, 3, R, R)

LOSSES = {"mse": 1.0, "ms_ssim": 0.2}
BATCH = 8  # frames that are drawn at once
IN_Z = Search(steps=200, space="z", candidates=256)
IN_W = Search(steps=200, space="w")

# ---------------------------------------------------------------------------------- recipes


def last_blocks(face: Generator, anime: Generator, n: int) -> Draw:
    """The synthesis of `face` whose last n blocks (those next to the image) are `anime`'s."""
    resolutions = face.config.block_resolutions
    check_blocks(face, (n,))
    if n == 0:
        return face.synthesis
    return SwappedSynthesis(face, anime, resolutions[-n], style_limit=math.inf)


def check_blocks(face: Generator, numbers: Sequence[int]) -> None:
    count = len(face.config.block_resolutions)
    if outside := [n for n in numbers if not 0 <= n <= count]:
        raise ValueError(f"there are {count} blocks; {outside[0]} of them cannot be swapped")


def check_splits(face: Generator, splits: Sequence[int]) -> None:
    if outside := [split for split in splits if not 0 <= split <= face.layers]:
        raise ValueError(f"a split is a layer from 0 to {face.layers}, not {outside[0]}")


@dataclass(frozen=True)
class CrossDomain:
    """Pictures in [-1, 1]; those of variant i are [i]."""

    z: Tensor  # (B, Z) whose picture by the face generator is the target
    reconstruction: Tensor  # (B, 3, R, R) that picture
    swapped: Tensor  # (N, B, 3, R, R) by the face generator with the fine-tune's last blocks
    ws: Tensor  # (N, B, L, D) whose picture by the fine-tune is `swapped`
    final: Tensor  # (N, B, 3, R, R) that picture


def cross_domain(
    face: Generator,
    anime: Generator,  # a fine-tune of `face`
    target: Tensor,  # (B, 3, R, R) in [-1, 1]
    swaps: Sequence[int] = (1, 2, 3, 4),  # n for each variant
    *,
    losses: LossSet,
    face_search: Search = IN_Z,
    anime_search: Search = IN_W,
) -> CrossDomain:
    """Cross-domain reverse generation: the photo is found in the face generator, drawn half in the
    other style, and what came out is found in the fine-tune, which draws the result.

    The second search starts where the first one ended: there the two generators draw alike.
    """
    find = partial(optimise_latent, losses=losses)
    found = find(face, target, search=face_search, start="random")
    assert found.ws is not None
    with torch.no_grad():
        swapped = torch.stack([last_blocks(face, anime, n)(found.ws).clamp(-1, 1) for n in swaps])
    shape = swapped.shape[:2]  # (N, B)
    start = found.ws.repeat(len(swaps), 1, 1)  # (N * B, L, D)
    last = find(anime, swapped.flatten(0, 1), search=anime_search, start=start)
    assert last.ws is not None
    final = last.image.clamp(-1, 1).unflatten(0, shape)
    image = found.image.clamp(-1, 1)
    return CrossDomain(found.latent, image, swapped, last.ws.unflatten(0, shape), final)


@torch.no_grad()
def concatenate(
    face: Generator,
    anime: Generator,  # a fine-tune of `face`
    coarse: Tensor,  # ws (B, L, D) of pictures of `face`
    fine: Tensor,  # ws (B, L, D) of pictures of `anime`
    splits: Sequence[int],  # 0 to L, for each variant
) -> Tensor:
    """(N, B, 3, R, R) in [-1, 1]: layers below the split from `coarse`, the others from `fine`,
    through `face` whose blocks with all of their layers above the split are `anime`'s.

    Two layers are a block's: 2 is its resolution 8, 4 is 16; 0 is all of `anime`, L all of `face`.
    """
    check_splits(face, splits)
    images = [
        last_blocks(face, anime, (face.layers - split) // 2)(mix(coarse, fine, split, face.layers))
        for split in splits
    ]
    return torch.stack(images).clamp(-1, 1)


@torch.no_grad()
def interpolate(keys: Tensor, frames: int, draw: Draw, loop: bool = False) -> Tensor:
    """(N, 3, R, R) in [-1, 1]: `frames` pictures from each key to the next, both included.

    keys: ws (K, L, D), between which the way is straight, or z (K, Z), between which it is the arc
    of a great circle. loop: and back again, so that the last frame leads to the first.
    """
    if len(keys) < 2 or frames < 2:
        raise ValueError("an interpolation needs two latents and two frames, or more")
    between: Callable[..., Tensor] = slerp if keys.ndim == 2 else torch.lerp
    t = torch.arange(frames - 1, device=keys.device) / (frames - 1)
    t = t.view(-1, *[1] * (keys.ndim - 1))  # (frames - 1, 1, …)
    parts = [between(a.expand(len(t), *a.shape), b, t) for a, b in pairwise(keys)]
    latents = torch.cat([*parts, keys[-1:]])
    images = torch.cat([draw(part).clamp(-1, 1) for part in latents.split(BATCH)])
    return torch.cat([images, images[1:-1].flip(0)]) if loop else images


# ------------------------------------------------------------------------------ command line


@dataclass(frozen=True, kw_only=True)
class CrossDomainConfig(FilesConfig, Networks):
    """Find the photo in the face generator, redraw it with n blocks of anime, find that in anime.

    Writes OUT/name_sheet.png (above: photo, swapped; below: reconstruction, final) and a final
    picture OUT/name_n1.png for each n.
    """

    last_blocks: tuple[int, ...] = (1, 2, 3, 4)  # n: of the fine-tune, in the redrawn picture
    space: Literal["w", "w+"] = "w"  # of the second search
    steps: int = 200  # of each search
    candidates: int = 256  # random faces the first search starts from the best of
    size: int = 128  # side of each picture of the sheet, in pixels
    seed: int = 0  # of the random faces

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.size)
        Search(self.steps, candidates=self.candidates)  # its sentences

    @property
    def endings(self) -> dict[str, str]:
        return {"sheet": "_sheet.png"} | {f"n{n}": f"_n{n}.png" for n in self.last_blocks}


@dataclass(frozen=True, kw_only=True)
class ConcatenateConfig(FilesConfig, Networks):
    """The photo's layout from the face generator, its details from the fine-tune's view of it.

    Writes OUT/name_sheet.png: photo, its picture by each generator, then a column per split.
    """

    fine: Path | None = None  # the picture whose details are taken; None: the same one
    splits: tuple[int, ...] = (2, 4, 6, 8)  # first layer of the details; 4 is resolution 16
    steps: int = 100  # of each search
    size: int = 128  # side of each picture of the sheet, in pixels

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.size)
        Search(self.steps)  # its sentences

    @property
    def endings(self) -> dict[str, str]:
        return {"sheet": "_sheet.png"} | {f"split{k}": f"_split{k}.png" for k in self.splits}


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(Networks):
    """A film from one face to the next: straight in w+, along great circles in z."""

    input: tuple[Path, ...]  # in their order: pictures, or .safetensors with `ws` or `z`
    output: Path  # .mp4, .gif, or .png for a sheet
    overwrite: bool = False  # replace a film that exists
    anime: bool = False  # drawn with the fine-tune's blocks from --swap-resolution on
    swap_resolution: int = 16  # of the first of them
    refine_steps: int = 25  # of latent optimisation after the encoder, for pictures
    frames: int = 50  # from each to the next, both included
    loop: bool = False  # and back to the first
    fps: int = 25  # frames a second, 1 to 100
    size: int | None = None  # side in pixels, reached by super-resolution; None: the generator's
    superres: str = "superres64"  # the network for --size

    def __post_init__(self) -> None:
        super().__post_init__()
        check_size(self.size)
        check_format(self.output)
        Search(self.refine_steps)  # its sentence
        if not 1 <= self.fps <= 100:
            raise ValueError(f"--fps is frames a second, 1 to 100, not {self.fps}")
        if self.frames < 2:
            raise ValueError(f"--frames must be 2 or more, not {self.frames}")


def load_networks(config: Networks) -> tuple[Translator, Generator]:
    """What finds the photos in the face generator, and the whole fine-tune."""
    face = load(resolve(config.face_generator), Generator)
    anime = load_style(config.anime_generator, face)
    device = parse_device(config.device)
    use_threads(config.threads, pixels=face.resolution**2)
    translator = Translator(
        face,
        anime,
        load(resolve(config.encoder), Encoder),
        swap_resolution=face.resolution,  # the recipes swap by themselves
        device=device,
        aligner=Aligner(device) if config.align else None,
    )
    return translator, frozen(anime).to(device)


def read_crop(translator: Translator, path: Path) -> Tensor:
    """(1, 3, S, S) in [-1, 1]: the largest face of a picture."""
    picture = open_image(path)
    face = find_faces(translator.aligner, picture, path)[0] if translator.aligner else None
    return translator.prepare([translator.crop(picture, face)])


def search_ws(translator: Translator, generator: Generator, photo: Tensor, steps: int) -> Tensor:
    """photo (B, 3, S, S) -> (B, L, D): the encoder's, then searched in w+ for the generator. Not by
    its metric: that comes closer, and what is drawn of what it finds is a face less often."""
    return optimise_latent(
        generator,
        resize(photo, generator.resolution),
        losses=LossSet(LOSSES),
        search=Search(steps=steps),
        start=translator.encode(photo),
    ).latent


@dataclass(frozen=True)
class Shown:
    """One picture's result, everything (1, 3, R, R)."""

    sheet: Sequence[Tensor]  # row by row
    labels: Sequence[str]  # of its columns
    final: dict[str, Tensor]  # pictures of their own


def show_cross_domain(
    config: CrossDomainConfig, translator: Translator, anime: Generator, photo: Tensor
) -> Shown:
    search = Search(config.steps, "z", candidates=config.candidates, seed=config.seed)
    target = resize(photo, translator.resolution)
    made = cross_domain(
        translator.face,
        anime,
        target,
        config.last_blocks,
        losses=LossSet(LOSSES),
        face_search=search,
        anime_search=replace(search, space=config.space),
    )
    labels = ["photo, face", *(f"n = {n}" for n in config.last_blocks)]
    final = {f"n{n}": image for n, image in zip(config.last_blocks, made.final, strict=True)}
    return Shown((target, *made.swapped, made.reconstruction, *made.final), labels, final)


def show_concatenate(
    config: ConcatenateConfig,
    translator: Translator,
    anime: Generator,
    other: list[Tensor],  # of --fine, or none
    photo: Tensor,
) -> Shown:
    face = translator.face
    photos = [photo, *other]
    coarse = search_ws(translator, face, photo, config.steps)
    fine = search_ws(translator, anime, photos[-1], config.steps)
    ends = concatenate(face, anime, coarse, fine, (face.layers, 0))
    made = concatenate(face, anime, coarse, fine, config.splits)
    labels = ["photo"] if config.fine is None else ["coarse", "fine"]
    labels += ["by face", "by anime", *(f"split {split}" for split in config.splits)]
    final = {f"split{k}": image for k, image in zip(config.splits, made, strict=True)}
    return Shown([*(resize(x, face.resolution) for x in photos), *ends, *made], labels, final)


def run_pictures(config: CrossDomainConfig | ConcatenateConfig) -> int:
    """BASE_sheet.png and BASE_…png of every input, one after the other."""
    results = Results(config, config.endings, ",".join(config.endings), r"(_n\d+|_split\d+)?")
    if not results.todo:
        return 0
    translator, anime = load_networks(config)
    if isinstance(config, CrossDomainConfig):
        check_blocks(translator.face, config.last_blocks)
        show: Callable[[Tensor], Shown] = partial(show_cross_domain, config, translator, anime)
    else:
        check_splits(translator.face, config.splits)
        fine = [] if config.fine is None else [read_crop(translator, config.fine)]
        show = partial(show_concatenate, config, translator, anime, fine)

    with results:
        for job in results.todo:
            with results.attempt(job):
                shown = show(read_crop(translator, job.path))
                if not all(image.isfinite().all() for image in shown.sheet):
                    raise ValueError(f"The result of {job.path} is not finite.")
                sheet = grid(
                    resize(torch.cat([*shown.sheet]).cpu(), config.size), len(shown.labels)
                )
                pictures = {"sheet": labelled(sheet, shown.labels)}
                pictures |= {key: to_pil(image[0]) for key, image in shown.final.items()}
                results.begin(job)
                for key, file in job.files().items():
                    write_atomically(file, partial(pictures[key].save, format="PNG"))
                results.done(job)
    return results.report("done")


def run_interpolate(config: InterpolateConfig) -> int:
    # 1. What is drawn, and by what.
    may_write(config.output, config.overwrite, config.input)
    device = parse_device(config.device)
    path = resolve(config.face_generator)
    dcgan = read_metadata(path)["kind"] == DcganGenerator.kind
    latents = [file.suffix.lower() == ".safetensors" for file in config.input]
    if dcgan and (config.anime or not all(latents)):
        raise ValueError("with a DCGAN only latents `z` are interpolated, without --anime")
    generator: Any
    if config.anime or not all(latents):
        translator, anime = load_networks(config)
        generator = translator.face
    else:
        generator = frozen(load(path, Generator, DcganGenerator)).to(device)
    synthesis = getattr(generator, "synthesis", None)  # a DCGAN has none
    if config.anime:
        synthesis = SwappedSynthesis(generator, anime, config.swap_resolution)

    # 2. The latents to pass through.
    keys = []
    for file, is_latent in zip(config.input, latents, strict=True):
        if is_latent:
            keys.append(read_latents(file, generator).to(device))
        else:
            photo = read_crop(translator, file)
            keys.append(search_ws(translator, generator, photo, config.refine_steps))
    if len({key.ndim for key in keys}) > 1:
        raise ValueError("the inputs are of z and of w+; give latents of one space")

    # 3. The film.
    network = None
    if config.size is not None:
        network = frozen(load(resolve(config.superres), SuperResolution)).to(device)

    def draw(part: Tensor) -> Tensor:
        if synthesis is None:
            images = generator(part)
        else:
            images = synthesis(generator.map(part) if part.ndim == 2 else part)
        if network is not None and config.size is not None:
            images = upscale(network, images.clamp(-1, 1), config.size)
        return images.cpu()

    film = interpolate(torch.cat(keys), config.frames, draw, config.loop)
    if not film.isfinite().all():
        raise ValueError("the film is not finite: the generator or a latent is damaged")
    write_frames(config.output, film, config.fps)
    console.print(f"written: {printable(config.output)}")
    return 0


Config = (
    Annotated[CrossDomainConfig, tyro.conf.subcommand("cross-domain")]
    | Annotated[ConcatenateConfig, tyro.conf.subcommand("concatenate")]
    | Annotated[InterpolateConfig, tyro.conf.subcommand("interpolate")]
)


def run(config: CrossDomainConfig | ConcatenateConfig | InterpolateConfig) -> int:
    return (
        run_interpolate(config) if isinstance(config, InterpolateConfig) else run_pictures(config)
    )


def main(argv: Sequence[str] | None = None) -> int:
    return command(Config, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
