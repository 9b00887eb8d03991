"""Memory and time of logits in training: of all positions, and of supervised positions only, in chunks.

    python benchmarks/logits_memory.py [--quick] [--runs 3] [--only memory speed]

Half of the batch are action samples (two frames of 256 px, five actions), half world samples (one frame and
action, the next frame), in the published layout.

memory: the bytes of all tensors as wide as the vocabulary that are alive at once in the head and the loss, forward
and backward: logits, their fp32 copies, probabilities, gradients.
speed: samples a second of `WorldVLATrainer` against transformers' own `Trainer` with the logits of all positions
and the published loss in the plainest way. A random model of about 100 million parameters in fp32; both sides
begin with the same weights and see the same batches under the same optimizer. They train in turn, anew in every
run, and the losses of all steps are compared.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import weakref
from copy import deepcopy
from typing import Any

import common
import numpy as np
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from worldvla_model import WorldVLAConfig, WorldVLAForConditionalGeneration
from worldvla_model.cost import body_parameters
from worldvla_model.loss import IGNORED, chunked_losses, combine, means
from worldvla_model.training import Collator, Mixture, MixtureSampler, WorldVLATrainer
from worldvla_tokenizers import Vocabulary, sequence

V = Vocabulary.published()
HIDDEN = 64  # where the head and the loss are all there is
NEEDED = 30  # at most so many percent of the bytes of all logits
BATCH = 4  # where samples a second are counted
STEPS = 3  # of a run; the first is not counted
SIZES: dict[str, dict[str, int]] = {
    "quick": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4},
    "100M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 12, "num_attention_heads": 8},
}
PARTS = ("memory", "speed")
PLAIN, OURS = "Trainer, all logits", "WorldVLATrainer"


class WideTensors(TorchDispatchMode):
    """Counts bytes of living tensors with rows as wide as the vocabulary; weights are not among them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.living, self.now, self.peak = width, set(), 0, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.ndim >= 2 and tensor.shape[-1] == self.width:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage.data_ptr(), storage.nbytes()
        if place in self.living or not size:
            return
        self.living.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget() -> None:
            self.living.discard(place)
            self.now -= size

        weakref.finalize(storage, forget)


class PlainTrainer(Trainer):
    """transformers' own, with the batches of the other one."""

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        data = self.train_dataset
        return MixtureSampler(len(data.action), len(data.world), share=0.5, seed=self.args.seed, step=BATCH)


class Clock(TrainerCallback):
    """When steps end: by the clock on the wall, and in seconds of processors."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One does."""
        self.ends.append((time.perf_counter(), time.process_time()))


