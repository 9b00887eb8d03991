"""A policy drives the simulator for one episode, closed loop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldvla_libero.evaluation.policy import WRIST, EpisodicPolicy, Needs, Observation, Policy
from worldvla_libero.simulator.settling import Motion
from worldvla_libero.simulator.simulator import Frame, Simulator, SimulatorError, StepResult, check_actions
from worldvla_libero.simulator.suites import Task


@dataclass(frozen=True)
class Rollout:
    """What happened in an episode.

    Attributes:
        success: whether the goal was reached within the step limit.
        actions: (T, 7) float64, all that were executed.
        query_steps: at which steps the policy was asked.
        query_seconds: wall-clock time until each of its answers.
        settling: how each object moved until the scene had settled; see `StepResult`.
    """

    success: bool
    actions: NDArray[np.float64]
    query_steps: tuple[int, ...]
    query_seconds: tuple[float, ...]
    settling: tuple[Motion, ...] = ()


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
        policy: who drives. One with a `reset` is told when the scene has settled.
        simulator: the task, with the cameras that the policy asks for.
        initial_state: index of a fixed initial state, or a state.
        seed: of the simulator.
        max_steps: step limit; default the protocol's for the task.
        instruction: default `task.language`.
        frame_stride: additionally render every n-th step; 0 for none.
        on_step: called with each step (0 is the settled scene) and its frame, None where none was rendered.

    Raises:
        PolicyError: the policy raised or gave no valid chunk.
        SimulatorError: the simulator failed, or does not have a camera that the policy asks for.
    """
    episode = drive(
        policy,
        simulator,
        initial_state=initial_state,
        seed=seed,
        max_steps=max_steps,
        instruction=instruction,
        frame_stride=frame_stride,
        on_step=on_step,
    )
    while True:
        try:
            next(episode)
        except StopIteration as ended:
            return ended.value


def drive(policy: Policy, simulator: Simulator, **arguments: Any) -> Generator[None, None, Rollout]:
    """`rollout` with its arguments, in turns: it yields before each query, and returns what happened."""
    on_begin = policy.reset if isinstance(policy, EpisodicPolicy) else None
    episode = play(simulator, Needs.of(policy), on_begin=on_begin, **arguments)
    try:
        observation = next(episode)
        while True:
            yield
            try:
                actions = policy.act(observation)
            except Exception as error:  # noqa: BLE001 -- becomes a PolicyError
                observation = episode.throw(error)
            else:
                observation = episode.send(actions)
    except StopIteration as ended:
        return ended.value


def play(
    simulator: Simulator,
    needs: Needs,
    *,
    initial_state: int | ArrayLike = 0,
    seed: int | None = None,
    max_steps: int | None = None,
    instruction: str | None = None,
    frame_stride: int = 0,
    on_step: Callable[[int, Frame | None], None] | None = None,
    on_begin: Callable[[Simulator], None] | None = None,
) -> Generator[Observation, ArrayLike, Rollout]:
    """One episode for whoever answers: yields observations, is sent action chunks, returns what happened.

    What the policy raised is thrown in, so that it is told with the episode so far. Further arguments are those of
    `rollout`.

    Args:
        simulator: the task.
        needs: what is shown.
        initial_state: see `rollout`.
        seed: see `rollout`.
        max_steps: see `rollout`.
        instruction: see `rollout`.
        frame_stride: see `rollout`.
        on_step: see `rollout`.
        on_begin: called when the scene has settled; what it raises is the policy's.

    Raises:
        PolicyError: something was thrown in, `on_begin` raised, or what was sent is no valid chunk.
        SimulatorError: the simulator failed, or lacks a camera.
    """
    task = simulator.task
    limit = simulator.protocol.step_limit(task) if max_steps is None else max_steps
    words = task.language if instruction is None else instruction
    start = simulator.reset(initial_state, seed=seed, observe=needs.history_length > 0 or frame_stride > 0)
    result = start
    if on_step:
        on_step(0, result.frame)
    # At the first step there is one image; a chunk shorter than M leaves older frames of the history standing.
    history: deque[Frame] = deque(maxlen=needs.history_length)
    if needs.history_length:
        history.append(_frame(result, needs.cameras[0], task))
    executed: list[NDArray[np.float64]] = []
    query_steps: list[int] = []
    query_seconds: list[float] = []

    def so_far() -> Rollout:
        actions = np.array(executed).reshape(-1, 7)
        return Rollout(result.success, actions, tuple(query_steps), tuple(query_seconds), start.settling)

    def failed(error: Exception) -> PolicyError:
        return PolicyError(f"step {result.step} of {task}: {type(error).__name__}: {error}", so_far())

    if on_begin is not None:
        try:
            on_begin(simulator)
        except Exception as error:
            raise failed(error) from error
    while result.step < limit and not result.success:
        observation = _observed(simulator, result, needs, tuple(history), words)
        asked = time.perf_counter()
        try:
            chunk = check_actions((yield observation), shape=(None, 7))
        except Exception as error:
            raise failed(error) from error
        query_seconds.append(time.perf_counter() - asked)
        query_steps.append(result.step)
        for i, action in enumerate(chunk):
            for_policy = len(chunk) - i <= needs.history_length  # the next query is shown it
            for_stride = frame_stride > 0 and (result.step + 1) % frame_stride == 0
            result = simulator.step(action, observe=for_policy or for_stride)
            executed.append(action)
            if for_policy:
                history.append(_frame(result, needs.cameras[0], task))
            if on_step:
                on_step(result.step, result.frame)
            if result.success or result.step == limit:
                break
    return so_far()


def _observed(
    simulator: Simulator, result: StepResult, needs: Needs, images: tuple[Frame, ...], instruction: str
) -> Observation:
    wrist = _frame(result, WRIST, simulator.task) if needs.history_length and WRIST in needs.cameras else None
    state = simulator.proprioception if needs.state else None
    return Observation(images, instruction, result.step, wrist, state)


def _frame(result: StepResult, camera: str, task: Task) -> Frame:
    if camera not in result.frames:
        raise SimulatorError(
            f"the policy asks for camera {camera!r}; the simulator of {task} renders {', '.join(result.frames)}: "
            "make it with cameras=Needs.of(policy).cameras"
        )
    return result.frames[camera]
