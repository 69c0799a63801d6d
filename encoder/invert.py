"""Search the latents of a picture, a folder or a glob: latents, reconstructions, curves out.

    python -m encoder.invert --input photos/ --output out/ --steps 100
    python -m encoder.invert --input me.jpg --output out/ --save reconstruction,film \\
        --optimiser adam --start mean --space w --steps 1000 --learning-rate 0.1 \\
        --loss.mse 0.9 --loss.perceptual 0.1                   # reverse generation
    python -m encoder.invert --no-align --input holes/ --mask masks/ --output out/
    python -m encoder.invert --no-align --input sketch.png --mask alpha --output out/ --space w

Writes OUT/sub/name.png (reconstruction), name_latents.safetensors ("ws" (L, D) or "z" (Z,), and
what else was searched), name_curve.png (loss against steps), name_film.gif or .mp4. The same
command goes on where it stopped: finished pictures are not searched again. Exit code 0, 1 where
pictures failed (they are listed, the others are done), 2 where nothing could be done.

The search itself: `encoder.search`. Shape letters: B batch, L layers of w+, D dimension of w, R
resolution.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

from encoder.align import Aligner
from encoder.frames import check_format, write_frames
from encoder.losses import CRITICS, LossSet, LossWeights, LpipsNet
from encoder.model import Encoder
from encoder.search import Inversion, Search, optimize_latent
from generators import checkpoint
from generators.blocks import read_ws
from generators.curvature import curvature_of
from generators.dcgan import DcganGenerator
from generators.features import read_state
from generators.images import (
    find_images,
    fit,
    open_image,
    open_opacity,
    resize,
    result_names,
    to_float,
    to_pil,
    to_uint8,
)
from generators.runs import frozen, progress, record, write_atomically
from generators.stylegan2 import Generator

ARTEFACTS = {"reconstruction": ".png", "latents": "_latents.safetensors", "curve": "_curve.png",
             "film": "_film"}  # fmt: skip
ENDING = re.compile(r"(_latents|_curve|_film)?$")
FILM_FRAMES = 250  # at most
CHANGEABLE = ("input", "output", "batch_size", "device", "save", "film_format")


@dataclass(frozen=True)
class InvertConfig:
    input: str  # a picture, a folder (with its sub-folders) or a quoted glob
    output: Path  # folder, made if need be; the same command goes on with what it holds
    save: str = "reconstruction,latents,curve"  # comma list of reconstruction, latents, curve, film
    film_format: Literal["gif", "mp4"] = "gif"  # mp4 needs PyAV: pip install '.[video]'
    generator: str = "face64"  # bundled name or .safetensors, of a StyleGAN2 or a DCGAN
    start: str = "encoder"  # encoder, mean, random (the best of --candidates), or a latents file
    encoder: str = "encoder64"  # of the generator, for --start encoder
    curvature: str | None = None  # of the generator, for lbfgs; face64 has curvature64
    search: Annotated[Search, tyro.conf.arg(name="")] = field(default_factory=Search)
    loss: LossWeights = field(default_factory=lambda: LossWeights(latent=0.0))
    mask: str | None = None  # picture or folder of them, white is valid; "alpha": what is opaque
    align: bool = True  # find the largest face first; off: the pictures are crops already
    discriminator: str | None = None  # of the losses feature, feature_mse, adversarial
    lpips_net: LpipsNet = "alex"
    lpips_weights: Path | None = None  # of its backbone; None: a download, said aloud
    feature_weights: str | None = "wheel"  # of the perceptual term: a .safetensors, None downloads
    id_weights: Path | None = None  # of the id term; None: a download, said aloud
    batch_size: int = 8  # pictures searched together
    device: str = "cpu"

    def __post_init__(self) -> None:
        if unknown := sorted(self.artefacts - ARTEFACTS.keys()):
            raise ValueError(
                f"--save does not know {', '.join(unknown)}; choose from {', '.join(ARTEFACTS)}"
            )
        if self.batch_size < 1:
            raise ValueError("--batch-size must be at least 1")
        if self.loss.latent:
            raise ValueError("the loss latent is for training, where the latent is known")
        if self.loss.of_discriminator and self.discriminator is None:
            raise ValueError(f"the loss {self.loss.of_discriminator[0]} needs --discriminator")
        if self.mask is not None and self.align:
            raise ValueError("masks are for pictures that are crops already; add --no-align")

    @property
    def artefacts(self) -> set[str]:
        return {name.strip() for name in self.save.split(",")}


@dataclass
class Job:
    """One picture to search."""

    path: Path
    relative: Path  # of the input
    base: Path  # OUT/sub/name

    def files(self, config: InvertConfig) -> dict[str, Path]:
        endings = ARTEFACTS | {"film": f"_film.{config.film_format}"}
        names = {name: self.base.name + ending for name, ending in endings.items()}
        return {n: self.base.with_name(f) for n, f in names.items() if n in config.artefacts}


class Inverter:
    """The networks, losses and starts that a configuration asks for."""

    def __init__(self, config: InvertConfig) -> None:
        self.config, self.device = config, torch.device(config.device)
        path = checkpoint.resolve(config.generator)
        self.generator: Any = self.placed(checkpoint.load_one_of(path, ("generator", "dcgan")))
        discriminator = None
        if config.discriminator is not None:
            discriminator = self.placed(checkpoint.load_one_of(config.discriminator, CRITICS))
        self.losses = LossSet(
            dataclasses.asdict(config.loss),
            lpips_net=config.lpips_net,
            lpips_weights=config.lpips_weights,
            feature_weights=config.feature_weights,
            id_weights=config.id_weights,
            discriminator=discriminator,
        ).to(self.device)
        self.encoder: Encoder | None = None
        if config.start == "encoder":
            self.encoder = self.fitting_encoder()
        curvature = curvature_of(config.generator, config.curvature)
        self.curvature = None if curvature is None else self.placed(curvature)
        detector = "cpu" if self.device.type == "mps" else self.device
        self.aligner = Aligner(detector) if config.align else None

    def placed(self, network: Any) -> Any:
        return frozen(network).to(self.device)

    def fitting_encoder(self) -> Encoder:
        if not isinstance(self.generator, Generator) or self.config.search.space == "z":
            raise ValueError("an encoder finds w+, not z; give --start random or mean")
        encoder = self.placed(checkpoint.load(checkpoint.resolve(self.config.encoder), "encoder"))
        wanted = self.generator.num_ws, self.generator.w_dim
        if (encoder.config.num_ws, encoder.config.w_dim) != wanted:
            raise ValueError(
                f"the encoder {self.config.encoder} is not of {self.config.generator}; give its "
                "own with --encoder, or --start mean"
            )
        return encoder

    # ------------------------------------------------------------------------------ pictures

    def read(self, job: Job) -> tuple[Image.Image, Image.Image | None]:
        """The picture, aligned if asked for, and its mask."""
        picture, mask = open_image(job.path), None
        if self.aligner is not None:
            faces = self.aligner.detect(picture)
            if not faces:
                raise ValueError(
                    f"No face found in {job.path}; give --no-align for an aligned crop."
                )
            picture = self.aligner.crop(picture, faces[0], self.generator.resolution * 4)
        if self.config.mask == "alpha":
            mask = open_opacity(job.path)
        elif self.config.mask is not None:
            mask = open_image(mask_file(Path(self.config.mask), job.relative)).convert("L")
        return picture, mask

    def tensors(
        self, pictures: list[tuple[Image.Image, Image.Image | None]]
    ) -> tuple[Tensor, Tensor | None]:
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
            return self.encoder(resize(target, self.encoder.config.resolution))
        if self.config.start in ("mean", "random"):
            return self.config.start
        latents = read_latents(Path(self.config.start), self.generator).to(self.device)
        if len(latents) != 1:
            raise ValueError(f"{self.config.start} holds {len(latents)} latents; give one")
        return latents.expand(len(target), *latents.shape[1:])

    def __call__(self, target: Tensor, mask: Tensor | None, callback: Any) -> Inversion:
        return optimize_latent(
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


def read_latents(path: Path, generator: Generator | DcganGenerator) -> Tensor:
    """ws (K, L, D), or z (K, Z)."""
    z = read_state(path).get("z")
    if z is None and isinstance(generator, Generator):
        return read_ws(path, generator)
    if z is None or z.ndim not in (1, 2) or z.shape[-1] != generator.z_dim or not z.numel():
        raise ValueError(f"{path} needs a tensor `z` of shape (K, {generator.z_dim}); give another")
    return z.float().reshape(-1, generator.z_dim)


# ---------------------------------------------------------------------------- files to files


def run(config: InvertConfig, console: Console) -> int:
    """The exit code."""
    sources = find_images(config.input)
    names = result_names([relative for _, relative in sources], ENDING)
    jobs = [Job(p, r, config.output / n) for (p, r), n in zip(sources, names, strict=True)]
    for file in (file for job in jobs for file in job.files(config).values()):
        if any(file.resolve() == job.path.resolve() for job in jobs):
            raise ValueError(f"{file} is an input and would be replaced; give another --output")
        if file.suffix == ".mp4":
            check_format(file)
    if config.output.exists() and not config.output.is_dir():
        raise ValueError(f"--output {config.output} is a file; give a folder")
    inverter = Inverter(config)
    config.output.mkdir(parents=True, exist_ok=True)
    record(config.output / "search.json", dataclasses.asdict(config), CHANGEABLE)

    todo = [job for job in jobs if not all(file.exists() for file in job.files(config).values())]
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} pictures are finished already")
    failed: list[str] = []
    losses: list[float] = []
    steps = config.search.steps + 1
    with progress(len(todo) * steps, 0, console.is_terminal, "steps") as advance:
        readable = read_all(todo, inverter, failed)
        done = 0
        while batch := list(itertools.islice(readable, config.batch_size)):
            target, mask = inverter.tensors([pictures for _, pictures in batch])
            history = History(config, target)

            def look(step: int, images: Tensor, loss: Tensor, history=history, done=done) -> None:
                history.add(step, images, loss)
                if step % 10 == 0 or step == config.search.steps:  # a look at the loss waits
                    advance(done * steps + (step + 1) * len(loss), loss=float(loss.mean()))

            found = inverter(target, mask, look)
            done += len(batch)
            for i, (job, _) in enumerate(batch):
                try:
                    write(job, i, found, history, config)
                    losses.append(float(found.loss[i]))
                except OSError as error:
                    failed.append(f"Cannot write the result of {job.path}: {error.strerror}.")
    for reason in failed:
        console.print(reason)
    mean = f", mean loss {sum(losses) / len(losses):.4g}" if losses else ""
    console.print(f"{len(losses)} of {len(todo)} pictures searched{mean}; see {config.output}")
    return 1 if failed else 0


def read_all(jobs: list[Job], inverter: Inverter, failed: list[str]) -> Any:
    """(job, (picture, mask)) one at a time; what cannot be read is added to `failed`."""
    for job in jobs:
        try:
            yield job, inverter.read(job)
        except ValueError as error:
            failed.append(str(error))


class History:
    """What a batch's search looked at: losses of all steps, some pictures for the film."""

    def __init__(self, config: InvertConfig, target: Tensor) -> None:
        self.target = target.cpu()
        self.every = (
            -(-config.search.steps // FILM_FRAMES) or 1 if "film" in config.artefacts else 0
        )
        self.losses: list[Tensor] = []  # (B,) on the device
        self.images: list[Tensor] = []  # uint8 (B, 3, R, R)

    def add(self, step: int, images: Tensor, loss: Tensor) -> None:
        self.losses.append(loss)
        if self.every and step % self.every == 0:
            self.images.append(to_uint8(images).cpu())

    def film(self, i: int) -> Tensor:
        """(N, 3, R, 2R): the target beside what was tried."""
        made = to_float(torch.stack([images[i] for images in self.images]))
        return torch.cat([self.target[i].expand_as(made), made], dim=3)


def write(job: Job, i: int, found: Inversion, history: History, config: InvertConfig) -> None:
    """Row i of a batch; the files of one picture, each whole or not."""
    for name, file in job.files(config).items():
        file.parent.mkdir(parents=True, exist_ok=True)
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
            tensors = {key: value.cpu().contiguous() for key, value in tensors.items()}
            write_atomically(file, partial(save_file, tensors))


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


def main() -> int:
    console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    try:
        return run(tyro.cli(InvertConfig, description=__doc__), console)
    except ValueError as error:
        console.print(str(error))
    except OSError as error:
        console.print(f"Cannot write: {error}.")
    return 2


if __name__ == "__main__":
    sys.exit(main())
