"""Sample latents from a diffusion model, decode them, and write samples_NxHxWxC.npz, PNG files and a contact sheet.

    python scripts/image_sample_vae.py --model_path runs/diffusion/ema_0.999_010000.pt
    mpiexec -n 2 python scripts/image_sample_vae.py --model_path ... --classes tapin,tapout \\
        --sampler dpmpp_sde --timestep_respacing logsnr20 --cfg_scale 2

The model file carries its own description; flags that contradict it are refused. A bare state dict, such as one of
guided-diffusion, is described by the flags of its model, and needs --vae_path, --image_size and --normalizer as well.
An interrupted sampling goes on where it stopped.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import loading
from guided_diffusion_vae.runs.flags import argparser, parse_explicit, select_fields
from guided_diffusion_vae.runs.run import RunConfig, start_run
from guided_diffusion_vae.sampling.sampler import SamplingConfig
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import NormalizerConfig, VAEConfig

CONFIGS = (SamplingConfig, VAEConfig, select_fields(NormalizerConfig, "normalizer"),
           select_fields(DataConfig, "image_size", "image_channels"), ModelConfig, DiffusionConfig,
           RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    config, vae, scale, data, model, process, run = configs
    folder = start_run(run, configs)

    sampler = loading.load_sampler(config, given, model, process, data, vae, scale)
    loading.sample(sampler, config, folder, run)


if __name__ == "__main__":
    dist_util.launch(main)
