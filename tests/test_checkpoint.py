"""One safetensors is one whole network, or one clear sentence.

pytest tests/test_checkpoint.py
"""

import json
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from generators import checkpoint
from generators.checkpoint import BUNDLED, load, read_metadata, resolve, save
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.features import load_backbone
from generators.stylegan2 import Generator, GeneratorConfig
from generators.superres import SuperResolution, SuperResolutionConfig
from generators.tensors import load_state, read_weights

CONFIG = GeneratorConfig(resolution=8, z_dim=4, w_dim=6, mapping_layers=2, widths=(5, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A saved generator."""
    torch.manual_seed(0)
    save(tmp_path / "g.safetensors", Generator(CONFIG), provenance={"licence": "CC0", "data": "x"})
    return tmp_path / "g.safetensors"


def rewrite(path: Path, change: Callable[[dict, dict], object]) -> None:
    """Lets `change` edit the tensors and the metadata of a file."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = safetensors.torch.load_file(path)
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata)


def edit_config(**changes: object) -> Callable[[dict, dict], object]:
    return lambda _, metadata: metadata.update(
        config=json.dumps(json.loads(metadata["config"]) | changes)
    )


def test_round_trip(path):
    torch.manual_seed(0)
    original = Generator(CONFIG).eval()
    loaded = load(path, Generator)
    assert loaded.config == CONFIG and not loaded.training
    for name, value in original.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    z = torch.randn(2, 4)
    assert torch.equal(original(z), loaded(z))


def test_discriminator_round_trip(tmp_path):
    original = Discriminator(DiscriminatorConfig(resolution=8, widths=(4, 3), mbstd_group_size=2))
    save(tmp_path / "d.safetensors", original, provenance={"licence": "CC0"})
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(original(images), load(tmp_path / "d.safetensors", Discriminator)(images))


def test_metadata(path):
    metadata = read_metadata(path)
    assert metadata["kind"] == "generator"
    assert metadata["config"]["widths"] == [5, 3]
    assert metadata["provenance"] == {"licence": "CC0", "data": "x"}


def test_licence_is_always_there(tmp_path):
    save(tmp_path / "g.safetensors", Generator(CONFIG))
    assert read_metadata(tmp_path / "g.safetensors")["provenance"] == {"licence": "not stated"}


def test_half_is_smaller_and_loads_as_fp32(path, tmp_path):
    whole = load(path, Generator)
    save(tmp_path / "half.safetensors", whole, half=True)
    loaded = load(tmp_path / "half.safetensors", Generator)
    assert all(value.dtype == torch.float32 for value in loaded.state_dict().values())
    assert os.path.getsize(tmp_path / "half.safetensors") < 0.8 * os.path.getsize(path)
    torch.testing.assert_close(loaded.state_dict(), whole.state_dict(), rtol=1e-3, atol=1e-6)


def test_half_refuses_what_does_not_fit(tmp_path):
    generator = Generator(CONFIG)
    generator.w_avg.fill_(1e5)
    with pytest.raises(ValueError, match=r"mapping\.w_avg.*half=False"):
        save(tmp_path / "g.safetensors", generator, half=True)
    assert list(tmp_path.iterdir()) == []


def test_loading_leaves_the_random_state(path):
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    load(path, Generator)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t, m: t.pop("mapping.w_avg"), r"mapping\.w_avg for one"),
        (lambda t, m: t.update(extra=torch.zeros(1)), "unknown, extra"),
        (lambda t, m: t.update({"mapping.w_avg": torch.zeros(7)}), r"shape \(7,\), not \(6,\)"),
        (lambda t, m: t.update({"mapping.w_avg": torch.zeros(6).int()}), r"torch\.int32"),
        (lambda t, m: m.pop("kind"), "metadata has no kind"),
        (lambda t, m: m.clear(), "this project did not write it"),
        (lambda t, m: m.update(kind="encoder"), "of kind 'encoder'"),
        (lambda t, m: m.update(format="9"), "format 9"),
        (lambda t, m: m.update(config="{"), "metadata is damaged"),
        (lambda t, m: m.update(config="[]"), "metadata is damaged"),
        (edit_config(colour=3), "no field colour"),
        (edit_config(resolution=9), "power of two"),
        (edit_config(resolution="8"), "bad config"),
        (edit_config(widths=[5, 4]), "shape"),
    ],
)
def test_a_wrong_file_is_one_sentence(path, change, sentence):
    rewrite(path, change)
    with pytest.raises(ValueError, match=sentence) as caught:
        load(path, Generator)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [5, 100, -1])
