"""The paper's numbers, as they were printed."""

import re
from pathlib import Path

import pytest

from worldvla_libero.evaluation.published_results import IMAGINATION, SUCCESS, SUITES


def test_averages_are_those_of_the_suites():
    assert [row.model for row in SUCCESS] == ["WorldVLA 512", "WorldVLA 256", "OpenVLA"]
    for row in SUCCESS:
        assert list(row.rates) == list(SUITES)
        assert sum(row.rates.values()) / 4 == pytest.approx(row.average, abs=0.0006)  # printed to 0.1 %


def test_success_is_that_of_table_2():
    found = {row.model: [*row.rates.values(), row.average] for row in SUCCESS}
    printed = {
        "WorldVLA 512": (87.6, 96.2, 83.4, 60.0, 81.8),
        "WorldVLA 256": (85.6, 89.0, 82.6, 59.0, 79.1),
        "OpenVLA": (84.7, 88.4, 79.2, 53.7, 76.5),
    }
    assert found == {model: pytest.approx([rate / 100 for rate in rates]) for model, rates in printed.items()}
    assert SUITES == ("libero_spatial", "libero_object", "libero_goal", "libero_10")


# FVD, PSNR, SSIM and LPIPS, the last two as per cent.
TABLE_4 = {
    ("world model", 10): (250.0, 29.62, 90.73, 11.97),
    ("action world model", 10): (255.1, 29.77, 90.40, 11.94),
    ("world model", 50): (718.6, 23.98, 83.41, 15.60),
    ("action world model", 50): (674.1, 24.30, 83.55, 15.44),
}


def test_imagination_is_that_of_table_4():
    found = {(row.model, frames): metrics for row in IMAGINATION for frames, metrics in row.metrics.items()}
    assert found.keys() == TABLE_4.keys()
    for key, (fvd, psnr, ssim, lpips) in TABLE_4.items():
        expected = {"fvd": fvd, "psnr": psnr, "ssim": ssim / 100, "lpips": lpips / 100}
        assert dict(found[key]) == pytest.approx(expected)


def test_the_docs_print_the_same_table():
    words = Path(__file__).parents[3].joinpath("docs/world-model.md").read_text("utf-8")
    rows = re.findall(r"^\| ([a-z ]+ model), (\d+) frames \| (.+) \|$", words, re.MULTILINE)
    found = {(model, int(frames)): tuple(map(float, cells.split(" | "))) for model, frames, cells in rows}
    assert found == TABLE_4
