"""Sample pictures from a diffusion model and write samples_NxHxWxC.npz, PNG files and a contact sheet.

    python scripts/image_sample.py --model_path runs/pixels --num_samples 64 --timestep_respacing 250
    MODEL_FLAGS="--attention_resolutions 32,16,8 --class_cond True --image_size 64 --learn_sigma True ..."
    mpiexec -n 2 python scripts/image_sample.py $MODEL_FLAGS --model_path 64x64_diffusion.pt --timestep_respacing 250

A model of this project describes itself; one of guided-diffusion is described by the flags. An interrupted sampling
goes on where it stopped.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import loading
from guided_diffusion_vae.runs.flags import argparser, parse_explicit, select_fields
from guided_diffusion_vae.runs.run import RunConfig, start_run
from guided_diffusion_vae.sampling.sampler import PixelSamplingConfig
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig

CONFIGS = (PixelSamplingConfig, select_fields(DataConfig, "image_size", "image_channels"), VAEConfig, ModelConfig,
           DiffusionConfig, RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    config, data, vae, model, process, run = configs
    folder = start_run(run, configs)

    sampler = loading.load_sampler(config, given, model, process, data, vae)
    loading.sample(sampler, config, folder, run)


if __name__ == "__main__":
    dist_util.launch(main)
