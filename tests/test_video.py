"""Films through infer.py on tiny random networks: formats, times, sound, layouts, failures, Ctrl-C.

pytest tests/test_video.py
"""

import errno
import io
import json
import os
import signal
import struct
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from films import coloured, make_film, read_film
from pictures import photo
from PIL import Image
from safetensors.torch import load_file, save_file

from encoder import films, infer
from encoder.align import Aligner
from encoder.films import FilmWriter, Guarded, camera_address, is_film, orientation
from encoder.model import Encoder, EncoderConfig
from encoder.video import translate as video
from encoder.video.shots import Places
from encoder.video.trace import TraceWriter, read_trace
from encoder.video.track import Track
from generators.checkpoint import save
from generators.images import open_image

EXAMPLES = Path(__file__).parent.parent / "examples"
UNEVEN = (0.0, 0.04, 0.06, 0.3, 0.5)


@pytest.fixture
def models(tmp_path, face, anime) -> list[str]:
    """The options that name three tiny networks; aligned crops."""
    torch.manual_seed(5)
    encoder = Encoder(EncoderConfig(resolution=16, num_ws=6, w_dim=8, width=16, depth=1))
    with torch.no_grad():
        encoder.to_offsets.mul_(20)
    options = ["--swap-resolution", "8", "--device", "cpu", "--no-align", "--superres", "bicubic"]
    for option, module in {"face-generator": face, "anime-generator": anime,
                           "encoder": encoder.eval()}.items():  # fmt: skip
        file = tmp_path / "models" / f"{option}.safetensors"
        save(file, module)
        options += [f"--{option}", str(file)]
    return options


@pytest.fixture
def aligned(models) -> list[str]:
    """The same, with alignment: for films of faces."""
    return [option for option in models if option != "--no-align"]


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def run(source, out, *options) -> int:
    return infer.main(["--input", str(source), "--output", str(out), *options])


def manifest(out: Path) -> dict[str, dict]:
    lines = (out / "manifest.jsonl").read_text().splitlines()
    return {Path(line["input"]).name: line for line in map(json.loads, lines)}


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


# ------------------------------------------------------------------------- formats in


@pytest.mark.parametrize(
    ("name", "codec", "sound", "kept"),
    [
        ("a.mp4", "libx264", "aac", "copied"),
        ("a.webm", "libvpx", "libopus", "copied"),
        ("a.mov", "libx264", "pcm_s16le", "aac"),
        ("a.mkv", "libx264", "mp2", "aac"),
        ("a.gif", "gif", None, "none"),
    ],
)
def test_frames_keep_their_times_and_the_sound_stays(
    models, tmp_path, out, name, codec, sound, kept
):
    clip = make_film(tmp_path / name, UNEVEN, codec=codec, sound=sound, seconds=0.7)
    assert run(clip, out, *models) == 0
    assert files(out) == {"a.mp4", "manifest.jsonl"}
    times, frames, heard = read_film(out / "a.mp4")
    np.testing.assert_allclose(times, UNEVEN, atol=0.011 if codec == "gif" else 2e-3)
    assert all(frame.shape == (16, 16, 3) for frame in frames)
    assert heard == (0 if sound is None else pytest.approx(0.7, abs=0.08))
    line = manifest(out)[name]
    assert line["status"] == "ok" and line["sound"] == kept and line["outputs"] == ["a.mp4"]
    assert line["frames"] == len(UNEVEN) and line["faces"] == 1 and line["frames_per_second"] > 0


def test_sound_begins_when_the_pictures_do(models, tmp_path, out):
    """A film whose times begin at 5 s: both are moved by the same."""
    clip = make_film(tmp_path / "late.ts", [5 + t for t in UNEVEN], kind="mpegts")
    assert run(clip, out, *models) == 0
    times, _, _ = read_film(out / "late.mp4")
    np.testing.assert_allclose(times, UNEVEN, atol=2e-3)


