"""Training: mixed samples in, batches of ids, a model out. Knows no data set: samples are pairs of ids and labels.

Action and world samples share one batch, each under its own mask, and one loss. The optimizer, schedules, mixed
precision, FSDP and the loop are those of transformers' `Trainer` and of accelerate.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from worldvla_model.cost import known_hardware, training_flops
from worldvla_model.loss import (
    IGNORED,
    IMAGE_IDS,
    Mean,
    SupervisedLosses,
    combine,
    means,
    supervised_positions,
    token_weights,
)


class TrainingError(ValueError):
    """Samples or settings that nothing can be trained with."""


class Example(NamedTuple):
    """One sample and what kind it is.

    Attributes:
        ids: (T,) ids.
        labels: (T,) ids, -100 where nothing is supervised.
        is_world: whether it is a world (or video) sample.
    """

    ids: Sequence[int]
    labels: Sequence[int]
    is_world: bool


class Mixture(Dataset[Example]):
    """Action samples followed by world samples.

    Args:
        action: map-style samples (ids, labels); may be empty.
        world: likewise.

    Raises:
        TrainingError: there is no sample at all.
    """

    def __init__(self, action: Sequence[Any] = (), world: Sequence[Any] = ()) -> None:
        if len(action) + len(world) == 0:
            raise TrainingError("no action sample and no world sample; at least one is needed")
        self.action, self.world = action, world

    def __len__(self) -> int:
        return len(self.action) + len(self.world)

    def __getitem__(self, index: int) -> Example:
        is_world = index >= len(self.action)
        ids, labels = self.world[index - len(self.action)] if is_world else self.action[index]
        return Example(ids, labels, is_world)


class MixtureSampler(Sampler[int]):
    """Indices of a `Mixture`, shuffled anew in every epoch, with a set share of world samples in every stretch.

    Any n neighbours hold `share * n` world samples, up to one: so does every batch, however batches are divided
    among processes. In an epoch every sample of one kind is seen once, and those of the other kind, which would
    run short, equally often, up to one.

    Args:
        num_action: action samples.
        num_world: world samples.
        share: of world samples, 0 … 1; None to shuffle all uniformly, as published.
        seed: of the order.
        step: samples of an optimizer step. An epoch is a whole number of them, so that it ends alike however a
            step is divided among processes and accumulation; the rest waits for the next shuffle.

    Raises:
        TrainingError: a share outside 0 … 1, or one of samples that do not exist.
    """

    def __init__(
        self, num_action: int, num_world: int, *, share: float | None = None, seed: int = 0, step: int = 1
    ) -> None:
        if share is not None:
            if not 0 <= share <= 1:
                raise TrainingError(f"share of world samples is {share}; allowed: 0 … 1")
            for kind, count, part in (("action", num_action, 1 - share), ("world", num_world, share)):
                if part and not count:
                    raise TrainingError(f"share of world samples is {share}, but there is no {kind} sample")
        self.counts, self.share, self.seed, self.step, self.epoch = (num_action, num_world), share, seed, step, 0

    def __len__(self) -> int:
        count = sum(self.counts)
        if self.share is not None:
            parts = zip(self.counts, (1 - self.share, self.share), strict=True)
            count = max(round(number / part) for number, part in parts if part)
        return count - count % self.step if count >= self.step else count

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.share is None:
            yield from islice(self._shuffled(0, len(self)), len(self))
            return
        action, world = self._shuffled(0, self.counts[0]), self._shuffled(self.counts[0], self.counts[1])
        for position in range(len(self)):
            is_world = int((position + 1) * self.share) > int(position * self.share)
            yield next(world if is_world else action)

    def _shuffled(self, first: int, count: int) -> Iterator[int]:
        """Indices from `first` on in random order, again and again."""
        seeds = np.random.SeedSequence((self.seed, self.epoch, first))
        order = np.random.default_rng(seeds)
        while count:
            yield from (first + order.permutation(count)).tolist()


class Collator:
    """Examples → one padded batch.

    There is no padding mask: padding stands on the right, every mask is causal at least, so no token looks at it.

    Args:
        pad_token_id: fills up.
        pad_to_multiple_of: length of the batch, so that few different ones occur (for compiled models).
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int = 1) -> None:
        self.pad_token_id, self.multiple = pad_token_id, pad_to_multiple_of

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Collate.

        Returns:
            `input_ids`, `labels` (B, T), `is_world` (B,).
        """
        longest = max(len(example.ids) for example in examples)
        shape = len(examples), -(-longest // self.multiple) * self.multiple
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORED)
        for row, example in enumerate(examples):
            ids[row, : len(example.ids)] = torch.tensor(example.ids)
            labels[row, : len(example.ids)] = torch.tensor(example.labels)
        return {
            "input_ids": ids,
            "labels": labels,
            "is_world": torch.tensor([example.is_world for example in examples]),
        }


class WorldVLATrainer(Trainer):
    """transformers' Trainer with the loss of a mixed batch, taken over all of it.

    The means of the loss go over all samples of an optimizer step, whatever the number of accumulation steps and
    processes they are spread over. The rule and its weights are those of the model's configuration. World samples
    are under the causal mask, action samples under that of the configuration.

    A checkpoint appears under its name when all of it is written, and not before. Resumed from it, training goes
    on as if it had never stopped, with the intervals of logs, evaluations and checkpoints that are set now; from
    one of the last step, it does nothing more. With every checkpoint of `save_strategy="steps"` a line is logged,
    so that no mean goes over steps on both sides of one.

    Evaluation takes every held-out sample once, and no random numbers from training.

    Logged beside transformers' own: cross-entropy of action and of world samples (`loss_action`, `loss_world`),
    the mean squared log-partition function (`z`), the share of tokens predicted right by kind
    (`accuracy_action_1` …, `accuracy_image`, `accuracy_structure`), the mean absolute error of the likeliest
    actions in data units (`action_l1`, each dimension given the true ones before it), samples and tokens a second,
    and on GPUs of `cost.HARDWARE` the share of their peak (`mfu`).

    Args:
        model: a `WorldVLAForConditionalGeneration`, or peft's model around one.
        args: transformers' `TrainingArguments`.
        train_dataset: a `Mixture`.
        world_share: see `MixtureSampler`.
        processing_class: a `WorldVLAProcessor`, saved with every checkpoint; without it actions are not decoded.
        kwargs: of transformers' `Trainer`.

    Raises:
        TrainingError: settings under which losses would be wrong or hidden, or several GPUs without a launcher.
    """

    control: Any
    loss_is_scaled_for_ga = True  # read by transformers 5.2x; earlier ones look at `num_items_in_batch`

    def __init__(
        self,
        model: Any,
        args: Any,
        *,
        world_share: float | None = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        if args.logging_nan_inf_filter:
            raise TrainingError(
                "logging_nan_inf_filter is True, which shows other losses for NaN; set it to False"
            )
        if args.n_gpu > 1:
            raise TrainingError(
                f"{args.n_gpu} GPUs and one process; start with `accelerate launch` or `torchrun`, or choose one "
                "GPU with CUDA_VISIBLE_DEVICES"
            )
        kwargs.setdefault("data_collator", Collator(model.config.pad_token_id))
        super().__init__(model, args, processing_class=processing_class, **kwargs)
        self.world_share = world_share
        self._stage: Path | None = None
        # Of training and of evaluation, which interrupts it.
        self._records = {
            training: _Record(model.config, processing_class, self.args.device) for training in (True, False)
        }
        self._since, self._paused = time.perf_counter(), 0.0
        self._sampler: MixtureSampler | None = None
        self.add_callback(_Flow(self))
        # The loss is that of the whole step already; transformers 5.4 lets accelerate divide it once more.
        self.accelerator.gradient_accumulation_steps = 1

    def _get_train_sampler(self, train_dataset: Any = None) -> MixtureSampler:
        data = self.train_dataset if train_dataset is None else train_dataset
        args = self.args
        self._sampler = MixtureSampler(
            len(data.action),
            len(data.world),
            share=self.world_share,
            seed=args.seed if args.data_seed is None else args.data_seed,
            step=args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        )
        return self._sampler

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        """All of them, as published; transformers would leave out norms and biases."""
        return [name for name, _ in model.named_parameters()]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> dict[str, Tensor]:
        """Denominators of the loss: for each mean, the weight of all tokens of an optimizer step, on all ranks."""
        config = self._config
        found: dict[str, Tensor] = {}
        for batch in batch_samples:
            row, _, labels = supervised_positions(batch["labels"])
            world = batch["is_world"][row]
            for name, weights in token_weights(labels, config.loss, is_world=world, alpha=config.alpha).items():
                found[name] = found.get(name, 0) + weights.sum()
        found = {name: weight.to(device) for name, weight in found.items()}
        # Whether the model is in training mode says nothing here: the loop sets it after this.
        if self.accelerator.num_processes > 1:
            found = {name: self.accelerator.reduce(weight, "sum") for name, weight in found.items()}
        return found

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The share of one forward pass in the loss of the whole step."""
        config = self._config
        outputs = model(**inputs, skip_logits=True)
        losses: SupervisedLosses = outputs["losses"]
        self._records[True].add(losses, inputs)
        parts = means(losses, config.loss, is_world=inputs["is_world"], alpha=config.alpha)
        loss = combine(parts, alpha=config.alpha, z_loss_weight=config.z_loss_weight, weights=num_items_in_batch)
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # gradients are averaged over processes
        if not torch.isfinite(loss):
            raise TrainingError(f"the loss is {loss.item()} at step {self.state.global_step}: {_shown(parts)}")
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with what was counted since the last time."""
        if "loss" in logs:
            now = time.perf_counter()
            seconds, self._since, self._paused = now - self._since - self._paused, now, 0.0
            logs = {**logs, **self._rates(seconds), **self._records[True].drain(self.accelerator)}
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers. Nothing comes back where there was nothing left to do."""
        self._since, self._paused = time.perf_counter(), 0.0
        try:
            return super().train(*args, **kwargs)
        except _NothingLeft:
            self.is_in_train = False
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return None

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate; see transformers."""
        device = self.args.device
        # A data loader draws a seed for its workers from the numbers that dropout goes on with.
        with self._pause(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of all held-out samples: what training leaves for the next epoch would be lost here."""
        drop, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Count the losses of a held-out batch; nothing of it is kept."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            losses: SupervisedLosses = model(**inputs, skip_logits=True)["losses"]
        own = losses.sample < self._own_samples(len(inputs["input_ids"]))
        self._records[False].add(SupervisedLosses(*(part[own] for part in losses)), inputs)
        return None, None, None

    def _own_samples(self, batch: int) -> int:
        """How many of a held-out batch are not repeated from its beginning, which gives all processes as many.

        They come first, in the order of processes: what `Accelerator.gather_for_metrics` relies on, too.
        """
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return batch
        return min(batch, max(0, state.remainder - batch * self.accelerator.process_index))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Losses and accuracies of held-out samples, without gradients and without keeping predictions."""
        record = self._records[False]
        record.clear()
        result = super().evaluation_loop(dataloader, description, True, ignore_keys, metric_key_prefix)
        config, found = self._config, record.parts(self.accelerator)
        loss = combine(found, alpha=config.alpha, z_loss_weight=config.z_loss_weight).item()
        if not math.isfinite(loss):
            step = self.state.global_step
            raise TrainingError(f"the loss of held-out samples is {loss} at step {step}: {_shown(found)}")
        counted = {"loss": loss, **record.drain(self.accelerator)}
        result.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in counted.items()})
        return result

    def _rates(self, seconds: float) -> dict[str, float]:
        config = self._config
        samples, tokens, squares = self._records[True].counted(self.accelerator)
        found = {"samples_per_second": samples / seconds, "tokens_per_second": tokens / seconds}
        device = torch.cuda.get_device_name(self.args.device) if self.args.device.type == "cuda" else ""
        hardware = known_hardware(device)
        if hardware is not None:
            flops = training_flops(config, tokens, squares)
            found["mfu"] = flops / seconds / hardware.flops / self.accelerator.num_processes
        return found

    @contextmanager
    def _pause(self) -> Iterator[None]:
        """Time that does not count as training."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - began

    def _get_output_dir(self, trial: Any) -> str:
        return str(super()._get_output_dir(trial) if self._stage is None else self._stage)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place, and give it its name when all processes are done."""
        folder = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        stage = folder / f".{name}.partial"
        with self._pause():
            if self.args.should_save:
                for leftover in folder.glob(f".{PREFIX_CHECKPOINT_DIR}-*"):
                    shutil.rmtree(leftover)
                stage.mkdir(parents=True)
            self.accelerator.wait_for_everyone()
            best = self._best_checkpoint(folder)
            self._stage = stage
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._stage = None
            self.accelerator.wait_for_everyone()
            self.state.best_model_checkpoint = best
            if self.args.should_save:
                _correct_state(stage / name / "trainer_state.json", best)
                _flush(stage)
                if (folder / name).exists():  # of a run that was resumed from before it
                    _remove(folder / name)
                os.rename(stage / name, folder / name)
                shutil.rmtree(stage)
                kept = {name, Path(best).name if best else name}
                spare = [path for path in checkpoints(folder) if path.name not in kept]
                limit = self.args.save_total_limit
                for path in spare[: max(0, len(spare) + len(kept) - limit) if limit else 0]:
                    _remove(path)
            self.accelerator.wait_for_everyone()

    def _best_checkpoint(self, folder: Path) -> str | None:
        """The checkpoint of the best evaluation, the one being written included.

        The best step itself may have none; then the one that was best before stays.
        """
        step, known = self.state.best_global_step, self.state.best_model_checkpoint
        found = folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if step and (step == self.state.global_step or found.is_dir()):
            return str(found)
        return known if known and Path(known).is_dir() else None

    @property
    def _config(self) -> Any:
        return self.accelerator.unwrap_model(self.model).config


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Checkpoints of a run, oldest first. All of them are whole: half-written ones have other names."""
    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    found = {
        int(path.name.removeprefix(prefix)): path
        for path in Path(folder).glob(f"{prefix}*")
        if path.name.removeprefix(prefix).isdigit()
    }
    return [found[step] for step in sorted(found)]


