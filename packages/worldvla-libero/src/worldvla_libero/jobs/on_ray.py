"""Items worked on by Ray Data, on this machine or a cluster; one of its processes writes all files."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import Any

from worldvla_libero.jobs.parts import (
    DRAFT,
    TRIES,
    Dropped,
    Item,
    JobError,
    Result,
    attempt,
    existing,
    keep,
    killed,
    storing,
)
from worldvla_libero.jobs.processes import WorkerKilledError, answer, portable, prepare_worker


def run_on_ray(
    folder: Path,
    items: Mapping[str, Item],
    work: Callable[[Item], Result],
    store: Callable[[Result, Path], object],
    suffix: str,
    workers: int,
    store_gpus: float,
) -> Generator[tuple[str, Path | Dropped], None, None]:
    """Work on items with Ray Data; arguments as of `Job.run`, and its folder, which every node has."""
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
    folder = folder.absolute()
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
                yield name, killed(items[name], failure)
            elif failure is not None:
                raise failure
            else:
                part = existing(folder, name, suffix)
                assert part is not None  # written by the row's process; a shared folder is a condition
                yield name, part
    except ray.exceptions.RayActorError as error:
        raise JobError(
            "a worker process could not start on Ray (see its own message above): what it works with must be "
            "importable on every node"
        ) from error


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
        tries = self.folder / f"{DRAFT}{name}.tries"
        with storing(name, self.folder), tries.open("ab") as count:
            killed = count.tell() == TRIES
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
                keep(self.folder, row["name"], self.suffix, result, self.store)
            except Exception as error:  # noqa: BLE001 -- raised where the job runs, in its own type
                failure = portable(error)
        return {"name": row["name"], "failure": pickle.dumps(failure)}
