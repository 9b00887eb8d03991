"""One LIBERO task in the real simulator: settle, step, and render only the frames someone looks at."""

from __future__ import annotations

import atexit
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldvla_libero.conventions import ACTION_DIM, proprioception
from worldvla_libero.simulator.libero_files import InitialStateError
from worldvla_libero.simulator.protocols import OPENVLA, EvaluationProtocol
from worldvla_libero.simulator.rendering import check_rendering
from worldvla_libero.simulator.settling import FreeObjects, Motion
from worldvla_libero.simulator.suites import Task

NO_MOTION = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)  # the wait step: arm at rest, gripper opening

_PLACEMENT_ATTEMPTS = 100

Frame = NDArray[np.uint8]


class SimulatorError(RuntimeError):
    """The simulator cannot do what was asked."""


class InvalidActionError(SimulatorError, ValueError):
    """An action the robot cannot be sent."""


@dataclass(frozen=True)
class StepResult:
    """What one control step led to.

    Attributes:
        success: whether the task's goal holds.
        step: control steps since the scene had settled; 0 after `reset`.
        frames: (S, S, 3) uint8 image of each camera, upright; empty when the step was not observed.
        settling: after `reset`, how each object moved while the scene settled. With some versions of MuJoCo not
            all tasks come to rest where the initial state means to.
    """

    success: bool
    step: int
    frames: Mapping[str, Frame] = field(default_factory=lambda: MappingProxyType({}))
    settling: tuple[Motion, ...] = ()

    @property
    def frame(self) -> Frame | None:
        """(S, S, 3) uint8 image of the first camera; None when the step was not observed."""
        return next(iter(self.frames.values()), None)