def test_a_truncated_file_is_one_sentence(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"not a whole \.safetensors file") as caught:
        load(path, Generator)
    assert str(path) in str(caught.value)


def test_wrong_kind_and_missing_file(path):
    with pytest.raises(ValueError, match="of kind 'generator'; give a file with a discriminator"):
        load(path, Discriminator)
    with pytest.raises(ValueError, match="no such file"):
        load(path.with_name("none.safetensors"), Generator)
    assert isinstance(load(path, Discriminator, Generator), Generator)


def test_a_failed_load_state_changes_nothing():
    network = Generator(CONFIG)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()} | {"mapping.w_avg": torch.ones(9)}
    with pytest.raises(ValueError, match="shape"):
        load_state(network, state, "it does not fit")
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_failed_save_keeps_the_old_file(path, monkeypatch):
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        save(path, Generator(CONFIG))
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@dataclass(frozen=True)
class SofaConfig:
    seats: int = 2


class Sofa(nn.Linear):
    kind = "sofa"
    config_class = SofaConfig

    def __init__(self, config: SofaConfig) -> None:
        super().__init__(config.seats, 1)
        self.config = config


def test_a_class_says_what_its_files_hold(tmp_path):
    save(tmp_path / "s.safetensors", Sofa(SofaConfig(seats=3)))
    assert load(tmp_path / "s.safetensors", Sofa).config == SofaConfig(seats=3)


def test_resolve(path):
    assert resolve(path) == path and resolve(str(path)) == path
    with pytest.raises(ValueError, match=r"face128, anime128, sketch128.*face64, anime64"):
        resolve("face65")
    assert all(file.parent.name == "weights" for file in BUNDLED.values())


def test_pack_stores_half_precision_and_keeps_the_rest(path, tmp_path):
    target = tmp_path / "small.safetensors"
    assert checkpoint.main([str(path), str(target), "--provenance", "licence", "CC BY"]) == 0
    small = load(tmp_path / "small.safetensors", Generator)
    assert small.config == CONFIG
    assert (tmp_path / "small.safetensors").stat().st_size < path.stat().st_size
    provenance = read_metadata(tmp_path / "small.safetensors")["provenance"]
    assert provenance == {"licence": "CC BY", "data": "x"}
    for name, value in load(path, Generator).state_dict().items():
        assert torch.equal(small.state_dict()[name], value.half().float())
    assert checkpoint.main([str(tmp_path / "nothing"), str(tmp_path / "x.safetensors")]) == 2


def test_pack_replaces_nothing_unasked_and_never_its_source(path, tmp_path, capsys):
    content, target = path.read_bytes(), tmp_path / "small.safetensors"
    target.write_text("mine")
    assert checkpoint.main([str(path), str(target)]) == 2
    assert target.read_text() == "mine" and "--overwrite" in capsys.readouterr().err
    assert checkpoint.main([str(path), str(path), "--overwrite"]) == 2
    assert path.read_bytes() == content and "is an input" in capsys.readouterr().err
    assert checkpoint.main([str(path), str(target), "--overwrite"]) == 0
    assert load(target, Generator).config == CONFIG


# ------------------------------------------------------------------- files without their base


@pytest.fixture
def base(path, monkeypatch) -> Path:
    """A bundled model, "base", in half precision as those are."""
    file = path.with_name("base.safetensors")
    checkpoint.pack(path, file, {})
    monkeypatch.setitem(BUNDLED, "base", file)
    return file


