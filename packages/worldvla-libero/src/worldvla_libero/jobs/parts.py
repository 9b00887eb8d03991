"""Parts of a job: a file for each item that is done, or the record of why it was dropped, whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar
from uuid import uuid4

WORK_FOLDER = ".work"  # inside the output folder; gone when the job has ended
WORKER_KILLED = "worker killed"  # the reason why an item is dropped that killed the processes that worked on it

TRIES = 2  # of an item whose worker was killed: the next one may have been luckier with memory
DRAFT = ".draft-"  # how the names of files begin that are not whole yet

Item = TypeVar("Item")
Result = TypeVar("Result")

_DROPPED = ".dropped.json"


class JobError(ValueError):
    """A job that cannot go on in this folder: other settings, other content, or somebody else at work."""


class StorageError(OSError):
    """A result could not be written, for instance because the disk is full; what was written before stays."""


class ItemError(ValueError):
    """An item that cannot be worked on: it is dropped, and the others go on.

    Args:
        reason: what kind of fault it is; reports count by it.
        message: names the item and what exactly is wrong.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(reason, message)  # both, so that it survives pickling
        self.reason = reason
        self.message = message

    def __str__(self) -> str:
        return f"{self.reason}: {self.message}"


class Dropped(NamedTuple):
    """An item, such as an episode or a whole file, that was left out.

    Attributes:
        id: of the item, or name of the file.
        reason: a few words that others of the kind have in common, see `ItemError`.
        message: what exactly was wrong.
    """

    id: str
    reason: str
    message: str

    @classmethod
    def because(cls, id: str, error: ItemError) -> Dropped:
        """The record of an error."""
        return cls(id, str(error.reason), error.message)


def attempt(work: Callable[[Item], Result], item: Item) -> Result | Dropped:
    """Work on an item; one that cannot be used comes back as the record of why."""
    try:
        return work(item)
    except ItemError as error:
        return Dropped.because(_id(item), error)


def killed(item: object, error: Exception) -> Dropped:
    """The record of an item that killed whoever worked on it."""
    # Not kept as a part: the machine's fault, not the item's. Another run tries it again.
    return Dropped(_id(item), WORKER_KILLED, f"{_id(item)}: {error}, {TRIES} times")


def _id(item: object) -> str:
    return str(getattr(item, "id", item))


def existing(folder: Path, name: str, suffix: str) -> Path | Dropped | None:
    """The part of a name, if it is there."""
    dropped, part = folder / f"{name}{_DROPPED}", folder / f"{name}{suffix}"
    if dropped.is_file():
        return Dropped(**json.loads(dropped.read_text(encoding="utf-8")))
    return part if part.is_file() else None


def keep(
    folder: Path, name: str, suffix: str, result: Result | Dropped, store: Callable[[Result, Path], object]
) -> Path | Dropped:
    """Write a part, whole or not at all."""
    target = folder / f"{name}{_DROPPED if isinstance(result, Dropped) else suffix}"
    draft = folder / f"{DRAFT}{uuid4().hex}{suffix}"
    try:
        with storing(name, folder):
            if isinstance(result, Dropped):
                draft.write_text(json.dumps(result._asdict(), ensure_ascii=False) + "\n", encoding="utf-8")
            else:
                store(result, draft)
            os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
    return result if isinstance(result, Dropped) else target


@contextmanager
def storing(name: str, folder: Path) -> Iterator[None]:
    """Around the writing of a file: tells what a failure leaves behind.

    Raises:
        StorageError: it could not be written.
    """
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{name}: cannot be written to {folder} ({error.strerror or error}); what was stored before stays: "
            "run the same command again once that is mended"
        ) from error
