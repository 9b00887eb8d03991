import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from worldvla_libero.data.episodes import Episode
from worldvla_libero.evaluation.world.metrics import (
    frame_lpips,
    frame_psnr,
    frame_ssim,
    frechet_distance,
    mean_interval,
    one_step,
    psnr,
)


def test_psnr_of_a_known_error():
    black = np.zeros((4, 6, 3), np.uint8)
    assert psnr(black, black) == math.inf
    assert psnr(black + np.uint8(255), black) == pytest.approx(0)
    assert psnr(black + np.uint8(16), black) == pytest.approx(20 * math.log10(255 / 16))
    with pytest.raises(ValueError, match=r"shapes \(4, 6, 3\) and \(4, 5, 3\); one shape needed"):
        psnr(black, black[:, :5])


class Images:
    """Keeps the upper half of the grey values."""

    def encode(self, images):
        return np.asarray(images) // 32

    def decode(self, codes):
        return (np.asarray(codes) * 32 + 16).astype(np.uint8)


def test_predictions_stand_beside_what_needs_no_model():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    actions = rng.normal(size=(9, 7))
    asked = []

    def predict(images, taken):
        asked.append(([np.array_equal(images[0], frame) for frame in frames].index(True), taken))
        return np.full((8, 8, 3), 128, np.uint8)

    agent = SimpleNamespace(predict_frame=predict, processor=SimpleNamespace(images=Images()))
    episode = Episode("e", "t", "lift", actions, frames={"front": frames})
    told = []
    found = one_step(agent, [episode], per_episode=4, on_frame=told.append)
    assert len(found) == 4
    assert told == [1, 2, 3, 4]
    assert [t for t, _ in asked] == [0, 2, 4, 6]
    for place, (t, taken) in enumerate(asked):
        assert np.array_equal(taken, actions[t : t + 1])
        true = frames[t + 1]
        assert found.predicted[place] == psnr(np.full_like(true, 128), true)
        assert found.copied[place] == psnr(frames[t], true)
        assert found.reconstructed[place] == psnr(true // 32 * 32 + 16, true)
        assert found.copied_tokens[place] == psnr(frames[t] // 32 * 32 + 16, true)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ({"front": (1, 8, 8, 3)}, "e has 1 frames; at least 2 needed"),
        (
            {"front": (9, 8, 8, 3), "wrist": (9, 8, 8, 3)},
            "e has frames of cameras: front, wrist; exactly one needed",
        ),
        ({}, "e has frames of cameras: none; exactly one needed"),
    ],
)
def test_episodes_without_a_next_frame_of_one_camera_are_named(frames, message):
    made = {camera: np.zeros(shape, np.uint8) for camera, shape in frames.items()}
    agent = SimpleNamespace(processor=SimpleNamespace(images=Images()))
    with pytest.raises(ValueError, match=message):
        one_step(agent, [Episode("e", "t", "lift", np.zeros((9, 7)), frames=made)])


