"""Reconstruct EMA weights of any length from the snapshots of a training with --ema_profiles.

    python scripts/image_train_vae.py --cache_dir latents_cache/NAME --ema_profiles 0.05,0.10 --logdir runs/diffusion
    python scripts/reconstruct_ema.py --model_path runs/diffusion --ema_std 0.03,0.075,0.15
    python scripts/image_sample_vae.py --model_path runs/diffusion/reconstructed_ema_0.075_010000.pt
    python scripts/reconstruct_ema.py --model_path runs/diffusion --ema_std 0.02,0.05,0.1,0.2 --reference DIR/val \\
        --classifier_path runs/classifier --timestep_respacing logsnr10 --sampler unipc

Lengths are standard deviations relative to the number of steps (Karras et al. 2024, arXiv:2312.02696). Snapshots are
never pruned. The log states how closely each profile is reproduced: more snapshots, and lengths between those of
--ema_profiles, give smaller errors. With --reference, a diffusion model samples with each length from the same noise,
and only the weights with the lowest Fréchet distance are kept. Features come from --classifier_path,
--inception_path or --vae_path, as in evaluate.py. Rerun the same command to resume an interrupted sweep."""

from ..config import require
from ..ema_profiles import relative_stds
from ..runs.configs import DataConfig, DiffusionConfig, EvaluateConfig, ReconstructConfig, SamplingConfig, VAEConfig
from ..runs.ema_sweep import reconstruct_files, sweep_ema
from ..runs.run import drop_fields, script, select_fields


@script(
    __doc__, ReconstructConfig, select_fields(EvaluateConfig, "inception_path", "classifier_path"),
    select_fields(SamplingConfig, "batch_size", "sampler", "clip_denoised", "cfg_scale", "sample_dtype", "classes",
                  "seed"),
    select_fields(DiffusionConfig, "timestep_respacing"), VAEConfig, drop_fields(DataConfig, "data_dir"),
)
def main(run):
    config = run[ReconstructConfig]
    stds = relative_stds.parse(config.ema_std, "ema_std")
    if config.reference:
        return sweep_ema(run, stds)
    require(("num_samples" not in run.explicit, f"--num_samples {config.num_samples} has no effect without "
             "--reference; set it to real images, or omit --num_samples"))
    for _ in reconstruct_files(config, stds):
        pass


create_argparser = main.argparser
