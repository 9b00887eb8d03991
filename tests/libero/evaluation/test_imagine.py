"""The world-model evaluation from end to end, on a small model with the published layout."""

import json
import os
import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from worldvla_libero.cli import main as cli
from worldvla_libero.data.episodes import Episode
from worldvla_libero.data.record import RECORD_FILE, DataRecord, SplitRecord, fingerprint_of
from worldvla_libero.data.shards import TokenEpisode, write_episodes
from worldvla_libero.evaluation import imagine as imagining
from worldvla_libero.evaluation.imagine import imagine
from worldvla_libero.evaluation.report import write_report
from worldvla_libero.evaluation.world.backbones import Backbones
from worldvla_libero.evaluation.world.clips import ImagineSettings
from worldvla_libero.evaluation.world.metrics import frame_ssim, frechet_distance, psnr
from worldvla_libero.evaluation.world.trajectories import open_trajectories
from worldvla_libero.hdf5 import write_demonstrations
from worldvla_libero.jobs.parts import JobError
from worldvla_model import WorldVLA
from worldvla_tokenizers import ActionTokenizer

SIZE = 32
PUBLISHED = Path(__file__).parents[2] / "fixtures" / "published"
MODEL = ["--model", str(PUBLISHED / "checkpoint"), "--tokenizers", str(PUBLISHED / "tokenizer")]
MODEL += ["--image-size", str(SIZE)]


@pytest.fixture(scope="module")
def agent() -> WorldVLA:
    return WorldVLA.from_pretrained(PUBLISHED / "checkpoint", tokenizers=PUBLISHED / "tokenizer", image_size=SIZE)


def episode(n: int, steps: int) -> Episode:
    """Something that moves down, on a background of its own."""
    frames = np.full((steps, SIZE, SIZE, 3), 40 + 30 * n, np.uint8)
    for t in range(steps):
        frames[t, 2 + t : 14 + t, 8:20] = (200, 60, 250 - 20 * t)
    actions = np.random.default_rng(n).uniform(-0.3, 0.3, (steps, 7))
    return Episode("", "", "push it", actions, {"front": frames})


@pytest.fixture(scope="module")
def demos(tmp_path_factory) -> Path:
    """Four demonstrations of one task, two of them short."""
    root = tmp_path_factory.mktemp("demos")
    write_demonstrations(root / "push_demo.hdf5", [episode(n, steps) for n, steps in enumerate((9, 4, 12, 4))])
    return root


def held_out(demos):
    return open_trajectories(demos, fraction=0.01)  # one of them trains


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, agent) -> Path:
    """The same as codes, all of them held out."""
    root = tmp_path_factory.mktemp("tokens")
    settings = {"image_tokenizer": agent.processor.images.vqgan.fingerprint, "image_size": SIZE}
    (root / "data").mkdir()
    made = []
    for n, steps in enumerate((9, 4)):
        one = episode(n, steps)
        codes = agent.processor.images.encode(one.frames["front"]).astype(np.uint16)
        made.append(TokenEpisode(f"push/demo_{n}", "push", "push it", codes, one.actions))
    write_episodes(root / "data/validation.arrow", made, {"fingerprint": fingerprint_of(settings)})
    splits = {"validation": SplitRecord(len(made), sum(map(len, made)), ("data/validation.arrow",))}
    record = DataRecord(settings=settings, splits=splits, name="pushed", control_hz=10)
    (root / RECORD_FILE).write_text(json.dumps(record.content()))
    ActionTokenizer.published().save_pretrained(root)
    return root


def distance(a, b):
    return (a - b).abs().mean(dim=(1, 2, 3))


def look(videos):
    assert videos.dtype == np.uint8
    rest = videos.astype(np.float64)
    return np.stack(
        [rest.mean(axis=(1, 2, 3, 4)), rest.std(axis=(1, 2, 3, 4)), rest[:, -1].max(axis=(1, 2, 3))], 1
    )


