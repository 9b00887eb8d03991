"""Measures small models on all they were trained on; prints the tables of a model card.

    python benchmarks/nano.py MODEL... --frames FRAMES [--episodes 20] [--out FOLDER] [--card]

Success in closed loop from the suites' fixed initial states, which no demonstration began with, on each task of
the training data, with Wilson's 95 % intervals. On the episodes of FRAMES that were held out (demonstrations with
frames, as `worldvla replay --to hdf5` makes them): mean absolute error of whole predicted chunks, and PSNR of
single predicted frames, with 95 % intervals from a bootstrap over episodes. Sizes on disk, and what training cost.
With --card the tables become the model's README.md. Finished evaluations of the same weights in --out are read,
not run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import common
import numpy as np

from worldvla_libero.data.episodes import Episode, split
from worldvla_libero.evaluation.closed_loop import evaluate
from worldvla_libero.evaluation.policies import ModelPolicy
from worldvla_libero.evaluation.records import SuccessRate
from worldvla_libero.evaluation.world.metrics import one_step
from worldvla_libero.prepare import open_source
from worldvla_libero.simulator.protocols import OPENVLA
from worldvla_libero.simulator.suites import Task, load_suite
from worldvla_libero.versions import installed_versions
from worldvla_model import WorldVLA

RESAMPLES = 10_000
CHUNKS_PER_EPISODE = 12
FRAMES_PER_EPISODE = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--frames", type=Path, required=True, help="demonstrations with frames")
    parser.add_argument("--episodes", type=int, default=20, help="fixed initial states of each task")
    parser.add_argument("--workers", type=int, default=2, help="processes that simulate")
    parser.add_argument("--tasks", nargs="*", help="only these tasks, by name")
    parser.add_argument("--held-out", type=int, help="only so many held-out episodes")
    parser.add_argument("--out", type=Path, default=Path("worldvla-nano"))
    parser.add_argument("--card", action="store_true", help="write the tables into the model's README.md")
    options = parser.parse_args()

    results = {}
    for folder in options.models:
        results[folder.name] = measure(folder, options)
        if options.card:
            (folder / "README.md").write_text(card(folder.name, results[folder.name]), encoding="utf-8")
    common.print_machine(episodes=options.episodes, models=", ".join(results))
    for name, found in results.items():
        print(f"\n## {name}\n\n{tables(found)}")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one model."""
    agent = WorldVLA.from_pretrained(folder)
    record = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    tasks = [
        task
        for suite in record["recipe"]["suites"]
        for task in load_suite(suite).tasks
        if task.name in (options.tasks or record["data"]["tasks"])
    ]
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    closed = closed_loop(
        agent, tasks, options.out / f"{folder.name}_{weights[:12]}", options.episodes, options.workers
    )
    held_out = held_out_episodes(options.frames, record["data"]["tasks"], options.held_out)
    return {
        "success": closed,
        **open_loop(agent, held_out),
        "held_out_episodes": len(held_out),
        "bytes": {
            "model": (folder / "model.safetensors").stat().st_size,
            "image tokenizer": (folder / "image_tokenizer" / "model.safetensors").stat().st_size,
        },
        "image_size": agent.processor.image_size,
        "training": record,
        "image_tokenizer": read_if_there(folder / "image_tokenizer" / "training.json"),
        "versions": installed_versions(),
    }


def closed_loop(
    agent: WorldVLA, tasks: Sequence[Task], out: Path, episodes: int, workers: int
) -> list[dict[str, Any]]:
    """Success on each task, from its first fixed initial states; a rerun goes on, or reads what was found."""
    result = evaluate(
        ModelPolicy(agent),
        tasks,
        out,
        protocol=replace(OPENVLA, image_size=agent.processor.image_size),
        episodes=episodes,
        policy_name=out.name,
        video_stride=0,
        workers=workers,
        on_episode=lambda record: print(record.task_name, record.episode, record.outcome, file=sys.stderr),
    )
    names = {(record.suite, record.task): record.instruction for record in result.records}
    return [
        {"suite": suite, "instruction": names[suite, task], **asdict(rate)}
        for (suite, task), rate in result.by_task.items()
    ]


def held_out_episodes(frames: Path, tasks: Sequence[str], limit: int | None) -> list[Episode]:
    """Those that neither the model nor its image tokenizer were trained on; both split alike (seed 0)."""
    source = open_source(frames, replay=False)
    keys, _ = source.list()
    parts = split(keys)
    chosen = [key for key in keys if parts[key.id] != "train" and key.task in tasks]
    return [source.read(key.id, source.cameras) for key in chosen[:limit]]


