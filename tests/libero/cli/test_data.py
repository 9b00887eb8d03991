import functools
import inspect
import json
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from worldvla_libero import default_model_path
from worldvla_libero.cli import main as cli
from worldvla_libero.data.episodes import Episode
from worldvla_libero.data.record import DataRecord
from worldvla_libero.data.samples import ActionSamples, TokenSamples
from worldvla_libero.data.shards import TokenDataset
from worldvla_libero.demonstrations import collect as collecting
from worldvla_libero.demonstrations import replay as replaying
from worldvla_libero.hdf5 import HDF5Source, write_demonstrations
from worldvla_libero.jobs.job import Job
from worldvla_libero.jobs.parts import Dropped
from worldvla_libero.prepare import PrepareSettings, open_source, plan, prepare
from worldvla_tokenizers import VQGAN, ImageTokenizer, TextTokenizer, VQGANConfig

HERE = Path(__file__).parents[1]
FIXTURES = HERE.parent / "fixtures"
DEMOS, SHORT = (FIXTURES / folder / "libero_object" for folder in ("demos", "short_demos"))
SO101 = FIXTURES / "lerobot" / "so101"
SOUP, SAUCE = (f"pick_up_the_{thing}_and_place_it_in_the_basket" for thing in ("alphabet_soup", "bbq_sauce"))


@pytest.fixture(autouse=True)
def terminal(tmp_path, monkeypatch) -> None:
    """Wide enough that no line is broken, in a folder that may be filled; without the figures of the page."""
    without_page = functools.partial(prepare, page=lambda *_: "page")
    monkeypatch.setattr("worldvla_libero.prepare.prepare", without_page)
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> str:
    """An image tokenizer that takes milliseconds."""
    torch.manual_seed(0)
    config = VQGANConfig(ch=32, n_embed=64, embed_dim=8, z_channels=8, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1)
    folder = tmp_path_factory.mktemp("tiny")
    ImageTokenizer(VQGAN(config).eval(), image_size=32).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """Two tasks with frames: four and two demonstrations of 60 steps."""
    root, rng = tmp_path_factory.mktemp("demonstrations"), np.random.default_rng(0)
    for task, count in (("a", 4), ("b", 2)):
        made = []
        for _ in range(count):
            frames = rng.integers(0, 256, (60, 32, 32, 3), dtype=np.uint8)
            made.append(Episode("", "", f"do [{task}]", rng.normal(size=(60, 7)), {"agentview": frames}))
        write_demonstrations(root / f"{task}_demo.hdf5", made)
    return str(root)


@pytest.fixture
def spoiled(source, tmp_path) -> str:
    """The same with one action that is no number."""
    folder = shutil.copytree(source, tmp_path / "spoiled")
    with h5py.File(folder / "b_demo.hdf5", "a") as content:
        content["data/demo_1/actions"][7, 2] = np.nan
    return str(folder)


def rows(printed: str) -> list[list[str]]:
    """Cells of all tables."""
    lines = [line for line in printed.splitlines() if line[:1] in "│┃"]
    return [[cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]] for line in lines]


# Usage


