import json
import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import weakref
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worldvla_libero.data.episodes import Episode, EpisodeError, EpisodeKey, Reason, check_episode
from worldvla_libero.lerobot import DataSetExistsError, LeRobotSource, is_lerobot, write_lerobot

FIXTURES = Path(__file__).parents[2] / "fixtures" / "lerobot"
MADE = runpy.run_path(str(FIXTURES / "make.py"))  # computes what went into the fixtures
AGENTVIEW, WRIST = "observation.images.image", "observation.images.image2"
INDEX = "meta/episodes/chunk-000/file-000.parquet"
DATA = "data/chunk-000/file-000.parquet"


def _scene(number: int, steps: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Smooth images, each clearly different from the ones before and after."""
    t, y, x = np.ogrid[:steps, :height, :width]
    channels = [4 * x + 40 * t + 0 * y, 5 * y + 70 * number + 0 * t + 0 * x, 2 * x + 3 * y + 60 * t]
    return np.abs(np.stack(channels, axis=-1) % 510 - 255).astype(np.uint8)


def _episode(number: int, steps: int = 9, **changes) -> Episode:
    rng = np.random.default_rng(number)
    return Episode(
        **{
            "id": f"task_{number % 2}_demo/demo_{number}",
            "task": f"task_{number % 2}",
            "instruction": f"do task {number % 2}",
            "actions": rng.normal(size=(steps, 7)),
            "proprioception": rng.normal(size=(steps, 8)),
            "frames": {"agentview": _scene(number, steps), "robot0_eye_in_hand": _scene(number + 50, steps)},
        }
        | changes
    )


def _psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Of the worst frame, in dB."""
    error = ((one.astype(float) - other) ** 2).reshape(len(one), -1).mean(axis=1).max()
    return 10 * np.log10(255**2 / max(error, 1e-12))


def _made(name: str) -> list[Episode]:
    """What went into a fixture."""
    about, episodes = MADE["DATA_SETS"][name], []
    for i in range(len(MADE["LENGTHS"])):
        episodes.append(
            Episode(
                id=f"episode_{i:06d}",
                task=MADE["task"](i),
                instruction=MADE["task"](i),
                actions=MADE["vectors"](i, about["action"][1], 0).astype(float),
                proprioception=MADE["vectors"](i, about["state"][1], 50).astype(float),
                frames={camera: MADE["frames"](i, c) for c, camera in enumerate(about["cameras"])},
                control_hz=about["fps"],
            )
        )
    return episodes


def _assert_same(got: Episode, given: Episode, keys: dict[str, str], *, psnr: float = np.inf) -> None:
    check_episode(got)
    assert got.instruction == got.task == given.instruction
    np.testing.assert_array_equal(got.actions, given.actions.astype(np.float32))
    np.testing.assert_array_equal(got.proprioception, given.proprioception.astype(np.float32))
    assert got.actions.dtype == got.proprioception.dtype == np.float64
    assert set(got.frames) == {keys[camera] for camera in given.frames}
    for camera, frames in given.frames.items():
        if psnr == np.inf:
            np.testing.assert_array_equal(got.frames[keys[camera]], frames)
        else:
            assert _psnr(got.frames[keys[camera]], frames) > psnr


def _edit_table(path: Path, **columns) -> None:
    """Replace columns; a callable gets the old values."""
    table = pq.read_table(path)
    for name, values in columns.items():
        place, field = table.schema.get_field_index(name), table.schema.field(name)
        if callable(values):
            values = values(table[name].to_pylist())
        table = table.set_column(place, field, pa.array(values, field.type))
    pq.write_table(table, path)


def _edit_info(root: Path, **values) -> None:
    file = root / "meta/info.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def libero(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "libero", tmp_path / "libero"))


@pytest.fixture
def so101(tmp_path) -> Path:
    return Path(shutil.copytree(FIXTURES / "so101", tmp_path / "so101"))


# --- reading what lerobot wrote


@pytest.mark.parametrize(
    ("name", "control_hz", "psnr"), [("libero", 20.0, np.inf), ("openpi", 20.0, np.inf), ("so101", 30.0, 34.0)]
)
def test_data_sets_of_the_real_lerobot(name, control_hz, psnr):
    assert is_lerobot(FIXTURES / name)
    source = pickle.loads(pickle.dumps(LeRobotSource(FIXTURES / name)))
    truth = _made(name)
    assert (source.name, source.needs_replay) == (name, False)
    assert source.cameras == MADE["DATA_SETS"][name]["cameras"]
    assert source.list() == ([EpisodeKey(e.id, e.task, len(e)) for e in truth], [])
    for given_ in truth:
        got = source.read(given_.id, source.cameras)
        assert (got.id, got.control_hz) == (given_.id, control_hz)
        _assert_same(got, given_, {camera: camera for camera in source.cameras}, psnr=psnr)


def test_only_the_cameras_asked_for_are_read(so101):
    shutil.rmtree(so101 / "videos" / "observation.images.side")
    source = LeRobotSource(so101)
    assert list(source.read("episode_000002", ["observation.images.top"]).frames) == ["observation.images.top"]
    shutil.rmtree(so101 / "videos")
    assert source.read("episode_000002").frames == {}


def test_rate_is_liberos_only_where_everything_says_so(libero):
    def rate(**options):
        return LeRobotSource(libero, **options).read("episode_000000").control_hz

    assert rate() == 20
    assert rate(control_hz=10) == 10
    for change in ({"fps": 15}, {"robot_type": "so101_follower"}):
        before = json.loads((libero / "meta/info.json").read_text())
        _edit_info(libero, **change)
        assert rate() == change.get("fps", 10)
        _edit_info(libero, **before)
    features = json.loads((libero / "meta/info.json").read_text())["features"]
    _edit_info(libero, features={**features, "observation.images.third": features[AGENTVIEW]})
    assert rate() == 10


def test_agentview_comes_first_and_keys_can_be_named(libero):
    features = json.loads((libero / "meta/info.json").read_text())["features"]
    _edit_info(libero, features=dict(reversed(features.items())))
    assert LeRobotSource(libero).cameras == (AGENTVIEW, WRIST)
    swapped = LeRobotSource(libero, action_key="observation.state", state_key="timestamp").read("episode_000001")
    np.testing.assert_array_equal(swapped.actions, _made("libero")[1].proprioception)
    np.testing.assert_allclose(
        swapped.proprioception, np.arange(5)[:, None] / 10, rtol=1e-6
    )  # of one element: (T, 1)
    del features["observation.state"]
    _edit_info(libero, features=features)
    assert LeRobotSource(libero).read("episode_000001").proprioception is None


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    gop=st.integers(1, 50),
    b_frames=st.integers(0, 3),
    fps=st.sampled_from([10, 24, 30]),
)
def test_frames_of_a_video_are_those_of_the_span(tmp_path_factory, lengths, gop, b_frames, fps):
    """Whatever the encoder's keyframes and reordering, as if the whole file had been decoded in order."""
    root = tmp_path_factory.mktemp("spans") / "set"
    write_lerobot([_episode(i, n, control_hz=fps) for i, n in enumerate(lengths)], root, fps=fps, video=True)
    path = root / "videos" / WRIST / "chunk-000" / "file-000.mp4"
    with av.open(str(path), "w") as container:
        options = {"g": str(gop), "bf": str(b_frames), "x264-params": "open-gop=1", "preset": "ultrafast"}
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.height, stream.width = 48, 64
        for i, length in enumerate(lengths):
            for frame in _scene(i, length):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        everything = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(everything) == sum(lengths)
    source, end = LeRobotSource(root), 0
    for i, length in enumerate(lengths):
        end += length
        frames = source.read(f"episode_{i:06d}", [WRIST]).frames[WRIST]
        np.testing.assert_array_equal(frames, everything[end - length : end])


