"""The VQ-GAN: reference codes and pixels, checkpoints of both kinds, and what is refused."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import io
import json
import os
import pickle
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from worldvla_tokenizers import vqgan as module
from worldvla_tokenizers.vqgan import VQGAN, PixelError, VQGANConfig, VQGANError, nearest_codes

PUBLISHED = Path(__file__).parents[1] / "fixtures" / "published"
TOKENIZER = PUBLISHED / "tokenizer"
SMALL = VQGANConfig(ch=32, ch_mult=(1, 1, 1), z_channels=8, embed_dim=4, n_embed=32, num_res_blocks=1)
FOLDED = dataclasses.replace(SMALL, ch_mult=(1, 1), stem=4)


@cache
def published() -> VQGAN:
    return VQGAN.from_pretrained(TOKENIZER)


@cache
def small() -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(SMALL).eval()
    with torch.no_grad():  # entries spread over what the encoder answers, so that codes differ
        z = model.quant_conv(model.encoder(torch.rand(2, 3, 16, 16) * 2 - 1))
        model.quantize.embedding.weight.copy_(z.permute(0, 2, 3, 1).reshape(-1, 4))
    return model


def pixels_of(name: str) -> torch.Tensor:
    array = np.array(Image.open(PUBLISHED / "frames" / f"{name}.png").convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1)[None].float() / 255 * 2 - 1


def published_copy(folder: Path, **extra: object) -> Path:
    """The published pair of files, with `extra` entries beside the state dict."""
    (folder / "vqgan.yaml").write_bytes((TOKENIZER / "vqgan.yaml").read_bytes())
    content = torch.load(TOKENIZER / "vqgan.ckpt", weights_only=True)
    torch.save(content | extra, folder / "vqgan.ckpt")
    return folder


# --- reference answers ------------------------------------------------------------------------------------------


FRAMES = sorted(json.loads((PUBLISHED / "image_codes.json").read_text()))
EVERYDAY = {"libero_goal_0_0", "libero_goal_8_8", "libero_object_2_9"}  # two of them with near ties; fp64 is slow


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow) for name in FRAMES]
)
def test_codes_of_real_frames_are_the_published_ones(published, name):
    """All of them in fp64. In fp32 all but near ties, which rounding decides and so processor and threads do."""
    exact, usual = fp64(), VQGAN.from_pretrained(TOKENIZER)
    codebook = exact.quantize.embedding.weight.detach()
    wanted, pixels = torch.tensor(published.json("image_codes")[name]), pixels_of(name)
    (exactly, z), (found, rounded) = encoded(exact, pixels), encoded(usual, pixels)
    assert torch.equal(exactly, wanted)
    assert ((rounded.double() - z).norm(dim=1) <= FP32 * z.norm(dim=1)).all()
    (nearest, second), (a, b) = (part.T for part in torch.cdist(z, codebook).topk(2, largest=False))
    # Moved by d, |z - a|² - |z - b|² changes by 2 d·(b - a), at most 2 |d| |a - b|.
    near_tie = second**2 - nearest**2 <= 2 * FP32 * z.norm(dim=1) * (codebook[a] - codebook[b]).norm(dim=1)
    assert torch.equal(found[~near_tie], wanted[~near_tie])
    assert torch.isin(found[near_tie], torch.cat([a[near_tie], b[near_tie]])).all()
    episode, number = name.rsplit("_", 1)
    assert ((episode, int(number)) in published.near_ties) == bool(near_tie.any())


@cache
def fp64() -> VQGAN:
    return VQGAN.from_pretrained(TOKENIZER, dtype=torch.float64)


FP32 = 1e-5  # relative error that fp32 leaves in the latents of this encoder, on any processor


def encoded(vqgan: VQGAN, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, 3, H, W) -> codes (N), and what they are the nearest entries of, (N, E): of one pass, slow in fp64."""
    kept = []
    hook = vqgan.quant_conv.register_forward_hook(lambda module, inputs, output: kept.append(output))
    codes = vqgan.encode(pixels).flatten()
    hook.remove()
    (z,) = kept
    return codes, z.permute(0, 2, 3, 1).flatten(0, 2)