@pytest.fixture
def tuned(base) -> Generator:
    """A fine-tune of it, of which one block has learnt."""
    generator = load(base, Generator)
    with torch.no_grad():
        generator.synthesis.b8.conv1.weight += 1
    return generator


def test_a_file_leaves_out_what_is_its_base_s(base, tuned, tmp_path):
    file = tmp_path / "tuned.safetensors"
    save(file, tuned, half=True, base="base")
    assert [*read_weights(file)] == ["synthesis.b8.conv1.weight"]
    assert file.stat().st_size < base.stat().st_size / 2
    loaded = load(file, Generator).state_dict()
    assert all(torch.equal(loaded[k], v.half().float()) for k, v in tuned.state_dict().items())


def test_a_base_has_a_base(tuned, tmp_path, monkeypatch):
    save(tmp_path / "tuned.safetensors", tuned, half=True, base="base")
    monkeypatch.setitem(BUNDLED, "tuned", tmp_path / "tuned.safetensors")
    with torch.no_grad():
        tuned.mapping.w_avg += 1
    save(tmp_path / "third.safetensors", tuned, half=True, base="tuned")
    assert [*read_weights(tmp_path / "third.safetensors")] == ["mapping.w_avg"]
    loaded = load(tmp_path / "third.safetensors", Generator).state_dict()
    assert torch.equal(loaded["mapping.w_avg"], tuned.mapping.w_avg.half().float())
    assert loaded["synthesis.b8.conv1.weight"].mean() > 0.5


def test_what_is_all_of_the_base_still_holds_something(base, tmp_path):
    save(tmp_path / "same.safetensors", load(base, Generator), half=True, base="base")
    assert len(read_weights(tmp_path / "same.safetensors")) == 1
    assert load(tmp_path / "same.safetensors", Generator).config == CONFIG


def test_pack_leaves_out_too_and_keeps_a_base(base, tuned, tmp_path):
    whole, small, again = (tmp_path / f"{name}.safetensors" for name in ("a", "b", "c"))
    save(whole, tuned)
    with pytest.raises(ValueError, match="--base is a bundled name, one of face128"):
        checkpoint.PackConfig(str(whole), small, base="none")
    checkpoint.pack(whole, small, {}, base="base")
    assert len(read_weights(small)) == 1
    checkpoint.pack(small, again, {"licence": "mine"})
    assert load(again, Generator).config == CONFIG
    assert read_metadata(again)["base"]["name"] == "base"
    with pytest.raises(ValueError, match="has a base already"):
        checkpoint.pack(small, again, {}, base="base")


def test_another_base_is_noticed(base, tuned, path, tmp_path):
    save(tmp_path / "tuned.safetensors", tuned, half=True, base="base")
    rewrite(base, lambda tensors, _: tensors["mapping.w_avg"].add_(1))
    with pytest.raises(ValueError, match="left out was of another base; get it again"):
        load(tmp_path / "tuned.safetensors", Generator)


def test_a_base_is_bundled_and_has_something_in_common(base, tuned, tmp_path):
    file = tmp_path / "tuned.safetensors"
    save(file, tuned, half=True, base="base")
    rewrite(file, lambda _, metadata: metadata.update(base='{"name": "/etc/passwd"}'))
    with pytest.raises(ValueError, match="is based on /etc/passwd, which is no bundled model"):
        load(file, Generator)
    rewrite(file, lambda _, metadata: metadata.update(base='{"name": ["base"]}'))
    with pytest.raises(ValueError, match="which is no bundled model"):
        load(file, Generator)
    rewrite(file, lambda _, metadata: metadata.update(base="[]"))
    with pytest.raises(ValueError, match="metadata is damaged"):
        load(file, Generator)
    with pytest.raises(ValueError, match="no weight is one of base; leave the base out"):
        save(file, SuperResolution(SuperResolutionConfig(4, 1)), base="base")


