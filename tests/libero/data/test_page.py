"""The page of a token data set: what it says, what it escapes, and that it always says it alike."""

import ast
import base64
import importlib.util
import io
import re
import weakref
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from page_work import cells_of, parse_page, section_of, words_of
from PIL import Image

from worldvla_libero.data.page import Preview, data_page
from worldvla_libero.data.record import DataRecord, SplitRecord, fingerprint_of
from worldvla_libero.data.shards import TokenEpisode
from worldvla_libero.jobs.parts import Dropped
from worldvla_tokenizers import ActionTokenizer
from worldvla_tokenizers.action import ActionError

FRAMES = Path(__file__).parents[2] / "fixtures" / "published" / "frames"
TASKS = {
    "open_the_middle_drawer": ("open the middle drawer of the cabinet", "libero_goal_0"),
    "turn_on_the_stove": ("turn on the stove", "libero_goal_8"),
    "pick_up_the_salad_dressing": ("pick up the salad dressing and place it in the basket", "libero_object_2"),
}
EMPTY = SplitRecord(0, 0, ())
SECTIONS = ["tasks", "lengths", "actions", "left-out", "loading", "settings"]
HOSTILE = "<script>alert(\"1\")</script> & 'it' </table> $name {name}"


def _actions(rng, steps, dimensions=7):
    """A hand's smooth motion, a few slow waves that fade in and out, and a gripper that closes and opens."""
    t = np.linspace(0, 1, steps)[:, None]
    waves = [
        rng.normal(0, 0.3 / k, dimensions) * np.sin(np.pi * k * (t + rng.random(dimensions))) for k in (1, 2, 5)
    ]
    actions = sum(waves) * np.sin(np.pi * t) + rng.normal(0, 0.01, (steps, dimensions))
    actions[:, 3:6] *= 0.25
    actions[np.abs(actions) < 0.004] = 0.0
    actions[:, -1] = np.where((t[:, 0] > 0.4) & (t[:, 0] < 0.9), 1.0, -1.0)
    return actions


def _episodes(number=24, dimensions=7, tasks=TASKS, seed=0):
    rng = np.random.default_rng(seed)
    for i in range(number):
        task = list(tasks)[i % len(tasks)]
        steps = int(rng.gamma(30, 4 + i % len(tasks)))
        codes = rng.integers(0, 8192, (steps, 16, 16)).astype(np.uint16)
        actions = _actions(rng, steps, dimensions)
        episode = TokenEpisode(f"{task}_demo/demo_{i}", task, tasks[task][0], codes, actions)
        yield "validation" if i % 10 == 7 else "train", episode


def _strip(prefix):
    frames = [np.asarray(Image.open(FRAMES / f"{prefix}_{i}.png").resize((96, 96))) for i in (0, 1, 8, 9) * 2]
    file = io.BytesIO()
    Image.fromarray(np.concatenate(frames, axis=1)).save(file, "JPEG", quality=85)
    return file.getvalue()


def _record(episodes, **more):
    counts = Counter(split for split, _ in episodes)
    splits = {name: SplitRecord(n, 0, ()) for name, n in counts.items()}
    return DataRecord(**{"settings": {}, "splits": splits, **more})


def _fit(episodes, quantile=None):
    return ActionTokenizer.fit(np.concatenate([e.actions for s, e in episodes if s == "train"]), quantile)


def _panels(section):
    return {words_of(panel.find("h3")): panel for panel in section.iter("figure")}


def _svg(panel):
    kind, data = panel.find("img").get("src").split(",")
    assert kind == "data:image/svg+xml;base64"
    return ElementTree.fromstring(base64.b64decode(data))


