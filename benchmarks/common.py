"""What the scripts in this folder share: on which machine they ran, how busy it was, and how tables look."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from worldvla_libero.versions import installed_versions

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Others:
    """Processor seconds that were not ours.

    Attributes:
        seconds: of all other processes of the machine, and those that its host took away.
        wall: seconds of the clock.
    """

    seconds: float = 0.0
    wall: float = 0.0

    @property
    def cores(self) -> float:
        """How many cores the others kept busy on average."""
        return self.seconds / self.wall


@contextmanager
def watching_others() -> Iterator[Others]:
    """Over a stretch of work, started processes and all, provided that they have ended: what did others use?"""
    others = Others()
    busy, own, began = _busy_seconds(), own_seconds(), os.times().elapsed
    try:
        yield others
    finally:
        others.wall = os.times().elapsed - began
        others.seconds = max(0.0, _busy_seconds() - busy - (own_seconds() - own))


def print_machine(**settings: object) -> None:
    """What the figures below depend on."""
    described = platform.processor() or platform.machine()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        described = next(
            (line.split(": ")[1].strip() for line in file if line.startswith("model name")), described
        )
    versions = {**installed_versions(), **installed_versions(["pyarrow", "datasets"])}
    print(f"machine   {described}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}")
    print("load      " + load())
    print("versions  " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    print("settings  " + ", ".join(f"{name} {value}" for name, value in settings.items()))


def print_others(others: Others) -> None:
    """How far the figures above can be trusted."""
    print(f"\nload      {load()} at the end; other processes kept {others.cores:.2f} cores busy on average")
    if others.cores > 0.1:
        print("          NOT A QUIET MACHINE: figures of speed are too low, and ratios of them uncertain")


def own_seconds() -> float:
    """Processor seconds of this process and of those it started, once they have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def load() -> str:
    return "{:.2f} {:.2f} {:.2f}".format(*os.getloadavg())


def table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> None:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for first, *others in [head, *rows]:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("   " + "  ".join([first.ljust(widths[0]), *cells]).rstrip())


def yes(reached: bool) -> str:
    return "yes" if reached else "NO"


def _busy_seconds() -> float:
    user, nice, system, _, _, *interrupts_and_stolen = map(
        int, Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + sum(interrupts_and_stolen)) / _TICK
