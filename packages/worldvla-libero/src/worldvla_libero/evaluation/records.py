"""What an evaluation finds: a record of each episode, and success rates."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from worldvla_libero.evaluation.episode_runner import EpisodeEnd, EpisodePlan
from worldvla_libero.evaluation.run_files import RunError, check_inside, parse_fields
from worldvla_libero.jobs.parts import StorageError
from worldvla_libero.simulator.protocols import EvaluationProtocol
from worldvla_libero.versions import PUBLISHED_VERSIONS
from worldvla_tokenizers.files import write_text_atomic

EPISODES_FILE = "episodes.jsonl"
RETRIED_FILE = "retried.jsonl"
RESULTS_FILE = "eval_info.json"


@dataclass(frozen=True)
class EpisodeRecord:
    """One line of `episodes.jsonl`.

    Attributes:
        outcome: `success`, `failure` (the step limit was reached) or `error`, which is no failure of the policy
            to reach the goal.
        query_seconds: wall-clock time until each answer of the policy, other episodes' answers included.
        attempts: how often the episode was begun; again after the simulator or its process failed.
        error: where, type, message and traceback; None otherwise.
        video: file name beside the record; None when none was asked for.
        last_frame: file name beside the record; None after a success.
        unsettled: which objects were not at rest when it began (see `settling`); None where all were, and in
            records of before this was measured.
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
    max_steps: int
    queries: int
    seconds: float
    policy_seconds: float
    query_seconds: tuple[float, ...]
    attempts: int
    error: dict[str, str] | None
    video: str | None
    last_frame: str | None
    versions: dict[str, str] = field(repr=False)
    unsettled: str | None = None

    @classmethod
    def of(cls, plan: EpisodePlan, end: EpisodeEnd, attempts: int, versions: Mapping[str, str]) -> Self:
        """The record of an episode that has ended.

        Args:
            plan: what was run.
            end: what happened.
            attempts: how often it was begun.
            versions: where the policy is; those of the simulator are told with what happened.
        """
        return cls(
            suite=plan.task.suite,
            task=plan.task.index,
            task_name=plan.task.name,
            instruction=plan.instruction,
            protocol=plan.protocol.name,
            episode=plan.episode,
            initial_state=plan.episode,
            seed=plan.seed,
            outcome="error" if end.error else "success" if end.success else "failure",
            steps=end.steps,
            max_steps=plan.max_steps,
            queries=len(end.query_seconds),
            seconds=end.seconds,
            policy_seconds=sum(end.query_seconds),
            query_seconds=end.query_seconds,
            attempts=attempts,
            error=asdict(end.error) if end.error else None,
            video=end.video,
            last_frame=end.last_frame,
            versions={**versions, **end.versions},
            unsettled=end.unsettled,
        )

    @classmethod
    def parse(cls, line: bytes, where: str) -> Self:
        """Read a line.

        Args:
            line: of `episodes.jsonl`.
            where: file and line, for errors.

        Raises:
            RunError: it is no record.
        """
        kinds = {field.name: str(field.type) for field in fields(cls)}
        values = parse_fields(line, kinds, where, {"unsettled": None})
        values["query_seconds"] = tuple(values["query_seconds"])
        record = cls(**values)
        for name in (record.video, record.last_frame):
            if name is not None:
                check_inside(name, where)
        if record.outcome == "error" and record.error is None:
            raise RunError(f"{where}: outcome 'error' without an error")
        return record

    @property
    def key(self) -> tuple[str, int, int]:
        """Suite, task index and number of the episode."""
        return self.suite, self.task, self.episode

    @property
    def line(self) -> bytes:
        """As a line of `episodes.jsonl`."""
        return (json.dumps(asdict(self)) + "\n").encode()


class EpisodeLog:
    """`episodes.jsonl`: only ever longer, by whole lines.

    Args:
        folder: of the evaluation.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / EPISODES_FILE

    def read(self) -> list[EpisodeRecord]:
        """All records, each episode once; what a killed run had begun to write is removed.

        Raises:
            RunError: a line is no record.
        """
        if not self.path.is_file():
            return []
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self.path, whole)
        lines = content[:whole].splitlines()
        return [EpisodeRecord.parse(line, f"{self.path}, line {n}") for n, line in enumerate(lines, 1)]

    def append(self, record: EpisodeRecord) -> None:
        """Append in one write, on disk before it returns; a write that fails leaves nothing.

        Raises:
            StorageError: it cannot be written.
        """
        line = record.line
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            before = os.fstat(descriptor).st_size
            try:
                if os.write(descriptor, line) < len(line):
                    raise OSError("the disk took half a line")
                os.fsync(descriptor)
            except OSError as error:
                os.ftruncate(descriptor, before)
                raise StorageError(
                    f"{self.path}: no record can be written ({error.strerror or error}); those before it stay: "
                    "run the same command again once that is mended"
                ) from error
        finally:
            os.close(descriptor)

    def set_errors_aside(self) -> None:
        """Move episodes that ended in an error to `retried.jsonl`, so that they are left to do.

        Raises:
            RunError: a line is no record.
        """
        records = self.read()
        errors = [record.line for record in records if record.outcome == "error"]
        if errors:  # killed between both, it leaves them in two files, and the next time moves them once more
            with self.path.with_name(RETRIED_FILE).open("ab") as file:
                file.writelines(errors)
            kept = (record.line for record in records if record.outcome != "error")
            write_text_atomic(self.path, b"".join(kept).decode())


@dataclass(frozen=True)
class SuccessRate:
    """Successes among the episodes that ran to their end; those that an error broke off are counted apart.

    Attributes:
        successes: episodes that reached the goal.
        episodes: episodes that ran to their end.
        errors: episodes that ended in an error. The rate says little unless this is 0.
    """

    successes: int
    episodes: int
    errors: int = 0

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

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval of the rate; the whole of [0, 1] without episodes.

        Unlike the normal approximation it stays sensible at 0 and 1.
        """
        if not self.episodes:
            return 0.0, 1.0
        from scipy.stats import binomtest  # a second to import

        low, high = binomtest(self.successes, self.episodes).proportion_ci(confidence, method="wilson")
        return float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"success_rate": self.rate, "wilson_95": list(self.interval())}


