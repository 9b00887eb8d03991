"""Files of a LeRobotDataset v3.x: where the templates of `info.json` lead, tables, and the words of its tasks."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from worldvla_libero.data.episodes import EpisodeError, Reason
from worldvla_libero.lerobot.layout import INFO_FILE, TASKS_FILE
from worldvla_tokenizers.signatures import Kind, misnamed

# `{file_index}` or `{file_index:03d}`. Not `str.format`: that follows attributes and makes strings of any width.
_FIELDS = ("chunk_index", "file_index", "video_key", "episode_index", "episode_chunk")
_FIELD = re.compile(r"\{(" + "|".join(_FIELDS) + r")(?::(\d{0,2})[ds]?)?\}")

_DEEPEST = 50  # folders; glob calls itself for each

_MOST_ITEMS, _LONGEST_TEXT = 1_000_000, 100_000_000  # that Parquet's own reader takes

# Where the index of pandas goes that has no name: lerobot 0.4.0 to 0.4.3 keep the words there.
_UNNAMED_INDEX = "__index_level_0__"


@dataclass(frozen=True)
class Template:
    """A path template of `info.json`, such as `data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet`.

    Args:
        key: its key in `info.json`.
        text: what stands there. Version 2 has fields for an episode's number, of which some data sets were kept.

    Raises:
        EpisodeError: it makes no path, or one that leads out of the data set's folder.
    """

    key: str
    text: str

    def __post_init__(self) -> None:
        literal = _FIELD.sub("0", self.text) if isinstance(self.text, str) else ""
        if "{" in literal or "}" in literal or not _leads_inside(literal):
            raise EpisodeError(
                Reason.UNREADABLE,
                f"{INFO_FILE}: {self.key} is {self.text!r}, which makes no path inside the data set's folder; "
                f"allowed: a relative path without '..', with the fields {', '.join(_FIELDS)}, as in "
                "{file_index:03d}",
            )

    def path(self, values: Mapping[str, int | str]) -> str | None:
        """The path below the data set's folder; None where a value is missing or is of the wrong type.

        Raises:
            EpisodeError: a value leads out of the folder.
        """
        widths = dict(_FIELD.findall(self.text))
        if any(name not in values or (width and isinstance(values[name], str)) for name, width in widths.items()):
            return None
        return self._inside(_FIELD.sub(lambda field: _filled(values[field[1]], field[2]), self.text))

    def names(self, root: Path, values: Mapping[str, int | str]) -> list[str]:
        """Paths of all files that fit, whatever stands for the values not given; in the order of their numbers.

        Raises:
            EpisodeError: a value leads out of the folder.
        """
        pieces, end = [], 0
        for field in _FIELD.finditer(self.text):
            known = field[1] in values and not (field[2] and isinstance(values[field[1]], str))
            pieces += [glob.escape(self.text[end : field.start()])]
            pieces += [glob.escape(_filled(values[field[1]], field[2])) if known else "*"]
            end = field.end()
        return files_named(root, self._inside("".join(pieces) + glob.escape(self.text[end:])))

    def _inside(self, path: str) -> str:
        if not _leads_inside(path):
            raise EpisodeError(
                Reason.UNREADABLE, f"{INFO_FILE}: {self.key} leads to {path!r}, out of the data set's folder"
            )
        return path


def files_named(root: Path, *patterns: str) -> list[str]:
    """Files below a folder by patterns, hidden ones left out, in the order of their numbers (10 after 9)."""
    found = {
        path.relative_to(root)
        for pattern in patterns
        for path in root.glob(pattern)
        if not path.is_dir()  # a link to a file that is not there counts: its name says what is missing
    }
    names = [path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts)]
    return sorted(names, key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))


def require(existing: Iterable[str], names: Sequence[str], where: str) -> None:
    """Refuse what lacks a key.

    Raises:
        EpisodeError: names what is missing and what exists.
    """
    missing = [name for name in names if name not in existing]
    if missing:
        raise EpisodeError(
            Reason.MISSING_KEY, f"{where}: no {', '.join(missing)}; existing: {', '.join(existing) or 'nothing'}"
        )


@contextmanager
def parquet(root: Path, name: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of the data set, by its path below the folder.

    Raises:
        EpisodeError: it is missing or damaged, also where that shows only while it is read.
    """
    try:
        # No list or text in a file is longer than the file: a damaged length must not take memory.
        longest = max(1, (root / name).stat().st_size)
        limits = {
            "thrift_container_size_limit": min(longest, _MOST_ITEMS),
            "thrift_string_size_limit": min(longest, _LONGEST_TEXT),
        }
        with pq.ParquetFile(root / name, memory_map=True, **limits) as file:
            yield file
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:  # the last of words that are none
        message = f"{name}: missing, truncated or no Parquet file ({' '.join(str(error).split())})"
        raise EpisodeError(Reason.UNREADABLE, message + misnamed_note(root / name, "Parquet file")) from error


