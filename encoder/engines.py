"""Backends: torch, ONNX Runtime or OpenVINO runs the networks, called as torch's modules are.

    backend = choose("auto", device)                        # "torch", "onnxruntime" or "openvino"
    encoder = encoder_of(encoder, backend, threads=1)       # encoder(images) -> ws
    synthesis = synthesis_of(synthesis, backend, threads=1)     # synthesis.draw(ws) -> {style: …}
    use_in(aligner.mtcnn, backend, threads=1)               # its three networks replaced

Graphs are written once and kept in the user's cache folder, under a hash of the weights and of the
code that wrote them; `GAN_INVERT_CACHE` names another folder. All of it is for the CPU and fp32: on
a GPU, and in half precision, torch is the backend.

Shape letters: B batch, L layers of w+, D dimension of w, R resolution, S side of a crop.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from encoder.options import Drawing
from generators.blocks import RECONSTRUCTION, SwappedSynthesis
from generators.checkpoint import read_metadata, resolve
from generators.command import console
from generators.disk import write_atomically
from generators.threads import use_threads

Backend = Literal["torch", "onnxruntime", "openvino"]
BACKENDS = ("torch", "onnxruntime", "openvino")
KEPT = 30  # days that a graph stays in the cache unused
FASTEST = "onnxruntime"  # on a CPU: benchmarks/latency.py
CODE = ("graphs.py", "model.py", "../generators/graphs.py")  # that decides what a graph holds


# ------------------------------------------------------------------------------ choosing


def installed(backend: str) -> bool:
    return backend == "torch" or all(find_spec(x) for x in ("onnx", "onnxscript", backend))


def choose(asked: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Backend:
    """The backend of that name; "auto" is the fastest that is installed and can do it, and a line
    says so where a faster one only lacks its package. ValueError for one that cannot be used."""
    able = device.type == "cpu" and dtype == torch.float32
    if asked == "auto":
        if not able:
            return "torch"
        if installed(FASTEST):
            return FASTEST  # type: ignore[return-value]
        console.print(
            f"Drawing with torch; with {FASTEST} it is faster: pip install "
            "'amortized-gan-inversion[onnx]'."
        )
        return "torch"
    if asked not in BACKENDS:
        raise ValueError(f"There is no backend {asked}; choose from auto, {', '.join(BACKENDS)}.")
    if asked != "torch" and not able:
        raise ValueError(f"The backend {asked} is for fp32 on a CPU; take --backend torch here.")
    if not installed(asked):
        extra = "openvino" if asked == "openvino" else "onnx"
        raise ValueError(
            f"The backend {asked} is not installed; pip install 'amortized-gan-inversion[{extra}]',"
            " or take --backend torch."
        )
    return asked  # type: ignore[return-value]


def engine_of(
    config: Drawing,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 1,
    few: bool = False,
) -> dict[str, Any]:
    """The translator's options backend, threads, export; sets torch's threads.

    few: an encoder that was not exported before is left to torch, unless --backend says more.
    """
    side = read_metadata(resolve(config.face_generator))["config"]["resolution"]
    threads = use_threads(config.threads, pixels=batch_size * side**2)
    backend = choose(config.backend, device, dtype)
    return {"backend": backend, "threads": threads, "export": config.backend != "auto" or not few}


# --------------------------------------------------------------------------------- running

Run = Callable[..., list[Tensor]]  # tensors in the order of the graph's inputs -> its outputs


def runner(model: bytes, backend: str, threads: int) -> Run:
    """A graph, ready to be called on the CPU."""
    return (_openvino if backend == "openvino" else _onnxruntime)(model, threads)


def _onnxruntime(model: bytes, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # threads that wait must not take the processor from others
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(*inputs: Tensor) -> list[Tensor]:
        feed = {name: x.contiguous().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(y) for y in session.run(None, feed)]

    return run


def _openvino(model: bytes, threads: int) -> Run:
    import openvino

    core = openvino.Core()
    graph = core.read_model(model)
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
             "INFERENCE_PRECISION_HINT": "f32"}  # fmt: skip
    # OpenVINO gives the thread that compiles a stack of its own for signals, and may take it away
    # while Python's handlers still count on it: the next Ctrl-C would be a segmentation fault
    with ThreadPoolExecutor(1) as other:
        compiled = other.submit(core.compile_model, graph, "CPU", hints).result()
    request = compiled.create_infer_request()

    def run(*inputs: Tensor) -> list[Tensor]:
        results = request.infer([x.contiguous().numpy() for x in inputs])
        return [torch.from_numpy(np.array(results[port])) for port in compiled.outputs]

    return run


# ------------------------------------------------------------------------------- the cache


def cache_folder() -> Path:
    """Of this user and project."""
    if asked := os.environ.get("GAN_INVERT_CACHE"):
        return Path(asked)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home()))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "gan-invert"


def key_of(module: nn.Module, *rest: Any) -> str:
    """A hash of the weights, of `rest`, and of what decides how a graph is written."""
    code = [(Path(__file__).parent / name).read_bytes() for name in CODE]
    about = json.dumps([str(module.__class__), torch.__version__, *rest], default=str)
    digest = hashlib.blake2b(about.encode() + b"".join(code), digest_size=16)
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def cached(name: str, key: str) -> Path:
    return cache_folder() / f"{name}-{key}.onnx"


def graph_of(name: str, key: str, build: Callable[[], Any]) -> bytes:
    """The serialised model, from the cache, where it is put if it is not there yet. Where the
    folder cannot be written it is built each time. What was not used for KEPT days goes."""
    path = cached(name, key)
    with suppress(OSError):
        data = path.read_bytes()
        path.touch()  # used today
        return data
    data = build().SerializeToString()
    with suppress(OSError):
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
        for old in path.parent.glob("*.onnx"):
            if time.time() - old.stat().st_mtime > KEPT * 86400:
                old.unlink()
    return data


def ready(name: str, key: str, build: Callable[[], Any], backend: str, threads: int) -> Run:
    """`runner` of `graph_of`; a graph in the cache that cannot be read is built anew."""
    try:
        return runner(graph_of(name, key, build), backend, threads)
    except Exception:  # each backend raises its own
        with suppress(OSError):
            cached(name, key).unlink(missing_ok=True)
        return runner(graph_of(name, key, build), backend, threads)


# ----------------------------------------------------------------------------- the networks


def encoder_of(
    encoder: Any, backend: str, threads: int, export: bool = True
) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, S, S) -> ws (B, L, D), as the encoder gives them.

    The first time torch's exporter takes half a minute, which is announced; without `export` the
    encoder is then left as it is, which is said too.
    """
    if backend == "torch":
        return encoder
    key = key_of(encoder, asdict(encoder.config))
    if not (export or cached("encoder", key).is_file()):
        console.print(
            f"The encoder runs in torch this time; --backend {backend} takes half a minute once to "
            "export it, and is faster from then on."
        )
        return encoder

    def build() -> Any:
        from encoder.graphs import encoder_model

        console.print("Exporting the encoder, once (half a minute).")
        return encoder_model(encoder)

    run = ready("encoder", key, build, backend, threads)
    return lambda images: run(images)[0]


