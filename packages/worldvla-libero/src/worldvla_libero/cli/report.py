"""The command that shows results: `worldvla report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

EXIT_OK = 0


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN…")],
    out: Path = Path("worldvla-report"),
    videos: int = 6,
) -> int:
    """Write one page, and pictures of its figures, of evaluations and world-model runs side by side.

    Args:
        runs: Folders that `worldvla evaluate` wrote, also of a run that is not over, or that `worldvla imagine`
            wrote, when it is over.
        out: Folder for index.html and the pictures.
        videos: Embed the videos of so many episodes, failures and successes in turn; the others are linked.
    """
    from rich.console import Console
    from rich.filesize import decimal

    from worldvla_libero.evaluation.report import write_report

    page, *pictures = write_report(runs, out, videos=videos)
    console = Console()
    console.print(
        f"look at it: {page} ({decimal(page.stat().st_size)})", highlight=False, markup=False, soft_wrap=True
    )
    console.print(
        f"pictures: {', '.join(path.name for path in pictures)}", style="dim", highlight=False, soft_wrap=True
    )
    return EXIT_OK
