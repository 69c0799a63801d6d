"""Retouched drawings: halves, colours, ink, eyes, mouths; a style that learns them.

pytest tests/test_retouch.py
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pictures import photo
from test_train_gan import config, metrics, same  # noqa: F401

from encoder.attributes import points_of
from encoder.model import Encoder, EncoderConfig
from encoder.retouch import drawings as retouch
from encoder.retouch.eyes import Turns, irises, turns_of, with_eyes
from encoder.retouch.mouths import Mouths, mouths_of, place_of, with_mouths
from generators import gan, train
from generators.blocks import SwappedSynthesis
from generators.checkpoint import load, save
from generators.data import first_pictures, open_dataset
from generators.filters import DRAWINGS, LATENTS
from generators.images import open_image, resize, to_float
from generators.latents import read_ws
from generators.stylegan2 import Generator
from generators.superres import SuperResolution, SuperResolutionConfig

ASIDE = ("--hair=0", "--ground=0", "--skin=0", "--sharpen=0", "--flatten=0", "--no-eyes",
         "--no-mouths", "--emphasis=0")  # fmt: skip
PLAIN = (*ASIDE, "--strangers=0")


@pytest.fixture
def models(tmp_path: Path, face, anime) -> Path:
    """A folder with an encoder, its face generator and a fine-tune, and photos/."""
    torch.manual_seed(5)
    sizes = {"resolution": 16, "num_ws": face.num_ws, "w_dim": face.w_dim, "width": 16, "heads": 2}
    encoder = Encoder(EncoderConfig("mobilenetv3_small_050", depth=1, **sizes)).eval()
    with torch.no_grad():
        encoder.to_offsets.mul_(20)
    for name, network in (("encoder", encoder), ("face", face), ("anime", anime)):
        save(tmp_path / f"{name}.safetensors", network)
    (tmp_path / "photos").mkdir()
    for i in range(5):
        photo(i).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path


def made(models: Path, *more: str) -> int:
    names = {"encoder": "encoder", "face-generator": "face", "anime-generator": "anime"}
    files = [f"--{option}={models / name}.safetensors" for option, name in names.items()]
    return retouch.main([str(models / "pairs"), f"--data={models / 'photos'}", "--images=4",
                           "--swap-resolution=8", *files, *more])  # fmt: skip


@pytest.mark.parametrize("half", ["left", "right"])
def test_each_side_is_the_better_half_of_one_of_the_drawings(half):
    drawings, mirrored = torch.rand(2, 2, 3, 16, 16)
    joined = retouch.joined_halves(drawings, mirrored, half)
    ours, other = (slice(0, 6), slice(10, 16)) if half == "left" else (slice(10, 16), slice(0, 6))
    assert (joined[..., ours] == drawings[..., ours]).all()
    assert (joined[..., other] == mirrored.flip(-1)[..., other]).all()
    again = retouch.joined_halves(mirrored, drawings, half)  # of the mirrored photo
    torch.testing.assert_close(again, joined.flip(-1))
    seam = slice(6, 10)  # in between, between both
    both = torch.stack([drawings, mirrored.flip(-1)])[..., seam]
    assert (both.amin(0) <= joined[..., seam]).all() and (joined[..., seam] <= both.amax(0)).all()


def test_the_command_writes_each_photo_and_its_mirror_image(models, face, capsys):
    assert made(models, *PLAIN) == 0
    ws = read_ws(models / "pairs" / LATENTS, face)
    drawings = to_float(open_dataset(models / "pairs" / DRAWINGS, 16).pictures)
    assert ws.shape == (8, 6, 8) and drawings.shape == (8, 3, 16, 16)
    photos, encoder, draws = looked_at(models)
    with torch.no_grad():
        wanted = torch.stack([encoder(photos), encoder(photos.flip(-1))], 1).flatten(0, 1)
        right = draws(wanted).clamp(-1, 1)[..., 10:]
    torch.testing.assert_close(ws, wanted, atol=1e-5, rtol=1e-5)
    assert (drawings[..., 10:] - right).abs().max() < 0.01
    assert (drawings[::2] - drawings[1::2].flip(-1)).abs().max() == 0
    assert made(models) == 2 and "overwrite" in capsys.readouterr().err
    assert made(models, "--overwrite") == 0
    retouched = to_float(open_dataset(models / "pairs" / DRAWINGS, 16).pictures)
    assert (retouched - drawings).abs().mean() > 0.05
    assert (retouched[::2] - retouched[1::2].flip(-1)).abs().max() < 0.01


def looked_at(models: Path) -> tuple[torch.Tensor, Encoder, SwappedSynthesis]:
    """The four photos, and what looks at them and draws them."""
    photos = first_pictures(open_dataset(models / "photos", 16), 4)
    files = (models / f"{name}.safetensors" for name in ("face", "anime"))
    draws = SwappedSynthesis(*(load(file, Generator) for file in files), 8)
    return photos, load(models / "encoder.safetensors", Encoder).eval(), draws


def test_strangers_give_the_w_of_the_blocks_that_draw(models, face):
    assert made(models, *ASIDE, "--strangers=0.5") == 0
    ws = read_ws(models / "pairs" / LATENTS, face)[::2]
    photos, encoder, draws = looked_at(models)
    with torch.no_grad():
        own, other = encoder(photos), encoder(photos.roll(1, 0))
        drawn = draws(own, drawing_ws=other).clamp(-1, 1)
    first = draws.limit.first
    torch.testing.assert_close(ws[:, :first], own[:, :first], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ws[::2, first:], own[::2, first:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ws[1::2, first:], other[1::2, first:], atol=1e-5, rtol=1e-5)
    drawings = to_float(open_dataset(models / "pairs" / DRAWINGS, 16).pictures)[::2]
    assert (drawings - drawn)[1::2, ..., 10:].abs().max() < 0.01
    assert (drawings - drawn)[::2, ..., 10:].abs().max() > 0.1


def head(hair: float, ground: float, skin: float, mouth: float = -0.8) -> torch.Tensor:
    """(1, 3, 64, 64): a face with a mouth, hair around it, ground behind; greys."""
    y, x = torch.meshgrid(torch.arange(64) - 31.5, torch.arange(64) - 31.5, indexing="ij")
    picture = torch.full((64, 64), ground)
    picture[(y + 3) ** 2 + x**2 < 26**2] = hair
    picture[((y - 5) / 17) ** 2 + (x / 14) ** 2 < 1] = skin
    picture[45:47, 28:36] = mouth
    return picture.expand(1, 3, 64, 64).clone()


HAIR, GROUND, SKIN, MOUTH = (..., 10, 32), (..., 60, 4), (..., 40, 26), (..., 45, 32)


def test_hair_and_ground_go_to_the_photos_and_the_face_stays():
    drawn, photo = head(0.1, 0.9, 0.8), head(-0.9, 0.2, 0.0)
    for hair, ground in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0)):
        got = retouch.with_colours(drawn, photo, photo, hair, ground)[0, 0]
        assert float(got[HAIR]) == pytest.approx(0.1 - hair, abs=0.06)
        assert float(got[GROUND]) == pytest.approx(0.9 - 0.7 * ground, abs=0.06)
        assert float(got[SKIN]) == pytest.approx(0.8, abs=0.03)
        assert float(got[MOUTH]) == pytest.approx(-0.8, abs=0.03)
    stranger, large = (resize(x, 128) for x in (head(0.6, -1.0, 0.0), photo))
    got = retouch.with_colours(drawn, large, stranger, 1, 1)[0, 0]
    assert float(got[HAIR]) == pytest.approx(0.6, abs=0.06)
    assert float(got[GROUND]) == pytest.approx(0.2, abs=0.06)


def test_face_and_hair_are_shares_of_each_pixel_and_mirrored_with_it():
    drawings = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    face, hair = retouch.faces_and_hair(drawings)
    assert face.shape == hair.shape == (3, 1, 32, 32)
    assert face.min() >= 0 and hair.min() >= 0 and (face + hair).max() <= 1 + 1e-6
    for part, other in zip((face, hair), retouch.faces_and_hair(drawings.flip(-1)), strict=True):
        torch.testing.assert_close(part, other.flip(-1), atol=1e-5, rtol=0)


def test_sharpening_makes_edges_steeper_and_leaves_plain_areas():
    drawn = head(0.1, 0.9, 0.8)
    sharp = retouch.sharpened(drawn, 0.7)
    assert float((sharp - drawn)[..., 8:12, 30:34].abs().max()) < 1e-5
    steep = [float(x.diff(dim=-1).abs().max()) for x in (drawn, sharp)]
    assert steep[1] > 1.2 * steep[0]
    assert (retouch.sharpened(drawn, 0) == drawn).all()


def test_flattening_joins_like_colours_and_keeps_edges():
    drawn = head(0.1, 0.9, 0.8)
    rough = drawn + 0.04 * torch.randn(drawn.shape, generator=torch.Generator().manual_seed(2))
    flat = retouch.flattened(rough, 4)
    assert flat[..., 8:12, 28:36].std() < 0.4 * rough[..., 8:12, 28:36].std()
    assert float((flat[MOUTH] - drawn[MOUTH]).abs().max()) < 0.1
    steep = [float(x.diff(dim=-1).abs().max()) for x in (drawn, flat)]
    assert steep[1] > 0.8 * steep[0]
    assert retouch.flattened(rough, 0) is rough


def test_drawings_are_enlarged_by_super_resolution(models, face):
    network = SuperResolution(SuperResolutionConfig(width=4, blocks=1))
    save(models / "superres.safetensors", network)
    larger = ("--size=32", f"--superres={models / 'superres.safetensors'}")
    assert made(models, *PLAIN, "--overwrite") == 0
    small = to_float(open_dataset(models / "pairs" / DRAWINGS, 16).pictures)
    assert made(models, *PLAIN, *larger, "--overwrite") == 0
    stored = pq.read_table(models / "pairs" / DRAWINGS)["image"][0].as_py()["bytes"]
    assert open_image(stored).size == (32, 32)
    large = open_dataset(models / "pairs" / DRAWINGS, 32)
    assert (resize(to_float(large.pictures), 16, "area") - small).abs().mean() < 0.1


# ------------------------------------------------------------------------------ mouths


class Onet:
    """In place of MTCNN's last network: corners of the mouth so far apart, and a score; the nose
    so far to the right, in half distances of the eyes."""

    def __init__(self, apart: list[float], scores: list[float], turn: float) -> None:
        self.apart, self.scores, self.turn = apart, scores, turn

    def __call__(self, looks):
        # in parts of what is cut out, 0.72 of the side from 0.14, 0.2 on: the mouth is at 0.66
        points, nose = torch.zeros(len(looks), 10), 0.5 + 0.174 * self.turn
        for i, apart in enumerate(self.apart):
            half = 0.125 * apart / 0.72  # the eyes are 1 / 4 of the side apart
            points[i, :5] = torch.tensor([0.326, 0.674, nose, 0.5 - half, 0.5 + half])
            points[i, 5:] = torch.tensor([0.3, 0.3, 0.5, 0.639, 0.639])
        return None, points, torch.tensor([[1 - s, s] for s in self.scores])


def aligner_of(apart: list[float], scores: list[float], turn: float = 0) -> Any:
    mtcnn = SimpleNamespace(onet=Onet(apart, scores, turn), device="cpu")
    return SimpleNamespace(mtcnn=mtcnn)


def mouths_at(photos: torch.Tensor, aligner: Any) -> Mouths:
    return mouths_of(photos, *points_of(photos, aligner))


def smiling(teeth: bool) -> torch.Tensor:
    """(1, 3, 128, 128): skin, red lips at 0.66 of the height, teeth between them or not."""
    picture = torch.tensor([0.6, 0.2, 0.0]).view(1, 3, 1, 1).expand(1, 3, 128, 128).clone()
    lips = torch.tensor([0.1, -0.6, -0.5]).view(1, 3, 1, 1)
    picture[..., 80:91, 40:88] = lips
    if teeth:
        picture[..., 83:88, 44:84] = 0.8
    return picture


def test_a_mouth_is_as_wide_as_its_corners_and_open_where_teeth_show():
    photos = torch.cat([smiling(True), smiling(False), smiling(True), smiling(True)])
    found = mouths_at(photos, aligner_of([0.96, 0.96, 0.8, 0.96], [1, 1, 1, 0.5]))
    assert found.found.tolist() == [True, True, True, False]
    assert found.wide[:3].tolist() == pytest.approx([0.525, 0.525, 0.125], abs=0.02)
    assert found.open[0] > 0.75 and found.open[1] < 0.05
    assert found.open[2] < 0.1  # as narrow as that none smiles
    darker = mouths_at(0.4 * photos - 0.6, aligner_of([0.96] * 4, [1] * 4))
    assert darker.open[0] > 0.4 > 0.1 > darker.open[1]
    grins = mouths_at(0.4 * photos - 0.6, aligner_of([0.98, 1.02, 1.1, 1.3], [1] * 4))
    assert grins.open[1] == pytest.approx(0.5, abs=0.05)  # whatever the light
    assert (grins.open[2:] == 1).all()


def test_who_laughs_is_written_several_times(models, face, monkeypatch):
    mouths = Mouths(torch.zeros(4), torch.tensor([0.1, 0.9, 0.5, 1.0]), torch.tensor([False] * 4))
    monkeypatch.setattr(retouch, "mouths_of", lambda *_: mouths)
    one_mouth = tuple(option for option in PLAIN if option != "--no-mouths")
    assert made(models, *one_mouth, "--laughs=1") == 0
    once = read_ws(models / "pairs" / LATENTS, face)
    assert made(models, *one_mouth, "--overwrite") == 0
    places = [0, 1, 2, 3, 2, 3, 2, 3, 4, 5, 6, 7, 6, 7, 6, 7]  # a photo, its mirror image, the next
    assert torch.equal(read_ws(models / "pairs" / LATENTS, face), once[places])
    drawings = open_dataset(models / "pairs" / DRAWINGS, 16).pictures
    assert len(drawings) == 16 and (drawings[2] == drawings[6]).all()
    assert (drawings[2] != drawings[8]).any()


def test_mouths_are_drawn_where_the_drawing_has_its_own():
    drawings = resize(head(0.1, 0.9, 0.8), 128).repeat(4, 1, 1, 1)
    drawings[:, :, 90:94, 56:72] = 0.8  # no mouth where `head` has it
    drawings[:, :, 80:83, 61:67] = -0.6  # but where a style draws it
    values = torch.tensor([0.0, 1.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    made = with_mouths(drawings, Mouths(*values, torch.tensor([True, True, True, False])))
    assert torch.equal(made[3], drawings[3])
    ink = (made[:3].mean(dim=1) < -0.2).float().flatten(1).sum(dim=1)
    own = (drawings[:1].mean(dim=1) < -0.2).float().sum()
    assert own < ink[0] + own and ink[0] < ink[1] < ink[2]
    changed = (made[:3] - drawings[:3]).abs().amax(dim=1) > 0.02
    assert not changed[:, :66].any() and not changed[:, 100:].any()  # eyes and chin stay
    inside = made[2, :, 82:86, 62:66].mean(dim=(1, 2))
    assert inside[0] - inside[1] > 0.4  # red
    torch.testing.assert_close(
        with_mouths(drawings.flip(-1), Mouths(*values, torch.tensor([True] * 4)))[:3],
        made[:3].flip(-1), atol=1e-4, rtol=0,
    )  # fmt: skip


def test_a_mouth_is_found_where_it_is_darker_than_what_is_around():
    drawings = torch.full((2, 3, 64, 64), 0.8)
    drawings[0, :, 40:42, 34:37] = -0.5
    drawings[1, :, 39:41, 26:29] = -0.5
    x, y = place_of(drawings)
    assert x.tolist() == pytest.approx([35.5, 27.5], abs=0.7)
    assert y.tolist() == pytest.approx([41, 40], abs=0.7)


# -------------------------------------------------------------------------------- eyes


def test_skin_is_browner_where_the_photos_is_dark_and_hair_and_ground_stay():
    drawing = torch.full((3, 3, 64, 64), -0.4)
    drawing[:, :, 20:60, 16:48] = 0.9
    photos = torch.full((3, 3, 96, 96), 0.4)  # fair, dark, darker
    photos[1:] = torch.tensor([0.0, -0.45, -0.6]).view(3, 1, 1)
    photos[2] -= 0.3
    made = retouch.with_skin(drawing, photos, 1.0)
    assert torch.equal(made[0], drawing[0])
    cheeks = made[:, :, 38:44, 28:36].mean(dim=(2, 3))
    assert (cheeks[1] < 0.6).all() and (cheeks[2] < cheeks[1] - 0.2).all()
    assert (cheeks[1:].diff(dim=1) < -0.1).all()  # brown: red, then green, then blue
    light = ((cheeks + 1) * torch.tensor([0.299, 0.587, 0.114])).sum(dim=1)
    assert light[1] / light[0] == pytest.approx((1 - 0.331) / 1.05, abs=0.03)  # as in the photo
    assert (made[1] - drawing[1])[:, :, :10].abs().max() < 0.01
    assert torch.equal(retouch.with_skin(drawing, photos, 0.0), drawing)


def test_a_head_is_turned_as_far_as_its_nose_is_off_the_middle():
    for turn in (-0.5, 0.0, 0.8, 1.7):
        looked = torch.zeros(2, 3, 128, 128), aligner_of([1, 1], [1, 0.5], turn)
        found = turns_of(*points_of(*looked))
        assert found.turn.tolist() == pytest.approx([min(turn, 1)] * 2, abs=1e-3)
        assert found.found.tolist() == [True, False]


def test_both_eyes_are_of_one_kind_and_the_farther_one_is_narrower():
    drawings = torch.full((4, 3, 128, 128), 0.8)
    drawings[:, :, :40] = torch.tensor([-0.2, 0.0, 0.9]).view(3, 1, 1)  # blue hair
    turns = Turns(torch.tensor([0.0, 0.8, -0.8, 0.8]), torch.tensor([True, True, True, False]))
    made = with_eyes(drawings, turns)
    assert torch.equal(made[3], drawings[3])  # no face
    # frontal: mirror images of one another, but for the lights, which are on the same side
    dark = made.amin(dim=1)[:, 44:80] < 0
    assert (dark[0] != dark[0].flip(-1)).float().mean() < 0.04
    assert (dark[2] != dark[1].flip(-1)).float().mean() < 0.04
    wide = [half.any(dim=0).sum() for half in (dark[1][:, :64], dark[1][:, 64:])]
    assert wide[1] < 0.85 * wide[0]
    eye = made[0, :, 64:70, 42:50].mean(dim=(1, 2))  # the lower iris: blue
    assert eye[2] > eye[0] + 0.3
    changed = (made[0] - drawings[0]).abs().amax(dim=0) > 0.02
    assert not changed[:44].any() and not changed[80:].any()  # fringe, nose and mouth stay
    assert not changed[:, 60:68].any()


def test_irises_are_amber_below_dark_hair_green_below_brown_and_blue_below_fair():
    drawings = torch.full((4, 3, 64, 64), 0.8)
    for picture, hair in zip(drawings, (-0.9, -0.3, 0.1, 0.6), strict=True):
        picture[:, :20] = hair
    found = irises(drawings)[:, :, 0, 0]
    assert found.argmax(dim=1).tolist() == [0, 1, 2, 2]
    assert found.mean(dim=1).abs().max() < 1e-6  # no grey in them, and all are as vivid
    assert found.norm(dim=1).tolist() == pytest.approx([found[0].norm().item()] * 4)
    assert (found[2] - found[3]).abs().max() < 0.02  # fair is blue, however fair


@pytest.mark.parametrize(
    ("option", "said"),
    [("--size=0", "size"), ("--flatten=-1", "flatten"), ("--hair=1.5", "a number from 0 to 1"),
     ("--strangers=2", "a number from 0 to 1"),
     ("--ground=-1", "ground"), ("--sharpen=nan", "sharpen"), ("--images=0", "images")],
)  # fmt: skip
def test_a_share_is_one(models, option, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        made(models, option)
    assert said in " ".join(capsys.readouterr().err.split())
    assert not (models / "pairs").exists()


def test_an_encoder_of_another_generator_is_refused(models, capsys):
    assert made(models, "--encoder", "encoder64") == 2
    assert "give the encoder that was trained for it" in " ".join(capsys.readouterr().err.split())
    assert not (models / "pairs").exists()


def test_a_style_learns_them_beside_real_drawings_and_resumes_exactly(config, models):  # noqa: F811
    assert made(models) == 0
    pairs = models / "pairs"
    config = replace(
        config, latents=pairs / LATENTS, pairs=str(pairs / DRAWINGS), paired_weight=1.0,
        init=str(models / "anime.safetensors"), freeze_generator_below=8, reconstruction_weight=0,
        patch_weight=0.5, adversarial_weight=0.01, images=160, save_every=20, log_every=20,
        generator_lr=0.01,
    )  # fmt: skip
    train.train(config, cpu=True)
    lines = metrics(config.output)
    assert lines[-1]["l1"] < 0.8 * lines[0]["l1"] and {"d", "g", "patches"} <= lines[-1].keys()
    files = config.output / "generator.safetensors", models / "anime.safetensors"
    first = {n for n in load(files[1], Generator).state_dict() if ".b4." in n or "mapping" in n}
    assert first <= same(*(load(file, Generator) for file in files))
    again = replace(config, output=models / "again")
    train.train(replace(again, images=80), cpu=True)
    train.train(again, cpu=True)
    assert metrics(again.output)[-1] == lines[-1]


def test_eyes_and_mouths_count_as_much_as_they_are_told_to(config, models):  # noqa: F811
    numbers = torch.arange(64**2).view(1, 1, 64, 64)
    places = [gan.within(numbers, place) for place in (gan.EYES, gan.MOUTH)]
    assert (places[0] == 32 * 64 + 22).any() and (places[0] == 32 * 64 + 41).any()  # both eyes
    assert (places[1] == 41 * 64 + 32).any() and not (places[1] == 32 * 64 + 32).any()
    assert made(models) == 0
    pairs = models / "pairs"
    config = replace(
        config, latents=pairs / LATENTS, pairs=str(pairs / DRAWINGS), paired_weight=1.0,
        init=str(models / "anime.safetensors"), freeze_generator_below=8, reconstruction_weight=0,
        adversarial_weight=0, perceptual_weight=0, images=1600, warmup_lr=0.01,
    )  # fmt: skip
    train.train(config, cpu=True)
    train.train(replace(config, focus=10.0, output=models / "focused"), cpu=True)
    ws = read_ws(pairs / LATENTS, load(models / "anime.safetensors", Generator))
    wanted = to_float(open_dataset(pairs / DRAWINGS, 16).pictures)
    errors = []
    for run in (config.output, models / "focused"):
        drawn = load(run / "generator.safetensors", Generator).synthesis(ws)
        errors.append((drawn - wanted).square().mean(dim=(0, 1)).detach())
    before, after = (
        sum(gan.within(error[None, None], place).mean() for place in (gan.EYES, gan.MOUTH))
        for error in errors
    )
    assert after < before
    assert errors[1].mean() > errors[0].mean()
    logged = metrics(models / "focused")[-1]
    assert logged["eyes"] > 0 and logged["mouth"] > 0


def test_patches_alone_move_the_colours_to_the_drawings(config, models):  # noqa: F811
    config = replace(
        config, init=str(models / "face.safetensors"), freeze_generator_below=8, patch_weight=1.0,
        reconstruction_weight=0, adversarial_weight=0, images=240, log_every=20, save_every=60,
        warmup_lr=0.02,
    )  # fmt: skip
    train.train(config, cpu=True)
    lines = metrics(config.output)
    assert lines[-1]["patches"] < 0.6 * lines[0]["patches"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"pairs": "somewhere"}, "--pairs teach nothing without"),
        ({"patch_weight": 1.0}, "--patch-weight is for fine-tunes"),
        ({"patch_weight": -1.0}, "patch-weight"),
        ({"focus": -1.0}, "focus"),
    ],
)
def test_options_that_do_not_fit_are_refused(config, wrong, said):  # noqa: F811
    with pytest.raises(ValueError, match=said):
        replace(config, **wrong)


def test_pairs_that_are_not_as_many_are_refused_by_their_name(config, models):  # noqa: F811
    assert made(models) == 0
    wrong = replace(
        config, reconstruction_weight=0, paired_weight=1.0, latents=models / "pairs" / LATENTS,
        init=str(models / "anime.safetensors"), pairs=str(models / "photos"),
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"photos is 5 pictures and .* has 8 latents"):
        train.train(wrong, cpu=True)