# --- reading what is broken


def _refused(source: LeRobotSource, reason: Reason, match: str, id: str = "episode_000001", cameras=()) -> None:
    with pytest.raises(EpisodeError, match=match) as caught:
        source.read(id, cameras)
    assert caught.value.reason is reason


def test_folders_that_are_no_data_set_of_version_3(libero, tmp_path):
    (tmp_path / "empty").mkdir()
    assert not is_lerobot(tmp_path / "empty")
    cases = [(tmp_path / "empty", Reason.UNREADABLE, r"empty/meta/info\.json describes no LeRobotDataset")]

    def broken(name: str, reason: Reason, match: str, text: str | None = None, **values) -> None:
        root = Path(shutil.copytree(libero, tmp_path / name))
        (root / "meta/info.json").write_text(text) if text is not None else _edit_info(root, **values)
        cases.append((root, reason, match))

    broken("json", Reason.UNREADABLE, "describes no LeRobotDataset", text='{"codebase')
    broken("list", Reason.UNREADABLE, "describes no LeRobotDataset", text="[]")
    broken("v2", Reason.UNREADABLE, r"v2\.1; v3\.x needed.*convert_dataset_v21_to_v30", codebase_version="v2.1")
    broken("v4", Reason.UNREADABLE, r"v4\.0; v3\.x needed", codebase_version="v4.0")
    broken("fps", Reason.UNREADABLE, "fps is '10'; a number above 0 needed", fps="10")
    broken("inf", Reason.UNREADABLE, "fps is inf; a number above 0 needed", fps=float("inf"))
    broken("keys", Reason.MISSING_KEY, "no features, fps", text='{"codebase_version": "v3.0"}')
    broken("features", Reason.UNREADABLE, "features are no object of objects", features=["action"])
    broken("type", Reason.MISSING_KEY, "feature 'action'.*no dtype", features={"action": {"shape": [7]}})
    for root, reason, match in cases:
        for use in (
            LeRobotSource.list,
            lambda source: source.read("episode_000000"),
            lambda source: source.cameras,
        ):
            with pytest.raises(EpisodeError, match=match) as caught:
                use(LeRobotSource(root))
            assert caught.value.reason is reason
    shutil.rmtree(libero / "data")
    with pytest.raises(
        EpisodeError, match=r"no file of rows .*file_index:03d}\.parquet.*download or copy it again"
    ):
        LeRobotSource(libero).list()


@pytest.mark.parametrize("id", ["episode_000004", "episode_1", "demo_0", "", "episode_-00001"])
def test_unknown_episodes(id):
    _refused(
        LeRobotSource(FIXTURES / "libero"), Reason.UNREADABLE, "existing: episode_000000 to episode_000003", id
    )


def test_missing_keys_are_named_with_those_that_exist(libero):
    _refused(LeRobotSource(libero), Reason.MISSING_KEY, f"no camera 'wrist'.*{WRIST}", cameras=["wrist"])
    _refused(
        LeRobotSource(libero, action_key="torque"), Reason.MISSING_KEY, "no feature torque; existing: .*action"
    )
    _refused(LeRobotSource(libero, state_key="joints"), Reason.MISSING_KEY, "no feature joints; .*state_key")
    data = pq.read_table(libero / DATA)
    pq.write_table(data.drop_columns([AGENTVIEW]), libero / DATA)
    LeRobotSource(libero).read("episode_000001", [WRIST])
    match = rf"{DATA}: no {AGENTVIEW}; existing: {WRIST}"
    _refused(LeRobotSource(libero), Reason.MISSING_KEY, match, cameras=[AGENTVIEW])
    pq.write_table(data.drop_columns(["action"]), libero / DATA)
    _refused(LeRobotSource(libero), Reason.MISSING_KEY, f"{DATA}: no action; existing")
    features = json.loads((libero / "meta/info.json").read_text())["features"]
    del features["action"]
    _edit_info(libero, features=features)
    _refused(LeRobotSource(libero), Reason.MISSING_KEY, "no feature action or actions; existing")


def test_one_episode_has_one_task(libero):
    _edit_table(libero / DATA, task_index=lambda old: [9 if i == 8 else task for i, task in enumerate(old)])
    _refused(LeRobotSource(libero), Reason.MISSING_KEY, "no task_index 9 in meta/tasks.parquet; existing: 0, 1")
    _edit_table(libero / DATA, task_index=lambda old: [0 if task == 9 else task for task in old])
    _refused(
        LeRobotSource(libero), Reason.UNREADABLE, "its task changes .put the bowl on the stove; open the drawer"
    )
    keys, (dropped,) = LeRobotSource(libero).list()
    assert [key.id for key in keys] == ["episode_000000", "episode_000002", "episode_000003"]
    assert (dropped.id, dropped.reason) == ("episode_000001", Reason.UNREADABLE)


def test_rows_that_are_missing_are_named_when_episodes_are_listed(libero):
    def dropped(*ids: str, match: str) -> None:
        source = LeRobotSource(libero)
        keys, drops = source.list()
        assert {drop.id for drop in drops} == {*ids}
        for key in keys:
            source.read(key.id, source.cameras)  # what is listed can be read
        for drop in drops:
            assert drop.reason == Reason.UNREADABLE
            if drop.id.startswith("episode"):
                _refused(source, Reason.UNREADABLE, match, drop.id)
            else:
                assert re.search(match, drop.message)

    whole = (libero / DATA).read_bytes()
    pq.write_table(pq.read_table(libero / DATA).slice(0, 10), libero / DATA)
    dropped("episode_000001", match=f"3 rows in {DATA}; meta/episodes promises 5")
    pq.write_table(pq.read_table(FIXTURES / "libero" / DATA).slice(3), libero / DATA)
    dropped("episode_000000", match=f"4 rows in {DATA}, whose frame_index is not 0 to 3, each once")
    both = pa.concat_tables([pq.read_table(FIXTURES / "libero" / DATA), pq.read_table(libero / DATA)])
    pq.write_table(both, libero / DATA)
    dropped("episode_000000", "episode_000001", match="rows in .* not 0 to .*; rows are missing or double")
    (libero / DATA).write_bytes(whole[:-100])
    damaged = f"{DATA}: missing, truncated or no Parquet file"
    dropped(DATA, "episode_000000", "episode_000001", match=damaged)
    (libero / DATA).unlink()
    missing = f"no rows in any file that can be read; meta/episodes names {DATA}; download or copy"
    dropped("episode_000000", "episode_000001", match=missing)
    (libero / INDEX).unlink()
    dropped("data", match=r"2 whole episodes and 15 rows in all files; meta/info.json promises 4 and 27")


