"""Sample from a diffusion model, pulled towards classes by a classifier of noisy data; in pixels or in latents.

    python scripts/classifier_sample.py --model_path runs/diffusion --classifier_path runs/noisy_classifier \\
        --classifier_scale 2 --num_samples 64 --timestep_respacing 250
    mpiexec -n 2 python scripts/classifier_sample.py $MODEL_FLAGS $CLASSIFIER_FLAGS --model_path 256x256_diffusion.pt \\
        --classifier_path 256x256_classifier.pt --classifier_scale 1 --timestep_respacing 250

Both models of this project describe themselves and must work on the same x0 (pictures, or latents of one autoencoder);
those of guided-diffusion are described by the flags. The diffusion model need not know classes.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import loading
from guided_diffusion_vae.runs.flags import argparser, parse_explicit, select_fields
from guided_diffusion_vae.runs.run import RunConfig, start_run
from guided_diffusion_vae.sampling.guidance import GuidanceConfig
from guided_diffusion_vae.sampling.sampler import PixelSamplingConfig
from guided_diffusion_vae.unet import ClassifierConfig, ModelConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig

CONFIGS = (PixelSamplingConfig, GuidanceConfig, select_fields(DataConfig, "image_size", "image_channels"),
           VAEConfig, ModelConfig, ClassifierConfig, DiffusionConfig, RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    config, guidance, data, vae, model, classifier, process, run = configs
    folder = start_run(run, configs)

    sampler = loading.load_sampler(
        config, given, model, process, data, vae, guidance=guidance, classifier=classifier
    )
    loading.sample(sampler, config, folder, run)


if __name__ == "__main__":
    dist_util.launch(main)
