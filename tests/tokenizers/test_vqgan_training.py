"""Training of the VQ-GAN: codebook, learning, resuming, checkpoints, measuring and several processes."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from worldvla_tokenizers import vqgan_training as module
from worldvla_tokenizers.vqgan import VQGAN, VQGANConfig
from worldvla_tokenizers.vqgan_training import (
    Codebook,
    VQGANTrainer,
    VQGANTraining,
    VQGANTrainingError,
    perceptual_loss,
)

TINY = VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, embed_dim=8, n_embed=16)
FOLDED = VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, embed_dim=8, n_embed=16, stem=4)
COLOURS = np.array([[220, 40, 40], [40, 200, 60], [40, 60, 210], [240, 220, 60]], np.uint8)
VGG_CHANNELS = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256)}
VGG_CHANNELS |= {14: (256, 256), 17: (256, 512), **dict.fromkeys((19, 21, 24, 26, 28), (512, 512))}


def squares(count: int, size: int = 8) -> np.ndarray:
    """A coloured square on grey, elsewhere in each frame."""
    rng = np.random.default_rng(0)
    frames = np.full((count, size, size, 3), 230, np.uint8)
    for i, frame in enumerate(frames):
        top, left = 2 * rng.integers(0, size // 4, 2)
        frame[top : top + size // 2, left : left + size // 2] = COLOURS[i % len(COLOURS)]
    return frames


def moving_square(count: int, size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """A bright square on noise that stays: frames, and which of their pixels are those of the square."""
    rng = np.random.default_rng(1)
    frames = np.repeat(rng.integers(0, 160, (1, size, size, 3), dtype=np.uint8), count, axis=0)
    masks = np.zeros(frames.shape[:3], bool)
    for mask in masks:
        top, left = rng.integers(0, size - size // 4, 2)
        mask[top : top + size // 4, left : left + size // 4] = True
    frames[masks] = 255, 240, 200
    return frames, masks


def make(topology: VQGANConfig = TINY, perceptual: nn.Module | None = None, **options) -> VQGANTrainer:
    torch.manual_seed(0)
    usual = {
        "steps": 8,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "discriminator_start": None,
        "discriminator_channels": 8,
        "discriminator_layers": 1,
        "restart_after": 2,
    }
    settings = VQGANTraining(**{**usual, **options})
    return VQGANTrainer(VQGAN(topology), settings, perceptual=perceptual, device="cpu")


def train(
    trainer: VQGANTrainer, frames: object, until: int | None = None, moving: object = None
) -> list[tuple[int, dict[str, float]]]:
    told = []
    trainer.train(frames, moving=moving, until=until, on_step=lambda step, losses: told.append((step, losses)))
    return told


class Recorder:
    """Frames that remember which of them were asked for."""

    def __init__(self, frames: np.ndarray) -> None:
        self.frames, self.asked = frames, []

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> np.ndarray:
        self.asked.append(index)
        return self.frames[index]


class SquaredError(nn.Module):
    def forward(self, drawn: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
        return (drawn - true).square().mean(dim=(1, 2, 3))


# --- settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("steps", 0, "steps is 0; allowed: 1 and above"),
        ("batch_size", -2, "batch_size is -2; allowed: 1 and above"),
        ("restart_after", 0, "restart_after is 0; allowed: 1 and above"),
        ("discriminator_channels", 0, "discriminator_channels is 0; allowed: 1 and above"),
        ("discriminator_layers", 0, "discriminator_layers is 0; allowed: 1 and above"),
        ("motion_weight", 0.5, "motion_weight is 0.5; allowed: 1 and above"),
        ("motion_weight", math.nan, "motion_weight is nan; allowed: 1 and above"),
        ("learning_rate", 0.0, "learning_rate is 0.0; allowed: above 0"),
        ("learning_rate", math.nan, "learning_rate is nan; allowed: above 0"),
        ("clip_norm", -1.0, "clip_norm is -1.0; allowed: above 0"),
        ("pixel_weight", -0.5, "pixel_weight is -0.5; allowed: 0 and above"),
        ("perceptual_weight", math.nan, "perceptual_weight is nan; allowed: 0 and above"),
        ("commitment", -1.0, "commitment is -1.0; allowed: 0 and above"),
        ("discriminator_weight", -1.0, "discriminator_weight is -1.0; allowed: 0 and above"),
        ("warmup", 1.0, "warmup is 1.0; allowed: 0 up to, not including, 1"),
        ("codebook_decay", -0.1, "codebook_decay is -0.1; allowed: 0 up to, not including, 1"),
        ("discriminator_start", -1, "discriminator_start is -1; allowed: 0 and above"),
        ("seed", -3, "seed is -3; allowed: 0 and above"),
        ("precision", "fp16", "precision is 'fp16'; allowed: 'fp32', 'bf16'"),
    ],
)
def test_settings_out_of_range(field, value, message):
    with pytest.raises(VQGANTrainingError) as caught:
        VQGANTraining(**{field: value})
    assert str(caught.value) == message


def test_learning_rate_rises_and_then_falls_along_a_cosine():
    settings = VQGANTraining(steps=100, learning_rate=2.0, warmup=0.1)
    rates = [settings.rate(step) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11))
    np.testing.assert_allclose(rates[10:], 1 + np.cos(np.pi * np.arange(90) / 90))
    assert 0 < rates[-1] < 0.001
    assert settings.rate(100) == pytest.approx(0)
    assert VQGANTraining(steps=100, learning_rate=2.0, warmup=0).rate(0) == 2.0


def test_the_learning_rate_is_that_of_the_step():
    """Adam's first step moves every weight by the learning rate, whatever the gradient."""
    trainer = make(steps=10, learning_rate=0.01, warmup=0.5)
    before = trainer.vqgan.decoder.conv_out.bias.detach().clone()
    train(trainer, squares(2), until=1)
    moved = (trainer.vqgan.decoder.conv_out.bias.detach() - before).abs()
    np.testing.assert_allclose(moved, 0.01 / 5, rtol=1e-3)


