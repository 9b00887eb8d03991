"""Figures of evaluations: success with intervals, steps to success, latency. A colour for each run."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.evaluation import published_results
from worldvla_libero.evaluation.report.evaluation_run import EvaluationRun
from worldvla_libero.pages.panels import GREY, Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from worldvla_libero.evaluation.records import SuccessRate

QUANTILES = (0.5, 0.9, 0.99)

_TASKS_A_PANEL = 10  # those of LIBERO-90 are spread over several
_LABEL_WIDTH, _NAME_WIDTH = 56, 17  # letters

# Inches. Rows are placed in inches, so that they look alike in panels of any height.
_LINE, _ROW, _SPACE, _EDGE = 0.155, 0.165, 0.1, 0.05
_AROUND = 0.308  # what a panel keeps for itself above and below its axes
_FONT = 8.5


def short(name: str, width: int = _NAME_WIDTH) -> str:
    """A name cut in its middle, for both of its ends may tell it apart."""
    return name if len(name) <= width else f"{name[: width // 2 - 1]}…{name[width // 2 - width :]}"


def published_rates(runs: Sequence[EvaluationRun], suite: str | None) -> dict[str, float]:
    """The paper's rates on a suite, by model; without one its averages, where a run has just those suites."""
    if suite is not None:
        return {row.model: row.rates[suite] for row in published_results.SUCCESS if suite in row.rates}
    same = any({e.suite for e in run.episodes} == set(published_results.SUITES) for run in runs)
    return {row.model: row.average for row in published_results.SUCCESS} if same else {}


def success_panel(
    title: str,
    runs: Sequence[EvaluationRun],
    suite: str | None,
    published: Mapping[str, float],
    notes: Sequence[str],
) -> Panel:
    """Success rates of runs with their intervals, above published ones.

    Args:
        title: above it.
        runs: those that ran the suite.
        suite: whose episodes; all without one.
        published: between 0 and 1, by model.
        notes: below it, a line each.
    """
    row = 1.15 * _ROW
    height = row * (len(runs) + len(published)) + 2 * _EDGE

    def draw(axes: Axes) -> None:
        _shares_axis(axes, height)
        heights = [_EDGE + row * (index + 0.5) for index in range(len(runs) + len(published))]
        for run, y in zip(runs, heights, strict=False):
            rate = run.rate(suite)
            _bar(axes, y, rate, run.colour)
            value = "\N{EN DASH}" if rate.rate is None else f"{100 * rate.rate:.1f} %"
            _beside(axes, y, short(run.name), value, fontweight="bold")
        for (name, share), y in zip(published.items(), heights[len(runs) :], strict=True):
            axes.barh(y, share, height=0.5 * _ROW, color=GREY, alpha=0.3)
            _beside(axes, y, name, f"{100 * share:.1f} %", fontstyle="italic")

    names = ", ".join([*(run.name for run in runs), *published])
    alt = f"success rates on {title} of {names}; the table below has the numbers"
    return Panel(title, draw, alt, notes, height + _AROUND, left=1.34, right=0.62)


def task_panels(runs: Sequence[EvaluationRun], tasks: Mapping[tuple[str, int], str]) -> list[Panel]:
    """Pairs of panels of at most ten tasks each, with a row for each run: success, and steps to it."""
    panels = []
    for title, keys in _groups(tasks):
        present = [run for run in runs if any(run.of(*key) for key in keys)]
        panels += [_task_success(title, keys, tasks, present), _task_steps(title, keys, tasks, present)]
    return panels


def _task_success(
    title: str,
    keys: Sequence[tuple[str, int]],
    tasks: Mapping[tuple[str, int], str],
    runs: Sequence[EvaluationRun],
) -> Panel:
    """A bar with its interval for each run."""

    def row(axes: Axes, y: float, run: EvaluationRun, key: tuple[str, int]) -> None:
        rate = run.rate(*key)
        _bar(axes, y, rate, run.colour)
        errors = f" ✕{rate.errors}" if rate.errors else ""
        counted = f"{rate.successes}/{rate.episodes}{errors}" if run.of(*key) else "not run"
        _beside(axes, y, "", counted)

    def scale(axes: Axes, height: float) -> None:
        _shares_axis(axes, height)

    return _task_panel(f"{title}: success", keys, tasks, runs, row, scale)


