"""Training of a VQ-GAN in processes of its own, which may be several.

python vqgan_training_work.py FILE SETTINGS     under torch.distributed.run; each process writes FILE.<rank>
"""

import json
import sys

import numpy as np
import torch

from worldvla_tokenizers.vqgan import VQGAN, VQGANConfig
from worldvla_tokenizers.vqgan_training import VQGANTrainer, VQGANTraining

TINY = VQGANConfig(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=8, embed_dim=8, n_embed=16)


def train(file, options):
    torch.manual_seed(0)
    trainer = VQGANTrainer(VQGAN(TINY), VQGANTraining(**options), device="cpu")
    frames = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), dtype=np.uint8)
    frames = frames.repeat(4, axis=1).repeat(4, axis=2)  # blocks of 4 px
    losses = []
    trainer.train(frames, on_step=lambda step, values: losses.append(values))
    found = {
        "processes": trainer.accelerator.num_processes,
        "losses": losses,
        "codes": trainer.vqgan.quantize.embedding.weight,
        "weights": torch.cat([parameter.detach().flatten() for parameter in trainer.vqgan.parameters()]),
        "judge": torch.cat([parameter.detach().flatten() for parameter in trainer.discriminator.parameters()]),
    }
    torch.save(found, f"{file}.{trainer.accelerator.process_index}")


if __name__ == "__main__":
    train(sys.argv[1], json.loads(sys.argv[2]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