def misnamed_note(path: Path, expected: str) -> str:
    """What to add to a message about a file that cannot be read, if it is not what its name says."""
    try:
        # Parquet and MP4 have no signature there; what has one is something else.
        wrong = misnamed(path, expected, Kind.UNKNOWN, called=path.name)
    except OSError:
        return ""
    return f"; {wrong}" if wrong else ""


def records(root: Path, name: str) -> list[dict[str, Any]]:
    """Rows of a table of `meta`, Parquet or JSON lines, without columns of statistics.

    Raises:
        EpisodeError: it is missing or damaged.
    """
    if name.endswith(".parquet"):
        with parquet(root, name) as file:
            names = file.schema_arrow.names
            columns = [column for column in names if not column.startswith("stats/")]
            rows: list[dict[str, Any]] = file.read(columns=columns).select(columns).to_pylist()
            return rows
    try:
        rows = [json.loads(line) for line in (root / name).read_text("utf-8").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise EpisodeError(Reason.UNREADABLE, f"{name}: missing, or its lines are no JSON ({error})") from error
    if not all(isinstance(row, dict) for row in rows):
        raise EpisodeError(Reason.UNREADABLE, f"{name}: lines of JSON objects needed")
    return rows


def whole_numbers(column: pa.Array | pa.ChunkedArray, name: str, *, empty: int | None = None) -> NDArray[np.int64]:
    """A column of whole numbers, however they are stored: some writers make lists of one of them.

    Args:
        column: of a table.
        name: what messages call it.
        empty: stands for nothing; None where there has to be something in every row.

    Raises:
        EpisodeError: they are not one whole number a row.
    """
    try:
        values = pc.list_flatten(column) if pa.types.is_nested(column.type) else column
        values = values.cast(pa.int64()) if empty is None else values.cast(pa.int64()).fill_null(empty)
        numbers: NDArray[np.int64] = values.to_numpy(zero_copy_only=False)
    except (pa.ArrowException, TypeError) as error:
        raise EpisodeError(Reason.UNREADABLE, f"{name} holds no whole numbers ({error})") from error
    if values.null_count or len(numbers) != len(column):
        raise EpisodeError(Reason.UNREADABLE, f"{name} is empty in some rows; one whole number a row needed")
    return numbers


def whole(value: Any) -> int | None:
    """A count or index, 0 or above; None for anything else: an index may hold NaN, or nothing."""
    usable = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if usable and value >= 0 else None


def words(value: Any) -> list[str]:
    """Words in a cell that holds a string or a list of them; those that say nothing are left out."""
    cells = value if isinstance(value, list) else [value]
    return [cell for cell in cells if isinstance(cell, str) and cell.strip()]


@dataclass(frozen=True)
class Tasks:
    """The words of every task.

    Attributes:
        words: by the number that rows call `task_index`.
        source: the files they come from, or why there are none.
    """

    words: Mapping[int, str]
    source: str

    @classmethod
    def read(cls, root: Path) -> Tasks:
        """Read `meta/tasks.parquet`; else what it was called before, or in converters' documentation."""
        problems = []
        for names in ([TASKS_FILE], files_named(root, "meta/tasks/**/*.parquet"), ["meta/tasks.jsonl"]):
            try:
                found = {number: text for name in names for number, text in _tasks(records(root, name), name)}
            except EpisodeError as error:
                problems.append(error.message)
                continue
            if found:
                return cls(found, ", ".join(names))
        return cls({}, problems[0] if problems else f"{TASKS_FILE} (it is empty)")


def _tasks(rows: Sequence[Mapping[str, Any]], name: str) -> Iterator[tuple[int, str]]:
    """Numbers and words of a table that pandas may have written, with the words or the numbers as its index."""
    columns = [*dict.fromkeys(column for row in rows for column in row)]
    text = [c for c in columns if any(isinstance(row.get(c), str) and words(row[c]) for row in rows)]
    usual = [c for c in ("task", _UNNAMED_INDEX) if c in text]
    if not usual and len(text) != 1:
        require(columns, ["task"], name)
        raise EpisodeError(Reason.MISSING_KEY, f"{name}: its column task holds no words")
    wanted = (usual or text)[0]
    numbered = next((c for c in ("task_index", _UNNAMED_INDEX) if c in columns and c != wanted), None)
    for index, row in enumerate(rows):
        # pandas writes an index that only counts from 0 into no column at all.
        number = whole(row.get(numbered)) if numbered else index
        cell = row.get(wanted)
        if number is not None and isinstance(cell, str) and words(cell):
            yield number, cell


def _filled(value: int | str, width: str) -> str:
    return f"{value:0{width}d}" if width else str(value)


def _leads_inside(path: str) -> bool:
    """Whether a path stays below the folder it starts from, by its words alone, on any system.

    The files themselves may be links to elsewhere, as in the Hub's cache.
    """
    parts = PureWindowsPath(path)  # splits at "/" too, and knows drives
    relative = not parts.anchor and ".." not in parts.parts and path.isprintable()
    return relative and 0 < len(parts.parts) <= _DEEPEST