def _task_steps(
    title: str,
    keys: Sequence[tuple[str, int]],
    tasks: Mapping[tuple[str, int], str],
    runs: Sequence[EvaluationRun],
) -> Panel:
    """A tick for each success, a dot on their median."""
    limit = max(episode.max_steps for run in runs for key in keys for episode in run.of(*key))

    def row(axes: Axes, y: float, run: EvaluationRun, key: tuple[str, int]) -> None:
        steps = [episode.steps for episode in run.of(*key) if episode.outcome == "success"]
        axes.plot(steps, [y] * len(steps), "|", color=run.colour, ms=8, mew=1.1, alpha=0.55)
        if steps:
            axes.plot(np.median(steps), y, "o", color=run.colour, ms=5, mec="white", mew=0.8)
        _beside(axes, y, "", f"{np.median(steps):g}" if steps else "\N{EN DASH}")

    def scale(axes: Axes, height: float) -> None:
        _rows_axis(axes, height)
        axes.set(xlim=(0, limit))
        axes.set_xticks((0, limit / 2, limit), ("0", f"{limit / 2:g}", f"{limit} steps"))

    return _task_panel(f"{title}: steps to success", keys, tasks, runs, row, scale)


def query_panel(runs: Sequence[EvaluationRun]) -> Panel:
    """Share of the policy's queries that were answered within a time."""
    times = [(run.colour, query_times(run)) for run in runs if any(e.query_seconds for e in run.episodes)]
    if not times:
        return Panel("Seconds a query", None, notes=["no query was recorded"])
    # A first query may compile for minutes: the slowest hundredth may leave the figure, but not the table.
    end = 1.25 * max(float(np.quantile(found, QUANTILES[-1])) for _, found in times)

    def draw(axes: Axes) -> None:
        for colour, found in times:
            shares = np.arange(1, len(found) + 1) / len(found)
            axes.step([0, *found], [0, *shares], where="post", color=colour, linewidth=1.6)
            axes.plot(np.quantile(found, QUANTILES), QUANTILES, "o", color=colour, ms=4)
        axes.set(xlim=(0, end), ylim=(0, 1.02))
        axes.set_yticks(QUANTILES, [f"{100 * share:g} %" for share in QUANTILES])
        axes.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.6)
        axes.locator_params(axis="x", nbins=5)

    beyond = sum(int((found > end).sum()) for _, found in times)
    notes = ["share of the queries answered within so many seconds; dots: p50, p90, p99"]
    if beyond:
        notes.append(f"{beyond:,} slower ones lie to the right of it")
    alt = "cumulative distribution of seconds a query; the table below has its quantiles"
    return Panel("Seconds a query", draw, alt, notes, height=1.9, left=0.55)


def episode_seconds_panel(runs: Sequence[EvaluationRun]) -> Panel:
    """Mean seconds of an episode, in the policy and elsewhere."""
    height = 1.3 * _ROW * len(runs) + 2 * _EDGE

    def draw(axes: Axes) -> None:
        _rows_axis(axes, height)
        for index, run in enumerate(runs):
            y, colour = _EDGE + (0.65 + 1.3 * index) * _ROW, run.colour
            policy, total = (float(np.mean([getattr(e, n) for e in run.episodes])) for n in
                             ("policy_seconds", "seconds"))  # fmt: skip
            axes.barh(y, policy, height=0.8 * _ROW, color=colour)
            axes.barh(y, total - policy, left=policy, height=0.8 * _ROW, color=colour, alpha=0.3)
            _beside(axes, y, short(run.name), f"{total:.1f} s", fontweight="bold")
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", nbins=4)

    alt = "mean seconds of an episode; the table below has the numbers"
    notes = ["mean over all episodes; full colour: in the policy, pale: in the simulator and elsewhere"]
    return Panel("Seconds an episode", draw, alt, notes, height + _AROUND, left=1.34, right=0.62)


