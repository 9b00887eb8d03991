"""Files of a checkpoint on disk: a new one takes the place of an older one, whole, and nothing of that stays.

Whoever reads a folder takes one of several files that may hold weights, and not everybody the same: transformers
shards of distributed checkpoints before `model.safetensors` before its index before pickles, and then adapters on
top; others whatever is there. A file that an older checkpoint left behind would be read, alone or among new ones.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from safetensors import SafetensorError, safe_open


class CheckpointError(ValueError):
    """A checkpoint that is not the model's: of another family, or with tensors that are not those of the model."""


def check_tensors(
    complaint: str,
    *,
    missing: Iterable[str],
    unexpected: Iterable[str],
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]],
) -> None:
    """Raise one error that lists everything wrong with the tensors of a checkpoint, if anything is.

    Args:
        complaint: how the message begins.
        missing: names that the model needs.
        unexpected: names that it does not have.
        shapes: for each name of another shape the one found and the one needed.

    Raises:
        CheckpointError: any of the three is not empty.
    """
    wrong = {
        "missing": sorted(missing),
        "unexpected": sorted(unexpected),
        "of another shape": [
            f"{name} {found}, {needed} needed" for name, (found, needed) in sorted(shapes.items())
        ],
    }
    if any(wrong.values()):
        listed = "; ".join(f"{len(names)} {kind}: {', '.join(names)}" for kind, names in wrong.items() if names)
        raise CheckpointError(f"{complaint}: {listed}")


# The default checkpoint of a folder, and others under a `variant` such as fp16, which live beside it.
_WEIGHTS = re.compile(
    r"""(?:model|pytorch_model) (?:\.(?P<variant>.+?))? (?:-\d+-of-\d+)? \.(?:safetensors|bin)
    | (?:model\.safetensors|pytorch_model\.bin)\.index (?:\.(?P<indexed>.+))? \.json
    | shard-\d+-model-\d+-of-\d+\.safetensors""",
    re.VERBOSE,
)
_ADAPTER = re.compile(r"adapter_config\.json|adapter_model.*\.(?:safetensors|bin|json)")
_DEFAULT = ""

SUPERSEDED_PATTERNS = (
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json",
    "shard-*-model-*-of-*.safetensors", "adapter_config.json", "adapter_model*",
)  # fmt: skip
"""What a default checkpoint takes the place of, as patterns for a repository of the Hub."""


@contextmanager
def replaced_checkpoint(folder: str | os.PathLike) -> Iterator[Path]:
    """A new folder to write a checkpoint into, which takes the place of the one in `folder` once it is whole.

    A failure while it is written leaves `folder` as it was. Weights of an older checkpoint go, in whatever form
    they are; other variants and other files stay.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a checkpoint needs a folder")
    made = not folder.exists()
    # Inside, so that both are on one file system and a move is a rename.
    stage = folder / f".{uuid4().hex}"
    stage.mkdir(parents=True)
    try:
        yield stage
        files = sorted(path for path in stage.rglob("*") if path.is_file())
        supersede(folder, [file.name for file in files if file.parent == stage])
        for file in sorted(files, key=lambda file: ".index." in file.name):  # an index after what it names
            target = folder / file.relative_to(stage)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if made:
            with suppress(OSError):  # there is something in it
                folder.rmdir()


def supersede(folder: Path, written: Iterable[str]) -> None:
    """Delete what files about to be moved to a folder take the place of, although they have other names.

    Old indices go first, those of the same name included: without one, old and new shards cannot be read together.

    Args:
        folder: with an older checkpoint, or without.
        written: names of the new files. Weights supersede weights of their variant, and adapters, which would
            be put on top of them; adapters supersede adapters.
    """
    names = set(written)
    variants = {variant for name in names if (variant := _variant(name)) is not None}
    adapters = bool(variants) or any(_ADAPTER.fullmatch(name) for name in names)
    stale = [
        path
        for path in folder.iterdir()
        if not path.is_dir()
        and (path.name not in names or ".index." in path.name)
        and (_variant(path.name) in variants or (adapters and _ADAPTER.fullmatch(path.name)))
    ]
    for path in sorted(stale, key=lambda path: ".index." not in path.name):
        path.unlink()


def damaged_weights(folder: Path) -> str | None:
    """Tell what is wrong with the first of a folder's safetensors files that cannot be opened; None if all can."""
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                continue
        except (SafetensorError, OSError) as error:
            with path.open("rb") as file:
                head = file.read(40)  # shows a pointer of Git LFS, or a page of a server
            return (
                f"{path} is no whole safetensors file: {error} ({path.stat().st_size:,} bytes, which begin with "
                f"{head!r}); remedy: fetch it again"
            )
    return None


def _variant(name: str) -> str | None:
    """Of which variant a file holds weights, or lists them; None where it does neither."""
    found = _WEIGHTS.fullmatch(name)
    return None if found is None else found["variant"] or found["indexed"] or _DEFAULT
