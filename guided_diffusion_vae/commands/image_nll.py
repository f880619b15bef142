"""Compute the variational bound on the likelihood of held-out data under a diffusion model.

    python scripts/image_nll.py --model_path runs/pixels --data_dir DIR/val
    mpiexec -n 2 python scripts/image_nll.py --model_path runs/diffusion --cache_dir latents_cache/val

For pixels the unit is bits per dimension, as in guided-diffusion. For latents the bound is a density in nats per latent
dimension. It does not bound the likelihood of images, so the two values cannot be compared."""

import dataclasses

from ..evaluation import likelihood
from ..runs import loading, spaces
from ..runs.configs import (
    DataConfig, DiffusionConfig, LatentConfig, LikelihoodConfig, ModelConfig, RunConfig, VAEConfig,
)
from ..runs.run import script, select_fields


@script(
    __doc__, LikelihoodConfig, DataConfig, select_fields(LatentConfig, "cache_dir"), VAEConfig, ModelConfig,
    DiffusionConfig, RunConfig,
)
def main(run):
    network, diffusion, data = loading.load_model_and_data(run)
    spaces.log_source(data.source)
    if run.dry_run:
        return
    config = run[LikelihoodConfig]
    # Clipping is the default of guided-diffusion; latents are clipped only on request.
    clip = config.clip_denoised and (data.space.is_pixels or "clip_denoised" in run.explicit)
    config = dataclasses.replace(config, clip_denoised=clip)
    run.write_report(likelihood(network, diffusion, data, config, run.folder))


create_argparser = main.argparser
