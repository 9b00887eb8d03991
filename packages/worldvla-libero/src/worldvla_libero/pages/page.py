"""What all pages have in common: one HTML file each, without network or JavaScript, on screen, phone and paper.

A room keeps its templates in a folder `templates`; they extend and import those that lie here as `pages/…`.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined


@dataclass(frozen=True)
class Cell:
    """What a cell of a table says if that is more than a word.

    Attributes:
        words: in letters of the usual size.
        small: below them.
        alarm: below that, in the colour of alarms.
        published: in italics, as it is not one's own.
    """

    words: str
    small: str = ""
    alarm: str = ""
    published: bool = False


@dataclass(frozen=True)
class Table:
    """The numbers of a figure.

    Attributes:
        title: that opens it.
        head: of each column; the first is that of the rows' names.
        rows: cells.
        opened: spread out on screen, too.
    """

    title: str
    head: Sequence[str | Cell]
    rows: Sequence[Sequence[str | Cell]]
    opened: bool = False


@dataclass(frozen=True)
class Card:
    """A run at a glance.

    Attributes:
        name: of the run.
        colour: of the run.
        about: what it is, in small letters.
        value: what came of it, in large ones.
        lines: more of that.
        alarms: likewise, in the colour of alarms.
    """

    name: str
    colour: str
    about: str
    value: str
    lines: Sequence[str]
    alarms: Sequence[str]


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


def differences(conditions: Mapping[str, Mapping[str, str]]) -> list[str]:
    """What is not alike in runs that are compared, in words.

    Args:
        conditions: value by what it is, by name of the run. What a run does not state is not compared.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name, stated in conditions.items():
        for what, value in stated.items():
            found.setdefault(what, {}).setdefault(value, []).append(name)
    return [
        f"Not all runs have the same {what}: "
        + "; ".join(f"{value} in {', '.join(names)}" for value, names in values.items())
        + "."
        for what, values in found.items()
        if len(values) > 1
    ]
