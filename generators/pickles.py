"""Foreign pickles read as data: nothing of a file is ever imported, called or executed.

    with open_regular("ffhq.pkl") as file:
        networks = mapping(read_pickle(file))                         # {"G": …, "D": …, "G_ema": …}
    for prefix, state in walk(networks["G_ema"], budget):     # "synthesis.b4.conv1.", {…}
        weights = {name: tensor(node, budget) for name, node in mapping(state["_parameters"])…}
    state = load_torch(Path("model.pth"))                             # what torch.save wrote

A pickle is a program for a small machine. This one knows a list of globals and makes Nodes of them,
which only record the arguments of a call. The few that matter (tensors, modules) are interpreted
afterwards, by the functions below. NVIDIA's own loader executes the source text inside.

A file of a few hundred bytes can describe 2^40 things, or one nested a million deep, by naming its
parts twice. So tuples are read as lists, which are no keys; keys are short; and what is copied or
built is paid for from a Budget in proportion to the file's size.
"""

import argparse
import io
import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from pickletools import genops
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

from generators.command import printable
from generators.disk import open_regular

MOST_OPERATIONS = 500_000  # of a pickle; NVIDIA's of 1024 pixels have 43,000
MOST_LETTERS = 1000  # of a name
TORCH_ZIP = b"PK\x03\x04"
TORCH_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch before 1.6: 5 pickles, bytes

PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
STORAGE = "torch.storage._load_from_bytes"
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETER = "torch._utils._rebuild_parameter"
ENCODE = "_codecs.encode"
MAPPINGS = ("collections.OrderedDict", "dnnlib.util.EasyDict")
SIZES = ("torch.Size", "torch.device")
IGNORED = (  # may occur, are never interpreted
    "builtins.set",
    "__builtin__.set",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
)
NVIDIA = frozenset({PERSISTENT, STORAGE, *TENSORS, PARAMETER, ENCODE, *MAPPINGS, *SIZES, *IGNORED})
TORCH = frozenset(
    {*TENSORS, PARAMETER, ENCODE, MAPPINGS[0], *SIZES, "argparse.Namespace"}
    | {f"torch.{kind}Storage" for kind in (
        "Float Double Half BFloat16 Long Int Short Char Byte Bool ComplexFloat ComplexDouble "
        "Untyped".split()
    )}
    | {"torch.storage.UntypedStorage"}
)  # fmt: skip
TENSORFLOW = "dnnlib.tflib.network.Network"


class Refused(ValueError):
    """One sentence, to follow the file's name: what the file is or asks for, and what to do."""


class Budget:
    """What may be built of a file: about as many bytes or entries as the file has bytes."""

    def __init__(self, size: int) -> None:
        self.left = 2 * size + (1 << 20)

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise Refused("unfolds to far more than its size; do not trust this file")


class Node:
    """A global of a pickle (args is None), or a call of one: its arguments, items and state."""

    __slots__ = ("args", "items", "path", "state")

    def __init__(self, path: str, args: list[Any] | None = None) -> None:
        self.path, self.args = path, args
        self.items: dict[Any, Any] = {}
        self.state: Any = None


# ------------------------------------------------------------------------- the machine

_CONSTANTS: dict[str, Any] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": list,
    "EMPTY_SET": set,
}
_LITERALS = frozenset(  # operations that push their own argument
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING "
    "BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8".split()
)


def read_pickle(
    file: Any,  # binary, left behind the pickle's end
    allowed: frozenset[str] = NVIDIA,  # globals
    budget: Budget | None = None,
) -> Any:
    """Plain values and Nodes. Refused for what is not allowed; nearly any exception on damage."""
    machine = _Machine(allowed, budget or Budget(0))
    for count, (operation, argument, _) in enumerate(genops(file)):
        if count > MOST_OPERATIONS:
            raise Refused("has more parts than any network; do not trust this file")
        machine.step(operation.name, argument)
    return machine.stack.pop()


