"""How people write demonstrations into HDF5, variation by variation.

Looked up in the scripts of the field: LIBERO's `collect_demonstration.py` and `create_dataset.py` (scene as a
path of the machine it was made on, problem_info as JSON, macros_image_convention, `demo.hdf5` in a folder a
run), OpenVLA's regeneration (no attributes at all), robomimic (env_args, `low_dim_v15.hdf5`, a group `mask`
beside `data`), RoboCasa (words as `lang` in the JSON of ep_meta, one per episode), Cosmos-Policy
(task_description per episode, frames as JPEG of varying length), ALOHA's compressed frames (rows padded with
zeros), Isaac Lab (RGBA, float, `states` as a group), and converters that put the words on the file, into a data
set, or into an array of one.
"""

import io
import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from worldvla_libero.data.episodes import EpisodeError, Reason, SourceError
from worldvla_libero.hdf5 import FileInUseError, HDF5Source
from worldvla_libero.hdf5.layouts import json_of, text_of
from worldvla_libero.prepare import PrepareError, PrepareSettings, plan

RNG = np.random.default_rng(0)
STEPS = 4
FRAMES = RNG.integers(0, 256, (STEPS, 16, 16, 3), dtype=np.uint8)
ONE = {"actions": RNG.normal(size=(STEPS, 7)), "obs/agentview_rgb": FRAMES}
SOUP = "pick_up_the_alphabet_soup_and_place_it_in_the_basket"