class Simulator:
    """A LIBERO environment, closed after use.

    Frames are exactly those of LIBERO's own environment with its camera always on. That takes care: robosuite
    samples a camera once per control step, on a clock that every forced update advances by one substep. After
    LIBERO's `reset` and `set_init_state` (two forced updates) the sample falls on substep 24 of 25, not on the
    first; rendering afterwards, or switching the observable off and on, which resets its clock, gives other
    frames. So the camera stays an enabled observable whose clock always runs, and only its sensor skips the
    rendering when nobody looks.

    Args:
        task: the task.
        protocol: settling steps, control rate and image size.
        image_size: width and height of frames in pixels; by default the protocol's.
        cameras: names of cameras in LIBERO's scenes, such as `agentview` and `robot0_eye_in_hand`.

    Raises:
        RenderingError: there is no OpenGL to render with.
        LiberoNotInstalledError: LIBERO is not installed.
        MissingFilesError: LIBERO does not bring all that the scene is made of.
        SimulatorError: the scene has no such camera, or none is named.

    Example:
        >>> from worldvla_libero import Simulator, load_suite
        >>> with Simulator(load_suite("libero_goal").task(0), image_size=64) as simulator:
        ...     start = simulator.reset(initial_state=0, seed=0)
        ...     after = simulator.step([0, 0, -0.5, 0, 0, 0, -1])
        >>> after.frame.shape, after.success
        ((64, 64, 3), False)
    """

    def __init__(
        self,
        task: Task,
        protocol: EvaluationProtocol = OPENVLA,
        *,
        image_size: int | None = None,
        cameras: Sequence[str] = ("agentview",),
    ) -> None:
        if isinstance(cameras, str) or not cameras:
            raise SimulatorError(f"cameras are {cameras!r}; a sequence of at least one name needed")
        task.check_files()
        check_rendering()
        from libero.libero.envs.env_wrapper import ControlEnv

        self.task = task
        self.protocol = protocol
        self.image_size = protocol.image_size if image_size is None else image_size
        self.cameras = tuple(cameras)
        self._frames: dict[str, Frame] = {}
        self._observing = False
        self._step: int | None = None
        self._start_state: NDArray[np.float64] | None = None
        with _numpy_seed(protocol.seed):  # construction already draws a scene
            self._wrapper: Any = ControlEnv(
                bddl_file_name=str(task.bddl_file),
                use_camera_obs=False,  # the camera is ours, see above
                has_offscreen_renderer=False,  # opened when someone looks: where the CPU renders, most of a reset
                control_freq=protocol.control_hz,
                ignore_done=True,  # the step limit is the protocol's affair
            )
        _close_at_exit(self)
        existing = self.environment.sim.model.camera_names
        for camera in cameras:
            if camera not in existing:
                self.close()
                raise SimulatorError(
                    f"camera {camera!r} is not in the scene of {task}; existing: {', '.join(existing)}"
                )
        self._add_cameras()

    @functools.cached_property
    def initial_states(self) -> NDArray[np.float64]:
        """(N, 1 + nq + nv) fixed initial states of the task."""
        return self.task.initial_states()

    @property
    def environment(self) -> Any:
        """The robosuite environment below, with all that a policy is not shown: poses, contacts, the goal.

        Raises:
            SimulatorError: the simulator is closed.
        """
        if self._wrapper is None:
            raise SimulatorError(f"the simulator of {self.task} is closed")
        return self._wrapper.env

    @property
    def state(self) -> NDArray[np.float64]:
        """(1 + nq + nv,) simulation time [s], joint positions, joint velocities."""
        return self.environment.sim.get_state().flatten()

    @property
    def start_state(self) -> NDArray[np.float64]:
        """(1 + nq + nv,) state this episode began with, before the scene settled: what a replay needs.

        Raises:
            SimulatorError: `reset` was not called.
        """
        if self._start_state is None:
            raise SimulatorError("no episode has begun: call Simulator.reset first")
        return self._start_state

    @property
    def robot_state(self) -> NDArray[np.float64]:
        """(9,) positions of both fingers [m], position of the hand [m], its quaternion (x, y, z, w).

        LIBERO's `robot_states`, sampled at the same moment as the frames.
        """
        observed = self.environment._get_observations()
        return np.concatenate([observed[f"robot0_{key}"] for key in ("gripper_qpos", "eef_pos", "eef_quat")])

    @property
    def proprioception(self) -> NDArray[np.float64]:
        """(8,) position of the hand [m], its axis-angle [rad], positions of both fingers [m].

        The order of `observation.state` in LeRobot's and openpi's LIBERO data.
        """
        return proprioception(self.robot_state[None])[0]

    def reset(
        self, initial_state: int | ArrayLike | None = 0, *, seed: int | None = None, observe: bool = True
    ) -> StepResult:
        """Start an episode and let the scene settle.

        Args:
            initial_state: index of one of the task's fixed initial states, a (1 + nq + nv,) state, or None to
                have the simulator draw one, as for demonstrations.
            seed: places the fixtures, which a state does not hold, and draws the state where it is None; by
                default the protocol's first. NumPy's global generator, from which LIBERO draws, is left as it
                was found.
            observe: whether to render the settled scene.

        Returns:
            The settled scene, at step 0.

        Raises:
            InitialStateError: the index is out of range, or the state does not fit the scene.
            SimulatorError: no scene without colliding objects was found, or the simulator is closed.
        """
        environment = self.environment
        state = None if initial_state is None else self._checked_state(initial_state)
        self._step, self._frames = None, {}
        self._make_current()  # a reset frees the GL objects of the old scene, if there are any
        with _numpy_seed(self.protocol.seed if seed is None else seed):
            _draw_scene(environment)
        self._observing = observe and self.protocol.wait_steps == 0
        # A drawn state is set as well, so that replaying it later is the same episode to the last bit.
        self._wrapper.set_init_state(self.state if state is None else state)
        self._start_state = self.state
        dropped = FreeObjects.of(environment.sim)
        self._observing = False
        success = bool(environment._check_success())
        for left in reversed(range(self.protocol.wait_steps)):
            success = self._advance(np.asarray(NO_MOTION), observe=observe and left == 0)
        self._step = 0
        settling = FreeObjects.of(environment.sim).since(dropped)
        return StepResult(success, 0, MappingProxyType(self._frames), settling)

    def step(self, action: ArrayLike, *, observe: bool = True) -> StepResult:
        """Take one control step.

        Args:
            action: (7,) per-step deltas of position and axis-angle in controller units, clipped to [-1, 1] by
                robosuite, and the gripper, -1 open to +1 closed.
            observe: whether to render. Where the CPU renders, rendering is most of a step's cost.

        Raises:
            InvalidActionError: the action is not 7 wide or not finite.
            SimulatorError: `reset` was not called, or the simulator is closed.
        """
        checked = check_actions(action, shape=(ACTION_DIM,))
        if self._step is None:
            raise SimulatorError("step before reset: call Simulator.reset first")
        success = self._advance(checked, observe=observe)
        self._step += 1
        return StepResult(success, self._step, MappingProxyType(self._frames))

    def look(self) -> Frame:
        """(S, S, 3) uint8 image of the first camera as the scene is now, for people.

        Not for policies: the frames of `step` are sampled at another moment of the control step.
        """
        return self._render(self.cameras[0])

    def close(self) -> None:
        """Free the scene and its OpenGL context; may be called twice."""
        if self._wrapper is not None:
            self._make_current()
            self._wrapper.close()
            self._wrapper = None
            self._step = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _advance(self, action: NDArray[np.float64], *, observe: bool) -> bool:
        environment = self.environment
        self._observing, self._frames = observe, {}
        try:
            _, _, success, _ = environment.step(action)
        finally:
            self._observing = False
        if observe and not self._frames:
            raise SimulatorError(f"the cameras took no sample in a control step at {self.protocol.control_hz} Hz")
        return bool(success)

    def _add_cameras(self) -> None:
        from robosuite.utils.observables import Observable, sensor

        @sensor(modality="image")
        def sample(_: Any) -> NDArray[np.float64]:
            if self._observing:
                self._frames = {camera: self._render(camera) for camera in self.cameras}
            return np.zeros(1)  # robosuite stores this; the frames are kept here

        self.environment.add_observable(
            Observable("worldvla_cameras", sample, sampling_rate=self.protocol.control_hz, active=False)
        )

    def _render(self, camera: str) -> Frame:
        if self._renderer is None:
            self._open_renderer()
        self._make_current()
        image = self.environment.sim.render(camera_name=camera, width=self.image_size, height=self.image_size)
        # OpenGL's rows run upwards; like all published LIBERO data, turned by 180° rather than flipped.
        return np.ascontiguousarray(image[::-1, ::-1])

    @property
    def _renderer(self) -> Any:
        """The scene's OpenGL context, robosuite's; None until someone looks, and again after a reset."""
        return self.environment.sim._render_context_offscreen

    def _open_renderer(self) -> None:
        from robosuite.utils.binding_utils import MjRenderContextOffscreen

        environment = self.environment
        simulation = environment.sim
        # robosuite computes derived quantities anew here. Within a step they are those of the substep before
        # the positions, and that is the scene LIBERO's own camera sees.
        simulation.forward = lambda: None
        try:
            renderer = MjRenderContextOffscreen(simulation, device_id=environment.render_gpu_device_id)
        finally:
            del simulation.forward
        renderer.vopt.geomgroup[0] = environment.render_collision_mesh
        renderer.vopt.geomgroup[1] = environment.render_visual_mesh

    def _make_current(self) -> None:
        # robosuite draws into whichever context was made last: wrong with two simulators in a process.
        if self._renderer is not None:
            self._renderer.gl_ctx.make_current()

    def _checked_state(self, initial_state: int | ArrayLike) -> NDArray[np.float64]:
        if isinstance(initial_state, int | np.integer):
            count = len(self.initial_states)
            if not 0 <= initial_state < count:
                raise InitialStateError(f"initial state {initial_state} of {self.task}; allowed: 0 … {count - 1}")
            state = self.initial_states[int(initial_state)]
        else:
            state = np.asarray(initial_state, dtype=np.float64)
        if state.shape != self.state.shape or not np.isfinite(state).all():
            raise InitialStateError(
                f"initial state of {self.task} has shape {state.shape}; {self.state.shape} finite values needed"
            )
        return state


