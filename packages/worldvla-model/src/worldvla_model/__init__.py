"""One autoregressive transformer that acts and imagines, on Hugging Face foundations.

After `import worldvla_model` transformers' Auto classes know the family, published checkpoints included.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    ChameleonConfig,
)

from worldvla_model import loss, masks, published
from worldvla_model.agent import WorldVLA
from worldvla_model.configuration_worldvla import (
    ConfigurationError,
    PublishedOrChameleonConfig,
    WorldVLAConfig,
)
from worldvla_model.decoding import DecodingError, Sampling
from worldvla_model.modeling_worldvla import (
    CheckpointError,
    SequenceLengthError,
    WorldVLAForConditionalGeneration,
    WorldVLAModel,
)
from worldvla_model.processing_worldvla import SettingsError, WorldVLAProcessor

AutoConfig.register("worldvla", WorldVLAConfig)
# Published checkpoints say `chameleon`, a name that belongs to transformers' own model.
AutoConfig.register(ChameleonConfig.model_type, PublishedOrChameleonConfig, exist_ok=True)
AutoModel.register(WorldVLAConfig, WorldVLAModel)
AutoModelForCausalLM.register(WorldVLAConfig, WorldVLAForConditionalGeneration)
AutoModelForImageTextToText.register(WorldVLAConfig, WorldVLAForConditionalGeneration)
AutoProcessor.register(WorldVLAConfig, WorldVLAProcessor)

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "DecodingError",
    "Sampling",
    "SequenceLengthError",
    "SettingsError",
    "WorldVLA",
    "WorldVLAConfig",
    "WorldVLAForConditionalGeneration",
    "WorldVLAModel",
    "WorldVLAProcessor",
    "loss",
    "masks",
    "published",
]
