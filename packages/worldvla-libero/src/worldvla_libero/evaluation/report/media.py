"""Pictures and videos of runs in a page: embedded, or linked where they are many."""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
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
from worldvla_libero.pages.page import folded

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


def run_label(run: EvaluationRun | WorldRun, words: str = "") -> str:
    """The name of a run in its colour, and what is said of it."""
    text = escape(f"{run.name}: {words}" if words else run.name)
    return f'<p class="key"><i style="background:{run.colour}"></i><span>{text}</span></p>'


def failure_sheets(runs: Sequence[EvaluationRun], tasks: Mapping[tuple[str, int], str]) -> str:
    """Last frames of failed episodes, by task and run."""
    groups = []
    for key, instruction in tasks.items():
        sheets = []
        for run in runs:
            failed = [e for e in run.of(*key) if e.outcome == "failure"]
            if failed:
                label = f"{len(failed)} of {run.rate(*key).episodes} failed"
                if len(failed) > _SHOWN_FAILURES:
                    label += f"; the first {_SHOWN_FAILURES} are shown"
                shown = "".join(_thumbnail(run, episode) for episode in failed[:_SHOWN_FAILURES])
                sheets.append(f'{run_label(run, label)}<div class="sheet">{shown}</div>')
        if sheets:
            groups.append((f"{escape(instruction)} <small>{escape(key[0])}/{key[1]}</small>", "\n".join(sheets)))
    return "\n".join(folded(title, body, len(groups)) for title, body in groups)


def _thumbnail(run: EvaluationRun, episode: EpisodeRecord) -> str:
    what = f"episode {episode.episode}"
    caption = f"<figcaption>{what}</figcaption>"
    if episode.last_frame is None or not (path := run.folder / episode.last_frame).is_file():
        reason = "no picture was kept" if episode.last_frame is None else "its picture is gone"
        return f"<figure><figcaption>{reason}</figcaption>{caption}</figure>"
    alt = f"last frame of {what} of {episode.instruction}, {run.name}"
    source = base64.b64encode(thumbnail(path)).decode()
    return f'<figure><img alt="{escape(alt)}" src="data:image/jpeg;base64,{source}">{caption}</figure>'


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
    places = {task: place for place, task in enumerate(tasks)}
    for key in sorted(outcomes, key=lambda key: (places[key[:2]], key)):
        kind = next(kind for kind in _ORDER if kind in outcomes[key])
        ranked[kind].append((seen[*key[:2], kind], key))
        seen[*key[:2], kind] += 1
    # Sorting is stable: what has the same rank among those of its task stays in the order of the tasks.
    failed, solved, broken = ([k for _, k in sorted(ranked[kind], key=lambda item: item[0])] for kind in _ORDER)
    turns = [key for pair in zip_longest(failed, solved) for key in pair if key is not None]
    return [*turns, *broken][:count]


def episode_videos(runs: Sequence[EvaluationRun], tasks: Mapping[tuple[str, int], str], media: Media) -> str:
    """Videos of chosen episodes, those of one episode beside each other."""
    chosen = chosen_videos(runs, tasks, media.videos)
    html = []
    for key in chosen:
        title = f"{escape(tasks[key[:2]])} <small>{escape(key[0])}/{key[1]}, episode {key[2]}</small>"
        tiles = []
        for run in runs:
            episode = next((e for e in run.of(*key[:2]) if e.episode == key[2]), None)
            if episode is not None and episode.video and (path := run.folder / episode.video).is_file():
                words = f"{episode.outcome} after {episode.steps} steps"
                alt = f"video of episode {key[2]} of {tasks[key[:2]]}, {run.name}: {words}"
                head = f"<h3>{title}</h3>" if len(runs) == 1 else ""
                tiles.append(f"<figure>{_video(path, alt)}{run_label(run, words)}{head}</figure>")
        block = "".join(tiles)
        html.append(block if len(runs) == 1 else f'<h3>{title}</h3><div class="tiles">{block}</div>')
    body = "\n".join(html) if len(runs) > 1 or not html else f'<div class="tiles">{"".join(html)}</div>'
    recorded = {e.key for run in runs for e in run.episodes if e.video}
    if len(recorded) > len(chosen):
        body += (
            f"<p>{len(chosen)} of {len(recorded)} recorded episodes are embedded; the others are linked from the "
            'list of <a href="#episodes">episodes</a>, as long as their folders stay where they are.</p>'
        )
    return body


def world_videos(runs: Sequence[WorldRun], media: Media) -> str:
    """Rollouts of world models, true beside imagined: the first embedded, the others linked."""
    html = []
    for run in runs:
        tiles, links = list[str](), list[str]()
        for episode in run.content["episodes"]:
            if not episode.get("videos") or not (path := run.folder / episode["videos"]).is_file():
                continue
            words = f"{episode['task']}, {episode['frames']} frames from step {episode['start']}"
            if len(tiles) < media.videos:
                tiles.append(f"<figure>{_video(path, words)}<figcaption>{escape(words)}</figcaption></figure>")
            else:
                links.append(f'<a href="{media.link(path)}">{escape(str(episode["id"]))}</a>')
        if tiles or links:
            more = f"<p>More: {', '.join(links)}</p>" if links else ""
            html.append(f'{run_label(run)}<div class="tiles">{"".join(tiles)}</div>{more}')
    return "\n".join(html)


def _video(path: Path, alt: str) -> str:
    source = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<video controls muted loop playsinline preload="metadata" aria-label="{escape(alt)}" '
        f'src="data:video/mp4;base64,{source}"></video>'
    )
