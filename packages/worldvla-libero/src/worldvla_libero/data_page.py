"""A token data set as one page for people: what is inside, how it is spread, what was left out and why.

The page is a single HTML file that needs no network and no JavaScript; equal input gives equal bytes.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from io import BytesIO
from string import Template
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldvla_libero.rendering import prepare_process
from worldvla_libero.shards import TokenEpisode
from worldvla_tokenizers import ActionTokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TRAINING = "train"  # the split that the bounds are fitted to

# Okabe and Ito's colours, told apart by colour-blind readers: training, validation, further splits.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
_GREY = "#666666"

_FIGURE_SIZE = (3.7, 1.5)  # inches; about as wide as a column of the page, so that letters keep their size
_SMALLEST_SHARE = 1e-5  # where the logarithmic axes begin
_LENGTH_BINS = 40
_OPEN_TASKS = 12  # with more, each task's previews are folded away
_OPEN_DROPPED = 20  # with more, the list of what was left out is folded away
_INSTRUCTIONS_SHOWN = 3  # of one task


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
    record: Mapping[str, Any],
    episodes: Iterable[tuple[str, TokenEpisode]],
    actions: ActionTokenizer,
    previews: Sequence[Preview],
) -> str:
    """Write the page of a token data set.

    Args:
        record: content of `dataset.json`. Needed: `splits`. Shown if there: `name`, `fingerprint`, `settings`,
            `dropped`, `versions`; `control_hz`, in the record or its settings, turns steps into seconds, and
            `action_names` likewise names the D dimensions.
        episodes: name of the split and episode, read once; one episode is in memory at a time.
        actions: bounds and bins, fitted to the training split.
        previews: episodes to show, in this order.

    Returns:
        HTML; names, instructions and messages are escaped.

    Raises:
        ValueError: an episode is of a split that the record lacks, or a split has another number of episodes.
        ActionError: actions of another width than the bounds.
    """
    survey = _survey(record["splits"], episodes, actions)
    known = {**(record.get("settings") or {}), **record}
    hz, names = known.get("control_hz"), known.get("action_names") or ()
    if len(names) != actions.dimensions:
        names = [f"dimension {d}" for d in range(actions.dimensions)]
    name = str(record.get("name", "token data set"))
    sections = {
        "Tasks": _tasks(survey),
        "Lengths": _lengths(survey.splits, hz),
        "Actions": _actions(survey.splits, actions, names),
        "Episodes": _contact_sheet(previews),
        "Left out": _dropped(record["dropped"]) if "dropped" in record else "",
        "Loading": _loading(name),
        "Settings": _settings(record),
    }
    shown = [(title, title.lower().replace(" ", "-"), body) for title, body in sections.items() if body]
    return _PAGE.substitute(
        name=escape(name),
        facts=_facts(survey, actions, hz),
        links="\n".join(f'<a href="#{anchor}">{title}</a>' for title, anchor, _ in shown),
        sections="\n".join(
            f'<section id="{anchor}">\n<h2>{title}</h2>\n{body}\n</section>' for title, anchor, body in shown
        ),
    )


@dataclass(eq=False)
class _Split:
    """What the pass over the episodes leaves of one split.

    Attributes:
        counts: (D, bins) values in each bin, clipped ones included.
        below: (D,) values below the lower bound.
        above: (D,) values above the upper bound.
        lengths: steps of each episode.
        episodes: how many of each task.
        steps: how many of each task.
    """

    counts: NDArray[np.int64]
    below: NDArray[np.int64]
    above: NDArray[np.int64]
    lengths: list[int] = field(default_factory=list)
    episodes: Counter[str] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)

    def add(self, episode: TokenEpisode, actions: ActionTokenizer) -> None:
        bins = actions.vocabulary.action_bins(actions.encode(episode.actions)) - 1  # (T, D), from 0
        places = bins + actions.bins * np.arange(actions.dimensions)
        self.counts += np.bincount(places.ravel(), minlength=self.counts.size).reshape(self.counts.shape)
        self.below += (episode.actions < actions.low).sum(axis=0)
        self.above += (episode.actions > actions.high).sum(axis=0)
        self.lengths.append(len(episode))
        self.episodes[episode.task] += 1
        self.steps[episode.task] += len(episode)


@dataclass(eq=False)
class _Survey:
    """What the pass over the episodes leaves of all splits, with the first instructions of each task."""

    splits: dict[str, _Split]
    instructions: dict[str, list[str]] = field(default_factory=dict)
    code_sizes: set[tuple[int, int]] = field(default_factory=set)


def _survey(
    recorded: Mapping[str, Any], episodes: Iterable[tuple[str, TokenEpisode]], actions: ActionTokenizer
) -> _Survey:
    def zeros(*shape: int) -> NDArray[np.int64]:
        return np.zeros((actions.dimensions, *shape), dtype=np.int64)

    survey = _Survey({name: _Split(zeros(actions.bins), zeros(), zeros()) for name in recorded})
    for name, episode in episodes:
        if name not in survey.splits:
            raise ValueError(f"{episode.id} is of split {name!r}; recorded: {', '.join(recorded)}")
        survey.splits[name].add(episode, actions)
        survey.code_sizes.add((episode.codes.shape[1], episode.codes.shape[2]))
        told = survey.instructions.setdefault(episode.task, [])
        if episode.instruction not in told and len(told) <= _INSTRUCTIONS_SHOWN:  # one more tells that there are
            told.append(episode.instruction)
    for name, split in survey.splits.items():
        expected = recorded[name].get("episodes", len(split.lengths))
        if len(split.lengths) != expected:
            raise ValueError(f"split {name!r} has {len(split.lengths)} episodes; recorded: {expected}")
    return survey


def _facts(survey: _Survey, actions: ActionTokenizer, hz: float | None) -> str:
    lengths = [steps for split in survey.splits.values() for steps in split.lengths]
    facts = [(f"{len(lengths):,}", "episodes"), (f"{sum(lengths):,}", "steps")]
    if hz:
        facts.append((f"{sum(lengths) / hz / 60:,.1f}", f"minutes at {hz:g} Hz"))
    facts.append((f"{len(survey.instructions):,}", "tasks"))
    sizes = " or ".join(f"{rows} &times; {columns}" for rows, columns in sorted(survey.code_sizes))
    facts += [
        (sizes or "&ndash;", "codes per frame"),
        (f"{actions.dimensions}", f"action dimensions, {actions.bins} bins"),
    ]
    return "\n".join(f"<div><dd>{value}</dd><dt>{label}</dt></div>" for value, label in facts)


def _tasks(survey: _Survey) -> str:
    columns = [(escape(name), split.episodes, split.steps) for name, split in survey.splits.items()]
    if len(columns) > 1:
        episodes, steps = (sum((column[i] for column in columns), Counter[str]()) for i in (1, 2))
        columns.append(("all", episodes, steps))

    def cell(episodes: int, steps: int) -> str:
        return (
            f'<td class="n">{episodes:,}<small>{steps:,} steps</small></td>'
            if episodes
            else '<td class="n">&ndash;</td>'
        )

    def row(head: str, tasks: Sequence[str]) -> str:
        cells = (cell(sum(e[t] for t in tasks), sum(s[t] for t in tasks)) for _, e, s in columns)
        return f"<tr>{head}{''.join(cells)}</tr>"

    rows = []
    for task in sorted(survey.instructions):
        told = survey.instructions[task]
        words = "<br>".join(escape(text) for text in told[:_INSTRUCTIONS_SHOWN])
        words += "<br>and others" if len(told) > _INSTRUCTIONS_SHOWN else ""
        rows.append(row(f"<td>{words}<small>{escape(task)}</small></td>", [task]))
    head = "".join(f'<th class="n">{name}</th>' for name, _, _ in columns)
    total = row("<th>all tasks</th>", list(survey.instructions))
    return _table(f"<tr><th>instruction and task</th>{head}</tr>{total}", rows)


def _lengths(splits: Mapping[str, _Split], hz: float | None) -> str:
    everything = [steps for split in splits.values() for steps in split.lengths]
    if not everything:
        return ""
    width = -(-(max(everything) - min(everything) + 1) // _LENGTH_BINS)  # whole steps, rounded up
    edges = np.arange(min(everything), max(everything) + width + 1, width) - 0.5

    def panel(name: str, split: _Split, colour: str) -> str:
        if not split.lengths:
            return _panel(name, "", "no episode")

        def draw(axes: Axes) -> None:
            axes.stairs(np.histogram(split.lengths, edges)[0], edges, fill=True, color=colour, alpha=0.75)
            axes.set_ylabel("episodes")
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=3)  # type: ignore[call-arg]
            axes.set_xlabel("steps")

        median = float(np.median(split.lengths))
        seconds = f" ({median / hz:.1f} s)" if hz else ""
        note = f"median {median:g} steps{seconds}, {min(split.lengths):,} to {max(split.lengths):,}"
        return _panel(name, _figure(draw, f"Histogram of episode lengths, {name}"), note)

    panels = (panel(name, split, colour) for name, split, colour in _coloured(splits))
    return f'<div class="panels">{"".join(panels)}</div>'


def _actions(splits: Mapping[str, _Split], actions: ActionTokenizer, names: Sequence[Any]) -> str:
    intervals = actions.bins - 1

    def panel(d: int) -> str:
        low, high = actions.low[d], actions.high[d]
        constant = low == high
        # bounds, and zero where it does not crowd them; on an axis of bins, which suits any unit
        zero = -low / (high - low) if not constant else 0.0
        ticks = {0.0: low, **({zero: 0.0} if 0.15 < zero < 0.85 else {}), **({} if constant else {1.0: high})}

        def draw(axes: Axes) -> None:
            for name, split, colour in _coloured(splits):
                if not split.lengths:
                    continue
                # the last bin holds only clipped values, has no width, and decodes to the centre of the one before
                share = np.append(split.counts[d, :-2], split.counts[d, -2:].sum()) / split.counts[d].sum()
                if name == _TRAINING:
                    axes.stairs(share, fill=True, color=colour, alpha=0.75)
                else:
                    axes.stairs(share, baseline=None, color=colour, linewidth=1.0)
            for bound in (0, intervals):
                axes.axvline(bound, color=_GREY, linewidth=0.8, linestyle=(0, (3, 2)))
            axes.set_yscale("log")
            axes.set_ylim(_SMALLEST_SHARE, 1.5)
            axes.set_yticks((1e-4, 1e-2, 1), ("0.01 %", "1 %", "100 %"))
            axes.set_yticks((), minor=True)
            axes.set_xlim(-0.04 * intervals, 1.04 * intervals)
            axes.set_xticks([place * intervals for place in ticks], [_number(value) for value in ticks.values()])

        used = (split.counts[d].astype(bool).sum() for name, split in splits.items() if name == _TRAINING)
        bins = f"{sum(used)} of {actions.bins} bins used" + (", constant" if constant else "")
        clipped = " · ".join(_clipped(name, split, d) for name, split in splits.items() if split.lengths)
        return _panel(str(names[d]), _figure(draw, f"Share of values per bin, {names[d]}"), bins, clipped)

    key = "".join(f'<span><i style="background:{c}"></i>{escape(n)}</span>' for n, _, c in _coloured(splits))
    return (
        f"<p>Share of the values that fall into each of {actions.bins} bins, on a logarithmic axis: the area is "
        f"<em>{_TRAINING}</em>, lines are other splits. Dashed: the bounds, in data units. Values outside them are "
        f'clipped. Bins count as used if a value of <em>{_TRAINING}</em> falls into them.</p><p class="key">{key}'
        f'</p><div class="panels">{"".join(panel(d) for d in range(actions.dimensions))}</div>'
    )


def _clipped(name: str, split: _Split, d: int) -> str:
    below, above = split.below[d], split.above[d]
    if not below + above:
        return f"{escape(name)} 0 clipped"
    share = (below + above) / split.counts[d].sum()
    percent = f"{share:.2%}" if share >= 5e-5 else "&lt;0.01%"
    return (
        f'<strong class="clipped">{escape(name)} {below + above:,} clipped</strong> '
        f"({percent}: {below:,} below, {above:,} above)"
    )


def _contact_sheet(previews: Sequence[Preview]) -> str:
    groups: dict[tuple[str, str], list[Preview]] = {}
    for preview in previews:
        groups.setdefault((preview.task, preview.instruction), []).append(preview)
    opened = " open" if len(groups) <= _OPEN_TASKS else ""
    html = ["<p>Evenly spaced frames of some episodes, oldest first.</p>"] if groups else []
    for (task, instruction), members in groups.items():
        html.append(f"<details{opened}><summary>{escape(instruction)}<small>{escape(task)}</small></summary>")
        for preview in members:
            source = f"data:image/jpeg;base64,{base64.b64encode(preview.strip).decode()}"
            alt = escape(f"{preview.episode}: {preview.instruction}")
            html.append(
                f'<figure class="strip"><div><img alt="{alt}" src="{source}" decoding="async"></div>'
                f"<figcaption><b>{escape(preview.split)}</b> {escape(preview.episode)}</figcaption></figure>"
            )
        html.append("</details>")
    return "\n".join(html)


def _dropped(dropped: Sequence[Mapping[str, str]]) -> str:
    if not dropped:
        return "<p>Nothing was left out.</p>"
    reasons = sorted(Counter(entry["reason"] for entry in dropped).items(), key=lambda item: (-item[1], item[0]))
    counts = [f'<tr><td>{escape(reason)}</td><td class="n">{n:,}</td></tr>' for reason, n in reasons]
    rows = [
        "<tr>" + "".join(f"<td>{escape(entry[k])}</td>" for k in ("id", "reason", "message")) + "</tr>"
        for entry in dropped
    ]
    opened = " open" if len(dropped) <= _OPEN_DROPPED else ""
    return (
        _table('<tr><th>reason</th><th class="n">left out</th></tr>', counts)
        + f"<details{opened}><summary>All {len(dropped):,} that were left out</summary>"
        + _table("<tr><th>episode or file</th><th>reason</th><th>what was wrong</th></tr>", rows)
        + "</details>"
    )


def _loading(name: str) -> str:
    return "<pre><code>" + escape(_LOADING.replace("NAME", repr(name))) + "</code></pre>"


def _settings(record: Mapping[str, Any]) -> str:
    shown = {key: record[key] for key in ("fingerprint", "settings", "versions") if record.get(key)}
    return _values(shown) if shown else ""


def _values(value: Any) -> str:
    """JSON as nested lists; words bare, all else as `dataset.json` spells it."""
    if isinstance(value, Mapping) and value:
        rows = (f"<div><dt>{escape(str(key))}</dt><dd>{_values(v)}</dd></div>" for key, v in value.items())
        return f"<dl>{''.join(rows)}</dl>"
    if isinstance(value, list | tuple) and value:
        return ", ".join(_values(v) for v in value)
    return escape(value if isinstance(value, str) else json.dumps(value))


def _table(head: str, rows: Sequence[str]) -> str:
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def _panel(title: str, figure: str, *notes: str) -> str:
    lines = "".join(f"<p>{note}</p>" for note in notes)
    return f"<figure><h3>{escape(title)}</h3>{figure}<figcaption>{lines}</figcaption></figure>\n"


def _figure(draw: Callable[[Axes], None], alt: str) -> str:
    """An SVG image, dark on nothing: the page inverts it in the dark."""
    prepare_process()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "worldvla",  # else ids in the file are random
        "svg.fonttype": "none",  # letters stay letters, in a font that the reader has
        "font.size": 9.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _GREY),
    }
    file = BytesIO()
    with rc_context(style):
        figure = Figure(figsize=_FIGURE_SIZE)
        draw(figure.add_axes((0.15, 0.24, 0.84, 0.72)))
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue().replace(b"'DejaVu Sans'", b"system-ui, 'DejaVu Sans'")  # the page's own font
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _coloured(splits: Mapping[str, _Split]) -> list[tuple[str, _Split, str]]:
    """Splits and their colours, training first, so that lines lie on its area."""
    ordered = sorted(splits, key=lambda name: name != _TRAINING)
    return [(name, splits[name], _COLOURS[i % len(_COLOURS)]) for i, name in enumerate(ordered)]


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


_LOADING = """\
from worldvla_libero.samples import ActionSamples, TokenSamples
from worldvla_libero.shards import TokenDataset
from worldvla_tokenizers import TextTokenizer

