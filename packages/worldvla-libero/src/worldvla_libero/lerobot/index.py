"""Which episodes a LeRobotDataset holds: the rows say it themselves, and `meta/episodes` is but a hint.

Official and converted data sets have indices that lack columns or point to wrong files, while every row knows its
episode, its place in it and its task. These three columns of numbers are read once, of all files; images are not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from worldvla_libero.data.episodes import EpisodeError, Reason
from worldvla_libero.jobs.parts import Dropped
from worldvla_libero.lerobot.files import (
    Tasks,
    Template,
    files_named,
    parquet,
    records,
    require,
    whole,
    whole_numbers,
    words,
)
from worldvla_libero.lerobot.layout import DATA_PATH, FILES_PER_CHUNK, INFO_FILE

INDEX_FOLDER = "meta/episodes"
# As lerobot writes it, flat, in one file, and as version 2 called it.
_INDEX_PATTERNS = (f"{INDEX_FOLDER}/**/*.parquet", f"{INDEX_FOLDER}.parquet", f"{INDEX_FOLDER}.jsonl")
_NO_TASK = -1  # what some writers put where no task is meant, others leaving it empty


@dataclass(frozen=True)
class Rows:
    """Where all rows of an episode are.

    Attributes:
        steps: how many.
        parts: files and their row groups that hold some of them.
        tasks: numbers of its tasks, in order; empty where rows have none.
    """

    steps: int
    parts: Sequence[tuple[str, Sequence[int]]]
    tasks: Sequence[int]


@dataclass(frozen=True)
class EpisodeIndex:
    """What a data set holds.

    Attributes:
        rows: of every whole episode, by number.
        hints: of every episode in `meta/episodes`, what it says of it; nothing that is empty.
        tasks: the words of the tasks.
        dropped: why episodes cannot be used, by number.
        unreadable: files of rows that cannot be read, and rows that are promised but in no file.
    """

    rows: Mapping[int, Rows]
    hints: Mapping[int, Mapping[str, Any]]
    tasks: Tasks
    dropped: Mapping[int, Dropped]
    unreadable: Sequence[Dropped]

    @classmethod
    def read(cls, root: Path, info: Mapping[str, Any]) -> EpisodeIndex:
        """Look through all rows.

        Raises:
            EpisodeError: there is no file with rows, or `data_path` leads to none.
        """
        template = Template("data_path", info.get("data_path") or DATA_PATH)
        files = template.names(root, {})
        # Also what was put there by hand, under names of its own.
        files += [name for name in files_named(root, "data/**/*.parquet") if name not in files]
        if not files:
            raise EpisodeError(
                Reason.UNREADABLE,
                f"{root}: no file of rows as {INFO_FILE} names them ({template.text}), nor any Parquet file in "
                "data; download or copy it again",
            )
        found: dict[int, dict[str, _Part]] = {}
        unreadable = []
        for name in files:
            try:
                scanned = _scan(root, name)
            except EpisodeError as error:
                unreadable.append(Dropped.because(name, error))
                continue
            for number, part in scanned.items():
                found.setdefault(number, {})[name] = part
        hints = _hints(root)
        present = sum(part.steps for parts in found.values() for part in parts.values())
        promised = whole(info.get("total_frames"))
        lost = promised is None or present < promised
        problems = {drop.id: drop.message for drop in unreadable}
        rows, dropped = dict[int, Rows](), dict[int, Dropped]()
        for number in sorted({*found, *hints}):
            id, hint = episode_id(number), hints.get(number, {})
            hinted = template.path({**numbering(number, info), **file_indices(hint, "data")})
            try:
                if number not in found:
                    said = problems.get(hinted or "", f"{INDEX_FOLDER} names {hinted or 'none'}")
                    message = f"{id}: no rows in any file that can be read; {said}; download or copy it again"
                    raise EpisodeError(Reason.UNREADABLE, message)
                rows[number] = _whole_episode(id, found[number], hinted, whole(hint.get("length")), lost)
            except EpisodeError as error:
                dropped[number] = Dropped.because(id, error)
        episodes = whole(info.get("total_episodes")) or 0
        # An episode too many in info.json alone is an old count. With rows missing as well, episodes are.
        if not unreadable and len(rows) + len(dropped) < episodes and promised is not None and present < promised:
            message = (
                f"{len(rows)} whole episodes and {present} rows in all files; {INFO_FILE} promises {episodes} and "
                f"{promised}; download or copy the data set again"
            )
            unreadable.append(Dropped("data", str(Reason.UNREADABLE), message))
        return cls(rows, hints, Tasks.read(root), dropped, unreadable)

    def find(self, number: int) -> Rows:
        """Where an episode's rows are.

        Raises:
            EpisodeError: they are not there, or not whole.
            KeyError: nobody speaks of such an episode.
        """
        if number in self.dropped:
            drop = self.dropped[number]
            raise EpisodeError(Reason(drop.reason), drop.message)
        return self.rows[number]

    def task(self, number: int) -> str:
        """The words of an episode: by its rows' `task_index`, else as `meta/episodes` has them.

        Raises:
            EpisodeError: there are none, or they change on the way.
        """
        id, numbers = episode_id(number), self.rows[number].tasks
        missing = [task for task in numbers if task not in self.tasks.words]
        if numbers and not missing:
            return _only_task(id, [self.tasks.words[task] for task in numbers])
        if len(numbers) <= 1:
            hint = self.hints.get(number, {})
            if said := words(hint.get("tasks", hint.get("task"))):
                return _only_task(id, said)
            if not numbers and len(self.tasks.words) == 1:
                return next(iter(self.tasks.words.values()))
        if missing and self.tasks.words:
            known = ", ".join(map(str, self.tasks.words))
            raise EpisodeError(
                Reason.MISSING_KEY, f"{id}: no task_index {missing[0]} in {self.tasks.source}; existing: {known}"
            )
        lacking = "no words for its task_index" if numbers else "no task_index in its rows"
        raise EpisodeError(
            Reason.MISSING_KEY, f"{id}: {lacking}, and no tasks in {INDEX_FOLDER}; {self.tasks.source}"
        )


def episode_id(number: int) -> str:
    """What an episode is called, by its number."""
    return f"episode_{number:06d}"


def numbering(number: int, info: Mapping[str, Any]) -> dict[str, int | str]:
    """Values of path templates that follow from an episode's number, as in version 2."""
    return {
        "episode_index": number,
        "episode_chunk": number // (whole(info.get("chunks_size")) or FILES_PER_CHUNK),
    }


