"""Train a classifier of noised data, to guide sampling, or of clean data (--noised False), to judge samples.

    mpiexec -n 2 python scripts/classifier_train.py --data_dir DIR/train --val_data_dir DIR/val --iterations 3000
    python scripts/classifier_train.py --cache_dir latents_cache/NAME --classifier_channel_mult 1,2,2 --iterations 3000
    python scripts/classifier_train.py --data_dir DIR/train --val_data_dir DIR/val --noised False --iterations 2000 \\
        --classifier_width 32 --classifier_attention_resolutions 8 --batch_size 32

It reads pictures, or latents where --cache_dir or --vae_path is given: those of the diffusion model it shall guide.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import LatentConfig
from guided_diffusion_vae.runs import spaces, training
from guided_diffusion_vae.runs.flags import argparser, parse_explicit
from guided_diffusion_vae.runs.run import RunConfig, start_run, finish_run
from guided_diffusion_vae.train_util import ClassifierTrainConfig
from guided_diffusion_vae.unet import ClassifierConfig
from guided_diffusion_vae.vae_wrapper import NormalizerConfig, VAEConfig

CONFIGS = (DataConfig, LatentConfig, NormalizerConfig, VAEConfig, ClassifierConfig, DiffusionConfig,
           ClassifierTrainConfig, RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    data, latents, scale, vae, flags, process, train, run = configs
    folder = start_run(run, configs)

    source, space = spaces.open_data(latents, vae, scale, data, given, train.seed, folder)
    training.train_classifier(run, folder, configs, given, source, space, data, flags, process, train)
    finish_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
