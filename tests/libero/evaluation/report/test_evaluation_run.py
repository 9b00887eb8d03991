"""Evaluations read from disk: what is counted, and what is refused."""

import json

import pytest
from report_work import episode_line, evaluation_info, write_evaluation

from worldvla_libero.evaluation.report.evaluation_run import read_evaluation, task_order
from worldvla_libero.evaluation.run_files import RunError

LINES = [
    episode_line("libero_goal", task, episode, outcome)
    for task, outcomes in enumerate((("success", "failure", "error"), ("success", "success")))
    for episode, outcome in enumerate(outcomes)
]


def read(folder):
    return read_evaluation("run", "#0072B2", folder)


def test_a_run_is_read_line_by_line(tmp_path):
    run = read(write_evaluation(tmp_path / "run", LINES, policy="mine"))
    assert [episode.key for episode in run.episodes] == [
        (line["suite"], line["task"], line["episode"]) for line in LINES
    ]
    assert run.policy == "mine"
    assert (run.rate().successes, run.rate().episodes, run.rate().errors) == (3, 4, 1)
    assert (run.rate("libero_goal", 0).successes, run.rate("libero_goal", 0).episodes) == (1, 2)
    assert run.rate("libero_object").rate is None
    assert run.warnings == ()


def test_an_interrupted_run_is_what_it_has_so_far(tmp_path):
    run = read(write_evaluation(tmp_path / "run", LINES[:2], finished=False))
    assert run.info is None
    assert run.policy == ""
    assert run.rate().to_dict()["success_rate"] == 0.5


def test_a_line_that_a_killed_run_had_begun_is_left_out_but_not_one_of_a_run_that_is_over(tmp_path):
    folder = write_evaluation(tmp_path / "run", LINES[:2], finished=False)
    with (folder / "episodes.jsonl").open("ab") as lines:
        lines.write(json.dumps(LINES[2]).encode()[:90])
    assert [episode.key[2] for episode in read(folder).episodes] == [0, 1]
    (folder / "eval_info.json").write_text(json.dumps(evaluation_info(LINES[:2])))
    with pytest.raises(RunError, match="line 3: no JSON"):
        read(folder)


def test_unknown_fields_are_left_alone_and_versions_that_changed_are_warned_of(tmp_path):
    changed = [LINES[0] | {"later": 1}, LINES[1] | {"versions": LINES[1]["versions"] | {"mujoco": "3.17.0"}}]
    run = read(write_evaluation(tmp_path / "run", changed, warnings=["mind this"]))
    assert run.warnings == ("mind this", "episodes ran with mujoco 3.2.7 and 3.17.0")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": "93"}, r"episodes\.jsonl, line 2: steps is '93'; allowed: int"),
        ({"steps": True}, "line 2: steps is True"),
        ({"steps": -1}, "line 2: steps is -1"),
        ({"seconds": float("nan")}, "line 2: seconds is nan; allowed: float"),
        ({"query_seconds": [0.1, None]}, "line 2: query_seconds"),
        ({"outcome": "sucess"}, "line 2: outcome is 'sucess'; allowed: Literal"),
        ({"outcome": "error"}, "line 2: outcome 'error' without an error"),
        ({"episode": 0}, r"line 2: episode \('libero_goal', 0, 0\) is in line 1 already"),
        ({"protocol": "lerobot"}, "line 2: protocol 'lerobot'; line 1 has 'openvla'"),
        ({"max_steps": 400}, "line 2: .*400.*; line 1 says of the same task .*300"),
        ({"instruction": "another"}, "line 2: .*another"),
        ({"video": "../../secret.mp4"}, r"line 2: file '\.\./\.\./secret\.mp4'; allowed: a path inside"),
        ({"last_frame": "/etc/passwd"}, "line 2: file '/etc/passwd'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, changed, message):
    folder = write_evaluation(tmp_path / "run", [], finished=False)
    lines = [LINES[0], LINES[1] | changed, *LINES[2:]]
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    with pytest.raises(RunError, match=message):
        read(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"episodes\.jsonl is empty"),
        (b"{}\n", "line 1: no suite"),
        (b"[1]\n", "line 1: list; allowed: a JSON object"),
        (json.dumps(LINES[0]).encode() + b'\n{"suite": "libe\n', "line 2: no JSON"),
        (b'{"suite": "libe', r"episodes\.jsonl is empty"),  # the first line of a run that was killed
        (json.dumps(LINES[0]).encode() + b"\n\n" + json.dumps(LINES[1]).encode(), "line 2: no JSON"),
        (b"\xff\xfe\n", "line 1: no JSON"),
    ],
)
def test_what_is_no_line_is_refused(tmp_path, content, message):
    folder = write_evaluation(tmp_path / "run", [], finished=False)
    (folder / "episodes.jsonl").write_bytes(content)
    with pytest.raises(RunError, match=message):
        read(folder)


def test_an_end_that_counts_otherwise_is_refused(tmp_path):
    folder = write_evaluation(tmp_path / "run", LINES)
    info = json.dumps(evaluation_info(LINES[1:]))
    (folder / "eval_info.json").write_text(info)
    with pytest.raises(RunError, match=r"eval_info\.json states 2 successes overall; episodes\.jsonl holds 3"):
        read(folder)
    (folder / "eval_info.json").write_text("{}")
    with pytest.raises(RunError, match="states None successes overall"):
        read(folder)
    for key in ("protocol", "settings"):
        (folder / "eval_info.json").write_text(json.dumps(evaluation_info(LINES) | {key: ["openvla"]}))
        with pytest.raises(RunError, match=rf"eval_info\.json: {key} is \['openvla'\]; allowed: an object"):
            read(folder)
    (folder / "eval_info.json").write_text(info[:40])
    with pytest.raises(RunError, match=r"eval_info\.json: no JSON"):
        read(folder)


def test_tasks_of_several_runs_have_one_order(tmp_path):
    def run(name, suites):
        lines = [episode_line(suite, task, 0, "success") for suite in suites for task in (10, 2)]
        return read_evaluation(name, "#0072B2", write_evaluation(tmp_path / name, lines))

    first, second = run("a", ["libero_zebra", "libero_10"]), run("b", ["libero_10", "libero_spatial"])
    expected = [(suite, task) for suite in ("libero_spatial", "libero_10", "libero_zebra") for task in (2, 10)]
    assert list(task_order([first, second])) == list(task_order([second, first])) == expected
    lines = [episode_line("libero_10", 2, 0, "success", task_name="other")]
    other = read_evaluation("c", "#0072B2", write_evaluation(tmp_path / "c", lines))
    with pytest.raises(RunError, match=r"task 2 of libero_10 is 'put_the_wine\w+' in a and 'other' in c"):
        task_order([first, other])
