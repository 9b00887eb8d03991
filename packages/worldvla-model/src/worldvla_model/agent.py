"""WorldVLA: the face that most users meet. It acts, and it imagines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from worldvla_model.checkpoint_files import SUPERSEDED_PATTERNS, replaced_checkpoint
from worldvla_model.decoding import (
    GREEDY,
    ChunkGrammar,
    Draft,
    Sampling,
    UnfinishedAnswerError,
    Workspace,
    continue_chunks,
    continue_frames,
    decode_chunks,
    decode_frames,
    repeat,
)
from worldvla_model.decoding.chunks import SPECULATED
from worldvla_model.modeling_worldvla import WorldVLAForConditionalGeneration, one_dtype
from worldvla_model.processing_worldvla import WorldVLAProcessor
from worldvla_tokenizers import ActionTokenizer, sequence
from worldvla_tokenizers.files import PushOptions, push_folder, write_text_atomic

CARD_NAME = "README.md"

_FINGERPRINT_VALUES = 256  # of each parameter

_Decoded = TypeVar("_Decoded")

WORLD_ATTENTION = "causal"
"""World samples are plainly causal (paper, Fig. 3c)."""


class WorldVLA:
    """A model with its processor: images and words → actions; frames and actions → the next frame.

    Args:
        model: the model; it is put into evaluation mode.
        processor: tokenizers, prompts and sizes it was trained with.

    Attributes:
        workspace: what queries leave for the next ones; None, as long as `compile` was not called, for nothing.

    Raises:
        ValueError: the processor does not fit the model: more ids than its vocabulary has, other ids that open and
            close blocks, or prompts longer than its positions.

    Example:
        >>> import numpy as np
        >>> published = "tests/fixtures/published"
        >>> agent = WorldVLA.from_pretrained(
        ...     f"{published}/checkpoint", tokenizers=f"{published}/tokenizer", image_size=128
        ... )
        >>> frame = np.zeros((256, 256, 3), np.uint8)
        >>> actions = agent.predict_actions([frame, frame], "put the bowl on the plate", num_actions=5)
        >>> actions.shape
        (5, 7)
        >>> agent.predict_frame([frame], actions[:1]).shape
        (128, 128, 3)
    """

    def __init__(self, model: WorldVLAForConditionalGeneration, processor: WorldVLAProcessor) -> None:
        _check_fit(model, processor)
        self.model = model.eval()
        self.processor = processor
        self.workspace: Workspace | None = None

    @classmethod
    def from_pretrained(
        cls,
        model_dir_or_repo: str | os.PathLike,
        tokenizers: str | os.PathLike | None = None,
        image_size: int | None = None,
        *,
        dtype: torch.dtype | str = "auto",
        device: str | torch.device | None = None,
        action_tokenizer: ActionTokenizer | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        tokenizers_revision: str | None = None,
        tokenizers_subfolder: str | None = None,
        **model_options: Any,
    ) -> WorldVLA:
        """Load a checkpoint, ours or a published one, from a folder or the Hub.

        Args:
            model_dir_or_repo: folder or Hub repository with the weights.
            tokenizers: folder or Hub repository with the tokenizers; by default where the weights are. For
                published checkpoints the folder with `tokenizer.json` or `text_tokenizer.json`, `vqgan.yaml` and
                `vqgan.ckpt`.
            image_size: pixels (published: 256 or 512); default as saved, else 256.
            dtype: of the weights; `auto` as stored. Image codes are always computed in fp32. Its older name,
                `torch_dtype`, is understood as well.
            device: default CUDA where there is one, else the CPU. Where `device_map` or quantization says where
                weights are, they stay there, and only images are tokenized on this device.
            action_tokenizer: bounds of other data than the checkpoint's.
            revision: branch, tag or commit of the model's repository.
            subfolder: folder inside the model's folder or repository (`model_256/libero_goal`).
            tokenizers_revision: branch, tag or commit of the repository `tokenizers`; without `tokenizers` the
                model's repository and `revision` are meant.
            tokenizers_subfolder: folder inside `tokenizers`, or without it inside the model's folder or repository
                (`chameleon/tokenizer`); default there `subfolder`.
            model_options: further arguments of transformers' `from_pretrained` (`attn_implementation`,
                `device_map`, `quantization_config`, `load_in_4bit`, `token`, …).

        Raises:
            PretrainedFilesError: tokenizer files are missing.
            CheckpointError: the weights do not fit, or are another model's.
            VocabularyError: the tokenizer has another layout.
            ValueError: `dtype` and `torch_dtype` differ, parts do not fit each other, or `tokenizers_revision`
                without `tokenizers`.
        """
        if "torch_dtype" in model_options:
            dtype = one_dtype(dtype, model_options.pop("torch_dtype"))
        if tokenizers is None:
            if tokenizers_revision is not None:
                raise ValueError(
                    f"tokenizers_revision is {tokenizers_revision!r}, but tokenizers names no repository"
                )
            location = {"revision": revision, "subfolder": tokenizers_subfolder or subfolder}
        else:
            location = {"revision": tokenizers_revision, "subfolder": tokenizers_subfolder}
        shared = {
            key: model_options[key] for key in ("cache_dir", "token", "local_files_only") if key in model_options
        }
        settings: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # First the tokenizers: a wrong one should not cost the loading of a large model.
        processor = WorldVLAProcessor.from_pretrained(
            model_dir_or_repo if tokenizers is None else tokenizers,
            device=str(device),
            action_tokenizer=action_tokenizer,
            **location,
            **shared,
            **settings,
        )
        if revision is not None:
            model_options["revision"] = revision
        model = WorldVLAForConditionalGeneration.from_pretrained(
            model_dir_or_repo, dtype=dtype, subfolder=subfolder or "", **model_options
        )
        placed = model_options.get("device_map") is not None or getattr(model, "is_quantized", False)
        return cls(model if placed else model.to(device), processor)

    @property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of settings, bounds and some values of each parameter.

        Other weights have another one. Of all values of a large model it would take minutes.
        """
        parts = self.processor
        bounds = [parts.actions.low.tolist(), parts.actions.high.tolist()]
        words = json.dumps([asdict(parts.settings), bounds, parts.images.vqgan.fingerprint], sort_keys=True)
        found = hashlib.sha256(words.encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            flat = tensor.detach().flatten()
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(flat[:: max(1, len(flat) // _FINGERPRINT_VALUES)].float().cpu().numpy().tobytes())
        return found.hexdigest()

    def compile(self, *, slots: int | None = None, **compile_options: Any) -> WorldVLA:
        """Compile the passes of decoding over caches of one size: on a GPU, CUDA graphs. Returns this agent.

        The first queries after it are slow. Call it again when weights have changed.

        Args:
            slots: tokens of the longest prompt with its answer that is worth compiling for; default what the
                settings need with 256 ids of words. A query that needs more is answered uncompiled.
            compile_options: of `torch.compile`.
        """
        settings = self.processor.settings
        if slots is None:
            images = max(settings.history_length, 2) * _image_length(self.processor)
            actions = (settings.num_actions or SPECULATED) * (self.processor.actions.dimensions + 2)
            slots = min(256 + images + actions, self.model.config.max_position_embeddings)
        self.workspace = Workspace(self.model, slots=slots, **compile_options)
        return self

    def predict_actions(
        self,
        images: Any,
        instruction: str,
        *,
        num_actions: int | None = None,
        constrained: bool = True,
        sampling: Sampling = GREEDY,
        workspace: Workspace | None = None,
    ) -> NDArray[np.float64]:
        """What to do next.

        Args:
            images: up to M images, oldest first, or one image; PIL images or uint8 arrays (H, W, 3) of any sizes.
            instruction: the task in words.
            num_actions: K; default as saved with the checkpoint, else the model ends the chunk itself.
            constrained: only action ids where actions stand, so that the answer is always a chunk; False for
                the answer of the published algorithm, which may leave the grammar.
            sampling: how ids are chosen.
            workspace: what earlier queries left; default that of the agent, if any.

        Returns:
            (K, D) actions in data units.

        Raises:
            SequenceError: unconstrained, and the model's answer is no chunk: it left the grammar or never ended.
                The ids are shown.
            DecodingError: `num_actions` below 1, no end after as many actions as it may take, an id of the prompt
                outside the model's vocabulary, or the workspace of another model.
            MaskError: the model's mask strategy is unknown.
            SequenceLengthError: prompt and chunk do not fit into the model's positions.
            ValueError: unconstrained with a fixed number of actions, no image, or no instruction.
        """
        (actions,) = self.predict_actions_batch(
            [images],
            [instruction],
            num_actions=num_actions,
            constrained=constrained,
            sampling=sampling,
            workspace=workspace,
        )
        return actions

    def predict_actions_batch(
        self,
        images: Sequence[Any],
        instructions: Sequence[str],
        *,
        num_actions: int | None = None,
        constrained: bool = True,
        sampling: Sampling = GREEDY,
        workspace: Workspace | None = None,
    ) -> list[NDArray[np.float64]]:
        """What to do next in each of several scenes; prompts may differ in length.

        Args:
            images: B lists of images, as `predict_actions` takes them.
            instructions: B of them.
            num_actions: as in `predict_actions`.
            constrained: as in `predict_actions`.
            sampling: as in `predict_actions`.
            workspace: as in `predict_actions`.

        Returns:
            B arrays (K, D), each what `predict_actions` gives.

        Raises:
            ValueError: another number of instructions, or none; else as in `predict_actions`.
        """
        vocabulary, dimensions = self.processor.vocabulary, self.processor.actions.dimensions
        grammar = ChunkGrammar(sequence.action_slots(dimensions, vocabulary), vocabulary.eot)
        prompts = self.processor.action_prompts(images, instructions)
        workspace = workspace or self.workspace
        if constrained:
            wanted = num_actions if num_actions is not None else self.processor.settings.num_actions
            answers = decode_chunks(
                self.model, prompts, grammar, num_actions=wanted, sampling=sampling, workspace=workspace
            )
            return [self.processor.decode_actions(ids) for ids in answers]
        if num_actions is not None:
            raise ValueError(f"num_actions is {num_actions}, but unconstrained decoding ends where the model ends")
        with self._unfinished_shown():
            answers = continue_chunks(
                self.model,
                prompts,
                grammar,
                speculated=self.processor.settings.num_actions or SPECULATED,
                sampling=sampling,
                workspace=workspace,
            )
        return [self._understood(self.processor.decode_actions, ids) for ids in answers]

    def predict_frame(
        self,
        images: Any,
        actions: ArrayLike,
        *,
        constrained: bool = True,
        sampling: Sampling = GREEDY,
        workspace: Workspace | None = None,
    ) -> NDArray[np.uint8]:
        """What the camera will see next.

        Args:
            images: h images, oldest first, or one image; PIL images or uint8 arrays (H, W, 3) of any sizes.
            actions: (h, D) actions in data units, each taken at the image of the same place; (D,) for one image.
            constrained: only image codes where codes stand; False for the answer of the published algorithm.
            sampling: how ids are chosen.
            workspace: what earlier queries left; default that of the agent, if any.

        Returns:
            (H, W, 3) the next frame, at the size that images are tokenized at.

        Raises:
            SequenceError: unconstrained, and the model's answer is no frame of this size: it left the grammar or
                never ended. The ids are shown.
            DecodingError: an id of the prompt outside the model's vocabulary, or the workspace of another model.
            SequenceLengthError: prompt and frame do not fit into the model's positions.
            ValueError: no image, or another number of actions.
        """
        prompt = self.processor.world_prompt(images, actions)
        vocabulary = self.processor.vocabulary
        blocks = sequence.parse(prompt, vocabulary, dimensions=self.processor.actions.dimensions)
        now = sequence.images_of(blocks)[-1]
        slots, draft = self._rounds(now, [])
        decode = decode_frames if constrained else partial(continue_frames, end_of_turn=vocabulary.eot)
        with self._unfinished_shown():
            (ids,) = decode(
                self.model,
                [prompt],
                slots,
                draft=draft,
                sampling=sampling,
                attention=WORLD_ATTENTION,
                workspace=workspace or self.workspace,
            )
        read = partial(self.processor.decode_images, shape=now.shape)
        return (read(ids) if constrained else self._understood(read, ids))[0]

    def imagine(
        self,
        images: Any,
        actions: ArrayLike,
        *,
        rounds: int = 1,
        sampling: Sampling = GREEDY,
        workspace: Workspace | None = None,
    ) -> NDArray[np.uint8]:
        """What the camera will see while several actions are taken, each frame imagined from those before it.

        Imagined frames are read again as the codes they are, not by way of pixels.

        Args:
            images: h images, oldest first, or one image; PIL images or uint8 arrays (H, W, 3) of any sizes.
            actions: (h + T - 1, D) actions in data units: those taken at the images, then one for each further
                frame.
            rounds: frames that follow from one prompt, each given all before it: N that the model was trained
                with. They share one cache. The next prompt begins with the last h frames.
            sampling: how ids are chosen.
            workspace: what earlier queries left; default that of the agent, if any.

        Returns:
            (T, H, W, 3) frames.

        Raises:
            SequenceLengthError: prompt and frames do not fit into the model's positions.
            ValueError: no image, too few actions, or `rounds` below 1.
        """
        codes = self.imagine_codes(
            self.processor.encode_images(images), actions, rounds=rounds, sampling=sampling, workspace=workspace
        )
        return self.processor.images.decode(codes)

    def imagine_codes(
        self,
        codes: NDArray[np.integer] | Sequence[ArrayLike],
        actions: ArrayLike,
        *,
        rounds: int = 1,
        sampling: Sampling = GREEDY,
        workspace: Workspace | None = None,
    ) -> NDArray[np.int64]:
        """`imagine` for frames that are codes already, as those of a token data set are.

        Args:
            codes: (h, rows, columns) of h frames, oldest first; a list of them where sizes differ.
            actions: as in `imagine`.
            rounds: as in `imagine`.
            sampling: as in `imagine`.
            workspace: as in `imagine`.

        Returns:
            (T, rows, columns) codes.

        Raises:
            SequenceLengthError: prompt and frames do not fit into the model's positions.
            ValueError: no frame, too few actions, or `rounds` below 1.
        """
        known, vocabulary = [np.asarray(frame, dtype=np.int64) for frame in codes], self.processor.vocabulary
        history, ids = len(known), np.atleast_2d(self.processor.actions.encode(actions))
        if not known or len(ids) < history or rounds < 1:
            raise ValueError(
                f"{len(ids)} actions for {history} images, {rounds} rounds; at least 1 image, an action for each "
                "and at least 1 round needed"
            )
        text = self.processor.text.encode(self.processor.settings.world_prompt)
        while (done := len(known)) <= len(ids):
            prompt = sequence.world_prompt(text, known[-history:], ids[done - history : done], vocabulary)
            slots, draft = self._rounds(known[-1], ids[done : done + rounds - 1])
            (answer,) = decode_frames(
                self.model,
                [prompt],
                slots,
                draft=draft,
                sampling=sampling,
                attention=WORLD_ATTENTION,
                workspace=workspace or self.workspace,
            )
            blocks = sequence.parse(answer, vocabulary, dimensions=self.processor.actions.dimensions)
            known += sequence.images_of(blocks)
        return np.stack(known[history:])

    def _rounds(self, now: NDArray[np.int64], following: ArrayLike) -> tuple[list[Sequence[int]], Draft]:
        """What the next frames and the actions between them may look like; as a draft, most of it stays."""
        vocabulary, size = self.processor.vocabulary, self.processor.images.codebook_size
        rows, columns = now.shape
        frame: list[Sequence[int]] = [
            *sequence.image_slots(rows, columns, vocabulary, codebook_size=size),
            [vocabulary.eot],
        ]
        slots = list(frame)
        period = len(frame)
        for action in np.asarray(following):
            between = [*sequence.action_block(action, vocabulary), vocabulary.eot]
            slots += [[token] for token in between] + frame
            period = len(frame) + len(between)
        return slots, repeat([*sequence.image_block(now, vocabulary), vocabulary.eot], period=period)

    def _understood(self, decode: Callable[[Sequence[int]], _Decoded], ids: Sequence[int]) -> _Decoded:
        """What free ids say.

        Raises:
            SequenceError: nothing; the ids are shown.
        """
        try:
            return decode(ids)
        except sequence.SequenceError as error:
            raise sequence.SequenceError(f"the model left the grammar: {error}. It said {list(ids)}") from error

    @contextmanager
    def _unfinished_shown(self) -> Iterator[None]:
        """Turn an answer that could not go on into the error of one that cannot be read.

        Raises:
            SequenceError: the ids are shown.
        """
        try:
            yield
        except UnfinishedAnswerError as error:
            raise sequence.SequenceError(f"the model left the grammar: {error}. It said {error.ids}") from error

    def with_settings(self, **settings: Any) -> WorldVLA:
        """The same weights under other settings, fields of `ProcessorSettings` (`world_prompt`, …).

        They share the workspace, if there is one.
        """
        other = WorldVLA(self.model, self.processor.with_settings(**settings))
        other.workspace = self.workspace
        return other

    def save_pretrained(self, save_directory: str | os.PathLike, *, name: str | None = None) -> None:
        """Write one folder that `from_pretrained` brings back: model, processor, bounds, prompts, model card.

        Args:
            save_directory: the folder, made if need be. Weights of an older checkpoint in it are deleted.
            name: what the card calls the model; default the name of the folder. An existing card is kept.
        """
        folder = Path(save_directory)
        with replaced_checkpoint(folder) as stage:
            self.model.save_pretrained(stage)
            self.processor.save_pretrained(stage)
            if not (folder / CARD_NAME).exists():
                write_text_atomic(stage / CARD_NAME, self._card(name or folder.absolute().name))

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload what `save_pretrained` writes, model card included, to a Hub repository in one commit.

        The same commit deletes weights of an older checkpoint there that it does not replace.

        Args:
            repo_id: `organisation/name`; made if it does not exist.
            options: `private`, `token`, `revision`, `commit_message`, `create_pr`.

        Returns:
            The address of the commit.
        """

        def save(folder: str) -> None:
            self.save_pretrained(folder, name=repo_id)

        options.setdefault("commit_message", "Upload WorldVLA")
        return push_folder(save, repo_id, supersedes=SUPERSEDED_PATTERNS, **options)

    def _card(self, name: str) -> str:
        config, settings = self.model.config, self.processor.settings
        bounds = "\n".join(
            f"| {d} | {low:.6g} | {high:.6g} |"
            for d, (low, high) in enumerate(
                zip(self.processor.actions.low, self.processor.actions.high, strict=True)
            )
        )
        chunk = settings.num_actions or "as many as the model chooses"
        return f"""---
library_name: worldvla-model
pipeline_tag: robotics
tags: [worldvla, vision-language-action, world-model, robotics]
---

# {name}

A WorldVLA model: images and words in, robot actions out; frame and action in, next frame out.

```python
from worldvla_model import WorldVLA

agent = WorldVLA.from_pretrained("{name}")
actions = agent.predict_actions([previous_frame, frame], "put the bowl on the plate")
imagined = agent.predict_frame([frame], actions[:1])
```

| | |
|---|---|
| parameters | {self.model.num_parameters():,} |
| layers, width, heads | {config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads} |
| vocabulary | {config.vocab_size:,} |
| attention mask of action chunks | `{config.attention}` |
| images | {settings.history_length} of {settings.image_size} px |
| actions a chunk | {chunk} |
| action prompt | `{settings.action_prompt}` |
| world prompt | `{settings.world_prompt}` |

Bounds of the actions, in the units of the training data:

| dimension | low | high |
|---|---|---|
{bounds}
"""


def _check_fit(model: WorldVLAForConditionalGeneration, processor: WorldVLAProcessor) -> None:
    """Refuse parts that do not fit each other, before they fail at the first prompt, or in silence.

    Raises:
        ValueError: they do not; both sides are named.
    """
    config, vocabulary, settings = model.config, processor.vocabulary, processor.settings
    if vocabulary.size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {vocabulary.size} ids; the model has {config.vocab_size} (vocab_size): take the "
            "tokenizer it was trained with"
        )
    for name in ("boi", "eoi", "boa", "eoa"):
        if (ours := getattr(vocabulary, name)) != (theirs := getattr(config, name)):
            raise ValueError(
                f"{name} is {ours} in the tokenizer, {theirs} in the model's configuration ({name}_token_id): its "
                "masks would not see the blocks; take the tokenizer it was trained with"
            )
    answer = (settings.num_actions or 1) * (processor.actions.dimensions + 2) + 1
    length = 2 + settings.history_length * _image_length(processor) + answer  # and some words
    if length > config.max_position_embeddings:
        raise ValueError(
            f"a prompt of {settings.history_length} images (history_length) of {settings.image_size} px "
            f"(image_size) with {settings.num_actions or 1} actions takes {length} tokens at least; the model has "
            f"{config.max_position_embeddings} positions (max_position_embeddings): take the image_size and "
            "history_length that it was trained with"
        )


def _image_length(processor: WorldVLAProcessor) -> int:
    """Ids of a square image."""
    side = processor.image_size // processor.images.vqgan.config.factor
    return side * (side + 1) + 4


__all__ = ["WorldVLA"]
