import json
from dataclasses import replace
from pathlib import Path

import h5py
import pytest

from worldvla_libero.nano.making import make_nano
from worldvla_libero.nano.settings import NANO_TASKS, NanoError, NanoSettings
from worldvla_libero.simulator.suites import UnknownNameError
from worldvla_model import WorldVLA

SHORT = Path(__file__).parents[2] / "fixtures/short_demos/libero_object"
SAUCE = "libero_object/pick_up_the_bbq_sauce_and_place_it_in_the_basket"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "episodes is 0; allowed: 1 and above"),
        ({"sample_episodes": 0}, "sample_episodes is 0; allowed: 1 and above"),
        ({"evaluate_episodes": -1}, "evaluate_episodes is -1; allowed: 1 and above"),
        ({"tokenizer_steps": -1}, "tokenizer_steps is -1; allowed: 0 and above"),
        ({"steps": -1}, "steps is -1; allowed: 0 and above"),
        ({"tasks": ()}, "no task; at least one is needed"),
        ({"tasks": ("butter",)}, "task is 'butter'; allowed: SUITE/NAME, such as libero_object/"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(NanoError, match=message):
        NanoSettings(**changes)


def test_unknown_tasks_are_refused_before_the_work(tmp_path):
    for name in ("libero_object/juggle", "libero_circus/juggle"):
        with pytest.raises(UnknownNameError, match=r"juggle|circus"):
            make_nano(tmp_path / "out", NanoSettings(tasks=(name,)))
    assert not (tmp_path / "out").exists()


def test_demonstrations_of_other_tasks_are_refused(tmp_path):
    with pytest.raises(NanoError, match="has no demonstration of pick_up_the_butter"):
        make_nano(tmp_path, NanoSettings(tasks=NANO_TASKS[1:2]), demos=SHORT)


@pytest.mark.campaign
def test_from_given_demonstrations_to_a_model_with_its_card(tmp_path):
    (given := tmp_path / "given").mkdir()
    name = f"{SAUCE.partition('/')[2]}_demo.hdf5"
    with h5py.File(SHORT / name) as short, h5py.File(given / name, "w") as file:
        data = file.create_group("data")
        data.attrs.update(short["data"].attrs)
        for number in range(10):  # as many as it takes to hold one out
            short.copy("data/demo_0", data, f"demo_{number}")
    settings = NanoSettings((SAUCE,), tokenizer_steps=3, steps=2, sample_episodes=1, evaluate_episodes=1)
    stages = []

    def make():
        stages.clear()
        return make_nano(tmp_path / "out", settings, demos=given, workers=1, cpu=True, on_stage=stages.append)

    measured = make()
    assert stages == ["frames of libero_object", "image tokenizer", "data", "sample data", "model", "evaluation"]
    (rate,) = measured.success.values()
    assert rate.episodes == 1
    record = json.loads((tmp_path / "out/nano/training.json").read_text())
    assert record["steps"] == 2
    assert record["recipe"]["suites"] == ["libero_object"]
    assert WorldVLA.from_pretrained(tmp_path / "out/nano").processor.image_size == 128
    text = (tmp_path / "out/nano/README.md").read_text()
    assert "| optimizer steps | 2 | 3 |" in text
    weights = (tmp_path / "out/nano/model.safetensors").stat().st_mtime_ns
    assert replace(make(), training={}) == replace(measured, training={})  # nothing is done twice
    assert (tmp_path / "out/nano/model.safetensors").stat().st_mtime_ns == weights
