"""A token data set as one page for people: what is inside, how it is spread, what was left out and why.

The page is a single HTML file that needs no network and no JavaScript; equal input gives equal bytes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.data.record import DataRecord, SplitRecord
from worldvla_libero.data.shards import TokenEpisode
from worldvla_libero.pages.page import render
from worldvla_libero.pages.panels import COLOURS, GREY, Note, Panel, number, percent
from worldvla_tokenizers import ActionTokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAINING = "train"  # the split that the bounds are fitted to

_LENGTH_BINS = 40


@dataclass(frozen=True)
class Preview:
    """An episode at a glance.

    Attributes:
        episode: its id.
        task: name of what it demonstrates.
        instruction: the task in words.
        split: that it belongs to.
        strip: JPEG, a row of evenly spaced frames of the episode, oldest first.
    """

    episode: str
    task: str
    instruction: str
    split: str
    strip: bytes


def data_page(
    record: DataRecord,
    episodes: Iterable[tuple[str, TokenEpisode]],
    actions: ActionTokenizer,
    previews: Sequence[Preview],
    action_names: Sequence[str] = (),
) -> str:
    """Write the page of a token data set.

    Args:
        record: of the data set; its `control_hz` turns steps into seconds.
        episodes: name of the split and episode, read once; one episode is in memory at a time.
        actions: bounds and bins, fitted to the training split.
        previews: episodes to show, in this order.
        action_names: of the D dimensions; by default they are numbered.

    Returns:
        HTML; all words that come from the data are escaped.

    Raises:
        ValueError: an episode is of a split that the record lacks, or a split has another number of episodes.
        ActionError: actions of another width than the bounds, or not finite.
    """
    survey = _survey(record.splits, episodes, actions)
    names = action_names or [f"dimension {d}" for d in range(actions.dimensions)]
    return render(
        __package__,
        "data.html",
        name=record.name,
        facts=_facts(survey, actions, record.control_hz),
        tasks=_tasks(survey),
        lengths=_lengths(survey.splits, record.control_hz),
        colours={name: split.colour for name, split in survey.splits.items() if sum(split.lengths)},
        actions=_actions(survey.splits, actions, names),
        bins=actions.bins,
        training=_TRAINING,
        previews=_by_task(previews),
        dropped=record.dropped,
        reasons=Counter(one.reason for one in record.dropped).most_common(),
        name_as_code=json.dumps(record.name),
        settings={"fingerprint": record.fingerprint, "settings": record.settings, "versions": record.versions},
    )


@dataclass(eq=False)
class _Split:
    """What the pass over the episodes leaves of a split.

    Attributes:
        colour: that it is drawn in.
        counts: (D, bins) values in each bin, clipped ones included.
        outside: (D,) values outside the bounds, which are clipped.
        lengths: steps of each episode.
        episodes: how many of each task.
        steps: how many of each task.
    """

    colour: str
    counts: NDArray[np.int64]
    outside: NDArray[np.int64]
    lengths: list[int] = field(default_factory=list)
    episodes: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)

    def add(self, episode: TokenEpisode, actions: ActionTokenizer) -> None:
        values = episode.actions  # (T, D)
        bins = actions.vocabulary.action_bins(actions.encode(values)) - 1  # (T, D), from 0
        cells = bins + actions.bins * np.arange(actions.dimensions)
        self.counts += np.bincount(cells.ravel(), minlength=self.counts.size).reshape(self.counts.shape)
        self.outside += ((values < actions.low) | (values > actions.high)).sum(axis=0)
        self.lengths.append(len(values))
        self.episodes[episode.task] += 1
        self.steps[episode.task] += len(values)


@dataclass(eq=False)
class _Survey:
    """What the pass over the episodes leaves: splits, training first; tasks; rows and columns of the codes."""

    splits: dict[str, _Split]
    instructions: dict[str, list[str]] = field(default_factory=dict)  # one of each task, two if they differ
    code_sizes: set[tuple[int, ...]] = field(default_factory=set)


def _survey(
    recorded: Mapping[str, SplitRecord], episodes: Iterable[tuple[str, TokenEpisode]], actions: ActionTokenizer
) -> _Survey:
    survey = _Survey({})
    for i, name in enumerate(sorted(recorded, key=lambda name: name != _TRAINING)):
        counts = np.zeros((actions.dimensions, actions.bins), dtype=np.int64)
        survey.splits[name] = _Split(COLOURS[i % len(COLOURS)], counts, np.zeros_like(counts[:, 0]))
    for name, episode in episodes:
        if name not in survey.splits:
            raise ValueError(f"{episode.id} is of split {name!r}; recorded: {', '.join(recorded)}")
        survey.splits[name].add(episode, actions)
        survey.code_sizes.add(episode.codes.shape[1:])
        instructions = survey.instructions.setdefault(episode.task, [])
        if episode.instruction not in instructions and len(instructions) < 2:
            instructions.append(episode.instruction)
    for name, split in survey.splits.items():
        expected = recorded[name].episodes
        if len(split.lengths) != expected:
            raise ValueError(f"split {name!r} has {len(split.lengths)} episodes; recorded: {expected}")
    return survey


def _facts(survey: _Survey, actions: ActionTokenizer, hz: float | None) -> dict[str, str]:
    lengths = [steps for split in survey.splits.values() for steps in split.lengths]
    sizes = " or ".join(f"{rows} \N{MULTIPLICATION SIGN} {columns}" for rows, columns in sorted(survey.code_sizes))
    return {
        "episodes": f"{len(lengths):,}",
        "steps": f"{sum(lengths):,}",
        **({f"minutes at {hz:g} Hz": f"{sum(lengths) / hz / 60:,.1f}"} if hz else {}),
        "tasks": f"{len(survey.instructions):,}",
        "image codes per frame": sizes or "\N{EN DASH}",
        f"action dimensions, {actions.bins} bins each": f"{actions.dimensions}",
    }


@dataclass(frozen=True)
class _TaskTable:
    """Episodes and steps by task and split.

    Attributes:
        splits: names of the columns.
        all: (episodes, steps) of each column.
        tasks: name, one of its instructions, whether it has others, and (episodes, steps) of each column.
    """

    splits: Sequence[str]
    all: Sequence[tuple[int, int]]
    tasks: Sequence[tuple[str, str, bool, Sequence[tuple[int, int]]]]


def _tasks(survey: _Survey) -> _TaskTable:
    columns = {name: (split.episodes, split.steps) for name, split in survey.splits.items()}
    counts = list(columns.values())
    if len(columns) > 1:
        none = Counter[str]()
        counts.append((sum((e for e, _ in counts), none), sum((s for _, s in counts), none)))

    def row(tasks: Collection[str]) -> list[tuple[int, int]]:
        return [(sum(e[task] for task in tasks), sum(s[task] for task in tasks)) for e, s in counts]

    tasks = [(task, words[0], len(words) > 1, row([task])) for task, words in sorted(survey.instructions.items())]
    return _TaskTable([*columns, *["all"] * (len(columns) > 1)], row(survey.instructions), tasks)


def _lengths(splits: Mapping[str, _Split], hz: float | None) -> list[Panel]:
    everything = [steps for split in splits.values() for steps in split.lengths]
    if not everything:
        return []
    shortest, longest = min(everything), max(everything)
    width = (longest - shortest) // _LENGTH_BINS + 1
    edges = np.arange(shortest, longest + width + 1, width) - 0.5  # whole steps are amid their bin

    def panel(name: str, split: _Split) -> Panel:
        if not split.lengths:
            return Panel(name, None, notes=["no episode"])

        def draw(axes: Axes) -> None:
            axes.stairs(np.histogram(split.lengths, edges)[0], edges, fill=True, color=split.colour, alpha=0.75)
            axes.locator_params(axis="x", integer=True, min_n_ticks=1, nbins=6)
            axes.locator_params(axis="y", integer=True, min_n_ticks=1, nbins=3)

        median = float(np.median(split.lengths))
        seconds = f" ({median / hz:.1f} s)" if hz else ""
        note = f"median {median:g} steps{seconds}, from {min(split.lengths):,} to {max(split.lengths):,}"
        return Panel(name, draw, f"histogram of episode lengths, {name}", [note])

    return [panel(name, split) for name, split in splits.items()]


def _actions(splits: Mapping[str, _Split], actions: ActionTokenizer, names: Sequence[Any]) -> list[Panel]:
    filled = {name: split for name, split in splits.items() if sum(split.lengths)}
    end = actions.bins - 1  # the axis counts bins, which suits any unit; its labels are in data units

    def panel(d: int) -> Panel:
        low, high = actions.low[d], actions.high[d]
        span = high - low + 1e-8  # as `encode` has it, so that a constant dimension has a place, too
        upper, zero = (high - low) / span, -low / span
        ticks = {0.0: low, upper: high, **({zero: 0.0} if 0.15 < zero < upper - 0.15 else {})}

        def draw(axes: Axes) -> None:
            top = 0.0
            for name, split in filled.items():
                # values at the upper bound have a bin of no width, which decodes to the centre of the one before
                share = np.append(split.counts[d, :-2], split.counts[d, -2:].sum()) / split.counts[d].sum()
                area = name == _TRAINING
                style = {"alpha": 0.75, "linewidth": 1.2} if area else {"linewidth": 0.8}
                axes.stairs(share, fill=area, color=split.colour, **style)  # type: ignore[arg-type]
                top = max(top, share.max())
            for beyond in ((-0.03, 0), (upper, 1.03)):
                axes.axvspan(beyond[0] * end, beyond[1] * end, color=GREY, alpha=0.2, linewidth=0)
            axes.set_yscale("function", functions=(np.sqrt, np.square))
            axes.set(xlim=(-0.03 * end, 1.03 * end), ylim=(0, 1.05 * top))
            axes.set_xticks([position * end for position in ticks], [number(value) for value in ticks.values()])
            axes.set_yticks((0, top / 4, top), ("0", percent(top / 4), percent(top)))

        used = sum(int(np.count_nonzero(s.counts[d])) for name, s in filled.items() if name == _TRAINING)
        notes: list[str | Note] = [f"{used} of {actions.bins} bins used" + (", constant" if low == high else "")]
        for name, split in filled.items():
            n = split.outside[d]
            share = percent(n / split.counts[d].sum())
            notes.append(Note(f"{name}: ", f"{n:,} clipped", f" ({share})") if n else f"{name}: none clipped")
        return Panel(str(names[d]), draw, f"share of values per bin, {names[d]}", notes)

    return [panel(d) for d in range(actions.dimensions)] if filled else []


def _by_task(previews: Sequence[Preview]) -> dict[tuple[str, str], list[Preview]]:
    """Previews of each task and instruction."""
    groups: dict[tuple[str, str], list[Preview]] = {}
    for preview in previews:
        groups.setdefault((preview.task, preview.instruction), []).append(preview)
    return groups
