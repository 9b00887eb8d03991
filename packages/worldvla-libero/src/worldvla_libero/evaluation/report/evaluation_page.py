"""Sections of the page that reports evaluations: errors, success, steps, failures, latency, every episode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

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
    episode_tables,
    interval,
    latency_table,
    paired_table,
    same_start,
    share,
    shared_episodes,
    steps_table,
    success_table,
    task_table,
)
from worldvla_libero.evaluation.report.media import Media, episode_videos, failure_sheets, run_label
from worldvla_libero.pages.page import differences, table, values_html
from worldvla_libero.pages.panels import Panel, key_html, panels_html
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.versions import SIMULATOR

_STATED_OTHERWISE = ("name", "max_steps", "episodes_per_task")  # of a protocol: by the episodes themselves
_SUITE_SIZES = {"libero_90": 90}  # all others have ten tasks


def evaluation_card(run: EvaluationRun) -> str:
    """A run at a glance."""
    rate = run.rate()
    lines = [f"{rate.successes} of {rate.episodes} episodes succeeded; 95&nbsp;% interval {interval(rate)}"]
    if rate.errors:
        lines.append(f'<span class="alarm">{count(rate.errors, "error")}, counted apart</span>')
    if run.info is None:
        lines.append('<span class="alarm">interrupted, or still running</span>')
    policy = escape(run.policy) or "policy not recorded"
    return (
        f'<article style="--run: {run.colour}"><h3>{escape(run.name)}</h3>'
        f"<p><small>{policy}, protocol {escape(run.episodes[0].protocol)}</small></p>"
        f"<p><b>{share(rate)}</b></p><p><small>{'<br>'.join(lines)}</small></p></article>"
    )


def evaluation_notes(runs: Sequence[EvaluationRun]) -> list[str]:
    """What a reader must know before comparing numbers; HTML."""
    notes = []
    for run in runs:
        if run.info is None:
            notes.append(
                f"{escape(run.name)} was interrupted or is still running: it has no {RESULTS_FILE}. "
                f"Its numbers are those of the {count(len(run.episodes), 'episode')} recorded so far."
            )
        notes += [f"{escape(run.name)}: {escape(warning)}" for warning in run.warnings]
    notes += differences({run.name: _conditions(run) for run in runs})
    for run in runs[1:]:
        shared = list(shared_episodes(runs[0], run))
        others = sum(not same_start(*pair) for pair in shared)
        if others:
            notes.append(
                f"{others:,} of {count(len(shared), 'episode')} that {escape(run.name)} shares with "
                f"{escape(runs[0].name)} began from another initial state or with another seed; "
                "they are in no pair."
            )
    every = {episode.key for run in runs for episode in run.episodes}
    if any(len(run.episodes) < len(every) for run in runs):
        counts = ", ".join(f"{escape(run.name)} {len(run.episodes):,}" for run in runs)
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


def evaluation_sections(
    runs: Sequence[EvaluationRun], tasks: Tasks, figures: Mapping[str, Sequence[Panel]], media: Media
) -> dict[str, str]:
    """All sections of evaluations: HTML by title."""
    key = key_html({run.name: run.colour for run in runs})
    sections = {
        "Errors": _errors(runs),
        "Success": f"""<p>Share of the episodes that reached the goal, with Wilson's 95 % interval. Errors are in
none of these numbers. Grey: as published ({SOURCE}, Table 2), without intervals and of {EPISODES_PER_TASK}
episodes a task.</p>{panels_html(figures["success"])}{success_table(runs, tasks)}{paired_table(runs)}""",
        "Tasks": f"""{key}<p>Success: of the episodes that ran to their end, with Wilson's 95 %
interval; ✕ counts errors. Steps: a tick for each success, a dot and a number at their median; the axis ends at the
step limit.</p>{panels_html(figures["tasks"], pairs=True)}{task_table(runs, tasks)}{steps_table(runs, tasks)}""",
        "Where it fails": failure_sheets(runs, tasks),
        "Latency": f'{key}{panels_html(figures["latency"])}{latency_table(runs)}',
        "Videos": episode_videos(runs, tasks, media),
        "Episodes": episode_tables(runs, tasks, media),
        "Record": "".join(run_label(run) + values_html(_record(run)) for run in runs),
    }  # fmt: skip
    if not sections["Where it fails"]:
        sections["Where it fails"] = "<p>No episode ended at the step limit.</p>"
    return sections


def _conditions(run: EvaluationRun) -> dict[str, str]:
    """What should be alike in runs that are compared."""
    info = run.info or {}
    limits = {f"step limit of {episode.suite}": str(episode.max_steps) for episode in run.episodes}
    versions = {name: run.episodes[-1].versions.get(name, "none") for name in SIMULATOR}
    protocol = {k: str(v) for k, v in info.get("protocol", {}).items() if k not in _STATED_OTHERWISE}
    words = info.get("published_instructions", info.get("settings", {}).get("published_instructions"))
    told = {} if words is None else {"published_instructions": str(words)}
    return {"protocol": run.episodes[0].protocol, **limits, **versions, **protocol, **told}


def _suite_panel(runs: Sequence[EvaluationRun], suite: str) -> Panel:
    present = [run for run in runs if run.of(suite)]
    published, size = published_rates(runs, suite), _SUITE_SIZES.get(suite, 10)
    notes = []
    for run in present if published else ():
        tried = {episode.task for episode in run.of(suite)}
        if len(tried) < size:
            notes.append(f"{escape(run.name)}: {len(tried)} of the suite's {size} tasks")
        limit = run.of(suite)[0].max_steps
        if limit != OPENVLA.max_steps[suite]:
            notes.append(f"{escape(run.name)}: step limit {limit}; published with {OPENVLA.max_steps[suite]}")
    return success_panel(suite, present, suite, published, notes)


def _errors(runs: Sequence[EvaluationRun]) -> str:
    groups: dict[tuple[str, ...], list[EpisodeRecord]] = {}
    for run in runs:
        for episode in run.episodes:
            if episode.outcome == "error" and (error := episode.error) is not None:
                kind = (run.name, *(error.get(name, "") for name in ("origin", "type", "message")))
                groups.setdefault(kind, []).append(episode)
    if not groups:
        return ""
    rows = []
    for (name, origin, error_type, message), episodes in groups.items():
        trace = escape((episodes[0].error or {}).get("traceback", ""))
        which = ", ".join(f"{e.suite}/{e.task} episode {e.episode}" for e in episodes[:5])
        which += f" and {len(episodes) - 5} more" if len(episodes) > 5 else ""
        told = f"<b>{escape(error_type)}</b>: {escape(message)}<small>{escape(which)}</small>"
        told += f"<details><summary>traceback of the first</summary><pre>{trace}</pre></details>" if trace else ""
        cells = f"<td>{escape(name)}</td><td>{escape(origin)}</td>"
        rows.append(f'<tr><td class="n">{len(episodes):,}</td>{cells}<td>{told}</td></tr>')
    total = sum(len(episodes) for episodes in groups.values())
    return f"""<div class="box"><p class="alarm">{count(total, "episode")} ended in an error.</p>
<p>An error is no failure of the policy and in no success rate: the rates say little until it is mended.</p></div>
{table('<tr><th class="n"></th><th>run</th><th>origin</th><th>error</th></tr>', rows)}"""


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