# --- the codebook -----------------------------------------------------------------------------------------------


def codebook(codes: np.ndarray, **options) -> Codebook:
    """A codebook whose codes are where they belong: none of them waits for a restart."""
    embedding = nn.Embedding.from_pretrained(torch.tensor(codes, dtype=torch.float32), freeze=False)
    made = Codebook(embedding, VQGANTraining(**options))
    made.unused.zero_()
    made.count.fill_(1.0)
    made.total.copy_(made.codes[0])
    return made


def follow(book: Codebook, vectors: np.ndarray, seed: int = 0) -> list[int]:
    tensor = torch.tensor(vectors, dtype=torch.float32)
    return book.follow(tensor, Accelerator(cpu=True), torch.Generator().manual_seed(seed)).tolist()


def test_codes_are_the_running_means_of_their_vectors():
    """Against k-means with exponential means, in NumPy, in fp64."""
    rng = np.random.default_rng(0)
    codes, decay = rng.normal(size=(5, 3)), 0.8
    book = codebook(codes, codebook_decay=decay, restart_after=1_000)
    count, total = np.ones(5), codes.copy()
    for _ in range(6):
        vectors = rng.normal(size=(40, 3))
        nearest = ((vectors[:, None] - codes[None]) ** 2).sum(-1).argmin(1)
        for i in range(5):
            mine = vectors[nearest == i]
            count[i] = decay * count[i] + (1 - decay) * len(mine)
            total[i] = decay * total[i] + (1 - decay) * mine.sum(axis=0)
        codes = total / count[:, None]
        assert follow(book, vectors) == nearest.tolist()
        np.testing.assert_allclose(book.codes[0], codes, atol=1e-5)
    np.testing.assert_allclose(book.count, count, atol=1e-4)


