import csv
import math

import numpy as np
import pytest
from PIL import Image

from worldvla_libero.training import run_log
from worldvla_libero.training.run_log import RunLog, read_lines


def write(folder, steps, **values):
    log = RunLog(folder)
    for step in steps:
        log.write(step, {"loss": 1 / step, **values})
    return log


def test_every_line_is_on_disk_at_once(tmp_path):
    folder = tmp_path / "runs" / "new"
    log = RunLog(folder)
    assert (folder / "log.jsonl").read_text() == ""
    log.write(1, {"loss": 0.5, "learning_rate": 1e-3})
    assert (folder / "log.jsonl").read_text() == '{"step": 1, "loss": 0.5, "learning_rate": 0.001}\n'
    log.write(2, {"eval_psnr": 20.0})
    assert read_lines(folder / "log.jsonl") == log.rows
    assert log.rows == [{"step": 1, "loss": 0.5, "learning_rate": 1e-3}, {"step": 2, "eval_psnr": 20.0}]


def test_what_is_not_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    log = RunLog(tmp_path)
    log.write(1, {"loss": math.nan, "norm": math.inf, "rate": -math.inf, "kept": 0.0})
    text = (tmp_path / "log.jsonl").read_text()
    assert text == '{"step": 1, "loss": null, "norm": null, "rate": null, "kept": 0.0}\n'
    (row,) = read_lines(tmp_path / "log.jsonl")
    assert row["kept"] == 0
    assert all(math.isnan(row[name]) for name in ("loss", "norm", "rate"))
    log.write(2, {"loss": 1.0, "norm": 2.0})
    log.draw()
    assert (tmp_path / "curves.png").is_file()


def test_a_resumed_run_drops_what_came_after_its_step(tmp_path):
    write(tmp_path, range(1, 8))
    log = RunLog(tmp_path, step=4)
    assert [row["step"] for row in log.rows] == [1, 2, 3, 4]
    assert read_lines(tmp_path / "log.jsonl") == log.rows
    log.write(5, {"loss": 9.0})
    assert read_lines(tmp_path / "log.jsonl") == [*({"step": i, "loss": 1 / i} for i in range(1, 5)), log.rows[-1]]
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_several_rows_of_the_step_that_a_run_goes_on_from_stay(tmp_path):
    log = write(tmp_path, [2])
    log.write(2, {"eval_loss": 0.25})
    assert RunLog(tmp_path, step=2).rows == [{"step": 2, "loss": 0.5}, {"step": 2, "eval_loss": 0.25}]


def test_the_time_that_a_run_took_goes_on_where_it_was(tmp_path):
    log = RunLog(tmp_path)
    assert log.seconds == 0
    log.write(1, {"seconds": 2.5})
    log.write(2, {"eval_loss": 1.0})
    assert log.seconds == 2.5
    assert RunLog(tmp_path, step=2).seconds == 2.5


def test_a_new_run_begins_an_empty_log(tmp_path):
    write(tmp_path, [1, 2])
    assert RunLog(tmp_path).rows == []
    assert (tmp_path / "log.jsonl").read_text() == ""
    assert RunLog(tmp_path / "no log here", step=3).rows == []


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_last_line_that_was_cut_off_is_left_out(tmp_path, cut):
    write(tmp_path, [1, 2, 3])
    path = tmp_path / "log.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert [row["step"] for row in read_lines(path)] == [1, 2]
    log = RunLog(tmp_path, step=3)
    log.write(3, {"loss": 7.0})
    assert [(row["step"], row["loss"]) for row in read_lines(path)] == [(1, 1.0), (2, 0.5), (3, 7.0)]


def test_the_table_has_every_column_that_occurs(tmp_path):
    log = RunLog(tmp_path)
    log.write(1, {"loss": 0.5})
    log.draw()
    log.write(2, {"eval_psnr": 20.0})
    log.write(3, {"loss": math.nan, "learning_rate": 1e-3})
    log.draw()
    with (tmp_path / "log.csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["step", "loss", "eval_psnr", "learning_rate"]
    assert rows == [["1", "0.5", "", ""], ["2", "", "20.0", ""], ["3", "nan", "", "0.001"]]
    with Image.open(tmp_path / "curves.png") as image:
        assert np.asarray(image.convert("RGB")).std() > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.csv", "log.jsonl"]


def test_a_log_without_rows_has_no_picture(tmp_path):
    RunLog(tmp_path).draw()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "log.jsonl"]


def test_a_failure_while_drawing_leaves_the_old_picture(tmp_path, monkeypatch):
    log = write(tmp_path, [1, 2])
    log.draw()
    old = (tmp_path / "curves.png").read_bytes()

    def full(figure, draft, **options):
        draft.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    log.write(3, {"loss": 0.1})
    with pytest.raises(OSError, match="disk full"):
        log.draw()
    assert (tmp_path / run_log.CURVES_FILE).read_bytes() == old
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "log.csv", "log.jsonl"]
