"""Data by the name of a Hub repository, in a cache laid out as huggingface_hub's; nothing asks the network."""

import shutil
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download

from worldvla_libero.cli.main import main
from worldvla_libero.data.hub import DataNotFoundError, data_name, data_path
from worldvla_libero.data.shards import TokenDataset
from worldvla_libero.evaluation.world.trajectories import Demonstrations, TokenTrajectories, open_trajectories
from worldvla_libero.lerobot import LeRobotSource
from worldvla_libero.prepare import open_source

FIXTURES = Path(__file__).parents[2] / "fixtures"
SO101 = FIXTURES / "lerobot" / "so101"


def refuse(*_, **__) -> str:
    raise AssertionError("the Hub was asked")


def test_a_repository_is_downloaded_as_a_data_set(tmp_path, monkeypatch, hub_cache):
    monkeypatch.chdir(tmp_path)
    snapshot = hub_cache(tmp_path / "cache", "lab/arm", SO101)
    cached = partial(snapshot_download, cache_dir=tmp_path / "cache", local_files_only=True)
    assert data_path("lab/arm", download=cached) == snapshot
    source = open_source("lab/arm", download=cached)
    assert isinstance(source, LeRobotSource)
    assert source.name == "arm"
    keys, dropped = source.list()
    assert (len(keys), dropped) == (4, [])
    assert len(source.read(keys[0].id, source.cameras)) == 7


@pytest.mark.parametrize("kind", [str, Path])
def test_what_is_here_comes_first(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SO101, tmp_path / "lab" / "arm")
    assert data_path(kind("lab/arm"), download=refuse) == Path("lab/arm")
    assert open_source(kind("lab/arm"), download=refuse).name == "arm"


@pytest.mark.parametrize(
    "path",
    [
        "/data/demos",
        "./demos",
        "../demos",
        "~/demos",
        "demos",
        "demos/",
        "a/b/c",
        "a//b",
        "lab/pick up",
        "lab/pick_up_the_milk_demo.hdf5",
        "",
        "-x/y",
        Path("lab/arm"),
    ],
)
def test_what_can_only_be_a_path_never_asks_the_hub(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    assert data_path(path, download=refuse) == Path(path)
    with pytest.raises(FileNotFoundError, match="no demonstrations"):
        open_source(path, download=refuse)


@pytest.mark.parametrize("error", [OSError("no route"), ValueError("what"), RuntimeError("half of it")])
def test_a_repository_that_cannot_be_fetched_is_named_with_the_command(tmp_path, monkeypatch, error):
    def fail(repository: str, **options) -> str:
        assert (repository, options) == ("lab/arm", {"repo_type": "dataset"})
        raise error

    monkeypatch.chdir(tmp_path)
    match = (
        rf"'lab/arm' is no folder or file here .{tmp_path}/lab/arm.*{type(error).__name__}: {error}.*"
        "hf download lab/arm --repo-type dataset --local-dir lab/arm"
    )
    with pytest.raises(DataNotFoundError, match=match):
        open_source("lab/arm", download=fail)


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """The cache as huggingface_hub knows it from the environment, which it reads when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


def test_commands_say_how_to_fetch_what_the_hub_cannot_give(offline, capsys):
    for command in (["prepare", "lab/none", "--out", "o", "--image-size", "32"], ["replay", "lab/none"]):
        assert main(command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert "hf download lab/none --repo-type dataset --local-dir lab/none" in said
    # As `imagine` and `train --data` ask for them, whose own imports take seconds.
    for use in (open_trajectories, TokenDataset.from_pretrained):
        with pytest.raises(DataNotFoundError, match="hf download lab/none --repo-type dataset"):
            use("lab/none")


def test_trajectories_and_tokens_come_from_the_hub_too(offline, tmp_path, hub_cache, episodes, data_set):
    hub_cache(offline, "lab/arm", SO101)
    hub_cache(offline, "lab/tokens", data_set(tmp_path / "made", episodes(3)))
    demonstrations = open_trajectories("lab/arm", camera="observation.images.top", fraction=0.5)
    assert isinstance(demonstrations, Demonstrations)
    assert isinstance(open_trajectories("lab/tokens", split="train"), TokenTrajectories)
    assert len(TokenDataset.from_pretrained("lab/tokens")) == 3


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/cache/datasets--HuggingFaceVLA--libero/snapshots/0123abc", "libero"),
        ("/cache/snapshots/0123abc", "0123abc"),
        ("/data/libero_goal", "libero_goal"),
    ],
)
def test_a_snapshot_is_called_as_its_repository(path, name):
    assert data_name(Path(path)) == name
