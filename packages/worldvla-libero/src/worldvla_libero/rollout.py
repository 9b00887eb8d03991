"""A policy drives the simulator for one episode, closed loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldvla_libero.simulator import Frame, Simulator, check_actions

if TYPE_CHECKING:
    from worldvla_model import WorldVLA


@dataclass(frozen=True)
class Observation:
    """What a policy is shown.

    Attributes:
        images: (S, S, 3) uint8 camera images of the last simulator steps, oldest first: as many as the policy's
            history length, but one at the first step.
        instruction: the task in words.
        step: control steps since the scene had settled.
    """

    images: tuple[Frame, ...]
    instruction: str
    step: int


class Policy(Protocol):
    """Whatever can drive the robot."""

    @property
    def history_length(self) -> int:
        """M, how many images it is shown."""
        ...

    def act(self, observation: Observation) -> NDArray[np.floating]:
        """Choose the next K actions; all of them are executed before it is asked again.

        Returns:
            (K, 7) per-step deltas of position and axis-angle, and the gripper, -1 open to +1 closed.
        """
        ...


class ModelPolicy:
    """A WorldVLA model as a policy.

    Args:
        agent: the model.
        num_actions: K; default as saved with the model.
    """

    def __init__(self, agent: WorldVLA, *, num_actions: int | None = None) -> None:
        self.agent = agent
        self.num_actions = num_actions

    @property
    def history_length(self) -> int:
        """M of the checkpoint."""
        return self.agent.processor.history_length

    def act(self, observation: Observation) -> NDArray[np.float64]:
        """One action chunk, with the gripper as decoded: neither binarised nor flipped."""
        return self.agent.predict_actions(
            list(observation.images), observation.instruction, num_actions=self.num_actions
        )


@dataclass(frozen=True)
class Rollout:
    """What happened in an episode.

    Attributes:
        success: whether the goal was reached within the step limit.
        actions: (T, 7) float64, all that were executed.
        query_steps: at which steps the policy was asked.
        policy_seconds: wall-clock time spent in the policy.
    """

    success: bool
    actions: NDArray[np.float64]
    query_steps: tuple[int, ...]
    policy_seconds: float


class PolicyError(RuntimeError):
    """The policy raised, or answered with something that is no action chunk; the cause is attached.

    Attributes:
        so_far: the episode until then.
    """

    def __init__(self, message: str, so_far: Rollout) -> None:
        super().__init__(message)
        self.so_far = so_far


def rollout(
    policy: Policy,
    simulator: Simulator,
    *,
    initial_state: int | ArrayLike = 0,
    seed: int | None = None,
    max_steps: int | None = None,
    instruction: str | None = None,
    frame_stride: int = 0,
    on_step: Callable[[int, Frame | None], None] | None = None,
) -> Rollout:
    """Run one episode: every action of a chunk is executed open loop, then the policy is asked again.

    Only frames that the policy will see, or that `frame_stride` asks for, are rendered.

    Args:
        policy: who drives.
        simulator: the task.
        initial_state: index of a fixed initial state, or a state.
        seed: of the simulator.
        max_steps: step limit; default the protocol's for the task.
        instruction: default `task.language`.
        frame_stride: additionally render every n-th step; 0 for none.
        on_step: called with each step (0 is the settled scene) and its frame, None where none was rendered.

    Raises:
        PolicyError: the policy raised or gave no valid chunk.
        SimulatorError: the simulator failed.
    """
    task = simulator.task
    limit = simulator.protocol.step_limit(task) if max_steps is None else max_steps
    words = task.language if instruction is None else instruction
    result = simulator.reset(initial_state, seed=seed)
    if on_step:
        on_step(0, result.frame)
    # At the first step there is one image; a chunk shorter than M leaves older frames of the history standing.
    history: deque[Frame] = deque([_seen(result.frame)], maxlen=policy.history_length)
    executed: list[NDArray[np.float64]] = []
    query_steps: list[int] = []
    policy_seconds = 0.0

    def so_far() -> Rollout:
        return Rollout(result.success, np.array(executed).reshape(-1, 7), tuple(query_steps), policy_seconds)

    while result.step < limit and not result.success:
        asked = time.perf_counter()
        try:
            actions = policy.act(Observation(tuple(history), words, result.step))
            chunk = check_actions(actions, shape=(None, 7))
        except Exception as error:
            message = f"step {result.step} of {task}: {type(error).__name__}: {error}"
            raise PolicyError(message, so_far()) from error
        policy_seconds += time.perf_counter() - asked
        query_steps.append(result.step)
        for i, action in enumerate(chunk):
            for_policy = len(chunk) - i <= policy.history_length  # the next query is shown it
            for_stride = frame_stride > 0 and (result.step + 1) % frame_stride == 0
            result = simulator.step(action, observe=for_policy or for_stride)
            executed.append(action)
            if for_policy:
                history.append(_seen(result.frame))
            if on_step:
                on_step(result.step, result.frame)
            if result.success or result.step == limit:
                break
    return so_far()


def _seen(frame: Frame | None) -> Frame:
    assert frame is not None  # the step was observed
    return frame
