"""Runs the scripts in benchmarks/ at their smallest sizes: that they run, and what they claim apart from speed."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from worldvla_libero.hdf5 import HDF5Source

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DRAFTS = ["undrafted", *(f"draft right for {share} %" for share in (0, 50, 80, 95))]
DEMOS = Path(__file__).parent / "fixtures" / "demos" / "libero_object"


def run(script: str, *options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *(options or ("--quick",))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def rows(output: str, name: str) -> list[list[str]]:
    """Cells of the rows of that name, without the name."""
    found = re.findall(rf"^ *{re.escape(name)}  +(.*)$", output, re.MULTILINE)
    return [re.split(r"  +", cells.strip()) for cells in found]


@pytest.fixture
def data_pipeline(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)  # as for a script that is run from there
    yield importlib.import_module("data_pipeline")
    for name in ("data_pipeline", "common"):
        sys.modules.pop(name, None)


def test_page_names_every_script():
    page = (BENCHMARKS / "README.md").read_text()
    scripts = {path.name for path in BENCHMARKS.glob("*.py")} - {"common.py"}
    assert set(re.findall(r"^## (\w+\.py)$", page, re.MULTILINE)) == scripts
    assert set(re.findall(r"python benchmarks/(\w+\.py)", page)) == scripts


def test_encodings_of_the_published_procedure(data_pipeline):
    lengths = [key.steps for key in HDF5Source(DEMOS).list()[0]]

    def times(kinds):
        return sum(data_pipeline.encodings(kind, T) for kind in kinds for T in lengths) / sum(lengths)

    for kinds, formula, slope, offset in (
        (data_pipeline.MIX, "4T - 11", 4, 11),
        (data_pipeline.TABLE_3, "6T - 12", 6, 12),
        ([*data_pipeline.TABLE_5, data_pipeline.WORLD], "16T - 44", 16, 44),
    ):
        assert data_pipeline.formula(kinds) == formula
        assert times(kinds) == pytest.approx(slope - offset * len(lengths) / sum(lengths))
    # A frame stands in four samples of the released mix, but for those at the ends: four times is its limit.
    assert 3.8 < times(data_pipeline.MIX) < 4
    assert times(data_pipeline.TABLE_3) > 4


@pytest.mark.slow
def test_logits_of_supervised_positions_take_less_memory_and_give_the_same_losses():
    output = run("logits_memory.py")
    assert "4 samples, 2,480 positions, 646 of them supervised (26 %)" in output
    (whole,) = rows(output, "all positions")
    found = [rows(output, name)[0] for name in ("supervised positions", "… in chunks of 256")]
    for _, share, error, needed, reached in found:
        assert float(share.split()[0]) <= 30  # issue: at most 30 % of all logits
        assert float(error) < 1e-5
        assert (needed, reached) == ("30 %", "yes")
    assert int(found[1][0].replace(",", "")) < int(found[0][0].replace(",", "")) < int(whole[0].replace(",", ""))
    (off,) = re.findall(r"Losses of all 6 steps differ by (\S+) of the loss at most", output)
    assert float(off) < 1e-5
    assert rows(output, "Trainer, all logits")[0][1] == "1.00x"
    assert len(rows(output, "WorldVLATrainer")) == 1


@pytest.mark.campaign
def test_data_pipeline():
    output = run("data_pipeline.py")
    assert re.search(r"All \d+ samples of both sides are equal\.", output)
    assert "50 of each are read back and are equal" in output
    (measured,) = rows(output, "frames encoded, Table 3 (all three sets)")
    assert measured[:2] == ["432", "80"]
    assert measured[-1] == "yes"
    (counted,) = rows(output, "Table 3: action M=2 K=1 and 5, world")
    assert counted[0] == "6T - 12"
    assert counted[-1] == "yes"
    (size,) = rows(output, "bytes of a sample")
    assert float(size[2].rstrip("x")) >= 15
    assert size[-1] == "yes"
    for what in ("prepare", "open, draw"):  # the last table: memory at the largest size against the smallest
        assert rows(output, what)[-1][-1] == "yes", rows(output, what)


@pytest.mark.campaign
def test_decoding():
    output = run("decoding.py")
    assert output.count("ids of all 2 runs are equal.") == 4  # two chunks, frames, real frames
    for actions, name in ((5, 46), (10, 91)):
        assert [row[0] for row in rows(output, "published")][actions // 10] == f"{name}"
    assert [row[0] for row in rows(output, "ours")] == ["7", "7"]
    assert rows(output, "careful")[-1][0] == "277"
    assert len(rows(output, "lookup")) == 3  # the other peer, `static`, waits for a compiler
    assert "no row `static`" in output
    passes = [int(row[0]) for name in DRAFTS for row in rows(output, name)]
    assert passes[0] == 256
    for found, base, fewer in zip(passes[1:], [256] * 4, (1.0, 1.8, 4.0, 10.0), strict=True):
        assert base / found >= fewer
    assert rows(output, "chunk of 10")[0][0] == "7"
    assert re.search(r"codes that stay in the next frame: [\d.]+ % of the camera's", output)


@pytest.mark.campaign
def test_replay_workers():
    output = run("replay_workers.py")
    assert "The outputs of all 2 runs are equal, byte by byte." in output
    assert "Replay of 3 episodes, 312 frames" in output
    assert rows(output, "at full speed")[0][1] == "1.7x"
    assert len(rows(output, "all in")) == 1
