"""The demonstration: a model drives one real LIBERO task and imagines the frames that are about to come."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.report import ImaginedFrame, VideoWriter, save_demo_figure, side_by_side
from worldvla_libero.rollout import ModelPolicy, Rollout, rollout
from worldvla_libero.simulator import Frame, Simulator
from worldvla_libero.suites import Task
from worldvla_libero.versions import installed_versions
from worldvla_tokenizers.files import write_text_atomic

if TYPE_CHECKING:
    from worldvla_model import WorldVLA

FIGURE_FILE = "demo.png"
VIDEO_FILE = "demo.mp4"
NUMBERS_FILE = "demo.json"

STAND_IN_TAG = "stand-in"
STAND_IN_NOTE = (
    "Stand-in model: fitted to 16 samples to check the code, its image tokenizer has random weights. "
    "Expect noise for images, and no success."
)

Progress = Callable[[str, int, int], None]
"""Called with the phase (`driving`, `imagining`), how many steps of it are done, and how many there are."""


@dataclass(frozen=True)
class DemoModel:
    """A loaded model and what the picture says about it.

    Attributes:
        agent: the model.
        name: e.g. its folder or repository.
        stand_in: whether it is untrained for control and says so.
    """

    agent: WorldVLA
    name: str
    stand_in: bool


def is_stand_in(folder: Path) -> bool:
    """Whether the model card in a folder (`README.md`) carries the tag `stand-in`."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    return card.is_file() and STAND_IN_TAG in (ModelCard.load(card).data.tags or [])


def run_demo(
    model: DemoModel,
    task: Task,
    out_dir: str | os.PathLike[str],
    *,
    steps: int = 30,
    columns: int = 6,
    progress: Progress = lambda phase, done, total: None,
) -> dict[str, Any]:
    """Drive the task for some chunks, imagine every next frame from the true one, write picture, video, numbers.

    Args:
        model: who drives and imagines.
        task: what to do.
        out_dir: gets `demo.png`, `demo.mp4` and `demo.json`.
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
    if steps < 1 or columns < 1:
        raise ValueError(f"steps is {steps} and columns is {columns}; allowed: 1 and above")
    started = time.perf_counter()
    folder = Path(out_dir)
    progress("driving", 0, steps)
    with Simulator(task) as simulator:
        control_hz = simulator.protocol.control_hz
        run, frames = _drive(model.agent, simulator, steps, progress)
    driven = time.perf_counter()
    imagined = []
    for step in range(1, len(frames)):
        progress("imagining", step - 1, len(frames) - 1)
        imagined.append(_imagine(model.agent, step, frames, run.actions))
    progress("imagining", len(imagined), len(imagined))
    done = time.perf_counter()

    with VideoWriter(folder / VIDEO_FILE, control_hz) as video:
        for frame in imagined:
            video.write(side_by_side({"true next frame": frame.true, "imagined next frame": frame.imagined}))
    size = imagined[0].imagined.shape
    shown = np.unique(np.linspace(0, len(imagined) - 1, columns).round().astype(int))
    save_demo_figure(
        folder / FIGURE_FILE,
        title=f"“{task.language}”",
        subtitle=f"{task.suite}, task {task.index} · {model.name}, {size[1]} px. "
        f"{STAND_IN_NOTE if model.stand_in else ''}",
        frames=[imagined[i] for i in shown],
        actions=run.actions,
        query_steps=run.query_steps,
        control_hz=control_hz,
    )
    numbers = {
        "task": {"suite": task.suite, "index": task.index, "instruction": task.language},
        "model": {"name": model.name, "stand_in": model.stand_in, "image_size": list(size[:2])},
        "success": run.success,
        "steps": len(run.actions),
        "queries_at_steps": list(run.query_steps),
        "actions": run.actions.tolist(),
        "psnr_imagined_vs_true_db": {str(f.step): _finite(f.psnr) for f in imagined},
        "psnr_tokenized_vs_true_db": {str(f.step): _finite(_psnr(f.tokenized, f.true)) for f in imagined},
        "seconds": {
            "driving": driven - started,
            "of_which_in_the_policy": run.policy_seconds,
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


def _imagine(agent: WorldVLA, step: int, frames: list[Frame], actions: NDArray[np.float64]) -> ImaginedFrame:
    imagined = agent.predict_frame([frames[step - 1]], actions[step - 1 : step])
    codes = agent.processor.encode_images([frames[step]])[0]
    tokenized = np.asarray(agent.processor.images.decode(codes[None]))[0]
    return ImaginedFrame(step, frames[step], tokenized, imagined, _psnr(imagined, frames[step]))


def _psnr(image: NDArray[np.uint8], true: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio in dB at the image's size, to which the true frame is averaged down."""
    from PIL import Image

    height, width = image.shape[:2]
    resized = np.asarray(Image.fromarray(true).resize((width, height), Image.Resampling.BOX))
    error = np.square(image.astype(np.float64) - resized).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity
