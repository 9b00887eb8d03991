"""Robot actions ↔ ids: each dimension cut into equal bins between its bounds.

NumPy only, so that other vision-language-action projects can import it alone.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray

from worldvla_tokenizers.files import HubOptions, resolve_files, write_text_atomic
from worldvla_tokenizers.signatures import read_json
from worldvla_tokenizers.vocabulary import Vocabulary

FILE_NAME = "action_tokenizer.json"

LIBERO_LOW = (-0.9375, -0.9375, -0.9375, -0.32571429, -0.375, -0.375, -1.0)
LIBERO_HIGH = (0.9375, 0.9375, 0.9375, 0.375, 0.375, 0.375, 1.0)

# What `fit` says of data whose bounds need a word. Spread is the range of most values of a dimension.
_FAR = 0.25  # of the spread beyond a quantile bound: where a command that recurs is more than the end of a tail
_ENOUGH_BINS = 16  # for the spread, where bounds are widened to reach a recurring command
_OUTLIERS = 64  # times as far apart as the middle 90 % are minimum and maximum then; it gets 4 of 255 bins
_NEARLY_ONE_VALUE = 0.01  # of a dimension's magnitude: a spread below it is that of one value
_NAMED = 16  # dimensions in a warning

_EPSILON = 1e-8  # part of the published formula; it also keeps a constant dimension finite


class ActionError(ValueError):
    """An action, a set of bounds or a shape that cannot be binned."""


class BoundsWarning(UserWarning):
    """Fitted bounds out of whose reach recorded actions lie, or that had to be wider than was asked for."""


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
                so that outliers are clipped rather than widening every bin (OpenVLA uses 0.01). Minimum and
                maximum hold all the same for a dimension that is nearly always one value (a gripper that seldom
                moves), and bounds are widened to commands that recur far beyond the quantiles.
            bins: bins per dimension.

        Warns:
            BoundsWarning: bounds are wider than the quantiles; recorded values lie beyond the bounds, to which
                they are clipped; or, of minimum and maximum, so few outliers set them that nearly all values
                share a few bins. Dimensions and values are named.

        Raises:
            ActionError: no action, a value that is not finite, or a quantile out of range.
        """
        array = np.asarray(actions, dtype=np.float64)
        if array.ndim < 2 or array.size == 0:
            raise ActionError(f"actions to fit have shape {array.shape}; (*, D) with at least one action needed")
        _check_finite(array)
        array = array.reshape(-1, array.shape[-1])
        if quantile is None:
            _warn_of_outliers(array)
            return cls(array.min(axis=0), array.max(axis=0), bins=bins)
        if not 0.0 < quantile < 0.5:
            raise ActionError(f"quantile is {quantile}; allowed: above 0 and below 0.5, or None")
        low, high = np.quantile(array, [quantile, 1.0 - quantile], axis=0)
        bounds = [_widened(*column, bins) for column in zip(array.T, low, high, strict=True)]
        fitted = cls(*zip(*bounds, strict=True), bins=bins)
        _warn_of_quantiles(array, low, high, fitted, quantile)
        return fitted

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
        content = read_json(path, ActionError)
        try:
            return cls(content["low"], content["high"], bins=content["bins"])
        except (ValueError, KeyError, TypeError) as error:
            raise ActionError(f"{path}: 'low', 'high' and 'bins' needed: {error!r}") from error

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


def _widened(values: NDArray[np.float64], low: float, high: float, bins: int) -> tuple[float, float]:
    """Quantile bounds of one dimension (N,), as wide as its commands need."""
    least, most, spread = float(values.min()), float(values.max()), high - low
    if spread <= _NEARLY_ONE_VALUE * max(abs(low), abs(high)):
        return least, most  # nearly always one value: what else it can be lies beyond any quantile
    beyond = values[(values < low - _FAR * spread) | (values > high + _FAR * spread)]
    found, counts = np.unique(beyond, return_counts=True)
    recurring = found[counts > 1]
    if recurring.size == 0:
        return low, high
    wide = min(low, float(recurring[0])), max(high, float(recurring[-1]))
    # So far away that reaching it would leave everything else a few bins, it is a fault that recurs.
    return wide if spread * (bins - 1) >= _ENOUGH_BINS * (wide[1] - wide[0]) else (low, high)


def _warn_of_quantiles(
    array: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    fitted: ActionTokenizer,
    quantile: float,
) -> None:
    widened, clipped = [], []
    half_a_bin = (fitted.high - fitted.low) / (fitted.bins - 1) / 2
    for d in range(fitted.dimensions):
        column, bounds = array[:, d], f"{fitted.low[d]:.6g} … {fitted.high[d]:.6g}"
        outside = int(((column < low[d]) | (column > high[d])).sum())
        if (fitted.low[d], fitted.high[d]) != (low[d], high[d]):
            widened.append(
                f"dimension {d}: {bounds} (quantiles {low[d]:.6g} … {high[d]:.6g}, with {outside:,} of "
                f"{len(column):,} values beyond)"
            )
        unreachable = (column < fitted.low[d] - half_a_bin[d]) | (column > fitted.high[d] + half_a_bin[d])
        if unreachable.any():
            clipped.append(
                f"dimension {d}: {int(unreachable.sum()):,} of {len(column):,}, in {column.min():.6g} … "
                f"{column.max():.6g}, to {bounds}"
            )
    if widened:
        _warn(
            f"quantile {quantile} would put recorded commands out of reach; bounds are wider there: ",
            widened,
            "",
        )
    if clipped:
        _warn(
            f"quantile {quantile} clips recorded values: ",
            clipped,
            "; remedy, if they are commands and no outliers: a smaller quantile, or None for minimum and maximum",
        )


def _warn_of_outliers(array: NDArray[np.float64]) -> None:
    least, most = array.min(axis=0), array.max(axis=0)
    low, high = np.quantile(array, [0.05, 0.95], axis=0)
    middle = high - low
    strange = (middle > _NEARLY_ONE_VALUE * np.maximum(abs(low), abs(high))) & (middle * _OUTLIERS < most - least)
    if strange.any():
        _warn(
            "minimum and maximum lie so far out that most values share a few bins: ",
            [
                f"dimension {d}: 90 % in {low[d]:.6g} … {high[d]:.6g}, all in {least[d]:.6g} … {most[d]:.6g}"
                for d in np.flatnonzero(strange)
            ],
            "; remedy: leave the outliers out of the data, or cut them with a quantile such as 0.01",
        )


def _warn(head: str, dimensions: Sequence[str], remedy: str) -> None:
    more = f"; and {len(dimensions) - _NAMED} more dimensions" if len(dimensions) > _NAMED else ""
    # The caller of `fit`, which calls the one that calls this.
    warnings.warn(head + "; ".join(dimensions[:_NAMED]) + more + remedy, BoundsWarning, stacklevel=4)


def _check_finite(array: NDArray[np.float64]) -> None:
    bad = ~np.isfinite(array)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ActionError(f"action value at index {where} is {array[where]}; finite numbers needed")
