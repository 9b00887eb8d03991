"""Whether a scene is at rest when the policy first sees it: measured, since MuJoCo's versions differ in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

MAX_SPEED = 0.01
"""Up to which an object is at rest [m/s].

LIBERO's initial states hold objects above their places, or within them, and the scene has the wait steps to settle
in. After ten, no object moves at more than 0.0001 m/s with MuJoCo 3.2.7; from 3.4 on, some do at 0.06 to 1.6 m/s.
How far they went tells nothing: with all versions some bowls push others 50 mm aside.
"""


@dataclass(frozen=True)
class Motion:
    """How an object moved while the scene settled.

    Attributes:
        name: of the object in the BDDL file, such as `akita_black_bowl_1`.
        slide: horizontal distance from where the initial state has it [m].
        rise: how much higher it is than there [m]; below 0 where it fell.
        speed: at the end [m/s].
    """

    name: str
    slide: float
    rise: float
    speed: float

    @property
    def at_rest(self) -> bool:
        """Whether it has settled."""
        return self.speed <= MAX_SPEED

    def __str__(self) -> str:
        slide, rise, speed = (f"{1e3 * value:.0f}" for value in (self.slide, abs(self.rise), self.speed))
        place = f"{slide} mm beside and {rise} mm {'above' if self.rise > 0 else 'below'} its initial state"
        return f"{self.name} moves at {speed} mm/s, {place}"


@dataclass(frozen=True, eq=False)
class FreeObjects:
    """The objects of a scene that nothing holds, at one moment.

    Attributes:
        names: of N objects.
        places: (N, 3) in the world [m].
        velocities: (N, 3) [m/s].
    """

    names: tuple[str, ...]
    places: NDArray[np.float64]
    velocities: NDArray[np.float64]

    @classmethod
    def of(cls, simulation: Any) -> Self:
        """Read robosuite's simulation."""
        model, data, axes = simulation.model, simulation.data, np.arange(3)
        joints = np.flatnonzero(model.jnt_type == 0)  # mjJNT_FREE
        return cls(
            tuple(model.joint_names[joint].removesuffix("_joint0") for joint in joints),
            data.qpos[model.jnt_qposadr[joints][:, None] + axes],
            data.qvel[model.jnt_dofadr[joints][:, None] + axes],
        )

    def since(self, before: FreeObjects) -> tuple[Motion, ...]:
        """How they moved since another moment."""
        ways = self.places - before.places
        slides, speeds = np.linalg.norm(ways[:, :2], axis=1), np.linalg.norm(self.velocities, axis=1)
        return tuple(map(Motion, self.names, slides.tolist(), ways[:, 2].tolist(), speeds.tolist()))


def unsettled(motions: Iterable[Motion]) -> str | None:
    """What is not at rest, for people; None where everything is."""
    return "; ".join(str(motion) for motion in motions if not motion.at_rest) or None