@pytest.mark.parametrize(
    ("turned", "corner"), [(0, (0, 0)), (90, (1, 0)), (180, (1, 1)), (-90, (0, 1))]
)
def test_turned_films_are_shown_upright(models, tmp_path, out, turned, corner):
    clip = make_film(tmp_path / "t.mp4", turned=turned)
    assert run(clip, out, *models, "--layout", "side-by-side") == 0
    _, frames, _ = read_film(out / "t.mp4")
    width, height = (48, 64) if turned in (90, -90) else (64, 48)
    assert frames[0].shape == (height, width + height, 3)
    shown = frames[-1][:, :width].astype(int)
    at = shown[4 if corner[0] == 0 else -5, 4 if corner[1] == 0 else -5]
    assert at[0] > 180 and at[1] < 90  # the red mark


@pytest.mark.parametrize(("matrix", "how"), [(k, v) for k, v in films.UPRIGHT.items()])
def test_every_display_matrix(matrix, how):
    a, b, c, d = (x << 16 for x in matrix)
    data = struct.pack("=9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    frame = type("Frame", (), {"side_data": {"DISPLAYMATRIX": data}})()
    assert orientation(frame) == how
    # what the matrix says of a point right of the middle, and of one below it
    small = np.zeros((3, 3), np.uint8)
    for x, y in ((1, 0), (0, 1), (1, 1)):
        small[:] = 0
        small[1 + y, 1 + x] = 255
        turned = np.asarray(Image.fromarray(small).transpose(how))
        to = matrix[0] * x + matrix[2] * y, matrix[1] * x + matrix[3] * y
        assert turned[1 + to[1], 1 + to[0]] == 255
    assert orientation(type("Frame", (), {"side_data": {}})()) is None


def test_pixels_that_are_not_square(models, tmp_path, out):
    clip = make_film(tmp_path / "w.mp4", wide=Fraction(2, 1))
    assert run(clip, out, *models, "--layout", "in-place") == 0
    assert read_film(out / "w.mp4")[1][0].shape == (48, 128, 3)


def test_a_still_gif_is_a_picture_and_a_moving_one_a_film(models, tmp_path, out):
    folder = tmp_path / "in"
    folder.mkdir()
    photo(1).save(folder / "still.gif")
    make_film(folder / "film.gif", codec="gif")
    assert [is_film(folder / name) for name in ("still.gif", "film.gif")] == [False, True]
    assert run(folder, out, *models) == 0
    assert files(out) == {"still.png", "film.mp4", "manifest.jsonl"}


# ------------------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("layout", "size", "shape"),
    [
        ("drawing", None, (16, 16)),
        ("drawing", 33, (32, 32)),  # H.264 in 4:2:0 has even sides
        ("side-by-side", None, (48, 64 + 48)),
        ("side-by-side", 24, (24, 32 + 24)),
        ("in-place", None, (48, 64)),
        ("in-place", 24, (48, 64)),
    ],
)
def test_layouts(models, tmp_path, out, layout, size, shape):
    clip = make_film(tmp_path / "a.mp4")
    options = [] if size is None else ["--size", str(size)]
    assert run(clip, out, *models, "--layout", layout, *options) == 0
    _, frames, _ = read_film(out / "a.mp4")
    assert len(frames) == 4 and frames[0].shape == (*shape, 3)


def test_in_place_leaves_the_rest_of_the_frame(models, tmp_path, out):
    clip = make_film(tmp_path / "a.mp4", size=(96, 48))
    assert run(clip, out, *models, "--layout", "in-place") == 0
    before, after = (np.int16(read_film(path)[1][-1]) for path in (clip, out / "a.mp4"))
    outside = np.abs(after - before)[:, :20]  # the central square is 24 to 72
    inside = np.abs(after - before)[:, 40:56]
    assert outside.mean() < 4 and inside.mean() > 10


def test_every_artefact_of_a_film(models, tmp_path, out):
    clip = make_film(tmp_path / "a.mp4", UNEVEN, sound="aac", seconds=0.7)
    everything = ",".join(video.ENDINGS)
    assert run(clip, out, *models, "--save", everything, "--size", "20") == 0
    assert files(out) == {f"a{end}" for end in video.ENDINGS.values()} | {"manifest.jsonl"}
    shapes = {name: read_film(out / f"a{end}") for name, end in video.ENDINGS.items()
              if name != "latents"}  # fmt: skip
    assert {name: film[1][0].shape for name, film in shapes.items()} == {
        "anime": (20, 20, 3), "aligned": (20, 20, 3), "reconstruction": (20, 20, 3),
        "grid": (20, 60, 3),
    }  # fmt: skip
    assert all(len(film[0]) == len(UNEVEN) for film in shapes.values())
    assert [name for name, film in shapes.items() if film[2]] == ["anime"]