STAND_INS = Backbones(distance, look, 3, {"lpips": "grey", "fvd": "three numbers"}, {})


@pytest.fixture(scope="module")
def evaluated(agent, demos, tmp_path_factory):
    """A run with stand-ins for the networks of LPIPS and FVD: its folder and its record."""
    out = tmp_path_factory.mktemp("run") / "out"
    told = []
    settings = ImagineSettings((6, 2))
    record = imagine(agent, held_out(demos), out, settings, backbones=STAND_INS, on_part=lambda *p: told.append(p))
    assert len(told) == 3
    assert record == json.loads((out / "world.json").read_text())
    return out, record


def test_every_number_is_that_of_the_frames_it_names(agent, demos, evaluated):
    _, record = evaluated
    images, trajectories = agent.processor.images, held_out(demos)
    assert [clip["id"] for clip in record["episodes"]] == [key.id for key in trajectories.keys]
    features = {kind: [] for kind in ("true", "imagined", "copied", "reconstructed")}
    for place, clip in enumerate(record["episodes"]):
        whole = trajectories.source.read(clip["id"], ("front",))
        start, end = clip["start"], clip["start"] + clip["frames"]
        frames = whole.frames["front"]
        true = frames[start + 1 : end + 1]
        kinds = {
            "imagined": agent.imagine([frames[start]], whole.actions[start:end]),
            "copied": np.repeat(frames[start : start + 1], len(true), axis=0),
            "reconstructed": images.decode(images.encode(frames[start : end + 1]))[1:],
        }
        for kind, made in kinds.items():
            curves = {metric: record["curves"][metric][kind][place] for metric in ("psnr", "ssim", "lpips")}
            assert curves["psnr"] == pytest.approx(
                [psnr(*pair) for pair in zip(made, true, strict=True)], abs=1e-6
            )
            assert curves["ssim"] == pytest.approx(frame_ssim(made, true).tolist(), abs=1e-9)
            plain = 2 / 255 * np.abs(made.astype(np.float64) - true).mean(axis=(1, 2, 3))
            assert curves["lpips"] == pytest.approx(plain.tolist(), rel=1e-4)
        if clip["frames"] == 6:
            for kind, made in {"true": true, **kinds}.items():
                features[kind] += [look(made[None])[0]]
    found = record["horizons"]["6"]["fvd"]
    for kind in ("imagined", "copied", "reconstructed"):
        assert found[kind] == pytest.approx(frechet_distance(features[kind], features["true"]), rel=1e-6)


def test_horizons_say_of_how_many_clips_they_are_and_which_were_too_short(evaluated):
    _, record = evaluated
    lengths = [clip["frames"] for clip in record["episodes"]]
    assert sorted(lengths) in ([2, 2, 6], [2, 6, 6])
    two, six = record["horizons"]["2"], record["horizons"]["6"]
    assert (two["episodes"], six["episodes"]) == (3, lengths.count(6))
    assert len(record["too_short"]["6"]) == lengths.count(2)
    assert record["too_short"]["2"] == []
    values = [np.mean(curve[:2]) for curve in record["curves"]["psnr"]["imagined"]]
    assert two["psnr"]["imagined"]["mean"] == pytest.approx(np.mean(values))
    assert two["psnr"]["imagined"]["low"] <= two["psnr"]["imagined"]["mean"] <= two["psnr"]["imagined"]["high"]
    assert min(values) <= two["psnr"]["imagined"]["low"]
    assert two["fvd"] is None
    assert record["not_computed"]["fvd_2"] == "2 frames; the network needs 3"


def test_the_record_says_what_was_done(evaluated):
    _, record = evaluated
    assert (record["model"], record["split"], record["truth"]) == ("a model", "validation", "camera")
    assert (record["context"], record["control_hz"], record["dropped"]) == (1, 20.0, [])
    assert record["settings"]["backbones"] == {"lpips": "grey", "fvd": "three numbers"}
    assert record["world_prompt"].startswith("Generate the next image")
    assert record["seconds_per_frame"] > 0
    assert {"torch", "torchmetrics", "worldvla-model"} <= record["versions"].keys()