def test_an_unused_code_moves_to_a_vector_and_used_ones_stay():
    rng = np.random.default_rng(1)
    book = codebook(np.array([[0.0] * 4, [10.0] * 4, [100.0] * 4]), codebook_decay=0.9, restart_after=3)

    def batch() -> np.ndarray:
        return np.concatenate([rng.normal(scale=0.1, size=(6, 4)), rng.normal(10, 0.1, size=(6, 4))])

    for step in range(1, 4):
        follow(book, batch())
        assert book.unused.tolist() == [0, 0, step]
        np.testing.assert_allclose(book.codes[0][2], 100.0, rtol=1e-5)
    vectors = batch()
    follow(book, vectors)
    codes = book.codes[0].numpy()
    assert np.linalg.norm(vectors - codes[2], axis=1).min() < 0.5
    assert np.abs(codes[0]).max() < 0.5
    assert np.abs(codes[1] - 10).max() < 0.5
    assert book.unused[2] <= 1


def test_the_first_step_puts_all_codes_on_vectors_but_not_on_each_other():
    vectors = np.random.default_rng(2).normal(50, 5, size=(6, 8))
    embedding = nn.Embedding(10, 8)  # more codes than vectors
    book = Codebook(embedding, VQGANTraining(codebook_decay=0.99))
    follow(book, vectors)
    distances = np.linalg.norm(book.codes[0].numpy()[:, None] - vectors[None], axis=-1)
    assert distances.min(axis=1).max() < 1  # vectors are about 20 apart
    assert len(set(distances.argmin(axis=1).tolist())) > 1
    assert len(book.codes[0].unique(dim=0)) == 10
    assert book.codes[0] is embedding.weight
    assert not embedding.weight.requires_grad


def test_codes_that_mean_something_already_stay_where_they_are():
    """Far from each other and from vectors: only those that vectors are nearest to move, and little."""
    codes = 100 * torch.eye(4, 8)
    book = Codebook(nn.Embedding.from_pretrained(codes.clone()), VQGANTraining(restart_after=3), fresh=False)
    assert follow(book, codes[[1, 1, 2]].numpy() + 1) == [1, 1, 2]
    assert torch.equal(book.codes[0][[0, 3]], codes[[0, 3]])
    assert (book.codes[0] - codes).abs().max() < 0.05  # of 1, by a decay of 0.99
    assert book.unused.tolist() == [1, 0, 0, 1]


@pytest.fixture(scope="module")
def learned() -> tuple[VQGANTrainer, np.ndarray, dict, list[tuple[int, dict[str, float]]]]:
    """A trained VQ-GAN, its frames, what was measured on them before, and what training told; to be read only."""
    trainer, frames = make(steps=60, codebook_decay=0.9, restart_after=10), squares(8, 32)
    before = trainer.evaluate(frames)
    return trainer, frames, before, train(trainer, frames)


def test_training_goes_on_from_the_codes_of_another(learned):
    """A trained VQ-GAN draws in its first step as well as before; with its codes thrown away it does not."""
    first, frames, *_ = learned
    error = first.evaluate(frames)["l1"]
    found = {}
    for fresh in (True, False):
        again = VQGANTrainer(
            copy.deepcopy(first.vqgan), VQGANTraining(steps=10, batch_size=8), fresh=fresh, device="cpu"
        )
        before = again.vqgan.quantize.embedding.weight.clone()
        ((_, losses),) = train(again, frames, until=1)
        moved = (again.vqgan.quantize.embedding.weight - before).abs().mean() / before.abs().mean()
        found[fresh] = losses["l1"] / 2, moved.item()
    assert found[False][0] == pytest.approx(error, rel=0.05)
    assert found[False][1] < 0.1 * found[True][1]


