import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from worldvla_libero.conventions import proprioception, quaternion_to_axis_angle
from worldvla_libero.data.episodes import Episode, EpisodeError, EpisodeKey, Reason
from worldvla_libero.hdf5 import HDF5Source, merge_demonstrations, write_demonstrations
from worldvla_libero.simulator.rendering import prepare_process

FIXTURE = Path(__file__).parents[2] / "fixtures" / "demos" / "libero_object"
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"
STOVE = "KITCHEN_SCENE3_turn_on_the_stove_and_put_the_moka_pot_on_it"
WORDS = json.dumps({"language_instruction": "pick up the milk"})
RNG = np.random.default_rng(0)


def frames_of(steps: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(steps).integers(0, 256, (steps, size, size, 3), dtype=np.uint8)


def libero_episode(steps: int = 5, **changes) -> Episode:
    rng = np.random.default_rng(steps)
    made = Episode(
        id=f"made/{steps}",
        task="milk",
        instruction="pick up the milk",
        actions=rng.normal(size=(steps, 7)),
        frames={"agentview": frames_of(steps), "robot0_eye_in_hand": frames_of(steps)[:, ::-1]},
        proprioception=rng.normal(size=(steps, 8)),
        states=rng.normal(size=(steps, 21)),
        seed=steps,
        versions={"mujoco": "3.17.0", "robosuite": "1.4.0"},
    )
    return replace(made, **changes)


def write_file(path: Path, demos: dict[str, dict[str, np.ndarray]], **attributes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as content:
        data = content.create_group("data")
        data.attrs.update(attributes)
        for name, arrays in demos.items():
            demo = data.create_group(name)
            for key, array in arrays.items():
                demo[key] = array
    return path


def assert_same(found: Episode, made: Episode, *, cameras: bool = True) -> None:
    assert found.instruction == made.instruction
    assert found.seed == made.seed
    assert found.versions == made.versions
    assert found.control_hz == made.control_hz
    for name in ("actions", "proprioception", "states"):
        expected = getattr(made, name)
        if expected is None:
            assert getattr(found, name) is None
        else:
            np.testing.assert_array_equal(getattr(found, name), expected)
            assert getattr(found, name).dtype == np.float64
    if cameras:
        assert set(found.frames) == set(made.frames)
        for camera, frames in made.frames.items():
            np.testing.assert_array_equal(found.frames[camera], frames)


# Layouts


def test_official_raw_files_are_listed_and_read_for_replay():
    source = HDF5Source(FIXTURE)
    assert source.name == "libero_object"
    assert source.needs_replay
    assert source.cameras == ()
    keys, dropped = source.list()
    assert dropped == []
    assert keys[:2] == [
        EpisodeKey(f"{SOUP}_demo/demo_0", SOUP, 107),
        EpisodeKey(f"{SOUP}_demo/demo_1", SOUP, 109),
    ]
    assert len(keys) == 4
    demo = source.read(keys[0].id)
    assert demo.task == SOUP
    assert demo.instruction == "pick up the alphabet soup and place it in the basket"
    assert demo.actions.shape == (107, 7)
    assert demo.actions.dtype == np.float64
    assert demo.states is not None
    assert demo.states.shape == (1, 110)
    assert demo.seed == 1004
    assert demo.versions == {"mujoco": "3.17.0", "robosuite": "1.4.0"}
    assert demo.control_hz == 20
    assert demo.frames == {}


def test_libero_s_own_frames_of_raw_files_can_be_read_if_no_replay_is_wanted(tmp_path):
    """The official layout in full: frames and proprioception in obs, words as a list of letters' pieces."""
    upside_down = frames_of(3)
    arrays = {
        "actions": np.ones((3, 7)),
        "states": np.ones((3, 9)),
        "robot_states": np.ones((3, 9)),
        "rewards": np.zeros(3, np.uint8),
        "obs/agentview_rgb": upside_down,
        "obs/eye_in_hand_rgb": upside_down,
        "obs/ee_states": np.full((3, 6), 2.0),
        "obs/gripper_states": np.full((3, 2), 3.0),
    }
    words = json.dumps({"language_instruction": ["pick", "up", "the", "milk"]})
    write_file(tmp_path / "milk_demo.hdf5", {"demo_0": arrays}, bddl_file_name="milk.bddl", problem_info=words)
    source = HDF5Source(tmp_path, replay=False)
    assert not source.needs_replay
    assert source.cameras == ("agentview", "robot0_eye_in_hand")
    read = source.read("milk_demo/demo_0", source.cameras)
    assert read.instruction == "pick up the milk"
    np.testing.assert_array_equal(read.frames["agentview"], upside_down[:, ::-1, ::-1])
    np.testing.assert_array_equal(read.proprioception, [[2.0] * 6 + [3.0] * 2] * 3)
    assert HDF5Source(tmp_path).needs_replay
    assert HDF5Source(tmp_path).cameras == ()


@pytest.mark.parametrize(
    ("stem", "instruction"),
    [
        ("put_the_bowl_on_the_plate_demo", "put the bowl on the plate"),
        (f"{STOVE}_demo", "turn on the stove and put the moka pot on it"),
        ("LIVING_ROOM_SCENE2_put_both_the_alphabet_soup_and_the_tomato_sauce_in_the_basket_demo", None),
    ],
)
def test_regenerated_files_are_turned_upright_and_their_name_is_the_instruction(tmp_path, stem, instruction):
    """As OpenVLA's script writes them: no attributes at all, frames as OpenGL draws them."""
    upside_down = frames_of(4)
    arrays = {
        "actions": np.ones((4, 7)),
        "states": np.ones((4, 5)),
        "robot_states": np.ones((4, 9)),
        "obs/agentview_rgb": upside_down,
        "obs/eye_in_hand_rgb": upside_down,
        "obs/ee_states": np.ones((4, 6)),
        "obs/gripper_states": np.ones((4, 2)),
        "obs/joint_states": np.ones((4, 7)),
    }
    write_file(tmp_path / f"{stem}.hdf5", {"demo_0": arrays})
    source = HDF5Source(tmp_path)
    assert not source.needs_replay
    assert source.cameras == ("agentview", "robot0_eye_in_hand")
    read = source.read(f"{stem}/demo_0", ["agentview"])
    assert read.task == stem.removesuffix("_demo")
    words = instruction or "put both the alphabet soup and the tomato sauce in the basket"
    assert read.instruction == words
    assert list(read.frames) == ["agentview"]
    np.testing.assert_array_equal(read.frames["agentview"], upside_down[:, ::-1, ::-1])
    assert read.frames["agentview"].flags.c_contiguous
    assert read.seed is None
    assert read.versions == {}


def test_a_robot_of_another_kind_keeps_its_frames_as_they_are(tmp_path):
    frames, states = frames_of(3), RNG.normal(size=(3, 9))
    arrays = {
        "actions": np.ones((3, 4), np.float32),
        "robot_states": states,  # nine of them, but not LIBERO's
        "obs/front": frames,
        "obs/depth": np.ones((3, 16, 16, 1), np.uint8),
        "obs/joints": np.ones((3, 4)),
    }
    write_file(tmp_path / "stack.h5", {"demo_0": arrays}, problem_info=WORDS, control_hz=50.0)
    source = HDF5Source(tmp_path)
    assert source.cameras == ("front",)
    assert source.list()[0] == [EpisodeKey("stack/demo_0", "stack", 3)]
    read = source.read("stack/demo_0", ["front"])
    assert read.actions.shape == (3, 4)
    assert read.actions.dtype == np.float64
    np.testing.assert_array_equal(read.frames["front"], frames)
    np.testing.assert_array_equal(read.proprioception, states)
    assert read.states is None
    assert read.control_hz == 50
    with pytest.raises(EpisodeError, match=r"stack/demo_0: no frames of camera 'agentview'; existing: front"):
        source.read("stack/demo_0", ["agentview"])


def test_words_may_be_strings_of_either_kind(tmp_path):
    path = write_file(tmp_path / "a_demo.hdf5", {"demo_0": {"actions": np.ones((2, 7))}})
    for words in ("stack the cups", np.bytes_("stack the cups")):
        with h5py.File(path, "a") as content:
            content["data/demo_0"].attrs["language_instruction"] = words
            content["data"].attrs["mujoco"] = np.bytes_("3.17.0")
        read = HDF5Source(path).read("a_demo/demo_0")
        assert read.instruction == "stack the cups"
        assert read.versions == {"mujoco": "3.17.0"}


def test_a_single_file_is_a_source(tmp_path):
    path = write_file(tmp_path / "a_demo.hdf5", {"demo_0": {"actions": np.ones((2, 7))}})
    source = HDF5Source(path)
    assert source.name == "a_demo.hdf5"
    assert [key.id for key in source.list()[0]] == ["a_demo/demo_0"]
    assert source.read("a_demo/demo_0").instruction == "a"


# Listing


def test_demos_are_listed_by_number_and_files_by_name(tmp_path):
    names = [f"demo_{i}" for i in (10, 2, 0, 1, 11)]
    demos = {name: {"actions": np.ones((2, 7))} for name in names}
    for stem in ("b_demo", "a_demo", "more/a_demo"):
        write_file(tmp_path / f"{stem}.hdf5", demos)
    ids = [key.id for key in HDF5Source(tmp_path).list()[0]]
    numbered = [f"demo_{i}" for i in (0, 1, 2, 10, 11)]
    assert ids == [f"{stem}/{name}" for stem in ("a_demo", "b_demo", "more/a_demo") for name in numbered]
    assert HDF5Source(tmp_path).read("more/a_demo/demo_10").id == "more/a_demo/demo_10"


def test_parts_of_unfinished_jobs_are_not_demonstrations(tmp_path):
    demos = {"demo_0": {"actions": np.ones((2, 7))}}
    write_file(tmp_path / "a_demo.hdf5", demos)
    write_file(tmp_path / ".work" / "000-000000.hdf5", demos)
    write_file(tmp_path / ".a_demo.hdf5", demos)
    assert [key.id for key in HDF5Source(tmp_path).list()[0]] == ["a_demo/demo_0"]
    inside = tmp_path / ".hidden"
    write_file(inside / "b_demo.hdf5", demos)
    assert len(HDF5Source(inside).list()[0]) == 1  # whoever names a hidden folder means it


@pytest.mark.parametrize("content", ["nothing", "other files", "absent", "a folder called .hdf5"])
def test_a_folder_without_demonstrations_is_refused(tmp_path, content):
    root = tmp_path / "demos"
    if content != "absent":
        root.mkdir()
    if content == "other files":
        (root / "readme.md").write_text("no demonstrations")
    if content == "a folder called .hdf5":
        (root / "a_demo.hdf5").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no demonstrations: .*demos is no HDF5 file"):
        HDF5Source(root)


# Faults


def truncated(path: Path) -> None:
    source = FIXTURE / f"{SOUP}_demo.hdf5"
    path.write_bytes(source.read_bytes()[:-1000])


def emptied(path: Path) -> None:
    path.touch()


def foreign(path: Path) -> None:
    with h5py.File(path, "w") as content:
        content["observations"] = np.ones(3)
        content["mask"] = np.ones(3)


def data_is_an_array(path: Path) -> None:
    with h5py.File(path, "w") as content:
        content["data"] = np.ones(3)


def text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")


@pytest.mark.parametrize(
    ("spoil", "reason", "message"),
    [
        (truncated, Reason.UNREADABLE, "b_demo.hdf5: truncated, damaged, or still being copied ("),
        (emptied, Reason.UNREADABLE, "b_demo.hdf5 is empty, no HDF5 file (0 bytes); remedy: fetch the file again"),
        (
            text,
            Reason.UNREADABLE,
            "b_demo.hdf5 is a Git LFS pointer, not the file itself, no HDF5 file (63 bytes)",
        ),
        (foreign, Reason.MISSING_KEY, "b_demo.hdf5: no group 'data'; LIBERO's layout needed, found mask, observ"),
        (data_is_an_array, Reason.MISSING_KEY, "b_demo.hdf5: no group 'data'; LIBERO's layout needed, found data"),
    ],
)
def test_a_bad_file_is_reported_and_the_others_are_listed(
    tmp_path, spoil: Callable[[Path], None], reason, message
):
    for stem in ("a", "c"):
        demo = {"actions": np.ones((2, 7)), "obs/agentview_rgb": frames_of(2)}
        write_file(tmp_path / f"{stem}_demo.hdf5", {"demo_0": demo})
    spoil(tmp_path / "b_demo.hdf5")
    source = HDF5Source(tmp_path)
    keys, (dropped,) = source.list()
    assert [key.id for key in keys] == ["a_demo/demo_0", "c_demo/demo_0"]
    assert dropped.id == "b_demo.hdf5"
    assert dropped.reason == reason
    assert dropped.message.startswith(message)
    assert "\n" not in dropped.message
    with pytest.raises(EpisodeError) as caught:
        source.read("b_demo/demo_0")
    assert caught.value.reason is reason
    # What the source is, is told by the first readable file.
    (tmp_path / "a_demo.hdf5").unlink()
    assert HDF5Source(tmp_path).cameras == ("agentview",)
    assert not HDF5Source(tmp_path).needs_replay


def test_a_folder_of_bad_files_alone_is_a_source_without_episodes(tmp_path):
    text(tmp_path / "b_demo.hdf5")
    source = HDF5Source(tmp_path)
    assert (source.cameras, source.needs_replay) == ((), False)
    keys, dropped = source.list()
    assert keys == []
    assert len(dropped) == 1


@pytest.mark.parametrize(
    ("demo", "attributes", "reason", "message"),
    [
        ({"states": np.ones((2, 5))}, {}, Reason.MISSING_KEY, "a_demo/demo_0: no 'actions'; existing: states"),
        ({}, {}, Reason.MISSING_KEY, "a_demo/demo_0: no 'actions'; existing: nothing"),
        (
            {"actions": np.array([b"left", b"right"])},
            {},
            Reason.UNREADABLE,
            "a_demo/demo_0: damaged, or not what it should be",
        ),
        ({"actions/x": np.ones(3)}, {}, Reason.UNREADABLE, "a_demo/demo_0: damaged, or not what it should be"),
        (
            {"actions": np.ones((2, 7)), "obs": np.ones(3)},
            {},
            Reason.UNREADABLE,
            "a_demo/demo_0: damaged, or not what it should be",
        ),
        (
            {"actions": np.ones((2, 7))},
            {"problem_info": "{half"},
            Reason.MISSING_KEY,
            "a_demo/demo_0: attribute 'problem_info' of 'data' holds no 'language_instruction'",
        ),
        (
            {"actions": np.ones((2, 7))},
            {"problem_info": json.dumps({"domain_name": "robosuite"})},
            Reason.MISSING_KEY,
            "a_demo/demo_0: attribute 'problem_info' of 'data' holds no 'language_instruction'",
        ),
        (
            {"actions": np.ones((2, 7))},
            {"problem_info": 3},
            Reason.MISSING_KEY,
            "a_demo/demo_0: attribute 'problem_info' of 'data' holds no 'language_instruction'",
        ),
    ],
)
def test_a_bad_episode_is_listed_and_refused_when_read(tmp_path, demo, attributes, reason, message):
    good = {"actions": np.ones((2, 7))}
    write_file(tmp_path / "a_demo.hdf5", {"demo_0": demo, "demo_1": good}, **attributes)
    source = HDF5Source(tmp_path)
    keys, dropped = source.list()
    assert [key.id for key in keys] == ["a_demo/demo_0", "a_demo/demo_1"]
    assert dropped == []
    with pytest.raises(EpisodeError) as caught:
        source.read("a_demo/demo_0")
    assert caught.value.reason is reason
    assert caught.value.message.startswith(message)
    if not attributes:
        assert len(source.read("a_demo/demo_1")) == 2


def test_an_array_beside_the_demos_is_no_trap(tmp_path):
    path = write_file(tmp_path / "a_demo.hdf5", {"demo_0": {"actions": np.ones((2, 7))}})
    with h5py.File(path, "a") as content:
        content["data/total"] = 2
    keys, _ = HDF5Source(tmp_path).list()
    assert [(key.id, key.steps) for key in keys] == [("a_demo/demo_0", 2), ("a_demo/total", 0)]
    with pytest.raises(EpisodeError, match="a_demo/total: no 'actions'"):
        HDF5Source(tmp_path).read("a_demo/total")


@pytest.mark.parametrize("id", ["a_demo/demo_7", "b_demo/demo_0", "demo_0", ""])
def test_an_unknown_id_is_named(tmp_path, id):
    write_file(tmp_path / "a_demo.hdf5", {"demo_0": {"actions": np.ones((2, 7))}})
    with pytest.raises(EpisodeError, match=f"{id}: no such file|{id}: no 'demo_7'; existing: demo_0"):
        HDF5Source(tmp_path).read(id)


def test_a_hole_in_an_array_is_found_when_it_is_read(tmp_path):
    """An interrupted download leaves zeros where blocks are missing; compressed frames notice."""
    path = tmp_path / "milk_demo.hdf5"
    write_demonstrations(path, [libero_episode(20)])
    content = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        chunk = file["data/demo_0/obs/agentview_rgb"].id.get_chunk_info(3)
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)
    source = HDF5Source(path)
    assert len(source.read("milk_demo/demo_0")) == 20
    with pytest.raises(EpisodeError, match="milk_demo/demo_0: damaged") as caught:
        source.read("milk_demo/demo_0", ["agentview"])
    assert caught.value.reason is Reason.UNREADABLE


@given(st.floats(0, 1))
def test_a_file_cut_anywhere_is_an_unreadable_file(tmp_path_factory, share):
    content = (FIXTURE / f"{SOUP}_demo.hdf5").read_bytes()
    path = tmp_path_factory.getbasetemp() / "cut_demo.hdf5"
    path.write_bytes(content[: int(share * (len(content) - 1))])
    keys, (dropped,) = HDF5Source(path).list()
    assert keys == []
    assert dropped.reason == Reason.UNREADABLE


# Writing


@pytest.mark.parametrize(
    "made",
    [
        libero_episode(),
        libero_episode(frames={}, proprioception=None, states=None, seed=None, versions={}),
        libero_episode(frames={"front": frames_of(5)}, actions=RNG.normal(size=(5, 4)), control_hz=50.0),
        libero_episode(frames={"front": frames_of(5)}, proprioception=RNG.normal(size=(5, 9)), states=None),
        libero_episode(states=RNG.normal(size=(1, 21))),
        libero_episode(instruction='put the mug that says "hi" on the plate — now'),
    ],
    ids=["everything", "actions alone", "another robot", "nine states", "first state alone", "odd words"],
)
def test_what_is_written_is_read(tmp_path, made):
    path = tmp_path / "deep" / "milk_demo.hdf5"
    assert write_demonstrations(path, [made]) == 1
    source = HDF5Source(path)
    assert source.cameras == tuple(made.frames)
    assert not source.needs_replay
    assert_same(source.read("milk_demo/demo_0", source.cameras), made)


def test_frames_are_stored_as_libero_stores_them(tmp_path):
    made = libero_episode()
    write_demonstrations(tmp_path / "milk_demo.hdf5", [made])
    with h5py.File(tmp_path / "milk_demo.hdf5") as content:
        data = content["data"]
        demo = data["demo_0"]
        stored = demo["obs/agentview_rgb"][:]
        np.testing.assert_array_equal(stored[:, ::-1, ::-1], made.frames["agentview"])
        np.testing.assert_array_equal(demo["obs/ee_states"], made.proprioception[:, :6])
        np.testing.assert_array_equal(demo["obs/gripper_states"], made.proprioception[:, 6:])
        assert demo["dones"][:].tolist() == demo["rewards"][:].tolist() == [0, 0, 0, 0, 1]
        assert demo.attrs["num_samples"] == 5
        assert json.loads(data.attrs["problem_info"]) == {"language_instruction": "pick up the milk"}
        assert data.attrs["num_demos"] == 1


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("written")
    write_demonstrations(root / "milk_demo.hdf5", [libero_episode(n) for n in (3, 4)])
    parts = [root / "part" / f"{n}.hdf5" for n in (3, 4)]
    for part, n in zip(parts, (3, 4), strict=True):
        write_demonstrations(part, [libero_episode(n)])
    merge_demonstrations(
        root / "merged_demo.hdf5", parts, attributes={"bddl_file_name": "milk.bddl", "attempts": 7}
    )
    return root


def test_the_same_episodes_give_the_same_bytes(written, tmp_path):
    time.sleep(1.1)  # HDF5's own time stamps are in seconds
    write_demonstrations(tmp_path / "milk_demo.hdf5", (libero_episode(n) for n in (3, 4)))
    assert (tmp_path / "milk_demo.hdf5").read_bytes() == (written / "milk_demo.hdf5").read_bytes()
    parts = [written / "part" / f"{n}.hdf5" for n in (3, 4)]
    merge_demonstrations(tmp_path / "merged", parts, attributes={"bddl_file_name": "milk.bddl", "attempts": 7})
    assert (tmp_path / "merged").read_bytes() == (written / "merged_demo.hdf5").read_bytes()


def test_a_merger_numbers_the_demonstrations_anew_in_the_order_given(written):
    source = HDF5Source(written / "merged_demo.hdf5", replay=False)
    assert HDF5Source(written / "merged_demo.hdf5").needs_replay
    for number, steps in enumerate((3, 4)):
        assert_same(source.read(f"merged_demo/demo_{number}", source.cameras), libero_episode(steps))
    with h5py.File(written / "merged_demo.hdf5") as content:
        attributes = content["data"].attrs
        assert (attributes["num_demos"], attributes["total"], attributes["attempts"]) == (2, 7, 7)
        assert json.loads(attributes["problem_info"])["language_instruction"] == "pick up the milk"


def test_a_merger_of_many_keeps_the_order_of_numbers(tmp_path):
    episodes = [libero_episode(n, frames={}) for n in range(1, 13)]
    write_demonstrations(tmp_path / "many.hdf5", episodes)
    assert merge_demonstrations(tmp_path / "all_demo.hdf5", [tmp_path / "many.hdf5"] * 2) == 2 * sum(range(1, 13))
    keys, _ = HDF5Source(tmp_path / "all_demo.hdf5").list()
    assert [key.steps for key in keys] == [*range(1, 13)] * 2


def test_nothing_is_written_of_no_episodes(tmp_path):
    with pytest.raises(EpisodeError, match="no episode to write"):
        write_demonstrations(tmp_path / "a_demo.hdf5", [])
    with pytest.raises(EpisodeError, match="no episode to write"):
        merge_demonstrations(tmp_path / "a_demo.hdf5", [])
    assert list(tmp_path.iterdir()) == []


def test_two_tasks_do_not_go_into_one_file(tmp_path):
    other = libero_episode(4, instruction="pick up the soup")
    with pytest.raises(
        EpisodeError, match=r"made/4: its instruction is 'pick up the soup', the file's 'pick up the m"
    ):
        write_demonstrations(tmp_path / "a_demo.hdf5", [libero_episode(3), other])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "milk_demo.hdf5"
    write_demonstrations(path, [libero_episode(3)])
    before = path.read_bytes()

    def fail() -> Iterator[Episode]:
        yield libero_episode(4)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_demonstrations(path, fail())
    assert path.read_bytes() == before
    text(tmp_path / "b.hdf5")
    with pytest.raises(EpisodeError, match=r"b\.hdf5 is a Git LFS pointer"):
        merge_demonstrations(path, [path, tmp_path / "b.hdf5"])
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.hdf5", "milk_demo.hdf5"]


def test_an_error_of_the_system_while_a_demo_is_written_leaves_nothing(tmp_path, monkeypatch):
    create, calls = h5py.Group.create_dataset, []

    def full(group, name, **options):
        calls.append(name)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return create(group, name, **options)

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(OSError, match="No space left") as caught:
        write_demonstrations(tmp_path / "milk_demo.hdf5", [libero_episode(3), libero_episode(4)])
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("work", ["write", "merge"])
def test_a_full_disk_is_an_ordinary_error_however_much_still_fits(tmp_path, written, work):
    """In a process of its own: HDF5, left to itself, ends it with a segmentation fault."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_hdf5 import allowed_to_write
allowed_to_write({work!r}, Path({str(written)!r}), Path({str(tmp_path)!r}))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    first, *limited, last = ran.stdout.split()
    assert first == last == "written"
    assert limited == ["EFBIG"] * 13
    assert [path.name for path in tmp_path.iterdir()] == ["x_demo.hdf5"]


def allowed_to_write(work: str, written: Path, folder: Path) -> None:
    """Write a file, then with ever more bytes allowed per file, as on a disk that is full, then once more."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    path, episodes = folder / "x_demo.hdf5", [libero_episode(n) for n in (3, 4)]

    def write() -> None:
        if work == "write":
            write_demonstrations(path, episodes)
        else:
            merge_demonstrations(path, [written / "milk_demo.hdf5"])

    write()
    print("written")  # noqa: T201
    whole = path.read_bytes()
    path.unlink()
    for limit in (0, 50, 1000, 3000, *(len(whole) * n // 9 for n in range(1, 9)), len(whole) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write()
        except OSError as error:
            print(errno.errorcode[error.errno])  # noqa: T201
        assert list(folder.iterdir()) == []
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    write()
    print("written")  # noqa: T201
    assert path.read_bytes() == whole


# Proprioception


# Where w is -1 but for rounding, the formula, which is LIBERO's, is off by what the sine has lost.
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q[:3]) > 1e-3))
def test_axis_angles_are_the_same_rotation(numbers):
    quaternion = np.array(numbers) / np.linalg.norm(numbers)
    vector = quaternion_to_axis_angle(quaternion)
    assert 0 <= np.linalg.norm(vector) < 2 * np.pi + 1e-6
    turned = Rotation.from_rotvec(vector) * Rotation.from_quat(quaternion).inv()
    assert turned.magnitude() < 1e-6


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # robosuite greets with some
def test_axis_angles_equal_robosuite_s():
    prepare_process()
    from robosuite.utils.transform_utils import quat2axisangle

    quaternions = np.random.default_rng(0).normal(size=(100, 4))
    quaternions /= np.linalg.norm(quaternions, axis=1, keepdims=True)
    quaternions[0] = (0, 0, 0, 1)
    expected = [quat2axisangle(quaternion.copy()) for quaternion in quaternions]
    np.testing.assert_allclose(quaternion_to_axis_angle(quaternions), expected, rtol=1e-12)


def test_proprioception_is_position_axis_angle_fingers():
    half = np.sqrt(0.5)
    robot_states = [[0.01, -0.02, 1, 2, 3, 0, 0, half, half]]
    np.testing.assert_allclose(
        proprioception(np.array(robot_states)), [[1, 2, 3, 0, 0, np.pi / 2, 0.01, -0.02]], atol=1e-12
    )


def test_cameras_are_told_by_the_first_episode_that_has_any(tmp_path):
    frames = {"actions": np.zeros((5, 4)), "obs/front": frames_of(5)}
    path = write_file(tmp_path / "a.hdf5", {"demo_0": {"actions": np.zeros((5, 4))}, "demo_1": frames})
    with h5py.File(path, "a") as content:
        content["data/array"] = np.zeros(3)
    assert HDF5Source(tmp_path).cameras == ("front",)