@dataclass(frozen=True)
class EvaluationResult:
    """All episodes of an evaluation, by task and number.

    Attributes:
        policy: what it is called.
        identity: what tells it from others of that name.
        protocol: how episodes were run.
        published_instructions: whether the policy was told the words that published models were trained on.
        records: of the episodes.
    """

    policy: str
    identity: Mapping[str, Any]
    protocol: EvaluationProtocol
    published_instructions: bool
    records: tuple[EpisodeRecord, ...]

    @property
    def warnings(self) -> list[str]:
        """What differs between the episodes, or from how the published success rates were measured."""
        return [
            *version_warnings([record.versions for record in self.records]),
            *(warning for records in self._by_task().values() if (warning := unsettled_warning(records))),
        ]

    @property
    def overall(self) -> SuccessRate:
        """Over all episodes."""
        return SuccessRate.of(self.records)

    @property
    def by_task(self) -> dict[tuple[str, int], SuccessRate]:
        """Keyed by suite and task index, in the order of the tasks."""
        return {key: SuccessRate.of(records) for key, records in self._by_task().items()}

    @property
    def by_suite(self) -> dict[str, SuccessRate]:
        """Keyed by suite."""
        return {suite: SuccessRate.of(records) for suite, records in self._by_suite().items()}

    def to_dict(self) -> dict[str, Any]:
        """For JSON, under the names of LeRobot's `eval_info.json`, and ours beside them."""
        return {
            "policy": self.policy,
            "policy_identity": dict(self.identity),
            "protocol": asdict(self.protocol),
            "published_instructions": self.published_instructions,
            "overall": _summary(self.records),
            "per_group": {suite: _summary(records) for suite, records in self._by_suite().items()},
            "per_task": [
                {
                    "task_group": suite,
                    "task_id": task,
                    "instruction": records[0].instruction,
                    "metrics": _metrics(records),
                }
                for (suite, task), records in self._by_task().items()
            ],
            "versions": self.records[-1].versions,
            "warnings": self.warnings,
        }

    def _by_task(self) -> dict[tuple[str, int], list[EpisodeRecord]]:
        found: dict[tuple[str, int], list[EpisodeRecord]] = {}
        for record in self.records:
            found.setdefault((record.suite, record.task), []).append(record)
        return found

    def _by_suite(self) -> dict[str, list[EpisodeRecord]]:
        found: dict[str, list[EpisodeRecord]] = {}
        for record in self.records:
            found.setdefault(record.suite, []).append(record)
        return found


def version_warnings(recorded: Iterable[Mapping[str, str]]) -> list[str]:
    """What differs between episodes, or from the versions that the published rates were measured with.

    Args:
        recorded: versions by name, of each episode.
    """
    found: dict[str, dict[str, None]] = {}  # in the order in which they appear
    for versions in recorded:
        for name in {**versions, **PUBLISHED_VERSIONS}:
            found.setdefault(name, {})[versions.get(name, "not installed")] = None
    warnings = [
        f"{name} is {' and '.join(found[name])}; published rates were measured with {published}"
        for name, published in PUBLISHED_VERSIONS.items()
        if name in found and list(found[name]) != [published]
    ]
    return warnings + [
        f"not all episodes were run with the same {name}: {' and '.join(versions)}"
        for name, versions in found.items()
        if len(versions) > 1 and name not in PUBLISHED_VERSIONS
    ]


def unsettled_warning(records: Sequence[EpisodeRecord]) -> str | None:
    """That episodes of a task began with objects that were not at rest; None where all were.

    Args:
        records: of one task.
    """
    concerned = [record for record in records if record.unsettled]
    if not concerned:
        return None
    first = concerned[0]
    mujoco = first.versions.get("mujoco", "of unknown version")
    return (
        f"{first.suite}/{first.task} {first.task_name}: {len(concerned)} of {len(records)} episodes began before "
        f"all was at rest, with mujoco {mujoco}; in episode {first.episode} {first.unsettled}. Compare its rate "
        f"with none measured under another MuJoCo: published ones were under {PUBLISHED_VERSIONS['mujoco']}"
    )


def _summary(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    """LeRobot's numbers over episodes that ran to their end, and ours."""
    rate = SuccessRate.of(records)
    reward = rate.rate  # None where no episode ran to its end: errors are no failures
    seconds = sum(record.seconds for record in records)
    return {
        "avg_sum_reward": reward,  # the reward is 1 when the goal is reached, and ends the episode
        "avg_max_reward": reward,
        "pc_success": None if reward is None else 100 * reward,
        "n_episodes": rate.episodes,
        "eval_s": seconds,
        "eval_ep_s": seconds / len(records) if records else 0.0,
        "video_paths": [record.video for record in records if record.video],
        **rate.to_dict(),
    }


def _metrics(records: Sequence[EpisodeRecord]) -> dict[str, Any]:
    ended = [record for record in records if record.outcome != "error"]
    successes = [record.outcome == "success" for record in ended]
    rewards = [float(success) for success in successes]
    return {
        "sum_rewards": rewards,
        "max_rewards": rewards,
        "video_paths": [record.video for record in ended if record.video],
        **SuccessRate.of(records).to_dict(),
        "successes": successes,
    }
