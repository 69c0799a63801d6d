"""Foreign checkpoints: same numbers as their own code gave, and nothing in them is executed.

    pytest tests/test_convert.py

NVIDIA's pickles are made here, in the form its persistence module writes, from the golden tensors.
"""

import argparse
import builtins
import functools
import io
import os
import pickle
import subprocess
import sys
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from generators.checkpoint import load, read_metadata
from generators.convert import convert, main
from generators.discriminator import Discriminator
from generators.pickles import (
    TORCH_LEGACY,
    Budget,
    Node,
    Refused,
    load_torch,
    mapping,
    read_pickle,
    tensor,
    walk,
)
from generators.stylegan2 import Generator

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
NVIDIA = load_file(GOLDEN / "stylegan2_ada_tiny32.safetensors")
ROSINALITY = GOLDEN / "rosinality_tiny32.pt"
BUFFERS = ("w_avg", "noise_const", "resample_filter")


# --- Writing pickles as NVIDIA's code does --------------------------------------------------------


def _reconstruct_persistent_obj(meta: dict) -> None:
    raise AssertionError("the reader called a function of the file")


class EasyDict(dict):
    """Stands in for dnnlib.util.EasyDict."""


class Persistent:
    """A module of theirs: reduced to a call that carries its source text and its state."""

    def __init__(self, class_name: str, **state: Any) -> None:
        self.class_name, self.state = class_name, state

    def __reduce__(self) -> tuple:
        source = "import os; os.mkdir('executed')"  # their loader executes this text
        meta = {"type": "class", "version": 6, "module_src": source, "class_name": self.class_name}
        return _reconstruct_persistent_obj, (meta | {"state": self.state},)


@contextmanager
def their_modules() -> Iterator[None]:
    """Lets pickle find the two names above where they are at home, while it writes."""
    homes: dict[str, Any] = {
        "torch_utils.persistence": _reconstruct_persistent_obj,
        "dnnlib.util": EasyDict,
    }
    names = [name for home in homes for name in (home.split(".")[0], home)]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setitem(sys.modules, name, types.ModuleType(name))
        for home, thing in homes.items():
            setattr(sys.modules[home], thing.__name__, thing)
            patch.setattr(thing, "__module__", home)
        yield


def dumps(value: Any, protocol: int = 4) -> bytes:
    with their_modules():
        return pickle.dumps(value, protocol)


def module(tensors: dict[str, Tensor], class_name: str, layer: dict[str, Any], **own: Any) -> Any:
    """The tree of modules of a flat state dict; `layer` holds plain attributes of every module."""
    groups: dict[str, dict[str, Tensor]] = {}
    parameters, buffers = OrderedDict(), OrderedDict()
    for name, value in tensors.items():
        head, _, rest = name.partition(".")
        if rest:
            groups.setdefault(head, {})[rest] = value
        elif head in BUFFERS:
            buffers[head] = value
        else:
            parameters[head] = torch.nn.Parameter(value, requires_grad=False)
    children = {name: module(group, "Layer", layer) for name, group in groups.items()}
    return Persistent(
        class_name,
        training=False,
        _parameters=parameters | {"absent": None},
        _buffers=buffers,
        _modules=OrderedDict(children),
        _forward_hooks=OrderedDict(),
        _non_persistent_buffers_set=set(),
        weight_gain=1 / np.sqrt(4.0),  # a numpy scalar
        **(layer | own),
    )


def part(prefix: str) -> dict[str, Tensor]:
    return {name[2:]: value for name, value in NVIDIA.items() if name.startswith(prefix)}


def network(
    prefix: str, init: dict | None = None, layer: dict | None = None, **extra: Tensor
) -> Any:
    tensors = part(prefix) | {name.replace("__", "."): value for name, value in extra.items()}
    own = {"_init_args": (), "_init_kwargs": EasyDict(init or {}), "c_dim": 0}
    return module(tensors, "Generator" if prefix == "G." else "Discriminator", layer or {}, **own)


