"""What a small model can do, measured on all it was trained on, and the model card that says so.

Success in closed loop from the suites' fixed initial states, with Wilson's intervals. On held-out episodes the
mean absolute error of whole predicted chunks, and PSNR of single predicted frames, with intervals from a bootstrap
over episodes. Sizes on disk, and what training cost.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from worldvla_libero.data.episodes import Episode, split
from worldvla_libero.evaluation.closed_loop import evaluate
from worldvla_libero.evaluation.policies import ModelPolicy
from worldvla_libero.evaluation.records import EpisodeRecord, SuccessRate
from worldvla_libero.evaluation.world.metrics import mean_interval, one_step
from worldvla_libero.prepare import open_source
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.simulator.suites import load_suite
from worldvla_libero.training.tokenizer_training import RECORD_FILE as TOKENIZER_RECORD_FILE
from worldvla_libero.training.training import RECORD_FILE
from worldvla_libero.versions import installed_versions
from worldvla_model import WorldVLA
from worldvla_tokenizers.image import FOLDER_NAME

_CHUNKS_PER_EPISODE = 12
_FRAMES_PER_EPISODE = 24


@dataclass(frozen=True)
class Measured:
    """All numbers of a model card.

    Attributes:
        success: of each task, by suite and instruction.
        action_l1: of each held-out episode, mean absolute error of chunks in data units.
        psnr: of each held-out episode [dB], by what stands in for the next frame: `predicted`, `reconstructed`,
            `copied`, `copied_tokens`.
        weights_bytes: of the model and of its image tokenizer on disk.
        image_size: pixels that the model sees.
        training: record of its training.
        tokenizer_training: that of its image tokenizer; None where it is not there.
        versions: of the packages that measured.
    """

    success: dict[tuple[str, str], SuccessRate]
    action_l1: tuple[float, ...]
    psnr: dict[str, tuple[float, ...]]
    weights_bytes: tuple[int, int]
    image_size: int
    training: dict[str, Any]
    tokenizer_training: dict[str, Any] | None
    versions: dict[str, str]


def measure(
    folder: str | os.PathLike[str],
    frames: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    episodes: int = 20,
    tasks: Sequence[str] = (),
    held_out: int | None = None,
    workers: int = 2,
    on_episode: Callable[[EpisodeRecord], None] | None = None,
) -> Measured:
    """Measure a model that `worldvla train` made.

    Args:
        folder: of the model, with `training.json`.
        frames: the demonstrations with frames that its data were made of.
        out: for the evaluations, a folder each; those of the same weights go on, or are read if they are over.
        episodes: fixed initial states of each task.
        tasks: names of tasks; all that it was trained on if there are none.
        held_out: at most so many held-out episodes; None for all.
        workers: processes that simulate.
        on_episode: told each episode in closed loop.
    """
    folder = Path(folder)
    agent = WorldVLA.from_pretrained(folder)
    training = json.loads((folder / RECORD_FILE).read_text(encoding="utf-8"))
    weights = [path / "model.safetensors" for path in (folder, folder / FOLDER_NAME)]
    fingerprint = hashlib.sha256(weights[0].read_bytes()).hexdigest()[:12]
    suites, wanted = training["recipe"]["suites"], tasks or training["data"]["tasks"]
    run = Path(out) / f"{folder.absolute().name}_{fingerprint}"
    result = evaluate(
        ModelPolicy(agent),
        [task for suite in suites for task in load_suite(suite).tasks if task.name in wanted],
        run,
        protocol=replace(OPENVLA, image_size=agent.processor.image_size),
        episodes=episodes,
        policy_name=run.name,
        video_stride=0,
        workers=workers,
        on_episode=on_episode,
    )
    instructions = {(record.suite, record.task): record.instruction for record in result.records}
    left_out = _held_out_episodes(frames, training["data"]["tasks"], held_out)
    worlds = [one_step(agent, [episode], per_episode=_FRAMES_PER_EPISODE) for episode in left_out]
    names = ("predicted", "reconstructed", "copied", "copied_tokens")
    tokenizer_record = folder / FOLDER_NAME / TOKENIZER_RECORD_FILE
    return Measured(
        success={(key[0], instructions[key]): rate for key, rate in result.by_task.items()},
        action_l1=tuple(_chunk_error(agent, episode, training["recipe"]["chunk"]) for episode in left_out),
        psnr={name: tuple(float(np.mean(getattr(world, name))) for world in worlds) for name in names},
        weights_bytes=(weights[0].stat().st_size, weights[1].stat().st_size),
        image_size=agent.processor.image_size,
        training=training,
        tokenizer_training=(
            json.loads(tokenizer_record.read_text(encoding="utf-8")) if tokenizer_record.is_file() else None
        ),
        versions=installed_versions(),
    )


def _held_out_episodes(frames: str | os.PathLike[str], tasks: Sequence[str], limit: int | None) -> list[Episode]:
    """Those that neither the model nor its image tokenizer were trained on; both split alike (seed 0)."""
    source = open_source(frames, replay=False)
    keys, _ = source.list()
    parts = split(keys)
    chosen = [key for key in keys if parts[key.id] != "train" and key.task in tasks]
    return [source.read(key.id, source.cameras) for key in chosen[:limit]]


def _chunk_error(agent: WorldVLA, episode: Episode, chunk: int) -> float:
    (frames,) = episode.frames.values()
    errors = []
    for t in np.linspace(0, len(episode) - chunk, _CHUNKS_PER_EPISODE).astype(int):
        history = [frames[i] for i in range(max(0, t - agent.processor.history_length + 1), t + 1)]
        predicted = agent.predict_actions(history, episode.instruction, num_actions=chunk)
        errors.append(np.abs(predicted - episode.actions[t : t + chunk]).mean())
    return float(np.mean(errors))


def tables(measured: Measured) -> str:
    """The card's tables, in Markdown."""
    lines = ["| task | success | 95 % interval |", "|---|---|---|"]
    for (suite, instruction), rate in measured.success.items():
        lines.append(f"| {suite}: {instruction} | {_rate(rate)} |")
    parts = [
        sum(getattr(rate, name) for rate in measured.success.values())
        for name in ("successes", "episodes", "errors")
    ]
    lines.append(f"| **all** | {_rate(SuccessRate(*parts))} |")

    chunk = measured.training["recipe"]["chunk"]
    lines += ["", f"| on {len(measured.action_l1)} held-out episodes | mean | 95 % interval |", "|---|---|---|"]
    lines.append(_row(f"mean absolute error of chunks of {chunk} actions", measured.action_l1, ".4f"))
    for name, words in (
        ("predicted", "PSNR of the next frame, imagined"),
        ("copied_tokens", "… of the frame before, through the image tokenizer"),
        ("copied", "… of the frame before, as it is"),
        ("reconstructed", "… of the next frame, through the image tokenizer"),
    ):
        lines.append(_row(words, measured.psnr[name], ".2f", "dB"))
    gains = np.subtract(measured.psnr["predicted"], measured.psnr["copied"])
    lines.append(_row("imagined over the frame before, as it is", gains.tolist(), "+.2f", "dB"))

    training, tokenizer = measured.training, measured.tokenizer_training or {}
    model_bytes, tokenizer_bytes = measured.weights_bytes
    hours = training["seconds"] / 3600, tokenizer.get("seconds", 0.0) / 3600
    lines += ["", "| | model | image tokenizer |", "|---|---|---|"]
    lines.append(f"| parameters | {training['parameters']:,} | {tokenizer.get('parameters', 0):,} |")
    lines.append(f"| on disk | {model_bytes / 1e6:.1f} MB | {tokenizer_bytes / 1e6:.1f} MB |")
    lines.append(f"| training | {hours[0]:.1f} h | {hours[1]:.1f} h |")
    lines.append(f"| optimizer steps | {training['steps']:,} | {tokenizer.get('steps', 0):,} |")
    return "\n".join(lines)