@pytest.mark.parametrize("command", ["collect", "replay", "prepare", "imagine"])
def test_help_names_and_explains_all_options(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # beyond, options stand side by side
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == cli.EXIT_OK
    printed, function = capsys.readouterr().out, cli.COMMANDS[command]
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^\W*({name.replace('_', '-')}|{name.upper()})\b", printed, re.MULTILINE), name
        assert f"        {name}: " in function.__doc__
    words = " ".join(printed.replace("│", " ").split())
    assert " ".join(function.__doc__.split("\n")[0].split()) in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "libero_objet"], "UnknownNameError: unknown suite 'libero_objet' (did you mean"),
        (
            ["collect", "libero_object", "--tasks", "11"],
            "UnknownNameError: task 11 of libero_object; allowed: 0 …",
        ),
        (["collect", "libero_object", "--tasks", "fly"], "UnknownNameError: "),
        (["collect", "libero_10"], "NoExpertError: no task of libero_10 has a scripted expert"),
        (["collect", "libero_10", "--tasks", "0"], "NoExpertError: there is no scripted expert for libero_10/"),
        (["collect", "libero_object", "--episodes", "0"], "episodes is 0; allowed: 1 and above"),
        (["replay", "nowhere"], "no demonstrations: nowhere is no HDF5 file and no folder with one"),
        (["replay", str(SO101)], "PrepareError: "),
        (["replay", str(DEMOS), "--limit", "0"], "limit is 0 episodes; allowed: 1 and above"),
        (["replay", str(DEMOS), "--image-size", "8"], "image_size is 8 px; allowed: 32 and above"),
        (["prepare", "nowhere"], "no demonstrations: nowhere is no HDF5 file and no folder with one"),
        (["prepare", "."], "no demonstrations: . is no HDF5 file"),
        (["prepare", str(SO101)], "has several cameras: observation.images.top, observation.images.side; choose"),
        (
            ["prepare", str(SO101), "--camera", "wrist"],
            "so101 has no camera 'wrist'; existing: observation.images.",
        ),
        (["prepare", str(SO101), "--replay", "always"], "is a LeRobotDataset, which holds no simulator states"),
        (["prepare", str(DEMOS), "--action-key", "x"], "is no LeRobotDataset; options action_key are for those"),
        (["prepare", str(DEMOS), "--replay", "never"], "holds no camera frames and cannot be replayed"),
        (["prepare", str(DEMOS), "--image-size", "100"], "image_size is 100 px; allowed: multiples of 32 from 32"),
        (["prepare", str(DEMOS), "--bounds-quantile", "0.7"], "quantile is 0.7; allowed: above 0 and below 0.5"),
        (["prepare", str(DEMOS), "--train-fraction", "0"], "fraction is 0.0; allowed: above 0, up to 1"),
        (["prepare", str(DEMOS), "--limit", "0"], "limit is 0 episodes; allowed: 1 and above"),
        (["prepare", str(DEMOS), "--tokenizer", "./no/where/at/all"], "./no/where/at/all"),
    ],
)
def test_usage_errors_are_one_line_and_leave_nothing(arguments, message, capsys, tmp_path):
    assert cli.main(arguments) == cli.EXIT_USAGE
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert list(tmp_path.rglob("*.*")) == []


@pytest.mark.parametrize(
    "arguments", [["prepare"], ["collect"], ["replay", "x", "--to", "zarr"], ["prepare", "x", "--split", "random"]]
)
def test_arguments_that_cannot_be_parsed_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == cli.EXIT_USAGE


# Prepare


def test_prepare_tells_what_it_will_do_and_what_it_did(source, tiny, tmp_path, capsys):
    arguments = ["prepare", source, "--tokenizer", tiny, "--train-fraction", "0.8", "--workers", "2"]
    assert cli.main(arguments) == cli.EXIT_OK
    printed = capsys.readouterr().out
    name = Path(source).name
    said = f"6 episodes, 360 steps of {name}, camera agentview, tokenized at 32 px: about 23.0 kB of shards, "
    assert printed.startswith(said)
    assert "166.1 kB on the way, " in printed.splitlines()[0]
    assert f"{name} in worldvla-data" in printed
    assert rows(printed) == [["split", "episodes", "steps"], ["train", "5", "300"], ["validation", "1", "60"]]
    assert "6/6" in printed
    assert "dropped" not in printed
    assert printed.splitlines()[-1] == "see what is inside: worldvla-data/index.html"
    out = tmp_path / "worldvla-data"
    assert [path.name for path in sorted(out.iterdir())] == [
        "README.md",
        "action_tokenizer.json",
        "data",
        "dataset.json",
        "index.html",
    ]
    # what it estimated, against what it is
    planned = plan(open_source(source), PrepareSettings(image_size=32))
    real = sum(file.stat().st_size for file in (out / "data").iterdir())
    assert real / 2 <= planned.bytes_final <= real * 2
    # again: the same answer, without work
    assert cli.main(arguments) == cli.EXIT_OK
    assert rows(capsys.readouterr().out) == rows(printed)
    # other settings
    assert cli.main([*arguments, "--min-steps", "9"]) == cli.EXIT_USAGE
    assert (
        "JobError: worldvla-data was begun with other settings (min_steps was 5, now 9); choose another folder"
        in (capsys.readouterr().err)
    )


