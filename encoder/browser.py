"""The networks as a browser runs them: ONNX files of small graphs, weights in half precision.

    about = write_networks(Path("site/onnx"), face, {"anime": anime}, encoder)    # for the page

`encoder` (crop -> ws) and `styles` (ws -> truncated, and those for drawn blocks), then each block
of the generators by itself, `face_b4` … `anime_b64`: any number of them can be swapped at run time,
and no weight is downloaded twice: a style has only those that are not the face's. `pnet`, `rnet`
and `onet` are MTCNN's. WebAssembly computes in fp32; half precision is how weights are stored, and
they are cast when a file is loaded.

Shape letters: B batch, L layers of w+, D dimension of w, C channels, R resolution, S side of
a crop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoder.export import DECIBELS, described, export_mtcnn, faces_of
from encoder.graphs import encoder_model
from encoder.model import Encoder
from generators.blocks import RECONSTRUCTION, SwappedSynthesis
from generators.disk import write_atomically
from generators.graphs import Graph, block, halve_weights, limited
from generators.images import resize
from generators.latents import DEVIATIONS
from generators.stylegan2 import Generator


def write_networks(
    folder: Path,
    face: Generator,
    styles: Mapping[str, Generator],  # fine-tunes of `face`; the first is what the page starts with
    encoder: Encoder,
    swap_resolution: int = 16,  # that the page starts with
    *,
    style_limit: float = DEVIATIONS,
    origin: Mapping[str, Mapping[str, str]] | None = None,  # {"face": provenance, …}
) -> dict[str, Any]:
    """Writes all files and runs them; what the page has to know of them. ValueError where they draw
    otherwise than torch does."""
    for net in (face, encoder, *styles.values()):
        net.cpu().float().eval()
    network = SwappedSynthesis(face, styles, swap_resolution, style_limit).requires_grad_(False)
    metadata = described(face, encoder, network, origin or {}) | {"dtype": "mixed"}
    models = {"encoder": encoder_model(encoder, "mixed", metadata | {"network": "encoder"})}
    models["styles"] = styles_model(face, network, metadata | {"network": "styles"})
    for kind, generator in (("face", face), *styles.items()):
        for r in face.config.block_resolutions:
            if generator is face or not same_block(generator, face, r):
                name = f"{kind}_b{r}"
                models[name] = block_model(generator, r, metadata | {"network": name})
    for name, model in models.items():
        write = partial(Path.write_bytes, data=model.SerializeToString())
        write_atomically(folder / f"{name}.onnx", write)
    export_mtcnn(folder, "fp32")  # rounded, they now and then find a face a pixel aside
    blocks = face.config.block_resolutions
    about = {
        "crop": encoder.config.resolution,
        "blocks": blocks,
        "layers": face.num_ws,
        "dimension": face.w_dim,
        "swap": sum(r >= swap_resolution for r in blocks),  # blocks that are drawn at first
        "styles": list(styles),
    }
    check(folder, face, encoder, network)
    return about


def same_block(one: Generator, other: Generator, resolution: int) -> bool:
    """Whether a block's weights are equal."""
    a, b = (net.synthesis.get_submodule(f"b{resolution}").state_dict() for net in (one, other))
    return all(torch.equal(a[name], b[name]) for name in b)


def styles_model(face: Generator, network: SwappedSynthesis, metadata: Mapping[str, Any]) -> Any:
    """found (B, L, D), truncation (1), colours (1) -> ws, and limited: those for drawn blocks."""
    graph = Graph()
    shape = ("B", face.num_ws, face.w_dim)
    found = graph.input("found", shape)
    truncation, colours = graph.input("truncation", (1,)), graph.input("colours", (1,))
    average = graph.constant(face.ws_avg)
    ws = graph("Add", average, graph("Mul", truncation, graph("Sub", found, average)))
    drawn = limited(graph, network.limit, ws, 0, colours)  # all: it is not known which are drawn
    graph.output("ws", ws, shape)
    graph.output("limited", drawn, shape)
    return halve_weights(graph.model("styles", metadata))


def block_model(generator: Generator, resolution: int, metadata: Mapping[str, Any]) -> Any:
    """features (B, C, r, r), picture (B, 3, r, r), ws (B, L, D) -> both at R = 2 r; the first block
    takes ws alone."""
    graph = Graph(transposed=True)
    channels, half = generator.config.channels, resolution // 2
    features = picture = ""
    if half in channels:
        features = graph.input("features", ("B", channels[half], half, half))
        picture = graph.input("picture", ("B", 3, half, half))
    ws = graph.input("ws", ("B", generator.num_ws, generator.w_dim))
    x, image = block(graph, generator.synthesis, resolution, features, picture, ws)
    batch: int | str = "B" if features else 1  # nothing there knows of a batch but the styles
    graph.output("x", x, (batch, channels[resolution], resolution, resolution))
    graph.output("image", image, (batch, 3, resolution, resolution))
    return halve_weights(graph.model(f"b{resolution}", metadata))


@torch.no_grad()
def check(folder: Path, face: Generator, encoder: Encoder, network: SwappedSynthesis) -> None:
    """Runs the files one after another, as the page does, on faces that the generator draws."""
    files = Files(folder, network.resolutions)
    images = resize(faces_of(face), encoder.config.resolution)
    for swap in {network.resolutions[0], network.swap_resolution}:
        for image in images.split(1):
            wanted = network.draw(encoder(image), None, True, swap_resolution=swap)
            found = files(image.numpy(), swap, network.styles)
            for kind, picture in wanted.items():
                a, expected = found[kind], picture.numpy()
                error = float(np.square(a - expected).mean()) / float(np.ptp(expected)) ** 2
                psnr = -10 * np.log10(max(error, 1e-24))
                if not psnr >= DECIBELS:
                    raise ValueError(
                        f"In half precision the {kind} differs from torch's (PSNR {psnr:.1f} dB, "
                        f"{DECIBELS:.0f} are needed); these networks cannot be put on a page."
                    )


class Files:
    """files(image, swap_resolution, styles) -> {style, "reconstruction": (1, 3, R, R)}, as the page
    draws."""

    def __init__(self, folder: Path, resolutions: list[int]) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.resolutions = resolutions
        self.sessions = {
            path.stem: onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
            for path in folder.glob("*.onnx")
        }

    def __call__(
        self, image: np.ndarray, swap_resolution: int, styles: Sequence[str] = ("anime",)
    ) -> dict[str, np.ndarray]:
        """image (1, 3, S, S) in [-1, 1]."""
        (found,) = self.run("encoder", images=image)
        one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
        ws, limited = self.run("styles", found=found, truncation=one, colours=zero)
        early = [r for r in self.resolutions if r < swap_resolution]
        late = [r for r in self.resolutions if r >= swap_resolution]
        trunk = self.through("face", early, ws, {})
        made = {name: self.through(name, late, limited, trunk)["picture"] for name in styles}
        return made | {RECONSTRUCTION: self.through("face", late, ws, trunk)["picture"]}

    def run(self, name: str, **inputs: np.ndarray) -> list[np.ndarray]:
        return self.sessions[name].run(None, inputs)

    def through(
        self, kind: str, resolutions: list[int], ws: np.ndarray, state: dict[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Some blocks of one generator; `state`: what the block before gave."""
        for r in resolutions:
            own = f"{kind}_b{r}"
            name = own if own in self.sessions else f"face_b{r}"
            features, picture = self.run(name, ws=ws, **state)
            state = {"features": features, "picture": picture}
        return state
