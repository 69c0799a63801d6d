"""Search the latents of a picture, a folder or a glob: latents, reconstructions, curves out.

    python -m encoder.invert --input photos/ --output out/ --steps 100
    python -m encoder.invert --input me.jpg --output out/ --save reconstruction,film \\
        --optimiser adam --start mean --space w --steps 1000 --learning-rate 0.1 \\
        --loss.mse 0.9 --loss.perceptual 0.1                   # reverse generation
    python -m encoder.invert --no-align --input holes/ --mask masks/ --output out/
    python -m encoder.invert --no-align --input sketch.png --mask alpha --output out/ --space w

Writes OUT/sub/name.png (reconstruction), name_latents.safetensors ("ws" (L, D) or "z" (Z,), and
what else was searched), name_curve.png (loss against steps), name_film.gif or .mp4, and
OUT/manifest.jsonl with one line per picture. The same command goes on where it stopped: finished
pictures are not searched again. Exit code 0, 1 where pictures failed (they are listed, the others
are done), 2 where nothing could be done.

The search itself: `encoder.search`. Shape letters: B batch, L layers of w+, D dimension of w, R
resolution.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image
from torch import Tensor

from encoder.align import Aligner
from encoder.files import Job, Results, find_faces
from encoder.frames import check_format, write_frames
from encoder.losses import LossNetworks, LossSet, LossWeights
from encoder.model import Encoder
from encoder.options import FilesConfig, belonging, chosen
from encoder.search import Inversion, Search, optimise_latent
from generators import checkpoint
from generators.bundled import FACE
from generators.command import command, console, parse_device, printable
from generators.curvature import curvature_of
from generators.dcgan import DcganGenerator
from generators.disk import write_atomically
from generators.images import (
    fit,
    open_image,
    open_opacity,
    to_float,
    to_pil,
    to_uint8,
)
from generators.latents import read_latents, write_latents
from generators.runs import frozen, progress
from generators.stylegan2 import Generator
from generators.threads import use_threads

ENDINGS = {"reconstruction": ".png", "latents": "_latents.safetensors", "curve": "_curve.png"}
FILM_FRAMES = 250  # at most


@dataclass(frozen=True, kw_only=True)
class InvertConfig(FilesConfig):
    save: str = "reconstruction,latents,curve"  # comma list of reconstruction, latents, curve, film
    film_format: Literal["gif", "mp4"] = "gif"  # mp4 needs PyAV: pip install '.[video]'
    generator: str = FACE  # bundled name or .safetensors, of a StyleGAN2 or a DCGAN
    start: str = "encoder"  # encoder, mean, random (the best of --candidates), or a latents file
    encoder: str = "auto"  # of the generator, for --start encoder; auto: the bundled one
    curvature: str | None = None  # of the generator, for lbfgs; None: the bundled generator's
    # how to search: space, optimiser, steps
    search: Annotated[Search, tyro.conf.arg(name="")] = field(default_factory=Search)
    # what is minimised; the term "latent" is for training alone
    loss: LossWeights = field(default_factory=lambda: LossWeights(latent=0.0))
    # the weights of the networks that losses look through
    networks: Annotated[LossNetworks, tyro.conf.arg(name="")] = field(default_factory=LossNetworks)
    mask: str | None = None  # picture or folder of them, white is valid; "alpha": what is opaque
    align: bool = True  # find the largest face first; off: the pictures are crops already
    batch_size: int = 8  # pictures searched together
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: the fastest that is here
    threads: int = 0  # of the CPU; 0: what fits the work

    def __post_init__(self) -> None:
        if self.encoder == "auto":
            object.__setattr__(self, "encoder", belonging(self.generator, "encoder"))
        artefacts = chosen(self.save, self.endings)
        if "film" in artefacts:
            check_format(Path(artefacts["film"]))
        if self.batch_size < 1:
            raise ValueError("--batch-size must be at least 1")
        if self.loss.latent:
            raise ValueError("the loss latent is for training, where the latent is known")
        if self.loss.of_discriminator and self.networks.discriminator is None:
            raise ValueError(f"the loss {self.loss.of_discriminator[0]} needs --discriminator")
        if self.mask is not None and self.align:
            raise ValueError("masks are for pictures that are crops already; add --no-align")
        if self.mask not in (None, "alpha") and not Path(str(self.mask)).exists():
            mask = printable(self.mask)
            raise ValueError(f"--mask {mask}: there is no such file or folder; check the path")

    @property
    def endings(self) -> dict[str, str]:
        return ENDINGS | {"film": f"_film.{self.film_format}"}


Pair = tuple[Image.Image, Image.Image | None]  # a picture and its mask


class Inverter:
    """The networks, losses and starts that a configuration asks for."""

    def __init__(self, config: InvertConfig) -> None:
        self.config, self.device = config, parse_device(config.device)
        path = checkpoint.resolve(config.generator)
        self.generator: Any = self.placed(checkpoint.load(path, Generator, DcganGenerator))
        use_threads(config.threads, pixels=config.batch_size * self.generator.resolution**2)
        losses = LossSet(dataclasses.asdict(config.loss), config.networks)
        self.losses = losses.to(self.device)
        self.encoder: Encoder | None = None
        self.given: Tensor | None = None  # (1, …) where all searches start
        if config.start == "encoder":
            self.encoder = self.fitting_encoder()
        elif config.start not in ("mean", "random"):
            self.given = read_latents(Path(config.start), self.generator).to(self.device)
            if len(self.given) != 1:
                raise ValueError(f"{config.start} holds {len(self.given)} latents; give one")
        curvature = curvature_of(config.generator, config.curvature)
        self.curvature = None if curvature is None else self.placed(curvature)
        self.aligner = Aligner(self.device) if config.align else None

    def placed(self, network: Any) -> Any:
        return frozen(network).to(self.device)

    def fitting_encoder(self) -> Encoder:
        if not isinstance(self.generator, Generator) or self.config.search.space == "z":
            raise ValueError("an encoder finds w+, not z; give --start random or mean")
        encoder = self.placed(checkpoint.load(checkpoint.resolve(self.config.encoder), Encoder))
        wanted = self.generator.num_ws, self.generator.w_dim
        if (encoder.config.num_ws, encoder.config.w_dim) != wanted:
            raise ValueError(
                f"the encoder {self.config.encoder} is not of {self.config.generator}; give its "
                "own with --encoder, or --start mean"
            )
        return encoder

    # ------------------------------------------------------------------------------ pictures

    def read(self, job: Job) -> Pair:
        """The picture, aligned if asked for, and its mask."""
        picture, mask = open_image(job.path), None
        if self.aligner is not None:
            faces = find_faces(self.aligner, picture, job.path)
            picture = self.aligner.crop(picture, faces[0], self.generator.resolution * 4)
        if self.config.mask == "alpha":
            mask = open_opacity(job.path)
        elif self.config.mask is not None:
            mask = open_image(mask_file(Path(self.config.mask), job.relative)).convert("L")
        return picture, mask

    def tensors(self, pictures: list[Pair]) -> tuple[Tensor, Tensor | None]:
        """(B, 3, R, R) in [-1, 1], and masks (B, 1, R, R) of 0 and 1."""
        side = self.generator.resolution
        target = to_float(torch.stack([fit(picture, side) for picture, _ in pictures]))
        if self.config.mask is None:
            return target.to(self.device), None
        masks = [fit(mask.convert("RGB"), side)[:1] for _, mask in pictures if mask is not None]
        return target.to(self.device), (torch.stack(masks) > 127).float().to(self.device)

    # -------------------------------------------------------------------------------- search

    @torch.no_grad()
    def start(self, target: Tensor) -> Any:
        if self.encoder is not None:
            return self.encoder(target)
        if self.given is not None:
            return self.given.expand(len(target), *self.given.shape[1:])
        return self.config.start

    def __call__(self, target: Tensor, mask: Tensor | None, callback: Any) -> Inversion:
        return optimise_latent(
            self.generator,
            target,
            losses=self.losses,
            search=self.config.search,
            start=self.start(target if mask is None else torch.where(mask > 0, target, 0.0)),
            mask=mask,
            curvature=self.curvature,
            callback=callback,
        )


def mask_file(mask: Path, relative: Path) -> Path:
    """The mask of an input: the file itself, or in a folder the file of the same name."""
    if not mask.is_dir():
        return mask
    found = sorted(f for f in (mask / relative.parent).glob("*") if f.stem == relative.stem)
    if not found:
        raise ValueError(f"There is no mask for {relative} in {mask}; give one of the same name.")
    return found[0]


# ---------------------------------------------------------------------------- files to files


def run(config: InvertConfig) -> int:
    """The exit code."""
    results = Results(config, config.endings, config.save)
    if not results.todo:
        return 0
    inverter = Inverter(config)
    losses: list[float] = []
    steps = config.search.steps + 1
    with (
        results,
        progress(len(results.todo) * steps, 0, console.is_terminal, "steps") as advance,
    ):
        readable = read_all(results, inverter)
        while batch := list(itertools.islice(readable, config.batch_size)):
            target, mask = inverter.tensors([pictures for _, pictures in batch])
            history = History(config, target, len(losses) * steps, advance)
            found = inverter(target, mask, history.add)
            for i, (job, _) in enumerate(batch):
                with results.attempt(job):
                    loss = float(found.loss[i])
                    if not math.isfinite(loss):
                        raise ValueError(f"The loss of {job.path} is never a finite number.")
                    results.begin(job)
                    write(job, i, found, history)
                    results.done(job, loss=loss, step=int(found.step[i]))
                    losses.append(loss)
    mean = f", mean loss {sum(losses) / len(losses):.4g}" if losses else ""
    return results.report("searched", mean)


def read_all(results: Results, inverter: Inverter) -> Iterator[tuple[Job, Pair]]:
    """(job, (picture, mask)) of all that can be read, one at a time."""
    for job in results.todo:
        pair = None
        with results.attempt(job):
            pair = inverter.read(job)
        if pair is not None:
            yield job, pair


class History:
    """What a batch's search looked at: losses of all steps, some pictures for the film."""

    def __init__(
        self,
        config: InvertConfig,
        target: Tensor,
        before: int,  # looks at the pictures of earlier batches, for `advance`
        advance: Callable[..., None],
    ) -> None:
        self.target, self.before, self.advance = target.cpu(), before, advance
        self.last = config.search.steps
        self.every = 0  # steps between two pictures of the film
        if "film" in chosen(config.save, config.endings):
            self.every = max(1, math.ceil(self.last / FILM_FRAMES))
        self.losses: list[Tensor] = []  # (B,) on the device
        self.images: list[Tensor] = []  # uint8 (B, 3, R, R)

    def add(self, step: int, images: Tensor, loss: Tensor) -> None:
        self.losses.append(loss)
        if self.every and step % self.every == 0:
            self.images.append(to_uint8(images).cpu())
        if step % 10 == 0 or step == self.last:  # a look at the loss waits for the device
            self.advance(self.before + (step + 1) * len(loss), loss=float(loss.mean()))

    def film(self, i: int) -> Tensor:
        """(N, 3, R, 2R): the target beside what was tried."""
        made = to_float(torch.stack([images[i] for images in self.images]))
        return torch.cat([self.target[i].expand_as(made), made], dim=3)


