"""Encoder against latent optimisation, on the same held-out faces: error, seconds, both at once.

    python benchmarks/inversion.py --data faces/test.parquet --images 50 \\
        --lpips-alex alex.safetensors --lpips-vgg vgg.safetensors --refiners lbfgs adam \\
        --output benchmarks/results/inversion64.json --csv inversion64.csv \\
        --plot inversion64.png --picture inversion64_faces.png
    python benchmarks/inversion.py … --optimisation-steps 250 --spaces w+ --starts mean   # cheaper
    python benchmarks/inversion.py … --loss.mse 1 --loss.lpips 0.1        # what all searches lower
    python benchmarks/inversion.py … --anime-data anime/test.parquet      # their drawn faces, too

Methods: the mean face; the encoder; the encoder and k steps of search in w+; Adam from the mean of
w or from a random start (the best of 32 for each picture, by the loss), as the field does it; and
L-BFGS from the mean in w+, which tells the encoder's gain from the optimiser's. Adam's learning
rate ramps down at the end of a run: fewer steps are a run of their own, not a longer one cut short.

All are judged by one code, on pictures clamped to [-1, 1]. The report names what was optimised;
LPIPS (vgg) is independent of that, and of the encoder's training, unless --loss-lpips says
otherwise. dlib's embedding would be a second judge of identity, and is left out: it was trained on
faces its own landmarks cut at 150 px, which are not reliably found in 64 px reconstructions.

Seconds are per picture, the generator's passes included, after a warm-up with the device
synchronised: medians and 95th percentiles over full batches, and over single pictures ("single").
equal_steps: searches of as many steps. equal_seconds: how far the longest search of each family was
when a faster method was done, and when it was as good (null: never). Its best picture so far is
looked up along "curves", a step being its run's seconds / (steps + 1), the start's look counted as
one; the schedule of Adam was made for the whole run, so compare with the shorter runs as well.
Ends with one JSON line; `--quick` runs a little of every family.

Shape letters: N pictures, B batch, L layers of w+, D dimension of w, R resolution.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from common import (
    Benchmark,
    benchmark,
    distance_matrix,
    metrics_of,
    percentiles,
    retrieval,
    scores,
    show,
    sketch_features,
    stopwatch,
)
from pareto import equal_seconds, equal_steps, longest, plot, readme, sheet, thinned, write_csv
from torch import Tensor

from encoder.losses import LossNetworks, LossSet, LossWeights
from encoder.metrics import mse
from encoder.model import Encoder
from encoder.search import Inversion, Search, optimise_latent
from generators.blocks import SwappedSynthesis
from generators.checkpoint import load, resolve
from generators.command import console
from generators.curvature import Curvature
from generators.data import first_pictures, open_dataset
from generators.distances import feature_space, kernel_distance, pooled_features
from generators.features import FeaturePyramid
from generators.images import to_float, to_uint8
from generators.runs import frozen
from generators.stylegan2 import Generator

Start = Literal["mean", "random", "encoder"]
TITLES = {"lbfgs": "L-BFGS", "adam": "Adam"}
QUICK: dict[str, Any] = {"images": 8, "steps": (2, 5), "refiners": ("lbfgs", "adam"), "timed": 1,
                         "optimisation_steps": (4, 8), "lbfgs_steps": (5,),
                         "anime_images": 200}  # fmt: skip


@dataclass(frozen=True)
class Config(Benchmark):
    data: str  # held-out aligned faces
    images: int = 50  # evenly spread
    face_generator: str = "face128"
    encoder: str = "auto"
    curvature: str | None = "auto"  # the generator's, of L-BFGS; None: without
    steps: tuple[int, ...] = (10, 25, 50, 100, 250)  # of search after the encoder
    refiners: tuple[Literal["lbfgs", "adam"], ...] = ("lbfgs",)  # that search after the encoder
    optimisation_steps: tuple[int, ...] = (100, 250, 500, 1000)  # of Adam without the encoder
    spaces: tuple[Literal["w", "w+"], ...] = ("w", "w+")  # of Adam without the encoder
    starts: tuple[Literal["mean", "random"], ...] = ("mean", "random")  # the same
    lbfgs_steps: tuple[int, ...] = (25, 50, 100)  # of L-BFGS from the mean in w+
    learning_rate: float = 0.05  # Adam's in w+
    learning_rate_w: float = 0.1  # Adam's in w
    loss: LossWeights = field(default_factory=lambda: LossWeights(latent=0.0))  # of all searches
    loss_lpips: Literal["alex", "vgg"] = "alex"  # network of --loss.lpips
    lpips_alex: Path | None = None  # backbone of the column lpips_alex; None: no such column
    lpips_vgg: Path | None = None
    id_weights: Path | None = None  # FaceNet's, of the column id: 1 - cosine; None: no such column
    anime_data: str | None = None  # drawn faces; with them, each method's anime picture is judged
    anime_images: int = 2000  # drawn faces, evenly spread, at most
    anime_generator: str = "auto"
    swap_resolution: int = 16  # its first block
    anime_space: str = "efficientnet"  # of KID; NAME or NAME=WEIGHTS of generators.distances
    batch_size: int = 8
    timed: int = 3  # pictures that are timed one by one
    seed: int = 0
    device: str = "cpu"
    csv: Path | None = None  # its rows
    plot: Path | None = None  # error against seconds
    picture: Path | None = None  # input x method, and below each face its anime

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timed < 1:
            raise ValueError("--timed is 1 or more.")
        if min((*self.steps, *self.optimisation_steps, *self.lbfgs_steps), default=1) < 1:
            raise ValueError("steps must be at least 1; the encoder alone is always there")

    @property
    def lpips(self) -> dict[str, Path]:
        files = {"alex": self.lpips_alex, "vgg": self.lpips_vgg}
        return {net: file for net, file in files.items() if file is not None}


@dataclass(frozen=True)
class Method:
    family: str  # a series of the plot
    start: Start
    search: Search | None = None  # None: the start itself

    @property
    def steps(self) -> int:
        return 0 if self.search is None else self.search.steps

    @property
    def name(self) -> str:
        return f"{self.family}, {self.steps} steps" if self.steps else self.family


def methods(config: Config) -> Iterator[Method]:
    """The rows of the table, in its order."""
    yield Method("mean face", "mean")
    yield Method("encoder", "encoder")
    rates = {"w": config.learning_rate_w, "w+": config.learning_rate}
    for optimiser in config.refiners:
        for k in config.steps:
            search = Search(k, optimiser=optimiser, learning_rate=rates["w+"], seed=config.seed)
            yield Method(f"encoder + {TITLES[optimiser]}", "encoder", search)
    for space in config.spaces:
        for start in config.starts:
            for k in config.optimisation_steps:
                search = Search(k, space, "adam", rates[space], seed=config.seed)
                yield Method(f"Adam in {space} from {start}", start, search)
    for k in config.lbfgs_steps:
        yield Method("L-BFGS in w+ from mean", "mean", Search(k, seed=config.seed))


# ----------------------------------------------------------------------- translation


class Translation:
    """The drawn faces that latents give, on the two axes of benchmarks/translation.py."""

    def __init__(self, config: Config, face: Generator, images: Tensor) -> None:
        device = images.device
        anime = frozen(load(resolve(config.anime_generator), Generator)).to(device)
        self.synthesis = SwappedSynthesis(face, anime, config.swap_resolution)
        self.space = feature_space(config.anime_space).to(device)
        self.pyramid = frozen(FeaturePyramid(weights="wheel")).to(device)
        drawn = first_pictures(open_dataset(str(config.anime_data), face.resolution),
                               config.anime_images)  # fmt: skip
        self.drawn = pooled_features(self.space, drawn, device=device)
        self.sought = sketch_features(self.pyramid, images)

    @torch.no_grad()
    def __call__(self, ws: Tensor) -> tuple[Tensor, dict[str, float]]:
        """ws (N, L, D) -> pictures (N, 3, R, R), {"top1", "top5", "kid"}."""
        made = torch.cat([self.synthesis(piece) for piece in ws.split(25)])
        made = to_float(to_uint8(made)).to(ws.device)  # as written pictures are
        found = retrieval(distance_matrix(self.sought, sketch_features(self.pyramid, made)))
        return made, found | {
            "kid": kernel_distance(self.drawn, pooled_features(self.space, made))[0]
        }


# ------------------------------------------------------------------------------- a run


class Recorder:
    """A callback: the MSE of each picture's best so far, by the loss, at each step."""

    def __init__(self, target: Tensor) -> None:
        self.target = target
        self.loss = self.error = torch.full_like(target[:, 0, 0, 0], torch.inf)
        self.curve: list[Tensor] = []  # of (B,)

    def __call__(self, step: int, images: Tensor, loss: Tensor) -> None:
        better = loss < self.loss
        self.error = torch.where(better, mse(images.clamp(-1, 1), self.target), self.error)
        self.loss = torch.where(better, loss, self.loss)
        self.curve.append(self.error)