def test_decoded_pixels_are_the_published_ones_within_a_level():
    codes = json.loads((PUBLISHED / "image_codes.json").read_text())["libero_goal_0_0"]
    pixels = published().decode(torch.tensor(codes).view(1, 16, 16)).clamp(-1, 1)
    levels = ((pixels + 1) / 2 * 255).to(torch.uint8)[0].permute(1, 2, 0).numpy().astype(int)
    expected = np.asarray(Image.open(PUBLISHED / "decoded_libero_goal_0_0.png").convert("RGB")).astype(int)
    assert abs(levels - expected).max() <= 1
    assert (levels != expected).mean() < 1e-3


def test_published_topology_is_the_default():
    config = VQGANConfig.from_yaml(TOKENIZER / "vqgan.yaml")
    assert dataclasses.replace(config, ch=128, z_channels=256, embed_dim=256) == VQGANConfig()
    assert config.factor == 16


# --- codes and pixels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 4), (12, 20)])
def test_any_size_that_is_a_multiple_of_the_factor(height, width):
    pixels = torch.rand(3, 3, height, width) * 2 - 1
    codes = small().encode(pixels)
    assert codes.dtype == torch.int64
    assert codes.shape == (3, height // 4, width // 4)
    decoded = small().decode(codes)
    assert decoded.shape == pixels.shape
    assert decoded.dtype == torch.float32
    assert not decoded.requires_grad


def test_chunks_do_not_change_the_codes():
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    codes = small().encode(pixels)
    assert len(codes.unique()) > 5
    for positions in (1, 5, 32, 1_000):
        assert torch.equal(small().encode(pixels, positions_per_chunk=positions), codes)


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 40),
    entries=st.integers(1, 20),
    chunk=st.integers(1, 50),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_nearest_code_is_that_of_a_slow_search(seed, n, entries, chunk, dtype):
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: every distance is exact, and ties are common.
    vectors = torch.randint(-3, 4, (n, 3), generator=generator).to(dtype)
    codebook = torch.randint(-3, 4, (entries, 3), generator=generator).to(dtype)
    distances = ((vectors.double()[:, None] - codebook.double()[None]) ** 2).sum(-1).numpy()
    assert nearest_codes(vectors, codebook, chunk).tolist() == distances.argmin(axis=1).tolist()


def test_distances_stay_in_fp32_under_autocast():
    vectors = torch.full((1, 1), 100.0)
    codebook = torch.tensor([[100.25], [100.0]])  # one bf16 step apart is 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert nearest_codes(vectors, codebook, 1).tolist() == [1]


def test_bf16_gives_codes_close_to_those_of_fp32():
    pixels = pixels_of("libero_goal_0_0")
    half = VQGAN.from_pretrained(TOKENIZER, dtype=torch.bfloat16)
    codes = half.encode(pixels)
    assert half.dtype == torch.bfloat16
    assert (codes == published().encode(pixels)).float().mean() > 0.5
    assert half.decode(codes).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_codes_on_the_gpu():
    pixels = torch.cat([pixels_of("libero_goal_0_0"), pixels_of("libero_goal_8_0")])
    with torch.backends.cudnn.flags(allow_tf32=False):
        model = VQGAN.from_pretrained(TOKENIZER, device="cuda")
        codes = model.encode(pixels)
        decoded = model.decode(codes)
    assert codes.device.type == "cuda"
    assert torch.equal(codes.cpu(), published().encode(pixels))
    assert torch.allclose(decoded.cpu(), published().decode(codes.cpu()), atol=1e-3)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\); \(B, 3, H, W\) needed"),
        (torch.zeros(1, 4, 8, 8), r"\(B, 3, H, W\) needed"),
        (torch.zeros(0, 3, 8, 8), r"shape \(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 3, 8, 10), "10 x 8 px; both must be multiples of 4"),
        (torch.full((1, 3, 8, 8), float("nan")), "NaN"),
        (torch.full((1, 3, 8, 8), float("inf")), "infinite"),
    ],
)
def test_bad_pixels(pixels, message):
    with pytest.raises(PixelError, match=message):
        small().encode(pixels)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.tensor([[[0, 32]]]), "from 0 to 32; allowed: 0 … 31"),
        (torch.tensor([[[-1, 3]]]), "from -1 to 3"),
        (torch.tensor([[0, 1]]), r"shape \(1, 2\)"),
        (torch.tensor([[[0.0]]]), "torch.float32"),
        (torch.zeros(1, 0, 2, dtype=torch.int64), r"shape \(1, 0, 2\)"),
    ],
)
def test_bad_codes(codes, message):
    with pytest.raises(PixelError, match=message):
        small().decode(codes)


