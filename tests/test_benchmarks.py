"""The benchmarks of speed on tiny networks: rows for what was asked, figures that agree.

pytest tests/test_benchmarks.py
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import examples_sheet
import generator
import inversion
import latency
import pytest
import quality
import superres
import torch
import training_speed
import translation
from processes import code_of

from encoder.model import Encoder, EncoderConfig
from generators.checkpoint import save
from generators.images import open_image

EXAMPLES = Path(__file__).parent.parent / "examples"
CPU = torch.device("cpu")
SMALL = ("--channel-base", "128", "--channel-max", "8", "--threads", "1", "--repeats", "3")


@pytest.fixture
def networks(tmp_path, face, anime) -> list[str]:
    """The options that name three tiny networks of 16 x 16, and a small photo of a face."""
    torch.manual_seed(5)
    shape = EncoderConfig("mobilenetv3_small_050", 16, num_ws=6, w_dim=8, width=16, depth=1)
    modules = {"face-generator": face, "anime-generator": anime, "encoder": Encoder(shape)}
    options = []
    for option, module in modules.items():
        file = tmp_path / f"{option}.safetensors"
        save(file, module)
        options += [f"--{option}", str(file)]
    (tmp_path / "photos").mkdir()
    open_image(EXAMPLES / "astronaut.jpg").resize((192, 192)).save(tmp_path / "photos" / "a.png")
    return [*options, "--pictures", str(tmp_path / "photos")]


def run(script, arguments, tmp_path, capsys) -> dict:
    """main() in this process -> the report, printed and written alike."""
    file = tmp_path / "out" / "report.json"
    assert script.main([*arguments, "--output", str(file)]) == 0
    written = json.loads(file.read_text())
    assert written == json.loads(capsys.readouterr().out.splitlines()[-1])
    assert str(tmp_path) not in file.read_text()
    return written


def check(row: dict, images: int, imports: float) -> None:
    assert "reason" not in row
    assert 0 < row["p50_ms"] <= row["p95_ms"]
    rate = 1000 * images / row["p50_ms"]
    assert row["images_per_second"] == pytest.approx(rate, rel=0.01, abs=0.006)
    assert imports < row["peak_memory_mb"] < imports + 2000  # MB


# --------------------------------------------------------------------------------- family


def test_a_face_generator_brings_its_family_along():
    for face, size in (({}, 128), ({"face_generator": "face64"}, 64)):
        config = inversion.Config(data="faces", **face)
        found = config.face_generator, config.encoder, config.curvature, config.anime_generator
        assert found == tuple(f"{kind}{size}" for kind in ("face", "encoder", "curvature", "anime"))
        tunes = translation.fine_tunes(translation.Config(data="faces", anime_data="", **face))
        assert [tune.name for tune in tunes] == [f"anime{size}"]
    own = inversion.Config(data="faces", face_generator="face64", encoder="mine.safetensors")
    assert (own.encoder, own.curvature) == ("mine.safetensors", "curvature64")


# ------------------------------------------------------------------------------ stopwatch


def test_the_stopwatch_leaves_the_warm_up_out():
    calls = []
    assert len(common.stopwatch(lambda: calls.append(1), 5, CPU, warm_up=2)) == 5
    assert len(calls) == 7


def test_percentiles_are_milliseconds():
    assert common.percentiles([0.003, 0.001, 0.002]) == {"p50_ms": 2.0, "p95_ms": 2.9}
    assert common.percentiles([0.004]) == {"p50_ms": 4.0, "p95_ms": 4.0}


def test_a_process_has_a_peak_of_its_own():
    ballast = torch.ones(2**27)  # 512 MB that only this process holds
    [peak] = common.in_processes(common.peak_memory_mb)
    assert 50 < peak < common.peak_memory_mb() - 400 and len(ballast)


# -------------------------------------------------------------------------------- latency


def test_latency_measures_every_stage(networks, tmp_path, capsys):
    asked = ("--resolutions", "16", "--batch-sizes", "2", "--variants", "channels_last")
    made = run(latency, [*networks, *SMALL, *asked], tmp_path, capsys)
    rows = {row["stage"]: row for row in made["rows"]}
    assert list(rows) == ["align", *latency.STAGES] and len(made["rows"]) == 6
    for stage, row in rows.items():
        check(row, 1 if stage == "align" else 2, made["memory_of_imports_mb"])


@pytest.fixture
def config(networks, monkeypatch) -> latency.Config:
    """Rows are measured in this process."""
    monkeypatch.setattr(latency, "in_processes", lambda f, *arguments: [f(*arguments)])
    names = [option[2:].replace("-", "_") for option in networks[::2]]
    values: dict[str, Any] = dict(zip(names, networks[1::2], strict=True))
    values["pictures"] = Path(values["pictures"])
    return latency.Config(threads=1, repeats=2, channel_base=128, channel_max=8, **values)


def test_backends_take_turns(config, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the extra [onnx] is not installed")
    monkeypatch.setenv("GAN_INVERT_CACHE", str(tmp_path))
    asked = replace(config, backends=("torch", "onnxruntime"), busy=1)
    for stage in ("align", "both"):
        rows = latency.rows_of_backends(asked, stage, 16, 2)
        assert [row["variant"] for row in rows] == ["torch", "onnxruntime"]
        for row in rows:
            assert row["stage"] == stage and row["busy"] == row["threads"] == 1
            assert 0 < row["cpu_ms"] and 0 < row["p50_ms"] <= row["p95_ms"]


def test_styles_take_turns_with_as_many_passes(config):
    rows = latency.measure_styles(replace(config, styles=2), "torch", 16, 2)
    assert [row["stage"] for row in rows] == ["1 styles", "1 passes", "2 styles", "2 passes"]
    for styles, passes in zip(rows[::2], rows[1::2], strict=True):
        assert passes["of_passes"] == 1
        assert styles["of_passes"] == round(styles["p50_ms"] / passes["p50_ms"], 3)


def test_other_resolutions_have_random_weights(config):
    before = common.peak_memory_mb()  # of this process, whatever tests it has seen
    for variant in ("contiguous", "channels_last"):
        row = latency.row_of(config, latency.Job("both", 32, 2, variant))
        assert row["weights"] == "random weights" and row["resolution"] == 32
        check(row, 2, before - 1)


def test_a_compiled_row_says_its_difference_or_why_it_has_no_times(config, monkeypatch):
    job = latency.Job("both", 16, 1, "compiled")
    offsets: list[float] = []  # of the compiled network's calls, in turn

    def compile(draw, fullgraph):
        assert fullgraph
        return lambda *x, **how: {k: y + offsets.pop(0) for k, y in draw(*x, **how).items()}

    monkeypatch.setattr(torch, "compile", compile)
    offsets += [0.0] * 100
    row = latency.row_of(config, job)
    assert row["difference"] == 0 and row["p50_ms"] > 0
    offsets[:] = [0.0, 0.0, 0.25, 0.25]  # the second call is wrong
    row = latency.row_of(config, job)
    assert "second call is 0.25 off" in row["reason"] and "p50_ms" not in row
    offsets[:] = [float("nan")] * 4
    assert "second call is nan off" in latency.row_of(config, job)["reason"]

    def no_compiler(draw, fullgraph):
        def fail(*_, **__):
            raise RuntimeError("no /usr/bin/g++ here\nand more")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    row = latency.row_of(config, job)
    assert row["reason"] == "does not compile: RuntimeError, no g++ here" and "p50_ms" not in row


def test_users_errors_are_a_sentence_and_exit_code_2(tmp_path, capsys):
    for script, options, sentence in (
        (latency, ["--batch-sizes", "0"], "at least 1"),
        (latency, ["--resolutions", "8"], "16 or more"),
        (latency, ["--device", "bogus"], "bogus cannot be used here"),
        (latency, ["--repeats", "0"], "--repeats is 0"),
        (latency, ["--output", str(tmp_path)], "is a folder"),
        (quality, ["face64", "--data", str(tmp_path / "none")], "check the path"),
        (quality, ["face64", "--data", "x", "--encoder", "encoder64"], "give these, too"),
        (superres, ["--data", f"{tmp_path}/none@x"], "needs its resolution"),
        (examples_sheet, [str(tmp_path / "none"), str(tmp_path / "a.png")], "check the path"),
        (generator, ["--reference", str(tmp_path)], "no training/networks.py"),
        (training_speed, ["--backbones", "resnet19"], "timm knows no resnet19"),
        (training_speed, ["--face-generator", "nowhere"], "nowhere"),
    ):
        assert code_of(script.main, options) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "columns"), [(["--across", "2"], 6), (["--blocks"], 7), (["--styles", "paint"], 3)]
)
def test_the_sheet_of_examples_has_a_row_of_each_face(options, columns, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("generated_1.png", "generated_2.png"):
        (photos / name).write_bytes((EXAMPLES / name).read_bytes())
    target = tmp_path / "sheet.png"
    assert examples_sheet.main([str(photos), str(target), "--size", "64", *options]) == 0
    with open_image(target) as sheet:
        rows = 1 if "--across" in options else 2
        assert sheet.width == 64 * columns and 64 * rows < sheet.height < 64 * (rows + 1)
    assert examples_sheet.main([str(photos), str(target), *options]) == 2  # --overwrite
    alone = ["--alone", "2", "--across", "2", "--size", "64", "--overwrite"]
    assert examples_sheet.main([str(photos), str(target), *alone]) == 0
    with open_image(target) as sheet:
        assert sheet.size == (128, 64)


# ------------------------------------------------------------------------------- training


def test_training_measures_steps_of_one_and_two_processes(networks, tmp_path, capsys):
    arguments = [*networks[:2], *SMALL, "--backbones", "mobilenetv3_small_050", "--batch-size", "4"]
    arguments += ["--resolutions", "32", "--precisions", "fp32", "--processes", "1", "2"]
    made = run(training_speed, arguments, tmp_path, capsys)
    asked = [(row["resolution"], row["processes"], row["generator"]) for row in made["rows"]]
    assert asked == [(32, n, "random weights") for n in (1, 2)]
    for row in made["rows"]:
        check(row, 4 * row["processes"], made["memory_of_imports_mb"])
        assert row["threads"] == 1 and row["loss"] > 0


def test_the_generator_at_its_own_resolution_is_the_trained_one(networks, tmp_path):
    config = training_speed.Config(face_generator=networks[1])
    assert training_speed.generator_file(config, 16, tmp_path) == (networks[1], "trained")


def test_what_a_device_cannot_do_is_said_in_the_row(tmp_path):
    job = training_speed.Job("resnet18d", 64, "fp16", 1)
    row = training_speed.row_of(training_speed.Config(), job, tmp_path)
    assert row["reason"] == "fp16 training needs a GPU" and "p50_ms" not in row
