"""Configuration of the WorldVLA model."""

from __future__ import annotations

import json
import os
from typing import Any, Literal, get_args

from transformers import ChameleonConfig, PreTrainedConfig
from transformers.activations import ACT2FN

from worldvla_model.configuration_published import check_family, config_from_published, is_published
from worldvla_model.loss import LossRule
from worldvla_model.masks import STRATEGIES

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_LARGEST = 2**31 - 1
_NOT_NEGATIVE = ("initializer_range", "rms_norm_eps", "attention_dropout", "dropout", "alpha", "z_loss_weight")
_SWITCHES = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_cache")
_IDS = ("boi_token_id", "eoi_token_id", "boa_token_id", "eoa_token_id")


class ConfigurationError(ValueError):
    """A configuration that no model can be made of."""


class WorldVLAConfig(PreTrainedConfig):
    """Sizes and settings of a WorldVLA model; the defaults are those of the published 7B checkpoints.

    A published `config.json` (`model_type: chameleon`) is understood as well: it is translated when read.

    Attributes:
        vocab_size: rows of the shared vocabulary of text, image and action ids.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated MLP.
        num_hidden_layers: number of decoder layers.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; fewer than query heads for grouped queries.
        hidden_act: activation of the MLP.
        max_position_embeddings: longest sequence.
        initializer_range: standard deviation of fresh weights.
        rms_norm_eps: epsilon of the RMS norms.
        rope_parameters: rotary embedding, as in transformers.
        attention_bias: biases in the attention projections.
        mlp_bias: biases in the MLP.
        attention_dropout: dropout of attention weights.
        dropout: dropout of what attention and MLP add to the residual stream.
        tie_word_embeddings: one matrix for embedding and head.
        use_cache: return keys and values for decoding.
        qk_norm: `shared`: one row of query and key norm weights for all heads, (1, head_dim), as in published
            files; `per_head`: one row a head, as in transformers' Chameleon.
        attention: name of the mask strategy, a function of `worldvla_model.masks`.
        loss: rule of the training loss, `published` or `paper` (see `worldvla_model.loss.means`).
        alpha: weight of image tokens (published) or of world samples (paper) in the loss.
        z_loss_weight: weight of the mean squared log-partition function in the loss.
        boi_token_id: begin of image.
        eoi_token_id: end of image.
        boa_token_id: begin of action.
        eoa_token_id: end of action.
        bos_token_id: begin of sequence.
        pad_token_id: padding.
        eos_token_id: what ends a generation: the end of turn, since no `</s>` is ever written.

    Raises:
        ConfigurationError: a value of another type, or out of its range; the message says which is allowed.

    Source: published `config.json`; paper §3.2, §4.1.
    """

    model_type = "worldvla"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 - transformers adds to it

    vocab_size: int = 65_536
    hidden_size: int = 4_096
    intermediate_size: int = 11_008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 4_096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    rope_parameters: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    dropout: float = 0.0
    tie_word_embeddings: bool = False
    use_cache: bool = True
    qk_norm: Literal["shared", "per_head"] = "shared"
    attention: str = "action_isolated"
    loss: LossRule = "published"
    alpha: float = 0.04
    z_loss_weight: float = 1e-5
    boi_token_id: int = 8_197
    eoi_token_id: int = 8_196
    boa_token_id: int = 10_004
    eoa_token_id: int = 15_004
    bos_token_id: int | None = 0
    pad_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 8_710

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self._check_values()
        # transformers' Chameleon attention reads this; its norms are replaced by ours (`qk_norm`).
        self.model_parallel_size = 1
        super().__post_init__(**kwargs)

    def _check_values(self) -> None:
        """Before transformers computes with them."""
        for name in _SIZES:
            _require(
                name, value := getattr(self, name), _is_whole(value, 1), f"whole numbers from 1 to {_LARGEST}"
            )
        for name in _NOT_NEGATIVE:
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            _require(name, value, number and 0 <= value < float("inf"), "numbers from 0")
        for name in _SWITCHES:
            _require(name, value := getattr(self, name), isinstance(value, bool), "true and false")
        for name in _IDS:
            _require(name, value := getattr(self, name), _is_whole(value, 0), "ids, whole numbers from 0")
        for name in ("hidden_size", "num_attention_heads"):
            divisor = "num_attention_heads" if name == "hidden_size" else "num_key_value_heads"
            value, by = getattr(self, name), getattr(self, divisor)
            if value % by:
                raise ConfigurationError(f"{name} is {value}; a multiple of {divisor}, {by}, is needed")
        choices = {
            "hidden_act": (*ACT2FN,),
            "qk_norm": ("shared", "per_head"),
            "loss": get_args(LossRule),
            "attention": (*STRATEGIES,),
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            known = isinstance(value, str) and value in allowed
            _require(name, value, known, ", ".join(map(repr, allowed)))
        _require(
            "rope_parameters",
            self.rope_parameters,
            isinstance(self.rope_parameters, dict | None),
            "an object of transformers' rope parameters, or null",
        )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make a configuration of the content of a `config.json`, as transformers does.

        Raises:
            ConfigurationError: a value of another type, or out of its range.
        """
        try:
            return super().from_dict(config_dict, **kwargs)
        except ConfigurationError:
            raise
        except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
            # Fields of its own transformers uses without a look at their types.
            raise ConfigurationError(
                f"transformers can make no configuration of it ({type(error).__name__}: {error})"
            ) from error

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a `config.json`, ours or a published one, as transformers does.

        Raises:
            CheckpointError: it is another model's; transformers alone would only warn and go on.
            ConfigurationError: it is no JSON, or no object.
        """
        try:
            config, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (OSError, AttributeError, TypeError, ValueError) as error:
            no_json = isinstance(error.__context__, json.JSONDecodeError | UnicodeDecodeError)
            if isinstance(error, OSError) and not no_json:
                raise  # there is none
            raise ConfigurationError(
                f"config.json of {pretrained_model_name_or_path} is no JSON object ({error})"
            ) from error
        if not isinstance(config, dict):
            kind = type(config).__name__
            raise ConfigurationError(f"config.json of {pretrained_model_name_or_path} is no JSON object ({kind})")
        check_family(config, str(pretrained_model_name_or_path))
        return (config_from_published(config) if is_published(config) else config), unused

    # The names by which `worldvla_model.masks` asks for them.
    @property
    def boi(self) -> int:
        """Begin of image."""
        return self.boi_token_id

    @property
    def eoi(self) -> int:
        """End of image."""
        return self.eoi_token_id

    @property
    def boa(self) -> int:
        """Begin of action."""
        return self.boa_token_id

    @property
    def eoa(self) -> int:
        """End of action."""
        return self.eoa_token_id


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _LARGEST


def _require(name: str, value: Any, fits: bool, allowed: str) -> None:
    if not fits:
        raise ConfigurationError(f"{name} is {value!r}; allowed: {allowed}")


class PublishedOrChameleonConfig(ChameleonConfig):
    """What `AutoConfig` makes of a file that says `model_type: chameleon`.

    A published WorldVLA file becomes a `WorldVLAConfig`; any other stays what transformers makes of it.
    """

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read a configuration as the class it belongs to."""
        if is_published(config_dict):
            return WorldVLAConfig.from_dict(config_from_published(config_dict), **kwargs)
        return ChameleonConfig.from_dict(config_dict, **kwargs)


# transformers finds the model of a configuration made by hand by the name of its class.
PublishedOrChameleonConfig.__name__ = ChameleonConfig.__name__

__all__ = ["ConfigurationError", "PublishedOrChameleonConfig", "WorldVLAConfig"]
