"""From nothing to a small model that drives and imagines, stage by stage.

demos/        raw demonstrations of scripted experts        `worldvla collect`
frames/       what the camera saw, without pauses           `worldvla replay --to hdf5`
images/       an image tokenizer fitted to the frames       `worldvla train-tokenizer`
data/         codes, actions and instructions               `worldvla prepare`
sample_data/  the same of a few episodes
nano/         the model with its tokenizers and card        `worldvla train`
evaluation/   its episodes in closed loop
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch

from worldvla_libero.demonstrations.collect import collect
from worldvla_libero.demonstrations.replay import ReplaySettings, replay
from worldvla_libero.nano.card import Measured, card, measure
from worldvla_libero.nano.settings import NanoError, NanoSettings
from worldvla_libero.prepare import PrepareSettings, open_source, plan, prepare
from worldvla_libero.simulator.suites import Task, load_suite
from worldvla_libero.training.recipes import NANO, TOKENIZER_RECIPES
from worldvla_libero.training.tokenizer_training import RECORD_FILE as TOKENIZER_RECORD_FILE
from worldvla_libero.training.tokenizer_training import FrameSettings, train_tokenizer
from worldvla_libero.training.training import RunOptions, train_recipe
from worldvla_tokenizers import VQGAN
from worldvla_tokenizers.files import atomic_path, write_text_atomic
from worldvla_tokenizers.image import FOLDER_NAME

_CAMERA = "agentview"


def make_nano(
    out: str | os.PathLike[str],
    settings: NanoSettings = NanoSettings(),
    *,
    demos: str | os.PathLike[str] | None = None,
    workers: int = 2,
    cpu: bool = False,
    on_stage: Callable[[str], None] = lambda stage: None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Measured:
    """Make a small model. Killed at any moment, the same call goes on where it was.

    Args:
        out: folder for everything; the model is in `nano`.
        settings: of what.
        demos: raw demonstrations of these tasks, to be taken in place of collected ones.
        workers: processes that simulate.
        cpu: train on the CPU though there is a GPU.
        on_stage: told the name of each stage when it begins.
        on_progress: told how much of a stage is done, and how much there is, where that is known.

    Returns:
        What the model was measured to do, as its card has it.

    Raises:
        NanoError: there is no demonstration with frames of one of the tasks.
        UnknownNameError: there is no such suite or task.
        NoExpertError: a task has no scripted expert.
    """
    folder = Path(out)
    by_suite = _tasks_by_suite(settings.tasks)
    recipe = replace(NANO, suites=tuple(by_suite), max_steps=settings.steps or NANO.max_steps)
    tokenizer_recipe = TOKENIZER_RECIPES[NANO.name]
    tokenizer_steps = settings.tokenizer_steps or tokenizer_recipe.training.steps

    # 1. Demonstrations
    sources = {suite: folder / "demos" / suite if demos is None else Path(demos) for suite in by_suite}
    for suite, tasks in by_suite.items() if demos is None else ():
        on_stage(f"demonstrations of {suite}")
        count = _Count(len(tasks) * settings.episodes, on_progress)
        collect(tasks, sources[suite], episodes=settings.episodes, workers=workers, on_part=count)

    # 2. Frames, of those that succeed again
    for suite, tasks in by_suite.items():
        on_stage(f"frames of {suite}")
        source = open_source(sources[suite], replay=True)
        names = {task.name for task in tasks}
        keys = [key for key in source.list()[0] if key.task in names]
        if missing := names - {key.task for key in keys}:
            raise NanoError(f"{sources[suite]} has no demonstration of {', '.join(sorted(missing))}")
        rendered = ReplaySettings(image_size=recipe.image_size, cameras=(_CAMERA,))
        count = _Count(len(keys), on_progress)
        replay(source, keys, folder / "frames" / suite, rendered, format="hdf5", workers=workers, on_part=count)
    frames = open_source(folder / "frames", replay=False)

    # 3. Image tokenizer
    on_stage("image tokenizer")
    torch.manual_seed(tokenizer_recipe.training.seed)
    train_tokenizer(
        VQGAN(tokenizer_recipe.topology),
        frames,
        folder / "images",
        frames=FrameSettings(image_size=recipe.image_size),
        training=replace(tokenizer_recipe.training, steps=tokenizer_steps),
        on_progress=lambda phase, done, total: on_progress(done, total),
    )

    # 4. Token shards, all and a few
    shards = PrepareSettings(image_size=recipe.image_size)
    for name, limit in (("data", None), ("sample_data", settings.sample_episodes)):
        on_stage(name.replace("_", " "))
        planned = plan(frames, shards, limit=limit)
        count = _Count(len(planned.keys), on_progress)
        prepare(planned, folder / name, folder / "images", shards, workers=workers, on_part=count)

    # 5. Model
    on_stage("model")
    model = folder / "nano"
    train_recipe(recipe, folder / "data", model, tokenizer=folder / "images", options=RunOptions(cpu=cpu))
    with atomic_path(model / FOLDER_NAME / TOKENIZER_RECORD_FILE) as draft:
        shutil.copyfile(folder / "images" / TOKENIZER_RECORD_FILE, draft)

    # 6. What it can do
    on_stage("evaluation")
    count = _Count(len(settings.tasks) * settings.evaluate_episodes, on_progress)
    measured = measure(
        model,
        folder / "frames",
        folder / "evaluation",
        episodes=settings.evaluate_episodes,
        workers=workers,
        on_episode=count,
    )
    write_text_atomic(model / "README.md", card(model.name, measured))
    return measured


def _tasks_by_suite(names: Sequence[str]) -> dict[str, list[Task]]:
    pairs = [name.split("/") for name in dict.fromkeys(names)]
    by_suite = groupby(sorted(pairs, key=lambda pair: pair[0]), key=lambda pair: pair[0])
    return {suite: [load_suite(suite).task(name) for _, name in members] for suite, members in by_suite}


class _Count:
    """Counts calls, whatever they are told."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None]) -> None:
        self.done, self.total, self.on_progress = 0, total, on_progress

    def __call__(self, *_: object) -> None:
        self.done += 1
        self.on_progress(self.done, self.total)