# --- the stem ---------------------------------------------------------------------------------------------------


def folded(**changes: object) -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(dataclasses.replace(FOLDED, **changes)).eval()


@pytest.mark.parametrize(("stem", "stages"), [(2, 1), (2, 3), (4, 2), (8, 1)])
def test_a_stem_multiplies_the_pixels_of_a_code(stem, stages):
    model, factor = folded(stem=stem, ch_mult=(1,) * stages), stem * 2 ** (stages - 1)
    assert model.config.factor == factor
    codes = model.encode(torch.rand(2, 3, 3 * factor, 2 * factor) * 2 - 1)
    assert codes.shape == (2, 3, 2)
    assert model.decode(codes).shape == (2, 3, 3 * factor, 2 * factor)
    assert model.encoder.conv_in.in_channels == model.decoder.conv_out.out_channels == 3 * stem**2
    assert model.state_dict().keys() == folded(stem=1, ch_mult=(1,) * stages).state_dict().keys()
    with pytest.raises(PixelError, match=f"both must be multiples of {factor}"):
        model.encode(torch.zeros(1, 3, factor, factor // 2))


def test_folding_moves_pixels_into_channels_and_back():
    model = folded()
    for name in ("encoder", "decoder", "quant_conv", "post_quant_conv"):
        setattr(model, name, torch.nn.Identity())
    pixels = torch.rand(2, 3, 8, 12)
    latents = model.to_latents(pixels)
    blocks = pixels.numpy().reshape(2, 3, 2, 4, 3, 4).transpose(0, 1, 3, 5, 2, 4)  # (B, C, y, x, h, w)
    np.testing.assert_array_equal(latents, blocks.reshape(2, 48, 2, 3))
    assert torch.equal(model.from_latents(latents), pixels)


def test_attention_is_at_the_image_sizes_named():
    model = folded(resolution=64, attn_resolutions=(8,))  # stages of 16 and 8 px
    assert [len(stage.attn) for stage in model.encoder.down] == [0, 1]
    assert [len(stage.attn) for stage in model.decoder.up] == [0, 2]
    seen = []
    for layer in (model.encoder.down[1].attn[0], model.decoder.up[1].attn[0]):
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[2:]))
    model.decode(model.encode(torch.zeros(1, 3, 64, 64)))
    assert seen == [(8, 8), (8, 8)]


def test_a_stem_is_saved_and_none_is_not_mentioned(tmp_path):
    """Readers of before there were stems refuse fields that they do not know."""
    folded().save_pretrained(tmp_path / "folded")
    loaded = VQGAN.from_pretrained(tmp_path / "folded")
    assert json.loads((tmp_path / "folded" / "config.json").read_text())["stem"] == 4
    assert loaded.config == FOLDED
    assert loaded.fingerprint == folded().fingerprint
    pixels = torch.rand(1, 3, 16, 16) * 2 - 1
    assert torch.equal(loaded.encode(pixels), folded().encode(pixels))

    small().save_pretrained(tmp_path / "small")
    content = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "stem" not in content
    for fields in (content, {**content, "stem": 1}):
        (tmp_path / "small" / "config.json").write_text(json.dumps(fields))
        assert VQGAN.from_pretrained(tmp_path / "small").config == SMALL


def test_the_published_pair_may_have_a_stem(tmp_path):
    content = yaml.safe_load((TOKENIZER / "vqgan.yaml").read_text())
    params = content["model"]["params"] | {"n_embed": 32, "embed_dim": 4}
    params["ddconfig"] |= {"ch_mult": [1, 1], "num_res_blocks": 1, "z_channels": 8, "stem": 4}
    content["model"]["params"] = params
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump(content))
    torch.save({"state_dict": folded().state_dict()}, tmp_path / "vqgan.ckpt")
    loaded = VQGAN.from_pretrained(tmp_path)
    assert loaded.config == FOLDED
    assert loaded.fingerprint == folded().fingerprint


