"""Long work over many episodes: one file per result, several processes, and a run that is killed goes on.

A job lives in the hidden folder `.work` of its output. Every item ends there as one file, which appears whole or
not at all: its result, or the record of why it was dropped. Who runs the same job again finds these and does the
rest. What is made of the parts in the end depends on them alone, never on who made them when.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self

from filelock import FileLock, Timeout

from worldvla_libero.jobs.local import StartWorker, run_local
from worldvla_libero.jobs.on_ray import run_on_ray
from worldvla_libero.jobs.parts import (
    DRAFT,
    WORK_FOLDER,
    Dropped,
    Item,
    ItemError,
    JobError,
    Result,
    existing,
    storing,
)
from worldvla_libero.jobs.processes import (
    Worker,
)
from worldvla_tokenizers.files import write_text_atomic

Executor = Literal["local", "ray"]

_MANIFEST = "job.json"
_LOCK = "lock"
_DRAFTS = re.compile(rf"{re.escape(DRAFT)}.+|\..+\.[0-9a-f]{{32}}")  # ours, and all that come whole or not at all


class Job(Generic[Item, Result]):
    """A job and the folder it fills.

    Args:
        out: output folder, made if need be.
        record: name of the file that says the job has ended, such as `dataset.json`.
        settings: all that the results depend on, as JSON; whoever goes on has to come with the same.
        error: type of what is raised where an item that must not be dropped is.

    Raises:
        JobError: `out` is a file, was filled or begun with other settings, holds something else, or another run
            is at work on it.

    Example:
        >>> import math, tempfile
        >>> out = Path(tempfile.mkdtemp(), "factorials")
        >>> def store(result: int, path: Path) -> None:
        ...     _ = path.write_text(str(result))
        >>> with Job(out, "factorials.json", {"up to": 2}) as job:
        ...     if not job.ended:
        ...         parts = job.run({"1": 1, "2": 2}, math.factorial, store, suffix=".txt", workers=2)
        ...         job.end({"sum": sum(int(part.read_text()) for part in parts.values())})
        >>> job.content()
        {'settings': {'up to': 2}, 'sum': 3}
    """

    def __init__(
        self,
        out: str | os.PathLike[str],
        record: str,
        settings: Mapping[str, Any],
        *,
        error: Callable[[str, str], ItemError] = ItemError,
    ) -> None:
        self.out = Path(out)
        self.record = self.out / record
        self.folder = self.out / WORK_FOLDER
        self.settings = json.loads(json.dumps(settings))  # as it will be read back: tuples are lists
        self._error = error
        self._lock = FileLock(self.folder / _LOCK)

    @property
    def ended(self) -> bool:
        """Whether the output is complete."""
        return self.record.is_file()

    def __enter__(self) -> Self:
        if self.out.exists() and not self.out.is_dir():
            raise JobError(f"{self.out} is a file; choose a folder")
        if self.out.is_dir() and not self.ended and not self.folder.is_dir() and any(self.out.iterdir()):
            raise JobError(f"{self.out} is not empty and holds no {self.record.name}; choose another folder")
        if self.ended:
            self._compare(self.record)
            shutil.rmtree(self.folder, ignore_errors=True)  # it may have been killed after its last word
            return self
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise JobError(
                f"another process is at work in {self.out}; wait for it, or choose another folder"
            ) from error
        try:
            manifest = self.folder / _MANIFEST
            if manifest.is_file():
                self._compare(manifest)
            else:
                write_text_atomic(manifest, json.dumps({"settings": self.settings}, indent=2) + "\n")
            _remove_drafts(self.out)
            _remove_drafts(self.folder)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def run(
        self,
        items: Mapping[str, Item],
        work: Callable[[Item], Result],
        store: Callable[[Result, Path], object],
        *,
        suffix: str,
        workers: int = 1,
        strict: bool = False,
        wanted: Callable[[str, Mapping[str, Path | Dropped]], bool] | None = None,
        on_part: Callable[[str, Path | Dropped], None] | None = None,
        executor: Executor | StartWorker = "local",
        store_gpus: float = 0,
    ) -> dict[str, Path | Dropped]:
        """Do what is left of the items.

        Args:
            items: by the name their parts get.
            work: makes the result of an item, in a worker process, to which it is pickled once.
            store: writes a result to a path; in this process, or with Ray in one of its own.
            suffix: of the parts.
            workers: how many processes work.
            strict: raise at the first item that is dropped.
            wanted: called before an item is begun, with all parts so far; False leaves it out.
            on_part: called with every part, those of earlier runs first.
            executor: `local`, or `ray` for Ray Data on the cluster that `ray.init` finds; every node needs the
                output folder at the same path. Or what starts a local worker, instead of `Worker`.
            store_gpus: with Ray, share of a GPU for the storing process.

        Returns:
            The file of each result, or why there is none, in the order of `items`.

        Raises:
            ItemError: with `strict`, the first item that was dropped; of the type given.
            StorageError: a part could not be written.
            JobError: a worker process could not start.
            ValueError: `workers` is below 1.
        """
        if workers < 1:
            raise ValueError(f"workers is {workers}; allowed: 1 and above")
        parts: dict[str, Path | Dropped] = {}
        for name in items:
            part = existing(self.folder, name, suffix)
            if part is not None:
                parts[name] = part
                if on_part:
                    on_part(name, part)
                if strict and isinstance(part, Dropped):
                    raise self._error(part.reason, part.message)
        left = {name: item for name, item in items.items() if name not in parts}
        if executor == "ray":
            if wanted is not None:
                raise ValueError("Ray begins all items at once; 'wanted' needs the local executor")
            done = run_on_ray(self.folder, left, work, store, suffix, workers, store_gpus)
        else:
            start = executor if callable(executor) else Worker
            done = run_local(self.folder, left, work, store, suffix, workers, wanted, parts, start)
        with closing(done):  # ends the workers, whoever raises
            for name, part in done:
                parts[name] = part
                if on_part:
                    on_part(name, part)
                if strict and isinstance(part, Dropped):
                    raise self._error(part.reason, part.message)
        return {name: parts[name] for name in items if name in parts}

    def content(self) -> dict[str, Any]:
        """The record of the job that has ended, its settings included."""
        return json.loads(self.record.read_text(encoding="utf-8"))

    @contextmanager
    def storing(self, name: str) -> Iterator[None]:
        """Around the writing of an output: tells what a failure leaves behind.

        Raises:
            StorageError: it could not be written.
        """
        with storing(name, self.out):
            yield

    def reopen(self) -> None:
        """Have a job that has ended go on, to do again what went wrong; called before it is entered.

        Raises:
            JobError: it was done with other settings.
        """
        self._compare(self.record)
        self.folder.mkdir(exist_ok=True)
        write_text_atomic(self.folder / _MANIFEST, json.dumps({"settings": self.settings}, indent=2) + "\n")
        self.record.unlink()

    def end(self, content: Mapping[str, Any]) -> None:
        """Write the record that says the output is complete, and remove the parts."""
        text = json.dumps({"settings": self.settings, **content}, indent=2, ensure_ascii=False)
        with self.storing(self.record.name):
            write_text_atomic(self.record, text + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _compare(self, path: Path) -> None:
        found = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        if found == self.settings:
            return
        names = [key for key in {**found, **self.settings} if found.get(key) != self.settings.get(key)]
        described = "; ".join(f"{key} was {found.get(key)!r}, now {self.settings.get(key)!r}" for key in names)
        raise JobError(
            f"{self.out} was begun with other settings ({described}); choose another folder or delete it"
        )


def _remove_drafts(folder: Path) -> None:
    """Remove what a killed run had begun to write."""
    for path in folder.iterdir():
        if _DRAFTS.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