def open_loop(agent: WorldVLA, episodes: Sequence[Episode]) -> dict[str, Any]:
    """Errors of chunks and of imagined frames on held-out episodes: a mean for each episode."""
    errors = []
    for episode in episodes:
        ((_, frames),) = episode.frames.items()
        chunk = agent.processor.settings.num_actions
        own = []
        for t in np.linspace(0, len(episode) - chunk, CHUNKS_PER_EPISODE).astype(int):
            shown = [frames[i] for i in range(max(0, t - agent.processor.history_length + 1), t + 1)]
            predicted = agent.predict_actions(shown, episode.instruction)
            own.append(np.abs(predicted - episode.actions[t : t + chunk]).mean())
        errors.append(float(np.mean(own)))
    worlds = [one_step(agent, [episode], per_episode=FRAMES_PER_EPISODE) for episode in episodes]
    names = ("predicted", "reconstructed", "copied", "copied_tokens")
    return {
        "action_l1": errors,
        "psnr": {name: [float(np.mean(getattr(world, name))) for world in worlds] for name in names},
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % of the means of samples drawn from the values with replacement."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.asarray(values), (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def tables(found: dict[str, Any]) -> str:
    """The tables in Markdown."""
    lines = ["| task | success | 95 % interval |", "|---|---|---|"]
    rates = []
    for row in found["success"]:
        rate = SuccessRate(row["successes"], row["episodes"], row["errors"])
        rates.append(rate)
        lines.append(f"| {row['suite']}: {row['instruction']} | {shown(rate)} |")
    total = SuccessRate(
        *(sum(getattr(rate, name) for rate in rates) for name in ("successes", "episodes", "errors"))
    )
    lines.append(f"| **all** | {shown(total)} |")

    held_out, chunk = found["held_out_episodes"], found["training"]["recipe"]["chunk"]
    lines += ["", f"| on {held_out} held-out episodes | mean | 95 % interval |", "|---|---|---|"]
    low, high = interval(found["action_l1"])
    lines.append(
        f"| mean absolute error of chunks of {chunk} actions | {np.mean(found['action_l1']):.4f} "
        f"| {low:.4f} … {high:.4f} |"
    )
    names = {
        "predicted": "PSNR of the next frame, imagined",
        "copied_tokens": "… of the frame before, through the image tokenizer",
        "copied": "… of the frame before, as it is",
        "reconstructed": "… of the next frame, through the image tokenizer",
    }
    for name, told in names.items():
        low, high = interval(found["psnr"][name])
        lines.append(f"| {told} | {np.mean(found['psnr'][name]):.2f} dB | {low:.2f} … {high:.2f} |")
    gains = np.subtract(found["psnr"]["predicted"], found["psnr"]["copied"])
    low, high = interval(gains.tolist())
    lines.append(
        f"| imagined over the frame before, as it is | {gains.mean():+.2f} dB | {low:+.2f} … {high:+.2f} |"
    )

    training, images = found["training"], found["image_tokenizer"]
    lines += ["", "| | model | image tokenizer |", "|---|---|---|"]
    parameters = training["parameters"], (images or {}).get("parameters", 0)
    lines.append(f"| parameters | {parameters[0]:,} | {parameters[1]:,} |")
    sizes = found["bytes"]
    lines.append(f"| on disk | {sizes['model'] / 1e6:.1f} MB | {sizes['image tokenizer'] / 1e6:.1f} MB |")
    seconds = training["seconds"], (images or {}).get("seconds", 0.0)
    lines.append(f"| training | {seconds[0] / 3600:.1f} h | {seconds[1] / 3600:.1f} h |")
    lines.append(f"| optimizer steps | {training['steps']:,} | {(images or {}).get('steps', 0):,} |")
    return "\n".join(lines)


def shown(rate: SuccessRate) -> str:
    low, high = rate.interval()
    share = "-" if rate.rate is None else f"{100 * rate.rate:.0f} % ({rate.successes}/{rate.episodes})"
    errors = f", {rate.errors} errors" if rate.errors else ""
    return f"{share}{errors} | {100 * low:.0f} … {100 * high:.0f} %"


def card(name: str, found: dict[str, Any]) -> str:
    """README.md of the model."""
    training = found["training"]
    recipe = training["recipe"]
    versions = ", ".join(f"{key} {value}" for key, value in found["versions"].items())
    return f"""---
library_name: worldvla-model
pipeline_tag: robotics
tags: [worldvla, vision-language-action, world-model, robotics]
---

# {name}

The model that comes with worldvla: small enough for a wheel and for a CPU, trained from scratch on scripted
demonstrations. It drives the tasks below in the simulator and imagines their next frames. It knows nothing else:
no other task, scene, camera or robot, and no other words than the instructions it was trained on.

{tables(found)}

Success: closed loop from the first fixed initial states of the suites, which no demonstration began with;
protocol `openvla` (10 wait steps, step limits 220 and 280), frames rendered at {found["image_size"]} px. Held-out:
episodes of the same scripted demonstrators that neither part was trained on; a chunk's error is the mean over its
actions and dimensions in data units. "The frame before" is what a model that changes nothing would draw.

Recipe `{recipe["name"]}`: {recipe["history"]} frames in, chunks of {recipe["chunk"]} actions, mask
`{recipe["attention"]}`; {training["samples"]["action"]:,} action and {training["samples"]["world"]:,} world
samples; trained on {training["machine"]}. `training.json` holds all of it.

Versions: {versions}.

How to make it again: docs/make-nano.md.
"""


def read_if_there(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    main()