def test_prepare_hands_every_option_on(source, tiny, tmp_path, monkeypatch):
    import worldvla_libero.prepare

    calls = []

    def remember(planned, out, place, settings, **options):
        calls.append((planned, out, place, settings, options))
        return DataRecord(settings={}, splits={})

    monkeypatch.setattr(worldvla_libero.prepare, "prepare", remember)
    arguments = f"prepare {source} --out o --tokenizer {tiny} --image-size 64 --camera agentview --replay always "
    arguments += (
        "--render-size 48 --min-steps 3 --action-dim 7 --split published --train-fraction 0.5 --split-seed 4 "
    )
    arguments += (
        "--bounds-quantile 0.01 --limit 3 --workers 5 --device cpu --batch-size 6 --strict --executor ray "
    )
    arguments += "--gpus 0.5"
    assert cli.main(arguments.split()) == cli.EXIT_OK
    ((planned, out, place, settings, options),) = calls
    assert settings == PrepareSettings(
        image_size=64,
        camera="agentview",
        replay=replaying.ReplaySettings(image_size=48),
        min_steps=3,
        dimensions=7,
        split="published",
        fraction=0.5,
        seed=4,
        quantile=0.01,
        batch_size=6,
    )
    assert (planned.replayed, len(planned.keys), str(out), place) == (True, 3, "o", tiny)
    assert options.pop("on_part")
    assert options == {"workers": 5, "device": "cpu", "strict": True, "executor": "ray", "gpus": 0.5}
    assert cli.main(["prepare", str(SO101), "--action-key", "observation.state", "--camera", SIDE]) == cli.EXIT_OK
    planned, _, place, settings, _ = calls[1]
    assert (planned.source.action_key, planned.camera) == ("observation.state", SIDE)
    assert (place, settings.image_size, settings.replay.image_size) == (default_model_path(), 128, 128)


SIDE = "observation.images.side"


def test_prepare_lists_what_was_dropped_or_stops_there_if_strict(spoiled, tiny, capsys):
    assert cli.main(["prepare", spoiled, "--tokenizer", tiny, "--out", "o"]) == cli.EXIT_OK
    printed = capsys.readouterr().out
    assert "1 dropped" in printed
    assert "dropped: 1 (not finite: 1)" in printed
    row = ["b_demo/demo_1", "not finite", "b_demo/demo_1: action 7, dimension 2 is nan"]
    assert rows(printed)[-2:] == [["episode", "why", "what"], row]
    assert cli.main(["prepare", spoiled, "--tokenizer", tiny, "--out", "s", "--strict"]) == cli.EXIT_USAGE
    assert "EpisodeError: not finite: b_demo/demo_1: action 7, dimension 2 is nan" in capsys.readouterr().err
    everything = ["prepare", spoiled, "--tokenizer", tiny, "--out", "n", "--min-steps", "1000"]
    assert cli.main(everything) == cli.EXIT_FAILED
    assert "is left: 6 dropped (not finite, too short)" in capsys.readouterr().err


def test_a_long_list_of_dropped_episodes_is_cut_and_words_are_not_markup(capsys):
    from worldvla_libero.cli.data import _console, _print_dropped

    dropped = [Dropped(f"[red]/{n}", "too short", "[/b] 3") for n in range(12)]
    _print_dropped(_console(), dropped, Path("o/dataset.json"))
    printed = capsys.readouterr().out
    assert [row[0] for row in rows(printed)] == ["episode", *(f"[red]/{n}" for n in range(10))]
    assert printed.splitlines()[-1] == "… and 2 more; all are in o/dataset.json"
    _print_dropped(_console(), [], None)
    assert capsys.readouterr().out == ""


def disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


