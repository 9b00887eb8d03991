"""Where pretrained files come from (a folder or the Hub), and how they are written (whole or not at all)."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypedDict
from uuid import uuid4

# `name` or `organisation/name`, as the Hub spells repositories; anything else can only be a path.
_REPOSITORY_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# A place inside a repository in one string, as huggingface_hub's file system spells it.
_HUB_PATH = re.compile(
    r"hf://(?!(?:datasets|spaces)/)(?P<repository>[^/@]+/[^/@]+)"
    r"(?:@(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+))?(?:/(?P<subfolder>[^/].*?))?/?"
)
_SUGGESTED_DEPTH = 3  # folders below one that lacks a file, in which it is looked for to say where it is


class HubOptions(TypedDict, total=False):
    """Keyword arguments of `resolve_files` that every `from_pretrained` passes on, as in transformers."""

    revision: str | None
    subfolder: str | None
    cache_dir: str | os.PathLike[str] | None
    token: str | bool | None
    local_files_only: bool


class PushOptions(TypedDict, total=False):
    """Keyword arguments of `push_folder` that every `push_to_hub` passes on."""

    private: bool | None
    token: str | bool | None
    revision: str | None
    commit_message: str
    create_pr: bool


class PretrainedFilesError(FileNotFoundError):
    """Files of a pretrained object are neither in a local folder nor in a repository of the Hub."""


def resolve_files(
    dir_or_repo: str | os.PathLike[str],
    names: Sequence[str] = (),
    *,
    any_of: Sequence[str] = (),
    optional: Sequence[str] = (),
    revision: str | None = None,
    subfolder: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> dict[str, Path]:
    """Find files of a pretrained object on this machine, downloading them from the Hub where needed.

    Args:
        dir_or_repo: a local folder if it exists; else, if it is a string, a Hub repository id
            (`organisation/name`). An `os.PathLike` always means a local folder. Where one string has to say all,
            `hf://organisation/name@revision/sub/folder` does; revision and subfolder can be left out.
        names: files that must be there.
        any_of: files of which at least one must be there.
        optional: files that may be there.
        revision: branch, tag or commit of the Hub repository; a local folder has none and ignores it.
        subfolder: folder inside the folder or repository.
        cache_dir: where Hub files are kept (default: huggingface_hub's own cache).
        token: Hub access token, or True for the stored one.
        local_files_only: take Hub files from the cache alone.

    Returns:
        The path of every file of `names`, and of those of `any_of` and `optional` that exist.

    Raises:
        PretrainedFilesError: a file that must be there is not, or `dir_or_repo` is neither a folder nor a
            repository that can be reached; the message says what was looked for, and where.
        ImportError: it can only be a Hub id, and huggingface_hub is not installed.
    """
    wanted = (*names, *any_of, *optional)
    folder = Path(dir_or_repo)
    if isinstance(dir_or_repo, str) and dir_or_repo.startswith("hf://"):
        dir_or_repo, revision, subfolder = _hub_place(dir_or_repo, revision, subfolder)
    elif folder.is_dir():
        inside = folder / (subfolder or "")
        found = {name: inside / name for name in wanted if (inside / name).is_file()}
        if missing := _missing(names, any_of, found):
            hint = _elsewhere(folder, names or any_of)
            raise PretrainedFilesError(f"not found in the folder {inside.absolute()}: {missing}{hint}")
        return found

    described = ", ".join(wanted) + (f" in subfolder {subfolder!r}" if subfolder else "")
    nowhere = f"cannot look for {described}: {str(dir_or_repo)!r} is no folder ({folder.absolute()})"
    if folder.exists():
        raise PretrainedFilesError(f"{nowhere} but a file; name the folder that holds it")
    if not isinstance(dir_or_repo, str) or not _REPOSITORY_ID.fullmatch(dir_or_repo):
        raise PretrainedFilesError(f"{nowhere}, and no Hub repository id, which reads 'organisation/name'")
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )
    except ImportError as error:
        raise ImportError(
            f"{nowhere}; reading it from the Hub needs huggingface_hub: pip install huggingface_hub"
        ) from error

    found = {}
    unreachable: Exception | None = None
    for name in wanted:
        try:
            found[name] = Path(
                hf_hub_download(
                    dir_or_repo,
                    name,
                    subfolder=subfolder,
                    revision=revision,
                    cache_dir=None if cache_dir is None else Path(cache_dir),
                    token=token,
                    local_files_only=local_files_only,
                )
            )
        except LocalEntryNotFoundError as error:
            # The Hub cannot be reached: whether it has the file cannot be known, and asking again only waits.
            unreachable, local_files_only = error, True
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            raise PretrainedFilesError(
                f"{nowhere}, and the Hub answers for {_hub_name(dir_or_repo, revision)}: {error}"
            ) from error
        except EntryNotFoundError:
            continue  # The repository has no such file; it is reported below if it must be there.
    if missing := _missing(names, any_of, found):
        where = f"{_hub_name(dir_or_repo, revision)}{f', subfolder {subfolder!r}' if subfolder else ''}"
        reason = f": {unreachable}" if unreachable else "; for files in another folder of it give subfolder="
        raise PretrainedFilesError(
            f"not found in {where} (and {str(folder)!r} is no local folder): {missing}{reason}"
        ) from unreachable
    return found


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file to write beside `path`, which takes its name once the block has ended without an error.

    Readers see the old content or the new one, never a half. Folders that lead to it are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 file whole or not at all, see `atomic_path`."""
    with atomic_path(path) as draft:
        draft.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def staged_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder to write into, whose files move to `folder` once the block has ended without an error.

    A failure while the files are written leaves `folder` as it was: absent if it was absent, and with its old
    files if it had any. Other files in it are kept.
    """
    folder = Path(folder)
    # Inside the target where it exists, so that both are on one file system and a move is a rename.
    parent = folder if folder.is_dir() else folder.parent
    stage = parent / f".{folder.name}.{uuid4().hex}"
    stage.mkdir(parents=True)
    try:
        yield stage
        if folder.is_dir():
            for file in sorted(path for path in stage.rglob("*") if path.is_file()):
                target = folder / file.relative_to(stage)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        else:
            os.rename(stage, folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def push_folder(
    save: Callable[[str], None],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload",
    create_pr: bool = False,
    repo_type: Literal["model", "dataset"] = "model",
    supersedes: Sequence[str] = (),
) -> str:
    """Upload to the Hugging Face Hub, in one commit, what `save` writes into a folder.

    Args:
        save: writes all files into the folder it is given.
        repo_id: `organisation/name`; made if it does not exist.
        private: whether a new repository is private (default: as the organisation has it).
        token: access token, or True or None for the stored one.
        revision: branch to commit to, made if it does not exist (default: main).
        commit_message: first line of the commit.
        create_pr: open a pull request instead of committing.
        repo_type: what the repository holds.
        supersedes: patterns, as of `fnmatch`, of files that the same commit deletes where `save` has not written
            them anew.

    Returns:
        The address of the commit.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save(folder)  # first, so that a failure leaves no empty repository
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True, repo_type=repo_type).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True, repo_type=repo_type)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            repo_type=repo_type,
            delete_patterns=list(supersedes) or None,
        )
    return commit.commit_url


