"""Measure how likely a diffusion model finds held-out data: the variational bound.

    python scripts/image_nll.py --model_path runs/pixels --data_dir DIR/val
    mpiexec -n 2 python scripts/image_nll.py --model_path runs/diffusion --cache_dir latents_cache/val

Of pictures it is given in bits per dimension, as guided-diffusion does. Of latents it is a density, given in nats per
latent dimension; it says nothing of pictures, and the two must not be compared.
"""

from guided_diffusion_vae import dist_util, evaluation, loading, script_util, spaces
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.latent_datasets import LatentConfig
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig

CONFIGS = (evaluation.LikelihoodConfig, DataConfig, script_util.part_of(LatentConfig, "cache_dir"), VAEConfig,
           ModelConfig, DiffusionConfig, script_util.RunConfig)


def create_argparser():
    return script_util.argparser(__doc__, *CONFIGS)


def main():
    configs, given = script_util.parse_given(__doc__, *CONFIGS)
    config, data, latents, vae, model, process, run = configs
    folder = script_util.begin_run(run, configs)

    network, diffusion, source, space, labels = loading.load_with_data(
        config, given, model, process, data, latents, vae
    )
    spaces.say_source(source)
    if run.dry_run:
        return
    clip = config.clip_denoised if space.is_pixels or "clip_denoised" in given else False
    report = evaluation.likelihood(network, diffusion, source, space, labels, clip, config, folder)
    script_util.print_report(report)
    script_util.end_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