def test_where_codes_restart_depends_on_the_generator_alone():
    vectors = np.random.default_rng(3).normal(size=(20, 8))
    found = []
    for seed in (4, 4, 5):
        torch.manual_seed(len(found))
        book = Codebook(nn.Embedding(10, 8), VQGANTraining())
        follow(book, vectors, seed)
        found.append(book.codes[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# --- training ---------------------------------------------------------------------------------------------------


def test_it_learns_to_draw(learned):
    trainer, frames, before, told = learned
    losses = [losses["l1"] for _, losses in told]
    assert np.mean(losses[-5:]) < 0.4 * np.mean(losses[:5])
    after = trainer.evaluate(frames)
    assert after["l1"] < 0.4 * before["l1"]
    assert after["psnr"] > before["psnr"] + 3
    assert after["codes_used"] > 8


def test_it_learns_to_draw_behind_a_stem():
    trainer, frames = make(FOLDED, steps=40, codebook_decay=0.9, restart_after=10), squares(8, 32)
    before = trainer.evaluate(frames)
    train(trainer, frames)
    after = trainer.evaluate(frames)
    assert after["psnr"] > before["psnr"] + 3
    assert after["codes_used"] > 8


def test_gradients_go_past_the_choice_of_codes_to_the_encoder():
    trainer = make(commitment=0.0)
    codes = trainer.vqgan.quantize.embedding.weight
    train(trainer, squares(2), until=1)
    assert trainer.vqgan.encoder.conv_in.weight.grad.abs().sum() > 0
    assert trainer.vqgan.quant_conv.weight.grad.abs().sum() > 0
    assert codes.grad is None
    assert codes is trainer.codebook.codes[0]


def test_a_perceptual_loss_may_be_any_module():
    measure = SquaredError()
    runs = {}
    cases = (("none", None, 1.0), ("zero", measure, 0.0), ("weak", measure, 0.1), ("alone", measure, 1.0))
    for name, perceptual, weight in cases:
        options = {"pixel_weight": 0.0, "commitment": 0.0} if name == "alone" else {}
        trainer = make(perceptual=perceptual, perceptual_weight=weight, **options)
        before = trainer.vqgan.encoder.conv_in.weight.detach().clone()
        told = train(trainer, squares(4), until=2)
        assert not torch.equal(trainer.vqgan.encoder.conv_in.weight, before)
        runs[name] = told, trainer.vqgan.encoder.conv_in.weight.detach()
    assert set(runs["none"][0][0][1]) == {"l1", "commitment"}
    assert set(runs["weak"][0][0][1]) == {"l1", "commitment", "perceptual"}
    assert 0 < runs["weak"][0][0][1]["perceptual"] == runs["alone"][0][0][1]["perceptual"]
    assert torch.equal(runs["none"][1], runs["zero"][1])
    assert not torch.equal(runs["none"][1], runs["weak"][1])
    assert not measure.training


def test_the_discriminator_starts_when_it_is_told_to():
    trainer = make(discriminator_start=2)
    fresh = {name: tensor.clone() for name, tensor in trainer.discriminator.state_dict().items()}
    told = train(trainer, squares(4), until=2)
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in trainer.discriminator.state_dict().items())
    told += train(trainer, squares(4), until=4)
    assert [set(losses) for _, losses in told] == [{"l1", "commitment"}] * 2 + [
        {"l1", "commitment", "adversarial", "discriminator"}
    ] * 2
    learned = [name for name, p in trainer.discriminator.named_parameters() if not torch.equal(p, fresh[name])]
    assert {"main.0.weight", "main.2.weight", "main.5.weight"} <= set(learned)


def test_in_bf16_weights_and_codes_stay_in_fp32_beside_a_trainer_of_another_precision():
    half, full = make(precision="bf16", discriminator_start=0), make(discriminator_start=0)
    found = [train(trainer, squares(4), until=2)[-1][1] for trainer in (half, full)]
    assert all(tensor.dtype == torch.float32 for tensor in half.vqgan.state_dict().values())
    assert found[0] != found[1]
    assert found[0]["l1"] == pytest.approx(found[1]["l1"], rel=0.05)


def test_every_frame_comes_once_in_each_round():
    trainer, frames = make(steps=10, seed=3), Recorder(squares(5))
    train(trainer, frames)
    asked = frames.asked[1:]  # after a look at the size
    rounds = [asked[place : place + 5] for place in range(0, 20, 5)]
    assert all(sorted(frames) == list(range(5)) for frames in rounds)
    assert len(set(map(tuple, rounds))) > 1

    other, seen = make(steps=10, seed=4), Recorder(frames.frames)
    train(other, seen)
    assert seen.asked != frames.asked

    later, seen = make(steps=10, seed=3), Recorder(frames.frames)
    later.step = 7
    train(later, seen, until=9)
    assert seen.asked[1:] == asked[14:18]


def test_frames_may_be_a_list_or_an_array():
    frames = squares(4)
    expected, found = (make(steps=3) for _ in range(2))
    assert train(expected, frames) == train(found, list(frames))


def test_training_leaves_the_random_numbers_of_others_alone():
    trainer = make(steps=2)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(trainer, squares(2))
    assert torch.equal(torch.rand(3), expected)


def test_a_loss_that_is_not_finite_stops():
    trainer = make()
    train(trainer, squares(2), until=3)
    with torch.no_grad():
        trainer.vqgan.decoder.conv_out.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(VQGANTrainingError, match=r"the loss is nan at step 3: l1 nan, commitment \d"):
        train(trainer, squares(2))
    assert trainer.step == 3


def test_without_frames_there_is_nothing_to_do():
    with pytest.raises(VQGANTrainingError, match="no frames; at least one is needed"):
        make().train([])
    with pytest.raises(VQGANTrainingError, match="no frames; at least one is needed"):
        make().evaluate([])


# --- what moves -------------------------------------------------------------------------------------------------


def test_what_moves_is_drawn_better_the_more_it_weighs():
    frames, masks = moving_square(8)
    found = {}
    for weight in (1.0, 5.0):
        trainer = make(FOLDED, steps=40, motion_weight=weight, codebook_decay=0.9, restart_after=10)
        train(trainer, frames, moving=masks)
        found[weight] = trainer.evaluate(frames, moving=masks)
    assert found[5.0]["psnr_moving"] > found[1.0]["psnr_moving"] + 3
    assert found[5.0]["l1"] > found[1.0]["l1"]  # that is its price


def test_a_weighted_pixel_counts_so_many_times():
    frames, masks = moving_square(2, 8)
    first = {}
    for name, moving in {"some": masks, "others": ~masks, "all": masks | True, "none": masks & False}.items():
        ((_, first[name]),) = train(make(motion_weight=5.0), frames, until=1, moving=moving)
        assert first[name]["l1"] == first["some"]["l1"]
    weighted = {name: losses["weighted_l1"] for name, losses in first.items()}
    assert weighted["none"] == first["none"]["l1"]
    assert weighted["all"] == pytest.approx(5 * first["all"]["l1"])
    assert weighted["some"] + weighted["others"] == pytest.approx(6 * first["some"]["l1"])
    assert weighted["others"] > weighted["some"] > weighted["none"]


def test_alike_weights_and_nothing_that_moves_are_training_as_ever_to_the_last_bit():
    frames, masks = moving_square(4, 8)
    plain, alike, still = make(steps=4), make(steps=4), make(steps=4, motion_weight=5.0)
    expected = train(plain, frames)
    assert {name for _, losses in expected for name in losses} == {"l1", "commitment"}
    assert train(alike, frames, moving=masks) == expected
    told = train(still, frames, moving=masks & False)
    assert [{**losses, "weighted_l1": losses["l1"]} for _, losses in expected] == [losses for _, losses in told]
    wanted = state(plain)
    for trainer in (alike, still):
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in state(trainer).items())


