import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors import safe_open

from worldvla_libero import Simulator, load_suite
from worldvla_libero.cli import main as cli
from worldvla_libero.data.record import RECORD_FILE, DataRecord, ShardError, SplitRecord, fingerprint_of
from worldvla_libero.data.shards import TokenDataset, TokenEpisode, write_episodes
from worldvla_libero.training import run_log, training
from worldvla_libero.training.adapters import LAYERS
from worldvla_libero.training.recipes import FINE_TUNE, NANO, RECIPES, ModelSize, RecipeError, find_recipe
from worldvla_libero.training.run_log import read_lines
from worldvla_libero.training.training import RunOptions, train_recipe
from worldvla_model import WorldVLA, WorldVLAForConditionalGeneration
from worldvla_model.loss import IMAGE_IDS
from worldvla_model.training import WorldVLATrainer
from worldvla_tokenizers import VQGAN, ActionTokenizer, ImageTokenizer, VQGANConfig

ROOT = Path(__file__).parents[3]
STEPS = 6
TINY = dataclasses.replace(
    NANO,
    image_size=64,
    chunk=2,
    size=ModelSize(hidden_size=32, intermediate_size=48, layers=1, heads=2, max_positions=256),
    max_steps=STEPS,
    batch_size=4,
    precision="fp32",
    dropout=0.1,
    warmup_epochs=0.01,
)
EXACT = dataclasses.replace(TINY, stored="fp32")
OPTIONS = RunOptions(log_every=1, evaluate_every=3, save_every=2, cpu=True)


def write_data(root, tokenizer, *, rows, splits=("train", "validation"), words=None):
    """Episodes in which the first code tells the first action; `words`: other instructions by split and number."""
    rng = np.random.default_rng(2)
    words = words or {}
    settings = {"image_tokenizer": tokenizer, "image_size": 16 * rows}
    made_splits = {}
    (root / "data").mkdir(parents=True)
    for split, count in zip(splits, (8, 3), strict=False):
        made = []
        for i in range(count):
            codes = rng.integers(0, 16, (9, rows, rows)).astype(np.uint16)
            actions = rng.uniform(-0.5, 0.5, (9, 7))
            actions[:, 0] = codes[:, 0, 0] / 16 - 0.5
            told = words.get((split, i), "lift the cube")
            made.append(TokenEpisode(f"{split}/demo_{i}", "lift", told, codes, actions))
        file = f"data/{split}-00000.arrow"
        write_episodes(root / file, made, {"fingerprint": fingerprint_of(settings)})
        made_splits[split] = SplitRecord(count, 9 * count, (file,))
    record = DataRecord(settings=settings, splits=made_splits)
    (root / RECORD_FILE).write_text(json.dumps(record.content()))
    ActionTokenizer.published().save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with an image tokenizer and data made with it."""
    root = tmp_path_factory.mktemp("training")
    torch.manual_seed(0)
    topology = VQGANConfig(8, 16, 8, ch=32, ch_mult=(1, 1, 1, 1, 1), num_res_blocks=1)
    images = ImageTokenizer(VQGAN(topology).eval(), image_size=64)
    images.save_pretrained(root / "tokenizer")
    write_data(root / "data", images.vqgan.fingerprint, rows=4)
    return root


def run(place, out, recipe=TINY, *, drawn=(), **arguments):
    """Without pictures unless they are asked for: of runs this short they are nearly all of the time."""
    if place is not None:
        arguments = {"tokenizer": place / "tokenizer", "data": place / "data", **arguments}
    arguments.setdefault("options", OPTIONS)
    with pytest.MonkeyPatch.context() as patch:
        for module, picture in ((run_log, "save_curves"), (training, "save_strips")):
            if picture not in drawn:
                patch.setattr(module, picture, lambda *_, **__: None)
        return train_recipe(recipe, arguments.pop("data"), out, **arguments)


@pytest.fixture(scope="module")
def stopped(place, tmp_path_factory):
    """A run that was stopped at its third step, and its record; to be read, or copied."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    return out, run(place, out, EXACT, limit=3)


