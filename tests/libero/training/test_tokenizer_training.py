import copy
import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from worldvla_libero.cli import main as cli
from worldvla_libero.data.episodes import Episode, EpisodeError, split
from worldvla_libero.hdf5 import write_demonstrations
from worldvla_libero.prepare import open_source
from worldvla_libero.training import run_log, tokenizer_training
from worldvla_libero.training.run_log import read_lines
from worldvla_libero.training.tokenizer_training import (
    FramesError,
    FrameSettings,
    Intervals,
    gather_frames,
    gathered_masks,
    moving_pixels,
    train_tokenizer,
)
from worldvla_tokenizers import VQGAN, ImageTokenizer, Vocabulary, VQGANConfig
from worldvla_tokenizers.image import fit
from worldvla_tokenizers.vqgan_training import VQGANTraining, VQGANTrainingError

TINY = VQGANConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=8, embed_dim=8, n_embed=16)
FRAMES = FrameSettings(image_size=32, train_fraction=0.75, split_seed=3)
INTERVALS = Intervals(log=1, evaluate=5, save=2)
DEMOS = Path(__file__).parents[2] / "fixtures" / "short_demos" / "libero_object"
CAMERAS = ("agentview", "robot0_eye_in_hand")
RESULT = ["README.md", "config.json", "image_tokenizer.json", "model.safetensors", "training.json"]
RUN = ["checkpoint.pt", "curves.png", "frames", "log.csv", "log.jsonl", "reconstructions.png"]