def test_a_file_is_not_its_own_base(base, tuned, monkeypatch):
    save(base.with_name("loop.safetensors"), tuned, half=True, base="base")
    monkeypatch.setitem(BUNDLED, "base", base.with_name("loop.safetensors"))
    with pytest.raises(ValueError, match="no bundled model"):
        load(BUNDLED["base"], Generator)


# ------------------------------------------------------- configs and files not to be trusted


NESTED = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (edit_config(mapping_layers=1_000_000_000), "mapping_layers is 1000000000, not a fit int"),
        (edit_config(mapping_layers=1_000_000), "a larger network than the file holds"),
        (edit_config(z_dim=1_000_000, w_dim=1_000_000), "a larger network than the file holds"),
        (edit_config(resolution=1024, widths=[]), "a larger network than the file holds"),
        (edit_config(channel_base="x"), 'channel_base is "x", not a fit int'),
        (edit_config(channel_base=32768.5), "channel_base is 32768.5, not a fit int"),
        (edit_config(z_dim=True), "z_dim is true, not a fit int"),
        (edit_config(z_dim=0), "must be 1 or more"),
        (edit_config(conv_clamp="x"), 'conv_clamp is "x", not a fit'),
        (edit_config(widths=[5, "3"]), "widths is"),
        (edit_config(widths=7), "widths is 7"),
        (edit_config(widths={"a": 1}), "widths is"),
        (edit_config(resolution=None), "resolution is null"),
        (lambda t, m: m.update(config='{"conv_clamp": NaN}'), "NaN is no number"),
        (lambda t, m: m.update(config='{"z_dim": 4, "z_dim": 5}'), "a key is there twice"),
        (lambda t, m: m.update(config='{"z_dim": 1' + "0" * 5000 + "}"), "metadata is damaged"),
        (lambda t, m: m.update(config=NESTED), "metadata is damaged"),
        (lambda t, m: m.update(provenance=NESTED), "metadata is damaged"),
        (lambda t, m: m.update(config="{" + " " * (1 << 21) + "}"), "it is too long"),
        (lambda t, m: m.update(kind="\x1b[2J" * 1000), r"of kind '\\x1b\[2J"),
        (
            lambda t, m: t["mapping.w_avg"].fill_(torch.nan),
            r"mapping\.w_avg has values that are not",
        ),
        (
            lambda t, m: t["mapping.w_avg"].fill_(torch.inf),
            r"mapping\.w_avg has values that are not",
        ),
    ],
)
def test_metadata_is_checked_before_anything_is_built(path, change, sentence):
    rewrite(path, change)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=sentence) as caught:
        load(path, Generator)
    assert time.perf_counter() - start < 10
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500 + len(str(path))


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("blocks", 100_000_000, "blocks is 100000000, not a fit int"),
        ("blocks", 1_000_000, "a larger network than the file holds"),
        ("width", 1_000_000, "a larger network than the file holds"),
        ("width", 0, "needs width >= 1"),
    ],
)
def test_other_kinds_are_bounded_by_their_tensors_too(tmp_path, field, value, sentence):
    save(tmp_path / "s.safetensors", SuperResolution(SuperResolutionConfig(width=4, blocks=1)))
    rewrite(tmp_path / "s.safetensors", edit_config(**{field: value}))
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path / "s.safetensors", SuperResolution)


