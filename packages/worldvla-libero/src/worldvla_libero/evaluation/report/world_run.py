"""World-model runs as they lie on disk, checked for reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

from worldvla_libero.evaluation.run_files import RunError, check_inside, parse_object
from worldvla_libero.evaluation.world.record import METRICS, RECORD_FILE

_PARTS: dict[str, type | UnionType] = {
    **dict.fromkeys(("model", "data", "split", "truth", "world_prompt"), str),
    **dict.fromkeys(("image_size", "context", "rounds"), int),
    "control_hz": int | float,
    "episodes": list,
    **dict.fromkeys(("curves", "horizons", "not_computed", "settings"), dict),
}
_EPISODE: dict[str, type] = {"id": str, "task": str, "start": int, "frames": int}


@dataclass(frozen=True)
class WorldRun:
    """A run of `worldvla imagine`.

    Attributes:
        name: unique among the runs that are reported together.
        colour: likewise.
        folder: that holds it.
        content: of `world.json`.
    """

    name: str
    colour: str
    folder: Path
    content: Mapping[str, Any]


def read_world(name: str, colour: str, folder: Path) -> WorldRun:
    """Read a run.

    Raises:
        RunError: `world.json` is damaged or contradicts itself.
    """
    path = folder / RECORD_FILE
    content = parse_object(path.read_bytes(), str(path))
    for key, needed in _PARTS.items():
        if not isinstance(content.get(key), needed):
            allowed = getattr(needed, "__name__", needed)
            raise RunError(f"{path}: {key} is {content.get(key)!r}; allowed: {allowed}")
    _object(content["settings"].get("backbones"), f"{path}: backbones")
    for index, episode in enumerate(content["episodes"]):
        if not isinstance(episode, dict) or not all(isinstance(episode.get(k), t) for k, t in _EPISODE.items()):
            raise RunError(f"{path}: episode {index} is {episode!r}; needed: {', '.join(_EPISODE)}")
        if (videos := episode.get("videos")) is not None:
            if not isinstance(videos, str):
                raise RunError(f"{path}: videos of episode {index} is {videos!r}; allowed: a file, or null")
            check_inside(videos, str(path))
    for metric, kinds in content["curves"].items():
        for kind, curves in _object(kinds, f"{path}: curves of {metric}").items():
            if not isinstance(curves, list) or not all(isinstance(c, list) and all(map(_fits, c)) for c in curves):
                raise RunError(f"{path}: curves of {metric}, {kind}: a list of numbers for each episode needed")
            if len(curves) != len(content["episodes"]):
                raise RunError(
                    f"{path}: {len(curves)} curves of {metric}, {kind}; {len(content['episodes'])} episodes"
                )
    for frames, row in content["horizons"].items():
        where = f"{path}: horizon {frames!r}"
        if not frames.isdecimal() or frames != str(int(frames)):
            raise RunError(f"{where}; allowed: a number of frames")
        _check_row(row, len(content["episodes"]), where)
    return WorldRun(name, colour, folder, content)


def _check_row(row: Any, clips: int, where: str) -> None:
    """How many clips are as long as a horizon, and for each metric and kind of frames a number or its mean."""
    if not isinstance(row, dict):
        raise RunError(f"{where} is {row!r}; allowed: an object")
    count = row.get("episodes")
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= clips:
        raise RunError(f"{where}: episodes is {count!r}; allowed: 0 … {clips}, the clips of the run")
    for metric in METRICS:
        for kind, value in _object(row.get(metric), f"{where}, {metric}").items():
            if not _fits_mean(value):
                raise RunError(f"{where}, {metric}, {kind} is {value!r}; allowed: a number, or mean, low and high")


def _object(value: Any, where: str) -> dict[str, Any]:
    """What is computed by name; nothing where it was not."""
    if value is not None and not isinstance(value, dict):
        raise RunError(f"{where} is {value!r}; allowed: an object, or null")
    return value or {}


def _fits_mean(value: Any) -> bool:
    """A number, or one with both ends of its interval, which are null where none is known."""
    if not isinstance(value, dict):
        return _fits(value)
    ends = [value.get(end, "missing") for end in ("low", "high")]
    return value.get("mean") is not None and all(map(_fits, [value["mean"], *ends])) and ends.count(None) != 1


def _fits(value: Any) -> bool:
    """A number, infinite ones (PSNR of equal frames) included, or nothing."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))