def test_without_a_stem_the_fingerprint_is_that_of_before_there_were_any():
    """Data sets hold it; restated from the fields that there were."""
    config = dataclasses.asdict(SMALL)
    assert config.pop("stem") == 1
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(small().state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    assert small().fingerprint == digest.hexdigest()


# --- checkpoints ------------------------------------------------------------------------------------------------


def test_construction_is_quiet_and_loading_leaves_the_random_numbers_alone(capsys):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    model = VQGAN.from_pretrained(TOKENIZER)
    assert torch.equal(torch.rand(3), expected)
    assert not model.training
    assert capsys.readouterr() == ("", "")


def test_ours_is_bit_equal_to_the_published(tmp_path):
    published().save_pretrained(tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "worldvla-vqgan"
    loaded = VQGAN.from_pretrained(tmp_path / "ours")
    assert loaded.config == published().config
    raw = torch.load(TOKENIZER / "vqgan.ckpt", weights_only=True)["state_dict"]
    assert loaded.state_dict().keys() == raw.keys()
    assert all(torch.equal(tensor, raw[name].float()) for name, tensor in loaded.state_dict().items())


def test_from_the_hub_cache_with_revision_and_subfolder(tmp_path, monkeypatch):
    repository = tmp_path / "hub" / "models--lab--robot"
    snapshot = repository / "snapshots" / ("c" * 40) / "model_256" / "goal"
    small().save_pretrained(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text("c" * 40)
    options = {"revision": "v2", "subfolder": "model_256/goal", "cache_dir": tmp_path / "hub"}
    loaded = VQGAN.from_pretrained("lab/robot", local_files_only=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), small().parameters(), strict=True))


def test_the_config_of_a_language_model_beside_it_is_passed_over(tmp_path):
    published_copy(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "chameleon"}')
    assert VQGAN.from_pretrained(tmp_path).config == published().config
    (tmp_path / "vqgan.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"worldvla-vqgan.*vqgan\.yaml"):
        VQGAN.from_pretrained(tmp_path)


def test_a_folder_without_any_vqgan(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json or vqgan\.yaml"):
        VQGAN.from_pretrained(tmp_path)


def test_failed_save_leaves_no_half(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(module, "write_text_atomic", full)
    with pytest.raises(OSError, match="disk full"):
        small().save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_push_to_hub_uploads_what_is_saved(monkeypatch):
    calls = []

    def create_repo(self, repo_id, **options):
        calls.append(("create_repo", self.token, repo_id, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **options):
        files = {path.name for path in Path(folder_path).iterdir()}
        loaded = VQGAN.from_pretrained(folder_path)
        calls.append(("upload_folder", repo_id, files, loaded.config, options))
        return argparse.Namespace(commit_url="https://huggingface.co/lab/vqgan/commit/1")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_branch", lambda self, repo_id, **o: calls.append(("create_branch", o))
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    url = small().push_to_hub("lab/vqgan", private=True, token="t", revision="v2", commit_message="First")
    assert url.endswith("/commit/1")
    options = {"revision": "v2", "commit_message": "First", "create_pr": False, "repo_type": "model"}
    options["delete_patterns"] = None
    assert calls == [
        ("create_repo", "t", "lab/vqgan", {"private": True, "exist_ok": True, "repo_type": "model"}),
        ("create_branch", {"branch": "v2", "exist_ok": True, "repo_type": "model"}),
        ("upload_folder", "lab/vqgan", {"config.json", "model.safetensors"}, SMALL, options),
    ]


def test_weights_of_the_discriminator_are_dropped(tmp_path):
    state = torch.load(TOKENIZER / "vqgan.ckpt", weights_only=True)["state_dict"]
    state["loss.discriminator.main.0.weight"] = torch.zeros(2)
    state["loss.perceptual_loss.lin0.model.1.weight"] = torch.zeros(2)
    published_copy(tmp_path, state_dict=state, global_step=3, epoch=1)
    assert VQGAN.from_pretrained(tmp_path).state_dict().keys() == published().state_dict().keys()


def test_wrong_tensors_are_all_listed(tmp_path):
    state = torch.load(TOKENIZER / "vqgan.ckpt", weights_only=True)["state_dict"]
    del state["quant_conv.bias"], state["decoder.conv_in.weight"]
    state["temporal.weight"] = torch.zeros(1)
    state["quantize.embedding.weight"] = torch.zeros(4, 32)
    published_copy(tmp_path, state_dict=state)
    with pytest.raises(VQGANError) as caught:
        VQGAN.from_pretrained(tmp_path)
    for part in (
        str(tmp_path / "vqgan.ckpt"),
        "missing: decoder.conv_in.weight; missing: quant_conv.bias",
        "unexpected: temporal.weight",
        "quantize.embedding.weight is [4, 32], should be [8192, 32]",
    ):
        assert part in str(caught.value)


def test_our_own_files_are_checked_as_strictly(tmp_path):
    small().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["loss.extra"] = tensors.pop("quant_conv.bias")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(VQGANError, match=r"missing: quant_conv\.bias; unexpected: loss\.extra"):
        VQGAN.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(VQGANError, match="no safetensors"):
        VQGAN.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        VQGAN.from_pretrained(tmp_path)


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_would_run_code_is_refused_without_running_it(tmp_path):
    published_copy(tmp_path, callbacks=_Attack(tmp_path / "pwned"))
    with pytest.raises(VQGANError) as caught:
        VQGAN.from_pretrained(tmp_path)
    message = str(caught.value)
    assert not (tmp_path / "pwned").exists()
    assert str(tmp_path / "vqgan.ckpt") in message
    assert f"{os.mkdir.__module__}.mkdir" in message
    assert f"VQGAN.from_published({str(tmp_path)!r}, trust_pickle=True).save_pretrained(out)" in message
    assert f"worldvla convert {tmp_path} OUT --trust-pickle" in message


def test_a_trusted_pickle_converts(tmp_path):
    published_copy(tmp_path, hyper_parameters=argparse.Namespace(lr=4.5e-6))
    with pytest.raises(VQGANError, match=r"argparse\.Namespace"):
        VQGAN.from_published(tmp_path)
    VQGAN.from_published(tmp_path, trust_pickle=True).save_pretrained(tmp_path / "ours")
    loaded = VQGAN.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), published().parameters(), strict=True))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}}, "no 'state_dict'"),
        ([torch.zeros(1)], "no 'state_dict'"),
        ({"state_dict": {"quant_conv.bias": 3}}, r"no tensors: quant_conv\.bias"),
    ],
)
def test_checkpoints_of_another_kind(tmp_path, content, message):
    published_copy(tmp_path)
    torch.save(content, tmp_path / "vqgan.ckpt")
    with pytest.raises(VQGANError, match=message):
        VQGAN.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [0, 100, 100_000])
