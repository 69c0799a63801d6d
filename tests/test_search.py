"""Latent optimisation: pictures are independent, results never worse, known answers are found.

pytest tests/test_search.py
"""

import math
from dataclasses import replace

import pytest
import torch

from encoder.geometry import warp
from encoder.losses import LossSet
from encoder.optimisers import ramp
from encoder.search import Search, noise_regulariser, optimise_latent
from generators import checkpoint
from generators.curvature import curvature_of, measure
from generators.dcgan import DcganConfig, DcganGenerator
from generators.runs import frozen
from generators.stylegan2 import Generator

LOSSES = LossSet({"mse": 1.0})
ADAM = Search(steps=12, optimiser="adam")
METHODS = [Search(steps=12), ADAM]


@pytest.fixture
def problem(face, ws):
    """A double-precision generator, three targets it can draw, and starts away from them."""
    face = face.double()
    ws = ws.double()
    return face, face.synthesis(ws), ws + 0.3 * torch.randn_like(ws)


@pytest.fixture(scope="module")
def face64():
    return frozen(checkpoint.load(checkpoint.resolve("face64"), Generator))


def error(generator, ws, target):
    return LOSSES(generator.synthesis(ws), target)[0]


# ---------------------------------------------------------------------------- what always holds


@pytest.mark.parametrize("search", METHODS)
def test_each_picture_comes_nearer_and_nothing_else_changes(problem, search):
    face, target, start = problem
    before = {name: tensor.clone() for name, tensor in face.state_dict().items()}
    copies = start.clone(), target.clone()
    search = replace(search, steps=40)
    found = optimise_latent(face, target, losses=LOSSES, search=search, start=start)
    assert (found.loss < 0.5 * error(face, start, target)).all()
    torch.testing.assert_close(error(face, found.ws, target), found.loss)
    torch.testing.assert_close(face.synthesis(found.ws), found.image)
    assert not found.latent.requires_grad
    assert torch.equal(start, copies[0]) and torch.equal(target, copies[1])
    assert all(torch.equal(before[name], tensor) for name, tensor in face.state_dict().items())
    assert all(parameter.grad is None for parameter in face.parameters())


@pytest.mark.parametrize(
    "search",
    [
        *METHODS,
        replace(ADAM, latent_noise=0.1),
        replace(ADAM, noise_maps=True),
        Search(steps=12, affine=True),
        Search(steps=30, space="w", patience=3),
    ],
)
def test_pictures_of_a_batch_do_not_influence_each_other(problem, search):
    face, target, _ = problem
    for start in ("mean", "random"):
        together = optimise_latent(face, target, losses=LOSSES, search=search, start=start)
        for i in range(len(target)):
            one = slice(i, i + 1)
            alone = optimise_latent(face, target[one], losses=LOSSES, search=search, start=start)
            torch.testing.assert_close(together.latent[one], alone.latent, rtol=0, atol=1e-4)
            assert together.step[i] == alone.step[0]


@pytest.mark.parametrize("search", [*METHODS, replace(ADAM, learning_rate=50.0)])
def test_never_worse_than_the_start_nor_than_anything_seen(problem, search):
    face, target, start = problem
    seen = []

    def look(step, images, loss):
        seen.append(loss.clone())

    found = optimise_latent(face, target, losses=LOSSES, search=search, start=start, callback=look)
    assert len(seen) == 13  # the start, and each step's result
    torch.testing.assert_close(seen[0], error(face, start, target))
    torch.testing.assert_close(found.loss, torch.stack(seen).amin(dim=0))
    assert torch.equal(found.step, torch.stack(seen).argmin(dim=0))


@pytest.mark.parametrize("search", METHODS)
def test_a_loss_that_is_not_a_number_never_wins(problem, search):
    face, target, start = problem

    class NanAfterTheStart(LossSet):
        def against(self, target, mask=None):
            objective, calls = super().against(target, mask), []

            def counted(*arguments, **options):
                calls.append(1)
                loss, parts = objective(*arguments, **options)
                return loss if len(calls) == 1 else loss * float("nan"), parts

            return counted

    losses = NanAfterTheStart({"mse": 1.0})
    found = optimise_latent(face, target, losses=losses, search=search, start=start)
    assert torch.equal(found.ws, start)


