"""Sections of the page that reports evaluations: errors, success, steps, failures, latency, every episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worldvla_libero.evaluation.published_results import EPISODES_PER_TASK, SOURCE
from worldvla_libero.evaluation.records import RESULTS_FILE, EpisodeRecord
from worldvla_libero.evaluation.report.evaluation_figures import (
    episode_seconds_panel,
    published_rates,
    query_panel,
    success_panel,
    task_panels,
)
from worldvla_libero.evaluation.report.evaluation_run import EvaluationRun
from worldvla_libero.evaluation.report.evaluation_tables import (
    Tasks,
    count,
    interval,
    latency_table,
    listed_episodes,
    paired_table,
    same_start,
    share,
    shared_episodes,
    steps_table,
    success_table,
    task_table,
)
from worldvla_libero.evaluation.report.media import Media, episode_videos, failure_sheets
from worldvla_libero.pages.page import Card, differences
from worldvla_libero.pages.panels import Panel
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.versions import SIMULATOR

_STATED_OTHERWISE = ("name", "max_steps", "episodes_per_task")  # of a protocol: by the episodes themselves
_SUITE_SIZES = {"libero_90": 90}  # all others have ten tasks


def evaluation_card(run: EvaluationRun) -> Card:
    """A run at a glance."""
    rate = run.rate()
    line = (
        f"{rate.successes} of {rate.episodes} episodes succeeded; 95\N{NO-BREAK SPACE}% interval {interval(rate)}"
    )
    alarms = [f"{count(rate.errors, 'error')}, counted apart"] if rate.errors else []
    if run.info is None:
        alarms.append("interrupted, or still running")
    about = f"{run.policy or 'policy not recorded'}, protocol {run.episodes[0].protocol}"
    return Card(run.name, run.colour, about, share(rate), [line], alarms)


def evaluation_notes(runs: Sequence[EvaluationRun]) -> list[str]:
    """What a reader must know before comparing numbers."""
    notes = []
    for run in runs:
        if run.info is None:
            notes.append(
                f"{run.name} was interrupted or is still running: it has no {RESULTS_FILE}. "
                f"Its numbers are those of the {count(len(run.episodes), 'episode')} recorded so far."
            )
        notes += [f"{run.name}: {warning}" for warning in run.warnings]
    notes += differences({run.name: _conditions(run) for run in runs})
    for run in runs[1:]:
        shared = list(shared_episodes(runs[0], run))
        others = sum(not same_start(*pair) for pair in shared)
        if others:
            notes.append(
                f"{others:,} of {count(len(shared), 'episode')} that {run.name} shares with "
                f"{runs[0].name} began from another initial state or with another seed; "
                "they are in no pair."
            )
    every = {episode.key for run in runs for episode in run.episodes}
    if any(len(run.episodes) < len(every) for run in runs):
        counts = ", ".join(f"{run.name} {len(run.episodes):,}" for run in runs)
        notes.append(
            f"Not every run has every episode: of {len(every):,}, {counts}. Rates are over different sets."
        )
    return notes


def evaluation_figures(runs: Sequence[EvaluationRun], tasks: Tasks) -> dict[str, list[Panel]]:
    """All figures of evaluations by name."""
    suites = list(dict.fromkeys(suite for suite, _ in tasks))
    success = [_suite_panel(runs, suite) for suite in suites]
    if len(suites) > 1:
        published = published_rates(runs, None)
        note = "over all episodes of each run" + "; published: the mean of the four suites" * bool(published)
        success.append(success_panel("all suites", runs, None, published, [note]))
    return {
        "success": success,
        "tasks": task_panels(runs, tasks),
        "latency": [query_panel(runs), episode_seconds_panel(runs)],
    }


def evaluation_values(
    runs: Sequence[EvaluationRun], tasks: Tasks, figures: Mapping[str, Sequence[Panel]], media: Media
) -> dict[str, Any]:
    """What the sections of evaluations show, by its name in their template."""
    return {
        "runs": runs,
        "colours": {run.name: run.colour for run in runs},
        "source": SOURCE,
        "episodes_per_task": EPISODES_PER_TASK,
        "tasks": tasks,
        "figures": figures,
        "errors": _errors(runs),
        "ended_in_error": count(sum(run.rate().errors for run in runs), "episode"),
        "success_table": success_table(runs, tasks),
        "paired_table": paired_table(runs),
        "task_table": task_table(runs, tasks),
        "steps_table": steps_table(runs, tasks),
        "latency_table": latency_table(runs),
        "failures": failure_sheets(runs, tasks),
        "videos": episode_videos(runs, tasks, media),
        "recorded_videos": len({e.key for run in runs for e in run.episodes if e.video}),
        "episodes": listed_episodes(runs, tasks, media),
        "records": [(run, _record(run)) for run in runs],
    }


def _conditions(run: EvaluationRun) -> dict[str, str]:
    """What should be alike in runs that are compared."""
    info = run.info or {}
    limits = {f"step limit of {episode.suite}": str(episode.max_steps) for episode in run.episodes}
    versions = {name: run.episodes[-1].versions.get(name, "none") for name in SIMULATOR}
    protocol = {k: str(v) for k, v in info.get("protocol", {}).items() if k not in _STATED_OTHERWISE}
    words = info.get("published_instructions", info.get("settings", {}).get("published_instructions"))
    instructions = {} if words is None else {"published_instructions": str(words)}
    return {"protocol": run.episodes[0].protocol, **limits, **versions, **protocol, **instructions}


def _suite_panel(runs: Sequence[EvaluationRun], suite: str) -> Panel:
    present = [run for run in runs if run.of(suite)]
    published, size = published_rates(runs, suite), _SUITE_SIZES.get(suite, 10)
    notes = []
    for run in present if published else ():
        tried = {episode.task for episode in run.of(suite)}
        if len(tried) < size:
            notes.append(f"{run.name}: {len(tried)} of the suite's {size} tasks")
        limit = run.of(suite)[0].max_steps
        if limit != OPENVLA.max_steps[suite]:
            notes.append(f"{run.name}: step limit {limit}; published with {OPENVLA.max_steps[suite]}")
    return success_panel(suite, present, suite, published, notes)


@dataclass(frozen=True)
class _Error:
    """Errors of a kind.

    Attributes:
        times: how often it happened.
        run: name of the run it happened in.
        origin: whose it is.
        type: of the exception.
        message: of the exception.
        episodes: that ended in it, in words.
        traceback: of the first, if it has one.
    """

    times: int
    run: str
    origin: str
    type: str
    message: str
    episodes: str
    traceback: str


def _errors(runs: Sequence[EvaluationRun]) -> list[_Error]:
    groups: dict[tuple[str, str, str, str], list[EpisodeRecord]] = {}
    for run in runs:
        for episode in run.episodes:
            if episode.outcome == "error" and (error := episode.error) is not None:
                origin, error_type, message = (error.get(name, "") for name in ("origin", "type", "message"))
                groups.setdefault((run.name, origin, error_type, message), []).append(episode)
    found = []
    for kind, episodes in groups.items():
        which = ", ".join(f"{e.suite}/{e.task} episode {e.episode}" for e in episodes[:5])
        which += f" and {len(episodes) - 5} more" if len(episodes) > 5 else ""
        found.append(_Error(len(episodes), *kind, which, (episodes[0].error or {}).get("traceback", "")))
    return found


def _record(run: EvaluationRun) -> dict[str, object]:
    """Where the numbers come from."""
    info = run.info or {}
    limits = {episode.suite: episode.max_steps for episode in run.episodes}
    protocol = info.get("protocol") or {"name": run.episodes[0].protocol, "max_steps": limits}
    seeds = sorted({episode.seed for episode in run.episodes})
    rate = run.rate()
    return {
        "folder": str(run.folder),
        "policy": run.policy or "not recorded",
        "episodes": len(run.episodes),
        "successes": rate.successes,
        "failures": rate.episodes - rate.successes,
        "errors": rate.errors,
        "seeds": seeds if len(seeds) <= 10 else f"{len(seeds)} from {seeds[0]} to {seeds[-1]}",
        "protocol": protocol,
        "versions": info.get("versions") or run.episodes[-1].versions,
        "warnings": list(run.warnings) or "none",
    }
