"""Sample from a diffusion model with classifier guidance, in pixels or in latents.

    python scripts/classifier_sample.py --model_path runs/diffusion --classifier_path runs/noisy_classifier \\
        --classifier_scale 2 --num_samples 64 --timestep_respacing 250
    mpiexec -n 2 python scripts/classifier_sample.py $MODEL_FLAGS $CLASSIFIER_FLAGS --model_path 256x256_diffusion.pt \\
        --classifier_path 256x256_classifier.pt --classifier_scale 1 --timestep_respacing 250

The classifier must be trained on noised data. Checkpoints of this project contain their settings; those of
guided-diffusion require the model flags. Both models must use the same x0: pixels, or latents of one autoencoder. The
diffusion model may be unconditional."""

from ..runs import loading
from ..runs.configs import (
    ClassifierConfig, ConditionConfig, DataConfig, DiffusionConfig, GuidanceConfig, ModelConfig, PixelSamplingConfig,
    RunConfig, SpectrogramConfig, VAEConfig,
)
from ..runs.run import script, select_fields


@script(
    __doc__, PixelSamplingConfig, GuidanceConfig, select_fields(DataConfig, "image_size", "image_channels"),
    select_fields(ConditionConfig, "condition_dir"), VAEConfig, ModelConfig, ClassifierConfig, DiffusionConfig,
    SpectrogramConfig, RunConfig, samples=True,
)
def main(run):
    sampler = loading.load_sampler(run, guidance=run[GuidanceConfig])
    loading.sample(run, sampler)


create_argparser = main.argparser