def test_a_start_whose_loss_is_not_a_number_loses_to_what_follows(problem):
    face, target, start = problem

    class NanAtTheStart(LossSet):
        def against(self, target, mask=None):
            objective, calls = super().against(target, mask), []

            def counted(*arguments, **options):
                calls.append(1)
                loss, parts = objective(*arguments, **options)
                return torch.where(
                    torch.tensor(len(calls) == 1), loss.detach() * torch.nan, loss
                ), parts

            return counted

    search = replace(ADAM, latent_noise=0.1)  # its next point is another one
    found = optimise_latent(
        face, target, losses=NanAtTheStart({"mse": 1.0}), search=search, start=start
    )
    assert found.loss.isfinite().all() and (found.step > 0).all()


def test_no_steps_return_the_start(problem):
    face, target, start = problem
    found = optimise_latent(face, target, losses=LOSSES, search=Search(steps=0), start=start)
    assert torch.equal(found.ws, start)


def test_works_inside_inference_mode(face, ws):
    with torch.inference_mode():
        target = face.synthesis(ws)
        start = ws + 0.3
        found = optimise_latent(face, target, losses=LOSSES, search=Search(steps=3), start=start)
        assert (found.loss < error(face, start, target)).all()


def test_the_seed_decides(problem):
    face, target, _ = problem
    search = replace(ADAM, latent_noise=0.1)

    def run(seed):
        search_ = replace(search, seed=seed)
        return optimise_latent(face, target, losses=LOSSES, search=search_, start="random").latent

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


# ------------------------------------------------------------------------------ spaces, starts


@pytest.mark.parametrize(("space", "shape"), [("z", (8,)), ("w", (8,)), ("w+", (6, 8))])
def test_spaces(problem, space, shape):
    face, target, _ = problem
    search = Search(steps=15, space=space)
    found = optimise_latent(face, target, losses=LOSSES, search=search, start="random")
    assert found.latent.shape == (3, *shape) and found.ws.shape == (3, 6, 8)
    if space != "w+":
        assert torch.equal(found.ws, found.ws[:, :1].expand_as(found.ws))
    torch.testing.assert_close(face.synthesis(found.ws), found.image)
    start = optimise_latent(
        face, target, losses=LOSSES, search=replace(search, steps=0), start="random"
    )
    assert (found.loss < start.loss).all()


def test_a_random_start_is_the_best_of_its_candidates(problem):
    face, target, _ = problem

    def at(candidates):
        search = Search(steps=0, space="z", candidates=candidates)
        return optimise_latent(face, target, losses=LOSSES, search=search, start="random").loss

    assert (at(20) <= at(1)).all() and (at(20) < at(1)).any()


def test_starts_are_brought_into_the_space(problem):
    face, target, start = problem
    w = Search(steps=0, space="w")
    found = optimise_latent(face, target, losses=LOSSES, search=w, start=start)
    torch.testing.assert_close(found.latent, start.mean(dim=1))
    found = optimise_latent(face, target, losses=LOSSES, search=Search(steps=0), start=start[:, 0])
    assert torch.equal(found.latent, start[:, :1].expand_as(start))
    mean = optimise_latent(face, target, losses=LOSSES, search=w)
    assert torch.equal(mean.latent, face.w_avg.expand(3, -1))


def test_a_dcgan_is_searched_in_z():
    torch.manual_seed(1)
    generator = frozen(DcganGenerator(DcganConfig(resolution=16, z_dim=6, width=4)))
    for module in generator.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(1e-3)
            module.bias.fill_(0.1)  # at z = 0 a network of zeros has no gradient
    target = generator(torch.randn(2, 6))
    losses = LossSet({"mse": 1.0, "w_norm": 1e-4})
    found = optimise_latent(generator, target, losses=losses, search=Search(steps=40))
    start = optimise_latent(generator, target, losses=losses, search=Search(steps=0))
    assert found.ws is None and found.latent.shape == (2, 6)
    assert (found.loss < 0.3 * start.loss).all()
    with pytest.raises(ValueError, match="noise maps"):
        search = replace(ADAM, noise_maps=True)
        optimise_latent(generator, target, losses=losses, search=search)


