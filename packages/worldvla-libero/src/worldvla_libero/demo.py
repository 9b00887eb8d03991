"""The demonstration: a model drives one real LIBERO task and imagines the frames that are about to come."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.evaluation.policies import ModelPolicy
from worldvla_libero.evaluation.rollout import Rollout, rollout
from worldvla_libero.evaluation.world.metrics import psnr
from worldvla_libero.figures import ImaginedFrame, save_demo_figure, side_by_side
from worldvla_libero.simulator.simulator import Frame, Simulator
from worldvla_libero.simulator.suites import Task
from worldvla_libero.versions import installed_versions
from worldvla_libero.video import VideoWriter
from worldvla_tokenizers.files import write_text_atomic

if TYPE_CHECKING:
    from worldvla_model import WorldVLA
    from worldvla_model.decoding import Workspace

FIGURE_FILE = "demo.png"
VIDEO_FILE = "demo.mp4"
NUMBERS_FILE = "demo.json"

Progress = Callable[[str, int, int], None]
"""Called with the phase (`driving`, `imagining`), how many steps of it are done, and how many there are."""


def run_demo(
    agent: WorldVLA,
    task: Task,
    out_dir: str | os.PathLike[str],
    *,
    name: str,
    steps: int = 150,
    columns: int = 6,
    progress: Progress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Drive the task, imagine every next frame from the true one, write picture, video, numbers.

    Args:
        agent: who drives and imagines; the camera is rendered at the size it sees.
        task: what to do.
        out_dir: gets `demo.png`, `demo.mp4` and `demo.json`.
        name: of the model, e.g. its folder or repository.
        steps: control steps to drive, fewer after success.
        columns: frames shown in the picture, spread over the rollout.
        progress: told how far it is.

    Returns:
        The numbers, as written to `demo.json`.

    Raises:
        RenderingError: there is no OpenGL.
        PolicyError: the model gave no valid chunk.
        ValueError: no step or no column.
    """
    from worldvla_model.decoding import Workspace

    if steps < 1 or columns < 1:
        raise ValueError(f"steps is {steps} and columns is {columns}; allowed: 1 and above")
    started = time.perf_counter()
    folder = Path(out_dir)
    progress("driving", 0, steps)
    with Simulator(task, image_size=agent.processor.image_size) as simulator:
        control_hz = simulator.protocol.control_hz
        run, frames = _drive(agent, simulator, steps, progress)
    driven = time.perf_counter()
    imagined = []
    workspace = Workspace(agent.model)
    for step in range(1, len(frames)):
        progress("imagining", step - 1, len(frames) - 1)
        imagined.append(_imagine(agent, step, frames, run.actions, workspace))
    progress("imagining", len(imagined), len(imagined))
    done = time.perf_counter()

    with VideoWriter(folder / VIDEO_FILE, control_hz) as video:
        for frame in imagined:
            video.write(side_by_side({"true next frame": frame.true, "imagined next frame": frame.imagined}))
    size = imagined[0].imagined.shape
    chosen = np.unique(np.linspace(0, len(imagined) - 1, columns).round().astype(int))
    save_demo_figure(
        folder / FIGURE_FILE,
        title=f"“{task.language}”",
        subtitle=f"{task.suite}, task {task.index} · {name}, {size[1]} px · "
        f"{'reached the goal' if run.success else 'did not reach the goal'} in {len(run.actions)} steps",
        frames=[imagined[i] for i in chosen],
        actions=run.actions,
        query_steps=run.query_steps,
        control_hz=control_hz,
    )
    numbers = {
        "task": {"suite": task.suite, "index": task.index, "instruction": task.language},
        "model": {"name": name, "image_size": list(size[:2])},
        "success": run.success,
        "steps": len(run.actions),
        "queries_at_steps": list(run.query_steps),
        "actions": run.actions.tolist(),
        "psnr_imagined_vs_true_db": {str(f.step): _finite(f.psnr) for f in imagined},
        "psnr_tokenized_vs_true_db": {str(f.step): _finite(_psnr(f.tokenized, f.true)) for f in imagined},
        "decoding": _compare_decoding(agent, frames[:2], run.actions[:1], task.language),
        "seconds": {
            "driving": driven - started,
            "of_which_in_the_policy": sum(run.query_seconds),
            "imagining": done - driven,
            "total": time.perf_counter() - started,
        },
        "versions": installed_versions(),
    }
    write_text_atomic(folder / NUMBERS_FILE, json.dumps(numbers, indent=2) + "\n")
    return numbers


