"""The VQ-GAN: pixels → codebook indices → pixels, on the network modules of taming-transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import os
import pickle
import re
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from taming.modules.diffusionmodules.model import Decoder, Encoder
from taming.modules.vqvae.quantize import VectorQuantizer
from torch import Tensor, nn
from torch.nn import functional

from worldvla_tokenizers.files import (
    HubOptions,
    PretrainedFilesError,
    PushOptions,
    push_folder,
    resolve_files,
    staged_folder,
    write_text_atomic,
)
from worldvla_tokenizers.signatures import Kind, misnamed, read_json, read_text

MODEL_TYPE = "worldvla-vqgan"
CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
PUBLISHED_CONFIG_NAME = "vqgan.yaml"
PUBLISHED_WEIGHTS_NAME = "vqgan.ckpt"

_NORM_GROUPS = 32  # of taming's GroupNorm, in every block
_BETA = 0.25  # commitment weight of taming's VQModel; training only
_LOSS_PREFIX = "loss."  # discriminator and perceptual network, saved beside the VQ-GAN they trained
# Entries of `model.params` that steer taming's training and say nothing about the network.
_TRAINING_PARAMS = {"lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor"}


# What torch raises, besides its own error, for a file whose bytes are wrong.
_DAMAGE = (
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AssertionError,
    struct.error,
)


class VQGANError(ValueError):
    """A VQ-GAN configuration or checkpoint that cannot be used; the message says which entries, and why."""


CheckpointError = VQGANError
"""Its former name, which `worldvla_model` has for an error of its own."""


class PixelError(ValueError):
    """Pixels or codes of a shape, type or value the VQ-GAN cannot take."""


@dataclass(frozen=True)
class VQGANConfig:
    """Topology of a VQ-GAN; the defaults are the published one, the names taming's.

    Attributes:
        embed_dim: width of a codebook entry.
        n_embed: entries of the codebook.
        z_channels: width between encoder and codebook, and between codebook and decoder.
        resolution: image size [px] at which `attn_resolutions` are those of the stages; it limits no input.
        in_channels: channels of the input (3: RGB).
        out_ch: channels of the output.
        ch: width of the first stage; a multiple of 32.
        ch_mult: width of each stage in units of `ch`; each stage but the last halves the image.
        num_res_blocks: residual blocks per stage.
        attn_resolutions: image sizes [px] at which a stage has attention. The first stage works on images of
            `resolution` / `stem`, each further one on half of that.
        dropout: in the residual blocks.
        double_z: must be false (mean and variance are for KL autoencoders, not for a codebook).
        stem: s, a power of two: blocks of s x s pixels are folded into channels before the encoder and unfolded
            after the decoder, in place of stages at full size, which cost the most. 1 for none, as published.

    Raises:
        VQGANError: a value is out of range.

    Source: Esser et al. 2021; `vqgan.yaml` of Chameleon (Gafni et al. 2022). The stem is that of Shi et al. 2016;
    the tokenizers of Cosmos (NVIDIA 2025) fold by wavelets.
    """

    embed_dim: int = 256
    n_embed: int = 8_192
    z_channels: int = 256
    resolution: int = 512
    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    dropout: float = 0.0
    double_z: bool = False
    stem: int = 1

    def __post_init__(self) -> None:
        for name in ("ch_mult", "attn_resolutions"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise VQGANError(f"{name} is {value!r}; a list of whole numbers is needed")
            object.__setattr__(self, name, tuple(value))
        numbers = ("embed_dim", "n_embed", "z_channels", "resolution", "in_channels", "out_ch", "ch")
        for name in (*numbers, "num_res_blocks", "stem"):
            _check_whole(name, getattr(self, name))
        for name in ("ch_mult", "attn_resolutions"):
            for value in getattr(self, name):
                _check_whole(name, value)
        if not self.ch_mult:
            raise VQGANError("ch_mult is empty; one width per stage is needed")
        if self.ch % _NORM_GROUPS:
            raise VQGANError(f"ch is {self.ch}; a multiple of {_NORM_GROUPS} is needed")
        if type(self.dropout) not in (int, float) or not 0.0 <= self.dropout < 1.0:
            raise VQGANError(f"dropout is {self.dropout!r}; allowed: 0 up to, not including, 1")
        if self.double_z is not False:
            raise VQGANError(f"double_z is {self.double_z!r}; a VQ-GAN has double_z: false")
        if self.stem.bit_count() != 1:
            raise VQGANError(f"stem is {self.stem}; a power of two is needed: 1, 2, 4, 8 …")

    @property
    def factor(self) -> int:
        """Pixels per code, along each side (published: 16)."""
        return self.stem * 2 ** (len(self.ch_mult) - 1)

    def to_mapping(self) -> dict[str, Any]:
        """Fields by name, as files hold them: without `stem` where there is none.

        A network without a stem keeps the files and the fingerprint that it had when there was no such field.
        """
        fields = dataclasses.asdict(self)
        if self.stem == 1:
            del fields["stem"]
        return fields

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any], *, origin: str) -> VQGANConfig:
        """Check fields by name: all of them but `stem`, which may be absent (1), and no other.

        Raises:
            VQGANError: fields are missing or unknown (all are listed), or a value is out of range.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        missing = sorted(known - fields.keys() - {"stem"})
        unknown = sorted(map(str, fields.keys() - known))
        if missing or unknown:
            raise VQGANError(
                f"{origin}: missing fields: {', '.join(missing) or 'none'}; "
                f"unknown fields: {', '.join(unknown) or 'none'}"
            )
        try:
            return cls(**fields)
        except (VQGANError, TypeError) as error:
            raise VQGANError(f"{origin}: {error}") from error

    @classmethod
    def from_yaml(cls, path: Path) -> VQGANConfig:
        """Read the published `vqgan.yaml`.

        Raises:
            VQGANError: it is no YAML, or its `model.params` is not a VQ-GAN's.
        """
        text = read_text(path, "configuration of a VQ-GAN", VQGANError)
        try:
            content = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise VQGANError(f"{path} is no plain YAML: {error}") from error
        params = content
        for name in ("model", "params"):
            params = params.get(name) if isinstance(params, dict) else None
        if not isinstance(params, dict) or not isinstance(params.get("ddconfig"), dict):
            raise VQGANError(f"{path} has no 'model.params.ddconfig'; it describes no VQ-GAN")
        top = {name: value for name, value in params.items() if name not in {"ddconfig", *_TRAINING_PARAMS}}
        return cls.from_mapping({**params["ddconfig"], **top}, origin=f"model.params of {path}")


