"""A drawing's colours for a photo: codes found again, which drawing for whom, films, bad drawings.

pytest tests/test_reference.py
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import photo
from PIL import Image

from encoder import infer, reference
from encoder.model import Encoder, EncoderConfig
from encoder.pipeline import Translator
from encoder.reference import References, invert
from generators.checkpoint import save
from generators.images import to_pil
from generators.palette import colours
from generators.stylegan2 import broadcast


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(5)
    encoder = Encoder(EncoderConfig(resolution=16, num_ws=6, w_dim=8, width=16, depth=1))
    with torch.no_grad():
        encoder.to_offsets.mul_(20)
    return encoder.eval()


@pytest.fixture(autouse=True)
def paler(face, anime) -> None:
    """Pictures of random networks are far outside [-1, 1]."""
    for generator in (face, anime):
        for name, parameter in generator.named_parameters():
            if ".torgb." in name and "affine" not in name:
                parameter.mul_(0.25)


@pytest.fixture
def translator(face, anime, encoder) -> Translator:
    return Translator(face, anime, encoder, swap_resolution=8)


@pytest.fixture
def drawings(translator, face) -> tuple[torch.Tensor, torch.Tensor]:
    """Six drawings (6, 3, 16, 16), and the w (6, 8) of their drawn blocks; of other poses."""
    z = torch.randn(12, 8, generator=torch.Generator().manual_seed(8))
    poses, codes = face.mapping(z).chunk(2)
    with torch.no_grad():
        images = translator.synthesis(broadcast(poses, 6), drawing_ws=broadcast(codes, 6))
    return images.clamp(-1, 1), codes


@pytest.fixture
def models(tmp_path, face, anime, encoder, monkeypatch) -> list[str]:
    """The options that name three tiny networks; what they draw is no face, and may be far."""
    monkeypatch.setattr(reference, "LARGEST_ERROR", 100)
    options = ["--swap-resolution", "8", "--device", "cpu", "--no-align", "--superres", "bicubic"]
    networks = {"face-generator": face, "anime-generator": anime, "encoder": encoder}
    for option, module in networks.items():
        file = tmp_path / "models" / f"{option}.safetensors"
        save(file, module)
        options += [f"--{option}", str(file)]
    return options


@pytest.fixture
def given(tmp_path, drawings) -> Path:
    """A folder with the six drawings."""
    folder = tmp_path / "drawings"
    folder.mkdir()
    for i, image in enumerate(drawings[0]):
        to_pil(image).resize((48, 48), Image.Resampling.NEAREST).save(folder / f"d{i}.png")
    return folder


def run(source, out, *options) -> int:
    return infer.main(["--input", str(source), "--output", str(out), *options])


def lines(out: Path) -> dict[str, dict]:
    text = (out / "manifest.jsonl").read_text()
    return {Path(line["input"]).name: line for line in map(json.loads, text.splitlines())}


def pixels(file: Path) -> np.ndarray:
    return np.asarray(Image.open(file)).astype(int)


# ------------------------------------------------------------------------------ the search


def test_planted_codes_are_found_and_give_other_photos_their_colours(translator, face, drawings):
    images, codes = drawings
    found, errors = invert(translator, images)
    assert found.shape == codes.shape and not found.is_inference()
    start = translator.encoder(images).mean(dim=1)
    z = torch.randn(6, 8, generator=torch.Generator().manual_seed(9))
    photos = broadcast(face.mapping(z), 6)

    def drawn(w: torch.Tensor) -> torch.Tensor:
        return translator.synthesise(photos, drawing_ws=broadcast(w, 6))[0]

    wanted, made, before = (colours(drawn(w)).flatten(1) for w in (codes, found, start))
    closer = (made - wanted).square().mean() / (before - wanted).square().mean()
    assert closer < 0.2
    distances = torch.cdist(made - made.mean(0), wanted - wanted.mean(0))
    assert (distances.argmin(dim=1) == torch.arange(6)).all()  # each reference is its own
    assert errors.mean() < 0.1
    one, error = invert(translator, images[2:3])  # no other drawing has a say
    torch.testing.assert_close(one, found[2:3], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(error, errors[2:3], atol=1e-4, rtol=1e-2)


def test_codes_stay_where_w_are(translator, face):
    """Of noise, too, which nothing draws."""
    noise = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    found, errors = invert(translator, noise)
    with torch.no_grad():
        spread = face.mapping(torch.randn(500, 8)) - face.w_avg
    assert (found - face.w_avg).norm(dim=1).max() < 3 * spread.norm(dim=1).max()
    assert errors.isfinite().all()


def test_strength_mixes_the_codes(translator, ws):
    codes = {Path("a"): torch.ones(8), Path("b"): torch.zeros(8)}
    names = {"x": Path("a"), "y": Path("b"), "z": Path("a")}
    for strength in (0.0, 0.25, 1.0):
        mixed = References(names, codes, strength).mixed(ws, ["x", "y", "z"])
        target = torch.tensor([1.0, 0, 1])[:, None, None]
        torch.testing.assert_close(mixed, (1 - strength) * ws + strength * target)


# ---------------------------------------------------------------------------- the command


def test_pictures_take_the_drawing_s_colours_and_strength_0_changes_nothing(
    models, given, translator, tmp_path
):
    source = tmp_path / "photos"
    source.mkdir()
    for i in range(3):
        photo(i).save(source / f"{i}.png")
    plain, none, full = (tmp_path / name for name in ("plain", "none", "full"))
    drawing = given / "d1.png"
    assert run(source, plain, *models, "--save", "anime,reconstruction") == 0
    options = [*models, "--save", "anime,reconstruction", "--reference", str(drawing)]
    assert run(source, none, *options, "--reference-strength", "0") == 0
    assert run(source, full, *options) == 0
    own = References.read(drawing, translator, ["x"]).codes[drawing]
    for i in range(3):
        same = f"{i}_reconstruction.png"
        assert np.array_equal(pixels(full / same), pixels(plain / same))
        assert np.array_equal(pixels(none / f"{i}.png"), pixels(plain / f"{i}.png"))
        made = pixels(full / f"{i}.png")
        assert np.abs(made - pixels(plain / f"{i}.png")).mean() > 5
        crop = translator.prepare([Image.open(source / f"{i}.png")])
        with torch.no_grad():
            codes = broadcast(own[None], 6)
            wanted = translator.synthesise(translator.encode(crop), drawing_ws=codes)[0][0]
        assert np.abs(made - np.asarray(to_pil(wanted)).astype(int)).max() <= 1
        assert lines(full)[f"{i}.png"]["reference"] == str(drawing)
        assert "reference" not in lines(plain)[f"{i}.png"]
    assert run(source, plain, *models, "--save", "anime,reconstruction", "--seed", "5") == 0
    assert run(source, full, *options, "--reference-strength", "0.5") == 2  # made with another


def test_of_a_folder_each_photo_gets_one_by_its_name_and_the_seed(models, given, tmp_path):
    source, few = tmp_path / "photos", tmp_path / "few"
    source.mkdir(), few.mkdir()
    for i in range(8):
        photo(i).save(source / f"{i}.png")
    for i in (3, 5):
        shutil.copy(source / f"{i}.png", few)
    options = [*models, "--reference", str(given)]
    outs = [tmp_path / name for name in "abc"]
    assert run(source, outs[0], *options, "--batch-size", "3") == 0
    assert run(few, outs[1], *options) == 0
    assert run(source, outs[2], *options, "--seed", "1") == 0
    first, some, other = (
        {k: v["reference"] for k, v in lines(out).items()} for out in outs
    )  # fmt: skip
    assert some == {name: first[name] for name in ("3.png", "5.png")}
    assert other != first and len(set(first.values())) > 1
    assert set(first.values()) <= {str(file) for file in given.iterdir()}
    for name in some:
        assert np.abs(pixels(outs[0] / name) - pixels(outs[1] / name)).max() <= 1


def test_a_film_has_one_reference(models, given, translator, tmp_path, monkeypatch):
    pytest.importorskip("av")
    from films import make_film

    used, drawings = [], Translator.drawings

    def noted(self, *args, drawing_ws=None, **options):
        used.append(drawing_ws)
        return drawings(self, *args, drawing_ws=drawing_ws, **options)

    monkeypatch.setattr(Translator, "drawings", noted)
    clip, out = make_film(tmp_path / "clip.mp4", [0, 0.04, 0.08]), tmp_path / "out"
    assert run(clip, out, *models, "--reference", str(given), "--batch-size", "2") == 0
    drawing = Path(lines(out)["clip.mp4"]["reference"])
    codes = References.read(drawing, translator, ["x"]).codes[drawing]
    torch.testing.assert_close(torch.cat(used), codes.expand(3, 6, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_backends_draw_the_same(backend, face, anime, encoder, drawings, ws):
    for package in ("onnx", "onnxscript", backend):
        pytest.importorskip(package)
    networks = (face, anime, encoder)
    other = Translator(*networks, swap_resolution=8, backend=backend, export=False)
    torch_s = Translator(*networks, swap_resolution=8)
    codes = broadcast(drawings[1][:3], 6)
    wanted, made = (t.synthesise(ws, drawing_ws=codes)[0] for t in (torch_s, other))
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------ bad drawings


def test_what_is_no_drawing_is_one_sentence(models, given, tmp_path, monkeypatch, capsys):
    def complaint(source, *options) -> str:
        try:
            code = run(face, tmp_path / "out", *models, "--reference", str(source), *options)
        except SystemExit as stop:  # of a mistake in the options themselves
            code = stop.code
        text = " ".join("".join(capsys.readouterr()).split())
        assert code == 2 and "Traceback" not in text and not (tmp_path / "out").exists()
        return text

    face = tmp_path / "photo.png"
    photo(1).save(face)
    wide, text, empty = tmp_path / "wide.png", tmp_path / "text.png", tmp_path / "empty"
    photo(2, 60, 20).save(wide)
    text.write_text("no picture")
    empty.mkdir()
    assert "60 x 20 pixels, not a head alone" in complaint(wide)
    assert "text.png" in complaint(text)
    assert "empty" in complaint(empty)
    assert "nowhere" in complaint(tmp_path / "nowhere.png")
    assert "0 to 1" in complaint(given, "--reference-strength", "1.5")
    assert "one style" in complaint(given, "--styles", "anime,sketch")
    noise = tmp_path / "noise.png"
    photo(3, 8, 8).resize((64, 64), Image.Resampling.NEAREST).save(noise)
    monkeypatch.setattr(reference, "LARGEST_STRANGENESS", 2.5)
    assert "noise.png shows no drawn head, or one unlike any that this style" in complaint(noise)
    monkeypatch.setattr(reference, "LARGEST_STRANGENESS", math.inf)
    monkeypatch.setattr(reference, "LARGEST_ERROR", 0.4)
    assert "noise.png shows no drawn face that the generator can draw" in complaint(noise)


def test_a_style_s_own_drawings_are_not_strange_to_it_and_other_things_are(translator, drawings):
    strangeness = reference.Strangeness(translator)
    own = strangeness(drawings[0])
    noise = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert own.shape == (6,) and 0.3 < own.median() < 2
    assert strangeness(noise).min() > 1.5 * own.max()
    torch.testing.assert_close(strangeness(drawings[0][:2]), own[:2])