def test_a_recipe_leads_to_a_model_that_acts_and_imagines(place, tmp_path):
    longer = dataclasses.replace(TINY, max_steps=30, dropout=0.0, learning_rate=5e-3)
    options = dataclasses.replace(OPTIONS, evaluate_every=30, save_every=30)
    record = run(place, tmp_path / "run", longer, drawn=("save_curves", "save_strips"), options=options)
    rows = read_lines(tmp_path / "run" / "log.jsonl")
    curve = [row["loss"] for row in rows if "loss" in row]
    assert curve[-1] < 0.7 * curve[0]
    held_out = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in held_out] == [30]
    assert {"eval_action_l1", "eval_accuracy_action_7", "eval_accuracy_image"} <= held_out[0].keys()
    assert (record["steps"], record["of_steps"]) == (30, 30)
    assert record == json.loads((tmp_path / "run" / "training.json").read_text())
    assert record["recipe"]["chunk"] == 2
    assert record["data"]["fingerprint"] == TokenDataset(place / "data").fingerprint
    assert record["versions"]["torch"]
    for name in ("curves.png", "imagined.png"):
        assert np.asarray(Image.open(tmp_path / "run" / name)).std() > 1

    agent = WorldVLA.from_pretrained(tmp_path / "run", device="cpu")
    frame = np.zeros((64, 64, 3), np.uint8)
    assert agent.predict_actions([frame, frame], "lift the cube").shape == (2, 7)
    assert agent.predict_frame([frame], np.zeros((1, 7))).shape == (64, 64, 3)
    assert agent.processor.settings.image_size == 64
    assert WorldVLA.from_pretrained(tmp_path / "run" / "checkpoint-30", device="cpu").model.num_parameters() > 0


