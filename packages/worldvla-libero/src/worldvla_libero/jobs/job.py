"""Long work over many episodes: one file per result, several processes, and a run that is killed goes on.

A job lives in the hidden folder `.work` of its output. Every item ends there as one file, which appears whole or
not at all: its result, or the record of why it was dropped. Who runs the same job again finds these and does the
rest. What is made of the parts in the end depends on them alone, never on who made them when.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar
from uuid import uuid4

from filelock import FileLock, Timeout

from worldvla_libero.jobs.parts import WORK_FOLDER, WORKER_KILLED, Dropped, ItemError
from worldvla_libero.jobs.processes import (
    Worker,
    WorkerKilledError,
    WorkerStartError,
    answer,
    portable,
    prepare_worker,
)
from worldvla_tokenizers.files import write_text_atomic

Executor = Literal["local", "ray"]
StartWorker = Callable[[Callable[[Any], Any]], Worker]
"""Given the work, starts what does it, such as `Worker`."""

Item = TypeVar("Item")
Result = TypeVar("Result")

_MANIFEST = "job.json"
_LOCK = "lock"
_DROPPED = ".dropped.json"
_DRAFT = ".draft-"
_DRAFTS = re.compile(rf"{re.escape(_DRAFT)}.+|\..+\.[0-9a-f]{{32}}")  # ours, and all that come whole or not at all
_TRIES = 2  # of an item whose worker was killed: the next one may have been luckier with memory


class JobError(ValueError):
    """A job that cannot go on in this folder: other settings, other content, or somebody else at work."""


class StorageError(OSError):
    """A result could not be written, for instance because the disk is full; what was written before stays."""


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
        ```python
        with Job(out, "dataset.json", settings) as job:
            if not job.ended:
                parts = job.run(items, work, store, suffix=".arrow", workers=4)
                ...  # make the output of the parts
                job.end({"episodes": len(parts)})
        ```
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
            part = _existing(self.folder, name, suffix)
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
            done = self._run_on_ray(left, work, store, suffix, workers, store_gpus)
        else:
            start = executor if callable(executor) else Worker
            done = self._run_here(left, work, store, suffix, workers, wanted, parts, start)
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

    def _run_here(
        self,
        items: Mapping[str, Item],
        work: Callable[[Item], Result],
        store: Callable[[Result, Path], object],
        suffix: str,
        workers: int,
        wanted: Callable[[str, Mapping[str, Path | Dropped]], bool] | None,
        parts: Mapping[str, Path | Dropped],
        start: StartWorker,
    ) -> Generator[tuple[str, Path | Dropped], None, None]:
        waiting = list(items.items())[::-1]
        tries = Counter[str]()
        attempting = functools.partial(attempt, work)
        idle: list[Worker] = []
        busy: dict[Any, tuple[str, Worker]] = {}

        def begin() -> None:
            while waiting and idle:
                name, item = waiting.pop()
                if wanted is None or wanted(name, parts):
                    worker = idle.pop()
                    busy[worker.connection] = name, worker
                    worker.send(item)

        try:
            for _ in range(min(workers, len(items))):
                idle.append(start(attempting))
            begin()
            while busy:
                answers: list[tuple[str, Any]] = []
                failures: list[Exception] = []
                killed: list[tuple[str, Dropped]] = []
                for connection in wait(list(busy)):
                    name, worker = busy.pop(connection)
                    idle.append(worker)
                    try:
                        result, failure = worker.answer()
                        if failure is None:
                            answers.append((name, result))
                        else:
                            failures.append(failure)
                    except WorkerStartError as error:
                        raise JobError(str(error)) from error
                    except WorkerKilledError as error:
                        idle[-1] = start(attempting)
                        tries[name] += 1
                        if tries[name] < _TRIES:
                            waiting.append((name, items[name]))
                        else:
                            killed.append((name, _killed(items[name], error)))
                if wanted is None and not failures:
                    begin()  # before this process is busy storing; `wanted` has to see what was stored
                for name, result in answers:
                    yield name, _keep(self.folder, name, suffix, result, store)
                for failure in failures:
                    raise failure
                yield from killed
                begin()
        finally:
            for worker in [*idle, *(worker for _, worker in busy.values())]:
                worker.stop()  # it holds nothing that could be half done: this process writes all files

    def _run_on_ray(
        self,
        items: Mapping[str, Item],
        work: Callable[[Item], Result],
        store: Callable[[Result, Path], object],
        suffix: str,
        workers: int,
        store_gpus: float,
    ) -> Generator[tuple[str, Path | Dropped], None, None]:
        try:
            import ray.data
            import ray.exceptions
        except ImportError as error:
            raise ImportError("executor 'ray' needs Ray; remedy: pip install 'worldvla-libero[ray]'") from error
        if not items:
            return
        # Ray moves rows of Arrow; results travel pickled, as they do between local processes.
        rows = ray.data.from_items(
            [{"name": name, "item": pickle.dumps(item)} for name, item in items.items()],
            override_num_blocks=len(items),
        )
        folder = self.folder.absolute()
        answers = rows.map(
            _RayWork,
            fn_constructor_args=(folder, work),
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        kept = answers.map(
            _RayStore,
            fn_constructor_args=(folder, suffix, store),
            num_gpus=store_gpus,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        try:
            for row in kept.iter_rows():
                name, failure = row["name"], pickle.loads(row["failure"])  # noqa: S301 -- of our own process
                if isinstance(failure, WorkerKilledError):
                    yield name, _killed(items[name], failure)
                elif failure is not None:
                    raise failure
                else:
                    part = _existing(self.folder, name, suffix)
                    assert part is not None  # written by the row's process; a shared folder is a condition
                    yield name, part
        except ray.exceptions.RayActorError as error:
            raise JobError(
                "a worker process could not start on Ray (see its own message above): what it works with must be "
                "importable on every node"
            ) from error

    def _compare(self, path: Path) -> None:
        found = json.loads(path.read_text(encoding="utf-8")).get("settings", {})
        if found == self.settings:
            return
        names = [key for key in {**found, **self.settings} if found.get(key) != self.settings.get(key)]
        described = "; ".join(f"{key} was {found.get(key)!r}, now {self.settings.get(key)!r}" for key in names)
        raise JobError(
            f"{self.out} was begun with other settings ({described}); choose another folder or delete it"
        )


def attempt(work: Callable[[Item], Result], item: Item) -> Result | Dropped:
    """Work on an item; one that cannot be used comes back as the record of why."""
    try:
        return work(item)
    except ItemError as error:
        return Dropped.because(_id(item), error)


def _killed(item: object, error: WorkerKilledError) -> Dropped:
    # Not kept as a part: the machine's fault, not the item's. Another run tries it again.
    return Dropped(_id(item), WORKER_KILLED, f"{_id(item)}: {error}, {_TRIES} times")


def _id(item: object) -> str:
    return str(getattr(item, "id", item))


def _existing(folder: Path, name: str, suffix: str) -> Path | Dropped | None:
    dropped, part = folder / f"{name}{_DROPPED}", folder / f"{name}{suffix}"
    if dropped.is_file():
        return Dropped(**json.loads(dropped.read_text(encoding="utf-8")))
    return part if part.is_file() else None


def _keep(
    folder: Path, name: str, suffix: str, result: Result | Dropped, store: Callable[[Result, Path], object]
) -> Path | Dropped:
    """Write a part, whole or not at all."""
    target = folder / f"{name}{_DROPPED if isinstance(result, Dropped) else suffix}"
    draft = folder / f"{_DRAFT}{uuid4().hex}{suffix}"
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


def _remove_drafts(folder: Path) -> None:
    """Remove what a killed run had begun to write."""
    for path in folder.iterdir():
        if _DRAFTS.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class _RayWork:
    def __init__(self, folder: Path, work: Callable[[Any], Any]) -> None:
        prepare_worker()
        self.folder, self.work = folder, work

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        item = pickle.loads(row["item"])  # noqa: S301
        work = functools.partial(attempt, functools.partial(self._try, row["name"]))
        return {"name": row["name"], "answer": answer(work, item)}

    def _try(self, name: str, item: Any) -> Any:
        # Ray itself would try an item that kills its process for ever.
        tries = self.folder / f"{_DRAFT}{name}.tries"
        with storing(name, self.folder), tries.open("ab") as count:
            killed = count.tell() == _TRIES
            count.write(b".")
        try:
            if killed:
                raise WorkerKilledError("the worker process ended")
            return self.work(item)
        finally:
            tries.unlink(missing_ok=True)


class _RayStore:
    def __init__(self, folder: Path, suffix: str, store: Callable[[Any, Path], object]) -> None:
        self.folder, self.suffix, self.store = folder, suffix, store

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        result, failure = pickle.loads(row["answer"])  # noqa: S301
        if failure is None:
            try:
                _keep(self.folder, row["name"], self.suffix, result, self.store)
            except Exception as error:  # noqa: BLE001 -- raised where the job runs, in its own type
                failure = portable(error)
        return {"name": row["name"], "failure": pickle.dumps(failure)}
