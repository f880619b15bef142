"""Train a diffusion model on latents, read from a cache or encoded from images on the fly.

    mpiexec -n 2 python scripts/image_train_vae.py --config configs/microdoppler_small.yaml \\
        --cache_dir latents_cache/NAME
    mpiexec -n 2 python scripts/image_train_vae.py --config ... --data_dir DIR --vae_path runs/autoencoder
    python scripts/image_train_vae.py --config ... --cache_dir latents_cache/NAME --process rectified_flow \\
        --schedule_sampler logit-normal"""

from ..runs.configs import (
    ConditionConfig, DataConfig, DiffusionConfig, DiffusionTrainConfig, LatentConfig, ModelConfig, NormalizerConfig,
    RunConfig, VAEConfig,
)
from ..runs.run import script
from ..runs.spaces import open_latent_data
from ..runs.training import train_diffusion


@script(
    __doc__, LatentConfig, NormalizerConfig, VAEConfig, DataConfig, ConditionConfig, ModelConfig, DiffusionConfig,
    DiffusionTrainConfig, RunConfig, trains=True,
)
def main(run):
    train_diffusion(run, *open_latent_data(run))


create_argparser = main.argparser
