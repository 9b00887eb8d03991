"""Demonstrations as one type, whatever file they come from: checks, the no-op filter, splits and bounds."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldvla_libero.jobs.parts import WORKER_KILLED, Dropped, ItemError
from worldvla_tokenizers import ActionTokenizer

SplitRule = Literal["paper", "published"]

NOOP_THRESHOLD = 1e-4  # of the norm of all dimensions but the last, the gripper's

Frames = NDArray[np.uint8]


class Reason(StrEnum):
    """Why an episode is left out."""

    UNREADABLE = "unreadable file"
    MISSING_KEY = "missing key"
    ACTION_WIDTH = "wrong action width"
    NOT_FINITE = "not finite"
    TOO_SHORT = "too short"
    MISSING_FRAMES = "frames missing"
    BAD_FRAMES = "unusable frames"
    NO_SUCCESS = "no success on replay"
    NO_SIMULATION = "cannot be simulated"
    WORKER_KILLED = WORKER_KILLED


class EpisodeError(ItemError):
    """A demonstration, or a whole file of them, that cannot be used.

    Args:
        reason: what kind of fault it is; reports count by it.
        message: names the file, the episode and the value.
    """

    def __init__(self, reason: Reason | str, message: str) -> None:
        super().__init__(Reason(reason), message)


class SourceError(ValueError):
    """Demonstrations that leave open what they are; refused before the work begins."""


class SplitError(ValueError):
    """A split that cannot be made."""


class EpisodeKey(NamedTuple):
    """An episode before it is read.

    Attributes:
        id: unique within its source, such as `pick_up_the_milk_and_place_it_in_the_basket_demo/demo_3`.
        task: what it demonstrates; the same for all episodes of one task.
        steps: T, its number of actions.
    """

    id: str
    task: str
    steps: int


class NoEpisodeLeftError(RuntimeError):
    """Every episode was dropped: the work was done as asked, to no avail."""

    @classmethod
    def of(cls, source: str, dropped: Sequence[Dropped]) -> NoEpisodeLeftError:
        """The error of a source, with the reasons."""
        reasons = ", ".join(sorted({one.reason for one in dropped})) or "there was none"
        return cls(f"no episode of {source} is left: {len(dropped)} dropped ({reasons})")


@dataclass(frozen=True, eq=False)
class Episode:
    """One demonstration.

    Attributes:
        id: unique within its source.
        task: name of what it demonstrates; LIBERO's own name for LIBERO.
        instruction: the task in words.
        actions: (T, D) float64 in data units (LIBERO: 3 deltas of position, 3 of axis-angle, gripper, -1 open to
            +1 closed).
        frames: (T, H, W, 3) uint8 by camera, upright; frame t is what the camera saw *before* action t. Empty for
            raw demonstrations, which a replay has yet to render.
        proprioception: (T, S) float64, what the robot feels of itself, row t before action t (LIBERO: position of
            the hand [m], its axis-angle [rad], both fingers [m]); None where the source has none.
        robot_states: (T or 1, 9) float64, what LIBERO's own files hold under this name: both fingers [m], position
            [m] and unit quaternion (x, y, z, w) of the hand; None where the source has none.
        states: (T or 1, 1 + nq + nv) float64 states of the simulator, of which a replay needs the first; None
            where there is no simulator.
        seed: of the simulator when it was recorded; None if unknown.
        versions: of what it was recorded with, by distribution.
        control_hz: actions per second.
    """

    id: str
    task: str
    instruction: str
    actions: NDArray[np.float64]
    frames: Mapping[str, Frames] = field(default_factory=dict)
    proprioception: NDArray[np.float64] | None = None
    robot_states: NDArray[np.float64] | None = None
    states: NDArray[np.float64] | None = None
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    control_hz: float = 20.0

    def __len__(self) -> int:
        return len(self.actions)


class Source(Protocol):
    """Demonstrations on disk. A source is small and can be pickled; each worker opens the files it reads.

    docs/architecture.md has one for `.npz` files in fifteen lines. For a format of one's own, `list` says which
    episodes there are, and `read` puts under `actions`, `frames` and `instruction` what the files call otherwise.
    """

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras whose frames it holds; empty for raw demonstrations."""
        ...

    @property
    def needs_replay(self) -> bool:
        """Whether the simulator has to render (and judge) the episodes before they are of use."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What had to be guessed, for people to read before the work begins."""
        ...

    def list(self) -> tuple[Sequence[EpisodeKey], Sequence[Dropped]]:
        """All episodes, and all files that cannot be read, in an order that depends on names alone.

        Raises:
            SourceError: they leave open what they are.
        """
        ...

    def read(self, id: str, cameras: Sequence[str] = ()) -> Episode:
        """Read one episode with the frames of the cameras named.

        Raises:
            EpisodeError: it cannot be read.
        """
        ...


