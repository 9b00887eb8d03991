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

_FIGURE_SIZE = (3.7, 1.4)  # inches; about as wide as a column of the page, so that letters keep their size
_LENGTH_BINS = 40
_UNFOLDED = 20  # tasks with previews, or rows of what was left out; more are folded away


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
            `action_names`, likewise, names the D dimensions.
        episodes: name of the split and episode, read once; one episode is in memory at a time.
        actions: bounds and bins, fitted to the training split.
        previews: episodes to show, in this order.

    Returns:
        HTML; all words that come from the data are escaped.

    Raises:
        ValueError: an episode is of a split that the record lacks, or a split has another number of episodes.
        ActionError: actions of another width than the bounds, or not finite.
    """
    survey = _survey(record["splits"], episodes, actions)
    known = {**(record.get("settings") or {}), **record}
    hz, names = known.get("control_hz"), known.get("action_names") or ()
    if len(names) != actions.dimensions:
        names = [f"dimension {d}" for d in range(actions.dimensions)]
    name = str(record.get("name", "token data set"))
    described = {key: record[key] for key in ("fingerprint", "settings", "versions") if record.get(key)}
    sections = {
        "Tasks": _tasks(survey),
        "Lengths": _lengths(survey.splits, hz),
        "Actions": _actions(survey.splits, actions, names),
        "Episodes": _contact_sheet(previews),
        "Left out": _dropped(record["dropped"]) if "dropped" in record else "",
        "Loading": f"<pre><code>{escape(_LOADING.format(name=json.dumps(name)))}</code></pre>",
        "Settings": _values(described) if described else "",
    }
    shown = [(title, title.lower().replace(" ", "-"), body) for title, body in sections.items() if body]
    return _PAGE.substitute(
        name=escape(name),
        facts=_facts(survey, actions, hz),
        links="\n".join(f'<a href="#{anchor}">{title}</a>' for title, anchor, _ in shown),
        sections="\n".join(f'<section id="{anchor}">\n<h2>{title}</h2>\n{body}\n</section>'
                           for title, anchor, body in shown),
    )  # fmt: skip


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
        places = bins + actions.bins * np.arange(actions.dimensions)
        self.counts += np.bincount(places.ravel(), minlength=self.counts.size).reshape(self.counts.shape)
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
    recorded: Mapping[str, Any], episodes: Iterable[tuple[str, TokenEpisode]], actions: ActionTokenizer
) -> _Survey:
    survey = _Survey({})
    for i, name in enumerate(sorted(recorded, key=lambda name: name != _TRAINING)):
        counts = np.zeros((actions.dimensions, actions.bins), dtype=np.int64)
        survey.splits[name] = _Split(_COLOURS[i % len(_COLOURS)], counts, np.zeros_like(counts[:, 0]))
    for name, episode in episodes:
        if name not in survey.splits:
            raise ValueError(f"{episode.id} is of split {name!r}; recorded: {', '.join(recorded)}")
        survey.splits[name].add(episode, actions)
        survey.code_sizes.add(episode.codes.shape[1:])
        told = survey.instructions.setdefault(episode.task, [])
        if episode.instruction not in told and len(told) < 2:
            told.append(episode.instruction)
    for name, split in survey.splits.items():
        expected = recorded[name].get("episodes", len(split.lengths))
        if len(split.lengths) != expected:
            raise ValueError(f"split {name!r} has {len(split.lengths)} episodes; recorded: {expected}")
    return survey


def _facts(survey: _Survey, actions: ActionTokenizer, hz: float | None) -> str:
    lengths = [steps for split in survey.splits.values() for steps in split.lengths]
    sizes = " or ".join(f"{rows} &times; {columns}" for rows, columns in sorted(survey.code_sizes))
    facts = {
        "episodes": f"{len(lengths):,}",
        "steps": f"{sum(lengths):,}",
        **({f"minutes at {hz:g} Hz": f"{sum(lengths) / hz / 60:,.1f}"} if hz else {}),
        "tasks": f"{len(survey.instructions):,}",
        "image codes per frame": sizes or "&ndash;",
        f"action dimensions, {actions.bins} bins each": f"{actions.dimensions}",
    }
    return "\n".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in facts.items())


def _tasks(survey: _Survey) -> str:
    """Episodes and steps by task and split; the sum on top, where it stays in sight."""
    splits = survey.splits.values()
    columns = [(name, split.episodes, split.steps) for name, split in survey.splits.items()]
    if len(columns) > 1:
        none = Counter[str]()
        columns.append(("all", sum((s.episodes for s in splits), none), sum((s.steps for s in splits), none)))

    def row(head: str, tasks: Iterable[str]) -> str:
        for _, episodes, steps in columns:
            n, total = (sum(counts[task] for task in tasks) for counts in (episodes, steps))
            head += f'<td class="n">{n:,}<small>{total:,} steps</small></td>'
        return f"<tr>{head}</tr>"

    rows = []
    for task, told in sorted(survey.instructions.items()):
        words = escape(told[0]) + (" <small>and others</small>" if len(told) > 1 else "")
        rows.append(row(f"<td>{words}<small>{escape(task)}</small></td>", [task]))
    heads = "".join(f'<th class="n">{escape(name)}</th>' for name, *_ in columns)
    return _table(f"<tr><th></th>{heads}</tr>{row('<th>all tasks</th>', survey.instructions)}", rows)


def _lengths(splits: Mapping[str, _Split], hz: float | None) -> str:
    everything = [steps for split in splits.values() for steps in split.lengths]
    if not everything:
        return ""
    shortest, longest = min(everything), max(everything)
    width = (longest - shortest) // _LENGTH_BINS + 1
    edges = np.arange(shortest, longest + width + 1, width) - 0.5  # whole steps are amid their bin

    def panel(name: str, split: _Split) -> str:
        if not split.lengths:
            return _panel(name, "", "no episode")

        def draw(axes: Axes) -> None:
            axes.stairs(np.histogram(split.lengths, edges)[0], edges, fill=True, color=split.colour, alpha=0.75)
            axes.locator_params(axis="x", integer=True, min_n_ticks=1, nbins=6)
            axes.locator_params(axis="y", integer=True, min_n_ticks=1, nbins=3)

        median = float(np.median(split.lengths))
        seconds = f" ({median / hz:.1f} s)" if hz else ""
        note = f"median {median:g} steps{seconds}, from {min(split.lengths):,} to {max(split.lengths):,}"
        return _panel(name, _figure(draw, f"histogram of episode lengths, {name}"), note)

    panels = "".join(panel(name, split) for name, split in splits.items())
    return f'<p>Number of episodes by their number of steps.</p><div class="panels">{panels}</div>'


def _actions(splits: Mapping[str, _Split], actions: ActionTokenizer, names: Sequence[Any]) -> str:
    filled = {name: split for name, split in splits.items() if sum(split.lengths)}
    if not filled:
        return ""
    end = actions.bins - 1  # the axis counts bins, which suits any unit; its labels are in data units

    def panel(d: int) -> str:
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
                axes.axvspan(beyond[0] * end, beyond[1] * end, color=_GREY, alpha=0.2, linewidth=0)
            axes.set_yscale("function", functions=(np.sqrt, np.square))
            axes.set(xlim=(-0.03 * end, 1.03 * end), ylim=(0, 1.05 * top))
            axes.set_xticks([place * end for place in ticks], [_number(value) for value in ticks.values()])
            axes.set_yticks((0, top / 4, top), ("0", _percent(top / 4), _percent(top)))

        used = sum(int(np.count_nonzero(s.counts[d])) for name, s in filled.items() if name == _TRAINING)
        notes = [f"{used} of {actions.bins} bins used" + (", constant" if low == high else "")]
        for name, split in filled.items():
            n = split.outside[d]
            clipped = f"<b>{n:,} clipped</b> ({_percent(n / split.counts[d].sum())})" if n else "none clipped"
            notes.append(f"{escape(name)}: {clipped}")
        return _panel(str(names[d]), _figure(draw, f"share of values per bin, {names[d]}"), *notes)

    key = [f'<i style="background:{s.colour}"></i><span>{escape(name)}</span>' for name, s in filled.items()]
    return f"""<p>Share of the values in each of the {actions.bins} bins, on a square-root axis, over data units.
