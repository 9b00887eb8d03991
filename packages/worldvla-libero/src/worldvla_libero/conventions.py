"""What LIBERO's names and numbers mean: known to data and simulator alike, and importing neither."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import ArrayLike, NDArray

ACTION_DIM = 7  # three deltas of position, three of axis-angle, gripper

_SCENE_PREFIX = re.compile(r"^[A-Z_]+_SCENE\d+_")


def instruction_of(name: str) -> str:
    """The instruction that a task's name spells: without scene prefix and underscores."""
    return _SCENE_PREFIX.sub("", name).replace("_", " ")


def quaternion_to_axis_angle(quaternion: ArrayLike) -> NDArray[np.float64]:
    """(*, 4) unit quaternions (x, y, z, w) → (*, 3) axis times angle in [0, 2π) [rad], as LIBERO's `ee_ori`.

    The formula is that of robosuite, loss of precision near w = -1 included: policies know these values.
    """
    quaternion = np.asarray(quaternion, dtype=np.float64)
    w = quaternion[..., 3:].clip(-1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    small = np.isclose(sine, 0.0)
    return np.where(small, 0.0, quaternion[..., :3] * 2.0 * np.arccos(w) / np.where(small, 1.0, sine))


def proprioception(robot_states: ArrayLike) -> NDArray[np.float64]:
    """(T, 9) LIBERO's `robot_states` (fingers, position, quaternion) → (T, 8) position, axis-angle, fingers.

    The order of `observation.state` in LeRobot's LIBERO data.
    """
    fingers, position, quaternion = np.split(np.asarray(robot_states, dtype=np.float64), [2, 5], axis=1)
    return np.concatenate([position, quaternion_to_axis_angle(quaternion), fingers], axis=1)