def test_truncated_checkpoint(tmp_path, keep):
    published_copy(tmp_path)
    path = tmp_path / "vqgan.ckpt"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(VQGANError, match=r"vqgan\.ckpt"):
        VQGAN.from_pretrained(tmp_path)


# --- configurations ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("ddconfig.kernel", 3, "unknown fields: kernel"),
        ("remap", "codes.npy", "unknown fields: remap"),
        ("n_embed", None, "n_embed is None"),
        ("ddconfig.ch", 48, "ch is 48; a multiple of 32"),
        ("ddconfig.ch", "32", "ch is '32'"),
        ("ddconfig.ch_mult", 2, "ch_mult is 2; a list"),
        ("ddconfig.ch_mult", [], "ch_mult is empty"),
        ("ddconfig.ch_mult", [1, 0], "ch_mult is 0"),
        ("ddconfig.dropout", 1.0, "dropout is 1.0"),
        ("ddconfig.dropout", "no", "dropout is 'no'"),
        ("ddconfig.double_z", True, "double_z is True"),
        ("ddconfig.stem", 3, "stem is 3; a power of two is needed: 1, 2, 4, 8 …"),
        ("ddconfig.stem", 0, "stem is 0; a whole number of at least 1"),
        ("ddconfig.stem", -4, "stem is -4; a whole number"),
        ("ddconfig.stem", 2.0, "stem is 2.0; a whole number"),
        ("ddconfig.stem", True, "stem is True; a whole number"),
        ("ddconfig", None, r"no 'model\.params\.ddconfig'"),
    ],
)
def test_bad_yaml_fields(tmp_path, path, value, message):
    published_copy(tmp_path)
    content = yaml.safe_load((tmp_path / "vqgan.yaml").read_text())
    *parents, name = path.split(".")
    fields = content["model"]["params"]
    for parent in parents:
        fields = fields[parent]
    fields[name] = value
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(VQGANError, match=message) as caught:
        VQGAN.from_pretrained(tmp_path)
    assert "vqgan.yaml" in str(caught.value)


