"""NVIDIA's network pickles read as data: nothing of the file is ever imported, called or executed.

    with open("ffhq.pkl", "rb") as file:
        networks = mapping(Unpickler(file).load())                    # {"G": …, "D": …, "G_ema": …}
    for prefix, state in walk(networks["G_ema"]):                # "synthesis.b4.conv1.", {…}
        weights = {name: tensor(node) for name, node in mapping(state["_parameters"]).items()}

Every global of a pickle is looked up in a table and becomes an inert class, never the real thing;
calling it only records the arguments. The few records that matter (tensors, modules) are
interpreted afterwards, by the functions below. NVIDIA's own loader executes the source text inside.
"""

import io
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
STORAGE = "torch.storage._load_from_bytes"
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETER = "torch._utils._rebuild_parameter"
ENCODE = "_codecs.encode"
MAPPINGS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
IGNORED = (  # may occur, are never interpreted
    "builtins.set",
    "__builtin__.set",
    "torch.Size",
    "torch.device",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
)
ALLOWED = frozenset({PERSISTENT, STORAGE, *TENSORS, PARAMETER, ENCODE, *MAPPINGS, *IGNORED})
TENSORFLOW = "dnnlib.tflib.network.Network"


class Refused(ValueError):
    """One sentence, to follow the file's name: what the file is or asks for, and what to do."""


class Node:
    """One call or object of a pickle, recorded: the global's path, its arguments, items, state."""

    __slots__ = ("args", "items", "state")
    path = ""
    args: tuple[Any, ...]
    items: dict[Any, Any]
    state: Any

    def __new__(cls, *args: Any) -> "Node":
        node = super().__new__(cls)
        node.args, node.items, node.state = args, {}, None
        return node

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Unpickler(pickle.Unpickler):
    """Builds plain Python values and Nodes only, a fresh class per global: none outlives the file.

    `load` raises Refused for a global outside the table, and whatever `pickle` raises on damage.
    """

    def find_class(self, module: str, name: str) -> type[Node]:
        path = f"{module}.{name}"
        if path == TENSORFLOW:
            raise Refused("holds TensorFlow networks; convert it with NVIDIA's legacy.py first")
        if path not in ALLOWED:
            raise Refused(f"asks for {path}, which no network needs; do not trust this file")
        return type("Node", (Node,), {"__slots__": (), "path": path})


def mapping(value: Any) -> dict[Any, Any]:
    """The items of a recorded dict, OrderedDict or EasyDict."""
    if isinstance(value, Node) and value.path in MAPPINGS and value.state is None:
        pairs = value.args[0] if value.args else {}  # old pickles pass the pairs as an argument
        return dict(pairs) | value.items
    if isinstance(value, dict):
        return value
    raise Refused("has another object where a dict is needed; give one of NVIDIA's network files")


def tensor(node: Any) -> Tensor:
    """The tensor that a recorded _rebuild_parameter or _rebuild_tensor stands for, as a copy."""
    path = node.path if isinstance(node, Node) else type(node).__name__
    if path == PARAMETER:
        return tensor(node.args[0])
    if path not in TENSORS:
        raise Refused(f"has {path} where a tensor is needed; give one of NVIDIA's network files")
    storage, offset, size, stride = node.args[:4]
    if not isinstance(storage, Node) or storage.path != STORAGE:
        raise Refused("has a tensor without a storage; get the file again")
    values = restricted_torch_load(io.BytesIO(_bytes(storage.args[0])))
    if not isinstance(values, torch.TypedStorage):
        raise Refused("has a tensor without a storage; get the file again")
    flat = torch.empty(0, dtype=values.dtype).set_(values)  # type: ignore[call-overload]  # (n,)
    if math.prod(size) > flat.numel():
        raise Refused("has a tensor larger than its storage; get the file again")
    return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def _bytes(value: Any) -> bytes:
    """Bytes, which pickles of protocol 2 hold as a call of _codecs.encode(text, "latin1")."""
    if isinstance(value, Node) and value.path == ENCODE:
        value = str(value.args[0]).encode("latin1")
    if not isinstance(value, bytes):
        raise Refused("has a storage that is not bytes; get the file again")
    return value


def restricted_torch_load(file: Path | io.BytesIO) -> Any:
    """torch.load of tensors and plain values only, on the CPU; Refused if it asks for more."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text tells how to load it unsafely
        raise Refused(
            "asks for more than tensors, or is damaged; get the file again from a source you trust"
        ) from error


def persistent(node: Any) -> dict[str, Any]:
    """The recorded `__dict__` of a module that NVIDIA's code pickled together with its source."""
    if not isinstance(node, Node) or node.path != PERSISTENT:
        raise Refused("has another object where a network is needed; give a whole network file")
    return mapping(mapping(node.args[0])["state"])


def walk(node: Any, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix, `__dict__`) of a module and of all modules below it."""
    state = persistent(node)
    yield prefix, state
    for name, child in mapping(state["_modules"]).items():
        if child is not None:
            yield from walk(child, f"{prefix}{name}.")
