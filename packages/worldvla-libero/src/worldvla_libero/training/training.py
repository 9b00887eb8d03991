"""Train a recipe on a token data set: from shards and initial weights to a folder that `WorldVLA` loads.

checkpoint-N/                        where training goes on, each whole
log.jsonl, log.csv, curves.png       numbers of the run
imagined.png                         held-out frames as the model imagines them
config.json, model.safetensors, …    the model with its tokenizers
adapter/                             what was trained, where that is adapters beside frozen weights
training.json                        the recipe as it was resolved, versions, the data's fingerprint
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import ConcatDataset
from transformers import TrainerCallback, TrainingArguments

from worldvla_libero.data.samples import ActionSamples, SampleKind, TokenSamples
from worldvla_libero.data.shards import TokenDataset
from worldvla_libero.figures import save_strips
from worldvla_libero.prepare import load_image_tokenizer
from worldvla_libero.training.adapters import lora_config, merged, save_adapter, with_adapters
from worldvla_libero.training.recipes import ModelSize, Recipe, RecipeError
from worldvla_libero.training.run_log import RunLog
from worldvla_libero.versions import installed_versions
from worldvla_model import (
    WorldVLA,
    WorldVLAConfig,
    WorldVLAForConditionalGeneration,
    WorldVLAProcessor,
)
from worldvla_model.agent import WORLD_ATTENTION
from worldvla_model.decoding import Decoder, fill
from worldvla_model.loss import IGNORED, IMAGE_IDS
from worldvla_model.processing_worldvla import ProcessorSettings
from worldvla_model.training import Collator, Mixture, MixtureSampler, WorldVLATrainer, checkpoints
from worldvla_tokenizers import ActionTokenizer, TextTokenizer, sequence
from worldvla_tokenizers.files import write_text_atomic

RECORD_FILE = "training.json"
STRIPS_FILE = "imagined.png"
ADAPTER_FOLDER = "adapter"

_SHOWN = 6  # frames in a strip
_TEXT_PIECES = 320  # of a text tokenizer made for a model from scratch: 256 bytes, and the words of its prompts
_LENGTHS = 128  # compiled models see lengths that are multiples of it
_OF_THE_EVALUATION = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
_OF_A_RUN = {"recipe", "data", "image_tokenizer", "init", "frozen_weights"}  # in its record: what must stay
_TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_MANY = 1_024  # held-out samples that are looked at


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run here; none of it changes what is learned.

    Attributes:
        per_device: samples in one forward pass of one process; 0 for the batch of the recipe, divided among the
            processes. The rest of the batch is accumulated.
        log_every: steps between two lines of the log.
        evaluate_every: steps between two looks at held-out samples.
        save_every: steps between two checkpoints.
        keep: checkpoints kept.
        loaders: processes that assemble samples.
        kernel: attention implementation: sdpa, eager, or flex_attention (on GPUs).
        compile: compile the model.
        report_to: further places to log to: tensorboard, trackio, wandb.
        cpu: leave a GPU alone.

    Raises:
        RecipeError: a number is out of range.
    """

    per_device: int = 0
    log_every: int = 20
    evaluate_every: int = 500
    save_every: int = 500
    keep: int = 2
    loaders: int = 0
    kernel: str = "sdpa"
    compile: bool = False
    report_to: tuple[str, ...] = ()
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("log_every", "evaluate_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: 1 and above")
        for name in ("per_device", "loaders"):
            if getattr(self, name) < 0:
                raise RecipeError(f"{name} is {getattr(self, name)}; allowed: 0 and above")


