"""Words, images and actions to model inputs: the three tokenizers and the prompts of one checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Unpack

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from transformers import BatchFeature
from transformers.utils import TensorType

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
from worldvla_tokenizers.image import LARGEST_SIZE, UNIT, ImageError, fit
from worldvla_tokenizers.image import MODEL_SETTINGS_NAME as FILE_NAME
from worldvla_tokenizers.sequence import Prompts, Sample
from worldvla_tokenizers.signatures import read_json
from worldvla_tokenizers.vocabulary import TOKENIZER_NAMES


class SettingsError(ValueError):
    """Settings of a processor that are none, out of their range, or do not fit its tokenizers."""


@dataclass(frozen=True)
class ProcessorSettings(Prompts):
    """What a checkpoint was trained with, apart from its weights: `Prompts`, and sizes.

    Attributes:
        image_size: pixels; every image is cropped and scaled to about this size squared. This is where a model's
            image size is kept: the image tokenizer inside takes it over.
        history_length: M, images of an action prompt (one at the first step of an episode).
        num_actions: K, actions of a chunk; None where the model itself ends the chunk.

    Raises:
        SettingsError: a value of another type, or out of its range.
    """

    image_size: int = 256
    history_length: int = 2
    num_actions: int | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "history_length", "num_actions"):
            value = getattr(self, name)
            if type(value) is not int and not (value is None and name == "num_actions"):
                raise SettingsError(f"{name} is {value!r}; an int needed")
        for name in ("action_prompt", "world_prompt", "video_prompt"):
            if not isinstance(getattr(self, name), str):
                raise SettingsError(f"{name} is {getattr(self, name)!r}; words needed")
        if not UNIT <= self.image_size <= LARGEST_SIZE or self.image_size % UNIT:
            raise SettingsError(
                f"image_size is {self.image_size} pixels; allowed: multiples of {UNIT} from {UNIT} to "
                f"{LARGEST_SIZE}"
            )
        if self.history_length < 1:
            raise SettingsError(f"history_length is {self.history_length} images; allowed: 1 and above")
        if self.num_actions is not None and self.num_actions < 1:
            raise SettingsError(f"num_actions is {self.num_actions}; allowed: 1 and above, or None")
        for name in ("action_prompt", "video_prompt"):
            if "{instruction}" not in getattr(self, name):
                raise SettingsError(f"{name} is {getattr(self, name)!r}; it needs '{{instruction}}'")
        if self.labels not in ("published", "paper"):
            raise SettingsError(f"labels is {self.labels!r}; allowed: 'published', 'paper'")


class WorldVLAProcessor:
    """Turns words, images and actions into ids, and ids back.

    Args:
        text: words ↔ ids.
        images: pixels ↔ codes.
        actions: robot actions ↔ ids.
        settings: prompts and sizes.

    `images` arguments of the methods are lists, oldest first, of PIL images or uint8 arrays (H, W, 3) of any size;
    one image is a list of one. Called as transformers' processors are, it makes batches for `generate`.

    Example:
        >>> import numpy as np
        >>> processor = WorldVLAProcessor.from_pretrained("tests/fixtures/published/tokenizer", image_size=128)
        >>> frame = np.zeros((256, 256, 3), np.uint8)
        >>> inputs = processor(images=[frame, frame], text="put the bowl on the plate", return_tensors="pt")
        >>> sorted(inputs)
        ['attention_mask', 'input_ids']

        `processor.post_process_actions(model.generate(**inputs))` are then the actions, one (K, D) each; with
        `actions=` instead of `text=`, `post_process_images` of what is generated are the frames.

    Raises:
        ImageError: the image tokenizer's codes have no ids in the vocabulary.
        SettingsError: the image tokenizer is made for another size than the settings', or there are more action
            bins than ids.
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
            raise SettingsError(
                f"the image tokenizer is made for images of {images.image_size} px, the model for "
                f"{settings.image_size} px; remedy: settings with image_size={images.image_size}, or the "
                f"tokenizer's with_image_size({settings.image_size})"
            )
        ids = text.vocabulary.action_range
        if actions.bins > len(ids):
            raise SettingsError(
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

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        actions: Any = None,
        padding: bool | Literal["longest"] = True,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """Prompts as a batch for `model.generate(**inputs)`.

        Args:
            images: of one prompt: an image, or a list of them, oldest first. Of several: a list with an image or a
                list for each.
            text: the instruction of an action prompt, as `action_prompt` takes it; a list of B for B prompts.
            actions: instead of `text`, for a world prompt: (h, D) in data units, or (D,) for one image; a list of
                B of them, or (B, h, D), for B prompts.
            padding: shorter prompts are padded at the left, where generation needs it; False for lists of
                different lengths.
            return_tensors: `pt` for tensors, `np` for arrays; default lists.

        Returns:
            `input_ids` and `attention_mask`, (B, T) each; of world prompts also `is_world` (B,).

        Raises:
            ValueError: neither or both of `text` and `actions`, another number of them than of images, no image,
                or another `padding`.
            ImageError: something that is no image.
        """
        if (text is None) == (actions is None):
            found = "neither" if text is None else "both"
            raise ValueError(
                f"{found} of text and actions given; text asks for actions, actions for a frame, one of them "
                "needed (samples for training: action_sample, world_sample)"
            )
        if padding not in (True, False, "longest"):
            raise ValueError(f"padding is {padding!r}; allowed: True, 'longest', False")
        if images is None:
            raise ValueError("0 images; at least 1 needed")
        if text is not None:
            words = [text] if isinstance(text, str) else list(text)
            # One instruction and a flat list: the images are the history of the one prompt.
            single = len(words) == 1 and not _is_nested(images)
            prompts = self.action_prompts([images] if single else as_list(images), words)
        else:
            several = _axes(actions) == 3
            frames = as_list(images) if several or _is_nested(images) else [images]
            taken = list(actions) if several or len(frames) > 1 else [actions]
            if len(frames) != len(taken):
                raise ValueError(
                    f"images of {len(frames)} prompts and actions of {len(taken)}; equal numbers needed"
                )
            prompts = [self.world_prompt(*prompt) for prompt in zip(frames, taken, strict=True)]
        longest = max(map(len, prompts)) if padding else 0
        spare = [max(0, longest - len(prompt)) for prompt in prompts]
        batch: dict[str, Any] = {
            "input_ids": [[self.vocabulary.pad] * n + ids for n, ids in zip(spare, prompts, strict=True)],
            "attention_mask": [[0] * n + [1] * len(ids) for n, ids in zip(spare, prompts, strict=True)],
        }
        if text is None:
            batch["is_world"] = [True] * len(prompts)
        return BatchFeature(batch, tensor_type=return_tensors)

    def post_process_actions(self, sequences: Any) -> list[NDArray[np.float64]]:
        """What `generate` gave for action prompts → (K, D) actions in data units for each.

        Args:
            sequences: (B, T) ids, with the prompts or without; padding is left out.

        Raises:
            SequenceError: an answer is anything but whole actions and the end of the turn.
        """
        return [self.decode_actions(self._answer(ids)) for ids in _rows(sequences)]

    def post_process_images(self, sequences: Any) -> list[NDArray[np.uint8]]:
        """What `generate` gave for world prompts → the frame (H, W, 3) of each.

        Args:
            sequences: (B, T) ids, with the prompts or without; padding is left out.

        Raises:
            SequenceError: an answer is anything but one whole image and the end of the turn.
        """
        answers = [self._answer(ids) for ids in _rows(sequences)]
        found = [self.decode_images(ids) for ids in answers]
        for ids, frames in zip(answers, found, strict=True):
            if len(frames) != 1 or ids[-1] != self.vocabulary.eot:
                raise sequence.SequenceError(
                    f"{len(ids)} generated ids: one image and the end of the turn expected, found {len(frames)} "
                    f"images{'' if ids[-1] == self.vocabulary.eot else ' and no end'}"
                )
        return [frames[0] for frames in found]

    def decode(self, token_ids: Any, *, skip_special_tokens: bool = False) -> str:
        """Ids as text, as transformers' tokenizers and streamers have it: every id by its name, text joined.

        Args:
            token_ids: (T,) ids of any kind.
            skip_special_tokens: words alone.

        Raises:
            ValueError: several sequences, or no ids.
            VocabularyError: an id is outside the vocabulary.
        """
        rows = _rows(token_ids)
        if len(rows) != 1:
            raise ValueError(f"{len(rows)} sequences; decode takes one, batch_decode takes several")
        (ids,) = rows
        if skip_special_tokens:
            return self.text.decode(ids, skip_special_tokens=True)
        return self.text.spell(ids)

    def batch_decode(self, sequences: Any, *, skip_special_tokens: bool = False) -> list[str]:
        """`decode` for each of (B, T) sequences."""
        return [self.decode(ids, skip_special_tokens=skip_special_tokens) for ids in _rows(sequences)]

    def encode_images(self, images: Any) -> list[NDArray[np.int64]]:
        """Images of any sizes, or one image → one array of codes (rows, columns) each.

        Raises:
            ValueError: no image.
            ImageError: something that is no image; it is named with its shape and type.
        """
        images = as_list(images)
        if len(images) == 0:
            raise ValueError("0 images; at least 1 needed")
        pictures = [self._fit(image, f"image {n} of {len(images)}") for n, image in enumerate(images, start=1)]
        codes: list[NDArray[np.int64]] = [np.empty(0, np.int64)] * len(pictures)
        for size in {picture.size for picture in pictures}:  # only images of one size go together
            indices = [index for index, picture in enumerate(pictures) if picture.size == size]
            found = self.images.encode([pictures[index] for index in indices], target=self.image_size)
            for index, code in zip(indices, found, strict=True):
                codes[index] = code
        return codes

    def action_prompt(self, images: Any, instruction: str) -> list[int]:
        """Ids that ask for a chunk of actions.

        Args:
            images: M images, oldest first.
            instruction: the task in words, such as `put the bowl on the plate`.
        """
        (prompt,) = self.action_prompts([images], [instruction])
        return prompt

    def action_prompts(self, images: Any, instructions: Sequence[str]) -> list[list[int]]:
        """`action_prompt` for each of several scenes; all images are encoded in one go.

        Raises:
            ValueError: another number of instructions than of lists of images, or none.
        """
        images = as_list(images)
        if isinstance(instructions, str):
            instructions = [instructions]
        if len(images) != len(instructions) or len(images) == 0:
            raise ValueError(
                f"{len(images)} lists of images and {len(instructions)} instructions; equal numbers, at least 1, "
                "needed"
            )
        texts = [self._instruct(self.settings.action_prompt, words) for words in instructions]
        histories = [as_list(frames) for frames in images]
        codes = iter(self.encode_images([image for frames in histories for image in frames]))
        return [
            sequence.action_prompt(text, [next(codes) for _ in frames], self.vocabulary)
            for text, frames in zip(texts, histories, strict=True)
        ]

    def world_prompt(self, images: Any, actions: ArrayLike) -> list[int]:
        """Ids that ask for the next frame.

        Args:
            images: h images, oldest first.
            actions: (h, D) actions in data units, each taken at the image of the same place; (D,) for one image.
        """
        text = self.text.encode(self.settings.world_prompt)
        ids = np.atleast_2d(self.actions.encode(actions))
        return sequence.world_prompt(text, self.encode_images(images), ids, self.vocabulary)

    def video_prompt(self, images: Any, instruction: str) -> list[int]:
        """Ids that ask for future frames without actions (the paper's Fig. 7); arguments as `action_prompt`."""
        text = self._instruct(self.settings.video_prompt, instruction)
        return sequence.action_prompt(text, self.encode_images(images), self.vocabulary)

    def action_sample(self, images: Any, instruction: str, actions: ArrayLike) -> Sample:
        """Ids and labels of a training sample: M images and words → (K, D) actions in data units."""
        text = self._instruct(self.settings.action_prompt, instruction)
        codes, ids = self.encode_images(images), self.actions.encode(actions)
        return sequence.action_sample(text, codes, ids, self.vocabulary, labels=self.settings.labels)

    def world_sample(self, images: Any, actions: ArrayLike, next_image: Any) -> Sample:
        """Ids and labels of a training sample: h images and their actions → the next frame.

        Args:
            images: h images, oldest first.
            actions: (h, D) actions in data units; for N rounds (h + N - 1, D).
            next_image: the frame to predict; a list of N frames for N rounds.
        """
        frames = as_list(images)
        codes = self.encode_images([*frames, *as_list(next_image)])
        return sequence.world_sample(
            self.text.encode(self.settings.world_prompt),
            codes[: len(frames)],
            np.atleast_2d(self.actions.encode(actions)),
            codes[len(frames) :],
            self.vocabulary,
            labels=self.settings.labels,
        )

    def video_sample(self, images: Any, instruction: str, next_images: Any) -> Sample:
        """Ids and labels of a training sample: M images and words → K future frames."""
        frames = as_list(images)
        codes = self.encode_images([*frames, *as_list(next_images)])
        text = self._instruct(self.settings.video_prompt, instruction)
        parts = codes[: len(frames)], codes[len(frames) :]
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
            SettingsError: an option that is no setting, a setting out of its range, or parts that do not fit.
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
            settings = read_json(found[FILE_NAME], SettingsError)
            settings.pop("processor_class", None)
            saved = ActionTokenizer.from_pretrained(source, **hub)
            if action_tokenizer is not None and action_tokenizer.dimensions != saved.dimensions:
                raise SettingsError(
                    f"the action tokenizer has {action_tokenizer.dimensions} dimensions; {source} was trained "
                    f"with {saved.dimensions}"
                )
            actions = action_tokenizer or saved
        unknown = sorted((settings | options).keys() - ProcessorSettings.__dataclass_fields__.keys())
        if unknown:
            allowed = ", ".join(ProcessorSettings.__dataclass_fields__)
            raise SettingsError(f"{source}: unknown settings {', '.join(unknown)}; allowed: {allowed}")
        try:
            chosen = ProcessorSettings(**(settings | options))
        except SettingsError as error:
            raise SettingsError(f"{source}: {error}") from error
        return cls(
            text=TextTokenizer.from_pretrained(source, **hub),
            images=ImageTokenizer.from_pretrained(source, image_size=chosen.image_size, device=device, **hub),
            actions=actions,
            settings=chosen,
        )

    def _fit(self, image: Any, name: str) -> Image.Image:
        """An image at the processor's size."""
        if isinstance(image, torch.Tensor):
            image = image.detach().cpu().numpy()
        try:
            return fit(image, self.image_size)
        except ImageError as error:
            if not isinstance(image, np.ndarray):
                raise ImageError(f"{name}: {error}") from error
            first = image.ndim == 3 and image.shape[0] in (1, 3, 4) and image.shape[2] not in (1, 3, 4)
            remedy = "; its channels come first: pass np.moveaxis(image, 0, -1)" if first else ""
            raise ImageError(f"{name}, {image.dtype} of shape {image.shape}: {error}{remedy}") from error

    def _answer(self, ids: list[int]) -> list[int]:
        """Generated ids without padding, and without the prompt, which ends where the first turn does."""
        tokens = self.vocabulary
        start, stop = 0, len(ids)
        while start < stop and ids[start] == tokens.pad:
            start += 1
        while stop > start and ids[stop - 1] == tokens.pad:
            stop -= 1
        ids = ids[start:stop]
        if ids[:1] == [tokens.bos] and tokens.eot in ids:
            return ids[ids.index(tokens.eot) + 1 :]
        return ids

    def _instruct(self, template: str, instruction: str) -> list[int]:
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(f"instruction is {instruction!r}; words are needed")
        return self.text.encode(template.replace("{instruction}", instruction))


def as_list(images: Any) -> list[Any]:
    """One image, or several in a list or array, as a list.

    An array of up to three axes is one image, as for `ImageTokenizer`: taken for a list, its rows would be images.

    Raises:
        ImageError: anything else, such as the name of a file.
    """
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray | torch.Tensor) and images.ndim < 4):
        return [images]
    if isinstance(images, str | bytes | Mapping) or not isinstance(images, Iterable):
        raise ImageError(
            f"images are {type(images).__name__}, {images!r:.60}; an image (PIL, or an array of shape (H, W, 3)) "
            "or a list of them needed"
        )
    return list(images)