def test_masks_may_be_numbers_and_a_list():
    frames, masks = moving_square(4, 8)
    expected, found = (make(steps=3, motion_weight=4.0) for _ in range(2))
    told = train(expected, frames, moving=masks)
    assert train(found, frames, moving=[mask.astype(np.uint8) for mask in masks]) == told
    assert found.evaluate(frames, moving=list(masks * 1)) == expected.evaluate(frames, moving=masks)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.zeros((3, 8, 8), bool), "3 masks of moving pixels for 2 frames; one for each is needed"),
        (np.zeros((2, 8, 4), bool), r"masks of moving pixels have shape \(8, 4\); \(8, 8\) needed"),
        (np.zeros((2, 8, 8, 3), bool), r"have shape \(8, 8, 3\); \(8, 8\) needed"),
    ],
)
def test_masks_that_do_not_fit_the_frames(masks, message):
    trainer = make(motion_weight=2.0)
    with pytest.raises(VQGANTrainingError, match=message):
        train(trainer, squares(2), moving=masks)
    with pytest.raises(VQGANTrainingError, match=message):
        trainer.evaluate(squares(2), moving=masks)
    assert trainer.step == 0


def test_a_motion_weight_without_masks():
    with pytest.raises(VQGANTrainingError, match=r"motion_weight is 2\.0, but which pixels move is not given"):
        train(make(motion_weight=2.0), squares(2))