def test_an_interrupted_run_goes_on_bit_for_bit(place, stopped, tmp_path):
    run(place, tmp_path / "whole", EXACT)
    shutil.copytree(stopped[0], tmp_path / "parts")
    assert (tmp_path / "parts" / "checkpoint-3").is_dir()
    run(place, tmp_path / "parts", EXACT)
    rows = {
        name: [row for row in read_lines(tmp_path / name / "log.jsonl") if "loss" in row]
        for name in ("whole", "parts")
    }
    assert [r["step"] for r in rows["parts"]] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in rows["parts"]] == [r["loss"] for r in rows["whole"]]
    weights = [
        WorldVLAForConditionalGeneration.from_pretrained(tmp_path / name).state_dict()
        for name in ("whole", "parts")
    ]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_a_finished_run_has_nothing_left_to_do(place, stopped, tmp_path, monkeypatch):
    first = stopped[1]
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True)
    weights = (tmp_path / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(training.WorldVLATrainer, "train", None)
        assert run(place, tmp_path, EXACT, limit=3) == first
    # Killed after the last checkpoint and before the model was written: nothing is done again.
    rows = read_lines(tmp_path / "log.jsonl")
    (tmp_path / "training.json").write_text(json.dumps({k: v for k, v in first.items() if k != "steps"}))
    (tmp_path / "model.safetensors").unlink()
    shutil.rmtree(tmp_path / "checkpoint-2")
    with monkeypatch.context() as patch:
        patch.setattr(training.WorldVLATrainer, "training_step", None)
        again = run(place, tmp_path, EXACT, limit=3)
    assert again["steps"] == 3
    assert again["last"]["loss"] == first["last"]["loss"]
    assert again["last"]["eval_loss"] == first["last"]["eval_loss"]
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert read_lines(tmp_path / "log.jsonl") == rows


def test_the_model_of_another_recipe_is_not_returned_as_ones_own(place, stopped, tmp_path):
    shutil.copytree(stopped[0], tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoint-*"))
    with pytest.raises(RecipeError, match=r"begun otherwise: recipe\.chunk: 2 there, 3 here"):
        run(place, tmp_path, dataclasses.replace(EXACT, chunk=3), limit=1)
    assert run(place, tmp_path, EXACT, limit=1) == stopped[1]


def test_each_step_is_looked_at_once_and_every_sample_counts(place, tmp_path, monkeypatch):
    """24 held-out samples fill no batch of 32, and three steps no interval of two."""
    looked_at = []
    add = WorldVLATrainer.prediction_step

    def look(self, model, inputs, *arguments, **keywords):
        looked_at.append((self.state.global_step, len(inputs["input_ids"])))
        return add(self, model, inputs, *arguments, **keywords)

    monkeypatch.setattr(WorldVLATrainer, "prediction_step", look)
    recipe = dataclasses.replace(TINY, mixture="action", world_share=None, batch_size=32, max_steps=3)
    record = run(place, tmp_path, recipe, options=dataclasses.replace(OPTIONS, evaluate_every=2))
    assert looked_at == [(2, 24), (3, 24)]
    assert record["last"]["eval_loss"] > 0
    rows = [row["step"] for row in read_lines(tmp_path / "log.jsonl") if "eval_loss" in row]
    assert rows == [2, 3]


def test_curves_are_drawn_without_held_out_samples(place, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise Killed

    monkeypatch.setattr(training._Log, "on_step_end", kill)
    with pytest.raises(Killed):
        run(place, tmp_path, dataclasses.replace(TINY, held_out=False), drawn=("save_curves",))
    assert (tmp_path / "curves.png").is_file()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3  # columns and two steps


@pytest.mark.parametrize("where", [("train", 0), ("validation", 1)])
def test_a_long_instruction_is_refused_before_training(place, tmp_path, where):
    """Not only that of the last episode."""
    tokenizer = TokenDataset(place / "data").record.image_tokenizer
    long = write_data(tmp_path / "long", tokenizer, rows=4, words={where: "lift the cube slowly " * 60})
    with pytest.raises(RecipeError, match=r"samples of \d+ tokens; the model has 256 positions"):
        run(place, tmp_path / "run", data=long)
    assert not (tmp_path / "run").exists()


def test_another_recipe_cannot_go_on_in_the_same_folder(place, stopped):
    with pytest.raises(RecipeError, match=r"begun otherwise: recipe\.learning_rate: 0\.001 there, 0\.5 here"):
        run(place, stopped[0], dataclasses.replace(EXACT, learning_rate=0.5))


@pytest.mark.parametrize("mixture", ["action", "world", "action+video"])
def test_other_mixtures_train(place, tmp_path, mixture):
    share = 0.5 if "+" in mixture else None
    recipe = dataclasses.replace(TINY, mixture=mixture, world_share=share, video_frames=2, max_steps=1)
    record = run(place, tmp_path, recipe, drawn=("save_strips",))
    assert (record["samples"]["action"] > 0) == ("action" in mixture)
    assert (record["samples"]["world"] > 0) == (mixture != "action")
    assert (tmp_path / "imagined.png").is_file() == (mixture != "action")


def test_without_holding_out_everything_trains(place, stopped, tmp_path):
    part = stopped[1]["samples"]["action"]
    whole = run(place, tmp_path, dataclasses.replace(EXACT, held_out=False), limit=1)["samples"]["action"]
    assert whole == part * 11 // 8


@pytest.fixture(scope="module")
def published_data(published, tmp_path_factory):
    """Data at 128 px made with the published fixture's tokenizer."""
    tokenizer = training.load_image_tokenizer(published.tokenizer).vqgan.fingerprint
    return write_data(tmp_path_factory.mktemp("published") / "data", tokenizer, rows=8)


def test_from_a_published_checkpoint(place, published, published_data, tmp_path):
    recipe = dataclasses.replace(
        find_recipe("table3-row5-goal"),
        image_size=128,
        max_steps=1,
        batch_size=4,
        learning_rate=1e-12,
        precision="fp32",
    )
    found = {}

    def look(*arguments, **keywords):
        model = original(*arguments, **keywords)
        found.update({name: value.clone() for name, value in model.state_dict().items()})
        return model

    original = training._model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_model", look)
        init = {"tokenizer": published.tokenizer, "init": published.checkpoint, "data": published_data}
        record = run(place, tmp_path, recipe, **init)
    # Chameleon never learned to write images: SPEC §8.
    assert not found["lm_head.weight"][IMAGE_IDS.start : IMAGE_IDS.stop].any()
    assert found["lm_head.weight"][10_006].any()
    assert record["init"] == str(published.checkpoint)
    agent = WorldVLA.from_pretrained(tmp_path, device="cpu")
    assert agent.model.config.loss == "published"
    assert agent.model.config.dropout == 0.05


def test_from_a_world_model(place, published, published_data, tmp_path):
    recipe = dataclasses.replace(
        find_recipe("table6-pretrained-goal"), image_size=128, max_steps=1, batch_size=4, precision="fp32"
    )
    init = {"tokenizer": published.tokenizer, "init": published.checkpoint, "data": published_data}
    run(place, tmp_path, recipe, **init)
    agent = WorldVLA.from_pretrained(tmp_path, device="cpu")
    assert agent.model.lm_head.weight[IMAGE_IDS.start : IMAGE_IDS.stop].any()  # it did learn to write images
    assert agent.processor.settings.num_actions == 1


ADAPTED = dataclasses.replace(
    FINE_TUNE,
    lora_rank=4,
    image_size=64,
    chunk=2,
    max_steps=4,
    batch_size=4,
    learning_rate=1e-2,
    dropout=0.1,
    precision="fp32",
    stored="fp32",
)


@pytest.fixture(scope="module")
def small_data(published, tmp_path_factory):
    """Data at 64 px made with the published fixture's tokenizer."""
    tokenizer = training.load_image_tokenizer(published.tokenizer).vqgan.fingerprint
    return write_data(tmp_path_factory.mktemp("small") / "data", tokenizer, rows=4)


def adapt(published, data, out, recipe=ADAPTED, **arguments):
    arguments = {"tokenizer": published.tokenizer, "init": published.checkpoint, "data": data, **arguments}
    return run(None, out, recipe, **arguments)


@pytest.fixture(scope="module")
def adapted(published, small_data, tmp_path_factory):
    """A run of adapters, whole, and its record; to be read, or copied."""
    out = tmp_path_factory.mktemp("adapted") / "run"
    return out, adapt(published, small_data, out, drawn=("save_strips",))


def load(folder):
    return WorldVLAForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()


def test_adapters_lead_to_a_whole_model_and_stand_beside_it(published, adapted):
    out, record = adapted
    base, model = load(published.checkpoint), load(out)
    weights = base.state_dict()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed == {name for name in weights if name.split(".")[-2] in LAYERS}
    alone = PeftModel.from_pretrained(base, out / "adapter")
    ids = torch.tensor([[0, 16_400, 8_197, 8_805, 8_805, 5, 6, 8_803, 7, 8, 8_803, 8_196, 8_710, 10_004, 10_010]])
    torch.testing.assert_close(model(input_ids=ids).logits, alone(input_ids=ids).logits, rtol=1e-5, atol=1e-5)

    with safe_open(out / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
        count = sum(file.get_tensor(name).numel() for name in names)
    assert all("lora_" in name for name in names)
    settings = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["base_model_name_or_path"] == str(published.checkpoint)
    assert (record["parameters"], record["trained_parameters"]) == (model.num_parameters(), count)
    assert record["recipe"]["lora_rank"] == 4
    assert record == json.loads((out / "training.json").read_text())
    assert not list((out / "checkpoint-4").glob("model*"))  # what training goes on from is small
    assert (out / "imagined.png").is_file()

    agent = WorldVLA.from_pretrained(out, device="cpu")
    frame = np.zeros((64, 64, 3), np.uint8)
    assert agent.predict_actions([frame, frame], "lift the cube").shape == (2, 7)
    assert agent.predict_frame([frame], np.zeros((1, 7))).shape == (64, 64, 3)
    checkpoint = WorldVLA.from_pretrained(out / "checkpoint-4", dtype=torch.float32, device="cpu")
    logits = checkpoint.model(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, logits, rtol=1e-5, atol=1e-5)


def test_adapters_learn_and_log_what_other_runs_do(published, small_data, adapted, tmp_path):
    other = adapt(published, small_data, tmp_path, dataclasses.replace(ADAPTED, lora_rank=0), limit=1)
    assert other["trained_parameters"] == other["parameters"] == adapted[1]["parameters"]
    assert not (tmp_path / "adapter").exists()
    rows = [read_lines(folder / "log.jsonl") for folder in (adapted[0], tmp_path)]
    for name in ("loss", "eval_loss"):
        kinds = [set(next(row for row in run if name in row)) for run in rows]
        assert kinds[0] == kinds[1]
    # New adapters add nothing: the first loss is that of the weights beneath.
    first, curve = rows[1][0]["loss"], [row["loss"] for row in rows[0] if "loss" in row]
    assert curve[0] == pytest.approx(first, rel=1e-5)
    losses = [row["eval_loss"] for row in rows[0] if "eval_loss" in row]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_interrupted_adapters_go_on_bit_for_bit(published, small_data, adapted, tmp_path):
    adapt(published, small_data, tmp_path, limit=2)
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    record = adapt(published, small_data, tmp_path)
    assert record["steps"] == 4
    curves = [
        [row["loss"] for row in read_lines(folder / "log.jsonl") if "loss" in row]
        for folder in (adapted[0], tmp_path)
    ]
    assert curves[0] == curves[1]
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / name).read_bytes() == (adapted[0] / name).read_bytes()


def test_adapters_do_not_go_on_over_other_weights(published, small_data, tmp_path):
    """A checkpoint holds nothing but adapters."""
    shutil.copytree(published.checkpoint, tmp_path / "init")
    recipe = dataclasses.replace(ADAPTED, held_out=False)
    adapt(published, small_data, tmp_path / "run", recipe, limit=1, init=tmp_path / "init")
    other = load(tmp_path / "init")
    torch.nn.init.zeros_(other.model.layers[0].self_attn.q_proj.weight)
    other.save_pretrained(tmp_path / "init")
    with pytest.raises(RecipeError, match="begun otherwise: frozen_weights"):
        adapt(published, small_data, tmp_path / "run", recipe, init=tmp_path / "init")


def test_frozen_weights_are_in_the_type_of_the_precision(published, small_data, tmp_path, monkeypatch):
    seen = []

    def look(model, config):
        seen.append(model.dtype)
        return original(model, config)

    original = training.with_adapters
    monkeypatch.setattr(training, "with_adapters", look)
    recipe = dataclasses.replace(ADAPTED, precision="bf16", stored="bf16", held_out=False)
    record = adapt(published, small_data, tmp_path, recipe, limit=1)
    assert seen == [torch.bfloat16]
    assert record["last"]["loss"] > 0
    assert WorldVLA.from_pretrained(tmp_path, device="cpu").model.dtype == torch.bfloat16


def test_adapters_under_fsdp_are_refused(published, small_data, tmp_path, monkeypatch):
    def spread(self, *arguments, **keywords):
        original(self, *arguments, **keywords)
        self.is_fsdp_enabled = True

    original = WorldVLATrainer.__init__
    monkeypatch.setattr(WorldVLATrainer, "__init__", spread)
    with pytest.raises(RecipeError, match="lora_rank is 4, and FSDP is to spread the weights"):
        adapt(published, small_data, tmp_path)
    assert not (tmp_path / "training.json").exists()


def test_adapters_without_peft_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'worldvla-libero\[lora\]'"):
        train_recipe(ADAPTED, "nowhere", tmp_path, tokenizer="nowhere", init="nowhere")


def test_what_does_not_fit_is_refused(place, published, tmp_path):
    with pytest.raises(RecipeError, match="holds frames of 64 px; recipe nano needs 128"):
        run(place, tmp_path, dataclasses.replace(TINY, image_size=128))
    with pytest.raises(RecipeError, match="starts from Chameleon-7B in the published layout"):
        run(place, tmp_path, dataclasses.replace(find_recipe("table3-row5-goal"), image_size=64))
    with pytest.raises(RecipeError, match="no initial weights belong to it"):
        run(place, tmp_path, init="somewhere")
    with pytest.raises(ShardError, match="was made with image tokenizer"):
        run(place, tmp_path, tokenizer=published.tokenizer)
    with pytest.raises(RecipeError, match="batch_size is 4; a multiple of 3 is needed: 1 processes of 3 samples"):
        run(place, tmp_path, options=dataclasses.replace(OPTIONS, per_device=3))
    with pytest.raises(RecipeError, match="do not fill one batch of 4000"):
        run(place, tmp_path, dataclasses.replace(TINY, batch_size=4000))
    small = dataclasses.replace(TINY, size=dataclasses.replace(TINY.size, max_positions=32))
    with pytest.raises(RecipeError, match="tokens; the model has 32 positions"):
        run(place, tmp_path, small)
    only = write_data(
        tmp_path / "only",
        TokenDataset(place / "data").record.image_tokenizer,
        rows=4,
        splits=("train",),
    )
    with pytest.raises(RecipeError, match="no validation split"):
        run(place, tmp_path, data=only)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize("name", ["one_gpu", "one_node", "several_nodes"])
def test_configurations_for_accelerate_are_understood(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "examples" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes >= 1
    if name != "one_gpu":
        assert config.fsdp_config["fsdp_version"] == 2
        wrapped = config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
        assert wrapped in WorldVLAForConditionalGeneration._no_split_modules


def test_documented_launches_divide_the_batch():
    commands = re.findall(r"accelerate launch(?:[^`\\]|\\\n)*", (ROOT / "docs" / "cluster.md").read_text())
    launches = [dict(re.findall(r"--([a-z_-]+) (\S+)", command)) for command in commands]
    launches = [launch for launch in launches if "recipe" in launch]
    assert len(launches) == 2
    for launch in launches:
        batch = RECIPES[launch["recipe"]].batch_size
        assert batch % (int(launch["num_processes"]) * int(launch["per-device"])) == 0


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("log_every", 0, "1 and above"),
        ("evaluate_every", -1, "1 and above"),
        ("save_every", 0, "1 and above"),
        ("keep", 0, "1 and above"),
        ("per_device", -1, "0 and above"),
        ("loaders", -2, "0 and above"),
    ],
)
def test_options_out_of_range_are_refused(name, value, allowed):
    with pytest.raises(RecipeError, match=f"{name} is {value}; allowed: {allowed}"):
        RunOptions(**{name: value})


@pytest.mark.slow
def test_a_sharded_run_of_two_processes_gets_past_an_evaluation(place, tmp_path):
    """Their model is of the usual class, too; rank 0 must not imagine alone."""
    recipe = dataclasses.replace(TINY, dropout=0.0, max_steps=3)
    run(place, tmp_path / "one", recipe)
    work = Path(__file__).with_name("sharded_training_work.py")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    plain = json.dumps(dataclasses.asdict(recipe))
    command = [sys.executable, *launcher, work, place, tmp_path / "two", plain]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    assert done.stderr.count("no imagined.png: the weights are spread over processes") <= 2  # one for each run
    # And a finished one, whose model is not there, gathers it from its checkpoint.
    for two in (tmp_path / "two", tmp_path / "two-again"):
        rows = [read_lines(folder / "log.jsonl") for folder in (tmp_path / "one", two)]
        for name in ("loss", "eval_loss", "eval_action_l1"):
            curves = [[row[name] for row in run if name in row] for run in rows]
            assert curves[1] == pytest.approx(curves[0], rel=1e-5)
        assert not (two / "imagined.png").exists()
        assert WorldVLA.from_pretrained(two, device="cpu").processor.settings.num_actions == 2
        assert json.loads((two / "training.json").read_text())["steps"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nano", "fine-tune"])
def test_the_command_on_two_processes_learns_what_it_learns_on_one(
    place, published, small_data, tmp_path, capsys, name
):
    """All weights of a small model; adapters of one that exists, under gradient checkpointing."""
    if name == "nano":
        options = ["--data", place / "data", "--tokenizer", place / "tokenizer"]
        options += ["--hidden-size", "32", "--intermediate-size", "48", "--layers", "1", "--heads", "2"]
    else:
        options = ["--data", small_data, "--tokenizer", published.tokenizer, "--init", published.checkpoint]
        options += ["--lora-rank", "4", "--lora-alpha", "16", "--learning-rate", "0.01", "--dropout", "0"]
    options += ["--recipe", name, "--image-size", "64", "--chunk", "2", "--max-steps", "3", "--batch-size", "4"]
    options += ["--precision", "fp32", "--log-every", "1", "--cpu"]
    command = list(map(str, ["train", *options, "--out"]))
    assert cli.main([*command, str(tmp_path / "1")]) == cli.EXIT_OK
    said = [capsys.readouterr().out]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "worldvla_libero.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [sys.executable, *launcher, *command, str(tmp_path / "2")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    said.append(done.stdout)
    curves = []
    for out, printed in zip((tmp_path / "1", tmp_path / "2"), said, strict=True):
        assert printed.count(f"recipe {name}") == 1
        curves.append([row["loss"] for row in read_lines(out / "log.jsonl") if "loss" in row])
        assert WorldVLA.from_pretrained(out, device="cpu").processor.settings.num_actions == 2
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.slow
def test_smoke_learns_from_the_few_demonstrations_that_come_with_the_package(tmp_path):
    command = [Path(sys.executable).with_name("worldvla"), "train", "--recipe", "smoke", "--log-every", "5"]
    done = subprocess.run([*command, "--out", tmp_path / "smoke"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "40 of 40 steps" in done.stdout
    losses = [row["loss"] for row in read_lines(tmp_path / "smoke" / "log.jsonl") if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    agent = WorldVLA.from_pretrained(tmp_path / "smoke", device="cpu")
    with Simulator(load_suite("libero_object").task(0), image_size=128) as simulator:
        frame = simulator.reset(initial_state=0).frame
        chunk = agent.predict_actions([frame], simulator.task.language)
        assert chunk.shape == (5, 7)
        assert simulator.step(chunk[0]).frame.shape == (128, 128, 3)