class Bench:
    def __init__(self, config: Config) -> None:
        self.config, self.device = config, torch.device(config.device)
        face: Generator = frozen(load(resolve(config.face_generator), Generator))
        encoder: Encoder = frozen(load(resolve(config.encoder), Encoder))
        self.face, self.encoder = face.to(self.device), encoder.to(self.device)
        self.curvature: Curvature | None = None
        if config.curvature is not None:
            self.curvature = frozen(load(resolve(config.curvature), Curvature)).to(self.device)
        images = first_pictures(open_dataset(config.data, face.resolution), config.images)
        self.images = images.to(self.device)  # (N, 3, R, R)
        self.metrics = metrics_of(config.lpips, config.id_weights, self.device)
        self.losses = LossSet(
            asdict(config.loss),
            LossNetworks(
                lpips_net=config.loss_lpips,
                lpips_weights=config.lpips.get(config.loss_lpips),
                id_weights=config.id_weights,
            ),
        ).to(self.device)
        self.translation = None
        if config.anime_data is not None:
            self.translation = Translation(config, face, self.images)

    @torch.no_grad()
    def look(self, method: Method, images: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(B, 3, R, R) -> ws (B, L, D), pictures (B, 3, R, R), curve (B, 1 + steps) or None."""
        start: Tensor | Literal["mean", "random"]
        if method.start == "encoder":
            start = self.encoder(images).float()
        else:
            start = method.start
        if method.search is None:
            mean = self.face.ws_avg.expand(len(images), -1, -1)
            ws = start if isinstance(start, Tensor) else mean
            return ws, self.face.synthesis(ws), None
        record = Recorder(images)
        found: Inversion = optimise_latent(
            self.face, images, losses=self.losses, search=method.search, start=start,
            curvature=self.curvature, callback=record,
        )  # fmt: skip
        assert found.ws is not None
        return found.ws, found.image, torch.stack(record.curve, dim=1)

    def timed(self, method: Method, pieces: Sequence[Tensor]) -> tuple[list[Any], list[float]]:
        """What `look` finds in each piece, and its seconds a picture."""
        few = method.search and replace(method.search, steps=min(2, method.steps))
        self.look(replace(method, search=few), pieces[0])  # warm-up
        made: list[Any] = []
        left = iter(pieces)
        times = stopwatch(
            lambda: made.append(self.look(method, next(left))), len(pieces), self.device, warm_up=0
        )
        return made, [t / len(piece) for t, piece in zip(times, pieces, strict=True)]

    def row(self, method: Method) -> tuple[dict[str, Any], list[Tensor], np.ndarray | None]:
        """Figures; pictures (N, 3, R, R) of faces and, if asked for, anime; curve (1 + steps,)."""
        pieces = self.images.split(self.config.batch_size)
        made, seconds = self.timed(method, pieces)
        if len(pieces) > 1 and len(pieces[-1]) < len(pieces[0]):
            seconds.pop()  # a short batch is not of that size
        ws, pictures = (torch.cat([x[i] for x in made]) for i in range(2))
        shown = [pictures.clamp(-1, 1)]
        figures: dict[str, Any] = {"method": method.name, "family": method.family}
        figures |= {"steps": method.steps} | scores(self.metrics, shown[0], self.images)
        if self.translation is not None:
            drawn, found = self.translation(ws)
            shown.append(drawn)
            figures |= found
        single = self.timed(method, self.images[: self.config.timed].split(1))[1]
        figures |= percentiles(seconds) | {f"single_{k}": v for k, v in percentiles(single).items()}
        curve = None
        if method.search is not None:
            curve = torch.cat([x[2] for x in made]).double().mean(dim=0).cpu().numpy()
        return figures, [x.cpu() for x in shown], curve


# ------------------------------------------------------------------------------ report


def run(config: Config) -> dict[str, Any]:
    bench = Bench(config)
    rows, shown, curves = [], {}, {}
    for method in methods(config):
        figures, shown[method.name], curve = bench.row(method)
        rows.append(figures)
        if curve is not None:
            curves[method.name] = thinned(curve)
        console.print(f"{method.name}: MSE {figures['mse']:.4f}, {figures['p50_ms']:.0f} ms")
    curves = {row["method"]: curves[row["method"]] for row in longest(rows).values()}
    show([{key: value for key, value in row.items() if key != "family"} for row in rows])
    if config.csv is not None:
        write_csv(rows, config.csv)
    if config.plot is not None:
        plot(rows, config.plot)
    if config.picture is not None:
        sheet(bench.images.cpu(), shown, rows, config.picture)
    report: dict[str, Any] = {"images": len(bench.images), "batch_size": config.batch_size}
    report["optimised"] = bench.losses.weights
    if config.loss.lpips:
        report["lpips_optimised"] = config.loss_lpips
    report |= {"rows": rows, "equal_steps": equal_steps(rows)}
    report |= {"equal_seconds": equal_seconds(rows, curves), "curves": curves}
    return report | {"markdown": readme(rows)}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("inversion", Config, run, QUICK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
