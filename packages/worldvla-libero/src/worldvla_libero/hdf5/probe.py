"""Whether the HDF5 library survives a file: tried in a process of its own, before this one reads it.

In some of ten thousand damaged files the library ends in a segmentation fault or in an endless loop, and nothing
in Python can catch either. So another process walks through the file first: this module, run as a program. A
process that reads has one of them, started with the first file and kept for those that follow.
"""

from __future__ import annotations

import atexit
import functools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import h5py

_STARTED, _WALKED = b"started\n", b"walked\n"

# Of the processor's time, which does not depend on how busy machine and disk are: a small file takes milliseconds,
# and no file needs a second for each MiB.
_SECONDS, _SECONDS_A_MIB, _MOST_SECONDS = 0.5, 1.0, 300.0
_TIME_IS_UP = getattr(signal, "SIGPROF", 0)  # what the timer sends; Windows has none
_MIB = 2**20
_READ_WHOLE = 4 * _MIB  # bytes of a file up to which its arrays are read as well
_LARGEST_ARRAY = 64 * _MIB  # bytes of an array up to which it is: a damaged one can have any shape
_AT_REST = 100_000_000  # [ns] since the last change

_lock = threading.Lock()
_process: _Process | None = None

Identity = tuple[int, int, int, int]


def identity(path: Path) -> Identity | None:
    """Changes with the file: place, size and times; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def identity_at_rest(path: Path) -> Identity | None:
    """The same; None as well for a file written just now, which could change within a tick of the disk's clock."""
    found = identity(path)
    return found if found and time.time_ns() - max(found[2:]) > _AT_REST else None


def open_file(path: str | os.PathLike[str]) -> h5py.File:
    """A file to read, without a lock where the disk has none: many network disks (NFS, Lustre) cannot lock."""
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if isinstance(error, BlockingIOError) or "unable to lock file" not in str(error):
            raise
        return h5py.File(path, "r", locking=False)


def fault_of(path: Path) -> str | None:
    """What the HDF5 library does to a process that reads this file.

    All groups, attributes and indices of arrays are read, and of a file of up to 4 MiB the arrays themselves.

    Returns:
        `crashes (SIGSEGV)`, `does not end`; None where it reads the file, or reports what is wrong with it. None
        as well where no other process can be started, as in a program that was frozen into one file: a warning
        tells that once.
    """
    with _lock:
        try:
            code = _ask(path)
        except OSError as error:
            _warn_untried(str(error))
            return None
    if code is None:
        return None
    if code >= 0:
        return f"ends the process (exit status {code})"
    return "does not end" if code == -_TIME_IS_UP else f"crashes ({signal.Signals(-code).name})"


def _ask(path: Path) -> int | None:
    """The exit code of a process that died of a file; None where it lives.

    Raises:
        OSError: no process could be started.
    """
    global _process
    while True:
        process = _process = _process or _Process()
        first = not process.asked
        try:
            if process.survives(path):
                return None
            code = process.end()
        except BaseException:  # Ctrl-C: the answer would be taken for that to the next question
            process.end(kill=True)
            raise
        finally:
            if process.ended:
                _process = None
        # It may have died of what an earlier file left in its memory, or been killed while it waited.
        if first or code == -_TIME_IS_UP:
            return code


class _Process:
    """The other process.

    Raises:
        OSError: it could not be started.
    """

    def __init__(self) -> None:
        if getattr(sys, "frozen", False) or not sys.executable:
            raise OSError("this program is not run by an interpreter that could be started again")
        # Either flag keeps the folder of this file, full of other modules, out of the program's imports.
        command = [sys.executable, "-I" if sys.flags.isolated else "-P", __file__]
        pipe = subprocess.PIPE
        self._popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._questions, self._answers = self._popen.stdin, self._popen.stdout
        self.asked = False
        if self._answers.readline() != _STARTED:
            raise OSError(f"{' '.join(command)} ended with exit status {self.end()}")

    @property
    def ended(self) -> bool:
        return self._popen.returncode is not None

    def survives(self, path: Path) -> bool:
        """Whether it answers, after it has walked through the file."""
        self.asked = True
        # In hexadecimal, for a name may hold any bytes; whole, for it keeps the folder it was started in.
        question = os.fsencode(path.absolute()).hex().encode() + b"\n"
        with suppress(BrokenPipeError):
            self._questions.write(question)
            return self._answers.readline() == _WALKED
        return False

    def end(self, *, kill: bool = False) -> int:
        """Its exit code, once it has ended; to kill it costs nothing."""
        if kill:
            self._popen.kill()
        with self._popen:  # closes the pipes
            return self._popen.wait()

    def leave(self) -> None:
        """Let go of it, which belongs to the process that this one was forked from."""
        self._popen.returncode = 0  # so that nobody waits for it here
        self._questions.close()
        self._answers.close()


@atexit.register
def _stop() -> None:
    global _process
    if _process is not None:
        _process.end(kill=True)
        _process = None


def _forget() -> None:
    """A forked process starts one of its own: the answers to its parent's questions are not for it."""
    global _lock, _process
    process, _process, _lock = _process, None, threading.Lock()
    if process is not None:
        process.leave()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget)


@functools.cache
def _warn_untried(why: str) -> None:
    warnings.warn(
        f"HDF5 files are read without a trial in another process ({why}): a damaged one may end this one",
        RuntimeWarning,
        stacklevel=2,
    )


# In the other process


def _serve() -> None:
    with suppress(ImportError):  # Windows has no such module, nor files of dead processes
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0) as answers:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whatever a library prints is no answer
        answers.write(_STARTED)
        for question in sys.stdin.buffer:
            path = os.fsdecode(bytes.fromhex(question.decode().strip()))
            with _time_limit(path):
                _walk(path)
            answers.write(_WALKED)


@contextmanager
def _time_limit(path: str) -> Iterator[None]:
    """The process ends where the block takes too much of the processor's time."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return
    size = os.path.getsize(path) if os.path.exists(path) else 0
    signal.signal(_TIME_IS_UP, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, min(_SECONDS + _SECONDS_A_MIB * size / _MIB, _MOST_SECONDS))
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


# What the library reports, the reader will hear as well: here it only matters to try the rest in spite of it.
_reported = functools.partial(suppress, Exception)


def _walk(path: str) -> None:
    """Read all that can be read."""
    with _reported(), open_file(path) as file:
        whole = os.path.getsize(path) <= _READ_WHOLE
        seen = set()
        waiting: list[Any] = [file]
        while waiting:
            found = waiting.pop()
            with _reported():
                info = h5py.h5o.get_info(found.id)
                if (info.fileno, info.addr) in seen:  # links may lead in a circle
                    continue
                seen.add((info.fileno, info.addr))
            with _reported():
                for name in found.attrs:
                    with _reported():
                        found.attrs[name]
            with _reported():
                if isinstance(found, h5py.Dataset):
                    _try_array(found, whole=whole)
                elif isinstance(found, h5py.Group):
                    for name in found:
                        with _reported():
                            waiting.append(found[name])


def _try_array(array: h5py.Dataset, *, whole: bool) -> None:
    kind = array.dtype.kind  # of bytes, words and lists of any length the reader looks at the first
    if array.chunks:
        array.id.get_num_chunks()  # goes through the index
    if whole and array.nbytes <= _LARGEST_ARRAY:
        array[()]
        if kind in "uifb":
            array.astype("f8")[()]  # the library converts numbers by itself, and so does the reader
    elif kind in "OSV" and array.shape and array.nbytes <= _LARGEST_ARRAY * len(array):
        array[0]


if __name__ == "__main__":
    _serve()