def test_damaged_words_are_no_hint(libero):
    expected = LeRobotSource(libero).list()
    pq.write_table(pq.read_table(libero / INDEX), libero / INDEX, compression="none", use_dictionary=False)
    content = (libero / INDEX).read_bytes()
    (libero / INDEX).write_bytes(content.replace(b"put", b"p\xfft"))
    assert content != (libero / INDEX).read_bytes()
    assert LeRobotSource(libero).list() == expected


def test_a_damaged_length_takes_no_memory(libero):
    """Of a list of 900,000 columns, in a file of a few bytes."""
    footer = b"\x15\x02\x19\xfc\xa0\xf7\x36"
    (libero / DATA).write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    _, (dropped, *_) = LeRobotSource(libero).list()
    assert dropped.id == DATA
    assert "limit" in dropped.message


def test_a_file_that_changes_is_noticed(libero):
    source = LeRobotSource(libero)
    source.list()
    pq.write_table(pq.read_table(libero / DATA).slice(0, 10), libero / DATA)
    _refused(source, Reason.UNREADABLE, f"{DATA} (has )?changed while it was used")


def test_unusable_images_and_vectors(libero):
    def cells(change):
        return lambda old: [change(cell) if i == 9 else cell for i, cell in enumerate(old)]

    def refused(match: str, change) -> None:
        shutil.copy(FIXTURES / "libero" / DATA, libero / DATA)
        _edit_table(libero / DATA, **{AGENTVIEW: cells(change)})
        _refused(LeRobotSource(libero), Reason.BAD_FRAMES, match, cameras=[AGENTVIEW])

    small = pq.read_table(FIXTURES / "openpi" / DATA)["image"][0].as_py()
    small["bytes"] = _png(np.zeros((8, 8, 3), np.uint8))
    refused("frame 2 of .* is no image", lambda cell: cell | {"bytes": cell["bytes"][:100]})
    refused("frame 2 of .* is no image", lambda cell: cell | {"bytes": b"no image"})
    refused("frame 2 of .* is no image", lambda cell: cell | {"bytes": None})
    refused("frame 2 of .* is no image", lambda cell: None)
    refused("mode I;16; 8-bit", lambda cell: cell | {"bytes": _png(np.zeros((32, 48), np.uint16))})
    refused(r"frame 2 of .* shape \(8, 8, 3\), frame 0 has \(32, 48, 3\)", lambda cell: small)

    table = pq.read_table(FIXTURES / "libero" / DATA)
    ragged = [row[:3] if i == 9 else row for i, row in enumerate(table["action"].to_pylist())]
    place = table.schema.get_field_index("action")
    pq.write_table(table.set_column(place, "action", pa.array(ragged, pa.list_(pa.float32()))), libero / DATA)
    _refused(LeRobotSource(libero), Reason.ACTION_WIDTH, "rows of 'action' are not vectors of one width")


def _png(array: np.ndarray) -> bytes:
    import io

    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(array).save(content, "PNG")
    return content.getvalue()


def test_unusable_videos(so101):
    camera, source = "observation.images.top", LeRobotSource(so101)
    file = f"videos/{camera}/chunk-000/file-000.mp4"
    last = "episode_000002"
    whole = (so101 / file).read_bytes()
    # Of 21 frames 19 are left, so that the last episode lacks two.
    _write_video(so101 / file, np.zeros((19, 32, 48, 3), np.uint8))
    source.read("episode_000001", [camera])
    _refused(source, Reason.MISSING_FRAMES, f"{file} has 7 frames for 9 rows", last, [camera])
    (so101 / file).write_bytes(whole)
    # Frames of the next episode do not stand in for missing ones.
    _edit_table(so101 / INDEX, **{f"videos/{camera}/to_timestamp": lambda old: [old[0] - 2 / 30, *old[1:]]})
    source = LeRobotSource(so101)
    _refused(source, Reason.MISSING_FRAMES, "5 frames for 7 rows", "episode_000000", [camera])
    (so101 / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EpisodeError, match=file) as caught:
        source.read(last, [camera])
    assert caught.value.reason in (Reason.UNREADABLE, Reason.MISSING_FRAMES)
    (so101 / file).write_bytes(b"no video" * 100)
    _refused(source, Reason.UNREADABLE, f"{file} cannot be decoded", last, [camera])
    (so101 / file).unlink()
    _refused(source, Reason.UNREADABLE, f"{file} cannot be decoded", last, [camera])


def _write_video(path: Path, frames: np.ndarray, rate: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def test_damage_inside_a_video_is_not_passed_off_as_frames(tmp_path):
    write_lerobot([_episode(0, 60)], tmp_path / "set", video=True)
    path = tmp_path / "set" / "videos" / AGENTVIEW / "chunk-000" / "file-000.mp4"
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 2000
    content[begin : begin + 3000] = bytes(3000)
    path.write_bytes(content)
    with pytest.raises(EpisodeError, match=r"file-000\.mp4") as caught:
        LeRobotSource(tmp_path / "set").read("episode_000000", [AGENTVIEW])
    assert caught.value.reason in (Reason.BAD_FRAMES, Reason.UNREADABLE, Reason.MISSING_FRAMES)


# --- reading what others wrote
#
# Seen in official and converted data sets, in other programs' writers, and in their users' reports:
#   meta/episodes   without tasks (lerobot/libero); without data/ or videos/ indices, or with none and NaN in them
#                   (yaak-ai/L2D-v3, GR00T's converter); with data/file_index of the file before (lerobot's own
#                   converter, HuggingFaceVLA/libero); with scrambled dataset_from_index (the same, of images);
#                   fewer rows than info.json says (1,691 of 1,693); flat, in one file, as version 2's
#                   episodes.jsonl, or not there at all
#   tasks           words as pandas' index with a name or without (`__index_level_0__`), as a column beside an
#                   index of numbers, with `task_index` as index or only counted, under another name, tasks.jsonl
#   rows            an episode over two files, rows in another order, files with other names, parts not downloaded,
#                   files left over from before a conversion, numbers as float or as lists of one
#   info.json       total_episodes too high after episodes were deleted, or not there; version 2's path fields


def _read_as_made(root: Path, name: str = "libero", psnr: float = np.inf, without: tuple[str, ...] = ()) -> None:
    """All episodes are listed and read, as if the data set were as lerobot left it."""
    source = pickle.loads(pickle.dumps(LeRobotSource(root)))
    keys, dropped = source.list()
    assert not dropped
    truth = [episode for episode in _made(name) if episode.id not in without]
    assert keys == [EpisodeKey(e.id, e.task, len(e)) for e in truth]
    for given_ in truth:
        got = source.read(given_.id, source.cameras)
        _assert_same(got, given_, {camera: camera for camera in source.cameras}, psnr=psnr)


def _columns(prefix: str) -> list[str]:
    return [name for name in pq.read_schema(FIXTURES / "libero" / INDEX).names if name.startswith(prefix)]


@pytest.mark.parametrize(
    "missing",
    [
        ["tasks"],
        ["data/chunk_index"],
        ["data/file_index"],
        ["length"],
        ["dataset_from_index", "dataset_to_index"],
        ["episode_index"],
        ["tasks", "length", "data/chunk_index", "data/file_index", *_columns("dataset"), *_columns("meta")],
    ],
    ids=lambda names: names[0].replace("/", "."),
)
def test_an_index_without_columns(libero, missing):
    pq.write_table(pq.read_table(libero / INDEX).drop_columns(missing), libero / INDEX)
    _read_as_made(libero)


@pytest.mark.parametrize(
    "wrong",
    [
        {"data/file_index": [0, 0, 0, 0]},
        {"data/file_index": [7, 7, None, 1], "data/chunk_index": [None, 3, 0, 0]},
        {"length": [5, 7, 6, 90]},
        {"dataset_from_index": [20, 0, 7, 3], "dataset_to_index": [0, 0, 0, 0]},
        {"tasks": [["a"], ["b", "a"], [], None]},
    ],
    ids=lambda wrong: next(iter(wrong)).replace("/", "."),
)
def test_an_index_that_is_wrong(libero, wrong):
    _edit_table(libero / INDEX, **wrong)
    _read_as_made(libero)


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")


def _as_floats(table: pa.Table) -> pa.Table:
    """As pandas leaves them once a cell was empty."""
    for name in ("episode_index", "data/chunk_index", "data/file_index", "length"):
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(pa.float64()))
    return table


@pytest.mark.parametrize(
    ("place", "write"),
    [
        ("meta/episodes/file-000.parquet", pq.write_table),
        ("meta/episodes.parquet", pq.write_table),
        ("meta/episodes/chunk-000/file_000.parquet", lambda table, path: pq.write_table(_as_floats(table), path)),
        (
            "meta/episodes.jsonl",
            lambda table, path: _write_lines(path, table.to_pylist()),
        ),
        (INDEX, lambda table, path: path.write_bytes(b"PAR1 no index")),
        (INDEX, lambda table, path: pq.write_table(table.slice(0, 2), path)),
        (INDEX, lambda table, path: None),
    ],
    ids=["flat", "one file", "floats", "json lines", "damaged", "half", "none"],
)
def test_an_index_in_another_place_or_none(libero, place, write):
    table = pq.read_table(libero / INDEX)
    table = table.drop_columns([name for name in table.column_names if name.startswith("stats/")])
    (libero / INDEX).unlink()
    write(table, libero / place)
    _read_as_made(libero)


@pytest.mark.parametrize("total", [0, 3, 6, "4", None, -1, float("nan")])
def test_another_count_of_episodes_in_info(libero, total):
    _edit_info(libero, total_episodes=total)
    _read_as_made(libero)


def test_info_that_says_little(libero, so101):
    for root, name, psnr in ((libero, "libero", np.inf), (so101, "so101", 34.0)):
        info = json.loads((root / "meta/info.json").read_text())
        kept = {key: info[key] for key in ("codebase_version", "fps", "features", "robot_type")}
        (root / "meta/info.json").write_text(json.dumps(kept | {"codebase_version": "3.0"}))
        _read_as_made(root, name, psnr)


WORDS = ["open the drawer", "put the bowl on the stove"]


@pytest.mark.parametrize(
    "columns",
    [
        {"task": WORDS, "task_index": [0, 1]},
        {"task_index": [0, 1], "__index_level_0__": WORDS},
        {"task_index": [1, 0], "task": WORDS[::-1], "__index_level_0__": [4, 2]},
        {"task": WORDS[::-1], "__index_level_0__": [1, 0]},
        {"task": WORDS},
        {"task_index": [0.0, 1.0, None], "task": pa.array([*WORDS, None]).dictionary_encode()},
        {"task_index": [0, 1], "instruction": pa.array(WORDS, pa.large_string())},
    ],
    ids=["index with a name", "without", "both", "numbers as index", "counted", "categories", "another name"],
)
def test_tables_of_tasks(libero, columns):
    pq.write_table(pa.table(columns), libero / "meta/tasks.parquet")
    pq.write_table(pq.read_table(libero / INDEX).drop_columns(["tasks"]), libero / INDEX)
    _read_as_made(libero)


@pytest.mark.parametrize("place", ["meta/tasks.jsonl", "meta/tasks/chunk-000/file_000.parquet", None])
def test_tasks_in_another_file_or_in_the_index_alone(libero, place):
    (libero / "meta/tasks.parquet").unlink()
    rows = [{"task_index": 1, "task": WORDS[1]}, {"task_index": 0, "task": WORDS[0]}]
    if place:
        pq.write_table(pq.read_table(libero / INDEX).drop_columns(["tasks"]), libero / INDEX)
        (libero / place).parent.mkdir(parents=True, exist_ok=True)
        if place.endswith("jsonl"):
            _write_lines(libero / place, rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), libero / place)
    _read_as_made(libero)


def test_what_lines_of_an_index_do_not_say_is_passed_over(libero):
    """Cells of all types, as programs leave them that write JSON themselves."""
    odd = {"length": 10**400, "data/file_index": "0", "tasks": "open the drawer", "videos/x/from_timestamp": True}
    rows = [odd, {"episode_index": 1, "tasks": [None, WORDS[1]]}, {"episode_index": "x"}, {"episode_index": 3.0}]
    (libero / INDEX).unlink()
    _write_lines(libero / "meta/episodes.jsonl", rows)
    _read_as_made(libero)
    for content in ("[1, 2]\n", "{", "\xff", "7"):
        (libero / "meta/episodes.jsonl").write_text(content, "latin-1")
        (libero / "meta/tasks.jsonl").write_text(content, "latin-1")
        _read_as_made(libero)


def test_episodes_without_words_are_dropped_by_name(libero):
    (libero / "meta/tasks.parquet").unlink()
    _edit_table(libero / INDEX, tasks=[["a"], ["b", "a"], [], [" "]])
    keys, dropped = LeRobotSource(libero).list()
    assert keys == [EpisodeKey("episode_000000", "a", 7)]
    assert [drop.id for drop in dropped] == ["episode_000001", "episode_000002", "episode_000003"]
    assert [drop.reason for drop in dropped] == [Reason.UNREADABLE, Reason.MISSING_KEY, Reason.MISSING_KEY]
    assert "its task changes (b; a)" in dropped[0].message
    assert "no words for its task_index, and no tasks in meta/episodes; meta/tasks.parquet" in dropped[1].message
    pq.write_table(pa.table({"task_index": [0, 1], "task": [1, 2]}), libero / "meta/tasks.parquet")
    assert "meta/tasks.parquet: its column task holds no words" in LeRobotSource(libero).list()[1][1].message


OTHER = DATA.replace("file-000", "file-001")


def _rewrite(root: Path, **tables: pa.Table) -> None:
    """Lay the rows out anew, in files by name."""
    shutil.rmtree(root / "data")
    for name, table in tables.items():
        path = root / "data" / f"{name.replace('__', '/')}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, row_group_size=4)


def _all_rows() -> pa.Table:
    return pa.concat_tables([pq.read_table(FIXTURES / "libero" / file) for file in (DATA, OTHER)])


def _listed_numbers(table: pa.Table) -> pa.Table:
    for name in ("episode_index", "frame_index", "task_index"):
        place = table.schema.get_field_index(name)
        lists = pa.array([[value] for value in table[name].to_pylist()], pa.list_(pa.float64()))
        table = table.set_column(place, name, lists)
    return table


@pytest.mark.parametrize(
    "lay",
    [
        lambda rows: {"chunk-000__file-000": rows.slice(0, 9), "chunk-001__file-000": rows.slice(9)},
        lambda rows: {"chunk-000__file-000": rows.take(np.random.default_rng(0).permutation(27))},
        lambda rows: {"chunk-000__file-000": rows.take(np.arange(27)[::2]), "b": rows.take(np.arange(27)[1::2])},
        lambda rows: {"part-10": rows.slice(0, 15), "part-9": rows.slice(15)},
        lambda rows: {"chunk-000__file-000": _listed_numbers(rows)},
        lambda rows: {"chunk-000__file-000": rows.drop_columns(["frame_index", "index", "timestamp"])},
        lambda rows: {"chunk-000__file-000": rows.drop_columns(["task_index"])},
        lambda rows: {"chunk-000__file-000": rows, "chunk-000__file-001": rows.slice(0, 9), "old": rows.slice(20)},
    ],
    ids=["cut", "shuffled", "dealt out", "other names", "lists", "no frames", "no tasks", "left over"],
)
def test_rows_that_lie_otherwise(libero, lay):
    _rewrite(libero, **lay(_all_rows()))
    _edit_table(libero / INDEX, **{"data/file_index": [0, 0, 0, 0]})
    _read_as_made(libero)


@pytest.mark.parametrize(
    "tasks", [pa.array([None] * 27, pa.int64()), pa.array([-1] * 27), pa.array(["?"] * 27), pa.array([0.5] * 27)]
)
def test_rows_that_do_not_say_their_task(libero, tasks):
    rows = _all_rows()
    rows = rows.set_column(rows.schema.get_field_index("task_index"), "task_index", tasks)
    _rewrite(libero, all=rows)
    _read_as_made(libero)


def test_an_episode_that_is_there_twice_is_refused_where_nothing_tells_which_is_meant(libero):
    _rewrite(libero, one=_all_rows(), two=_all_rows().slice(0, 7))
    keys, (dropped,) = LeRobotSource(libero).list()
    assert [key.id for key in keys] == [f"episode_{i:06d}" for i in (1, 2, 3)]
    assert "episode_000000: its rows are in data/one.parquet, data/two.parquet alike" in dropped.message


def test_rows_of_which_numbers_are_none(libero):
    for name, values, match in (
        ("episode_index", [None] * 15, f"{OTHER}: episode_index is empty in some rows"),
        ("frame_index", [0.5] * 15, f"{OTHER}: frame_index holds no whole numbers"),
        ("episode_index", [-1] * 15, f"{OTHER}: episode_index -1; allowed: 0 and above"),
    ):
        table = pq.read_table(FIXTURES / "libero" / OTHER)
        place = table.schema.get_field_index(name)
        pq.write_table(table.set_column(place, name, pa.array(values)), libero / OTHER)
        keys, dropped = LeRobotSource(libero).list()
        assert [key.id for key in keys] == ["episode_000000", "episode_000001"]
        assert dropped[0].id == OTHER
        assert [drop.id for drop in dropped[1:]] == ["episode_000002", "episode_000003"]
        assert all(match in drop.message for drop in dropped)


def test_states_that_nobody_asked_for_may_be_missing(libero):
    pq.write_table(pq.read_table(libero / DATA).drop_columns(["observation.state"]), libero / DATA)
    assert LeRobotSource(libero).read("episode_000001").proprioception is None
    assert LeRobotSource(libero).read("episode_000002").proprioception is not None
    asked = LeRobotSource(libero, state_key="observation.state")
    _refused(asked, Reason.MISSING_KEY, f"{DATA}: no observation.state; existing")


TOP, SIDE = "observation.images.top", "observation.images.side"


def _without(*names: str):
    wanted = [f"videos/{camera}/{name}" for camera in (TOP, SIDE) for name in names]
    return lambda table: table.drop_columns([name for name in wanted if name in table.column_names])


def _with(**values):
    def edit(table: pa.Table) -> pa.Table:
        for camera in (TOP, SIDE):
            for name, cells in values.items():
                column = f"videos/{camera}/{name}"
                place, type = table.schema.get_field_index(column), table.schema.field(column).type
                table = table.set_column(place, column, pa.array(cells, type))
        return table

    return edit


ALL = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")


@pytest.mark.parametrize(
    "edit",
    [
        _without("from_timestamp"),
        _without("to_timestamp"),
        _without("from_timestamp", "to_timestamp"),
        _without("chunk_index"),
        _without("file_index"),
        _without(*ALL),
        _with(from_timestamp=[None, 7 / 30, float("nan"), None]),
        _with(file_index=[0, 0, 0, 0]),  # its frames are those of the first episode too
        _with(file_index=[5, 5, 5, 5]),
        _with(file_index=[1, 1, 1, 1], from_timestamp=[0.0, 7 / 30, 12 / 30, 0.0]),
        lambda table: None,
    ],
    ids=[
        "no from",
        "no to",
        "no times",
        "no chunk",
        "no file",
        "nothing",
        "nan",
        "same",
        "none",
        "short",
        "no index",
    ],
)
def test_videos_by_the_lengths_of_episodes(so101, edit):
    table = edit(pq.read_table(so101 / INDEX))
    (so101 / INDEX).unlink()
    if table is not None:
        pq.write_table(table, so101 / INDEX)
    _read_as_made(so101, "so101", 34.0)


@pytest.mark.parametrize(
    "template",
    [
        "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",  # version 2's
        "videos/{video_key}/episode_{file_index}.mp4",
    ],
)
def test_a_video_for_each_episode(so101, template):
    shutil.rmtree(so101 / "videos")
    for i in range(4):
        for number, camera in enumerate((TOP, SIDE)):
            values = {"video_key": camera, "episode_index": i, "episode_chunk": 0, "file_index": i}
            _write_video(so101 / template.format(**values), MADE["frames"](i, number))
    _edit_info(so101, video_path=template)
    pq.write_table(_without(*ALL)(pq.read_table(so101 / INDEX)), so101 / INDEX)
    _read_as_made(so101, "so101", 30.0)