# --- checkpoints ------------------------------------------------------------------------------------------------


def state(trainer: VQGANTrainer) -> dict[str, torch.Tensor]:
    parts = {"vqgan": trainer.vqgan, "codebook": trainer.codebook, "discriminator": trainer.discriminator}
    return {
        f"{part}.{name}": tensor
        for part, network in parts.items()
        for name, tensor in network.state_dict().items()
    }


@pytest.mark.parametrize(
    ("start", "dropout", "weight"), [(None, 0.0, 1.0), (None, 0.2, 4.0), (2, 0.0, 4.0), (2, 0.2, 1.0)]
)
def test_resumed_training_is_the_same_to_the_last_bit(tmp_path, start, dropout, weight):
    topology = VQGANConfig(**{**vars(TINY), "dropout": dropout})
    frames, masks = moving_square(5, 8)
    whole = make(topology, discriminator_start=start, motion_weight=weight)
    expected = train(whole, frames, moving=masks)
    half = make(topology, discriminator_start=start, motion_weight=weight)
    told = train(half, frames, until=4, moving=masks)
    half.save(tmp_path / "checkpoint.pt")
    torch.rand(5)

    rest = make(topology, discriminator_start=start, motion_weight=weight)
    with torch.no_grad():
        for tensor in state(rest).values():
            tensor.zero_()
    rest.restore(tmp_path / "checkpoint.pt")
    assert rest.step == 4
    told += train(rest, frames, moving=masks)
    assert told == expected
    assert [step for step, _ in told] == list(range(1, 9))
    wanted, found = state(whole), state(rest)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    assert rest.codebook.codes[0] is rest.vqgan.quantize.embedding.weight


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("training") / "checkpoint.pt"
    trainer = make(discriminator_start=0)
    train(trainer, squares(2), until=1)
    trainer.save(path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.5}, "learning_rate: 0.002 there, 0.5 here"),
        ({"steps": 9, "seed": 1}, "steps: 8 there, 9 here; seed: 0 there, 1 here"),
        ({"discriminator_start": None}, "discriminator_start: 0 there, None here"),
        ({"topology": VQGANConfig(**{**vars(TINY), "n_embed": 32})}, "n_embed: 16 there, 32 here"),
        (
            {"topology": VQGANConfig(**{**vars(TINY), "ch_mult": (1, 1, 1)})},
            r"ch_mult: \(1, 1\) there, \(1, 1, 1\) here",
        ),
        ({"topology": VQGANConfig(**{**vars(TINY), "stem": 2})}, "stem: 1 there, 2 here"),
        ({"motion_weight": 3.0}, "motion_weight: 1.0 there, 3.0 here"),
        ({"perceptual": SquaredError()}, "perceptual: False there, True here"),
    ],
)
def test_other_settings_do_not_go_on(checkpoint, changes, message):
    trainer = make(**{"discriminator_start": 0, **changes})
    before = {name: tensor.clone() for name, tensor in state(trainer).items()}
    with pytest.raises(VQGANTrainingError, match=f"written under other settings: {message}$") as caught:
        trainer.restore(checkpoint)
    assert str(checkpoint) in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(trainer).items())
    assert trainer.step == 0


def test_a_checkpoint_of_before_there_were_stems_and_weights_goes_on_without(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    for name in ("stem", "motion_weight"):
        del content["settings"][name]
    torch.save(content, tmp_path / "old.pt")
    trainer = make(discriminator_start=0)
    trainer.restore(tmp_path / "old.pt")
    assert trainer.step == 1
    with pytest.raises(VQGANTrainingError, match=r"settings: motion_weight: 1\.0 there, 2\.0 here$"):
        make(discriminator_start=0, motion_weight=2.0).restore(tmp_path / "old.pt")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_checkpoint(checkpoint, tmp_path, share):
    content = checkpoint.read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: int(share * len(content))])
    with pytest.raises(VQGANTrainingError, match=r"half\.pt is not a checkpoint .*, or is damaged"):
        make().restore(tmp_path / "half.pt")


