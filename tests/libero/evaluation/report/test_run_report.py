"""The page of runs: its numbers, what it embeds and links, what it refuses, and how it looks in a browser."""

import base64
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from page_work import cells_of, parse_page, section_of, words_of
from PIL import Image
from report_work import (
    LIMITS,
    episode_line,
    evaluation_lines,
    world_content,
    write_evaluation,
    write_world,
)

from worldvla_libero.cli import main as cli
from worldvla_libero.evaluation.published_results import IMAGINATION, SUCCESS
from worldvla_libero.evaluation.report import write_report
from worldvla_libero.evaluation.run_files import RunError
from worldvla_libero.pages.panels import COLOURS

HOSTILE = "<script>alert(\"1\")</script> & 'it' </td> $name {name} $x^2$"
FOUR = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@pytest.fixture(scope="module")
def lines():
    """Of a run with pictures and videos, and of one without that was interrupted."""
    first = evaluation_lines(("libero_goal", "libero_object"), tasks=2, episodes=6, skill=0.6, error_at=(1, 2))
    return first, evaluation_lines(("libero_goal",), tasks=2, episodes=5, skill=0.3, seed=3, media=False)


@pytest.fixture(scope="module")
def runs(lines, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    first = write_evaluation(root / "ours at 5", lines[0], warnings=["mujoco 3.17.0; published with 3.2.7"])
    return [first, write_evaluation(root / "random", lines[1], finished=False)]


@pytest.fixture(scope="module")
def out(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    write_report(runs, folder, videos=3)
    return folder


@pytest.fixture
def page(out):
    return parse_page((out / "index.html").read_text("utf-8"))


def table_of(page, anchor, number=0):
    """Cells below the head of a section's table."""
    table = list(section_of(page, anchor).iter("table"))[number]
    return {row[0].split("\n")[0]: row[1:] for row in cells_of(table)[1:]}


def wilson(successes, n, z=1.959963984540054):
    """The interval, as the roots of (p - k/n)² = z² p (1 - p) / n."""
    a, b, c = 1 + z * z / n, -(2 * successes / n + z * z / n), (successes / n) ** 2
    root = math.sqrt(b * b - 4 * a * c)
    return (-b - root) / (2 * a), (-b + root) / (2 * a)


def told(lines, suite=None, task=None):
    """What a table says of a rate."""
    outcomes = [e["outcome"] for e in lines if suite in (None, e["suite"]) and task in (None, e["task"])]
    if not outcomes:
        return "\N{EN DASH}"
    k, errors = outcomes.count("success"), outcomes.count("error")
    n = len(outcomes) - errors
    low, high = wilson(k, n)
    words = f"{100 * k / n:.1f}\xa0%\n{k}/{n}, {100 * low:.1f} … {100 * high:.1f}\xa0%"
    return words + (f"\n{errors} error{'s' * (errors > 1)}" if errors else "")


def test_success_is_that_of_the_lines_beside_the_papers(page, lines):
    found = table_of(page, "success")
    for suite in ("libero_object", "libero_goal"):
        published = [f"{100 * row.rates[suite]:.1f}\xa0%" for row in SUCCESS]
        assert found[suite] == [*(told(run, suite) for run in lines), *published]
    # The paper averages over four suites: its numbers do not stand beside two.
    assert found["all suites"] == [*(told(run) for run in lines), *["\N{EN DASH}"] * 3]
    cards = [words_of(card) for card in page.iter("article")]
    for card, run in zip(cards, lines, strict=True):
        assert told(run).split("\n")[0] in card


def test_tasks_and_steps_are_those_of_the_lines(page, lines):
    successes, steps = table_of(page, "tasks"), table_of(page, "tasks", 1)
    keys = [(suite, task) for suite in ("libero_object", "libero_goal") for task in (0, 1)]
    tables = list(section_of(page, "tasks").iter("table"))
    assert [len(list(table.find("tbody"))) for table in tables] == [len(keys)] * 2
    instructions = [line["instruction"] for line in lines[0][:12:6]]
    assert list(successes) == list(steps) == instructions  # of the two suites: later rows have the same words
    for instruction, (suite, task) in zip(instructions, keys[2:], strict=True):
        assert successes[instruction] == [told(run, suite, task) for run in lines]
        for cell, run in zip(steps[instruction], lines, strict=True):
            solved = [e["steps"] for e in run if (e["suite"], e["task"], e["outcome"]) == (suite, task, "success")]
            if solved:
                low, median, high = np.quantile(solved, (0.25, 0.5, 0.75))
                assert cell == f"{median:g}\n{low:g} … {high:g}, from {min(solved)} to {max(solved)}"
            else:
                assert cell == "\N{EN DASH}"


def test_latency_is_that_of_all_queries(page, lines):
    found = table_of(page, "latency")
    for column, run in enumerate(lines):
        times = [seconds for line in run for seconds in line["query_seconds"]]
        for share in (50, 90, 99):
            assert found[f"query, p{share}"][column] == f"{1e3 * np.percentile(times, share):.0f} ms"
        assert found["queries"][column] == f"{sum(line['queries'] for line in run):,}"
        assert found["episode, mean"][column] == f"{np.mean([line['seconds'] for line in run]):.2f} s"


def test_runs_are_compared_episode_by_episode(page, lines):
    outcomes = [{(e["suite"], e["task"], e["episode"]): e["outcome"] for e in run} for run in lines]
    pairs = [
        (outcomes[0][key] == "success", outcome == "success")
        for key, outcome in outcomes[1].items()
        if outcomes[0].get(key, "error") != "error"
    ]
    expected = [len(pairs), *(pairs.count(p) for p in ((1, 1), (1, 0), (0, 1), (0, 0)))]
    assert table_of(page, "success", 1)["random"] == [str(n) for n in expected]


def test_episodes_that_began_otherwise_are_in_no_pair(tmp_path):
    first = [episode_line("libero_goal", 0, episode, "success") for episode in range(4)]
    other = [line | {"outcome": "failure"} for line in first]
    other[1] |= {"initial_state": 7}
    other[3] |= {"seed": 1003}
    runs = [write_evaluation(tmp_path / name, lines) for name, lines in (("a", first), ("b", other))]
    write_report(runs, tmp_path / "out", videos=0)
    page = parse_page((tmp_path / "out" / "index.html").read_text("utf-8"))
    assert table_of(page, "success", 1)["b"] == ["2\n2 began otherwise", "0", "2", "0", "0"]
    assert [words_of(note) for note in page.find(".//header").iter("li")] == [
        "2 of 4 episodes that b shares with a began from another initial state or with another seed; "
        "they are in no pair."
    ]


def test_errors_come_first_and_apart(page, lines):
    assert page.find(".//section").get("id") == "errors"
    words = words_of(section_of(page, "errors"))
    assert "2 episodes ended in an error." in words
    assert "ValueError: actions hold NaN" in words
    assert "libero_goal/1 episode 2, libero_object/1 episode 2" in words
    assert lines[0][0]["error"] is None
    assert words_of(section_of(page, "errors").find(".//pre")).startswith("Traceback")


def test_what_to_beware_of_is_on_top(page):
    notes = [words_of(note) for note in page.find(".//header").iter("li")]
    assert notes[0] == "ours at 5: mujoco 3.17.0; published with 3.2.7"
    assert "random was interrupted or is still running: it has no eval_info.json." in notes[1]
    assert "those of the 10 episodes recorded so far" in notes[1]
    assert "of 24, ours at 5 24, random 10" in notes[2]
    assert len(notes) == 3


def test_every_failure_has_its_last_frame(page, lines, runs):
    sheets = [s for s in section_of(page, "where-it-fails").iter("div") if s.get("class") == "sheet"]
    failed = [line for run in lines for line in run if line["outcome"] == "failure"]
    assert sum(len(sheet) for sheet in sheets) == len(failed)
    pictures = [image for sheet in sheets for image in sheet.iter("img")]
    assert len(pictures) == sum(line["last_frame"] is not None for line in failed)
    shown = Image.open(io.BytesIO(base64.b64decode(pictures[0].get("src").split(",")[1])))
    line = next(e for e in lines[0] if e["suite"] == "libero_object" and e["outcome"] == "failure")
    true = Image.open(runs[0] / line["last_frame"]).resize(shown.size)
    assert np.abs(np.asarray(shown, float) - np.asarray(true, float)).mean() < 4
    assert line["instruction"] in pictures[0].get("alt")
    assert "no picture was kept" in words_of(section_of(page, "where-it-fails"))


def test_so_many_videos_are_embedded_and_the_others_linked(page, lines, runs, out):
    embedded = [v.get("src").split(",")[1] for v in section_of(page, "videos").iter("video")]
    assert len(embedded) == 3
    files = {base64.b64encode((runs[0] / line["video"]).read_bytes()).decode() for line in lines[0]}
    assert set(embedded) <= files
    outcomes = re.findall(r"(failure|success|error) after", words_of(section_of(page, "videos")))
    assert outcomes == ["failure", "success", "failure"]
    assert "3 of 24 recorded episodes are embedded" in words_of(section_of(page, "videos"))
    links = [a.get("href") for a in section_of(page, "episodes").iter("a")]
    assert len(links) == 2 * len(lines[0])
    assert all((out / unquote(link)).resolve().is_file() for link in links)


def test_every_episode_is_listed(page, lines):
    words = words_of(section_of(page, "episodes"))
    for run in lines:
        for line in run:
            assert f"{line['outcome']} after {line['steps']} steps" in words
    assert words.count("2 attempts") == 2


def test_the_page_needs_nothing_but_itself(page, out):
    for element in page.iter():
        assert element.tag not in ("script", "link", "iframe")
        assert not any(name.startswith("on") for name in element.attrib)
        source, link = element.get("src"), element.get("href")
        assert source is None or source.startswith("data:")
        assert link is None or link.startswith("#") or (out / unquote(link)).is_file()
        if element.tag == "img":
            assert element.get("alt")
    style = words_of(page.find(".//style"))
    assert "url(" not in style
    assert "@import" not in style


def test_pictures_lie_beside_the_page(page, out):
    names = {"failures.png", "latency.png", "success.png", "tasks.png"}
    assert {file.name for file in out.iterdir()} == names | {"index.html"}
    assert {a.get("href") for a in page.find(".//header/p").iter("a")} == names
    for name in names:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 300
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 20


def test_equal_runs_give_equal_bytes(runs, out, tmp_path):
    again = out.parent / "again"
    write_report(runs, again, videos=3)
    try:
        assert (again / "index.html").read_bytes() == (out / "index.html").read_bytes()
    finally:
        shutil.rmtree(again)


def test_hostile_words_stay_words(tmp_path):
    error = {"origin": HOSTILE, "type": HOSTILE, "message": HOSTILE, "traceback": HOSTILE}
    hostile = {"instruction": HOSTILE, "protocol": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    made = [
        episode_line(HOSTILE, 0, 0, "failure", last_frame="frames/a b'#?<i>.png", video="a:b.mp4", **hostile),
        episode_line(HOSTILE, 0, 1, "error", **hostile | {"error": error}),
        episode_line(HOSTILE, 0, 2, "success", **hostile),
    ]
    run = write_evaluation(tmp_path / "<b>run", made, policy=HOSTILE, warnings=[HOSTILE], protocol={"n": HOSTILE})
    content = world_content(episodes=1, frames=3)
    content["model"] = content["not_computed"]["fvd"] = content["episodes"][0]["task"] = HOSTILE
    world = write_world(tmp_path / "world", content)
    write_report([run, world], tmp_path / "out", videos=0)
    page = parse_page((tmp_path / "out" / "index.html").read_text("utf-8"))
    assert not list(page.iter("script"))
    assert not list(page.iter("b")) or all("run" not in words_of(b) for b in page.iter("b"))
    assert words_of(page.find(".//h1")) == "<b>run · world"
    assert words_of(page).count(HOSTILE) > 12
    links = [a.get("href") for a in section_of(page, "episodes").iter("a")]
    assert len(links) == 2
    assert all((tmp_path / "out" / unquote(link)).is_file() for link in links)


def test_four_suites_stand_beside_the_papers_average(tmp_path):
    made = [episode_line(suite, 0, 0, "success") for suite in FOUR]
    write_report([write_evaluation(tmp_path / "run", made)], tmp_path / "out", videos=0)
    page = parse_page((tmp_path / "out" / "index.html").read_text("utf-8"))
    rows = table_of(page, "success")
    assert list(rows) == [*FOUR, "all suites"]
    assert rows["all suites"][1:] == [f"{100 * row.average:.1f}\xa0%" for row in SUCCESS]
    assert "run: 1 of the suite's 10 tasks" in words_of(section_of(page, "success"))
    assert "No episode ended at the step limit." in words_of(section_of(page, "where-it-fails"))


def test_runs_under_other_conditions_are_told_apart(tmp_path):
    versions = {"mujoco": "3.17.0", "robosuite": "1.4.0"}
    made = [episode_line("libero_goal", 0, 0, "success"), episode_line("libero_goal", 0, 0, "error")]
    made[1] |= {"protocol": "lerobot", "max_steps": 350, "versions": versions}
    runs = [write_evaluation(tmp_path / name / "run", [line]) for name, line in zip("ab", made, strict=True)]
    info = json.loads((runs[1] / "eval_info.json").read_text())
    info["protocol"] |= {"name": "lerobot", "control_hz": 10, "episodes_per_task": 10, "wait_steps": 10}
    info["published_instructions"] = True
    (runs[1] / "eval_info.json").write_text(json.dumps(info))
    info = json.loads((runs[0] / "eval_info.json").read_text())
    info["settings"] = {"published_instructions": False}
    (runs[0] / "eval_info.json").write_text(json.dumps(info))
    write_report(runs, tmp_path / "out", videos=0)
    page = parse_page((tmp_path / "out" / "index.html").read_text("utf-8"))
    assert words_of(page.find(".//h1")) == "a/run · b/run"
    notes = [words_of(note) for note in page.find(".//header").iter("li")]
    assert notes == [
        "Not all runs have the same protocol: openvla in a/run; lerobot in b/run.",
        f"Not all runs have the same step limit of libero_goal: {LIMITS['libero_goal']} in a/run; 350 in b/run.",
        "Not all runs have the same mujoco: 3.2.7 in a/run; 3.17.0 in b/run.",
        "Not all runs have the same control_hz: 20 in a/run; 10 in b/run.",
        "Not all runs have the same published_instructions: False in a/run; True in b/run.",
    ]
    assert "b/run: step limit 350; published with 300" in words_of(section_of(page, "success"))
    assert table_of(page, "success")["libero_goal"][1].startswith("\N{EN DASH}")  # errors alone are no rate


def test_world_models_are_shown_over_their_horizon(tmp_path):
    first, second = world_content(episodes=3, frames=12), world_content(episodes=3, frames=12, seed=1, lpips=True)
    first["curves"]["psnr"]["copied"][0][0] = math.inf  # equal frames
    runs = [write_world(tmp_path / "a", first), write_world(tmp_path / "b", second)]
    write_report(runs, tmp_path / "out", videos=2)
    page = parse_page((tmp_path / "out" / "index.html").read_text("utf-8"))
    section = section_of(page, "world-model")
    steps = table_of(page, "world-model")
    assert len(steps) == 12
    expected = [np.mean([curve[t] for curve in first["curves"]["psnr"]["imagined"]]) for t in range(12)]
    assert [float(steps[str(t + 1)][0]) for t in range(12)] == pytest.approx(expected, rel=1e-3)
    finite = np.mean([curve[0] for curve in first["curves"]["psnr"]["copied"][1:]])
    assert float(steps["1"][1]) == pytest.approx(finite, rel=1e-3)
    horizon = table_of(page, "world-model", 1)
    mean = first["horizons"]["10"]["psnr"]["imagined"]
    assert horizon["PSNR [dB] imagined"][0] == f"{mean['mean']:.4g}\n{mean['low']:.4g} … {mean['high']:.4g}"
    assert horizon["clips"] == ["3", "3", "not stated", "not stated"]
    assert horizon["PSNR [dB] imagined"][2:] == [f"{row.metrics[10]['psnr']:.4g}" for row in IMAGINATION]
    assert horizon["FVD imagined"][:2] == ["not computed"] * 2
    assert horizon["LPIPS copied"][0] == "not computed"
    assert "no weights: name a file with --lpips-weights" in words_of(section)
    assert [len(list(panel.iter("img"))) for panel in section.iter("figure")] == [1, 1, 1]
    videos = section_of(page, "imagined-videos")
    assert len(list(videos.iter("video"))) == 4
    assert [words_of(a) for a in videos.iter("a")] == ["goal_demo/demo_2"] * 2
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["index.html", "world.png"]


def test_world_models_that_do_not_compare_are_told_apart(tmp_path):
    first = world_content(episodes=4, frames=12, lpips=True)
    second = world_content(episodes=3, frames=12, lpips=True, truth="codes", context=2, rounds=3, image_size=512)
    second["settings"] |= {"clips": "8e" * 32, "backbones": {"lpips": {"network": "vgg", "weights": "39" * 32}}}
    second |= {"split": "validation_unseen", "world_prompt": "What comes next?"}
    runs = [write_world(tmp_path / name, content) for name, content in (("a", first), ("b", second))]
    write_report(runs, tmp_path / "out", videos=0)
    page = parse_page((tmp_path / "out" / "index.html").read_text("utf-8"))
    code_note, *notes = [words_of(note) for note in page.find(".//header").iter("li")]
    assert code_note.startswith("b: its true frames are drawn from codes")
    assert [note.removeprefix("Not all runs have the same ") for note in notes] == [
        "split: validation in a; validation_unseen in b.",
        "truth (what the true frames are): camera in a; codes in b.",
        "image size: 256 in a; 512 in b.",
        "context (true frames shown): 1 in a; 2 in b.",
        "rounds (frames of one prompt): 1 in a; 3 in b.",
        f"world prompt: {first['world_prompt']} in a; What comes next? in b.",
        "clips, by their digest: 7d7d7d7d in a; 8e8e8e8e in b.",
        f"network of LPIPS: alex, {('7b' * 14)[:27]} in a; vgg, {('39' * 14)[:27]} in b.",
        "number of clips over 10 frames: 4 in a; 3 in b.",
        "number of clips over 12 frames: 4 in a; 3 in b.",
    ]
    words = words_of(section_of(page, "world-model"))
    assert "Not to be compared with b, whose true frames are drawn from codes" in words
    write_report(runs[1:], tmp_path / "out", videos=0)
    page = parse_page((tmp_path / "out" / "index.html").read_text("utf-8"))
    assert "Table 4) are left out: they are not to be compared with b" in words_of(section_of(page, "world-model"))
    assert table_of(page, "world-model", 1)["clips"] == ["3"]  # and no column of the paper's


def test_the_card_of_a_world_model_has_the_longest_horizon_that_was_computed(tmp_path):
    content = world_content(episodes=3, frames=20)
    content["horizons"]["20"] |= {"psnr": None, "episodes": 0}
    write_report([write_world(tmp_path / "run", content)], tmp_path / "out", videos=0)
    page = parse_page((tmp_path / "out" / "index.html").read_text("utf-8"))
    card = words_of(page.find(".//article"))
    assert f"{content['horizons']['10']['psnr']['imagined']['mean']:.4g} dB" in card
    assert "PSNR over 10 frames, as imagined, of 3 clips" in card


def test_a_run_without_a_result_is_told_from_no_run(tmp_path):
    (tmp_path / "run" / ".work").mkdir(parents=True)
    with pytest.raises(
        RunError, match=r"run holds neither .* what was begun in it has no result yet: run the same c"
    ):
        write_report([tmp_path / "run"], tmp_path / "out")


def test_pictures_of_an_earlier_report_do_not_stay(runs, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.png").write_bytes(b"mine")
    write_report(runs, out, videos=0)
    assert (out / "failures.png").is_file()
    write_report([write_world(tmp_path / "world", world_content(episodes=2, frames=3))], out, videos=0)
    assert sorted(file.name for file in out.iterdir()) == ["index.html", "mine.png", "world.png"]
    write_report([write_evaluation(tmp_path / "one", [episode_line("libero_goal", 0, 0, "success")])], out)
    assert {file.name for file in out.iterdir()} == {
        "index.html",
        "mine.png",
        "latency.png",
        "success.png",
        "tasks.png",
    }


def test_what_cannot_be_reported_is_refused_and_leaves_nothing(runs, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for folders, error, message in (
        ([tmp_path / "empty"], RunError, "empty holds neither episodes.jsonl nor world.json"),
        ([tmp_path / "nowhere"], RunError, "nowhere is no folder"),
        ([], RunError, "0 runs; allowed: 1 … 6"),
        ([runs[0]] * 7, RunError, "7 runs"),
        ([runs[1], runs[0], runs[1]], RunError, "random is given twice"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            write_report(folders, out)
    with pytest.raises(FileExistsError, match="file is a file; name a folder"):
        write_report(runs, tmp_path / "file")
    with pytest.raises(ValueError, match="videos is -1; allowed: 0 and above"):
        write_report(runs, out, videos=-1)
    assert not out.exists()


def test_a_report_that_fails_leaves_the_last_one(tmp_path):
    run = write_evaluation(tmp_path / "run", [episode_line("libero_goal", 0, 0, "failure", last_frame="a.png")])
    out = tmp_path / "out"
    write_report([run], out)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    (run / "a.png").write_bytes(b"no picture")
    with pytest.raises(RunError, match=r"a\.png cannot be read as a picture"):
        write_report([run], out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    (run / "a.png").unlink()
    write_report([run], out)
    assert "its picture is gone" in (out / "index.html").read_text("utf-8")


def test_the_command_says_where_to_look(tmp_path, monkeypatch, capsys):
    run = write_evaluation(tmp_path / "run", [episode_line("libero_goal", 0, 0, "success")], finished=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    assert cli.main(["report", str(run), "--videos", "0"]) == cli.EXIT_OK
    assert "look at it: worldvla-report/index.html" in capsys.readouterr().out
    (run / "episodes.jsonl").write_text(json.dumps({"suite": 1}) + "\n")
    assert cli.main(["report", str(run)]) == cli.EXIT_USAGE
    assert "episodes.jsonl, line 1: suite is 1; allowed: str" in capsys.readouterr().err


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def screenshot(page: Path, picture: Path, *options: str) -> np.ndarray:
    """What a browser shows, after it has said nothing on its console."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
         f"--user-data-dir={picture.parent / 'profile'}", "--window-size=1100,2400",
         f"--screenshot={picture}", *options, page.as_uri()],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr, done.stderr
    with Image.open(picture) as image:
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize(
    ("kind", "options", "paper"),
    [
        ("evaluations", (), (255, 255, 255)),
        ("evaluations", ("--force-dark-mode",), (20, 23, 26)),
        ("worlds", (), (255, 255, 255)),
    ],
    ids=["light", "dark", "worlds"],
)
def test_a_browser_shows_the_page(kind, out, tmp_path, options, paper):
    if kind == "worlds":
        contents = (world_content(episodes=2, frames=12, seed=seed, lpips=True) for seed in (0, 1))
        runs = [write_world(tmp_path / str(place), content) for place, content in enumerate(contents)]
        out = tmp_path / "out"
        write_report(runs, out, videos=1)
    pixels = screenshot(out / "index.html", tmp_path / "page.png", *options)
    assert pixels.shape == (2400, 1100, 3)
    blank = (pixels == paper).all(axis=-1)
    assert 0.5 < blank.mean() < 0.97  # the paper shows, and is written on
    # Both runs' colours are there, brighter in the dark, in the figures below the head, which only images draw.
    factor = 1.3 if options else 1.0
    for colour in COLOURS[:2]:
        wanted = [min(255, factor * int(colour[i : i + 2], 16)) for i in (1, 3, 5)]
        assert (np.abs(pixels[700:] - wanted).max(axis=-1) < 12).sum() > 200
