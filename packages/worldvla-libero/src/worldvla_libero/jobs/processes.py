"""Worker processes: each answers one message after the other, and may die without taking anyone along."""

from __future__ import annotations

import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

_ENVIRONMENT = {"LP_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_TRACE_NOTE = "In a worker process:\n"


class WorkerStartError(RuntimeError):
    """A worker process could not start, or cannot be told what to do."""


class WorkerKilledError(RuntimeError):
    """A worker process ended before it had answered."""


class Worker:
    """A process with a pipe of its own: one that is killed, even while it answers, cannot block the others.

    It starts while its first message waits; whatever goes wrong then, the answer says.

    Args:
        work: called with each message, in the process, to which it is pickled once.
        context: of multiprocessing; None to spawn, since OpenGL and CUDA do not survive a fork.

    Attributes:
        connection: readable when there is an answer, or the process has ended.
    """

    has_place = True  # whoever starts more of them than there are cores chose to

    def __init__(self, work: Callable[[Any], Any], context: Any = None) -> None:
        context = context or get_context("spawn")
        self.connection, far = context.Pipe()
        self._sign, far_sign = context.Pipe(duplex=False)  # of life, once it has started
        self.process = context.Process(target=_serve, args=(far, far_sign, work), daemon=True)
        with _worker_environment():
            self.process.start()
        far.close()  # so that the end of the process is the end of the pipe
        far_sign.close()

    def send(self, message: Any) -> None:
        """Give it something to do."""
        with suppress(BrokenPipeError):  # it has died; `answer` says so
            self.connection.send(message)

    def answer(self) -> tuple[Any, Exception | None]:
        """What the work returned, or what it raised.

        Raises:
            WorkerKilledError: the process ended before.
            WorkerStartError: it ended by itself before it had started, or could not read its message.
        """
        try:
            answer = self.connection.recv_bytes()
        except (EOFError, OSError) as gone:  # before its answer, or in the middle of it
            end, killed = self._end()
            if not killed and not self._had_started():
                raise WorkerStartError(
                    f"a worker process could not start ({end}; see its own message above): what it works with "
                    "must be importable, and a script that begins a job needs `if __name__ == '__main__':`"
                ) from gone
            raise WorkerKilledError(f"the worker process ended ({end})") from gone
        return read_answer(answer)

    def stop(self) -> None:
        """Kill it; may be called twice."""
        self.process.kill()
        self.process.join()
        self.connection.close()
        self._sign.close()

    def _had_started(self) -> bool:
        """Asked when it has ended, so that nothing is waited for."""
        try:
            self._sign.recv_bytes()
        except EOFError:
            return False
        return True

    def _end(self) -> tuple[str, bool]:
        """How it ended, and whether by a signal."""
        self.process.join()
        code = self.process.exitcode or 0
        return (signal.Signals(-code).name, True) if code < 0 else (f"exit status {code}", False)


def answer(work: Callable[[Any], Any], message: Any) -> bytes:
    """The pickled result, or what the work raised."""
    try:
        return pickle.dumps((work(message), None))
    except Exception as error:  # noqa: BLE001 -- the parent raises it
        return pickle.dumps((None, portable(error)))


def answer_pickled(work: Callable[[Any], Any], message: bytes) -> bytes:
    """The same of a pickled message, which may hold what cannot be imported here."""
    try:
        content = pickle.loads(message)  # noqa: S301 -- of our parent
    except Exception as error:  # noqa: BLE001 -- as above
        reason = f"a worker process cannot read its message, what is in it must be importable: {error!r}"
        return pickle.dumps((None, portable(WorkerStartError(reason))))
    return answer(work, content)


def read_answer(answer: bytes) -> tuple[Any, Exception | None]:
    """What the work returned, or what it raised.

    Raises:
        WorkerStartError: it could not read its message.
    """
    result, failure = pickle.loads(answer)  # noqa: S301 -- of our own process
    if isinstance(failure, WorkerStartError):
        raise failure
    return result, failure


def portable(error: Exception) -> Exception:
    """The error itself, or one that says the same where it cannot be pickled; its traceback travels as a note."""
    trace = trace_of(error)
    try:
        error = pickle.loads(pickle.dumps(error))  # noqa: S301
    except Exception:  # noqa: BLE001 -- classes pickle by code of their own
        error = RuntimeError(f"{type(error).__name__}: {error}")
    error.add_note(_TRACE_NOTE + trace)
    return error


def trace_of(error: BaseException) -> str:
    """The traceback of an error, also where it was raised in another process."""
    for note in getattr(error, "__notes__", ()):
        if note.startswith(_TRACE_NOTE):
            return note.removeprefix(_TRACE_NOTE)
    return "".join(traceback.format_exception(error))


def prepare_worker() -> None:
    """One thread each: several workers that draw with all cores' threads only get in each other's way."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair


@contextmanager
def _worker_environment() -> Iterator[None]:
    """What a process finds that is started meanwhile: NumPy reads it when the worker's work is unpickled."""
    added = [name for name in _ENVIRONMENT if name not in os.environ]
    os.environ.update({name: _ENVIRONMENT[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _serve(connection: Connection, sign: Connection, work: Callable[[Any], Any]) -> None:
    prepare_worker()
    with suppress(OSError):
        sign.send_bytes(b"started")
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):  # the parent is gone
            return
        try:
            connection.send_bytes(answer_pickled(work, message))
        except OSError:  # as above
            return