def snapshot(**networks: Any) -> dict[str, Any]:
    rest = {"training_set_kwargs": EasyDict(path="x"), "augment_pipe": None}
    return {"G": network("G."), "D": network("D."), "G_ema": network("G.")} | networks | rest


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], Path]:
    """Writes bytes, or an object as a pickle, to a file in an empty working folder."""
    monkeypatch.chdir(tmp_path)

    def write(content: Any, protocol: int = 4) -> Path:
        path = tmp_path / "network.pkl"
        path.write_bytes(content if isinstance(content, bytes) else dumps(content, protocol))
        return path

    return write


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4


def refused(path: Path, sentence: str, which: Any = "g_ema") -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        convert(path, which)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


# --- NVIDIA --------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_nvidia_parity(write, protocol, tmp_path):
    path = write(snapshot(), protocol)
    generator, discriminator = convert(path), convert(path, "d")
    with torch.no_grad():
        assert_close(generator.map(NVIDIA["in.z"], 0.7), NVIDIA["out.ws_psi0.7"])
        assert_close(generator.synthesis(NVIDIA["in.wplus"]), NVIDIA["out.image_const"])
        assert_close(discriminator(NVIDIA["out.image_const"]), NVIDIA["out.logits"])
    assert list(tmp_path.iterdir()) == [path]  # the source text inside was not executed


def test_sizes_come_from_the_shapes(write):
    path = write(snapshot())
    config = convert(path).config
    assert (config.resolution, config.z_dim, config.w_dim, config.mapping_layers) == (32, 16, 24, 3)
    assert config.widths == (24, 24, 16, 8) == convert(path, "d").config.widths
    assert config.conv_clamp is None


@pytest.mark.parametrize(
    ("init", "layer"),
    [
        ({"synthesis_kwargs": EasyDict(num_fp16_res=4, conv_clamp=256)}, {}),  # stylegan2-ada
        ({"conv_clamp": 256, "num_fp16_res": 4}, {}),  # stylegan3, and discriminators
        ({}, {"conv_clamp": 256}),  # stylegan3's default is in the layers alone
        ({"conv_clamp": None}, {"conv_clamp": 256}),
    ],
)
def test_clamp_of_mixed_precision_networks(write, init, layer):
    path = write(snapshot(G_ema=network("G.", init, layer), D=network("D.", init, layer)))
    assert convert(path).config.conv_clamp == 256
    if "synthesis_kwargs" not in init:
        assert convert(path, "d").config.conv_clamp == 256


def test_minibatch_group(write):
    path = write(snapshot(D=network("D.", {"epilogue_kwargs": EasyDict(mbstd_group_size=2)})))
    assert convert(path, "d").config.mbstd_group_size == 2
    path = write(snapshot(D=network("D.", {"epilogue_kwargs": {"mbstd_group_size": None}})))
    refused(path, "whole batches", "d")


