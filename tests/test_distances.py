"""Feature spaces, and distances between sets of pictures: pytest tests/test_distances.py."""

import warnings

import lpips
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F

from generators.distances import (
    FeatureSpace,
    compare,
    draw,
    feature_space,
    frechet_distance,
    inception,
    kernel_distance,
    pooled_features,
    precision_recall,
    squared_mmd,
    truncation_curve,
)

# ---------------------------------------------------------------------- feature spaces


def test_the_default_space_needs_no_download_and_names_itself():
    space = feature_space("efficientnet")
    assert space.name == "tf_efficientnet_lite0, level 4, 128 px"
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    features = pooled_features(space, images)
    assert features.shape == (2, 320)
    large = F.interpolate(images, (128, 128), mode="bilinear", antialias=True)
    expected = space.net(large)[0].mean(dim=(2, 3))
    torch.testing.assert_close(features, expected)
    assert not any(p.requires_grad for p in space.parameters()) and not space.training


def test_alexnet_reads_the_names_of_lpips_and_of_torchvision(tmp_path):
    net = torchvision.models.alexnet(weights=None)
    net.classifier = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4))  # small
    save_file(net.state_dict(), tmp_path / "theirs.safetensors")
    with warnings.catch_warnings():  # it calls torchvision in a deprecated way
        warnings.simplefilter("ignore")
        backbone = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    names = {key: key.split(".", 1)[1] for key in backbone.net.state_dict()}
    backbone.net.load_state_dict({k: net.features.state_dict()[v] for k, v in names.items()})
    save_file(backbone.net.state_dict(), tmp_path / "lpips.safetensors")

    images = torch.rand(2, 3, 128, 128) * 2 - 1
    relu5 = backbone.net(backbone.scaling_layer(images)).relu5.mean(dim=(2, 3))
    for file in ("theirs", "lpips"):
        space = feature_space(f"alexnet={tmp_path / file}.safetensors")
        assert space.name == "alexnet, relu5, 128 px"
        torch.testing.assert_close(pooled_features(space, images), relu5)


def test_inception_is_torchvisions_up_to_its_last_layer(tmp_path):
    net = torchvision.models.inception_v3(weights=None, aux_logits=True, init_weights=False)
    torch.save(net.state_dict(), tmp_path / "inception.pth")
    space = inception(tmp_path / "inception.pth")
    assert space.name.endswith("Mixed_7c, 299 px")
    net.fc = torch.nn.Identity()
    images = torch.rand(1, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(pooled_features(space, images), net.eval()(images))


@pytest.mark.parametrize(
    "spec, complaint",
    [("vgg", "choose from efficientnet, alexnet"), ("alexnet", "write alexnet=PATH")],
)
def test_unknown_spaces_and_missing_weights_are_one_sentence(spec, complaint):
    with pytest.raises(ValueError, match=complaint):
        feature_space(spec)


def test_weights_of_another_network_are_refused(tmp_path):
    save_file({"classifier": torch.zeros(1), "a.b": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="are not AlexNet's"):
        feature_space(f"alexnet={tmp_path}/x.safetensors")


# ----------------------------------------------------------------- pictures to features


def test_draws_depend_on_the_seed_alone_and_are_rounded_to_8_bits(face):
    images = torch.cat(list(draw(face, 5, seed=1, batch_size=2)))
    assert images.shape == (5, 3, 16, 16)
    torch.randn(3)
    again = torch.cat(list(draw(face, 5, seed=1, batch_size=5)))
    torch.testing.assert_close(images, again, rtol=0, atol=2 / 255 + 1e-6)
    other = torch.cat(list(draw(face, 5, seed=2)))
    assert (images - other).abs().mean() > 0.01
    levels = (images + 1) * 127.5
    torch.testing.assert_close(levels, levels.round())
    assert images.min() >= -1 and images.max() <= 1
    (mean,) = draw(face, 1, seed=1, truncation=0.0)
    expected = face.synthesis(face.w_avg.expand(1, face.num_ws, -1)).clamp(-1, 1)
    torch.testing.assert_close(mean, expected, rtol=0, atol=1 / 255 + 1e-6)


def test_no_picture_is_one_sentence():
    for nothing in (torch.zeros(0, 3, 8, 8), []):
        with pytest.raises(ValueError, match="no picture to take features of"):
            pooled_features(torch.nn.Identity(), nothing)


def test_pooled_features_are_the_levels_side_by_side():
    class Levels(torch.nn.Module):
        def forward(self, x):
            return [x, x[:, :2, ::2, ::2]]

    images = torch.rand(5, 3, 8, 8)
    features = pooled_features(Levels(), images, batch_size=2)
    assert features.shape == (5, 5)
    torch.testing.assert_close(features[:, :3], images.mean(dim=(2, 3)))
    torch.testing.assert_close(features[:, 3:], images[:, :2, ::2, ::2].mean(dim=(2, 3)))


def test_frechet_distance_of_known_gaussians():
    a = torch.randn(4000, 3).double()
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(a.T.cov())).T  # N(0, 1) exactly
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(a, a + torch.tensor([1.0, 2.0, 0.0])) == pytest.approx(5, rel=1e-9)
    assert frechet_distance(a, 3 * a) == pytest.approx(3 * (3 - 1) ** 2, rel=1e-9)


def test_frechet_distance_of_dependent_features_by_the_formula():
    a, b = (torch.randn(50, 4).double() @ torch.randn(4, 4).double() for _ in range(2))
    product = a.T.cov() @ b.T.cov()
    root = torch.linalg.eigvals(product).sqrt().sum().real
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = means + a.T.cov().trace() + b.T.cov().trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected.item(), rel=1e-8)
    few = torch.randn(3, 10)  # fewer pictures than features
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-5)


