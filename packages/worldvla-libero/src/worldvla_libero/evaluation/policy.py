"""What a policy is: what it is shown, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.simulator.simulator import Frame, Simulator

AGENTVIEW, WRIST = "agentview", "robot0_eye_in_hand"


@dataclass(frozen=True)
class Observation:
    """What a policy is shown.

    Attributes:
        images: (S, S, 3) uint8 images of the third-person camera at the last simulator steps, oldest first: as
            many as the policy's history length, or fewer as long as the episode has not had as many steps.
        instruction: the task in words.
        step: control steps since the scene had settled.
        wrist: (S, S, 3) uint8 present image of the camera at the wrist; None unless the policy asks for it.
        state: (8,) float64 position [m], axis-angle [rad] and fingers [m] of the hand, in the order of LeRobot's
            and openpi's LIBERO data; None unless the policy asks for it.
    """

    images: tuple[Frame, ...]
    instruction: str
    step: int
    wrist: Frame | None = None
    state: NDArray[np.float64] | None = None


class Policy(Protocol):
    """Whatever can drive the robot.

    Two further attributes may say that it wants to see more: `cameras`, the names of the cameras it is shown,
    `("agentview",)` by default, of which `robot0_eye_in_hand` becomes `Observation.wrist`; and `uses_state`,
    whether it is shown `Observation.state`. What no policy asks for is not rendered.

    An attribute `identity`, a mapping that JSON can hold, tells it from others of its name: a run is gone on with
    only if it is the same.

    One that has a method `act_batch(observations) -> list of chunks` answers several simulators at once. One that
    has a method `reset` as well is an `EpisodicPolicy`.
    """

    @property
    def history_length(self) -> int:
        """M, how many images it is shown; 0 for none, and then nothing is rendered for it."""
        ...

    def act(self, observation: Observation) -> NDArray[np.floating]:
        """Choose the next K actions; all of them are executed before it is asked again.

        Returns:
            (K, 7) per-step deltas of position and axis-angle, and the gripper, -1 open to +1 closed.
        """
        ...


@runtime_checkable
class EpisodicPolicy(Policy, Protocol):
    """A policy that keeps something from one query to the next.

    It drives one simulator at a time and lives in its process: whoever runs several side by side gives each a
    copy, which is made by pickling. A policy without `reset` may answer for many simulators in turn.
    """

    def reset(self, simulator: Simulator) -> None:
        """An episode begins; called before its first query.

        Args:
            simulator: with the scene settled. A policy under test leaves it alone; the scripted expert looks into
                it. `simulator.start_state` is what sets this episode apart from others of the task.
        """
        ...


@dataclass(frozen=True)
class Needs:
    """What a simulator has to provide for a policy.

    Attributes:
        history_length: M, of images.
        cameras: that are rendered.
        state: whether the robot's state is read.
    """

    history_length: int
    cameras: tuple[str, ...] = (AGENTVIEW,)
    state: bool = False

    @classmethod
    def of(cls, policy: Policy) -> Needs:
        """Ask a policy.

        Raises:
            ValueError: its history length is negative, or it names cameras but no third-person one.
        """
        length = policy.history_length
        if length < 0:
            raise ValueError(f"history_length of {type(policy).__name__} is {length}; allowed: 0 and above")
        cameras = tuple(getattr(policy, "cameras", (AGENTVIEW,)))
        if not cameras or cameras[0] == WRIST:
            raise ValueError(
                f"cameras of {type(policy).__name__} are {cameras!r}; the first has to be the third-person one, "
                f"such as {AGENTVIEW!r}"
            )
        return cls(length, cameras, bool(getattr(policy, "uses_state", False)))