@pytest.mark.parametrize("content", [torch.zeros(3), [1], {"state_dict": {}}, {"settings": 1}])
def test_torch_files_of_another_kind(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(VQGANTrainingError, match=r"other\.pt holds something else than a checkpoint"):
        make().restore(tmp_path / "other.pt")


def test_a_file_that_is_not_torch_s_and_none_at_all(tmp_path):
    for content in (b"short", b"\x00" * 100, b'{"settings": {}}\n'):
        (tmp_path / "text.pt").write_bytes(content)
        with pytest.raises(VQGANTrainingError, match=r"text\.pt is not a checkpoint"):
            make().restore(tmp_path / "text.pt")
    with pytest.raises(FileNotFoundError):
        make().restore(tmp_path / "absent.pt")


class _Attack:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_a_pickle_that_would_run_code_is_refused_without_running_it(checkpoint, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    torch.save({**content, "extra": _Attack(tmp_path / "pwned")}, tmp_path / "bad.pt")
    with pytest.raises(VQGANTrainingError, match=r"bad\.pt is not a checkpoint"):
        make(discriminator_start=0).restore(tmp_path / "bad.pt")
    assert not (tmp_path / "pwned").exists()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, trainer = tmp_path / "checkpoint.pt", make()
    trainer.save(path)
    old = path.read_bytes()

    def full(content, file):
        file.write(b"half of it")
        raise OSError("disk full")

    monkeypatch.setattr(module.torch, "save", full)
    with pytest.raises(OSError, match="disk full"):
        trainer.save(path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


# --- measuring --------------------------------------------------------------------------------------------------


def test_measures_are_those_of_the_decoded_images():
    trainer, (frames, masks) = make(), moving_square(5, 8)
    train(trainer, frames, until=3)
    measured = trainer.evaluate(frames, moving=masks, batch_size=2)
    assert trainer.vqgan.training
    absolute, decibels, codes, moved = [], [], [], []
    for frame, mask in zip(frames, masks, strict=True):
        pixels = torch.tensor(frame).permute(2, 0, 1)[None] / 255 * 2 - 1
        codes.append(trainer.vqgan.encode(pixels).numpy().ravel())
        drawn = trainer.vqgan.decode(torch.tensor(codes[-1]).view(1, 4, 4))[0].permute(1, 2, 0).numpy()
        error = (np.clip(drawn.astype(np.float64), -1, 1) + 1) / 2 - frame / 255
        absolute.append(np.abs(error).mean())
        decibels.append(10 * np.log10(1 / (error**2).mean()))
        moved.append(error[mask])
    share = np.bincount(np.concatenate(codes)) / 80
    share = share[share > 0]
    assert measured == pytest.approx(
        {
            "l1": np.mean(absolute),
            "psnr": np.mean(decibels),
            "psnr_moving": 10 * np.log10(1 / (np.concatenate(moved) ** 2).mean()),
            "codes_used": len(share),
            "perplexity": np.exp(-(share * np.log(share)).sum()),
        },
        rel=1e-4,
    )
    others = {name: value for name, value in measured.items() if name != "psnr_moving"}
    for moving in (None, masks & False):
        assert trainer.evaluate(frames, moving=moving, batch_size=2) == others


def test_codes_are_counted_over_all_frames(monkeypatch):
    trainer, frames = make(), squares(3, 4)

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[[0, 0], [0, 5]]]).expand(len(pixels), 2, 2)

    monkeypatch.setattr(trainer.vqgan, "encode", encode)
    found = trainer.evaluate(frames, batch_size=2)
    assert found["codes_used"] == 2
    assert found["perplexity"] == pytest.approx(4 / 3**0.75)  # of shares 3/4 and 1/4
    monkeypatch.setattr(trainer.vqgan, "encode", lambda pixels: torch.arange(4).view(1, 2, 2) * 5)
    found = trainer.evaluate(frames, batch_size=1)
    assert found["codes_used"] == 4
    assert found["perplexity"] == pytest.approx(4)


def test_a_perfect_image_has_a_finite_psnr(monkeypatch):
    trainer, frames = make(), squares(2, 4)
    pixels = torch.tensor(frames).permute(0, 3, 1, 2) / 255 * 2 - 1
    monkeypatch.setattr(trainer.vqgan, "decode", lambda codes: pixels)
    found = trainer.evaluate(frames)
    assert (found["l1"], found["psnr"]) == (0, pytest.approx(100))


# --- the perceptual loss ----------------------------------------------------------------------------------------


def vgg(path: Path, **changes: torch.Tensor | None) -> Path:
    """Random weights of VGG-16 by torchvision's names, with a layer of the classifier, which is not needed."""
    generator, tensors = torch.Generator().manual_seed(0), {"classifier.6.bias": torch.zeros(1_000)}
    for place, (inside, outside) in VGG_CHANNELS.items():
        weight = torch.randn(outside, inside, 3, 3, generator=generator) * (2 / (9 * inside)) ** 0.5
        tensors |= {f"features.{place}.weight": weight, f"features.{place}.bias": torch.zeros(outside)}
    tensors = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
    torch.save(tensors, path)
    return path


def test_perceptual_loss_is_lpips_on_the_weights_given(tmp_path):
    network = perceptual_loss(vgg(tmp_path / "vgg.pth"))
    weight = torch.load(tmp_path / "vgg.pth", weights_only=True)["features.19.weight"]
    assert sum(torch.equal(parameter, weight) for parameter in network.parameters()) == 1
    assert not any(parameter.requires_grad for parameter in network.parameters())
    drawn = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    true = torch.rand(2, 3, 32, 32) * 2 - 1
    distances = network(drawn, true)
    assert distances.numel() == 2
    assert (distances > 0).all()
    distances.sum().backward()
    assert (drawn.grad.abs().amax(dim=(1, 2, 3)) > 0).all()
    assert network(true, true).abs().max() < 1e-6
    told = train(make(perceptual=network), squares(2, 32), until=1)
    assert told[0][1]["perceptual"] > 0


def test_files_without_vgg_are_refused(tmp_path):
    absent = {"features.5.weight": None, "features.28.bias": torch.zeros(3)}
    with pytest.raises(VQGANTrainingError) as caught:
        perceptual_loss(vgg(tmp_path / "vgg.pth", **absent))
    message = "vgg.pth holds no VGG-16: features.5.weight, features.28.bias missing or of another shape"
    assert message in str(caught.value)
    (tmp_path / "vgg.pth").write_bytes(b"short")
    with pytest.raises(VQGANTrainingError, match=r"vgg\.pth is not weights of VGG-16, or is damaged"):
        perceptual_loss(tmp_path / "vgg.pth")


# --- several processes ------------------------------------------------------------------------------------------


def work(folder: Path, processes: int, **settings) -> list[dict]:
    script, out = Path(__file__).with_name("vqgan_training_work.py"), folder / f"{processes}"
    usual = {
        "steps": 8,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "restart_after": 2,
        "discriminator_channels": 8,
        "discriminator_layers": 2,
    }
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher = launcher if processes > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(script), str(out), json.dumps({**usual, **settings})],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1"},
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4_000:]
    found = [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(processes)]
    assert all(each["processes"] == processes for each in found)
    return found


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path):
    """Up to where the discriminator starts: each normalizes by its own frames, but they must be one network.

    Of what moves there is more in the frames of one than of the other.
    """
    (one,) = work(tmp_path, 1, discriminator_start=5, motion_weight=6.0)
    two = work(tmp_path, 2, discriminator_start=5, motion_weight=6.0)
    for each in two:
        assert len(each["losses"]) == 8
        for losses, expected in zip(each["losses"][:5], one["losses"], strict=False):
            assert "discriminator" not in losses
            assert losses == pytest.approx(expected, rel=1e-5)
        assert each["refused"].startswith("batch_size is 3; a multiple of 2, the number of processes")
        torch.testing.assert_close(each["early_codes"], one["early_codes"], rtol=1e-4, atol=1e-5)
    assert "discriminator" in two[0]["losses"][5]
    assert two[0]["losses"] == two[1]["losses"]
    for name in ("codes", "weights", "judge"):
        assert torch.equal(two[0][name], two[1][name])