class _Machine:
    """The stack, the stacks below the open marks, and the numbered values of a pickle."""

    def __init__(self, allowed: frozenset[str], budget: Budget) -> None:
        self.allowed, self.budget = allowed, budget
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """One operation. IndexError and the like where the file is damaged."""
        stack = self.stack
        if name in _LITERALS:
            if isinstance(argument, int) and argument.bit_length() > 128:
                raise Refused("has a number of absurd size; do not trust this file")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.below.append(stack)
            self.stack = []
        elif name in ("TUPLE", "LIST"):
            items = self.pop_to_mark()
            self.stack.append(items)
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(self.pop(int(name[-1])))
        elif name in ("APPEND", "APPENDS"):
            items = self.pop(1) if name == "APPEND" else self.pop_to_mark()
            self.top(list).extend(items)
        elif name in ("DICT", "SETITEM", "SETITEMS"):
            items = self.pop(2) if name == "SETITEM" else self.pop_to_mark()
            if name == "DICT":
                self.stack.append({})
            target = self.top(dict, Node)
            pairs = zip(items[::2], items[1::2], strict=True)
            (target.items if isinstance(target, Node) else target).update(
                {_key(key): value for key, value in pairs}
            )
        elif name == "ADDITEMS":
            items = self.pop_to_mark()
            self.top(set).update(map(_key, items))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            path = argument.split(" ", 1) if argument else self.pop(2)
            stack.append(self.find(".".join(path)))
        elif name in ("REDUCE", "NEWOBJ"):
            stack.append(self.call(*self.pop(2)))
        elif name in ("INST", "OBJ"):
            items = self.pop_to_mark()
            made = self.find(".".join(argument.split(" ", 1))) if argument else items.pop(0)
            self.stack.append(self.call(made, items))
        elif name == "BUILD":
            (state,) = self.pop(1)
            self.budget.spend(_length(state))
            node = self.top(Node)
            if node.args is None:
                raise Refused("changes what is not its own; do not trust this file")
            node.state = state
        elif name == "BINPERSID" and self.allowed is TORCH:
            stack.append(_storage_of(*self.pop(1)))
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self.pop_to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"uses the pickle operation {name}, as no network does; do not trust it")

    def pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise Refused("is damaged; get the file again")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def top(self, *kinds: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kinds):
            raise Refused("changes what cannot be changed; do not trust this file")
        return self.stack[-1]

    def find(self, path: str) -> Node:
        if path == TENSORFLOW:
            raise Refused("holds TensorFlow networks; convert it with NVIDIA's legacy.py first")
        if path not in self.allowed:
            raise Refused(
                f"asks for {printable(path, 80)}, which no network needs; do not trust this file"
            )
        return Node(path)

    def call(self, function: Any, args: Any) -> Node:
        if not isinstance(function, Node) or function.args is not None or type(args) is not list:
            raise Refused("calls what is no function; do not trust this file")
        self.budget.spend(1 + sum(map(_length, args)))
        node = Node(function.path, args)
        if node.path == MAPPINGS[0]:
            mapping(node)  # its keys are looked at before torch makes a dict of them
        if node.path == ENCODE and args[1:] != ["latin1"]:  # others take time that grows squared
            raise Refused("has bytes in an odd encoding; do not trust this file")
        return node


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list | dict | str | bytes | set) else 1


def _key(value: Any) -> Any:
    """A key that is hashed and compared in no time; a nested one crashes or never ends."""
    if not isinstance(value, str | bytes | int | float | None) or (
        isinstance(value, str | bytes) and len(value) > MOST_LETTERS
    ):
        raise Refused("has a key that is no short text or number; do not trust this file")
    return value


def _storage_of(identity: Any) -> Node:
    """("storage", its class, key, device, number of elements[, None]), which torch looks up."""
    kind, storage, key, _, count, *view = identity
    if kind != "storage" or not isinstance(storage, Node) or view not in ([], [None]):
        raise Refused("has a tensor without a storage; get the file again")
    if not isinstance(_key(key), str) or not isinstance(count, int):
        raise Refused("has a tensor without a storage; get the file again")
    return Node("storage", [storage.path, key])


# ---------------------------------------------------------------------------- torch.save


def is_torch(head: bytes) -> bool:
    """Whether the first bytes of a file are those that torch.save writes."""
    return head.startswith((TORCH_ZIP, TORCH_LEGACY))


def load_torch(source: Path | bytes) -> Any:
    """torch.load of tensors, plain values and Namespaces only, on the CPU; Refused if the file asks
    for more, or for what would not end; nearly any exception if it is damaged."""
    with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        _look_through(file, size)
        file.seek(0)
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                return torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:  # torch's own text tells how to load it unsafely
            raise Refused(
                "asks for more than tensors, or is damaged; get the file again from a source you "
                "trust"
            ) from error


