"""Our StyleGAN2 gives the numbers of NVIDIA's: goldens of stylegan2-ada-pytorch on random weights.

    pytest tests/test_golden.py

Shape letters: B batch, L layers of w+, D w dimension, Z z dimension, R resolution.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from generators.convert import build, rename_nvidia
from generators.discriminator import Discriminator
from generators.stylegan2 import Generator

GOLDEN = Path(__file__).parent / "golden" / "stylegan2_ada_tiny32.safetensors"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN)


def part(golden: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[2:]: value for name, value in golden.items() if name.startswith(prefix)}


@pytest.fixture(scope="module")
def generator(golden: dict[str, Tensor]) -> Generator:
    network = build(rename_nvidia(part(golden, "G.")), {}, "g_ema")
    assert isinstance(network, Generator)
    return network


@pytest.fixture(scope="module")
def discriminator(golden: dict[str, Tensor]) -> Discriminator:
    network = build(rename_nvidia(part(golden, "D.")), {"mbstd_group_size": 4}, "d")
    assert isinstance(network, Discriminator)
    return network


def assert_close(ours: Tensor, theirs: Tensor, scale: float = 1.0) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-4 * scale


@pytest.mark.parametrize(
    ("expected", "truncation", "cutoff"),
    [("out.ws", 1.0, None), ("out.ws_psi0.7", 0.7, None), ("out.ws_psi0.5_cutoff4", 0.5, 4)],
)
def test_mapping(golden, generator, expected, truncation, cutoff):
    with torch.no_grad():
        ws = generator.map(golden["in.z"], truncation, cutoff)  # (B, L, D)
    assert_close(ws, golden[expected], scale=float(golden[expected].abs().max()))


@pytest.mark.parametrize("noise_mode", ["const", "none"])
def test_synthesis(golden, generator, noise_mode):
    with torch.no_grad():
        images = generator.synthesis(golden["in.wplus"], noise_mode=noise_mode)  # (B, 3, R, R)
    assert_close(images, golden[f"out.image_{noise_mode}"])


def test_synthesis_one_by_one(golden, generator):
    """Batch 1 may take another path through the convolutions; the picture is the same."""
    with torch.no_grad():
        images = torch.cat([generator.synthesis(ws[None]) for ws in golden["in.wplus"]])
    assert_close(images, golden["out.image_const"])


def test_discriminator(golden, discriminator):
    with torch.no_grad():
        logits = discriminator(golden["out.image_const"])  # (B, 1)
    assert_close(logits, golden["out.logits"], scale=float(golden["out.logits"].abs().max()))


THEIR_LOGITS = {  # of NVIDIA's code at batches that the group of 4 does and does not divide
    1: [-0.38464],
    2: [-0.44518, -0.4646],
    3: [-0.63431, -0.63002, -1.77836],
    8: [-0.66225, -0.52413, -1.79504, 0.12988, -0.57149, -0.14523, -1.26419, -0.08116],
}


@pytest.mark.parametrize("batch", THEIR_LOGITS)
def test_discriminator_at_batches_of_other_sizes(golden, discriminator, batch):
    images = golden["out.image_const"]
    images = torch.cat([images, images.flip(-1)])[:batch]
    with torch.no_grad():
        assert_close(discriminator(images)[:, 0], torch.tensor(THEIR_LOGITS[batch]))


@pytest.mark.parametrize("batch", [5, 6, 7])
def test_discriminator_where_theirs_fails(golden, discriminator, batch):
    """Each picture is compared with its own group: here the largest that divides the batch."""
    images = golden["out.image_const"].repeat(2, 1, 1, 1)[:batch]
    group = {5: 1, 6: 3, 7: 1}[batch]
    with torch.no_grad():
        whole = discriminator(images)
        own = [discriminator(images[i :: batch // group]) for i in range(batch // group)]
    assert_close(whole, torch.stack(own, dim=1).flatten(0, 1))


@pytest.mark.parametrize("prefix", ["G.", "D."])
def test_only_the_filters_are_dropped(golden, prefix):
    state = part(golden, prefix)
    dropped = state.keys() - rename_nvidia(state).keys()
    assert dropped == {name for name in state if name.endswith("resample_filter")} != set()


def test_another_filter_is_not_dropped(golden):
    state = part(golden, "G.")
    state["synthesis.b8.resample_filter"] = torch.ones(4, 4) / 16
    with pytest.raises(ValueError, match=r"synthesis\.b8\.resample_filter"):
        rename_nvidia(state)


def test_unknown_name_is_refused(golden):
    with pytest.raises(ValueError, match=r"mapping\.embed\.weight"):
        rename_nvidia(part(golden, "G.") | {"mapping.embed.weight": torch.zeros(2, 2)})
