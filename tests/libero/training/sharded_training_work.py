"""One of several processes that train a recipe with weights spread over all of them, on CPUs.

python sharded_training_work.py PLACE OUT RECIPE    under torch.distributed.run; PLACE has data, RECIPE is JSON

Then again in a copy, OUT-again, as a kill would have left it that came before the model was written.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "model"))

import torch
from training_work import SHARDED, shard_on_cpu

from worldvla_libero.training.recipes import ModelSize, Recipe
from worldvla_libero.training.training import RunOptions, train_recipe


def train(place, out, recipe):
    fields = json.loads(recipe)
    fields |= {"size": ModelSize(**fields["size"]), "suites": tuple(fields["suites"])}
    options = RunOptions(log_every=1, evaluate_every=3, save_every=2, cpu=True)
    train_recipe(Recipe(**fields), Path(place) / "data", out, tokenizer=Path(place) / "tokenizer", options=options)


if __name__ == "__main__":
    os.environ |= SHARDED
    shard_on_cpu()
    place, out, recipe = sys.argv[1:]
    train(place, out, recipe)
    again = Path(f"{out}-again")
    if os.environ["RANK"] == "0":
        shutil.copytree(out, again)
        (again / "model.safetensors").unlink()
        record = json.loads((again / "training.json").read_text())
        (again / "training.json").write_text(json.dumps({**record, "steps": 0}))
    torch.distributed.barrier()
    train(place, again, recipe)
