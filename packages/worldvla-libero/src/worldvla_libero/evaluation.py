"""Evaluation: episodes over tasks, a record of each, and success rates."""

from __future__ import annotations

import json
import math
import os
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from worldvla_libero.report import VideoWriter
from worldvla_libero.rollout import Policy, PolicyError, rollout
from worldvla_libero.simulator import Frame, Simulator
from worldvla_libero.suites import OPENVLA, EvaluationProtocol, InitialStateError, Task
from worldvla_libero.versions import installed_versions
from worldvla_tokenizers.files import write_text_atomic

EPISODES_FILE = "episodes.jsonl"
RESULTS_FILE = "results.json"


class RecordExistsError(FileExistsError):
    """The output folder already holds an evaluation."""


@dataclass(frozen=True)
class EpisodeRecord:
    """One line of `episodes.jsonl`.

    Attributes:
        outcome: `success`, `failure` (the step limit was reached) or `error` (the policy raised).
        error: type, message and traceback of what the policy raised; None otherwise.
        policy_seconds: wall-clock time in the policy's answers.
        video: file name beside the record; None when none was asked for.
    """

    suite: str
    task: int
    task_name: str
    instruction: str
    protocol: str
    episode: int
    initial_state: int
    seed: int
    outcome: Literal["success", "failure", "error"]
    steps: int
    queries: int
    seconds: float
    policy_seconds: float
    error: dict[str, str] | None
    video: str | None
    versions: dict[str, str] = field(repr=False)


@dataclass(frozen=True)
class SuccessRate:
    """Successes among the episodes that ran to their end; those the policy broke off are counted apart.

    Attributes:
        successes: episodes that reached the goal.
        episodes: episodes that ran to their end.
        errors: episodes in which the policy raised. The rate says little unless this is 0.
    """

    successes: int
    episodes: int
    errors: int

    @classmethod
    def of(cls, records: Iterable[EpisodeRecord]) -> SuccessRate:
        """Count records."""
        outcomes = [record.outcome for record in records]
        errors = outcomes.count("error")
        return cls(outcomes.count("success"), len(outcomes) - errors, errors)

    @property
    def rate(self) -> float | None:
        """Between 0 and 1; None when no episode ran to its end."""
        return self.successes / self.episodes if self.episodes else None

    def interval(self, z: float = 1.959963984540054) -> tuple[float, float]:
        """Wilson's score interval of the rate; 95 % by default, the whole of [0, 1] without episodes.

        Source: Wilson 1927; unlike the normal approximation it stays sensible at 0 and 1.
        """
        if not self.episodes:
            return 0.0, 1.0
        n, p = self.episodes, self.successes / self.episodes
        centre = p + z * z / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        scale = 1 + z * z / n
        return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"success_rate": self.rate, "wilson_95": list(self.interval())}


@dataclass(frozen=True)
class EvaluationResult:
    """All episodes of an evaluation, in the order they were run."""

    policy: str
    protocol: EvaluationProtocol
    records: tuple[EpisodeRecord, ...]

    @property
    def overall(self) -> SuccessRate:
        """Over all episodes."""
        return SuccessRate.of(self.records)

    @property
    def by_task(self) -> dict[tuple[str, int], SuccessRate]:
        """Keyed by suite and task index, in the order they were run."""
        keys = dict.fromkeys((record.suite, record.task) for record in self.records)
        return {key: SuccessRate.of(r for r in self.records if (r.suite, r.task) == key) for key in keys}

    def to_dict(self) -> dict[str, Any]:
        """For JSON: what was evaluated how, success per task and overall."""
        instructions = {(r.suite, r.task): r.instruction for r in self.records}
        return {
            "policy": self.policy,
            "protocol": asdict(self.protocol),
            "overall": self.overall.to_dict(),
            "tasks": [
                {"suite": suite, "task": task, "instruction": instructions[suite, task]} | rate.to_dict()
                for (suite, task), rate in self.by_task.items()
            ],
            "seconds": sum(record.seconds for record in self.records),
            "versions": installed_versions(),
        }


