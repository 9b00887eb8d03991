import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from worldvla_model import WorldVLAConfig, WorldVLAForConditionalGeneration
from worldvla_model.cost import (
    HARDWARE,
    LAUNCH,
    TYPICAL_CPU,
    Hardware,
    body_parameters,
    chunk_cost,
    frame_cost,
    free_tokens,
    known_hardware,
    pass_cost,
)


def test_the_published_model():
    config = WorldVLAConfig()
    # 32 layers of 4 · 4096² attention and 3 · 4096 · 11008 MLP.
    assert body_parameters(config) == 32 * (4 * 4096**2 + 3 * 4096 * 11_008)
    one = pass_cost(config, new=1, cached=569)
    assert one.bytes == pytest.approx(13.5e9, rel=0.03)  # RESEARCH: 13.5 GB of weights a pass
    assert one.seconds(HARDWARE["H100"]) == pytest.approx(4.1e-3, rel=0.05)


def test_parameters_are_those_of_the_model(small_config):
    model = WorldVLAForConditionalGeneration(small_config)
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2 and min(p.shape) > 1)
    norms = sum(p.numel() for name, p in model.model.layers.named_parameters() if "_norm" in name and p.ndim == 2)
    assert body_parameters(small_config) in (matrices, matrices - norms)


def test_a_chunk_costs_seven_or_eight_passes_whatever_its_length():
    config = WorldVLAConfig()
    for actions in (1, 5, 10, 25):
        assert chunk_cost(config, prompt=569, actions=actions).passes == 7
        assert chunk_cost(config, prompt=569, actions=actions, exact=True).passes == 8
        assert chunk_cost(config, prompt=569, actions=actions, parallel=False).passes == 9 * actions + 1
    slow, fast = (chunk_cost(config, prompt=569, actions=10, parallel=p) for p in (False, True))
    # The published code computes the logits of the whole prompt.
    assert slow.steps[0] == pass_cost(config, new=569, logits=569)
    assert slow.steps[1] == pass_cost(config, new=1, cached=569)
    assert slow.seconds(HARDWARE["H100"]) > 8 * fast.seconds(HARDWARE["H100"])


def test_the_last_layer_computes_keys_and_values_only_of_tokens_without_logits(small_config):
    one, width = WorldVLAConfig(num_hidden_layers=1), 4096
    whole, last = (pass_cost(one, new=100, logits=logits, among=1) for logits in (100, 1))
    per_token = 2 * (2 * width**2 + 3 * width * 11_008) + 4 * width * 100  # query, output, MLP; attention
    assert whole.flops - last.flops == 99 * (per_token + 2 * width)
    # As `torch` counts: norms and rotations are left out by both, and grouped keys are shared.
    model = WorldVLAForConditionalGeneration(small_config).eval()
    ids = torch.arange(1, 41)[None]
    mask = torch.zeros(1, 1, 40, 40)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model(ids, attention_mask=mask, states_to_keep=torch.tensor([[39]]))
    counted = pass_cost(small_config, new=40, logits=1, among=1).flops - 2 * small_config.hidden_size
    assert counted == counter.get_total_flops()


def test_a_frame_costs_a_pass_a_code_and_less_with_a_draft():
    config = WorldVLAConfig()
    frame = {"prompt": 320, "rows": 16, "columns": 16}
    assert frame_cost(config, **frame).passes == 256
    assert frame_cost(config, **frame, window=16, held=9).passes == 26
    assert frame_cost(config, **frame, window=16, held=9).bytes < frame_cost(config, **frame).bytes / 8


def test_the_slower_of_two_bounds_a_pass():
    config = WorldVLAConfig()
    one = pass_cost(config, new=1)
    assert one.seconds(Hardware(1e30, 1e9)) == one.bytes / 1e9
    assert one.seconds(Hardware(1e9, 1e30)) == one.flops / 1e9
    many = pass_cost(config, new=1, batch=16)
    assert many.flops == 16 * one.flops
    assert many.bytes < 1.1 * one.bytes  # weights are read once


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"), ("cpu", None)],
)
def test_devices_are_known_by_name(name, known):
    assert known_hardware(name) == (HARDWARE[known] if known else None)


def test_more_tokens_than_the_free_ones_make_a_pass_twice_as_slow(small_config):
    for config in (WorldVLAConfig(), small_config):
        free = free_tokens(config, TYPICAL_CPU, bytes_per_value=4)
        multiplied = 2 * body_parameters(config) * free / TYPICAL_CPU.flops
        read = 4 * body_parameters(config) / TYPICAL_CPU.bandwidth
        assert multiplied == pytest.approx(read + config.num_hidden_layers * LAUNCH)
    assert free_tokens(small_config, TYPICAL_CPU) > free_tokens(WorldVLAConfig(), TYPICAL_CPU)
    assert free_tokens(WorldVLAConfig(), HARDWARE["H100"]) > free_tokens(WorldVLAConfig(), TYPICAL_CPU)
