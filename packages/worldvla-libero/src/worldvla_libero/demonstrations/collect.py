"""Demonstrations from scripted experts in the real simulator, in LIBERO's own HDF5 layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from worldvla_libero.data.episodes import Episode, EpisodeError, Reason
from worldvla_libero.demonstrations.experts import NoExpertError, demonstrate, has_expert
from worldvla_libero.hdf5 import merge_demonstrations, write_demonstrations
from worldvla_libero.jobs.job import Job
from worldvla_libero.jobs.parts import Dropped
from worldvla_libero.simulator.simulator import Simulator
from worldvla_libero.simulator.suites import Task
from worldvla_libero.versions import SIMULATOR, installed_versions

RECORD_FILE = "collection.json"

_PART_SUFFIX = ".hdf5"


@dataclass(frozen=True)
class Attempt:
    """One try of an expert at a task.

    Attributes:
        task: the task.
        number: from 0, per task.
        seed: of the collection.
    """

    task: Task
    number: int
    seed: int

    @property
    def id(self) -> str:
        """What reports call it."""
        return f"{self.task.name}/attempt_{self.number}"

    @property
    def episode_seed(self) -> int:
        """Seed of simulator and expert: collections with different seeds share no episode."""
        return int(np.random.SeedSequence((self.seed, self.number)).generate_state(1)[0] >> 1)


class Demonstrator:
    """In a worker: an attempt → an episode. Keeps the simulator of the last task open."""

    def __init__(self) -> None:
        self._simulator: Simulator | None = None

    def __call__(self, attempt: Attempt) -> Episode:
        """Let the expert try.

        Raises:
            EpisodeError: it did not reach the goal.
        """
        if self._simulator is None or self._simulator.task != attempt.task:
            if self._simulator is not None:
                self._simulator.close()
            self._simulator = Simulator(attempt.task)
        demonstration = demonstrate(self._simulator, seed=attempt.episode_seed)
        if not demonstration.success:
            raise EpisodeError(
                Reason.NO_SUCCESS,
                f"{attempt.id}: the expert missed the goal in {len(demonstration.actions)} steps "
                f"(seed {demonstration.seed})",
            )
        return Episode(
            id=attempt.id,
            task=attempt.task.name,
            instruction=attempt.task.language,
            actions=demonstration.actions,
            robot_states=demonstration.robot_states,
            states=demonstration.states,
            seed=demonstration.seed,
            versions=installed_versions(SIMULATOR),
            control_hz=float(self._simulator.protocol.control_hz),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"_simulator": None}


def collect(
    tasks: Sequence[Task],
    out: str | os.PathLike[str],
    *,
    episodes: int = 50,
    attempts: int | None = None,
    seed: int = 0,
    workers: int = 1,
    demonstrator: Callable[[Attempt], Episode] | None = None,
    on_part: Callable[[str, Path | Dropped], None] | None = None,
) -> dict[str, Any]:
    """Collect demonstrations: for each task the first successful attempts, in the order of their numbers.

    Start states are drawn by the simulator, never taken from those kept for evaluation. The files depend on
    tasks, numbers and seed alone, not on workers, nor on how often the run was killed and started again.

    Args:
        tasks: each with a scripted expert.
        out: folder for `<task>_demo.hdf5` and `collection.json`, made if need be.
        episodes: successes wanted per task.
        attempts: after how many to give up on a task; default twice the episodes.
        seed: of the collection.
        workers: processes.
        demonstrator: what makes an attempt, in a worker process; None for a `Demonstrator`.
        on_part: called after each attempt with its file, or why there is none.

    Returns:
        The content of `collection.json`: per task, attempts and successes.

    Raises:
        NoExpertError: a task has no script.
        JobError: `out` holds something else, or a collection with other settings.
        StorageError: the disk is full, or a file cannot be written; what is done stays.
        ValueError: a number is below 1.
    """
    limit = 2 * episodes if attempts is None else attempts
    for name, value in (("episodes", episodes), ("attempts", limit), ("tasks", len(tasks))):
        if value < 1:
            raise ValueError(f"{name} is {value}; allowed: 1 and above")
    for task in tasks:
        if not has_expert(task):
            raise NoExpertError(f"there is no scripted expert for {task}; choose other tasks")
    settings = {
        "tasks": [f"{task.suite}/{task.name}" for task in tasks],
        "episodes": episodes,
        "attempts": limit,
        "seed": seed,
        "versions": installed_versions((*SIMULATOR, "worldvla-libero")),
    }
    items = {_part(i, n): Attempt(task, n, seed) for i, task in enumerate(tasks) for n in range(limit)}

    def wanted(name: str, parts: Mapping[str, Path | Dropped]) -> bool:
        # Later attempts do not count: they may have ended first, and this one may still be among the first.
        first = f"{name.split('-')[0]}-"
        earlier = (part for key, part in parts.items() if first <= key < name)
        return sum(isinstance(part, Path) for part in earlier) < episodes

    with Job[Attempt, Episode](Path(out), RECORD_FILE, settings) as job:
        if not job.ended:
            parts = job.run(
                items,
                demonstrator or Demonstrator(),
                lambda episode, path: write_demonstrations(path, [episode]),
                suffix=_PART_SUFFIX,
                workers=workers,
                wanted=wanted,
                on_part=on_part,
            )
            table = [_finish(job, task, i, parts, episodes) for i, task in enumerate(tasks)]
            job.end({"tasks": table})
        return job.content()


def _part(task: int, number: int) -> str:
    return f"{task:03d}-{number:06d}"


def _finish(
    job: Job[Attempt, Episode], task: Task, index: int, parts: Mapping[str, Path | Dropped], episodes: int
) -> dict[str, Any]:
    """Put a task's successes into its file; attempts beyond the last one needed are those of other workers."""
    made: list[Path] = []
    failed: list[Dropped] = []
    number = 0
    while len(made) < episodes and (part := parts.get(_part(index, number))) is not None:
        if isinstance(part, Path):
            made.append(part)
        else:
            failed.append(part)
        number += 1
    row: dict[str, Any] = {
        "suite": task.suite,
        "task": task.name,
        "instruction": task.language,
        "attempts": number,
        "successes": len(made),
        "mean_steps": None,
        "file": None,
        "failures": [failure.message for failure in failed],
    }
    if made:
        row["file"] = f"{task.name}_demo.hdf5"
        attributes = {
            "bddl_file_name": f"bddl_files/{task.suite}/{task.name}.bddl",
            "macros_image_convention": "opengl",
            "source": "worldvla scripted expert, privileged state",
            "attempts": number,
        }
        with job.storing(row["file"]):
            steps = merge_demonstrations(job.out / row["file"], made, attributes=attributes)
        row["mean_steps"] = steps / len(made)
    return row
