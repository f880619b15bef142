"""Train an upsampler (a super-resolution diffusion model), in pixels or between latent grids.

    mpiexec -n 2 python scripts/super_res_train.py --data_dir DIR --large_size 256 --small_size 64
    mpiexec -n 2 python scripts/super_res_train.py --data_dir DIR --vae_path runs/autoencoder --large_size 256 \\
        --small_size 64 --channel_mult 1,2,3,4 --cond_noise_steps 250
    mpiexec -n 2 python scripts/super_res_train.py --cache_dir latents_cache/large \\
        --low_res_cache_dir latents_cache/small

Low-resolution images are downsampled from the high-resolution ones, or read from a second cache of the same images."""

import dataclasses

from ..runs import spaces, training
from ..runs.configs import (
    DataConfig, DiffusionConfig, DiffusionTrainConfig, LatentConfig, ModelConfig, NormalizerConfig, RunConfig,
    SmallCacheConfig, SuperResConfig, VAEConfig,
)
from ..runs.run import drop_fields, script


@script(
    __doc__, SuperResConfig, drop_fields(DataConfig, "image_size"), LatentConfig, SmallCacheConfig, NormalizerConfig,
    VAEConfig, ModelConfig, DiffusionConfig, DiffusionTrainConfig, RunConfig, trains=True,
)
def main(run):
    data = dataclasses.replace(run[DataConfig], image_size=run[SuperResConfig].large_size)
    run = run.override(data, **({"image_size": data.image_size} if data.data_dir else {}))
    source, space = spaces.open_data(run)
    low_res = spaces.open_low_res(run, source, space)
    super_res = spaces.infer_sizes(run, source, low_res)
    training.train_diffusion(run, source, space, super_res, low_res)


create_argparser = main.argparser
