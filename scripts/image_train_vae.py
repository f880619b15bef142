"""Train a diffusion model on latents: from a cache, or from pictures that an autoencoder encodes on the fly.

    mpiexec -n 2 python scripts/image_train_vae.py --config configs/microdoppler_small.yaml \\
        --cache_dir latents_cache/NAME
    mpiexec -n 2 python scripts/image_train_vae.py --config ... --data_dir DIR --vae_path runs/autoencoder
"""

from guided_diffusion_vae import dist_util, script_util
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.image_datasets import BatchPlan, DataConfig
from guided_diffusion_vae.latent_datasets import LatentConfig, LatentStream
from guided_diffusion_vae.previews import SamplePreview
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.train_util import DiffusionTrainConfig, TrainLoop, seed_weights
from guided_diffusion_vae.unet import ModelConfig
from guided_diffusion_vae.vae_wrapper import NormalizerConfig, VAEConfig

CONFIGS = (LatentConfig, NormalizerConfig, VAEConfig, DataConfig, ModelConfig, DiffusionConfig, DiffusionTrainConfig,
           script_util.RunConfig)


def create_argparser():
    return script_util.argparser(__doc__, *CONFIGS)


def main():
    configs, given = script_util.parse_given(__doc__, *CONFIGS)
    latents, scale, vae, data, model_flags, process, train, run = configs
    folder = script_util.begin_run(run, configs)

    source, codec = script_util.open_source(latents, vae, data, given, train.seed, dist_util.dev(), folder)
    script_util.say_source(source)
    normalizer = script_util.fit_normalizer(scale, source)
    model_flags = script_util.with_classes(model_flags, source)
    seed_weights(train.seed)
    model, diffusion = script_util.create_model_and_diffusion_vae(source.latent_shape, model_flags, process)
    plan = BatchPlan(source.count, train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    script_util.say(plan.summary())
    if run.dry_run:
        one = script_util.one_sample(source.latent_shape, model_flags)
        return script_util.print_model_size(model, one, train.batch_size)

    header = script_util.diffusion_header(source, codec, normalizer, model_flags, process)
    loop = TrainLoop(
        model=model.to(dist_util.dev()), diffusion=diffusion, header=header, use_fp16=model_flags.use_fp16,
        schedule_sampler=create_named_schedule_sampler(train.schedule_sampler, diffusion),
        data=LatentStream(source, normalizer, plan, train.seed, dist_util.dev(), model_flags.class_cond),
        preview=codec and SamplePreview(script_util.preview_sampler(model, codec, header), folder, dist_util.dev()),
        **script_util.loop_arguments(train, "schedule_sampler"),
    )
    script_util.write_config(folder, "image_train_vae", configs, header)
    loop.run_loop()
    script_util.end_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