def test_strided_tensors_are_read(write):
    weight = part("G.")["synthesis.b8.conv0.weight"]
    strided = weight.to(memory_format=torch.channels_last)
    path = write(snapshot(G_ema=network("G.", synthesis__b8__conv0__weight=strided)))
    assert torch.equal(convert(path).state_dict()["synthesis.b8.conv0.weight"], weight)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"init": {"c_dim": 10}}, "conditional"),
        ({"layer": {"c_dim": 0, "activation": "relu"}}, "activation relu; only lrelu"),
        ({"layer": {"activation": "linear"}}, "activation linear; only lrelu"),
        ({"layer": {"architecture": "orig"}}, "architecture orig; only "),
        ({"layer": {"use_noise": False}}, "use_noise False; only True"),
        ({"layer": {"architecture": [[["a\x1b"]]]}}, "architecture of another kind"),
        ({"synthesis__b8__torgb__weight": torch.ones(1, 24, 1, 1)}, "of 1 channels; only RGB"),
        ({"synthesis__b8__torgb__weight": torch.ones(4, 24, 1, 1)}, "of 4 channels; only RGB"),
        ({"synthesis__b8__conv0__weight": torch.ones(24, 24, 5, 5)}, "convolutions of 5 x 5"),
        ({"mapping__fc1__weight": torch.ones(32, 24)}, r"mapping layers \(layer_features\)"),
        (
            {"mapping__w_avg": torch.full((24,), float("nan"))},
            r"mapping\.w_avg has values that are",
        ),
        ({"layer": {"bias_gain": 1}}, "lr_multiplier"),
        ({"layer": {"conv_clamp": "256"}}, "not numbers"),
        ({"mapping__embed__weight": torch.ones(2, 2)}, r"unknown tensor mapping\.embed\.weight"),
        ({"synthesis__b8__skip__weight": torch.ones(1)}, r"unknown tensor synthesis\.b8\.skip"),
        ({"synthesis__input__freqs": torch.ones(1)}, "StyleGAN3"),
        ({"synthesis__L0_36_512__magnitude_ema": torch.ones(1)}, "StyleGAN3"),
        (
            {"synthesis__b8__resample_filter": torch.ones(4, 4)},
            r"another filter than \[1, 3, 3, 1\]",
        ),
        ({"layer": {"conv_clamp": float("nan")}}, "settings that are not numbers"),
        ({"layer": {"conv_clamp": -1.0}}, "conv_clamp must be a number above 0"),
        (
            {"synthesis__b32__conv1__weight": torch.ones(10**5, 1, 3, 3)},
            "a larger network than the file holds",
        ),
        ({"mapping__fc0__bias": torch.ones(7)}, r"shape \(7,\)"),
        ({"synthesis__b64__torgb__bias": torch.ones(3)}, "unknown"),
    ],
)
def test_other_architectures_are_one_sentence(write, change, sentence):
    refused(write(snapshot(G_ema=network("G.", **change))), sentence)


def test_missing_networks_are_one_sentence(write):
    refused(write(snapshot(G_ema=None)), "holds no G_ema, only G, D")
    refused(write({"G": network("G.")}), "holds no G_ema")
    refused(write(["G_ema"]), "dict is needed")
    refused(write(snapshot(G_ema="G_ema")), "network is needed")
    refused(write(b"cdnnlib.tflib.network\nNetwork\n."), "TensorFlow")


@pytest.mark.parametrize("keep", [0, 1, 20, 1000, 100_000, -1])
def test_truncated_pickles_are_one_sentence(write, keep):
    refused(write(dumps(snapshot())[:keep]), "get the .pkl or .pt again")


def test_a_missing_file_is_one_sentence(tmp_path):
    refused(tmp_path / "none.pkl", "no such file")


# --- Hostile files: each would make the folder `executed` -----------------------------------------


class Call:
    """Pickled as the call function(*args)."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


class Tamper:
    """Pickled as an allowed call whose result is then given a state."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call


def storage(payload: bytes) -> Any:
    """A network one of whose tensors has this payload in place of its storage's bytes."""
    call = Call(torch.storage._load_from_bytes, payload)
    rebuilt = Call(torch._utils._rebuild_tensor_v2, call, 0, (1,), (1,), False, OrderedDict())
    return snapshot(G_ema=Persistent("G", _parameters={"w": rebuilt}, _buffers={}, _modules={}))


