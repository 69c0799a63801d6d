"""How much perceptual loss, and in which space: latent search over weights alpha and latent spaces.

    python benchmarks/sweep.py --data faces/test.parquet --dcgan dcgan.safetensors \\
        --lpips-alex alex.safetensors --lpips-vgg vgg.safetensors \\
        --output benchmarks/results/sweep64.json --picture sweep64.png
    python benchmarks/sweep.py … --perceptual lpips                       # instead of "features"

What is minimised is alpha * perceptual + (1 - alpha) * mse, in z, w and w+ of the StyleGAN2 and in
z of a DCGAN, all with the same optimiser, steps and kind of start: for each picture the best of 32
random latents, by that loss (the mean of z is no face). "features" is the distance of EfficientNet
features (`perceptual_distance`), "lpips" is LPIPS (alex); the two are of different size, so their
alphas do not compare. The curvature speeds up w and w+; z has none. All rows are judged by the
code of benchmarks/common.py, on pictures clamped to [-1, 1].
Ends with one JSON line; `--quick` takes a few pictures, steps and alphas.

Shape letters: N pictures, B batch, R resolution.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from common import Benchmark, benchmark, markdown, metrics_of, scores, show
from PIL import Image
from torch import Tensor

from encoder.losses import LossNetworks, LossSet
from encoder.search import Search, Space, optimise_latent
from generators.checkpoint import load, resolve
from generators.command import console
from generators.curvature import Curvature
from generators.data import first_pictures, open_dataset
from generators.dcgan import DcganGenerator
from generators.images import grid, labelled, resize
from generators.runs import frozen
from generators.stylegan2 import Generator

ROWS, SIDE = 6, 128  # of each section of the picture: people, and pixels of a face
QUICK: dict[str, Any] = {"images": 4, "steps": 3, "alphas": (1e-5, 1e-2, 1.0)}


@dataclass(frozen=True)
class Config(Benchmark):
    data: str  # held-out aligned faces
    images: int = 24  # evenly spread
    face_generator: str = "face128"
    curvature: str | None = "auto"  # its own, for L-BFGS in w and w+; None: without
    dcgan: Path | None = None  # a DCGAN of the same resolution; None: no such rows
    alphas: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # from 0 to 1
    spaces: tuple[Space, ...] = ("z", "w", "w+")  # of the StyleGAN2
    perceptual: Literal["features", "lpips"] = "features"
    steps: int = 100
    optimiser: Literal["lbfgs", "adam"] = "lbfgs"
    learning_rate: float = 0.05  # adam's
    lpips_alex: Path | None = None  # backbone of the column lpips_alex, and of that loss
    lpips_vgg: Path | None = None
    batch_size: int = 8
    seed: int = 0
    device: str = "cpu"
    picture: Path | None = None  # a section for each space: faces x alphas

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alphas or not all(0 <= alpha <= 1 for alpha in self.alphas):
            raise ValueError("give at least one alpha, all from 0 to 1")
        if self.perceptual == "lpips" and self.lpips_alex is None:
            raise ValueError("--perceptual lpips needs --lpips-alex FILE")


def sweep(config: Config) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The report, and by name of the space the input and each alpha's pictures
    (N, 1 + alphas, 3, R, R)."""
    device = torch.device(config.device)
    face: Generator = frozen(load(resolve(config.face_generator), Generator)).to(device)
    curvature: Curvature | None = None
    if config.curvature is not None:
        curvature = frozen(load(resolve(config.curvature), Curvature)).to(device)
    searched: dict[str, tuple[Generator | DcganGenerator, Space]]
    searched = {f"StyleGAN2, {space}": (face, space) for space in config.spaces}
    if config.dcgan is None:
        console.print("no rows of a DCGAN: give --dcgan FILE")
    else:
        dcgan: DcganGenerator = frozen(load(config.dcgan, DcganGenerator)).to(device)
        if dcgan.resolution != face.resolution:
            raise ValueError(
                f"{config.dcgan} draws {dcgan.resolution} pixels a side and the face generator "
                f"{face.resolution}; give a DCGAN of that resolution"
            )
        searched["DCGAN, z"] = dcgan, "z"
    data = open_dataset(config.data, face.resolution)
    images = first_pictures(data, config.images).to(device)
    files = {"alex": config.lpips_alex, "vgg": config.lpips_vgg}
    metrics = metrics_of({net: f for net, f in files.items() if f is not None}, None, device)

    rows: list[dict[str, Any]] = []
    pictures = {name: [images.cpu()] for name in searched}
    term = "perceptual" if config.perceptual == "features" else "lpips"
    for alpha in config.alphas:
        networks = LossNetworks(lpips_weights=config.lpips_alex)
        losses = LossSet({term: alpha, "mse": 1 - alpha}, networks).to(device)
        for name, (generator, space) in searched.items():
            search = Search(
                config.steps, space, config.optimiser, config.learning_rate, seed=config.seed
            )
            found = [
                optimise_latent(generator, batch, losses=losses, search=search, start="random",
                                curvature=curvature)
                for batch in images.split(config.batch_size)
            ]  # fmt: skip
            made = torch.cat([x.image for x in found]).clamp(-1, 1)
            loss = float(torch.cat([x.loss for x in found]).double().mean())
            figures = {"space": name, "alpha": alpha, "loss": loss}
            rows.append(figures | scores(metrics, made, images))
            pictures[name].append(made.cpu())
            console.print(f"{name}, alpha {alpha:g}: MSE {rows[-1]['mse']:.4f}")
    rows.sort(key=lambda row: list(searched).index(row["space"]))  # stable: alphas keep their order
    report: dict[str, Any] = {"images": len(images), "perceptual": config.perceptual}
    report |= {"steps": config.steps, "optimiser": config.optimiser}
    report |= {"rows": rows, "markdown": table_of(rows)}
    return report, {name: torch.stack(columns, dim=1) for name, columns in pictures.items()}


def table_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: one line a row."""
    titles = {"mse": "MSE", "psnr": "PSNR, dB", "ms_ssim": "MS-SSIM",
              "lpips_alex": "LPIPS (alex)", "lpips_vgg": "LPIPS (vgg)"}  # fmt: skip
    kept = {key: title for key, title in titles.items() if key in rows[0]}
    lines = [["space", "alpha", *kept.values()]]
    for row in rows:
        lines.append([row["space"], f"{row['alpha']:g}", *(f"{row[key]:.4g}" for key in kept)])
    return markdown(lines)


def sheet(pictures: Mapping[str, Tensor], alphas: Sequence[float], path: Path) -> None:
    """Sections below each other, one a space: rows are people, columns the input and the alphas."""
    sections = []
    labels = ["input", *(f"alpha {alpha:g}" for alpha in alphas)]
    for name, faces in pictures.items():
        count = len(faces)
        chosen = [i * count // ROWS for i in range(ROWS)] if count > ROWS else list(range(count))
        big = resize(faces[chosen].flatten(0, 1), SIDE).clamp(-1, 1)
        sections.append(labelled(labelled(grid(big, columns=len(labels)), labels), [name]))
    whole = Image.new("RGB", (sections[0].width, sum(s.height for s in sections)), "white")
    top = 0
    for section in sections:
        whole.paste(section, (0, top))
        top += section.height
    path.parent.mkdir(parents=True, exist_ok=True)
    whole.save(path)


def run(config: Config) -> dict[str, Any]:
    report, pictures = sweep(config)
    show(report["rows"])
    if config.picture is not None:
        sheet(pictures, config.alphas, config.picture)
    return report


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("sweep", Config, run, QUICK, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