def test_numbers_are_those_of_the_episodes():
    episodes = list(_episodes())
    actions = _fit(episodes, quantile=0.01)
    page = parse_page(data_page(_record(episodes, control_hz=20), iter(episodes), actions, []))
    steps = sum(len(e) for _, e in episodes)

    facts = {words_of(fact.find("dt")): words_of(fact.find("dd")) for fact in page.find(".//dl[@class='facts']")}
    assert facts == {
        "episodes": "24",
        "steps": f"{steps:,}",
        "minutes at 20 Hz": f"{steps / 1200:,.1f}",
        "tasks": "3",
        "image codes per frame": "16 \N{MULTIPLICATION SIGN} 16",
        "action dimensions, 256 bins each": "7",
    }

    def cell(task, *splits):
        lengths = [len(e) for s, e in episodes if s in splits and task in (None, e.task)]
        return f"{len(lengths):,}\n{sum(lengths):,} steps"

    columns = (("train",), ("validation",), ("train", "validation"))
    assert cells_of(section_of(page, "tasks")) == [
        ["", "train", "validation", "all"],
        ["all tasks", *(cell(None, *splits) for splits in columns)],
        *([f"{TASKS[task][0]}\n{task}", *(cell(task, *splits) for splits in columns)] for task in sorted(TASKS)),
    ]

    panels = _panels(section_of(page, "lengths"))
    for name in ("train", "validation"):
        lengths = [len(e) for s, e in episodes if s == name]
        median = np.median(lengths)
        caption = f"median {median:g} steps ({median / 20:.1f} s), from {min(lengths)} to {max(lengths)}"
        assert words_of(panels[name].find("figcaption")) == caption


def test_action_panels_count_bins_and_clipped_values_of_each_split():
    episodes = list(_episodes())
    actions = _fit(episodes, quantile=0.01)
    page = parse_page(data_page(_record(episodes), iter(episodes), actions, []))
    panels = _panels(section_of(page, "actions"))
    assert list(panels) == [f"dimension {d}" for d in range(7)]
    values = {s: np.concatenate([e.actions for t, e in episodes if t == s]) for s in ("train", "validation")}
    bins = {split: actions.vocabulary.action_bins(actions.encode(v)) for split, v in values.items()}
    assert sum(int((v > actions.high).sum()) for v in values.values())  # else there is nothing to test
    for d, panel in enumerate(panels.values()):
        notes = [f"{len(np.unique(bins['train'][:, d]))} of 256 bins used"]
        for split, v in values.items():
            outside = int(((v[:, d] < actions.low[d]) | (v[:, d] > actions.high[d])).sum())
            share = f"({100 * outside / len(v):.3g}%)"
            notes.append(f"{split}: {outside:,} clipped {share}" if outside else f"{split}: none clipped")
        shown = words_of(panel.find("figcaption")).split("\n")
        assert [_rounded(note) for note in shown] == [_rounded(note) for note in notes]
        # the axes end at the bounds and at the largest share; the last bin, of no width, goes with its neighbour
        words = [words_of(text).strip() for text in _svg(panel).iter("{http://www.w3.org/2000/svg}text")]
        top = max(np.bincount(np.minimum(b[:, d], 255)).max() / len(b) for b in bins.values())
        assert {_rounded(f"{bound:.4g}") for bound in (actions.low[d], actions.high[d])} <= set(words)
        assert float(words[-1].rstrip("%")) == pytest.approx(100 * top, rel=0.05)
    assert "2 of 256 bins used" in words_of(panels["dimension 6"])  # the gripper


def _rounded(note):
    """A percentage to two digits; minus signs as they are set."""
    note = re.sub(r"[\d.]+(?=%)", lambda number: f"{float(number[0]):.2g}", note)
    return note.replace("-", "\N{MINUS SIGN}")


def test_equal_input_gives_equal_bytes_from_one_pass_with_one_episode_in_memory():
    class Tracked(TokenEpisode):
        pass

    alive = weakref.WeakSet()

    def once():
        for split, e in _episodes(8):
            episode = Tracked(e.id, e.task, e.instruction, e.codes, e.actions)
            alive.add(episode)
            yield split, episode
            del episode
            assert len(alive) <= 1

    episodes = list(_episodes(8))
    record, previews = _record(episodes, name="mine"), [_preview(*episodes[0])]
    assert data_page(record, once(), _fit(episodes), previews) == data_page(
        record, iter(episodes), _fit(episodes), previews
    )


def _preview(split, episode):
    return Preview(episode.id, episode.task, episode.instruction, split, _strip(TASKS[episode.task][1]))


def test_page_needs_nothing_else():
    episodes = list(_episodes(6))
    html = data_page(_record(episodes), iter(episodes), _fit(episodes), [_preview(*pair) for pair in episodes])
    page = parse_page(html)
    anchors = {section.get("id") for section in page.iter("section")}
    for element in page.iter():
        assert element.tag not in ("script", "link", "iframe")
        assert element.get("src", "data:").startswith("data:")
        assert element.get("href", "#")[1:] in anchors | {""}
    assert "http" not in html
    assert not re.search(r"url\(|@import", html)