def test_every_file_that_is_no_weights_is_one_sentence(tmp_path):
    """What is wrong, and what would be right."""
    torch.save({"a": torch.ones(3)}, tmp_path / "whole.pt")
    torch.save({"state_dict": {"a": torch.ones(3)}, "epoch": 1}, tmp_path / "wrapped.pth")
    for name in ("whole.pt", "wrapped.pth"):
        assert torch.equal(read_weights(tmp_path / name)["a"], torch.ones(3))

    contents: dict[str, object] = {
        "a list": [torch.ones(3)],
        "a number": {"a": torch.ones(3), "b": 1},
        "a number for a name": {1: torch.ones(3)},
        "nothing": {},
        "nan": {"a": torch.tensor([1.0, torch.nan])},
        "expanded": {"a": torch.ones(1).expand(1 << 30)},
        "code": {"a": Run()},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.safetensors").write_text("weights")
    (tmp_path / "pickle.pkl").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "folder.pt").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    reasons = {
        "a list.pt": "holds a list and no tensors by name; give it",
        "a number.pt": "b in it is no tensor; give it",
        "a number for a name.pt": "1 in it is no tensor; give it",
        "nothing.pt": "no tensors by name; give it",
        "nan.pt": "a has values that are not finite; get it again",
        "expanded.pt": "a tensor larger than its storage; get",
        "code.pt": r"asks for posix\.mkdir, which no network needs; do not trust",
        "empty.pt": "it is empty; give it",
        "cut.pt": "it is damaged .*; give it",
        "text.safetensors": r"not a whole \.safetensors file .*; give it",
        "pickle.pkl": "is a pickle; python -m generators.convert",
        "folder.pt": "it is a folder; give it",
        "pipe.pt": "a pipe, a socket or a device, not a file; give it",
        "missing.pt": "there is no such file; give it",
    }
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason) as caught:
            read_weights(tmp_path / name, "it")
        assert str(caught.value).startswith(str(tmp_path / name))
        assert str(caught.value).isprintable()
    assert not (tmp_path / "executed").exists()


class Run:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("executed",)


@settings(deadline=3000, max_examples=200, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=6)), max_size=6),
    st.floats(0, 2),
    st.booleans(),
)
def test_any_bytes_are_a_network_or_one_sentence(whole, changes, keep, header):
    """The changes fall on the metadata, or on the whole file."""
    content, path = whole
    data = bytearray(content)
    for place, replacement in changes:
        start = int(place * (1500 if header else len(data)))
        data[start : start + len(replacement)] = replacement
    path.write_bytes(data[: int(keep * len(data))] if keep < 1 else data)
    try:
        assert load(path, Generator).config.resolution == 8
    except ValueError as error:
        assert str(error).isprintable() and len(str(error)) < 500 + len(str(path))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[bytes, Path]:
    path = tmp_path_factory.mktemp("fuzz") / "g.safetensors"
    save(path, Generator(CONFIG), provenance={"licence": "CC0"})
    return path.read_bytes(), path


def test_a_backbone_of_bad_weights_is_one_sentence(tmp_path):
    name = "mobilenetv3_small_050"
    net = timm.create_model(name, pretrained=False, features_only=True)
    state = net.state_dict()
    torch.save(state, tmp_path / "whole.pt")
    load_backbone(net, name, tmp_path / "whole.pt")
    for file, content in {"list": [1], "other": {"a": torch.ones(1)}, "code": Run()}.items():
        torch.save(content, tmp_path / f"{file}.pt")
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:10_000])
    for file, reason in {
        "list": "holds a list and no tensors by name; give a .safetensors file",
        "other": f"do not fit timm's {name}",
        "code": "asks for posix.mkdir",
        "empty": "it is empty; give a .safetensors file",
        "cut": "it is damaged",
        "none": "there is no such file; give a .safetensors file",
    }.items():
        with pytest.raises(ValueError, match=reason) as caught:
            load_backbone(net, name, tmp_path / f"{file}.pt")
        assert f"{file}.pt" in str(caught.value)


def test_a_header_of_any_length_is_no_pickle(tmp_path):
    """One of 128 bytes begins the file as a pickle begins."""
    path = tmp_path / "a.safetensors"
    firsts = set()
    for length in range(300):
        safetensors.torch.save_file({"a": torch.ones(2)}, path, {"note": "x" * length})
        firsts.add(path.read_bytes()[0])
        assert read_weights(path)["a"].tolist() == [1, 1]
    assert 0x80 in firsts
