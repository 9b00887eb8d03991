import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional
from training_work import SHARDED, losses, trainer
from transformers import TrainerCallback, TrainingArguments

from worldvla_model.loss import IGNORED, supervised_losses
from worldvla_model.modeling_worldvla import WorldVLAForConditionalGeneration
from worldvla_model.training import (
    Collator,
    Mixture,
    MixtureSampler,
    TrainingError,
    WorldVLATrainer,
    checkpoints,
)

LEARNING_RATE = 2e-5  # the published one is 5e-6


@pytest.fixture(scope="module")
def mixture(published):
    samples = {"action": [], "world": []}
    for sample in published.samples(size=128):
        samples[sample["kind"]].append((sample["tokens"], sample["labels"]))
    return Mixture(**samples)


def arguments(folder, **options):
    usual = {
        "max_steps": 5,
        "per_device_train_batch_size": 4,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_grad_norm": 4.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    return TrainingArguments(str(folder), **{**usual, **options})


def fresh(published, **config):
    return WorldVLAForConditionalGeneration.from_pretrained(published.checkpoint, dtype=torch.float32, **config)


@pytest.mark.parametrize("share", [None, 0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_share_of_world_samples_holds_in_every_stretch(share):
    sampler = MixtureSampler(30, 50, share=share, seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert epochs[0] != epochs[1]
    for order in epochs:
        assert len(order) == len(sampler)
        world = np.array([i >= 30 for i in order])
        if share is None:
            assert sorted(order) == list(range(80))
            continue
        for length in (4, 7, 32):
            counts = np.convolve(world, np.ones(length), "valid")
            assert np.abs(counts - share * length).max() <= 1
        for kind in (False, True):
            seen = Counter(i for i in order if (i >= 30) == kind)
            if seen:
                assert len(seen) >= min(len(order) * (share if kind else 1 - share), (30, 50)[kind]) - 1
                assert max(seen.values()) - min(seen.values()) <= 1
    again = MixtureSampler(30, 50, share=share, seed=3)
    assert list(again) == epochs[0]
    assert list(MixtureSampler(30, 50, share=share, seed=4)) != epochs[0]


def test_collated_examples_are_padded_on_the_right():
    mixture = Mixture([([5, 6, 7], [-100, 6, 7])], [([8], [8])])
    batch = Collator(1)([mixture[0], mixture[1]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, IGNORED, IGNORED]]
    assert Collator(1, pad_to_multiple_of=8)([mixture[0]])["input_ids"].shape == (1, 8)
    assert batch["is_world"].tolist() == [False, True]


def restated_loss(model, examples, rule):
    """SPEC §8, one sample at a time and without any of our code but the model's forward pass."""
    terms = {"action": [], "world": [], "weighted": [], "weights": [], "z": []}
    for ids, labels, is_world in examples:
        logits = model(torch.tensor([ids])).logits[0, :-1]
        for scores, label in zip(logits, labels[1:], strict=True):
            if label == -100:
                continue
            entropy = functional.cross_entropy(scores, torch.tensor(label))
            weight = 0.04 if 3 <= label <= 8194 else 1.0
            terms["world" if is_world else "action"].append(entropy)
            terms["weighted"].append(weight * entropy)
            terms["weights"].append(weight)
            terms["z"].append(scores.logsumexp(0) ** 2)
    z = 1e-5 * sum(terms["z"]) / len(terms["z"])
    if rule == "published":
        return sum(terms["weighted"]) / sum(terms["weights"]) + z
    means = {kind: sum(terms[kind]) / len(terms[kind]) for kind in ("action", "world") if terms[kind]}
    return means["action"] + 0.04 * means["world"] + z


@pytest.mark.parametrize(("accumulation", "rule"), [(1, "paper"), (2, "published")])
def test_five_steps_give_the_weights_of_a_plain_restatement(published, mixture, tmp_path, rule, accumulation):
    chosen = [0, 1, len(mixture.action), len(mixture.action) + 1]
    batch = Mixture([mixture[i][:2] for i in chosen[:2]], [mixture[i][:2] for i in chosen[2:]])
    trained = fresh(published, loss=rule).double()  # fp32 leaves the sign of tiny gradients to the processor
    options = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = WorldVLATrainer(trained, arguments(tmp_path, **options), train_dataset=batch)
    trainer.train()

    model = fresh(published).double()
    decayed = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(decayed, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    losses = []
    for _ in range(5):
        loss = restated_loss(model, [mixture[i] for i in chosen], rule)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decayed, 4.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-5)
    for (name, found), expected in zip(trained.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(
            found, expected, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    whole = trainer(tmp_path / "whole", save_strategy="steps", save_steps=4)
    whole.train()
    first = trainer(tmp_path / "first", save_strategy="steps", save_steps=4)
    first.add_callback(StopAt(6))  # after the checkpoint of step 4, in the second epoch
    first.train()
    assert losses(first) == {step: loss for step, loss in losses(whole).items() if step <= 6}
    again = trainer(tmp_path / "first", save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=str(checkpoints(tmp_path / "first")[-1]))
    assert losses(again) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name


def test_lines_of_the_log_do_not_reach_over_a_checkpoint(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 3}
    whole = trainer(tmp_path / "whole", **saving)
    whole.train()
    assert list(losses(whole)) == [3, 4, 6, 8, 9]
    first = trainer(tmp_path / "first", **saving)
    first.add_callback(StopAt(5))
    first.train()
    again = trainer(tmp_path / "first", **saving)
    again.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    for name in ("loss", "loss_action", "loss_world", "z", "accuracy_image"):
        assert losses(again, name) == losses(whole, name)


def test_a_resumed_run_takes_the_intervals_that_are_set_now(tmp_path):
    first = trainer(tmp_path, save_strategy="steps", save_steps=4)
    first.add_callback(StopAt(4))
    first.train()
    options = {"save_strategy": "steps", "save_steps": 3, "logging_steps": 2, "held_out": True}
    again = trainer(tmp_path, **options, eval_strategy="steps", eval_steps=7)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{n}" for n in (4, 6, 9)]
    assert list(losses(again)) == [1, 2, 3, 4, 6, 8, 9]
    assert list(losses(again, "eval_loss")) == [7, 9]


def test_a_run_that_goes_on_from_its_last_step_does_nothing_more(tmp_path):
    whole = trainer(tmp_path, save_strategy="steps", save_steps=4)
    whole.train()
    again = trainer(tmp_path, save_strategy="steps", save_steps=4)
    assert again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9")) is None
    assert again.state.global_step == 9
    assert losses(again) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, again.model.state_dict()[name]), name
    assert again.evaluate(again.train_dataset)["eval_loss"] > 0


def test_a_look_at_held_out_samples_does_not_change_what_is_learned(tmp_path):
    alone = trainer(tmp_path)
    alone.train()
    watched = trainer(tmp_path, held_out=True, eval_strategy="steps", eval_steps=2)
    watched.train()
    assert alone.model.config.dropout
    assert losses(watched) == losses(alone)


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_every_held_out_sample_is_looked_at_once(tmp_path, batch):
    run = trainer(tmp_path, held_out=True, per_device_eval_batch_size=batch)
    assert run.args.dataloader_drop_last  # which is for training
    found = run.evaluate()
    whole = run.evaluate(run.eval_dataset)
    assert found["eval_loss"] == whole["eval_loss"]
    assert run.args.dataloader_drop_last
    with torch.no_grad():
        losses = [
            supervised_losses(run.model(torch.tensor([ids])).logits, torch.tensor([labels]))
            for ids, labels, _ in (run.eval_dataset[i] for i in range(7))
        ]
    expected = torch.cat([one.squared_logsumexp for one in losses]).mean()
    assert found["eval_z"] == pytest.approx(expected.item(), rel=1e-5)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_old_checkpoints_make_room(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2)
    run.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-9"]
    assert not list(tmp_path.glob(".checkpoint-*"))


@pytest.mark.parametrize(
    ("found", "best", "kept"),
    [
        # At steps 2, 4, 6, 8 and 9; a checkpoint stands at 4, 8 and 9.
        ([5.0, 1.0, 3.0, 2.0, 2.0], 4, [4, 9]),
        ([5.0, 3.0, 3.0, 1.0, 2.0], 8, [8, 9]),
        ([1.0, 2.0, 3.0, 4.0, 5.0], None, [8, 9]),  # the best step has none
        ([5.0, 3.0, 1.0, 4.0, 5.0], 4, [4, 9]),  # neither; the best before it has
    ],
)
def test_the_best_checkpoint_is_kept(tmp_path, monkeypatch, found, best, kept):
    options = {"held_out": True, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    run = trainer(tmp_path, **options, save_strategy="steps", save_steps=4, save_total_limit=2)
    values = iter(found)
    evaluate = run.evaluation_loop

    def evaluate_as_found(*args, **kwargs):
        result = evaluate(*args, **kwargs)
        result.metrics["eval_loss"] = next(values)
        return result

    monkeypatch.setattr(run, "evaluation_loop", evaluate_as_found)
    run.train()
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    path = None if best is None else str(tmp_path / f"checkpoint-{best}")
    assert run.state.best_model_checkpoint == path
    state = json.loads((tmp_path / "checkpoint-9" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == path


def test_a_failed_save_leaves_the_checkpoints_as_they_were(tmp_path, monkeypatch):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    fail = iter([False, True])
    save = type(run)._save_rng_state

    def save_or_fail(self, folder):
        if next(fail):
            raise OSError("disk full")
        save(self, folder)

    monkeypatch.setattr(type(run), "_save_rng_state", save_or_fail)
    with pytest.raises(OSError, match="disk full"):
        run.train()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]


def test_what_is_logged(tmp_path):
    run = trainer(tmp_path, max_steps=2)
    run.train()
    logged = next(entry for entry in run.state.log_history if "loss" in entry)
    model = trainer(tmp_path).model
    batch = Collator(1)([run.train_dataset[i] for i in next(iter(run.get_train_dataloader().batch_sampler))])
    assert {"loss_action", "loss_world", "z", "accuracy_image", "accuracy_structure"} <= logged.keys()
    assert logged["samples_per_second"] > 0
    assert model.config.loss == "paper"
    assert batch["input_ids"].shape[0] == 4
    parts = logged["loss_action"] + 0.04 * logged["loss_world"] + 1e-5 * logged["z"]
    assert logged["loss"] == pytest.approx(parts, rel=1e-5)
    found = run.evaluate(run.train_dataset)
    parts = found["eval_loss_action"] + 0.04 * found["eval_loss_world"] + 1e-5 * found["eval_z"]
    assert found["eval_loss"] == pytest.approx(parts, rel=1e-5)


def test_actions_are_measured_in_data_units(agent, published, mixture, tmp_path):
    run = WorldVLATrainer(
        agent.model, arguments(tmp_path), train_dataset=mixture, processing_class=agent.processor
    )
    found = run.evaluate(mixture)
    tokenizer, vocabulary = agent.processor.actions, agent.processor.vocabulary
    errors, right = [], []
    for ids, labels, is_world in [mixture[i] for i in range(len(mixture.action))]:
        assert not is_world
        likeliest = agent.model(torch.tensor([ids])).logits[0].argmax(dim=-1)
        places = [i for i, label in enumerate(labels) if 10_006 <= label <= 10_261]
        true = np.array([labels[i] for i in places]).reshape(-1, 7)
        given = np.array([int(likeliest[i - 1]) for i in places]).reshape(-1, 7)
        right += (true == given)[:, 0].tolist()
        given = np.clip(given, vocabulary.action_ids([1])[0], vocabulary.action_ids([256])[0])
        errors += np.abs(tokenizer.decode(true) - tokenizer.decode(given)).ravel().tolist()
    assert found["eval_action_l1"] == pytest.approx(np.mean(errors), rel=1e-4, abs=1e-7)
    assert found["eval_accuracy_action_1"] == pytest.approx(np.mean(right))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = trainer(tmp_path)
    with torch.no_grad():
        run.model.model.norm.weight[0] = float("nan")
    with pytest.raises(TrainingError, match="the loss is nan at step 0"):
        run.train()


def test_settings_that_would_hide_losses_are_refused(tmp_path, small):
    with pytest.raises(TrainingError, match="logging_nan_inf_filter"):
        WorldVLATrainer(
            small, arguments(tmp_path, logging_nan_inf_filter=True), train_dataset=Mixture([([1], [1])])
        )


@pytest.mark.slow
def test_killed_at_each_moment_of_saving_the_last_checkpoint_loads(tmp_path):
    told = json.loads(work("kill", tmp_path).splitlines()[-1])
    # Before the first and the fourth nothing is half done; the last two come after a new one has its name.
    assert told == {"killed": 5, "torn": 3, "step": 4}


@pytest.mark.campaign
def test_killed_at_any_moment_of_saving_the_last_checkpoint_loads(tmp_path):
    found = work("kill", tmp_path, "50")
    told = json.loads(found.splitlines()[-1])
    assert told["killed"] == 50
    assert told["torn"] >= 10  # the moments are those of saving
    assert told["step"] >= 3  # and those that survive lead on


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(tmp_path):
    """From weights that exist, and on after a look at held-out samples: both leave a model in evaluation mode."""
    trainer(tmp_path).model.save_pretrained(tmp_path / "init")
    options = {"init": str(tmp_path / "init"), "held_out": True, "eval_strategy": "steps", "eval_steps": 2}
    options |= {"dropout": 0.0, "double": True, "per_device_eval_batch_size": 2, "max_steps": 7}  # past an epoch
    one = trainer(tmp_path / "one", **options)
    assert not one.model.training
    one.train()
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    work("train", tmp_path / "two", json.dumps(options), ranks=2)
    for name in ("loss", "eval_loss", "eval_z"):
        found = {int(step): value for step, value in curve(tmp_path / "two", name).items()}
        assert found == pytest.approx(losses(one, name), rel=1e-5)
    assert list(losses(one, "eval_loss")) == [2, 4, 6, 7]


@pytest.mark.slow
def test_a_sharded_run_learns_the_same_and_goes_on_under_another_number_of_ranks(tmp_path):
    exact = {"dropout": 0.0, "double": True, "max_steps": 7}
    one, two = trainer(tmp_path / "one", **exact), tmp_path / "two"
    one.train()
    saving = {**exact, "save_strategy": "steps", "save_steps": 2}
    work("train", two, json.dumps({**saving, "per_device_train_batch_size": 2}), ranks=2, env=SHARDED)
    expected = pytest.approx(list(losses(one).values()), rel=1e-5)
    assert list(curve(two).values()) == expected
    shutil.copytree(two / "checkpoint-4", tmp_path / "one_again" / "checkpoint-4")
    resumed = {**saving, "resume": True}
    work("train", tmp_path / "one_again", json.dumps(resumed), ranks=1, env=SHARDED)
    assert list(curve(tmp_path / "one_again").values()) == expected
    shutil.copytree(tmp_path / "one_again" / "checkpoint-6", tmp_path / "two_again" / "checkpoint-6")
    resumed |= {"per_device_train_batch_size": 2}
    work("train", tmp_path / "two_again", json.dumps(resumed), ranks=2, env=SHARDED)
    assert list(curve(tmp_path / "two_again").values()) == expected


def curve(folder, name="loss"):
    return json.loads((folder / "losses.json").read_text())[name]


def work(*command, ranks=None, env=None):
    script = str(Path(__file__).with_name("training_work.py"))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(
        [sys.executable, *launcher, script, *map(str, command)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    return done.stdout
