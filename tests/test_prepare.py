"""Raw pictures to a data set of crops: detection, duplicates, awkward inputs, resume.

pytest tests/test_prepare.py
"""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pictures import encoded, photo
from PIL import Image
from safetensors.torch import save_file

from encoder import prepare as module
from encoder.crops import CropConfig, examine
from encoder.dedup import dhash, find_duplicates
from encoder.detect import Found, load_upscaler
from encoder.geometry import UNIT_SQUARE, square_matrix
from encoder.prepare import PrepareConfig, prepare
from encoder.report import page, sheet
from encoder.sources import find_sources
from generators.data import open_dataset

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def scene(seed: int, width: int = 40, height: int = 40) -> Image.Image:
    """Soft random colours: unlike noise, it stays the same picture when it is resized."""
    return photo(seed, 6, 6).resize((width, height), Image.Resampling.BICUBIC)


def plain(data: Path | str, output: Path, **options) -> PrepareConfig:
    """Small crops without detection."""
    return PrepareConfig(
        data=str(data), output=output, **({"size": 16, "detector": "none", "min_side": 8} | options)
    )


def reasons(output: Path) -> dict[str, str]:
    lines = (output / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["source"]: line["reason"] for line in map(json.loads, lines)}


def rows(output: Path) -> datasets.Dataset:
    files = sorted(map(str, (output / "data").glob("*.parquet")))
    return datasets.load_dataset("parquet", data_files=files, split="train")


def contents(output: Path) -> dict[str, bytes]:
    return {
        file.relative_to(output).as_posix(): file.read_bytes()
        for file in output.rglob("*")
        if file.is_file()
    }


# ------------------------------------------------------------------------- one picture


@pytest.mark.parametrize("faces, count", [("largest", 1), ("all", 2)])
def test_people_are_found_and_cut(faces, count):
    config = CropConfig(size=64, faces=faces)
    detector = module.tools(replace(config, faces="largest"))[0]  # made once for both
    found = examine("two.jpg", EXAMPLES / "two_faces.jpg", config, detector)
    assert [row.face for row in found] == list(range(count))
    assert [row.reason for row in found] == [""] * count
    assert found[0].more == 2 - count
    for row in found:
        assert Image.open(io.BytesIO(row.image["bytes"])).size == (64, 64)
        assert 0 <= row.left < row.right <= row.width and row.score >= 0.9
        assert row.side > row.right - row.left


