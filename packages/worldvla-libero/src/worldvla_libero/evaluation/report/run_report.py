"""The report of runs: one page that can be sent as it is, and its figures as pictures for slides and papers."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from worldvla_libero.evaluation.records import EPISODES_FILE
from worldvla_libero.evaluation.report.evaluation_page import (
    evaluation_card,
    evaluation_figures,
    evaluation_notes,
    evaluation_values,
)
from worldvla_libero.evaluation.report.evaluation_run import EvaluationRun, read_evaluation, task_order
from worldvla_libero.evaluation.report.media import Media, save_failures
from worldvla_libero.evaluation.report.world_page import (
    save_world_panels,
    world_card,
    world_notes,
    world_panels,
    world_values,
)
from worldvla_libero.evaluation.report.world_run import WorldRun, read_world
from worldvla_libero.evaluation.run_files import RunError
from worldvla_libero.evaluation.world.record import RECORD_FILE as WORLD_FILE
from worldvla_libero.jobs.parts import WORK_FOLDER
from worldvla_libero.pages.page import render
from worldvla_libero.pages.panels import COLOURS, Panel, save_panels
from worldvla_tokenizers.files import staged_folder, write_text_atomic

PAGE_FILE = "index.html"
PICTURES = ("failures.png", "latency.png", "success.png", "tasks.png", "world.png")


def write_report(
    runs: Sequence[str | os.PathLike[str]], out: str | os.PathLike[str], *, videos: int = 6
) -> list[Path]:
    """Report evaluations and world-model runs side by side.

    Args:
        runs: folders that hold `episodes.jsonl` or `world.json`, in the order in which they are shown.
        out: gets `index.html` and a PNG for each kind of figure; files of these names are replaced, all of them or
            none, and those of figures that these runs do not have are removed.
        videos: how many episodes (of world models: rollouts of each run) have their videos embedded. The others
            are linked.

    Returns:
        The files that were written, the page first.

    Raises:
        RunError: a folder holds no run (a world-model run: none that is over), or a file in it is damaged or
            contradicts itself.
        FileExistsError: `out` is a file.
        ValueError: `videos` is negative.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder")
    if videos < 0:
        raise ValueError(f"videos is {videos}; allowed: 0 and above")
    evaluations, worlds = read_runs(runs)
    tasks = task_order(evaluations)
    media = Media(out, videos)
    cards = [evaluation_card(run) for run in evaluations] + [world_card(run) for run in worlds]
    names = dict.fromkeys(run.name for runs in (evaluations, worlds) for run in runs)
    evaluation_part, world_part = dict[str, Any](), dict[str, Any]()
    with staged_folder(out) as stage:
        if evaluations:
            figures = evaluation_figures(evaluations, tasks)
            evaluation_part = evaluation_values(evaluations, tasks, figures, media)
            _save_pictures(stage, figures, evaluations)
            save_failures(stage / "failures.png", evaluations, tasks)
        if worlds:
            panels = world_panels(worlds)
            world_part = world_values(worlds, panels, media)
            if panels:
                save_world_panels(stage / "world.png", worlds, panels)
        files = sorted(file.name for file in stage.iterdir())
        page = render(
            __package__,
            "report.html",
            name=" · ".join(names),
            cards=cards,
            notes=[*evaluation_notes(evaluations), *world_notes(worlds)],
            pictures=files,
            evaluations=evaluation_part,
            worlds=world_part,
        )
        write_text_atomic(stage / PAGE_FILE, page)
    for name in PICTURES:  # of other runs that were reported here before
        if name not in files:
            (out / name).unlink(missing_ok=True)
    return [out / name for name in (PAGE_FILE, *files)]


def read_runs(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[EvaluationRun], list[WorldRun]]:
    """Read runs, told apart by the file they hold.

    Args:
        folders: of runs. One that holds an evaluation and a world-model run gives both.

    Raises:
        RunError: too many folders; one holds no run, is given twice, or a file in it is damaged or contradicts
            itself or another; the message names file and line.
    """
    paths = [Path(folder) for folder in folders]
    if not 1 <= len(paths) <= len(COLOURS):
        raise RunError(f"{len(paths)} runs; allowed: 1 … {len(COLOURS)}, for no more colours can be told apart")
    evaluations, worlds = [], []
    for path, name, colour in zip(paths, _names(paths), COLOURS, strict=False):
        lines, world = path / EPISODES_FILE, path / WORLD_FILE
        if not lines.is_file() and not world.is_file():
            what = "is no folder" if not path.is_dir() else f"holds neither {EPISODES_FILE} nor {WORLD_FILE}"
            remedy = "name a folder that `worldvla evaluate` or `worldvla imagine` wrote"
            if (path / WORK_FOLDER).is_dir():
                remedy = "what was begun in it has no result yet: run the same command again"
            raise RunError(f"{path} {what}; {remedy}")
        if lines.is_file():
            evaluations.append(read_evaluation(name, colour, path))
        if world.is_file():
            worlds.append(read_world(name, colour, path))
    return evaluations, worlds


def _save_pictures(folder: Path, figures: Mapping[str, Sequence[Panel]], runs: Sequence[EvaluationRun]) -> None:
    for name, panels in figures.items():
        if any(panel.draw for panel in panels):
            colours = {run.name: run.colour for run in runs}
            save_panels(folder / f"{name}.png", panels, colours, columns=2 if name == "tasks" else 3)


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ."""
    parts = [path.resolve().parts for path in paths]
    for i, path in enumerate(paths):
        if parts[i] in parts[:i]:
            raise RunError(f"{path} is given twice; each run once")
    ends = (["/".join(part[-depth:]) for part in parts] for depth in itertools.count(1))
    return next(names for names in ends if len(set(names)) == len(names))