def samples(count: int, vocabulary: int) -> Mixture:
    """Random ones, half of each kind."""
    rng = np.random.default_rng(0)

    def image() -> np.ndarray:
        return rng.integers(0, 8_192, (16, 16))

    def words() -> list[int]:
        return rng.integers(16_388, min(vocabulary, V.size), 20).tolist()

    def actions(number: int) -> np.ndarray:
        return rng.integers(V.action_range.start, V.action_range.stop, (number, 7))

    half = range(count // 2)
    return Mixture(
        [sequence.action_sample(words(), [image(), image()], actions(5), V) for _ in half],
        [sequence.world_sample(words(), [image()], actions(1), [image()], V) for _ in half],
    )


def plain_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The published loss in the plainest way: over the logits of all positions."""
    scores, targets = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
    entropy = functional.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="none")
    weights = torch.where((targets >= 3) & (targets <= 8_194), 0.04, 1.0) * (targets != IGNORED)
    squares = scores.logsumexp(dim=-1)[targets != IGNORED] ** 2
    return (weights * entropy).sum() / weights.sum() + 1e-5 * squares.mean()


def peak(batch: dict[str, torch.Tensor], vocabulary: int, chunk: int | None) -> tuple[int, torch.Tensor]:
    """Peak bytes of logits in a step, and the gradient of the hidden states."""
    torch.manual_seed(0)
    labels = batch["labels"]
    hidden = torch.randn(*labels.shape, HIDDEN, requires_grad=True)
    head = torch.randn(vocabulary, HIDDEN, requires_grad=True)
    with WideTensors(vocabulary) as counted:
        if chunk is None:
            plain_loss(hidden @ head.T, labels).backward()
        else:
            losses = chunked_losses(hidden, head, labels, chunk=chunk)
            combine(means(losses, "published", is_world=batch["is_world"])).backward()
    return counted.peak, hidden.grad


def memory(count: int, vocabulary: int, chunk: int) -> None:
    mixture = samples(count, vocabulary)
    batch = Collator(1)([mixture[i] for i in range(count)])
    labels = batch["labels"]
    supervised = int((labels[:, 1:] != IGNORED).sum())
    print(
        f"\nMemory of logits: {count} samples, {labels.numel():,} positions, {supervised:,} of them supervised "
        f"({100 * supervised / labels.numel():.0f} %), vocabulary {vocabulary:,}, fp32"
    )
    full, gradient = peak(batch, vocabulary, None)
    rows = [["all positions", f"{full / 2**20:,.0f}", "", "", "", ""]]
    for size in (supervised, chunk):
        found, other = peak(batch, vocabulary, size)
        share, error = 100 * found / full, float((other - gradient).norm() / gradient.norm())
        name = "supervised positions" if size == supervised else f"… in chunks of {size:,}"
        reached = common.yes(share <= NEEDED)
        row = [name, f"{found / 2**20:,.0f}", f"{share:.1f} %", f"{error:.1e}", f"{NEEDED} %", reached]
        rows.append(row)
    common.table(rows, ["", "MiB", "of all", "gradient off by", "needed", "reached"])


def train(way: str, model: WorldVLAForConditionalGeneration, mixture: Mixture) -> tuple[float, float, list[float]]:
    """Seconds and processor seconds of a step after the first, and the loss of each."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            seed=1,
            use_cpu=True,
            logging_steps=1,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            dataloader_drop_last=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        options: dict[str, Any] = {"train_dataset": mixture, "callbacks": [clock]}
        if way == OURS:
            trainer = WorldVLATrainer(model, arguments, world_share=0.5, **options)
        else:
            trainer = PlainTrainer(
                model,
                arguments,
                data_collator=Collator(model.config.pad_token_id),
                compute_loss_func=lambda outputs, labels, **_: plain_loss(outputs.logits, labels),
                **options,
            )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds, busy = (
        (last - first) / (STEPS - 1) for first, last in zip(clock.ends[0], clock.ends[-1], strict=True)
    )
    return seconds, busy, losses


def speed(size: str, vocabulary: int, runs: int) -> None:
    torch.manual_seed(0)
    config = WorldVLAConfig(**SIZES[size], vocab_size=vocabulary, max_position_embeddings=1_024)
    model = WorldVLAForConditionalGeneration(config)
    mixture = samples(BATCH * STEPS, vocabulary)
    rates, busy, curves = ({way: [] for way in (PLAIN, OURS)} for _ in range(3))
    for run in range(runs):
        for way in (PLAIN, OURS) if run % 2 == 0 else (OURS, PLAIN):
            seconds, processors, losses = train(way, deepcopy(model), mixture)
            rates[way].append(BATCH / seconds)
            busy[way].append(processors)
            curves[way] += losses
    off = max(abs(a - b) / a for a, b in zip(curves[PLAIN], curves[OURS], strict=True))
    print(
        f"\nTraining: {model.num_parameters():,} parameters, batches of {BATCH}; {runs} runs of {STEPS} steps of "
        "each side,\n   in turn, the first step of each not counted; medians (lowest … highest).\n"
        f"   Losses of all {len(curves[PLAIN])} steps differ by {off:.0e} of the loss at most."
    )
    base = statistics.median(rates[PLAIN])
    rows = [
        [
            way,
            f"{statistics.median(found):.2f} ({min(found):.2f} … {max(found):.2f})",
            f"{statistics.median(found) / base:.2f}x",
            f"{statistics.median(busy[way]):.1f}",
        ]
        for way, found in rates.items()
    ]
    common.table(rows, ["", "samples/s", "ratio", "processor seconds a step"])
    shares = [head_share(one) for one in (config, WorldVLAConfig())]
    print("   the head has {:.0f} % of the weights that multiply a token, {:.0f} % in a 7B model".format(*shares))


def head_share(config: WorldVLAConfig) -> float:
    """Percent."""
    head = config.vocab_size * config.hidden_size
    return 100 * head / (head + body_parameters(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="smallest sizes: to see that it runs, not how fast")
    parser.add_argument("--samples", type=int, help="where memory is counted")
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--runs", type=int)
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    options = parser.parse_args()
    vocabulary = 16_400 if options.quick else 65_536
    runs = options.runs or (2 if options.quick else 3)
    torch.set_num_threads(2)
    common.print_machine(sizes="quick" if options.quick else "default", threads=torch.get_num_threads(), runs=runs)
    with common.watching_others() as others:
        if "memory" in options.only:
            count, chunk = (4, 256) if options.quick else (8, 512)
            memory(options.samples or count, vocabulary, options.chunk or chunk)
        if "speed" in options.only:
            speed("quick" if options.quick else "100M", vocabulary, runs)
    common.print_others(others)


if __name__ == "__main__":
    main()
