"""The one entry of every command: sentences, exit codes, signals.

pytest tests/test_command.py
"""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from generators.command import NonFiniteLoss, Terminated, command, parse_device, printable


@dataclass(frozen=True)
class Config:
    size: int = 1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError("--size must be at least 1")


def failing(error: BaseException):
    def run(config: Config) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (ValueError("a.png [/b] is broken"), 2, "a.png [/b] is broken"),
        (NonFiniteLoss("the loss is NaN"), 1, "the loss is NaN"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), 2, "a/b: No space left"),
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "not enough memory"),
        (torch.OutOfMemoryError("CUDA"), 2, "not enough memory"),
        (KeyboardInterrupt(), 130, "Stopped by Ctrl-C."),
        (Terminated(), 143, "Stopped by SIGTERM."),
    ],
)
def test_what_goes_wrong_is_a_sentence_and_an_exit_code(error, code, sentence, capsys):
    assert command(Config, failing(error), None, []) == code
    printed = capsys.readouterr().err
    assert sentence in printed and "Traceback" not in printed


def test_a_fault_of_ours_keeps_its_traceback():
    for error in (TypeError("ours"), RuntimeError("ours"), OSError("ours, without a number")):
        with pytest.raises(type(error), match="ours"):
            command(Config, failing(error), None, [])


def test_the_exit_code_is_what_the_command_returns():
    assert command(Config, lambda config: None, None, []) == 0
    assert command(Config, lambda config: config.size, None, ["--size", "3"]) == 3


def test_a_wrong_option_ends_with_2_before_anything_runs(capsys):
    for value, said in (("0", "--size must be at least 1"), ("much", "much")):
        with pytest.raises(SystemExit) as caught:
            command(Config, failing(AssertionError()), None, ["--size", value])
        assert caught.value.code == 2 and said in capsys.readouterr().err


def test_foreign_text_is_one_short_line_that_steers_no_terminal(capsys):
    assert printable("a\x1b[2Jb\nc\x9b\u202e") == "a\\x1b[2Jb\\nc\\x9b\\u202e"
    assert printable("日本 фото [/a]") == "日本 фото [/a]"
    assert len(printable("x" * 10**6)) == 200
    command(Config, failing(ValueError("name \x1b[31m" + "y" * 10**6)), None, [])
    printed = capsys.readouterr().err
    assert "\x1b" not in printed and len(printed) < 3000


PROGRAM = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from generators.command import command

@dataclass(frozen=True)
class Config:
    cleared: Path

def run(config):
    try:
        print("begun", flush=True)
        time.sleep(60)
    finally:
        config.cleared.touch()

sys.exit(command(Config, run, None))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_clears_up_and_ends_in_a_sentence(tmp_path, number, code):
    options = ["--cleared", str(tmp_path / "cleared")]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    process.send_signal(number)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == code and (tmp_path / "cleared").exists()
    assert printed.startswith("Stopped") and "Traceback" not in printed


def test_a_reader_that_goes_away_is_no_traceback():
    program = (
        "import sys\nfrom generators.command import command\nfrom test_command import Config\n"
        "sys.exit(command(Config, lambda config: print('x\\n' * 10**6, flush=True), None, []))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(timeout=60) == 141


@pytest.mark.parametrize("name", ["bogus", "meta", "cuda:x", "", "cpu:1:2", "\x1b[2J"])
def test_a_device_that_is_not_here_is_a_sentence(name):
    with pytest.raises(ValueError, match="cannot be used here") as caught:
        parse_device(name)
    assert "\x1b" not in str(caught.value)


def test_devices_that_are_here():
    assert parse_device("cpu") == torch.device("cpu")
    assert parse_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="cuda cannot be used here"):
            parse_device("cuda")
