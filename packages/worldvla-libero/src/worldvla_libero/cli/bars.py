"""Bars of what is done and what is left: the same for all commands that take long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


def counting_bars(console: Console, *fields: str) -> Progress:
    """Bars with a name, a count, and the time passed and left.

    Args:
        console: where they are drawn.
        fields: of each task, shown in yellow after its count.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *(TextColumn(f"{{task.fields[{field}]}}", style="yellow") for field in fields),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def phase_bars(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each phase from when it is first heard of: (phase, done, total)."""
    with counting_bars(console) as bars:
        known: dict[str, TaskID] = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in known:
                known[phase] = bars.add_task(phase)
            bars.update(known[phase], completed=done, total=total)

        yield show