data = TokenDataset.from_pretrained(NAME, split="train")  # a folder, or a data set on the Hub
episode = data[0]                                         # .instruction .codes .actions

text = TextTokenizer.from_pretrained("tokenizer-of-your-model")
samples = TokenSamples(data, ActionSamples(history=2, actions=5), text)
ids, labels = samples[0]
"""

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$name</title>
<style>
:root { color-scheme: light; --ink: #1d2329; --soft: #5d6770; --line: #e2e5e9; --paper: #fff; --tint: #f6f7f9;
  --link: #0072B2; --alarm: #b34700; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e4e7ea; --soft: #9aa3ac; --line: #2c3238; --paper: #14171a; --tint: #1c2024;
    --link: #56B4E9; --alarm: #f0944d; }
  .panels img, .key i { filter: invert(1) hue-rotate(180deg); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1128px; padding: 40px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { margin: 0; font-size: 30px; line-height: 1.2; letter-spacing: -.015em; }
h2 { margin: 56px 0 12px; padding-top: 14px; border-top: 1px solid var(--line); font-size: 20px; }
h3 { margin: 0 0 4px; font-size: 14px; }
p { margin: 0 0 10px; max-width: 46em; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
small { display: block; color: var(--soft); font-size: 12.5px; }
header p, nav, figcaption, .key { color: var(--soft); font-size: 13px; }
nav { display: flex; flex-wrap: wrap; gap: 4px 20px; }
.facts { display: flex; flex-wrap: wrap; gap: 16px 44px; margin: 24px 0; }
.facts dd { margin: 0; font-size: 26px; font-weight: 600; line-height: 1.2; }
.facts dt { color: var(--soft); font-size: 13px; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll { max-height: 560px; overflow: auto; margin: 12px 0; }
table { border-collapse: collapse; }
th, td { padding: 7px 28px 7px 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-size: 13px; }
thead { position: sticky; top: 0; background: var(--paper); }
figure { margin: 0; break-inside: avoid; }
figcaption p { margin: 0; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 28px 32px; }
.panels img { display: block; width: 100%; }
.key span { margin-right: 18px; }
.key i { display: inline-block; width: 12px; height: 12px; margin-right: 6px; border-radius: 2px; }
.clipped { color: var(--alarm); }
summary { cursor: pointer; padding: 8px 0; font-weight: 600; }
summary small { display: inline; margin-left: 12px; font-weight: 400; }
.strip { margin: 4px 0 16px; }
.strip div { overflow-x: auto; }
.strip img { display: block; max-width: 100%; border-radius: 4px; }
.strip b { color: var(--ink); }
pre { overflow-x: auto; padding: 16px 20px; border-radius: 6px; background: var(--tint); font-size: 13px; }
section > dl div { display: grid; grid-template-columns: minmax(110px, 180px) 1fr; gap: 0 16px; }
section > dl div { padding: 5px 0; border-bottom: 1px solid var(--line); font-size: 13.5px; }
section > dl dl div:last-child { border: 0; }
section dl { margin: 0; }
section dt { color: var(--soft); }
section dd { margin: 0; max-height: 480px; overflow: auto; }
@media (max-width: 640px) {
  body { padding: 24px 16px 40px; }
  th, td { padding-right: 14px; }
  .strip img { max-width: none; height: 84px; }
  section > dl dl div { grid-template-columns: minmax(80px, 110px) 1fr; }
}
@media print {
  body { max-width: none; padding: 0; font-size: 12px; }
  nav { display: none; }
  .scroll, section dd { max-height: none; overflow: visible; }
  .panels { grid-template-columns: repeat(3, 1fr); }
}
</style>
</head>
<body>
<header>
<p>Token data set for WorldVLA</p>
<h1>$name</h1>
<dl class="facts">
$facts
</dl>
<nav>
$links
</nav>
</header>
$sections
</body>
</html>
""")
