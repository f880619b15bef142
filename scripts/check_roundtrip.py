"""Encode and decode pictures with an autoencoder, and say how much survives.

Writes metrics.json and a side-by-side picture into the run folder; the exit status is 1 below the given thresholds.

    python scripts/check_roundtrip.py --vae_path runs/autoencoder --data_dir DIR --min_psnr 23
"""

import sys

from guided_diffusion_vae import dist_util, logger
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.evaluation import roundtrip
from guided_diffusion_vae.runs import spaces
from guided_diffusion_vae.runs.flags import argparser, parse_explicit
from guided_diffusion_vae.runs.run import RunConfig, start_run, finish_run, print_report
from guided_diffusion_vae.vae_wrapper import VAEConfig, create_vae

CONFIGS = (VAEConfig, DataConfig, roundtrip.RoundtripConfig, RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    vae, data, check, run = configs
    folder = start_run(run, configs)

    codec = create_vae(vae, dist_util.dev())
    pictures = spaces.open_images(data, given, codec)
    latent_shape = codec.latent_shape(pictures.shape)
    logger.log_rank0(pictures.summary())
    logger.log_rank0(f"{codec.path}: pictures {pictures.shape} -> latents {latent_shape}")
    if run.dry_run:
        return

    report = roundtrip.roundtrip(codec, pictures, check, folder, dist_util.dev())
    print_report(report)
    missed = roundtrip.failed_thresholds(report, check)
    finish_run(folder)
    if missed:
        sys.exit("round trip failed: " + "; ".join(missed))


if __name__ == "__main__":
    dist_util.launch(main)
