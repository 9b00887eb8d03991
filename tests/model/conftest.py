"""The published checkpoint of the fixtures, loaded once."""

import pytest
import torch

from worldvla_model import WorldVLA, WorldVLAConfig, WorldVLAForConditionalGeneration


@pytest.fixture(scope="session")
def agent(published) -> WorldVLA:
    return WorldVLA.from_pretrained(
        published.checkpoint, published.tokenizer, image_size=128, dtype=torch.float32, device="cpu"
    )


@pytest.fixture(scope="session")
def model(agent) -> WorldVLAForConditionalGeneration:
    return agent.model


@pytest.fixture
def small_config() -> WorldVLAConfig:
    """A model that takes milliseconds: every id of the vocabulary, random weights."""
    return WorldVLAConfig(
        vocab_size=16_640,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )


@pytest.fixture
def small(small_config) -> WorldVLAForConditionalGeneration:
    torch.manual_seed(0)
    return WorldVLAForConditionalGeneration(small_config).eval()
