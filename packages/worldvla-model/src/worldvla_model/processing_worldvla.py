"""Words, images and actions to model inputs: the three tokenizers and the prompts of one checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldvla_tokenizers import ActionTokenizer, ImageTokenizer, TextTokenizer, Vocabulary, sequence
from worldvla_tokenizers.files import (
    HubOptions,
    PushOptions,
    push_folder,
    resolve_files,
    staged_folder,
    write_text_atomic,
)
from worldvla_tokenizers.image import FOLDER_NAME as IMAGE_FOLDER_NAME
from worldvla_tokenizers.image import MODEL_SETTINGS_NAME as FILE_NAME
from worldvla_tokenizers.image import fit
from worldvla_tokenizers.sequence import ACTION_PROMPT, VIDEO_PROMPT, WORLD_PROMPTS, LabelRule, Sample
from worldvla_tokenizers.signatures import read_json
from worldvla_tokenizers.vocabulary import TOKENIZER_NAMES


@dataclass(frozen=True)
class ProcessorSettings:
    """What a checkpoint was trained with, apart from its weights.

    Attributes:
        image_size: pixels; every image is cropped and scaled to about this size squared. This is where a model's
            image size is kept: the image tokenizer inside takes it over.
        history_length: M, images of an action prompt (one at the first step of an episode).
        num_actions: K, actions of a chunk; None where the model itself ends the chunk.
        action_prompt: text before the images, with `{instruction}`.
        world_prompt: text before frames and actions.
        video_prompt: text before the images of video prediction, with `{instruction}`.
        labels: what is supervised, `published` or `paper`.

    Raises:
        ValueError: a value out of its range.
    """

    image_size: int = 256
    history_length: int = 2
    num_actions: int | None = None
    action_prompt: str = ACTION_PROMPT
    world_prompt: str = WORLD_PROMPTS["published"]
    video_prompt: str = VIDEO_PROMPT
    labels: LabelRule = "published"

    def __post_init__(self) -> None:
        for name in ("image_size", "history_length", "num_actions"):
            value = getattr(self, name)
            if type(value) is not int and not (value is None and name == "num_actions"):
                raise ValueError(f"{name} is {value!r}; an int needed")
        for name in ("action_prompt", "world_prompt", "video_prompt"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; words needed")
        if self.image_size < 32 or self.image_size % 32:
            raise ValueError(f"image_size is {self.image_size} pixels; allowed: multiples of 32 from 32")
        if self.history_length < 1:
            raise ValueError(f"history_length is {self.history_length} images; allowed: 1 and above")
        if self.num_actions is not None and self.num_actions < 1:
            raise ValueError(f"num_actions is {self.num_actions}; allowed: 1 and above, or None")
        for name in ("action_prompt", "video_prompt"):
            if "{instruction}" not in getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it needs '{{instruction}}'")
        if self.labels not in ("published", "paper"):
            raise ValueError(f"labels is {self.labels!r}; allowed: 'published', 'paper'")


class WorldVLAProcessor:
    """Turns words, images and actions into ids, and ids back.

    Args:
        text: words ↔ ids.
        images: pixels ↔ codes.
        actions: robot actions ↔ ids.
        settings: prompts and sizes.

    Raises:
        ImageError: the image tokenizer's codes have no ids in the vocabulary.
        ValueError: the image tokenizer is made for another size than the settings', or there are more action bins
            than ids.

    `images` arguments of the methods are lists, oldest first, of PIL images or uint8 arrays (H, W, 3).
    """

    def __init__(
        self,
        text: TextTokenizer,
        images: ImageTokenizer,
        actions: ActionTokenizer,
        settings: ProcessorSettings = ProcessorSettings(),
    ) -> None:
        images.check_vocabulary(text.vocabulary)
        if images.image_size is None:
            images = images.with_image_size(settings.image_size)
        if images.image_size != settings.image_size:
            raise ValueError(
                f"the image tokenizer is made for images of {images.image_size} px, the model for "
                f"{settings.image_size} px; remedy: settings with image_size={images.image_size}, or the "
                f"tokenizer's with_image_size({settings.image_size})"
            )
        ids = text.vocabulary.action_range
        if actions.bins > len(ids):
            raise ValueError(
                f"the action tokenizer has {actions.bins} bins; the vocabulary has ids for {len(ids)} "
                f"({ids[0]} … {ids[-1]})"
            )
        self.text = text
        self.images = images
        self.actions = actions
        self.settings = settings
        self.vocabulary: Vocabulary = text.vocabulary

    @property
    def image_size(self) -> int:
        """Pixels that images are brought to."""
        return self.settings.image_size

    @property
    def history_length(self) -> int:
        """M, images of an action prompt."""
        return self.settings.history_length

    def with_settings(self, **settings: Any) -> WorldVLAProcessor:
        """The same tokenizers under other settings, fields of `ProcessorSettings`."""
        changed = replace(self.settings, **settings)
        return WorldVLAProcessor(self.text, self.images.with_image_size(changed.image_size), self.actions, changed)

    def encode_images(self, images: Sequence[Any]) -> list[NDArray[np.int64]]:
        """Images of any sizes → one array of codes (rows, columns) each.

        Raises:
            ValueError: no image.
            ImageError: something that is no image.
        """
        if len(images) == 0:
            raise ValueError("0 images; at least 1 needed")
        pictures = [fit(image, self.image_size) for image in images]
        codes: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(pictures)
        for size in {picture.size for picture in pictures}:  # only images of one size go together
            places = [place for place, picture in enumerate(pictures) if picture.size == size]
            found = self.images.encode([pictures[place] for place in places], target=self.image_size)
            for place, code in zip(places, found, strict=True):
                codes[place] = code
        return codes

    def action_prompt(self, images: Sequence[Any], instruction: str) -> list[int]:
        """Ids that ask for a chunk of actions.

        Args:
            images: M images, oldest first.
            instruction: the task in words, such as `put the bowl on the plate`.
        """
        (prompt,) = self.action_prompts([images], [instruction])
        return prompt

    def action_prompts(self, images: Sequence[Sequence[Any]], instructions: Sequence[str]) -> list[list[int]]:
        """`action_prompt` for each of several scenes; all images are encoded in one go.

        Raises:
            ValueError: another number of instructions than of lists of images, or none.
        """
        if len(images) != len(instructions) or len(images) == 0:
            raise ValueError(
                f"{len(images)} lists of images and {len(instructions)} instructions; equal numbers, at least 1, "
                "needed"
            )
        texts = [self._instruct(self.settings.action_prompt, words) for words in instructions]
        codes = iter(self.encode_images([image for shown in images for image in shown]))
        return [
            sequence.action_prompt(text, [next(codes) for _ in shown], self.vocabulary)
            for text, shown in zip(texts, images, strict=True)
        ]

    def world_prompt(self, images: Sequence[Any], actions: ArrayLike) -> list[int]:
        """Ids that ask for the next frame.

        Args:
            images: h images, oldest first.
            actions: (h, D) actions in data units, each taken at the image of the same place.
        """
        text = self.text.encode(self.settings.world_prompt)
        ids = self.actions.encode(actions)
        return sequence.world_prompt(text, self.encode_images(images), ids, self.vocabulary)

    def video_prompt(self, images: Sequence[Any], instruction: str) -> list[int]:
        """Ids that ask for future frames without actions (the paper's Fig. 7); arguments as `action_prompt`."""
        text = self._instruct(self.settings.video_prompt, instruction)
        return sequence.action_prompt(text, self.encode_images(images), self.vocabulary)

    def action_sample(self, images: Sequence[Any], instruction: str, actions: ArrayLike) -> Sample:
        """Ids and labels of a training sample: M images and words → (K, D) actions in data units."""
        text = self._instruct(self.settings.action_prompt, instruction)
        codes, ids = self.encode_images(images), self.actions.encode(actions)
        return sequence.action_sample(text, codes, ids, self.vocabulary, labels=self.settings.labels)

    def world_sample(self, images: Sequence[Any], actions: ArrayLike, next_image: Any) -> Sample:
        """Ids and labels of a training sample: h images and their actions → the next frame.

        Args:
            images: h images, oldest first.
            actions: (h, D) actions in data units; for N rounds (h + N - 1, D).
            next_image: the frame to predict; a list of N frames for N rounds.
        """
        following = list(next_image) if isinstance(next_image, list | tuple) else [next_image]
        codes = self.encode_images([*images, *following])
        return sequence.world_sample(
            self.text.encode(self.settings.world_prompt),
            codes[: len(images)],
            self.actions.encode(actions),
            codes[len(images) :],
            self.vocabulary,
            labels=self.settings.labels,
        )

    def video_sample(self, images: Sequence[Any], instruction: str, next_images: Sequence[Any]) -> Sample:
        """Ids and labels of a training sample: M images and words → K future frames."""
        codes = self.encode_images([*images, *next_images])
        text = self._instruct(self.settings.video_prompt, instruction)
        parts = codes[: len(images)], codes[len(images) :]
        return sequence.video_sample(text, *parts, self.vocabulary, labels=self.settings.labels)

    def decode_actions(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Generated ids of a chunk → (K, D) actions in data units.

        Raises:
            SequenceError: the ids are anything but whole action blocks, at least one, and the end of the turn.
        """
        blocks = sequence.parse(ids, self.vocabulary, dimensions=self.actions.dimensions)
        strange = [block for block in blocks[:-1] if not isinstance(block, sequence.ActionBlock)]
        found = None
        if strange:
            found = f"{_name(strange[0])} among them"
        elif not blocks or blocks[-1] is not sequence.Marker.EOT:
            found = f"{_name(blocks[-1]) if blocks else 'nothing'} at the end"
        elif len(blocks) == 1:
            found = "no action at all"
        if found is not None:
            raise sequence.SequenceError(
                f"{len(ids)} generated ids: action blocks and the end of the turn expected, found {found}"
            )
        return self.actions.decode(sequence.actions_of(blocks))

    def decode_images(
        self, ids: Sequence[int], *, shape: tuple[int, int] | None = None
    ) -> list[NDArray[np.uint8]]:
        """Generated ids of frames → one uint8 array (H, W, 3) each.

        Args:
            ids: whole image blocks; ends of turns may stand between them.
            shape: rows and columns of codes of the one frame that is expected, and after it the end of the turn;
                None for as many frames as there are, of any size.

        Raises:
            SequenceError: the ids are anything else, or a code is not in the codebook.
        """
        blocks = sequence.parse(ids, self.vocabulary, dimensions=self.actions.dimensions)
        codes, size = sequence.images_of(blocks), self.images.codebook_size
        strange = [b for b in blocks if not isinstance(b, sequence.ImageBlock) and b is not sequence.Marker.EOT]
        expected, found = "image blocks", None
        if strange:
            found = _name(strange[0])
        elif not codes:
            found = "none"
        elif shape is not None:
            expected = f"an image of {shape[0]} x {shape[1]} codes and the end of the turn"
            sizes = [f"{len(frame)} x {len(frame[0])} codes" for frame in codes]
            if len(blocks) != 2 or blocks[-1] is not sequence.Marker.EOT or codes[0].shape != tuple(shape):
                turns = len(blocks) - len(codes)
                found = f"{len(codes)} ({', '.join(sizes)}) and {turns} ends of turns, or in another order"
        highest = max((int(frame.max()) for frame in codes), default=0)
        if found is None and highest >= size:
            expected, found = f"codes 0 … {size - 1}", f"{highest}"
        if found is not None:
            raise sequence.SequenceError(f"{len(ids)} generated ids: {expected} expected, found {found}")
        return [self.images.decode(frame[None])[0] for frame in codes]

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write tokenizers and settings into a folder, made if need be; `from_pretrained` brings them back."""
        content = {"processor_class": type(self).__name__, **asdict(self.settings)}
        with staged_folder(save_directory) as stage:
            self.text.save_pretrained(stage)
            self.images.save_pretrained(stage / IMAGE_FOLDER_NAME)
            self.actions.save_pretrained(stage)
            write_text_atomic(stage / FILE_NAME, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload what `save_pretrained` writes to a Hub repository; `WorldVLA.push_to_hub` adds the model."""
        options.setdefault("commit_message", "Upload processor")
        return push_folder(self.save_pretrained, repo_id, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        subfolder: str | None = None,
        device: str = "cpu",
        action_tokenizer: ActionTokenizer | None = None,
        **options: Any,
    ) -> WorldVLAProcessor:
        """Load tokenizers and settings from a folder or the Hub.

        Ours holds `processor_config.json`. The published layout (`tokenizer.json` or `text_tokenizer.json`,
        `vqgan.yaml`, `vqgan.ckpt`) has no settings: those of the released LIBERO checkpoints are taken, and can be
        overridden.

        Args:
            pretrained_model_name_or_path: a folder or the id of a Hub repository; see
                `worldvla_tokenizers.files.resolve_files`.
            revision: branch, tag or commit on the Hub.
            subfolder: folder inside the folder or repository.
            device: where images are tokenized.
            action_tokenizer: bounds of other data than those saved.
            options: fields of `ProcessorSettings` to override; `cache_dir`, `token`, `local_files_only`.

        Raises:
            PretrainedFilesError: files are missing.
            VocabularyError: the text tokenizer has another layout.
            CheckpointError: the VQ-GAN cannot be used.
            ActionError: the bounds cannot be used.
            ValueError: an option that is no setting, a setting out of its range, or parts that do not fit.
        """
        options.pop("_from_auto", None)
        options.pop("trust_remote_code", None)
        source, hub = pretrained_model_name_or_path, HubOptions(revision=revision, subfolder=subfolder)
        for key in ("cache_dir", "token", "local_files_only"):
            if key in options:
                hub[key] = options.pop(key)
        # Both layouts have the text tokenizer; only ours has settings beside it.
        found = resolve_files(source, any_of=TOKENIZER_NAMES, optional=[FILE_NAME], **hub)
        settings: dict[str, Any] = {}
        actions = action_tokenizer or ActionTokenizer.published()
        if FILE_NAME in found:
            settings = read_json(found[FILE_NAME], ValueError)
            settings.pop("processor_class", None)
            saved = ActionTokenizer.from_pretrained(source, **hub)
            if action_tokenizer is not None and action_tokenizer.dimensions != saved.dimensions:
                raise ValueError(
                    f"the action tokenizer has {action_tokenizer.dimensions} dimensions; {source} was trained "
                    f"with {saved.dimensions}"
                )
            actions = action_tokenizer or saved
        unknown = sorted((settings | options).keys() - ProcessorSettings.__dataclass_fields__.keys())
        if unknown:
            allowed = ", ".join(ProcessorSettings.__dataclass_fields__)
            raise ValueError(f"{source}: unknown settings {', '.join(unknown)}; allowed: {allowed}")
        try:
            chosen = ProcessorSettings(**(settings | options))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return cls(
            text=TextTokenizer.from_pretrained(source, **hub),
            images=ImageTokenizer.from_pretrained(source, image_size=chosen.image_size, device=device, **hub),
            actions=actions,
            settings=chosen,
        )

    def _instruct(self, template: str, instruction: str) -> list[int]:
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"instruction is {instruction!r}; words are needed")
        return self.text.encode(template.replace("{instruction}", instruction))


def _name(block: sequence.Block) -> str:
    """A block in an error."""
    if isinstance(block, sequence.Marker):
        return block.value
    return f"{'a' if isinstance(block, sequence.TextBlock) else 'an'} {type(block).__name__}"


__all__ = ["ProcessorSettings", "WorldVLAProcessor"]
