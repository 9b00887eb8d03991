import dataclasses
import re
from pathlib import Path

import pytest

from worldvla_libero.cli.main import main
from worldvla_libero.data.samples import VideoSamples, WorldSamples
from worldvla_libero.training.recipes import (
    FINE_TUNE,
    NANO,
    PRINTED,
    RECIPES,
    SUITES,
    TOKENIZER_RECIPES,
    RecipeError,
    changed_fields,
    find_recipe,
)
from worldvla_model.masks import STRATEGIES


def test_every_row_of_the_paper_is_there():
    rows = {"table2-256", "table2-512", *(f"table3-row{n}" for n in range(1, 6))}
    rows |= {"table4-world", "table4-action-world", "table6-plain", "table6-pretrained"}
    wanted = {f"{row}-{suite}" for row in rows for suite in ("goal", "object", "spatial", "long")}
    wanted |= {f"table5-{n}-frames-{kind}-goal" for n in (1, 2, 4) for kind in ("single", "chunks")}
    wanted |= {
        f"figure7-{k}-{suite}" for k in ("action", "world", "video") for suite in ("goal", "object", "spatial")
    }
    assert wanted <= RECIPES.keys()
    left = RECIPES.keys() - wanted
    assert {name for name in left if not name.startswith("figure6-k")} == {"nano", "smoke", "fine-tune"}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_the_paper_says(name):
    recipe = RECIPES[name]
    assert recipe.name == name
    assert recipe.attention in STRATEGIES
    assert all(suite in SUITES.values() for suite in recipe.suites)
    if name in ("nano", "smoke", "fine-tune"):
        return
    # Paper §4.1 and the released scripts (SPEC §8).
    assert (recipe.alpha, recipe.z_loss_weight, recipe.rounds, recipe.epochs) == (0.04, 1e-5, 1, 40)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.beta2, recipe.max_grad_norm) == (
        5e-6,
        0.1,
        0.95,
        4.0,
    )
    assert (recipe.dropout, recipe.precision, recipe.schedule, recipe.world_share) == (
        0.05,
        "bf16",
        "constant",
        None,
    )
    assert recipe.batch_size == (8 if name == "table2-256-goal" else 32)  # 8 a GPU on 4 GPUs; goal-256: 2
    assert (recipe.warmup_epochs, recipe.loss, recipe.max_steps) == (0.01, "published", 0)
    assert recipe.gradient_checkpointing
    assert recipe.held_out == (not name.startswith("table2"))
    assert recipe.initial == ("checkpoint" if "pretrained" in name else "chameleon")
    assert recipe.image_size == (512 if "512" in name else 256)
    if not name.startswith("table5"):
        assert recipe.history == 2
    if recipe.chunk > 1 and not name.startswith("figure6"):
        assert recipe.chunk == (10 if name.endswith("long") else 5)


def test_the_rows_of_table_3_differ_where_they_should():
    kinds = [(r.mixture, r.chunk, r.attention) for r in (RECIPES[f"table3-row{n}-long"] for n in range(1, 6))]
    assert kinds == [
        ("action", 1, "action_isolated"),  # one action: the masks are the same
        ("action+world", 1, "action_isolated"),
        ("action", 10, "causal"),
        ("action", 10, "action_isolated"),
        ("action+world", 10, "action_isolated"),
    ]


def test_what_the_paper_printed_stands_beside():
    assert {name: PRINTED[name] for name in ("table2-256-long", "table2-512-object", "table3-row3-spatial")} == {
        "table2-256-long": "59.0 %",
        "table2-512-object": "96.2 %",
        "table3-row3-spatial": "36.7 %",
    }
    assert PRINTED["table4-action-world-goal"] == "29.77, 24.30 dB"
    assert PRINTED["table5-4-frames-chunks-goal"] == "84.7 %"
    assert PRINTED["table6-pretrained-long"] == "30.2 %"
    assert {name for name in RECIPES if name.startswith("table")} == set(PRINTED)


def test_kinds_of_samples():
    assert find_recipe("table4-world-goal").second_kind == WorldSamples(1, 1)
    assert not find_recipe("table4-world-goal").trains_actions
    assert find_recipe("figure7-video-goal").second_kind == VideoSamples(2, 5)
    assert find_recipe("table3-row4-goal").second_kind is None


def test_an_unknown_recipe_is_refused_with_those_like_it():
    with pytest.raises(RecipeError, match="no recipe 'tabel3-row5'; like it: table3-row5"):
        find_recipe("tabel3-row5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk": 0}, "chunk is 0; allowed: 1 and above"),
        ({"epochs": 0}, "nano: epochs is 0; allowed: above 0"),
        ({"learning_rate": -1e-3}, "learning_rate is -0.001; allowed: above 0"),
        ({"max_steps": -1}, "nano: max_steps is -1; allowed: 0 and above"),
        ({"warmup_epochs": -0.5}, "warmup_epochs is -0.5; allowed: 0 and above"),
        ({"world_share": 1.0}, "world_share is 1.0; allowed: between 0 and 1"),
        ({"mixture": "action"}, "world_share is 0.3, but only action is trained"),
    ],
)
def test_values_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(NANO, **changes)


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        (FINE_TUNE, {"lora_rank": -1}, "fine-tune: lora_rank is -1; allowed: 0 and above"),
        (FINE_TUNE, {"lora_rank": 4, "lora_alpha": -8.0}, "lora_alpha is -8.0; allowed: 0 and above"),
        (FINE_TUNE, {"lora_alpha": 8.0}, "lora_alpha is 8.0, but lora_rank is 0: no adapters"),
        (NANO, {"lora_rank": 4}, "nano: lora_rank is 4 and initial is 'scratch'; adapters need a 'checkpoint'"),
        (RECIPES["table2-256-goal"], {"lora_rank": 4}, "lora_rank is 4 and initial is 'chameleon'"),
    ],
)
def test_adapters_are_for_weights_that_act_already(recipe, changes, message):
    with pytest.raises(RecipeError, match=message):
        dataclasses.replace(recipe, **changes)


def test_what_was_changed_is_told():
    assert changed_fields(NANO) == {}
    assert changed_fields(dataclasses.replace(NANO, chunk=3)) == {"chunk": 3}
    own = dataclasses.replace(NANO, name="mine")
    assert changed_fields(own)["chunk"] == 5


def test_presets_of_image_tokenizers():
    assert TOKENIZER_RECIPES["published"].topology.n_embed == 8_192
    assert TOKENIZER_RECIPES["nano"].image_size == NANO.image_size


@pytest.mark.parametrize("command", ["train", "train-tokenizer"])
def test_every_option_is_explained_by_what_it_does(command, capsys):
    page = (Path(__file__).parents[3] / "docs/training-options.md").read_text()
    with pytest.raises(SystemExit):
        main([command, "--help"])
    options = set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out)) - {"--help"}
    assert {"--recipe", "--out"} <= options
    assert not {option for option in options if f"`{option}`" not in page and not option.startswith("--no-")}
