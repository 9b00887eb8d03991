import errno
import functools
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import import_module
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from worldvla_libero.data.episodes import Episode, EpisodeError, NoEpisodeLeftError, Reason, Source, split
from worldvla_libero.data.page import Preview
from worldvla_libero.data.record import ShardError
from worldvla_libero.data.samples import ActionSamples, SampleWriter, TokenSamples, VideoSamples, WorldSamples
from worldvla_libero.data.shards import TokenDataset, write_episodes
from worldvla_libero.demonstrations.replay import Replayer, ReplaySettings
from worldvla_libero.hdf5 import HDF5Source, write_demonstrations
from worldvla_libero.jobs.parts import JobError, StorageError
from worldvla_libero.jobs.processes import Worker
from worldvla_libero.prepare import (
    PrepareError,
    PrepareSettings,
    load_image_tokenizer,
    open_source,
    plan,
    preparation,
    prepare,
)
from worldvla_libero.prepare import parts as parts_module
from worldvla_libero.simulator.simulator import SimulatorError
from worldvla_libero.versions import SIMULATOR, installed_versions
from worldvla_model.processing_worldvla import ProcessorSettings, WorldVLAProcessor
from worldvla_tokenizers import VQGAN, ActionTokenizer, ImageError, ImageTokenizer, TextTokenizer, VQGANConfig

FIXTURES = Path(__file__).parents[2] / "fixtures"
DEMOS = FIXTURES / "short_demos" / "libero_object"
TASKS = [f"pick_up_the_{thing}_and_place_it_in_the_basket" for thing in ("alphabet_soup", "bbq_sauce")]
SMALL = PrepareSettings(image_size=32)
KINDS = [ActionSamples(2, 3), WorldSamples(2, 1), WorldSamples(1, 2), VideoSamples(2, 2)]


def episode(number: int, steps: int = 6, *, words: str = "pick up the milk", dimensions: int = 7) -> Episode:
    rng = np.random.default_rng(number)
    frames = rng.integers(0, 256, (steps, 32, 32, 3), dtype=np.uint8)
    return Episode(str(number), "", words, rng.normal(size=(steps, dimensions)), {"agentview": frames})


def write(root: Path, tasks: str = "abc", each: int = 2, *, dimensions: int = 7) -> Path:
    """A file of demonstrations with frames per task, all different and of different lengths."""
    for i, task in enumerate(tasks):
        numbers = range(each * i, each * (i + 1))
        made = [episode(n, 5 + n % 3, words=f"do {task}", dimensions=dimensions) for n in numbers]
        write_demonstrations(root / f"{task}_demo.hdf5", made)
    return root


OPTIONS: dict[str, Any] = {}  # of `prepare`, beside those that a test gives


