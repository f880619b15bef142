"""Encode a folder of pictures into a latent cache, all ranks at once; interrupted, the same command goes on.

    mpiexec -n 2 python scripts/encode_dataset.py --vae_path runs/autoencoder --data_dir DIR \\
        --cache_dir latents_cache/NAME
"""

from guided_diffusion_vae import dist_util, logger
from guided_diffusion_vae.data.cache_writer import LatentCacheConfig, write_cache
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.logger import progress_bar
from guided_diffusion_vae.runs import spaces
from guided_diffusion_vae.runs.flags import argparser, parse_explicit
from guided_diffusion_vae.vae_wrapper import VAEConfig, create_vae

CONFIGS = (VAEConfig, DataConfig, LatentCacheConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    vae, data, config = configs
    dist_util.setup_dist()

    codec = create_vae(vae, dist_util.dev())
    pictures = spaces.open_images(data, given, codec)
    logger.log_rank0(pictures.summary())

    with progress_bar(None, 0, "encoding") as bar:
        cache = write_cache(config.cache_dir, pictures, codec, config, dist_util.rank(), dist_util.world_size(),
                            bar.advance_to, dist_util.barrier)
    spaces.log_source(cache)


if __name__ == "__main__":
    dist_util.launch(main)
