import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, LlamaConfig

from worldvla_model import CheckpointError, WorldVLA, WorldVLAConfig, WorldVLAForConditionalGeneration
from worldvla_model import published as layout
from worldvla_model.configuration_published import PublishedFormatError


def tensors(folder):
    content = {}
    for shard in sorted(folder.glob("*.safetensors")):
        content.update(load_file(shard))
    return content


def config(folder):
    return json.loads((folder / "config.json").read_text())


def test_there_and_back_is_bit_equal(published, tmp_path):
    layout.to_ours(published.checkpoint, tmp_path / "ours")
    shutil.copy(published.tokenizer / "tokenizer.json", tmp_path / "ours")
    layout.to_published(tmp_path / "ours", tmp_path / "back")
    original, back = tensors(published.checkpoint), tensors(tmp_path / "back")
    assert original.keys() == back.keys()
    for name, tensor in original.items():
        assert tensor.dtype == back[name].dtype
        assert torch.equal(tensor.view(torch.int16), back[name].view(torch.int16)), name
    before, after = config(published.checkpoint), config(tmp_path / "back")
    for field in ("transformers_version", "vq_config"):  # who wrote it, and the VQ-GAN, which has its own file
        before.pop(field)
        after.pop(field, None)
    assert after == before
    index = "model.safetensors.index.json"
    assert json.loads((tmp_path / "back" / index).read_text()) == json.loads(
        (published.checkpoint / index).read_text()
    )


def test_ours_is_what_transformers_would_save(published, tmp_path):
    layout.to_ours(published.checkpoint, tmp_path / "ours")
    converted = WorldVLAForConditionalGeneration.from_pretrained(tmp_path / "ours")
    direct = WorldVLAForConditionalGeneration.from_pretrained(published.checkpoint)
    assert converted.config.to_diff_dict() == direct.config.to_diff_dict()
    assert converted.generation_config.to_diff_dict() == direct.generation_config.to_diff_dict()
    assert all(torch.equal(a, b) for a, b in zip(converted.parameters(), direct.parameters(), strict=True))


def test_one_shard_in_memory_at_a_time(published, tmp_path, monkeypatch):
    """Each tensor is read once, and every shard is written before the next is read."""
    events = []

    class Recorded:
        def __init__(self, path, framework):
            self.path, self.file = path, safe_open(path, framework)

        def __enter__(self):
            self.open = self.file.__enter__()
            return self

        def __exit__(self, *details):
            return self.file.__exit__(*details)

        def __getattr__(self, name):
            return getattr(self.open, name)

        def get_tensor(self, name):
            events.append(("read", self.path.name))
            return self.open.get_tensor(name)

    def recorded_save(content, path, metadata):
        events.append(("write", path.name))
        save_file(content, path, metadata)

    monkeypatch.setattr(layout, "safe_open", Recorded)
    monkeypatch.setattr(layout, "save_file", recorded_save)
    layout.to_ours(published.checkpoint, tmp_path / "ours")
    order = [event for n, event in enumerate(events) if n == 0 or events[n - 1] != event]
    shards = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert order == [(what, shard) for shard in shards for what in ("read", "write")]
    assert sum(what == "read" for what, _ in events) == len(tensors(published.checkpoint))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("lm_head.weight"), "1 missing: lm_head.weight"),
        (lambda t: t.update({"vqmodel.x": torch.zeros(1)}), r"1 unexpected: vqmodel\.x"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.zeros(4, 16)}),
            r"1 of another shape: model\.layers\.0\.self_attn\.q_norm\.weight \(4, 16\), \(1, 16\) needed",
        ),
    ],
)
def test_checkpoints_that_do_not_fit(published, tmp_path, damage, message):
    content = tensors(published.checkpoint)
    damage(content)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(published.checkpoint / "config.json", source)
    save_file(content, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        layout.to_ours(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]  # nothing half-written stays


def test_a_truncated_shard_leaves_nothing_behind(published, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(published.checkpoint, source)
    shard = source / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:5_000])
    with pytest.raises(PublishedFormatError, match=r"model-00003-of-00003\.safetensors cannot be read"):
        layout.to_ours(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", r"config\.json holds list; an object needed"),
        ("config.json", "{", r"config\.json is no JSON file"),
        ("model.safetensors.index.json", "{}", "no weight_map of tensors and files beside it"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../b.safetensors"}}', "no weight_map of tensors"),
        ("model.safetensors.index.json", '{"weight_map": {"a": 5}}', "no weight_map of tensors"),
    ],
)
def test_files_that_are_not_what_their_names_say(published, tmp_path, file, content, message):
    source = tmp_path / "source"
    shutil.copytree(published.checkpoint, source)
    (source / file).write_text(content)
    with pytest.raises(PublishedFormatError, match=message):
        layout.to_ours(source, tmp_path / "ours")


