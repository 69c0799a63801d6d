"""Pictures of every awkward kind, and finding them.

pytest tests/test_images.py
"""

import os
import re
import socket
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import encoded, photo
from PIL import Image

from generators.images import (
    decode,
    find_images,
    fit,
    grid,
    labelled,
    open_image,
    open_opacity,
    resize,
    result_names,
    to_pil,
    to_tensor,
)

RED, WHITE = (255, 0, 0), (255, 255, 255)


def gradient(mode: str, dtype: type, top: float, side: int = 16) -> Image.Image:
    """Grey columns from 0 to `top`."""
    row = np.linspace(0, top, side)
    picture = Image.fromarray(np.tile(row, (side, 1)).astype(dtype))
    assert picture.mode == mode
    return picture


# ------------------------------------------------------------------------ one picture


def test_all_bytes_survive_the_round_trip():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    tensor = to_tensor(levels)
    assert tensor.shape == (3, 16, 16)
    assert (tensor.min(), tensor.max()) == (-1, 1)
    assert to_pil(tensor).tobytes() == levels.tobytes()


def test_values_outside_are_clipped():
    assert to_pil(torch.tensor([-3.0, 0.0, 3.0]).view(3, 1, 1)).getpixel((0, 0)) == (0, 128, 255)


def test_to_tensor_takes_any_mode():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert torch.equal(to_tensor(clear), torch.ones(3, 2, 2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    stored = photo(width=6, height=4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    upright = open_image(tmp_path / "a.png")
    assert upright.size == ((4, 6) if orientation >= 5 else (6, 4))
    corner = {
        1: (0, 0),
        2: (5, 0),
        3: (5, 3),
        4: (0, 3),
        5: (0, 0),
        6: (0, 3),
        7: (5, 3),
        8: (5, 0),
    }
    assert upright.getpixel((0, 0)) == stored.getpixel(corner[orientation])


def test_damaged_exif_is_ignored(tmp_path):
    photo().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffrubbish")
    assert open_image(tmp_path / "a.png").tobytes() == photo().tobytes()


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_alpha_is_composited_over_white(tmp_path, suffix):
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    image.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    opened = open_image(tmp_path / f"a.{suffix}")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]


def test_half_transparent_black_is_grey(tmp_path):
    Image.new("LA", (1, 1), (0, 128)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_with_transparency(tmp_path, suffix):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / f"a.{suffix}", transparency=1)
    opened = open_image(tmp_path / f"a.{suffix}")
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [RED, WHITE]


def test_transparent_colour_of_an_rgb_png(tmp_path):
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png", transparency=(1, 2, 3))
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == WHITE


def test_cmyk(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    assert np.allclose(open_image(tmp_path / "a.jpg").getpixel((4, 4)), RED, atol=4)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_and_black_and_white(tmp_path, mode):
    Image.new(mode, (3, 3), 255).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((1, 1)) == WHITE


@pytest.mark.parametrize(
    "mode, dtype, top, suffix",
    [
        ("I;16", np.uint16, 65535, "png"),
        ("I;16", np.uint16, 65535, "tiff"),
        ("I", np.int32, 65535, "tiff"),
        ("I", np.int32, 2**31 - 1, "tiff"),
        ("F", np.float32, 1.0, "tiff"),
        ("F", np.float32, 255.0, "tiff"),
        ("F", np.float32, 65535.0, "tiff"),
    ],
)
def test_deep_pictures_are_scaled_not_clipped(tmp_path, mode, dtype, top, suffix):
    gradient(mode, dtype, top).save(tmp_path / f"a.{suffix}")
    opened = np.asarray(open_image(tmp_path / f"a.{suffix}"))
    assert np.allclose(opened[0, :, 0], np.linspace(0, 255, 16), atol=1)


def test_infinite_and_missing_values_of_a_float_picture(tmp_path):
    values = np.array([[np.nan, np.inf, -np.inf, 0.5, 1.0]], dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    assert np.asarray(open_image(tmp_path / "a.tiff"))[0, :, 0].tolist() == [0, 0, 0, 128, 255]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), color) for color in (RED, (0, 0, 255))]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert open_image(path).getpixel((2, 2)) == RED


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), RED).save(tmp_path / "a.png")
    assert to_tensor(open_image(tmp_path / "a.png")).flatten().tolist() == [1, -1, -1]


def test_bytes_are_read_like_files():
    assert open_image(encoded(photo(), "PNG")).tobytes() == photo().tobytes()
    with pytest.raises(ValueError, match="Cannot read the picture: the file is empty"):
        open_image(b"")