def evaluate(
    policy: Policy,
    tasks: Sequence[Task],
    out_dir: str | os.PathLike[str],
    *,
    protocol: EvaluationProtocol = OPENVLA,
    episodes: int | None = None,
    policy_name: str = "",
    video_stride: int = 1,
    published_instructions: bool = False,
    strict: bool = False,
    on_episode: Callable[[EpisodeRecord], None] | None = None,
) -> EvaluationResult:
    """Evaluate a policy on tasks, one episode after the other.

    Args:
        policy: who drives.
        tasks: of one or several suites.
        out_dir: gets `episodes.jsonl` (a line as soon as an episode has ended), `results.json` (at the end) and
            `videos/`.
        protocol: step limits, seeds, settling, image size; a preset or one with numbers replaced.
        episodes: per task; default the protocol's.
        policy_name: how the results call the policy.
        video_stride: record every n-th simulator step; 0 for no videos. Recording renders frames that nobody
            else needs: with chunks of 5 and 2 images of history, every step costs 2.5 times the rendering.
        published_instructions: give the instructions the published models were trained on, which for LIBERO-10
            and -90 are not those they were evaluated with.
        strict: raise what the policy raised once the episode is recorded, instead of going on.
        on_episode: called with each record.

    Returns:
        All records; `results.json` is written.

    Raises:
        RecordExistsError: `out_dir` already holds an evaluation.
        InitialStateError: more episodes than a task has fixed initial states.
        PolicyError: with `strict` only.
        SimulatorError: the simulator failed; the records so far are on disk.
        ValueError: a number out of range.
    """
    count = protocol.episodes_per_task if episodes is None else episodes
    if count < 1:
        raise ValueError(f"episodes is {count}; allowed: 1 and above")
    if video_stride < 0:
        raise ValueError(f"video_stride is {video_stride}; allowed: 0 (no videos) and above")
    for task in tasks:
        protocol.step_limit(task)  # fail now, not after hours
        if count > task.num_initial_states:
            raise InitialStateError(
                f"episodes is {count}; {task} has {task.num_initial_states} fixed initial states, one per episode"
            )
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / EPISODES_FILE
    if log.exists():
        raise RecordExistsError(f"{log} exists; choose another output folder or delete it")

    versions = installed_versions()
    records: list[EpisodeRecord] = []
    for task in tasks:
        with Simulator(task, protocol) as simulator:
            for episode in range(count):
                record, failure = _run_recorded(
                    policy,
                    simulator,
                    episode,
                    instruction=task.published_training_language if published_instructions else task.language,
                    folder=folder,
                    video_stride=video_stride,
                    versions=versions,
                )
                _append_line(log, json.dumps(asdict(record)))
                records.append(record)
                if on_episode:
                    on_episode(record)
                if strict and failure:
                    raise failure
    result = EvaluationResult(policy_name, protocol, tuple(records))
    write_text_atomic(folder / RESULTS_FILE, json.dumps(result.to_dict(), indent=2) + "\n")
    return result


def _run_recorded(
    policy: Policy,
    simulator: Simulator,
    episode: int,
    *,
    instruction: str,
    folder: Path,
    video_stride: int,
    versions: dict[str, str],
) -> tuple[EpisodeRecord, PolicyError | None]:
    """Run episode i from the i-th initial state, with a video; the record, and the error if there was one."""
    task, protocol = simulator.task, simulator.protocol
    seed = protocol.episode_seed(episode)
    name = f"videos/{task.suite}_{task.index:02d}_{episode:03d}.mp4" if video_stride else None
    writer = VideoWriter(folder / name, protocol.control_hz / video_stride) if name else nullcontext()
    failure: PolicyError | None = None
    started = time.perf_counter()
    with writer as video:

        def record_frame(step: int, frame: Frame | None) -> None:
            if video is not None and frame is not None and step % video_stride == 0:
                video.write(frame)

        try:
            run = rollout(
                policy,
                simulator,
                initial_state=episode,
                seed=seed,
                instruction=instruction,
                frame_stride=video_stride,
                on_step=record_frame,
            )
        except PolicyError as error:
            run, failure = error.so_far, error
    record = EpisodeRecord(
        suite=task.suite,
        task=task.index,
        task_name=task.name,
        instruction=instruction,
        protocol=protocol.name,
        episode=episode,
        initial_state=episode,
        seed=seed,
        outcome="error" if failure else "success" if run.success else "failure",
        steps=len(run.actions),
        queries=len(run.query_steps),
        seconds=time.perf_counter() - started,
        policy_seconds=run.policy_seconds,
        error=_described(failure.__cause__) if failure else None,
        video=name,
        versions=versions,
    )
    return record, failure


def _described(error: BaseException | None) -> dict[str, str]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _append_line(path: Path, line: str) -> None:
    """Append in one write, on disk before it returns, so that a record is there whole or not at all."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, (line + "\n").encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
