"""What the tests of training run in processes of their own: to be killed, or to be several.

python training_work.py train FOLDER OPTIONS…       one run, also under torch.distributed.run
python training_work.py kill FOLDER [COUNT]         kills runs at each moment of saving, or COUNT at random
"""

import json
import os
import signal
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from transformers import TrainingArguments

from worldvla_model import WorldVLAConfig, WorldVLAForConditionalGeneration
from worldvla_model.training import Mixture, WorldVLATrainer, checkpoints

SIZE = {
    "vocab_size": 16_400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}

SHARDED = {  # what `accelerate launch` sets for examples/accelerate/one_node.yaml
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "WorldVLADecoderLayer",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def mixture(actions=13, worlds=9):
    """Small samples of the right shape: one image of four codes, two actions, or an image again."""
    rng = np.random.default_rng(5)

    def image():
        codes = rng.integers(4, 8_196, (2, 2))
        return [8_197, 8_805, 8_805, *codes[0], 8_803, *codes[1], 8_803, 8_196]

    def action():
        return [10_004, *rng.integers(10_006, 10_262, 7), 15_004]

    def sample(prompt, answer):
        ids = [0, *rng.integers(16_388, 16_400, rng.integers(2, 9)), *prompt, 8_710]
        return [*map(int, ids), *map(int, answer), 8_710], [*[-100] * len(ids), *map(int, answer), 8_710]

    return Mixture(
        [sample(image(), [*action(), *action()]) for _ in range(actions)],
        [sample([*image(), *action()], image()) for _ in range(worlds)],
    )


def trainer(folder, *, dropout=0.1, init=None, held_out=False, double=False, **options):
    """In fp64 if asked to: where sums in another order are compared, Adam makes much of what fp32 rounds away."""
    torch.manual_seed(3)
    config = {"dropout": dropout, "loss": "paper"}
    if init is None:
        model = WorldVLAForConditionalGeneration(WorldVLAConfig(**SIZE, **config))
    else:
        model = WorldVLAForConditionalGeneration.from_pretrained(init, dtype=torch.float32, **config)
    usual = {
        "max_steps": 9,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "max_grad_norm": 1.0,
        "weight_decay": 0.1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "dataloader_drop_last": True,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 1,
        "data_seed": 2,
    }
    if double:
        model = model.double()
    arguments = TrainingArguments(str(folder), **{**usual, **options})
    # Seven held-out samples fill no batch of four, and are no multiple of two processes.
    looked_at = mixture(5, 2) if held_out else None
    return WorldVLATrainer(model, arguments, train_dataset=mixture(), eval_dataset=looked_at, world_share=0.4)


def losses(run, name="loss"):
    return {entry["step"]: entry[name] for entry in run.state.log_history if name in entry}


def train(folder, resume=False, **options):
    run = trainer(folder, **options)
    run.train(resume_from_checkpoint=str(checkpoints(folder)[-1]) if resume else None)
    if run.args.process_index == 0:
        found = {name: losses(run, name) for name in ("loss", "eval_loss", "eval_z")}
        (Path(folder) / "losses.json").write_text(json.dumps(found))


def shard_on_cpu():
    """Let accelerate shard on processes without GPUs, which it does not on its own: FSDP2 itself runs on gloo."""
    from accelerate.state import DistributedType, PartialState

    prepare = PartialState.__init__

    def prepare_as_if_on_gpus(self, *args, **kwargs):
        prepare(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = prepare_as_if_on_gpus


def die_before(folder, is_the_moment):
    """Kill this process before a call, to be chosen, that opens, renames or removes something in the folder."""

    def hook(name, details):
        if name in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
            for place in map(str, details[:2]):
                if str(folder) in place and is_the_moment(name, place.removeprefix(str(folder))):
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


MOMENTS = (  # of writing a checkpoint, in order
    ("os.mkdir", "/.checkpoint-*.partial"),
    ("open", "/.checkpoint-*.partial/*/model.safetensors"),  # written, and not yet on the disk
    ("os.rename", "/.checkpoint-*.partial/checkpoint-*"),  # whole, and without its name
    ("os.rename", "/.checkpoint-*.deleted"),  # the oldest is to go
    ("shutil.rmtree", "/.checkpoint-*.deleted"),
)


def kill_at_moments(folder):
    """Kill a run that saves after every step at each moment of a write, going on from what the last one left."""
    run_and_die(folder, "first", lambda: None, steps=2)
    for moment in MOMENTS:

        def arm(moment=moment):
            die_before(folder, lambda name, place: name == moment[0] and fnmatchcase(place, moment[1]))

        run_and_die(folder, moment, arm)
        yield moment


def kill_at_random(folder, count):
    """Kill runs that save after every step: before one of their file operations, or at any moment between."""
    rng = np.random.default_rng(11)
    for number in range(count):
        known = checkpoints(folder)

        def arm(number=number, known=known):
            if number % 2:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(0.1, 3.0) if known else 2.0)
                signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
            else:
                left = [int(rng.integers(1, 180)) + (0 if known else 90)]

                def counts_down(*_):
                    left[0] -= 1
                    return not left[0]

                die_before(folder, counts_down)

        run_and_die(folder, number, arm)
        yield number


def run_and_die(folder, moment, arm, *, steps=60):
    """A run in a process of its own that `arm` has killed, unless it ends first; what it leaves loads.

    That the newest leads on is for the next run to show: it goes on from it, or ends otherwise than it should.
    """
    known = [path.name for path in checkpoints(folder)]
    child = os.fork()
    if child == 0:
        run = trainer(folder, save_strategy="steps", save_steps=1, save_total_limit=2, max_steps=steps)
        arm()
        run.train(resume_from_checkpoint=str(checkpoints(folder)[-1]) if known else None)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) == (steps == 60), f"run {moment} ended with {status}"
    found = checkpoints(folder)
    assert len(found) >= min(1, len(known)), f"run {moment}: no checkpoint is left of {known}"
    for path in found:
        load_whole(path)


def load_whole(checkpoint):
    """All that a run reads where it goes on."""
    WorldVLAForConditionalGeneration.from_pretrained(checkpoint)
    torch.load(checkpoint / "optimizer.pt", weights_only=True)
    torch.load(checkpoint / "scheduler.pt", weights_only=True)
    torch.load(checkpoint / "rng_state.pth", weights_only=False)  # NumPy's among them
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert checkpoint.name == f"checkpoint-{state['global_step']}"


def go_on(checkpoint):
    resumed = trainer(checkpoint.parent, max_steps=int(checkpoint.name.split("-")[1]) + 1)
    resumed.train(resume_from_checkpoint=str(checkpoint))


def kill(folder, runs):
    torch.set_num_threads(1)
    killed = [any(path.name.startswith(".checkpoint-") for path in Path(folder).iterdir()) for _ in runs]
    for path in checkpoints(folder):
        go_on(path)
    told = {"killed": len(killed), "torn": sum(killed), "step": int(checkpoints(folder)[-1].name.split("-")[1])}
    sys.stdout.write(json.dumps(told) + "\n")


if __name__ == "__main__":
    work, place, *rest = sys.argv[1:]
    if work == "kill":
        kill(place, kill_at_random(place, int(rest[0])) if rest else kill_at_moments(place))
    else:
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            shard_on_cpu()
        train(place, **json.loads(rest[0]))
        if torch.distributed.is_initialized():  # its threads can abort an interpreter that ends with them
            torch.distributed.destroy_process_group()
