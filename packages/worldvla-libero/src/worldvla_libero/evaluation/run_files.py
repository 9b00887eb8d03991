"""Reading what runs leave on disk, strictly: files may be damaged, or come from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Any


class RunError(ValueError):
    """A folder that holds no run, or a run whose files are damaged or contradict each other."""


def check_inside(name: str, where: str) -> None:
    """Check that a recorded file name stays within the run: what a page embeds must not come from elsewhere.

    Raises:
        RunError: it is absolute or leads upwards.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name:
        raise RunError(f"{where}: file {name!r}; allowed: a path inside the folder of the run")


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        RunError: it is something else.
    """
    try:
        content = json.loads(text)
    except ValueError as error:  # also where it is not UTF-8
        raise RunError(f"{where}: no JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunError(f"{where}: {type(content).__name__}; allowed: a JSON object")
    return content


def parse_fields(
    text: bytes, kinds: Mapping[str, str], where: str, defaults: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, Any]:
    """A JSON object with given fields; others are left out.

    Args:
        text: the JSON.
        kinds: type of each field, as in annotations; numbers have to be finite and not negative.
        where: what the error names.
        defaults: of fields that older files do not have.

    Raises:
        RunError: a field is missing or of another type.
    """
    content = {**defaults, **parse_object(text, where)}
    for name, kind in kinds.items():
        if name not in content:
            raise RunError(f"{where}: no {name}")
        if not _fits(content[name], kind):
            raise RunError(f"{where}: {name} is {content[name]!r}; allowed: {kind}")
    return {name: content[name] for name in kinds}


def _fits(value: Any, kind: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    match kind.removesuffix(" | None"):
        case _ if value is None:
            return kind.endswith("None")
        case "str":
            return isinstance(value, str)
        case "int":
            return number and isinstance(value, int)
        case "float":
            return number
        case "tuple[float, ...]":
            return isinstance(value, list) and all(_fits(item, "float") for item in value)
        case "dict[str, str]":
            return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
        case _:  # a Literal, which as a string is written with single quotes
            return isinstance(value, str) and repr(value) in kind
