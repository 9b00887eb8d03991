"""What a training run says of itself: a JSON line as soon as something is known, a CSV, a picture of curves."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

from worldvla_libero.figures import save_curves
from worldvla_tokenizers.files import write_text_atomic

LINES_FILE = "log.jsonl"
TABLE_FILE = "log.csv"
CURVES_FILE = "curves.png"


class RunLog:
    """The numbers of a run by step.

    Args:
        folder: of the run.
        step: at which the run goes on; what was logged after it, before an interruption, is dropped. 0 for a new
            run.

    Attributes:
        rows: one for each call of `write`, oldest first.
    """

    def __init__(self, folder: str | os.PathLike[str], *, step: int = 0) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows: list[dict[str, float]] = []
        path = self.folder / LINES_FILE
        if step and path.is_file():
            self.rows = [row for row in read_lines(path) if row["step"] <= step]
        write_text_atomic(path, "".join(_line(row) for row in self.rows))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Append what became known at a step. NaN and infinities are kept, as JSON null."""
        row = {"step": step, **values}
        self.rows.append(row)
        with (self.folder / LINES_FILE).open("a", encoding="utf-8") as file:
            file.write(_line(row))

    @property
    def seconds(self) -> float:
        """How long the run took up to its last row that says so, over all interruptions."""
        return max((row["seconds"] for row in self.rows if "seconds" in row), default=0.0)

    def draw(self) -> None:
        """Write the table and the picture anew, each whole."""
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        text = io.StringIO()
        table = csv.DictWriter(text, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        write_text_atomic(self.folder / TABLE_FILE, text.getvalue())
        if any(row.keys() - {"step", "seconds"} for row in self.rows):
            save_curves(self.folder / CURVES_FILE, self.rows)


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a log; a last line that was cut off by a kill is left out."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            rows.append({name: math.nan if value is None else value for name, value in row.items()})
    return rows


def _line(row: Mapping[str, float]) -> str:
    finite = {name: value if math.isfinite(value) else None for name, value in row.items()}
    return json.dumps(finite) + "\n"
