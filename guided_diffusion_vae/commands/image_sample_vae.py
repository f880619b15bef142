"""Sample latents and decode them; write samples_NxHxWxC.npz, PNG files and a contact sheet.

    python scripts/image_sample_vae.py --model_path runs/diffusion/ema_0.999_010000.pt
    mpiexec -n 2 python scripts/image_sample_vae.py --model_path ... --classes tapin,tapout \\
        --sampler dpmpp_sde --timestep_respacing logsnr20 --cfg_scale 2
    python scripts/image_sample_vae.py --model_path runs/diffusion --cfg_scale 1.5 \\
        --guide_model_path runs/diffusion/ema_0.999_002000.pt

A checkpoint contains its settings, and conflicting flags are an error. A bare state dict, such as one of
guided-diffusion, requires the model flags, --vae_path, --image_size and --normalizer. Rerun the same command to resume
an interrupted run."""

from ..runs import loading
from ..runs.configs import (
    ConditionConfig, DataConfig, DiffusionConfig, ModelConfig, NormalizerConfig, RunConfig, SamplingConfig,
    SpectrogramConfig, VAEConfig,
)
from ..runs.run import script, select_fields


@script(
    __doc__, SamplingConfig, VAEConfig, select_fields(NormalizerConfig, "normalizer"),
    select_fields(DataConfig, "image_size", "image_channels"),
    select_fields(ConditionConfig, "condition_dir"), ModelConfig, DiffusionConfig,
    SpectrogramConfig, RunConfig, samples=True,
)
def main(run):
    sampler = loading.load_sampler(run, scale=run[NormalizerConfig])
    loading.sample(run, sampler)


create_argparser = main.argparser
