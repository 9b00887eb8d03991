"""Replay with two workers against one: episodes and frames a second, in alternating runs.

Raw demonstrations are replayed in the simulator, rendered and stored as a LeRobotDataset, as the command does it.
The software renderer has one thread per worker on both sides. All outputs must be equal, byte by byte.

Two figures: at full speed, that is from the moment when every worker has done its first episode; and all in, with
the start of the processes (imports, first scene) and the writing of the data set, which a small job feels most.

    python benchmarks/replay_workers.py [--quick] [--demos FOLDER] [--episodes 8] [--repeats 3]

Linux only: the load by others is read from /proc. Two free cores are needed.
"""

from __future__ import annotations

import os

os.environ["LP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before imports; the workers inherit it

import argparse
import hashlib
import itertools
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

from common import FIXTURES, own_seconds, print_machine, print_others, table, watching_others, yes

from worldvla_libero.data.episodes import (
    Episode,
    EpisodeKey,
    Source,
    spread,
)
from worldvla_libero.demonstrations.replay import ReplaySettings, replay
from worldvla_libero.hdf5 import HDF5Source
from worldvla_libero.jobs.parts import Dropped
from worldvla_libero.simulator.rendering import renderer_name

DEMOS = FIXTURES / "demos" / "libero_object"
WORKERS = (1, 2)
NEEDED = 1.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one repeat of 3 episodes: to see that it runs")
    parser.add_argument("--demos", type=Path, default=DEMOS, help="folder of raw demonstrations")
    parser.add_argument("--episodes", type=int, help="how many; repeated if there are fewer (8)")
    parser.add_argument("--repeats", type=int, help="runs of each side, in turn (3)")
    parser.add_argument("--image-size", type=int, help="pixels of the frames (128)")
    options = parser.parse_args()
    episodes = options.episodes or (3 if options.quick else 8)
    repeats = options.repeats or (1 if options.quick else 3)
    settings = ReplaySettings(image_size=options.image_size or (32 if options.quick else 128))
    if episodes <= max(WORKERS):
        parser.error(f"--episodes is {episodes}; allowed: above {max(WORKERS)}, for the first ones do not count")

    source, keys = demonstrations(options.demos, episodes)
    print_machine(
        sizes="quick" if options.quick else "default",
        demos=options.demos.name,
        episodes=len(keys),
        image_size=settings.image_size,
        renderer=renderer_name(),
        threads="1 a worker",
    )
    runs: dict[int, list[Run]] = {workers: [] for workers in WORKERS}
    with tempfile.TemporaryDirectory() as folder, watching_others() as others:
        for _ in range(repeats):
            for workers in WORKERS:
                runs[workers].append(run(source, keys, Path(folder) / "out", settings, workers))
    outputs = {one.output for one in itertools.chain(*runs.values())}
    assert len(outputs) == 1, f"{len(outputs)} different outputs"
    print_runs(runs, len(keys))
    print_others(others)


# Replay -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Repeated:
    """The same demonstrations several times over, each time under another id."""

    source: Source
    times: int
    cameras: tuple[str, ...] = ()
    needs_replay: bool = True

    @property
    def name(self) -> str:
        """That of the demonstrations."""
        return self.source.name

    def list(self) -> tuple[Sequence[EpisodeKey], Sequence[Dropped]]:
        """Copies of an episode are neighbours."""
        keys, dropped = self.source.list()
        copies = itertools.product(keys, range(self.times))
        return [key._replace(id=f"{key.id}#{number}") for key, number in copies], dropped

    def read(self, id: str, cameras: Sequence[str] = ()) -> Episode:
        """Read the original."""
        return replace(self.source.read(id.rpartition("#")[0], cameras), id=id)


def demonstrations(folder: Path, episodes: int) -> tuple[Source, list[EpisodeKey]]:
    source = HDF5Source(folder)
    repeated = Repeated(source, -(-episodes // len(source.list()[0])))
    return repeated, spread(repeated.list()[0], episodes)


class Run(NamedTuple):
    """One replay.

    Attributes:
        frames: rendered and kept, of all episodes.
        seconds: of all of it.
        cpu: processor seconds of this process and the workers, hardly touched by what else runs.
        starting: seconds until every worker had done its first episode.
        episodes_after: done after that, up to the last.
        frames_after: theirs.
        seconds_after: from then until the last episode was done.
        output: SHA-256 of all files, names and content.
    """

    frames: int
    seconds: float
    cpu: float
    starting: float
    episodes_after: int
    frames_after: int
    seconds_after: float
    output: str

    @property
    def rate(self) -> float:
        """Frames a second at full speed."""
        return self.frames_after / self.seconds_after


def run(source: Source, keys: Sequence[EpisodeKey], out: Path, settings: ReplaySettings, workers: int) -> Run:
    done: dict[str, tuple[float, int]] = {}  # seconds since the start, frames
    began, cpu = time.perf_counter(), own_seconds()

    def on_part(name: str, part: Path | Dropped) -> None:
        assert isinstance(part, Path), part
        done[name] = time.perf_counter() - began, HDF5Source(part).list()[0][0].steps

    replay(source, keys, out, settings, workers=workers, on_part=on_part)
    seconds = time.perf_counter() - began
    first = sorted(done)[:workers]  # episodes are given out in this order: one to each worker
    starting = max(done[name][0] for name in first)
    after = [(when, frames) for when, frames in done.values() if when > starting]
    result = Run(
        frames=sum(frames for _, frames in done.values()),
        seconds=seconds,
        cpu=own_seconds() - cpu,
        starting=starting,
        episodes_after=len(after),
        frames_after=sum(frames for _, frames in after),
        seconds_after=max(when for when, _ in after) - starting,
        output=digest_of(out),
    )
    shutil.rmtree(out)
    return result


def digest_of(folder: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            file = hashlib.sha256(path.read_bytes()).hexdigest()
            content.update(f"{path.relative_to(folder)} {file}\n".encode())
    return content.hexdigest()


# Printing -----------------------------------------------------------------------------------------------------


def print_runs(runs: dict[int, list[Run]], episodes: int) -> None:
    first = runs[WORKERS[0]][0]
    print(
        f"\nReplay of {episodes} episodes, {first.frames:,} frames; medians of {len(runs[1])} runs of each side, "
        f"in turn (lowest … highest).\nThe outputs of all {2 * len(runs[1])} runs are equal, byte by byte.\n"
    )
    measures: list[tuple[str, Callable[[Run], float], int]] = [
        ("at full speed: episodes/s", lambda one: one.episodes_after / one.seconds_after, 3),
        ("at full speed: frames/s", lambda one: one.rate, 1),
        ("  measured over [s]", lambda one: one.seconds_after, 1),
        ("until every worker has done one episode [s]", lambda one: one.starting, 1),
        ("all in: seconds", lambda one: one.seconds, 1),
        ("all in: frames/s", lambda one: one.frames / one.seconds, 1),
        ("all in: processor milliseconds a frame", lambda one: 1000 * one.cpu / one.frames, 0),
    ]
    rows = [
        [what, *(spread_of([measure(one) for one in runs[workers]], digits) for workers in WORKERS)]
        for what, measure, digits in measures
    ]
    table(rows, ["", "one worker", "two workers"])
    print()
    pairs = list(zip(runs[1], runs[2], strict=True))
    full_speed = [two.rate / one.rate for one, two in pairs]
    table(
        [
            ["at full speed", spread_of(full_speed, 2), f"{NEEDED}x", yes(median(full_speed) >= NEEDED)],
            ["all in", spread_of([one.seconds / two.seconds for one, two in pairs], 2), "", ""],
        ],
        ["frames/s, two workers against one", "ratio", "needed", "reached"],
    )


def spread_of(values: Sequence[float], digits: int) -> str:
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f} … {max(values):,.{digits}f})"


if __name__ == "__main__":
    main()
