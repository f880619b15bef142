"""Encode and decode images with an autoencoder, and report the reconstruction quality.

Writes metrics.json and roundtrip.png to the run folder. The exit status is 1 if a threshold is not reached.

    python scripts/check_roundtrip.py --vae_path runs/autoencoder --data_dir DIR --min_psnr 23"""

import sys

from .. import dist_util
from ..evaluation import failed_thresholds, roundtrip
from ..logger import log_rank0
from ..runs import spaces
from ..runs.configs import DataConfig, RoundtripConfig, RunConfig, VAEConfig
from ..runs.run import script
from ..vae_wrapper import create_vae


@script(__doc__, VAEConfig, DataConfig, RoundtripConfig, RunConfig)
def main(run):
    codec = create_vae(run[VAEConfig], dist_util.dev())
    images = spaces.open_images(run[DataConfig], run.explicit, codec)
    latent_shape = codec.latent_shape(images.shape)
    log_rank0(images.summary())
    log_rank0(f"{codec.path}: images {images.shape} -> latents {latent_shape}")
    if run.dry_run:
        return

    config = run[RoundtripConfig]
    report = roundtrip(codec, images, config, run.folder, dist_util.dev())
    run.write_report(report)
    failed = failed_thresholds(report, config)
    if failed:
        sys.exit("round trip failed: " + "; ".join(failed))


create_argparser = main.argparser