def saved(value: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


MKDIR = Call(os.mkdir, "executed")
EVAL = Call(builtins.eval, "__import__('os').mkdir('executed')")
RUNNING = {  # plain pickle runs these, which shows that the payload is live
    "os.system": lambda: dumps(Call(os.system, "mkdir executed")),
    "os.mkdir": lambda: dumps(MKDIR, 2),
    "eval": lambda: dumps(EVAL),
    "exec": lambda: dumps(Call(builtins.exec, "import os; os.mkdir('executed')")),
    "partial": lambda: dumps(Call(functools.partial(os.mkdir, "executed"))),
    "subprocess": lambda: dumps(Call(subprocess.check_call, ["mkdir", "executed"])),
    "GLOBAL": lambda: b"cposix\nmkdir\n(S'executed'\ntR.",
    "INST": lambda: b"(S'executed'\niposix\nmkdir\n.",
    "OBJ": lambda: b"(cposix\nmkdir\nS'executed'\no.",
    "dotted STACK_GLOBAL": lambda: (
        b"\x80\x04\x8c\x09torch.hub\x8c\x08os.mkdir\x93\x8c\x08executed\x85R."
    ),
    "nested torch.load": lambda: dumps(
        Call(
            functools.partial(torch.load, weights_only=False), Call(io.BytesIO, saved(MKDIR, True))
        )
    ),
}
HOSTILE = RUNNING | {
    "in another entry": lambda: dumps(snapshot(D=network("D.", {"x": EVAL}))),
    "in the training set's options": lambda: dumps(snapshot() | {"training_set_kwargs": MKDIR}),
    "in a module's state": lambda: dumps(snapshot(G_ema=Persistent("G", _parameters=MKDIR))),
    "in a dict's key": lambda: dumps({Call(os.getcwd): 1}),
    "storage is a pickle": lambda: dumps(storage(pickle.dumps(MKDIR, 2))),
    "storage is a torch file": lambda: dumps(storage(saved(MKDIR, True))),
    "storage is an old torch file": lambda: dumps(storage(saved(MKDIR, False))),
    "storage is no storage": lambda: dumps(storage(saved({"a": torch.ones(1)}, True))),
    "subclass of EasyDict": lambda: dumps(Call(type, "E", (EasyDict,), {"__setitem__": os.mkdir})),
    "attribute of EasyDict": lambda: b"\x80\x04\x8c\x0bdnnlib.util\x8c\x0fEasyDict.update\x93.",
    "BUILD on an allowed class": lambda: (
        b"\x80\x02ccollections\nOrderedDict\n}X\x08\x00\x00\x00__init__cposix\nmkdir\nsb."
    ),
    "BUILD with slots on a class": lambda: (
        b"\x80\x02ccollections\nOrderedDict\nN}X\x01\x00\x00\x00aK\x01s\x86b."
    ),
    "BUILD on an allowed function": lambda: (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."
    ),
    "state on a dict": lambda: dumps(
        snapshot() | {"G_ema": Tamper(OrderedDict, (), {"__setstate__": 1, "__class__": 2})}
    ),
    "getattr": lambda: dumps(Call(getattr, OrderedDict, "fromkeys")),
    "the table itself": lambda: b"cgenerators.pickles\nUnpickler\n.",
    "persistent id": lambda: b"Pexecuted\n.",
    "extension registry": lambda: b"\x80\x02\x82\x01.",
    "a call of a number": lambda: b"\x80\x02K\x01)R.",
    "endless modules": lambda: dumps(snapshot(G_ema=endless())),
    "too large a tensor": lambda: dumps(snapshot(G_ema=huge())),
}


def endless() -> Persistent:
    loop = Persistent("G", _parameters={}, _buffers={}, _modules={})
    loop.state["_modules"]["again"] = Tamper(_reconstruct_persistent_obj, ({"state": loop.state},))
    return loop


def huge() -> Persistent:
    storage = Call(torch.storage._load_from_bytes, saved(torch.ones(1).untyped_storage(), False))
    args: tuple = (storage, 0, (1 << 40,), (0,), False, OrderedDict())
    rebuilt = Call(torch._utils._rebuild_tensor_v2, *args)
    return Persistent("G", _parameters={"w": rebuilt}, _buffers={}, _modules={})


@pytest.mark.parametrize("name", RUNNING)
def test_the_payloads_are_live(write, name, tmp_path):
    pickle.loads(RUNNING[name]())
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(write, name, tmp_path):
    path = write(HOSTILE[name]())
    refused(path, r"; (do not trust|get|give|choose) ")
    assert list(tmp_path.iterdir()) == [path]


def test_globals_are_records_not_the_things_themselves():
    found = read_pickle(io.BytesIO(b"ccollections\nOrderedDict\n."))
    assert type(found) is Node and found.path == "collections.OrderedDict"


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_torch_files_are_refused(write, zipped, tmp_path):
    path = write(saved({"g_ema": {"w": MKDIR}}, zipped))
    refused(path, r"asks for posix\.mkdir, which no network needs; do not trust")
    assert list(tmp_path.iterdir()) == [path]


# --- rosinality ----------------------------------------------------------------------------------


def rosinality() -> dict[str, Any]:
    return torch.load(ROSINALITY, weights_only=True)


def test_rosinality_parity():
    golden = load_file(GOLDEN / "rosinality_tiny32_io.safetensors")
    generator, discriminator = convert(ROSINALITY), convert(ROSINALITY, "d")
    with torch.no_grad():
        assert_close(generator.mapping(golden["in.z"]), golden["out.w"])
        assert_close(generator.synthesis(golden["in.wplus"]), golden["out.image_const"])
        assert_close(discriminator(golden["out.image_const"]), golden["out.logits"])
    assert torch.equal(generator.w_avg, rosinality()["latent_avg"])
    assert generator.config.widths == discriminator.config.widths == (24, 24, 24, 24)


@pytest.mark.parametrize("zipped", [True, False])
def test_rosinality_as_its_trainer_saves_it(write, zipped):
    """With a Namespace and without latent_avg: w_avg is then estimated from the mapping."""
    checkpoint = rosinality() | {"args": argparse.Namespace(size=32, lr=0.002)}
    del checkpoint["latent_avg"]
    path = write(saved(checkpoint, zipped))
    generator = convert(path, "g")
    with torch.no_grad():
        w = generator.mapping(torch.randn(4096, generator.z_dim))
    assert (generator.w_avg - w.mean(0)).abs().max() < 0.1 * w.std()
    assert torch.equal(convert(path, "g").w_avg, generator.w_avg)


@pytest.mark.parametrize(
    ("change", "sentence", "which"),
    [
        (lambda c: c.pop("g_ema"), "holds no g_ema, only g, d", "g_ema"),
        (lambda c: c["g_ema"].update(extra=torch.ones(1)), "unknown tensor extra", "g_ema"),
        (
            lambda c: c["g_ema"].update({"convs.999999999999.conv.weight": torch.ones(1)}),
            r"unknown tensor convs\.999999999999",
            "g_ema",
        ),
        (lambda c: c["d"].update({"convs.9.x": torch.ones(1)}), r"unknown tensor convs\.9\.x", "d"),
        (lambda c: c["g_ema"].pop("noises.noise_3"), "1 tensors are missing", "g_ema"),
        (
            lambda c: c["g_ema"].update({"convs.0.conv.blur.kernel": torch.ones(4, 4)}),
            "another filter",
            "g_ema",
        ),
    ],
)
def test_wrong_rosinality_files_are_one_sentence(write, change, sentence, which):
    checkpoint = rosinality()
    change(checkpoint)
    refused(write(saved(checkpoint, True)), sentence, which)


@pytest.mark.parametrize("keep", [10, 1000, 400_000])
def test_truncated_torch_files_are_one_sentence(write, keep):
    refused(write(ROSINALITY.read_bytes()[:keep]), "get the .pkl or .pt again")


# --- Files that would never end, or crash the interpreter ----------------------------------------


DOUBLING = b"\x80\x02)" + b"q\x00h\x00\x86" * 40  # a tuple of two times the one before, 2^40 leaves
DEEP = b"\x80\x02)" + b"\x85" * 100_000
MANY = b"\x80\x02" + b"N0" * 300_000
GLOBAL = b"cc\n" + b"a\x1b[2J" * 200_000 + b"\n"
PAIRS = b"(" + b"K\x01K\x02\x86" * 10_000 + b"lq\x00"  # a list of 10,000 pairs, as number 0
COPIES = b"\x80\x02" + PAIRS + b"ccollections\nOrderedDict\nq\x01" + b"h\x01h\x00\x85R" * 10_000
BOMBS = {
    "a doubling tuple": DOUBLING + b".",
    "a doubling tuple as a key": b"\x80\x02}" + DOUBLING[2:] + b"K\x01s.",
    "a doubling tuple in the pairs of a dict": (
        b"\x80\x02ccollections\nOrderedDict\n(" + DOUBLING[2:] + b"K\x01\x86l\x85R."
    ),
    "a deep tuple": DEEP + b".",
    "a deep tuple as a key": b"\x80\x02}" + DEEP[2:] + b"K\x01s.",
    "a deep tuple in a set": b"\x80\x04\x8f(" + DEEP[2:] + b"\x90.",
    "too many operations": MANY + b"N.",
    "a long global": GLOBAL + b".",
    "many copies of a large list": COPIES + b".",
    "an encoding that takes for ever": (
        b"\x80\x02c_codecs\nencode\nX\x00\x00\x10\x00"
        + b"\xc3\xa9" * (1 << 19)
        + b"X\x08\x00\x00\x00punycode\x86R."
    ),
    "a long number": b"\x80\x02\x8b\x00\x00\x10\x00" + b"\x01" * (1 << 20) + b".",
    "a long key": b"\x80\x02}X\x00\x00\x10\x00" + b"a" * (1 << 20) + b"K\x01s.",
}


def torch_zip(content: bytes) -> bytes:
    """A file of torch.save with this pickle in place of its own."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a/data.pkl", content)
        archive.writestr("a/version", "3")
    return stream.getvalue()


def torch_legacy(content: bytes) -> bytes:
    """The same in the form of before torch 1.6: magic number, version, machine, object, keys."""
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = TORCH_LEGACY + pickle.dumps(1001, 2) + pickle.dumps(machine, 2)
    return head + content + pickle.dumps([], 2)


FORMS = {"nvidia": bytes, "zip": torch_zip, "legacy": torch_legacy}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BOMBS)
def test_bombs_end_quickly_in_one_short_sentence(write, name, form):
    path = write(FORMS[form](BOMBS[name]))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"; (do not trust|get|give|choose) ") as caught:
        convert(path)
    assert time.perf_counter() - start < 20
    message = str(caught.value).removeprefix(str(path))
    assert message.isprintable() and len(message) < 400


def test_modules_that_double_by_sharing_are_refused(write):
    module = Persistent("G", _parameters={}, _buffers={}, _modules={})
    for _ in range(40):
        module = Persistent("G", _parameters={}, _buffers={}, _modules={"a": module, "b": module})
    refused(write(snapshot(G_ema=module)), "unfolds to far more than its size")


def test_one_storage_of_many_tensors_is_read_a_few_times_only(write):
    call = Call(torch.storage._load_from_bytes, saved(torch.ones(10**5)._typed_storage(), False))
    rebuilt = Call(torch._utils._rebuild_tensor_v2, call, 0, (1,), (1,), False, OrderedDict())
    weights = {f"w{i}": rebuilt for i in range(400)}
    network = Persistent("G", _parameters=weights, _buffers={}, _modules={})
    refused(write(snapshot(G_ema=network)), "unfolds to far more than its size")


def test_a_packed_torch_file_is_refused(write):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    refused(write(stream.getvalue()), "packed as torch does not")


@settings(deadline=5000, max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["nvidia", "zip", "legacy"]),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=4)), max_size=8),
    st.floats(0, 2),
)
def test_any_bytes_are_read_or_refused(form, changes, keep):
    data = bytearray(FUZZED[form])
    for place, replacement in changes:
        start = place % len(data)
        data[start : start + len(replacement)] = replacement
    data = bytes(data[: int(keep * len(data))] if keep < 1 else data)
    budget = Budget(len(data))
    try:
        if form == "nvidia":
            for _, state in walk(mapping(read_pickle(io.BytesIO(data))).get("G_ema"), budget):
                for node in mapping(state["_parameters"]).values():
                    assert node is None or isinstance(tensor(node, budget), Tensor)
        else:
            load_torch(data)
    except Refused as error:
        assert str(error).isprintable() and len(str(error)) < 500
    except (MemoryError, SystemExit, KeyboardInterrupt):
        raise AssertionError(f"{form} with {changes}") from None
    except Exception as error:  # of damage: pickletools, zipfile and torch raise nearly any
        assert not isinstance(error, OSError) or error.errno is None


FUZZED = {
    "nvidia": dumps(snapshot(), 2)[:20_000] + dumps({"G_ema": network("D.")}),
    "zip": saved({"a": torch.ones(3), "b": [torch.zeros(2, 2), "text", (1, 2.5, None)]}, True),
    "legacy": saved({"a": torch.ones(3), "b": [torch.zeros(2, 2), "text", (1, None)]}, False),
}


# --- The command ---------------------------------------------------------------------------------


def test_command(write, tmp_path, capsys):
    source, out, second = write(snapshot()), tmp_path / "g.safetensors", tmp_path / "d.safetensors"
    assert main([str(source), str(out), "--discriminator", str(second), "--licence", "X"]) == 0
    assert "g_ema ->" in capsys.readouterr().err
    provenance = read_metadata(out)["provenance"]
    assert provenance["licence"] == "X" and provenance["source"] == "network.pkl"
    assert_close(load(out, Generator).synthesis(NVIDIA["in.wplus"]), NVIDIA["out.image_const"])
    assert_close(load(second, Discriminator)(NVIDIA["out.image_const"]), NVIDIA["out.logits"])
    before = out.stat()
    assert main([str(source), str(out), "--which", "d"]) == 2
    assert "exists" in capsys.readouterr().err and out.stat() == before
    assert main([str(source), str(out), "--which", "d", "--overwrite"]) == 0
    assert load(out, Discriminator).config.resolution == 32


def test_neither_the_source_nor_the_other_network_is_overwritten(write, tmp_path, capsys):
    source, out = write(snapshot()), tmp_path / "g.safetensors"
    content = source.read_bytes()
    (tmp_path / "link").symlink_to(source)
    for target in (source, tmp_path / "link", tmp_path / "x" / ".." / "network.pkl"):
        (tmp_path / "x").mkdir(exist_ok=True)
        assert main([str(source), str(target), "--overwrite"]) == 2
        assert main([str(source), str(out), "--discriminator", str(target), "--overwrite"]) == 2
    assert "is an input and would be replaced" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(source), str(out), "--discriminator", str(out)])
    assert "are one file" in capsys.readouterr().err
    assert source.read_bytes() == content and not out.exists()


def test_nothing_is_written_unless_all_is_read(write, tmp_path, capsys):
    source = write(snapshot(D=None))
    out = [str(tmp_path / name) for name in ("g.safetensors", "d.safetensors")]
    assert main([str(source), out[0], "--discriminator", out[1]]) == 2
    assert "holds no D" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [source]


def test_command_line(tmp_path):
    out = tmp_path / "out.safetensors"
    assert main([str(ROSINALITY), str(out), "--which", "d", "--half"]) == 0
    assert load(out, Discriminator).config.resolution == 32
    command = [sys.executable, "-m", "generators.convert", tmp_path / "none.pt", tmp_path / "new"]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert failed.returncode == 2 and "no such file" in failed.stderr
    assert failed.stderr.count("\n") == 1