def test_existing_targets_are_kept(published, tmp_path):
    with pytest.raises(FileExistsError, match="needs a folder of its own"):
        layout.to_ours(published.checkpoint, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("swin_norm", True, "swin_norm = True; allowed: False"),
        ("model_parallel_size", 4, "model_parallel_size = 4; allowed: 1"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "rope_scaling"),
        (
            "architectures",
            ["ChameleonForConditionalGeneration"],
            "'ChameleonXLLMXForConditionalGeneration_ck' needed",
        ),
        ("model_type", "llama", "'chameleon'"),
    ],
)
def test_configurations_that_are_not_ours(published, tmp_path, field, value, message):
    (tmp_path / "config.json").write_text(json.dumps({**config(published.checkpoint), field: value}))
    with pytest.raises(PublishedFormatError, match=message):
        layout.to_ours(tmp_path, tmp_path / "ours")


def test_missing_files(published, tmp_path):
    with pytest.raises(PublishedFormatError, match=r"config\.json is missing"):
        layout.to_ours(tmp_path, tmp_path / "ours")
    shutil.copy(published.checkpoint / "config.json", tmp_path)
    with pytest.raises(PublishedFormatError, match="weights in safetensors needed"):
        layout.to_ours(tmp_path, tmp_path / "ours")
    layout.to_ours(published.checkpoint, tmp_path / "ours")
    with pytest.raises(PublishedFormatError, match=r"no tokenizer\.json"):
        layout.to_published(tmp_path / "ours", tmp_path / "back")


BASE = "ChameleonXLLMXForConditionalGeneration"


# Families whose files look like ours, and what tells them apart:
#   RynnVLA-002         architectures …_ck_action_head; action_dim and time_horizon, whatever the architecture says
#   its descendants     architectures …_ck_action_head_…, action_head_type
#   RynnVLA-001         chameleon, architectures RynnVLAXLLMXForActionPrediction, action_chunk_size
#   Lumina-mGPT's       chameleon, architectures …AnyRes, a head of several resolutions
#   Chameleon itself    chameleon, architectures ChameleonForConditionalGeneration, or none
#   anything else       another model_type, or none
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": [f"{BASE}_ck_action_head"]},
            r"RynnVLA-002, which has an action_head .*_action_head'\]",
        ),
        (
            {"architectures": [f"{BASE}_ck", f"{BASE}_ck_action_head"]},
            r"another model, such as RynnVLA-002, .*action_head'\]",
        ),
        ({"action_dim": 7, "time_horizon": 5}, r"such as RynnVLA-002.* with action_dim 7, time_horizon 5"),
        ({"action_head_type": "legacy"}, "with action_head_type 'legacy'"),
        ({"architectures": [f"{BASE}AnyRes"]}, f"architectures .'{BASE}AnyRes'"),
        (
            {"architectures": ["RynnVLAXLLMXForActionPrediction"]},
            "another family: .*'chameleon'.*RynnVLAX",
        ),
        ({"architectures": ["ChameleonForConditionalGeneration"]}, "another family: model_type 'chameleon'"),
        ({"architectures": 7}, r"another family: model_type 'chameleon', architectures \['7'\]"),
        ({"architectures": None}, r"another family: model_type 'chameleon', architectures \[\]"),
        ({"model_type": "llama"}, "another family: model_type 'llama'"),
        (
            {"model_type": "openvla", "architectures": ["OpenVLAForActionPrediction"]},
            "another family: .*'openvla'",
        ),
        ({"model_type": None}, "another family: model_type None"),
    ],
)
def test_other_families_are_refused_by_name(published, tmp_path, changes, message):
    source = tmp_path / "source"
    shutil.copytree(published.checkpoint, source)
    (source / "config.json").write_text(json.dumps({**config(source), **changes}))
    for load in (
        WorldVLAForConditionalGeneration.from_pretrained,
        WorldVLAConfig.from_pretrained,
        lambda folder: WorldVLA.from_pretrained(folder, published.tokenizer, image_size=128, device="cpu"),
    ):
        with pytest.raises(CheckpointError, match=rf"source is of .*{message}"):
            load(source)
    if "RynnVLA-002" in message or BASE in message:  # others are what transformers makes of them
        with pytest.raises(CheckpointError, match=message):
            AutoModel.from_pretrained(source)
    with pytest.raises(ValueError, match=r"of another model|'chameleon' and 'ChameleonXLLMX"):
        layout.to_ours(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_the_published_checkpoints_started_from_is_read(published, tmp_path):
    shutil.copytree(published.checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({**config(tmp_path), "architectures": [BASE]}))
    assert WorldVLAForConditionalGeneration.from_pretrained(tmp_path).config.qk_norm == "shared"


def test_a_config_saved_by_transformers_is_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="another family: model_type 'llama'"):
        WorldVLAConfig.from_pretrained(tmp_path)
