"""One of several processes that train a recipe with weights spread over all of them, on CPUs.

python sharded_training_work.py PLACE OUT RECIPE    under torch.distributed.run; PLACE has data, RECIPE is JSON
"""

import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "model"))

from training_work import SHARDED, shard_on_cpu

from worldvla_libero.recipes import ModelSize, Recipe
from worldvla_libero.training import RunOptions, train_recipe


def train(place, out, recipe):
    fields = json.loads(recipe)
    fields |= {"size": ModelSize(**fields["size"]), "suites": tuple(fields["suites"])}
    options = RunOptions(log_every=1, evaluate_every=3, save_every=2, cpu=True)
    train_recipe(Recipe(**fields), Path(place) / "data", out, tokenizer=Path(place) / "tokenizer", options=options)


if __name__ == "__main__":
    os.environ |= SHARDED
    shard_on_cpu()
    train(*sys.argv[1:])