def test_photos_to_a_data_set_that_opens(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in ("astronaut", "grace_hopper", "grace_hopper_exif"):  # the last two are one
        (raw / f"{name}.jpg").write_bytes((EXAMPLES / f"{name}.jpg").read_bytes())
    photo(1, 200, 200).save(raw / "noise.png")
    summary = prepare(PrepareConfig(data=str(raw), output=tmp_path / "out", size=64))
    assert (summary["inputs"], summary["inputs_accepted"], summary["accepted"]) == (4, 2, 2)
    assert summary["reasons"] == {"a duplicate": 1, "no face found": 1}
    table = rows(tmp_path / "out")
    assert table["source"][0] == "astronaut.jpg" and table[0]["image"].size == (64, 64)
    assert open_dataset(tmp_path / "out" / "data", 32).pictures.shape == (2, 3, 32, 32)


def test_a_detector_of_ones_own():
    def detect(picture: Image.Image) -> list[Found]:
        boxes = [((10, 10, 30, 30), 0.8), ((0, 0, 5, 5), 0.7)]
        return [
            Found(box, square_matrix(box[0] + UNIT_SQUARE * (box[2] - box[0])), score)
            for box, score in boxes
        ]

    config = CropConfig(size=16, min_side=8, faces="all")
    large, small = examine("a", encoded(scene(0), "PNG"), config, detect)
    assert (large.side, large.score, large.reason) == (20, 0.8, "")
    assert (large.left, large.top, large.right, large.bottom) == (10, 10, 30, 30)
    assert small.reason == "the square is too small (5 pixels)" and small.image is not None
    (alone,) = examine("a", encoded(scene(0), "PNG"), replace(config, faces="largest"), detect)
    assert alone.more == 1


def test_blurred_pictures_are_rejected_only_if_asked():
    config = CropConfig(size=32, detector="none", min_side=8, min_sharpness=100)
    detect = config.load_detector()
    sharp = encoded(photo(0, 32, 32), "PNG")
    blurred = encoded(photo(0, 2, 2).resize((32, 32), Image.Resampling.BICUBIC), "PNG")
    assert examine("a", sharp, config, detect)[0].reason == ""
    assert examine("a", blurred, config, detect)[0].reason.startswith("it is blurred (")
    assert examine("a", blurred, replace(config, min_sharpness=0.0), detect)[0].reason == ""


def test_small_sources_go_through_the_upscaler():
    config = CropConfig(size=32, detector="none", min_side=8)
    seen = []

    def red(picture: Image.Image) -> Image.Image:
        seen.append(picture.size)
        return Image.new("RGB", (4 * picture.width, 4 * picture.height), "red")

    detect = config.load_detector()
    (small,) = examine("a", encoded(scene(0, 20, 24), "PNG"), config, detect, red)
    (large,) = examine("b", encoded(scene(0, 40, 40), "PNG"), config, detect, red)
    crop = Image.open(io.BytesIO(small.image["bytes"]))
    assert seen == [(20, 20)] and small.upscaled and not large.upscaled
    assert crop.size == (32, 32) and crop.getpixel((5, 5)) == (255, 0, 0)


def fake(monkeypatch, name: str, **members) -> None:
    monkeypatch.setitem(sys.modules, name, type(sys)(name))
    for key, value in members.items():
        setattr(sys.modules[name], key, value)


def test_missing_extras_are_named(monkeypatch, tmp_path):
    config = CropConfig(detector="cascade", cascade=tmp_path / "face.xml")
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[prepare\]'"):
        config.load_detector()
    with pytest.raises(ValueError, match=r"pip install '\.\[prepare\]'"):
        load_upscaler(tmp_path / "x4.safetensors", "cpu")
    fake(monkeypatch, "cv2", __version__="5.0.0")
    with pytest.raises(ValueError, match=r"OpenCV 5\.0\.0 has no cascades"):
        config.load_detector()


class Classifier:
    """Stands for cv2.CascadeClassifier: a box of 20 pixels in the middle of any grey picture."""

    def __init__(self, path: str = "") -> None:
        self.path = path

    def empty(self) -> bool:
        return not self.path.endswith("face.xml")

    def detectMultiScale2(self, grey, minNeighbors):
        assert grey.ndim == 2 and grey.dtype == np.uint8 and minNeighbors == 7
        y, x = (side // 2 - 10 for side in grey.shape)
        return np.array([[x, y, 20, 20]]), np.array([9])


def test_cascades_are_cut_with_a_margin(monkeypatch, tmp_path):
    fake(
        monkeypatch,
        "cv2",
        __version__="4.0.0",
        CascadeClassifier=Classifier,
        error=RuntimeError,
        setNumThreads=int,
        equalizeHist=lambda grey: grey,
    )
    config = CropConfig(size=16, detector="cascade", cascade=tmp_path / "face.xml", min_score=7)
    (found,) = config.load_detector()(scene(0, 2048, 1024))
    assert found.box == (1004, 492, 1044, 532) and found.score == 9  # searched at half the size
    np.testing.assert_allclose(found.matrix, [[60, 0, 994], [0, 60, 478]])
    with pytest.raises(ValueError, match="as a cascade"):
        replace(config, cascade=tmp_path / "other.xml").load_detector()


def test_an_upscaler_that_would_run_code_is_refused(monkeypatch, tmp_path):
    fake(monkeypatch, "spandrel", UnsupportedModelError=KeyError)

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="no super-resolution network"):
        load_upscaler(tmp_path / "evil.pth", "cpu")
    assert not (tmp_path / "owned").exists()
    with pytest.raises(ValueError, match=r"\.safetensors or \.pth"):
        load_upscaler(tmp_path / "x4.pt", "cpu")
    with pytest.raises(ValueError, match="No such file"):
        load_upscaler(tmp_path / "none.safetensors", "cpu")


def test_an_upscaler_file_is_read_and_runs(monkeypatch, tmp_path):
    class Descriptor(torch.nn.Module):
        input_channels = 3

        def __init__(self, weights: dict) -> None:
            super().__init__()
            self.gain = weights["gain"]

        def forward(self, images):
            assert images.shape == (1, 3, 5, 7) and 0 <= images.min() and images.max() <= 1
            return (self.gain * images).repeat_interleave(2, 2).repeat_interleave(2, 3)

    class Loader:
        def __init__(self, device: str) -> None:
            pass

        load_from_state_dict = staticmethod(Descriptor)

    fake(
        monkeypatch,
        "spandrel",
        ModelLoader=Loader,
        ImageModelDescriptor=Descriptor,
        UnsupportedModelError=KeyError,
        canonicalize_state_dict=lambda weights: weights,
    )
    save_file({"gain": torch.tensor(1.0)}, tmp_path / "x2.safetensors")
    torch.save({"gain": torch.tensor(1.0)}, tmp_path / "x2.pth")
    picture = photo(0, 7, 5)
    doubled = picture.resize((14, 10), Image.Resampling.NEAREST)
    for name in ("x2.safetensors", "x2.pth"):
        assert load_upscaler(tmp_path / name, "cpu")(picture).tobytes() == doubled.tobytes()


# --------------------------------------------------------------------------- duplicates


def test_copies_are_near_and_others_far():
    for seed in range(20):
        picture = scene(seed, 128, 128)
        jpeg = Image.open(io.BytesIO(encoded(picture, "JPEG", quality=40)))
        small = picture.resize((77, 77), Image.Resampling.BILINEAR)
        own, others = dhash(picture), [dhash(scene(other, 128, 128)) for other in range(100, 120)]
        assert all((own ^ dhash(copy)).bit_count() <= 4 for copy in (jpeg, small))
        assert all((own ^ other).bit_count() > 8 for other in others)


@pytest.mark.parametrize("distance", [0, 1, 4, 9])
def test_the_search_is_exact(distance):
    rng = np.random.default_rng(distance)
    hashes = [int(h) for h in rng.integers(0, 2**63, 60, dtype=np.uint64)]
    for base in hashes[:60]:
        bits = rng.choice(64, rng.integers(0, 12), replace=False)
        hashes.append(base ^ sum(1 << int(bit) for bit in bits))
    kept, expected = [], {}
    for i, value in enumerate(hashes):
        near = [k for k in kept if (hashes[k] ^ value).bit_count() <= distance]
        if near:
            expected[i] = near[0]
        else:
            kept.append(i)
    assert find_duplicates(hashes, distance) == expected and expected


def test_fifty_thousand_are_searched_in_seconds():
    hashes = np.random.default_rng(0).integers(0, 2**63, 50_000, dtype=np.uint64).tolist()
    start = time.process_time()
    assert find_duplicates([*hashes, hashes[7]], 4) == {50_000: 7}
    assert time.process_time() - start < 10


def test_the_largest_copy_stays(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    picture = scene(0, 128, 128)
    picture.resize((64, 64)).save(raw / "a small.png")
    picture.save(raw / "b large.png")
    picture.save(raw / "c compressed.jpg", quality=50)
    scene(1, 64, 64).save(raw / "d other.png")
    prepare(plain(raw, tmp_path / "out"))
    assert rows(tmp_path / "out")["source"][:] == ["b large.png", "d other.png"]
    reason = "a duplicate (of b large.png)"
    assert reasons(tmp_path / "out") == {"a small.png": reason, "c compressed.jpg": reason}
    summary = prepare(plain(raw, tmp_path / "all", duplicates=-1))
    assert summary["accepted"] == 4


# ----------------------------------------------------------------------- awkward inputs


def awkward(root: Path) -> dict[str, str]:
    """Fills a folder; returns the reason of each input that is to be rejected."""
    (root / "sub" / "日本").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "x.png").write_bytes(b"")
    scene(0).save(root / "sub" / "日本" / "ä <b>.png")
    scene(1).save(root / "good.JPG")
    with open(os.fsencode(root) + b"/\xff.png", "wb") as file:
        file.write(encoded(scene(2), "PNG"))
    (root / "empty.png").write_bytes(b"")
    (root / "cut.jpg").write_bytes(encoded(photo(3, 64, 64), "JPEG")[:-900])
    (root / "text.png").write_text("no picture")
    (root / "notes.txt").write_text("no picture")
    photo(4, 1, 1).save(root / "dot.png")
    scene(5, 4, 300).save(root / "thin.png")
    huge = bytearray(encoded(Image.new("L", (1, 1)), "BMP"))
    huge[18:26] = (60_000).to_bytes(4, "little") * 2
    (root / "huge.bmp").write_bytes(huge)
    (root / "twin.png").write_bytes((root / "sub" / "日本" / "ä <b>.png").read_bytes())
    (root / "round").symlink_to(root)
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "void").mkdir()
    return {
        ".git": "it is hidden",
        "cut.jpg": "it is damaged (image file is truncated",
        "dot.png": "the square is too small (1 pixels)",
        "empty.png": "the file is empty",
        "huge.bmp": "it has more than 178,000,000 pixels; make it smaller first",
        "loop.png": "it is a broken link or no ordinary file",
        "notes.txt": "its name does not end like a picture's",
        "pipe.png": "it is a broken link or no ordinary file",
        "round": "it is a link to a folder",
        "text.png": "it is not a picture in a known format",
        "thin.png": "the square is too small (4 pixels)",
        "twin.png": "a duplicate (of sub/日本/ä <b>.png)",
    }