def write(path: Path, *demos: dict, file: dict | None = None, each: tuple[dict, ...] = (), **data) -> Path:
    """A file with `demos`, attributes of the group `data`, of the file, and of each episode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as content:
        content.attrs.update(file or {})
        content.create_group("data").attrs.update(data)
        for i, arrays in enumerate(demos or (ONE,)):
            demo = content.create_group(f"data/demo_{i}")
            demo.attrs.update(each[i] if each else {})
            for key, array in arrays.items():
                demo[key] = array
    return path


def tasks(source: HDF5Source) -> dict[str, str]:
    return {key.id: key.task for key in source.list()[0]}


# Files that robosuite, robomimic and Isaac Lab wrote themselves (tests/fixtures/hdf5)


@pytest.mark.parametrize(
    ("name", "task", "cameras"),
    [
        ("robosuite", "Lift", ()),
        ("robomimic", "Lift", ("agentview_image", "robot0_eye_in_hand_image")),
        ("isaaclab", "Isaac-Stack-Cube-Franka-IK-Rel-Visuomotor-v0", ("table_cam", "wrist_cam")),
    ],
)
def test_files_of_other_programs(name, task, cameras):
    source = HDF5Source(Path(__file__).parents[2] / f"fixtures/hdf5/{name}.hdf5")
    assert not source.needs_replay
    keys, dropped = source.list()
    assert [(key.task, key.steps) for key in keys] == [(task, 12)] * 2
    assert not dropped
    assert source.cameras == cameras
    assert f"they are taken from the names of files, folders and environments: {task}" in source.notes[0]
    for key in keys:
        episode = source.read(key.id, cameras)
        assert episode.actions.shape == (12, 7)
        assert np.abs(episode.actions).max() <= 1
        assert {frames.shape for frames in episode.frames.values()} <= {(12, 32, 32, 3)}
        assert (episode.proprioception is None) == (name != "robomimic")
        assert (episode.states is None) == (name == "isaaclab")  # there a group, of which nothing is read


def test_robomimic_s_frames_stand_upright():
    source = HDF5Source(Path(__file__).parents[2] / "fixtures/hdf5/robomimic.hdf5")
    frame = source.read(source.list()[0][0].id, ["agentview_image"]).frames["agentview_image"][0]
    assert frame[:8].mean() < frame[8:].mean() - 30  # the dark wall above, the white table below


# Words


@pytest.mark.parametrize(
    "value",
    [
        "stack the cups",
        b"stack the cups",
        np.bytes_("stack the cups"),
        np.array(["stack the cups"], dtype=object),
        np.array([b"stack the cups"]),
        np.array(b"stack the cups"),
        np.array(["stack", "the", "cups"], dtype=object),
        [b"stack the cups"] * 3,
    ],
)
def test_text_comes_in_every_form_that_h5py_has(value):
    assert text_of(value) == "stack the cups"


def test_what_is_no_text_of_one_sentence():
    assert text_of(None) == text_of(h5py.Empty("S1")) == text_of(np.array([])) == ""
    with pytest.raises(ValueError, match=r"2 texts \(stack the cups; pile the cups\); one needed"):
        text_of(np.array(["stack the cups", "pile the cups"], dtype=object))


def test_json_may_be_encoded_twice():
    content = {"language_instruction": "stack"}
    assert json_of(json.dumps(content)) == json_of(json.dumps(json.dumps(content)).encode()) == content
    for broken in ("{half", "3", "[1]", ""):
        with pytest.raises(ValueError, match=r"."):
            json_of(broken)


@pytest.mark.parametrize(
    ("file", "data", "demo"),
    [
        ({}, {"problem_info": json.dumps({"language_instruction": '"stack the cups"'})}, {}),
        ({}, {"problem_info": json.dumps({"language_instruction": ["stack", "the", "cups"]}).encode()}, {}),
        ({}, {"language_instruction": np.array(["stack the cups"], dtype=object)}, {}),
        ({}, {"problem_info": "{broken"}, {"language_instruction": "stack the cups"}),
        ({}, {}, {"task_description": b"stack the cups"}),
        ({}, {}, {"ep_meta": json.dumps({"lang": "stack the cups", "layout_id": 3})}),
        ({}, {"language_instruction": "other words"}, {"lang": "stack the cups"}),
        ({"task_description": "stack the cups"}, {}, {}),
        ({"language_instruction": " stack the cups\n"}, {"problem_info": json.dumps({"domain": "x"})}, {}),
    ],
)
def test_words_are_found_wherever_they_stand(tmp_path, file, data, demo):
    write(tmp_path / "a_demo.hdf5", file=file, each=(demo,), **data)
    source = HDF5Source(tmp_path)
    assert source.read("a_demo/demo_0").instruction == "stack the cups"
    assert source.notes == ()


def test_words_may_be_a_data_set_the_same_for_every_step(tmp_path):
    words = np.array([b"stack the cups"] * STEPS)
    write(tmp_path / "a_demo.hdf5", ONE | {"language_instruction": words})
    assert HDF5Source(tmp_path).read("a_demo/demo_0").instruction == "stack the cups"


def test_the_name_is_the_last_resort_and_the_source_says_so(tmp_path):
    write(tmp_path / "stack_the_cups_demo.hdf5")
    source = HDF5Source(tmp_path)
    assert source.read("stack_the_cups_demo/demo_0").instruction == "stack the cups"
    (note,) = source.notes
    assert note.startswith("no attribute says the words of 1 tasks; they are taken from the names of files")
    assert note.endswith(": stack_the_cups")
    assert plan(source, PrepareSettings(image_size=32, fraction=1)).notes == (note,)


# Tasks


@pytest.mark.parametrize(
    "data",
    [
        {"bddl_file_name": f"{SOUP}.bddl"},
        {"bddl_file_name": f"/home/someone/LIBERO/libero/libero/bddl_files/libero_object/{SOUP}.bddl"},
        {"bddl_file_name": rf"C:\Users\someone\bddl_files\libero_object\{SOUP}.bddl".encode()},
        {"env_args": json.dumps({"env_kwargs": {"bddl_file_name": f"libero/libero/bddl_files/{SOUP}.bddl"}})},
        {"env_args": json.dumps(json.dumps({"bddl_file": f"{SOUP}.bddl"}))},
    ],
)
@pytest.mark.parametrize("name", ["demo.hdf5", "2026-01-05_10-11-12/demo.hdf5", "some_other_task_demo.h5"])
def test_the_scene_names_the_task_whatever_the_file_is_called(tmp_path, data, name):
    write(tmp_path / name, **data)
    assert [*tasks(HDF5Source(tmp_path)).values()] == [SOUP]


def test_runs_of_one_task_may_share_a_file_name(tmp_path):
    for run in ("robosuite_ln_1704_11", "robosuite_ln_1704_12"):
        write(tmp_path / run / "demo.hdf5", language_instruction="stack the cups")
    source = HDF5Source(tmp_path)
    assert {*tasks(source).values()} == {"stack_the_cups"}
    assert len(tasks(source)) == 2
    assert source.notes == ()


def test_tasks_with_one_file_name_are_told_apart_by_their_words(tmp_path):
    for words in ("stack the cups", "open the door"):
        write(tmp_path / words[:4] / "milk_demo.hdf5", language_instruction=words)
    assert {*tasks(HDF5Source(tmp_path)).values()} == {"stack_the_cups", "open_the_door"}


@pytest.mark.parametrize("name", ["demo_im128.hdf5", "low_dim_v15.hdf5", "milk_demo.hdf5", "2024-11-02/image.h5"])
def test_without_words_tasks_are_told_apart_by_their_folders_and_that_is_said(tmp_path, name):
    for task in ("OpenDoor", "PnP"):
        write(tmp_path / "v1" / task / name)
    source = HDF5Source(tmp_path)
    assert {*tasks(source).values()} == {"v1/OpenDoor", "v1/PnP"}
    (first, *_), _ = source.list()
    assert source.read(first.id).instruction == "OpenDoor"
    assert "no attribute says the words of 2 tasks" in source.notes[0]


def test_the_folder_itself_may_say_the_task(tmp_path):
    write(tmp_path / "open_the_door" / "demo.hdf5")
    assert [*tasks(HDF5Source(tmp_path / "open_the_door")).values()] == ["open_the_door"]


def test_a_file_of_many_tasks_has_those_of_its_episodes(tmp_path):
    each = tuple({"ep_meta": json.dumps({"lang": words})} for words in ("open the door", "stack", "open the door"))
    write(tmp_path / "demo_gentex_im128_randcams.hdf5", ONE, ONE, ONE, each=each)
    write(tmp_path / "demo.hdf5", ONE, ONE, ONE, each=each)
    found = tasks(HDF5Source(tmp_path))
    assert [found[f"demo/demo_{i}"] for i in range(3)] == ["open_the_door", "stack", "open_the_door"]


@pytest.mark.parametrize("name", ["demo.hdf5", "2024-11-02/demo.hdf5", "run_3/data/episode_000.h5"])
def test_a_file_of_which_nothing_says_the_task_is_refused_before_the_work(tmp_path, name):
    path = write(tmp_path / "2026" / name)
    with pytest.raises(SourceError, match="nothing says which task it is of") as caught:
        HDF5Source(tmp_path / "2026").list()
    assert str(path) in str(caught.value)
    assert "language_instruction" in str(caught.value)


# Files


@pytest.mark.parametrize("second", ["milk_demo.h5", "more/milk_demo.h5"])
def test_two_files_of_one_name_are_refused(tmp_path, second):
    first = write(tmp_path / second.replace(".h5", ".hdf5"))
    other = write(tmp_path / second)
    with pytest.raises(
        SourceError, match="have the same name, and so would their episodes; move one away"
    ) as caught:
        HDF5Source(tmp_path).list()
    assert str(first) in str(caught.value)
    assert str(other) in str(caught.value)


def test_raw_and_replayed_files_under_one_parent_are_refused_unless_one_says_what_is_meant(tmp_path):
    write(tmp_path / "no_noops" / "milk_demo.hdf5")
    write(tmp_path / "raw" / "milk_demo.hdf5", ONE | {"states": np.ones((STEPS, 9))}, bddl_file_name="milk.bddl")
    source = HDF5Source(tmp_path)
    with pytest.raises(SourceError, match=r"raw demonstrations, to be replayed \(raw/milk_demo\), beside others"):
        plan(source)
    assert HDF5Source(tmp_path / "raw").needs_replay
    assert not HDF5Source(tmp_path / "no_noops").needs_replay
    assert len(HDF5Source(tmp_path, replay=False).list()[0]) == 2


def test_a_file_that_names_a_scene_and_has_no_states_is_not_raw(tmp_path):
    write(tmp_path / "milk_demo.hdf5", bddl_file_name="milk.bddl")
    assert not HDF5Source(tmp_path).needs_replay


def test_mixed_control_rates_are_refused_unless_the_simulator_sets_the_rate(tmp_path):
    states = ONE | {"states": np.ones((STEPS, 9))}
    for name, rate in (("a", 20.0), ("b", 10.0)):
        write(tmp_path / f"{name}_demo.hdf5", states, control_hz=rate, bddl_file_name=f"{name}.bddl")
    with pytest.raises(SourceError, match=r"mixes control rates \(b_demo.hdf5 at 10 Hz, a_demo.hdf5 at 20 Hz\)"):
        HDF5Source(tmp_path, replay=False).list()
    assert len(HDF5Source(tmp_path).list()[0]) == 2


@pytest.mark.parametrize(("rate", "read"), [(10, 10.0), (12.5, 12.5), (0, 20.0), ("fast", 20.0)])
def test_the_control_rate_is_what_robosuite_was_told(tmp_path, rate, read):
    arguments = json.dumps({"env_name": "Lift", "env_kwargs": {"control_freq": rate}})
    write(tmp_path / "lift_demo.hdf5", env_args=arguments)
    assert HDF5Source(tmp_path).read("lift_demo/demo_0").control_hz == read


@pytest.mark.parametrize(
    ("name", "env", "task"),
    [
        ("lift/ph/low_dim_v15.hdf5", "Lift", "lift"),  # robomimic's folders
        ("datasets/dataset.hdf5", "Isaac-Lift-Cube-Franka-v0", "Isaac-Lift-Cube-Franka-v0"),
        ("generated_dataset.hdf5", "NutAssemblySquare", "NutAssemblySquare"),
    ],
)
def test_where_names_say_nothing_the_environment_is_the_task(tmp_path, name, env, task):
    write(tmp_path / "data" / name, env_args=json.dumps({"env_name": env, "type": 1}))
    assert {*tasks(HDF5Source(tmp_path / "data")).values()} == {task}


def test_libero_s_environments_are_no_tasks(tmp_path):
    write(tmp_path / "data/demo.hdf5", env_args=json.dumps({"env_name": "Libero_Tabletop_Manipulation"}))
    with pytest.raises(SourceError, match="nothing says which task it is of"):
        HDF5Source(tmp_path / "data").list()


def test_groups_beside_the_episodes_are_no_episodes(tmp_path):
    path = write(tmp_path / "lift_demo.hdf5")
    with h5py.File(path, "a") as content:
        content["mask/train"] = np.array([b"demo_0"])
    assert [*tasks(HDF5Source(tmp_path))] == ["lift_demo/demo_0"]


@pytest.mark.skipif(sys.platform != "linux", reason="locks differ elsewhere")
def test_a_file_that_another_process_writes_is_not_called_damaged(tmp_path):
    write(tmp_path / "a_demo.hdf5")
    path = write(tmp_path / "b_demo.hdf5")
    code = f"import h5py; file = h5py.File({str(path)!r}, 'a'); print('open', flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "open\n"
        with pytest.raises(FileInUseError, match=r"b_demo\.hdf5 is in use: another process writes it"):
            HDF5Source(tmp_path).list()
        writer.communicate("\n")
    assert len(HDF5Source(tmp_path).list()[0]) == 2


# Frames


def encoded(format: str, frames: np.ndarray = FRAMES) -> list[np.ndarray]:
    found = []
    for frame in frames:
        Image.fromarray(frame).save(buffer := io.BytesIO(), format)
        found.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return found


def padded(images: list[np.ndarray]) -> np.ndarray:
    widest = max(map(len, images))
    return np.stack([np.pad(image, (0, widest - len(image))) for image in images])


ALPHA = np.concatenate([FRAMES, np.full((*FRAMES.shape[:3], 1), 255, np.uint8)], axis=3)


@pytest.mark.parametrize(
    "stored",
    [
        FRAMES,
        ALPHA,
        np.moveaxis(FRAMES, 3, 1),
        np.moveaxis(ALPHA, 3, 1),
        FRAMES.astype(np.float32) / np.float32(255),
        FRAMES.astype(np.float64),
        np.moveaxis(FRAMES, 3, 1) / 255,
        FRAMES.astype(np.int64),
        padded(encoded("PNG")),
        np.array([image.tobytes() + b"\1" for image in encoded("PNG")]),
    ],
)
def test_frames_are_read_in_whatever_form_they_are_stored(tmp_path, stored):
    write(tmp_path / "a_demo.hdf5", {"actions": ONE["actions"], "obs/front_rgb": stored})
    source = HDF5Source(tmp_path)
    assert source.cameras == ("front_rgb",)
    frames = source.read("a_demo/demo_0", source.cameras).frames["front_rgb"]
    np.testing.assert_array_equal(frames, FRAMES)
    assert frames.dtype == np.uint8
    assert frames.flags.c_contiguous


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_compressed_frames_of_varying_length(tmp_path, format):
    path = write(tmp_path / "a_demo.hdf5", {"actions": ONE["actions"]})
    smooth = np.broadcast_to(np.arange(0, 256, 16, dtype=np.uint8)[:, None, None], FRAMES.shape)
    with h5py.File(path, "a") as content:
        cells = content.create_dataset("data/demo_0/obs/wrist_jpeg", (STEPS,), h5py.vlen_dtype(np.uint8))
        for t, image in enumerate(encoded(format, smooth)):
            cells[t] = image
    frames = HDF5Source(tmp_path).read("a_demo/demo_0", ["wrist_jpeg"]).frames["wrist_jpeg"]
    np.testing.assert_allclose(frames.astype(int), smooth, atol=3)


def test_a_frame_that_is_no_image_is_named(tmp_path):
    images = encoded("PNG")
    images[2] = images[2][:20]
    write(tmp_path / "a_demo.hdf5", {"actions": ONE["actions"], "obs/front": padded(images)})
    with pytest.raises(EpisodeError, match="a_demo/demo_0: frame 2 of 'front' is no image") as caught:
        HDF5Source(tmp_path).read("a_demo/demo_0", ["front"])
    assert caught.value.reason is Reason.BAD_FRAMES


@pytest.mark.parametrize(
    ("values", "stated"),
    [(FRAMES / 127.5 - 1, "from -1 to 1"), (FRAMES * 257.0, "to 65535"), (np.full(FRAMES.shape, np.nan), "nan")],
)
def test_values_that_no_image_has_are_named_with_shape_and_type(tmp_path, values, stated):
    write(tmp_path / "a_demo.hdf5", {"actions": ONE["actions"], "obs/front_rgb": values})
    with pytest.raises(
        EpisodeError, match=r"frames of 'front_rgb', shape \(4, 16, 16, 3\) and type float64"
    ) as caught:
        HDF5Source(tmp_path).read("a_demo/demo_0", ["front_rgb"])
    assert stated in caught.value.message
    assert "allowed: 0 to 1, or 0 to 255" in caught.value.message


def test_what_is_called_an_image_and_is_none_is_named_before_the_work(tmp_path):
    observed = {
        "obs/front_image": np.zeros((STEPS, 16, 16), np.uint8),
        "obs/front_depth": np.ones((STEPS, 8, 8, 1)),
    }
    write(tmp_path / "stack_demo.hdf5", {"actions": ONE["actions"], **observed}, language_instruction="stack")
    with pytest.raises(
        PrepareError, match=r"no image: front_image is \(4, 16, 16\) uint8 in stack_demo/demo_0/obs"
    ):
        plan(HDF5Source(tmp_path))


def test_points_and_poses_are_no_cameras(tmp_path):
    observed = {"obs/points": np.ones((STEPS, 16, 16, 3)), "obs/camera_pose": np.ones((STEPS, 4, 4, 4))}
    write(tmp_path / "stack_demo.hdf5", ONE | observed)
    assert HDF5Source(tmp_path).cameras == ("agentview",)


@pytest.mark.parametrize(
    ("convention", "upright"),
    [
        ({}, FRAMES[:, ::-1, ::-1]),
        ({"macros_image_convention": "opengl"}, FRAMES[:, ::-1, ::-1]),
        ({"macros_image_convention": np.bytes_("opencv")}, FRAMES[:, :, ::-1]),
    ],
)
def test_libero_s_frames_are_turned_unless_the_file_says_that_they_are_upright(tmp_path, convention, upright):
    """robosuite's `opencv` turns rows over; the turn by 180° of all published data mirrors each row as well."""
    write(tmp_path / "a_demo.hdf5", **convention)
    frames = HDF5Source(tmp_path).read("a_demo/demo_0", ["agentview"]).frames["agentview"]
    np.testing.assert_array_equal(frames, upright)


