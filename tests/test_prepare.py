"""Raw pictures to a data set of crops: detection, duplicates, awkward inputs, resume.

pytest tests/test_prepare.py
"""

import errno
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from pictures import encoded, photo
from PIL import Image
from safetensors.torch import save_file

from encoder.geometry import UNIT_SQUARE, square_matrix
from encoder.prepare import dataset as module
from encoder.prepare.crops import CropConfig, Found, dhash, examine, load_upscaler
from encoder.prepare.dataset import PrepareConfig, find_duplicates, prepare
from encoder.prepare.report import page, sheet
from encoder.prepare.sources import find_sources
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
    for name in ("face.xml", "other.xml"):
        (tmp_path / name).touch()
    config = CropConfig(size=16, detector="cascade", cascade=tmp_path / "face.xml", min_score=7)
    (found,) = config.load_detector()(scene(0, 2048, 1024))
    assert found.box == (1004, 492, 1044, 532) and found.score == 9  # searched at half the size
    np.testing.assert_allclose(found.matrix, [[60, 0, 994], [0, 60, 478]])
    with pytest.raises(ValueError, match="as a cascade"):
        replace(config, cascade=tmp_path / "other.xml").load_detector()


def test_upscalers_that_are_none_are_a_sentence(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "owned"),))

    torch.save({"weight": torch.ones(99)}, tmp_path / "other.pth")
    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    torch.save([torch.ones(9)], tmp_path / "list.pth")
    torch.save({1: {"a": "b"}}, tmp_path / "nested.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "other.pth").read_bytes()[:-700])
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "text.safetensors").write_text("no weights")
    save_file({"weight": torch.ones(99)}, tmp_path / "other.safetensors")
    (tmp_path / "folder.pth").mkdir()
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "none.safetensors"]:
        with pytest.raises(ValueError, match=re.escape(path.name)):
            load_upscaler(path, "cpu")
    assert not (tmp_path / "owned").exists()


def test_cascades_that_are_none_are_a_sentence(tmp_path):
    (tmp_path / "empty.xml").write_bytes(b"")
    (tmp_path / "list.xml").write_text("[1, 2]")
    (tmp_path / "other.xml").write_text("<?xml version='1.0'?><opencv_storage></opencv_storage>")
    (tmp_path / "bytes.xml").write_bytes(bytes(range(256)))
    os.mkfifo(tmp_path / "pipe.xml")
    for path in [*sorted(tmp_path.iterdir()), tmp_path / "none.xml", tmp_path]:
        with pytest.raises(ValueError, match=re.escape(path.name)):
            CropConfig(detector="cascade", cascade=path).load_detector()


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


EPS = (
    "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"  # Pillow starts Ghostscript
)


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
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(root / "end.png"))  # an absolute path may be too long
    (root / ("n" * 251 + ".png")).write_bytes(b"")
    with open(root / "sparse.png", "wb") as file:
        file.truncate(20 * 2**30)
    (root / "eps.png").write_text(EPS)
    (root / "void").mkdir()
    return {
        ".git": "it is hidden",
        "cut.jpg": "it is damaged (image file is truncated",
        "dot.png": "the square is too small (1 pixels)",
        "empty.png": "the file is empty",
        "end.png": "it is a broken link or no ordinary file",
        "eps.png": "it is not a picture in a known format",
        "n" * 251 + ".png": "the file is empty",
        "sparse.png": "it is too large (21,474,836,480 bytes)",
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
    assert summary["inputs"] == 19
    assert summary["inputs_accepted"] + summary["inputs_rejected"] == summary["inputs"]
    assert sum(summary["reasons"].values()) == summary["rejected"] == 16

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
    [
        *({"size": 4}, {"size": 10**6}, {"size": -16}, {"min_side": 0}, {"duplicates": 17}),
        *({"workers": 0}, {"workers": 10**6}, {"detector": "cascade"}, {"device": "bogus"}),
        *({"device": "meta"}, {"min_score": float("nan")}, {"min_sharpness": float("inf")}),
    ],
)
def test_settings_out_of_range_are_refused_before_anything_is_written(tmp_path, capsys, wrong):
    options = {"data": tmp_path, "output": tmp_path / "out"} | wrong
    words = (str(x) for k, v in options.items() for x in (f"--{k.replace('_', '-')}", v))
    try:
        assert module.main(list(words)) == 2
    except SystemExit as caught:
        assert caught.code == 2
    assert next(iter(wrong)).split("_")[-1] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
    monkeypatch.setattr("encoder.prepare.sources.MAX_BYTES", 600)
    for name in ("raw.zip", "raw.tar"):
        write_archive(tmp_path / name)
        assert "too large" in dict(names_and_errors(tmp_path / name))["../../evil.png"]