def clip(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three frames with structure, flat regions and noise, and what an imperfect model would make of them."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:26, 0:31]
    waves = [127 + 90 * np.sin(rows / (3 + t)) * np.cos(columns / 5) for t in range(3)]
    true = np.stack([np.stack([wave, wave[::-1], np.full_like(wave, 60)], axis=-1) for wave in waves])
    true[:, :12, :12] = 200  # flat: variances are zero
    made = true + rng.normal(scale=12, size=true.shape)
    return made.clip(0, 255).astype(np.uint8), true.clip(0, 255).astype(np.uint8)


def plain_ssim(image: np.ndarray, true: np.ndarray) -> float:
    """Equations 13 to 17 of Wang et al. 2004 around every pixel of every channel, the border reflected."""
    offsets = np.arange(-5, 6)
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    found = []
    for channel in range(3):
        x, y = (np.pad(a[..., channel].astype(np.float64), 5, mode="reflect") for a in (image, true))
        for i in range(image.shape[0]):
            for j in range(image.shape[1]):
                a, b = x[i : i + 11, j : j + 11], y[i : i + 11, j : j + 11]
                mean_a, mean_b = (window * a).sum(), (window * b).sum()
                var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
                covariance = (window * (a - mean_a) * (b - mean_b)).sum()
                found.append(
                    (2 * mean_a * mean_b + c1)
                    * (2 * covariance + c2)
                    / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
                )
    return float(np.mean(found))


def test_psnr_and_ssim_of_a_clip_equal_plain_computations():
    made, true = clip()
    errors = ((made.astype(np.float64) - true) ** 2).reshape(3, -1).mean(axis=1)
    np.testing.assert_allclose(frame_psnr(made, true), 10 * np.log10(255**2 / errors), atol=1e-6, rtol=0)
    plain = [plain_ssim(*pair) for pair in zip(made, true, strict=True)]
    assert 0.3 < min(plain) < max(plain) < 0.95
    np.testing.assert_allclose(frame_ssim(made, true), plain, atol=1e-6, rtol=0)
    assert torch.get_default_dtype() == torch.float32


def test_metrics_of_frames_agree_with_that_of_one_image_and_know_equal_frames():
    made, true = clip(1)
    assert frame_psnr(made, true) == pytest.approx(
        [psnr(*pair) for pair in zip(made, true, strict=True)], abs=1e-9
    )
    assert np.isinf(frame_psnr(true, true)).all()
    assert frame_ssim(true, true) == pytest.approx(1, abs=1e-12)
    for metric in (frame_psnr, frame_ssim):
        with pytest.raises(
            ValueError, match=r"shapes \(3, 26, 31, 3\) and \(2, 26, 31, 3\); \(T, H, W, 3\) twice"
        ):
            metric(made, true[:2])


def test_ssim_says_how_large_frames_have_to_be():
    made, true = clip()
    assert frame_ssim(made[:, :6, :6], true[:, :6, :6]).shape == (3,)
    for cut in (np.s_[:, :5], np.s_[:, :, :5]):
        with pytest.raises(ValueError, match="SSIM needs 6 pixels of height and width"):
            frame_ssim(made[cut], true[cut])


def test_lpips_asks_the_network_in_batches_of_pixels_between_minus_one_and_one():
    made, true = clip()
    asked = []

    def distance(a, b):
        asked.append((a, b))
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)

    found = frame_lpips(made, true, distance, batch_size=2)
    assert [len(a) for a, _ in asked] == [2, 1]
    assert all(a.device.type == "cpu" for pair in asked for a in pair)  # the network brings them to its own
    assert all(a.dtype == torch.float32 and a.shape[1:] == (3, 26, 31) for pair in asked for a in pair)
    plain = 2 / 255 * np.abs(made.astype(np.float64) - true).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found, plain, rtol=1e-5)
    assert min(float(b.min()) for _, b in asked) >= -1
    assert max(float(b.max()) for _, b in asked) == pytest.approx(200 / 255 * 2 - 1, abs=0.2)


def plain_frechet(features: np.ndarray, true: np.ndarray) -> float:
    """|μ − μ'|² + tr Σ + tr Σ' − 2 tr (Σ^½ Σ' Σ^½)^½, whose roots are of symmetric matrices."""

    def root(matrix):
        values, vectors = np.linalg.eigh(matrix)
        return vectors * np.sqrt(values.clip(0)) @ vectors.T

    one, other = np.cov(features.T), np.cov(true.T)
    mixed = np.trace(root(root(one) @ other @ root(one)))
    shift = ((features.mean(axis=0) - true.mean(axis=0)) ** 2).sum()
    return float(shift + np.trace(one) + np.trace(other) - 2 * mixed)


@pytest.mark.parametrize(("samples", "width"), [(40, 6), (5, 12)])
def test_frechet_distance_equals_a_plain_one(samples, width):
    rng = np.random.default_rng(0)
    true = rng.normal(size=(samples, width)) @ rng.normal(size=(width, width)) + 3
    made = rng.normal(size=(samples + 2, width)) * 1.7
    assert frechet_distance(made, true) == pytest.approx(plain_frechet(made, true), rel=1e-6)
    assert frechet_distance(true, true) == pytest.approx(0, abs=1e-4)
    for bad in (true[:1], true[:, :2], true[0]):
        with pytest.raises(ValueError, match=r"features have shapes .* at least 2, needed"):
            frechet_distance(bad, true)


def test_intervals_of_means_are_those_of_theory_where_there_is_one():
    values = np.random.default_rng(3).normal(loc=5, scale=2, size=400)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)
    assert mean_interval(values) == (mean, low, high)
    assert mean_interval([3.5]) == (3.5, None, None)
    with pytest.raises(ValueError, match=r"shape \(0,\)"):
        mean_interval([])
