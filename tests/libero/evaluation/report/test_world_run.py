"""World-model runs read from disk: what is refused."""

import math

import pytest
from report_work import world_content, write_world

from worldvla_libero.evaluation.report.world_run import read_world
from worldvla_libero.evaluation.run_files import RunError


def test_a_run_is_read(tmp_path):
    content = world_content(frames=12)
    content["curves"]["psnr"]["copied"][0][0] = math.inf  # two equal frames
    content["curves"]["psnr"]["copied"][1][0] = None
    content["horizons"]["12"]["ssim"]["imagined"] |= {
        "low": None,
        "high": None,
    }  # of one clip no interval is known
    content["horizons"]["12"]["fvd"] = {"imagined": 250.5, "copied": None}
    run = read_world("run", "#0072B2", write_world(tmp_path / "run", content))
    assert run.content == content


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda c: c.pop("curves"), r"world\.json: curves is None; allowed: dict"),
        (lambda c: c["episodes"].pop(), "3 curves of psnr, imagined; 2 episodes"),
        (lambda c: c["episodes"][1].pop("start"), "episode 1 is .*; needed: id, task, start, frames"),
        (lambda c: c["episodes"][1].update(videos="../x.mp4"), r"file '\.\./x\.mp4'"),
        (
            lambda c: c["curves"]["ssim"].update(copied=[[1], [2], "x"]),
            "curves of ssim, copied: a list of numbers",
        ),
        (lambda c: c["curves"].update(psnr=[1]), r"curves of psnr is \[1\]; allowed: an object, or null"),
        (lambda c: c["horizons"].update(ten={}), "horizon 'ten'; allowed: a number of frames"),
        (lambda c: c["horizons"].update({"012": {}}), "horizon '012'; allowed: a number of frames"),
        (lambda c: c["horizons"].update({"12": None}), "horizon '12' is None; allowed: an object"),
        (
            lambda c: c["horizons"]["12"].pop("episodes"),
            "horizon '12': episodes is None; allowed: 0 … 3, the clips",
        ),
        (lambda c: c["horizons"]["12"].update(episodes=True), "horizon '12': episodes is True"),
        (lambda c: c["horizons"]["12"].update(episodes=4), "horizon '12': episodes is 4; allowed: 0 … 3"),
        (
            lambda c: c["horizons"]["12"].update(fvd=[1.0]),
            r"horizon '12', fvd is \[1\.0\]; allowed: an object, or",
        ),
        (lambda c: c["horizons"]["12"]["psnr"].update(copied="high"), "horizon '12', psnr, copied is 'high'"),
        *(
            (
                lambda c, mean=mean: c["horizons"]["12"]["psnr"].update(copied=mean),
                "psnr, copied is {.*; allowed: a n",
            )
            for mean in (
                {"mean": 3.0},
                {"mean": 3.0, "low": 2.0},
                {"mean": 3.0, "low": 2.0, "high": None},
                {"mean": None, "low": 2.0, "high": 4.0},
                {"mean": 3.0, "low": "2", "high": 4.0},
            )
        ),
        (
            lambda c: c["episodes"][1].update(videos=["a.mp4"]),
            r"videos of episode 1 is \['a\.mp4'\]; allowed: a file",
        ),
        (lambda c: c.update(truth=None), "truth is None; allowed: str"),
        (lambda c: c.update(control_hz="20"), r"control_hz is '20'; allowed: int \| float"),
        (
            lambda c: c["settings"].update(backbones=["alex"]),
            r"backbones is \['alex'\]; allowed: an object, or null",
        ),
    ],
)
def test_a_damaged_run_is_refused(tmp_path, spoil, message):
    content = world_content(episodes=3, frames=12)
    spoil(content)
    with pytest.raises(RunError, match=message):
        read_world("run", "#0072B2", write_world(tmp_path / "run", content, videos=False))
