"""What jobs in the tests work on, for worker processes to import; run as a script, a job to be killed."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from worldvla_libero.data.episodes import Episode, EpisodeError, Reason
from worldvla_libero.jobs.job import Job
from worldvla_libero.jobs.parts import WORK_FOLDER, Dropped
from worldvla_tokenizers.files import write_text_atomic

if TYPE_CHECKING:
    from worldvla_libero.demonstrations.collect import Attempt
    from worldvla_libero.demonstrations.replay import ReplaySettings

RECORD = "done.json"


def numbered(count: int) -> dict[str, int]:
    return {f"{n:03d}": n for n in range(count)}


def describe(number: int) -> str:
    """Later items of every three are done earlier; every seventh is dropped."""
    time.sleep(0.01 * (3 - number % 3))
    if number % 7 == 3:
        raise EpisodeError(Reason.TOO_SHORT, f"item {number}: “too short”")
    return f"item {number}\n"


def fail_at_two(number: int) -> str:
    if number == 2:
        raise ZeroDivisionError("two is too much")
    return describe(number)


class UnportableError(Exception):
    def __init__(self, thing: object, place: str) -> None:
        super().__init__(f"{place}: not portable")
        self.thing = thing


def fail_unportably_at_two(number: int) -> str:
    if number == 2:
        raise UnportableError(lambda: number, "here")
    return describe(number)


def answer_unportably_at_two(number: int) -> Any:
    return (lambda: number) if number == 2 else describe(number)


@dataclass
class FailsWhileStoring:
    """While item 1 is stored, item 0 fails and item 2 is answered."""

    folder: Path

    def __call__(self, number: int) -> str:
        if number != 1:
            await_file(self.folder / "storing")
        if number == 0:
            raise ZeroDivisionError
        (self.folder / f"answered_{number}").touch()
        return describe(number)

    def store(self, text: str, path: Path) -> None:
        (self.folder / "storing").touch()
        await_file(self.folder / "answered_2")
        time.sleep(1)  # until both are in their pipes
        store(text, path)


def await_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


@dataclass
class Fragile:
    """Kills its process at item 2, so many times; a folder counts them."""

    folder: Path
    times: int

    def __call__(self, number: int) -> str:
        if number == 2 and len(list(self.folder.iterdir())) < self.times:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return describe(number)


class Unstartable:
    """Cannot be unpickled, like work of a module that the workers do not find."""

    def __reduce__(self) -> tuple[Any, ...]:
        return import_module, ("no_such_module",)


def store(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def store_on_a_full_disk(text: str, path: Path) -> None:
    store(text[:3], path)
    if text == "item 2\n":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    store(text, path)


def complete(
    out: Path,
    items: Mapping[str, Any],
    work: Callable[[Any], str] = describe,
    store: Callable[[str, Path], object] = store,
    settings: Mapping[str, Any] = {"of": "letters"},
    **options: Any,
) -> dict[str, Any]:
    """A whole job, whose output is made of its parts."""
    with Job(out, RECORD, settings) as job:
        if not job.ended:
            parts = job.run(items, work, store, suffix=".txt", **options)
            dropped = [part._asdict() for part in parts.values() if isinstance(part, Dropped)]
            kept = [part for part in parts.values() if isinstance(part, Path)]
            with job.storing("all.txt"):
                write_text_atomic(out / "all.txt", "".join(part.read_text(encoding="utf-8") for part in kept))
            job.end({"dropped": dropped})
        return job.content()


class SyntheticDemonstrator:
    """Instead of the simulator: even attempts succeed, and later ones end first."""

    def __call__(self, attempt: Attempt) -> Episode:
        time.sleep(0.3 / (1 + attempt.number))
        if attempt.number % 2:
            raise EpisodeError(Reason.NO_SUCCESS, f"{attempt.id}: missed")
        rng = np.random.default_rng(attempt.episode_seed)
        steps = 3 + attempt.number
        return Episode(
            attempt.id,
            attempt.task.name,
            attempt.task.language,
            rng.normal(size=(steps, 7)),
            robot_states=rng.normal(size=(steps, 9)),
            states=rng.normal(size=(steps, 20)),
            seed=attempt.episode_seed,
        )


class NeverSucceeds:
    def __call__(self, attempt: Attempt) -> Episode:
        raise EpisodeError(Reason.NO_SUCCESS, f"{attempt.id}: missed")


class SyntheticReplayer:
    """Instead of the simulator: every episode succeeds but one, and earlier ones end later."""

    FAILS = "pick_up_the_alphabet_soup_and_place_it_in_the_basket_demo/demo_1"

    def __init__(self, settings: ReplaySettings, *, suite: str) -> None:
        self.settings = settings

    def __call__(self, episode: Episode) -> Episode:
        if episode.id == self.FAILS:
            raise EpisodeError(Reason.NO_SUCCESS, f"{episode.id}: made to fail")
        if episode.id.endswith("demo_0"):
            time.sleep(0.3)
        steps, rng = 7, np.random.default_rng(len(episode))
        size = (steps, self.settings.image_size, self.settings.image_size, 3)
        return replace(
            episode,
            actions=episode.actions[:steps],
            frames={name: rng.integers(0, 256, size, np.uint8) for name in self.settings.cameras},
            proprioception=rng.normal(size=(steps, 8)),
            robot_states=None,
            states=rng.normal(size=(steps, 20)),
            versions={"mujoco": "3.17.0"},
        )


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def processes_of(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, *_, sid = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            except OSError:  # it has ended meanwhile
                continue
            if int(sid) == session and state != "Z":
                found.append(int(entry.name))
    return found


def gone(session: int, patience: float = 20) -> bool:
    """Whether no process of a session is left, soon."""
    end = time.monotonic() + patience
    while processes_of(session) and time.monotonic() < end:
        time.sleep(0.05)
    return not processes_of(session)


def kill_when(command: list[str], out: Path, pattern: str, *, log: Path) -> None:
    """Start a command that fills a folder, and kill it and its workers as soon as there is such a file."""
    with log.open("a") as printed:
        run = subprocess.Popen([*command, out], start_new_session=True, stdout=printed, stderr=printed)
    while not list(out.glob(pattern)) and run.poll() is None:
        time.sleep(0.005)
    os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, log.read_text()
    assert gone(run.pid)


def kill_at_random(
    command: list[str], root: Path, record: str, suffix: str, *, kills: int, seed: int, log: Path, after: float = 0
) -> Counter[str]:
    """Kill runs of a command at random moments, each started again until it has ended.

    Args:
        command: the folder it fills is appended.
        root: of the folders.
        record: file that says that a job has ended.
        suffix: of the parts.
        kills: how many.
        seed: of the moments, uniform over the time that an undisturbed run takes.
        log: for what the runs print.
        after: share of that time in which none is killed, where starting takes most of it.

    Returns:
        How many kills found which state of the output.
    """
    rng = random.Random(seed)
    whole, found, number = root / "whole", Counter[str](), 0
    began = time.monotonic()
    subprocess.run([*command, whole], check=True, stdout=subprocess.DEVNULL)
    duration = time.monotonic() - began
    expected = files(whole)
    assert record in expected
    while found.total() < kills:
        out, number = root / str(number), number + 1
        while True:
            began, fresh = time.monotonic(), not out.exists()
            with log.open("a") as printed:
                run = subprocess.Popen([*command, out], start_new_session=True, stdout=printed, stderr=printed)
            try:
                code = run.wait(duration * rng.uniform(after, 1) if found.total() < kills else 600)
            except subprocess.TimeoutExpired:
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
                assert gone(run.pid)
                parts = list((out / WORK_FOLDER).glob(f"[0-9]*{suffix}"))
                found["ended" if (out / record).exists() else "parts" if parts else "no part"] += 1
            else:
                assert code == 0, log.read_text()
                if fresh:  # the machine is less busy than it was
                    duration = min(duration, time.monotonic() - began)
                assert gone(run.pid)
                break
        assert files(out) == expected
    return found


def store_slowly(text: str, path: Path) -> None:
    with path.open("w", encoding="utf-8") as file:
        for letter in text:
            file.write(letter)
            file.flush()
            time.sleep(0.003)


if __name__ == "__main__":
    complete(Path(sys.argv[1]), numbered(20), describe, store_slowly, workers=2)
