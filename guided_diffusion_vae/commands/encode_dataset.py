"""Encode a folder of images into a latent cache, on all ranks in parallel.

    mpiexec -n 2 python scripts/encode_dataset.py --vae_path runs/autoencoder --data_dir DIR \\
        --cache_dir latents_cache/NAME

Rerun the same command to resume an interrupted encoding."""

from .. import dist_util
from ..data.cache_writer import write_cache
from ..logger import log_rank0, progress_bar
from ..runs import spaces
from ..runs.configs import DataConfig, LatentCacheConfig, VAEConfig
from ..runs.run import script
from ..vae_wrapper import create_vae


@script(__doc__, VAEConfig, DataConfig, LatentCacheConfig)
def main(run):
    codec = create_vae(run[VAEConfig], dist_util.dev())
    images = spaces.open_images(run[DataConfig], run.explicit, codec)
    log_rank0(images.summary())

    config = run[LatentCacheConfig]
    with progress_bar(None, 0, "encoding") as bar:
        cache = write_cache(images, codec, config, (dist_util.rank(), dist_util.world_size()), bar.advance_to,
                            dist_util.barrier)
    spaces.log_source(cache)


create_argparser = main.argparser