def test_smoothing_calms_and_can_be_left_out(models, tmp_path):
    rng = np.random.default_rng(0)

    def noisy(i):
        return np.clip(coloured(0) + rng.normal(0, 6, (48, 64, 3)), 0, 255).astype(np.uint8)

    clip = make_film(tmp_path / "n.mp4", np.arange(20) / 25, frame=noisy, options={"crf": "5"})
    steps = []
    for smoothing in ("0", "1"):
        out = tmp_path / smoothing
        assert run(clip, out, *models, "--smoothing", smoothing, "--save", "latents") == 0
        assert files(out) == {"n_latents.safetensors", "manifest.jsonl"}
        ws = load_file(out / "n_latents.safetensors")["ws"]
        assert ws.shape == (20, 6, 8)
        steps.append(ws.diff(dim=0).abs().mean())
    assert 0 < steps[1] < 0.7 * steps[0]


# ------------------------------------------------------------------------- latents


def test_latents_are_drawn_again(models, tmp_path, out):
    clip = make_film(tmp_path / "a.mp4", UNEVEN)
    assert run(clip, out, *models, "--save", "anime,latents") == 0
    again = tmp_path / "again"
    assert run(out / "a_latents.safetensors", again, *models) == 0
    assert files(again) == {"a_latents.mp4", "manifest.jsonl"}
    first, second = read_film(out / "a.mp4"), read_film(again / "a_latents.mp4")
    np.testing.assert_allclose(first[0], second[0], atol=1e-4)
    # a pixel rounded otherwise may change what the film's encoder does with its block
    one, other = (np.stack(film[1]).astype(int) for film in (first, second))
    assert np.abs(one - other).mean() < 3
    large = tmp_path / "large"
    assert run(out / "a_latents.safetensors", large, *models, "--size", "40") == 0
    assert read_film(large / "a_latents.mp4")[1][0].shape == (40, 40, 3)


def test_latents_that_cannot_be_drawn_are_refused(models, tmp_path, out, capsys):
    picture, other = tmp_path / "picture.safetensors", tmp_path / "other.safetensors"
    save_file({"ws": torch.zeros(1, 6, 8)}, picture)
    assert run(picture, out, *models) == 1
    assert "no times" in capsys.readouterr().err
    save_file({"ws": torch.zeros(1, 5, 8)}, other)
    assert run(other, out, *models) == 1
    assert "this generator" in capsys.readouterr().err
    clip = make_film(tmp_path / "a.mp4")
    assert run(clip, out, *models, "--save", "latents") == 0
    known = out / "a_latents.safetensors"
    assert run(known, tmp_path / "b", *models, "--layout", "in-place") == 1
    assert "holds latents" in capsys.readouterr().err
    assert run(known, tmp_path / "c", *models, "--save", "grid") == 1
    assert "not grid" in capsys.readouterr().err


def test_a_trace_is_what_was_added(tmp_path, face):
    rng = torch.Generator().manual_seed(0)
    rows = [(0.1 * i, 1 + i % 2, np.random.default_rng(i).random((5, 2)),
             torch.randn(6, 8, generator=rng)) for i in range(7)]  # fmt: skip
    file = tmp_path / "t.safetensors"
    with open(file, "wb") as stream:
        trace = TraceWriter(stream)
        for row in rows:
            trace.add(*row)
        trace.close()
    times, numbers, points, ws = read_trace(file, face)
    assert times.tolist() == [row[0] for row in rows]
    assert numbers.tolist() == [row[1] for row in rows]
    np.testing.assert_array_equal(points, np.stack([row[2] for row in rows]))
    assert torch.equal(ws, torch.stack([row[3] for row in rows]))


# ------------------------------------------------------------------------- folders