def test_squared_mmd_by_double_loop():
    a, b = torch.randn(4, 3).double(), torch.randn(4, 3).double()

    def k(x, y):
        return (float(x @ y) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    expected = sum(k(a[i], a[j]) + k(b[i], b[j]) for i, j in pairs) / 12
    expected -= 2 * sum(k(x, y) for x in a for y in b) / 16
    assert squared_mmd(a, b).item() == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_is_unbiased_and_repeatable():
    pool = torch.randn(600, 4)
    a, b = pool[:300], pool[300:]
    mean, spread = kernel_distance(a, b, subsets=50, subset_size=100)
    assert abs(mean) < 3 * spread and spread > 0
    assert kernel_distance(a, b, subsets=50, subset_size=100) == (mean, spread)
    far, _ = kernel_distance(a, b + 1, subsets=50, subset_size=100)
    assert far > 1


def test_distances_need_two_pictures():
    for distance in (frechet_distance, kernel_distance):
        with pytest.raises(ValueError, match="at least two pictures"):
            distance(torch.zeros(1, 4), torch.zeros(5, 4))


def test_precision_and_recall_of_known_sets():
    real = torch.arange(10.0)[:, None]  # the balls of k = 1 have radius 1: they cover [-1, 10]
    fake = torch.tensor([-1.5, -1.0, 4.5, 10.0, 11.0])[:, None]  # radii 0.5, 0.5, 5.5, 1, 1
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == pytest.approx(3 / 5)  # -1, 4.5 and 10
    assert recall == pytest.approx(1)  # 4.5 is within 5.5 of all ten
    fake = torch.tensor([4.4, 4.5, 4.6])[:, None]
    assert precision_recall(real, fake, k=1) == (1, 0)  # collapsed: precise, recalls nothing


def test_precision_and_recall_by_double_loop():
    real, fake = torch.randn(30, 5), torch.randn(20, 5) * 1.5 + 1.5

    def share(points, samples, k):
        count = 0
        for p in points:
            for i, s in enumerate(samples):
                others = sorted(float((s - o).norm()) for j, o in enumerate(samples) if j != i)
                if float((p - s).norm()) <= others[k - 1]:
                    count += 1
                    break
        return count / len(points)

    expected = share(fake, real, 3), share(real, fake, 3)
    assert precision_recall(real, fake) == pytest.approx(expected)
    assert 0 < min(expected) and max(expected) < 1


def test_precision_and_recall_do_not_depend_on_the_blocks(monkeypatch):
    real, fake = torch.randn(50, 4), torch.randn(40, 4)
    whole = precision_recall(real, fake)
    monkeypatch.setattr("generators.distances.ROWS", 7)
    assert precision_recall(real, fake) == whole
    assert precision_recall(real, real) == (1, 1)
    assert precision_recall(torch.ones(5, 4), torch.ones(6, 4)) == (1, 1)  # radii of zero


def test_precision_and_recall_need_more_pictures_than_neighbours():
    with pytest.raises(ValueError, match="need more pictures"):
        precision_recall(torch.zeros(9, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="neighbours"):
        precision_recall(torch.zeros(9, 2), torch.zeros(9, 2), k=0)


def test_a_truncation_curve_is_deterministic_and_loses_recall(face):
    space = FeatureSpace("pixels", 4, torch.nn.Identity())
    real = pooled_features(space, draw(face, 60, seed=9))
    curve = truncation_curve(face, space, real, (0.2, 1.0), samples=60, seed=1)
    assert [row["truncation"] for row in curve] == [0.2, 1.0]
    assert set(curve[0]) == {"truncation", "fd", "kid", "kid_std", "precision", "recall"}
    low, full = curve
    assert low["fd"] > full["fd"] and low["recall"] < full["recall"]
    assert curve == truncation_curve(face, space, real, (0.2, 1.0), samples=60, seed=1)
    fake = pooled_features(space, draw(face, 60, seed=1))
    assert full == {"truncation": 1.0} | compare(real, fake)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_features_that_are_not_finite_are_refused(value):
    bad = torch.ones(5, 4)
    bad[2, 1] = value
    for distance in (frechet_distance, kernel_distance, precision_recall):
        with pytest.raises(ValueError, match="features of NaN or infinity"):
            distance(torch.ones(5, 4), bad)


def test_a_space_of_weights_that_are_not_finite_is_refused(tmp_path):
    state = torchvision.models.alexnet(weights=None).features.state_dict()
    state["0.bias"][0] = torch.nan
    state = {f"features.{key}": value for key, value in state.items()}
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"features\.0\.bias has values that are not finite"):
        feature_space(f"alexnet={tmp_path}/a.safetensors")
    for content in (b"", b"text"):
        (tmp_path / "b.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"b\.pth: .*; give AlexNet's weights"):
            feature_space(f"alexnet={tmp_path}/b.pth")
    with pytest.raises(ValueError, match="there is no such file; give AlexNet's"):
        feature_space("alexnet=nowhere")
