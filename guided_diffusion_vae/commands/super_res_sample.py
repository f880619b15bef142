"""Upsample low-resolution samples with a diffusion model, in pixels or between latent grids.

    python scripts/super_res_sample.py --model_path runs/upsampler --base_samples runs/samples/samples_64x64x64x3.npz \\
        --num_samples 64 --timestep_respacing 250
    mpiexec -n 2 python scripts/super_res_sample.py $MODEL_FLAGS --large_size 256 --small_size 64 \\
        --model_path 64_256_upsampler.pt --base_samples 64_samples.npz --timestep_respacing 250"""

from ..runs import loading
from ..runs.configs import (
    BaseConfig, DataConfig, DiffusionConfig, ModelConfig, PixelSamplingConfig, RunConfig, SpectrogramConfig,
    SuperResConfig, VAEConfig,
)
from ..runs.run import script, select_fields


@script(
    __doc__, PixelSamplingConfig, BaseConfig, SuperResConfig, select_fields(DataConfig, "image_channels"), VAEConfig,
    ModelConfig, DiffusionConfig, SpectrogramConfig, RunConfig, samples=True,
)
def main(run):
    sampler = loading.load_sampler(run, base=run[BaseConfig])
    loading.sample(run, sampler)


create_argparser = main.argparser
