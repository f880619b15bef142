"""Sample from a diffusion model of pixels; write samples_NxHxWxC.npz, PNG files and a contact sheet.

    python scripts/image_sample.py --model_path runs/pixels --num_samples 64 --timestep_respacing 250
    MODEL_FLAGS="--attention_resolutions 32,16,8 --class_cond True --image_size 64 --learn_sigma True ..."
    mpiexec -n 2 python scripts/image_sample.py $MODEL_FLAGS --model_path 64x64_diffusion.pt --timestep_respacing 250

Checkpoints of this project contain their settings; those of guided-diffusion require the model flags. Rerun the same
command to resume an interrupted run."""

from ..runs import loading
from ..runs.configs import (
    ConditionConfig, DataConfig, DiffusionConfig, ModelConfig, PixelSamplingConfig, RunConfig, SpectrogramConfig,
    VAEConfig,
)
from ..runs.run import script, select_fields


@script(
    __doc__, PixelSamplingConfig, select_fields(DataConfig, "image_size", "image_channels"),
    select_fields(ConditionConfig, "condition_dir"), VAEConfig, ModelConfig, DiffusionConfig,
    SpectrogramConfig, RunConfig, samples=True,
)
def main(run):
    loading.sample(run, loading.load_sampler(run))


create_argparser = main.argparser
