"""What README.md, docs/ and the model card say: commands run or parse, links lead somewhere.

pytest tests/test_docs.py
"""

import io
import re
import runpy
import shlex
import shutil
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import tyro

from generators.checkpoint import BUNDLED, load
from generators.images import to_pil
from generators.stylegan2 import Generator

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
CARD = ROOT / "generators" / "weights" / "MODEL_CARD.md"
RUN = (  # to their end, by their first words; all others train or search for long: they are parsed
    "python infer.py",
    "python -m encoder.prepare --data photos.zip",
    "python -m encoder.prepare --data crops.parquet",
    "python -m encoder.edit directions --output pcs.safetensors",
    "python -m encoder.recipes interpolate",
    "python -m generators.blocks",
    "python -m generators.checkpoint",
    "python -m generators.convert 550000.pt",
)
NOT_RUN = ("webcam", "clip", "onnxruntime", "mine=")  # camera, film, export, style of one's own
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules")
LAUNCHERS = r"^(?:accelerate launch|torchrun --nproc-per-node 2) "  # what they start is parsed


def commands(page: Path) -> Iterator[str]:
    """One line each, without comments and without what is set in front of them."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE):
        for part in line.split(" && "):
            words = " ".join(part.split(" #")[0].split())
            command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", words)
            if re.match(r"(python|accelerate|torchrun|pip|pytest)\b", command):
                yield re.sub(LAUNCHERS, "python ", command)


COMMANDS = sorted({command for page in [*PAGES, CARD] for command in commands(page)})


class Parsed(BaseException):
    """The options are right."""


def execute(command: str) -> None:
    """`python …` in this process."""
    _, *words = shlex.split(command)
    module = words.pop(0) == "-m"
    program = words.pop(0) if module else command.split()[1]
    sys.argv = [program, *words]
    if module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(str(ROOT / program), run_name="__main__")


@cache
def a_drawing() -> bytes:
    anime = load(BUNDLED["anime64"], Generator)
    with torch.no_grad():
        images = anime(torch.randn(1, anime.z_dim, generator=torch.Generator().manual_seed(1)), 0.7)
    file = io.BytesIO()
    to_pil(images[0].clamp(-1, 1)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The working folder, with what the commands name: bundled networks and small pictures."""
    reference = tmp_path / "stylegan2-ada-pytorch" / "training"
    reference.mkdir(parents=True)
    (reference / "networks.py").touch()
    tmp_path /= "here"
    example = ROOT / "examples" / "astronaut.jpg"
    for name in "photos examples faces faces_test anime anime_test latents masks".split():
        (tmp_path / name).mkdir(parents=True)
        shutil.copy(example, tmp_path / name / "a.jpg")
    for name in ("me.jpg", "a.jpg", "b.jpg"):
        shutil.copy(example, tmp_path / name)
    (tmp_path / "drawings").mkdir()
    for name in ("drawing.png", "drawings/a.png", "drawings/b.png"):
        (tmp_path / name).write_bytes(a_drawing())
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.write(example, "a.jpg")
    data = {"image": [{"bytes": example.read_bytes(), "path": None}]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(data, features=features).to_parquet(tmp_path / "crops.parquet")
    shutil.copy(ROOT / "tests" / "golden" / "rosinality_tiny32.pt", tmp_path / "550000.pt")
    for run, name in (("face64", "face64"), ("anime64", "anime64"), ("anime64b", "anime64")):
        (tmp_path / "runs" / run).mkdir(parents=True)
        for file in ("best", "generator"):
            shutil.copy(BUNDLED[name], tmp_path / "runs" / run / f"{file}.safetensors")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    return tmp_path


def test_there_are_commands_and_those_that_run_are_among_them():
    assert len(COMMANDS) > 40
    for start in RUN:
        assert any(command.startswith(start) for command in COMMANDS), start


def is_run(command: str) -> bool:
    return command.startswith(RUN) and not any(word in command for word in NOT_RUN)


@pytest.mark.parametrize("command", [x for x in COMMANDS if is_run(x)])
def test_a_command_runs(folder, command):
    try:
        execute(command)
    except SystemExit as caught:
        assert caught.code in (0, None)


@pytest.mark.parametrize(
    "command", [x for x in COMMANDS if x.startswith("python ") and not is_run(x)]
)
def test_the_options_of_a_command_exist(folder, monkeypatch, command):
    real = tyro.cli

    def parse(given: Any, args: Any = None, **options: Any) -> None:
        real(given, args=sys.argv[1:] if args is None else args, **options)
        raise Parsed

    monkeypatch.setattr(tyro, "cli", parse)
    with pytest.raises(Parsed):
        execute(command)


def test_what_is_installed_is_there():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    whole = [command for command in COMMANDS if not command.startswith("python ")]
    assert {"pip install .", "pip install '.[dev]'", "pytest"} <= set(whole)
    for command in whole:
        for extra in re.findall(r"\.\[(\w+)\]", command):
            assert f"\n{extra} = [" in project, command


@pytest.mark.parametrize(
    "block", re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
)
def test_the_python_of_the_pages_runs(folder, block):
    shutil.copy(ROOT / "examples" / "astronaut.jpg", folder / "examples")
    exec(compile(block, "docs/python.md", "exec"), {})


@pytest.mark.parametrize("page", [*PAGES, CARD], ids=lambda page: page.name)
def test_links_lead_somewhere_and_lines_are_short(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for line in text.splitlines():
        assert len(line) <= 100 or line.startswith("|"), line


def test_the_map_names_the_modules_that_are_there():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    parts = re.split(r"\n    (encoder|generators|benchmarks)/", page)
    for package, part in zip(parts[1::2], parts[2::2], strict=True):
        named = set(re.findall(r"(\w+)\.py", part))
        there = {file.stem for file in (ROOT / package).rglob("*.py")} - {"__init__"}
        assert package == "benchmarks" or named == there
