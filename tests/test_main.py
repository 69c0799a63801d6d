"""The commands by their names: pytest tests/test_main.py."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from encoder.__main__ import COMMANDS, main

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_the_commands_are_listed_with_a_line_each(argv, capsys):
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(len(line.split()) > 3 and len(line) <= 100 for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_each_name_is_a_command_with_options(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0 and f"gan-invert {name}" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["nothing", "--fast", "encoder.infer", "\x1b[2J"])
def test_another_word_is_a_sentence(word, capsys):
    assert main([word]) == 2
    said = capsys.readouterr().err
    assert "There is no command" in said and "train-encoder" in said and "\x1b[2J" not in said


def test_the_version_is_the_projects(capsys):
    project = (ROOT / "pyproject.toml").read_text()
    (written,) = re.findall(r'^version = "(.*)"$', project, re.MULTILINE)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() in (written, "not installed")
    assert 'gan-invert = "encoder.__main__:main"' in project


def test_listing_imports_no_network(tmp_path):
    code = "import sys; from encoder.__main__ import main; main([]); print('torch' in sys.modules)"
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.endswith("False\n"), done.stderr
