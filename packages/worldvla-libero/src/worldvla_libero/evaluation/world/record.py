"""What a world-model evaluation found, by the names of `world.json`: curves over the horizon, means, intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.evaluation.world.metrics import frechet_distance, mean_interval

if TYPE_CHECKING:
    from worldvla_libero.evaluation.world.backbones import Backbones
    from worldvla_libero.evaluation.world.clips import ClipKey

RECORD_FILE = "world.json"
VIDEO_FOLDER = "videos"

METRICS = {
    "psnr": "PSNR [dB], higher is better",
    "ssim": "SSIM, higher is better",
    "lpips": "LPIPS, lower is better",
    "fvd": "FVD, lower is better",
}
"""And what figures call them."""

FRAME_METRICS = ("psnr", "ssim", "lpips")
"""Those that judge each frame, and so have curves; FVD is one number for all clips."""

KINDS = ("imagined", "copied", "reconstructed")
"""The model's frames; the last true frame, repeated; the true frames, encoded and decoded: the best of codes."""

PSNR_LIMIT = 100.0
"""dB for frames equal to the true ones, whose PSNR is infinite, so that means stay finite."""

_STRIPS = 4
_TOO_FEW = 2  # clips, below which there is no covariance


class Results:
    """What was judged of all clips.

    Args:
        parts: of each clip its file, see `imagine`.
        horizons: at which means are taken.

    Attributes:
        clips: which.
        horizons: as given.
        curves: by metric and kind one list for each clip, of one number for each frame; None where not computed.
    """

    def __init__(self, parts: Sequence[tuple[ClipKey, Path]], horizons: Sequence[int]) -> None:
        self.clips, self.horizons = [clip for clip, _ in parts], horizons
        self._arrays = [_load(path) for _, path in parts]
        self.curves: dict[str, dict[str, list[list[float]] | None] | None] = {}
        for metric in FRAME_METRICS:
            found = {kind: self._each(f"{metric}/{kind}") for kind in KINDS}
            some = any(values for values in found.values())
            self.curves[metric] = (
                {kind: [v.tolist() for v in values] or None for kind, values in found.items()} if some else None
            )

    def record(self, backbones: Backbones, truth: Literal["camera", "codes"]) -> dict[str, Any]:
        """What goes into `world.json`.

        Args:
            backbones: that LPIPS and FVD were computed with.
            truth: what the true frames are.
        """
        not_computed = dict(backbones.missing)
        if truth == "codes":
            not_computed["reconstructed"] = (
                "the true frames are drawn from codes, which reconstruct to themselves; give demonstrations with "
                "camera frames"
            )
        horizons: dict[str, Any] = {}
        for horizon in self.horizons:
            row: dict[str, Any] = {"episodes": sum(clip.frames >= horizon for clip in self.clips)}
            for metric in FRAME_METRICS:
                row[metric] = self._means(metric, horizon)
            row["fvd"] = self._fvd(horizon)
            if backbones.video is not None and row["fvd"] is None:
                not_computed[f"fvd_{horizon}"] = (
                    f"{horizon} frames; the network needs {backbones.min_frames}"
                    if horizon < backbones.min_frames
                    else f"{row['episodes']} clips; at least {_TOO_FEW} needed"
                )
            horizons[str(horizon)] = row
        frames = sum(clip.frames for clip in self.clips)
        return {
            "episodes": [
                {
                    "id": clip.id,
                    "task": clip.task,
                    "start": clip.start,
                    "frames": clip.frames,
                    "videos": f"{VIDEO_FOLDER}/{clip.name}.mp4",
                }
                for clip in self.clips
            ],
            "curves": self.curves,
            "horizons": horizons,
            "psnr_limit_db": PSNR_LIMIT,
            "not_computed": not_computed,
            "seconds_per_frame": float(sum(arrays["seconds"] for arrays in self._arrays)) / frames,
        }

    def strips(self) -> list[dict[str, list[NDArray[np.uint8]]]]:
        """Some frames of the longest clips, true and imagined, by what to call them."""
        longest = sorted(range(len(self.clips)), key=lambda index: -self.clips[index].frames)[:_STRIPS]
        return [
            {
                name.removeprefix("strip/"): list(value)
                for name, value in arrays.items()
                if name.startswith("strip/")
            }
            for arrays in (self._arrays[index] for index in sorted(longest))
        ]

    def _means(self, metric: str, horizon: int) -> dict[str, Any] | None:
        curves = self.curves[metric]
        if curves is None:
            return None
        means: dict[str, Any] = {}
        for kind, values in curves.items():
            long = [np.mean(each[:horizon]) for each in values or () if len(each) >= horizon]
            means[kind] = dict(zip(("mean", "low", "high"), mean_interval(long), strict=True)) if long else None
        return means if any(means.values()) else None

    def _fvd(self, horizon: int) -> dict[str, float | None] | None:
        true = self._each(f"video/{horizon}/true")
        if len(true) < _TOO_FEW:
            return None
        found = {kind: self._each(f"video/{horizon}/{kind}") for kind in KINDS}
        return {kind: frechet_distance(values, true) if values else None for kind, values in found.items()}

    def _each(self, name: str) -> list[NDArray[np.floating]]:
        return [arrays[name] for arrays in self._arrays if name in arrays]


def _load(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as content:
        return dict(content)