def _drive(agent: WorldVLA, simulator: Simulator, steps: int, progress: Progress) -> tuple[Rollout, list[Frame]]:
    """The rollout and all its frames, the settled scene first."""
    frames: list[Frame] = []

    def keep(step: int, frame: Frame | None) -> None:
        assert frame is not None  # a stride of 1 renders every step
        frames.append(frame)
        progress("driving", step, steps)

    run = rollout(ModelPolicy(agent), simulator, max_steps=steps, frame_stride=1, on_step=keep)
    return run, frames


def _imagine(
    agent: WorldVLA, step: int, frames: list[Frame], actions: NDArray[np.float64], workspace: Workspace
) -> ImaginedFrame:
    imagined = agent.predict_frame([frames[step - 1]], actions[step - 1 : step], workspace=workspace)
    codes = agent.processor.encode_images([frames[step]])[0]
    tokenized = np.asarray(agent.processor.images.decode(codes[None]))[0]
    return ImaginedFrame(step, frames[step], tokenized, imagined, _psnr(imagined, frames[step]))


def _compare_decoding(
    agent: WorldVLA, frames: list[Frame], actions: NDArray[np.float64], words: str
) -> dict[str, dict[str, Any]]:
    """A chunk and a frame as the agent decodes them, and one token after the other: passes, seconds, ids."""
    from worldvla_model.agent import WORLD_ATTENTION
    from worldvla_model.decoding import ChunkGrammar, Decoder, Workspace, decode_chunks, decode_frames, repeat
    from worldvla_tokenizers import sequence

    model, parts = agent.model, agent.processor
    vocabulary, size, count = parts.vocabulary, parts.images.codebook_size, parts.settings.num_actions or 1
    now = parts.encode_images(frames[:1])[0]
    rows, columns = now.shape
    frame = [*sequence.image_slots(rows, columns, vocabulary, codebook_size=size), [vocabulary.eot]]
    draft = repeat([*sequence.image_block(now, vocabulary), vocabulary.eot])
    grammar = ChunkGrammar(sequence.action_slots(parts.actions.dimensions, vocabulary), vocabulary.eot)
    chunk = [*list(grammar.slots) * count, [vocabulary.eot]]
    to_act, to_imagine = [parts.action_prompt(frames[:1], words)], [parts.world_prompt(frames[:1], actions)]

    def act(workspace: Workspace) -> list[list[int]]:
        return decode_chunks(model, to_act, grammar, num_actions=count, workspace=workspace)

    def imagine(workspace: Workspace) -> list[list[int]]:
        return decode_frames(model, to_imagine, frame, draft=draft, attention=WORLD_ATTENTION, workspace=workspace)

    found = {}
    for name, decode, (prompt,), slots, attention in (
        (f"chunk of {count} actions", act, to_act, chunk, None),
        ("frame", imagine, to_imagine, frame, WORLD_ATTENTION),
    ):
        for _ in range(2):  # the second time everything is warm
            workspace, began = Workspace(model, prefixes=0), time.perf_counter()
            (answer,) = decode(workspace)
            seconds = time.perf_counter() - began
            decoder, began = Decoder(model, prompt, attention=attention), time.perf_counter()
            expected = [decoder.choose(slot) for slot in slots]
            found[name] = {
                "passes": workspace.passes,
                "seconds": seconds,
                "passes_one_by_one": decoder.passes,
                "seconds_one_by_one": time.perf_counter() - began,
                "same_ids": answer == expected,
            }
    return found


def _psnr(image: NDArray[np.uint8], true: NDArray[np.uint8]) -> float:
    """In dB at the image's size, to which the true frame is averaged down."""
    from PIL import Image

    size = image.shape[1], image.shape[0]
    return psnr(image, np.asarray(Image.fromarray(true).resize(size, Image.Resampling.BOX)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity
