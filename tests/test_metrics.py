"""Held-out metrics: pytest tests/test_metrics.py."""

import math
import warnings

import lpips
import pytest
import torch
from safetensors.torch import save_file

from encoder.metrics import evaluate, image_metrics, psnr


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
