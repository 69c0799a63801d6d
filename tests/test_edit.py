"""Directions of w+: planted ones are found, edits do what they say, wrong ones end in a sentence.

pytest tests/test_edit.py
"""

import csv
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_infer import make_encoder
from torch import Tensor

from encoder import edit, infer
from encoder.align import Aligner
from encoder.attributes import MEASURES, labelled_pictures, measure
from encoder.directions import (
    GROUPS,
    Directions,
    labelled,
    mapped,
    principal_axes_of,
    sefa,
    spread,
)
from encoder.options import Edit, edits_of
from encoder.pipeline import Translator
from encoder.video.shots import shots_of_latents
from encoder.video.trace import TraceWriter
from generators.checkpoint import load, resolve, save
from generators.images import to_pil
from generators.stylegan2 import Generator

EXAMPLE = Path(__file__).parent.parent / "examples" / "generated_1.png"


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0))


@pytest.fixture
def steps(ws) -> dict[str, Tensor]:
    """Two directions of a tiny w+ (6, 8), the second of layers 4 and 5."""
    late = ws[1].clone()
    late[:4] = 0
    return {"smile": ws[0] / 8, "late": late / 8}


@pytest.fixture
def models(tmp_path, face, anime, steps) -> list[str]:
    """The options that name tiny networks, and directions of theirs."""
    options = ["--device", "cpu", "--backend", "torch", "--no-align"]
    made = {"face-generator": face, "anime-generator": anime, "encoder": make_encoder()}
    for option, module in made.items():
        save(tmp_path / "models" / f"{option}.safetensors", module)
        options += [f"--{option}", str(tmp_path / "models" / f"{option}.safetensors")]
    save(tmp_path / "models" / "directions.safetensors", Directions.of(face, steps))
    return options


@pytest.fixture
def directions(tmp_path, models) -> list[str]:
    return ["--directions", str(tmp_path / "models" / "directions.safetensors")]


def drawn(folder: Path, *options: str, command=infer.main, before: tuple[str, ...] = ()) -> int:
    words = ["--input", str(EXAMPLE), "--output", str(folder), "--swap-resolution", "8"]
    return command([*before, *words, *options])


# ----------------------------------------------------------------------------- finding


def test_a_planted_direction_is_found_in_generated_faces():
    """The whole way: faces of face64 moved along an axis of w, the encoder's view of them."""
    face = load(resolve("face64"), Generator)
    ws = mapped(face, 1000)
    axis = spread(principal_axes_of(ws, 3), ws)[2]  # (L, D)
    amounts = torch.tensor([-2.0, 2.0]).repeat_interleave(24)  # steps; each face to both sides
    moved = ws[:24].repeat(2, 1, 1) + amounts[:, None, None] * axis
    translator = Translator.load("face64", "anime64", "encoder64")
    with torch.no_grad():
        pictures = torch.cat([face.synthesis(part) for part in moved.split(24)]).clamp(-1, 1)
        seen = torch.cat([translator.encode(part) for part in pictures.split(24)])
    found = labelled(seen, amounts[:, None], ["planted"])[0]
    assert cosine(found, axis) > 0.9


def test_labels_that_come_together_are_told_apart(face):
    rng = torch.Generator().manual_seed(0)
    planted, noise = torch.randn(2, 6, 8, generator=rng), torch.randn(400, 6, 8, generator=rng)
    both = torch.randn(400, 1, generator=rng)
    labels = both + 0.5 * torch.randn(400, 2, generator=rng)  # correlated by 0.8
    samples = noise + torch.einsum("mk,kld->mld", labels, planted)
    for found, axis in zip(labelled(samples, labels, ["a", "b"]), planted, strict=True):
        assert cosine(found, axis) > 0.97
    alone = labelled(samples, labels[:, :1], ["a"])[0]
    assert cosine(alone, planted[0]) < 0.9  # what comes with it, comes in


def test_the_principal_axes_are_the_covariance_s(face):
    samples = mapped(face)
    w = samples[:, 0].double()
    values, vectors = torch.linalg.eigh(torch.cov(w.T))
    steps = spread(principal_axes_of(samples, 3), samples)
    for i, step in enumerate(steps):
        assert abs(cosine(step[0], vectors[:, -1 - i])) > 0.999
        assert torch.equal(step, step[:1].expand_as(step))  # one w for all layers
        assert float(step[0].norm()) == pytest.approx(float(values[-1 - i].sqrt()), rel=1e-3)