def test_pictures_and_films_in_one_folder_are_done_and_gone_on_with(models, tmp_path, out, capsys):
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    photo(1, 20, 20).save(folder / "a.png")
    make_film(folder / "a.mp4")
    make_film(folder / "sub" / "b.webm", codec="libvpx")
    (folder / "notes.txt").write_text("neither")
    assert run(folder, out, *models) == 0
    names = {"a.png.png", "a.mp4.mp4", "sub/b.mp4"}
    assert files(out) == names | {"manifest.jsonl"}
    assert list(manifest(out)) == ["a.mp4", "a.png", "b.webm"]
    assert "3 of 3 pictures and films translated" in capsys.readouterr().err
    before = {name: (out / name).stat().st_mtime_ns for name in names}
    (out / "sub" / "b.mp4").unlink()
    assert run(folder, out, *models) == 0
    assert "2 of 3 pictures and films are finished already" in capsys.readouterr().err
    after = {name: (out / name).stat().st_mtime_ns for name in names}
    assert {name for name in names if before[name] != after[name]} == {"sub/b.mp4"}
    assert run(folder, out, *models, "--layout", "in-place") == 2
    assert "another layout" in capsys.readouterr().err


def sound_only(path: Path) -> None:
    import av

    with av.open(str(path), "w", format="mp4") as film:
        voice = film.add_stream("aac", rate=48_000)
        voice.codec_context.layout = "mono"
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        noise.sample_rate = 48_000
        film.mux(voice.encode(noise))
        film.mux(voice.encode())


def test_what_is_no_film_is_named_and_the_rest_goes_on(models, tmp_path, out, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    whole = make_film(folder / "good.mp4").read_bytes()
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mov").write_text("this is no film")
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its table is at the end
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\ngood.mp4\n#EXT-X-ENDLIST\n")
    (folder / "frames.mkv").symlink_to("/dev/null")
    (folder / "gone.webm").symlink_to("nowhere")
    sound_only(folder / "sound.mp4")
    photo(1, 20, 20).save(folder / "p.png")
    assert run(folder, out, *models) == 1
    lines, said = manifest(out), capsys.readouterr().err
    assert {name for name, line in lines.items() if line["status"] == "ok"} == {"good.mp4", "p.png"}
    assert files(out) == {"good.mp4", "p.png", "manifest.jsonl"}
    for name in lines.keys() - {"good.mp4", "p.png"}:
        assert name in lines[name]["reason"] and lines[name]["outputs"] == [] and name in said
    assert "only sound" in lines["sound.mp4"]["reason"]
    assert "Traceback" not in said


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_a_film_that_ends_in_the_middle_is_drawn_as_far_as_it_goes(
    models, tmp_path, out, capsys, kind
):
    rng = np.random.default_rng(0)
    clip = make_film(
        tmp_path / f"long.{kind}", np.arange(75) / 25,
        codec="libx264" if kind == "mp4" else "libvpx",
        frame=lambda i: rng.integers(0, 256, (48, 64, 3), np.uint8),
        options={"movflags": "faststart"} if kind == "mp4" else {},
    )  # fmt: skip
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) // 2])
    assert run(clip, out, *models) == 1
    [line] = manifest(out).values()
    assert line["status"] == "failed" and "ends in the middle" in line["reason"]
    assert line["outputs"] == ["long.mp4"]
    assert "ends in the middle" in capsys.readouterr().err
    assert 10 < len(read_film(out / "long.mp4")[0]) < 60
    clip.write_bytes(data)  # the same command makes it whole
    assert run(clip, out, *models) == 0
    assert len(read_film(out / "long.mp4")[0]) == 75


def test_without_pyav_films_are_named_and_pictures_done(models, tmp_path, out, capsys, monkeypatch):
    folder = tmp_path / "in"
    folder.mkdir()
    make_film(folder / "a.mp4")
    photo(1, 20, 20).save(folder / "p.png")
    monkeypatch.setitem(sys.modules, "av", None)
    assert run(folder, out, *models) == 1
    assert files(out) == {"p.png", "manifest.jsonl"}
    assert "pip install 'amortized-gan-inversion[video]'" in capsys.readouterr().err


# ------------------------------------------------------------------------- faces


def faces_film(path: Path, shown) -> Path:
    """160 x 120; shown(i) -> the picture of frame i, or None for an empty frame."""

    def frame(i):
        picture = shown(i)
        empty = np.full((120, 160, 3), 90, np.uint8)
        return empty if picture is None else np.asarray(picture.resize((160, 120)))

    return make_film(path, np.arange(12) / 10, size=(160, 120), frame=frame)