def check_episode(episode: Episode, *, dimensions: int | None = None, min_steps: int = 1) -> None:
    """Refuse an episode that no sample could be made of.

    Args:
        episode: with or without frames.
        dimensions: D, the width that actions must have; None for any.
        min_steps: the fewest actions, such as K, the length of a chunk.

    Raises:
        EpisodeError: names the episode, what is wrong with it and what is allowed.
    """
    actions, name = episode.actions, episode.id
    if actions.ndim != 2 or (dimensions is not None and actions.shape[1] != dimensions):
        needed = "D" if dimensions is None else dimensions
        raise EpisodeError(
            Reason.ACTION_WIDTH, f"{name}: actions have shape {actions.shape}; (T, {needed}) needed"
        )
    if not np.isfinite(actions).all():
        t, d = (int(i) for i in np.argwhere(~np.isfinite(actions))[0])
        raise EpisodeError(Reason.NOT_FINITE, f"{name}: action {t}, dimension {d} is {actions[t, d]}")
    if len(actions) < min_steps:
        raise EpisodeError(Reason.TOO_SHORT, f"{name}: {len(actions)} actions; at least {min_steps} needed")
    if not episode.instruction.strip():
        raise EpisodeError(Reason.MISSING_KEY, f"{name}: the instruction is empty; words are needed")
    for camera, frames in episode.frames.items():
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not frames.size:
            raise EpisodeError(
                Reason.BAD_FRAMES,
                f"{name}: frames of {camera!r} have shape {frames.shape} and type {frames.dtype}; "
                "(T, H, W, 3) uint8 needed",
            )
        if len(frames) != len(actions):
            raise EpisodeError(
                Reason.MISSING_FRAMES, f"{name}: {len(frames)} frames of {camera!r} for {len(actions)} actions"
            )


def motion_mask(actions: ArrayLike) -> NDArray[np.bool_]:
    """Tell actions from no-ops: the arm at rest and the gripper as in the last action that was kept.

    A first action with the arm at rest is a no-op whatever its gripper, for no gripper was commanded before it.

    Args:
        actions: (T, D), the gripper last.

    Returns:
        (T,) True where the action is kept. A no-op is left out of a replay altogether: the simulator is not
        stepped, so that demonstrations without pauses stay consistent.

    Source: the filter of OpenVLA's LIBERO data, which the published WorldVLA data went through.
    """
    array = np.asarray(actions, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"actions have shape {array.shape}; (T, D) needed")
    resting = np.linalg.norm(array[:, :-1], axis=1) < NOOP_THRESHOLD
    kept = np.zeros(len(array), dtype=bool)
    gripper: float | None = None  # of the last kept action
    for t, action in enumerate(array):
        kept[t] = not (resting[t] and (gripper is None or action[-1] == gripper))
        if kept[t]:
            gripper = action[-1]
    return kept


def digest(keys: Iterable[NamedTuple]) -> str:
    """SHA-256 of a listing, in hexadecimal: whether two runs mean the same episodes."""
    return hashlib.sha256(json.dumps([list(key) for key in keys]).encode()).hexdigest()