def write_source(root, *, size=(32, 32), cameras=CAMERAS[:1], steps=(3, 4, 5, 6)):
    """Demonstrations of two tasks; no two frames are alike."""
    rng = np.random.default_rng(0)
    for task in ("lift", "push"):
        episodes = []
        for count in steps:
            coarse = rng.integers(0, 256, (len(cameras), count, 4, 4, 3), dtype=np.uint8)
            frames = coarse.repeat(size[0] // 4, axis=2).repeat(size[1] // 4, axis=3)
            actions = rng.normal(size=(count, 7))
            by_camera = dict(zip(cameras, frames, strict=True))
            episodes.append(Episode("made", task, f"{task} the cube", actions, frames=by_camera))
        root.mkdir(parents=True, exist_ok=True)
        write_demonstrations(root / f"{task}_demo.hdf5", episodes)
    return open_source(root, replay=False)


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    """Where there is a GPU, too: only CPUs add up in the same order each time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("source") / "made")


def expected_frames(source, settings=FRAMES, camera="agentview"):
    """All frames of the episodes that train, and of those held out, as they are."""
    keys, _ = source.list()
    parts = split(keys, fraction=settings.train_fraction, seed=settings.split_seed)
    assert sorted(parts.values()).count("validation") == 2
    found = {"train": [], "validation": []}
    for key in keys:
        found[parts[key.id]] += list(source.read(key.id, (camera,)).frames[camera])
    return np.stack(found["train"]), np.stack(found["validation"])


# Frames


def test_frames_are_those_of_the_split(source, tmp_path):
    told = []
    train, held_out = gather_frames(
        source, tmp_path / "run" / "frames", FRAMES, on_episode=lambda *counts: told.append(counts)
    )
    for found, expected in zip((train, held_out), expected_frames(source), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert isinstance(found, np.memmap)
        assert not found.flags.writeable
    assert told == [(i, 8) for i in range(1, 9)]
    files = sorted(path.name for path in (tmp_path / "run" / "frames").iterdir())
    assert files == ["frames.json", "train.npy", "validation.npy"]
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["frames"]


def test_another_seed_holds_out_other_episodes(source, tmp_path):
    other = FrameSettings(image_size=32, train_fraction=0.75, split_seed=4)
    _, held_out = gather_frames(source, tmp_path / "other", other)
    np.testing.assert_array_equal(held_out, expected_frames(source, other)[1])
    mine = expected_frames(source)[1]
    assert held_out.shape != mine.shape or (held_out != mine).any()


@pytest.mark.parametrize("limit", [1, 5, 26, 1_000])
def test_a_limit_takes_frames_at_even_distances(source, tmp_path, limit):
    settings = FrameSettings(image_size=32, train_fraction=0.75, split_seed=3, limit=limit, held_out=4)
    found = gather_frames(source, tmp_path / "frames", settings)
    for array, everything, count in zip(found, expected_frames(source), (limit, 4), strict=True):
        wanted = min(count, len(everything))
        places = [i * len(everything) // wanted for i in range(wanted)]
        np.testing.assert_array_equal(array, everything[places])


def test_frames_are_brought_to_one_size(tmp_path):
    larger = write_source(tmp_path / "larger", size=(80, 64))
    found = gather_frames(larger, tmp_path / "frames", FRAMES)
    for array, everything in zip(found, expected_frames(larger), strict=True):
        assert array.shape == (len(everything), 32, 32, 3)
        np.testing.assert_array_equal(array, [np.asarray(fit(frame, 32)) for frame in everything])


def test_what_was_gathered_is_taken_as_it_is(source, tmp_path):
    first = gather_frames(source, tmp_path, FRAMES)
    files = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()}
    assert len(files) == 3
    again = gather_frames(source, tmp_path, FRAMES, on_episode=lambda *_: pytest.fail("an episode was read"))
    assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in tmp_path.iterdir()} == files
    for found, expected in zip(again, first, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 64}, "image_size 32, not 64"),
        ({"limit": 5, "held_out": 7}, "limit None, not 5; held_out 256, not 7"),
        ({"split_seed": 4}, "split_seed 3, not 4"),
    ],
)
def test_frames_of_other_settings_are_refused(source, tmp_path, changes, message):
    gather_frames(source, tmp_path, FRAMES)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FramesError, match=f"{tmp_path} holds frames of another run: {message}; choose another"):
        gather_frames(source, tmp_path, FrameSettings(**{**vars(FRAMES), **changes}))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_frames_of_other_episodes_are_refused(source, tmp_path):
    gather_frames(source, tmp_path / "frames", FRAMES)
    other = write_source(tmp_path / "other", steps=(3, 4, 5))
    with pytest.raises(FramesError, match=r"frames of another run: episodes '\w{64}', not '\w{64}'"):
        gather_frames(other, tmp_path / "frames", FRAMES)


def test_what_moves_differs_from_the_median_frame_of_the_episode():
    """A square that is elsewhere in each frame, a shadow that is too weak, a thing that is taken away."""
    rng = np.random.default_rng(2)
    frames = rng.integers(60, 180, (1, 16, 16, 3), dtype=np.uint8).repeat(6, axis=0)
    expected = np.zeros(frames.shape[:3], bool)
    for t in range(6):
        frames[t, 2 * t : 2 * t + 3, :4, 1] = 230  # one channel is enough
        expected[t, 2 * t : 2 * t + 3, :4] = True
    frames[1::2, :, 6:8] += tokenizer_training.STILL_LEVELS
    frames[:4, 12:, 12:] = 255
    expected[4:, 12:, 12:] = True
    np.testing.assert_array_equal(moving_pixels(frames), expected)


@pytest.mark.parametrize("limit", [None, 7])
def test_what_moves_is_gathered_beside_the_frames(tmp_path, limit):
    """Against the background of all frames of an episode, of which a limit takes some."""
    larger = write_source(tmp_path / "larger", size=(80, 64))
    settings = FrameSettings(**{**vars(FRAMES), "limit": limit})
    found = gather_frames(larger, tmp_path / "frames", settings, moving=True)
    plain = gather_frames(larger, tmp_path / "plain", settings)
    keys, _ = larger.list()
    parts = split(keys, fraction=settings.train_fraction, seed=settings.split_seed)
    for part, masks, frames, without in zip(
        ("train", "validation"), gathered_masks(tmp_path / "frames"), found, plain, strict=True
    ):
        np.testing.assert_array_equal(frames, without)
        everything = []
        for key in keys:
            if parts[key.id] == part:
                pictures = [fit(f, 32) for f in larger.read(key.id, CAMERAS[:1]).frames["agentview"]]
                everything += list(moving_pixels(np.stack(pictures)))
        places = [i * len(everything) // len(frames) for i in range(len(frames))]
        assert len(masks) == len(frames) == min(len(everything), (limit or 36) if part == "train" else 256)
        for i, place in enumerate(places):
            assert masks[i].dtype == bool
            np.testing.assert_array_equal(masks[i], everything[place])


def test_frames_without_what_moves_are_refused_where_it_is_needed(source, tmp_path):
    gather_frames(source, tmp_path, FRAMES)
    message = "holds frames of another run: still_levels None, not 8; choose another folder"
    with pytest.raises(FramesError, match=message):
        gather_frames(source, tmp_path, FRAMES, moving=True)
    # As they were gathered before there was such a field.
    record = json.loads((tmp_path / "frames.json").read_text())
    del record["still_levels"]
    (tmp_path / "frames.json").write_text(json.dumps(record))
    with pytest.raises(FramesError, match=message):
        gather_frames(source, tmp_path, FRAMES, moving=True)
    gather_frames(source, tmp_path, FRAMES, on_episode=lambda *_: pytest.fail("an episode was read"))


def test_the_camera_is_chosen_where_there_are_several(tmp_path):
    both = write_source(tmp_path / "both", cameras=CAMERAS)
    with pytest.raises(FramesError, match="both has several cameras: agentview, robot0_eye_in_hand; choose one"):
        gather_frames(both, tmp_path / "frames", FRAMES)
    with pytest.raises(FramesError, match="both has no camera 'front'; existing: agentview, robot0_eye_in_hand"):
        gather_frames(both, tmp_path / "frames", FrameSettings(camera="front"))
    assert not (tmp_path / "frames").exists()
    hand = FrameSettings(**{**vars(FRAMES), "camera": CAMERAS[1]})
    train, _ = gather_frames(both, tmp_path / "frames", hand)
    np.testing.assert_array_equal(train, expected_frames(both, camera=CAMERAS[1])[0])
    other = FrameSettings(**{**vars(FRAMES), "camera": CAMERAS[0]})
    with pytest.raises(FramesError, match="camera 'robot0_eye_in_hand', not 'agentview'"):
        gather_frames(both, tmp_path / "frames", other)


def test_demonstrations_without_frames_are_refused(tmp_path):
    raw = write_source(tmp_path / "raw", cameras=())
    with pytest.raises(FramesError, match="raw holds no frames; render them: worldvla replay"):
        gather_frames(raw, tmp_path / "frames", FRAMES)


def test_without_held_out_episodes_there_is_nothing_to_measure_on(source, tmp_path):
    with pytest.raises(FramesError, match="no episode is held out of 8; lower the share that trains"):
        gather_frames(source, tmp_path / "frames", FrameSettings(image_size=32, train_fraction=1.0))
    assert list(tmp_path.iterdir()) == []


def test_frames_that_do_not_become_square_are_refused(tmp_path):
    wide = write_source(tmp_path / "wide", size=(32, 64))
    message = "lift_demo/demo_0: frames of 64 x 32 px would become 64 x 32 px; square ones are needed"
    with pytest.raises(FramesError, match=message):
        gather_frames(wide, tmp_path / "frames", FrameSettings(image_size=64, train_fraction=0.75))
    assert [path.name for path in tmp_path.iterdir()] == ["wide"]  # no draft is left


def test_an_episode_that_cannot_be_used_leaves_no_half(tmp_path):
    damaged = write_source(tmp_path / "damaged")
    episode = damaged.read("lift_demo/demo_0", CAMERAS[:1])
    actions = episode.actions.copy()
    actions[1, 2] = math.nan
    bad = Episode("bad", "lift", "lift the cube", actions, frames=episode.frames)
    write_demonstrations(tmp_path / "damaged" / "lift_demo.hdf5", [bad] * 4)
    with pytest.raises(EpisodeError, match="action 1, dimension 2 is nan"):
        gather_frames(damaged, tmp_path / "frames", FRAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


@pytest.mark.parametrize(("field", "value"), [("limit", 0), ("held_out", 0), ("limit", -3)])
def test_frame_settings_out_of_range(field, value):
    with pytest.raises(FramesError, match=f"{field} is {value} frames; allowed: 1 and above"):
        FrameSettings(**{field: value})


@pytest.mark.parametrize("field", ["log", "evaluate", "save"])
def test_intervals_out_of_range(field):
    with pytest.raises(VQGANTrainingError, match=f"{field} is every 0 steps; allowed: 1 and above"):
        Intervals(**{field: 0})


# Training


def run(source, out, *, frames=FRAMES, intervals=INTERVALS, dtype="fp32", until=None, drawn=False, **options):
    """Six steps, the adversarial loss in the last two; pictures, most of the time of a run, only if asked for."""
    usual = {
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "restart_after": 2,
        "discriminator_start": 4,
        "discriminator_channels": 8,
        "discriminator_layers": 1,
    }
    torch.manual_seed(0)
    vqgan = VQGAN(TINY)
    training = VQGANTraining(**{**usual, **options})
    told = []
    with pytest.MonkeyPatch.context() as patch:
        if not drawn:
            undraw(patch)
        record = train_tokenizer(
            vqgan,
            source,
            out,
            frames=frames,
            training=training,
            intervals=intervals,
            dtype=dtype,
            until=until,
            on_progress=lambda *progress: told.append(progress),
        )
    return vqgan, record, told


def undraw(patch):
    patch.setattr(run_log, "save_curves", lambda *_, **__: None)
    patch.setattr(tokenizer_training, "save_strips", lambda *_, **__: None)


def rows_of(out):
    """The log without the times, which differ from run to run."""
    rows = read_lines(out / "log.jsonl")
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.fixture(scope="module")
def finished(source, tmp_path_factory):
    """A run that was not interrupted."""
    out = tmp_path_factory.mktemp("training") / "cubes"
    return out, *run(source, out, drawn=True)


def test_a_run_leaves_a_tokenizer_numbers_and_pictures(source, finished):
    out, vqgan, record, told = finished
    assert sorted(path.name for path in out.iterdir()) == sorted(RESULT + RUN)
    assert told == [("gathering", i, 8) for i in range(1, 9)] + [("training", i, 6) for i in range(1, 7)]

    tokenizer = ImageTokenizer.from_pretrained(out)
    assert tokenizer.image_size == 32
    assert same_weights(tokenizer.vqgan, vqgan)
    held_out = expected_frames(source)[1]
    codes = tokenizer.encode(held_out)
    assert codes.shape == (len(held_out), 8, 8)
    assert tokenizer.decode(codes).shape == held_out.shape

    assert json.loads((out / "training.json").read_text()) == json.loads(json.dumps(record))
    assert record["steps"] == 6
    assert record["source"] == "made"
    assert record["frames"]["training"] == 36 - len(held_out)
    assert record["frames"]["held_out"] == len(held_out)
    assert record["frames"]["image_size"] == 32
    assert record["training"]["learning_rate"] == 2e-3
    assert not record["perceptual_loss"]
    assert record["parameters"] == sum(parameter.numel() for parameter in vqgan.parameters())
    card = (out / "README.md").read_text()
    for part in ("# cubes", f"PSNR | {record['held_out']['psnr']:.2f} dB", f"on {len(held_out)} frames", "of 16"):
        assert part in card

    for name in ("curves.png", "reconstructions.png"):
        with Image.open(out / name) as image:
            assert np.asarray(image.convert("RGB")).std() > 1


def test_the_log_holds_losses_and_held_out_values(finished):
    out, _, record, _ = finished
    rows = read_lines(out / "log.jsonl")
    losses = [row for row in rows if "loss_l1" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4, 5, 6]
    usual = {"step", "loss_l1", "loss_commitment", "learning_rate", "seconds"}
    assert losses[0].keys() == usual
    assert losses[5].keys() == usual | {"loss_adversarial", "loss_discriminator"}
    training = VQGANTraining(**record["training"])
    assert [row["learning_rate"] for row in losses] == [training.rate(step) for step in range(6)]
    assert sorted(row["seconds"] for row in losses) == [row["seconds"] for row in losses]
    measured = [row for row in rows if "eval_psnr" in row]
    assert [row["step"] for row in measured] == [5, 6]
    assert {name.removeprefix("eval_"): value for name, value in measured[1].items() if name != "step"} == (
        pytest.approx(record["held_out"])
    )
    with (out / "log.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)


@pytest.mark.parametrize("until", [4, 5])  # with a checkpoint, and one step after one
def test_an_interrupted_run_goes_on_to_the_same_weights(source, finished, tmp_path, until):
    whole, expected, wanted, _ = finished
    _, record, _ = run(source, tmp_path, until=until)
    assert record["steps"] == until
    assert [row["step"] for row in rows_of(tmp_path) if "loss_l1" in row] == list(range(1, until + 1))
    vqgan, record, told = run(source, tmp_path)
    assert told == [("training", 5, 6), ("training", 6, 6)]
    assert same_weights(vqgan, expected)
    assert same_weights(ImageTokenizer.from_pretrained(tmp_path).vqgan, expected)
    assert rows_of(tmp_path) == rows_of(whole)
    assert record["held_out"] == wanted["held_out"]
    assert record["seconds"] > max(row.get("seconds", 0) for row in read_lines(tmp_path / "log.jsonl")) > 0


def test_what_moves_may_weigh_more_and_such_a_run_goes_on_too(source, finished, tmp_path):
    expected, record, _ = run(source, tmp_path / "whole", motion_weight=4.0)
    assert not same_weights(expected, finished[1])
    assert 0 < record["held_out"]["psnr_moving"] < 40
    assert (
        f"PSNR of what moves | {record['held_out']['psnr_moving']:.2f} dB"
        in (tmp_path / "whole" / "README.md").read_text()
    )
    rows = rows_of(tmp_path / "whole")
    assert all(row["loss_weighted_l1"] > row["loss_l1"] for row in rows if "loss_l1" in row)
    assert [row["step"] for row in rows if "eval_psnr_moving" in row] == [5, 6]

    run(source, tmp_path / "parts", motion_weight=4.0, until=4)
    vqgan, _, told = run(source, tmp_path / "parts", motion_weight=4.0)
    assert told == [("training", 5, 6), ("training", 6, 6)]
    assert same_weights(vqgan, expected)
    assert rows_of(tmp_path / "parts") == rows
    with pytest.raises(FramesError, match="still_levels 8, not None"):
        run(source, tmp_path / "parts")
    with pytest.raises(VQGANTrainingError, match=r"motion_weight: 4\.0 there, 2\.0 here"):
        run(source, tmp_path / "parts", motion_weight=2.0)


def test_a_tokenizer_that_exists_keeps_its_codes(source, finished, tmp_path, monkeypatch):
    """Codes at random places of the frames would draw them no better than fresh ones do."""
    undraw(monkeypatch)
    _, trained, _, _ = finished
    found = {}
    for fresh in (True, False):
        record = train_tokenizer(
            copy.deepcopy(trained),
            source,
            tmp_path / str(fresh),
            frames=FRAMES,
            training=VQGANTraining(steps=1, batch_size=2, learning_rate=1e-9, discriminator_start=None),
            dtype="fp32",
            fresh=fresh,
        )
        codes = ImageTokenizer.from_pretrained(tmp_path / str(fresh)).vqgan.quantize.embedding.weight
        found[fresh] = (codes - trained.quantize.embedding.weight).abs().max().item()
        assert record["steps"] == 1
    assert found[False] < 0.1 * found[True]


def test_losses_are_averaged_over_the_steps_that_there_were(source, finished, tmp_path):
    each = {row["step"]: row for row in rows_of(finished[0]) if "loss_l1" in row}
    intervals = Intervals(log=3, evaluate=100, save=2)
    run(source, tmp_path, intervals=intervals, until=3)
    (row,) = rows_of(tmp_path)
    assert row["loss_l1"] == pytest.approx(np.mean([each[step]["loss_l1"] for step in (1, 2, 3)]))
    run(source, tmp_path, intervals=intervals)
    rows = [row for row in rows_of(tmp_path) if "loss_l1" in row]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["loss_l1"] == pytest.approx(each[3]["loss_l1"])  # gone on from the checkpoint of step 2
    assert rows[1]["loss_l1"] == pytest.approx(np.mean([each[step]["loss_l1"] for step in (4, 5, 6)]))
    late = np.mean([each[step]["loss_adversarial"] for step in (5, 6)])
    assert rows[1]["loss_adversarial"] == pytest.approx(late)


def test_a_finished_run_is_left_as_it_is(source, finished):
    out, expected, _, _ = finished
    names = ("log.jsonl", "training.json", "model.safetensors")
    before = [(out / name).stat().st_mtime_ns for name in names]
    vqgan, record, told = run(source, out)
    assert told == []
    assert same_weights(vqgan, expected)
    assert record == json.loads((out / "training.json").read_text())
    assert [(out / name).stat().st_mtime_ns for name in names] == before


def test_weights_are_rounded_in_the_end_but_not_where_training_goes_on(source, finished, tmp_path):
    whole, expected, _, _ = finished
    run(source, tmp_path, dtype="bf16", until=4)
    vqgan, record, _ = run(source, tmp_path, dtype="bf16")
    rounded = {name: tensor.bfloat16().float() for name, tensor in expected.state_dict().items()}
    found = ImageTokenizer.from_pretrained(tmp_path).vqgan.state_dict()
    for name, tensor in vqgan.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, rounded[name])
        assert torch.equal(tensor, found[name])
    assert rows_of(tmp_path) == rows_of(whole)
    (before,) = [row for row in rows_of(tmp_path) if row["step"] == 6 and "eval_psnr" in row]
    assert record["held_out"]["psnr"] != before["eval_psnr"]  # it is that of the rounded weights


def test_a_run_does_not_go_on_under_other_settings(source, finished):
    out = finished[0]
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        VQGANTrainingError, match=r"learning_rate: 0\.002 there, 0\.1 here; commitment: 0\.25 there"
    ):
        run(source, out, learning_rate=0.1, commitment=1.0)
    with pytest.raises(FramesError, match="limit None, not 9; choose another folder"):
        run(source, out, frames=FrameSettings(**{**vars(FRAMES), "limit": 9}))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_numbers_that_are_not_finite_stop_a_run_before_it_writes_a_tokenizer(source, tmp_path):
    with pytest.raises(VQGANTrainingError, match=r"the loss is (nan|inf) at step \d"):
        run(source, tmp_path, learning_rate=1e30, clip_norm=1e30)
    assert not set(RESULT) & {path.name for path in tmp_path.iterdir()}


# The command


@pytest.mark.slow
def test_the_command_learns_frames_of_the_simulator(tmp_path, capsys):
    """With a stem, and what moves weighing more. Before is after one step, of a tenth of the learning rate."""
    frames, out = tmp_path / "frames", tmp_path / "run"
    replay = ["replay", str(DEMOS), str(frames), "--to", "hdf5", "--image-size", "64", "--cameras", "agentview"]
    assert cli.main(replay) == cli.EXIT_OK
    command = ["train-tokenizer", str(frames), "--out", str(out), "--image-size", "64", "--train-fraction", "0.75"]
    command += ["--stem", "4", "--ch-mult", "1", "2", "4", "--n-embed", "1024", "--motion-weight", "3"]
    command += ["--steps", "100", "--learning-rate", "1e-3", "--restart-after", "20", "--precision", "fp32"]
    command += ["--warmup", "0.1", "--every.evaluate", "100"]
    found = []
    for options in (["--until", "1"], []):
        assert cli.main([*command, *options]) == cli.EXIT_OK
        printed = capsys.readouterr().out
        found.append(json.loads((out / "training.json").read_text())["held_out"])
        (line,) = [line for line in printed.splitlines() if "codes_used" in line]
        assert f" {found[-1]['codes_used']:.0f} " in line
    before, after = found
    assert after["psnr"] > before["psnr"] + 6
    assert after["psnr_moving"] > before["psnr_moving"] + 1
    assert after["codes_used"] > 8
    tokenizer = ImageTokenizer.from_pretrained(out)
    tokenizer.check_vocabulary(Vocabulary.published())
    assert tokenizer.encode(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 4, 4)
