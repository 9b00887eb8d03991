"""Files from a folder, from a cache laid out like the Hub's, and whole-or-nothing writes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from worldvla_tokenizers.files import (
    PretrainedFilesError,
    resolve_files,
    staged_folder,
    write_text_atomic,
)

COMMITS = {"main": "a" * 40, "v1": "b" * 40}


@pytest.fixture
def hub_cache(tmp_path: Path) -> Path:
    """A cache as huggingface_hub leaves it: branch names point to commits, commits hold files."""
    repository = tmp_path / "hub" / "models--lab--robot"
    for branch, commit in COMMITS.items():
        write_text_atomic(repository / "refs" / branch, commit)
        write_text_atomic(repository / "snapshots" / commit / "a.json", branch)
        write_text_atomic(repository / "snapshots" / commit / "model_256" / "goal" / "a.json", f"{branch} goal")
    return tmp_path / "hub"


def test_a_local_folder_comes_first(tmp_path, monkeypatch, hub_cache):
    write_text_atomic(tmp_path / "lab" / "robot" / "a.json", "local")
    monkeypatch.chdir(tmp_path)
    found = resolve_files("lab/robot", ["a.json"], optional=["b.json"], cache_dir=hub_cache)
    assert {name: path.read_text() for name, path in found.items()} == {"a.json": "local"}


@pytest.mark.parametrize(
    ("options", "content"),
    [
        ({}, "main"),
        ({"revision": "v1"}, "v1"),
        ({"revision": "b" * 40}, "v1"),
        ({"subfolder": "model_256/goal"}, "main goal"),
        ({"subfolder": "model_256/goal", "revision": "v1"}, "v1 goal"),
    ],
)
def test_hub_repository_with_revision_and_subfolder(tmp_path, monkeypatch, hub_cache, options, content):
    monkeypatch.chdir(tmp_path)
    found = resolve_files("lab/robot", ["a.json"], cache_dir=hub_cache, local_files_only=True, **options)
    assert found["a.json"].read_text() == content


def test_the_environment_can_forbid_the_network(hub_cache):
    code = (
        "from worldvla_tokenizers.files import resolve_files, PretrainedFilesError\n"
        f"print(resolve_files('lab/robot', ['a.json'], cache_dir={str(hub_cache)!r})['a.json'].read_text())\n"
        "try: resolve_files('lab/other', ['a.json'])\n"
        "except PretrainedFilesError as error: print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=True
    )
    content, message = run.stdout.splitlines()
    assert content == "main"
    assert "'lab/other'" in message
    assert "a.json" in message


def test_importing_needs_no_hub_client():
    code = "import sys, worldvla_tokenizers.files; print('huggingface_hub' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("./no/such/folder", r"a\.json.*no folder.*no Hub repository id"),
        ("two words", "no Hub repository id"),
        (Path("lab/robot"), "no folder"),  # a path is never taken for a repository
    ],
)
def test_neither_folder_nor_repository(source, message):
    with pytest.raises(PretrainedFilesError, match=message):
        resolve_files(source, ["a.json"])


def test_a_file_is_no_folder(tmp_path):
    write_text_atomic(tmp_path / "a.json", "{}")
    with pytest.raises(PretrainedFilesError, match="but a file; name the folder"):
        resolve_files(tmp_path / "a.json", ["a.json"])


def test_missing_files_are_named_with_the_place(tmp_path, hub_cache):
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}.*: a\.json, b or c$"):
        resolve_files(tmp_path, ["a.json"], any_of=["b", "c"])
    with pytest.raises(FileNotFoundError, match=r"'lab/robot' at revision 'v1'.*b\.json"):
        resolve_files("lab/robot", ["b.json"], revision="v1", cache_dir=hub_cache, local_files_only=True)


def test_any_of_and_optional(tmp_path):
    write_text_atomic(tmp_path / "b", "")
    assert resolve_files(tmp_path, any_of=["b", "c"], optional=["d"]) == {"b": tmp_path / "b"}
    assert resolve_files(tmp_path, optional=["d"]) == {}


def test_failed_writes_leave_the_old_files(tmp_path):
    folder = tmp_path / "out"
    write_text_atomic(folder / "a", "old")

    def fail_halfway(target: Path) -> None:
        with staged_folder(target) as stage:
            (stage / "a").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail_halfway(folder)
    assert [path.name for path in folder.iterdir()] == ["a"]
    assert (folder / "a").read_text() == "old"

    with pytest.raises(OSError, match="disk full"):
        fail_halfway(tmp_path / "never")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]

    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(folder / "a", "\ud800")
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_staged_files_join_the_others(tmp_path):
    write_text_atomic(tmp_path / "out" / "kept", "kept")
    for content in ("first", "second"):
        with staged_folder(tmp_path / "out") as stage:
            (stage / "a").write_text(content)
    assert {path.name: path.read_text() for path in (tmp_path / "out").iterdir()} == {
        "kept": "kept",
        "a": "second",
    }


@pytest.mark.parametrize(
    ("place", "options", "content"),
    [
        ("hf://lab/robot", {}, "main"),
        ("hf://lab/robot/", {}, "main"),
        ("hf://lab/robot@v1", {}, "v1"),
        ("hf://lab/robot", {"revision": "v1"}, "v1"),
        ("hf://lab/robot/model_256/goal", {}, "main goal"),
        ("hf://lab/robot/model_256/goal/", {}, "main goal"),
        ("hf://lab/robot@v1/model_256/goal", {}, "v1 goal"),
        ("hf://lab/robot@v1/model_256", {"subfolder": "goal", "revision": "v1"}, "v1 goal"),
    ],
)
def test_one_string_names_repository_revision_and_folder(
    tmp_path, monkeypatch, hub_cache, place, options, content
):
    write_text_atomic(tmp_path / "lab" / "robot" / "a.json", "local")  # which hf:// never means
    monkeypatch.chdir(tmp_path)
    found = resolve_files(place, ["a.json"], cache_dir=hub_cache, local_files_only=True, **options)
    assert found["a.json"].read_text() == content


def test_revisions_of_pull_requests_have_slashes(tmp_path, hub_cache):
    repository = hub_cache / "models--lab--robot"
    write_text_atomic(repository / "refs" / "refs" / "pr" / "1", COMMITS["v1"])
    place = "hf://lab/robot@refs/pr/1/model_256/goal"
    assert (
        resolve_files(place, ["a.json"], cache_dir=hub_cache, local_files_only=True)["a.json"].read_text()
        == "v1 goal"
    )


@pytest.mark.parametrize("place", ["hf://", "hf://robot", "hf://datasets/lab/robot", "hf://lab/robot@/x"])
def test_other_addresses_are_refused_with_the_form(place):
    with pytest.raises(PretrainedFilesError, match="it reads hf://organisation/name, "):
        resolve_files(place, ["a.json"])


def test_two_revisions_are_refused():
    with pytest.raises(PretrainedFilesError, match="names revision 'v1', the argument 'v2'"):
        resolve_files("hf://lab/robot@v1", ["a.json"], revision="v2")


def test_a_folder_too_high_up_is_told_where_the_files_are(tmp_path):
    """As the authors' repository is laid out: tokenizers in chameleon/tokenizer, models beside."""
    write_text_atomic(tmp_path / "chameleon" / "tokenizer" / "vqgan.yaml", "")
    write_text_atomic(tmp_path / "model_256" / "libero_goal" / "config.json", "")
    with pytest.raises(
        PretrainedFilesError, match=r"vqgan\.yaml; remedy: subfolder='chameleon/tokenizer' has them$"
    ):
        resolve_files(tmp_path, ["vqgan.yaml"])
    with pytest.raises(PretrainedFilesError, match=r"goal: vqgan\.yaml; remedy: subfolder='chameleon/tokenizer'"):
        resolve_files(tmp_path, any_of=["vqgan.yaml"], subfolder="model_256/libero_goal")
