"""Tables of evaluations: the numbers of every figure, two runs episode by episode, and every episode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from worldvla_libero.evaluation.published_results import SUCCESS
from worldvla_libero.evaluation.records import EpisodeRecord
from worldvla_libero.evaluation.report.evaluation_figures import QUANTILES, published_rates, query_times
from worldvla_libero.evaluation.report.evaluation_run import EvaluationRun
from worldvla_libero.evaluation.report.media import Media
from worldvla_libero.pages.page import numbers, table

if TYPE_CHECKING:
    from worldvla_libero.evaluation.records import SuccessRate

Tasks = Mapping[tuple[str, int], str]

_DASH = "&ndash;"


def success_table(runs: Sequence[EvaluationRun], tasks: Tasks) -> str:
    """Success of each suite and of all, beside the paper's."""
    suites = list(dict.fromkeys(suite for suite, _ in tasks))
    rows = []
    for suite in [*suites, None]:
        printed = [f"{100 * rate:.1f}&nbsp;%" for rate in published_rates(runs, suite).values()]
        cells = [_rate_cell(run, suite) for run in runs] + (printed or [_DASH] * len(SUCCESS))
        rows.append([escape(suite or "all suites"), *cells])
    head = ["", *(escape(run.name) for run in runs), *(f"<i>{row.model}</i>" for row in SUCCESS)]
    return numbers("Numbers", head, rows, opened=True)


def task_table(runs: Sequence[EvaluationRun], tasks: Tasks) -> str:
    """Success of each task."""
    rows = [[_task_cell(key, told), *(_rate_cell(run, *key) for run in runs)] for key, told in tasks.items()]
    return numbers("Numbers: success", ["", *(escape(run.name) for run in runs)], rows)


def steps_table(runs: Sequence[EvaluationRun], tasks: Tasks) -> str:
    """Steps to success of each task."""

    def cell(run: EvaluationRun, key: tuple[str, int]) -> str:
        steps = [episode.steps for episode in run.of(*key) if episode.outcome == "success"]
        if not steps:
            return _DASH
        low, median, high = np.quantile(steps, (0.25, 0.5, 0.75))
        return f"{median:g}<small>{low:g} … {high:g}, from {min(steps)} to {max(steps)}</small>"

    rows = [[_task_cell(key, told), *(cell(run, key) for run in runs)] for key, told in tasks.items()]
    title = "Numbers: steps to success; median, middle half, fewest and most"
    return numbers(title, ["", *(escape(run.name) for run in runs)], rows)


def latency_table(runs: Sequence[EvaluationRun]) -> str:
    """Seconds of queries and episodes."""

    def seconds(value: float) -> str:
        return f"{1e3 * value:.0f} ms" if value < 1 else f"{value:.2f} s"

    times = [query_times(run) for run in runs]
    rows = [[f"query, p{100 * q:g}", *(seconds(float(np.quantile(t, q))) if len(t) else _DASH for t in times)]
            for q in QUANTILES]  # fmt: skip
    rows.append(["query, slowest", *(seconds(t[-1]) if len(t) else _DASH for t in times)])
    rows.append(["queries", *(f"{sum(e.queries for e in run.episodes):,}" for run in runs)])
    for label, name in (("episode, mean", "seconds"), ("of it in the policy", "policy_seconds")):
        rows.append([label, *(seconds(float(np.mean([getattr(e, name) for e in run.episodes]))) for run in runs)])
    steps = [sum(e.steps for e in run.episodes) / max(sum(e.seconds for e in run.episodes), 1e-9) for run in runs]
    rows.append(["control steps a second", *(f"{rate:.1f}" for rate in steps)])
    return numbers("Numbers", ["", *(escape(run.name) for run in runs)], rows)