class _NothingLeft(Exception):  # noqa: N818 - nothing is wrong
    """A run goes on from its last step."""


class _Flow(TrainerCallback):
    """What transformers' own flow leaves open."""

    def __init__(self, trainer: WorldVLATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a checkpoint brings the intervals it was written under

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if control.should_training_stop or state.global_step >= state.max_steps:
            raise _NothingLeft  # the loop would look only after one step more
        # Whether accelerate's data loader tells the sampler its epoch depends on versions and processes.
        assert self.trainer._sampler is not None  # made with the data loader
        self.trainer._sampler.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # What was summed up since the last line is not part of a checkpoint.
        if control.should_save and args.logging_strategy == "steps":
            control.should_log = True


class _Record:
    """Sums over tokens since the last look, on the device; what is logged are their quotients."""

    def __init__(self, config: Any, processor: Any, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dimensions, self.first, self.values = 0, 0, torch.zeros(0, 0, device=device)
        if processor is not None:
            self.first, values = _action_values(processor)
            self.dimensions, self.values = len(values), torch.tensor(values, device=device, dtype=torch.float32)
        actions = [f"accuracy_action_{d + 1}" for d in range(self.dimensions)]
        self.names = [
            "loss_action",
            "loss_world",
            "z",
            "action_l1",
            "accuracy_image",
            "accuracy_structure",
            *actions,
        ]
        self.clear()

    def clear(self) -> None:
        """Forget."""
        self.sums = torch.zeros(len(self.names), 2, device=self.device)  # numerator, denominator
        self.traffic = torch.zeros(3, device=self.device)  # samples, tokens, Σ tokens² of a sample
        self.means: dict[str, Mean] = {}

    @torch.no_grad()
    def add(self, losses: SupervisedLosses, inputs: dict[str, Tensor]) -> None:
        """Count the supervised tokens of a batch."""
        config, ids = self.config, inputs["input_ids"]
        parts = means(losses, config.loss, is_world=inputs["is_world"], alpha=config.alpha)
        for name, part in parts.items():
            known = self.means.get(name, Mean(torch.zeros_like(part.total), torch.zeros_like(part.weight)))
            self.means[name] = Mean(known.total + part.total.detach(), known.weight + part.weight)
        lengths = (ids != config.pad_token_id).sum(dim=1).float()
        self.traffic += torch.stack([torch.full_like(lengths[0], len(ids)), lengths.sum(), (lengths**2).sum()])

        world = inputs["is_world"][losses.sample]
        right = losses.predicted == losses.labels
        image = (losses.labels >= IMAGE_IDS.start) & (losses.labels < IMAGE_IDS.stop)
        dimension = _dimensions(ids, config)[losses.sample, losses.position]  # 1 … D inside actions
        action = dimension > 0
        self._sum("loss_action", losses.cross_entropy, ~world)
        self._sum("loss_world", losses.cross_entropy, world)
        self._sum("z", losses.squared_logsumexp, torch.ones_like(world))
        self._sum("accuracy_image", right, image)
        self._sum("accuracy_structure", right, ~image & ~action)
        for d in range(self.dimensions):
            self._sum(f"accuracy_action_{d + 1}", right, dimension == d + 1)
        if self.dimensions:
            row = (dimension - 1).clamp(min=0, max=self.dimensions - 1)
            true, likeliest = (
                self.values[row, (tokens - self.first).clamp(0, self.values.shape[1] - 1)]
                for tokens in (losses.labels, losses.predicted)
            )
            self._sum("action_l1", (true - likeliest).abs(), action)

    def _sum(self, name: str, values: Tensor, where: Tensor) -> None:
        self.sums[self.names.index(name)] += torch.stack([(values.float() * where).sum(), where.sum()])

    def parts(self, accelerator: Any) -> dict[str, Mean]:
        """The means of the loss over all processes."""
        return {
            name: Mean(*(accelerator.reduce(value, "sum") for value in part)) for name, part in self.means.items()
        }

    def counted(self, accelerator: Any) -> tuple[float, float, float]:
        """Samples, tokens and squared lengths of all processes."""
        return tuple(accelerator.reduce(self.traffic, "sum").tolist())

    def drain(self, accelerator: Any) -> dict[str, float]:
        """Quotients over all processes by name, of what occurred; then forget."""
        sums = accelerator.reduce(self.sums, "sum").tolist()
        self.clear()
        return {name: top / count for name, (top, count) in zip(self.names, sums, strict=True) if count}


def _dimensions(ids: Tensor, config: Any) -> Tensor:
    """(B, T) → (B, T): dimension of the action that a token is the value of, from 1; 0 elsewhere."""
    begins, ends = ids == config.boa_token_id, ids == config.eoa_token_id
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    begin = torch.where(begins, positions, -1).cummax(dim=1).values
    inside = begins.cumsum(dim=1) > ends.cumsum(dim=1)
    return torch.where(inside & ~begins, positions - begin, 0)


def _action_values(processor: Any) -> tuple[int, np.ndarray]:
    """First id of an action value, and (D, bins) what each stands for in each dimension."""
    actions = processor.actions
    first = int(processor.vocabulary.action_ids(np.array([1]))[0])
    ids = np.arange(first, first + actions.bins)
    return first, actions.decode(np.repeat(ids[:, None], actions.dimensions, axis=1)).T


def _correct_state(path: Path, best: str | None) -> None:
    state = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**state, "best_model_checkpoint": best}, indent=2) + "\n", encoding="utf-8")


def _remove(folder: Path) -> None:
    """Delete a checkpoint; under another name, for a deletion may be interrupted too."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def _flush(folder: Path) -> None:
    """Make sure that files are on the disk before a name says so."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())


def _shown(parts: dict[str, Mean]) -> str:
    return ", ".join(f"{name} {(part.total / part.weight).item():.4g}" for name, part in parts.items())
