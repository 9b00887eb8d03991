"""What a file is by its first bytes, where that is not what its name says, and what to do about it.

Downloads and copies go wrong in a few ways that every reader then reports as damage: a clone without Git LFS
leaves pointers, a browser saves the page about a file, a server answers with an error, a transfer stops. Whoever
reads a file of a pretrained object asks here first, so that the message names the fault and not its consequence.
"""

from __future__ import annotations

import codecs
import json
import re
import zipfile
from enum import Enum
from pathlib import Path
from typing import Any

_HEAD = 512  # bytes looked at; tar's signature is at 257
_SHOWN = 80  # characters of a text in a message
_MAX_SAFETENSORS_HEADER = 100_000_000  # of the format

# `torch.save` before 1.6 begins with a number of its own, pickled.
_TORCH_LEGACY = bytes.fromhex("6cfc9c46f9206aa85019")
_LFS_POINTER = re.compile(rb"version https?://\S+/spec/v\d")
_ANNEX_POINTER = re.compile(rb"(\.\./)*(\.git)?/annex/objects/")
_PAGE = re.compile(rb"<(!doctype\s+html|html|head|body|\?xml|!--)", re.IGNORECASE)
_ARCHIVES = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"7z\xbc\xaf\x27\x1c", b"\x28\xb5\x2f\xfd", b"Rar!")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_NOT_IN_TEXT = bytes(set(range(32)) - set(b"\t\n\r\f\x1b")) + b"\x7f"
# Fields of what servers answer instead of a file.
_ANSWER = {"code", "detail", "error", "error_type", "errors", "message", "path", "reason", "status", "statusCode"}


class Kind(Enum):
    """Kinds of files that are found under names of others: what to call one, and what to do with it."""

    JSON = "JSON", "fetch the file again"
    TEXT = "text", "fetch the file again"
    TORCH = (
        "a file of torch.save",
        "fetch the file of safetensors instead, or write its tensors again with safetensors.torch.save_file",
    )
    SAFETENSORS = (
        "a file of safetensors",
        "fetch the file of torch instead, or write one: torch.save({'state_dict': "
        "safetensors.torch.load_file(FILE)}, 'vqgan.ckpt')",
    )
    EMPTY = "empty", "fetch the file again: a download or copy was cut short"
    ZEROS = "nothing but zeros", "fetch the file again: a download reserved its space and did not end"
    LFS_POINTER = (
        "a Git LFS pointer, not the file itself",
        "fetch the file itself: `git lfs pull` in the clone, or `hf download REPOSITORY FILE`",
    )
    ANNEX_POINTER = "a git-annex pointer, not the file itself", "fetch the file itself: `git annex get FILE`"
    PAGE = (
        "an HTML or XML page",
        "a page about the file was saved, or a log-in or an error in its place: fetch it by its download address, "
        "for which the Hub has …/resolve/…, signed in where the repository asks for it",
    )
    ANSWER = "the answer of a server", "fetch the file again, signed in where the repository asks for it"
    UTF16 = "text in UTF-16", "save it as UTF-8"
    TORCHSCRIPT = (
        "a TorchScript program",
        "fetch the checkpoint it was made of: a file of torch.save that holds tensors",
    )
    PICKLE = (
        "a pickle that torch did not write",
        "ask its author for a file that torch.save or safetensors wrote; it is not opened",
    )
    CUT_ZIP = "the beginning of a zip archive", "fetch the file again: a download or copy was cut short"
    ZIP = "a zip archive that torch did not write", "unpack it and give what is inside"
    ARCHIVE = "a packed archive", "unpack it and give what is inside"
    HDF5 = "an HDF5 file", "fetch the file again"
    NUMPY = "an array of NumPy", "fetch the file again"
    UNKNOWN = "of no known kind", "fetch the file again"

    def __init__(self, words: str, remedy: str) -> None:
        self.words = words
        self.remedy = remedy