@pytest.mark.parametrize(
    ("edit", "fault"),
    [
        (_without(*ALL), "does not say where they are"),
        (_with(file_index=[0, 0, 0, 0]), f"gives its frames in videos/{TOP}/chunk-000/file-000.mp4 to others too"),
    ],
)
def test_frames_are_not_guessed(so101, edit, fault):
    """Lengths that do not add up to those of the files tell nothing."""
    pq.write_table(edit(pq.read_table(so101 / INDEX)), so101 / INDEX)
    _write_video(so101 / f"videos/{TOP}/chunk-000/file-001.mp4", MADE["frames"](3, 0)[:-1])
    match = f"episode_000003: its frames: videos/{TOP}/.* of meta/episodes {fault}.*from_timestamp needed"
    _refused(LeRobotSource(so101), Reason.MISSING_KEY, match, "episode_000003", [TOP])
    LeRobotSource(so101).read("episode_000003", [SIDE])


@pytest.mark.parametrize(
    "template",
    [
        "data/{episode}.parquet",
        "data/{chunk_index.__class__}.parquet",
        "data/{chunk_index[0]}.parquet",
        "data/{chunk_index!r}.parquet",
        "data/{chunk_index:>9999999999}.parquet",
        "data/{0}.parquet",
        "data/{{file_index}}.parquet",
        "../libero/data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "data/../../libero/data/file.parquet",
        "/etc/passwd",
        "C:/data/{file_index}.parquet",
        "data\\..\\..\\{file_index}.parquet",
        "data/\0.parquet",
        "data/\ud800.parquet",
        "data/" * 99 + "{file_index}.parquet",
        7,
        ["data"],
    ],
)
def test_path_templates_that_make_no_path_inside(libero, so101, template):
    _edit_info(libero, data_path=template)
    match = "data_path is .*, which makes no path inside the data set's folder"
    _refused(LeRobotSource(libero), Reason.UNREADABLE, match)
    with pytest.raises(EpisodeError, match=match):
        LeRobotSource(libero).list()
    _edit_info(so101, video_path=template)
    match = "video_path is .*, which makes no path inside"
    _refused(LeRobotSource(so101), Reason.UNREADABLE, match, cameras=[TOP])


@pytest.mark.parametrize(
    "template",
    [
        "data/chunk-{chunk_index}/file-{file_index}.parquet",
        "data/{file_index:d}.parquet",
        "rows/{file_index:06}/rows.parquet",
        "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",  # version 2's
        "[data]/*{chunk_index}/{file_index}.parquet",
        "elsewhere/{file_index}.parquet",  # where no file is
    ],
)
def test_path_templates_of_others(libero, template):
    rows = {i: _all_rows().filter(pc.equal(_all_rows()["episode_index"], i)) for i in range(4)}
    if not template.startswith("elsewhere"):
        shutil.rmtree(libero / "data")
        for i, table in rows.items():
            values = {"chunk_index": 0, "file_index": i, "episode_chunk": 0, "episode_index": i}
            path = libero / template.format(**values)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, path)
    _edit_info(libero, data_path=template)
    _read_as_made(libero)


def test_git_lfs_pointers_are_named(libero, so101):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 281000000\n"
    for file in libero.rglob("*.parquet"):
        file.write_bytes(pointer)
    keys, dropped = LeRobotSource(libero).list()
    assert (keys, [drop.id for drop in dropped]) == ([], [DATA, OTHER])
    assert all("is a Git LFS pointer, not the file itself" in drop.message for drop in dropped)
    for file in so101.rglob("*.mp4"):
        file.write_bytes(pointer)
    _refused(LeRobotSource(so101), Reason.UNREADABLE, "cannot be decoded .*a Git LFS pointer", cameras=[TOP])


def test_names_of_cameras_lead_nowhere_else(so101):
    info = json.loads((so101 / "meta/info.json").read_text())
    evil = "../../../" + TOP
    _edit_info(so101, features={**info["features"], evil: info["features"][TOP]})
    _refused(LeRobotSource(so101), Reason.UNREADABLE, "video_path leads to 'videos/../.*out of", cameras=[evil])


def test_links_of_the_hubs_cache_lead_out_of_the_folder(tmp_path, hub_cache):
    for name, psnr in (("libero", np.inf), ("so101", 34.0)):
        root = hub_cache(tmp_path, f"lab/{name}", FIXTURES / name)
        assert next(root.rglob("*.parquet")).resolve().parent.name == "blobs"
        _read_as_made(root, name, psnr)
        assert LeRobotSource(root).name == name


# --- writing


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    size=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    width=st.integers(1, 9),
    states=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_png_round_trip_is_exact(tmp_path_factory, lengths, size, width, states, seed):
    rng = np.random.default_rng(seed)
    episodes = [
        Episode(
            id=f"e{i}",
            task="t",
            instruction=f"träge {i % 3}",
            actions=rng.normal(size=(n, width)),
            proprioception=rng.normal(size=(n, 3)) if states else None,
            frames={"agentview": rng.integers(0, 256, (n, *size, 3), dtype=np.uint8)},
            control_hz=5,
        )
        for i, n in enumerate(lengths)
    ]
    root = tmp_path_factory.mktemp("round") / "set"
    assert write_lerobot(iter(episodes), root, fps=5, robot_type="arm") == len(episodes)
    source = LeRobotSource(root)
    keys, dropped = source.list()
    assert keys == [EpisodeKey(f"episode_{i:06d}", e.instruction, len(e)) for i, e in enumerate(episodes)]
    assert not dropped
    for key, given_ in zip(keys, episodes, strict=True):
        got = source.read(key.id, [AGENTVIEW])
        assert (got.instruction, got.control_hz) == (given_.instruction, 5)
        np.testing.assert_array_equal(got.actions, given_.actions.astype(np.float32))
        np.testing.assert_array_equal(got.frames[AGENTVIEW], given_.frames["agentview"])
        if states:
            np.testing.assert_array_equal(got.proprioception, given_.proprioception.astype(np.float32))
        else:
            assert got.proprioception is None


KEYS = {"agentview": AGENTVIEW, "robot0_eye_in_hand": WRIST}


@pytest.mark.parametrize(("video", "max_file_mb", "psnr"), [(False, 0.05, np.inf), (True, 0.02, 32.0)])
def test_many_episodes_per_file_and_several_files(tmp_path, video, max_file_mb, psnr):
    episodes = [_episode(i, 9 + i % 3) for i in range(70)]  # more than are listed at once
    root = tmp_path / "set"
    write_lerobot(episodes, root, video=video, max_file_mb=max_file_mb)
    source = LeRobotSource(root)
    assert [key.steps for key in source.list()[0]] == [len(e) for e in episodes]
    for i in range(0, 70, 3):
        got = source.read(f"episode_{i:06d}", source.cameras)
        assert got.control_hz == 20
        _assert_same(got, episodes[i], KEYS, psnr=psnr)
    data = sorted(root.glob("videos/*/*/*.mp4") if video else root.glob("data/*/*.parquet"))
    assert 2 < len(data) < 70
    assert len(list(root.glob("meta/episodes/*/*.parquet"))) > 1
    assert all(file.stat().st_size < 4 * max_file_mb * 2**20 for file in data)


