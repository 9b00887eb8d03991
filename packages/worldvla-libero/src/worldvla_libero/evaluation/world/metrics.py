"""How good imagined frames are: PSNR, SSIM, LPIPS and FVD, beside what no model is needed for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from worldvla_libero.data.episodes import Episode
    from worldvla_libero.evaluation.world.backbones import FrameDistance
    from worldvla_model import WorldVLA


_SSIM_LEAST = 6  # pixels: half its window, which is reflected at the border, and the pixel itself


@dataclass(frozen=True)
class OneStep:
    """PSNR [dB] against the true next frame, one entry for each prediction.

    Attributes:
        predicted: the model's frame, from the true frame and action before.
        reconstructed: the true next frame, encoded and decoded: the best a prediction can be.
        copied: the frame before, as the camera saw it.
        copied_tokens: the frame before, encoded and decoded: what a model draws that changes nothing.
    """

    predicted: tuple[float, ...]
    reconstructed: tuple[float, ...]
    copied: tuple[float, ...]
    copied_tokens: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.predicted)


def psnr(image: NDArray[np.uint8], true: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio [dB] of two images of one size; infinite where they are equal.

    Args:
        image: (H, W, 3).
        true: (H, W, 3).

    Raises:
        ValueError: two sizes.
    """
    if image.shape != true.shape:
        raise ValueError(f"images have shapes {image.shape} and {true.shape}; one shape needed")
    error = np.square(image.astype(np.float64) - true).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def frame_psnr(frames: NDArray[np.uint8], true: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio [dB] of each frame, as torchmetrics has it; infinite where frames are equal.

    `psnr` is the same for one frame, without the seconds that importing torchmetrics takes.

    Args:
        frames: (T, H, W, 3).
        true: (T, H, W, 3).

    Returns:
        (T,).

    Raises:
        ValueError: two shapes.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    with _double_precision():
        made, wanted = _pixels(frames, true)
        return peak_signal_noise_ratio(made, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3)).numpy()