# Proprioception

ROBOMIMIC = {
    "robot0_eef_pos": np.ones((STEPS, 3)),
    "robot0_eef_quat": np.ones((STEPS, 4)) / 2,
    "robot0_gripper_qpos": np.ones((STEPS, 2)),
}


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        ({"ee_states": np.ones((STEPS, 6)), "gripper_states": np.ones(STEPS)}, (STEPS, 7)),
        ({"ee_states": np.ones((STEPS, 6)), "gripper_states": np.ones((STEPS, 2))}, (STEPS, 8)),
        (
            {"ee_pos": np.ones((STEPS, 3)), "ee_ori": np.ones((STEPS, 3)), "gripper_states": np.ones((STEPS, 2))},
            (STEPS, 8),
        ),
        ({"ee_states": np.ones((STEPS - 1, 6)), "gripper_states": np.ones((STEPS, 2))}, None),
        ({"ee_states": np.array([b"x"] * STEPS), "gripper_states": np.ones((STEPS, 2))}, None),
        ({"ee_states": np.ones((STEPS, 2, 3)), "gripper_states": np.ones((STEPS, 2))}, None),
        ({"ee_states": np.ones((STEPS, 6))}, None),
        ({"proprioception": np.ones((STEPS, 12))}, (STEPS, 12)),
        (ROBOMIMIC, (STEPS, 8)),
        (ROBOMIMIC | {"robot0_gripper_qpos": np.ones((STEPS, 6))}, None),
    ],
)
def test_no_episode_is_lost_for_its_proprioception(tmp_path, observed, expected):
    write(tmp_path / "a_demo.hdf5", ONE | {f"obs/{key}": array for key, array in observed.items()})
    found = HDF5Source(tmp_path).read("a_demo/demo_0", ["agentview"]).proprioception
    assert (None if found is None else found.shape) == expected


@pytest.mark.parametrize(
    "states", [1.0, np.ones(9), np.ones((STEPS, 2, 3)), np.array([b"x"] * STEPS), np.ones((1, 20))]
)
def test_no_episode_is_lost_for_states_that_only_a_replay_needs(tmp_path, states):
    raw = ONE | {"states": states, "robot_states": np.ones((1, 9))}
    write(tmp_path / "milk_demo.hdf5", raw, bddl_file_name="milk.bddl")
    read = HDF5Source(tmp_path, replay=False).read("milk_demo/demo_0", ["agentview"])
    fits = np.ndim(states) == 2
    assert (read.states is not None) == (read.robot_states is not None) == fits


def test_a_set_too_small_for_validation_says_so(tmp_path):
    write(tmp_path / "a_demo.hdf5", ONE, ONE, ONE, language_instruction="a")
    settings = PrepareSettings(image_size=32, min_steps=1)
    (note,) = plan(HDF5Source(tmp_path), settings).notes
    assert note.startswith("no validation split: 0.9 of 3 episodes, rounded up, is all of them")
    assert plan(HDF5Source(tmp_path), PrepareSettings(image_size=32, fraction=0.6)).notes == ()