def test_contact_sheet_groups_by_task():
    episodes = list(_episodes(6))
    previews = [_preview(*pair) for pair in episodes]
    page = parse_page(data_page(_record(episodes), iter(episodes), _fit(episodes), previews))
    groups = list(section_of(page, "episodes").iter("details"))
    assert [words_of(group.find("summary")) for group in groups] == [
        f"{words} {task}" for task, (words, _) in TASKS.items()
    ]
    for group, (task, (_, frames)) in zip(groups, TASKS.items(), strict=True):
        assert "open" in group.attrib
        captions = [words_of(caption) for caption in group.iter("figcaption")]
        assert captions == [f"{s}\n{e.id}" for s, e in episodes if e.task == task]
        sources = {image.get("src") for image in group.iter("img")}
        assert sources == {f"data:image/jpeg;base64,{base64.b64encode(_strip(frames)).decode()}"}


def test_words_of_the_data_are_escaped():
    ((_, e),) = _episodes(1)
    name = f"{HOSTILE} split"
    episode = TokenEpisode(f"{HOSTILE} id", f"{HOSTILE} task", f"{HOSTILE} words", e.codes, e.actions)
    record = DataRecord(
        name=f"{HOSTILE} name",
        splits={"train": SplitRecord(1, 0, ()), name: SplitRecord(1, 0, ())},
        settings={HOSTILE: [HOSTILE, {HOSTILE: HOSTILE}]},
        dropped=(Dropped(HOSTILE, HOSTILE, HOSTILE),),
        versions={HOSTILE: HOSTILE},
    )
    names = [f"{HOSTILE} {d}" for d in range(7)]
    preview = Preview(episode.id, episode.task, episode.instruction, name, _strip("libero_goal_0"))
    actions = ActionTokenizer.fit(e.actions)
    page = parse_page(data_page(record, [("train", e), (name, episode)], actions, [preview], names))
    assert not list(page.iter("script"))
    assert words_of(page.find(".//h1")) == record.name
    assert f"{HOSTILE} words\n{HOSTILE} task" in [row[0] for row in cells_of(section_of(page, "tasks"))]
    assert list(_panels(section_of(page, "actions"))) == names
    assert words_of(section_of(page, "episodes").find(".//figcaption")) == f"{name}\n{episode.id}"
    assert [HOSTILE] * 3 in cells_of(section_of(page, "left-out"))
    assert words_of(section_of(page, "settings")).count(HOSTILE) == 6
    for element in page.iter():
        assert not {"onerror", "onload", "onclick"} & set(element.attrib)


def test_dropped_are_counted_by_reason_and_all_named():
    episodes = list(_episodes(3))
    dropped = [Dropped(f"demo_{i}", "too short" if i % 3 else "not finite", f"{i} steps") for i in range(10_000)]
    page = parse_page(data_page(_record(episodes, dropped=tuple(dropped)), iter(episodes), _fit(episodes), []))
    rows = cells_of(section_of(page, "left-out"))
    assert rows[:2] == [["too short", "6,666"], ["not finite", "3,334"]]
    assert rows[3:] == [[*one] for one in dropped]
    assert "open" not in section_of(page, "left-out").find("details").attrib  # too long to be spread out
    page = parse_page(data_page(_record(episodes, dropped=()), iter(episodes), _fit(episodes), []))
    assert "Nothing was left out." in words_of(section_of(page, "left-out"))


def test_settings_are_shown_whatever_they_are():
    episodes = list(_episodes(2))
    settings = {
        "split": {"rule": "paper", "fraction": 0.9},
        "replay": None,
        "cameras": ["a", "b"],
        "x": [],
        "y": True,
    }
    record = _record(episodes, settings=settings, versions={"numpy": "2.3"})
    page = parse_page(data_page(record, iter(episodes), _fit(episodes), []))
    rows = [
        (words_of(row.find("dt")), words_of(row.find("dd"))) for row in section_of(page, "settings").iter("div")
    ]
    assert rows[0] == ("fingerprint", fingerprint_of(settings))
    for row in (
        ("rule", "paper"),
        ("fraction", "0.9"),
        ("replay", "null"),
        ("cameras", "a, b"),
        ("x", "[]"),
        ("y", "true"),
    ):
        assert row in rows