def _row(words: str, values: Sequence[float], digits: str, unit: str = "") -> str:
    mean, low, high = mean_interval(values)
    number = f"{mean:{digits}} {unit}".strip()
    interval = "-" if low is None or high is None else f"{low:{digits}} … {high:{digits}}"
    return f"| {words} | {number} | {interval} |"


def _rate(rate: SuccessRate) -> str:
    low, high = rate.interval()
    share = "-" if rate.rate is None else f"{100 * rate.rate:.0f} % ({rate.successes}/{rate.episodes})"
    errors = f", {rate.errors} errors" if rate.errors else ""
    return f"{share}{errors} | {100 * low:.0f} … {100 * high:.0f} %"


def card(name: str, measured: Measured) -> str:
    """README.md of the model, in Markdown."""
    training = measured.training
    recipe = training["recipe"]
    limits = ", ".join(f"{OPENVLA.max_steps[suite]} on {suite}" for suite in recipe["suites"])
    versions = ", ".join(f"{key} {value}" for key, value in measured.versions.items())
    return f"""---
library_name: worldvla-model
pipeline_tag: robotics
tags: [worldvla, vision-language-action, world-model, robotics]
---

# {name}

A model small enough for a wheel and for a CPU, trained from scratch on demonstrations of the tasks below. It
drives them in the simulator and imagines their next frames. It knows nothing else: no other task, scene, camera or
robot, and no other words than the instructions it was trained on.

{tables(measured)}

Success: closed loop from the first fixed initial states of the suites; protocol `openvla`
({OPENVLA.wait_steps} wait steps; step limits: {limits}), frames rendered at {measured.image_size} px.
Held-out: episodes of the same demonstrations that neither part was trained on; a chunk's error is the mean over
its actions and dimensions in data units. "The frame before" is what a model that changes nothing would draw.

Recipe `{recipe["name"]}`: {recipe["history"]} frames in, chunks of {recipe["chunk"]} actions, mask
`{recipe["attention"]}`; {training["samples"]["action"]:,} action and {training["samples"]["world"]:,} world
samples; trained on {training["machine"]}. `training.json` holds all of it.

Versions: {versions}.

How to make it again: docs/make-nano.md.
"""
