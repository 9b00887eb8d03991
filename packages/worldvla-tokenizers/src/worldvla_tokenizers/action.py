"""Robot actions ↔ ids: each dimension cut into equal bins between its bounds.

NumPy only, so that other vision-language-action projects can import it alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldvla_tokenizers.files import HubOptions, resolve_files, write_text_atomic
from worldvla_tokenizers.vocabulary import Vocabulary

FILE_NAME = "action_tokenizer.json"

LIBERO_LOW = (-0.9375, -0.9375, -0.9375, -0.32571429, -0.375, -0.375, -1.0)
LIBERO_HIGH = (0.9375, 0.9375, 0.9375, 0.375, 0.375, 0.375, 1.0)

_EPSILON = 1e-8  # part of the published formula; it also keeps a constant dimension finite


class ActionError(ValueError):
    """An action, a set of bounds or a shape that cannot be binned."""


class ActionTokenizer:
    """Bins between per-dimension bounds, one id per dimension.

    A value is scaled from [low, high] to [-1, 1], clipped, and assigned one of `bins` bins; bin b has the id
    `vocabulary.action_ids(b)`. Decoding returns the centre of the bin. As in the published code there are
    `bins` edges and so `bins - 1` centres: the two highest ids decode to the same value, and ±1 comes back
    as ±(1 - 1/(bins - 1)).

    Args:
        low: (D,) lower bound of each dimension in data units.
        high: (D,) upper bound of each dimension in data units; at least `low`.
        bins: bins per dimension.

    Raises:
        ActionError: bounds of different or zero width, not finite, or in the wrong order.
        VocabularyError: more bins than the vocabulary's action range holds.

    Example:
        >>> tokenizer = ActionTokenizer.published()
        >>> tokenizer.encode([0.0, 0.1, 0.5, 0.0, 0.0, 0.0, 1.0])
        array([10133, 10147, 10201, 10124, 10133, 10133, 10260])
        >>> tokenizer.decode([10133, 10147, 10201, 10124, 10133, 10133, 10260]).round(3)[[1, 2, 6]].tolist()
        [0.103, 0.5, 0.996]

    Source: paper §3.2; RT-2 / OpenVLA binning, with ascending ids.
    """

    def __init__(self, low: ArrayLike, high: ArrayLike, *, bins: int = 256) -> None:
        self.low = _bounds(low, "low")
        self.high = _bounds(high, "high")
        if self.low.shape != self.high.shape:
            raise ActionError(f"low has {self.low.size} dimensions and high has {self.high.size}; equal needed")
        if (self.low > self.high).any():
            d = int(np.argmax(self.low > self.high))
            raise ActionError(f"dimension {d}: low {self.low[d]} is above high {self.high[d]}")
        self.vocabulary = Vocabulary(num_action_bins=bins)
        self.bins = bins
        self._edges = np.linspace(-1.0, 1.0, bins)
        self._centres = (self._edges[:-1] + self._edges[1:]) / 2.0

    @classmethod
    def published(cls) -> ActionTokenizer:
        """Bounds of the published LIBERO checkpoints: 3 positions, 3 angles, gripper (-1 open, +1 closed)."""
        return cls(LIBERO_LOW, LIBERO_HIGH)

    @classmethod
    def fit(cls, actions: ArrayLike, quantile: float | None = None, *, bins: int = 256) -> ActionTokenizer:
        """Take the bounds from data, as the paper does.

        Args:
            actions: (*, D) in data units; the training split only.
            quantile: None for minimum and maximum, else q in (0, 0.5): bounds are the q and 1 - q quantiles,
                so that outliers are clipped rather than widening every bin (OpenVLA uses 0.01).
            bins: bins per dimension.

        Raises:
            ActionError: no action, a value that is not finite, or a quantile out of range.
        """
        array = np.asarray(actions, dtype=np.float64)
        if array.ndim < 2 or array.size == 0:
            raise ActionError(f"actions to fit have shape {array.shape}; (*, D) with at least one action needed")
        _check_finite(array)
        array = array.reshape(-1, array.shape[-1])
        if quantile is None:
            return cls(array.min(axis=0), array.max(axis=0), bins=bins)
        if not 0.0 < quantile < 0.5:
            raise ActionError(f"quantile is {quantile}; allowed: above 0 and below 0.5, or None")
        low, high = np.quantile(array, [quantile, 1.0 - quantile], axis=0)
        return cls(low, high, bins=bins)

    @property
    def dimensions(self) -> int:
        """D, the number of ids of one action."""
        return self.low.size

    def encode(self, actions: ArrayLike) -> NDArray[np.int64]:
        """Bin actions into ids.

        Args:
            actions: (*, D) in data units (LIBERO: per-step deltas of position [m, scaled by the controller],
                axis-angle, and absolute gripper, -1 open to +1 closed). Values outside the bounds are clipped.

        Returns:
            (*, D) ids in the vocabulary's action range.

        Raises:
            ActionError: the last axis is not D, or a value is NaN or infinite.
        """
        array = self._check_width(np.asarray(actions), "actions").astype(np.float64)
        _check_finite(array)
        scaled = 2.0 * (array - self.low) / (self.high - self.low + _EPSILON) - 1.0
        return self.vocabulary.action_ids(np.digitize(scaled.clip(-1.0, 1.0), self._edges))

    def decode(
        self, ids: ArrayLike, *, time_horizon: int | None = None, action_dim: int | None = None
    ) -> NDArray[np.float64]:
        """Turn ids back into actions: the centres of their bins.

        Args:
            ids: (*, D) ids in the vocabulary's action range; or, with `time_horizon`, FAST's form: one flat
                list of `time_horizon * D` ids per sequence.
            time_horizon: actions per sequence, for FAST's form.
            action_dim: must equal D when given.

        Returns:
            (*, D) in data units; (B, time_horizon, D) for FAST's form.

        Raises:
            ActionError: the last axis is not D, or the lists are not `time_horizon` actions long.
            VocabularyError: an id is no action id. (The published code turns such an id into a full-range
                command.)
        """
        if action_dim not in (None, self.dimensions):
            raise ActionError(f"action_dim is {action_dim}; this tokenizer has {self.dimensions} dimensions")
        if time_horizon is not None:
            ids = self._unflatten(ids, time_horizon)
        array = self._check_width(np.asarray(ids), "ids")
        bins = self.vocabulary.action_bins(array)
        scaled = self._centres[(bins - 1).clip(0, self.bins - 2)]
        return (scaled + 1.0) / 2.0 * (self.high - self.low + _EPSILON) + self.low

    def __call__(self, actions: ArrayLike) -> list[list[int]]:
        """FAST's call: ([B,] T, D) actions → one flat list of ids per sequence.

        Raises:
            ActionError: as `encode`, or another number of axes.
        """
        ids = self.encode(actions)
        if ids.ndim not in (2, 3):
            raise ActionError(f"actions have shape {ids.shape}; (T, D) or (B, T, D) needed")
        sequences = ids.reshape(-1, ids.shape[-2] * ids.shape[-1])
        return [[int(i) for i in sequence] for sequence in sequences]

    def decode_token_ids_to_actions(self, ids: ArrayLike) -> NDArray[np.float64]:
        """OpenVLA's name for `decode`.

        OpenVLA scales actions outside its tokenizer: for the same split of work use bounds of -1 and +1.
        """
        return self.decode(ids)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `action_tokenizer.json` into a folder, made if need be."""
        content = {"bins": self.bins, "low": self.low.tolist(), "high": self.high.tolist()}
        path = Path(folder) / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomic(path, json.dumps(content, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, dir_or_repo: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> ActionTokenizer:
        """Read what `save_pretrained` wrote, from a folder or a Hub repository.

        Args:
            dir_or_repo: a folder, or the id of a Hub repository (needs `huggingface_hub`).
            hub: `revision`, `subfolder` and the like, as in transformers.

        Raises:
            ActionError: the file holds something else.
            FileNotFoundError: there is no such file.
        """
        path = resolve_files(dir_or_repo, [FILE_NAME], **hub)[FILE_NAME]
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            low, high, bins = content["low"], content["high"], content["bins"]
        except (ValueError, KeyError, TypeError) as error:
            raise ActionError(f"{path}: 'low', 'high' and 'bins' needed: {error!r}") from error
        return cls(low, high, bins=bins)

    def __repr__(self) -> str:
        return f"ActionTokenizer(low={self.low.tolist()}, high={self.high.tolist()}, bins={self.bins})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ActionTokenizer):
            return NotImplemented
        return (
            self.bins == other.bins
            and np.array_equal(self.low, other.low)
            and np.array_equal(self.high, other.high)
        )

    __hash__ = None  # type: ignore[assignment]  # mutable arrays inside

    def _check_width(self, array: NDArray, what: str) -> NDArray:
        if array.ndim == 0 or array.shape[-1] != self.dimensions:
            raise ActionError(f"{what} have shape {array.shape}; the last axis must be {self.dimensions}")
        if not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
            raise ActionError(f"{what} are {array.dtype}; numbers are needed")
        return array

    def _unflatten(self, sequences: ArrayLike, time_horizon: int) -> list[NDArray]:
        rows: Sequence[ArrayLike] = list(sequences)  # type: ignore[arg-type]
        length = time_horizon * self.dimensions
        for number, row in enumerate(rows):
            if np.shape(row) != (length,):
                raise ActionError(
                    f"sequence {number} has shape {np.shape(row)}; "
                    f"{time_horizon} actions of {self.dimensions} ids, ({length},), needed"
                )
        return [np.asarray(row).reshape(time_horizon, self.dimensions) for row in rows]


def _bounds(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.array(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ActionError(f"{name} has shape {array.shape}; (D,) with D of at least 1 needed")
    if not np.isfinite(array).all():
        raise ActionError(f"{name} is {array.tolist()}; every bound must be finite")
    return array


def _check_finite(array: NDArray[np.float64]) -> None:
    bad = ~np.isfinite(array)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ActionError(f"action value at index {where} is {array[where]}; finite numbers needed")