def test_pictures_and_videos_show_every_clip(evaluated):
    out, record = evaluated
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    videos = {clip["videos"] for clip in record["episodes"]}
    assert names == {"world.json", "curves.png", "frames.png"} | videos
    for name in ("curves.png", "frames.png"):
        with Image.open(out / name) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert pixels.std() > 10
    for clip in record["episodes"]:
        with av.open(str(out / clip["videos"])) as video:
            frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
            assert video.streams.video[0].average_rate == 20
        assert len(frames) == clip["frames"]
        assert frames[0].shape[1] >= 2 * SIZE
        assert np.abs(frames[0][-8:, :SIZE].astype(int) - frames[0][-8:, -SIZE:]).mean() > 5  # true and imagined


def test_a_run_can_be_reported(evaluated, tmp_path):
    out, record = evaluated
    page, *pictures = write_report([out], tmp_path / "report")
    assert [picture.name for picture in pictures] == ["world.png"]
    words = re.sub("<[^>]*>", " ", page.read_text("utf-8"))
    for horizon, row in record["horizons"].items():
        table = words[words.index(f"Over {horizon} frames") :]
        found = row["psnr"]["imagined"]
        assert re.search(rf"^\s*clips\s+{row['episodes']}\s", table, re.MULTILINE)
        assert re.search(
            rf"PSNR \[dB\] imagined\s+{found['mean']:.4g}\s+{found['low']:.4g} … {found['high']:.4g}", table
        )
    assert f"FVD imagined  {record['horizons']['6']['fvd']['imagined']:.4g}" in words
    assert page.read_text("utf-8").count("<video ") == len(record["episodes"])


