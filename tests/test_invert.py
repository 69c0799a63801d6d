"""python -m encoder.invert: files in, files out, masks, starts, failures; the recipes that are
options of it.

pytest tests/test_invert.py
"""

import math
import resource
from pathlib import Path

import pytest
import torch
from pictures import photo
from PIL import Image
from safetensors.torch import load_file, save_file

from encoder import invert
from encoder.files import Results
from encoder.invert import main
from encoder.losses import LossNetworks, LossSet
from encoder.model import Encoder, EncoderConfig
from generators.checkpoint import save
from generators.curvature import measure
from generators.dcgan import DcganConfig, DcganGenerator
from generators.images import open_image, to_pil, to_tensor
from generators.stylegan2 import SynthesisNetwork

FAST = ["--steps", "4", "--no-align"]


@pytest.fixture
def models(tmp_path, face, discriminator) -> dict[str, str]:
    """Options that name tiny networks."""
    torch.manual_seed(5)
    shape = {"resolution": 16, "num_ws": 6, "w_dim": 8, "width": 16, "depth": 1}
    networks = {
        "generator": face,
        "encoder": Encoder(EncoderConfig(**shape)).eval(),
        "curvature": measure(face, probes=20, rank=8),
        "discriminator": discriminator,
    }
    for name, network in networks.items():
        save(tmp_path / "models" / f"{name}.safetensors", network)
    return {name: str(tmp_path / "models" / f"{name}.safetensors") for name in networks}


@pytest.fixture
def run(models, capsys):
    """Options -> exit code and what was printed; with generator, encoder and curvature."""

    def call(*options: object, **changes: str) -> tuple[int, str]:
        used = {k: models[k] for k in ("generator", "encoder", "curvature")} | changes
        named = [x for k, v in used.items() if v for x in (f"--{k}", v)]
        try:
            code = main([*named, *map(str, options)])
        except SystemExit as stopped:  # tyro's, for values that cannot be
            code = int(str(stopped.code))
        return code, " ".join(capsys.readouterr().err.split())

    return call


@pytest.fixture
def target(tmp_path, face, ws) -> Path:
    """A picture the generator can draw."""
    file = tmp_path / "target.png"
    to_pil(face.synthesis(0.5 * ws[:1])[0].clamp(-1, 1)).save(file)
    return file


def error(path: Path, target: Path) -> float:
    made, wanted = to_tensor(open_image(path)), to_tensor(open_image(target))
    return (made - wanted).square().mean().item()


def test_a_folder(run, folder, tmp_path, face):
    out = tmp_path / "out"
    code, text = run("--input", folder, "--output", out, *FAST)
    assert code == 1 and "broken.png" in text  # one picture is damaged, the others are done
    assert "2 of 3 pictures searched" in text
    names = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()}
    wanted = {f"{n}{e}" for n in ("b", "Ärzte/日本") for e in invert.ENDINGS.values()}
    assert names == wanted | {"manifest.jsonl"}
    ws = load_file(out / "b_latents.safetensors")["ws"]
    assert ws.shape == (6, 8)
    made = to_tensor(open_image(out / "b.png"))
    drawn = face.synthesis(ws[None])[0].clamp(-1, 1)
    torch.testing.assert_close(made, drawn, atol=1 / 127, rtol=0)


def test_finished_pictures_are_not_searched_again(run, folder, tmp_path):
    out = tmp_path / "out"
    run("--input", folder, "--output", out, *FAST)
    before = {f: f.stat().st_mtime_ns for f in out.rglob("*") if f.is_file()}
    (out / "b_curve.png").unlink()
    (folder / "Ärzte" / "broken.png").unlink()
    photo(9).save(folder / "later.png")
    code, text = run("--input", folder, "--output", out, *FAST)
    assert code == 0 and "1 of 3 pictures are finished already" in text
    assert "2 of 2 pictures searched" in text and (out / "later.png").exists()
    same = out / "Ärzte" / "日本_latents.safetensors"
    assert same.stat().st_mtime_ns == before[same]
    code, text = run("--input", folder, "--output", out, "--steps", "5", "--no-align")
    assert code == 2 and "search.steps" in text


def test_a_search_that_is_interrupted_goes_on(run, folder, tmp_path, monkeypatch):
    (folder / "Ärzte" / "broken.png").unlink()
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("--input", folder, "--output", whole, *FAST, "--batch-size", "1")

    def stop(job, *rest):
        if job.path.name == "日本.JPG":
            raise KeyboardInterrupt
        return real(job, *rest)

    real = invert.write
    monkeypatch.setattr(invert, "write", stop)
    code, text = run("--input", folder, "--output", cut, *FAST, "--batch-size", "1")
    assert code == 130 and "Stopped by Ctrl-C" in text
    assert not list(cut.rglob("*.tmp"))
    monkeypatch.setattr(invert, "write", real)
    assert run("--input", folder, "--output", cut, *FAST, "--batch-size", "1")[0] == 0
    for file in whole.rglob("*.safetensors"):
        other = load_file(cut / file.relative_to(whole))["ws"]
        assert torch.equal(load_file(file)["ws"], other)


