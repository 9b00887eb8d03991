"""Where simulators run: in this process, in processes of this machine, or as actors of a Ray cluster."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any, Protocol

from worldvla_libero.jobs.job import Executor
from worldvla_libero.jobs.processes import (
    Worker,
    WorkerKilledError,
    WorkerStartError,
    answer_pickled,
    prepare_worker,
    read_answer,
)

Work = Callable[[], Callable[[Any], Any]]
"""Makes what answers messages; it travels to where it works before its first one."""


class Seat(Protocol):
    """Someone who answers one message after the other."""

    @property
    def has_place(self) -> bool:
        """Whether there is a core for it, so that time it takes is its own."""
        ...

    def send(self, message: Any) -> None:
        """Give it something to do; it must have answered before."""

    def answer(self) -> tuple[Any, Exception | None]:
        """What came of it, or what it raised.

        Raises:
            WorkerKilledError: its process ended before.
            WorkerStartError: its process cannot start, or cannot read the message.
        """

    def stop(self) -> None:
        """End it, whatever it does; may be called twice."""


class Pool(Protocol):
    """Where seats come from."""

    def start(self) -> Any:
        """A new seat."""

    def wait(self, seats: Sequence[Any], timeout: float) -> Sequence[Any]:
        """Those of the seats that have an answer, or have died; empty after `timeout` seconds without one."""


def open_pool(work: Work, workers: int, executor: Executor) -> Pool:
    """The pool of a command.

    Args:
        work: see `Work`.
        workers: 0 for this process; at least 1 with Ray.
        executor: `local`, or `ray` for the cluster that `ray.init` finds.

    Raises:
        ImportError: Ray is not installed.
    """
    if executor == "ray":
        return RayPool(work)
    return ProcessPool(work) if workers else HerePool(work)


class HerePool:
    """One seat in this process: to debug, and for scripts that start no processes. Nothing survives a crash."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def start(self) -> _HereSeat:
        """A seat that works as soon as it is sent something."""
        return _HereSeat(self._work())

    def wait(self, seats: Sequence[_HereSeat], timeout: float) -> Sequence[_HereSeat]:
        """All: they have answered already."""
        return seats


class _HereSeat:
    has_place = True

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self._work = work
        self._answer: tuple[Any, Exception | None] = (None, None)

    def send(self, message: Any) -> None:
        try:
            self._answer = self._work(message), None
        except Exception as error:  # noqa: BLE001 -- whoever asks for the answer gets it
            self._answer = None, error

    def answer(self) -> tuple[Any, Exception | None]:
        return self._answer

    def stop(self) -> None:
        getattr(self._work, "close", lambda: None)()


class ProcessPool:
    """Processes of this machine."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def start(self) -> Worker:
        """A process of its own."""
        return Worker(self._work())

    def wait(self, seats: Sequence[Worker], timeout: float) -> Sequence[Worker]:
        """See `Pool.wait`."""
        ready = wait([seat.connection for seat in seats], timeout)
        return [seat for seat in seats if seat.connection in ready]


class RayPool:
    """Actors of a Ray cluster, a core each."""

    def __init__(self, work: Work) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError("executor 'ray' needs Ray; remedy: pip install 'worldvla-libero[ray]'") from error
        self._ray, self._work = ray, work
        if not ray.is_initialized():
            ray.init(log_to_driver=False)

    def start(self) -> _RaySeat:
        """An actor; Ray chooses the node."""
        return _RaySeat(self._ray, self._work)

    def wait(self, seats: Sequence[_RaySeat], timeout: float) -> Sequence[_RaySeat]:
        """See `Pool.wait`."""
        if not seats:
            time.sleep(timeout)
            return []
        futures = [seat.future for seat in seats]
        ready, _ = self._ray.wait(futures, num_returns=1, timeout=timeout)
        if ready:  # and whoever else is
            ready, _ = self._ray.wait(futures, num_returns=len(futures), timeout=0)
        return [seat for seat in seats if seat.future in ready]


class _RaySeat:
    def __init__(self, ray: Any, work: Work) -> None:
        self._ray = ray
        self._actor = ray.remote(num_cpus=1, max_restarts=0)(_RayActor).remote(pickle.dumps(work()))
        self._placed = self._actor.__ray_ready__.remote()
        self.future: Any = None

    @property
    def has_place(self) -> bool:
        ready, _ = self._ray.wait([self._placed], timeout=0)
        return bool(ready)

    def send(self, message: Any) -> None:
        self.future = self._actor.call.remote(pickle.dumps(message))

    def answer(self) -> tuple[Any, Exception | None]:
        try:
            return read_answer(self._ray.get(self.future))
        except self._ray.exceptions.RayError as gone:
            if getattr(gone, "actor_init_failed", False):
                raise WorkerStartError(f"a worker cannot start on Ray: {gone}") from gone
            raise WorkerKilledError(f"the worker process ended (on Ray: {type(gone).__name__})") from gone

    def stop(self) -> None:
        self._ray.kill(self._actor)


class _RayActor:
    def __init__(self, work: bytes) -> None:
        prepare_worker()
        self._work = pickle.loads(work)  # noqa: S301

    def call(self, message: bytes) -> bytes:
        return answer_pickled(self._work, message)
