"""What may happen to a training from outside: signals, full disks, damaged and foreign files, a
second training, several processes. Both trainings go through all of it.

pytest tests/test_loop.py
"""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import kill
import pytest
import torch
from common import in_processes
from processes import LAUNCH, ROOT, environment

from encoder.train import EncoderTrainConfig, EncoderTraining
from generators import runs
from generators.gan import StyleGan2Training
from generators.loop import Signals
from generators.options import DcganOptions, StyleGan2Options, SuperresOptions
from generators.runs import RunFolder, read_checkpoint
from generators.state import LossMeter

BOTH = pytest.mark.parametrize("training", ["encoder", "generator"])
CLASSES = {"encoder": EncoderTraining, "generator": StyleGan2Training}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    kill.tiny_world(folder)
    return folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def give(training: str, world: Path, run: Path, **changes) -> int:
    """The command; its exit code."""
    try:
        return kill.MAINS[training](kill.arguments(training, world, run, **changes))
    except SystemExit as error:  # of the parser
        return error.code


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- signals, kill -9


@BOTH
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_waits_for_the_step_and_leaves_a_checkpoint(
    training, number, code, world, tmp_path, monkeypatch, capsys
):
    """Also between two lines of metrics.jsonl: a mean goes over both halves."""
    cadence = {"log_every": 5, "save_every": 100}
    step = CLASSES[training].step

    def interrupted(self, count: int, meter: LossMeter) -> None:
        if count == 7:
            os.kill(os.getpid(), number)
        step(self, count, meter)

    assert give(training, world, tmp_path / "whole", **cadence) == 0
    with monkeypatch.context() as patched:
        patched.setattr(CLASSES[training], "step", interrupted)
        assert give(training, world, tmp_path / "stopped", **cadence) == code
    assert "step 8 is saved, the same command goes on" in capsys.readouterr().err
    saved = os.listdir(tmp_path / "stopped" / "checkpoints")
    assert saved == ["step-00000008.safetensors"]
    assert give(training, world, tmp_path / "stopped", **cadence) == 0
    assert kill.same(training, tmp_path / "whole", tmp_path / "stopped")


def test_a_signal_after_the_last_step_is_not_lost():
    with pytest.raises(KeyboardInterrupt), Signals(world=1):
        os.kill(os.getpid(), signal.SIGINT)


def test_kill_9_at_any_moment_changes_no_bit():
    assert kill.main(["--moments", "1"]) == 0


@BOTH
def test_a_second_training_in_one_folder_is_refused(training, world, tmp_path, capsys):
    with RunFolder(tmp_path / "run").opened({}, ()):
        assert give(training, world, tmp_path / "run") == 2
    assert "Another process is at work in" in capsys.readouterr().err
    assert give(training, world, tmp_path / "run") == 0


# ------------------------------------------------------------------------------- disks


@BOTH
def test_a_full_disk_ends_in_a_sentence_and_the_training_goes_on(
    training, world, tmp_path, monkeypatch, capfd
):
    step, (soft, hard) = CLASSES[training].step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(self, count: int, meter: LossMeter) -> None:
        if count == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        step(self, count, meter)

    whole, run = tmp_path / "whole", tmp_path / "run"
    assert give(training, world, whole) == 0
    with monkeypatch.context() as patched:
        patched.setattr(CLASSES[training], "step", filling)
        try:
            assert give(training, world, run, tracker="tensorboard") == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    said = capfd.readouterr().err
    assert "step-00000006.safetensors: File too large" in said and "Traceback" not in said
    assert os.listdir(run / "checkpoints") == ["step-00000003.safetensors"]
    assert give(training, world, run, tracker="tensorboard") == 0
    assert kill.same(training, whole, run)


