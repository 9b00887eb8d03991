"""Training a VQ-GAN on frames: L1, perceptual and adversarial loss, a codebook that follows its vectors.

    frames → encoder → nearest codes → decoder → losses → weights

The codebook is a running mean of the vectors assigned to each code, and a code that nothing was assigned to for a
while is put where vectors are: both keep all of it in use, which gradients alone (taming's way) do not.
Everything that a step depends on follows from the settings and its number, so a run that was interrupted goes on
to the same weights, bit for bit on a CPU.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pickle
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from taming.modules.discriminator.model import NLayerDiscriminator, weights_init
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from worldvla_tokenizers.files import atomic_path
from worldvla_tokenizers.vqgan import VQGAN, nearest_codes

LPIPSNetwork = Literal["vgg", "alex", "squeeze"]

_POSITIONS_PER_CHUNK = 4_096
_IMAGENET = {"vgg": "VGG-16", "alex": "AlexNet", "squeeze": "SqueezeNet 1.1"}
# What torch.load raises at files of other kinds and at halves.
_UNREADABLE = (
    OSError,
    RuntimeError,
    pickle.UnpicklingError,
    struct.error,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AssertionError,
    AttributeError,
)


class Frames(Protocol):
    """Frames by index: a list or an array of (H, W, 3) uint8, also a memory-mapped one."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.uint8]: ...