def _look_through(file: BinaryIO, size: int) -> None:
    """Reads the pickles inside with the machine: torch's own runs into the traps named above."""
    budget = Budget(size)
    head = file.read(len(TORCH_LEGACY))
    file.seek(0)
    if head == TORCH_LEGACY:
        *_, keys = [read_pickle(file, TORCH, budget) for _ in range(5)]
        if not isinstance(keys, list) or any(not isinstance(_key(key), str) for key in keys):
            raise Refused("has a tensor without a storage; get the file again")
    elif head.startswith(TORCH_ZIP):
        with ZipFile(file) as archive:
            entries = archive.infolist()
            packed = any(entry.compress_type != ZIP_STORED for entry in entries)
            if packed or sum(entry.file_size for entry in entries) > size:
                raise Refused("is packed as torch does not pack files; get the file again")
            for entry in entries:
                if entry.filename.endswith(".pkl"):
                    with archive.open(entry) as stream:
                        read_pickle(stream, TORCH, budget)
    else:
        raise Refused("was not written by torch.save; get the file again")


# ------------------------------------------------------------------------------- NVIDIA's


def mapping(value: Any) -> dict[Any, Any]:
    """The items of a recorded dict, OrderedDict or EasyDict."""
    if isinstance(value, Node) and value.path in MAPPINGS and value.state is None:
        if value.args:  # old pickles pass the pairs as an argument
            given = value.args[0]
            pairs = given.items() if isinstance(given, dict) else given
            value.items = {_key(key): item for key, item in pairs} | value.items
            value.args = []
        return value.items
    if isinstance(value, dict):
        return value
    raise Refused("has another object where a dict is needed; give one of NVIDIA's network files")


def tensor(node: Any, budget: Budget) -> Tensor:
    """The tensor that a recorded _rebuild_parameter or _rebuild_tensor stands for, as a copy."""
    path = node.path if isinstance(node, Node) and node.args else type(node).__name__
    if path == PARAMETER:
        return tensor(node.args[0], budget)
    if path not in TENSORS:
        raise Refused(f"has {path} where a tensor is needed; give one of NVIDIA's network files")
    storage, offset, size, stride = node.args[:4]
    if not isinstance(storage, Node) or storage.path != STORAGE or not storage.args:
        raise Refused("has a tensor without a storage; get the file again")
    content = _bytes(storage.args[0])
    budget.spend(len(content))
    values = load_torch(content)
    if not isinstance(values, torch.TypedStorage):
        raise Refused("has a tensor without a storage; get the file again")
    flat = torch.empty(0, dtype=values.dtype).set_(values)  # type: ignore[call-overload]  # (n,)
    if len(size) > 8 or not all(type(x) is int and x >= 0 for x in (offset, *size, *stride)):
        raise Refused("has a tensor of no size; get the file again")
    if math.prod(size) > flat.numel():
        raise Refused("has a tensor larger than its storage; get the file again")
    return flat.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def _bytes(value: Any) -> bytes:
    """Bytes, which pickles of protocol 2 hold as a call of _codecs.encode(text, "latin1")."""
    if isinstance(value, Node) and value.path == ENCODE and value.args:
        text = value.args[0]
        value = text.encode("latin1") if isinstance(text, str) else None
    if not isinstance(value, bytes):
        raise Refused("has a storage that is not bytes; get the file again")
    return value


def persistent(node: Any) -> dict[str, Any]:
    """The recorded `__dict__` of a module that NVIDIA's code pickled together with its source."""
    if not isinstance(node, Node) or node.path != PERSISTENT or not node.args:
        raise Refused("has another object where a network is needed; give a whole network file")
    return mapping(mapping(node.args[0])["state"])


def walk(node: Any, budget: Budget, prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(prefix, `__dict__`) of a module and of all modules below it."""
    state = persistent(node)
    parts = [mapping(state[name]) for name in ("_parameters", "_buffers", "_modules")]
    budget.spend(100 + len(prefix) + sum(map(len, parts)))  # a real module takes more in a file
    yield prefix, state
    for name, child in parts[-1].items():
        if child is not None:
            yield from walk(child, budget, f"{prefix}{name}.")