def test_same_layout_and_statistics_as_the_real_lerobot(tmp_path):
    """The fixture's episodes, written by us, differ from the fixture in nothing that others read."""
    for name in ("libero", "so101"):
        about, theirs, ours = MADE["DATA_SETS"][name], FIXTURES / name, tmp_path / name
        write_lerobot(
            _made(name), ours, fps=about["fps"], robot_type=about["robot_type"], video=about["dtype"] == "video"
        )
        infos = [json.loads((root / "meta/info.json").read_text()) for root in (ours, theirs)]
        for info in infos:
            info.pop("data_files_size_in_mb")
            info.pop("video_files_size_in_mb")
            for feature in info["features"].values():
                feature.get("info", {}).pop("video.codec", None)
                if feature["names"] and feature["names"][0] != "height":
                    feature["names"] = len(feature["names"])
        assert infos[0] == infos[1] | {"features": infos[0]["features"]}
        assert infos[0]["features"] == infos[1]["features"]
        columns, needed = _types(ours / INDEX), _types(theirs / INDEX)
        assert set(columns) == set(needed)
        # Smallest and largest of whole numbers are whole in theirs; nobody reads them.
        assert all(columns[name] == needed[name] for name in needed if not name.startswith("stats/"))
        assert _types(ours / DATA) == _types(theirs / DATA)

        stats, expected = (json.loads((root / "meta/stats.json").read_text()) for root in (ours, theirs))
        assert {k: set(v) for k, v in stats.items()} == {k: set(v) for k, v in expected.items()}
        for key in stats:
            # lerobot squares 8-bit images in 8 bits, so that its std of images is of overflown numbers.
            for statistic in ("min", "max", "mean", "count", *(["std"] if "images" not in key else [])):
                np.testing.assert_allclose(stats[key][statistic], expected[key][statistic], rtol=1e-5, atol=1e-6)
            low, middle, high = (np.array(stats[key][q]) for q in ("q01", "q50", "q99"))
            assert (np.array(stats[key]["min"]) <= low + 1e-9).all()
            assert (low <= middle).all()
            assert (middle <= high).all()


def _types(path: Path) -> dict[str, str]:
    return {field.name: str(field.type).replace("item:", "element:") for field in pq.read_schema(path)}


def test_statistics_are_those_of_all_rows(tmp_path):
    episodes = [_episode(i, 5 + 7 * i) for i in range(5)]
    write_lerobot(episodes, tmp_path / "set")
    stats = json.loads((tmp_path / "set" / "meta/stats.json").read_text())
    actions = np.concatenate([episode.actions for episode in episodes]).astype(np.float32).astype(float)
    pixels = np.concatenate([episode.frames["agentview"] for episode in episodes]) / 255
    for key, values, axes in (("action", actions, 0), (AGENTVIEW, pixels, (0, 1, 2))):
        for statistic in ("min", "max", "mean", "std"):
            expected = getattr(values, statistic)(axis=axes).reshape(np.shape(stats[key][statistic]))
            np.testing.assert_allclose(stats[key][statistic], expected, rtol=1e-9, atol=1e-12)
        assert stats[key]["count"] == [len(values)]
    write_lerobot(episodes[:1], tmp_path / "one")  # quantiles are exact of one episode
    stats = json.loads((tmp_path / "one" / "meta/stats.json").read_text())
    for name, quantile in {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}.items():
        first = episodes[0]
        expected = np.quantile(first.actions.astype(np.float32).astype(float), quantile, axis=0)
        np.testing.assert_allclose(stats["action"][name], expected, rtol=1e-9)
        of_pixels = np.quantile(first.frames["agentview"] / 255, quantile, axis=(0, 1, 2), method="inverted_cdf")
        np.testing.assert_allclose(np.squeeze(stats[AGENTVIEW][name]), of_pixels, rtol=1e-9)


def test_names_of_cameras(tmp_path):
    frames = {name: _scene(i, 9) for i, name in enumerate(("side", "agentview", "observation.images.left"))}
    keys = {"agentview": "observation.images.front"}
    write_lerobot([_episode(0, frames=frames)], tmp_path / "set", camera_keys=keys)
    expected = ("observation.images.side", "observation.images.front", "observation.images.left")
    assert LeRobotSource(tmp_path / "set").cameras == expected
    for wrong in ({"side": "observation.images.image"}, {"side": "images/side"}):
        with pytest.raises(ValueError, match=r"camera '.*' has key '.*'; allowed: one of its own, without '/'"):
            write_lerobot([_episode(0, frames=frames)], tmp_path / "other", camera_keys=wrong)


def test_what_was_read_can_be_written_again(tmp_path):
    source = LeRobotSource(FIXTURES / "libero")
    write_lerobot((source.read(key.id, source.cameras) for key in source.list()[0]), tmp_path / "again")
    again = LeRobotSource(tmp_path / "again")
    assert (again.cameras, again.list()) == (source.cameras, source.list())
    for given_ in _made("libero"):
        _assert_same(again.read(given_.id, again.cameras), given_, {camera: camera for camera in again.cameras})


@pytest.mark.parametrize("video", [False, True])
def test_same_episodes_same_bytes(tmp_path, video):
    for name in ("one", "two"):
        write_lerobot((_episode(i) for i in range(6)), tmp_path / name, video=video, max_file_mb=0.01)
    files = sorted(file.relative_to(tmp_path / "one") for file in (tmp_path / "one").rglob("*") if file.is_file())
    assert len(files) > 6
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