def train_recipe(
    recipe: Recipe,
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str],
    init: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    options: RunOptions = RunOptions(),
) -> dict[str, Any]:
    """Train, or go on where an interrupted run in the same folder stopped.

    Args:
        recipe: what is trained.
        data: a token data set, a folder or a repository of the Hub.
        out: folder of the run.
        tokenizer: folder or Hub repository of the image tokenizer that the data were made with; for weights that
            exist already also of their text tokenizer, unless that is beside the weights.
        init: initial weights, a folder or a repository of the Hub; needed unless the recipe starts from scratch.
        limit: stop after this many optimizer steps, as if interrupted.
        options: how to run it here.

    Returns:
        What `training.json` holds.

    Raises:
        ImportError: adapters are trained, and peft is not installed.
        RecipeError: the data or the weights are not what the recipe needs, or the run was begun with another;
            or adapters are trained under FSDP.
        ShardError: the data were made with another image tokenizer.
        TrainingError: a loss is not finite, or the settings do not fit.
    """
    if limit is not None and limit < 1:
        raise RecipeError(f"limit is {limit} steps; allowed: 1 and above")
    folder = Path(out)
    # 1. Data, processor and model, which have to fit each other
    rank = recipe.lora_rank
    adapters = lora_config(rank=rank, alpha=recipe.lora_alpha or 2 * rank) if rank else None
    splits = _open_data(recipe, data)
    processor = _processor(recipe, splits["train"], tokenizer, init)
    splits["train"].check_tokenizer(processor.images)
    model = _model(recipe, processor, init, options)
    trained_on = [*splits.values()] if not recipe.held_out else [splits["train"]]
    mixture = _mixture(recipe, trained_on, processor)
    held_out = _mixture(recipe, [splits["validation"]], processor) if recipe.held_out else None
    for samples in (mixture, held_out):
        _check_lengths(samples, model.config)
    parameters = model.num_parameters()
    # Checkpoints of adapters say nothing of the weights beneath: going on with others would be another run.
    frozen = None if adapters is None else WorldVLA(model, processor).fingerprint
    trained = model if adapters is None else with_adapters(model, adapters)

    # 2. Is it the run that is in this folder, and how far has that come?
    arguments, steps = _arguments(recipe, mixture, folder, options)
    record = {
        "recipe": _plain(recipe),
        "init": None if init is None else str(init),
        "data": {
            "source": str(data),
            "fingerprint": splits["train"].fingerprint,
            "sha256": {name: split.digest() for name, split in splits.items()},
            "tasks": sorted({episode.task for episode in splits["train"]}),
            "episodes": {name: len(split) for name, split in splits.items()},
        },
        "image_tokenizer": processor.images.vqgan.fingerprint,
        "samples": {"action": len(mixture.action), "world": len(mixture.world)},
        "parameters": parameters,
        "trained_parameters": trained.num_parameters(only_trainable=True),
        "frozen_weights": frozen,
        "versions": installed_versions(),
        "machine": _machine(arguments),
    }
    _check_same_run(folder, record)
    target = min(steps, limit or steps)
    finished_record = _finished(folder, target)
    if finished_record is not None:
        return finished_record
    # One of the target itself was left by a run that was killed before it wrote the model.
    done = [path for path in checkpoints(folder) if _step_of(path) <= target]
    # 3. Train
    log = RunLog(folder, step=_step_of(done[-1]) if done else 0) if arguments.process_index == 0 else None
    callbacks: list[TrainerCallback] = [_Stop(limit)] if limit is not None else []
    trainer = WorldVLATrainer(
        trained,
        arguments,
        train_dataset=mixture,
        eval_dataset=None if held_out is None else _some(held_out),
        world_share=recipe.world_share,
        processing_class=processor,
        data_collator=Collator(model.config.pad_token_id, _LENGTHS if options.compile else 1),
        callbacks=callbacks,
    )
    if adapters is not None and trainer.is_fsdp_enabled:
        raise RecipeError(
            f"lora_rank is {rank}, and FSDP is to spread the weights over processes; adapters need all weights in "
            "every process: start it without FSDP"
        )
    if log is not None:
        trainer.add_callback(
            _Log(log, None if held_out is None else _Strips(recipe, splits["validation"], processor))
        )
        write_text_atomic(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")
    trainer.train(resume_from_checkpoint=str(done[-1]) if done else None)
    # 4. Look at it once more, write the model and what became of it
    finished = trainer.state.global_step
    looks = {entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry}
    if held_out is not None and finished not in looks:  # it was stopped before its time
        trainer.evaluate()
    record |= {
        "steps": finished,
        "of_steps": steps,
        "seconds": log.seconds if log is not None else 0.0,
        "last": {k: v for entry in trainer.state.log_history for k, v in entry.items()},
    }
    _write_model(trainer, processor, folder, _TYPES[recipe.stored])
    if log is not None:
        log.draw()
        write_text_atomic(folder / RECORD_FILE, json.dumps(record, indent=2) + "\n")
    trainer.accelerator.wait_for_everyone()
    return record


def _write_model(trainer: WorldVLATrainer, processor: WorldVLAProcessor, folder: Path, dtype: torch.dtype) -> None:
    """Write what was trained as one model, wherever its weights are; adapters also by themselves."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if not isinstance(model, WorldVLAForConditionalGeneration):
        if trainer.args.process_index == 0:
            save_adapter(model, folder / ADAPTER_FOLDER)
            WorldVLA(merged(model, dtype), processor).save_pretrained(folder)
        return
    weights = trainer.accelerator.get_state_dict(trainer.model)  # gathered from all processes
    if trainer.args.process_index == 0:
        with torch.device("meta"):
            whole = WorldVLAForConditionalGeneration(model.config)
        whole.load_state_dict(weights, assign=True)
        whole.tie_weights()
        WorldVLA(whole.to(dtype), processor).save_pretrained(folder)


def _open_data(recipe: Recipe, data: str | os.PathLike[str]) -> dict[str, TokenDataset]:
    train = TokenDataset.from_pretrained(data)
    if not len(train):
        raise RecipeError(f"{data} has no training episode")
    size = train.record.image_size
    if size != recipe.image_size:
        raise RecipeError(f"{data} holds frames of {size} px; recipe {recipe.name} needs {recipe.image_size}")
    splits = {"train": train}
    if "validation" in train.record.splits and train.record.splits["validation"].episodes:
        splits["validation"] = TokenDataset.from_pretrained(data, split="validation")
    elif recipe.held_out:
        raise RecipeError(f"{data} has no validation split; prepare it anew, or train with --no-held-out")
    return splits


def _processor(
    recipe: Recipe, data: TokenDataset, tokenizer: str | os.PathLike[str], init: str | os.PathLike[str] | None
) -> WorldVLAProcessor:
    settings = ProcessorSettings(
        image_size=recipe.image_size,
        history_length=recipe.history,
        num_actions=recipe.chunk if recipe.trains_actions else None,
    )
    if (recipe.initial == "scratch") != (init is None):
        needed = {
            "scratch": "it starts from scratch, so no initial weights belong to it",
            "chameleon": "it starts from Chameleon-7B in the published layout",
            "checkpoint": "it starts from a checkpoint that can do something already",
        }[recipe.initial]
        raise RecipeError(f"recipe {recipe.name}: init is {init!r}; {needed}")
    text = _train_text(data, settings) if init is None else _text_beside(init, tokenizer)
    actions: ActionTokenizer = data.actions
    # Whatever size it was made for: the data say at which size they were tokenized with it.
    images = load_image_tokenizer(tokenizer, image_size=recipe.image_size)
    return WorldVLAProcessor(text, images, actions, settings)


def _text_beside(*places: str | os.PathLike[str]) -> TextTokenizer:
    from worldvla_tokenizers.files import PretrainedFilesError

    problems = []
    for place in places:
        try:
            return TextTokenizer.from_pretrained(place)
        except PretrainedFilesError as error:
            problems.append(str(error))
    raise PretrainedFilesError("; ".join(problems))


def _train_text(data: TokenDataset, settings: ProcessorSettings) -> TextTokenizer:
    """A vocabulary of its own size: that of the prompts, filled in with every instruction."""
    from worldvla_tokenizers.text import FIRST_TEXT_ID

    words = sorted({episode.instruction for episode in data})
    templates = (settings.action_prompt, settings.video_prompt)
    texts = [template.replace("{instruction}", word) for template in templates for word in words]
    return TextTokenizer.train([*texts, settings.world_prompt], vocab_size=FIRST_TEXT_ID + _TEXT_PIECES)


def _model(
    recipe: Recipe, processor: WorldVLAProcessor, init: str | os.PathLike[str] | None, options: RunOptions
) -> WorldVLAForConditionalGeneration:
    changes: dict[str, Any] = {
        "attention": recipe.attention,
        "loss": recipe.loss,
        "alpha": recipe.alpha,
        "z_loss_weight": recipe.z_loss_weight,
        "dropout": recipe.dropout,
    }
    torch.manual_seed(recipe.seed)
    if init is None:
        config = _config(recipe.size, processor, changes)
        model = WorldVLAForConditionalGeneration._from_config(config, attn_implementation=options.kernel)
    else:
        # fp32 master weights, whatever they are stored in; frozen ones need be no more exact than computing is.
        dtype = _TYPES[recipe.precision] if recipe.lora_rank else torch.float32
        model = WorldVLAForConditionalGeneration.from_pretrained(
            init, dtype=dtype, attn_implementation=options.kernel, **changes
        )
    if recipe.initial == "chameleon":
        with torch.no_grad():  # published: Chameleon never learned to write images
            model.lm_head.weight[IMAGE_IDS.start : IMAGE_IDS.stop] = 0
    if recipe.gradient_checkpointing:
        # Its name changed within transformers 5.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        getattr(model, next(name for name in names if hasattr(model, name)))()
    return model


def _config(size: ModelSize, processor: WorldVLAProcessor, changes: dict[str, Any]) -> WorldVLAConfig:
    return WorldVLAConfig(
        vocab_size=processor.vocabulary.size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.max_positions,
        tie_word_embeddings=size.tied,
        **changes,
    )


def _mixture(recipe: Recipe, data: Sequence[TokenDataset], processor: WorldVLAProcessor) -> Mixture:
    def samples(kind: SampleKind | None) -> Any:
        if kind is None:
            return ()
        parts = [
            TokenSamples(part, kind, processor.text, actions=processor.actions, settings=processor.settings)
            for part in data
        ]
        return parts[0] if len(parts) == 1 else ConcatDataset(parts)  # type: ignore[arg-type]

    action = ActionSamples(recipe.history, recipe.chunk) if recipe.trains_actions else None
    return Mixture(samples(action), samples(recipe.second_kind))


def _some(held_out: Mixture) -> Mixture:
    """At most so many of each kind, spread evenly: a look should not take longer than the training between two."""

    def few(samples: Any) -> Any:
        places = np.linspace(0, len(samples), min(_MANY // 2, len(samples)), endpoint=False).astype(int)
        return [samples[i] for i in places]

    return Mixture(few(held_out.action), few(held_out.world))


def _check_lengths(mixture: Mixture | None, config: WorldVLAConfig) -> None:
    """Refuse samples that would be cut."""
    kinds = () if mixture is None else (mixture.action, mixture.world)
    for part in (part for kind in kinds for part in getattr(kind, "datasets", [kind]) if len(part)):
        length = max(len(ids) for ids, _ in part.longest())
        if length > config.max_position_embeddings:
            raise RecipeError(
                f"samples of {length} tokens; the model has {config.max_position_embeddings} positions"
            )


def _arguments(
    recipe: Recipe, mixture: Mixture, folder: Path, options: RunOptions
) -> tuple[TrainingArguments, int]:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_device = options.per_device or max(1, recipe.batch_size // processes)
    if recipe.batch_size % (per_device * processes):
        raise RecipeError(
            f"batch_size is {recipe.batch_size}; a multiple of {per_device * processes} is needed: {processes} "
            f"processes of {per_device} samples"
        )
    counts = len(mixture.action), len(mixture.world)
    samples = len(MixtureSampler(*counts, share=recipe.world_share, step=recipe.batch_size))
    epoch = samples // recipe.batch_size
    if not epoch:
        raise RecipeError(f"{samples} samples do not fill one batch of {recipe.batch_size}")
    steps = recipe.max_steps or math.ceil(recipe.epochs * epoch)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=per_device,
        per_device_eval_batch_size=per_device,
        gradient_accumulation_steps=recipe.batch_size // (per_device * processes),
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="constant_with_warmup" if recipe.schedule == "constant" else "cosine",
        warmup_steps=round(recipe.warmup_epochs * epoch),
        weight_decay=recipe.weight_decay,
        adam_beta1=0.9,
        adam_beta2=recipe.beta2,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bf16",
        use_cpu=options.cpu or not torch.cuda.is_available(),
        seed=recipe.seed,
        data_seed=recipe.seed,
        dataloader_num_workers=options.loaders,
        dataloader_drop_last=True,
        logging_steps=options.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.held_out else "no",
        eval_steps=options.evaluate_every,
        save_strategy="steps",
        save_steps=options.save_every,
        save_total_limit=options.keep,
        torch_compile=options.compile,
        report_to=list(options.report_to) or "none",
        run_name=recipe.name,
        remove_unused_columns=False,
        # Every adapter is used; by default they would be searched for unused ones, at every step.
        ddp_find_unused_parameters=False if recipe.lora_rank else None,
    )
    return arguments, steps


def _check_same_run(folder: Path, record: dict[str, Any]) -> None:
    """Refuse a folder with the checkpoints or the model of another run."""
    known = _known_record(folder)
    if not known or not (checkpoints(folder) or "steps" in known):
        return
    flat_known, flat = _flat(known), _flat(record)
    names = [name for name in flat if name.split(".")[0] in _OF_A_RUN]
    other = [
        f"{name}: {flat_known.get(name)!r} there, {flat[name]!r} here"
        for name in names
        if flat_known.get(name) != flat[name] and name != "data.source"
    ]
    if other:
        raise RecipeError(f"the run in {folder} was begun otherwise: {'; '.join(other)}; choose another folder")


def _finished(folder: Path, target: int) -> dict[str, Any] | None:
    """The record of a run that has nothing left to do."""
    known = _known_record(folder)
    return known if known.get("steps", 0) >= target else None


def _known_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in content.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def _machine(arguments: TrainingArguments) -> str:
    if arguments.device.type == "cuda":
        return f"{arguments.world_size} x {torch.cuda.get_device_name(arguments.device)}"
    processes = f" in each of {arguments.world_size} processes" if arguments.world_size > 1 else ""
    return f"{torch.get_num_threads()} CPU threads{processes}"


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON gives it back: lists instead of tuples."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


class _Stop(TrainerCallback):
    """Ends training before its time; the learning rate goes on as if there were no end."""

    def __init__(self, limit: int) -> None:
        self.limit = limit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.limit

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= self.limit:
            control.should_training_stop = control.should_save = control.should_log = True


class _Log(TrainerCallback):
    """Writes what the Trainer logs into the run's own files, and draws."""

    def __init__(self, log: RunLog, strips: Callable[[Any, Path, int], None] | None) -> None:
        self.log, self.strips = log, strips
        self._began, self._before = time.perf_counter(), log.seconds

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        numbers = {name: float(value) for name, value in logs.items() if name not in _OF_THE_EVALUATION}
        if "loss" in numbers:
            numbers["seconds"] = self._before + time.perf_counter() - self._began
        if "train_runtime" not in numbers:
            self.log.write(state.global_step, numbers)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.log.draw()
        if self.strips is not None:
            self.strips(model, self.log.folder / STRIPS_FILE, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.draw()  # there may be nothing to evaluate on

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.log.draw()


class _Strips:
    """Draws some held-out frames, what came next, and what the model imagines, always of the same samples.

    Not where the weights are spread over processes: all would have to imagine, and one alone waits forever.
    """

    def __init__(self, recipe: Recipe, data: TokenDataset, processor: WorldVLAProcessor) -> None:
        self.kind, self.processor, self._told = recipe.second_kind, processor, False
        self.adapters = recipe.lora_rank > 0
        if self.kind is None:
            return
        samples = TokenSamples(
            data, self.kind, processor.text, actions=processor.actions, settings=processor.settings
        )
        places = np.linspace(0, len(samples), min(_SHOWN, len(samples)), endpoint=False).astype(int)
        self.samples = [samples[i] for i in places]
        episodes = [(data[episode], t) for episode, t in map(samples.locate, places)]
        codes = [(episode.codes[t], episode.codes[t + 1]) for episode, t in episodes]
        self.shape = codes[0][0].shape
        self.now, self.next = (processor.images.decode(np.stack(part)) for part in zip(*codes, strict=True))

    def __call__(self, model: Any, path: Path, step: int) -> None:
        """Draw, unless nothing imagines or the weights are spread over processes."""
        if self.kind is None:
            return
        if self.adapters:
            model = model.get_base_model()  # with the adapters in its layers
        # `fully_shard` makes the model an FSDPModule too, and it stays one of its own class.
        if isinstance(model, FSDPModule) or not isinstance(model, WorldVLAForConditionalGeneration):
            if not self._told:
                warnings.warn(f"no {path.name}: the weights are spread over processes", stacklevel=2)
            self._told = True
            return
        training = model.training
        model.eval()
        imagined = [self._imagine(model, *sample) for sample in self.samples]
        model.train(training)
        rows = {"now": list(self.now), "next": list(self.next), "imagined": imagined}
        save_strips(path, [rows], title=f"held-out frames after {step:,} steps, as the tokenizer draws them")

    def _imagine(self, model: Any, ids: Sequence[int], labels: Sequence[int]) -> NDArray[np.uint8]:
        vocabulary = self.processor.vocabulary
        prompt = list(ids[: next(i for i, label in enumerate(labels) if label != IGNORED)])
        decoder = Decoder(model, prompt, attention=WORLD_ATTENTION)
        (rows, columns), size = self.shape, self.processor.images.codebook_size
        answer = fill(decoder, sequence.image_slots(rows, columns, vocabulary, codebook_size=size))
        return self.processor.decode_images(answer)[0]


__all__ = ["RunOptions", "train_recipe"]
