"""Held-out metrics and distances between sets: pytest tests/test_evaluate.py."""

import math
import warnings

import lpips
import pytest
import torch
from safetensors.torch import save_file

from encoder.evaluate import (
    evaluate,
    frechet_distance,
    image_metrics,
    kernel_distance,
    pooled_features,
    psnr,
    squared_mmd,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_psnr_of_known_errors():
    target = torch.zeros(3, 3, 8, 8)
    prediction = target + torch.tensor([2.0, 0.2, 0.0]).view(3, 1, 1, 1)
    values = psnr(prediction, target)
    assert values[:2].tolist() == pytest.approx([0, 20], abs=1e-4)
    assert math.isfinite(values[2]) and values[2] > 100


def test_every_picture_counts_once_also_in_a_short_batch():
    images = torch.zeros(5, 3, 8, 8)
    offsets = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    images += offsets.view(5, 1, 1, 1)
    metrics = image_metrics(with_lpips=False)
    sizes = []

    def reconstruct(batch):
        sizes.append(len(batch))
        return torch.zeros_like(batch)

    result = evaluate(images, reconstruct, metrics, batch_size=2)
    assert sizes == [2, 2, 1]
    assert set(result) == {"mse", "psnr", "ms_ssim"}
    assert result["mse"] == pytest.approx(offsets.square().mean().item(), rel=1e-5)
    assert evaluate(iter(images.split(3)), reconstruct, metrics) == pytest.approx(result)


def test_predictions_are_clamped_like_written_pictures():
    images = torch.ones(2, 3, 8, 8)
    result = evaluate(images, lambda x: x * 3, image_metrics(with_lpips=False))
    assert result["mse"] == 0 and result["ms_ssim"] == pytest.approx(1)


def test_lpips_is_a_metric_when_asked_for(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).net
    save_file(net.state_dict(), tmp_path / "alex.safetensors")
    metrics = image_metrics(lpips_weights=tmp_path / "alex.safetensors")
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    same = evaluate(images, lambda x: x, metrics)
    noise = evaluate(images, lambda x: torch.rand_like(x) * 2 - 1, metrics)
    assert same["lpips"] == pytest.approx(0, abs=1e-6) and noise["lpips"] > 1e-4


def test_nothing_to_evaluate_is_one_sentence():
    for nothing in (torch.zeros(0, 3, 8, 8), []):
        with pytest.raises(ValueError, match="no picture to evaluate"):
            evaluate(nothing, lambda x: x, {})
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