def run(
    source: Path | Source,
    out: Path,
    tokenizer: Path,
    settings: PrepareSettings = SMALL,
    *,
    limit: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    demonstrations = open_source(source) if isinstance(source, Path) else source
    return prepare(plan(demonstrations, settings, limit=limit), out, tokenizer, settings, **{**OPTIONS, **options})


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def ids(out: Path, split: str = "train") -> list[str]:
    return [episode.id for episode in TokenDataset(out, split)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """An image tokenizer that takes milliseconds; what its codes are does not matter here."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    ImageTokenizer(VQGAN(tiny_config()).eval()).save_pretrained(folder)
    return folder


def tiny_config() -> VQGANConfig:
    return VQGANConfig(ch=32, n_embed=64, embed_dim=8, z_channels=8, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1)


class Thread:
    """In place of a worker process, which takes a second to start."""

    exitcode = 0

    def __init__(
        self, target: Callable[..., None], args: tuple[Connection, Connection, Any], daemon: bool
    ) -> None:
        far, sign, work = args
        sent = *(Connection(os.dup(end.fileno())) for end in (far, sign)), pickle.loads(pickle.dumps(work))
        self.start = threading.Thread(target=target, args=sent, daemon=daemon).start

    def kill(self) -> None:
        """It ends when its connection does."""

    join = kill


@pytest.fixture
def quick(monkeypatch):
    """Leaves out what takes seconds and is tested elsewhere: processes, the figures of the page."""
    context = SimpleNamespace(Pipe=Pipe, Process=Thread)
    monkeypatch.setitem(OPTIONS, "executor", functools.partial(Worker, context=context))
    monkeypatch.setitem(OPTIONS, "page", lambda record, episodes, actions, previews: f"{len(previews)}")
    for variable in ("LP_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(variable, "1")  # a worker sets it in its own process, which is now this one
    monkeypatch.setattr(parts_module, "load_image_tokenizer", functools.cache(load_image_tokenizer))


@pytest.fixture
def encoded(monkeypatch) -> list[torch.Tensor]:
    """All that goes through the network: a tensor (B, 3, H, W) each time."""
    batches, encode = [], VQGAN.encode

    def counted(network, pixels, **options):
        batches.append(pixels)
        return encode(network, pixels, **options)

    monkeypatch.setattr(VQGAN, "encode", counted)
    return batches


# Samples


@pytest.mark.parametrize("size", [128, 256])
def test_samples_equal_those_of_the_published_code_id_by_id(tmp_path, published, size):
    """One episode holds an action sample at t = 1 and the world sample of the same frames at t = 0."""
    acting, imagining = (
        published.samples(size=size, kind=kind, near_ties=size < 256) for kind in ("action", "world")
    )
    tasks: dict[str, list[Episode]] = {}
    places = []
    for action, world in zip(acting, imagining, strict=True):
        assert (action["episode"], action["frames"]) == (world["episode"], world["frames"])
        actions = np.array([*world["actions"], *action["actions"]])
        shown = [np.asarray(published.frame(action["episode"], n)) for n in action["frames"]]
        frames = np.stack([shown[0]] + [shown[1]] * (len(actions) - 1))
        members = tasks.setdefault(action["episode"], [])
        places.append(f"{action['episode']}_demo/demo_{len(members)}")
        members.append(Episode("", "", action["instruction"], actions, {"agentview": frames}))
    for task, members in tasks.items():
        write_demonstrations(tmp_path / "source" / f"{task}_demo.hdf5", members)
    settings = PrepareSettings(image_size=size, min_steps=1, fraction=1)
    run(tmp_path / "source", tmp_path / "out", published.tokenizer, settings)

    data = TokenDataset(tmp_path / "out")
    data.check_tokenizer(ImageTokenizer.from_pretrained(published.tokenizer))
    assert sorted(e.id for e in data) == sorted(places)
    text, bounds = TextTokenizer.from_pretrained(published.tokenizer), ActionTokenizer.published()
    for place, action, world in zip(places, acting, imagining, strict=True):
        for sample, kind, t in (
            (action, ActionSamples(history=2, actions=len(action["actions"])), 1),
            (world, WorldSamples(history=1), 0),
        ):
            samples = TokenSamples(data, kind, text, actions=bounds)
            at = {(data[e].id, step): i for i in range(len(samples)) for e, step in [samples.locate(i)]}
            found, labels = samples[at[place, t]]
            assert found == sample["tokens"]
            assert labels == sample["labels"]
    assert len(acting) == len(imagining) == {128: 6, 256: 4}[size]


def assert_samples_of_processor(
    out: Path, demos: dict[str, Episode], tokenizer: Path, size: int, steps: list[int]
):
    """Frames through the model's processor, against codes from the shards."""
    splits = json.loads((out / "dataset.json").read_text())["splits"]
    text, images = TextTokenizer.from_pretrained(tokenizer), ImageTokenizer.from_pretrained(tokenizer)
    compared = Counter[str]()
    for name in splits:
        data = TokenDataset(out, name)
        for rule, times in (("published", steps), ("paper", steps[1:2])):
            settings = ProcessorSettings(image_size=size, labels=rule)
            processor = WorldVLAProcessor(text, images, data.actions, settings)
            for kind in KINDS:
                samples = TokenSamples(data, kind, text, settings=settings)
                for i in range(len(samples)):
                    e, t = samples.locate(i)
                    if t in times:
                        assert samples[i] == sample_of(processor, kind, demos[data[e].id], t)
                        compared[data[e].id] += 1
    assert compared.keys() == demos.keys()


def sample_of(processor: WorldVLAProcessor, kind: Any, demo: Episode, t: int) -> Any:
    (frames,) = demo.frames.values()
    shown = list(frames[max(0, t - kind.history + 1) : t + 1])
    if isinstance(kind, ActionSamples):
        return processor.action_sample(shown, demo.instruction, demo.actions[t : t + kind.actions])
    if isinstance(kind, VideoSamples):
        return processor.video_sample(shown, demo.instruction, list(frames[t + 1 : t + 1 + kind.frames]))
    taken = demo.actions[t + 1 - len(shown) : t + kind.rounds]
    return processor.world_sample(shown, taken, list(frames[t + 1 : t + 1 + kind.rounds]))


def test_samples_equal_those_of_the_model_s_processor(tmp_path, published, quick):
    demos = {}
    for i, task in enumerate(("libero_goal_0", "libero_object_2")):
        pictures = [published.frame(task, n).resize((80, 60)) for n in (0, 8)]
        frames = np.stack([np.roll(np.asarray(pictures[t % 2]), 3 * t, axis=1) for t in range(6)])
        demos[f"{task}_demo/demo_0"] = replace(episode(i, words=f"do {task}"), frames={"agentview": frames})
        write_demonstrations(tmp_path / "source" / f"{task}_demo.hdf5", [demos[f"{task}_demo/demo_0"]])
    settings = PrepareSettings(image_size=64, fraction=0.5)
    run(tmp_path / "source", tmp_path / "out", published.tokenizer, settings)
    assert len({code for e in TokenDataset(tmp_path / "out") for code in e.codes.ravel()}) > 20
    assert_samples_of_processor(tmp_path / "out", demos, published.tokenizer, 64, [0, 1, 3])


@pytest.fixture(scope="module")
def replayed(tmp_path_factory, published) -> Path:
    """Both tasks of the raw demonstrations, one demonstration each, replayed and prepared by two workers."""
    out = tmp_path_factory.mktemp("replayed") / "out"
    run(DEMOS, out, published.tokenizer, PrepareSettings(image_size=64, replay=SIXTY_FOUR), limit=2, workers=2)
    return out


SIXTY_FOUR = ReplaySettings(image_size=64)


@pytest.mark.slow
def test_samples_of_replayed_demonstrations_equal_those_of_the_processor(replayed, published):
    source, replayer = open_source(DEMOS), Replayer(SIXTY_FOUR, suite="libero_object")
    demos = {id: replayer(source.read(id)) for name in ("train",) for id in ids(replayed, name)}
    replayer.close()
    assert_samples_of_processor(replayed, demos, published.tokenizer, 64, [0, 1, 9])


@pytest.mark.slow
def test_replayed_demonstrations_are_a_data_set_with_record_page_and_card(replayed):
    assert sorted(files(replayed)) == [
        "README.md",
        "action_tokenizer.json",
        "data/train-00000-of-00001.arrow",
        "dataset.json",
        "index.html",
    ]
    data = TokenDataset(replayed)
    settings, record = data.record.settings, data.record
    assert [(e.task, e.codes.shape[1:]) for e in data] == [(task, (4, 4)) for task in TASKS]
    assert (settings["camera"], settings["replay"]["image_size"], record.dropped) == ("agentview", 64, ())
    assert settings["simulator"] == installed_versions(SIMULATOR)
    page, card = ((replayed / name).read_text() for name in ("index.html", "README.md"))
    for e in data:
        assert np.isfinite(e.actions).all()
        assert e.instruction in page
        assert f'alt="frames of {e.id}"' in page
    assert f"| train | 2 | {sum(map(len, data))} |" in card
    assert settings["image_tokenizer"] in card


@pytest.mark.slow
def test_one_worker_and_two_replay_to_the_same_bytes(replayed, published, tmp_path):
    run(DEMOS, tmp_path, published.tokenizer, PrepareSettings(image_size=64, replay=SIXTY_FOUR), limit=2)
    assert files(tmp_path) == files(replayed)


def test_one_worker_and_two_read_to_the_same_bytes(tmp_path, tiny):
    source = write(tmp_path / "source")
    for workers in (1, 2):
        run(source, tmp_path / str(workers), tiny, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert list(files(tmp_path / "1")) == [
        "README.md",
        "action_tokenizer.json",
        "data/train-00000-of-00001.arrow",
        "dataset.json",
        "index.html",
    ]


@pytest.mark.parametrize(
    ("folder", "camera", "dimensions", "hz"),
    [
        ("libero", "observation.images.image", 7, 20),
        ("openpi", "image", 7, 20),
        ("so101", "observation.images.top", 6, 30),
    ],
)
def test_data_sets_of_lerobot_become_samples(tmp_path, published, quick, folder, camera, dimensions, hz):
    settings = replace(SMALL, camera=camera if folder == "so101" else None, fraction=0.75)
    source = open_source(FIXTURES / "lerobot" / folder)
    record = run(source, tmp_path, published.tokenizer, settings)
    assert record.settings["camera"] == camera
    assert record.control_hz == hz
    assert {name: row.episodes for name, row in record.splits.items()} == {"train": 3, "validation": 1}
    data, text = TokenDataset(tmp_path), TextTokenizer.from_pretrained(published.tokenizer)
    assert data.actions.dimensions == dimensions
    tokens, labels = TokenSamples(data, ActionSamples(2, 5), text)[0]
    assert sum(label != -100 for label in labels) == 5 * (dimensions + 2) + 1
    raw = source.read(data[0].id, [camera])
    np.testing.assert_array_equal(data[0].actions, raw.actions)
    images = ImageTokenizer.from_pretrained(published.tokenizer)
    np.testing.assert_array_equal(data[0].codes, images.encode(raw.frames[camera], target=32))
    assert tokens[-1] == text.vocabulary.eot


def test_actions_of_any_width_give_bounds_of_that_width(tmp_path, published, quick):
    run(write(tmp_path / "source", dimensions=4), tmp_path / "out", published.tokenizer)
    data = TokenDataset(tmp_path / "out")
    assert data.record.settings["dimensions"] == data.actions.dimensions == data[0].actions.shape[1] == 4
    writer = SampleWriter(TextTokenizer.from_pretrained(published.tokenizer), data.actions)
    _, labels = ActionSamples(1, 5).assemble(data[0], 0, writer)
    assert sum(label != -100 for label in labels) == 5 * (4 + 2) + 1


# Tokens


@pytest.mark.parametrize(("batch_size", "batches"), [(1, {1: 36}), (4, {4: 6, 1: 2, 2: 2, 3: 2}), (99, {})])
def test_each_frame_is_encoded_once_in_the_batches_asked_for(tmp_path, tiny, quick, encoded, batch_size, batches):
    source, settings = write(tmp_path / "source"), replace(SMALL, batch_size=batch_size)
    record = run(source, tmp_path / "out", tiny, settings)
    assert Counter(map(len, encoded)) == (batches or {5: 2, 6: 2, 7: 2})
    assert len({frame.numpy().tobytes() for batch in encoded for frame in batch}) == 36
    assert record.splits["train"].steps == sum(map(len, encoded)) == 36
    assert run(source, tmp_path / "out", tiny, settings) == record
    assert sum(map(len, encoded)) == 36  # and not again for what is done


@pytest.mark.parametrize(
    ("variable", "options", "warned"),
    [
        (None, {"workers": 2}, True),
        ("active", {"workers": 2}, True),
        ("passive", {"workers": 2}, False),
        (None, {"workers": 1}, False),
    ],
)
def test_spinning_threads_beside_workers_are_warned_of_once(
    tmp_path, tiny, quick, monkeypatch, variable, options, warned
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if variable:
        monkeypatch.setenv("OMP_WAIT_POLICY", variable)
    source = write(tmp_path / "source", each=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # the second time there is nothing to do
            run(source, tmp_path / "out", tiny, device="cpu", **options)
    assert [(w.category, w.filename) for w in caught] == [(RuntimeWarning, __file__)] * warned
    assert all("set OMP_WAIT_POLICY=PASSIVE in the environment before torch" in str(w.message) for w in caught)


class StandIn:
    """In place of the simulator."""

    def __init__(self, settings: ReplaySettings, *, suite: str) -> None:
        self.settings, self.suite = settings, suite

    def __call__(self, raw: Episode) -> Episode:
        assert not raw.frames
        assert self.suite == "source"
        if raw.id.endswith("demo_1"):
            raise EpisodeError(Reason.NO_SUCCESS, f"{raw.id}: replayed with: mujoco 3.17.0")
        (camera,) = self.settings.cameras
        size = self.settings.image_size
        frames = np.zeros((len(raw) - 1, size, size, 3), np.uint8)
        return replace(raw, actions=raw.actions[1:], frames={camera: frames}, control_hz=20.0)


def test_raw_demonstrations_go_through_the_simulator_and_its_versions_into_the_record(
    tmp_path, tiny, quick, monkeypatch
):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    source = HDF5Source(write(tmp_path / "source", "ab", each=3), replay=True)
    settings = replace(SMALL, camera="sideview", replay=ReplaySettings(image_size=48), min_steps=5)
    replayer = StandIn(replace(settings.replay, cameras=("sideview",)), suite="source")
    with pytest.warns(RuntimeWarning, match="OMP_WAIT_POLICY"):
        record = run(source, tmp_path / "out", tiny, settings, device="cpu", replayer=replayer)
    assert record.settings["replay"] == json.loads(
        json.dumps({**vars(ReplaySettings(image_size=48)), "cameras": ["sideview"]})
    )
    assert record.settings["simulator"] == installed_versions(SIMULATOR)
    assert record.settings["camera"] == "sideview"
    # 5, 6, 7 steps a file, one less without the pause: the first is then too short, the second fails
    assert [(d.id, d.reason) for d in record.dropped] == [
        ("a_demo/demo_0", "too short"),
        ("a_demo/demo_1", "no success on replay"),
        ("b_demo/demo_0", "too short"),
        ("b_demo/demo_1", "no success on replay"),
    ]
    assert record.splits["train"].steps == 2 * 6


# Shards, splits, bounds


@pytest.mark.parametrize("room", [0, 1, 2.5, 1000])
def test_shards_of_any_size_hold_all_episodes_in_order(tmp_path, tiny, quick, room):
    source = write(tmp_path / "source", each=4)
    settings, parts = replace(SMALL, fraction=0.75), []
    run(source, tmp_path / "one", tiny, settings, on_part=lambda _, part: parts.append(part.stat().st_size))
    record = run(source, tmp_path / "out", tiny, settings, max_shard_bytes=int(room * max(parts)))
    for name, row in record.splits.items():
        n = len(row.files)
        assert [*row.files] == [f"data/{name}-{i:05d}-of-{n:05d}.arrow" for i in range(n)]
        assert n == row.episodes if room <= 1 else n == 1 if room == 1000 else 1 < n < row.episodes
        data, whole = TokenDataset(tmp_path / "out", name), TokenDataset(tmp_path / "one", name)
        assert len(data) == row.episodes == {"train": 9, "validation": 3}[name]
        for a, b in zip(data, whole, strict=True):
            assert (a.id, a.task, a.instruction) == (b.id, b.task, b.instruction)
            np.testing.assert_array_equal(a.codes, b.codes)
            np.testing.assert_array_equal(a.actions, b.actions)
        everything = [key.id for key in open_source(source).list()[0]]
        assert [e.id for e in data] == [id for id in everything if id in ids(tmp_path / "out", name)]
    assert sorted(f"data/{p.name}" for p in (tmp_path / "out" / "data").iterdir()) == sorted(
        file for row in record.splits.values() for file in row.files
    )


@pytest.mark.parametrize("rule", ["paper", "published"])
@pytest.mark.parametrize("quantile", [None, 0.1])
def test_bounds_are_those_of_the_training_episodes_alone(tmp_path, tiny, quick, rule, quantile):
    settings = replace(SMALL, split=rule, fraction=0.5, seed=3, quantile=quantile)
    source = open_source(write(tmp_path / "source", each=4))
    splits = split(source.list()[0], rule, fraction=0.5, seed=3)
    with h5py.File(tmp_path / "source" / "b_demo.hdf5", "a") as content:
        outlier = next(i for i in range(4) if splits[f"b_demo/demo_{i}"] == "validation")
        content[f"data/demo_{outlier}/actions"][0] = 1e6
    record = run(source, tmp_path / "out", tiny, settings)
    assert record.splits.keys() == set(splits.values())
    for name in record.splits:
        assert sorted(ids(tmp_path / "out", name)) == sorted(id for id, s in splits.items() if s == name)
    if rule == "published":  # two of three tasks, and of these two of four
        assert ids(tmp_path / "out") == [f"{task}_demo/demo_{i}" for task in "ab" for i in (0, 1)]
        assert {e.task for e in TokenDataset(tmp_path / "out", "validation_unseen")} == {"c"}
    training = np.concatenate([source.read(id).actions for id, name in splits.items() if name == "train"])
    low, high = (0, 1) if quantile is None else (quantile, 1 - quantile)
    bounds = TokenDataset(tmp_path / "out", "validation").actions
    np.testing.assert_allclose(bounds.low, np.quantile(training, low, axis=0), rtol=1e-12)
    np.testing.assert_allclose(bounds.high, np.quantile(training, high, axis=0), rtol=1e-12)


def test_a_limit_takes_turns_over_the_tasks(tmp_path, tiny, quick):
    record = run(write(tmp_path / "source", each=3), tmp_path / "out", tiny, replace(SMALL, fraction=1), limit=4)
    assert ids(tmp_path / "out") == ["a_demo/demo_0", "a_demo/demo_1", "b_demo/demo_0", "c_demo/demo_0"]
    assert record.dropped == ()


# Bad input


def put(name: str, value: Any) -> Callable[[Path], None]:
    """Another array, or none, in place of that of the second demonstration."""

    def spoil(path: Path) -> None:
        with h5py.File(path, "a") as content:
            group = content["data/demo_1"]
            new = value(group[name][:]) if callable(value) else value
            del group[name]
            if new is not None:
                group[name] = new

    return spoil


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(actions: np.ndarray) -> np.ndarray:
        actions[3, 2] = value
        return actions

    return change


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def foreign(path: Path) -> None:
    with h5py.File(path, "w") as content:
        content["observations"] = np.zeros(3)


def speechless(path: Path) -> None:
    with h5py.File(path, "a") as content:
        content["data/demo_1"].attrs["language_instruction"] = " "
        content["data/demo_0"].attrs["language_instruction"] = "do b"
        del content["data"].attrs["problem_info"]


def damaged(path: Path) -> None:
    with h5py.File(path) as content:
        chunk = content["data/demo_1/obs/agentview_rgb"].id.get_chunk_info(3)
    content = bytearray(path.read_bytes())
    content[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(content)


FILE, DEMO = "b_demo.hdf5", "b_demo/demo_1"
FRAMES = "obs/agentview_rgb"
FAULTS = {
    "truncated file": (truncated, FILE, Reason.UNREADABLE, "truncated, damaged, or still being copied"),
    "foreign file": (foreign, FILE, Reason.MISSING_KEY, "no group 'data'; LIBERO's layout needed, found observ"),
    "no actions": (put("actions", None), DEMO, Reason.MISSING_KEY, "no 'actions'; existing:"),
    "no frames": (put(FRAMES, None), DEMO, Reason.MISSING_KEY, "no frames of camera 'agentview'; existing: none"),
    "wrong width": (
        put("actions", np.ones((6, 5))),
        DEMO,
        Reason.ACTION_WIDTH,
        "actions have shape (6, 5); (T, 7) needed",
    ),
    "no width": (put("actions", np.ones(6)), DEMO, Reason.ACTION_WIDTH, "actions have shape (6,); (T, 7) needed"),
    "NaN": (put("actions", with_value(np.nan)), DEMO, Reason.NOT_FINITE, "action 3, dimension 2 is nan"),
    "infinite": (put("actions", with_value(np.inf)), DEMO, Reason.NOT_FINITE, "action 3, dimension 2 is inf"),
    "short": (put("actions", np.ones((4, 7))), DEMO, Reason.TOO_SHORT, "4 actions; at least 5 needed"),
    "fewer frames": (put(FRAMES, lambda a: a[1:]), DEMO, Reason.MISSING_FRAMES, "4 frames of 'agentview' for 5 a"),
    "floating frames": (
        put(FRAMES, lambda a: a / 127.5 - 1),
        DEMO,
        Reason.BAD_FRAMES,
        "frames of 'agentview', shape (5, 32, 32, 3) and type float64, have values from -1 to 1; allowed: 0 to",
    ),
    "hole in frames": (damaged, DEMO, Reason.UNREADABLE, "damaged, or not what it should be"),
    "no words": (speechless, DEMO, Reason.MISSING_KEY, "the instruction is empty; words are needed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_the_rest_goes_on_or_stops_there_if_strict(tmp_path, tiny, quick, fault):
    spoil, id, reason, message = FAULTS[fault]
    source = write(tmp_path / "source", "abc")
    spoil(source / FILE)
    record = run(source, tmp_path / "out", tiny)
    (dropped,) = record.dropped
    assert (dropped.id, dropped.reason) == (id, str(reason))
    assert dropped.message.startswith(f"{id}: {message}")
    kept = [f"{task}_demo/demo_{i}" for task in "abc" for i in (0, 1)]
    kept = [one for one in kept if one != id and (id != FILE or not one.startswith("b"))]
    assert ids(tmp_path / "out") == kept
    with pytest.raises(EpisodeError) as caught:
        run(source, tmp_path / "strict", tiny, strict=True)
    assert caught.value.reason is reason
    assert caught.value.message == dropped.message
    assert not (tmp_path / "strict" / "dataset.json").exists()


def test_many_faults_in_one_data_set_are_reported_in_order_whoever_works(tmp_path, tiny):
    source = write(tmp_path / "source", "a")
    for number, (spoil, *_) in enumerate(FAULTS.values()):
        name = f"b{number:02d}_demo.hdf5"
        (source / name).write_bytes((write(tmp_path / "b", "b") / FILE).read_bytes())
        spoil(source / name)
    seen: list[str] = []
    record = run(
        source, tmp_path / "out", tiny, replace(SMALL, fraction=1), workers=2, on_part=lambda n, _: seen.append(n)
    )
    expected = [
        ((FILE if id == FILE else DEMO).replace("b_", f"b{number:02d}_"), str(reason))
        for number, (_, id, reason, _) in enumerate(FAULTS.values())
    ]
    expected.sort(key=lambda row: "/" in row[0])  # files are found out first
    assert [(d.id, d.reason) for d in record.dropped] == expected
    readable = len(FAULTS) - 2
    assert sorted(seen) == [f"{n:06d}" for n in range(2 + 2 * readable)]
    assert len(ids(tmp_path / "out")) == 2 + readable
    page = (tmp_path / "out" / "index.html").read_text()
    assert all(id in page for id, _ in expected)
    assert f"{len(FAULTS)} episodes or files were dropped" in (tmp_path / "out" / "README.md").read_text()


DEADLY = """
import os, signal
from dataclasses import dataclass
from worldvla_libero.hdf5 import HDF5Source

@dataclass(frozen=True)
class DeadlySource(HDF5Source):
    def read(self, id, cameras=()):
        if id == "b_demo/demo_0":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(id, cameras)
"""


def test_an_episode_that_kills_its_worker_is_dropped_by_name(tmp_path, tiny, monkeypatch):
    """As the kernel does when memory is short."""
    (tmp_path / "deadly.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)  # workers get the source by name
    source = import_module("deadly").DeadlySource(write(tmp_path / "source"))
    record = run(source, tmp_path / "out", tiny, replace(SMALL, fraction=1), workers=2)
    (dropped,) = record.dropped
    assert dropped.reason == Reason.WORKER_KILLED
    assert dropped.id == "b_demo/demo_0"
    assert "SIGKILL" in dropped.message
    assert len(ids(tmp_path / "out")) == 5


def test_a_data_set_of_nothing_is_refused(tmp_path, tiny, quick):
    source = write(tmp_path / "source", "ab")
    with pytest.raises(NoEpisodeLeftError, match=r"no episode of source is left: 4 dropped \(too short\)"):
        run(source, tmp_path / "out", tiny, replace(SMALL, min_steps=8))
    assert not (tmp_path / "out" / "dataset.json").exists()
    truncated(source / "a_demo.hdf5")
    foreign(source / "b_demo.hdf5")
    with pytest.raises(NoEpisodeLeftError, match=r"has no episode that can be read: a_demo.*; b_demo.* no group"):
        run(source, tmp_path / "out", tiny)
    for name in "cdef":
        truncated(write(tmp_path / "source", name) / f"{name}_demo.hdf5")
    with pytest.raises(NoEpisodeLeftError, match=r"a_demo.*; b_demo.*; c_demo.*; and 3 more$"):
        plan(open_source(source))


def test_cameras_are_chosen_by_name_where_it_is_not_clear(tmp_path):
    made = episode(0)
    two = {"left": made.frames["agentview"], "right": made.frames["agentview"]}
    write_demonstrations(tmp_path / "two" / "a_demo.hdf5", [replace(made, frames=two)])
    write_demonstrations(tmp_path / "none" / "a_demo.hdf5", [replace(made, frames={})])
    usual = {"agentview": made.frames["agentview"], "wrist": made.frames["agentview"]}
    write_demonstrations(tmp_path / "usual" / "a_demo.hdf5", [replace(made, frames=usual)])

    def camera(folder: str, name: str | None = None) -> str:
        return plan(open_source(tmp_path / folder), replace(SMALL, camera=name)).camera

    assert camera("two", "right") == "right"
    assert camera("usual") == "agentview"
    assert camera("usual", "wrist") == "wrist"
    with pytest.raises(PrepareError, match="two has several cameras: left, right; choose one"):
        camera("two")
    with pytest.raises(PrepareError, match="two has no camera 'top'; existing: left, right"):
        camera("two", "top")
    with pytest.raises(PrepareError, match="none holds no camera frames and cannot be replayed"):
        camera("none")
    with pytest.raises(
        PrepareError, match=r"cameras: observation\.images\.top, observation\.images\.side; choose"
    ):
        plan(open_source(FIXTURES / "lerobot" / "so101"))


def test_only_raw_hdf5_can_be_replayed_and_only_lerobot_has_keys(tmp_path):
    with pytest.raises(PrepareError, match="is a LeRobotDataset, which holds no simulator states"):
        open_source(FIXTURES / "lerobot" / "libero", replay=True)
    with pytest.raises(PrepareError, match="is no LeRobotDataset; options action_key are for those"):
        open_source(DEMOS, action_key="action")
    with pytest.raises(FileNotFoundError, match="no demonstrations"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 100}, "image_size is 100 px; allowed: multiples of 32 from 32"),
        ({"min_steps": 0}, "min_steps is 0; allowed: 1 and above"),
        ({"batch_size": 0}, "batch_size is 0; allowed: 1 and above"),
        ({"seed": -1}, "seed is -1; allowed: 0 and above"),
        ({"split": "random"}, "split rule is 'random'; allowed: 'paper', 'published'"),
        ({"fraction": 0}, "fraction is 0; allowed: above 0, up to 1"),
        ({"quantile": 0.5}, "quantile is 0.5; allowed: above 0 and below 0.5, or None"),
    ],
)
def test_settings_out_of_range_are_found_out_before_the_work(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(SMALL, **changes)
    assert str(caught.value) == message


@pytest.mark.slow
def test_a_camera_that_no_scene_has_is_named(tmp_path, published):
    with pytest.raises(SimulatorError, match=r"camera 'topview' is not in the scene of .*; existing: .*agentview"):
        run(DEMOS, tmp_path / "out", published.tokenizer, replace(SMALL, camera="topview"), limit=1)


# Interrupted work


def full_disk(monkeypatch, target: int | str) -> None:
    """Fails in the middle of the n-th Arrow file, or of the text file of a name."""
    write_text, count = Path.write_text, iter(range(1000))

    def fail() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def episodes(path, *arguments):
        written = write_episodes(path, *arguments)
        if next(count) == target:
            os.truncate(path, path.stat().st_size // 2)
            fail()
        return written

    def text(path, content, *arguments, **options):
        hit = path.name.startswith(f".{target}.")
        written = write_text(path, content[: 10 if hit else None], *arguments, **options)
        if hit:
            fail()
        return written

    for module in (parts_module, preparation):
        monkeypatch.setattr(module, "write_episodes", episodes)
    monkeypatch.setattr(Path, "write_text", text)


def undisturbed(go: Callable[..., Any], factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run without fault makes; it is the same for all faults."""
    out = factory.getbasetemp() / "undisturbed"
    go(out=out)
    return files(out)


# four parts, three training shards, one of validation; then, in this order, the rest
@pytest.mark.parametrize(
    "target", [*range(8), "action_tokenizer.json", "index.html", "README.md", "dataset.json"], ids=str
)
def test_a_full_disk_stops_the_work_and_the_same_call_goes_on(
    tmp_path, tmp_path_factory, tiny, quick, encoded, target
):
    source, settings = write(tmp_path / "source", "ab"), replace(SMALL, fraction=0.75)
    go = functools.partial(run, source, tokenizer=tiny, settings=settings, max_shard_bytes=1)
    expected = undisturbed(go, tmp_path_factory)
    assert sum(name.startswith("data/") for name in expected) == 4
    encoded.clear()
    with pytest.MonkeyPatch.context() as faulty:
        full_disk(faulty, target)
        with pytest.raises(StorageError, match=r"No space left on device.*: run the same command again once that"):
            go(out=tmp_path / "out")
    left = files(tmp_path / "out")
    parts = [name for name in left if name.startswith(".work/0")]
    assert len(parts) == (target if isinstance(target, int) and target < 4 else 4)
    assert "dataset.json" not in left
    assert not [name for name in left if ".draft-" in name or (isinstance(target, str) and target in name)]
    assert all(expected[name] == content for name, content in left.items() if not name.startswith(".work/"))
    with pytest.raises(ShardError, match="its preparation has not ended: run it again"):
        TokenDataset(tmp_path / "out")
    done = sum(map(len, encoded))
    go(out=tmp_path / "out")
    assert files(tmp_path / "out") == expected
    if len(parts) == 4:
        assert sum(map(len, encoded)) == done  # no frame is encoded again


def test_a_limit_on_file_sizes_is_a_full_disk(tmp_path, tiny, quick, monkeypatch):
    """A real failure of writing: the system's, not a made-up one."""
    monkeypatch.setattr(parts_module, "_strip", lambda frames: b"")  # else parts are larger than their shard
    source = write(tmp_path / "source", "a", each=9)
    sizes: list[int] = []
    run(source, tmp_path / "whole", tiny, on_part=lambda _, part: sizes.append(part.stat().st_size))
    assert max(sizes) + 1000 < (tmp_path / "whole" / "data" / "train-00000-of-00001.arrow").stat().st_size
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    for number, (limit, parts) in enumerate(((1000, 0), (max(sizes) + 100, 9))):
        out = tmp_path / str(number)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, kept[1]))
            with pytest.raises(StorageError, match="File too large"):
                run(source, out, tiny)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, kept)
        assert len([name for name in files(out) if name.endswith(".arrow") and ".work/0" in name]) == parts
        assert sorted(path.name for path in out.iterdir()) == [".work"]
        run(source, out, tiny)
        assert files(out) == files(tmp_path / "whole")


def test_other_settings_do_not_go_into_a_folder_that_was_begun_or_ended(tmp_path, tiny, published, quick):
    source = write(tmp_path / "source")
    with pytest.MonkeyPatch.context() as faulty:
        full_disk(faulty, 2)
        with pytest.raises(StorageError):
            run(source, tmp_path / "begun", tiny)
    run(source, tmp_path / "ended", tiny)
    for name in ("begun", "ended"):
        out = tmp_path / name
        before = files(out)
        with pytest.raises(
            JobError, match=rf"{name} was begun with .*\(image_size was 32, now 64\); choose anoth"
        ):
            run(source, out, tiny, PrepareSettings(image_size=64))
        with pytest.raises(JobError, match=r"\(split was \{.*'seed': 0\}, now \{.*'seed': 1\}\)"):
            run(source, out, tiny, replace(SMALL, seed=1))
        with pytest.raises(JobError, match=r"\(quantile was None, now 0\.01\)"):
            run(source, out, tiny, replace(SMALL, quantile=0.01))
        with pytest.raises(JobError, match=r"\(image_tokenizer was '[0-9a-f]{64}', now "):
            run(source, out, published.tokenizer)
        with pytest.raises(JobError, match=r"\(episodes was "):
            run(source, out, tiny, limit=2)
        assert files(out).keys() == before.keys() | ({".work/lock"} if name == "begun" else set())
        assert all(files(out)[file] == content for file, content in before.items())


def test_an_ended_data_set_is_given_back_without_work(tmp_path, tiny, quick, encoded, monkeypatch):
    source = write(tmp_path / "source")
    record = run(source, tmp_path / "out", tiny)
    before, frames = files(tmp_path / "out"), len(encoded)
    nobody = {"executor": None, "workers": 4, "max_shard_bytes": 1}
    assert run(source, tmp_path / "out", tiny, **nobody) == record
    assert (len(encoded), files(tmp_path / "out")) == (frames, before)


def test_a_folder_of_something_else_is_left_alone(tmp_path, tiny, quick):
    source = write(tmp_path / "source")
    with pytest.raises(JobError, match=r"source is not empty and holds no dataset\.json; choose another folder"):
        run(source, source, tiny)
    with pytest.raises(JobError, match=r"a_demo\.hdf5 is a file; choose a folder"):
        run(source, source / "a_demo.hdf5", tiny)


def test_codes_of_another_tokenizer_are_refused(tmp_path, tiny, published, quick):
    run(write(tmp_path / "source"), tmp_path / "out", tiny)
    data = TokenDataset(tmp_path / "out")
    data.check_tokenizer(ImageTokenizer.from_pretrained(tiny))
    torch.manual_seed(1)
    for other in (ImageTokenizer(VQGAN(tiny_config())), ImageTokenizer.from_pretrained(published.tokenizer)):
        with pytest.raises(ShardError, match=r"was made with image tokenizer .* prepare the data again"):
            data.check_tokenizer(other)


def test_a_tokenizer_is_found_inside_its_model_too(tmp_path, tiny):
    from worldvla_libero import default_model_path

    torch.manual_seed(0)
    inside = load_image_tokenizer(default_model_path())
    assert (
        inside.vqgan.fingerprint
        == load_image_tokenizer(default_model_path() / "image_tokenizer").vqgan.fingerprint
    )
    with pytest.raises(FileNotFoundError):
        load_image_tokenizer(tmp_path)


@pytest.fixture
def killed(tmp_path, published) -> Iterator[tuple[ModuleType, list[str]]]:
    """What kills, and a command to be killed: twelve episodes, of which one is dropped."""
    rng = np.random.default_rng(0)
    for task in "ab":
        made = []
        for n in range(6):
            pictures = [np.asarray(published.frame("libero_goal_0", t).resize((64, 64))) for t in (0, 1, 8, 9)]
            frames = np.stack([np.roll(pictures[t % 4], t + n, axis=1) for t in range(12)])
            made.append(Episode("", "", f"do {task}", rng.normal(size=(12, 7)), {"agentview": frames}))
        write_demonstrations(tmp_path / "source" / f"{task}_demo.hdf5", made)
    put("actions", with_value(np.nan))(tmp_path / "source" / FILE)
    command = f"-m worldvla_libero.cli prepare {tmp_path / 'source'} --image-size 64 --workers 2 --tokenizer"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1])
        yield import_module("job_work"), [sys.executable, *command.split(), str(published.tokenizer), "--out"]


def only_dropped(out: Path) -> str:
    (dropped,) = json.loads((out / "dataset.json").read_text())["dropped"]
    return dropped["id"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are counted in /proc")
def test_killed_when_it_has_begun_and_after_a_part_the_command_goes_on_to_the_same_bytes(tmp_path, killed):
    work, command = killed
    for moment in (".work/job.json", ".work/*.arrow"):
        work.kill_when(command, tmp_path / "out", moment, log=tmp_path / "log")
        assert not (tmp_path / "out" / "dataset.json").exists()
    for name in ("out", "whole"):
        subprocess.run([*command, tmp_path / name], check=True, stdout=subprocess.DEVNULL)
    assert work.files(tmp_path / "out") == work.files(tmp_path / "whole")
    assert only_dropped(tmp_path / "whole") == DEMO


@pytest.mark.campaign
@pytest.mark.skipif(sys.platform != "linux", reason="processes are counted in /proc")
def test_killed_at_random_moments_the_command_goes_on_to_the_same_bytes(tmp_path, killed):
    """Twenty times SIGKILL to the whole group, the runs between them to their end."""
    work, command = killed
    options = {"kills": 20, "seed": 0, "log": tmp_path / "log"}
    found = work.kill_at_random(command, tmp_path / "runs", "dataset.json", ".arrow", **options)
    assert found.total() == 20
    assert found["parts"] >= 3
    assert only_dropped(tmp_path / "runs" / "whole") == DEMO


def test_previews_are_strips_of_a_few_frames_in_time(tmp_path, tiny, quick, monkeypatch):
    shown: list[Preview] = []
    shades = np.arange(6, dtype=np.uint8)[:, None, None, None] * 50
    made = replace(episode(0), frames={"agentview": np.broadcast_to(shades, (6, 32, 48, 3)).copy()})
    write_demonstrations(tmp_path / "source" / "a_demo.hdf5", [made] * 3)
    run(tmp_path / "source", tmp_path / "out", tiny, page=lambda *arguments: shown.extend(arguments[3]) or "")
    assert [preview.episode for preview in shown] == ["a_demo/demo_0", "a_demo/demo_1"]  # of three, two per task
    with Image.open(io.BytesIO(shown[0].strip)) as strip:
        assert strip.size == (6 * 144, 96)
        columns = np.asarray(strip).mean(axis=(0, 2)).reshape(6, 144).mean(axis=1)
    np.testing.assert_allclose(columns, shades.ravel(), atol=3)


def test_a_codebook_without_ids_is_refused_before_the_work(tmp_path):
    config = replace(tiny_config(), n_embed=16_384)
    ImageTokenizer(VQGAN(config)).save_pretrained(tmp_path / "large")
    source = write(tmp_path / "source")
    with pytest.raises(ImageError, match="codebook of 16384 entries; the vocabulary has ids for 8192"):
        run(source, tmp_path / "out", tmp_path / "large")
    assert not (tmp_path / "out").exists()


def test_frames_of_another_size_than_the_tokenizers_are_told(tmp_path, tiny, quick):
    ImageTokenizer(VQGAN(tiny_config()).eval(), image_size=128).save_pretrained(tmp_path / "made_for_128")
    with pytest.warns(
        RuntimeWarning, match=f"tokenized at {SMALL.image_size} px; the image tokenizer is made for 128"
    ):
        run(write(tmp_path / "source"), tmp_path / "out", tmp_path / "made_for_128")


def test_the_default_model_is_one_of_one_image_size():
    from worldvla_libero import default_model_path

    said = json.loads((default_model_path() / "processor_config.json").read_text())["image_size"]
    assert load_image_tokenizer(default_model_path()).image_size == said
    assert load_image_tokenizer(default_model_path() / "image_tokenizer").image_size == said
    assert load_image_tokenizer(default_model_path(), image_size=64).image_size == 64


def test_a_tokenizer_is_found_in_a_folder_of_a_repository(tmp_path, tiny, monkeypatch):
    """Of a model, of the tokenizer itself, and the authors' pair in chameleon/tokenizer; here from the cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--lab--robot", "b" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v2").write_text(commit)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    shutil.copytree(tiny, snapshot / "image_tokenizer")
    (snapshot / "processor_config.json").write_text('{"image_size": 96}')
    shutil.copytree(tiny, snapshot / "nano" / "image_tokenizer")
    for place, size in (
        ("lab/robot", 96),
        ("hf://lab/robot@v2", 96),
        ("hf://lab/robot/image_tokenizer", None),
        ("hf://lab/robot@v2/nano", None),
    ):
        assert load_image_tokenizer(place).image_size == size
