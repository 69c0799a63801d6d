"""The latents of a film: when which face had which ws. Written as they come, for any length.

    trace = TraceWriter(file)
    trace.add(time=0.04, number=1, points=face.points, ws=ws[0])
    trace.close()
    times, numbers, ws = read_trace(Path("clip_latents.safetensors"), generator)

A .safetensors file: `ws` (N, L, D) float32, `points` (N, 5, 2) and `times` (N) float64 in pixels
of the film and seconds, `numbers` (N) int64: the face's. Shape letters: N faces of all frames,
L layers of w+, D dimension of w.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import numpy as np
from torch import Tensor

from encoder.geometry import Array
from generators.command import printable
from generators.latents import read_ws
from generators.stylegan2 import Generator
from generators.tensors import read_weights

HEADER = 1024  # bytes of the file's head: its length, then JSON, filled up with spaces


class TraceWriter:
    """ws goes to the file at once; the few numbers beside it wait for the end, as does the head,
    which says how many there are."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.times: list[float] = []
        self.numbers: list[int] = []
        self.points: list[Array] = []
        self.shape: tuple[int, ...] = ()  # (L, D)
        file.write(b" " * HEADER)

    def add(self, time: float, number: int, points: Array, ws: Tensor) -> None:
        """ws (L, D), points (5, 2)"""
        rows = ws.detach().float().cpu().contiguous().numpy()
        self.shape = rows.shape
        self.file.write(rows.astype("<f4").tobytes())
        self.times.append(time)
        self.numbers.append(number)
        self.points.append(np.asarray(points, np.float64))

    def close(self) -> None:
        count = len(self.times)
        rest = {
            "points": ("F64", np.array(self.points, "<f8").reshape(count, 5, 2)),
            "times": ("F64", np.array(self.times, "<f8")),
            "numbers": ("I64", np.array(self.numbers, "<i8")),
        }
        end = 4 * count * int(np.prod(self.shape))
        head = {"ws": {"dtype": "F32", "shape": [count, *self.shape], "data_offsets": [0, end]}}
        for name, (kind, values) in rest.items():
            data = values.tobytes()
            offsets = [end, end + len(data)]
            head[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": offsets}
            self.file.write(data)
            end += len(data)
        text = json.dumps(head).encode().ljust(HEADER - 8)
        self.file.seek(0)
        self.file.write(len(text).to_bytes(8, "little") + text)
        self.file.flush()


def read_trace(path: Path, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """times (N), numbers (N), points (N, 5, 2) and ws (N, L, D). ValueError where the file is no
    film's, or another generator's."""
    found = read_weights(path)
    ws = read_ws(path, generator)
    shapes = {"times": (len(ws),), "numbers": (len(ws),), "points": (len(ws), 5, 2)}
    if any(name not in found or found[name].shape != shape for name, shape in shapes.items()):
        raise ValueError(
            f"{printable(path)} has no times of a film's frames; give what --save latents made of "
            "a film."
        )
    times, numbers, points = (found[name] for name in shapes)
    if (times.diff() < 0).any() or times.min() < 0:
        raise ValueError(f"{printable(path)} has times that go back; write it anew.")
    return times, numbers, points, ws
