"""transformers' own tests of a model, run on ours: `ModelTesterMixin` on both of our classes.

    uv run python tools/transformers_tests.py [PYTEST_OPTION ...]

The tests are in the source distribution of transformers alone; that of the installed version is fetched with pip
from the index in use. They import two files that are not in it and that hold other mixins; these are left empty.
Prints which tests failed, against the list below; exit status 1 if they differ.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

# Tests that fail, and why; each of them is meant to.
STRICT = {
    "test_correct_missing_keys": "a checkpoint without a tensor is refused, never filled with random numbers",
    "test_model_weights_reload_no_missing_tied_weights": "as above",
}
EXPECTED: dict[str, dict[str, str]] = {
    "causal": STRICT,
    "action_isolated": STRICT | {"test_inputs_embeds": "the mask depends on ids, which embeddings do not show"},
}

TESTS = '''
import random
import unittest

import torch

from tests.generation.test_utils import GenerationTesterMixin
from tests.test_modeling_common import ModelTesterMixin
from worldvla_model import WorldVLAConfig, WorldVLAForConditionalGeneration, WorldVLAModel


class Tester:
    """A tiny model, and ids that are text: what images and actions do to the mask has tests of its own."""

    batch_size, seq_length, is_training = 2, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return WorldVLAConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=37,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=64,
            attention=ATTENTION,
            boi_token_id=90,
            eoi_token_id=91,
            boa_token_id=92,
            eoa_token_id=93,
            eos_token_id=94,
            bos_token_id=0,
            pad_token_id=1,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.tensor(
            [[random.Random(i).randrange(2, 90) for i in range(self.seq_length * row, self.seq_length * (row + 1))]
             for row in range(self.batch_size)]
        )
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class WorldVLATest(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (WorldVLAModel, WorldVLAForConditionalGeneration)
    pipeline_model_mapping = {}

    def setUp(self):
        self.model_tester = Tester(self)

    # Which classes have a loss, transformers tells by lists of its own names.

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is WorldVLAForConditionalGeneration:
            inputs["labels"] = inputs["input_ids"].clone()
        return inputs

    def test_training(self):
        self.all_model_classes = (WorldVLAForConditionalGeneration,)
        super().test_training()

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        self.all_model_classes = (WorldVLAForConditionalGeneration,)
        super().check_training_gradient_checkpointing(gradient_checkpointing_kwargs)
'''


def fetch(folder: Path) -> Path:
    """The folder `tests` of transformers' source distribution, ready to be imported from `folder`."""
    wanted = f"transformers=={version('transformers')}"
    pip = ["uv", "tool", "run", "pip"]
    options = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run(
        [*pip, "download", *options, "--no-binary", "transformers", "--dest", folder, wanted], check=True
    )
    subprocess.run([*pip, "install", *options, "--target", folder / "needed", "parameterized"], check=True)
    (archive,) = folder.glob("transformers-*.tar.gz")
    with tarfile.open(archive) as content:
        content.extractall(folder, filter="data")
    tests = folder / archive.name.removesuffix(".tar.gz") / "tests"
    for name, mixin in (
        ("exporters/test_export.py", "ExportTesterMixin"),
        ("generation/test_utils.py", "GenerationTesterMixin"),
    ):
        file = tests / name
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(f"class {mixin}:\n    pass\n")
    (tests / "__init__.py").touch()
    return tests


def main(arguments: list[str]) -> int:
    """Run the tests under both kinds of mask; 1 if others fail than expected, else 0."""
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        tests = fetch(Path(folder))
        for attention, expected in EXPECTED.items():
            (tests / "test_worldvla.py").write_text(TESTS.replace("ATTENTION", repr(attention)))
            ran = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "pytest",
                    "-q",
                    "-rf",
                    "--tb=line",
                    "-p",
                    "no:cacheprovider",
                    "-p",
                    "no:xdist",
                ]
                + ["-c", "/dev/null", "--rootdir", tests.parent, "tests/test_worldvla.py", *arguments],
                cwd=tests.parent,
                env=os.environ
                | {"PYTHONPATH": os.pathsep.join(map(str, (tests.parent, Path(folder) / "needed")))},
                capture_output=True,
                text=True,
            )
            # A test of several classes goes on after one of them failed: SUBFAILED names each such class.
            failed = set(re.findall(r"^(?:FAILED|ERROR|SUBFAILED\S*) \S+::(\w+)", ran.stdout, re.MULTILINE))
            last = (ran.stdout.strip().splitlines() or [ran.stderr[-500:]])[-1]
            print(f"{attention}: {last}")
            for name in sorted(failed & expected.keys()):
                print(f"  fails as expected: {name}: {expected[name]}")
            for name in sorted(failed - expected.keys()):
                print(f"  FAILS: {name}")
            for name in sorted(expected.keys() - failed):
                print(f"  passes, take it off the list: {name}")
            ended = ran.returncode in (0, 1) and "passed" in last
            if not ended:
                print(ran.stdout[-3_000:], ran.stderr[-3_000:], sep="\n")
            differ |= failed != expected.keys() or not ended
    return int(differ)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
