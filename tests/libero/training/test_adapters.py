import sys

import peft
import pytest
import torch
from safetensors.torch import load_file

from worldvla_libero.training.adapters import LAYERS, lora_config, merged, save_adapter, with_adapters
from worldvla_model import WorldVLAForConditionalGeneration
from worldvla_model.cost import adapter_parameters

IDS = torch.tensor([[0, 16_400, 8_197, 8_805, 8_805, 5, 6, 8_803, 7, 8, 8_803, 8_196, 8_710, 10_004, 10_010]])


def load(published, dtype=torch.float32):
    return WorldVLAForConditionalGeneration.from_pretrained(published.checkpoint, dtype=dtype)


def adapted(published, dtype=torch.float32, *, checkpointing=False):
    """Adapters that add something: a new one's second matrix is zero."""
    model = load(published, dtype)
    if checkpointing:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        getattr(model, next(name for name in names if hasattr(model, name)))()
    torch.manual_seed(1)
    model = with_adapters(model, lora_config(rank=4, alpha=8))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    return model


def test_new_adapters_change_nothing_and_are_all_that_is_trained(published):
    model = with_adapters(load(published), lora_config(rank=4, alpha=8))
    assert torch.equal(model(input_ids=IDS).logits, load(published)(input_ids=IDS).logits)
    names = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(names) == 2 * len(LAYERS) * model.config.num_hidden_layers
    assert all("lora_" in name for name in names)
    assert model.get_nb_trainable_parameters()[0] == adapter_parameters(model.config, rank=4)


def test_adapters_are_fp32_beside_weights_in_bf16(published):
    model = adapted(published, torch.bfloat16)
    types = {"lora_" in name: set() for name, _ in model.named_parameters()}
    for name, weight in model.named_parameters():
        types["lora_" in name].add(weight.dtype)
    assert types == {True: {torch.float32}, False: {torch.bfloat16}}


def test_gradients_reach_adapters_under_gradient_checkpointing(published):
    """Although nothing before them is trained."""
    found = []
    for checkpointing in (False, True):
        model = adapted(published, checkpointing=checkpointing).train()
        model(input_ids=IDS, labels=IDS, skip_logits=True).loss.backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert len(found[0]) == 2 * len(LAYERS) * model.config.num_hidden_layers
    assert found[0].keys() == found[1].keys()
    assert all(value.any() and torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_merged_model_gives_what_its_parts_give(published, tmp_path):
    model = adapted(published).eval()
    wanted = model(input_ids=IDS).logits
    save_adapter(model, tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    again = peft.PeftModel.from_pretrained(load(published), tmp_path / "adapter")
    assert torch.equal(again(input_ids=IDS).logits, wanted)
    whole = merged(model, torch.float32)
    assert type(whole) is WorldVLAForConditionalGeneration
    torch.testing.assert_close(whole(input_ids=IDS).logits, wanted, rtol=1e-5, atol=1e-5)
    base = load(published).state_dict()
    changed = {name for name, value in whole.state_dict().items() if not torch.equal(value, base[name])}
    assert changed == {name for name in base if name.split(".")[-2] in LAYERS}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_weights_are_rounded_once(published, tmp_path, dtype):
    model = adapted(published, torch.bfloat16)
    save_adapter(model, tmp_path)
    parts = load_file(tmp_path / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    narrow, wide = (parts[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
    wanted = load(published).get_submodule(name).weight + 8 / 4 * (wide @ narrow)
    weight = merged(model, dtype).get_submodule(name).weight
    assert weight.dtype == dtype
    assert torch.equal(weight, wanted.to(dtype))


def test_without_peft_the_remedy_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"adapters need peft; remedy: pip install 'worldvla-libero\[lora\]'"):
        lora_config(rank=4, alpha=8)