def kind_of(path: Path) -> Kind:
    """Tell what a file is by its first bytes (of zip archives: by the names inside); nothing is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return Kind.EMPTY
    if not any(head):
        return Kind.ZEROS
    if head.startswith(_UTF16):
        return Kind.UTF16
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head[0] == 0x80 and 2 <= head[1 % len(head)] <= 5:
        return Kind.TORCH if _TORCH_LEGACY in head[:32] else Kind.PICKLE
    for signature, kind in ((b"\x89HDF\r\n\x1a\n", Kind.HDF5), (b"\x93NUMPY", Kind.NUMPY)):
        if head.startswith(signature):
            return kind
    if head.startswith(_ARCHIVES) or head[257:262] == b"ustar":
        return Kind.ARCHIVE
    if head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= _MAX_SAFETENSORS_HEADER:
        return Kind.SAFETENSORS
    return _kind_of_text(head, path)


def misnamed(path: Path, expected: str, *kinds: Kind, called: str | None = None) -> str | None:
    """Say that a file is not what its name says.

    Args:
        path: the file.
        expected: what it should be, such as `safetensors file`.
        kinds: by which first bytes such a file is known.
        called: what the message calls it; by default its path.

    Returns:
        A whole message, with what the file is and the remedy; None if it is of one of the kinds.

    Raises:
        FileNotFoundError: there is no such file.
    """
    kind = kind_of(path)
    if kind in kinds:
        return None
    with path.open("rb") as file:
        head = file.read(_HEAD)
    beginning = ""
    if kind in (Kind.TEXT, Kind.JSON, Kind.ANSWER):
        text = " ".join(head.decode("utf-8", errors="replace").split())
        beginning = f" ({text[:_SHOWN]!r})"
    elif kind is Kind.UNKNOWN:
        beginning = f" (it begins with {head[:8].hex(' ')})"
    name, size = called or path, path.stat().st_size
    return f"{name} is {kind.words}{beginning}, no {expected} ({size:,} bytes); remedy: {kind.remedy}"


def read_text(path: Path, expected: str, error: type[ValueError]) -> str:
    """Read a text file in UTF-8, with or without the mark some editors put before it.

    Args:
        path: the file.
        expected: what it should hold, such as `tokenizer.json of Hugging Face`.
        error: what to raise.

    Raises:
        ValueError: of the type `error`: it is another kind of file, or no UTF-8.
        FileNotFoundError: there is no such file.
    """
    wrong = misnamed(path, expected, Kind.TEXT, Kind.JSON)
    if wrong is not None:
        raise error(wrong)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{path} is no UTF-8 text: {problem}") from problem


def read_json(path: Path, error: type[ValueError]) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        error: what to raise.

    Raises:
        ValueError: of the type `error`: it is another kind of file, no JSON, or something else than an object.
        FileNotFoundError: there is no such file.
    """
    text = read_text(path, "JSON file", error)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path} is no JSON: {problem}") from problem
    if not isinstance(content, dict):
        raise error(f"{path} holds a JSON {type(content).__name__}; an object is needed")
    return content


def _kind_of_zip(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return Kind.CUT_ZIP
    inside = {name.rpartition("/")[2] for name in names}
    if "data.pkl" not in inside:
        return Kind.ZIP
    return Kind.TORCHSCRIPT if "constants.pkl" in inside else Kind.TORCH


def _kind_of_text(head: bytes, path: Path) -> Kind:
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.translate(None, _NOT_IN_TEXT) != head:
        return Kind.UNKNOWN
    for pattern, kind in (
        (_LFS_POINTER, Kind.LFS_POINTER),
        (_ANNEX_POINTER, Kind.ANNEX_POINTER),
        (_PAGE, Kind.PAGE),
    ):
        if pattern.match(text):
            return kind
    if not text.startswith((b"{", b"[")):
        return Kind.TEXT if _is_utf8(head) else Kind.UNKNOWN
    return Kind.ANSWER if len(head) < _HEAD and _is_answer(text) else Kind.JSON


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < _HEAD)
    except UnicodeDecodeError:
        return False
    return True


def _is_answer(text: bytes) -> bool:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and bool(content) and content.keys() <= _ANSWER
