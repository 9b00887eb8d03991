"""The page of a token data set: what it says, what it escapes, and that it always says it alike."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from worldvla_libero.data_page import Preview, data_page
from worldvla_libero.shards import TokenEpisode
from worldvla_tokenizers import ActionTokenizer

FRAMES = Path(__file__).parents[1] / "fixtures" / "published" / "frames"
TASKS = {
    "open_the_middle_drawer": ("open the middle drawer of the cabinet", "libero_goal_0"),
    "turn_on_the_stove": ("turn on the stove", "libero_goal_8"),
    "pick_up_the_salad_dressing": ("pick up the salad dressing and place it in the basket", "libero_object_2"),
}


def _actions(rng, steps, dimensions=7):
    """Smooth like a hand's motion: a few slow waves that fade in and out, rest between them, a gripper that closes."""
    t = np.linspace(0, 1, steps)[:, None]
    waves = sum(
        rng.normal(0, 0.3 / k, dimensions) * np.sin(np.pi * k * (t + rng.random(dimensions))) for k in (1, 2, 5)
    )
    actions = waves * np.sin(np.pi * t) + rng.normal(0, 0.01, (steps, dimensions))
    actions[:, 3:6] *= 0.25
    actions[np.abs(actions) < 0.004] = 0.0
    actions[:, -1] = np.where((t[:, 0] > 0.4) & (t[:, 0] < 0.9), 1.0, -1.0)
    return actions


def _episodes(number=24, dimensions=7, tasks=TASKS, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(number):
        task = list(tasks)[i % len(tasks)]
        steps = int(rng.gamma(30, 4 + i % len(tasks)))
        codes = rng.integers(0, 8192, (steps, 16, 16)).astype(np.uint16)
        actions = _actions(rng, steps, dimensions)
        episode = TokenEpisode(f"{task}_demo/demo_{i}", task, tasks[task][0], codes, actions)
        yield "validation" if i % 10 == 7 else "train", episode


def _strip(prefix):
    frames = [np.asarray(Image.open(FRAMES / f"{prefix}_{i}.png").resize((96, 96))) for i in (0, 1, 8, 9) * 2]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(frames, axis=1)).save(file, "JPEG", quality=85)
    return file.getvalue()