def test_a_planted_principal_axis_of_w_plus_is_the_first(ws):
    noise = torch.randn(300, 6, 8, generator=torch.Generator().manual_seed(1))
    amounts = torch.randn(300, 1, 1, generator=torch.Generator().manual_seed(2)) * 4
    axis = ws[0] / ws[0].norm()
    samples = noise + amounts * axis
    found = principal_axes_of(samples, 2)
    assert abs(cosine(found[0], axis)) > 0.98
    assert float(spread(found, samples)[0].norm()) == pytest.approx(17**0.5, rel=0.1)
    assert torch.equal(found, principal_axes_of(samples, 2))


def test_sefa_is_what_the_affine_maps_answer_to_most(face):
    """By brute force: what the styles of a group of layers do, when w moves there."""
    styles: list[Tensor] = []
    for name, module in face.named_modules():
        if name.endswith(".affine"):
            module.register_forward_hook(lambda *call: styles.append(call[2]))

    def answer(step: Tensor) -> float:
        base, moved = [], []
        for kept, ws in ((base, torch.zeros(1, 6, 8)), (moved, step[None])):
            styles.clear()
            face.synthesis(ws)
            kept.extend(styles)
        return sum(float((a - b).square().sum()) for a, b in zip(base, moved, strict=True))

    for layers in (GROUPS["coarse"], GROUPS["middle"]):
        axes = sefa(face, layers, 8)
        kept = [layer for layer in range(6) if layer in layers]
        others = [layer for layer in range(6) if layer not in layers]
        assert not axes[:, others].any()
        answers = [answer(axis) for axis in axes]
        assert answers == sorted(answers, reverse=True)
        rng = torch.Generator().manual_seed(3)
        for w in torch.nn.functional.normalize(torch.randn(20, 8, generator=rng), dim=1):
            step = torch.zeros(6, 8)
            step[kept] = w
            assert answers[-1] * 0.999 <= answer(step) <= answers[0] * 1.001


def test_what_labels_cannot_tell(ws):
    samples = torch.randn(20, 6, 8, generator=torch.Generator().manual_seed(4))
    rising = torch.arange(20.0)[:, None]
    with pytest.raises(ValueError, match=r"The label b is the same for all pictures\."):
        labelled(samples, torch.cat([rising, 0 * rising], dim=1), ["a", "b"])
    with pytest.raises(ValueError, match="labels a, b follow from the others; omit one"):
        labelled(samples, torch.cat([rising, 2 * rising + 1], dim=1), ["a", "b"])
    with pytest.raises(ValueError, match="2 labelled pictures are too few"):
        labelled(samples[:2], rising[:2], ["a"])


# ----------------------------------------------------------------------------- labels


@pytest.fixture
def pictures(tmp_path) -> Path:
    """A .parquet and a .csv of eight grey pictures, labelled by their lightness; two gaps."""
    values = [0, 30, 60, 90, 120, 150, 180, 210]
    rows = []
    for i, value in enumerate(values):
        Image.new("RGB", (16, 16), (value, 99, 99)).save(tmp_path / f"{i}.png")
        rows.append({"picture": f"{i}.png", "Light": value, "Even": i % 2 == 0})
    rows[3]["Light"] = None
    with open(tmp_path / "faces.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    columns = {name: [row[name] for row in rows] for name in ("Light", "Even")}
    data = [(tmp_path / row["picture"]).read_bytes() for row in rows]
    columns["picture"] = [{"bytes": content, "path": None} for content in data]
    table = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    table.to_parquet(tmp_path / "faces.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["faces.csv", "faces.parquet"])
def test_columns_of_a_table(pictures, name):
    _, labels = labelled_pictures(pictures / name, "picture", ["Light", "Even"], 100)
    assert labels[:, 0].tolist() == [0, 30, 60, 120, 150, 180, 210]  # the gap is left out
    assert labels[:, 1].tolist() == [1, 0, 1, 1, 0, 1, 0]
    few, fewer = labelled_pictures(pictures / name, "picture", ["Light"], 3)
    assert len(few) == 3 and fewer[:, 0].tolist() == [0, 60, 150]
    with pytest.raises(ValueError, match=r"There is no column .?Hat.?.*; there is .*Light, Even"):
        labelled_pictures(pictures / name, "picture", ["Hat"], 3)


def test_directions_of_a_column_by_the_command(pictures, models, tmp_path, monkeypatch, capsys):
    """An encoder that sees red as one axis of w+, and noise beside it."""
    axis = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))

    def encode(self: Translator, images: Tensor) -> Tensor:
        red = images[:, 0].mean(dim=(1, 2)).cpu()
        noise = torch.randn(len(red), 6, 8, generator=torch.Generator().manual_seed(6))
        return red[:, None, None] * axis + 0.05 * noise

    monkeypatch.setattr(Translator, "encode", encode)
    out = tmp_path / "found.safetensors"
    words = ["directions", *models, "--data", str(pictures / "faces.csv"), "--column", "picture"]
    words += ["--labels", "Light", "--components", "1", "--sefa", "1", "--output", str(out)]
    assert edit.main([*words, "--anime"]) == 0
    found = load(out, Directions)
    assert found.config.names == ("Light", "pc1", "coarse1", "middle1")
    assert found.config.first == (0, 0, 0, 4) and found.config.last == (5, 5, 3, 5)
    assert cosine(found.steps[0], axis) > 0.9 and abs(cosine(found.steps[1], axis)) > 0.9
    assert "correlation of label and direction: Light 1.00" in capsys.readouterr().err
    sheet = Image.open(out.with_suffix(".png"))
    assert sheet.width > 14 * 16 and sheet.height > 4 * 16  # names beside, steps above
    assert edit.main(words) == 2
    assert f"{out} exists; give another name" in capsys.readouterr().err