def test_bombs_in_archives_are_not_unpacked(tmp_path):
    zeros = bytes(50 * 2**20)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.png", zeros)
    with tarfile.open(tmp_path / "raw.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("zeros.png")
        info.size = len(zeros)
        archive.addfile(info, io.BytesIO(zeros))
    for name in ("raw.zip", "raw.tar.gz"):
        for raw in find_sources(str(tmp_path / name)):
            assert len(raw.read()) < 100  # enough to be refused


def test_headers_that_lie_about_sizes_fill_no_memory(tmp_path):
    """A size of 2^40 bytes: of a member, of one before any picture, and of a name."""
    long = tarfile.TarInfo("long.png")
    long.size = 2**40
    named = tarfile.TarInfo("name")
    named.type, named.size = tarfile.XHDTYPE, 2**40
    whole = tarfile.TarInfo("good.png")
    whole.size = len(encoded(scene(0), "PNG"))
    good = whole.tobuf() + encoded(scene(0), "PNG") + bytes(-whole.size % 512)
    (tmp_path / "member.tar").write_bytes(good + long.tobuf())
    (tmp_path / "name.tar").write_bytes(good + named.tobuf())
    (tmp_path / "first.tar").write_bytes(named.tobuf())
    reason = dict(names_and_errors(tmp_path / "member.tar"))
    assert reason["good.png"] == "" and "too large" in reason["long.png"]
    assert names_and_errors(tmp_path / "name.tar")[-1][0] == "(the rest)"
    with pytest.raises(ValueError, match="not a tar archive, or damaged"):
        list(find_sources(str(tmp_path / "first.tar")))


def test_no_picture_of_an_archive_or_a_table_starts_a_program(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr("a.jpg", EPS)
    cell = {"bytes": EPS.encode(), "path": None}
    features = datasets.Features({"image": datasets.Image()})
    data = datasets.Dataset.from_dict({"image": [cell]}, features=features)
    data.to_parquet(tmp_path / "raw.parquet")
    for name in ("raw.zip", "raw.parquet"):
        with pytest.raises(ValueError, match="No picture was accepted"):
            prepare(plain(tmp_path / name, tmp_path / f"of {name}"))
        (reason,) = reasons(tmp_path / f"of {name}").values()
        assert reason.startswith("it is not a picture in a known format")


def test_names_that_would_steer_a_terminal_are_escaped(tmp_path):
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        archive.writestr("a\x1b[2J\n.png", encoded(scene(0), "PNG"))
    assert [raw.name for raw in find_sources(str(tmp_path / "raw.zip"))] == ["a\\x1b[2J\\n.png"]


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

    monkeypatch.setattr("encoder.prepare.sources.open_hub", lambda *_: Stream)
    stream = list(find_sources("hf:someone/something:test"))
    assert [raw.name for raw in stream] == ["row 0", "row 1"]
    assert stream[1].read() == encoded(scene(0))


# ------------------------------------------------------------------- the whole, resumed


SMALL = "--size 16 --detector none --min-side 8".split()


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
    command = [sys.executable, "-m", "encoder.prepare", "--data", raw, "--output", output, *SMALL]
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


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_is_a_sentence_and_the_same_command_goes_on(tmp_path, capsys, workers):
    raw, output = pictures(tmp_path / "raw", 70), tmp_path / "out"
    command = ["--data", str(raw), "--output", str(output), "--workers", workers, *SMALL]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # bytes, of any file
    try:
        assert module.main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said.startswith("Cannot read or write") and "File too large" in said
    assert {file.name for file in output.iterdir()} == {".shards", "config.json"}
    assert not list(output.rglob("*.tmp"))
    assert module.main(command) == 0
    prepare(plain(raw, tmp_path / "whole"))
    assert contents(output) == contents(tmp_path / "whole")


def test_data_is_not_there_before_it_is_whole(tmp_path, monkeypatch):
    raw, output = pictures(tmp_path / "raw", 5), tmp_path / "out"
    real = module.with_images

    def full(*given):
        yield from islice(real(*given), 3)
        raise OSError(errno.ENOSPC, "No space left on device")

    for kind in ("parquet", "folder"):
        output = tmp_path / kind
        monkeypatch.setattr(module, "with_images", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(plain(raw, output, format=kind))
        assert not (output / "data").exists()
        monkeypatch.setattr(module, "with_images", real)
        assert prepare(plain(raw, output, format=kind))["accepted"] == 5


def test_an_output_that_cannot_be_is_a_sentence(tmp_path, capsys):
    raw, file = pictures(tmp_path / "raw", 1), tmp_path / "file"
    file.touch()
    for output in (file, file / "out", Path("/proc/nowhere")):
        assert module.main(["--data", str(raw), "--output", str(output), *SMALL]) == 2
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert str(output) in said


def children(parent: int) -> list[int]:
    """Its processes, also those that it has left behind."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"PARENT={parent}\0".encode() in file.read_bytes():
                found.append(int(file.parent.name))
    return found


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_preparation_leaves_no_process_and_goes_on(
    tmp_path, monkeypatch, number, code
):
    raw, output = pictures(tmp_path / "raw", 200, side=150), tmp_path / "out"
    monkeypatch.setenv("PARENT", str(os.getpid()))  # that all its processes inherit
    command = [sys.executable, "-m", "encoder.prepare", "--data", raw, "--output", output, *SMALL]
    process = subprocess.Popen(
        [*command, "--workers", "2"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    try:
        while not list(output.glob(".shards/*.parquet")):
            assert process.poll() is None
            time.sleep(0.01)
        with pytest.raises(ValueError, match="Another process is at work in"):
            prepare(plain(raw, output))
        assert len(children(os.getpid())) > 2
        for pid in children(os.getpid()):  # as a terminal's Ctrl-C does
            if number == signal.SIGINT or pid == process.pid:
                os.kill(pid, number)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code and "Traceback" not in said
    assert said.rstrip().splitlines()[-1].startswith("Stopped by")
    deadline = time.monotonic() + 10  # the last one closes behind its parent
    while children(os.getpid()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not children(os.getpid()) and not (output / "data").exists()
    prepare(plain(raw, output))
    prepare(plain(raw, tmp_path / "whole"))
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 10**5, "no JSON"])
def test_damaged_records_are_a_sentence(tmp_path, text):
    raw, output = pictures(tmp_path / "raw", 2), tmp_path / "out"
    prepare(plain(raw, output))
    for name in ("summary.json", "config.json"):
        (output / name).write_text(text)
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            prepare(plain(raw, output))


def test_a_damaged_shard_is_made_anew(tmp_path, monkeypatch):
    raw, output = pictures(tmp_path / "raw", 5), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_data", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(plain(raw, output))
    (shard,) = output.glob(".shards/*")
    shard.write_bytes(shard.read_bytes()[:-50])
    assert prepare(plain(raw, output))["accepted"] == 5


def test_large_inputs_are_held_few_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 5000)
    with zipfile.ZipFile(tmp_path / "raw.zip", "w") as archive:
        for i in range(6):
            archive.writestr(f"{i}.png", encoded(photo(i, 30, 30), "PNG"))  # about 2,800 bytes
    sizes: list[int] = []
    prepare(plain(tmp_path / "raw.zip", tmp_path / "out"), sizes.append)
    assert sizes == [2, 2, 2]


def test_changed_data_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD", 3)
    raw = pictures(tmp_path / "raw", 5)
    monkeypatch.setattr(module, "write_data", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(plain(raw, tmp_path / "out"))
    (raw / "0001.png").unlink()
    with pytest.raises(ValueError, match="has changed since"):
        prepare(plain(raw, tmp_path / "out"))


def test_the_command_ends_with_two_where_the_user_errs(tmp_path, capsys):
    assert module.main(["--data", str(tmp_path / "no"), "--output", str(tmp_path / "out")]) == 2
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