def spread(keys: Sequence[EpisodeKey], limit: int | None) -> list[EpisodeKey]:
    """Take `limit` episodes, turn by turn from every task, in the order of `keys`; None takes all.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit is None:
        return list(keys)
    if limit < 1:
        raise ValueError(f"limit is {limit} episodes; allowed: 1 and above")
    turns: dict[str, int] = {}
    order = []
    for index, key in enumerate(keys):
        turn = turns[key.task] = turns.get(key.task, -1) + 1
        order.append((turn, index))
    return [keys[index] for index in sorted(index for _, index in sorted(order)[:limit])]


def split(
    keys: Iterable[EpisodeKey], rule: SplitRule = "paper", *, fraction: float = 0.9, seed: int = 0
) -> dict[str, str]:
    """Divide episodes into training and validation.

    `paper`: `fraction` of all trajectories train, drawn by `seed` so that every task gives its share; the rest is
    `validation`. `published`: of the tasks in alphabetical order the first `fraction` are in distribution; of each
    the first `fraction` of the trajectories *in string order* (demo_10 before demo_2) train and the rest is
    `validation`; all other tasks are `validation_unseen`. Both round up.

    Args:
        keys: the episodes, in any order.
        rule: `paper` or `published`.
        fraction: above 0, up to 1 (then there is no validation).
        seed: of the paper's rule.

    Returns:
        The name of the split of each id.

    Raises:
        SplitError: an unknown rule, a fraction out of range, no episode, or one id twice.

    Source: paper §4.1 (90 % of the trajectories train); the published data preparation.
    """
    episodes = sorted(keys)
    ids = [key.id for key in episodes]
    if not ids or len(set(ids)) < len(ids):
        twice = next((a for a, b in itertools.pairwise(ids) if a == b), None)
        raise SplitError(f"episode {twice!r} is there twice" if ids else "no episode to split")
    if not 0 < fraction <= 1:
        raise SplitError(f"fraction is {fraction}; allowed: above 0, up to 1")
    if rule not in _SPLIT_RULES:
        raise SplitError(f"split rule is {rule!r}; allowed: {', '.join(map(repr, _SPLIT_RULES))}")
    by_task: dict[str, list[str]] = {}
    for key in sorted(episodes, key=lambda key: (key.task, key.id)):
        by_task.setdefault(key.task, []).append(key.id)
    return _SPLIT_RULES[rule](by_task, fraction, seed)


def fit_bounds(training: Iterable[NDArray[np.float64]], *, quantile: float | None = None) -> ActionTokenizer:
    """Fit the bounds of the action bins to the training split alone.

    Args:
        training: (T, D) actions of each training episode; for minimum and maximum one at a time is in memory.
        quantile: None for minimum and maximum; else see `ActionTokenizer.fit`.

    Raises:
        SplitError: no episode trains.
        ActionError: the quantile is out of range.
    """
    ranges = quantile is None
    chosen = [np.stack([a.min(axis=0), a.max(axis=0)]) if ranges else a for a in training]
    if not chosen:
        raise SplitError("no episode is in the training split; bounds are fitted to that alone")
    return ActionTokenizer.fit(np.concatenate(chosen), quantile)


def _paper_split(by_task: Mapping[str, Sequence[str]], fraction: float, seed: int) -> dict[str, str]:
    # Each task's episodes are shuffled and laid out evenly over [0, 1) from a random offset; the cut at `fraction`
    # of all of them then takes from each task its share, although shares are seldom whole numbers.
    rng = np.random.default_rng(seed)
    positions = []
    for ids in by_task.values():
        offset = rng.random()
        positions += [((j + offset) / len(ids), ids[i]) for j, i in enumerate(rng.permutation(len(ids)))]
    ordered = [id for _, id in sorted(positions)]
    training = _share(len(ordered), fraction)
    return {id: "train" if i < training else "validation" for i, id in enumerate(ordered)}


def _published_split(by_task: Mapping[str, Sequence[str]], fraction: float, seed: int) -> dict[str, str]:
    seen = sorted(by_task)[: _share(len(by_task), fraction)]
    splits = {}
    for task, ids in by_task.items():
        training = _share(len(ids), fraction)
        for i, id in enumerate(sorted(ids)):
            splits[id] = ("train" if i < training else "validation") if task in seen else "validation_unseen"
    return splits


def _share(count: int, fraction: float) -> int:
    return math.ceil(round(count * fraction, 9))  # 0.9 * 10 must not become 10 by a rounding error


_SPLIT_RULES: dict[str, Callable[[Mapping[str, Sequence[str]], float, int], dict[str, str]]] = {
    "paper": _paper_split,
    "published": _published_split,
}