def frame_ssim(
    frames: NDArray[np.uint8], true: NDArray[np.uint8], *, device: torch.device | str = "cpu"
) -> NDArray[np.float64]:
    """Structural similarity of each frame, as torchmetrics has it; 1 where frames are equal.

    A Gaussian window of 11 x 11 pixels with σ = 1.5, K1 = 0.01, K2 = 0.03 and a data range of 1 for pixels in
    0 … 1; in each colour channel, around every pixel (the border is reflected), then the mean. In fp64: in fp32,
    variances of flat regions drown in rounding, and the mean is off by up to 4e-4.

    Args:
        frames: (T, H, W, 3), at least 6 pixels high and wide.
        true: (T, H, W, 3).
        device: where to compute; a CPU takes 0.6 s for a frame of 256 px.

    Returns:
        (T,).

    Raises:
        ValueError: two shapes, or smaller frames.

    Source: Wang et al. 2004.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    made, wanted = _pixels(frames, true)
    if min(made.shape[2:]) < _SSIM_LEAST:
        raise ValueError(f"frames have shape {frames.shape}; SSIM needs {_SSIM_LEAST} pixels of height and width")
    found = [
        structural_similarity_index_measure(
            made[t : t + 1].to(device), wanted[t : t + 1].to(device), data_range=1.0, sigma=1.5, k1=0.01, k2=0.03
        ).item()
        for t in range(len(made))  # one by one: its convolution unfolds 121 times the pixels of a batch
    ]
    return np.array(found)


def frame_lpips(
    frames: NDArray[np.uint8],
    true: NDArray[np.uint8],
    distance: FrameDistance,
    *,
    batch_size: int = 16,
) -> NDArray[np.float64]:
    """Learned perceptual distance of each frame; 0 where frames are equal.

    Args:
        frames: (T, H, W, 3).
        true: (T, H, W, 3).
        distance: the network, see `backbones.load_lpips`.
        batch_size: frames at once.

    Returns:
        (T,).

    Raises:
        ValueError: two shapes.
    """
    made, wanted = (pixels.float() * 2 - 1 for pixels in _pixels(frames, true))
    found = [
        distance(a, b).flatten().double().cpu().numpy()
        for a, b in zip(made.split(batch_size), wanted.split(batch_size), strict=True)
    ]
    return np.concatenate(found)


def frechet_distance(features: ArrayLike, true: ArrayLike) -> float:
    """Fréchet distance of two sets of features, each taken for a Gaussian; of I3D's features it is FVD.

    |μ − μ'|² + tr(Σ + Σ' − 2 (Σ Σ')^½), with unbiased covariances, by torchmetrics. With few samples it is far too
    large: compare values of the same number of samples only.

    Args:
        features: (N, F).
        true: (N', F).

    Raises:
        ValueError: fewer than two samples, or two numbers of features.

    Source: Unterthiner et al. 2018 (FVD); Heusel et al. 2017 (the distance).
    """
    import torch
    from torchmetrics.image.fid import FrechetInceptionDistance

    made, wanted = (torch.as_tensor(np.asarray(array, dtype=np.float64)) for array in (features, true))
    if made.ndim != 2 or wanted.ndim != 2 or made.shape[1] != wanted.shape[1] or min(len(made), len(wanted)) < 2:
        raise ValueError(
            f"features have shapes {tuple(made.shape)} and {tuple(wanted.shape)}; (N, F) and (N', F), N and N' at "
            "least 2, needed"
        )
    network: Any = torch.nn.Identity()
    network.num_features = made.shape[1]  # as torchmetrics asks a network of one's own
    fid = FrechetInceptionDistance(feature=network)
    fid.update(wanted, real=True)
    fid.update(made, real=False)
    return float(fid.compute())


def mean_interval(values: ArrayLike, *, resamples: int = 10_000) -> tuple[float, float | None, float | None]:
    """Mean of independent values, and its 95 % interval from a percentile bootstrap (seeded).

    Args:
        values: (N,) one for each episode.
        resamples: how many.

    Returns:
        Mean, lower and upper end; of one value no interval is known.

    Raises:
        ValueError: no value.

    Source: Efron and Tibshirani 1993, chapter 13.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values have shape {array.shape}; (N,) with at least 1 needed")
    if len(array) == 1:
        return float(array[0]), None, None
    rng = np.random.default_rng(0)
    means = array[rng.integers(0, len(array), (resamples, len(array)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(array.mean()), float(low), float(high)


def one_step(
    agent: WorldVLA,
    episodes: Iterable[Episode],
    *,
    per_episode: int = 4,
    on_frame: Callable[[int], None] = lambda done: None,
) -> OneStep:
    """Predict single next frames of demonstrations, each from the true frame and action before it.

    Args:
        agent: the model.
        episodes: with the frames of one camera, of the size that the model sees.
        per_episode: predictions of each, spread evenly over it.
        on_frame: told how many are done.

    Returns:
        One entry for each prediction, in the order of episodes and time.

    Raises:
        ValueError: an episode has a single frame, or not the frames of just one camera.
    """
    found: dict[str, list[float]] = {name: [] for name in OneStep.__dataclass_fields__}
    images = agent.processor.images
    for episode in episodes:
        if len(episode.frames) != 1:
            cameras = ", ".join(episode.frames) or "none"
            raise ValueError(f"{episode.id} has frames of cameras: {cameras}; exactly one needed")
        (frames,) = episode.frames.values()
        if len(frames) < 2:
            raise ValueError(f"{episode.id} has {len(frames)} frames; at least 2 needed, for a next one")
        for t in np.linspace(0, len(frames) - 1, per_episode, endpoint=False).astype(int):
            now, true = frames[t], frames[t + 1]
            drawn = images.decode(images.encode(np.stack([now, true])))
            predicted = agent.predict_frame([now], episode.actions[t : t + 1])
            found["predicted"].append(psnr(predicted, true))
            found["reconstructed"].append(psnr(drawn[1], true))
            found["copied"].append(psnr(now, true))
            found["copied_tokens"].append(psnr(drawn[0], true))
            on_frame(len(found["predicted"]))
    return OneStep(**{name: tuple(values) for name, values in found.items()})


def _pixels(frames: NDArray[np.uint8], true: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """(T, H, W, 3) uint8, twice → (T, 3, H, W) in 0 … 1, fp64."""
    import torch

    if frames.shape != true.shape or frames.ndim != 4:
        raise ValueError(f"frames have shapes {frames.shape} and {true.shape}; (T, H, W, 3) twice needed")
    made, wanted = (
        torch.tensor(np.ascontiguousarray(array)).permute(0, 3, 1, 2).double() / 255 for array in (frames, true)
    )
    return made, wanted


@contextmanager
def _double_precision() -> Iterator[None]:
    """For the constants of torchmetrics, which have the default type: log 10 in fp32 costs 1e-6 dB."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