def huge_png(side: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "is empty"),
        (b"no picture", "not a picture in a known format"),
        (encoded(photo(width=64, height=64), "JPEG")[:-900], "truncated"),
        (encoded(photo(width=64, height=64), "PNG")[:-900], "truncated"),
        (encoded(photo(width=64, height=64), "WEBP")[:-400], "is damaged"),
        (encoded(photo(width=64, height=64), "GIF")[:-900], "truncated"),
        (huge_png(13_360), "more than 178,000,000 pixels"),  # between PIL's warning and its error
        (huge_png(60_000), "more than 178,000,000 pixels"),
    ],
)
def test_unreadable_files_end_in_one_sentence(tmp_path, content, reason):
    path = tmp_path / "bad file.jpg"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=reason) as caught:
        open_image(path)
    message = str(caught.value)
    assert message.startswith(f"Cannot read {path}: ") and message.endswith(".")
    assert "\n" not in message


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        open_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="is a folder"):
        open_image(tmp_path)


def test_no_warning_leaks(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # PIL warns from here on, up to twice this
    photo().save(tmp_path / "a.png")
    open_image(tmp_path / "a.png")
    assert not recwarn.list


# ---------------------------------------------------------------------- many pictures


def names(found: list[tuple[Path, Path]]) -> list[str]:
    assert all(file.is_file() for file, _ in found)
    return [relative.as_posix() for _, relative in found]


def test_a_folder_is_searched_to_the_bottom(folder):
    assert names(find_images(str(folder))) == ["b.png", "Ärzte/broken.png", "Ärzte/日本.JPG"]


def test_a_file_is_itself_whatever_its_suffix(folder):
    assert names(find_images(folder / "b.png")) == ["b.png"]
    assert names(find_images(folder / "notes.txt")) == ["notes.txt"]


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("*.png", ["фото [1]/b.png"]),
        ("**/*", ["фото [1]/b.png", "фото [1]/Ärzte/broken.png", "фото [1]/Ärzte/日本.JPG"]),
        ("Ärzte/*.[Jj][Pp][Gg]", ["фото [1]/Ärzte/日本.JPG"]),
    ],
)
def test_globs(folder, pattern, expected):
    assert names(find_images(f"{folder.parent}/фото*/{pattern}")) == expected


def test_relative_globs(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert find_images("Ärzte/**/*.JPG") == [(Path("Ärzte/日本.JPG"), Path("日本.JPG"))]
    assert names(find_images("*.png")) == ["b.png"]


def test_nothing_found_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no file or folder"):
        find_images(tmp_path / "none")
    for empty in (tmp_path, tmp_path / "*.png"):
        with pytest.raises(ValueError, match="No picture found"):
            find_images(empty)


@pytest.mark.parametrize("mode", ["bicubic", "area"])
def test_resize_is_antialiased(mode):
    noise = torch.rand(2, 3, 64, 64) * 2 - 1  # of deviation 0.58; plain sampling would keep it
    small = resize(noise, 8, mode)
    assert small.shape == (2, 3, 8, 8)
    assert small.std() < 0.15
    assert resize(noise[0], (4, 6), mode).shape == (3, 4, 6)
    assert resize(noise, 64) is noise


def test_grid_keeps_the_order_and_fills_with_white():
    levels = torch.tensor([-1.0, 0.0, 0.5]).view(3, 1, 1, 1).expand(3, 3, 2, 4)
    sheet = grid(levels, columns=2)
    assert sheet.size == (8, 4)
    corners = [sheet.getpixel((x, y))[0] for y in (0, 2) for x in (0, 4)]
    assert corners == [0, 128, 191, 255]
    assert grid(levels).size == (8, 4) and grid(levels, columns=9).size == (12, 2)
    with pytest.raises(ValueError, match="A grid needs pictures"):
        grid(levels[:0])


def test_labels_stand_above_the_picture():
    picture = Image.new("RGB", (120, 30), "red")
    result = labelled(picture, ["a", "b", "c"])
    top = result.height - 30
    assert top > 0 and result.crop((0, top, 120, result.height)).tobytes() == picture.tobytes()
    header = result.convert("L").crop((0, 0, 120, top))
    assert all(header.crop((x, 0, x + 40, top)).getextrema()[0] < 128 for x in (0, 40, 80))


def test_long_labels_keep_apart():
    picture = Image.new("RGB", (4 * 96, 10))
    result = labelled(picture, ["reconstruction", *(f"anime64 n = {n}" for n in (1, 2, 3))])
    header = result.convert("L").crop((0, 0, 4 * 96, result.height - 10))
    for border in (96, 192, 288):
        assert header.crop((border - 2, 0, border + 2, header.height)).getextrema() == (255, 255)
    assert header.getextrema()[0] < 128


def test_central_square_then_resize():
    wide = Image.new("RGB", (40, 8), RED)
    wide.paste(WHITE, (16, 0, 24, 8))
    assert (fit(wide, 4) == 255).all()
    assert fit(photo(0, 7, 31), 16).shape == (3, 16, 16)


def test_results_of_different_pictures_have_different_names():
    ending = re.compile(r"(_latents)?$")
    paths = [Path(p) for p in ("a.png", "sub/a.png", "b.png", "b.jpg", "c.png", "c_latents.png")]
    names = [name.as_posix() for name in result_names(paths, ending)]
    assert names == ["a", "sub/a", "b.png", "b.jpg", "c", "c_latents.png"]


def test_opacity_is_upright_and_white_where_there_is_none(tmp_path):
    picture = photo(0, 8, 4).convert("RGBA")
    picture.putpixel((0, 0), (9, 9, 9, 0))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    picture.save(tmp_path / "a.png", exif=exif)
    opacity = open_opacity(tmp_path / "a.png")
    assert opacity.mode == "L" and opacity.getpixel((7, 3)) == 0
    assert opacity.getpixel((0, 0)) == 255
    photo(1).save(tmp_path / "b.jpg")
    assert open_opacity(tmp_path / "b.jpg").getextrema() == (255, 255)
    with pytest.raises(ValueError, match="Cannot read"):
        open_opacity(tmp_path / "none.png")


# ------------------------------------------------------------------- not to be trusted


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_program_is_started_for_a_disguised_file(tmp_path, monkeypatch):
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}:/usr/bin:/bin")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow looks for it anew
    (tmp_path / "a.jpg").write_bytes(EPS)
    for source in (tmp_path / "a.jpg", EPS):
        for opened in (open_image, decode):
            with pytest.raises(ValueError, match="not a picture in a known format"):
                opened(source)
    with pytest.raises(ValueError, match="not a picture in a known format"):
        open_opacity(tmp_path / "a.jpg")
    assert not (tmp_path / "started").exists()
    with pytest.raises(OSError), Image.open(tmp_path / "a.jpg") as image:  # the trap works
        image.load()
    assert (tmp_path / "started").exists()


