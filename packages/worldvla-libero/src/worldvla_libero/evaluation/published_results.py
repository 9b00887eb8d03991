"""Numbers of the paper to stand beside one's own. No interval is published with any of them.

Source: WorldVLA, arXiv 2506.21539, Tables 2 to 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

SOURCE = "arXiv 2506.21539"
SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10")
EPISODES_PER_TASK = 50
"""Each task from as many initial states; section 4, Metrics."""


@dataclass(frozen=True)
class PublishedSuccess:
    """A row of Table 2.

    Attributes:
        model: who.
        rates: success rate by suite, between 0 and 1.
        average: mean of the four suites, as printed.
    """

    model: str
    rates: Mapping[str, float]
    average: float


@dataclass(frozen=True)
class PublishedImagination:
    """A row of Table 4: rollouts on validation trajectories, each frame from the generated one before it.

    Attributes:
        model: who.
        metrics: by number of frames and metric: FVD, PSNR [dB], SSIM and LPIPS. The last two, printed as per cent,
            are here in their own units.
    """

    model: str
    metrics: Mapping[int, Mapping[str, float]]


def _success(model: str, spatial: float, obj: float, goal: float, long: float, average: float) -> PublishedSuccess:
    rates = {suite: rate / 100 for suite, rate in zip(SUITES, (spatial, obj, goal, long), strict=True)}
    return PublishedSuccess(model, MappingProxyType(rates), average / 100)


def _imagination(model: str, **frames: tuple[float, float, float, float]) -> PublishedImagination:
    metrics = {
        int(count.removeprefix("after_")): MappingProxyType(
            {"fvd": fvd, "psnr": psnr, "ssim": ssim / 100, "lpips": lpips / 100}
        )
        for count, (fvd, psnr, ssim, lpips) in frames.items()
    }
    return PublishedImagination(model, MappingProxyType(metrics))


SUCCESS = (
    _success("WorldVLA 512", 87.6, 96.2, 83.4, 60.0, 81.8),
    _success("WorldVLA 256", 85.6, 89.0, 82.6, 59.0, 79.1),
    _success("OpenVLA", 84.7, 88.4, 79.2, 53.7, 76.5),
)
"""Table 2, trained on all data. The numbers after the name are the image's width in pixels."""

IMAGINATION = (
    _imagination(
        "action world model", after_10=(255.1, 29.77, 90.40, 11.94), after_50=(674.1, 24.30, 83.55, 15.44)
    ),
    _imagination("world model", after_10=(250.0, 29.62, 90.73, 11.97), after_50=(718.6, 23.98, 83.41, 15.60)),
)
"""Table 4."""


def _rates(goal: float, obj: float, spatial: float, long: float) -> Mapping[str, float]:
    names = ("libero_goal", "libero_object", "libero_spatial", "libero_10")
    return MappingProxyType({s: rate / 100 for s, rate in zip(names, (goal, obj, spatial, long), strict=True)})


ACTION_ABLATION = (
    _rates(67.3, 82.9, 77.8, 23.0),
    _rates(73.1, 88.0, 80.2, 27.3),
    _rates(79.6, 82.9, 36.7, 16.9),
    _rates(84.4, 90.9, 81.8, 49.3),
    _rates(85.1, 90.9, 84.0, 52.4),
)
"""Table 3, success rates by suite, row by row."""

HISTORY_ABLATION = MappingProxyType(
    {(1, False): 0.584, (2, False): 0.673, (4, False): 0.787, (1, True): 0.740, (2, True): 0.844, (4, True): 0.847}
)
"""Table 5, success rate by frames in the prompt and whether actions come in chunks."""

PRETRAINING_ABLATION = MappingProxyType(
    {False: _rates(67.3, 82.9, 77.8, 23.0), True: _rates(73.1, 84.0, 79.8, 30.2)}
)
"""Table 6, success rates by suite, without and with pretraining as a world model."""