@pytest.mark.parametrize("start", ["encoder", "mean", "random", "file"])
def test_starts(run, target, tmp_path, start, ws):
    if start == "file":
        save_file({"ws": 0.5 * ws[0]}, tmp_path / "start.safetensors")
        start = str(tmp_path / "start.safetensors")
    out = tmp_path / "out"
    options = ["--input", target, "--output", out, "--start", start, "--no-align"]
    assert run(*options, "--steps", "0")[0] == 0
    first = error(out / "target.png", target)
    assert (first < 1e-4) == start.endswith("start.safetensors")
    assert run(*options[:3], tmp_path / "more", *options[4:], "--steps", "30")[0] == 0
    assert error(tmp_path / "more" / "target.png", target) <= first + 0.02


def test_film_and_curve(run, target, tmp_path):
    out = tmp_path / "out"
    for kind in ("gif", "mp4"):
        options = ["--save", "film,curve", "--film-format", kind, *FAST]
        code, _ = run("--input", target, "--output", out / kind, *options)
        assert code == 0 and (out / kind / f"target_film.{kind}").stat().st_size > 100
    film = Image.open(out / "gif" / "target_film.gif")
    assert film.n_frames == 5 and film.size == (32, 16)
    assert Image.open(out / "gif" / "target_curve.png").width > 300


def test_a_dcgan(run, target, tmp_path):
    save(tmp_path / "dcgan.safetensors", DcganGenerator(DcganConfig(16, z_dim=6, width=4)))
    given = {"generator": str(tmp_path / "dcgan.safetensors"), "curvature": ""}
    options = ["--input", target, "--output", tmp_path / "out", *FAST]
    code, text = run(*options, **given)
    assert code == 2 and "--start random" in text
    assert run(*options, "--start", "random", **given)[0] == 0
    assert load_file(tmp_path / "out" / "target_latents.safetensors")["z"].shape == (6,)


# ------------------------------------------------------------------------------------- recipes


def test_reverse_generation(run, target, tmp_path):
    """Adam at 0.1 in w, a mix of a perceptual and the squared error."""
    out = tmp_path / "out"
    options = "--optimiser adam --learning-rate 0.1 --space w --start mean --steps 60".split()
    losses = ["--loss.mse", "0.9", "--loss.perceptual", "0.001", "--no-align"]
    assert run("--input", target, "--output", out, *options, *losses)[0] == 0
    ws = load_file(out / "target_latents.safetensors")["ws"]
    assert torch.equal(ws, ws[:1].expand_as(ws))
    assert run("--input", target, "--output", tmp_path / "0", *options[:-1], "0", *losses)[0] == 0
    assert error(out / "target.png", target) < 0.5 * error(tmp_path / "0" / "target.png", target)


def test_noise_update_with_a_realism_prior(run, models, target, tmp_path):
    """Content by l1 and the discriminator's features, and the discriminator's own opinion."""
    adversarial = LossSet({"adversarial": 1.0}, LossNetworks(discriminator=models["discriminator"]))

    def realism(weight):
        out = tmp_path / f"out{weight}"
        options = "--space z --start random --steps 40 --no-align --loss.mse 0".split()
        content = ["--loss.l1", "1", "--loss.feature", "0.1", "--loss.feature-mse", "0.1"]
        prior = ["--loss.adversarial", weight, "--discriminator", models["discriminator"]]
        assert run("--input", target, "--output", out, *options, *content, *prior)[0] == 0
        image = to_tensor(open_image(out / "target.png"))[None]
        return adversarial(image, image)[0].item()

    assert realism("10") < realism("0")


def test_completion(run, target, tmp_path):
    """A hole in the picture: what is around it decides; the hole is drawn."""
    picture, mask = open_image(target), Image.new("L", (16, 16), 255)
    mask.paste(0, (5, 5, 11, 11))
    spoilt = picture.copy()
    spoilt.paste((0, 255, 0), (5, 5, 11, 11))
    (tmp_path / "in").mkdir()
    (tmp_path / "masks").mkdir()
    spoilt.save(tmp_path / "in" / "face.png")
    mask.save(tmp_path / "masks" / "face.bmp")
    options = ["--input", tmp_path / "in", "--no-align", "--start", "mean", "--steps", "60"]
    options += ["--loss.mse", "1", "--loss.ms-ssim", "0.05"]
    assert run(*options, "--output", tmp_path / "out", "--mask", tmp_path / "masks")[0] == 0
    assert run(*options, "--output", tmp_path / "naive")[0] == 0
    with_mask = error(tmp_path / "out" / "face.png", target)
    assert with_mask < 0.3 * error(tmp_path / "naive" / "face.png", target)
    (tmp_path / "masks" / "face.bmp").unlink()
    code, text = run(*options, "--output", tmp_path / "no", "--mask", tmp_path / "masks")
    assert code == 1 and "There is no mask for face.png" in text