class Masks(Protocol):
    """Masks of frames by the index of these: (H, W) bool, or integers that are 0 for False."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.bool_] | NDArray[np.integer]: ...


class VQGANTrainingError(ValueError):
    """Settings, frames or a checkpoint that no VQ-GAN can be trained with."""


@dataclass(frozen=True)
class VQGANTraining:
    """How a VQ-GAN is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: frames a step, on all processes together.
        learning_rate: the highest, reached after the warm-up and left along a cosine, down to 0.
        warmup: share of the steps in which the learning rate rises.
        pixel_weight: weight of the mean absolute difference.
        motion_weight: how many times as much as another a pixel that moves counts in that mean; 1 for all alike.
        perceptual_weight: weight of LPIPS; it counts only where VGG's weights are given.
        commitment: weight β of what draws vectors to their codes.
        codebook_decay: of the running means that the codes are.
        restart_after: steps without any vector after which a code is moved to one.
        discriminator_start: step at which the adversarial loss sets in; None for never.
        discriminator_weight: of the adversarial loss, which is also scaled to the gradient of the others.
        discriminator_channels: width of the discriminator's first layer.
        discriminator_layers: strided layers of the discriminator.
        clip_norm: gradients of the VQ-GAN are cut to this norm.
        precision: type to compute in; weights and the codebook are fp32 at any rate.
        compile: compile encoder and decoder.
        seed: of weights and of the order of frames.

    Raises:
        VQGANTrainingError: a value is out of range.

    Source: Esser et al. 2021 (losses and discriminator, hinge); van den Oord et al. 2017, appendix A.1 (running
    means); Dhariwal et al. 2020 (restarts). The motion weight is ours.
    """

    steps: int = 100_000
    batch_size: int = 8
    learning_rate: float = 1e-4
    warmup: float = 0.02
    pixel_weight: float = 1.0
    motion_weight: float = 1.0
    perceptual_weight: float = 1.0
    commitment: float = 0.25
    codebook_decay: float = 0.99
    restart_after: int = 200
    discriminator_start: int | None = 20_000
    discriminator_weight: float = 0.8
    discriminator_channels: int = 64
    discriminator_layers: int = 3
    clip_norm: float = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        whole = ("steps", "batch_size", "restart_after", "discriminator_channels", "discriminator_layers")
        for name in (*whole, "motion_weight"):
            if not getattr(self, name) >= 1:
                raise VQGANTrainingError(f"{name} is {getattr(self, name)}; allowed: 1 and above")
        for name in ("learning_rate", "clip_norm"):
            if not getattr(self, name) > 0:
                raise VQGANTrainingError(f"{name} is {getattr(self, name)}; allowed: above 0")
        for name in ("pixel_weight", "perceptual_weight", "commitment", "discriminator_weight"):
            if not getattr(self, name) >= 0:
                raise VQGANTrainingError(f"{name} is {getattr(self, name)}; allowed: 0 and above")
        for name in ("warmup", "codebook_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise VQGANTrainingError(f"{name} is {getattr(self, name)}; allowed: 0 up to, not including, 1")
        for name in ("discriminator_start", "seed"):
            if (getattr(self, name) or 0) < 0:
                raise VQGANTrainingError(f"{name} is {getattr(self, name)}; allowed: 0 and above")
        if self.precision not in ("fp32", "bf16"):
            raise VQGANTrainingError(f"precision is {self.precision!r}; allowed: 'fp32', 'bf16'")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


class Codebook(nn.Module):
    """The codes as running means of the vectors that are nearest to them.

    Args:
        embedding: the codes (C, E); changed in place.
        settings: decay and restarts.
        fresh: whether the codes mean nothing yet: then the first step puts all of them on vectors. Otherwise each
            begins as the mean of one vector, itself.
    """

    count: Tensor
    total: Tensor
    unused: Tensor

    def __init__(self, embedding: nn.Embedding, settings: VQGANTraining, *, fresh: bool = True) -> None:
        super().__init__()
        self.codes = [embedding.weight.requires_grad_(False)]  # in a list: they belong to the VQ-GAN's state
        self.settings = settings
        number, width = embedding.weight.shape
        self.register_buffer("count", torch.zeros(number) if fresh else torch.ones(number))
        self.register_buffer("total", torch.zeros(number, width) if fresh else embedding.weight.detach().clone())
        # Fresh ones count as unused, so that the first step puts them on vectors.
        self.register_buffer("unused", torch.full((number,), settings.restart_after if fresh else 0))

    @torch.no_grad()
    def follow(self, vectors: Tensor, accelerator: Accelerator, generator: torch.Generator) -> Tensor:
        """Assign vectors to codes, then move the codes after them.

        Args:
            vectors: (N, E) of this process.
            accelerator: adds up over processes.
            generator: chooses where codes restart; alike on all processes.

        Returns:
            (N,) codes as they were assigned.
        """
        codes, settings = self.codes[0], self.settings
        everything = accelerator.gather(vectors.float())
        waiting = torch.nonzero(self.unused >= settings.restart_after).flatten()
        if len(waiting):
            drawn = torch.randint(len(everything), (len(waiting),), generator=generator).to(vectors.device)
            # A little apart, where more codes restart than there are vectors.
            noise = torch.randn(len(waiting), vectors.shape[1], generator=generator).to(vectors.device)
            codes[waiting] = everything[drawn] + 0.01 * everything.std() * noise
            self.count[waiting], self.total[waiting] = 1.0, codes[waiting].clone()
            self.unused[waiting] = 0
        assigned = nearest_codes(vectors, codes, _POSITIONS_PER_CHUNK)
        everywhere = accelerator.gather(assigned)
        count = torch.bincount(everywhere, minlength=len(codes)).float()
        total = torch.zeros_like(codes).index_add_(0, everywhere, everything)
        self.count.lerp_(count, 1 - settings.codebook_decay)
        self.total.lerp_(total, 1 - settings.codebook_decay)
        self.unused = torch.where(count > 0, 0, self.unused + 1)
        seen = self.count > 1e-5
        codes[seen] = self.total[seen] / self.count[seen, None]
        return assigned


class VQGANTrainer:
    """Fits a VQ-GAN to frames.

    Args:
        vqgan: to be trained, in place; its weights are where training starts.
        settings: how.
        perceptual: (B, 3, H, W), (B, 3, H, W) in [-1, 1] → (B,) distances that gradients go through, such as
            `perceptual_loss` makes; None for none.
        fresh: whether `vqgan` was trained on nothing yet; the codes of one that was are kept.
        device: `cpu` to stay off a GPU that is there.

    Attributes:
        vqgan: the network.
        settings: how it is trained.
        step: steps done.

    Raises:
        VQGANTrainingError: the batch cannot be divided among the processes.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        settings: VQGANTraining,
        *,
        perceptual: nn.Module | None = None,
        fresh: bool = True,
        device: Literal["auto", "cpu"] = "auto",
    ) -> None:
        # Of the precision it is told nothing: that can only be chosen once for all trainers of a process.
        self.accelerator = Accelerator(cpu=device == "cpu")
        if settings.batch_size % self.accelerator.num_processes:
            raise VQGANTrainingError(
                f"batch_size is {settings.batch_size}; a multiple of {self.accelerator.num_processes}, the "
                "number of processes, is needed"
            )
        self.settings, self.step = settings, 0
        self.vqgan = vqgan.train().to(self.accelerator.device)
        self.codebook = Codebook(vqgan.quantize.embedding, settings, fresh=fresh).to(self.accelerator.device)
        self.perceptual = None if perceptual is None else perceptual.to(self.accelerator.device).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.discriminator = NLayerDiscriminator(
                vqgan.config.out_ch, settings.discriminator_channels, settings.discriminator_layers
            )
            self.discriminator.apply(weights_init)
        trained = [parameter for parameter in vqgan.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.Adam(trained, lr=settings.learning_rate, betas=(0.5, 0.9))
        self._generator: nn.Module = _Autoencoder(vqgan)
        self._judge: nn.Module = self.discriminator.to(self.accelerator.device)
        self._judge_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=settings.learning_rate, betas=(0.5, 0.9)
        )
        if settings.compile:
            vqgan.encoder.compile()
            vqgan.decoder.compile()
        if self.accelerator.num_processes > 1:
            on_gpu = self.accelerator.device.type == "cuda"
            devices = [self.accelerator.device] if on_gpu else None
            self._generator = DistributedDataParallel(self._generator, device_ids=devices)
            if on_gpu:  # on CPUs torch has none that synchronizes: each process normalizes by its own frames
                self._judge = nn.SyncBatchNorm.convert_sync_batchnorm(self._judge)
            self._judge = DistributedDataParallel(self._judge, device_ids=devices)

    def train(
        self,
        frames: Frames,
        *,
        moving: Masks | None = None,
        until: int | None = None,
        on_step: Callable[[int, dict[str, float]], None] = lambda step, losses: None,
    ) -> None:
        """Train up to a step.

        Args:
            frames: (H, W, 3) uint8 each, of one size; sides multiples of `vqgan.config.factor`. Anything with a
                length and an index, such as a memory-mapped array.
            moving: which pixels of each frame move; needed where `settings.motion_weight` is above 1, and else not
                looked at.
            until: number of the step to stop before; None for all of `settings.steps`.
            on_step: told the number of steps done, and the losses of the last by name, over all processes.

        Raises:
            VQGANTrainingError: no frames, masks that are missing or do not fit them, or the loss is not finite.
        """
        if len(frames) == 0:
            raise VQGANTrainingError("no frames; at least one is needed")
        if self.settings.motion_weight == 1:
            moving = None  # they would count as much as the others
        elif moving is None:
            raise VQGANTrainingError(
                f"motion_weight is {self.settings.motion_weight}, but which pixels move is not given; "
                "masks of them are needed"
            )
        else:
            _check_masks(moving, frames)
        sides, factor = frames[0].shape[:2], self.vqgan.config.factor
        if any(side % factor for side in sides):
            raise VQGANTrainingError(f"frames of {sides[1]} x {sides[0]} px; multiples of {factor} are needed")
        end = self.settings.steps if until is None else min(until, self.settings.steps)
        device = self.accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            while self.step < end:
                # For dropout, which takes torch's own random numbers; other ones on each process.
                torch.manual_seed(self._seed() * self.accelerator.num_processes + self.accelerator.process_index)
                chosen = self._chosen(len(frames))
                pixels = _to_pixels([frames[i] for i in chosen]).to(device)
                masks = None if moving is None else _to_masks([moving[i] for i in chosen]).to(device)
                losses = self._train_step(pixels, masks)
                self.step += 1
                on_step(self.step, losses)

    @torch.no_grad()
    def evaluate(self, frames: Frames, *, moving: Masks | None = None, batch_size: int = 8) -> dict[str, float]:
        """Reconstruct frames.

        Args:
            frames: (H, W, 3) uint8 each, of one size; sides multiples of `vqgan.config.factor`.
            moving: which pixels of each frame move; None if it is not known.
            batch_size: frames at once, which changes nothing but the memory taken.

        Returns:
            `l1` and `psnr` [dB] of pixel values cut to the range of images (PSNR of each frame, then the mean),
            `codes_used`, how many different codes occur, and `perplexity`, exp of the entropy of their
            frequencies. Where a pixel moves also `psnr_moving` [dB], of these pixels of all frames together.

        Raises:
            VQGANTrainingError: no frames, or masks that do not fit them.
        """
        if len(frames) == 0:
            raise VQGANTrainingError("no frames; at least one is needed")
        if moving is not None:
            _check_masks(moving, frames)
        self.vqgan.eval()
        absolute, decibels, counts = [], [], torch.zeros(self.vqgan.config.n_embed)
        squares = moved = 0.0
        for start in range(0, len(frames), batch_size):
            chosen = range(start, min(start + batch_size, len(frames)))
            pixels = _to_pixels([frames[i] for i in chosen])
            codes = self.vqgan.encode(pixels)
            error = (self.vqgan.decode(codes).cpu().clamp(-1, 1) - pixels) / 2
            absolute += error.abs().mean(dim=(1, 2, 3)).tolist()
            decibels += _decibels(error.square().mean(dim=(1, 2, 3))).tolist()
            if moving is not None:
                masks = _to_masks([moving[i] for i in chosen]).expand_as(error)
                squares += float(error[masks].double().square().sum())
                moved += float(masks.sum())
            counts += torch.bincount(codes.flatten().cpu(), minlength=len(counts))
        self.vqgan.train()
        share = counts[counts > 0] / counts.sum()
        of_moving = {"psnr_moving": float(_decibels(torch.tensor(squares / moved)))} if moved else {}
        return {
            "l1": float(np.mean(absolute)),
            "psnr": float(np.mean(decibels)),
            **of_moving,
            "codes_used": float((counts > 0).sum()),
            "perplexity": math.exp(float(-(share * share.log()).sum())),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything that training goes on from: one file, whole or not at all."""
        state = {
            "settings": self._identity(),
            "step": self.step,
            "vqgan": self.vqgan.state_dict(),
            "codebook": self.codebook.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "discriminator_optimizer": self._judge_optimizer.state_dict(),
        }
        with atomic_path(path) as draft, draft.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    def restore(self, path: str | os.PathLike[str]) -> None:
        """Go on from a file that `save` wrote.

        Raises:
            VQGANTrainingError: it was written under other settings, or is no such file.
        """
        state = _read(path, "a checkpoint of a VQ-GAN's training")
        saved = state.get("settings") if isinstance(state, dict) else None
        if not isinstance(saved, dict):
            raise VQGANTrainingError(f"{path} holds something else than a checkpoint of a VQ-GAN's training")
        saved = {"stem": 1, "motion_weight": 1.0, **saved}  # as it was when these were no settings yet
        other = [
            f"{name}: {saved.get(name)!r} there, {value!r} here"
            for name, value in self._identity().items()
            if saved.get(name) != value
        ]
        if other:
            raise VQGANTrainingError(f"{path} was written under other settings: {'; '.join(other)}")
        self.vqgan.load_state_dict(state["vqgan"])
        self.codebook.load_state_dict(state["codebook"])
        self.discriminator.load_state_dict(state["discriminator"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._judge_optimizer.load_state_dict(state["discriminator_optimizer"])
        self.step = state["step"]

    def _identity(self) -> dict[str, Any]:
        """What a run must not change on its way, by name."""
        perceptual = {"perceptual": self.perceptual is not None}
        return {**dataclasses.asdict(self.settings), **dataclasses.asdict(self.vqgan.config), **perceptual}

    def _seed(self) -> int:
        return self.settings.seed * 1_000_003 + self.step

    def _autocast(self) -> torch.autocast:
        device, enabled = self.accelerator.device.type, self.settings.precision == "bf16"
        return torch.autocast(device, torch.bfloat16, enabled=enabled)

    def _chosen(self, count: int) -> list[int]:
        """The share of this process in the frames of the step; in each round every one of `count` comes once."""
        size, share = self.settings.batch_size, self.settings.batch_size // self.accelerator.num_processes
        first = self.step * size + self.accelerator.process_index * share
        places = [divmod(place, count) for place in range(first, first + share)]
        return [int(self._order(epoch, count)[index]) for epoch, index in places]

    def _order(self, epoch: int, count: int) -> NDArray[np.int64]:
        key = epoch, count
        if getattr(self, "_known_order", (None, None))[0] != key:
            seeds = np.random.SeedSequence((self.settings.seed, epoch))
            self._known_order = key, np.random.default_rng(seeds).permutation(count)
        return self._known_order[1]

    def _train_step(self, pixels: Tensor, moving: Tensor | None) -> dict[str, float]:
        settings, accelerator = self.settings, self.accelerator
        chance = torch.Generator().manual_seed(self._seed())
        adversarial = settings.discriminator_start is not None and self.step >= settings.discriminator_start
        for optimizer in (self._optimizer, self._judge_optimizer):
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(self.step)

        with self._autocast():
            drawn, commitment = self._generator(
                pixels, lambda vectors: self.codebook.follow(vectors, accelerator, chance)
            )
        drawn = drawn.float()
        difference = (drawn - pixels).abs()
        parts = {"l1": difference.mean(), "commitment": commitment}
        pixel_loss = parts["l1"]
        if moving is not None:
            # Not divided by the sum of the weights: the background counts as much as ever, and the mean over
            # processes is that of all their frames, however much moves in the share of each.
            weights = torch.where(moving, settings.motion_weight, 1.0)  # (B, 1, H, W)
            parts["weighted_l1"] = pixel_loss = (weights * difference).mean()
        loss = settings.pixel_weight * pixel_loss + settings.commitment * commitment
        if self.perceptual is not None:
            parts["perceptual"] = self.perceptual(drawn, pixels).mean()
            loss = loss + settings.perceptual_weight * parts["perceptual"]
        if adversarial:
            with self._autocast():
                parts["adversarial"] = -self._judge(drawn).float().mean()
            last = self.vqgan.decoder.conv_out.weight
            own = torch.autograd.grad(loss, last, retain_graph=True)[0].norm()
            others = torch.autograd.grad(parts["adversarial"], last, retain_graph=True)[0].norm()
            scale = (own / (others + 1e-4)).clamp(0, 1e4).detach()
            loss = loss + settings.discriminator_weight * scale * parts["adversarial"]
        if not torch.isfinite(loss):
            shown = ", ".join(f"{name} {value.item():.4g}" for name, value in parts.items())
            raise VQGANTrainingError(f"the loss is {loss.item()} at step {self.step}: {shown}")
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.vqgan.parameters(), settings.clip_norm)
        self._optimizer.step()

        if adversarial:
            with self._autocast():
                real, made = self._judge(pixels).float(), self._judge(drawn.detach()).float()
            parts["discriminator"] = 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + made).mean())
            self._judge_optimizer.zero_grad()
            parts["discriminator"].backward()
            self._judge_optimizer.step()
        means = accelerator.reduce(torch.stack([value.detach() for value in parts.values()]), "mean")
        return dict(zip(parts, means.tolist(), strict=True))


def perceptual_loss(weights: str | os.PathLike[str], network: LPIPSNetwork = "vgg") -> nn.Module:
    """LPIPS on a network of ImageNet.

    Args:
        weights: torchvision's file of the network, such as `vgg16-397923af.pth`, or another file of its tensors by
            the same names; read without unpickling anything else. The linear layers come with the package `lpips`.
        network: `vgg` (VGG-16), `alex` (AlexNet) or `squeeze` (SqueezeNet 1.1).

    Raises:
        VQGANTrainingError: an unknown network, or the file holds another.
        ImportError: `lpips` is not installed.

    Source: Zhang et al. 2018.
    """
    from lpips import LPIPS

    if network not in _IMAGENET:
        raise VQGANTrainingError(f"network of LPIPS is {network!r}; allowed: {', '.join(map(repr, _IMAGENET))}")
    name = _IMAGENET[network]
    content = _read(weights, f"weights of {name}")
    found = content if isinstance(content, dict) else {}
    made = LPIPS(net=network, pnet_rand=True, verbose=False)
    own = made.net.state_dict()  # slice2.5.weight is features.5.weight of torchvision
    renamed = {key: f"features.{key.split('.', 1)[1]}" for key in own}
    wrong = [v for k, v in renamed.items() if getattr(found.get(v), "shape", None) != own[k].shape]
    if wrong:
        raise VQGANTrainingError(f"{weights} holds no {name}: {', '.join(wrong)} missing or of another shape")
    made.net.load_state_dict({key: found[source] for key, source in renamed.items()})
    return made.requires_grad_(False)


class _Autoencoder(nn.Module):
    """One pass through the VQ-GAN with gradients; a module, so that processes can share its gradients."""

    def __init__(self, vqgan: VQGAN) -> None:
        super().__init__()
        self.vqgan = vqgan

    def forward(self, pixels: Tensor, assign: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) → the same, reconstructed, and the commitment loss."""
        vqgan = self.vqgan
        z = vqgan.to_latents(pixels).float()  # (B, E, h, w)
        vectors = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (B·h·w, E)
        codes = assign(vectors.detach())
        chosen = functional.embedding(codes, vqgan.quantize.embedding.weight)
        commitment = functional.mse_loss(vectors, chosen)
        straight = vectors + (chosen - vectors).detach()  # gradients go past the choice
        straight = straight.view(z.shape[0], *z.shape[2:], z.shape[1]).permute(0, 3, 1, 2).contiguous()
        return vqgan.from_latents(straight), commitment


def _read(path: str | os.PathLike[str], what: str) -> Any:
    with Path(path).open("rb") as file:  # outside of what is caught: a file that is not there is told as such
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except _UNREADABLE as error:
            raise VQGANTrainingError(f"{path} is not {what}, or is damaged ({type(error).__name__})") from error


def _check_masks(masks: Masks, frames: Frames) -> None:
    if len(masks) != len(frames):
        raise VQGANTrainingError(
            f"{len(masks)} masks of moving pixels for {len(frames)} frames; one for each is needed"
        )
    found, needed = np.shape(masks[0]), np.shape(frames[0])[:2]
    if found != needed:
        raise VQGANTrainingError(f"masks of moving pixels have shape {found}; {needed} needed, as of the frames")


def _to_masks(masks: Sequence[NDArray[np.bool_] | NDArray[np.integer]]) -> Tensor:
    return torch.from_numpy(np.stack(masks)).unsqueeze(1) != 0  # (B, 1, H, W)


def _decibels(mean_square: Tensor) -> Tensor:
    """PSNR [dB] of errors whose range is 1; of none at all 100."""
    return -10 * mean_square.clamp(min=1e-10).log10()


def _to_pixels(frames: Sequence[NDArray[np.uint8]]) -> Tensor:
    # In order: of channels that come last, the gradients of group norms take several times as long on a CPU.
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).contiguous().float() / 255 * 2 - 1
