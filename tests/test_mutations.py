import importlib
import random
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

KINDS = [
    *(
        "tokenizer.json",
        "action_tokenizer.json",
        "processor_config.json",
        "config.json",
        "vqgan.yaml",
        "vqgan.ckpt",
    ),
    *("safetensors", "HDF5", "meta/episodes", "info.json", "dataset.json", "sequences"),
]


@pytest.fixture(scope="module")
def mutations() -> Iterator[ModuleType]:
    """The script, by its name: its processes import it by that, from the same path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "tools")
        yield importlib.import_module("mutations")


@pytest.mark.parametrize("fields", [False, True])
def test_a_seed_is_a_mutation(mutations, fields):
    good = b'{"a": {"b": [1, 2]}, "c": "x"}' * (1 if fields else 9)
    made = [mutations.mutate(good, random.Random(seed), fields=fields) for seed in range(60)]
    assert made == [mutations.mutate(good, random.Random(seed), fields=fields) for seed in range(60)]
    assert len({*made}) > 40
    assert any(len(changed) < len(good) for changed in made)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HDF5", "dataset.json", "info.json"])
def test_what_is_damaged_is_read_or_refused(mutations, kind):
    found = mutations.try_kind(kind, 60)
    assert not found.wrong, found.first
    assert found.read + found.refused == 60


@pytest.mark.campaign
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_mutations(mutations, kind):
    found = mutations.try_kind(kind, 10_000)
    assert not found.wrong, found.first
    assert found.read + found.refused == 10_000
    assert found.growth < 64  # MiB


def test_no_kind_is_left_out(mutations):
    assert [*mutations.KINDS] == KINDS