def test_directions_without_pictures(models, tmp_path, face):
    out = tmp_path / "found.safetensors"
    words = ["--face-generator", models[models.index("--face-generator") + 1], "--device", "cpu"]
    assert edit.main(["directions", *words, "--components", "2", "--output", str(out)]) == 0
    found = load(out, Directions)
    assert found.config.names == ("pc1", "pc2", "coarse1", "coarse2", "middle1", "middle2")
    found.check(face)


# ------------------------------------------------------------------------------- edits


def test_what_an_edit_says(face, steps):
    made = Directions.of(face, steps)
    assert made.config.first == (0, 4) and made.config.last == (5, 5)
    smile = steps["smile"]
    part = torch.zeros_like(smile)
    part[2:4] = -2 * smile[2:4]
    torch.testing.assert_close(made.offset(edits_of(["smile=-2@2-3"])), part)
    both = made.offset(edits_of(["smile=1.5", "late=.5", "smile=-1e0@0-"]))
    torch.testing.assert_close(both, 0.5 * smile + 0.5 * steps["late"])
    assert edits_of(["a=b=1@3"]) == (Edit("a=b", 1.0, 3, 3),)


@pytest.mark.parametrize("text", ["smile", "smile=", "=1", "smile=nan", "smile=1@", "smile=1e999"])
def test_what_is_no_edit(text):
    with pytest.raises(ValueError, match=r"An edit is NAME=STEPS, or NAME=STEPS@LAYERS, such as"):
        edits_of([text])


def test_no_strength_is_no_edit_bit_for_bit(models, directions, tmp_path):
    save_all = ["--save", "anime,reconstruction,latents"]
    edits = {"plain": [], "zero": ["smile=0", "late=-0.0"], "smile": ["smile=2"]}
    for name, given in edits.items():
        words = [word for text in given for word in ("--edit", text)]
        assert drawn(tmp_path / name, *models, *save_all, *words, *directions) == 0
    for ending in (".png", "_reconstruction.png", "_latents.safetensors"):
        plain, zero, smile = (
            (tmp_path / name / f"generated_1{ending}").read_bytes() for name in edits
        )
        assert plain == zero and plain != smile
    ws, moved = (
        load_file(tmp_path / name / "generated_1_latents.safetensors")["ws"]
        for name in ("plain", "smile")
    )
    step = load(Path(directions[1]), Directions).steps[0]
    torch.testing.assert_close(moved - ws, 2 * step, rtol=0, atol=1e-5)
    settings = [json.loads((tmp_path / name / "manifest.jsonl").read_text())["settings"]
                for name in ("plain", "smile")]  # fmt: skip
    assert "edit" not in settings[0] and "smile=2" in settings[1]["edit"]


def test_apply_is_infer_with_the_reconstruction(models, directions, tmp_path):
    words = [*models, *directions, "--edit", "smile=1", "--edit", "late=-1"]
    assert drawn(tmp_path / "a", *words, command=edit.main, before=("apply",)) == 0
    assert drawn(tmp_path / "b", *words, "--save", "anime,reconstruction") == 0
    names = sorted(file.name for file in (tmp_path / "a").glob("*.png"))
    assert names == ["generated_1.png", "generated_1_reconstruction.png"]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with pytest.raises(SystemExit):  # tyro's way, of options that cannot be
        drawn(tmp_path / "c", *models, command=edit.main, before=("apply",))
    assert not (tmp_path / "c").exists()


