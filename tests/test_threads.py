"""How many threads a run uses, and that starting one loads only what it needs.

pytest tests/test_threads.py
"""

import os
import subprocess
import sys

import pytest
import torch

from generators import threads
from generators.loop import RunConfig, make_accelerator
from generators.threads import SMALL, use_threads


@pytest.fixture(autouse=True)
def as_before():
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


def test_small_work_gets_one_thread_and_large_work_all(monkeypatch) -> None:
    monkeypatch.setattr(threads, "available", lambda: 3)
    assert use_threads(0, pixels=SMALL) == torch.get_num_threads() == 1
    assert use_threads(0, pixels=SMALL + 1) == torch.get_num_threads() == 3


def test_an_asked_number_is_taken(monkeypatch) -> None:
    assert use_threads(2, pixels=1) == torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="--threads is -1"):
        use_threads(-1, pixels=1)


NAME = "OMP_WAIT_POLICY"


def run(code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "KMP_"))}
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, text=True,
                          capture_output=True, check=True)  # fmt: skip
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["encoder", "generators"])
def test_waiting_threads_sleep_unless_told_otherwise(package) -> None:
    code = f"import sys, os, {package} as p; print('torch' in sys.modules, os.environ[{NAME!r}])"
    assert run(code) == "False passive", "it has to be set before torch is loaded"
    assert run(code, OMP_WAIT_POLICY="active") == "False active"


def test_the_options_of_infer_load_only_what_they_need() -> None:
    heavy = "torch._dynamo sympy torchvision timm lpips facenet_pytorch datasets matplotlib "
    heavy += "tensorboard onnx onnxruntime openvino av fastapi"
    code = f"import encoder.infer, sys; print([m for m in {heavy.split()} if m in sys.modules])"
    assert run(code) == "[]"


def test_a_training_takes_the_asked_number(tmp_path) -> None:
    config = RunConfig(output=tmp_path, batch_size=1, tracker="none", threads=2)
    make_accelerator(config, cpu=True)
    assert torch.get_num_threads() == 2
    with pytest.raises(ValueError, match="threads"):
        RunConfig(output=tmp_path, batch_size=1, threads=-1)