The grey margins lie outside the bounds: values there are clipped to the outermost bins. A bin is used if a value
of <i>{_TRAINING}</i> falls into it.</p>
<p class="key">{"".join(key)}</p>
<div class="panels">{"".join(panel(d) for d in range(actions.dimensions))}</div>"""


def _contact_sheet(previews: Sequence[Preview]) -> str:
    groups: dict[tuple[str, str], list[Preview]] = {}
    for preview in previews:
        groups.setdefault((preview.task, preview.instruction), []).append(preview)
    html = []
    for (task, instruction), members in groups.items():
        strips = []
        for preview in members:
            source = f"data:image/jpeg;base64,{base64.b64encode(preview.strip).decode()}"
            strips.append(
                f'<figure class="strip"><div><img alt="frames of {escape(preview.episode)}" src="{source}"></div>'
                f"<figcaption><b>{escape(preview.split)}</b><br>{escape(preview.episode)}</figcaption></figure>"
            )
        title = f"{escape(instruction)} <small>{escape(task)}</small>"
        html.append(_folded(title, "\n".join(strips), len(groups)))
    body = "\n".join(html)
    return body if len(groups) <= _UNFOLDED else f'<div class="scroll">{body}</div>'


def _dropped(dropped: Sequence[Mapping[str, Any]]) -> str:
    if not dropped:
        return "<p>Nothing was left out.</p>"
    reasons = Counter(str(entry["reason"]) for entry in dropped).most_common()
    counts = [f'<tr><td>{escape(reason)}</td><td class="n">{n:,}</td></tr>' for reason, n in reasons]
    keys = ("id", "reason", "message")
    rows = ["<tr>" + "".join(f"<td>{escape(str(entry[key]))}</td>" for key in keys) + "</tr>" for entry in dropped]
    head = "<tr><th>episode or file</th><th>reason</th><th>what was wrong</th></tr>"
    return _table("", counts) + _folded(f"All {len(dropped):,}, one by one", _table(head, rows), len(dropped))


def _values(value: Any) -> str:
    """JSON as nested lists; words bare, all else as `dataset.json` spells it."""
    if isinstance(value, Mapping) and value:
        rows = (f"<div><dt>{escape(str(key))}</dt><dd>{_values(v)}</dd></div>" for key, v in value.items())
        return f"<dl>{''.join(rows)}</dl>"
    if isinstance(value, list | tuple) and value:
        return ", ".join(_values(v) for v in value)
    return escape(value if isinstance(value, str) else json.dumps(value))


def _table(head: str, rows: Iterable[str]) -> str:
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def _folded(title: str, body: str, among: int) -> str:
    opened = " open" if among <= _UNFOLDED else ""
    return f"<details{opened}><summary>{title}</summary>\n{body}\n</details>"


def _panel(title: str, figure: str, *notes: str) -> str:
    return f"<figure><h3>{escape(title)}</h3>{figure}<figcaption>{'<br>'.join(notes)}</figcaption></figure>\n"


def _figure(draw: Callable[[Axes], None], alt: str) -> str:
    """An SVG image without background, in colours that can be read on white and, brighter, on black."""
    prepare_process()
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    style = {
        "svg.hashsalt": "worldvla",  # else ids in the file are random
        "svg.fonttype": "none",  # letters stay letters, in the reader's font
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _GREY),
    }
    file = BytesIO()
    with rc_context(style):  # type: ignore[arg-type]
        figure = Figure(figsize=_FIGURE_SIZE)
        draw(figure.add_axes((0.14, 0.16, 0.78, 0.78)))
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue().replace(b"'DejaVu Sans'", b"system-ui, 'DejaVu Sans'")  # the font of the page
    return f'<img alt="{escape(alt)}" src="data:image/svg+xml;base64,{base64.b64encode(svg).decode()}">'


def _number(value: float) -> str:
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def _percent(share: float) -> str:
    return np.format_float_positional(100 * share, precision=2, fractional=False, trim="-") + "%"


_LOADING = """\
from worldvla_libero.samples import ActionSamples, TokenSamples
from worldvla_libero.shards import TokenDataset
from worldvla_tokenizers import TextTokenizer

