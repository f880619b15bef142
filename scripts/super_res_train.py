"""Train an upsampler: a diffusion model that makes large pictures of small ones, in pixels or between latent grids.

    mpiexec -n 2 python scripts/super_res_train.py --data_dir DIR --large_size 256 --small_size 64
    mpiexec -n 2 python scripts/super_res_train.py --data_dir DIR --vae_path runs/autoencoder --large_size 256 \\
        --small_size 64 --channel_mult 1,2,3,4 --cond_noise_steps 250
    mpiexec -n 2 python scripts/super_res_train.py --cache_dir latents_cache/large --small_cache_dir latents_cache/small

Small pictures are averaged from large ones, or read from a second cache of the same pictures.
"""

import dataclasses

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig, SmallCacheConfig
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import LatentConfig
from guided_diffusion_vae.runs import spaces, training
from guided_diffusion_vae.runs.flags import argparser, parse_explicit, drop_fields
from guided_diffusion_vae.runs.run import RunConfig, start_run, finish_run
from guided_diffusion_vae.train_util import DiffusionTrainConfig
from guided_diffusion_vae.unet import ModelConfig, SuperResConfig
from guided_diffusion_vae.vae_wrapper import NormalizerConfig, VAEConfig

CONFIGS = (SuperResConfig, drop_fields(DataConfig, "image_size"), LatentConfig, SmallCacheConfig,
           NormalizerConfig, VAEConfig, ModelConfig, DiffusionConfig, DiffusionTrainConfig, RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    super_res, data, latents, small_latents, scale, vae, model, process, train, run = configs
    folder = start_run(run, configs)

    if "voxel_size" not in given:
        data = dataclasses.replace(data, image_size=super_res.large_size)
    sized = {**given, "image_size": super_res.large_size} if data.data_dir else given
    source, space = spaces.open_data(latents, vae, scale, data, sized, train.seed, folder)
    small = spaces.open_low_res(source, space, super_res.small_size, small_latents.small_cache_dir, given)
    super_res = spaces.infer_sizes(super_res, source, small, given)
    training.train_diffusion(
        "super_res_train", run, folder, configs, source, space, model, process, train, super_res, small
    )
    finish_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
