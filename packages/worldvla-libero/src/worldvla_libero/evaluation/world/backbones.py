"""The networks that LPIPS and FVD look with: from a file, fetched when asked, or the reason why there is none."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from worldvla_tokenizers.files import atomic_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from worldvla_tokenizers.vqgan_training import LPIPSNetwork

FrameDistance = Callable[["Tensor", "Tensor"], "Tensor"]
"""(B, 3, H, W) frames and true frames, both float32 on the CPU and in -1 … 1 → B distances, in any shape."""

VideoFeatures = Callable[[NDArray[np.uint8]], NDArray[np.floating]]
"""(B, T, H, W, 3) uint8 videos → (B, F) features."""

I3D_URL = "https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt"
"""Where the package cd-fvd has the weights from: I3D, trained on Kinetics-400. There is no checksum to compare."""

I3D_MIN_FRAMES = 9
"""Its strides halve time three times, and two steps have to be left to average."""

_ADVICE = "give --{name}-weights FILE, or --fetch-weights"


class WeightsError(ValueError):
    """Weights that cannot be fetched, or a file that does not hold them."""


@dataclass(frozen=True)
class Backbones:
    """What LPIPS and FVD look with; None where they are not to be computed.

    Attributes:
        lpips: distance of frames.
        video: features of videos.
        min_frames: of the shortest video that `video` takes.
        described: what they are, for the record, by name of the metric; with the SHA-256 of their weights.
        missing: why there is none, by name of the metric.
    """

    lpips: FrameDistance | None = None
    video: VideoFeatures | None = None
    min_frames: int = 1
    described: Mapping[str, Any] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def load_backbones(
    *,
    lpips_weights: str | os.PathLike[str] | None = None,
    lpips_network: LPIPSNetwork = "alex",
    fvd_weights: str | os.PathLike[str] | None = None,
    fetch: bool = False,
    device: torch.device | str = "cpu",
) -> Backbones:
    """Load what there are weights for.

    Args:
        lpips_weights: file of torchvision's ImageNet weights of `lpips_network`.
        lpips_network: `alex`, `vgg` or `squeeze`.
        fvd_weights: `i3d_pretrained_400.pt`.
        fetch: download those that no file is given for, to the cache folder of `torch.hub`.
        device: where they compute.

    Raises:
        WeightsError: they cannot be fetched, or a file holds something else.
        FileNotFoundError: there is no such file.
        ImportError: there are weights, but the package that uses them is not installed.
    """
    if fetch:
        lpips_weights = lpips_weights or fetch_weights(lpips_network)
        fvd_weights = fvd_weights or fetch_weights("i3d")
    described: dict[str, Any] = {}
    missing = {
        name: f"no weights: {_ADVICE.format(name=name)}"
        for name, file in (("lpips", lpips_weights), ("fvd", fvd_weights))
        if file is None
    }
    lpips, video = None, None
    if lpips_weights is not None:
        lpips = load_lpips(lpips_weights, lpips_network, device=device)
        described["lpips"] = {"network": lpips_network, "weights": _sha256(lpips_weights)}
    if fvd_weights is not None:
        video = I3D(fvd_weights, device=device)
        described["fvd"] = {"network": "I3D, logits of Kinetics-400", "weights": _sha256(fvd_weights)}
    return Backbones(lpips, video, I3D_MIN_FRAMES, described, missing)


def load_lpips(
    weights: str | os.PathLike[str], network: LPIPSNetwork = "alex", *, device: torch.device | str = "cpu"
) -> FrameDistance:
    """LPIPS (Zhang et al. 2018, version 0.1); its linear layers come with the package `lpips`.

    Args:
        weights: file of torchvision's ImageNet weights of the network, of which nothing but tensors is unpickled.
        network: `alex`, `vgg` or `squeeze`.
        device: where it computes.

    Raises:
        WeightsError: the file holds something else.
        ImportError: `lpips` is not installed.
    """
    import torch

    from worldvla_tokenizers.vqgan_training import VQGANTrainingError, perceptual_loss

    try:
        made = perceptual_loss(weights, network).to(device)
    except VQGANTrainingError as error:
        raise WeightsError(str(error)) from error
    except ImportError as error:
        raise ImportError("LPIPS needs lpips; remedy: pip install 'worldvla-libero[metrics]'") from error

    def distance(frames: Tensor, true: Tensor) -> Tensor:
        with torch.inference_mode():
            return made(frames.float().to(device), true.float().to(device))

    return distance


class I3D:
    """Features for FVD: logits of I3D, trained on Kinetics-400 (Carreira and Zisserman 2017), as cd-fvd has it.

    Args:
        weights: file of its weights, of which nothing but tensors is unpickled.
        device: where it computes.
        batch_size: videos at once.

    Raises:
        WeightsError: the file holds something else.
        ImportError: `cd-fvd` is not installed.
    """

    def __init__(
        self, weights: str | os.PathLike[str], *, device: torch.device | str = "cpu", batch_size: int = 4
    ) -> None:
        try:
            # The network and its preprocessing alone: the package's own loader downloads into its own folder, and
            # takes what an interrupted download left there for the weights.
            from cdfvd.third_party.i3d.pytorch_i3d import InceptionI3d
        except ImportError as error:
            raise ImportError("FVD needs cd-fvd; remedy: pip install 'worldvla-libero[metrics]'") from error
        self.network = InceptionI3d(400, in_channels=3)
        _fill(self.network, _tensors(weights), weights, "I3D of Kinetics-400")
        self.network.eval().requires_grad_(False).to(device)
        self.device, self.batch_size = device, batch_size

    def __call__(self, videos: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(B, T, H, W, 3) videos of at least `I3D_MIN_FRAMES` frames → (B, 400) logits."""
        import torch
        from cdfvd.third_party.i3d.utils import preprocess_i3d

        logits = []
        with torch.inference_mode():
            for start in range(0, len(videos), self.batch_size):
                batch = videos[start : start + self.batch_size].astype(np.float32)
                pixels = preprocess_i3d(batch)  # (B, 3, T, 224, 224), -1 … 1
                logits.append(self.network(pixels.to(self.device)).double().cpu().numpy())
        return np.concatenate(logits)


