"""Tables of evaluations: the numbers of every figure, two runs episode by episode, and every episode."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from worldvla_libero.evaluation.published_results import SUCCESS
from worldvla_libero.evaluation.records import EpisodeRecord
from worldvla_libero.evaluation.report.evaluation_figures import QUANTILES, published_rates, query_times
from worldvla_libero.evaluation.report.evaluation_run import EvaluationRun
from worldvla_libero.evaluation.report.media import Media
from worldvla_libero.pages.page import Cell, Table

if TYPE_CHECKING:
    from worldvla_libero.evaluation.records import SuccessRate

Tasks = Mapping[tuple[str, int], str]

_DASH = "\N{EN DASH}"
_PERCENT = "\N{NO-BREAK SPACE}%"


def success_table(runs: Sequence[EvaluationRun], tasks: Tasks) -> Table:
    """Success of each suite and of all, beside the paper's."""
    suites = list(dict.fromkeys(suite for suite, _ in tasks))
    rows = list[list[str | Cell]]()
    for suite in [*suites, None]:
        printed = [f"{100 * rate:.1f}{_PERCENT}" for rate in published_rates(runs, suite).values()]
        cells = [_rate_cell(run, suite) for run in runs] + (printed or [_DASH] * len(SUCCESS))
        rows.append([suite or "all suites", *cells])
    models = [Cell(row.model, published=True) for row in SUCCESS]
    return Table("Numbers", ["", *_names(runs), *models], rows, opened=True)


def task_table(runs: Sequence[EvaluationRun], tasks: Tasks) -> Table:
    """Success of each task."""
    rows = [[_task_cell(key, words), *(_rate_cell(run, *key) for run in runs)] for key, words in tasks.items()]
    return Table("Numbers: success", ["", *_names(runs)], rows)


def steps_table(runs: Sequence[EvaluationRun], tasks: Tasks) -> Table:
    """Steps to success of each task."""

    def cell(run: EvaluationRun, key: tuple[str, int]) -> str | Cell:
        steps = [episode.steps for episode in run.of(*key) if episode.outcome == "success"]
        if not steps:
            return _DASH
        low, median, high = np.quantile(steps, (0.25, 0.5, 0.75))
        return Cell(f"{median:g}", f"{low:g} … {high:g}, from {min(steps)} to {max(steps)}")

    rows = [[_task_cell(key, words), *(cell(run, key) for run in runs)] for key, words in tasks.items()]
    title = "Numbers: steps to success; median, middle half, fewest and most"
    return Table(title, ["", *_names(runs)], rows)


def latency_table(runs: Sequence[EvaluationRun]) -> Table:
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
    return Table("Numbers", ["", *_names(runs)], rows)


def paired_table(runs: Sequence[EvaluationRun]) -> Table | None:
    """Who solved what the other did not: far more telling than two intervals that overlap."""
    if len(runs) < 2:
        return None
    rows = list[list[str | Cell]]()
    for run in runs[1:]:
        shared = [(a, b) for a, b in shared_episodes(runs[0], run) if "error" not in (a.outcome, b.outcome)]
        pairs = [(a.outcome == "success", b.outcome == "success") for a, b in shared if same_start(a, b)]
        counts = (pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
        others = f"{len(shared) - len(pairs):,} began otherwise" if len(pairs) < len(shared) else ""
        rows.append([run.name, Cell(f"{len(pairs):,}", others), *(f"{count:,}" for count in counts)])
    first = runs[0].name
    head = [f"compared with {first}", "shared episodes", "both", f"only {first}", "only this", "neither"]
    title = "Episode by episode: successes of two runs from the same initial states, with the same seeds"
    return Table(title, head, rows)


def shared_episodes(first: EvaluationRun, second: EvaluationRun) -> Iterator[tuple[EpisodeRecord, EpisodeRecord]]:
    """Episodes of the same suite, task and number."""
    by_key = {episode.key: episode for episode in first.episodes}
    return ((by_key[episode.key], episode) for episode in second.episodes if episode.key in by_key)


def same_start(first: EpisodeRecord, second: EpisodeRecord) -> bool:
    """Whether two episodes of one task began alike: fixtures are placed by the seed, all else by the state."""
    return (first.initial_state, first.seed) == (second.initial_state, second.seed)


@dataclass(frozen=True)
class ListedEpisode:
    """What the list of episodes says of one.

    Attributes:
        outcome: one of `Outcome`.
        steps: that it took.
        said: more of it, in words.
        links: addresses of its files, by what they are.
    """

    outcome: str
    steps: int
    said: Sequence[str]
    links: Mapping[str, str]


def listed_episodes(
    runs: Sequence[EvaluationRun], tasks: Tasks, media: Media
) -> dict[tuple[str, int], list[tuple[int, list[ListedEpisode | None]]]]:
    """Each episode of each task by its number, those of the runs beside each other."""
    by_key = [{episode.key: episode for episode in run.episodes} for run in runs]
    numbered = sorted(set[tuple[str, int, int]]().union(*by_key))
    return {
        task: [
            (k[2], [_listed(run, found.get(k), media) for run, found in zip(runs, by_key, strict=True)])
            for k in numbered
            if k[:2] == task
        ]
        for task in tasks
    }


def _listed(run: EvaluationRun, episode: EpisodeRecord | None, media: Media) -> ListedEpisode | None:
    if episode is None:
        return None
    said = [f"state {episode.initial_state}, seed {episode.seed}", count(episode.queries, "query", "queries")]
    said.append(f"{episode.seconds:.1f} s")
    if episode.attempts > 1:
        said.append(f"{episode.attempts} attempts")
    files = {"video": episode.video, "last frame": episode.last_frame}
    links = {what: media.link(run.folder / name) for what, name in files.items() if name}
    return ListedEpisode(episode.outcome, episode.steps, said, links)


def _names(runs: Sequence[EvaluationRun]) -> list[str]:
    return [run.name for run in runs]


def _task_cell(key: tuple[str, int], instruction: str) -> Cell:
    return Cell(instruction, f"{key[0]}/{key[1]}")


def _rate_cell(run: EvaluationRun, suite: str | None = None, task: int | None = None) -> str | Cell:
    if not run.of(suite, task):
        return _DASH
    rate = run.rate(suite, task)
    errors = count(rate.errors, "error") if rate.errors else ""
    return Cell(share(rate), f"{rate.successes}/{rate.episodes}, {interval(rate)}", errors)


def share(rate: SuccessRate) -> str:
    """A success rate, or a dash where no episode ran to its end."""
    return _DASH if rate.rate is None else f"{100 * rate.rate:.1f}{_PERCENT}"


def interval(rate: SuccessRate) -> str:
    """Wilson's 95 % interval."""
    low, high = rate.interval()
    return f"{100 * low:.1f} … {100 * high:.1f}{_PERCENT}"


def count(number: int, thing: str, things: str | None = None) -> str:
    """How many of a thing, in words."""
    return f"{number:,} {thing if number == 1 else things or thing + 's'}"
