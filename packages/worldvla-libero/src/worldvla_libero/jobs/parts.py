"""What a job leaves on its way: the name of its work folder, and the items that were dropped."""

from __future__ import annotations

from typing import NamedTuple

WORK_FOLDER = ".work"  # inside the output folder; gone when the job has ended
WORKER_KILLED = "worker killed"  # the reason why an item is dropped that killed the processes that worked on it


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