def test_missing_yaml_fields_are_all_listed(tmp_path):
    published_copy(tmp_path)
    content = yaml.safe_load((tmp_path / "vqgan.yaml").read_text())
    del content["model"]["params"]["n_embed"], content["model"]["params"]["ddconfig"]["ch"]
    (tmp_path / "vqgan.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(VQGANError, match="missing fields: ch, n_embed; unknown fields: none"):
        VQGAN.from_pretrained(tmp_path)


def test_yaml_that_would_run_code(tmp_path):
    published_copy(tmp_path)
    (tmp_path / "vqgan.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/pwned']\n")
    with pytest.raises(VQGANError, match="no plain YAML"):
        VQGAN.from_pretrained(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "worldvla-vqgan", "ch": 32}'])
def test_bad_config_json(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(VQGANError, match=r"config\.json"):
        VQGAN.from_pretrained(tmp_path)


# --- files that are not what their names say (the kinds are listed in test_signatures.py) ----------------------


def safetensors_bytes() -> bytes:
    return safetensors.torch.save({"quant_conv.bias": torch.zeros(1)})


def torch_bytes(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 281000000\n"


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "Git LFS pointer.*git lfs pull"),
        (b"<!DOCTYPE html><html>", "HTML or XML page.*resolve"),
        (b'{"error": "Invalid credentials"}', "answer of a server.*Invalid credentials"),
        (b"", "is empty"),
        (safetensors_bytes(), "a file of safetensors.*torch.save"),
        (pickle.dumps({"state_dict": {}}), "a pickle that torch did not write"),
        (torch_bytes({"state_dict": {}})[:300], "beginning of a zip"),
        (torch_bytes({"state_dict": {}}).replace(b"state_dict", b"state\xffdict"), "no whole torch file"),
        (torch_bytes({"state_dict": {}}, _use_new_zipfile_serialization=False)[:-20], "no whole torch file"),
    ],
    ids=["lfs", "html", "json", "empty", "safetensors", "pickle", "cut", "damaged", "cut-legacy"],
)
def test_what_is_no_checkpoint_is_named_and_never_to_be_unpickled(tmp_path, content, message, trust):
    (tmp_path / "vqgan.yaml").write_bytes((TOKENIZER / "vqgan.yaml").read_bytes())
    (tmp_path / "vqgan.ckpt").write_bytes(content)
    with pytest.raises(VQGANError, match=message) as caught:
        VQGAN.from_published(tmp_path, trust_pickle=trust)
    assert str(tmp_path / "vqgan.ckpt") in str(caught.value)
    assert "trust" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "Git LFS pointer.*git lfs pull"),
        (torch_bytes({"a": torch.zeros(1)}), "a file of torch.save.*safetensors.torch.save_file"),
        (safetensors_bytes()[:-1], "no whole safetensors file.*fetch it again"),
        (b"\xff" * 64, "of no known kind .it begins with ff ff"),
    ],
    ids=["lfs", "torch", "cut", "noise"],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content, message):
    small().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(VQGANError, match=message) as caught:
        VQGAN.from_pretrained(tmp_path)
    assert "trust" not in str(caught.value)


@pytest.mark.parametrize("name", ["vqgan.yaml", "config.json"])
@pytest.mark.parametrize(
    ("content", "message"), [(POINTER, "Git LFS pointer"), (b"<html>", "HTML"), (b"", "empty")]
)
def test_what_is_no_configuration_is_named(tmp_path, name, content, message):
    published_copy(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VQGANError, match=f"{name} is .*{message}"):
        VQGAN.from_pretrained(tmp_path)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_classes_that_are_not_installed_are_named(tmp_path, options):
    """As of pytorch-lightning's callbacks in checkpoints of taming-transformers."""
    published_copy(tmp_path)
    callback = type("Callback", (), {"__module__": "lightnin"})
    with pytest.MonkeyPatch.context() as installed:
        installed.setitem(sys.modules, "lightnin", SimpleNamespace(Callback=callback))
        torch.save({"state_dict": {}, "callbacks": callback()}, tmp_path / "vqgan.ckpt", **options)
    with pytest.raises(VQGANError, match=r"lightnin\.Callback beside tensors.*need lightnin, which is not inst"):
        VQGAN.from_pretrained(tmp_path)
    with pytest.raises(VQGANError, match="classes that are not installed: No module named 'lightnin'"):
        VQGAN.from_published(tmp_path, trust_pickle=True)