def query_times(run: EvaluationRun) -> NDArray[np.float64]:
    """Seconds of every query of a run, in rising order."""
    return np.sort(
        np.array([seconds for episode in run.episodes for seconds in episode.query_seconds], dtype=float)
    )


@dataclass(frozen=True)
class _Block:
    """Where a task stands, in inches from the top: its label, and one row for each run."""

    key: tuple[str, int]
    label: str
    top: float
    rows: tuple[float, ...]


def _task_panel(
    title: str,
    keys: Sequence[tuple[str, int]],
    tasks: Mapping[tuple[str, int], str],
    runs: Sequence[EvaluationRun],
    draw_row: Callable[[Axes, float, EvaluationRun, tuple[str, int]], None],
    draw_scale: Callable[[Axes, float], None],
) -> Panel:
    blocks, y = [], _EDGE
    for key in keys:
        lines = textwrap.wrap(f"{key[1]} · {tasks[key]}", _LABEL_WIDTH)
        first = y + _LINE * len(lines)
        rows = tuple(first + _ROW * (index + 0.5) for index in range(len(runs)))
        blocks.append(_Block(key, "\n".join(lines), y, rows))
        y = first + _ROW * len(runs) + _SPACE
    height = y

    def draw(axes: Axes) -> None:
        draw_scale(axes, height)
        for block in blocks:
            transform = axes.get_yaxis_transform()
            axes.text(0, block.top, block.label, transform=transform, va="top", fontsize=_FONT, linespacing=1.2)
            for run, y in zip(runs, block.rows, strict=True):
                draw_row(axes, y, run, block.key)

    alt = f"{title}, of {len(keys)} tasks; the table below has the numbers"
    return Panel(title, draw, alt, (), height + _AROUND, left=0.12, right=0.75)


def _groups(tasks: Mapping[tuple[str, int], str]) -> list[tuple[str, list[tuple[str, int]]]]:
    """Tasks by suite, so many a panel."""
    groups = []
    for suite in dict.fromkeys(suite for suite, _ in tasks):
        keys = [key for key in tasks if key[0] == suite]
        parts = [keys[i : i + _TASKS_A_PANEL] for i in range(0, len(keys), _TASKS_A_PANEL)]
        groups += [(suite if len(parts) == 1 else f"{suite}, {p[0][1]} … {p[-1][1]}", p) for p in parts]
    return groups


def _bar(axes: Axes, y: float, rate: SuccessRate, colour: str) -> None:
    """A pale bar up to the rate, and the interval on it; nothing where no episode ran to its end."""
    if rate.rate is None:
        return
    axes.barh(y, rate.rate, height=0.66 * _ROW, color=colour, alpha=0.3)
    axes.plot(rate.interval(), (y, y), color=colour, linewidth=1.8, solid_capstyle="butt", clip_on=False)
    axes.plot(rate.rate, y, "o", color=colour, ms=4.2, clip_on=False)


def _beside(axes: Axes, y: float, name: str, value: str, **style: Any) -> None:
    """Words on the left of a row and on its right."""
    for x, words, side, font in ((-0.04, name, "right", {}), (1.04, value, "left", style)):
        axes.text(x, y, words, ha=side, va="center_baseline", fontsize=_FONT,
                  transform=axes.get_yaxis_transform(), **font)  # fmt: skip


def _shares_axis(axes: Axes, height: float) -> None:
    _rows_axis(axes, height)
    axes.set(xlim=(0, 1))
    axes.set_xticks((0, 0.5, 1), ("0", "50 %", "100 %"))


def _rows_axis(axes: Axes, height: float) -> None:
    """An axis in inches from the top, unseen, over whose rows thin lines help the eye."""
    axes.set(ylim=(height, 0), yticks=())
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=GREY, alpha=0.2, linewidth=0.6)
    axes.set_axisbelow(True)