@pytest.mark.parametrize(
    ("changes", "reason", "match"),
    [
        ({"actions": np.zeros((9, 6))}, Reason.ACTION_WIDTH, r"demo_1: 'action' has shape \[6\]; .* has \[7\]"),
        ({"actions": np.full((9, 7), np.nan)}, Reason.NOT_FINITE, "demo_1: action 0"),
        (
            {"proprioception": np.zeros((9, 9))},
            Reason.ACTION_WIDTH,
            r"demo_1: 'observation.state' has shape \[9\]",
        ),
        (
            {"proprioception": np.zeros((8, 8))},
            Reason.ACTION_WIDTH,
            r"its proprioception has shape \(8, 8\); \(9, S\)",
        ),
        ({"proprioception": np.full((9, 8), np.inf)}, Reason.NOT_FINITE, "demo_1: its proprioception holds inf"),
        ({"proprioception": None}, Reason.MISSING_KEY, "demo_1 has features .*; the first episode has .*state"),
        ({"frames": {"agentview": _scene(0, 9)}}, Reason.MISSING_KEY, "demo_1 has features"),
        (
            {"frames": {k: _scene(0, 9, 32, 32) for k in KEYS}},
            Reason.BAD_FRAMES,
            r"demo_1: .* \[32, 32, 3\]; .*\[48",
        ),
        (
            {"frames": {k: _scene(0, 8) for k in KEYS}},
            Reason.MISSING_FRAMES,
            "8 frames of 'agentview' for 9 actions",
        ),
        ({"instruction": " "}, Reason.MISSING_KEY, "the instruction is empty"),
    ],
)
def test_episodes_that_do_not_fit(tmp_path, changes, reason, match):
    for video in (False, True):
        with pytest.raises(EpisodeError, match=match) as caught:
            write_lerobot([_episode(0), replace(_episode(1), **changes)], tmp_path / "set", video=video)
        assert caught.value.reason is reason
        assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_writes_whole_or_not_at_all(tmp_path):
    root = tmp_path / "set"

    def interrupted():
        yield _episode(0)
        raise KeyboardInterrupt

    for video in (False, True):
        with pytest.raises(KeyboardInterrupt):
            write_lerobot(interrupted(), root, video=video)
    with pytest.raises(EpisodeError, match="no episode to write"):
        write_lerobot([], root)
    with pytest.raises(ValueError, match="fps is 20, but task_0_demo/demo_0 was recorded at 10 Hz"):
        write_lerobot([_episode(0, control_hz=10)], root)
    odd = {"agentview": _scene(0, 9, 31, 32)}
    with pytest.raises(EpisodeError, match=r"shape \[31, 32, 3\]; yuv420p needs even sides"):
        write_lerobot([_episode(0, frames=odd)], root, video=True)
    for option in ({"fps": 0}, {"fps": 7.5}, {"crf": 52}, {"max_file_mb": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is .*; allowed"):
            write_lerobot([_episode(0)], root, **option)
    assert list(tmp_path.iterdir()) == []

    write_lerobot([_episode(0)], root)
    before = sorted(root.rglob("*"))
    with pytest.raises(DataSetExistsError, match="exists; choose another folder"):
        write_lerobot([_episode(1)], root)
    assert sorted(root.rglob("*")) == before
    (tmp_path / "file").touch()
    with pytest.raises(DataSetExistsError):
        write_lerobot([_episode(1)], tmp_path / "file")


def test_one_episode_in_memory_at_a_time(tmp_path):
    alive: weakref.WeakSet[Episode] = weakref.WeakSet()

    def episodes():
        for i in range(8):
            episode = _episode(i)
            alive.add(episode)
            yield episode
            del episode
            assert len(alive) == 1  # the one just written

    write_lerobot(episodes(), tmp_path / "set", video=True)


# --- and lerobot itself reads what we wrote


@pytest.fixture(scope="module")
def lerobot_python(tmp_path_factory) -> str:
    """A Python that imports lerobot: WORLDVLA_LEROBOT_PYTHON, or lerobot alone laid over this environment.

    Its own requirements would bring another torch with gigabytes of CUDA, but all that its data sets need is here.
    """
    if given_ := os.environ.get("WORLDVLA_LEROBOT_PYTHON"):
        return given_
    uv = os.environ.get("UV") or shutil.which("uv")
    assert uv, "needs uv on PATH, or WORLDVLA_LEROBOT_PYTHON: a Python with lerobot>=0.4.3,<0.5"
    folder = tmp_path_factory.mktemp("lerobot")
    python = folder / "bin" / "python"
    for command in (
        ["venv", "--allow-existing", "--python", sys.executable, folder],
        ["pip", "install", "--python", python, "--no-deps", "lerobot==0.4.3"],
    ):
        done = subprocess.run([uv, *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python3*/site-packages")
    (packages / "workspace.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return str(python)


@pytest.mark.slow
@pytest.mark.parametrize("video", [False, True])
def test_the_real_lerobot_reads_it(tmp_path, lerobot_python, video):
    episodes = [_episode(i, 9 + i % 3) for i in range(8)]
    root = tmp_path / "set"
    write_lerobot(episodes, root, video=video, max_file_mb=0.005)
    assert len(list(root.glob("videos/*/*/*" if video else "data/*/*"))) > 2
    script = Path(__file__).with_name("read_with_lerobot.py")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [lerobot_python, str(script), str(root), str(tmp_path / "seen.npz")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "seen.npz") as file:
        seen = dict(file)
    about = json.loads(str(seen["about"]))
    assert (about["fps"], about["robot_type"], about["episodes"]) == (20, "panda", 8)
    assert about["frames"] == sum(map(len, episodes))
    assert about["tasks"] == ["do task 0", "do task 1"]
    kind = "video" if video else "image"
    assert about["features"] == {
        AGENTVIEW: [kind, 48, 64, 3],
        WRIST: [kind, 48, 64, 3],
        "action": ["float32", 7],
        "observation.state": ["float32", 8],
        "timestamp": ["float32", 1],
        **{name: ["int64", 1] for name in ("frame_index", "episode_index", "index", "task_index")},
    }
    source, end = LeRobotSource(root), 0
    for i, episode in enumerate(episodes):
        begin, end = end, end + len(episode)
        span, before_last = slice(begin, end), slice(begin, end - 2)
        np.testing.assert_array_equal(seen["action"][span], episode.actions.astype(np.float32))
        np.testing.assert_array_equal(seen["observation.state"][span], episode.proprioception.astype(np.float32))
        assert set(seen["task"][span]) == {episode.instruction}
        assert set(seen["episode_index"][span]) == {i}
        np.testing.assert_array_equal(seen["frame_index"][span], np.arange(len(episode)))
        np.testing.assert_array_equal(seen["index"][span], np.arange(begin, end))
        np.testing.assert_allclose(seen["timestamp"][span], np.arange(len(episode)) / 20, rtol=1e-6)
        bounds = [seen[f"episodes/{name}"][i] for name in ("dataset_from_index", "dataset_to_index", "length")]
        assert bounds == [begin, end, len(episode)]
        # Two steps ahead, and never across the end.
        np.testing.assert_array_equal(seen["ahead/is_pad"][span], np.arange(len(episode)) >= len(episode) - 2)
        np.testing.assert_array_equal(seen["ahead/action"][before_last], episode.actions[2:].astype(np.float32))
        read = source.read(f"episode_{i:06d}", source.cameras)
        for camera, frames in episode.frames.items():
            images = seen[KEYS[camera]][span]
            np.testing.assert_array_equal(images, read.frames[KEYS[camera]])  # as we decode them
            assert _psnr(images, frames) > (32 if video else 100)
            np.testing.assert_array_equal(seen[f"ahead/{KEYS[camera]}"][before_last], images[2:])
    actions = np.concatenate([episode.actions for episode in episodes])
    np.testing.assert_allclose(seen["stats/action/mean"], actions.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(seen["stats/action/std"], actions.std(axis=0), atol=1e-6)
    assert seen[f"stats/{AGENTVIEW}/mean"].shape == (3, 1, 1)
