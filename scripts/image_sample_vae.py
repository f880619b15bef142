"""Sample latents from a diffusion model, decode them, and write samples_NxHxWxC.npz, PNG files and a contact sheet.

    python scripts/image_sample_vae.py --model_path runs/diffusion/ema_0.999_010000.pt
    mpiexec -n 2 python scripts/image_sample_vae.py --model_path ... --classes tapin,tapout \\
        --timestep_respacing ddim50 --use_ddim True

The model file carries its own description; flags that contradict it are refused. A bare state dict, such as one of
guided-diffusion, is described by the flags of its model, and needs --vae_path, --image_size and --normalizer as well.
"""

from guided_diffusion_vae import dist_util, sampling, script_util
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import NormalizerConfig, VAEConfig

CONFIGS = (sampling.SamplingConfig, VAEConfig, script_util.part_of(NormalizerConfig, "normalizer"),
           script_util.part_of(DataConfig, "image_size", "image_channels"), ModelConfig, DiffusionConfig,
           script_util.RunConfig)


def create_argparser():
    return script_util.argparser(__doc__, *CONFIGS)


def main():
    configs, given = script_util.parse_given(__doc__, *CONFIGS)
    config, run = configs[0], configs[-1]
    folder = script_util.begin_run(run, configs)

    sampler = script_util.load_sampler(configs, given, dist_util.dev())
    classes = sampling.parse_classes(config.classes, sampler.num_classes, sampler.class_names)
    script_util.say(sampler.summary())
    if run.dry_run:
        return

    images, labels = sampling.draw(sampler, classes, config, dist_util.dev())
    if dist_util.rank() == 0:
        path = sampling.write_samples(folder, images, labels, classes, sampler.class_names)
        script_util.say(f"saved {len(images)} samples to {path}")
    script_util.end_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
