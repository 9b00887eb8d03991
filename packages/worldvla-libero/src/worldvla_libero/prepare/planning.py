"""What a preparation will do, before it does it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from worldvla_libero.conventions import ACTION_DIM
from worldvla_libero.data.episodes import (
    EpisodeError,
    EpisodeKey,
    NoEpisodeLeftError,
    Source,
    SplitRule,
    fit_bounds,
    split,
    spread,
)
from worldvla_libero.demonstrations.replay import ReplaySettings
from worldvla_libero.jobs.parts import Dropped
from worldvla_libero.prepare.sources import PrepareError, choose_camera

_PIXELS_PER_CODE = 16
_SHOWN_REASONS = 3


@dataclass(frozen=True)
class PrepareSettings:
    """How demonstrations become a token data set; everything the result depends on but sources and tokenizer.

    Attributes:
        image_size: pixels; every frame is cropped and scaled to about this size squared before it is tokenized.
        camera: whose frames; None for the source's only or usual one (LIBERO: agentview).
        replay: how raw demonstrations are replayed. Frames are rendered at `replay.image_size`.
        min_steps: episodes with fewer actions are dropped; give the K of the longest chunk you will train.
        dimensions: D, the width of the actions; None for that of the first readable episode.
        split: `paper` (by trajectory, drawn by `seed`) or `published` (by task, then by trajectory).
        fraction: share of the training split.
        seed: of the paper's split.
        quantile: None for bounds at minimum and maximum of the training actions, else see `ActionTokenizer.fit`.
        batch_size: frames tokenized at once; 1 gives the published codes to the last one (see `ImageTokenizer`).

    Raises:
        ValueError: a value out of its range.
    """

    image_size: int = 256
    camera: str | None = None
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    min_steps: int = 5
    dimensions: int | None = None
    split: SplitRule = "paper"
    fraction: float = 0.9
    seed: int = 0
    quantile: float | None = None
    batch_size: int = 1

    def __post_init__(self) -> None:
        for name, least in (("min_steps", 1), ("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} and above")
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size is {self.image_size} px; allowed: multiples of 32 from 32")
        # Used only after all frames are tokenized: raise on an unknown rule, and on values out of range, now.
        split([EpisodeKey("", "", 1)], self.split, fraction=self.fraction)
        fit_bounds([np.zeros((1, 1))], quantile=self.quantile)


@dataclass(frozen=True)
class Plan:
    """What a preparation will do, before it does it.

    Attributes:
        source: the demonstrations.
        keys: the episodes chosen.
        unreadable: files of the source that cannot be read.
        camera: whose frames.
        replayed: whether the simulator renders them.
        dimensions: D.
        bytes_final: estimate of the data set's size.
        bytes_peak: estimate of the disk needed on the way: parts and shards side by side.
        notes: what was guessed, and what one may not expect; for people to read before the work begins.
    """

    source: Source
    keys: Sequence[EpisodeKey]
    unreadable: Sequence[Dropped]
    camera: str
    replayed: bool
    dimensions: int
    bytes_final: int
    bytes_peak: int
    notes: tuple[str, ...] = ()

    @property
    def steps(self) -> int:
        """Recorded actions of all episodes chosen; a replay leaves no-ops out."""
        return sum(key.steps for key in self.keys)


def plan(source: Source, settings: PrepareSettings = PrepareSettings(), *, limit: int | None = None) -> Plan:
    """Look at the demonstrations without reading frames.

    Args:
        source: the demonstrations.
        settings: how they will be prepared.
        limit: how many episodes, taken turn by turn from every task; None for all.

    Raises:
        NoEpisodeLeftError: no episode can be read.
        PrepareError: there is none, or the camera is not clear.
    """
    everything, unreadable = source.list()
    keys = spread(everything, limit)
    if not keys:
        reasons = [dropped.message for dropped in unreadable[:_SHOWN_REASONS]] or ["it is empty"]
        more = [f"and {len(unreadable) - _SHOWN_REASONS} more"] if len(unreadable) > _SHOWN_REASONS else []
        message = f"{source.name} has no episode that can be read: {'; '.join([*reasons, *more])}"
        raise NoEpisodeLeftError(message) if unreadable else PrepareError(message)
    camera, dimensions = _camera(source, settings), settings.dimensions
    if dimensions is None:
        dimensions = ACTION_DIM if source.needs_replay else _first_width(source, keys)
    codes = (settings.image_size // _PIXELS_PER_CODE) ** 2
    size = sum(key.steps for key in keys) * (2 * codes + 8 * dimensions)
    previews = len(keys) * 20_000
    notes = [*source.notes]
    splits = split(keys, settings.split, fraction=settings.fraction, seed=settings.seed)
    if settings.fraction < 1 and set(splits.values()) == {"train"}:
        notes.append(
            f"no validation split: {settings.fraction:g} of {len(keys)} episodes, rounded up, is all of them; a "
            "smaller fraction (--train-fraction) or more episodes leave some"
        )
    return Plan(
        source,
        keys,
        unreadable,
        camera,
        source.needs_replay,
        dimensions,
        bytes_final=size,
        bytes_peak=2 * size + previews,
        notes=tuple(notes),
    )


def _camera(source: Source, settings: PrepareSettings) -> str:
    if source.needs_replay:
        return settings.camera or settings.replay.cameras[0]
    return choose_camera(source, settings.camera)


def _first_width(source: Source, keys: Sequence[EpisodeKey]) -> int:
    for key in keys:
        try:
            actions = source.read(key.id).actions
        except EpisodeError:
            continue  # dropped by name when its turn comes
        if actions.ndim == 2:
            return actions.shape[1]
    raise PrepareError(f"none of {len(keys)} episodes of {source.name} has readable actions")
