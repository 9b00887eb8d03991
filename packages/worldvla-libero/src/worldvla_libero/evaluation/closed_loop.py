"""Evaluation: a policy drives episodes over tasks; what happened is kept as it happens."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from worldvla_libero.evaluation.episode_runner import EpisodeFault, EpisodePlan, EpisodeRunner
from worldvla_libero.evaluation.fleet import run_episodes
from worldvla_libero.evaluation.policy import EpisodicPolicy, Needs, Policy
from worldvla_libero.evaluation.records import RESULTS_FILE, EpisodeLog, EpisodeRecord, EvaluationResult
from worldvla_libero.evaluation.run_files import RunError
from worldvla_libero.jobs.job import Executor, Job
from worldvla_libero.jobs.pools import HerePool, open_pool
from worldvla_libero.simulator.libero_files import InitialStateError
from worldvla_libero.simulator.protocols import OPENVLA, EvaluationProtocol
from worldvla_libero.simulator.rendering import prepare_process
from worldvla_libero.simulator.suites import Task
from worldvla_libero.versions import installed_versions


class EvaluationError(RuntimeError):
    """With `strict`: an episode ended in an error."""


def evaluate(
    policy: Policy,
    tasks: Sequence[Task],
    out_dir: str | os.PathLike[str],
    *,
    protocol: EvaluationProtocol = OPENVLA,
    episodes: int | None = None,
    policy_name: str | None = None,
    video_stride: int = 1,
    published_instructions: bool = False,
    strict: bool = False,
    retry_errors: bool = False,
    workers: int = 0,
    executor: Executor = "local",
    batch_size: int = 32,
    time_limit: float = 600.0,
    on_episode: Callable[[EpisodeRecord], None] | None = None,
) -> EvaluationResult:
    """Evaluate a policy on tasks. Interrupted, the same call goes on; ended, it reads what was found.

    Args:
        policy: who drives. It answers in this process, with `act_batch` for several at once; an `EpisodicPolicy`
            is copied into every worker instead.
        tasks: of one or several suites.
        out_dir: gets `episodes.jsonl` (a line as soon as an episode has ended), `eval_info.json` (at the end),
            `frames/` (the last one of each episode that did not reach its goal) and `videos/`.
        protocol: step limits, seeds, settling, image size; a preset or one with numbers replaced.
        episodes: per task; default the protocol's.
        policy_name: how the results call the policy; default its class. A run is gone on with by the same name
            only, and the same `identity` where the policy has one (see `Policy`).
        video_stride: record every n-th simulator step; 0 for no videos. Recording renders frames that nobody
            else needs: with chunks of 5 and 2 images of history, every step costs 2.5 times the rendering.
        published_instructions: give the instructions the published models were trained on, which for LIBERO-10
            and -90 are not those they were evaluated with.
        strict: raise at the first episode that ends in an error, once it is recorded.
        retry_errors: run episodes again that ended in an error before; their records go to `retried.jsonl`.
        workers: processes that simulate; 0 for this one, which nothing can save if the simulator hangs or dies.
        executor: `local`, or `ray` for workers on the cluster that `ray.init` finds; every node needs `out_dir`
            at the same path.
        batch_size: observations that the policy is given at once, at most.
        time_limit: seconds that a simulator or the policy may take for one answer.
        on_episode: called with each record, those of an interrupted run first.

    Returns:
        All records; `eval_info.json` is written.

    Raises:
        JobError: `out_dir` holds something else, an evaluation with other settings, or one that is running.
        RunError: a line of `episodes.jsonl` is no record, or an evaluation that has ended lacks some.
        MissingFilesError: LIBERO does not bring what a task's scene is made of.
        InitialStateError: more episodes than a task has fixed initial states.
        EvaluationError: with `strict` only.
        PolicyTimeLimitError: the policy hangs.
        WorkerStartError: no worker process can start.
        RenderingError: workers have no OpenGL to render with.
        StorageError: something cannot be written, for instance because the disk is full.
        ValueError: a number out of range, or an `EpisodicPolicy` that cannot be copied into workers.
    """
    count = protocol.episodes_per_task if episodes is None else episodes
    for name, value, least in (
        ("episodes", count, 1),
        ("video_stride", video_stride, 0),
        ("batch_size", batch_size, 1),
        ("workers", workers, 1 if executor == "ray" else 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; allowed: {least} and above")
    if not time_limit > 0:
        raise ValueError(f"time_limit is {time_limit}; allowed: above 0")
    if workers and isinstance(policy, EpisodicPolicy):
        _check_copy(policy)
    name = type(policy).__name__ if policy_name is None else policy_name
    identity = dict(getattr(policy, "identity", {}))
    folder = Path(out_dir).absolute()
    plans = {
        plan.key: plan
        for task in tasks
        for plan in _plans(task, policy, protocol, count, folder, video_stride, published_instructions)
    }
    settings = {
        "policy": name,
        "policy_identity": identity,
        "protocol": asdict(protocol),
        "tasks": [f"{task.suite}/{task.name}" for task in tasks],
        "episodes": count,
        "published_instructions": published_instructions,
        "video_stride": video_stride,
    }
    prepare_process()  # before workers start, which would each make what they then find here
    job: Job[Any, Any] = Job(folder, RESULTS_FILE, settings)
    log = EpisodeLog(folder)
    if retry_errors and job.ended and any(record.outcome == "error" for record in log.read()):
        job.reopen()
    with job:
        if retry_errors and not job.ended:
            log.set_errors_aside()
        records = {record.key: record for record in log.read()}
        for record in records.values():
            if on_episode:
                on_episode(record)
        left = [plan for key, plan in plans.items() if key not in records]
        if left and job.ended:
            raise RunError(
                f"{log.path} lacks {len(left)} of {len(plans)} episodes, though {RESULTS_FILE} says that all are "
                "there: it was changed; choose another folder"
            )
        pool = open_pool(EpisodeRunner, workers, executor) if left else HerePool(EpisodeRunner)
        versions = installed_versions()
        with closing(
            run_episodes(left, policy, pool, workers=workers, batch_size=batch_size, time_limit=time_limit)
        ) as ended:
            for plan, end, attempts in ended:
                record = EpisodeRecord.of(plan, end, attempts, versions)
                log.append(record)
                records[record.key] = record
                if on_episode:
                    on_episode(record)
                if strict and end.error:
                    raise EvaluationError(_told(record, end.error))
        result = EvaluationResult(
            name, identity, protocol, published_instructions, tuple(records[key] for key in plans)
        )
        if not job.ended:
            _remove_drafts(folder)
            job.end(result.to_dict())
    return result


def _check_copy(policy: Policy) -> None:
    """Fail now, not in every worker."""
    try:
        pickle.dumps(policy)
    except Exception as error:
        raise ValueError(
            f"{type(policy).__name__} has a method reset, so that every worker gets a copy, and cannot be copied: "
            f"{error}; remedy: define what it holds in a module, or workers=0"
        ) from error


def _plans(
    task: Task,
    policy: Policy,
    protocol: EvaluationProtocol,
    count: int,
    folder: Path,
    video_stride: int,
    published_instructions: bool,
) -> list[EpisodePlan]:
    protocol.step_limit(task)  # fail now, not after hours
    task.check_files()
    needs = Needs.of(policy)
    if count > task.num_initial_states:
        raise InitialStateError(
            f"episodes is {count}; {task} has {task.num_initial_states} fixed initial states, one per episode"
        )
    return [
        EpisodePlan(
            task=task,
            episode=episode,
            protocol=protocol,
            instruction=task.published_training_language if published_instructions else task.language,
            needs=needs,
            folder=folder,
            video_stride=video_stride,
            policy=policy if isinstance(policy, EpisodicPolicy) else None,
        )
        for episode in range(count)
    ]


def _told(record: EpisodeRecord, error: EpisodeFault) -> str:
    where = f"{record.suite}/{record.task} episode {record.episode}"
    return f"{where}, step {record.steps}: the {error.origin} failed: {error.type}: {error.message}"


def _remove_drafts(folder: Path) -> None:
    """Remove what workers that were killed had begun to write."""
    for part in ("videos", "frames"):
        for draft in (folder / part).glob(".*"):
            draft.unlink()
