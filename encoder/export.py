"""The networks as ONNX files, for other runtimes: a browser, a phone, C++, ONNX Runtime, OpenVINO.

    python -m encoder.export --output onnx/
    python -m encoder.export --output onnx/ --dtype fp16                  # half the size
    python -m encoder.export --output mine/ --face-generator face.safetensors \\
        --anime-generator anime.safetensors --encoder encoder.safetensors

    encoder.onnx        images (B, 3, S, S), aligned crops in [-1, 1] -> ws (B, L, D)
    synthesis.onnx      ws -> anime, …, reconstruction, each (B, 3, R, R) in [-1, 1]
    translator.onnx     images -> anime, …
    pnet.onnx rnet.onnx onet.onnx     MTCNN's: pictures (N, 3, H, W), (pixels - 127.5) / 128 ->
                        edges, points (O-Net's only), probabilities

With --styles anime,sketch,paint there is a drawing of each, all of one pass of the early blocks.
Any batch size; noise is constant. The metadata of a file hold the networks' configs, their origin
and their licence. Each file is run by ONNX Runtime when it is written, and compared with torch; one
that differs is taken away again.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution, S side of a crop.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from encoder.align import Aligner
from encoder.graphs import Dtype, encoder_model, mtcnn_model, synthesis_model, translator_model
from encoder.model import Encoder
from encoder.options import Models
from generators.blocks import SwappedSynthesis
from generators.checkpoint import load, read_metadata, resolve
from generators.command import command, console, printable
from generators.disk import may_write, write_atomically
from generators.graphs import halve_weights
from generators.images import find_images, fit, open_image, resize, to_float
from generators.latents import DEVIATIONS
from generators.stylegan2 import Generator
from generators.tails import load_styles

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TOLERANCE = 1e-4  # of the value range, in fp32
DECIBELS = 50.0  # PSNR at least, with half precision
COMPARED = 3  # faces at most
MTCNN_LICENCE = "MIT (facenet-pytorch)"


# ------------------------------------------------------------------------ writing, comparing


@dataclass(frozen=True)
class Compared:
    """How a file's results differ from torch's, at the batch size where they differ most."""

    file: str
    error: float  # largest difference, as a part of the range of torch's values
    psnr: float  # dB, the peak being that range


def compare(
    path: Path, network: Callable[..., Any], inputs: Sequence[Tensor], dtype: Dtype, name: str = ""
) -> Compared:
    """Runs the file on each of the inputs; ValueError where its results are not torch's.

    name: of the file in messages, where it is not the path's.
    """
    name = name or path.name
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    [asked] = session.get_inputs()
    error, psnr = 0.0, np.inf
    for x in inputs:
        with torch.no_grad():
            wanted = network(x)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        got = session.run(None, {asked.name: x.contiguous().numpy()})
        for given, right in zip(got, wanted, strict=True):
            a, b = given.astype(np.float64), right.double().numpy()
            if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
                error, psnr = np.inf, -np.inf
                continue
            span = max(float(np.ptp(b)), 1e-12)
            error = max(error, float(np.abs(a - b).max()) / span)
            mse = max(float(np.square((a - b) / span).mean()), 1e-24)
            psnr = min(psnr, -10 * np.log10(mse))
    good = error <= TOLERANCE if dtype == "fp32" else psnr >= DECIBELS
    if not good:
        raise ValueError(
            f"{name} gives other results than torch (largest difference {error:.1e} of the "
            f"range, PSNR {psnr:.1f} dB), so it was not kept; "
            + ("report this, please." if dtype == "fp32" else "take --dtype fp32.")
        )
    return Compared(name, error, float(psnr))


def write_model(
    path: Path, model: Any, network: Callable[..., Any], inputs: Sequence[Tensor], dtype: Dtype
) -> Compared:
    """Writes the model whole, unless it differs from the network (a function of the input that
    gives a tensor or several): then ValueError, and no file."""
    data = model.SerializeToString()
    compared: list[Compared] = []

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)
        compared.append(compare(temporary, network, inputs, dtype, path.name))

    write_atomically(path, write)
    return compared[0]


def export_networks(
    folder: Path,
    face: Generator,
    anime: Generator | Mapping[str, Generator],  # a fine-tune of `face`, or several by style
    encoder: Encoder,
    swap_resolution: int = 16,
    dtype: Dtype = "fp32",
    *,
    style_limit: float = DEVIATIONS,
    crops: Tensor | None = None,  # (N, 3, S, S) in [-1, 1] to compare on; None: faces it draws
    origin: Mapping[str, Mapping[str, str]] | None = None,  # {"face": provenance, "anime": …, …}
    overwrite: bool = False,
) -> list[Compared]:
    """Writes encoder, synthesis, translator and MTCNN's three as .onnx files into the folder, each
    compared with torch. ValueError for one that differs; it is not kept."""
    for name in FILES:
        may_write(folder / name, overwrite)
    styles = {"anime": anime} if isinstance(anime, Generator) else anime
    for net in (face, encoder, *styles.values()):
        net.cpu().float().eval()
    network = SwappedSynthesis(face, styles, swap_resolution, style_limit).requires_grad_(False)
    metadata = described(face, encoder, network, origin or {}) | {"dtype": dtype}
    side = encoder.config.resolution
    images = faces_of(face) if crops is None else crops
    images = resize(images.repeat(COMPARED, 1, 1, 1)[:COMPARED], side)
    with torch.no_grad():
        ws = encoder(images)

    def drawn(ws: Tensor, reconstruction: bool = True) -> tuple[Tensor, ...]:
        return tuple(x.clamp(-1, 1) for x in network.draw(ws, None, reconstruction).values())

    def translated(images: Tensor) -> tuple[Tensor, ...]:
        return drawn(encoder(images), False)

    looking = encoder_model(encoder, dtype, metadata | {"network": "encoder"})
    drawing = synthesis_model(network, dtype, metadata | {"network": "synthesis"})
    only = synthesis_model(network, dtype, both=False)
    whole = translator_model(looking, only, metadata | {"network": "translator"})
    compared = [
        write_model(folder / name, model, function, [x[:1], x], dtype)
        for name, model, function, x in (
            ("encoder.onnx", looking, encoder, images),
            ("synthesis.onnx", drawing, drawn, ws),
            ("translator.onnx", whole, translated, images),
        )
    ]
    return compared + export_mtcnn(folder, dtype)


FILES = ("encoder.onnx", "synthesis.onnx", "translator.onnx", "pnet.onnx", "rnet.onnx", "onet.onnx")


def export_mtcnn(folder: Path, dtype: Dtype = "fp32") -> list[Compared]:
    """pnet.onnx, rnet.onnx, onet.onnx: small, so arithmetic is float32 at any dtype."""
    dtype = "fp32" if dtype == "fp32" else "mixed"
    mtcnn: Any = Aligner().mtcnn
    rng = torch.Generator().manual_seed(0)
    compared = []
    for name, sides in (("pnet", (37, 52)), ("rnet", (24, 24)), ("onet", (48, 48))):
        net = getattr(mtcnn, name)
        model = mtcnn_model(net, {"network": name, "licence": MTCNN_LICENCE, "dtype": dtype})
        model = model if dtype == "fp32" else halve_weights(model)
        x = 2 * torch.rand(COMPARED, 3, *sides, generator=rng) - 1
        compared.append(write_model(folder / f"{name}.onnx", model, net, [x[:1], x], dtype))
    return compared


def described(
    face: Generator,
    encoder: Encoder,
    network: SwappedSynthesis,
    origin: Mapping[str, Mapping[str, str]],
) -> dict[str, Any]:
    """The metadata of the files: configs, origin and licence of each network."""
    licences = {name: source.get("licence", "not stated") for name, source in origin.items()}
    return {
        "format": "1",
        "generator": asdict(face.config),
        "encoder": asdict(encoder.config),
        "swap_resolution": network.swap_resolution,
        "styles": list(network.styles),
        "provenance": {name: dict(source) for name, source in origin.items()},
        "licence": "; ".join(f"{k}: {v}" for k, v in licences.items()) or "not stated",
    }


@torch.no_grad()
def faces_of(face: Generator) -> Tensor:
    """Pictures (COMPARED, 3, R, R) that the generator draws, always the same."""
    z = torch.randn(COMPARED, face.z_dim, generator=torch.Generator().manual_seed(0))
    return face(z, truncation=0.7).clamp(-1, 1)


# ---------------------------------------------------------------------------- the command


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Models):
    output: Path  # folder, made if need be
    styles: str = "anime"  # comma list of anime, sketch, paint, and NAME=FILE: a drawing of each
    swap_resolution: int = 16  # blocks from this resolution on are the anime generator's
    style_limit: float = DEVIATIONS  # of the drawing's blocks, as of infer.py
    dtype: Dtype = "fp32"  # fp16: all in half precision; mixed: weights only, arithmetic in fp32
    pictures: str | None = None  # photos to compare on; None: examples/, or faces that it draws
    overwrite: bool = False  # replace files that exist


def crops_of(pictures: str | None, side: int) -> Tensor | None:
    """(N, 3, S, S): the largest face of the first photos; None where there are no photos."""
    if pictures is None and not EXAMPLES.is_dir():
        return None
    aligner = Aligner()
    crops: list[Tensor] = []
    for file, _ in find_images(pictures or str(EXAMPLES)):
        picture = open_image(file)
        crops += [fit(aligner.crop(picture, f, side), side) for f in aligner.detect(picture)[:1]]
        if len(crops) == COMPARED:
            break
    if not crops:
        raise ValueError(f"There is no face in {pictures}; give photos of faces as --pictures.")
    return to_float(torch.stack(crops))


def run(config: ExportConfig) -> None:
    styles = config.styles_of(config.styles)
    names = {"face": config.face_generator, "encoder": config.encoder} | styles
    paths = {role: resolve(name) for role, name in names.items()}
    for name in FILES:
        may_write(config.output / name, config.overwrite, paths.values())
    face, encoder = load(paths["face"], Generator), load(paths["encoder"], Encoder)
    compared = export_networks(
        config.output,
        face,
        load_styles(styles, face),
        encoder,
        config.swap_resolution,
        config.dtype,
        style_limit=config.style_limit,
        crops=crops_of(config.pictures, encoder.config.resolution),
        origin={role: read_metadata(path)["provenance"] for role, path in paths.items()},
        overwrite=config.overwrite,
    )
    for row in compared:
        size = (config.output / row.file).stat().st_size / 1e6
        console.print(
            f"{printable(config.output / row.file)}: {size:.1f} MB, "
            f"off torch by {row.error:.1e} of the range, {row.psnr:.0f} dB"
        )


def main(argv: Sequence[str] | None = None) -> int:
    return command(ExportConfig, run, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
