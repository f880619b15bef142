"""Measure how likely a diffusion model finds held-out data: the variational bound.

    python scripts/image_nll.py --model_path runs/pixels --data_dir DIR/val
    mpiexec -n 2 python scripts/image_nll.py --model_path runs/diffusion --cache_dir latents_cache/val

Of pictures it is given in bits per dimension, as guided-diffusion does. Of latents it is a density, given in nats per
latent dimension; it says nothing of pictures, and the two must not be compared.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.evaluation import likelihood
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.latent_datasets import LatentConfig
from guided_diffusion_vae.runs import loading, spaces
from guided_diffusion_vae.runs.flags import argparser, parse_explicit, select_fields
from guided_diffusion_vae.runs.run import RunConfig, start_run, finish_run, print_report
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig

CONFIGS = (likelihood.LikelihoodConfig, DataConfig, select_fields(LatentConfig, "cache_dir"), VAEConfig,
           ModelConfig, DiffusionConfig, RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    config, data, latents, vae, model, process, run = configs
    folder = start_run(run, configs)

    network, diffusion, source, space, labels = loading.load_model_and_data(
        config, given, model, process, data, latents, vae
    )
    spaces.log_source(source)
    if run.dry_run:
        return
    clip = config.clip_denoised if space.is_pixels or "clip_denoised" in given else False
    report = likelihood.likelihood(network, diffusion, source, space, labels, clip, config, folder)
    print_report(report)
    finish_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
