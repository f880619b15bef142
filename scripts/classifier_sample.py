"""Sample from a diffusion model, pulled towards classes by a classifier of noisy data; in pixels or in latents.

    python scripts/classifier_sample.py --model_path runs/diffusion --classifier_path runs/noisy_classifier \\
        --classifier_scale 2 --num_samples 64 --timestep_respacing 250
    mpiexec -n 2 python scripts/classifier_sample.py $MODEL_FLAGS $CLASSIFIER_FLAGS --model_path 256x256_diffusion.pt \\
        --classifier_path 256x256_classifier.pt --classifier_scale 1 --timestep_respacing 250

Both models of this project describe themselves and must work on the same x0 (pictures, or latents of one autoencoder);
those of guided-diffusion are described by the flags. The diffusion model need not know classes."""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.runs import loading
from guided_diffusion_vae.runs.configs import (
    ClassifierConfig, DataConfig, DiffusionConfig, GuidanceConfig, ModelConfig, PixelSamplingConfig, RunConfig,
    VAEConfig,
)
from guided_diffusion_vae.runs.run import script, select_fields


@script(
    __doc__, PixelSamplingConfig, GuidanceConfig, select_fields(DataConfig, "image_size", "image_channels"), VAEConfig,
    ModelConfig, ClassifierConfig, DiffusionConfig, RunConfig,
)
def main(run):
    sampler = loading.load_sampler(run, guidance=run[GuidanceConfig])
    loading.sample(run, sampler)


create_argparser = main.argparser

if __name__ == "__main__":
    dist_util.launch(main)