def paired_table(runs: Sequence[EvaluationRun]) -> str:
    """Who solved what the other did not: far more telling than two intervals that overlap."""
    if len(runs) < 2:
        return ""
    rows = []
    for run in runs[1:]:
        shared = [(a, b) for a, b in shared_episodes(runs[0], run) if "error" not in (a.outcome, b.outcome)]
        pairs = [(a.outcome == "success", b.outcome == "success") for a, b in shared if same_start(a, b)]
        counts = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
        others = f"<small>{len(shared) - len(pairs):,} began otherwise</small>" * (len(pairs) < len(shared))
        rows.append([escape(run.name), f"{len(pairs):,}{others}", *(f"{count:,}" for count in counts)])
    first = escape(runs[0].name)
    head = [f"compared with {first}", "shared episodes", "both", f"only {first}", "only this", "neither"]
    title = "Episode by episode: successes of two runs from the same initial states, with the same seeds"
    return numbers(title, head, rows)


def shared_episodes(first: EvaluationRun, second: EvaluationRun) -> Iterator[tuple[EpisodeRecord, EpisodeRecord]]:
    """Episodes of the same suite, task and number."""
    by_key = {episode.key: episode for episode in first.episodes}
    return ((by_key[episode.key], episode) for episode in second.episodes if episode.key in by_key)


def same_start(first: EpisodeRecord, second: EpisodeRecord) -> bool:
    """Whether two episodes of one task began alike: fixtures are placed by the seed, all else by the state."""
    return (first.initial_state, first.seed) == (second.initial_state, second.seed)


def episode_tables(runs: Sequence[EvaluationRun], tasks: Tasks, media: Media) -> str:
    """Each episode of each task, those of the runs beside each other."""
    by_key = [{episode.key: episode for episode in run.episodes} for run in runs]
    html = []
    for key, told in tasks.items():
        numbered = sorted({k for found in by_key for k in found if k[:2] == key})
        rows = []
        for k in numbered:
            cells = "".join(f"<td>{_episode_cell(run, e.get(k), media)}</td>" for run, e in
                            zip(runs, by_key, strict=True))  # fmt: skip
            rows.append(f'<tr><td class="n">{k[2]}</td>{cells}</tr>')
        head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
        title = f"{escape(told)} <small>{escape(key[0])}/{key[1]}, {count(len(rows), 'episode')}</small>"
        body = table(f'<tr><th class="n"></th>{head}</tr>', rows)
        html.append(f"<details><summary>{title}</summary>\n{body}\n</details>")
    return "\n".join(html)


def _episode_cell(run: EvaluationRun, episode: EpisodeRecord | None, media: Media) -> str:
    if episode is None:
        return _DASH
    colour = ' class="alarm"' if episode.outcome == "error" else ""
    links = [
        f'<a href="{media.link(run.folder / name)}">{what}</a>'
        for what, name in (("video", episode.video), ("last frame", episode.last_frame))
        if name
    ]
    small = [f"state {episode.initial_state}, seed {episode.seed}", count(episode.queries, "query", "queries")]
    small += [
        f"{episode.seconds:.1f} s",
        *([f"{episode.attempts} attempts"] if episode.attempts > 1 else []),
        *links,
    ]
    return f"<span{colour}>{episode.outcome}</span> after {episode.steps} steps<small>{', '.join(small)}</small>"


def _task_cell(key: tuple[str, int], instruction: str) -> str:
    return f"{escape(instruction)}<small>{escape(key[0])}/{key[1]}</small>"


def _rate_cell(run: EvaluationRun, suite: str | None = None, task: int | None = None) -> str:
    if not run.of(suite, task):
        return _DASH
    rate = run.rate(suite, task)
    errors = f'<small class="alarm">{count(rate.errors, "error")}</small>' if rate.errors else ""
    return f"{share(rate)}<small>{rate.successes}/{rate.episodes}, {interval(rate)}</small>{errors}"


def share(rate: SuccessRate) -> str:
    """A success rate in HTML, or a dash where no episode ran to its end."""
    return _DASH if rate.rate is None else f"{100 * rate.rate:.1f}&nbsp;%"


def interval(rate: SuccessRate) -> str:
    """Wilson's 95 % interval in HTML."""
    low, high = rate.interval()
    return f"{100 * low:.1f} … {100 * high:.1f}&nbsp;%"


def count(number: int, thing: str, things: str | None = None) -> str:
    """How many of a thing, in words."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
