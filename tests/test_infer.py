"""infer.py and the Translator on tiny random networks: kinds of files, batches, names, failures.

pytest tests/test_infer.py
"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import encoded, photo
from PIL import Image
from safetensors.torch import load_file

from encoder import infer
from encoder.align import Aligner
from encoder.model import Encoder, EncoderConfig
from encoder.options import InferConfig
from encoder.pictures import load
from encoder.pipeline import Translator
from generators.blocks import SwappedSynthesis
from generators.checkpoint import BUNDLED, save
from generators.curvature import Curvature
from generators.disk import write_atomically
from generators.images import resize
from generators.stylegan2 import GeneratorConfig
from generators.superres import SuperResolution, SuperResolutionConfig, upscale

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# One thread, and the project's own modules; where there is a GPU, it is not looked at:
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}


def make_encoder(**changes) -> Encoder:
    """Random weights, offsets from the mean large enough to be seen."""
    torch.manual_seed(5)
    config = {"resolution": 16, "num_ws": 6, "w_dim": 8, "width": 16, "depth": 1} | changes
    encoder = Encoder(EncoderConfig(**config))
    with torch.no_grad():
        encoder.to_offsets.mul_(20)
    return encoder.eval()


@pytest.fixture
def encoder() -> Encoder:
    return make_encoder()


@pytest.fixture
def superres() -> SuperResolution:
    """Random weights that are seen: its result is not bicubic."""
    network = SuperResolution(SuperResolutionConfig(width=4, blocks=1))
    torch.nn.init.normal_(network.tail.weight, std=0.5)
    return network.eval()


@pytest.fixture
def models(tmp_path, face, anime, encoder, superres) -> list[str]:
    """The options that name four tiny networks."""
    options = ["--swap-resolution", "8", "--device", "cpu", "--no-align"]
    for option, module in (
        ("face-generator", face),
        ("anime-generator", anime),
        ("encoder", encoder),
        ("superres", superres),
    ):
        file = tmp_path / "models" / f"{option}.safetensors"
        save(file, module)
        options += [f"--{option}", str(file)]
    return options


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven pictures of several shapes, some in sub-folders."""
    folder = tmp_path / "photos"
    (folder / "sub" / "deep").mkdir(parents=True)
    for i, name in enumerate(["a", "b", "c", "sub/a", "sub/d", "sub/deep/a", "sub/deep/e"]):
        photo(i, 20 + 3 * i, 30 - 2 * i).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def run(source, out, *options) -> int:
    return infer.main(["--input", str(source), "--output", str(out), *options])


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def manifest(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def read(file: Path) -> bytes:
    return file.read_bytes()


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


# ------------------------------------------------------------------------- files in and out


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_as_many_results_as_pictures_in_the_same_folders(models, photos, out, batch_size):
    assert run(photos, out, *models, "--batch-size", str(batch_size)) == 0
    names = {p.relative_to(photos).as_posix() for p in photos.rglob("*.png")}
    assert files(out) == names | {"manifest.jsonl"}
    lines = manifest(out)
    assert [line["input"] for line in lines] == [str(photos / name) for name in sorted(names)]
    for line in lines:
        assert line["status"] == "ok" and line["faces"] == [] and "reason" not in line
        assert line["outputs"] == [str(Path(line["input"]).relative_to(photos))]
        assert set(line["timings_ms"]) == {"read", "align", "encode", "synthesise", "write"}
        assert all(value >= 0 for value in line["timings_ms"].values())


def test_a_result_does_not_depend_on_the_batch(models, photos, tmp_path):
    outs = [tmp_path / f"out{size}" for size in (1, 3, 64)]
    for out, size in zip(outs, ("1", "3", "64"), strict=True):
        assert run(photos, out, *models, "--batch-size", size, "--save", "anime,latents") == 0
    for name in files(outs[0]) - {"manifest.jsonl"}:
        for other in outs[1:]:
            if name.endswith(".png"):
                assert np.abs(pixels(outs[0] / name) - pixels(other / name)).max() <= 1
            else:
                ws, same = (load_file(folder / name)["ws"] for folder in (outs[0], other))
                torch.testing.assert_close(ws, same, rtol=0, atol=1e-5)


def test_every_artefact(models, photos, out, face, encoder):
    every = ["anime", "aligned", "reconstruction", "latents", "grid"]
    assert run(photos / "a.png", out, *models, "--save", ",".join(every), "--size", "24") == 0
    pictures = {"a.png", "a_aligned.png", "a_reconstruction.png", "a_grid.png"}
    assert files(out) == pictures | {"a_latents.safetensors", "manifest.jsonl"}
    assert set(manifest(out)[0]["outputs"]) == files(out) - {"manifest.jsonl"}
    strip = np.concatenate(
        [pixels(out / f"a{end}.png") for end in ("_aligned", "_reconstruction", "")], axis=1
    )
    assert strip.shape == (24, 72, 3) and strip.std() > 1
    np.testing.assert_array_equal(pixels(out / "a_grid.png"), strip)
    assert load_file(out / "a_latents.safetensors")["ws"].shape == (6, 8)


def test_pictures_of_the_generators_own_size_by_default(models, photos, out, anime, encoder):
    assert run(photos / "a.png", out, *models, "--save", "anime,aligned") == 0
    assert pixels(out / "a.png").shape == pixels(out / "a_aligned.png").shape == (16, 16, 3)


@pytest.mark.parametrize("size", [9, 16, 32, 50, 64])
def test_size_enlarges_by_super_resolution(models, photos, tmp_path, superres, size):
    save_all = ["--save", "anime,reconstruction,aligned,grid,latents"]
    own, large = tmp_path / "own", tmp_path / "large"
    assert run(photos / "a.png", own, *models, *save_all) == 0
    assert run(photos / "a.png", large, *models, *save_all, "--size", str(size)) == 0
    parts = ["a_aligned.png", "a_reconstruction.png", "a.png"]
    for name in parts:
        small = torch.from_numpy(pixels(own / name)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            same = resize(small, size) if name == parts[0] else upscale(superres, small, size)
        same = ((same[0].permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).numpy()
        assert np.abs(pixels(large / name) - same).mean() < 1  # `own` has been rounded to 8 bits
    strip = np.concatenate([pixels(large / name) for name in parts], axis=1)
    np.testing.assert_array_equal(pixels(large / "a_grid.png"), strip)
    latents = [load_file(folder / "a_latents.safetensors")["ws"] for folder in (own, large)]
    assert torch.equal(*latents)


def test_bicubic_needs_no_weights(models, photos, tmp_path):
    outs = [tmp_path / name for name in ("superres", "bicubic", "own")]
    assert run(photos / "a.png", outs[0], *models, "--size", "64") == 0
    assert run(photos / "a.png", outs[1], *models, "--size", "64", "--superres", "bicubic") == 0
    assert run(photos / "a.png", outs[2], *models) == 0
    pictures = [pixels(folder / "a.png") for folder in outs]
    own = torch.from_numpy(pictures[2]).permute(2, 0, 1).float()
    plain = resize(own, 64).permute(1, 2, 0).numpy().clip(0, 255)
    assert np.abs(pictures[1] - plain).max() <= 2
    assert np.abs(pictures[0] - pictures[1]).mean() > 2


def test_absent_weights_stop_only_those_who_enlarge(
    models, photos, tmp_path, out, capsys, monkeypatch
):
    absent = tmp_path / "superres64.safetensors"
    monkeypatch.setitem(BUNDLED, "superres64", absent)
    options = [*models, "--superres", "superres64"]
    assert run(photos, out, *options, "--size", "64") == 2
    error = capsys.readouterr().err
    assert str(absent) in error and "--superres bicubic" in error and not out.exists()
    assert run(photos, out, *options) == 0


KINDS = {
    "cmyk.jpg": encoded(photo(1).convert("CMYK"), "JPEG"),
    "sixteen.png": encoded(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
    "palette.png": encoded(photo(2).convert("P"), "PNG"),
    "alpha.png": encoded(photo(3).convert("RGBA"), "PNG"),
    "still.gif": encoded(photo(4), "GIF"),
    "animated.webp": encoded(photo(4), "WEBP", save_all=True, append_images=[photo(5)]),
    "one.png": encoded(photo(6, 1, 1), "PNG"),
    "thin.png": encoded(photo(7, 300, 2), "PNG"),
    "large.jpg": encoded(photo(8, 3000, 2000), "JPEG"),
}
BROKEN = {
    "zero.jpg": (b"", "empty"),
    "text.jpg": (b"this is no picture", "not a picture"),
    "cut.jpg": (encoded(photo(9, 64, 64), "JPEG")[:900], "damaged"),
    "cut.png": (encoded(photo(9, 64, 64), "PNG")[:900], "damaged"),
}


def test_every_kind_of_file_is_done_or_named(models, tmp_path, out, capsys):
    folder = tmp_path / "kinds"
    folder.mkdir()
    for name, data in KINDS.items():
        (folder / name).write_bytes(data)
    for name, (data, _) in BROKEN.items():
        (folder / name).write_bytes(data)
    assert run(folder, out, *models, "--batch-size", "3") == 1
    lines = {Path(line["input"]).name: line for line in manifest(out)}
    assert lines.keys() == KINDS.keys() | BROKEN.keys()
    for name in KINDS:
        assert lines[name]["status"] == "ok"
        assert pixels(out / lines[name]["outputs"][0]).shape == (16, 16, 3)
    printed = capsys.readouterr()
    for name, (_, reason) in BROKEN.items():
        assert lines[name]["status"] == "failed" and lines[name]["outputs"] == []
        assert name in lines[name]["reason"] and reason in lines[name]["reason"]
        assert name in printed.err
    counts = f"{len(KINDS)} of {len(lines)} pictures translated"
    assert counts in printed.err and printed.out == ""
    assert len(files(out)) == len(KINDS) + 1


def test_too_many_pixels_are_refused_by_name(models, photos, out, monkeypatch):
    monkeypatch.setattr("generators.images.MAX_PIXELS", 1000)  # the others have fewer
    monkeypatch.setattr("generators.images.Image.MAX_IMAGE_PIXELS", None)
    photo(0, 40, 40).save(photos / "huge.png")
    assert run(photos, out, *models) == 1
    failed = [line for line in manifest(out) if line["status"] == "failed"]
    assert [Path(line["input"]).name for line in failed] == ["huge.png"]
    assert "pixels" in failed[0]["reason"]


def test_equal_stems_keep_their_whole_names(models, tmp_path, out):
    folder = tmp_path / "names"
    folder.mkdir()
    names = ["a.jpg", "a.png", "a.jpg.png", "b.png", "c.png", "c_grid.png", "c_face2.png", "C.bmp"]
    for name in names:
        photo().save(folder / name)
    assert run(folder, out, *models, "--save", "anime,grid") == 0
    outputs = [name for line in manifest(out) for name in line["outputs"]]
    assert len(set(outputs)) == 2 * len(names) and files(out) == {*outputs, "manifest.jsonl"}
    assert {"a.jpg.png", "a.png.png", "a.jpg.png.png", "b.png", "c_grid.png.png"} <= set(outputs)


def test_globs_and_results_below_the_input(models, photos):
    assert run(f"{photos}/**/a.png", photos / "out", *models) == 0
    assert files(photos / "out") == {"a.png", "sub/a.png", "sub/deep/a.png", "manifest.jsonl"}
    assert run(photos, photos / "out", *models, "--overwrite") == 0  # old results are no inputs
    assert len(manifest(photos / "out")) == 7


# --------------------------------------------------------------------------------- refusals


def test_results_are_replaced_only_when_told(models, photos, out, capsys):
    (out / "sub").mkdir(parents=True)
    (out / "sub" / "d.png").write_text("mine")
    assert run(photos, out, *models) == 2
    assert str(out / "sub" / "d.png") in capsys.readouterr().err
    assert files(out) == {"sub/d.png"} and (out / "sub" / "d.png").read_text() == "mine"
    assert run(photos, out, *models, "--overwrite") == 0
    assert pixels(out / "sub" / "d.png").shape == (16, 16, 3)


def test_a_later_run_adds_to_the_manifest(models, photos, out):
    assert run(photos / "a.png", out, *models) == 0
    assert run(photos / "b.png", out, *models) == 0
    assert run(photos / "a.png", out, *models, "--overwrite") == 0
    assert [Path(line["input"]).name for line in manifest(out)] == ["b.png", "a.png"]


def test_an_input_is_never_replaced(models, photos, capsys):
    before = pixels(photos / "a.png")
    assert run(photos, photos, *models, "--overwrite") == 2
    assert "is an input" in capsys.readouterr().err
    np.testing.assert_array_equal(pixels(photos / "a.png"), before)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["--input", "nowhere"], "no file or folder"),
        (["--encoder", "nowhere"], "no such file"),
        (["--swap-resolution", "7"], "no block of resolution 7"),
        (["--device", "cuda:7"], "device cuda:7 cannot be used"),
        (["--device", "toaster"], "device toaster cannot be used"),
        (["--device", "meta"], "device meta cannot be used"),
        (["--size", "32", "--superres", "nowhere"], "no such file"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(models, photos, out, capsys, changes, sentence):
    assert run(photos, out, *models, *changes) == 2
    error = capsys.readouterr().err
    assert sentence in error and "Traceback" not in error
    assert not out.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--save", "anime,mesh"],
        ["--batch-size", "0"],
        ["--size", "0"],
        ["--size", "1000000"],
        ["--faces", "two"],
        ["--refine-steps", "-1"],
        ["--truncation", "nan"],
    ],
)
def test_wrong_options_are_refused(models, photos, out, capsys, options):
    with pytest.raises(SystemExit) as exit:
        run(photos, out, *models, *options)
    assert exit.value.code == 2 and options[0] in capsys.readouterr().err


def test_output_that_is_a_file(models, photos, out, capsys):
    out.write_text("a file")
    assert run(photos, out, *models) == 2
    assert "is not a folder" in capsys.readouterr().err and out.read_text() == "a file"


def test_a_file_where_a_folder_of_results_goes_is_seen_before_anything_is_written(
    models, photos, out, capsys
):
    out.mkdir()
    (out / "sub").write_text("in the way")
    assert run(photos, out, *models) == 2
    assert "is not a folder" in capsys.readouterr().err and files(out) == {"sub"}


def test_a_result_that_cannot_be_written_fails_alone(models, photos, out, capsys, monkeypatch):
    def full(path, write):
        if "sub" in path.parts:
            raise OSError(28, "No space left on device", str(path))
        write_atomically(path, write)

    monkeypatch.setattr("encoder.pictures.write_atomically", full)
    assert run(photos, out, *models) == 1
    assert [line["status"] for line in manifest(out)] == ["ok"] * 3 + ["failed"] * 4
    assert files(out) == {"a.png", "b.png", "c.png", "manifest.jsonl"}
    said = capsys.readouterr().err
    assert said.count("Cannot write the result of") == 4 and said.count("No space left") == 4
    monkeypatch.undo()
    assert run(photos, out, *models) == 0  # once there is room
    assert "3 of 7 pictures are finished already" in capsys.readouterr().err
    assert [line["status"] for line in manifest(out)] == ["ok"] * 7


def test_a_generator_of_nans_is_refused_before_anything_is_written(
    models, photos, out, tmp_path, anime, capsys
):
    with torch.no_grad():
        anime.synthesis.b16.torgb.bias.fill_(float("nan"))
    save(tmp_path / "nan.safetensors", anime)
    assert run(photos, out, *models, "--anime-generator", str(tmp_path / "nan.safetensors")) == 2
    assert "not finite" in capsys.readouterr().err and not out.exists()


def test_a_picture_of_nans_is_no_result(models, photos, out, capsys, monkeypatch):
    def damaged(self, ws, *how, **options):
        made = {name: images.clone() for name, images in draw(self, ws, *how, **options).items()}
        made["anime"][1] = float("nan")
        return made

    draw = Translator.drawings
    monkeypatch.setattr(Translator, "drawings", damaged)
    assert run(photos, out, *models) == 1
    said = capsys.readouterr().err
    assert "6 of 7 pictures translated" in said
    assert "b.png is not finite; try --dtype fp32" in said and not (out / "b.png").exists()


@pytest.mark.parametrize("kilobytes", [0, 2])
def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(
    models, photos, out, capsys, kilobytes
):
    options = [*models, "--size", "64"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, limits[1]))
    try:
        code = run(photos, out, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2 and files(out) == {"manifest.jsonl"}
    assert "File too large" in capsys.readouterr().err
    assert read(out / "manifest.jsonl").endswith(b"\n") == (kilobytes > 0)  # whole lines, or none
    assert run(photos, out, *options) == 0 and len(manifest(out)) == 7


# --------------------------------------------------------------------------- interruption


def test_an_interrupted_command_goes_on(models, photos, tmp_path, capsys, monkeypatch):
    """Ctrl-C at each moment in turn: between files of a picture, in the middle of one, after."""
    options = [*models, "--batch-size", "1", "--save", "anime,latents"]
    whole = tmp_path / "whole"
    assert run(photos, whole, *options) == 0
    for moment in (0, 1, 3, 13):
        calls = []

        def stop(path, write, calls=calls, moment=moment):
            calls.append(path)
            if len(calls) == moment + 1:
                write_atomically(path, interrupted if moment % 3 else write)
                raise KeyboardInterrupt
            write_atomically(path, write)

        out = tmp_path / f"cut{moment}"
        for module in ("encoder.pictures", "generators.latents"):
            monkeypatch.setattr(f"{module}.write_atomically", stop)
        assert run(photos, out, *options) == 130
        said = capsys.readouterr().err
        assert "Stopped by Ctrl-C" in said and "the same command goes on" in said
        assert not [name for name in files(out) if ".tmp" in name]
        monkeypatch.undo()
        assert run(photos, out, *options) == 0
        assert files(out) == files(whole)
        assert all(read(out / n) == read(whole / n) for n in files(out) - {"manifest.jsonl"})
        assert [line["status"] for line in manifest(out)] == ["ok"] * 7


def interrupted(path: Path) -> None:
    path.write_bytes(b"half")
    raise KeyboardInterrupt


def test_sigterm_ends_with_143_and_the_same_command_goes_on(models, photos, out):
    for i in range(30):
        photo(i).save(photos / f"more{i}.png")
    command = [sys.executable, str(ROOT / "infer.py"), "--input", str(photos), "--output", str(out)]
    with subprocess.Popen(
        [*command, *models, "--batch-size", "1"], env=ENV, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (out / "a.png").exists() and process.poll() is None:
            time.sleep(0.01)
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    assert "Stopped by SIGTERM" in said and "Traceback" not in said
    assert not [name for name in files(out) if name.startswith(".")]
    assert run(photos, out, *models, "--batch-size", "1") == 0
    assert len(files(out)) == 37 + 1 and len(manifest(out)) == 37


def test_half_a_line_of_a_killed_command_is_no_trouble(models, photos, out):
    assert run(photos / "a.png", out, *models) == 0
    with open(out / "manifest.jsonl", "a") as file:
        file.write('{"input": "half')
    assert run(photos, out, *models) == 0 and len(manifest(out)) == 7


def test_what_is_finished_is_not_done_again(models, photos, out, capsys):
    assert run(photos, out, *models) == 0
    times = {name: (out / name).stat().st_mtime_ns for name in files(out)}
    assert run(photos, out, *models) == 0
    assert "7 of 7 pictures are finished already" in capsys.readouterr().err
    assert times == {name: (out / name).stat().st_mtime_ns for name in files(out)}
    (out / "b.png").unlink()
    assert run(photos, out, *models) == 0 and (out / "b.png").exists()
    assert times["a.png"] == (out / "a.png").stat().st_mtime_ns


def test_results_of_other_options_are_not_taken_for_these(models, photos, out, capsys):
    assert run(photos, out, *models) == 0
    before = {name: read(out / name) for name in files(out)}
    assert run(photos, out, *models, "--truncation", "0.5") == 2
    assert "made with another truncation" in capsys.readouterr().err
    assert before == {name: read(out / name) for name in files(out)}
    assert run(photos, out, *models, "--save", "latents") == 0  # they replace nothing
    assert set(manifest(out)[0]["outputs"]) == {"a.png", "a_latents.safetensors"}
    assert run(photos, out, *models, "--truncation", "0.5", "--overwrite") == 0
    assert read(out / "a.png") != before["a.png"]


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"input": 1}', "[" * 100_000, "\xff"])
def test_a_foreign_manifest_is_left_alone(models, photos, out, capsys, text):
    out.mkdir()
    (out / "manifest.jsonl").write_bytes(text.encode("latin1") + b"\n")
    before = read(out / "manifest.jsonl")
    assert run(photos, out, *models) == 2
    assert "was not written by this program" in capsys.readouterr().err
    assert read(out / "manifest.jsonl") == before and files(out) == {"manifest.jsonl"}


def test_two_commands_at_once_share_a_folder(models, photos, out):
    """Each writes its own pictures and its own lines, and keeps the other's."""
    command = [sys.executable, str(ROOT / "infer.py"), "--output", str(out), *models]
    command += ["--batch-size", "1"]
    for i in range(12):
        photo(i).save(photos / f"x{i}.png")
        photo(i).save(photos / f"y{i}.png")
    running = [
        subprocess.Popen([*command, "--input", f"{photos}/{letter}*.png"], env=ENV)
        for letter in "xy"
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    assert {line["input"] for line in manifest(out)} == {
        str(photos / f"{letter}{i}.png") for letter in "xy" for i in range(12)
    }
    assert all(line["status"] == "ok" for line in manifest(out))
    assert len(manifest(out)) == 24 and len(files(out)) == 25


# ------------------------------------------------------------------------- awkward files


def test_nothing_is_passed_over_in_silence(models, photos, out, capsys):
    (photos / "nowhere.png").symlink_to(photos / "gone.png")
    (photos / "circle.png").symlink_to(photos / "circle.png")
    (photos / "sub" / "up").symlink_to(photos)  # followed once
    os.mkfifo(photos / "pipe.png")
    assert run(photos, out, *models) == 1
    said = capsys.readouterr().err
    assert "7 of 10 pictures translated" in said
    assert all(f"{name}.png" in said for name in ("nowhere", "circle", "pipe"))
    assert [line["status"] for line in manifest(out)].count("failed") == 3


def test_names_as_long_as_names_can_be(models, tmp_path, out):
    folder = tmp_path / "long"
    folder.mkdir()
    for name in ("a" * 251 + ".png", "b" * 246 + ".png", "é" * 125 + ".png", "a" * 251 + ".bmp"):
        photo().save(folder / name)
    assert run(folder, out, *models, "--save", "anime,latents,grid") == 0
    outputs = [name for line in manifest(out) for name in line["outputs"]]
    assert len(set(outputs)) == 12 and files(out) == {*outputs, "manifest.jsonl"}
    assert run(folder, out, *models, "--save", "anime,latents,grid") == 0


# ------------------------------------------------------------------------- faces, processes


def test_faces_are_aligned_and_pictures_without_are_reported(models, tmp_path, out):
    folder = tmp_path / "real"
    folder.mkdir()
    shutil.copy(EXAMPLES / "two_faces.jpg", folder)
    photo(0, 64, 64).save(folder / "noise.png")
    options = [*models, "--align", "--faces", "all", "--batch-size", "1", "--save", "anime,aligned"]
    assert run(folder, out, *options) == 1
    noise, two = manifest(out)
    assert noise["status"] == "failed" and "No face" in noise["reason"]
    names = ["two_faces.png", "two_faces_aligned.png", "two_faces_face2.png"]
    assert two["outputs"] == [*names, "two_faces_face2_aligned.png"]
    assert len(two["faces"]) == 2 and all(len(face["box"]) == 4 for face in two["faces"])
    assert np.abs(pixels(out / names[1]) - pixels(out / two["outputs"][3])).mean() > 5

    assert run(folder / "two_faces.jpg", out / "largest", *models, "--align") == 0
    assert files(out / "largest") == {"two_faces.png", "manifest.jsonl"}
    np.testing.assert_array_equal(pixels(out / "largest" / names[0]), pixels(out / names[0]))
    (out / "two_faces.png").unlink()
    (out / "two_faces_aligned.png").unlink()
    before = read(out / "two_faces_face2.png")
    assert run(folder / "two_faces.jpg", out, *options) == 0  # its own second face may be replaced
    assert (out / "two_faces.png").exists() and read(out / "two_faces_face2.png") == before


def test_a_second_face_replaces_no_other_file(models, tmp_path, out, capsys):
    out.mkdir()
    (out / "two_faces_face2.png").write_text("mine")
    options = [*models, "--align", "--faces", "all"]
    assert run(EXAMPLES / "two_faces.jpg", out, *options) == 1
    assert "two_faces_face2.png exists" in capsys.readouterr().err
    assert (out / "two_faces_face2.png").read_text() == "mine"
    assert files(out) == {"two_faces_face2.png", "manifest.jsonl"}


def test_two_processes_share_the_work(models, photos, out):
    (photos / "broken.jpg").write_bytes(b"")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [*launch, str(ROOT / "infer.py"), "--input", str(photos), "--output", str(out)]
    options = [option for option in models if option not in ("--device", "cpu")]
    done = subprocess.run(
        [*command, *options], env=ENV, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "by 2 process(es)" in done.stderr
    assert "7 of 8 pictures translated" in done.stderr and "broken.jpg" in done.stderr
    assert len(files(out)) == 7 + 1 and len(manifest(out)) == 8
    assert done.stderr.count("pictures translated") == 1
    assert [line["status"] for line in manifest(out)].count("ok") == 7


# ------------------------------------------------------------------------------- Translator


def test_translator_gives_float_pictures_on_the_cpu(face, anime, encoder):
    translator = Translator(face, anime, encoder, swap_resolution=8)
    crops = [photo(1, 16, 16), photo(2, 50, 40), photo(3, 7, 9)]
    result = translator(crops, reconstruction=True)
    assert (
        result.aligned.shape == result.anime.shape == result.reconstruction.shape == (3, 3, 16, 16)
    )
    assert result.ws.shape == (3, 6, 8)
    for images in (result.aligned, result.anime, result.reconstruction):
        assert images.dtype == torch.float32 and images.abs().max() <= 1
    expected = face.synthesis(encoder(result.aligned)).clamp(-1, 1)
    torch.testing.assert_close(result.reconstruction, expected, rtol=0, atol=1e-5)
    assert (result.anime - result.reconstruction).abs().mean() > 0.01
    alone = translator(crops[1:2])
    assert alone.reconstruction is None
    torch.testing.assert_close(alone.anime, result.anime[1:2], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least one"):
        translator([])


def test_refining_lowers_the_error(face, anime, encoder):
    crops = [photo(i, 16, 16) for i in range(3)]

    def errors(steps):
        translator = Translator(face, anime, encoder, swap_resolution=8, refine_steps=steps)
        result = translator(crops, reconstruction=True)
        return (result.reconstruction - result.aligned).square().mean(dim=(1, 2, 3))

    assert (errors(10) < errors(0)).all()


def test_drawings_are_refined_along_w_plus_as_it_is_unless_asked():
    """The metric's steps are closer to the photo, and their drawings worse (benchmarks/LOG.md)."""
    config = InferConfig(input="x", output=Path("y"), align=False, refine_steps=2,
                         backend="torch")  # fmt: skip
    asked = replace(config, curvature="curvature64")
    plain, metric = (load(c, torch.device("cpu")).curvature for c in (config, asked))
    assert plain is None and isinstance(metric, Curvature)
    assert Translator.bundled().curvature is None


def test_truncation_pulls_towards_the_average(face, anime, encoder):
    options = {"swap_resolution": 8}
    crops = [photo(1)]
    whole = Translator(face, anime, encoder, **options)(crops).ws
    half = Translator(face, anime, encoder, truncation=0.5, **options)(crops).ws
    torch.testing.assert_close(half, (whole + face.w_avg) / 2)


def test_the_style_limit_is_of_the_drawing_alone(face, anime, encoder):
    crops = [photo(i) for i in range(3)]
    free, narrow = (
        Translator(face, anime, encoder, swap_resolution=8, style_limit=limit)(crops, True)
        for limit in (math.inf, 0.1)
    )
    assert torch.equal(free.ws, narrow.ws)
    assert torch.equal(free.reconstruction, narrow.reconstruction)
    expected = SwappedSynthesis(face, anime, 8, style_limit=0.1)(narrow.ws).clamp(-1, 1)
    torch.testing.assert_close(narrow.anime, expected)
    assert (free.anime - narrow.anime).abs().max() > 0.05


def test_a_style_limit_of_nothing_is_one_sentence(models, photos, out, capsys):
    assert run(photos, out, *models, "--style-limit", "0") == 2
    assert "a number of deviations above 0, not 0" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_stays_close_and_leaves_the_networks_alone(face, anime, encoder, dtype):
    crops = [photo(i, 16, 16) for i in range(2)]
    exact = Translator(face, anime, encoder, swap_resolution=8)(crops)
    result = Translator(face, anime, encoder, swap_resolution=8, dtype=dtype)(crops)
    assert result.anime.dtype == result.ws.dtype == torch.float32
    assert (result.anime - exact.anime).abs().mean() < 0.05
    assert all(p.dtype == torch.float32 for p in [*face.parameters(), *encoder.parameters()])


def test_an_encoder_may_look_at_larger_crops_than_the_generator_draws(face, anime):
    translator = Translator(face, anime, make_encoder(resolution=32), swap_resolution=8)
    result = translator([photo(0, 40, 40)])
    assert result.aligned.shape == (1, 3, 32, 32) and result.anime.shape == (1, 3, 16, 16)


def test_enlarging_by_the_translator(face, anime, encoder, superres):
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    networks = (face, anime, encoder)
    options = {"swap_resolution": 8}
    plain = Translator(*networks, **options).enlarge(images, 40)
    assert torch.equal(plain, resize(images, 40).clamp(-1, 1))
    exact = Translator(*networks, superres=superres, **options).enlarge(images, 40)
    assert torch.equal(exact, upscale(superres, images, 40).clamp(-1, 1))
    half = Translator(*networks, superres=superres, dtype=torch.bfloat16, **options)
    result = half.enlarge(images, 40)
    assert result.dtype == torch.float32 and 0 < (result - exact).abs().mean() < 0.05
    assert all(p.dtype == torch.float32 for p in superres.parameters())


def test_networks_that_do_not_fit_are_refused(face, anime, encoder, generator_from_seed):
    with pytest.raises(ValueError, match="trained for it"):
        Translator(face, anime, make_encoder(num_ws=8), swap_resolution=8)
    other = generator_from_seed(3, GeneratorConfig(16, 8, 8, 2, widths=(8, 6, 5)))
    with pytest.raises(ValueError, match="differ"):
        Translator(face, other, encoder, swap_resolution=8)
    with pytest.raises(ValueError, match="no aligner"):
        Translator(face, anime, encoder, swap_resolution=8).faces(photo())


def test_faces_and_crops_of_a_real_picture(face, anime, encoder):
    translator = Translator(face, anime, encoder, swap_resolution=8, aligner=Aligner())
    picture = Image.open(EXAMPLES / "astronaut.jpg")
    (found,) = translator.faces(picture)
    assert translator.crop(picture, found).size == translator.crop(picture).size == (16, 16)