data = TokenDataset.from_pretrained({name}, split="train")  # this folder, or a data set on the Hub
episode = data[0]  # .instruction, .codes (T, rows, columns), .actions (T, D)

text = TextTokenizer.from_pretrained("folder-of-your-model")
samples = TokenSamples(data, ActionSamples(history=2, actions=5), text)
ids, labels = samples[0]"""

_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name</title>
<style>
:root { color-scheme: light; --ink: #1d2329; --soft: #5d6770; --line: #e2e5e9; --paper: #fff; --link: #0072B2; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e4e7ea; --soft: #9aa3ac; --line: #2c3238; --paper: #14171a;
    --link: #56B4E9; }
  .panels img, .key i { filter: brightness(1.3); }
}
body { max-width: 1080px; margin: 40px auto; padding: 0 24px; overflow-wrap: anywhere;
  background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 20px; font-size: 30px; line-height: 1.2; }
h2 { margin: 48px 0 12px; padding-top: 14px; border-top: 1px solid var(--line); font-size: 20px; }
h3 { margin: 0 0 4px; font-size: 14px; }
p { margin: 0 0 8px; max-width: 46em; }
a { color: var(--link); text-decoration: none; }
small, dt, figcaption, nav, .key { color: var(--soft); font-size: 13px; }
dl, dd, figure { margin: 0; }
.facts, nav, .key { display: flex; flex-wrap: wrap; gap: 4px 20px; }
.facts { gap: 14px 40px; margin-bottom: 24px; }
.facts div { display: flex; flex-direction: column-reverse; }
.facts dd { font-size: 26px; font-weight: 600; line-height: 1.2; }
.scroll { max-height: 560px; overflow: auto; margin-bottom: 12px; }
table { border-collapse: collapse; }
thead { position: sticky; top: 0; background: var(--paper); }
th, td { min-width: 120px; padding: 7px 32px 7px 0; border-bottom: 1px solid var(--line);
  text-align: left; vertical-align: top; }
th small, td small { display: block; font-weight: 400; }
th.n, td.n { min-width: 0; text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 28px 32px; }
.panels img { display: block; width: 100%; }
.panels figure, .strip { break-inside: avoid; }
.key i { align-self: center; width: 12px; height: 12px; margin-right: -14px; border-radius: 2px; }
figcaption b { color: var(--ink); }
summary { padding: 8px 0; font-weight: 600; cursor: pointer; }
summary small { margin-left: 8px; font-weight: 400; }
.strip { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 20px; margin-bottom: 12px; }
.strip div { max-width: 100%; overflow-x: auto; }
.strip img { display: block; border-radius: 4px; }
.strip figcaption { flex: 1 1 200px; }
pre { overflow-x: auto; padding: 16px 20px; border: 1px solid var(--line); border-radius: 6px; font-size: 13px; }
section dl div { display: grid; grid-template-columns: minmax(90px, 160px) 1fr; gap: 16px; padding: 3px 0;
  align-items: baseline; }
section dd { font-size: 14px; }
@media (max-width: 640px) {
  body { margin: 24px auto; padding: 0 16px; }
  th, td { min-width: 100px; padding-right: 10px; }
  .strip img { height: 84px; }
}
@media print {
  nav { display: none; }
  .scroll { max-height: none; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  .strip img { max-width: 100%; }
}
</style>
</head>
<body>
<header>
<small>Token data set for WorldVLA</small>
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
