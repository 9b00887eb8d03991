"""Words ↔ ids: byte-level BPE whose pieces stand after the fixed tokens of the published layout."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import ArrayLike
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from worldvla_tokenizers.files import HubOptions, resolve_files, staged_folder, write_text_atomic
from worldvla_tokenizers.signatures import read_text
from worldvla_tokenizers.vocabulary import (
    FIRST_TEXT_ID,
    TOKENIZER_NAMES,
    Vocabulary,
    VocabularyError,
    layout,
    may_rename,
    token_table,
)

FILE_NAME = TOKENIZER_NAMES[0]
CONFIG_NAME = "tokenizer_config.json"

# What transformers.AutoTokenizer needs to know beside tokenizer.json.
_AUTO_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "clean_up_tokenization_spaces": False,
}

# Byte-level text writes a space as "Ġ": a name with a true space in it can neither be typed nor merged.
_UNUSED = "unused {:05d}"

# Every fixed name has an end of its word where byte-level BPE stops merging, but for the image codes, which are
# letters only. Training text is cut here, so that no learned piece can take such a name.
_IMAGE_NAME_HEAD = "IMGIMG"


class TextTokenizer:
    """Text pieces of the shared vocabulary.

    Text is only ever text: `"<s>"`, `"<reserved10000>"` or `"IMGIMGAZ"` in an instruction is spelled out in
    pieces like any other string, so that no user can type a control, image or action token. (The published
    code parses them.) It holds by construction: the model that encodes has no fixed token in its table.

    Args:
        serialized: the content of a Hugging Face `tokenizer.json` of type BPE in the published layout.
        origin: what to call it in an error.

    Raises:
        VocabularyError: the layout is not the published one; the message lists what is missing or elsewhere.

    Example:
        >>> tokenizer = TextTokenizer.train(["open the drawer", "open the door"], vocab_size=16_700)
        >>> tokenizer.decode(tokenizer.encode("open the drawer"))
        'open the drawer'
        >>> min(tokenizer.encode("<s>")) >= 16_388
        True
    """

    def __init__(self, serialized: str, *, origin: str = FILE_NAME) -> None:
        content = _parse(serialized, origin)
        table = token_table(content, origin)
        pieces: dict[str, int] = content["model"]["vocab"]
        added: list[dict[str, Any]] = content.get("added_tokens") or []
        special = {token["content"] for token in added}
        # Marks that conversations add after the text pieces, such as `<|image|>`: no text makes them, and models
        # have no rows for them.
        marks = {token["content"] for token in added if token.get("special") and token["id"] >= FIRST_TEXT_ID}
        table = {name: i for name, i in table.items() if name not in marks}
        self.vocabulary = Vocabulary.from_mapping(table, origin=origin, special=special)
        self._serialized = serialized

        fixed = set(layout())
        unknown = content["model"].get("unk_token")
        stray = {
            name: i
            for name, i in table.items()
            if i < FIRST_TEXT_ID and name not in fixed and not may_rename(name, i, special)
        }
        if stray:
            raise VocabularyError(
                f"{origin}: text pieces on ids of fixed tokens (0 … {FIRST_TEXT_ID - 1}): "
                + "; ".join(f"{name!r} is {i}" for name, i in list(stray.items())[:5])
                + (f"; and {len(stray) - 5} more" if len(stray) > 5 else "")
            )
        self._text_ids = frozenset(
            i for name, i in table.items() if i >= FIRST_TEXT_ID and not name.startswith("unused ")
        )
        # Whatever frames, cuts or pads a sequence is the business of `sequence`, not of the text in it.
        content.update(truncation=None, padding=None, post_processor=None)
        text = {name for name, i in table.items() if i >= FIRST_TEXT_ID}
        content["added_tokens"] = [token for token in added if token["content"] in text]
        content["model"]["vocab"] = {name: i for name, i in pieces.items() if name in text or name == unknown}
        try:
            self._model = Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # tokenizers raises nothing narrower
            raise VocabularyError(
                f"{origin}: the text pieces alone make no BPE model, perhaps because merges produce "
                f"fixed tokens: {error}"
            ) from error

    @classmethod
    def from_pretrained(cls, dir_or_repo: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> TextTokenizer:
        """Read the `tokenizer.json`, or else `text_tokenizer.json`, of a folder or a Hub repository.

        Args:
            dir_or_repo: a folder, or the id of a Hub repository.
            hub: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`, as in transformers.

        Raises:
            VocabularyError: the layout is not the published one, or the file is of another kind.
            FileNotFoundError: there is no such file.
        """
        found = resolve_files(dir_or_repo, any_of=TOKENIZER_NAMES, **hub)
        return cls.from_file(next(found[name] for name in TOKENIZER_NAMES if name in found))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> TextTokenizer:
        """Read a `tokenizer.json`, under whatever name.

        Raises:
            VocabularyError: the layout is not the published one, or the file is of another kind.
            FileNotFoundError: there is no such file.
        """
        return cls(read_text(Path(path), "Hugging Face tokenizer.json", VocabularyError), origin=str(path))

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int = 65_536, pad_to: int | None = None) -> TextTokenizer:
        """Learn text pieces; the fixed tokens stand where every checkpoint of the family has them.

        The same texts give the same file, in whatever order they come.

        Args:
            texts: any number of strings, read once.
            vocab_size: upper limit of all ids, fixed tokens and the 256 bytes included.
            pad_to: fill the table up to this many ids (published: 65,536) with names no text can produce,
                so that it fits an embedding of that many rows.

        Raises:
            VocabularyError: `vocab_size` is too small for the fixed tokens and bytes, or above `pad_to`.
            TypeError: a text is no string.
        """
        smallest = FIRST_TEXT_ID + len(pre_tokenizers.ByteLevel.alphabet())
        if vocab_size < smallest:
            raise VocabularyError(
                f"vocab_size is {vocab_size}; at least {smallest} ({FIRST_TEXT_ID} fixed tokens and 256 bytes)"
            )
        if pad_to is not None and pad_to < vocab_size:
            raise VocabularyError(f"pad_to is {pad_to}; at least vocab_size, {vocab_size}, needed")

        bpe = Tokenizer(models.BPE(unk_token="<unk>"))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - FIRST_TEXT_ID,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(_training_parts(texts), trainer)

        # The pieces were learned without the fixed tokens, which a merge could otherwise have ended on.
        content = json.loads(bpe.to_str())
        names = list(layout())
        learned = content["model"]["vocab"]
        names += sorted(learned, key=learned.__getitem__)
        names += [_UNUSED.format(i) for i in range(len(names), pad_to or 0)]
        content["model"]["vocab"] = {name: i for i, name in enumerate(names)}
        content["added_tokens"] = [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False}
            | {"normalized": False, "special": True}
            for i, name in enumerate(names[:FIRST_TEXT_ID])
        ]
        return cls(json.dumps(content, ensure_ascii=False), origin="trained tokenizer")

    @property
    def size(self) -> int:
        """Number of ids, fixed tokens included."""
        return self.vocabulary.size

    def encode(self, text: str) -> list[int]:
        """Spell a text in pieces; no bos or other token is added, and none is parsed.

        Returns:
            Text ids, all of at least 16,388.

        Raises:
            TypeError: `text` is no string.
            VocabularyError: the text holds half a surrogate pair, or a character the tokenizer has no piece
                for (never with files that hold all 256 bytes, such as those of `train`).
        """
        if not isinstance(text, str):
            raise TypeError(f"text is {type(text).__name__}; a str is needed")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise VocabularyError(f"text {text!r} is no valid Unicode: {error}") from error
        ids = self._model.encode(text, add_special_tokens=False).ids
        if any(i < FIRST_TEXT_ID for i in ids):
            raise VocabularyError(f"text {text!r} holds a character the tokenizer has no piece for")
        return ids

    def decode(self, ids: ArrayLike, *, skip_special_tokens: bool = False) -> str:
        """Join text pieces. Pieces that are no whole UTF-8 character become U+FFFD, as in every byte-level BPE.

        Args:
            ids: (T,) text ids.
            skip_special_tokens: leave out ids that are no text (control, image, action, unused) instead of
                raising.

        Raises:
            VocabularyError: an id is no text, or `ids` is no flat list of integers.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise VocabularyError(f"ids have shape {array.shape} and type {array.dtype}; (T,) integers needed")
        kept = []
        for position, i in enumerate(array.tolist()):
            if i in self._text_ids:
                kept.append(i)
            elif not skip_special_tokens or not 0 <= i < self.size:
                raise VocabularyError(
                    f"id {self.vocabulary.describe(i)} at position {position} is no text; "
                    f"text ids are {FIRST_TEXT_ID} … {max(self._text_ids, default=FIRST_TEXT_ID)}"
                )
        return self._model.decode(kept, skip_special_tokens=False)

    def spell(self, ids: ArrayLike) -> str:
        """Ids of any kind, every one by its name; pieces of text joined as `decode` joins them.

        Raises:
            VocabularyError: an id is outside the vocabulary, or `ids` is no flat list of integers.
        """
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
            raise VocabularyError(f"ids have shape {array.shape} and type {array.dtype}; (T,) integers needed")
        if array.size and (array.min() < 0 or array.max() >= self.size):
            raise VocabularyError(f"ids reach from {array.min()} to {array.max()}; allowed: 0 … {self.size - 1}")
        return self._with_names.decode(array.tolist(), skip_special_tokens=False)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `tokenizer.json`, byte for byte as read, and the `tokenizer_config.json` of AutoTokenizer."""
        with staged_folder(folder) as stage:
            write_text_atomic(stage / FILE_NAME, self._serialized)
            write_text_atomic(stage / CONFIG_NAME, json.dumps(_AUTO_CONFIG, indent=2) + "\n")

    @cached_property
    def _with_names(self) -> Tokenizer:
        """The tokenizer of the whole file, which also knows what is no text."""
        return Tokenizer.from_str(self._serialized)

    def __repr__(self) -> str:
        return f"TextTokenizer(size={self.size}, text_pieces={len(self._text_ids)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TextTokenizer) and self._serialized == other._serialized

    def __hash__(self) -> int:
        return hash(self._serialized)


def _parse(serialized: str, origin: str) -> dict[str, Any]:
    try:
        content = json.loads(serialized)
    except (ValueError, RecursionError) as error:
        raise VocabularyError(f"{origin} is no JSON: {error}") from error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise VocabularyError(
            f"{origin}: no 'model' of type BPE with a 'vocab' table; a Hugging Face tokenizer.json is needed"
        )
    return content


def _training_parts(texts: Iterable[str]) -> Iterator[str]:
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"text {number} is {type(text).__name__}; a str is needed")
        yield from text.split(_IMAGE_NAME_HEAD)