def test_nothing_of_an_awkward_folder_is_lost(tmp_path):
    expected = awkward(tmp_path / "raw")
    summary = prepare(plain(tmp_path / "raw", tmp_path / "out"))
    found = reasons(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert found[name].startswith(reason), name
    assert rows(tmp_path / "out")["source"][:] == ["\\xff.png", "good.JPG", "sub/日本/ä <b>.png"]
    assert summary["inputs"] == 15
    assert summary["inputs_accepted"] + summary["inputs_rejected"] == summary["inputs"]
    assert sum(summary["reasons"].values()) == summary["rejected"] == 12

    html = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "ä &lt;b&gt;.png" in html and "<b>" not in html
    assert "://" not in html and html.count("src='data:image/png;base64,") == 2
    for name in ("accepted.png", "rejected.png"):
        with Image.open(tmp_path / "out" / name) as image:
            assert image.width <= 960
    assert not (tmp_path / "out" / ".shards").exists()


def test_a_folder_that_cannot_be_listed_is_reported(tmp_path, monkeypatch):
    scene(0).save(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    real = os.scandir

    def scandir(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    _, closed = find_sources(str(tmp_path))
    with pytest.raises(ValueError, match=r"the folder cannot be read \(Permission denied\)"):
        closed.read()


def test_unusable_data_ends_in_a_sentence(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(ValueError, match="There is no file in"):
        prepare(plain(tmp_path / "raw", tmp_path / "1"))
    with pytest.raises(ValueError, match="neither a folder nor an archive"):
        prepare(plain(tmp_path / "none", tmp_path / "2"))
    (tmp_path / "raw" / "a.txt").write_text("")
    for _ in range(2):  # also of a finished one
        with pytest.raises(ValueError, match="No picture was accepted; see"):
            prepare(plain(tmp_path / "raw", tmp_path / "3"))
    assert (tmp_path / "3" / "report.html").exists()
    with pytest.raises(ValueError, match="outside of it"):
        prepare(plain(tmp_path / "raw", tmp_path / "raw" / "out"))
    with pytest.raises(ValueError, match="is not empty"):
        prepare(plain(tmp_path / "raw", tmp_path))
    for name in ("bad.zip", "bad.tar.gz", "bad.parquet"):
        (tmp_path / name).write_bytes(b"rubbish")
        with pytest.raises(ValueError, match=f"Cannot read .*{name}"):
            prepare(plain(tmp_path / name, tmp_path / f"of {name}"))


@pytest.mark.parametrize(
    "wrong",
    [{"size": 4}, {"min_side": 0}, {"workers": 0}, {"duplicates": 17}, {"detector": "cascade"}],
)
def test_settings_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="--" + next(iter(wrong)).replace("_", "-")):
        plain(tmp_path, tmp_path / "out", **wrong)


# ----------------------------------------------------------- archives, Hugging Face data


def members() -> dict[str, bytes]:
    return {
        "../../evil.png": encoded(scene(0), "PNG"),
        "/absolute.png": encoded(scene(1), "PNG"),
        "sub/日本.jpg": encoded(scene(2), "JPEG"),
        "empty.png": b"",
        "notes.txt": b"no picture",
    }


def write_archive(path: Path) -> None:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in members().items():
                archive.writestr(name, data)
        return
    with tarfile.open(path, f"w:{'gz' if path.suffix == '.gz' else ''}") as archive:
        for name, data in members().items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("name", ["raw.zip", "raw.tar", "raw.tar.gz"])
def test_archives(tmp_path, name):
    (tmp_path / "in").mkdir()
    write_archive(tmp_path / "in" / name)
    before = sorted(tmp_path.rglob("*"))
    prepare(plain(tmp_path / "in" / name, tmp_path / "in" / "out"))
    table = rows(tmp_path / "in" / "out")
    assert table["source"][:] == ["../../evil.png", "/absolute.png", "sub/日本.jpg"]
    assert reasons(tmp_path / "in" / "out").keys() == {"empty.png", "notes.txt"}
    new = set(tmp_path.rglob("*")) - set(before)
    assert all((tmp_path / "in" / "out") in (path, *path.parents) for path in new)


def test_odd_members_of_a_tar(tmp_path):
    with tarfile.open(tmp_path / "raw.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.FIFOTYPE, "pipe.png")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    for raw in find_sources(str(tmp_path / "raw.tar")):
        with pytest.raises(ValueError, match="a link or no ordinary file"):
            raw.read()


def names_and_errors(path: Path) -> list[tuple[str, str]]:
    result = []
    for raw in find_sources(str(path)):
        try:
            raw.read()
            result.append((raw.name, ""))
        except ValueError as error:
            result.append((raw.name, str(error)))
    return result


@pytest.mark.parametrize("name", ["raw.tar", "raw.tar.gz"])
def test_a_damaged_tar_says_that_its_end_is_lost(tmp_path, name):
    write_archive(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    last, reason = names_and_errors(tmp_path / name)[-1]
    assert (last, reason) == ("(the rest)", "the archive is damaged from here on")


def test_a_broken_header_in_the_middle_of_a_tar(tmp_path):
    write_archive(tmp_path / "raw.tar")
    with tarfile.open(tmp_path / "raw.tar") as archive:
        start = archive.getmember("sub/日本.jpg").offset
    data = bytearray((tmp_path / "raw.tar").read_bytes())
    at = data.index("日本".encode(), start)
    data[at - 512 : at + 512] = b"\x01" * 1024
    (tmp_path / "raw.tar").write_bytes(data)
    assert names_and_errors(tmp_path / "raw.tar")[-1][0] == "(the rest)"


def test_a_damaged_member_of_a_zip_is_one_reject(tmp_path):
    write_archive(tmp_path / "raw.zip")
    data = bytearray((tmp_path / "raw.zip").read_bytes())
    at = data.index(b"absolute.png") + 40
    data[at : at + 20] = bytes(20)
    (tmp_path / "raw.zip").write_bytes(data)
    errors = dict(names_and_errors(tmp_path / "raw.zip"))
    assert "damaged or encrypted" in errors.pop("/absolute.png")
    assert errors["../../evil.png"] == errors["sub/日本.jpg"] == ""


def test_a_member_beyond_the_limit_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("encoder.sources.MAX_BYTES", 10)
    for name in ("raw.zip", "raw.tar"):
        write_archive(tmp_path / name)
        assert "too large" in dict(names_and_errors(tmp_path / name))["../../evil.png"]


def test_hugging_face_data(tmp_path):
    cells = [encoded(scene(i), "PNG") for i in range(3)] + [b"bad"]
    features = datasets.Features({"picture": datasets.Image()})
    data = datasets.Dataset.from_dict({"picture": [{"bytes": c} for c in cells]}, features=features)
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    data.to_parquet(tmp_path / "folder" / "sub" / "test.parquet")
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"a": data}).save_to_disk(str(tmp_path / "splits"))
    for source, name in (("folder", "sub/test.parquet#3"), ("saved", "row 3")):
        summary = prepare(plain(tmp_path / source, tmp_path / f"of {source}", column="picture"))
        assert (summary["inputs"], summary["accepted"]) == (4, 3)
        assert reasons(tmp_path / f"of {source}").keys() == {name}
    with pytest.raises(ValueError, match=r"give the folder of one: .*splits/a"):
        find_sources(str(tmp_path / "splits"))
    scene(5).save(tmp_path / "folder" / "beside.png")  # now it is a folder of files
    assert [raw.name for raw in find_sources(str(tmp_path / "folder"))] == [
        "beside.png",
        "sub/test.parquet",
    ]


def test_a_stream_of_the_hub(monkeypatch):
    class Stream:
        rows = ({"image": {"bytes": encoded(scene(0)), "path": None}} for _ in range(2))

    monkeypatch.setattr("encoder.sources.open_hub", lambda *_: Stream)
    stream = list(find_sources("hf:someone/something:test"))
    assert [raw.name for raw in stream] == ["row 0", "row 1"]
    assert stream[1].read() == encoded(scene(0))


# ------------------------------------------------------------------- the whole, resumed


def pictures(folder: Path, count: int, side: int = 40) -> Path:
    folder.mkdir()
    for i in range(count):
        scene(i, side, side).save(folder / f"{i:04d}.png", compress_level=1)
    (folder / "bad.png").write_bytes(b"")
    return folder


def test_a_folder_of_pictures_as_output(tmp_path, monkeypatch):
    raw = pictures(tmp_path / "raw", 5)
    prepare(plain(raw, tmp_path / "out", format="folder"))
    assert open_dataset(tmp_path / "out" / "data", 16).pictures.shape == (5, 3, 16, 16)
    lines = (tmp_path / "out" / "data" / "metadata.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert (last["file_name"], last["source"], last["width"]) == ("00000004.png", "0004.png", 40)


def test_workers_do_not_change_the_result(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 3)
    monkeypatch.setattr(module, "ROWS", 4)
    raw = pictures(tmp_path / "raw", 10)
    done: list[int] = []
    prepare(plain(raw, tmp_path / "two", workers=2), done.append)
    prepare(plain(raw, tmp_path / "one"))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert sum(done) == 11
    assert sorted(path.name for path in (tmp_path / "one" / "data").iterdir()) == [
        "train-00000.parquet",
        "train-00001.parquet",
        "train-00002.parquet",
    ]


def test_a_killed_preparation_goes_on(tmp_path, monkeypatch):
    raw = pictures(tmp_path / "raw", 200, side=150)
    output, shards = tmp_path / "killed", tmp_path / "killed" / ".shards"
    options = "--size 16 --detector none --min-side 8".split()
    command = [sys.executable, "-m", "encoder.prepare", "--data", raw, "--output", output, *options]
    process = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT)
    while not list(shards.glob("*1.parquet")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {file: file.stat().st_mtime_ns for file in shards.glob("*.parquet")}
    assert 2 <= len(before) < 7 and not (output / "data").exists()

    made: list[Path] = []
    real = module.make_shard

    def counted(config, file, job):
        made.append(file)
        return real(config, file, job)

    monkeypatch.setattr(module, "make_shard", counted)
    with pytest.raises(ValueError, match="another size"):
        prepare(plain(raw, output, size=17))
    prepare(plain(raw, output))
    assert len(made) == 7 - len(before) and not before.keys() & set(made)
    prepare(plain(raw, tmp_path / "whole"))
    assert contents(output) == contents(tmp_path / "whole")
    made.clear()
    prepare(plain(raw, output))  # finished: nothing to do
    assert not made


def test_changed_data_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 3)
    raw = pictures(tmp_path / "raw", 5)
    monkeypatch.setattr(module, "write_data", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(plain(raw, tmp_path / "out"))
    (raw / "0001.png").unlink()
    with pytest.raises(ValueError, match="has changed since"):
        prepare(plain(raw, tmp_path / "out"))


def test_the_command_ends_with_two_where_the_user_errs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["prepare", "--data", str(tmp_path / "no"), "--output", str(tmp_path / "out")]
    )
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 2
    assert "check the path" in capsys.readouterr().err


# ------------------------------------------------------------------------------- report


def test_sheet_and_page_of_nothing():
    assert sheet([]).size == (96, 110)
    assert sheet([(None, "日本 " * 50)] * 11).size == (960, 220)
    html = page("t", {"inputs": 0}, {}, [], [], {})
    assert "None was." in html


def test_the_histogram_and_the_list():
    rejected = [(f"{i}.png", "<why>") for i in range(301)]
    html = page("t", {}, {}, [64, 95.5, 96, 5000, 3], rejected, {})
    assert "<td>64 – 95<td class=n>2" in html and "<td>96 – 127<td class=n>1" in html
    assert "<td>2048 and more<td class=n>1" in html and "<td>below 16<td class=n>1" in html
    assert "299.png" in html and "300.png" not in html and "&lt;why&gt;" in html