@pytest.fixture(scope="module")
def person() -> Image.Image:
    return open_image(EXAMPLES / "astronaut.jpg").crop((80, 0, 400, 240))


def test_a_film_without_a_face_is_named(aligned, tmp_path, out, capsys):
    assert run(faces_film(tmp_path / "a.mp4", lambda i: None), out, *aligned) == 1
    assert files(out) == {"manifest.jsonl"}
    assert "No face found" in manifest(out)["a.mp4"]["reason"]
    assert "No face found" in capsys.readouterr().err


def test_a_face_that_is_away_for_a_while(aligned, tmp_path, person, monkeypatch):
    monkeypatch.setattr(video, "HOLD", 0.25)
    clip = faces_film(tmp_path / "a.mp4", lambda i: None if i < 2 or 5 <= i < 9 else person)
    row, place = tmp_path / "row", tmp_path / "place"
    assert run(clip, row, *aligned, "--smoothing", "0", "--detect-every", "1") == 0
    _, frames, _ = read_film(row / "a.mp4")
    grey = [np.abs(frame - 128.0).mean() < 6 for frame in frames]
    assert len(frames) == 12
    assert grey[:2] == [True, True] and not any(grey[2:7])  # held for two frames
    assert grey[8] and not grey[-1]
    assert run(clip, place, *aligned, "--layout", "in-place", "--detect-every", "1") == 0
    _, after, _ = read_film(place / "a.mp4")
    _, before, _ = read_film(clip)
    changed = [np.abs(np.int16(a) - np.int16(b)).mean() > 4 for a, b in
               zip(after, before, strict=True)]  # fmt: skip
    assert changed == [False] * 2 + [True] * 4 + [False] * 3 + [True] * 3


def test_all_faces_stand_in_a_row(aligned, tmp_path, out):
    pair = open_image(EXAMPLES / "two_faces.jpg")
    clip = make_film(tmp_path / "two.mp4", np.arange(8) / 10, size=(240, 144),
                     frame=lambda i: np.asarray(pair.resize((240, 144))))  # fmt: skip
    assert run(clip, out, *aligned, "--faces", "all", "--save", "anime,latents") == 0
    _, frames, _ = read_film(out / "two.mp4")
    assert frames[0].shape == (16, 32, 3) and manifest(out)["two.mp4"]["faces"] == 2
    assert load_file(out / "two_latents.safetensors")["numbers"].tolist() == [1, 2] * 8
    again = tmp_path / "again"
    assert run(out / "two_latents.safetensors", again, *aligned) == 0
    assert read_film(again / "two_latents.mp4")[1][0].shape == (16, 32, 3)


def test_places_are_kept_and_given_anew():
    def tracks(*states):
        face = lambda x: type("Face", (), {"box": np.array([x, 0, x + 1, 1.0])})()  # noqa: E731
        return [Track(n, face(x), 0.0, lost) for n, x, lost in states]

    places = Places(2)

    def numbers(*states):
        return {track.number: place for place, track in places(tracks(*states))}

    assert numbers((1, 50, False), (2, 10, False)) == {1: 1, 2: 0}  # left to right
    assert numbers((1, 5, False), (2, 60, False)) == {1: 1, 2: 0}
    assert numbers((1, 5, False), (2, 60, False), (3, 0, False)) == {1: 1, 2: 0}  # full
    assert numbers((1, 5, False), (3, 0, False), (2, 60, True)) == {1: 1, 3: 0}  # instead of lost
    assert numbers((4, 0, False)) == {4: 0}


# ------------------------------------------------------------------------- interruptions


def interrupt_at(monkeypatch, count: int) -> None:
    """Ctrl-C when the count-th batch is drawn."""
    draw, calls = video.Painter.draw, []

    def drawn(self, shots):
        calls.append(len(shots))
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGINT)
        draw(self, shots)

    monkeypatch.setattr(video.Painter, "draw", drawn)


def test_ctrl_c_leaves_no_half_film(models, tmp_path, out, monkeypatch, capsys):
    clip = make_film(tmp_path / "a.mp4", np.arange(10) / 25)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        assert run(clip, out, *models, "--batch-size", "2") == 130
    assert files(out) == {"manifest.jsonl"}
    assert "goes on from there" in capsys.readouterr().err
    assert run(clip, out, *models, "--batch-size", "2") == 0
    assert len(read_film(out / "a.mp4")[0]) == 10


