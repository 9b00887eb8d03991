"""Sections of the page that reports world models: curves over the horizon, metrics beside the paper's, videos."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.evaluation.published_results import IMAGINATION, SOURCE, PublishedImagination
from worldvla_libero.evaluation.report.media import Media, world_videos
from worldvla_libero.evaluation.report.world_run import WorldRun
from worldvla_libero.evaluation.world.metrics import mean_interval
from worldvla_libero.evaluation.world.record import FRAME_METRICS, KINDS, METRICS
from worldvla_libero.pages.page import Card, Cell, Table, differences
from worldvla_libero.pages.panels import GREY, Panel, save_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LINES = dict(zip(KINDS, ("-", "--", ":"), strict=True))

_DASH = "\N{EN DASH}"
_LABEL_SPACE = 0.11  # between labels, as a share of the axes
_SHOWN = 27  # letters of what a network is called; of the SHA-256 of its weights a part will do
_RESAMPLES = 1000  # of the interval of each frame; the horizons' own have more

_COMPARED = {  # key of `world.json`: what it is
    "data": "data",
    "split": "split",
    "truth": "truth (what the true frames are)",
    "image_size": "image size",
    "control_hz": "control rate",
    "context": "context (true frames shown)",
    "rounds": "rounds (frames of one prompt)",
    "world_prompt": "world prompt",
}


def world_card(run: WorldRun) -> Card:
    """A run at a glance: the metric that needs no backbone, at the longest horizon it was computed for."""
    horizons = {int(frames): row for frames, row in run.content["horizons"].items() if row.get("psnr")}
    longest = max(horizons, default=None)
    lines, psnr = ["no horizon was computed"], {}
    if longest is not None:
        psnr = horizons[longest]["psnr"]
        lines = [f"PSNR over {longest} frames, as imagined, of {_clips(horizons[longest])}"]
    for kind, words in (
        ("copied", "if the last true frame is kept"),
        ("reconstructed", "at best, with its tokenizer"),
    ):
        if psnr.get(kind):
            lines.append(f"{_mean(psnr[kind])} dB {words}")
    missing = ", ".join(run.content["not_computed"])
    about = f"{run.content['model']}, on {run.content['data']}"
    value = f"{_mean(psnr.get('imagined'))} dB"
    return Card(run.name, run.colour, about, value, lines, [f"not computed: {missing}"] if missing else [])


def world_notes(runs: Sequence[WorldRun]) -> list[str]:
    """What a reader must know before comparing numbers."""
    return [
        f"{run.name}: its true frames are drawn from codes, which leaves the image tokenizer's own loss "
        "out. Its numbers do not compare with those against camera frames, as the paper's are taken to be."
        for run in runs
        if run.content["truth"] != "camera"
    ] + differences({run.name: _conditions(run) for run in runs})


def world_values(runs: Sequence[WorldRun], panels: Sequence[Panel], media: Media) -> dict[str, Any]:
    """What the sections of world models show, by its name in their template."""
    coded = [run.name for run in runs if run.content["truth"] != "camera"]
    return {
        "runs": runs,
        "colours": {run.name: run.colour for run in runs},
        "source": SOURCE,
        "panels": panels,
        "step_table": _step_table(runs),
        "horizon_tables": _horizon_tables(runs, IMAGINATION if len(coded) < len(runs) else ()),
        "coded": coded,
        "not_computed": [(run, run.content["not_computed"]) for run in runs if run.content["not_computed"]],
        "videos": world_videos(runs, media),
        "records": [(run, _record(run)) for run in runs],
    }


def world_panels(runs: Sequence[WorldRun]) -> list[Panel]:
    """The curves over the horizon of every metric that any run has."""
    return [_curve_panel(runs, metric) for metric in FRAME_METRICS if any(_has(run, metric) for run in runs)]


def save_world_panels(path: str | os.PathLike[str], runs: Sequence[WorldRun], panels: Sequence[Panel]) -> None:
    """The curves as a picture.

    Raises:
        ValueError: no panel.
    """
    note = "over frames imagined; bands: 95 % interval of the mean over clips"
    save_panels(path, panels, {run.name: run.colour for run in runs}, note=note)


def mean_curve(run: WorldRun, metric: str, kind: str, *, intervals: bool = False) -> NDArray[np.float64]:
    """Mean over clips, frame by frame.

    Values that are no number, or infinite (PSNR of equal frames), are left out.

    Returns:
        (3, T): the mean, and with `intervals` both ends of its 95 % interval; NaN where there is none.
    """
    curves = ((run.content["curves"].get(metric) or {}).get(kind)) or []
    steps = max((len(curve) for curve in curves), default=0)
    found = np.full((3, steps), np.nan)
    for t in range(steps):
        values = np.array([curve[t] for curve in curves if t < len(curve) and curve[t] is not None], dtype=float)
        values = values[np.isfinite(values)]
        if len(values) and intervals:
            found[:, t] = [np.nan if end is None else end for end in mean_interval(values, resamples=_RESAMPLES)]
        elif len(values):
            found[0, t] = values.mean()
    return found


def _has(run: WorldRun, metric: str) -> bool:
    return any((run.content["curves"].get(metric) or {}).values())


def _conditions(run: WorldRun) -> dict[str, str]:
    """What should be alike in runs that are compared."""
    settings = run.content["settings"]
    same = {words: str(run.content[key]) for key, words in _COMPARED.items()}
    if "clips" in settings:  # a digest of trajectories, starts and lengths
        same["clips, by their digest"] = str(settings["clips"])[:8]
    for metric, network in (settings.get("backbones") or {}).items():
        parts = network.values() if isinstance(network, Mapping) else [network]
        same[f"network of {metric.upper()}"] = ", ".join(str(part)[:_SHOWN] for part in parts)
    for frames, row in run.content["horizons"].items():
        same[f"number of clips over {frames} frames"] = str(row["episodes"])
    return same


def _clips(row: Mapping[str, Any]) -> str:
    return f"{row['episodes']} clip{'s' * (row['episodes'] != 1)}"


def _curve_panel(runs: Sequence[WorldRun], metric: str) -> Panel:
    present = [run for run in runs if _has(run, metric)]
    curves = [(run, kind, mean_curve(run, metric, kind, intervals=kind == "imagined")) for run in present
              for kind in KINDS]  # fmt: skip

    def draw(axes: Axes) -> None:
        ends = {}
        for run, kind, (mean, low, high) in curves:
            if not np.isfinite(mean).any():
                continue
            steps = np.arange(1, len(mean) + 1)
            # A baseline alone says nothing about a run: grey, unless there are several to tell apart.
            colour = run.colour if kind == "imagined" or len(runs) > 1 else GREY
            axes.plot(steps, mean, _LINES[kind], color=colour, linewidth=1.8 if kind == "imagined" else 1.2)
            axes.fill_between(steps, low, high, color=colour, alpha=0.18, linewidth=0)
            ends[kind] = float(mean[np.isfinite(mean)][-1])
        axes.set_xlim(left=1)
        axes.locator_params(axis="x", integer=True, nbins=6)
        axes.locator_params(axis="y", nbins=5)
        _label_ends(axes, ends)

    notes = ["frames imagined; band: 95 % interval of the mean"]
    absent = [run for run in runs if run not in present]
    notes += [f"{run.name}: not computed" for run in absent]
    names = ", ".join(run.name for run in present)
    alt = f"{METRICS[metric]} over frames imagined, of {names}; the table below has the numbers"
    return Panel(METRICS[metric], draw, alt, notes, height=2.3, left=0.45, right=0.95)


def _label_ends(axes: Axes, ends: Mapping[str, float]) -> None:
    """Name lines at their right ends, so far from each other that all can be read."""
    low, high = axes.get_ylim()
    height = -np.inf
    for kind, end in sorted(ends.items(), key=lambda item: item[1]):
        height = max((end - low) / (high - low), height + _LABEL_SPACE)
        axes.text(1.02, height, kind, transform=axes.transAxes, va="center", fontsize=8.5)


def _step_table(runs: Sequence[WorldRun]) -> Table:
    columns = [(run, metric, kind) for metric in FRAME_METRICS for run in runs for kind in KINDS]
    means = [mean_curve(run, metric, kind)[0] for run, metric, kind in columns]
    filled = [(column, mean) for column, mean in zip(columns, means, strict=True) if np.isfinite(mean).any()]
    longest = max((len(mean) for _, mean in filled), default=0)
    heads = [
        Cell(f"{metric.upper()} {kind}", run.name if len(runs) > 1 else "") for (run, metric, kind), _ in filled
    ]
    rows = [[f"{t + 1}", *(_number(m[t]) if t < len(m) else _DASH for _, m in filled)] for t in range(longest)]
    return Table("Numbers: mean over clips, frame by frame", ["frame", *heads], rows)


def _horizon_tables(runs: Sequence[WorldRun], beside: Sequence[PublishedImagination]) -> list[Table]:
    """One table a horizon, and the published numbers that have it."""
    names, tables = [run.name for run in runs], []
    for frames in sorted({int(frames) for run in runs for frames in run.content["horizons"]}):
        published = [row for row in beside if frames in row.metrics]
        judged = [run.content["horizons"].get(str(frames)) for run in runs]
        clips = [str(row["episodes"]) if row else _DASH for row in judged]
        rows: list[list[str | Cell]] = [["clips", *clips, *("not stated" for _ in published)]]
        for metric, title in METRICS.items():
            cells = [(row or {}).get(metric) for row in judged]
            for kind in KINDS:
                printed = [_number(row.metrics[frames][metric]) if kind == "imagined" else "" for row in published]
                own = [_cell(cell.get(kind)) if cell else "not computed" for cell in cells]
                rows.append([f"{title.split(',')[0]} {kind}", *own, *printed])
        models = [Cell(row.model, published=True) for row in published]
        tables.append(Table(f"Over {frames} frames", ["", *names, *models], rows, opened=True))
    return tables


def _record(run: WorldRun) -> dict[str, Any]:
    """Everything but the numbers, which stand above."""
    apart = {"curves", "horizons", "not_computed", "episodes"}
    settings = {name: value for name, value in run.content.items() if name not in apart}
    episodes = [
        f"{e['id']} ({e['task']}), {e['frames']} frames from step {e['start']}" for e in run.content["episodes"]
    ]
    return {"folder": str(run.folder), **settings, "episodes": episodes}


def _cell(value: Any) -> Cell:
    """A mean with its interval, or a bare number."""
    known = isinstance(value, Mapping) and value["low"] is not None  # of one clip there is none
    return Cell(_mean(value), f"{_number(value['low'])} … {_number(value['high'])}" if known else "")


def _mean(value: Any) -> str:
    return _number(value["mean"] if isinstance(value, Mapping) else value)


def _number(value: float | None) -> str:
    return _DASH if value is None or not np.isfinite(value) else f"{value:.4g}"
