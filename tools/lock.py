"""Keep `uv.lock` free of download addresses, so that it serves behind any package index or mirror.

    python tools/lock.py [--upgrade ...]  resolve, keeping every version already pinned; write the stripped file
    python tools/lock.py --strip          take the addresses out of the present file; needs no network
    python tools/lock.py --check          is the committed file stripped, and does it satisfy every pyproject?

`uv sync` and `uv run` complete the stripped file in place: they keep its versions and write the addresses of the
user's own index back. That copy is theirs to work with; what is committed is the stripped one, and a pre-commit
hook sees to it. A stripped file is incomplete on purpose, so `--locked` and `--frozen` need a plain sync first.

Uses the standard library alone: it has to run before anything is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
# The top-level domain .invalid is reserved (RFC 2606): this can never become somebody's host.
PLACEHOLDER = "https://index.invalid/simple"

# uv writes one download per line, its address first: in `sdist = {...}` or as an element of `wheels`.
_DOWNLOAD = re.compile(r'^(sdist = |    )\{ (?:url|path) = "([^"]+)"', re.MULTILINE)
_REGISTRY = re.compile(r'\bregistry = "[^"]*"')
# Not every index reports these two, so with them one resolution would read differently from index to index.
_REPORTED = re.compile(r', (?:upload-time = "[^"]*"|size = \d+)')
# uv takes a complete file as it stands, placeholder and all; one without its workspace manifest it completes.
_MANIFEST = re.compile(r"^\[manifest\]\n.*?(?=^\[\[package\]\])", re.MULTILINE | re.DOTALL)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://[^\s\"']*")


class LockError(Exception):
    """The lock file cannot be made, stripped or vouched for; the message says why."""


def strip(text: str) -> str:
    """Take every address out of a lock file; stripping twice changes nothing more.

    Args:
        text: content of a `uv.lock`, as uv wrote it or already stripped.

    Returns:
        The same pins, file names and hashes, with `PLACEHOLDER` as the only address.

    Raises:
        LockError: an address remains, because a dependency comes from a URL or a Git repository.
    """

    def by_name(match: re.Match[str]) -> str:
        name = unquote(PurePosixPath(urlsplit(match[2]).path).name)
        return f'{match[1]}{{ filename = "{name}"'

    text = text.replace("\r\n", "\n")
    text = _DOWNLOAD.sub(by_name, text)
    text = _REGISTRY.sub(f'registry = "{PLACEHOLDER}"', text)
    text = _REPORTED.sub("", text)
    text = _MANIFEST.sub("", text)
    left = sorted(set(_ADDRESS.findall(text)) - {PLACEHOLDER})
    if left:
        raise LockError(
            f"uv.lock: {len(left)} addresses cannot be stripped, such as {left[0]}; "
            "a dependency may come from an index or the workspace, not from a URL or a Git repository"
        )
    return text


def resolve(lock: str | None, arguments: list[str] | None = None, *, quiet: bool = False) -> str:
    """Run `uv lock` on a copy of the workspace's metadata, so that a failure leaves the working tree alone.

    Args:
        lock: lock file to start from, whose versions are kept; None resolves afresh.
        arguments: further arguments of `uv lock`, such as `--upgrade`.
        quiet: show what uv prints only if it fails.

    Returns:
        The lock file as uv writes it, addresses included.

    Raises:
        LockError: uv is missing or finds no resolution.
    """
    uv = os.environ.get("UV") or shutil.which("uv")  # `uv run` names its own executable in UV
    if uv is None:
        raise LockError("uv: not found on PATH; install it with `pip install uv`")
    # The user's index settings must hold here too; these would only keep uv from locking.
    environment = {k: v for k, v in os.environ.items() if k not in {"UV_FROZEN", "UV_LOCKED", "UV_NO_SYNC"}}
    workspace = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["uv"]["workspace"]
    # Our metadata is static, so uv reads the pyproject files and builds nothing: it needs no sources.
    files = [ROOT / "pyproject.toml", ROOT / "uv.toml", ROOT / ".python-version"]
    files += [path / "pyproject.toml" for pattern in workspace["members"] for path in ROOT.glob(pattern)]
    with tempfile.TemporaryDirectory(prefix="worldvla-lock-") as folder:
        copy = Path(folder)
        for source in filter(Path.is_file, files):
            target = copy / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
        if lock is not None:
            (copy / "uv.lock").write_bytes(lock.encode())
        command = [uv, "lock", *(arguments or [])]
        done = subprocess.run(
            command, cwd=copy, env=environment, stderr=subprocess.PIPE if quiet else None, text=True
        )
        if done.returncode:
            raise LockError(f"uv lock: exit status {done.returncode}\n{done.stderr or ''}".rstrip())
        return (copy / "uv.lock").read_text("utf-8")


def differences(committed: str, current: str) -> list[str]:
    """List what keeps one stripped lock file from saying the same as another.

    A release may gain wheels after it was pinned, and a mirror may carry only some of them. No version changes by
    that, so a file that only one side knows is no difference; a file with two hashes is.

    Args:
        committed: stripped lock file in the repository.
        current: stripped lock file that uv makes of it now.

    Returns:
        One line per difference; empty if the two agree.
    """
    ours, theirs = tomllib.loads(committed), tomllib.loads(current)
    said, says, hashes, hashes_now = _statements(ours), _statements(theirs), _hashes(ours), _hashes(theirs)
    found = [f"only in uv.lock: {line}" for line in sorted(said - says)]
    found += [f"not in uv.lock: {line}" for line in sorted(says - said)]
    found += [
        f"another hash: {name} has {hashes[name]} in uv.lock, {hashes_now[name]} on this index"
        for name in sorted(hashes.keys() & hashes_now)
        if hashes[name] != hashes_now[name]
    ]
    return found


def _statements(lock: dict[str, Any]) -> set[str]:
    """One line per pin, dependency and marker: all that a lock file says but for its format and downloads."""

    def leaves(value: Any, path: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from leaves(inner, f"{path} {key}")
        elif isinstance(value, list):
            for item in value:
                yield f"{path}: {item}"
        else:
            yield f"{path}: {value}"

    # `version` and `revision` are those of the file format: they tell which uv wrote it.
    head = {key: lock[key] for key in lock.keys() - {"version", "revision", "package"}}
    lines = {line for key, value in head.items() for line in leaves(value, key)}
    for package in lock.get("package", []):
        pin = f"{package['name']} {package.get('version', '')}".rstrip()
        rest = {key: package[key] for key in package.keys() - {"name", "version", "sdist", "wheels"}}
        lines |= {pin, *leaves(rest, pin)}
    return lines


def _hashes(lock: dict[str, Any]) -> dict[str, str]:
    files = [
        file
        for package in lock.get("package", [])
        for file in (*package.get("wheels", []), package.get("sdist", {}))
    ]
    return {file["filename"]: file["hash"] for file in files if "filename" in file and "hash" in file}


def _to_be_committed(working: str) -> str:
    """The lock file that counts: the present one if it is stripped, else git's.

    One that carries addresses is uv's completed copy, and to judge it would prove nothing: had somebody
    forgotten to lock, `uv run` would just have mended that copy.
    """
    if strip(working) == working:
        return working
    try:
        shown = subprocess.run(["git", "show", ":./uv.lock"], cwd=ROOT, capture_output=True)
    except FileNotFoundError:
        return strip(working)
    if shown.returncode:  # not tracked, as in an unpacked archive: there is no other copy
        return strip(working)
    held = shown.stdout.decode()
    if strip(held) != held:
        raise LockError("uv.lock as git holds it carries the addresses of an index")
    return held


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        The exit status: 0, or 1 after a message on stderr.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="change nothing; exit 1 and say what differs")
    mode.add_argument("--strip", action="store_true", help="only take the addresses out of the present file")
    options, passed_on = parser.parse_known_args(arguments)
    if passed_on and (options.check or options.strip):
        parser.error(f"{' '.join(passed_on)}: only a plain run passes arguments on to `uv lock`")

    path = ROOT / "uv.lock"
    working = path.read_bytes().decode() if path.is_file() else None
    try:
        if working is None and (options.check or options.strip):
            raise LockError(f"{path}: no such file")
        if options.check:
            committed = _to_be_committed(working or "")
            found = differences(committed, strip(resolve(committed, quiet=True)))
            if found:
                raise LockError("\n  ".join(["uv.lock is not what the pyproject files ask for:", *found]))
            print(f"uv.lock: current, {committed.count('[[package]]')} packages, no address")
            return 0
        text = strip(working or "") if options.strip else strip(resolve(working, passed_on))
    except LockError as error:
        print(error, file=sys.stderr)
        if options.check:
            print("To mend it: `python tools/lock.py`, then commit uv.lock.", file=sys.stderr)
        return 1
    if text != working:
        path.write_bytes(text.encode())  # as bytes: in text mode Windows would write its own line ends
        print(f"uv.lock: written, {text.count('[[package]]')} packages, no address")
    return 0


if __name__ == "__main__":
    sys.exit(main())