class Synthesis:
    """Draws as `SwappedSynthesis` does, with constant noise. There is a graph for each kind of
    call, made when the first one comes."""

    def __init__(self, network: SwappedSynthesis, backend: str, threads: int) -> None:
        self.network, self.backend, self.threads = network, backend, threads
        self.key = key_of(network, network.resolutions)
        self.runs: dict[tuple[Any, ...], Run] = {}

    def draw(
        self,
        ws: Tensor,
        styles: Sequence[str] | None = None,  # None: all
        reconstruction: bool = False,
        *,
        colours: float = 0.0,
        swap_resolution: int | None = None,
        drawing_ws: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """ws (B, L, D) -> {style: (B, 3, R, R)} and, if asked for, "reconstruction"."""
        swap = self.network.swap_resolution if swap_resolution is None else swap_resolution
        names = self.network.styles if styles is None else tuple(styles)
        call = (swap, names, reconstruction, drawing_ws is not None)
        if call not in self.runs:
            self.runs[call] = self._run_of(*call)
        more = [] if drawing_ws is None else [drawing_ws]
        made = self.runs[call](ws, torch.tensor(float(colours)), *more)
        return dict(zip((*names, RECONSTRUCTION)[: len(made)], made, strict=True))

    def _run_of(self, swap: int, styles: tuple[str, ...], both: bool, drawing_ws: bool) -> Run:
        def build() -> Any:
            from encoder.graphs import synthesis_model

            return synthesis_model(
                self.network,
                both=both,
                swap_resolution=swap,
                colours=True,
                styles=styles,
                drawing_ws=drawing_ws,
            )

        numbers = "-".join(str(self.network.styles.index(name)) for name in styles)
        parts = ["synthesis", swap, numbers] + ["both"] * both + ["reference"] * drawing_ws
        name = "-".join(map(str, parts))
        return ready(name, self.key, build, self.backend, self.threads)


def synthesis_of(
    network: SwappedSynthesis, backend: str, threads: int
) -> SwappedSynthesis | Synthesis:
    return network if backend == "torch" else Synthesis(network, backend, threads)


class Detector(nn.Module):
    """One of MTCNN's networks: pictures (N, 3, H, W) -> edges, (points,) probabilities."""

    def __init__(self, net: nn.Module, backend: str, threads: int) -> None:
        super().__init__()

        def build() -> Any:
            from encoder.graphs import mtcnn_model

            return mtcnn_model(net)

        name = type(net).__name__.lower()
        self.run = ready(name, key_of(net), build, backend, threads)
        # MTCNN asks its first network for the type of its weights
        self.weight = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.run(pictures))


def use_in(mtcnn: Any, backend: str, threads: int) -> None:
    """Replaces the three networks of facenet-pytorch's MTCNN."""
    if backend != "torch":
        for name in ("pnet", "rnet", "onet"):
            setattr(mtcnn, name, Detector(getattr(mtcnn, name), backend, threads))