def test_prepare_does_not_begin_what_the_disk_cannot_hold(source, tiny, tmp_path, monkeypatch, capsys):
    arguments = ["prepare", source, "--tokenizer", tiny, "--out", "o"]
    needed = plan(open_source(source), PrepareSettings(image_size=32)).bytes_peak
    disk(monkeypatch, 100_000)
    assert cli.main(arguments) == cli.EXIT_FAILED
    printed = capsys.readouterr()
    assert " kB on the way, 100.0 kB free" in printed.out
    assert " kB needed, 100.0 kB free" in printed.err
    assert not (tmp_path / "o").exists()
    # what an interrupted run has done needs no more room
    end = Job.end
    with pytest.MonkeyPatch.context() as interrupted:
        interrupted.setattr(Job, "end", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        disk(monkeypatch, needed)
        assert cli.main(arguments) == cli.EXIT_INTERRUPTED
    assert Job.end is end
    parts = sum(
        p.stat().st_size for folder in (".work", "data") for p in (tmp_path / "o" / folder).rglob("*.arrow")
    )
    disk(monkeypatch, needed - parts)
    assert cli.main(arguments) == cli.EXIT_OK
    assert " kB done" in capsys.readouterr().out
    # and what is complete, none
    disk(monkeypatch, 0)
    assert cli.main(arguments) == cli.EXIT_OK


# Collect and replay, with stand-ins for the simulator


@pytest.fixture
def stand_ins(monkeypatch, tmp_path_factory) -> Iterator[None]:
    """An expert that succeeds every other time, and a replay that succeeds with the first of each task."""
    folder = tmp_path_factory.mktemp("modules")
    (folder / "stand_ins.py").write_text(STAND_INS)
    for place in (HERE, folder):
        monkeypatch.syspath_prepend(place)  # workers get classes by name
    monkeypatch.setattr(collecting, "Demonstrator", import_module("job_work").SyntheticDemonstrator)
    monkeypatch.setattr(replaying, "Replayer", import_module("stand_ins").Replayer)
    yield
    sys.modules.pop("stand_ins")


STAND_INS = """
from dataclasses import replace
import numpy as np
from worldvla_libero.data.episodes import EpisodeError, Reason

class Replayer:
    def __init__(self, settings, *, suite):
        self.settings = settings

    def __call__(self, raw):
        if raw.id.endswith("demo_1"):
            raise EpisodeError(Reason.NO_SUCCESS, f"{raw.id}: the goal is not reached")
        size = self.settings.image_size
        frames = {c: np.full((20, size, size, 3), 7, np.uint8) for c in self.settings.cameras}
        felt = np.zeros((20, 8))
        return replace(raw, actions=raw.actions[:20], frames=frames, proprioception=felt, states=None)

class Hopeless(Replayer):
    def __call__(self, raw):
        raise EpisodeError(Reason.NO_SUCCESS, f"{raw.id}: the goal is not reached")

class Unlucky:
    def __call__(self, attempt):
        raise EpisodeError(Reason.NO_SUCCESS, f"{attempt.id}: missed")
"""


def test_collect_tells_how_often_the_expert_succeeds(stand_ins, tmp_path, capsys):
    arguments = ["collect", "libero_object", "--tasks", "0", SAUCE, "--episodes", "2", "--seed", "3"]
    assert cli.main(arguments) == cli.EXIT_OK
    printed = capsys.readouterr().out
    assert "scripted experts on libero_object, seed 3" in printed
    assert "4/4" in printed  # successes, of those wanted
    assert rows(printed) == [
        ["task", "success", "kept", "steps"],
        *(
            [f"pick up the {thing} and place it in the basket", "67 % (2/3)", "2", "4"]
            for thing in ("alphabet soup", "bbq sauce")
        ),
    ]
    out = Path("worldvla-demos") / "libero_object"
    assert printed.splitlines()[-1] == f"wrote {out / 'collection.json'} and a file per task"
    assert sorted(p.name for p in out.iterdir()) == ["collection.json", f"{SOUP}_demo.hdf5", f"{SAUCE}_demo.hdf5"]
    assert HDF5Source(out).needs_replay
    assert cli.main([*arguments, "--attempts", "9"]) == cli.EXIT_USAGE
    assert "attempts was 4, now 9" in capsys.readouterr().err


def test_collect_names_tasks_that_no_expert_can_do(stand_ins, capsys):
    assert cli.main(["collect", "libero_goal", "--episodes", "1", "--attempts", "1"]) == cli.EXIT_OK
    printed = capsys.readouterr().out
    assert "left out, for it has no scripted expert: libero_goal/" in printed
    assert "push_the_plate" in printed.splitlines()[0] or "push the plate" in printed.splitlines()[0]
    assert len(rows(printed)) == 1 + 9


def test_a_task_at_which_the_expert_fails_has_no_file(stand_ins, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(collecting, "Demonstrator", import_module("stand_ins").Unlucky)
    assert cli.main(["collect", "libero_object", "--tasks", "0", "--episodes", "2", "--out", "o"]) == cli.EXIT_OK
    printed = capsys.readouterr().out
    assert rows(printed)[1] == ["pick up the alphabet soup and place it in the basket", "0 % (0/4)", "0", "-"]
    assert "4 failed" in printed
    assert [p.name for p in (tmp_path / "o").iterdir()] == ["collection.json"]


def test_replay_without_out_only_counts(stand_ins, tmp_path, capsys):
    assert cli.main(["replay", str(DEMOS)]) == cli.EXIT_OK
    printed = capsys.readouterr().out
    assert "replay of libero_object" in printed
    assert rows(printed)[:3] == [
        ["task", "replayed", "succeed"],
        [SOUP, "2", "1 (50 %)"],
        [SAUCE, "2", "1 (50 %)"],
    ]
    assert "dropped: 2 (no success on replay: 2)" in printed
    assert [row[0] for row in rows(printed)[4:]] == [f"{task}_demo/demo_1" for task in (SOUP, SAUCE)]
    assert "wrote" not in printed
    assert list(tmp_path.iterdir()) == []


def test_replay_that_reproduces_nothing_fails(stand_ins, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(replaying, "Replayer", import_module("stand_ins").Hopeless)
    assert cli.main(["replay", str(DEMOS)]) == cli.EXIT_FAILED
    assert "dropped: 4 (no success on replay: 4)" in capsys.readouterr().out
    assert cli.main(["replay", str(DEMOS), "o"]) == cli.EXIT_FAILED
    assert "no episode of libero_object is left: 4 dropped (no success on replay)" in capsys.readouterr().err
    (tmp_path / "cut").mkdir()
    whole = (DEMOS / f"{SOUP}_demo.hdf5").read_bytes()
    (tmp_path / "cut" / f"{SOUP}_demo.hdf5").write_bytes(whole[: len(whole) // 2])
    assert cli.main(["replay", "cut"]) != cli.EXIT_OK  # a file that cannot be read has no episode to count


@pytest.mark.parametrize("to", ["lerobot", "hdf5"])
def test_what_replay_wrote_can_be_prepared(stand_ins, tiny, tmp_path, capsys, to):
    broken = Path(shutil.copytree(DEMOS, tmp_path / "libero_object")) / "broken_demo.hdf5"
    broken.write_bytes(b"no HDF5")
    arguments = ["replay", "libero_object", "frames", "--to", to, "--image-size", "32", "--limit", "3"]
    assert cli.main([*arguments, "--cameras", "agentview"]) == cli.EXIT_OK
    printed = capsys.readouterr().out
    assert "dropped: 2 (unreadable file: 1, no success on replay: 1)" in printed
    assert printed.splitlines()[-1] == "wrote frames"
    assert cli.main(["prepare", "frames", "--tokenizer", tiny, "--train-fraction", "1"]) == cli.EXIT_OK
    assert rows(capsys.readouterr().out)[1:] == [["train", "2", "40"]]
    assert cli.main([*arguments, "--cameras", "agentview", "--keep-noops"]) == cli.EXIT_USAGE
    assert "skip_noops" in capsys.readouterr().err
    assert cli.main(["replay", "libero_object", "strict", "--to", to, "--strict"]) == cli.EXIT_USAGE
    assert "no success on replay: " in capsys.readouterr().err


# The real thing


@pytest.mark.campaign
def test_from_expert_to_samples(published, tmp_path, capsys):
    """With a demonstration of full length; the blocks of README.md and docs/data.md do the same in parts."""
    assert cli.main(["collect", "libero_object", "--tasks", "0", "--episodes", "1"]) == cli.EXIT_OK
    demos = str(Path("worldvla-demos") / "libero_object")
    assert cli.main(["replay", demos]) == cli.EXIT_OK
    assert rows(capsys.readouterr().out)[-1][1:] == ["1", "1 (100 %)"]
    tokenizer = str(published.tokenizer)
    arguments = ["prepare", demos, "--image-size", "64", "--tokenizer", tokenizer]
    assert cli.main(arguments) == cli.EXIT_OK
    assert ", replayed at 64 px, tokenized at 64 px" in capsys.readouterr().out
    data = TokenDataset(tmp_path / "worldvla-data")
    samples = TokenSamples(data, ActionSamples(2, 5), TextTokenizer.from_pretrained(tokenizer))
    assert len(samples) == len(data[0]) - 4


@pytest.mark.slow
def test_prepare_replays_raw_demonstrations_and_names_those_that_fail(published, tmp_path, capsys):
    """A demonstration that was cut short cannot reach its goal."""
    folder = shutil.copytree(SHORT, tmp_path / "libero_object")
    with h5py.File(DEMOS / f"{SOUP}_demo.hdf5") as whole, h5py.File(folder / f"{SOUP}_demo.hdf5", "a") as content:
        for key, values in {
            "states": whole["data/demo_1/states"],
            "actions": whole["data/demo_1/actions"][:10],
        }.items():
            del content["data/demo_1"][key]
            content["data/demo_1"][key] = values[:]
    arguments = ["prepare", "libero_object", "--image-size", "64", "--tokenizer", str(published.tokenizer)]
    assert cli.main([*arguments, "--limit", "3", "--workers", "2"]) == cli.EXIT_OK
    printed = capsys.readouterr().out
    ((id, _, message),) = [row for row in rows(printed) if row[1] == "no success on replay"]
    assert id == f"{SOUP}_demo/demo_1"
    for word in ("recorded with: robosuite 1.4.0, mujoco 3.17.0", "replayed with: mujoco 3.", "after "):
        assert word in message
    record = json.loads((tmp_path / "worldvla-data" / "dataset.json").read_text())
    assert record["settings"]["simulator"]["robosuite"] == "1.4.0"
    assert record["dropped"][0]["message"] == message
    planned = plan(open_source(folder), PrepareSettings(image_size=64), limit=3)
    real = sum(file.stat().st_size for file in (tmp_path / "worldvla-data" / "data").iterdir())
    assert real / 2 <= planned.bytes_final <= real * 2