def test_the_command_evaluates_a_token_data_set(agent, tokens, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    arguments = ["imagine", str(tokens), "--out", str(tmp_path / "out"), "--frames", "5", "--start", "1", *MODEL]
    assert cli.main(arguments) == cli.EXIT_OK
    printed = capsys.readouterr().out
    for line in (
        "1 too short for 5 frames: push/demo_1",
        "lpips not computed: no weights: give --lpips-weights FILE, or --fetch-weights",
        "fvd not computed: no weights: give --fvd-weights FILE, or --fetch-weights",
        "reconstructed not computed: the true frames are drawn from codes",
        "PSNR [dB]",
        "s a frame",
    ):
        assert line in printed
    record = json.loads((tmp_path / "out" / "world.json").read_text())
    assert record["curves"]["lpips"] is record["curves"]["psnr"]["reconstructed"] is None
    assert record["horizons"]["5"]["fvd"] is record["horizons"]["5"]["psnr"]["reconstructed"] is None
    assert record["horizons"]["5"]["psnr"]["imagined"]["low"] is None  # of one clip
    assert (record["truth"], record["control_hz"], record["episodes"][0]["start"]) == ("codes", 10.0, 1)
    one = episode(0, 9)
    codes = agent.processor.images.encode(one.frames["front"])[1:7]
    imagined = agent.processor.images.decode(agent.imagine_codes(codes[:1], one.actions[1:6]))
    true = agent.processor.images.decode(codes)
    expected = [min(psnr(*pair), 100) for pair in zip(imagined, true[1:], strict=True)]
    assert record["curves"]["psnr"]["imagined"] == [pytest.approx(expected, abs=1e-6)]
    before = (tmp_path / "out" / "world.json").stat().st_mtime_ns
    assert cli.main(arguments) == cli.EXIT_OK  # there already: it is shown again
    assert (tmp_path / "out" / "world.json").stat().st_mtime_ns == before
    assert cli.main([*arguments, "--seed", "1"]) == cli.EXIT_USAGE
    assert "begun with other settings (seed was 0, now 1); choose another folder" in capsys.readouterr().err


def test_interrupted_it_goes_on_and_nothing_looks_whole(agent, demos, evaluated, tmp_path, monkeypatch):
    out, settings, made = tmp_path / "out", ImagineSettings((6, 2)), []
    usual = imagining._Imagine.__call__

    def imagine_one(self, clip, path):
        if len(made) == 1:
            raise KeyboardInterrupt
        usual(self, clip, path)
        made.append(clip.key.id)

    monkeypatch.setattr(imagining._Imagine, "__call__", imagine_one)
    with pytest.raises(KeyboardInterrupt):
        imagine(agent, held_out(demos), out, settings, backbones=STAND_INS)
    assert [path.name for path in out.iterdir()] == [".work"]
    monkeypatch.setattr(imagining._Imagine, "__call__", usual)
    for picture in ("save_world_panels", "save_strips"):  # half of the time; those of `evaluated` are looked at
        monkeypatch.setattr(imagining, picture, lambda *_, **__: None)
    told = []
    record = imagine(
        agent, held_out(demos), out, settings, backbones=STAND_INS, on_part=lambda n, _: told.append(n)
    )
    assert len(told) == len(set(told)) == 3
    assert record | {"seconds_per_frame": 0} == evaluated[1] | {"seconds_per_frame": 0}
    assert len(list((out / "videos").iterdir())) == 3
    with torch.no_grad():
        weight = agent.model.model.norm.weight
        before = weight.clone()  # to add and take away again would not give it back to the last digit
        weight += 1
        try:
            with pytest.raises(JobError, match="begun with other settings"):
                imagine(agent, held_out(demos), out, settings, backbones=STAND_INS)
        finally:
            weight.copy_(before)


def test_a_folder_is_refused_to_other_frames_under_the_same_names(agent, demos, evaluated):
    settings, (file,) = ImagineSettings((6, 2)), demos.iterdir()
    assert imagine(agent, held_out(demos), evaluated[0], settings, backbones=STAND_INS) == evaluated[1]
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))  # replayed again, say
    try:
        with pytest.raises(JobError, match=r"begun with other settings \(data was .*; choose another folder"):
            imagine(agent, held_out(demos), evaluated[0], settings, backbones=STAND_INS)
    finally:
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_trajectories_that_cannot_be_used_are_named(agent, demos, tmp_path):
    spoiled = [episode(n, 9) for n in range(3)]
    spoiled[1].actions[4, 2] = np.nan
    write_demonstrations(tmp_path / "demos" / "push_demo.hdf5", spoiled)
    (tmp_path / "demos" / "torn_demo.hdf5").write_bytes(b"torn")
    record = imagine(
        agent,
        open_trajectories(tmp_path / "demos", fraction=0.01, seed=1),
        tmp_path / "out",
        ImagineSettings((1,)),
    )
    torn, dropped = record["dropped"]
    assert (torn["id"], torn["reason"]) == ("torn_demo.hdf5", "unreadable file")
    assert (dropped["id"], dropped["reason"]) == ("push_demo/demo_1", "not finite")
    assert len(record["episodes"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no demonstrations: nowhere is no HDF5 file and no folder with one"),
        (["DEMOS", "--frames", "0"], "frames is 0; allowed: 1 and above"),
        (["DEMOS", "--context", "3", "--start", "1"], "start is 1; allowed: 2 and above"),
        (["DEMOS", "--rounds", "0"], "rounds is 0; allowed: 1 and above"),
        (["DEMOS", "--episodes", "0"], "episodes is 0; allowed: 1 and above"),
        (["DEMOS", "--camera", "back"], "no camera 'back'; existing: front"),
        (["DEMOS", "--frames", "50"], "50 frames after step 0 need 51 steps; the longest has"),
        (["DEMOS", "--frames", "2", "--lpips-weights", "gone.pth", *MODEL], "gone.pth"),
    ],
)
def test_usage_errors_are_one_line_and_leave_nothing(arguments, message, demos, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(demos) if word == "DEMOS" else word for word in arguments]
    assert cli.main(["imagine", *arguments, "--train-fraction", "0.01"]) == cli.EXIT_USAGE
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
