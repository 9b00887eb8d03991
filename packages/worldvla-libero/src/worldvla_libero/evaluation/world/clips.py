"""Which clips are imagined: a stretch of each held-out trajectory, drawn by seed and name."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.data.episodes import EpisodeKey, Frames, spread


class ClipError(ValueError):
    """Trajectories that no clip can be taken of, or that are not there."""


@dataclass(frozen=True)
class ImagineSettings:
    """What is imagined; the defaults are the paper's.

    Attributes:
        frames: horizons; a clip is imagined once, as far as the longest that fits, and judged at each.
        episodes: trajectories, one clip of each, taken turn by turn from every task; None for all.
        context: h, true frames that the model is shown; from then on it sees but its own.
        rounds: N, frames that follow from one prompt (see `WorldVLA.imagine`).
        start: step of the last true frame shown; None to draw it for each trajectory.
        seed: of that draw.

    Raises:
        ValueError: no horizon, or a value out of its range.
    """

    frames: tuple[int, ...] = (10, 50)
    episodes: int | None = None
    context: int = 1
    rounds: int = 1
    start: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "frames", tuple(sorted(set(self.frames))))
        for name, value, least in (
            ("frames", min(self.frames, default=0), 1),
            ("episodes", 1 if self.episodes is None else self.episodes, 1),
            ("context", self.context, 1),
            ("rounds", self.rounds, 1),
            ("seed", self.seed, 0),
            ("start", self.context - 1 if self.start is None else self.start, self.context - 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}; allowed: {least} and above")


class ClipKey(NamedTuple):
    """A clip before it is read.

    Attributes:
        number: place among the clips that were chosen, from 0.
        id: of the trajectory.
        task: what it demonstrates.
        start: step of the last frame that the model is shown.
        frames: how many follow and are to be imagined.
    """

    number: int
    id: str
    task: str
    start: int
    frames: int

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.number:04d}_{re.sub('[^A-Za-z0-9]+', '_', self.id)[-60:]}"


@dataclass(frozen=True, eq=False)
class Clip:
    """A stretch of a trajectory: `context` frames to show, then H frames to imagine.

    Attributes:
        key: which.
        actions: (context + H - 1, D) float64 in data units; action i leads from frame i to frame i + 1.
        frames: (context + H, height, width, 3) uint8 of the camera; None where there are but codes.
        codes: (context + H, rows, columns) codebook indices; None where there are frames.
    """

    key: ClipKey
    actions: NDArray[np.float64]
    frames: Frames | None = None
    codes: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class Plan:
    """What will be imagined.

    Attributes:
        clips: one of each trajectory chosen that is long enough.
        short: by horizon the ids of trajectories that are too short for it.
    """

    clips: Sequence[ClipKey]
    short: dict[int, list[str]]

    @property
    def frames(self) -> int:
        """Of all clips."""
        return sum(clip.frames for clip in self.clips)


def choose_clips(trajectories: Iterable[EpisodeKey], settings: ImagineSettings) -> Plan:
    """One clip of each trajectory, as long as the longest horizon that fits; nothing but lengths is read.

    Where a clip starts depends on the seed and the trajectory's id alone, not on the other trajectories.

    Raises:
        ClipError: no trajectory is long enough for any horizon.
    """
    horizons, start = settings.frames, settings.start
    first = settings.context - 1 if start is None else start
    clips: list[ClipKey] = []
    short: dict[int, list[str]] = {horizon: [] for horizon in horizons}
    chosen = spread(list(trajectories), settings.episodes)
    for key in chosen:
        room = key.steps - 1 - first  # frame t is there for t < steps
        for horizon, ids in short.items():
            if horizon > room:
                ids.append(key.id)
        frames = max((horizon for horizon in horizons if horizon <= room), default=0)
        if frames:
            rng = np.random.default_rng([settings.seed, zlib.crc32(key.id.encode())])
            drawn = int(rng.integers(first, key.steps - frames)) if start is None else start
            clips.append(ClipKey(len(clips), key.id, key.task, drawn, frames))
    if not clips:
        longest = max((key.steps for key in chosen), default=0)
        raise ClipError(
            f"no trajectory of {len(chosen)} is long enough: {min(horizons)} frames after step {first} need "
            f"{first + min(horizons) + 1} steps; the longest has {longest}"
        )
    return Plan(clips, short)