@BOTH
def test_a_run_folder_below_a_file_is_refused(training, world, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert give(training, world, tmp_path / "file" / "run") == 2
    assert "is not a folder" in " ".join(capsys.readouterr().err.split())


def test_a_half_written_line_is_dropped(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log(step, {"loss": 0.5})
    whole = folder.metrics.read_bytes()
    folder.metrics.write_bytes(whole + b'{"step": 4, "lo')
    folder.rewind_metrics(4)
    assert folder.metrics.read_bytes() == whole
    folder.rewind_metrics(2)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


# ------------------------------------------------------------- damaged and foreign files


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


def pickled(file: Path) -> None:
    torch.save({"step": 6}, file)


def of_another_version(file: Path) -> None:
    torch.manual_seed(0)
    runs.save_file({"encoder/a": torch.zeros(2)}, file, {"format": "training 1"})


def of_another_training(file: Path) -> None:
    folder = RunFolder(file.parent.parent)
    kept = {path: path.read_bytes() for path in folder.saved()}
    folder.save(6, {"encoder/a": torch.zeros(2)}, {"step": 6, "best": 0.0, "scores": {}})
    for path, data in kept.items():
        if path != file:
            path.write_bytes(data)


def empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory) -> dict[str, Path]:
    """Runs of 6 steps, and of 12."""
    folder = tmp_path_factory.mktemp("stopped")
    before, os.environ["ACCELERATE_USE_CPU"] = os.environ.get("ACCELERATE_USE_CPU"), "true"
    assert give("encoder", world, folder / "encoder", steps=6) == 0
    assert give("encoder", world, folder / "encoder-whole") == 0
    if before is None:
        del os.environ["ACCELERATE_USE_CPU"]
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize(
    "damage", [empty, cut, flip_a_bit, pickled, of_another_version, of_another_training]
)
def test_after_a_damaged_checkpoint_the_one_before_is_taken(
    damage, world, stopped, tmp_path, capsys
):
    run = tmp_path / "run"
    shutil.copytree(stopped["encoder"], run)
    damage(run / "checkpoints" / "step-00000006.safetensors")
    assert give("encoder", world, run) == 0
    said = capsys.readouterr().err
    assert "step-00000006.safetensors cannot be used: " in said
    assert "starting at step 3" in said
    assert kill.same("encoder", stopped["encoder-whole"], run)


def test_without_a_whole_checkpoint_the_reasons_are_told(world, stopped, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(stopped["encoder"], run)
    for file in (run / "checkpoints").iterdir():
        cut(file)
    before = (run / "metrics.jsonl").read_bytes()
    assert give("encoder", world, run) == 2
    assert "has no checkpoint to go on from" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_checkpoint_of_any_bytes_is_read_or_refused(tmp_path):
    """Also with values that are no values; nothing is executed."""
    folder = RunFolder(tmp_path)
    folder.save(1, {"a/b": torch.arange(6.0)}, {"step": 1, "best": 0.0, "scores": {}})
    [file] = folder.saved()
    whole, rng = file.read_bytes(), torch.Generator().manual_seed(0)
    for _ in range(300):
        data = bytearray(whole)
        for place in torch.randint(len(data), (3,), generator=rng).tolist():
            data[place] = int(torch.randint(256, (), generator=rng))
        file.write_bytes(data)
        if bytes(data) != whole:
            with pytest.raises(ValueError, match="it "):
                read_checkpoint(file)
    os.remove(file)
    os.mkfifo(file)
    with pytest.raises(ValueError, match="not a file"):
        read_checkpoint(file)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
@pytest.mark.parametrize("content", [b"[1, 2]\n[3]\n", b"\x00\xff\xfe\n\n", b"[" * 100_000, None])
def test_a_foreign_file_in_the_run_folder_is_refused_and_kept(name, content, world, stopped,
                                                              tmp_path, capsys):  # fmt: skip
    run = tmp_path / "run"
    shutil.copytree(stopped["encoder"], run)
    (run / name).unlink()
    if content is None:
        (run / name).mkdir()
    else:
        (run / name).write_bytes(content + b"\n1\n")
    assert give("encoder", world, run) == 2
    assert name in capsys.readouterr().err
    assert content is None or (run / name).read_bytes() == content + b"\n1\n"


def test_a_run_of_an_older_version_is_refused(world, tmp_path, capsys):
    old = tmp_path / "run" / "checkpoints" / "step-00000003.pt"
    old.parent.mkdir(parents=True)
    torch.save({"step": 3}, old)
    assert give("encoder", world, tmp_path / "run") == 2
    assert "older version" in capsys.readouterr().err and old.exists()


# ------------------------------------------------------------------------------ options


def test_no_number_may_be_nan_infinite_or_out_of_its_range(tmp_path):
    smallest = {
        EncoderTrainConfig: {"data": "faces", "output": tmp_path / "run"},
        StyleGan2Options: {"data": "faces", "output": tmp_path / "run"},
        DcganOptions: {"data": "faces", "output": tmp_path / "run"},
        SuperresOptions: {"data": ("faces",), "output": tmp_path / "run"},
    }
    any_number = {"seed", "ada_target"}  # where -1 means something
    for options, given in smallest.items():
        config = options(**given)
        for field in dataclasses.fields(options):
            value = getattr(config, field.name)
            wrong = {int: [-1], float: [float("nan"), float("inf"), -1.0]}.get(type(value), [])
            for number in wrong[: -1 if field.name in any_number else None]:
                with pytest.raises(ValueError, match=field.name.replace("_", ".")):
                    options(**given | {field.name: number})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("training", "option", "value", "sentence"),
    [
        ("encoder", "batch_size", 0, "--batch-size is 0; give a number of 1 or more."),
        ("encoder", "lr", "nan", "--lr is nan; give a finite number."),
        ("encoder", "loss.mse", "inf", "mse"),
        ("encoder", "backbone", "nowhere", "timm knows no network 'nowhere'"),
        ("encoder", "backbone", "vit_tiny_patch16_224", "gives no feature maps"),
        ("encoder", "backbone", "naflexvit_base_patch16_gap", ""),
        ("encoder", "width", 30, "must be a multiple of 4"),
        ("generator", "resolution", -16, "--resolution is -16"),
        ("generator", "resolution", 48, "power of two"),
        ("generator", "ema_images", 0, "--ema-images is 0"),
        ("generator", "batch_size", 0, "--batch-size is 0"),
        ("generator", "eval_samples", 0, "--eval-samples is 0"),
        ("generator", "r1_gamma", "nan", "--r1-gamma is nan"),
        ("generator", "eval_space", "nowhere", "--eval-space nowhere is unknown"),
    ],
)
def test_wrong_options_end_before_anything_is_loaded_or_written(
    training, option, value, sentence, tmp_path, capsys
):
    assert give(training, tmp_path / "nowhere", tmp_path / "run", **{option: value}) == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_too_few_held_out_pictures_are_refused_before_the_training(world, tmp_path, capsys):
    few = tmp_path / "few"
    few.mkdir()
    for i in range(3):
        shutil.copy(world / "faces" / f"{i}.png", few)
    assert give("generator", world, tmp_path / "run", eval_data=few) == 2
    assert "3 held-out pictures" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------- several processes


def in_this_process(training: str, argv: list[str]) -> int:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    return kill.MAINS[training](argv)


@BOTH
def test_two_processes_resume_exactly(training, world, tmp_path):
    halves = {"encoder": {"steps": 6}, "generator": {"images": 48}}[training]
    whole, halved = (
        kill.arguments(training, world, tmp_path / name, **{k: 2 * v for k, v in halves.items()})
        for name in ("whole", "halved")
    )
    first = kill.arguments(training, world, tmp_path / "halved", **halves)
    for argv in (whole, first, halved):
        assert in_processes(in_this_process, training, argv, count=2) == [0, 0]
    assert metrics(tmp_path / "whole")[-1]["step"] == 12
    assert kill.same(training, tmp_path / "whole", tmp_path / "halved")


def test_a_dead_process_ends_the_other_with_a_sentence(world, tmp_path):
    argv = kill.arguments("encoder", world, tmp_path / "run", steps=100_000)
    launched = subprocess.Popen(
        [*LAUNCH, str(ROOT / "train_encoder.py"), *argv],
        env=environment(), cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        first, second = (process_of_rank(rank, launched.pid) for rank in (0, 1))
        launched.send_signal(signal.SIGSTOP)  # it ends the other one, too, and may be the first to
        os.kill(second, signal.SIGKILL)
        killed = time.monotonic()
        while not ended(first) and time.monotonic() - killed < 60:
            time.sleep(0.1)
        assert time.monotonic() - killed < 60
        launched.send_signal(signal.SIGCONT)
        _, said = launched.communicate(timeout=60)
    finally:
        launched.kill()
    assert "Another process of this training has ended, so this one ends too" in said


def ended(process: int) -> bool:
    """Of a child that nobody has waited for yet."""
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"


def process_of_rank(rank: int, parent: int) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    wanted = f"RANK={rank}".encode()
    return next(
        int(child) for child in children
        if wanted in Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
    )  # fmt: skip
