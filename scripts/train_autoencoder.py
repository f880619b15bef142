"""Train a KL autoencoder on a folder of pictures: reconstruction and KL, with a discriminator and LPIPS if wished.

    python scripts/train_autoencoder.py --config configs/microdoppler_small.yaml --data_dir DIR \\
        --logdir runs/autoencoder
    python scripts/train_autoencoder.py --data_dir DIR --discriminator_weight 0.5 --discriminator_start 5000 \\
        --use_perceptual_loss True --perceptual_path vgg16-397923af.pth

Held-out pictures (--val_data_dir) are measured beside every preview; the step with the best PSNR is kept, and a run
folder stands for it.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.runs import training
from guided_diffusion_vae.runs.flags import argparser, parse
from guided_diffusion_vae.runs.run import RunConfig, start_run, finish_run
from guided_diffusion_vae.train_util import AutoencoderTrainConfig
from guided_diffusion_vae.vae import AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig

CONFIGS = (DataConfig, AutoencoderConfig, AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig,
           AutoencoderTrainConfig, RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    data, autoencoder, loss, discriminator_config, perceptual, train, run = configs = parse(__doc__, *CONFIGS)
    folder = start_run(run, configs)

    training.train_autoencoder(run, folder, configs, data, autoencoder, loss, discriminator_config, perceptual, train)
    finish_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
