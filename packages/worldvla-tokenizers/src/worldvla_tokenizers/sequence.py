"""Blocks and whole samples: ids and labels; and back, from ids to blocks.

A sample is a prompt, a bar, and what the model has to say:

    action   bos, text, image x M, eot            | action x K, eot
    world    bos, text, (image, action) x h, eot  | image, eot
    video    bos, text, image x M, eot            | image x K, eot

Images are oldest first. A world sample of N rounds goes on `action, eot | image, eot` N - 1 times: the frame
just generated is the current frame of the next round, so it is not repeated.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import chain
from typing import Literal, NamedTuple, SupportsIndex, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldvla_tokenizers.vocabulary import FIRST_TEXT_ID, Vocabulary

IGNORED = -100
"""Label of a position that is not supervised, as in PyTorch and transformers."""

LabelRule = Literal["published", "paper"]
"""`published`: every token right of the bar. `paper`: of those only image codes and action bins."""

ACTION_PROMPT = "What action should the robot take to {instruction}?"
WORLD_PROMPTS = {
    "published": "Generate the next image based on the provided sequence of historical images and "
    "corresponding actions.",
    "published_inference": "Generate the image based on the current image and the action.",
    "paper": "Generate the next frame based on the current image and the action.",
}
"""The released code trains with `published` but infers with `published_inference`; the paper has a third."""
VIDEO_PROMPT = "Generate the future image based on the task and current image.{instruction}"


@dataclass(frozen=True)
class Prompts:
    """Texts of the prompts, and what is supervised.

    Attributes:
        action_prompt: text before the images, with `{instruction}`.
        world_prompt: text before frames and actions.
        video_prompt: text before the images of video prediction, with `{instruction}`.
        labels: what is supervised, `published` or `paper`.
    """

    action_prompt: str = ACTION_PROMPT
    world_prompt: str = WORLD_PROMPTS["published"]
    video_prompt: str = VIDEO_PROMPT
    labels: LabelRule = "published"


class SequenceError(ValueError):
    """Ids, codes or actions that do not form the blocks they should."""


class Sample(NamedTuple):
    """One training sample.

    Attributes:
        ids: (T,) ids of prompt and answer.
        labels: (T,) the id itself where it is supervised, else -100.
    """

    ids: list[int]
    labels: list[int]


class Marker(Enum):
    """Blocks of a single token."""

    BOS = "bos"
    EOT = "eot"


@dataclass(frozen=True)
class TextBlock:
    """A run of text.

    Attributes:
        ids: BPE ids.
    """

    ids: tuple[int, ...]


@dataclass(frozen=True)
class ActionBlock:
    """One action: `boa, D bin ids, eoa`.

    Attributes:
        ids: the D bin ids.
    """

    ids: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ImageBlock:
    """One image: `boi, grid(h), grid(w), rows of codes each closed by a new line, eoi`.

    Attributes:
        codes: (rows, columns) codebook indices; a row or column is 16 pixels.
    """

    codes: NDArray[np.int64]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageBlock) and np.array_equal(self.codes, other.codes)

    def __hash__(self) -> int:
        return hash((self.codes.shape, self.codes.tobytes()))


Block: TypeAlias = Marker | TextBlock | ImageBlock | ActionBlock
Slots: TypeAlias = list[range]
"""The grammar of a block: for each position the ids that may stand there (one id: it is forced)."""


def action_slots(dimensions: int, vocabulary: Vocabulary) -> Slots:
    """Allowed ids at each of the `dimensions + 2` positions of an action block."""
    return [_only(vocabulary.boa), *[vocabulary.action_range] * dimensions, _only(vocabulary.eoa)]


def image_slots(rows: int, columns: int, vocabulary: Vocabulary, *, codebook_size: int | None = None) -> Slots:
    """Allowed ids at each position of the block of an image of `rows` x `columns` codes.

    Args:
        rows: of codes.
        columns: of codes.
        vocabulary: owner of the ids.
        codebook_size: entries of the image tokenizer's codebook, where it has fewer than the vocabulary.

    Raises:
        SequenceError: the image is not a whole number of grid units (32 pixels, two codes) high and wide.
    """
    row = [*[vocabulary.image_range[:codebook_size]] * columns, _only(vocabulary.newline)]
    head = [_only(i) for i in _image_head(rows, columns, vocabulary)]
    return [*head, *row * rows, _only(vocabulary.eoi)]


def action_block(ids: ArrayLike, vocabulary: Vocabulary) -> list[int]:
    """Bin ids (D,) of one action → its block of D + 2 ids.

    Raises:
        SequenceError: not one action.
        VocabularyError: an id is no action id.
    """
    array = np.asarray(ids)
    if array.ndim != 1 or array.size == 0:
        raise SequenceError(f"action ids have shape {array.shape}; (D,) with D of at least 1 needed")
    return _action_blocks(array[None], vocabulary)


def image_block(codes: ArrayLike, vocabulary: Vocabulary) -> list[int]:
    """Codes (rows, columns) of one image → its block of `rows * (columns + 1) + 4` ids.

    Raises:
        SequenceError: not one image of whole grid units.
        VocabularyError: a code is outside the codebook.
    """
    array = np.asarray(codes)
    if array.ndim != 2:
        raise SequenceError(f"image codes have shape {array.shape}; (rows, columns) needed")
    rows, columns = array.shape
    head = _image_head(rows, columns, vocabulary)
    body = np.full((rows, columns + 1), vocabulary.newline)
    body[:, :-1] = vocabulary.image_ids(array)
    return [*head, *body.ravel().tolist(), vocabulary.eoi]


def action_prompt(text: Sequence[int], images: Sequence[ArrayLike], vocabulary: Vocabulary) -> list[int]:
    """Everything left of the bar of an action sample; a video sample's prompt has the same form.

    Args:
        text: ids of the filled-in `ACTION_PROMPT` (or `VIDEO_PROMPT`).
        images: M arrays of codes (rows, columns), oldest first.
        vocabulary: owner of the ids.

    Raises:
        SequenceError: no image, or a text id that is no text.
    """
    if len(images) == 0:
        raise SequenceError("0 images in the prompt; at least 1 needed")
    blocks = [image_block(codes, vocabulary) for codes in images]
    return [vocabulary.bos, *_text(text, vocabulary), *chain.from_iterable(blocks), vocabulary.eot]


def world_prompt(
    text: Sequence[int], images: Sequence[ArrayLike], actions: ArrayLike, vocabulary: Vocabulary
) -> list[int]:
    """Everything left of the bar of a world sample.

    Args:
        text: ids of one of `WORLD_PROMPTS`.
        images: h arrays of codes (rows, columns), oldest first.
        actions: (h, D) bin ids; action i was taken at image i.
        vocabulary: owner of the ids.

    Raises:
        SequenceError: no image, or another number of actions.
    """
    actions = _actions(actions)
    if len(images) == 0 or len(images) != len(actions):
        raise SequenceError(f"{len(images)} images and {len(actions)} actions; equal numbers, at least 1, needed")
    pairs = (
        [*image_block(codes, vocabulary), *action_block(ids, vocabulary)]
        for codes, ids in zip(images, actions, strict=True)
    )
    return [vocabulary.bos, *_text(text, vocabulary), *chain.from_iterable(pairs), vocabulary.eot]


def action_sample(
    text: Sequence[int],
    images: Sequence[ArrayLike],
    actions: ArrayLike,
    vocabulary: Vocabulary,
    *,
    labels: LabelRule = "published",
) -> Sample:
    """Words and M images → K actions.

    Args:
        text: ids of the filled-in `ACTION_PROMPT`.
        images: M arrays of codes (rows, columns), oldest first.
        actions: (K, D) bin ids.
        vocabulary: owner of the ids.
        labels: what is supervised.

    Raises:
        SequenceError: no image or no action.
    """
    actions = _actions(actions)
    if len(actions) == 0:
        raise SequenceError("0 actions to predict; at least 1 needed")
    answer = [*_action_blocks(actions, vocabulary), vocabulary.eot]
    return _sample([(action_prompt(text, images, vocabulary), answer)], vocabulary, labels)


def world_sample(
    text: Sequence[int],
    images: Sequence[ArrayLike],
    actions: ArrayLike,
    next_images: Sequence[ArrayLike],
    vocabulary: Vocabulary,
    *,
    labels: LabelRule = "published",
) -> Sample:
    """Images, each with its action → the next frame; N times over, each frame given all before it.

    Args:
        text: ids of one of `WORLD_PROMPTS`.
        images: h arrays of codes (rows, columns), oldest first.
        actions: (h + N - 1, D) bin ids: one for each image and for each next image but the last.
        next_images: N arrays of codes to predict.
        vocabulary: owner of the ids.
        labels: what is supervised.

    Raises:
        SequenceError: numbers of images and actions that do not fit.
    """
    actions = _actions(actions)
    h, rounds = len(images), len(next_images)
    if rounds == 0 or len(actions) != h + rounds - 1:
        raise SequenceError(
            f"{h} images, {len(actions)} actions, {rounds} next images; "
            "at least one next image and (images + next images - 1) actions needed"
        )
    prompts = [world_prompt(text, images, actions[:h], vocabulary)]
    prompts += [[*action_block(ids, vocabulary), vocabulary.eot] for ids in actions[h:]]
    answers = [[*image_block(codes, vocabulary), vocabulary.eot] for codes in next_images]
    return _sample(list(zip(prompts, answers, strict=True)), vocabulary, labels)


def video_sample(
    text: Sequence[int],
    images: Sequence[ArrayLike],
    next_images: Sequence[ArrayLike],
    vocabulary: Vocabulary,
    *,
    labels: LabelRule = "published",
) -> Sample:
    """Words and M images → K future frames, without actions (the paper's Fig. 7).

    Args:
        text: ids of the filled-in `VIDEO_PROMPT`.
        images: M arrays of codes (rows, columns), oldest first.
        next_images: K arrays of codes to predict.
        vocabulary: owner of the ids.
        labels: what is supervised.

    Raises:
        SequenceError: no image or no next image.
    """
    if len(next_images) == 0:
        raise SequenceError("0 frames to predict; at least 1 needed")
    answer = [*chain.from_iterable(image_block(codes, vocabulary) for codes in next_images), vocabulary.eot]
    return _sample([(action_prompt(text, images, vocabulary), answer)], vocabulary, labels)


def parse(ids: Sequence[int], vocabulary: Vocabulary, *, dimensions: int = 7) -> list[Block]:
    """Read ids back into blocks, strictly: whole samples, prompts, or what a model generated.

    Args:
        ids: (T,) ids, without padding.
        vocabulary: owner of the ids.
        dimensions: D, bin ids per action.

    Returns:
        The blocks in order; `bos` may stand only at the start.

    Raises:
        SequenceError: the first position that does not fit, what was expected there and what was found.
    """
    tokens = [_whole(i, at) for at, i in enumerate(ids)]
    blocks: list[Block] = []
    at = 0
    while at < len(tokens):
        token = tokens[at]
        if token == vocabulary.boa:
            slots = action_slots(dimensions, vocabulary)
            _expect(tokens, at, slots, vocabulary)
            blocks.append(ActionBlock(tuple(tokens[at + 1 : at + 1 + dimensions])))
            at += len(slots)
        elif token == vocabulary.boi:
            rows, columns = (2 * n for n in _grid(tokens, at, vocabulary))
            slots = image_slots(rows, columns, vocabulary)
            _expect(tokens, at, slots, vocabulary)
            body = np.array(tokens[at + 3 : at + len(slots) - 1]).reshape(rows, columns + 1)
            blocks.append(ImageBlock(vocabulary.image_codes(body[:, :-1])))
            at += len(slots)
        elif token == vocabulary.eot or (token == vocabulary.bos and at == 0):
            blocks.append(Marker.EOT if token == vocabulary.eot else Marker.BOS)
            at += 1
        elif _is_text(token, vocabulary):
            end = next((i for i in range(at, len(tokens)) if not _is_text(tokens[i], vocabulary)), len(tokens))
            blocks.append(TextBlock(tuple(tokens[at:end])))
            at = end
        else:
            raise _unexpected(tokens, at, "bos (at the start only), text, boi, boa or eot", vocabulary)
    return blocks


def actions_of(blocks: Sequence[Block]) -> NDArray[np.int64]:
    """Bin ids (K, D) of all action blocks, in order."""
    return np.array([block.ids for block in blocks if isinstance(block, ActionBlock)], dtype=np.int64)


def images_of(blocks: Sequence[Block]) -> list[NDArray[np.int64]]:
    """Codes (rows, columns) of each image block, in order."""
    return [block.codes for block in blocks if isinstance(block, ImageBlock)]


def _whole(id: SupportsIndex, at: int) -> int:
    try:
        return operator.index(id)
    except TypeError as error:
        raise SequenceError(f"position {at} holds {id!r}; a whole number needed") from error


def _sample(rounds: list[tuple[list[int], list[int]]], vocabulary: Vocabulary, rule: LabelRule) -> Sample:
    if rule not in ("published", "paper"):
        raise SequenceError(f"label rule is {rule!r}; allowed: 'published', 'paper'")
    sample = Sample([], [])
    for prompt, answer in rounds:
        sample.ids.extend(prompt + answer)
        sample.labels.extend([IGNORED] * len(prompt))
        sample.labels.extend(answer if rule == "published" else _values_only(answer, vocabulary))
    return sample


def _values_only(answer: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    codes, bins = vocabulary.image_range, vocabulary.action_range
    return [i if i in codes or i in bins else IGNORED for i in answer]


def _is_text(token: int, vocabulary: Vocabulary) -> bool:
    return token == vocabulary.unk or FIRST_TEXT_ID <= token < vocabulary.size


def _text(ids: Sequence[int], vocabulary: Vocabulary) -> list[int]:
    for position, token in enumerate(ids):
        if not _is_text(token, vocabulary):
            raise SequenceError(f"text id {vocabulary.describe(token)} at position {position} is no text")
    return [int(i) for i in ids]


def _actions(actions: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(actions)
    if array.ndim != 2:
        raise SequenceError(f"action ids have shape {array.shape}; (number of actions, D) needed")
    return array


def _action_blocks(actions: NDArray[np.int64], vocabulary: Vocabulary) -> list[int]:
    """(K, D) bin ids → K blocks in a row; checked and made together, which is most of a sample's cost."""
    count, dimensions = actions.shape
    if dimensions == 0:
        raise SequenceError(f"action ids have shape {actions.shape}; D of at least 1 needed")
    blocks = np.empty((count, dimensions + 2), dtype=np.int64)
    blocks[:, 0], blocks[:, -1] = vocabulary.boa, vocabulary.eoa
    vocabulary.action_bins(actions)  # raises on a foreign id
    blocks[:, 1:-1] = actions
    return blocks.ravel().tolist()


def _image_head(rows: int, columns: int, vocabulary: Vocabulary) -> list[int]:
    if rows < 2 or columns < 2 or rows % 2 or columns % 2:
        raise SequenceError(f"image of {rows} x {columns} codes; both must be even and at least 2 (32 pixels)")
    return [vocabulary.boi, vocabulary.grid(rows // 2), vocabulary.grid(columns // 2)]


def _only(token: int) -> range:
    return range(token, token + 1)


def _grid(tokens: list[int], at: int, vocabulary: Vocabulary) -> tuple[int, int]:
    _expect(tokens, at, [_only(vocabulary.boi), vocabulary.grid_range, vocabulary.grid_range], vocabulary)
    return vocabulary.grid_size(tokens[at + 1]), vocabulary.grid_size(tokens[at + 2])


def _expect(tokens: list[int], at: int, slots: Slots, vocabulary: Vocabulary) -> None:
    for position, slot in enumerate(slots, start=at):
        if position >= len(tokens) or tokens[position] not in slot:
            first = vocabulary.describe(slot[0])
            expected = first if len(slot) == 1 else f"{first} … {vocabulary.describe(slot[-1])}"
            raise _unexpected(tokens, position, expected, vocabulary)


def _unexpected(tokens: list[int], at: int, expected: str, vocabulary: Vocabulary) -> SequenceError:
    found = vocabulary.describe(tokens[at]) if at < len(tokens) else "the end"
    return SequenceError(f"position {at}: expected {expected}, found {found}")
