"""Pictures and videos of runs in a page: embedded, or linked where they are many."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.evaluation.records import EpisodeRecord
from worldvla_libero.evaluation.report.evaluation_figures import short
from worldvla_libero.evaluation.report.evaluation_run import EvaluationRun
from worldvla_libero.evaluation.report.world_run import WorldRun
from worldvla_libero.evaluation.run_files import RunError
from worldvla_libero.figures import save_strips

_THUMBNAIL = 144  # pixels, larger than shown, for sharp screens and paper
_SHOWN_FAILURES = 12  # of a task and run
_PICTURE_ROWS, _PICTURE_COLUMNS = 24, 8
_ORDER = ("failure", "success", "error")  # of videos: what can be learned from most, first


@dataclass(frozen=True)
class Media:
    """How files of runs get into a page.

    Attributes:
        out: folder of the page.
        videos: how many episodes (and world-model rollouts) have their videos embedded.
    """

    out: Path
    videos: int

    def link(self, path: Path) -> str:
        """The address of a file, as seen from the page."""
        return quote(os.path.relpath(path.resolve(), self.out.resolve()).replace(os.sep, "/"))


@dataclass(frozen=True)
class Picture:
    """The last frame of an episode.

    Attributes:
        episode: its number.
        alt: what the picture shows, in words; why there is none.
        jpeg: None where there is none.
    """

    episode: int
    alt: str
    jpeg: bytes | None


@dataclass(frozen=True)
class Sheet:
    """Failed episodes of a task and run: the run, how many there are in words, and the first of them."""

    run: EvaluationRun
    words: str
    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Video:
    """A video that is embedded: the run it is of, what is said of it, what it shows in words, and the file."""

    run: EvaluationRun | WorldRun
    words: str
    alt: str
    mp4: bytes


def failure_sheets(
    runs: Sequence[EvaluationRun], tasks: Iterable[tuple[str, int]]
) -> dict[tuple[str, int], list[Sheet]]:
    """Last frames of failed episodes by task, for each run; of tasks that no run failed, none."""
    sheets: dict[tuple[str, int], list[Sheet]] = {}
    for key in tasks:
        for run in runs:
            failed = [e for e in run.of(*key) if e.outcome == "failure"]
            if failed:
                words = f"{len(failed)} of {run.rate(*key).episodes} failed"
                if len(failed) > _SHOWN_FAILURES:
                    words += f"; the first {_SHOWN_FAILURES} are shown"
                pictures = [_picture(run, episode) for episode in failed[:_SHOWN_FAILURES]]
                sheets.setdefault(key, []).append(Sheet(run, words, pictures))
    return sheets


def _picture(run: EvaluationRun, episode: EpisodeRecord) -> Picture:
    if episode.last_frame is None:
        return Picture(episode.episode, "no picture was kept", None)
    if not (path := run.folder / episode.last_frame).is_file():
        return Picture(episode.episode, "its picture is gone", None)
    alt = f"last frame of episode {episode.episode} of {episode.instruction}, {run.name}"
    return Picture(episode.episode, alt, thumbnail(path))


def save_failures(path: Path, runs: Sequence[EvaluationRun], tasks: Mapping[tuple[str, int], str]) -> None:
    """The same as a picture, as long as there are any: a row for each task and run.

    Raises:
        RunError: a last frame cannot be read.
    """
    from PIL import Image

    rows: list[dict[str, list[NDArray[np.uint8]]]] = []
    left_out = 0
    for suite, task in tasks:
        for run in runs:
            kept = [e.last_frame for e in run.of(suite, task) if e.outcome == "failure" and e.last_frame]
            found = [run.folder / name for name in kept if (run.folder / name).is_file()][:_PICTURE_COLUMNS]
            label = f"{suite}/{task}" + (f"\n{short(run.name)}" if len(runs) > 1 else "")
            if found and len(rows) == _PICTURE_ROWS:
                left_out += 1
            elif found:
                rows.append({label: [np.asarray(Image.open(io.BytesIO(thumbnail(file)))) for file in found]})
    more = f"; {left_out} more rows are left out" if left_out else ""
    if rows:
        save_strips(path, rows, title=f"first failed episodes of each task, last frames{more}")


def thumbnail(path: Path) -> bytes:
    """A picture, made small, as JPEG.

    Raises:
        RunError: it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    file = io.BytesIO()
    try:
        with Image.open(path) as image:
            image.convert("RGB").resize((_THUMBNAIL, _THUMBNAIL * image.height // image.width)).save(
                file, "JPEG", quality=82
            )
    except (UnidentifiedImageError, OSError) as error:
        raise RunError(f"{path} cannot be read as a picture: {error}") from error
    return file.getvalue()


def chosen_videos(
    runs: Sequence[EvaluationRun], tasks: Iterable[tuple[str, int]], count: int
) -> list[tuple[str, int, int]]:
    """Episodes whose videos are embedded: failures and successes in turn, first the first ones of each task.

    Of several runs the same episodes are chosen, so that they can be compared; an episode that failed in any of
    them counts as a failure. Errors come last: there is little to see.
    """
    outcomes: dict[tuple[str, int, int], set[str]] = {}
    for run in runs:
        for episode in run.episodes:
            if episode.video and (run.folder / episode.video).is_file():
                outcomes.setdefault(episode.key, set()).add(episode.outcome)
    seen = Counter[tuple[str, int, str]]()
    ranked: dict[str, list[tuple[int, tuple[str, int, int]]]] = {kind: [] for kind in _ORDER}
    order = {task: index for index, task in enumerate(tasks)}
    for key in sorted(outcomes, key=lambda key: (order[key[:2]], key)):
        kind = next(kind for kind in _ORDER if kind in outcomes[key])
        ranked[kind].append((seen[*key[:2], kind], key))
        seen[*key[:2], kind] += 1
    # Sorting is stable: what has the same rank among those of its task stays in the order of the tasks.
    failed, solved, broken = ([k for _, k in sorted(ranked[kind], key=lambda item: item[0])] for kind in _ORDER)
    turns = [key for pair in zip_longest(failed, solved) for key in pair if key is not None]
    return [*turns, *broken][:count]


def episode_videos(
    runs: Sequence[EvaluationRun], tasks: Mapping[tuple[str, int], str], media: Media
) -> dict[tuple[str, int, int], list[Video]]:
    """Videos of chosen episodes, those of one episode beside each other."""
    videos: dict[tuple[str, int, int], list[Video]] = {}
    for key in chosen_videos(runs, tasks, media.videos):
        for run in runs:
            episode = next((e for e in run.of(*key[:2]) if e.episode == key[2]), None)
            if episode is not None and episode.video and (path := run.folder / episode.video).is_file():
                words = f"{episode.outcome} after {episode.steps} steps"
                alt = f"video of episode {key[2]} of {tasks[key[:2]]}, {run.name}: {words}"
                videos.setdefault(key, []).append(Video(run, words, alt, path.read_bytes()))
    return videos


@dataclass(frozen=True)
class Rollouts:
    """Rollouts of a world model, true beside imagined: the first embedded, of the others addresses by id."""

    run: WorldRun
    videos: Sequence[Video]
    links: Sequence[tuple[str, str]]


def world_videos(runs: Sequence[WorldRun], media: Media) -> list[Rollouts]:
    """Rollouts of each run that has any."""
    found = []
    for run in runs:
        videos, links = list[Video](), list[tuple[str, str]]()
        for episode in run.content["episodes"]:
            if not episode.get("videos") or not (path := run.folder / episode["videos"]).is_file():
                continue
            words = f"{episode['task']}, {episode['frames']} frames from step {episode['start']}"
            if len(videos) < media.videos:
                videos.append(Video(run, words, words, path.read_bytes()))
            else:
                links.append((episode["id"], media.link(path)))
        if videos or links:
            found.append(Rollouts(run, videos, links))
    return found
