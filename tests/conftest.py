"""Fixtures shared by all tests: tiny networks of 16 x 16 pixels, made from fixed seeds.

pytest tests
"""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pictures import photo

from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.stylegan2 import Generator, GeneratorConfig

torch.set_num_threads(1)
# of a shell's background job Ctrl-C is ignored, and so it would be in the commands tested here
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = GeneratorConfig(resolution=16, z_dim=8, w_dim=8, mapping_layers=2, widths=(8, 6, 4))


def make_generator(seed: int, config: GeneratorConfig = TINY) -> Generator:
    """Random weights in every tensor, also those that start at zero (biases, noise, w_avg)."""
    torch.manual_seed(seed)
    generator = Generator(config)
    with torch.no_grad():
        for tensor in generator.state_dict().values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return generator.eval().requires_grad_(False)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Exported graphs are not put into the user's cache; nor are they made anew in each test."""
    os.environ["GAN_INVERT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seed() -> None:
    """Each test starts from the same global random state."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_config() -> GeneratorConfig:
    """16², widths 8, 6, 4; Z = D = 8, so that ws is (B, 6, 8)."""
    return TINY


@pytest.fixture
def generator_from_seed() -> Callable[..., Generator]:
    """seed, config=tiny -> a frozen generator in which no tensor is constant."""
    return make_generator


@pytest.fixture
def face() -> Generator:
    return make_generator(1)


@pytest.fixture
def anime() -> Generator:
    return make_generator(2)


@pytest.fixture
def discriminator() -> Discriminator:
    torch.manual_seed(3)
    return Discriminator(DiscriminatorConfig(resolution=16, widths=(8, 6, 4)))


@pytest.fixture
def ws() -> torch.Tensor:
    """(3, 6, 8)"""
    return torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """b.png, Ärzte/日本.JPG, Ärzte/broken.png and things that are not to be found."""
    root = tmp_path / "фото [1]"
    (root / "Ärzte").mkdir(parents=True)
    (root / ".hidden").mkdir()
    photo(1).save(root / "b.png")
    photo(2).save(root / "Ärzte" / "日本.JPG")
    (root / "Ärzte" / "broken.png").write_bytes(b"")
    photo(3).save(root / ".hidden" / "c.png")
    photo(4).save(root / ".d.png")
    (root / "notes.txt").write_text("no picture")
    (root / "folder.png").mkdir()
    return root
