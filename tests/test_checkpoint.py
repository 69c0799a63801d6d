"""One safetensors is one whole network, or one clear sentence.

pytest tests/test_checkpoint.py
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from generators import checkpoint
from generators.checkpoint import BUNDLED, KINDS, load, read_metadata, resolve, save
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.stylegan2 import Generator, GeneratorConfig

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
    loaded = load(path, "generator")
    assert loaded.config == CONFIG and not loaded.training
    for name, value in original.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
    z = torch.randn(2, 4)
    assert torch.equal(original(z), loaded(z))


def test_discriminator_round_trip(tmp_path):
    original = Discriminator(DiscriminatorConfig(resolution=8, widths=(4, 3), mbstd_group_size=2))
    save(tmp_path / "d.safetensors", original, provenance={"licence": "CC0"})
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(original(images), load(tmp_path / "d.safetensors", "discriminator")(images))


def test_metadata(path):
    metadata = read_metadata(path)
    assert metadata["kind"] == "generator"
    assert metadata["config"]["widths"] == [5, 3]
    assert metadata["provenance"] == {"licence": "CC0", "data": "x"}


def test_licence_is_always_there(tmp_path):
    save(tmp_path / "g.safetensors", Generator(CONFIG))
    assert read_metadata(tmp_path / "g.safetensors")["provenance"] == {"licence": "not stated"}


def test_half_is_smaller_and_loads_as_fp32(path, tmp_path):
    whole = load(path, "generator")
    save(tmp_path / "half.safetensors", whole, half=True)
    loaded = load(tmp_path / "half.safetensors", "generator")
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
    load(path, "generator")
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
        load(path, "generator")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_one_sentence(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"not a whole \.safetensors file") as caught:
        load(path, "generator")
    assert str(path) in str(caught.value)


def test_wrong_kind_and_missing_file(path):
    with pytest.raises(ValueError, match="of kind 'generator'; give a file with a discriminator"):
        load(path, "discriminator")
    with pytest.raises(ValueError, match="no such file"):
        load(path.with_name("none.safetensors"), "generator")
    with pytest.raises(ValueError, match="known are generator, discriminator"):
        load(path, "sofa", kinds={k: KINDS[k] for k in ("generator", "discriminator")})


def test_a_failed_load_state_changes_nothing():
    network = Generator(CONFIG)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = {name: value + 1 for name, value in before.items()} | {"mapping.w_avg": torch.ones(9)}
    with pytest.raises(ValueError, match="shape"):
        checkpoint.load_state(network, state)
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
    def __init__(self, config: SofaConfig) -> None:
        super().__init__(config.seats, 1)
        self.config = config


def test_another_package_adds_its_kind(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="add it to KINDS"):
        save(tmp_path / "s.safetensors", Sofa(SofaConfig()))
    monkeypatch.setitem(KINDS, "sofa", (SofaConfig, Sofa))
    save(tmp_path / "s.safetensors", Sofa(SofaConfig(seats=3)))
    assert load(tmp_path / "s.safetensors", "sofa").config == SofaConfig(seats=3)


def test_resolve(path):
    assert resolve(path) == path and resolve(str(path)) == path
    with pytest.raises(ValueError, match="face64, anime64, encoder64"):
        resolve("face65")
    assert all(file.parent.name == "weights" for file in BUNDLED.values())


def test_pack_stores_half_precision_and_keeps_the_rest(path, tmp_path):
    checkpoint.main(path, tmp_path / "small.safetensors", {"licence": "CC BY"})
    small = load(tmp_path / "small.safetensors", "generator")
    assert small.config == CONFIG
    assert (tmp_path / "small.safetensors").stat().st_size < path.stat().st_size
    provenance = read_metadata(tmp_path / "small.safetensors")["provenance"]
    assert provenance == {"licence": "CC BY", "data": "x"}
    for name, value in load(path, "generator").state_dict().items():
        assert torch.equal(small.state_dict()[name], value.half().float())
    with pytest.raises(SystemExit):
        checkpoint.main(tmp_path / "nothing", tmp_path / "x.safetensors")