def read_rows(
    root: Path, number: int, rows: Rows, columns: Sequence[str], *, optional: Sequence[str] = ()
) -> dict[str, list[Any]]:
    """The rows of an episode, in the order of their `frame_index` whatever the file's.

    Args:
        root: the data set's folder.
        number: of the episode.
        rows: where they are.
        columns: which.
        optional: those of them that a file may lack; then they are left out.

    Raises:
        EpisodeError: a file is damaged or has changed since, or lacks a column.
    """
    values: dict[str, list[Any]] = {column: [] for column in columns}
    frames: list[int] = []
    for name, groups in rows.parts:
        with parquet(root, name) as file:
            existing = file.schema_arrow.names
            ordered = "frame_index" in existing
            values = {column: values[column] for column in values if column in existing or column not in optional}
            wanted = [*dict.fromkeys([*values, "episode_index", *(["frame_index"] if ordered else [])])]
            require(existing, wanted, name)
            if max(groups) >= file.num_row_groups:
                raise EpisodeError(Reason.UNREADABLE, f"{name} has changed while it was used")
            # Rows of images are large: some at a time, of which other episodes' are let go.
            for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=wanted):
                mine = whole_numbers(batch["episode_index"], f"{name}: episode_index") == number
                batch = batch.filter(pa.array(mine))
                for column in values:
                    values[column] += batch[column].to_pylist()
                if ordered:
                    frames += whole_numbers(batch["frame_index"], f"{name}: frame_index").tolist()
                else:
                    frames += range(len(frames), len(frames) + batch.num_rows)
    order = np.argsort(np.asarray(frames), kind="stable")
    if not _counts(np.asarray(frames)[order]) or len(frames) != rows.steps:
        files = ", ".join(name for name, _ in rows.parts)
        raise EpisodeError(
            Reason.UNREADABLE, f"{episode_id(number)}: {files} changed while it was used: {len(frames)} rows left"
        )
    return {column: [cells[row] for row in order] for column, cells in values.items()}


@dataclass
class _Part:
    """Rows of one episode in one file."""

    groups: list[int] = field(default_factory=list)
    frames: list[NDArray[np.int64]] = field(default_factory=list)
    tasks: list[int] = field(default_factory=list)
    steps: int = 0


