"""Held-out trajectories: which they are, what is in their clips, and what tells them from others."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from worldvla_libero.data.episodes import Episode, EpisodeError, split
from worldvla_libero.data.shards import ShardError
from worldvla_libero.evaluation.world.clips import ClipError, ClipKey
from worldvla_libero.evaluation.world.trajectories import Demonstrations, TokenTrajectories, open_trajectories
from worldvla_libero.hdf5 import HDF5Source, write_demonstrations

FIXTURES = Path(__file__).parents[3] / "fixtures"
RAW, SO101 = FIXTURES / "demos" / "libero_object", FIXTURES / "lerobot" / "so101"


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    """Two tasks, three demonstrations of 9 steps each, whose frames and actions tell where they are from."""
    root = tmp_path_factory.mktemp("demos")
    for task in "ab":
        made = []
        for n in range(3):
            frames = np.zeros((9, 32, 32, 3), np.uint8)
            frames += np.arange(9, dtype=np.uint8)[:, None, None, None] + np.uint8(50 * n)
            made.append(Episode("", "", task, np.full((9, 7), float(n)), {"front": frames, "wrist": frames + 9}))
        write_demonstrations(root / f"{task}_demo.hdf5", made)
    return root


def test_frames_of_a_token_data_set_are_codes(data_set, episodes, tmp_path):
    made = episodes(5)
    root = data_set(tmp_path / "tokens", made)
    trajectories = TokenTrajectories(root, "train")
    assert trajectories.truth == "codes"
    assert trajectories.control_hz == 20
    assert [key.steps for key in trajectories.keys] == [len(episode) for episode in made]
    clip = pickle.loads(pickle.dumps(trajectories)).read(ClipKey(0, made[2].id, "task", 1, 1), context=2)
    np.testing.assert_array_equal(clip.codes, made[2].codes[:3])
    np.testing.assert_array_equal(clip.actions, made[2].actions[:2])
    assert clip.frames is None
    with pytest.raises(ShardError, match="no split 'validation'; existing: train"):
        open_trajectories(root)


def test_a_token_data_set_is_refused_by_a_model_of_other_tokens(data_set, episodes, tmp_path):
    trajectories = open_trajectories(data_set(tmp_path / "tokens", episodes(2), tokenizer="y" * 64), split="train")

    def model(fingerprint, size):
        images = SimpleNamespace(vqgan=SimpleNamespace(fingerprint=fingerprint))
        return SimpleNamespace(images=images, image_size=size, actions=SimpleNamespace(dimensions=7))

    with pytest.raises(ShardError, match="made with image tokenizer yyyyyyyyyyyy, not zzz"):
        trajectories.check(model("z" * 64, 256))
    trajectories._data.record.settings["image_size"] = 256
    with pytest.raises(ClipError, match="was tokenized at 256 px; the model sees 128 px"):
        trajectories.check(model("y" * 64, 128))
    trajectories.check(model("y" * 64, 256))


def test_actions_of_another_width_than_the_models_are_refused(demos, data_set, episodes, tmp_path):
    model = SimpleNamespace(actions=SimpleNamespace(dimensions=6))
    tokens = open_trajectories(data_set(tmp_path / "tokens", episodes(2)), split="train")
    for trajectories in (tokens, open_trajectories(demos, camera="front", fraction=0.5)):
        with pytest.raises(ClipError, match=r"actions of \S+ have 7 dimensions; the model's have 6"):
            trajectories.check(model)
    frames = np.zeros((9, 32, 32, 3), np.uint8)
    made = [Episode("", "", "a", np.zeros((9, width)), {"front": frames}) for width in (7, 6)]
    write_demonstrations(tmp_path / "a_demo.hdf5", made)
    mixed = Demonstrations(HDF5Source(tmp_path), part="train", fraction=1.0)
    assert mixed.dimensions == 7
    with pytest.raises(EpisodeError, match=r"demo_1: actions have shape \(9, 6\); \(T, 7\) needed"):
        mixed.read(ClipKey(1, mixed.keys[1].id, "a", 0, 2), context=1)


def test_other_frames_or_options_are_other_data(demos, data_set, episodes, tmp_path):
    root = tmp_path / "demos"
    shutil.copytree(demos, root)

    def identity(**options):
        found = open_trajectories(root, **{"camera": "front", "fraction": 0.5, **options}).identity
        return json.dumps(found)  # as a job keeps it

    first = identity()
    (root / "imagined" / "videos").mkdir(parents=True)
    (root / "imagined" / "videos" / "0.mp4").write_bytes(b"video")  # of a run whose folder is in that of the data
    (root / "imagined" / ".work").mkdir()
    (root / "imagined" / ".work" / "0.hdf5").write_bytes(b"draft")
    assert identity() == first
    shutil.move(root, tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", root, copy_function=shutil.copy2)
    assert identity() == first
    assert identity(camera="wrist") != first
    file = root / "a_demo.hdf5"
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # rendered again: the same lengths, other frames
    changed = identity()
    assert changed != first
    with file.open("ab") as content:
        content.write(b" ")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert identity() not in (first, changed)
    camera, options = "observation.images.top", {"fraction": 0.5}
    usual = open_trajectories(SO101, camera=camera, **options).identity
    other = open_trajectories(SO101, camera=camera, **options, action_key="observation.state").identity
    assert usual != other
    assert usual["source"]["root"] == other["source"]["root"]
    tokens = data_set(tmp_path / "tokens", episodes(3))
    before = open_trajectories(tokens, split="train").identity
    assert open_trajectories(tokens, split="train").identity == before
    shutil.rmtree(tokens)
    assert open_trajectories(data_set(tokens, episodes(3, seed=1)), split="train").identity != before


def test_files_are_listed_once(demos, monkeypatch):
    listed = []
    usual = HDF5Source.list
    monkeypatch.setattr(HDF5Source, "list", lambda self: listed.append(self) or usual(self))
    open_trajectories(demos, camera="front", fraction=0.5)
    assert len(listed) == 1


def test_demonstrations_are_divided_as_prepare_divides_them(demos):
    source = HDF5Source(demos)
    trajectories = open_trajectories(demos, camera="front", fraction=0.6, seed=3)
    splits = split(source.list()[0], fraction=0.6, seed=3)
    assert {key.id for key in trajectories.keys} == {id for id, name in splits.items() if name == "validation"}
    assert (trajectories.truth, trajectories.split) == ("camera", "validation")
    key = trajectories.keys[0]
    clip = pickle.loads(pickle.dumps(trajectories)).read(ClipKey(0, key.id, key.task, 2, 4), context=2)
    n = int(key.id[-1])
    assert clip.frames[:, 0, 0, 0].tolist() == [50 * n + t for t in range(1, 7)]
    assert clip.actions.tolist() == [[float(n)] * 7] * 5
    assert clip.codes is None


def test_clips_of_a_lerobot_data_set_have_the_frames_of_the_camera_chosen():
    camera = "observation.images.top"
    trajectories = open_trajectories(SO101, camera=camera, fraction=0.5)
    key = trajectories.keys[0]
    clip = trajectories.read(ClipKey(0, key.id, key.task, 1, 2), context=1)
    whole = trajectories.source.read(key.id, (camera,))
    np.testing.assert_array_equal(clip.frames, whole.frames[camera][1:4])
    np.testing.assert_array_equal(clip.actions, whole.actions[1:3])
    assert trajectories.control_hz == whole.control_hz


def test_the_split_of_a_prepared_data_set_can_be_taken(demos, data_set, episodes, tmp_path):
    from dataclasses import replace

    ids = ["a_demo/demo_1", "b_demo/demo_2"]
    root = data_set(tmp_path / "tokens", [replace(e, id=id) for e, id in zip(episodes(2), ids, strict=True)])
    taken = Demonstrations(HDF5Source(demos), "front", part="train", prepared=root)
    assert [key.id for key in taken.keys] == ids
    other = data_set(tmp_path / "other", episodes(2))
    with pytest.raises(ClipError, match=r"2 of 2 episodes of .*other, train, are not in .*, such as a/demo_0"):
        Demonstrations(HDF5Source(demos), "front", part="train", prepared=other)


def test_what_cannot_be_imagined_says_why(demos, tmp_path):
    with pytest.raises(ClipError, match=r"raw demonstrations, .* rendered first: worldvla replay"):
        open_trajectories(RAW)
    with pytest.raises(ClipError, match="is in split 'validation': 6 in all"):
        open_trajectories(demos, camera="front", fraction=1.0)
    (tmp_path / "broken_demo.hdf5").write_bytes(b"nothing")
    with pytest.raises(ClipError, match=r"no trajectory of .* can be read: broken_demo\.hdf5 is text .*"):
        open_trajectories(tmp_path)
    (tmp_path / "broken_demo.hdf5").unlink()
    with pytest.raises(FileNotFoundError, match="no demonstrations"):
        open_trajectories(tmp_path)
    (tmp_path / ".work").mkdir()
    with pytest.raises(ShardError, match="its preparation has not ended"):
        open_trajectories(tmp_path)