# ------------------------------------------------------------------------------ schedules, terms


def test_adam_is_torchs_with_the_ramp(problem):
    face, target, start = problem
    ws = start.clone().requires_grad_()
    adam = torch.optim.Adam([ws])
    for step in range(4):
        adam.param_groups[0]["lr"] = 0.05 * ramp(step, 4)
        (ws.grad,) = torch.autograd.grad(error(face, ws, target).sum(), ws)
        adam.step()
    search = replace(ADAM, steps=4)
    found = optimise_latent(face, target, losses=LOSSES, search=search, start=start)
    assert (found.step == 4).all()
    torch.testing.assert_close(found.latent, ws.detach())


def test_patience_ends_a_search_early(problem):
    face, target, start = problem
    target = target + torch.randn_like(target)  # what it cannot draw
    search = Search(steps=120, patience=4)
    found = optimise_latent(face, target, losses=LOSSES, search=search, start=start)
    whole = optimise_latent(
        face, target, losses=LOSSES, search=replace(search, patience=0), start=start
    )
    assert found.steps < 120 == whole.steps
    assert (found.step <= found.steps).all()
    assert (found.loss < 1.1 * whole.loss).all()


def test_masked_pixels_do_not_matter(problem):
    face, target, start = problem
    mask = torch.ones(3, 1, 16, 16, dtype=torch.float64)
    mask[:, :, 4:10, 2:9] = 0
    spoilt = torch.where(mask > 0, target, 7 * torch.randn_like(target))
    losses = LossSet({"mse": 1.0, "ms_ssim": 0.1, "edge": 0.1})
    clean, other = (
        optimise_latent(face, x, losses=losses, search=METHODS[0], start=start, mask=mask)
        for x in (target, spoilt)
    )
    assert torch.equal(clean.latent, other.latent)
    unmasked = optimise_latent(face, spoilt, losses=losses, search=METHODS[0], start=start)
    assert not torch.allclose(unmasked.latent, clean.latent)


def test_w_norm_pulls_towards_the_mean(problem):
    face, target, start = problem

    def distance(weight):
        losses = LossSet({"mse": 1.0, "w_norm": weight})
        search = Search(steps=30)
        found = optimise_latent(face, target, losses=losses, search=search, start=start)
        return (found.ws - face.w_avg).norm()

    assert distance(1.0) < distance(0.1) < distance(0.0)