def _scan(root: Path, name: str) -> dict[int, _Part]:
    """What a file holds of each episode."""
    found: dict[int, _Part] = {}
    with parquet(root, name) as file:
        existing = file.schema_arrow.names
        require(existing, ["episode_index"], name)
        columns = [c for c in ("episode_index", "frame_index") if c in existing]
        tasked = ["task_index"] if "task_index" in existing else []
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[*columns, *tasked])
            numbers = {column: whole_numbers(table[column], f"{name}: {column}") for column in columns}
            with suppress(EpisodeError):  # then the index has to say what the task is
                numbers |= {c: whole_numbers(table[c], f"{name}: {c}", empty=_NO_TASK) for c in tasked}
            episodes = numbers["episode_index"]
            if not len(episodes):
                continue
            order = np.argsort(episodes, kind="stable")
            values, starts = np.unique(episodes[order], return_index=True)
            for number, chosen in zip(values.tolist(), np.split(order, starts[1:]), strict=True):
                if number < 0:
                    raise EpisodeError(Reason.UNREADABLE, f"{name}: episode_index {number}; allowed: 0 and above")
                part = found.setdefault(number, _Part())
                # Without a column of their own, frames are in order as they are stored.
                counted = np.arange(part.steps, part.steps + len(chosen))
                part.frames.append(numbers["frame_index"][chosen] if "frame_index" in numbers else counted)
                part.groups.append(group)
                part.steps += len(chosen)
                if "task_index" in numbers:
                    tasks = numbers["task_index"][chosen]
                    firsts = np.unique(tasks, return_index=True)[1]
                    part.tasks += [task for task in tasks[np.sort(firsts)].tolist() if task != _NO_TASK]
    return found


def _whole_episode(
    id: str, parts: Mapping[str, _Part], hinted: str | None, promised: int | None, lost: bool
) -> Rows:
    """The rows that make an episode.

    Args:
        id: of the episode.
        parts: by file.
        hinted: the file that `meta/episodes` names; wrong in some data sets.
        promised: how many rows `meta/episodes` says; wrong in some.
        lost: whether the data set has fewer rows than `info.json` promises.

    Raises:
        EpisodeError: rows are missing, or there are several of one frame.
    """
    chosen = list(parts)
    if not _are_whole([*parts.values()]):
        # Files left over from before a conversion hold an episode once more.
        whole_files = [name for name, part in parts.items() if _are_whole([part])]
        fitting = [name for name in whole_files if parts[name].steps == promised] or whole_files
        chosen = [hinted] if hinted in whole_files else fitting
        if not chosen:
            count = sum(part.steps for part in parts.values())
            raise EpisodeError(
                Reason.UNREADABLE,
                f"{id}: {count} rows in {', '.join(parts)}, whose frame_index is not 0 to {count - 1}, each once; "
                "rows are missing or double",
            )
        if len(chosen) > 1:
            raise EpisodeError(
                Reason.UNREADABLE, f"{id}: its rows are in {', '.join(chosen)} alike; keep the file that is meant"
            )
    steps = sum(parts[name].steps for name in chosen)
    if promised is not None and steps < promised and lost:
        raise EpisodeError(
            Reason.UNREADABLE, f"{id}: {steps} rows in {', '.join(chosen)}; {INDEX_FOLDER} promises {promised}"
        )
    tasks = dict.fromkeys(task for name in chosen for task in parts[name].tasks)
    return Rows(steps, [(name, parts[name].groups) for name in chosen], [*tasks])


def _are_whole(parts: Sequence[_Part]) -> bool:
    return _counts(np.sort(np.concatenate([frames for part in parts for frames in part.frames])))


def _counts(frames: NDArray[np.int64]) -> bool:
    """Whether they are 0, 1, 2 and so on."""
    return bool((frames == np.arange(len(frames))).all())


def _hints(root: Path) -> dict[int, dict[str, Any]]:
    """Rows of `meta/episodes` by episode. What cannot be read gives no hint, and none is needed."""
    hints: dict[int, dict[str, Any]] = {}
    for name in files_named(root, *_INDEX_PATTERNS):
        try:
            rows = records(root, name)
        except EpisodeError:
            continue
        for row in rows:
            # lerobot itself goes by the place in the list.
            number = whole(row.get("episode_index", len(hints)))
            if number is not None:
                said = {key: value for key, value in row.items() if value is not None and value == value}
                hints[number] = said | hints.get(number, {})
    return hints


def file_indices(hint: Mapping[str, Any], prefix: str) -> dict[str, int | str]:
    """Numbers of the file that a row of `meta/episodes` names, as far as it does."""
    indices = {name: whole(hint.get(f"{prefix}/{name}")) for name in ("chunk_index", "file_index")}
    return {name: index for name, index in indices.items() if index is not None}


def _only_task(id: str, tasks: Sequence[str]) -> str:
    first, *others = dict.fromkeys(tasks)
    if others:  # to take the first would pair what comes after it with the wrong words
        raise EpisodeError(
            Reason.UNREADABLE, f"{id}: its task changes ({'; '.join([first, *others])}); one needed"
        )
    return first
