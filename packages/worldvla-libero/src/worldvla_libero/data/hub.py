"""Data sets by name: a folder (or file) of this machine, else a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

# `organisation/name`, as the Hub spells repositories; anything else can only be a path.
_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_DATA_FILES = (".hdf5", ".h5")


class DataNotFoundError(FileNotFoundError):
    """Data are neither on this machine nor in a repository of the Hub that can be reached."""


def data_path(
    path_or_repo: str | os.PathLike[str], *, download: Callable[..., str] | None = None, **options: Any
) -> Path:
    """The path of data on this machine, downloaded from the Hub where they are only there.

    Args:
        path_or_repo: a folder or file if it exists; else, if it is a string, a Hub repository id
            (`organisation/name`). Absolute paths, `./name`, and names without or with several slashes are paths.
            An `os.PathLike` always means a path.
        download: what fetches a repository; by default `huggingface_hub.snapshot_download`, which shows its
            progress and fetches nothing that is in the cache.
        options: of it.

    Returns:
        The path itself, or the folder in the Hub's cache.

    Raises:
        DataNotFoundError: a repository cannot be fetched; the message says why, and the command to fetch it.
    """
    path = Path(path_or_repo)
    if path.exists() or not _is_repository(path_or_repo):
        return path
    from huggingface_hub import snapshot_download

    fetch: Callable[..., Any] = download or snapshot_download
    try:
        return Path(fetch(path_or_repo, repo_type="dataset", **options))
    except Exception as error:  # offline, unknown, private, a proxy: these errors have no base in common
        raise DataNotFoundError(
            f"{path_or_repo!r} is no folder or file here ({path.absolute()}), and no data set of that name could "
            f"be fetched from the Hub ({type(error).__name__}: {error}); where it can be reached: "
            f"hf download {path_or_repo} --repo-type dataset --local-dir {path_or_repo}"
        ) from error


def data_name(path: Path) -> str:
    """What data are called: their folder's (or file's) own name, or the repository's in the Hub's cache."""
    path = path.absolute()
    repository = path.parent.parent.name
    if path.parent.name == "snapshots" and repository.startswith("datasets--"):
        return repository.rpartition("--")[2]
    return path.name


def _is_repository(path_or_repo: str | os.PathLike[str]) -> bool:
    if not isinstance(path_or_repo, str) or path_or_repo.endswith(_DATA_FILES):
        return False
    return bool(_REPOSITORY_ID.fullmatch(path_or_repo))