def test_noise_maps_are_searched_and_stay_white(face, ws):
    for name, parameter in face.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(0.5)
    target = face.synthesis(ws)  # with its own maps
    other = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    face.synthesis.b16.conv1.noise_const.copy_(other)
    search = replace(ADAM, steps=60, noise_maps=True, noise_weight=1e-3)
    found = optimise_latent(face, target, losses=LOSSES, search=search, start=ws)
    assert (found.loss < 0.5 * error(face, ws, target)).all()
    assert set(found.noise) == {
        f"b{r}.conv{i}.noise_const" for r, i in [(4, 1), (8, 0), (8, 1), (16, 0), (16, 1)]
    }
    maps = found.noise["b16.conv1.noise_const"]
    assert maps.shape == (3, 1, 16, 16)
    torch.testing.assert_close(maps.mean(dim=(1, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(maps.var(dim=(1, 2, 3)), torch.ones(3), atol=0.01, rtol=0)


def test_the_noise_regulariser_knows_noise_from_pictures():
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1, 64, 64, generator=rng)
    smooth = torch.linspace(-1, 1, 64).expand(1, 1, 64, 64) * math.sqrt(3)
    assert noise_regulariser({"a": noise}).item() < 0.1
    assert noise_regulariser({"a": smooth}).item() > 1
    # by hand: 8 x 8, constant along rows: neighbours along a row are equal, hence a mean of 1
    columns = torch.tensor([1.0, -1.0] * 4).view(1, 1, 8, 1).expand(1, 1, 8, 8)
    assert noise_regulariser({"a": columns}).item() == pytest.approx(2)


# --------------------------------------------------------------------------------- known answers


def test_a_generated_picture_is_found(face64):
    z = torch.randn(2, face64.z_dim, generator=torch.Generator().manual_seed(5))
    target = face64.synthesis(face64.map(z, 0.7))
    found = optimise_latent(
        face64,
        target,
        losses=LOSSES,
        search=Search(steps=60),
        curvature=curvature_of("face64"),
    )
    psnr = 10 * torch.log10(4 / (found.image - target).square().mean(dim=(1, 2, 3)))
    assert (psnr >= 35).all(), psnr


def test_curvature_makes_a_search_faster(face):
    target = face.synthesis(face.map(torch.randn(3, 8)))
    search = Search(steps=15)
    plain = optimise_latent(face, target, losses=LOSSES, search=search)
    curvature = measure(face, probes=300, rank=48)
    found = optimise_latent(face, target, losses=LOSSES, search=search, curvature=curvature)
    assert found.loss.mean() < 0.7 * plain.loss.mean()


def test_affine_search_finds_a_known_place(face64):
    z = torch.randn(2, face64.z_dim, generator=torch.Generator().manual_seed(3))
    upright = face64.synthesis(face64.map(z, 0.7)).clamp(-1, 1)
    angle, scale, shift = math.radians(6), 1.06, torch.tensor([3 / 64, -2 / 64])
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    linear = torch.tensor([[cos, -sin], [sin, cos]])
    moved = torch.cat([linear, (shift + 0.5 - linear @ torch.tensor([0.5, 0.5]))[:, None]], 1)
    target = warp(upright, (64 * moved).expand(2, 2, 3), 64).clamp(-1, 1)
    found = optimise_latent(
        face64,
        target,
        losses=LOSSES,
        search=Search(steps=80, space="w", affine=True),
        curvature=curvature_of("face64"),
    )
    # the search undoes the move: one after the other they are nearly the identity
    both = moved[:, :2] @ found.affine[:, :, :2]
    middle = found.affine[:, :, :2] @ torch.tensor([0.5, 0.5]) + found.affine[:, :, 2]
    middle = middle @ moved[:, :2].T + moved[:, 2]
    assert (64 * (middle - 0.5)).abs().max() < 1  # pixels
    turned = torch.atan2(both[:, 1, 0], both[:, 0, 0]).rad2deg()
    assert turned.abs().max() < 1  # degrees
    assert ((both[:, 0, 0].square() + both[:, 1, 0].square()).sqrt() - 1).abs().max() < 0.02


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": -1}, "steps"),
        ({"candidates": 0}, "candidates"),
        ({"latent_noise": 0.1}, "adam"),
        ({"noise_maps": True}, "adam"),
        ({"affine_weight": -1.0}, "from 0"),
        ({"learning_rate": math.nan}, "from 0"),
        ({"noise_weight": math.inf}, "from 0"),
        ({"rampup": 1.5}, "0 to 1"),
    ],
)
def test_impossible_searches_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Search(**options)


def test_unfit_starts_and_curvatures_are_refused(problem, generator_from_seed, tiny_config):
    face, target, start = problem

    def run(space="w+", **options):
        search = Search(steps=1, space=space)
        optimise_latent(face, target, losses=LOSSES, search=search, **options)

    with pytest.raises(ValueError, match="2 starts for 3 targets"):
        run(start=start[:2])
    with pytest.raises(ValueError, match="a start in w"):
        run(start=start[:, :, :5])
    with pytest.raises(ValueError, match="start a search in z from random"):
        run(space="z", start="mean")
    larger = generator_from_seed(1, replace(tiny_config, w_dim=12))
    with pytest.raises(ValueError, match="curvature"):
        run(curvature=measure(larger, probes=4))
