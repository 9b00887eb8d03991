"""WorldVLA: the face that most users meet. It acts, and it imagines."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from worldvla_model.decoding import GREEDY, Decoder, Sampling, continue_freely, decode_chunk, fill
from worldvla_model.modeling_worldvla import WorldVLAForConditionalGeneration
from worldvla_model.processing_worldvla import WorldVLAProcessor
from worldvla_tokenizers import ActionTokenizer, sequence
from worldvla_tokenizers.files import PushOptions, push_folder, staged_folder, write_text_atomic

CARD_NAME = "README.md"

WORLD_ATTENTION = "causal"
"""World samples are plainly causal (paper, Fig. 3c)."""


class WorldVLA:
    """A model with its processor: images and words → actions; frames and actions → the next frame.

    Args:
        model: the model; it is put into evaluation mode.
        processor: tokenizers, prompts and sizes it was trained with.

    Raises:
        ValueError: the processor's ids do not fit into the model's vocabulary.

    Example:
        ```python
        agent = WorldVLA.from_pretrained("runs/libero_goal")
        actions = agent.predict_actions([previous_frame, frame], "put the bowl on the plate")  # (K, 7)
        imagined = agent.predict_frame([frame], actions[:1])  # (H, W, 3)
        ```
    """

    def __init__(self, model: WorldVLAForConditionalGeneration, processor: WorldVLAProcessor) -> None:
        if processor.vocabulary.size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {processor.vocabulary.size} ids; the model has {model.config.vocab_size}"
            )
        self.model = model.eval()
        self.processor = processor

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
        **model_options: Any,
    ) -> WorldVLA:
        """Load a checkpoint, ours or a published one, from a folder or the Hub.

        Args:
            model_dir_or_repo: folder or Hub repository with the weights.
            tokenizers: folder or Hub repository with the tokenizers; by default where the weights are. For
                published checkpoints the folder with `tokenizer.json`, `vqgan.yaml` and `vqgan.ckpt`.
            image_size: pixels (published: 256 or 512); default as saved, else 256.
            dtype: of the weights; `auto` as stored. Image codes are always computed in fp32.
            device: default CUDA where there is one, else the CPU.
            action_tokenizer: bounds of other data than the checkpoint's.
            revision: branch, tag or commit of the model's repository.
            subfolder: folder inside the model's folder or repository (`model_256/libero_goal`).
            model_options: further arguments of transformers' `from_pretrained` (`attn_implementation`,
                `device_map`, `token`, …).

        Raises:
            PretrainedFilesError: tokenizer files are missing.
            CheckpointError: the weights do not fit.
            VocabularyError: the tokenizer has another layout.
        """
        place = {"revision": revision, "subfolder": subfolder} if tokenizers is None else {}
        shared = {
            key: model_options[key] for key in ("cache_dir", "token", "local_files_only") if key in model_options
        }
        settings: dict[str, Any] = {} if image_size is None else {"image_size": image_size}
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # First the tokenizers: a wrong one should not cost the loading of a large model.
        processor = WorldVLAProcessor.from_pretrained(
            model_dir_or_repo if tokenizers is None else tokenizers,
            device=str(device),
            **place,
            **shared,
            **settings,
        )
        if action_tokenizer is not None:
            processor.actions = action_tokenizer
        if revision is not None:
            model_options["revision"] = revision
        model = WorldVLAForConditionalGeneration.from_pretrained(
            model_dir_or_repo, dtype=dtype, subfolder=subfolder or "", **model_options
        )
        return cls(model if "device_map" in model_options else model.to(device), processor)

    def predict_actions(
        self,
        images: Sequence[Any],
        instruction: str,
        *,
        num_actions: int | None = None,
        constrained: bool = True,
        sampling: Sampling = GREEDY,
    ) -> NDArray[np.float64]:
        """What to do next.

        Args:
            images: up to M images, oldest first; PIL images or uint8 arrays (H, W, 3).
            instruction: the task in words.
            num_actions: K; default as saved with the checkpoint, else the model ends the chunk itself.
            constrained: only action ids where actions stand, so that the answer is always a chunk; False for
                the published algorithm, which may leave the grammar.
            sampling: how ids are chosen.

        Returns:
            (K, D) actions in data units.

        Raises:
            SequenceError: unconstrained, and the model left the grammar.
            SequenceLengthError: prompt and chunk do not fit into the model's positions.
            ValueError: unconstrained with a fixed number of actions, no image, or no instruction.
        """
        vocabulary, dimensions = self.processor.vocabulary, self.processor.actions.dimensions
        prompt = self.processor.action_prompt(images, instruction)
        decoder = Decoder(self.model, prompt, sampling=sampling)
        if constrained:
            slots = sequence.action_slots(dimensions, vocabulary)
            wanted = num_actions if num_actions is not None else self.processor.settings.num_actions
            ids = decode_chunk(decoder, slots, vocabulary.eot, num_actions=wanted)
        elif num_actions is None:
            ids = continue_freely(decoder, vocabulary.eot)
        else:
            raise ValueError(f"num_actions is {num_actions}, but unconstrained decoding ends where the model ends")
        return self.processor.decode_actions(ids)

    def predict_frame(
        self,
        images: Sequence[Any],
        actions: ArrayLike,
        *,
        constrained: bool = True,
        sampling: Sampling = GREEDY,
    ) -> NDArray[np.uint8]:
        """What the camera will see next.

        Args:
            images: h images, oldest first; PIL images or uint8 arrays (H, W, 3).
            actions: (h, D) actions in data units, each taken at the image of the same place.
            constrained: only image codes where codes stand; False for the published algorithm.
            sampling: how ids are chosen.

        Returns:
            (H, W, 3) the next frame, at the size that images are tokenized at.

        Raises:
            SequenceError: unconstrained, and the model left the grammar.
            SequenceLengthError: prompt and frame do not fit into the model's positions.
            ValueError: no image, or another number of actions.
        """
        vocabulary = self.processor.vocabulary
        prompt = self.processor.world_prompt(images, actions)
        decoder = Decoder(self.model, prompt, attention=WORLD_ATTENTION, sampling=sampling)
        if constrained:
            blocks = sequence.parse(prompt, vocabulary, dimensions=self.processor.actions.dimensions)
            rows, columns = sequence.images_of(blocks)[-1].shape
            slots = sequence.image_slots(rows, columns, vocabulary)
            ids = fill(decoder, [*slots, [vocabulary.eot]])
        else:
            ids = continue_freely(decoder, vocabulary.eot)
        return self.processor.decode_images(ids)[0]

    def with_settings(self, **settings: Any) -> WorldVLA:
        """The same weights under other settings, fields of `ProcessorSettings` (`world_prompt`, …)."""
        parts = self.processor
        changed = replace(parts.settings, **settings)
        return WorldVLA(self.model, WorldVLAProcessor(parts.text, parts.images, parts.actions, changed))

    def save_pretrained(self, save_directory: str | os.PathLike, *, name: str | None = None) -> None:
        """Write one folder that `from_pretrained` brings back: model, processor, bounds, prompts, model card.

        Args:
            save_directory: the folder, made if need be.
            name: what the card calls the model; default the name of the folder. An existing card is kept.
        """
        folder = Path(save_directory)
        with staged_folder(folder) as stage:
            self.model.save_pretrained(stage)
            self.processor.save_pretrained(stage)
            if not (folder / CARD_NAME).exists():
                write_text_atomic(stage / CARD_NAME, self._card(name or folder.absolute().name))

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload what `save_pretrained` writes, model card included, to a Hub repository in one commit.

        Args:
            repo_id: `organisation/name`; made if it does not exist.
            options: `private`, `token`, `revision`, `commit_message`, `create_pr`.

        Returns:
            The address of the commit.
        """

        def save(folder: str) -> None:
            self.save_pretrained(folder, name=repo_id)

        options.setdefault("commit_message", "Upload WorldVLA")
        return push_folder(save, repo_id, **options)

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


__all__ = ["WorldVLA"]