@pytest.mark.parametrize("head", [b"", encoded(photo(), "JPEG")], ids=["zeros", "a picture"])
def test_a_huge_sparse_file_is_refused_at_once(tmp_path, head):
    path = tmp_path / "x.jpg"
    path.write_bytes(head)
    os.truncate(path, 20 << 30)
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"x\.jpg: it has more than 1,073,741,824 bytes"):
        open_image(path)
    assert time.perf_counter() - start < 0.5


def test_an_unknown_large_file_is_told_by_its_header(tmp_path):
    (tmp_path / "x.jpg").touch()
    os.truncate(tmp_path / "x.jpg", 1 << 30)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="not a picture in a known format"):
        open_image(tmp_path / "x.jpg")
    assert time.perf_counter() - start < 0.5


def test_what_is_no_file_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket.png"))
    for name in ("pipe", "device", "socket"):
        for opened in (open_image, open_opacity):
            with pytest.raises(ValueError, match="a pipe, a socket or a device, not a file"):
                opened(tmp_path / f"{name}.png")
    (tmp_path / "lost.png").symlink_to("nowhere")
    with pytest.raises(ValueError, match="the link leads nowhere"):
        open_image(tmp_path / "lost.png")


def test_names_do_not_steer_the_terminal():
    with pytest.raises(ValueError, match=r"Cannot read a\\x1b\[2J\\nb\.png: there is no") as caught:
        open_image("a\x1b[2J\nb.png")
    assert str(caught.value).isprintable()
    with pytest.raises(ValueError) as caught:
        open_image("a/" * 5000 + "b.png")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("kind", ["MPO", "AVIF", "TIFF", "PPM", "GIF", "BMP", "WEBP"])
def test_the_listed_formats_are_read(tmp_path, kind):
    options = {"append_images": [photo(2, 32, 32)], "save_all": True} if kind == "MPO" else {}
    (tmp_path / "a.jpg").write_bytes(encoded(photo(1, 32, 32), kind, **options))
    assert open_image(tmp_path / "a.jpg").size == (32, 32)


WHOLE = [encoded(photo(1, 24, 16), kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "PPM")]


@settings(deadline=3000, max_examples=300, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(WHOLE),
    st.lists(st.tuples(st.integers(0, 3000), st.binary(min_size=1, max_size=8)), max_size=6),
    st.integers(0, 3000),
)
def test_any_bytes_are_a_picture_or_one_sentence(data, changes, keep):
    data = bytearray(data)
    for place, replacement in changes:
        start = place % len(data)
        data[start : start + len(replacement)] = replacement
    data = bytes(data if keep > 1500 else data[:keep])
    try:
        assert open_image(data).mode == "RGB"
    except ValueError as error:
        message = str(error)
        assert message.startswith("Cannot read the picture: ") and message.isprintable()
        assert len(message) < 400
