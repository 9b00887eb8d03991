"""What files are by their first bytes.

What people found under the name of a checkpoint or a tokenizer, by their reports:
    a Git LFS pointer (clone without git-lfs; "invalid load key, 'v'"), with the address of the specification or
        the older one of hawser; a git-annex pointer (DataLad)
    an HTML page: the Hub's page of the file (…/blob/… instead of …/resolve/…), a log-in, Google Drive's virus
        warning; an XML error of S3
    a server's JSON error ("Access to model … is restricted"), or its bare words ("Entry not found")
    nothing at all; nothing but zeros (aria2 reserves the space first); the beginning of the file
    a torch file under the name of a safetensors file and the reverse; TorchScript; a pickle of anything else; a
        zip, tar or gz around the file; weights of Keras (HDF5) or NumPy
    text in UTF-16 (PowerShell's `>`), JSON with a byte order mark (Windows editors)
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from worldvla_tokenizers.signatures import Kind, kind_of, misnamed, read_json, read_text

POINTER = "oid sha256:" + "0" * 64 + "\nsize 281000000\n"


def torch_file(**options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state_dict": {"a": torch.zeros(2)}}, buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def torchscript() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.ReLU()), buffer)
    return buffer.getvalue()


def zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, "content")
    return buffer.getvalue()


def tarred() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("vqgan.ckpt"))
    return buffer.getvalue()


def numpy_file() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


CONTENTS = {
    Kind.EMPTY: [b""],
    Kind.ZEROS: [bytes(5000), b"\x00"],
    Kind.LFS_POINTER: [
        b"version https://git-lfs.github.com/spec/v1\n" + POINTER.encode(),
        b"version https://hawser.github.com/spec/v1\n" + POINTER.encode(),
        b"version https://git-lfs.github.com/spec/v1\r\n" + POINTER.encode(),
    ],
    Kind.ANNEX_POINTER: [b"/annex/objects/SHA256E-s281000000--0000.ckpt\n", b"../.git/annex/objects/ab/cd/x"],
    Kind.PAGE: [
        b"<!DOCTYPE html>\n<html>...",
        b"\n  <!doctype HTML><html lang=en>",
        b"\xef\xbb\xbf<html>",
        b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code></Error>',
    ],
    Kind.ANSWER: [b'{"error":"Repository not found"}', b'{"message": "gated", "statusCode": 403}'],
    Kind.JSON: [b'{"model": {}}', b"[]", b"{", b"\xef\xbb\xbf{}", b'{"error": "' + b"x" * 600],
    Kind.TEXT: [b"Entry not found", b"model:\n  params: {}\n", "Größe".encode()],
    Kind.UTF16: ['{"model": 1}'.encode("utf-16"), '{"model": 1}'.encode("utf-16-be").join([b"\xfe\xff", b""])],
    Kind.TORCH: [torch_file(), torch_file(_use_new_zipfile_serialization=False)]
    + [torch_file(_use_new_zipfile_serialization=False, pickle_protocol=4)],
    Kind.TORCHSCRIPT: [torchscript()],
    Kind.PICKLE: [pickle.dumps({"state_dict": 1}, protocol) for protocol in (2, 3, 4, 5)] + [b"\x80\x04"],
    Kind.CUT_ZIP: [torch_file()[:200], b"PK"],
    Kind.ZIP: [zipped("vqgan.ckpt")],
    Kind.ARCHIVE: [tarred(), gzip.compress(b"content")],
    Kind.SAFETENSORS: [safetensors.torch.save({"a": torch.zeros(2)}), safetensors.torch.save({})],
    Kind.HDF5: [b"\x89HDF\r\n\x1a\n" + bytes(20)],
    Kind.NUMPY: [numpy_file()],
    Kind.UNKNOWN: [b"\x80", b"\x7fELF\x02\x01\x00", bytes(range(256))],
}


def test_every_kind_has_an_example():
    assert set(CONTENTS) == set(Kind)


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        pytest.param(kind, content, id=f"{kind.name}-{i}")
        for kind in CONTENTS
        for i, content in enumerate(CONTENTS[kind])
    ],
)
def test_files_are_told_and_named_with_a_remedy(tmp_path, kind, content):
    path = tmp_path / "vqgan.ckpt"
    path.write_bytes(content)
    assert kind_of(path) is kind
    assert misnamed(path, "checkpoint", kind) is None
    message = misnamed(path, "checkpoint of torch")
    assert message.startswith(f"{path} is {kind.words}")
    assert f", no checkpoint of torch ({len(content):,} bytes); remedy: {kind.remedy}" in message
    assert "trust" not in message


def test_what_a_server_said_is_shown(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"error": "Access to this model is restricted"}')
    with pytest.raises(
        RefusalError, match=r"answer of a server \('\{\"error\": \"Access to this model is restricted"
    ):
        read_json(path, RefusalError)
    path.write_text("Entry not found")
    assert "('Entry not found'), no safetensors file (15 bytes)" in misnamed(
        path, "safetensors file", Kind.SAFETENSORS
    )


class RefusalError(ValueError):
    """Callers choose what is raised."""


def test_json_with_a_mark_before_it_is_read(tmp_path):
    path = tmp_path / "action_tokenizer.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"bins": "ä"}, ensure_ascii=False).encode())
    assert read_json(path, ValueError) == {"bins": "ä"}
    assert read_text(path, "text", ValueError).startswith("{")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no json", "is no JSON: Expecting value"),
        (b'{"a": 1', "is no JSON: Expecting"),
        (b"[1]", "holds a JSON list; an object is needed"),
        (b"[" * 100_000, "is no JSON: maximum recursion depth"),
        (b'{"a": "\xff"}', "is no UTF-8 text"),
        (b"", "is empty, no JSON file"),
        (CONTENTS[Kind.LFS_POINTER][0], "Git LFS pointer.*git lfs pull"),
    ],
)
def test_what_is_no_json_object_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(path, ValueError)
    assert str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_told_as_such():
    with pytest.raises(FileNotFoundError):
        read_json(Path("nowhere.json"), ValueError)
