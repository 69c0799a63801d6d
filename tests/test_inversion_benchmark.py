"""The benchmark of encoder against optimisation and the sweep of weights, on tiny networks.

pytest tests/test_inversion_benchmark.py
"""

import csv
import json
from pathlib import Path

import common
import inversion
import numpy as np
import pareto
import pytest
import sweep
import torch
from conftest import make_generator
from pictures import photo
from processes import code_of

from encoder.model import Encoder, EncoderConfig
from generators.checkpoint import save
from generators.curvature import measure
from generators.dcgan import DcganConfig, DcganGenerator
from generators.images import open_image

STEPS = {"encoder + L-BFGS": (1, 3), "encoder + Adam": (1, 3), "Adam in w from random": (2, 4),
         "Adam in w+ from random": (2, 4), "L-BFGS in w+ from mean": (3,)}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Tiny networks, and five photos that are drawn faces as well."""
    root = tmp_path_factory.mktemp("benchmark")
    face = make_generator(1)
    torch.manual_seed(5)
    shape = EncoderConfig("mobilenetv3_small_050", 16, num_ws=6, w_dim=8, width=16, depth=1)
    modules = {"face": face, "anime": make_generator(2), "encoder": Encoder(shape)}
    modules |= {"curvature": measure(face, probes=32, rank=4)}
    for size in (16, 32):
        modules[f"dcgan{size}"] = DcganGenerator(DcganConfig(size, z_dim=8, width=4))
    for name, module in modules.items():
        save(root / f"{name}.safetensors", module)
    (root / "photos").mkdir()
    for i in range(5):
        photo(i).save(root / "photos" / f"{i}.png")
    return root


def arguments(folder: Path, *more: str) -> list[str]:
    """Of either script."""
    files = {"face-generator": "face.safetensors", "curvature": "curvature.safetensors"}
    files["data"] = "photos"
    named = [x for option, file in files.items() for x in (f"--{option}", str(folder / file))]
    return [*named, "--images", "4", "--batch-size", "3", *more]


def of_inversion(folder: Path, *more: str) -> list[str]:
    return arguments(
        folder,
        *("--encoder", str(folder / "encoder.safetensors"), "--timed", "1"),
        *("--steps", "1", "3", "--refiners", "lbfgs", "adam", "--starts", "random"),
        *("--optimisation-steps", "2", "4", "--lbfgs-steps", "3", *more),
    )


@pytest.fixture(scope="module")
def made(folder) -> dict:
    """The report of a run that writes everything."""
    out = folder / "out"
    anime = ("--anime-data", str(folder / "photos"))
    anime += ("--anime-generator", str(folder / "anime.safetensors"), "--swap-resolution", "8")
    written = ("--output", f"{out}/a.json", "--csv", f"{out}/a.csv")
    written += ("--plot", f"{out}/plot.png", "--picture", f"{out}/faces.png")
    assert inversion.main(of_inversion(folder, *anime, *written)) == 0
    assert str(folder) not in (out / "a.json").read_text()
    return json.loads((out / "a.json").read_text())


def test_every_row_that_was_asked_for(made):
    names = [f"{family}, {k} steps" for family, steps in STEPS.items() for k in steps]
    assert [row["method"] for row in made["rows"]] == ["mean face", "encoder", *names]
    assert made["images"] == 4 and made["optimised"] == {"mse": 1.0}
    for row in made["rows"]:
        assert {"psnr", "ms_ssim", "kid", "top1", "top5"} < row.keys()
        assert 0 < row["p50_ms"] <= row["p95_ms"] and 0 < row["single_p50_ms"]
    errors = {row["method"]: row["mse"] for row in made["rows"]}
    assert errors["encoder + Adam, 3 steps"] < errors["encoder"]
    for start, found in (("encoder", "encoder + L-BFGS"), ("mean face", "L-BFGS in w+ from mean")):
        assert errors[f"{found}, 3 steps"] <= errors[start] * 1.0001  # never worse than the start


def test_csv_rows_are_the_json_rows(made, folder):
    with open(folder / "out" / "a.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [{key: str(value) for key, value in row.items()} for row in made["rows"]]


def test_plot_and_picture_open(made, folder):
    plot, faces = (open_image(folder / "out" / name) for name in ("plot.png", "faces.png"))
    assert plot.width > 400 and len(plot.convert("RGB").getcolors(10**6)) > 20
    columns, rows = 1 + 2 + len(STEPS), 2 * 4  # the input first; faces and their anime
    assert faces.width == columns * pareto.SIDE
    assert rows * pareto.SIDE < faces.height < (rows + 1) * pareto.SIDE


def test_curves_are_of_the_longest_searches_and_end_at_their_rows(made):
    errors = {row["method"]: row for row in made["rows"]}
    assert set(made["curves"]) == {f"{f}, {max(k)} steps" for f, k in list(STEPS.items())[2:]}
    for name, curve in made["curves"].items():
        assert curve["steps"] == list(range(errors[name]["steps"] + 1))
        assert curve["mse"][-1] == pytest.approx(errors[name]["mse"], rel=1e-4)
    assert [x["steps"] for x in made["equal_steps"]] == [1, 2, 3, 4]
    assert len(made["equal_steps"][2]["mse"]) == 3


def test_rows_at_equal_seconds_lie_on_the_curves(made):
    for row in made["equal_seconds"]:
        curve = made["curves"][row["against"]]
        assert 0 <= row["at_step"] <= curve["steps"][-1]
        assert min(curve["mse"]) <= row["its_mse"] <= max(curve["mse"])
    rows = [
        {"method": "encoder", "family": "encoder", "steps": 0, "mse": 0.25, "p50_ms": 100.0},
        {"method": "encoder + 9", "family": "encoder + x", "steps": 9, "mse": 0.1, "p50_ms": 550.0},
        {"method": "slow", "family": "slow", "steps": 9, "mse": 0.2, "p50_ms": 1000.0},
        {"method": "quick", "family": "quick", "steps": 1, "mse": 0.9, "p50_ms": 200.0},
    ]  # slow: a step takes 0.1 s, its start's look too
    curves = {"slow": {"steps": [0, 4, 9], "mse": [1.0, 0.6, 0.2]}}
    curves["quick"] = {"steps": [0, 1], "mse": [1.0, 0.9]}
    found = {(x["method"], x["against"]): x for x in pareto.equal_seconds(rows, curves)}
    assert len(found) == 3  # encoder + 9 takes longer than quick
    assert found["encoder", "slow"]["at_step"] == 0
    assert found["encoder", "slow"]["its_mse"] == 1
    assert found["encoder", "slow"]["its_seconds_to_be_as_good"] == 0.9375
    assert found["encoder", "quick"]["its_seconds_to_be_as_good"] is None
    assert found["encoder + 9", "slow"]["at_step"] == 4.5
    assert found["encoder + 9", "slow"]["its_mse"] == pytest.approx(0.56)


def test_curves_are_thinned_with_both_ends():
    curve = pareto.thinned(np.linspace(1, 0, 1001))
    assert curve["steps"][:4] == [0, 1, 2, 3] and curve["steps"][-1] == 1000
    assert len(curve["steps"]) <= pareto.POINTS + 1
    assert curve["mse"] == pytest.approx([1 - s / 1000 for s in curve["steps"]])


def test_the_readme_table_compares_with_the_longest_adam(made):
    lines = made["markdown"]
    assert len(lines) == 2 + len(made["rows"])
    assert "faster than Adam in w from random, 4 steps" in lines[0]  # none from the mean was asked
    [own] = [line for line in lines if line.startswith("| Adam in w from random, 4 steps")]
    assert own.endswith("| 1.0× |")


def test_errors_are_a_function_of_the_seed(folder, made):
    def errors(seed: int) -> list[float]:
        config = inversion.Config(
            str(folder / "photos"), 4, str(folder / "face.safetensors"), batch_size=3, timed=1,
            encoder=str(folder / "encoder.safetensors"), curvature=None, seed=seed,
        )  # fmt: skip
        bench = inversion.Bench(config)
        search = inversion.Search(2, "w", "adam", 0.1, seed=seed)
        row, _, _ = bench.row(inversion.Method("Adam", "random", search))
        return [row["mse"], row["psnr"], row["ms_ssim"]]

    [row] = [x for x in made["rows"] if x["method"] == "Adam in w from random, 2 steps"]
    assert errors(0) == [row["mse"], row["psnr"], row["ms_ssim"]]
    assert errors(1) != errors(0)


def test_the_networks_that_judge_are_columns_of_their_own(monkeypatch):
    class Judge(torch.nn.Module):
        def __init__(self, net, weights):
            super().__init__()
            self.size = len(net + weights.name)

        def forward(self, a, b):
            return torch.full((len(a),), float(self.size))

    monkeypatch.setattr(common, "Lpips", Judge)
    found = common.metrics_of({"vgg": Path("v"), "alex": Path("a")}, None, torch.device("cpu"))
    assert list(found) == ["mse", "psnr", "ms_ssim", "lpips_alex", "lpips_vgg"]
    pictures = torch.zeros(3, 3, 16, 16)
    values = common.scores(found, pictures, pictures + 1, batch_size=2)
    assert values["mse"] == 1 and values["lpips_alex"] == 5 and values["lpips_vgg"] == 4


def test_users_errors_of_inversion(folder, capsys):
    for options, sentence in (
        (["--steps", "0"], "at least 1"),
        (["--loss.feature", "1"], "needs discriminator"),
    ):
        assert code_of(inversion.main, of_inversion(folder, *options)) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())


# ---------------------------------------------------------------------------------- sweep


def test_the_sweep_has_a_row_for_each_space_and_alpha(folder, capsys):
    options = ("--alphas", "0", "0.01", "1", "--steps", "2")
    written = ("--output", f"{folder}/s.json", "--picture", f"{folder}/s.png")
    dcgan = ("--dcgan", str(folder / "dcgan16.safetensors"))
    assert sweep.main(arguments(folder, *options, *written, *dcgan)) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report == json.loads((folder / "s.json").read_text())
    spaces = [*(f"StyleGAN2, {space}" for space in ("z", "w", "w+")), "DCGAN, z"]
    found = [(row["space"], row["alpha"]) for row in report["rows"]]
    assert found == [(space, alpha) for space in spaces for alpha in (0, 0.01, 1)]
    for row in report["rows"]:
        assert (1 - row["alpha"]) * row["mse"] <= row["loss"] * 1.0001  # perceptual is >= 0
    of_alpha_0 = [row for row in report["rows"] if row["alpha"] == 0]
    for row in of_alpha_0:  # clamping to [-1, 1] can only help
        assert row["mse"] <= row["loss"] * 1.0001
    assert len(report["markdown"]) == 2 + 12
    picture = open_image(folder / "s.png")
    assert picture.width == 4 * sweep.SIDE and picture.height > 4 * 4 * sweep.SIDE


def test_users_errors_of_the_sweep(folder, capsys):
    for options, sentence in (
        (["--alphas", "2"], "from 0 to 1"),
        (["--perceptual", "lpips"], "needs --lpips-alex"),
        (["--dcgan", str(folder / "dcgan32.safetensors")], "give a DCGAN of that resolution"),
    ):
        assert code_of(sweep.main, arguments(folder, *options)) == 2
        assert sentence in " ".join(capsys.readouterr().err.split())
