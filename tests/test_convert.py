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
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from generators.checkpoint import load, read_metadata
from generators.convert import convert, main
from generators.pickles import Unpickler

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
        ({"layer": {"c_dim": 0, "activation": "relu"}}, "activation 'relu'"),
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
        ({"mapping__fc0__weight": torch.ones(7, 16)}, r"shape \(7, 16\)"),
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


def test_nothing_of_a_file_outlives_it():
    first = Unpickler(io.BytesIO(b"ccollections\nOrderedDict\n.")).load()
    second = Unpickler(io.BytesIO(b"ccollections\nOrderedDict\n.")).load()
    assert first is not second and first is not OrderedDict


@pytest.mark.parametrize("zipped", [True, False])
def test_hostile_torch_files_are_refused(write, zipped, tmp_path):
    path = write(saved({"g_ema": {"w": MKDIR}}, zipped))
    refused(path, "more than tensors")
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


# --- The command ---------------------------------------------------------------------------------


def test_command(write, tmp_path, capsys):
    source = write(snapshot())
    main(source, tmp_path / "g.safetensors", discriminator=tmp_path / "d.safetensors", licence="X")
    assert "g_ema ->" in capsys.readouterr().out
    provenance = read_metadata(tmp_path / "g.safetensors")["provenance"]
    assert provenance["licence"] == "X" and provenance["source"] == "network.pkl"
    images = load(tmp_path / "g.safetensors", "generator").synthesis(NVIDIA["in.wplus"])
    assert_close(images, NVIDIA["out.image_const"])
    logits = load(tmp_path / "d.safetensors", "discriminator")(NVIDIA["out.image_const"])
    assert_close(logits, NVIDIA["out.logits"])


def test_nothing_is_written_unless_all_is_read(write, tmp_path):
    source = write(snapshot(D=None))
    with pytest.raises(ValueError, match="holds no D"):
        main(source, tmp_path / "g.safetensors", discriminator=tmp_path / "d.safetensors")
    assert list(tmp_path.iterdir()) == [source]


def test_command_line(tmp_path):
    out = tmp_path / "out.safetensors"
    tyro.cli(main, args=[str(ROSINALITY), str(out), "--which", "d", "--half"])
    assert load(out, "discriminator").config.resolution == 32
    command = [sys.executable, "-m", "generators.convert", tmp_path / "none.pt", out]
    failed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert failed.returncode == 2 and "no such file" in failed.stderr
    assert failed.stderr.count("\n") == 1
