"""What all pages have in common: one HTML file each, without network or JavaScript, on screen, phone and paper.

A room keeps its templates in a folder `templates`; they extend and import those that lie here as `pages/…`.
"""

from __future__ import annotations

import base64
import functools
import json
from collections.abc import Iterable, Mapping
from html import escape
from string import Template
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined

UNFOLDED = 20  # so many parts are spread out; among more, each is folded away


def render(package: str, template: str, **values: Any) -> str:
    """Fill a template in. Words are escaped.

    Args:
        package: whose folder `templates` it lies in.
        template: name of the file.
        values: by their names in the template, which must use none that is missing.
    """
    return _environment(package).get_template(template).render(values)


@functools.cache
def _environment(package: str) -> Environment:
    shared = PrefixLoader({"pages": PackageLoader(__package__)})
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), shared]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment


def page(kicker: str, name: str, head: str, sections: Mapping[str, str]) -> str:
    """A page with a link to each of its sections.

    Args:
        kicker: what kind of page it is.
        name: its title; escaped.
        head: HTML below the title.
        sections: HTML by title. Empty ones are left out.
    """
    shown = [(title, title.lower().replace(" ", "-"), body) for title, body in sections.items() if body]
    return _PAGE.substitute(
        kicker=escape(kicker),
        name=escape(name),
        head=head,
        links="\n".join(f'<a href="#{anchor}">{title}</a>' for title, anchor, _ in shown),
        sections="\n".join(f'<section id="{anchor}">\n<h2>{title}</h2>\n{body}\n</section>'
                           for title, anchor, body in shown),
    )  # fmt: skip


def facts(values: Mapping[str, str]) -> str:
    """Large numbers above what they count; HTML both."""
    items = "\n".join(f"<div><dt>{label}</dt><dd>{value}</dd></div>" for label, value in values.items())
    return f'<dl class="facts">\n{items}\n</dl>'


def table(head: str, rows: Iterable[str]) -> str:
    """A table of HTML rows, whose head stays in sight."""
    body = "\n".join(rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def folded(title: str, body: str, among: int) -> str:
    """HTML that opens at a click; at once where it is among few."""
    opened = " open" if among <= UNFOLDED else ""
    return f"<details{opened}><summary>{title}</summary>\n{body}\n</details>"


def numbers(title: str, head: Iterable[str], rows: Iterable[Iterable[str]], *, opened: bool = False) -> str:
    """The table of a figure's numbers, in HTML: folded on screen, spread out on paper.

    Args:
        title: that opens it.
        head: of each column; the first is that of the rows' names.
        rows: cells.
        opened: spread out on screen, too.
    """
    heads = "".join(f"<th{_aligned(place)}>{cell}</th>" for place, cell in enumerate(head))
    lines = ("<tr>" + "".join(f"<td{_aligned(place)}>{cell}</td>" for place, cell in enumerate(row)) + "</tr>"
             for row in rows)  # fmt: skip
    body = table(f"<tr>{heads}</tr>", lines)
    return f'<details class="numbers"{" open" * opened}><summary>{title}</summary>\n{body}\n</details>'


def _aligned(column: int) -> str:
    return ' class="n"' if column else ""


def differences(conditions: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is not alike in runs that are compared, as notes in HTML.

    Args:
        conditions: value by what it is, by name of the run. What a run does not state is not compared.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name, stated in conditions.items():
        for what, value in stated.items():
            found.setdefault(what, {}).setdefault(value, []).append(name)
    return [
        f"Not all runs have the same {escape(what)}: "
        + "; ".join(f"{escape(value)} in {escape(', '.join(names))}" for value, names in values.items())
        + "."
        for what, values in found.items()
        if len(values) > 1
    ]


def values_html(value: Any) -> str:
    """JSON as nested lists; words bare, all else as JSON spells it."""
    if isinstance(value, Mapping) and value:
        rows = (f"<div><dt>{escape(str(key))}</dt><dd>{values_html(v)}</dd></div>" for key, v in value.items())
        return f"<dl>{''.join(rows)}</dl>"
    if isinstance(value, list | tuple) and value:
        return ", ".join(values_html(v) for v in value)
    return escape(value if isinstance(value, str) else json.dumps(value))


_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$name</title>
<style>
:root { color-scheme: light; --ink: #1d2329; --soft: #5d6770; --line: #e2e5e9; --paper: #fff; --link: #0072B2;
  --alarm: #b34700; }
@media screen and (prefers-color-scheme: dark) {
  :root { color-scheme: dark; --ink: #e4e7ea; --soft: #9aa3ac; --line: #2c3238; --paper: #14171a;
    --link: #56B4E9; --alarm: #ff9a5c; }
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
.numbers th, .numbers td { padding-right: 18px; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(300px, 100%), 1fr)); gap: 28px 32px; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(min(400px, 100%), 1fr)); }
.panels img { display: block; width: 100%; }
.pairs img { max-width: 420px; }
.panels figure, .strip { break-inside: avoid; }
.key i { flex: none; align-self: center; width: 12px; height: 12px; margin-right: -14px; border-radius: 2px; }
figcaption b { color: var(--ink); }
summary { padding: 8px 0; font-weight: 600; cursor: pointer; }
summary small { margin-left: 8px; font-weight: 400; }
.strip { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 20px; margin-bottom: 12px; }
.strip div { max-width: 100%; overflow-x: auto; }
.strip img { display: block; border-radius: 4px; }
.strip figcaption { flex: 1 1 200px; }
.cards, .tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(250px, 100%), 1fr));
  gap: 20px; }
.cards { margin-bottom: 20px; }
.cards article { padding: 2px 0 2px 14px; border-left: 4px solid var(--run, var(--line)); }
.cards p, .tiles p { margin: 0; }
.cards b { display: block; font-size: 26px; line-height: 1.3; }
.alarm { color: var(--alarm); font-weight: 600; }
.box { margin: 0 0 20px; padding: 10px 16px; border: 1px solid var(--alarm); border-radius: 6px; }
ul.box { padding-left: 32px; }
.sheet { display: flex; flex-wrap: wrap; gap: 10px; margin: 0 0 14px; }
.sheet figure { width: 112px; break-inside: avoid; }
.sheet img, .tiles video { display: block; width: 100%; border-radius: 4px; }
.sheet figcaption { font-size: 12px; line-height: 1.3; }
.tiles { grid-template-columns: repeat(auto-fill, minmax(min(220px, 100%), 1fr)); margin-bottom: 24px; }
.tiles figure { break-inside: avoid; }
.tiles .key { flex-wrap: nowrap; }
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
  .scroll { max-height: none; overflow: visible; }
  .numbers table { font-size: 12px; }
  .numbers th, .numbers td { min-width: 0; padding-right: 10px; }
  .panels { grid-template-columns: repeat(3, 1fr); }
  .pairs { grid-template-columns: repeat(2, 1fr); }
  .strip img { max-width: 100%; }
  details.numbers::details-content { content-visibility: visible; block-size: auto; }
}
</style>
</head>
<body>
<header>
<small>$kicker</small>
<h1>$name</h1>
$head
<nav>
$links
</nav>
</header>
$sections
</body>
</html>
""")
