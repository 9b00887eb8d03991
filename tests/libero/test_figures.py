import numpy as np
import pytest
from PIL import Image

from worldvla_libero.figures import ImaginedFrame, save_curves, save_demo_figure, save_strips, side_by_side


def _ramp(i: int, height: int = 64, width: int = 96) -> np.ndarray:
    frame = np.zeros((height, width, 3), np.uint8)
    frame[:, :, 0] = np.linspace(0, 255, width)
    frame[:, :, 1] = 40 * i
    return frame


def test_images_stand_side_by_side_at_one_height():
    canvas = side_by_side({"left": _ramp(0, 64, 64), "right": _ramp(5, 32, 32)}, gap=4, strip=20)
    assert canvas.shape == (84, 132, 3)
    np.testing.assert_array_equal(canvas[20:, :64], _ramp(0, 64, 64))
    np.testing.assert_array_equal(canvas[20:, 68:], _ramp(5, 32, 32).repeat(2, 0).repeat(2, 1))
    assert canvas[:20].min() < 100  # the names


def _columns(count: int) -> list[ImaginedFrame]:
    return [
        ImaginedFrame(i + 1, _ramp(i, 64, 64), _ramp(i, 32, 32), _ramp(5 - i, 32, 32), 20.0 + i)
        for i in range(count)
    ]


@pytest.mark.parametrize("count", [1, 6])
def test_figure_is_written_whole(tmp_path, count):
    path = tmp_path / "new" / "demo.png"
    save_demo_figure(
        path,
        title="“a task”",
        subtitle="a model. " * 20,
        frames=_columns(count),
        actions=np.random.default_rng(0).uniform(-1, 1, (10, 7)),
        query_steps=(0, 5),
        control_hz=20,
    )
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        assert min(image.size) > 300
    assert [file.name for file in path.parent.iterdir()] == ["demo.png"]


def test_a_figure_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="0 frames and 10 actions"):
        save_demo_figure(
            tmp_path / "f.png",
            title="",
            subtitle="",
            frames=[],
            actions=np.zeros((10, 7)),
            query_steps=(),
            control_hz=20,
        )


def _pixels(path):
    """A PNG that is whole, alone in its folder and not blank."""
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB"))
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert pixels.std() > 1
    return pixels


def test_curves_are_drawn_in_a_panel_for_each_family(tmp_path):
    rows = [{"step": i, "loss_l1": 1 / i, "learning_rate": 1e-3, "seconds": 2.0 * i} for i in range(1, 40)]
    rows += [{"step": i, "eval_loss_l1": 1.1 / i, "eval_psnr": 10.0 + i} for i in (20, 40)]
    save_curves(tmp_path / "new" / "curves.png", rows)
    three = _pixels(tmp_path / "new" / "curves.png")
    save_curves(tmp_path / "one" / "curves.png", [{"step": 1, "loss": 0.5}])
    one = _pixels(tmp_path / "one" / "curves.png")
    assert three.shape[1] > 2 * one.shape[1]  # loss, learning rate and PSNR, but no seconds
    assert three.shape[0] == one.shape[0]


def test_held_out_values_are_drawn_beside_those_of_training(tmp_path):
    rows = [{"step": i, "loss": 1 / i} for i in range(1, 9)]
    drawn = []
    for place, extra in enumerate(([], [{"step": i, "eval_loss": 0.5} for i in (2, 8)])):
        path = tmp_path / str(place) / "curves.png"
        save_curves(path, [*rows, *extra])
        drawn.append(_pixels(path))
    assert drawn[0].shape == drawn[1].shape  # in the same panel
    assert (drawn[0] != drawn[1]).any()


def test_values_that_are_not_numbers_leave_gaps_and_absent_ones_are_bridged(tmp_path):
    drawn = []
    for place, odd in enumerate((np.nan, np.inf, None, 0.75)):
        rows = [{"step": i, "loss": value} for i, value in enumerate((1.0, odd, 0.5, odd, 0.25))]
        path = tmp_path / str(place) / "curves.png"
        save_curves(path, rows)
        drawn.append(_pixels(path))
    gap, infinite, bridged, whole = drawn
    assert (infinite == gap).all()
    assert (bridged != gap).any()
    assert (bridged != whole).any()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows to draw; at least one needed"),
        ([{"step": 1, "seconds": 2.0}, {"step": 2, "epoch": 0.1}], "rows hold step, seconds, epoch alone"),
    ],
)
def test_curves_of_nothing_are_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        save_curves(tmp_path / "curves.png", rows)
    assert list(tmp_path.iterdir()) == []


def test_strips_show_every_row_of_frames(tmp_path):
    true, drawn = [_ramp(i) for i in range(4)], [_ramp(5 - i) for i in range(3)]  # one is not drawn
    strips = [{"true": true, "drawn": drawn}, {"later": true}]
    sizes = []
    for count in (1, 2):
        path = tmp_path / str(count) / "strips.png"
        save_strips(path, strips[:count], title="after 3 steps")
        pixels = _pixels(path)
        sizes.append(pixels.shape)
        assert (pixels == [0, 120, 0]).all(axis=-1).sum() > 100  # the left edge of true[3]
    assert sizes[0][1] == sizes[1][1]
    assert sizes[0][0] < sizes[1][0]


@pytest.mark.parametrize("strips", [[], [{}], [{"true": [], "drawn": []}]])
def test_strips_of_nothing_are_refused(tmp_path, strips):
    with pytest.raises(ValueError, match="no frames to draw; at least one needed"):
        save_strips(tmp_path / "strips.png", strips)
    assert list(tmp_path.iterdir()) == []


def test_dollars_in_names_stay_dollars(tmp_path):
    sizes = []
    for place, title in enumerate(("a $x^2$ model", "a €x^2€ model")):
        path = tmp_path / str(place) / "strips.png"
        save_strips(path, [{f"{title}'s": [_ramp(0)] * 4}], title=title)
        sizes.append((_pixels(path) < 100).all(axis=-1).sum())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)  # as much ink; as a formula it would be less
    save_strips(tmp_path / "2" / "strips.png", [{"true": [_ramp(0)]}], title="$\\frac{$")  # no formula at all
    save_curves(tmp_path / "3" / "curves.png", [{"step": 1, "$\\frac{$": 0.5}])
