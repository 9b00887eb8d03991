"""One side of an evaluation: a simulator that runs one episode after the other and asks for actions.

It is driven by messages, so that it may live in this process, in another one or on another machine:

    Begin(episode)     → an Observation to answer, or what happened
    Act(actions)       → the next Observation, or what happened
    Fail(error)        → what happened: the policy raised instead of answering
    GoOn()             → as Act, where the answer was None: a policy at its side is about to be asked
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from worldvla_libero.evaluation.policy import Needs, Observation, Policy
from worldvla_libero.evaluation.rollout import PolicyError, drive, play
from worldvla_libero.figures import save_image
from worldvla_libero.jobs.parts import storing
from worldvla_libero.jobs.processes import trace_of
from worldvla_libero.simulator.protocols import EvaluationProtocol
from worldvla_libero.simulator.settling import unsettled
from worldvla_libero.simulator.simulator import Frame, Simulator
from worldvla_libero.simulator.suites import Task
from worldvla_libero.versions import SIMULATOR, installed_versions
from worldvla_libero.video import VideoWriter

Origin = Literal["policy", "simulator", "worker"]


@dataclass(frozen=True)
class EpisodePlan:
    """An episode to run.

    Attributes:
        task: what to do.
        episode: its number; it starts from the fixed initial state of that number.
        protocol: step limits, seeds, settling, image size.
        instruction: what the policy is told.
        needs: what the policy is shown.
        folder: gets video and last frame, under the names below.
        video_stride: record every n-th step; 0 for no video.
        policy: acts beside the simulator; None where actions are asked for.
    """

    task: Task
    episode: int
    protocol: EvaluationProtocol
    instruction: str
    needs: Needs
    folder: Path
    video_stride: int = 0
    policy: Policy | None = None

    @property
    def key(self) -> tuple[str, int, int]:
        """Suite, task index and number of the episode."""
        return self.task.suite, self.task.index, self.episode

    @property
    def seed(self) -> int:
        """Of the simulator."""
        return self.protocol.episode_seed(self.episode)

    @property
    def max_steps(self) -> int:
        """Step limit."""
        return self.protocol.step_limit(self.task)

    @property
    def video(self) -> str | None:
        """File name of the video in the folder."""
        return f"videos/{self._stem}.mp4" if self.video_stride else None

    @property
    def last_frame(self) -> str:
        """File name of the last frame of an episode that did not reach its goal."""
        return f"frames/{self._stem}.png"

    @property
    def _stem(self) -> str:
        return f"{self.task.suite}_{self.task.index:02d}_{self.episode:03d}"


@dataclass(frozen=True)
class EpisodeFault:
    """Why an episode says nothing about the policy's success.

    Attributes:
        origin: what failed: the policy, the simulator, or the process it ran in.
        type: of the exception.
        message: of the exception.
        traceback: of the exception.
    """

    origin: Origin
    type: str
    message: str
    traceback: str

    @classmethod
    def of(cls, origin: Origin, error: BaseException) -> EpisodeFault:
        """Describe an exception."""
        if isinstance(error, _ToldError):
            return error.fault
        return cls(origin, type(error).__name__, str(error), trace_of(error))


class _ToldError(Exception):
    """What the policy raised elsewhere, which may be of a type that cannot travel."""

    def __init__(self, fault: EpisodeFault) -> None:
        super().__init__(f"{fault.type}: {fault.message}")
        self.fault = fault


@dataclass(frozen=True)
class EpisodeEnd:
    """What happened in an episode.

    Attributes:
        success: whether the goal was reached within the step limit.
        steps: that were taken.
        query_seconds: wall-clock time until each answer of the policy.
        seconds: wall-clock time of the episode.
        error: None where the episode ran to its end.
        video: file name, None where none was asked for.
        last_frame: file name, None after success or without a frame.
        versions: of the simulator, where it ran.
        unsettled: which objects were not at rest when it began (see `settling`); None where all were.
    """

    success: bool = False
    steps: int = 0
    query_seconds: tuple[float, ...] = ()
    seconds: float = 0.0
    error: EpisodeFault | None = None
    video: str | None = None
    last_frame: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    unsettled: str | None = None


@dataclass(frozen=True)
class Begin:
    """Run this episode."""

    plan: EpisodePlan


@dataclass(frozen=True)
class Act:
    """The policy's answer."""

    actions: Any


