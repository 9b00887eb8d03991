"""Curves of world models: what is drawn is the mean of the clips, and its interval."""

import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from report_work import world_content

from worldvla_libero.evaluation.report.world_page import mean_curve, save_world_panels, world_panels
from worldvla_libero.evaluation.report.world_run import WorldRun
from worldvla_libero.evaluation.world.metrics import mean_interval
from worldvla_libero.pages.panels import COLOURS


def run_of(content, place=0):
    return WorldRun(f"run {place}, $x^2$", COLOURS[place], Path("run"), content)


@pytest.fixture
def content():
    """Four clips; one shorter than the others, one with a frame equal to the true one."""
    made = world_content(episodes=4, frames=6)
    del made["curves"]["psnr"]["imagined"][1][4:]
    made["curves"]["psnr"]["imagined"][2][0] = math.inf
    return made


def test_a_curve_is_the_mean_of_the_clips_that_go_so_far_and_its_interval(content):
    mean, low, high = mean_curve(run_of(content), "psnr", "imagined", intervals=True)
    curves = content["curves"]["psnr"]["imagined"]
    for t, clips in ((0, (0, 1, 3)), (2, (0, 1, 2, 3)), (5, (0, 2, 3))):
        expected = mean_interval([curves[clip][t] for clip in clips], resamples=1000)
        assert (mean[t], low[t], high[t]) == pytest.approx(expected)
        assert low[t] < mean[t] < high[t]
    without = mean_curve(run_of(content), "psnr", "imagined")
    np.testing.assert_array_equal(without[0], mean)
    assert np.isnan(without[1:]).all()
    assert mean_curve(run_of(content), "lpips", "imagined").shape == (3, 0)


def test_the_figure_draws_these_curves(content):
    run = run_of(content)
    assert [panel.title for panel in world_panels([run])] == [
        "PSNR [dB], higher is better",
        "SSIM, higher is better",
    ]
    axes = Figure().add_subplot()
    world_panels([run])[0].draw(axes)
    for line, kind, style in zip(
        axes.lines, ("imagined", "copied", "reconstructed"), ("-", "--", ":"), strict=True
    ):
        np.testing.assert_array_equal(line.get_xdata(), range(1, 7))
        np.testing.assert_allclose(line.get_ydata(), mean_curve(run, "psnr", kind)[0])
        assert line.get_linestyle() == style
    band = axes.collections[0].get_paths()[0].vertices
    _, low, high = mean_curve(run, "psnr", "imagined", intervals=True)
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((low.min(), high.max()))
    assert all("95 % interval of the mean" in panel.notes[0] for panel in world_panels([run]))


def test_a_metric_that_no_run_has_is_not_drawn_and_one_that_some_lack_says_so(content):
    runs = [run_of(content), run_of(world_content(episodes=2, frames=6, lpips=True), 1)]
    lpips = world_panels(runs)[2]
    assert lpips.notes[1:] == ["run 0, $x^2$: not computed"]
    for run in runs:
        run.content["curves"].clear()
    assert world_panels(runs) == []


def test_the_picture_has_a_panel_for_each_metric_and_tells_what_the_band_is(content, tmp_path):
    run = run_of(content)
    panels = world_panels([run])
    save_world_panels(tmp_path / "one.png", [run], panels[:1])
    save_world_panels(tmp_path / "two.png", [run], panels)
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.size[0] > 1.5 * one.size[0]
        assert two.size[1] == one.size[1]
        pixels = np.asarray(two.convert("RGB"))
    assert pixels[-40:, pixels.shape[1] // 2 :].min() < 200  # the words at the bottom
    wanted = [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    assert (np.abs(pixels.astype(int) - wanted).max(axis=-1) < 12).sum() > 500
