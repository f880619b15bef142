"""Train a diffusion model on latents: from a cache, or from pictures that an autoencoder encodes on the fly.

    mpiexec -n 2 python scripts/image_train_vae.py --config configs/microdoppler_small.yaml \\
        --cache_dir latents_cache/NAME
    mpiexec -n 2 python scripts/image_train_vae.py --config ... --data_dir DIR --vae_path runs/autoencoder
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import LatentConfig
from guided_diffusion_vae.runs import spaces, training
from guided_diffusion_vae.runs.flags import argparser, parse_explicit
from guided_diffusion_vae.runs.run import RunConfig, start_run, finish_run
from guided_diffusion_vae.train_util import DiffusionTrainConfig
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import NormalizerConfig, VAEConfig

CONFIGS = (LatentConfig, NormalizerConfig, VAEConfig, DataConfig, ModelConfig, DiffusionConfig, DiffusionTrainConfig,
           RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    latents, scale, vae, data, model, process, train, run = configs
    folder = start_run(run, configs)

    source, codec = spaces.open_latent_source(latents, vae, data, given, train.seed, folder)
    space = spaces.Space(codec, spaces.fit_normalizer(scale, source))
    training.train_diffusion("image_train_vae", run, folder, configs, source, space, model, process, train)
    finish_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
