"""The command that makes the default model: `worldvla make-nano`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from worldvla_libero.cli.bars import counting_bars
from worldvla_libero.cli.model import Flat
from worldvla_libero.nano.settings import NanoSettings

EXIT_OK = 0


def make_nano(
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")] = Path("worldvla-nano"),
    demos: Path | None = None,
    workers: int = 2,
    cpu: bool = False,
    settings: Annotated[NanoSettings, Flat] = NanoSettings(),
) -> int:
    """Make a small model that drives and imagines from nothing: demonstrations, tokenizer, training, card.

    The training alone of the one that comes with this package took more than five hours on two CPU cores.
    Interrupted, the same command goes on.

    Args:
        out: Folder for everything; the model is in its folder nano.
        demos: Raw demonstrations to take in place of collecting some.
        workers: Processes that simulate; each needs a core.
        cpu: Leave a GPU alone.
        settings: Of what.
    """
    from rich.console import Console

    from worldvla_libero.nano.card import tables
    from worldvla_libero.nano.making import make_nano as run

    console = Console()
    with counting_bars(console) as bars:

        def begin(stage: str) -> None:
            bars.add_task(stage, total=None)
            if stage == "model":  # the trainer draws a bar of its own
                bars.stop()
            else:
                bars.start()

        def advance(done: int, total: int) -> None:
            bars.update(bars.task_ids[-1], completed=done, total=total)

        measured = run(out, settings, demos=demos, workers=workers, cpu=cpu, on_stage=begin, on_progress=advance)
    console.print(tables(measured), highlight=False, markup=False)
    console.print(f"wrote {out / 'nano'}", highlight=False, markup=False)
    return EXIT_OK