def test_latents_of_a_film_are_edited_too(tmp_path, face, anime, steps, ws):
    with open(tmp_path / "film.safetensors", "wb") as file:
        trace = TraceWriter(file)
        trace.add(0.0, 1, np.zeros((5, 2)), ws[0])
        trace.close()
    options = {"directions": Directions.of(face, steps), "edits": edits_of(["smile=3"])}
    translator = Translator(face, anime, make_encoder(), swap_resolution=8, **options)
    [shot] = shots_of_latents(tmp_path / "film.safetensors", translator)
    torch.testing.assert_close(shot.faces[0].ws, ws[0] + 3 * steps["smile"])


def test_wrong_edits_end_in_a_sentence(models, directions, tmp_path, capsys, generator_from_seed):
    def sentence(*words: str) -> str:
        assert drawn(tmp_path / "out", *models, *words) == 2
        return " ".join(capsys.readouterr().err.split())

    edit_it = ["--edit", "frown=1"]
    assert sentence(*directions, *edit_it) == (
        "There is no direction frown; choose from smile, late."
    )
    assert sentence(*directions, "--edit", "late=1@4-6") == (
        "The layers of w+ are 0 to 5 here; late cannot be limited to 4-6."
    )
    assert sentence(*edit_it) == (
        "Edits need --directions FILE; python -m encoder.edit directions finds them for a face "
        "generator."
    )
    other = tmp_path / "other.safetensors"
    save(other, Directions.of(generator_from_seed(8), {"smile": torch.ones(6, 8)}))
    assert sentence("--directions", str(other), "--edit", "smile=1") == (
        "The directions were found in another face generator: mapping or early blocks differ; "
        "find them anew with python -m encoder.edit directions --face-generator …."
    )
    assert not (tmp_path / "out").exists()


def test_packing_a_generator_keeps_its_directions(face, steps):
    directions = Directions.of(face, steps)
    directions.check(face.half().float())
    face.mapping.fc0.weight.mul_(1.1)
    with pytest.raises(ValueError, match="another face generator"):
        directions.check(face)


# -------------------------------------------------------------------------- the bundled


def test_the_bundled_directions_do_what_they_are_called():
    """On the average face and two others: each label rises with the steps along its direction."""
    face, directions = load(resolve("face64"), Generator), load(resolve("directions64"), Directions)
    directions.check(face)
    names = [name for name in directions.config.names if name in MEASURES]
    assert {"yaw", "smile", "hair-light"} <= set(names)
    ws = torch.cat([face.w_avg.expand(1, face.num_ws, -1), mapped(face, 2, seed=1).lerp(
        face.w_avg, 0.3)])  # fmt: skip
    aligner = Aligner()
    for name in names:
        values = []
        for strength in (-2, 0, 2):
            with torch.no_grad():
                moved = face.synthesis(ws + directions.offset([Edit(name, strength)]))
            values.append(measure(moved.clamp(-1, 1), aligner)[name].nanmean())
        assert values[0] < values[1] < values[2], name


def test_a_blank_picture_has_no_measures():
    values = measure(torch.zeros(1, 3, 64, 64), Aligner())
    assert values.keys() == MEASURES.keys() and all(v.isnan().all() for v in values.values())


# ------------------------------------------------------------------------------ mixing


def test_people_are_crossed_layer_by_layer(ws):
    made = edit.crossed(ws, 4)
    assert made.shape == (3, 3, 6, 8)
    for i in range(3):
        assert torch.equal(made[i, i], ws[i])
        for j in range(3):
            assert torch.equal(made[i, j, :4], ws[i, :4])
            assert torch.equal(made[i, j, 4:], ws[j, 4:])
    with pytest.raises(ValueError, match="a split is a layer from 0 to 6, not 7"):
        edit.crossed(ws, 7)


def test_a_sheet_of_two_people(models, tmp_path, face, anime):
    files = []
    for i, w in enumerate(mapped(face, 2)):
        to_pil(face.synthesis(w[None])[0]).save(tmp_path / f"{i}.png")
        files.append(str(tmp_path / f"{i}.png"))
    out = tmp_path / "mixed.png"
    words = ["mix", *models, "--input", *files, "--output", str(out), "--size", "32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(edit, "load_translator", lambda *_: Translator(
            face, anime, make_encoder(), swap_resolution=8))  # fmt: skip
        assert edit.main([*words, "--split", "2"]) == 0
        assert Image.open(out).size[0] == 96
        assert edit.main([*words[:5], *words[5:]]) == 2  # it exists
