"""What a token data set says of itself: `dataset.json`, read and written here alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

from worldvla_libero.jobs.parts import WORK_FOLDER, Dropped

RECORD_FILE = "dataset.json"
DATA_FOLDER = "data"

_REQUIRED = (("fingerprint", str), ("settings", dict), ("splits", dict))


class ShardError(ValueError):
    """A token data set that is missing, damaged, or of other settings or another tokenizer than it should be."""


@dataclass(frozen=True)
class SplitRecord:
    """One split of a token data set.

    Attributes:
        episodes: how many.
        steps: of all episodes.
        files: the shards, relative to the data set's folder.
    """

    episodes: int
    steps: int
    files: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DataRecord:
    """What `dataset.json` holds.

    Attributes:
        settings: all that the data set depends on, as JSON; see `worldvla_libero.prepare`.
        splits: by name.
        name: of the demonstrations.
        control_hz: actions per second; None where it is not known.
        dropped: episodes and files left out, and why.
        versions: of what it was made with, by distribution.
    """

    settings: Mapping[str, Any]
    splits: Mapping[str, SplitRecord]
    name: str = "token data set"
    control_hz: float | None = None
    dropped: tuple[Dropped, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the settings, in hexadecimal; equal in every shard."""
        return fingerprint_of(self.settings)

    @property
    def image_tokenizer(self) -> str:
        """Fingerprint of the VQ-GAN that made the codes."""
        return str(self._setting("image_tokenizer"))

    @property
    def image_size(self) -> int:
        """Pixels that frames were brought to before they were tokenized."""
        return int(self._setting("image_size"))

    def _setting(self, name: str) -> Any:
        if name not in self.settings:
            raise ShardError(f"the settings of {self.name} hold no {name}; prepare the data again")
        return self.settings[name]

    @classmethod
    def read(cls, root: str | os.PathLike[str]) -> Self:
        """Read the record of the data set in a folder.

        Raises:
            ShardError: there is none, it is no record, or it does not fit its own fingerprint.
        """
        path = Path(root) / RECORD_FILE
        if not path.is_file():
            unfinished = (path.parent / WORK_FOLDER).is_dir()
            remedy = "its preparation has not ended: run it again" if unfinished else "it is no token data set"
            raise ShardError(f"{root} has no {RECORD_FILE}; {remedy}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ShardError(f"{path} is damaged: no JSON ({error})") from error
        wrong = _wrong_in(content)
        if wrong:
            raise ShardError(f"{path} is damaged: {wrong}")
        record = cls(
            settings=content["settings"],
            splits={
                name: SplitRecord(split["episodes"], split["steps"], tuple(split["files"]))
                for name, split in content["splits"].items()
            },
            name=str(content.get("name", path.absolute().parent.name)),
            control_hz=content.get("control_hz"),
            dropped=tuple(Dropped(row["id"], row["reason"], row["message"]) for row in content.get("dropped", ())),
            versions=content.get("versions", {}),
        )
        if record.fingerprint != content["fingerprint"]:
            raise ShardError(f"{path} was changed by hand: its settings have another fingerprint than it says")
        return record

    def content(self) -> dict[str, Any]:
        """The record as JSON has it."""
        return {
            "settings": dict(self.settings),
            "name": self.name,
            "control_hz": self.control_hz,
            "fingerprint": self.fingerprint,
            "splits": {name: {**asdict(split), "files": [*split.files]} for name, split in self.splits.items()},
            "dropped": [one._asdict() for one in self.dropped],
            "versions": dict(self.versions),
        }


def fingerprint_of(settings: Mapping[str, Any]) -> str:
    """SHA-256 of settings, in hexadecimal, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def _wrong_in(content: Any) -> str | None:
    """What of a record is not what it should be; None if nothing is."""
    if not isinstance(content, dict):
        return f"it holds {type(content).__name__}, not an object"
    for name, needed in _REQUIRED:
        if not isinstance(content.get(name), needed):
            return f"{name} is {content.get(name)!r}; {needed.__name__} needed"
    hz = content.get("control_hz")
    if not (hz is None or (isinstance(hz, int | float) and not isinstance(hz, bool) and 0 < hz < float("inf"))):
        return f"control_hz is {hz!r}; a number above 0 needed"
    if not isinstance(content.get("versions", {}), dict):
        return f"versions is {content['versions']!r}; dict needed"
    dropped = content.get("dropped", [])
    if not isinstance(dropped, list):
        return f"dropped is {dropped!r}; list needed"
    for row in dropped:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in Dropped._fields):
            return f"dropped holds {row!r}; {', '.join(Dropped._fields)} needed"
    for name, split in content["splits"].items():
        if wrong := _wrong_in_split(split):
            return f"split {name!r} {wrong}"
    return None


def _wrong_in_split(split: Any) -> str | None:
    if not isinstance(split, dict):
        return f"is {split!r}; an object needed"
    for key in ("episodes", "steps"):
        number = split.get(key)
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            return f"has {number!r} {key}; a number from 0 needed"
    files = split.get("files")
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        return "has no list of files"
    for file in files:
        path = PurePosixPath(file)
        if path.parts[:1] != (DATA_FOLDER,) or ".." in path.parts:
            return f"has file {file!r}; allowed: those in {DATA_FOLDER}/"
    return None
