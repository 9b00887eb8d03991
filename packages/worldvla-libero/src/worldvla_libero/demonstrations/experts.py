"""Scripted demonstrators: they read the goal of a task and the poses of everything, and act it out."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from worldvla_libero.conventions import ACTION_DIM
from worldvla_libero.demonstrations.grasps import FINGERTIP, Grasp, arm_slack, clearance, hand_rotation, plan_grasp
from worldvla_libero.demonstrations.scene import Array, Boxes, Scene
from worldvla_libero.simulator.simulator import Simulator
from worldvla_libero.simulator.suites import Task

OPEN, CLOSED = -1.0, 1.0

# robosuite's OSC_POSE controller: what an action of 1 asks for, and how much of it a step accomplishes.
_METRES_PER_ACTION = 0.05
_RADIANS_PER_ACTION = 0.5
_GAIN = 1.6

# The field's no-op filter drops actions whose motion has a norm below 1e-4 unless the gripper changes, and a
# replay of what is left would then not step where we did. So the script never sends one.
_LEAST_MOTION = 2e-3

_ABOVE = 0.06  # height over a grasp at which the fingers come straight down [m]
_SPARE = 0.03  # kept between what is carried and what it is carried over [m]
_UP = np.array([0.0, 0.0, 1.0])

# Where the scripts have been measured; and what is out of their reach there: the fingers do not fit between the
# plate and the handles of the cabinet, from where it would have to be pushed, nor can they hold it by its rim.
_SUITES = ("libero_spatial", "libero_object", "libero_goal")
_UNSOLVED = frozenset({("libero_goal", "push_the_plate_to_the_front_of_the_stove")})


class NoExpertError(ValueError):
    """No script can do this task."""


def has_expert(task: Task) -> bool:
    """Whether there is a script for a task."""
    return task.suite in _SUITES and (task.suite, task.name) not in _UNSOLVED


@dataclass(frozen=True)
class ExpertStyle:
    """How an attempt differs from others.

    Attributes:
        speed: largest action, as a fraction of the controller's range.
        noise: standard deviation of the noise on the six motion values of every action, in controller units.
        height: added to the height of waypoints in the air [m].
        grasp_offset: (2,) displacement of the grasp along x and y [m].
    """

    speed: float = 1.0
    noise: float = 0.0
    height: float = 0.0
    grasp_offset: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> ExpertStyle:
        """Draw a style."""
        x, y = rng.normal(0.0, 0.002, 2).clip(-0.004, 0.004)
        return cls(
            speed=float(rng.uniform(0.8, 1.0)),
            noise=float(rng.uniform(0.01, 0.06)),
            height=float(rng.uniform(0.0, 0.04)),
            grasp_offset=(float(x), float(y)),
        )


@dataclass(frozen=True, eq=False)
class Setpoint:
    """Where the hand should be.

    Attributes:
        position: (3,) of the grip site [m].
        rotation: (3, 3) of the grip site: x is the closing direction, z points where the fingers do.
        gripper: `OPEN` or `CLOSED`.
        pace: fraction of the style's speed.
    """

    position: Array
    rotation: Array
    gripper: float
    pace: float = 1.0


Script = Generator[Setpoint, None, None]
Attempt = Generator[Setpoint, None, bool]  # a part of a script that may fail, and then says so


class ScriptedExpert:
    """Acts out a task from privileged state.

    A skill is a generator: it yields where the hand should be and finds the scene one control step later when
    it goes on. So skills look at what they did, and try again what did not work.

    Attributes:
        scene: what it knows.
        phase: what it is doing, for whoever looks into a failure.

    Args:
        simulator: the task, reset.
        style: speed, noise and the like.
        rng: source of the noise.

    Raises:
        NoExpertError: there is no script for the task.
    """

    def __init__(self, simulator: Simulator, style: ExpertStyle, rng: np.random.Generator) -> None:
        if not has_expert(simulator.task):
            unsolved = ", ".join(name.replace("_", " ") for _, name in sorted(_UNSOLVED))
            raise NoExpertError(
                f"no script for {simulator.task}; there is one for each task of {', '.join(_SUITES)} except "
                f"{unsolved!r}. Demonstrations of other tasks come from LIBERO's own files"
            )
        self.scene = Scene(simulator)
        self.style = style
        self.phase = ""
        self._rng = rng
        self._script = self._act_out()

    def act(self) -> Array:
        """Choose the next action from the simulator's present state.

        Returns:
            (7,) deltas of position and axis-angle in controller units, and the gripper; all within [-1, 1].
        """
        setpoint = next(self._script)
        limit = self.style.speed * setpoint.pace
        move = (setpoint.position - self.scene.hand) * _GAIN / _METRES_PER_ACTION
        turn = _axis_angle(self.scene.rotation, setpoint.rotation) * _GAIN / _RADIANS_PER_ACTION
        motion = np.concatenate([_limited(move, limit), _limited(turn, limit)])
        motion = (motion + self._rng.normal(0.0, self.style.noise, 6)).clip(-1.0, 1.0)
        if np.linalg.norm(motion) < _LEAST_MOTION:
            motion[2] = _LEAST_MOTION
        return np.append(motion, setpoint.gripper)

    def _act_out(self) -> Script:
        """Attain every predicate of the goal, again if need be, and then hold still."""
        while True:
            for predicate in self.scene.goal:
                if not self.scene.holds(predicate):
                    yield from _SKILLS[predicate[0]](self, *predicate[1:])
            yield from self._hold(OPEN, 1)

    def _move(
        self,
        position: Array,
        rotation: Array,
        gripper: float,
        *,
        pace: float = 1.0,
        tolerance: float = 0.01,
        patience: int = 80,
    ) -> Attempt:
        """Go there; whether the hand arrived before patience [steps] ran out."""
        for _ in range(patience):
            turn = np.linalg.norm(_axis_angle(self.scene.rotation, rotation))
            if np.linalg.norm(self.scene.hand - position) < tolerance and turn < 0.1:
                return True
            yield Setpoint(position, rotation, gripper, pace)
        return False

    def _hold(self, gripper: float, steps: int) -> Script:
        position, rotation = self.scene.hand, self.scene.rotation
        for _ in range(steps):
            yield Setpoint(position, rotation, gripper)

    def _close(self) -> Script:
        """Close until the fingers have stopped."""
        position, rotation = self.scene.hand, self.scene.rotation
        openings: list[float] = []
        while len(openings) < 20:
            yield Setpoint(position, rotation, CLOSED)
            openings.append(self.scene.opening)
            if len(openings) > 4 and np.ptp(openings[-3:]) < 1e-3:
                return

    def _clear_height(self, to: Array, obstacles: Boxes) -> float:
        """Height [m] at which nothing is in the way of the fingertips, from here to there."""
        return float(obstacles.near(self.scene.hand, to, 0.12).tops.max()) + _SPARE + self.style.height

    def _go_above(self, position: Array, rotation: Array, gripper: float) -> Script:
        """Over everything in the way to a place from which to come straight down to a position."""
        height = self._clear_height(position, self.scene.obstacles()) - FINGERTIP
        height = max(height, position[2] + _ABOVE + self.style.height)
        here = self.scene.hand
        if here[2] < height:
            yield from self._move(np.array([*here[:2], height]), rotation, gripper, tolerance=0.05)
        yield from self._move(np.array([*position[:2], height]), rotation, gripper, tolerance=0.015)

    def _put(self, name: str, region: str) -> Script:
        """Attain (In name region) or (On name region)."""
        while self.scene.drawer(region) is not None and not self.scene.holds(["open", region]):
            yield from self._open(region)
        failed: list[Grasp] = []
        while True:
            obstacles = self.scene.obstacles(name)
            grasp = plan_grasp(self.scene.boxes(name), obstacles, self.scene.shoulder, avoid=failed)
            if grasp is None:
                failed.clear()
                yield from self._hold(OPEN, 10)
            elif (yield from self._pick(name, grasp)) and (yield from self._place(name, region, grasp)):
                return
            else:
                failed.append(grasp)

    def _pick(self, name: str, grasp: Grasp) -> Attempt:
        scene, planned_for = self.scene, self.scene.position(name)
        at = grasp.position + (*self.style.grasp_offset, 0.0)
        self.phase = "above"
        yield from self._go_above(at, grasp.rotation, OPEN)
        if np.linalg.norm(scene.position(name) - planned_for) > 0.01:
            return False  # some scenes are not at rest when the episode begins
        self.phase = "down"
        yield from self._move(at, grasp.rotation, OPEN, pace=0.8, tolerance=0.006, patience=40)
        self.phase = "close"
        yield from self._close()
        self.phase = "lift"
        before = scene.position(name)[2]
        yield from self._move(at + (0, 0, 0.05), grasp.rotation, CLOSED, pace=0.7, tolerance=0.015)
        return scene.position(name)[2] > before + 0.02

    def _place(self, name: str, region: str, grasp: Grasp) -> Attempt:
        scene, obstacles = self.scene, self.scene.obstacles(name)
        grip = scene.hand - scene.position(name)
        hang = scene.hand[2] - scene.boxes(name).bottoms.min()
        self.phase = "carry"
        yield from self._come_out(name, grasp)
        goals = scene.surfaces(region)
        height = self._clear_height(goals[0], obstacles) + hang
        overs = np.column_stack([goals[:, :2] + grip[:2], np.full(len(goals), height)])
        chosen = int(np.argmax(np.minimum(arm_slack(overs, scene.shoulder), 0)))  # the first within reach
        goal, over = goals[chosen], overs[chosen]
        yield from self._move(np.array([*scene.hand[:2], over[2]]), grasp.rotation, CLOSED, tolerance=0.03)
        yield from self._move(over, grasp.rotation, CLOSED, tolerance=0.01)
        slipped = scene.hand - scene.position(name) - grip
        if np.linalg.norm(slipped) > 0.05:
            return False
        self.phase = "lower"
        grip += slipped
        column = goal + (grip[0], grip[1], hang + 0.004) + np.outer(np.arange(0, 0.3, 0.005), (0, 0, 1))
        free = clearance(column, grasp.yaw, obstacles) > 0.004
        yield from self._move(column[np.argmax(free)], grasp.rotation, CLOSED, tolerance=0.008, patience=30)
        self.phase = "release"
        yield from self._hold(OPEN, 6)
        self.phase = "retreat"
        yield from self._move(scene.hand + (0, 0, 0.1), grasp.rotation, OPEN, tolerance=0.03)
        return True

    def _come_out(self, name: str, grasp: Grasp) -> Script:
        """Carry something sideways from below whatever it would be lifted against, such as an open drawer."""
        boxes = self.scene.boxes(name)
        middle = (boxes.centres.min(axis=0) + boxes.centres.max(axis=0)) / 2
        radius = float(np.linalg.norm(boxes.centres - middle, axis=1).max()) + 0.01
        obstacles = self.scene.obstacles(name)
        above = obstacles[obstacles.tops > boxes.bottoms.min()]
        angles = np.arange(16) * np.pi / 8
        around = np.column_stack([np.cos(angles), np.sin(angles), np.zeros(16)])
        for distance in np.arange(0, 0.2, 0.02):
            for aside in distance * around:
                if not len(above.near(middle + aside, middle + aside, radius)):
                    if distance:
                        yield from self._move(self.scene.hand + aside, grasp.rotation, CLOSED, tolerance=0.015)
                    return

    def _open(self, region: str) -> Script:
        """Attain (Open region): pull a drawer by the bar of its handle."""
        drawer = self.scene.drawer(region)
        assert drawer is not None  # in the suites there are scripts for, nothing else is opened
        out = drawer.direction
        # The fingers come nearly level, because the handles of other drawers are above and below.
        tilt = np.radians(70)
        approach = -np.sin(tilt) * out - np.cos(tilt) * _UP
        closing = np.cos(tilt) * out - np.sin(tilt) * _UP
        rotation = hand_rotation(closing, approach)
        handle = drawer.boxes.centres[np.argmax(drawer.boxes.centres @ out)]
        self.phase = "before handle"
        yield from self._move(handle - 0.12 * approach, rotation, OPEN, tolerance=0.02)
        self.phase = "at handle"
        yield from self._move(handle, rotation, OPEN, pace=0.6, tolerance=0.01, patience=30)
        self.phase = "close"
        yield from self._close()
        self.phase = "pull"
        for _ in range(60):
            if self.scene.holds(["open", region]):
                break
            yield Setpoint(handle + 0.2 * out, rotation, CLOSED, pace=0.8)
        self.phase = "let go"
        yield from self._hold(OPEN, 4)
        yield from self._move(self.scene.hand - 0.1 * approach, rotation, OPEN, tolerance=0.03)

    def _turn_on(self, fixture: str) -> Script:
        """Attain (TurnOn fixture): turn a knob by its ridge."""
        knob = self.scene.knob(fixture)
        grasp = plan_grasp(knob.boxes, knob.others, self.scene.shoulder)
        assert grasp is not None  # the ridge stands free
        self.phase = "above"
        yield from self._go_above(grasp.position, grasp.rotation, OPEN)
        self.phase = "down"
        yield from self._move(grasp.position, grasp.rotation, OPEN, pace=0.6, tolerance=0.006, patience=40)
        self.phase = "close"
        yield from self._close()
        self.phase = "turn"
        for angle in np.linspace(0, 1.2, 40):
            turned = _rotation_about(knob.direction, angle)
            position = knob.anchor + turned @ (grasp.position - knob.anchor)
            yield Setpoint(position, turned @ grasp.rotation, CLOSED)
        self.phase = "let go"
        yield from self._hold(OPEN, 4)
        yield from self._move(self.scene.hand + (0, 0, 0.1), self.scene.rotation, OPEN, tolerance=0.03)


_SKILLS: Mapping[str, Callable[..., Script]] = MappingProxyType(
    {
        "in": ScriptedExpert._put,
        "on": ScriptedExpert._put,
        "open": ScriptedExpert._open,
        "turnon": ScriptedExpert._turn_on,
    }
)


def _limited(vector: Array, limit: float) -> Array:
    """Shorten a vector to a length."""
    return vector * min(1.0, limit / max(float(np.linalg.norm(vector)), 1e-9))


def _axis_angle(rotation: Array, wanted: Array) -> Array:
    """(3,) axis-angle [rad] from one (3, 3) rotation of the hand to another, or to its mirror image.

    The gripper is symmetric: the fingers may change places where that is the shorter way.
    """
    if wanted[:, 0] @ rotation[:, 0] < 0:
        wanted = wanted * (-1, -1, 1)
    sine_axis = np.cross(rotation, wanted, axis=0).sum(axis=1) / 2
    sine, cosine = float(np.linalg.norm(sine_axis)), (float(np.sum(rotation * wanted)) - 1) / 2
    return sine_axis * (np.arctan2(sine, cosine) / max(sine, 1e-9))


def _rotation_about(axis: Array, angle: float) -> Array:
    """(3, 3) rotation by an angle [rad] about a unit axis."""
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


@dataclass(frozen=True, eq=False)
class Demonstration:
    """One scripted episode, in LIBERO's raw form.

    Attributes:
        actions: (T, 7) float64, each within [-1, 1].
        states: (T, 1 + nq + nv) float64. Row t is the state before action t, but row 0 the one from which
            `Simulator.reset(states[0], seed=seed)` starts the episode again, before the scene settled.
        robot_states: (T, 9) float64, as `Simulator.robot_state` before each action.
        seed: of the simulator, the style and the noise.
        success: whether the goal was reached, with the last action.
        style: how it was done.
    """

    actions: Array
    states: Array
    robot_states: Array
    seed: int
    success: bool
    style: ExpertStyle


def demonstrate(simulator: Simulator, *, seed: int, max_steps: int | None = None) -> Demonstration:
    """Act out a task once, from a start state that the simulator draws: never one kept for evaluation.

    Args:
        simulator: the task.
        seed: settles everything; the same seed gives the same episode to the last bit.
        max_steps: step limit; default the protocol's for the task.

    Raises:
        NoExpertError: there is no script for the task.
        SimulatorError: the simulator failed.
    """
    limit = simulator.protocol.step_limit(simulator.task) if max_steps is None else max_steps
    result = simulator.reset(None, seed=seed, observe=False)
    rng = np.random.default_rng(seed)
    style = ExpertStyle.draw(rng)
    expert = ScriptedExpert(simulator, style, rng)
    actions: list[Array] = []
    states: list[Array] = []
    robot_states: list[Array] = []
    while result.step < limit and not result.success:
        states.append(simulator.state if actions else simulator.start_state)
        robot_states.append(simulator.robot_state)
        actions.append(expert.act())
        result = simulator.step(actions[-1], observe=False)
    return Demonstration(
        np.array(actions).reshape(-1, ACTION_DIM),
        np.array(states),
        np.array(robot_states),
        seed,
        result.success,
        style,
    )