def write(job: Job, i: int, found: Inversion, history: History) -> None:
    """Row i of a batch; the files of one picture, each whole or not."""
    for name, file in job.files().items():
        if name == "reconstruction":
            write_atomically(file, partial(to_pil(found.image[i]).save, format="PNG"))
        elif name == "curve":
            curve = torch.stack(history.losses)[:, i].tolist()
            write_atomically(file, partial(plot, curve))
        elif name == "film":
            write_frames(file, history.film(i))
        else:
            tensors = {"z": found.latent[i]} if found.ws is None else {"ws": found.ws[i]}
            if found.affine is not None:
                tensors["affine"] = found.affine[i]
            for noise, value in (found.noise or {}).items():
                tensors[noise] = value[i, 0]
            write_latents(file, tensors)


def plot(losses: list[float], file: Path) -> None:
    """The loss against steps, and the lowest so far, as a PNG."""
    from matplotlib.figure import Figure  # takes half a second

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(losses, color="tab:blue", alpha=0.4, label="tried")
    lowest = list(itertools.accumulate(losses, min))
    axes.plot(lowest, color="tab:blue", label=f"lowest, at the end {lowest[-1]:.4g}")
    if min(losses) > 0:
        axes.set_yscale("log")
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(file, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    return command(InvertConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