@dataclass(frozen=True)
class Fail:
    """What the policy raised."""

    error: EpisodeFault


@dataclass(frozen=True)
class GoOn:
    """Nothing was asked."""


Message: TypeAlias = Begin | Act | Fail | GoOn


class EpisodeRunner:
    """Runs episodes; the simulator stays from one to the next of the same task.

    An exception means that the simulator failed, and that this object is of no more use.
    """

    def __init__(self) -> None:
        self._simulator: Simulator | None = None
        self._episode: Generator[Observation | None, Any, EpisodeEnd] | None = None

    def __call__(self, message: Message) -> Observation | EpisodeEnd | None:
        """Go on until something is needed; None is a sign of life.

        Raises:
            SimulatorError: the simulator failed.
            StorageError: a video or frame cannot be written.
        """
        try:
            if isinstance(message, Begin):
                self._episode = self._run(message.plan)
                return next(self._episode)
            assert self._episode is not None
            if isinstance(message, Fail):
                return self._episode.throw(_ToldError(message.error))
            return self._episode.send(message.actions if isinstance(message, Act) else None)
        except StopIteration as ended:
            self._episode = None
            return ended.value

    def close(self) -> None:
        """Free the simulator."""
        if self._episode is not None:
            self._episode.close()
        if self._simulator is not None:
            self._simulator.close()
        self._episode = self._simulator = None

    def _run(self, plan: EpisodePlan) -> Generator[Observation | None, Any, EpisodeEnd]:
        started = time.perf_counter()
        simulator = self._simulator_of(plan)
        failure: PolicyError | None = None
        with self._recording(plan) as record:
            arguments: dict[str, Any] = {
                "initial_state": plan.episode,
                "seed": plan.seed,
                "instruction": plan.instruction,
                "frame_stride": plan.video_stride,
                "on_step": record,
            }
            try:
                run = yield from (
                    play(simulator, plan.needs, **arguments)
                    if plan.policy is None
                    else drive(plan.policy, simulator, **arguments)
                )
            except PolicyError as error:
                run, failure = error.so_far, error
        return EpisodeEnd(
            success=run.success and failure is None,
            steps=len(run.actions),
            query_seconds=run.query_seconds,
            seconds=time.perf_counter() - started,
            error=EpisodeFault.of("policy", failure.__cause__ or failure) if failure else None,
            video=plan.video,
            last_frame=None if run.success else self._keep_last_frame(plan, simulator),
            versions=installed_versions(SIMULATOR),
            unsettled=unsettled(run.settling),
        )

    @contextmanager
    def _recording(self, plan: EpisodePlan) -> Iterator[Callable[[int, Frame | None], None]]:
        """What is told of each step, to make a video of it if one is asked for."""
        if not plan.video:
            yield lambda step, frame: None
            return
        video = VideoWriter(plan.folder / plan.video, plan.protocol.control_hz / plan.video_stride)

        def record(step: int, frame: Frame | None) -> None:
            if frame is not None and step % plan.video_stride == 0:
                with storing(str(plan.video), plan.folder):
                    video.write(frame)

        with ExitStack() as opened:
            opened.enter_context(video)
            yield record
            with storing(str(plan.video), plan.folder):
                opened.pop_all().close()  # its last frames

    def _keep_last_frame(self, plan: EpisodePlan, simulator: Simulator) -> str:
        picture = simulator.look()
        with storing(plan.last_frame, plan.folder):
            save_image(plan.folder / plan.last_frame, picture)
        return plan.last_frame

    def _simulator_of(self, plan: EpisodePlan) -> Simulator:
        found = self._simulator
        wanted = plan.task, plan.protocol, plan.needs.cameras
        if found is None or (found.task, found.protocol, found.cameras) != wanted:
            if found is not None:
                found.close()
            self._simulator = found = Simulator(plan.task, plan.protocol, cameras=plan.needs.cameras)
        return found