def fetch_weights(network: str) -> Path:
    """Download weights, once, to the cache folder of `torch.hub`; the file appears whole or not at all.

    Args:
        network: `alex`, `vgg`, `squeeze` (ImageNet, checksum compared) or `i3d` (read, as there is no checksum).

    Raises:
        WeightsError: they cannot be fetched, or not whole; says from where, so that they can be brought by hand.
    """
    import torch

    if network == "i3d":
        url = I3D_URL
    else:
        from torchvision import models

        weights = {
            "alex": models.AlexNet_Weights,
            "vgg": models.VGG16_Weights,
            "squeeze": models.SqueezeNet1_1_Weights,
        }
        url = weights[network].DEFAULT.url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not file.is_file():
        checksum = torch.hub.HASH_REGEX.search(file.name)
        draft = file
        try:
            with atomic_path(file) as draft:
                torch.hub.download_url_to_file(url, str(draft), checksum and checksum[1], progress=False)
                # torch.hub compares no lengths: half a file would stay for ever.
                if not checksum and not _tensors(draft):
                    raise WeightsError("what came holds no weights")
        except (OSError, RuntimeError, HTTPException, WeightsError) as error:
            name = "fvd" if network == "i3d" else "lpips"
            reason = str(error).replace(str(draft), "what came")
            raise WeightsError(
                f"cannot fetch {url}: {reason}; remedy: download it elsewhere and give --{name}-weights FILE"
            ) from error
    return file


def _tensors(path: str | os.PathLike[str]) -> Mapping[str, Tensor]:
    """The tensors by name that a file of torch holds; nothing else is unpickled."""
    import pickle

    import torch

    with Path(path).open("rb") as file:  # outside of what is caught: a file that is not there is told as such
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
            raise WeightsError(f"{path} holds no weights, or is damaged ({type(error).__name__})") from error
    return found if isinstance(found, Mapping) else {}


def _fill(network: Any, found: Mapping[str, Tensor], path: str | os.PathLike[str], name: str) -> None:
    own = network.state_dict()
    # Batch norm's count of training steps came to torch after some files; nothing depends on it.
    wrong = [
        key
        for key, value in own.items()
        if getattr(found.get(key), "shape", None) != value.shape and not key.endswith("num_batches_tracked")
    ]
    if wrong:
        listed = ", ".join(wrong[:3]) + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise WeightsError(f"{path} holds no weights of {name}: {listed} missing or of another shape")
    network.load_state_dict({key: found.get(key, value) for key, value in own.items()})


def _sha256(path: str | os.PathLike[str]) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
