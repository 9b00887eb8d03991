"""Evaluations as they lie on disk, checked line by line, for reports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldvla_libero.evaluation.records import EPISODES_FILE, RESULTS_FILE, EpisodeRecord, SuccessRate
from worldvla_libero.evaluation.run_files import RunError, parse_object
from worldvla_libero.simulator.suites import SUITES

_COUNTS = ("successes", "episodes", "errors")


@dataclass(frozen=True)
class EvaluationRun:
    """A run of `worldvla evaluate`.

    Attributes:
        name: unique among the runs that are reported together.
        colour: likewise.
        folder: that holds it.
        episodes: in the order they ended.
        info: content of `eval_info.json`; None while the run goes on, or if it was interrupted.
    """

    name: str
    colour: str
    folder: Path
    episodes: tuple[EpisodeRecord, ...]
    info: Mapping[str, Any] | None

    @property
    def policy(self) -> str:
        """Who drove; empty where that is not recorded."""
        return str((self.info or {}).get("policy") or "")

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the run itself warns of, and several versions of one thing in its lines."""
        found = [str(warning) for warning in (self.info or {}).get("warnings") or ()]
        used: dict[str, list[str]] = {}
        for episode in self.episodes:
            for name, version in episode.versions.items():
                if version not in used.setdefault(name, []):
                    used[name].append(version)
        found += [f"episodes ran with {name} {' and '.join(v)}" for name, v in used.items() if len(v) > 1]
        return tuple(found)

    def of(self, suite: str | None = None, task: int | None = None) -> tuple[EpisodeRecord, ...]:
        """Episodes of a suite, or of one of its tasks; all without arguments."""
        return tuple(e for e in self.episodes if suite in (None, e.suite) and task in (None, e.task))

    def rate(self, suite: str | None = None, task: int | None = None) -> SuccessRate:
        """Success rate of a suite, or of one of its tasks; of everything without arguments."""
        return SuccessRate.of(self.of(suite, task))


def task_order(runs: Iterable[EvaluationRun]) -> dict[tuple[str, int], str]:
    """Instructions of all tasks of all runs, by suite and index: known suites first, in LIBERO's order.

    Raises:
        RunError: one task has two names, so that its numbers cannot stand side by side.
    """
    found: dict[tuple[str, int], tuple[str, str]] = {}
    for run in runs:
        for episode in run.episodes:
            name, told_by = found.setdefault((episode.suite, episode.task), (episode.task_name, run.name))
            if name != episode.task_name:
                raise RunError(
                    f"task {episode.task} of {episode.suite} is {name!r} in {told_by} and {episode.task_name!r} "
                    f"in {run.name}; runs of the same suites are needed"
                )
    order = {suite: index for index, suite in enumerate(SUITES)}
    keys = sorted(found, key=lambda key: (order.get(key[0], len(order)), key))
    instructions = {(e.suite, e.task): e.instruction for run in reversed(list(runs)) for e in run.episodes}
    return {key: instructions[key] for key in keys}


def read_evaluation(name: str, colour: str, folder: Path) -> EvaluationRun:
    """Read a run, over or not: of one that is not, a line that was begun is left out.

    Raises:
        RunError: a line is damaged, is there twice, or contradicts the lines before it; or the end of the run
            counted otherwise. The message names file and line.
    """
    path, info_path, episodes = folder / EPISODES_FILE, folder / RESULTS_FILE, list[EpisodeRecord]()
    content = path.read_bytes()
    if not info_path.is_file():  # killed, or at work: `EpisodeLog` runs such an episode again
        content = content[: content.rfind(b"\n") + 1]
    if not content:
        raise RunError(f"{path} is empty; at least one episode needed")
    lines: dict[tuple[Any, ...], int] = {}
    tasks: dict[tuple[str, int], tuple[int, tuple[str, str, int]]] = {}
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), 1):
        where = f"{path}, line {number}"
        episode = EpisodeRecord.parse(line, where)
        if episode.key in lines:
            raise RunError(f"{where}: episode {episode.key} is in line {lines[episode.key]} already")
        lines[episode.key] = number
        same = episode.task_name, episode.instruction, episode.max_steps
        first, expected = tasks.setdefault(episode.key[:2], (number, same))
        if same != expected:
            raise RunError(f"{where}: {same}; line {first} says of the same task {expected}")
        if episode.protocol != (episodes or [episode])[0].protocol:
            raise RunError(f"{where}: protocol {episode.protocol!r}; line 1 has {episodes[0].protocol!r}")
        episodes.append(episode)
    run = EvaluationRun(name, colour, folder, tuple(episodes), None)
    if not info_path.is_file():
        return run
    info = parse_object(info_path.read_bytes(), str(info_path))
    overall, counted = info.get("overall"), run.rate().to_dict()
    for key in _COUNTS:
        stated = overall.get(key) if isinstance(overall, Mapping) else None
        if stated != counted[key]:
            raise RunError(f"{info_path} states {stated} {key} overall; {EPISODES_FILE} holds {counted[key]}")
    for key in ("protocol", "settings"):
        if not isinstance(info.get(key, {}), Mapping):
            raise RunError(f"{info_path}: {key} is {info[key]!r}; allowed: an object")
    return EvaluationRun(name, colour, folder, tuple(episodes), info)
