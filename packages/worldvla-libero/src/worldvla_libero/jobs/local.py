"""Items worked on in processes of this machine; this process writes all files."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from worldvla_libero.jobs.parts import TRIES, Dropped, Item, JobError, Result, attempt, keep
from worldvla_libero.jobs.parts import killed as record_of_killed
from worldvla_libero.jobs.processes import Worker, WorkerKilledError, WorkerStartError

StartWorker = Callable[[Callable[[Any], Any]], Worker]
"""Given the work, starts what does it, such as `Worker`."""


def run_local(
    folder: Path,
    items: Mapping[str, Item],
    work: Callable[[Item], Result],
    store: Callable[[Result, Path], object],
    suffix: str,
    workers: int,
    wanted: Callable[[str, Mapping[str, Path | Dropped]], bool] | None,
    parts: Mapping[str, Path | Dropped],
    start: StartWorker,
) -> Generator[tuple[str, Path | Dropped], None, None]:
    """Work on items in processes of this machine; arguments as of `Job.run`, and its folder and parts so far."""
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
                    if tries[name] < TRIES:
                        waiting.append((name, items[name]))
                    else:
                        killed.append((name, record_of_killed(items[name], error)))
            if wanted is None and not failures:
                begin()  # before this process is busy storing; `wanted` has to see what was stored
            for name, result in answers:
                yield name, keep(folder, name, suffix, result, store)
            for failure in failures:
                raise failure
            yield from killed
            begin()
    finally:
        for worker in [*idle, *(worker for _, worker in busy.values())]:
            worker.stop()  # it holds nothing that could be half done: this process writes all files