@pytest.mark.parametrize("dimensions", [4, 14])
def test_other_robots_and_constant_dimensions(dimensions):
    episodes = list(_episodes(6, dimensions))
    for _, episode in episodes:
        episode.actions[:, 1] = 0.25
    episodes[0] = ("validation", episodes[0][1])
    episodes[0][1].actions[0, 1] = 0.5
    page = parse_page(data_page(_record(episodes), iter(episodes), _fit(episodes), []))
    panels = _panels(section_of(page, "actions"))
    assert len(panels) == dimensions
    caption = words_of(panels["dimension 1"].find("figcaption")).split("\n")
    assert caption[:2] == ["1 of 256 bins used, constant", "train: none clipped"]
    assert caption[2].startswith("validation: 1 clipped (")


def test_one_episode_of_one_step():
    ((split, e),) = _episodes(1)
    episode = TokenEpisode(e.id, e.task, e.instruction, e.codes[:1], e.actions[:1])
    page = parse_page(data_page(_record([(split, episode)]), [(split, episode)], _fit([(split, episode)]), []))
    assert [section.get("id") for section in page.iter("section")] == SECTIONS


def test_empty_splits():
    episodes = [pair for pair in _episodes(6) if pair[0] == "train"]
    record = _record(episodes, splits={"validation": EMPTY, "train": SplitRecord(len(episodes), 0, ())})
    page = parse_page(data_page(record, iter(episodes), _fit(episodes), []))
    assert list(_panels(section_of(page, "lengths"))) == ["train", "validation"]  # training first
    assert words_of(_panels(section_of(page, "lengths"))["validation"].find("figcaption")) == "no episode"
    assert "validation" not in words_of(section_of(page, "actions"))
    nothing = parse_page(data_page(_record([], splits={"train": EMPTY}), [], _fit(episodes), []))
    assert [section.get("id") for section in nothing.iter("section")] == [
        "tasks",
        "left-out",
        "loading",
        "settings",
    ]


def test_many_tasks_are_folded_away():
    tasks = {f"task_{i}": (f"put bowl {i} on the plate", "libero_goal_0") for i in range(200)}
    episodes = [(s, TokenEpisode(e.id, e.task, e.instruction, e.codes[:4], e.actions[:4]))
                for s, e in _episodes(200, tasks=tasks)]  # fmt: skip
    strip = _strip("libero_goal_0")
    previews = [Preview(e.id, e.task, e.instruction, s, strip) for s, e in episodes]
    page = parse_page(data_page(_record(episodes), iter(episodes), _fit(episodes), previews))
    assert len(cells_of(section_of(page, "tasks"))) == 2 + 200
    groups = list(section_of(page, "episodes").iter("details"))
    assert len(groups) == 200
    assert not any("open" in group.attrib for group in groups)


def test_code_block_names_what_exists():
    episodes = list(_episodes(2))
    page = parse_page(data_page(_record(episodes, name='it\'s "mine"'), iter(episodes), _fit(episodes), []))
    tree = ast.parse(words_of(section_of(page, "loading").find("pre")))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name for node in imports for alias in node.names} >= {"TokenDataset", "TokenSamples"}
    for node in imports:  # read, not imported: that takes a model's libraries and many seconds
        source = Path(importlib.util.find_spec(node.module).origin).read_text(encoding="utf-8")
        assert all(re.search(rf'(class |import |"){alias.name}\b', source) for alias in node.names)
    assert next(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)) == 'it\'s "mine"'


def test_a_page_that_would_contradict_the_record_is_refused():
    episodes = list(_episodes(6))
    actions = _fit(episodes)
    with pytest.raises(ValueError, match=r"demo_0 is of split 'train'; recorded: test"):
        data_page(_record([], splits={"test": SplitRecord(6, 0, ())}), iter(episodes), actions, [])
    with pytest.raises(ValueError, match=r"split 'train' has 6 episodes; recorded: 7"):
        data_page(_record([], splits={"train": SplitRecord(7, 0, ())}), iter(episodes), actions, [])
    with pytest.raises(ActionError, match="last axis must be 4"):
        data_page(_record(episodes), iter(episodes), ActionTokenizer([-1] * 4, [1] * 4), [])