def check_actions(actions: ArrayLike, *, shape: tuple[int | None, ...]) -> NDArray[np.float64]:
    """Refuse what the robot cannot be sent: MuJoCo would go on with NaN, and robosuite only asserts the width.

    Args:
        actions: values of any real type.
        shape: the shape needed; None allows any length from 1.

    Returns:
        `shape` float64.

    Raises:
        InvalidActionError: another shape, or a value that is not finite.
    """
    array = np.asarray(actions, dtype=np.float64)
    fits = array.ndim == len(shape) and all(
        size == needed if needed is not None else size > 0 for size, needed in zip(array.shape, shape, strict=True)
    )
    if not fits:
        raise InvalidActionError(f"action has shape {array.shape}; {str(shape).replace('None', 'K')} needed")
    if not np.isfinite(array).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
        raise InvalidActionError(f"action value at {where} is {array[where]}; finite values needed")
    return array


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, the only one LIBERO draws from, and give it back untouched."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


def _draw_scene(environment: Any) -> None:
    """Reset below LIBERO's wrapper, whose `reset` retries for ever and swallows every exception, Ctrl-C too."""
    from robosuite.utils.errors import RandomizationError

    for _ in range(_PLACEMENT_ATTEMPTS):
        try:
            environment.reset()
        except RandomizationError:
            continue
        return
    raise SimulatorError(f"no placement without collisions in {_PLACEMENT_ATTEMPTS} attempts")


_open_simulators: weakref.WeakSet[Simulator] = weakref.WeakSet()


def _close_at_exit(simulator: Simulator) -> None:
    if not _open_simulators:
        # Exit handlers run last in, first out. Registered after the first context exists, this one runs before
        # robosuite's, which ends EGL; contexts freed after that raise noisily.
        atexit.unregister(_close_simulators)
        atexit.register(_close_simulators)
    _open_simulators.add(simulator)


def _close_simulators() -> None:
    for simulator in list(_open_simulators):
        simulator.close()
