"""Reconstruct EMA weights of any length from the snapshots of a training.

    python scripts/image_train_vae.py --cache_dir latents_cache/NAME --ema_profiles 0.05,0.10 --logdir runs/diffusion
    python scripts/reconstruct_ema.py --model_path runs/diffusion --ema_std 0.03,0.075,0.15
    python scripts/image_sample_vae.py --model_path runs/diffusion/reconstructed_ema_0.075_010000.pt

The weights are written into the run. Lengths are standard deviations relative to the number of steps (Karras et al.
2024, arXiv:2312.02696). Snapshots are never pruned. The log states how closely each profile is reproduced: more
snapshots, and lengths between those of --ema_profiles, give smaller errors."""

from .. import dist_util
from ..ema_profiles import relative_stds, save_reconstruction
from ..logger import log_rank0
from ..runs.configs import ReconstructConfig
from ..runs.run import script


@script(__doc__, ReconstructConfig)
def main(run):
    config = run[ReconstructConfig]
    for std in relative_stds.parse(config.ema_std, "ema_std"):
        if dist_util.rank() == 0:
            path, error = save_reconstruction(config.model_path, std, config.ema_step)
            log_rank0(f"wrote {path}: error of the profile {error:.1e}")


create_argparser = main.argparser
