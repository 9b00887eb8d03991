"""Training of a VQ-GAN in processes of its own, which may be several.

python vqgan_training_work.py FILE SETTINGS     also under torch.distributed.run; each process writes FILE.<rank>
"""

import json
import sys

import numpy as np
import torch

from worldvla_tokenizers.vqgan import VQGAN, VQGANConfig
from worldvla_tokenizers.vqgan_training import VQGANTrainer, VQGANTraining, VQGANTrainingError

TINY = VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, embed_dim=8, n_embed=16)


def train(file, options):
    # In fp64: sums in another order would otherwise choose another code of two that are nearly as near.
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # frames are brought to fp32
    frames = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    frames = frames.repeat(4, axis=1).repeat(4, axis=2)  # blocks of 4 px
    moving = np.random.default_rng(1).random((10, 16, 16)) < np.linspace(0, 1, 10)[:, None, None]
    refused = None
    if torch.distributed.is_torchelastic_launched():
        try:
            VQGANTrainer(VQGAN(TINY), VQGANTraining(**{**options, "batch_size": 3}), device="cpu").train(
                frames, moving=moving
            )
        except VQGANTrainingError as error:
            refused = str(error)
    torch.manual_seed(0)
    trainer = VQGANTrainer(VQGAN(TINY), VQGANTraining(**options), device="cpu")
    assert {tensor.dtype for tensor in trainer.vqgan.parameters()} == {torch.float64}
    losses = []
    trainer.train(frames, moving=moving, until=5, on_step=lambda step, values: losses.append(values))
    early = trainer.vqgan.quantize.embedding.weight.detach().clone()
    trainer.train(frames, moving=moving, on_step=lambda step, values: losses.append(values))
    found = {
        "processes": trainer.accelerator.num_processes,
        "refused": refused,
        "losses": losses,
        "early_codes": early,
        "codes": trainer.vqgan.quantize.embedding.weight,
        "weights": torch.cat([parameter.detach().flatten() for parameter in trainer.vqgan.parameters()]),
        "judge": torch.cat([parameter.detach().flatten() for parameter in trainer.discriminator.parameters()]),
    }
    torch.save(found, f"{file}.{trainer.accelerator.process_index}")


if __name__ == "__main__":
    train(sys.argv[1], json.loads(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