def test_scribble(run, target, tmp_path):
    """What is transparent in a sketch is not looked at."""
    sketch = open_image(target).convert("RGBA")
    for x in range(16):
        for y in range(8, 16):
            sketch.putpixel((x, y), (255, 0, 255, 0))
    sketch.save(tmp_path / "sketch.png")
    options = ["--input", tmp_path / "sketch.png", "--no-align", "--start", "mean", "--steps", "60"]
    options += ["--loss.w-norm", "1e-4"]
    assert run(*options, "--output", tmp_path / "out", "--mask", "alpha")[0] == 0
    made = to_tensor(open_image(tmp_path / "out" / "sketch.png"))
    wanted = to_tensor(open_image(target))
    assert (made - wanted)[:, :8].square().mean() < 0.01
    assert (made[:, 8:] - torch.tensor([1.0, -1.0, 1.0])[:, None, None]).square().mean() > 0.3


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--save", "pictures"], "--save does not know pictures"),
        (["--batch-size", "0"], "--batch-size"),
        (["--loss.latent", "1"], "for training"),
        (["--loss.adversarial", "1"], "needs --discriminator"),
        (["--align", "--mask", "alpha"], "--no-align"),
        (["--start", "nothing.safetensors"], "nothing.safetensors"),
        (["--start", "mean", "--space", "z"], "start a search in z from random"),
        (["--steps", "-1"], "steps"),
        (["--encoder", "none.safetensors"], "no such file"),
        (["--optimiser", "lbfgs", "--noise-maps"], "adam"),
        (["--device", "meta"], "device meta cannot be used"),
        (["--mask", "nowhere"], "--mask nowhere"),
        (["--loss.mse", "0"], "every loss has the weight 0"),
        (["--loss.l1", "nan"], "give a number >= 0"),
        (["--learning-rate", "nan"], "learning_rate"),
    ],
)
def test_wrong_options_are_one_sentence(run, target, tmp_path, options, sentence):
    code, text = run("--input", target, "--output", tmp_path / "out", *FAST, *options)
    assert code == 2 and sentence in text and "Traceback" not in text
    assert not (tmp_path / "out").exists()


def test_a_start_that_is_not_finite_is_refused(run, target, tmp_path, ws):
    save_file({"ws": ws[0] * math.nan}, tmp_path / "start.safetensors")
    start = ["--start", tmp_path / "start.safetensors"]
    code, text = run("--input", target, "--output", tmp_path / "out", *FAST, *start)
    assert code == 2 and "finite" in text and not (tmp_path / "out").exists()


def test_a_loss_that_is_never_finite_is_no_success(run, target, tmp_path, face, monkeypatch):
    def damaged(self, *arguments, **options):
        return draw(self, *arguments, **options) * math.nan

    draw = SynthesisNetwork.forward
    monkeypatch.setattr(SynthesisNetwork, "forward", damaged)
    out = tmp_path / "out"
    code, text = run("--input", target, "--output", out, *FAST, "--start", "mean")
    assert code == 1 and "never a finite number" in text and "mean loss" not in text
    assert [file.name for file in out.iterdir()] == ["manifest.jsonl"]


@pytest.mark.parametrize("save", ["reconstruction", "curve", "latents", "film"])
def test_a_full_disk_is_a_sentence_and_leaves_no_file(run, target, tmp_path, monkeypatch, save):
    options = ["--input", target, "--output", tmp_path / "out", *FAST, "--save", save]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = Results.note

    def full(self, job, status, **details):
        """Nothing more can be written, once the manifest has the line "begun"."""
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        written(self, job, status, **details)
        if status == "begun":
            resource.setrlimit(resource.RLIMIT_FSIZE, (16, limits[1]))

    monkeypatch.setattr(Results, "note", full)
    try:
        code, text = run(*options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1 and "Cannot write the result of" in text and "File too large" in text
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["manifest.jsonl"]
    monkeypatch.undo()
    assert run(*options)[0] == 0


def test_inputs_are_never_replaced(run, target):
    code, text = run("--input", target, "--output", target.parent, *FAST)
    assert code == 2 and "would be replaced" in text