class VQGAN(nn.Module):
    """Image autoencoder with a codebook between its halves.

    Args:
        config: the topology.

    Example:
        >>> vqgan = VQGAN(VQGANConfig(ch=32, ch_mult=(1, 1), z_channels=8, embed_dim=8, n_embed=16)).eval()
        >>> codes = vqgan.encode(torch.zeros(1, 3, 32, 64))
        >>> codes.shape, vqgan.decode(codes).shape
        (torch.Size([1, 16, 32]), torch.Size([1, 3, 32, 64]))

    Source: Esser et al. 2021, "Taming Transformers"; keys as in its checkpoints.
    """

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        # Behind the stem the network is taming's, of smaller images with more channels.
        topology = dataclasses.asdict(config)
        for name in ("in_channels", "out_ch"):
            topology[name] *= config.stem**2
        topology["resolution"] //= config.stem
        with contextlib.redirect_stdout(io.StringIO()):  # taming prints the shape of z
            self.encoder = Encoder(**topology)
            self.decoder = Decoder(**topology)
        self.quantize = VectorQuantizer(config.n_embed, config.embed_dim, beta=_BETA)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of configuration and weights, in hexadecimal: equal networks give equal codes."""
        # Not of `asdict`: data sets hold fingerprints of networks without a stem, from before there were any.
        digest = hashlib.sha256(json.dumps(self.config.to_mapping(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type the network computes in."""
        return self.quant_conv.weight.dtype

    @torch.no_grad()
    def encode(self, pixels: Tensor, *, positions_per_chunk: int = 4_096) -> Tensor:
        """Find the codes of images.

        Where two entries are nearly as near as each other, rounding decides, and with it how many threads sum. On
        NVIDIA GPUs cuDNN convolves fp32 in TF32 unless `torch.backends.cudnn.allow_tf32` is false, which rounds
        more.

        Args:
            pixels: (B, in_channels, H, W) float in [-1, 1]; H and W multiples of `config.factor`.
            positions_per_chunk: codes searched for at once; the distance table takes
                4 · positions_per_chunk · n_embed bytes (published: 128 MiB), however many images there are.

        Returns:
            (B, H/factor, W/factor) int64 codes in 0 … n_embed - 1, on the device of the weights.

        Raises:
            PixelError: another shape or type, a size that is no multiple of the factor, or NaN or infinite
                values.
        """
        self._check_pixels(pixels)
        z = self.to_latents(pixels.to(self.device, self.dtype))  # (B, E, h, w)
        vectors = z.permute(0, 2, 3, 1).reshape(-1, self.config.embed_dim)  # (B·h·w, E)
        codes = nearest_codes(vectors, self.quantize.embedding.weight, positions_per_chunk)
        return codes.view(z.shape[0], *z.shape[2:])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Draw the images of codes.

        Args:
            codes: (B, h, w) integers in 0 … n_embed - 1.

        Returns:
            (B, out_ch, h·factor, w·factor) float32, about [-1, 1] and not clamped.

        Raises:
            PixelError: another shape or type, or a code outside the codebook.
        """
        if codes.ndim != 3 or 0 in codes.shape or codes.is_floating_point() or codes.is_complex():
            raise PixelError(
                f"codes have shape {tuple(codes.shape)} and type {codes.dtype}; (B, h, w) integers needed"
            )
        codes = codes.to(self.device, torch.int64)
        low, high = (int(bound) for bound in torch.aminmax(codes))
        if low < 0 or high >= self.config.n_embed:
            raise PixelError(f"codes reach from {low} to {high}; allowed: 0 … {self.config.n_embed - 1}")
        z = self.quantize.embedding(codes).permute(0, 3, 1, 2)  # (B, E, h, w)
        return self.from_latents(z).float()

    def to_latents(self, pixels: Tensor) -> Tensor:
        """(B, in_channels, H, W) in [-1, 1] → (B, embed_dim, h, w), what codes are chosen for; with gradients."""
        stem = self.config.stem
        folded = functional.pixel_unshuffle(pixels, stem) if stem > 1 else pixels
        return self.quant_conv(self.encoder(folded))

    def from_latents(self, latents: Tensor) -> Tensor:
        """(B, embed_dim, h, w), entries of the codebook → (B, out_ch, H, W) about [-1, 1]; with gradients."""
        drawn, stem = self.decoder(self.post_quant_conv(latents)), self.config.stem
        return functional.pixel_shuffle(drawn, stem) if stem > 1 else drawn

    @classmethod
    def from_pretrained(
        cls,
        dir_or_repo: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **hub: Unpack[HubOptions],
    ) -> VQGAN:
        """Load a VQ-GAN: ours (`config.json`, `model.safetensors`) or published (`vqgan.yaml`, `vqgan.ckpt`).

        Args:
            dir_or_repo: a folder, or the id of a Hub repository.
            device: where to put the weights (default: CPU).
            dtype: type to compute in.
            hub: `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`, as in transformers.

        Returns:
            The network, in eval mode.

        Raises:
            VQGANError: a field or tensor is missing, unexpected or of another shape, or the published
                file would have to be unpickled.
            FileNotFoundError: there is neither pair of files.
        """
        found = resolve_files(dir_or_repo, any_of=[CONFIG_NAME, PUBLISHED_CONFIG_NAME], **hub)
        if CONFIG_NAME in found:
            content = read_json(found[CONFIG_NAME], VQGANError)
            if content.pop("model_type", None) == MODEL_TYPE:
                config = VQGANConfig.from_mapping(content, origin=str(found[CONFIG_NAME]))
                weights = resolve_files(dir_or_repo, [WEIGHTS_NAME], **hub)[WEIGHTS_NAME]
                return cls._with_weights(config, _read_safetensors(weights), weights, device, dtype)
        # A published model's folder holds a config.json too: that of its language model.
        if PUBLISHED_CONFIG_NAME in found:
            return cls.from_published(dir_or_repo, device=device, dtype=dtype, **hub)
        raise PretrainedFilesError(
            f"{found[CONFIG_NAME]} is not of model_type {MODEL_TYPE!r}, and there is no "
            f"{PUBLISHED_CONFIG_NAME} beside it: {dir_or_repo} holds no VQ-GAN"
        )

    @classmethod
    def from_published(
        cls,
        dir_or_repo: str | os.PathLike[str],
        *,
        trust_pickle: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **hub: Unpack[HubOptions],
    ) -> VQGAN:
        """Load the published pair `vqgan.yaml` and `vqgan.ckpt`, as `from_pretrained` does.

        Args:
            dir_or_repo: a folder, or the id of a Hub repository.
            trust_pickle: unpickle a checkpoint that holds more than tensors. That runs whatever code the file
                names: only for a file whose author you trust.
            device: where to put the weights (default: CPU).
            dtype: type to compute in.
            hub: as `from_pretrained`.

        Raises:
            VQGANError: as `from_pretrained`.
            FileNotFoundError: a file is missing.
        """
        files = resolve_files(dir_or_repo, [PUBLISHED_CONFIG_NAME, PUBLISHED_WEIGHTS_NAME], **hub)
        config = VQGANConfig.from_yaml(files[PUBLISHED_CONFIG_NAME])
        path = files[PUBLISHED_WEIGHTS_NAME]
        return cls._with_weights(config, _read_published(path, trust_pickle), path, device, dtype)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write `config.json` and `model.safetensors`: both, or on failure neither.

        Weights that bf16 holds without loss take half the space; loading gives the same values back.
        """
        content = {"model_type": MODEL_TYPE, **self.config.to_mapping()}
        with staged_folder(folder) as stage:
            tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
            short = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
            if all(torch.equal(short[name].to(tensor.dtype), tensor) for name, tensor in tensors.items()):
                tensors = short
            save_file(tensors, stage / WEIGHTS_NAME, metadata={"format": "pt"})
            write_text_atomic(stage / CONFIG_NAME, json.dumps(content, indent=2) + "\n")

    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub.

        Args:
            repo_id: `organisation/name`; made if it does not exist.
            options: `private`, `token`, `revision`, `commit_message`, `create_pr`.

        Returns:
            The address of the commit.
        """
        options.setdefault("commit_message", "Upload VQ-GAN")
        return push_folder(self.save_pretrained, repo_id, **options)

    @classmethod
    def _with_weights(
        cls,
        config: VQGANConfig,
        tensors: Mapping[str, Tensor],
        origin: Path,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> VQGAN:
        # The initial weights are replaced: they must not use up the caller's random numbers. (On the meta device
        # there would be none to draw, but drawing there imports torch's compiler, which takes 4 s.)
        with torch.random.fork_rng(devices=[]):
            model = cls(config)
        expected = model.state_dict()
        problems = [f"missing: {name}" for name in sorted(expected.keys() - tensors.keys())]
        problems += [f"unexpected: {name}" for name in sorted(tensors.keys() - expected.keys())]
        problems += [
            f"{name} is {list(tensors[name].shape)}, should be {list(expected[name].shape)}"
            for name in expected
            if name in tensors and tensors[name].shape != expected[name].shape
        ]
        if problems:
            raise VQGANError(f"{origin} does not fit its configuration: {'; '.join(problems)}")
        model.load_state_dict(tensors, assign=True)
        return model.to(device=device or "cpu", dtype=dtype).eval()

    def _check_pixels(self, pixels: Tensor) -> None:
        channels, factor = self.config.in_channels, self.config.factor
        if pixels.ndim != 4 or 0 in pixels.shape or pixels.shape[1] != channels:
            raise PixelError(f"pixels have shape {tuple(pixels.shape)}; (B, {channels}, H, W) needed")
        if not pixels.is_floating_point():
            raise PixelError(f"pixels are {pixels.dtype}; floating point in [-1, 1] needed")
        height, width = pixels.shape[2:]
        if height % factor or width % factor:
            raise PixelError(f"image of {width} x {height} px; both must be multiples of {factor}")
        if not torch.isfinite(pixels).all():
            raise PixelError("pixels hold NaN or infinite values; [-1, 1] needed")


def nearest_codes(vectors: Tensor, codebook: Tensor, positions_per_chunk: int) -> Tensor:
    """Index of the codebook entry with the smallest squared L2 distance; of equally near ones the lowest.

    Distances are computed in fp32 or, for vectors of fp64, in fp64, whatever the type of the network and under
    autocast too: in bf16 many entries would be equally near.

    Args:
        vectors: (N, E).
        codebook: (C, E).
        positions_per_chunk: rows of `vectors` compared at once.

    Returns:
        (N,) int64.
    """
    with torch.autocast(vectors.device.type, enabled=False):
        precision = torch.promote_types(vectors.dtype, torch.float32)
        entries = codebook.to(precision)
        # |v - e|² = |v|² + |e|² - 2 v·e, and |v|² is the same for every entry.
        lengths = entries.square().sum(dim=1)  # (C,)
        chunks = vectors.split(positions_per_chunk)
        return torch.cat(
            [torch.addmm(lengths, chunk.to(precision), entries.T, alpha=-2.0).argmin(dim=1) for chunk in chunks]
        )


def _read_published(path: Path, trust_pickle: bool) -> dict[str, Tensor]:
    if (told := misnamed(path, "checkpoint of torch", Kind.TORCH)) is not None:
        raise VQGANError(told)
    try:
        content = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except (ImportError, AttributeError) as error:
        if not trust_pickle:
            raise _damaged(path, error) from error
        raise VQGANError(
            f"{path} holds objects of classes that are not installed: {error}; remedy: install the package they "
            "come from, or ask the file's author for one that holds tensors alone"
        ) from error
    except pickle.UnpicklingError as error:
        # Of files before torch 1.6 the names are in the error alone.
        names = _pickled_names(path) or sorted(set(re.findall(r"Unsupported global: GLOBAL (\S+)", str(error))))
        if not names or not all(part.isidentifier() for name in names for part in name.split(".")):
            raise _damaged(path, error) from error
        raise VQGANError(
            f"{path} is not opened: it holds {', '.join(names)} beside tensors, and unpickling them can run any "
            f"code. {_not_installed(names)}If you trust its author, convert it once, in Python with "
            f"VQGAN.from_published({str(path.parent)!r}, trust_pickle=True).save_pretrained(out), or with "
            f"`worldvla convert {path.parent} OUT --trust-pickle`"
        ) from error
    except _DAMAGE as error:
        raise _damaged(path, error) from error
    tensors = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(tensors, dict):
        raise VQGANError(f"{path} has no 'state_dict'; a checkpoint of taming-transformers is needed")
    kept = {name: value for name, value in tensors.items() if not str(name).startswith(_LOSS_PREFIX)}
    wrong = [str(name) for name, value in kept.items() if not isinstance(value, Tensor)]
    if wrong:
        raise VQGANError(f"{path}: state_dict entries that are no tensors: {', '.join(wrong)}")
    return kept


def _damaged(path: Path, error: Exception) -> VQGANError:
    # The first line: torch goes on with advice to unpickle all, which mends no damage.
    found = re.search(r"WeightsUnpickler error: (.*?)(?: was not an allowed|$)", str(error), re.MULTILINE)
    told = found[1] if found else str(error).partition("\n")[0]
    return VQGANError(f"{path} is no whole torch file: {told or type(error).__name__}; remedy: fetch it again")


def _pickled_names(path: Path) -> list[str]:
    """Names of the functions and classes a checkpoint would call, read without calling them."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except (pickle.UnpicklingError, *_DAMAGE):
        return []  # damaged, or of the oldest format


def _not_installed(names: Sequence[str]) -> str:
    """A sentence about the packages that the objects come from and that are not there, if any."""
    packages = sorted({name.partition(".")[0] for name in names})
    absent = [name for name in packages if name not in sys.modules and importlib.util.find_spec(name) is None]
    return f"They need {', '.join(absent)}, which is not installed here. " if absent else ""


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    if (told := misnamed(path, "safetensors file", Kind.SAFETENSORS)) is not None:
        raise VQGANError(told)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise VQGANError(f"{path} is no whole safetensors file: {error}; remedy: fetch it again") from error


def _check_whole(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise VQGANError(f"{name} is {value!r}; a whole number of at least 1 is needed")