def _missing(names: Sequence[str], any_of: Sequence[str], found: Mapping[str, Path]) -> str:
    """The files that must be there and are not, for a message; empty if there are none."""
    missing = [name for name in names if name not in found]
    if any_of and not any(name in found for name in any_of):
        missing.append(" or ".join(any_of))
    return ", ".join(missing)


def _elsewhere(folder: Path, names: Sequence[str]) -> str:
    """Where below a folder the files are, for whoever gave one too high up: a part of a message."""
    patterns = ["*/" * depth + name for depth in range(1, _SUGGESTED_DEPTH + 1) for name in names]
    folders = {path.parent.relative_to(folder).as_posix() for pattern in patterns for path in folder.glob(pattern)}
    return f"; remedy: subfolder={' or '.join(map(repr, sorted(folders)[:3]))} has them" if folders else ""


def _hub_place(path: str, revision: str | None, subfolder: str | None) -> tuple[str, str | None, str | None]:
    parts = _HUB_PATH.fullmatch(path)
    if parts is None:
        raise PretrainedFilesError(
            f"{path!r} is no place in a model repository of the Hub; it reads hf://organisation/name, "
            "hf://organisation/name@revision or hf://organisation/name@revision/sub/folder"
        )
    if None not in (revision, parts["revision"]) and revision != parts["revision"]:
        raise PretrainedFilesError(f"{path!r} names revision {parts['revision']!r}, the argument {revision!r}")
    inside = "/".join(part for part in (parts["subfolder"], subfolder) if part)
    return parts["repository"], revision or parts["revision"], inside or None


def _hub_name(repo_id: str, revision: str | None) -> str:
    return f"the Hub repository {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