def _is_nested(images: Any) -> bool:
    """Whether these are the images of several prompts, with a list for each: an array then has five axes."""
    if isinstance(images, np.ndarray | torch.Tensor):
        return images.ndim > 4
    return isinstance(images, list | tuple) and any(
        isinstance(entry, list | tuple) or (isinstance(entry, np.ndarray | torch.Tensor) and entry.ndim == 4)
        for entry in images
    )


def _axes(actions: Any) -> int:
    """Of (h, D) or (B, h, D) actions, whatever they are kept in."""
    axes = 0
    while not isinstance(actions, np.ndarray | torch.Tensor):
        if not isinstance(actions, list | tuple) or not actions:
            return axes
        actions, axes = actions[0], axes + 1
    return axes + int(actions.ndim)


def _rows(ids: Any) -> list[list[int]]:
    """Ids of one sequence, or of several in a tensor, an array or a list, as lists.

    Raises:
        ValueError: they are anything else.
    """
    if isinstance(ids, torch.Tensor | np.ndarray):
        ids = ids.tolist()
    if isinstance(ids, int | np.integer):  # a streamer's last token alone
        ids = [ids]
    if not isinstance(ids, list | tuple):
        raise ValueError(f"ids are {type(ids).__name__}; a tensor, an array or a list (B, T) or (T,) needed")
    rows: list[Any] = [row.tolist() if isinstance(row, torch.Tensor | np.ndarray) else row for row in ids]
    if all(isinstance(token, int | np.integer) for token in rows):
        return [[int(token) for token in rows]]
    return [[int(token) for token in row] for row in rows]


def _name(block: sequence.Block) -> str:
    """A block in an error."""
    if isinstance(block, sequence.Marker):
        return block.value
    return f"{'a' if isinstance(block, sequence.TextBlock) else 'an'} {type(block).__name__}"


__all__ = ["ProcessorSettings", "SettingsError", "WorldVLAProcessor"]
