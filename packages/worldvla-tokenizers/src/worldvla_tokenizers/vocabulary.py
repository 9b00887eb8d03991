"""The one table of ids that words, pixels and actions share: who owns which id.

The layout is the published one (Chameleon's, with the action tokens of WorldVLA placed on reserved ids) and
is the same for every checkpoint of the family; only the text pieces after it depend on a tokenizer file.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldvla_tokenizers.signatures import read_json

TOKENIZER_NAMES = ("tokenizer.json", "text_tokenizer.json")
"""The text tokenizer's file, as transformers and as Chameleon's and WorldVLA's authors name it, in this order."""

FIRST_TEXT_ID = 16_388
"""Every id below belongs to a special, image or reserved token; text pieces start here."""

# No piece of byte-level BPE reads so: it takes brackets and letters apart before it merges anything.
_TOKEN_NAME = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")

_LETTERS = str.maketrans("0123456789", "ABCDEFGHIJ")


class VocabularyError(ValueError):
    """An id, code or bin outside its range, or a token table with another layout."""


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the shared vocabulary.

    Attributes:
        size: number of rows of the table (published: 65,536); ids are 0 … size - 1.
        num_image_codes: entries of the image codebook.
        num_action_bins: bins per action dimension.

    Example:
        >>> v = Vocabulary.published()
        >>> v.boi, v.eoi, v.grid(8), v.eot
        (8197, 8196, 8812, 8710)
        >>> v.image_ids([0, 8191])
        array([   4, 8195])

    Source: vocabulary of the published checkpoints (`jcenaa/WorldVLA-ActionModel-LIBERO-*`).
    """

    size: int = 65_536
    num_image_codes: int = 8_192
    num_action_bins: int = 256

    bos: int = 0
    pad: int = 1
    eos: int = 2
    unk: int = 3
    first_image: int = 4
    eoi: int = 8_196
    boi: int = 8_197
    eot: int = 8_710
    """End of turn; the paper's [EOS]. The sequences never contain `eos`."""
    newline: int = 8_803
    """Closes each row of image codes."""
    boa: int = 10_004
    first_action: int = 10_006
    """Id of bin 1; 10,005 is never used."""
    eoa: int = 15_004

    def __post_init__(self) -> None:
        if not 1 <= self.num_image_codes <= self.eoi - self.first_image:
            raise VocabularyError(
                f"num_image_codes is {self.num_image_codes}; ids {self.first_image} … {self.eoi - 1} "
                f"hold 1 … {self.eoi - self.first_image} codes"
            )
        if not 2 <= self.num_action_bins <= self.eoa - self.first_action:
            raise VocabularyError(
                f"num_action_bins is {self.num_action_bins}; ids {self.first_action} … {self.eoa - 1} "
                f"hold 2 … {self.eoa - self.first_action} bins"
            )
        if self.size <= self.eoa:
            raise VocabularyError(f"size is {self.size}; at least {self.eoa + 1} ids are needed")

    @classmethod
    def published(cls) -> Vocabulary:
        """The published layout: the ids that do not depend on a tokenizer file."""
        return cls()

    @classmethod
    def from_tokenizer(cls, path: str | Path) -> Vocabulary:
        """Read a Hugging Face `tokenizer.json` and check that its layout is the published one.

        Args:
            path: the file, or a folder that holds a `tokenizer.json` or `text_tokenizer.json`.

        Returns:
            A vocabulary whose `size` is the number of ids the file names.

        Raises:
            VocabularyError: tokens are missing or stand elsewhere, or the file is no tokenizer.
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        if path.is_dir():
            first, *others = (path / name for name in TOKENIZER_NAMES)
            path = next((file for file in others if file.is_file() and not first.is_file()), first)
        content = read_json(path, VocabularyError)
        table = token_table(content, path)
        special = {token["content"] for token in content.get("added_tokens") or ()}
        return cls.from_mapping(table, origin=str(path), special=special)

    @classmethod
    def from_config(cls, path: str | Path) -> Vocabulary:
        """Read the `vocabulary_map` of a published checkpoint's `config.json`.

        Args:
            path: the file, or a folder that holds a `config.json`.

        Returns:
            A vocabulary whose `size` is the `vocab_size` of the model.

        Raises:
            VocabularyError: there is no `vocabulary_map`, or its layout is not the published one.
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        config = read_json(path, VocabularyError)
        table, size = config.get("vocabulary_map"), config.get("vocab_size")
        if size is not None and type(size) is not int:
            raise VocabularyError(f"{path}: vocab_size is {size!r}; a whole number needed")
        if not isinstance(table, dict):
            raise VocabularyError(
                f"{path} has no 'vocabulary_map'; published checkpoints carry one. "
                "Read the tokenizer with Vocabulary.from_tokenizer('tokenizer.json') instead"
            )
        return cls.from_mapping(table, origin=f"vocabulary_map of {path}", size=size)

    @classmethod
    def from_mapping(
        cls,
        table: Mapping[str, int],
        *,
        origin: str = "token table",
        size: int | None = None,
        special: Collection[str] = (),
    ) -> Vocabulary:
        """Check a table of token → id against the published layout.

        It is the ids that count: tokens from `eoi` on may have been renamed, as transformers renames
        `<reserved08707>` to `<image>`. The 8,192 names of image codes and the first four have to be there.

        Args:
            table: every token and its id.
            origin: what to call the table in an error.
            size: rows of the model's embedding, where it is larger than the table (padding).
            special: tokens known to be no text, whatever their names.

        Raises:
            VocabularyError: a needed token is missing or stands elsewhere, or an id lies outside `size`.
        """
        strange = next((name for name, index in table.items() if type(index) is not int or index < 0), None)
        if strange is not None:
            raise VocabularyError(f"{origin}: id of {strange!r} is {table[strange]!r}; a whole number needed")
        renamed = {index for name, index in table.items() if may_rename(name, index, special)}
        wrong = [
            f"{name!r} should be {index}, " + (f"is {table[name]}" if name in table else "is missing")
            for index, name in enumerate(layout())
            if table.get(name) != index and (name in table or index not in renamed)
        ]
        if wrong:
            listed = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            raise VocabularyError(f"{origin}: not the published layout of {FIRST_TEXT_ID} fixed tokens: {listed}")
        highest = max(table.values())
        if size is not None and size <= highest:
            raise VocabularyError(f"{origin}: id {highest} lies outside a vocabulary of {size} (0 … {size - 1})")
        return cls(size=highest + 1 if size is None else size)

    def grid(self, n: int) -> int:
        """Id of the token that says "n units of 32 pixels" (256 px: n = 8).

        Raises:
            VocabularyError: the token would not lie between the new line and the actions.
        """
        if not 1 <= n <= len(self.grid_range):
            raise VocabularyError(f"grid size is {n} units of 32 px; allowed: 1 … {len(self.grid_range)}")
        return self.grid_range[int(n) - 1]

    def grid_size(self, token: int) -> int:
        """Units of 32 pixels that a grid token stands for; the inverse of `grid`.

        Raises:
            VocabularyError: the id is no grid token.
        """
        if token not in self.grid_range:
            raise VocabularyError(
                f"id {token} is no grid token; allowed: {self.grid_range[0]} … {self.grid_range[-1]}"
            )
        return self.grid_range.index(int(token)) + 1

    @property
    def grid_range(self) -> range:
        """Ids of the grid sizes 1, 2 and so on."""
        return range(self.newline + 2, self.boa)

    @property
    def image_range(self) -> range:
        """Ids of the image codes."""
        return range(self.first_image, self.first_image + self.num_image_codes)

    @property
    def action_range(self) -> range:
        """Ids of the action bins."""
        return range(self.first_action, self.first_action + self.num_action_bins)

    def image_ids(self, codes: ArrayLike) -> NDArray[np.int64]:
        """Codebook indices (*) in 0 … num_image_codes - 1 → ids (*).

        Raises:
            VocabularyError: a code is outside its range.
        """
        return _shift(codes, range(self.num_image_codes), self.first_image, "image code")

    def image_codes(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Ids (*) of image codes → codebook indices (*).

        Raises:
            VocabularyError: an id is no image code.
        """
        return _shift(ids, self.image_range, -self.first_image, "image id")

    def action_ids(self, bins: ArrayLike) -> NDArray[np.int64]:
        """Bins (*) in 1 … num_action_bins → ids (*).

        Raises:
            VocabularyError: a bin is outside its range.
        """
        return _shift(bins, range(1, self.num_action_bins + 1), self.first_action - 1, "action bin")

    def action_bins(self, ids: ArrayLike) -> NDArray[np.int64]:
        """Ids (*) of action bins → bins (*) in 1 … num_action_bins.

        Raises:
            VocabularyError: an id is no action bin.
        """
        return _shift(ids, self.action_range, 1 - self.first_action, "action id")

    def describe(self, token: int) -> str:
        """What an id stands for, in words, for messages: `'8803 (new line)'`."""
        names = {
            self.bos: "bos", self.pad: "pad", self.eos: "eos", self.unk: "unk", self.eot: "end of turn",
            self.boi: "begin of image", self.eoi: "end of image", self.newline: "new line",
            self.boa: "begin of action", self.eoa: "end of action",
        }  # fmt: skip
        token = int(token)
        if token in names:
            return f"{token} ({names[token]})"
        if token in self.image_range:
            return f"{token} (image code {token - self.first_image})"
        if token in self.action_range:
            return f"{token} (action bin {token - self.first_action + 1})"
        if token in self.grid_range:
            return f"{token} (grid {self.grid_size(token)})"
        if FIRST_TEXT_ID <= token < self.size:
            return f"{token} (text)"
        return f"{token} (reserved)" if 0 <= token < self.size else f"{token} (outside 0 … {self.size - 1})"


def layout() -> Iterator[str]:
    """Names of the fixed tokens of the published layout, in the order of their ids 0 … 16,387."""
    yield from ("<s>", "<pad>", "</s>", "<unk>")
    for code in range(8_192):
        yield f"IMGIMG{str(code).translate(_LETTERS)}Z"
    yield from ("<eoss>", "<racm3:break>")
    for number in range(8_194, 16_384):
        yield f"<reserved{number:05d}>"


def may_rename(name: str, index: int, special: Collection[str] = ()) -> bool:
    """Whether a name can be that of a fixed token, renamed: it is no piece of text, and the id may be renamed."""
    fixed = Vocabulary.eoi <= index < FIRST_TEXT_ID
    return fixed and (name in special or _TOKEN_NAME.fullmatch(name) is not None)


def token_table(content: Mapping[str, Any], origin: str | Path) -> dict[str, int]:
    """Every token and id of the content of a Hugging Face `tokenizer.json`, added tokens included.

    Raises:
        VocabularyError: it is no tokenizer with a table.
    """
    model, added = content.get("model"), content.get("added_tokens") or []
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise VocabularyError(
            f"{origin}: no 'model.vocab' table; a Hugging Face tokenizer.json of type BPE is needed"
        )
    whole = isinstance(added, list) and all(
        isinstance(token, dict) and isinstance(token.get("content"), str) and type(token.get("id")) is int
        for token in added
    )
    if not whole:
        raise VocabularyError(f"{origin}: 'added_tokens' is no list of tokens with 'content' and 'id'")
    return model["vocab"] | {token["content"]: token["id"] for token in added}


def _shift(values: ArrayLike | Iterable[int], allowed: range, offset: int, what: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise VocabularyError(f"{what}s are {array.dtype}; integers are needed")
    array = array.astype(np.int64)
    if array.min() < allowed.start or array.max() >= allowed.stop:
        outside = (array < allowed.start) | (array >= allowed.stop)
        where = tuple(int(i) for i in np.argwhere(outside)[0])
        raise VocabularyError(
            f"{what} {int(array[where])} at index {where} is outside {allowed.start} … {allowed.stop - 1}"
            + (f" ({int(outside.sum())} such values)" if outside.sum() > 1 else "")
        )
    return array + offset
