"""Encode and decode pictures with an autoencoder, and say how much survives.

Writes metrics.json and a side-by-side picture into the run folder; the exit status is 1 below the given thresholds.

    python scripts/check_roundtrip.py --vae_path runs/autoencoder --data_dir DIR --min_psnr 23
"""

import sys

from guided_diffusion_vae import dist_util, evaluation, script_util, spaces
from guided_diffusion_vae.image_datasets import DataConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig, create_vae

CONFIGS = (VAEConfig, DataConfig, evaluation.RoundtripConfig, script_util.RunConfig)


def create_argparser():
    return script_util.argparser(__doc__, *CONFIGS)


def main():
    configs, given = script_util.parse_given(__doc__, *CONFIGS)
    vae, data, check, run = configs
    folder = script_util.begin_run(run, configs)

    codec = create_vae(vae, dist_util.dev())
    pictures = spaces.open_pictures(data, given, codec)
    latent_shape = codec.latent_shape(pictures.shape)
    script_util.say(pictures.summary())
    script_util.say(f"{codec.path}: pictures {pictures.shape} -> latents {latent_shape}")
    if run.dry_run:
        return

    report = evaluation.roundtrip(codec, pictures, check, folder, dist_util.dev())
    script_util.print_report(report)
    missed = evaluation.failures(report, check)
    script_util.end_run(folder)
    if missed:
        sys.exit("round trip failed: " + "; ".join(missed))


if __name__ == "__main__":
    dist_util.launch(main)
