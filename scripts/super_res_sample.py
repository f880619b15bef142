"""Make large pictures of small samples with an upsampler; in pixels or between latent grids.

    python scripts/super_res_sample.py --model_path runs/upsampler --base_samples runs/samples/samples_64x64x64x3.npz \\
        --num_samples 64 --timestep_respacing 250
    mpiexec -n 2 python scripts/super_res_sample.py $MODEL_FLAGS --large_size 256 --small_size 64 \\
        --model_path 64_256_upsampler.pt --base_samples 64_samples.npz --timestep_respacing 250
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import loading
from guided_diffusion_vae.runs.flags import argparser, parse_explicit, select_fields
from guided_diffusion_vae.runs.run import RunConfig, start_run
from guided_diffusion_vae.sampling.sampler import BaseConfig, PixelSamplingConfig
from guided_diffusion_vae.unet import ModelConfig, SuperResConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig

CONFIGS = (PixelSamplingConfig, BaseConfig, SuperResConfig, select_fields(DataConfig, "image_channels"),
           VAEConfig, ModelConfig, DiffusionConfig, RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    config, base, super_res, data, vae, model, process, run = configs
    folder = start_run(run, configs)

    sampler = loading.load_sampler(config, given, model, process, data, vae, super_res=(base, super_res))
    loading.sample(sampler, config, folder, run)


if __name__ == "__main__":
    dist_util.launch(main)
