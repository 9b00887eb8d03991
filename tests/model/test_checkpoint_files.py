import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from worldvla_model import WorldVLA, WorldVLAForConditionalGeneration
from worldvla_model import published as layout
from worldvla_model.checkpoint_files import replaced_checkpoint, supersede

# What an older checkpoint may have left in a folder, by the programs that write it:
#   transformers            model.safetensors; model-00001-of-00003.safetensors with model.safetensors.index.json
#   transformers < 4.35     pytorch_model.bin; pytorch_model-00001-of-00002.bin with pytorch_model.bin.index.json
#   with variant="fp16"     model.fp16.safetensors; model.fp16-00001-of-00002.safetensors with
#                           model.safetensors.index.fp16.json
#   PEFT                    adapter_config.json with adapter_model.safetensors or adapter_model.bin
#   distributed_checkpoint  shard-00001-model-00001-of-00001.safetensors, which transformers reads before others
SINGLE = ["model.safetensors"]
SHARDED = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
PICKLED = ["pytorch_model.bin"]
PICKLED_SHARDS = ["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"]
VARIANT = ["model.fp16.safetensors"]
VARIANT_SHARDS = ["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"]
DISTRIBUTED = ["shard-00001-model-00001-of-00001.safetensors"]
OTHERS = ["README.md", "config.json", "training_args.bin", "optimizer.bin", "tokenizer.json", "model.onnx"]
FULL = [*SINGLE, *SHARDED, *PICKLED, *PICKLED_SHARDS, *DISTRIBUTED]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, files):
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).write_text("old")


@pytest.mark.parametrize(
    ("written", "kept"),
    [
        (SINGLE, VARIANT + VARIANT_SHARDS),
        (SHARDED, VARIANT + VARIANT_SHARDS),
        (PICKLED, VARIANT + VARIANT_SHARDS),
        (VARIANT, FULL),
        (VARIANT_SHARDS, FULL),
        (ADAPTER[:2], FULL + VARIANT + VARIANT_SHARDS),
        (["config.json"], FULL + VARIANT + VARIANT_SHARDS + ADAPTER),
    ],
    ids=["single", "shards", "pickle", "variant", "variant shards", "adapter", "no weights"],
)
def test_nothing_of_an_older_checkpoint_stays(tmp_path, written, kept):
    fill(tmp_path, FULL + VARIANT + VARIANT_SHARDS + ADAPTER + OTHERS)
    with replaced_checkpoint(tmp_path) as stage:
        for name in written:
            (stage / name).write_text("new")
    assert names(tmp_path) == sorted({*written, *kept, *OTHERS})
    assert {name for name in names(tmp_path) if (tmp_path / name).read_text() == "new"} == set(written)


def test_old_and_new_shards_can_never_be_read_together(tmp_path):
    """The index goes before any shard is moved, and comes after all of them."""
    fill(tmp_path, SHARDED)
    supersede(tmp_path, SHARDED)
    assert names(tmp_path) == sorted(SHARDED[:2])


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_leaves_what_was_there(tmp_path, existing):
    folder = tmp_path / "model"
    if existing:
        fill(folder, SHARDED)

    def write_half():
        with replaced_checkpoint(folder) as stage:
            (stage / SINGLE[0]).write_text("half")
            raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        write_half()
    assert (names(folder) == sorted(SHARDED)) if existing else not folder.exists()


def test_a_file_is_no_folder(small, tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(NotADirectoryError, match="model is a file; a checkpoint needs a folder"):
        small.save_pretrained(tmp_path / "model")


def old_checkpoint(kind, folder, model):
    """What stands in the folder before: weights of another model, in each of the forms."""
    if kind == "pickle":
        model.config.save_pretrained(folder)
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    elif kind == "bare shards":  # an index alone, as when shards were cleaned by hand
        model.save_pretrained(folder, max_shard_size="1MB")
        for shard in folder.glob("model-*"):
            shard.unlink()
    else:
        model.save_pretrained(folder, max_shard_size="1MB" if kind == "shards" else "1GB")


def changed(model, by):
    other = WorldVLAForConditionalGeneration(model.config).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.lm_head.weight.add_(by)
    return other


@pytest.mark.parametrize("before", ["single", "shards", "pickle", "bare shards"])
@pytest.mark.parametrize("size", ["1MB", "1GB"])
def test_saving_over_a_checkpoint(small, tmp_path, before, size):
    new = changed(small, 1)
    old_checkpoint(before, tmp_path, small)
    new.save_pretrained(tmp_path, max_shard_size=size)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"<s>": 0}}}))
    layout.to_published(tmp_path, tmp_path / "published")
    for folder in (tmp_path, tmp_path / "published"):
        read = WorldVLAForConditionalGeneration.from_pretrained(folder)
        assert torch.equal(read.lm_head.weight, new.lm_head.weight)
    with pytest.raises(OSError, match=r"no file named model\.fp16\.safetensors"):
        WorldVLAForConditionalGeneration.from_pretrained(tmp_path, variant="fp16")
    found = {}
    for file in sorted(tmp_path.glob("*.safetensors")):  # as those read who take whatever is there
        found |= load_file(file)
    assert found.keys() == new.state_dict().keys()
    assert torch.equal(found["lm_head.weight"], new.lm_head.weight)
    assert not list(tmp_path.glob("*.bin"))


def test_an_agent_saved_over_shards(published, tmp_path):
    folder = tmp_path / "ours"
    shutil.copytree(published.checkpoint, folder)
    agent = WorldVLA.from_pretrained(folder, published.tokenizer, image_size=128, device="cpu")
    (folder / "adapter_config.json").write_text("{}")  # of an earlier save; where peft is there, it would be read
    with torch.no_grad():
        agent.model.lm_head.weight.add_(1)
    agent.save_pretrained(folder)
    assert not {"adapter_config.json", "model.safetensors.index.json"} & set(names(folder))
    assert [path.name for path in folder.glob("*.safetensors")] == SINGLE
    again = WorldVLA.from_pretrained(folder, device="cpu")
    assert torch.equal(again.model.lm_head.weight, agent.model.lm_head.weight)
    assert again.fingerprint == agent.fingerprint


def test_one_file_goes_before_shards_as_in_transformers(published, tmp_path):
    """Folders with both, which others left: converting must not take other weights than loading does."""
    folder = tmp_path / "both"
    shutil.copytree(published.checkpoint, folder)
    tensors = {}
    for shard in sorted(folder.glob("model-*.safetensors")):
        tensors |= load_file(shard)
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    layout.to_ours(folder, tmp_path / "ours")
    assert not (tmp_path / "ours" / "model.safetensors.index.json").exists()
    loaded, converted = (WorldVLAForConditionalGeneration.from_pretrained(p) for p in (folder, tmp_path / "ours"))
    assert torch.equal(loaded.lm_head.weight, converted.lm_head.weight)
    assert torch.equal(loaded.lm_head.weight, tensors["lm_head.weight"])