@pytest.fixture
def camera(tmp_path, monkeypatch) -> Path:
    """A film in the place of a camera."""
    clip = make_film(tmp_path / "camera.mp4", np.arange(20) / 25)
    monkeypatch.setattr(films, "camera_address", lambda name: (str(clip), None))
    return clip


def test_ctrl_c_ends_a_camera_and_keeps_its_film(models, out, camera, monkeypatch):
    with monkeypatch.context() as patched:
        interrupt_at(patched, 6)
        assert run("webcam:0", out, *models) == 0
    [name] = files(out) - {"manifest.jsonl"}
    assert name.startswith("webcam_0_") and name.endswith(".mp4")
    assert len(read_film(out / name)[0]) == 6
    assert manifest(out)["webcam:0"]["frames"] == 6
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_camera_twice_makes_two_films(models, out, camera, monkeypatch):
    for name in ("first", "second"):
        monkeypatch.setattr("encoder.files.time.strftime", lambda _, name=name: name)
        assert run("webcam:0", out, *models) == 0
    assert files(out) == {"webcam_0_first.mp4", "webcam_0_second.mp4", "manifest.jsonl"}


def test_a_camera_that_is_not_there_is_named(models, out, capsys):
    assert run("webcam:77", out, *models) == 1
    assert "webcam:77 cannot be opened" in capsys.readouterr().err


def test_a_camera_of_all_faces_has_no_row(aligned, out, camera, capsys):
    assert run("webcam:0", out, *aligned, "--faces", "all") == 1
    assert "--layout in-place" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("system", "camera", "expected"),
    [
        ("linux", "0", ("/dev/video0", "v4l2")),
        ("linux", "video2", ("/dev/video2", "v4l2")),
        ("darwin", "1", ("1", "avfoundation")),
        ("win32", "Cam X", ("video=Cam X", "dshow")),
        ("win32", "0", "webcam:NAME"),
        ("plan9", "0", "cannot be read"),
    ],
)
def test_cameras_of_each_system(monkeypatch, system, camera, expected):
    monkeypatch.setattr(films.sys, "platform", system)
    if isinstance(expected, tuple):
        assert camera_address(camera) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            camera_address(camera)


class Full(io.BytesIO):
    """A disk with little space left."""

    def write(self, data):
        if self.tell() + len(data) > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


def test_a_full_disk_is_an_error_at_once(tmp_path):
    writer, rng = FilmWriter(Full(), (64, 48), Fraction(25)), np.random.default_rng(0)
    with pytest.raises(OSError, match="No space left"):
        for i in range(50):
            noise = rng.integers(0, 256, (48, 64, 3), np.uint8)
            writer.add(Image.fromarray(noise), i / 25)
        writer.close()


def test_a_full_disk_names_the_film_and_leaves_nothing(models, tmp_path, out, monkeypatch, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    make_film(folder / "a.mp4")
    make_film(folder / "b.mp4")
    write, calls = Guarded.write, []

    def fails(self, data):
        calls.append(data)
        if len(calls) == 1:
            self.error = OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(Guarded, "write", fails)
    assert run(folder, out, *models) == 1
    assert "No space left" in manifest(out)["a.mp4"]["reason"]
    assert files(out) == {"b.mp4", "manifest.jsonl"}
    assert "a.mp4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--smoothing", "-1"], "--smoothing"),
        (["--smoothing", "nan"], "--smoothing"),
        (["--detect-every", "0"], "--detect-every"),
    ],
)
def test_wrong_options(models, tmp_path, out, capsys, options, said):
    with pytest.raises(SystemExit) as ended:
        run(make_film(tmp_path / "a.mp4"), out, *models, *options)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_tracker_is_the_films_own(aligned, tmp_path, out, person, monkeypatch):
    """Faces of the film before are not taken along."""
    searches = []
    detect = Aligner.detect
    monkeypatch.setattr(Aligner, "detect", lambda s, p: searches.append(p.size) or detect(s, p))
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        faces_film(folder / name, lambda i: person)
    assert run(folder, out, *aligned) == 0
    assert searches == [(160, 120)] * 2
