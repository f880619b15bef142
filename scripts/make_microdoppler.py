"""Simulate a labelled set of radar micro-Doppler spectrograms of hand motions.

    python scripts/make_microdoppler.py --out_dir runs/microdoppler --num_train 300 --num_val 60 --seed 0

writes train/ and val/ with grey 8-bit pictures <class>_<index>.png (rows: Doppler, the highest positive one at the top,
motion towards the sensor below the middle; columns: time) and dataset.json with all parameters. The same command again
leaves the folder as it is.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import microdoppler
from guided_diffusion_vae.data.microdoppler import MicrodopplerConfig
from guided_diffusion_vae.runs.flags import parse


def main():
    config, = parse(__doc__, MicrodopplerConfig)
    dist_util.setup_dist()
    if dist_util.rank() == 0:  # further ranks wait: they would only take the folder from each other
        written = microdoppler.write_dataset(config)
        print(f"{config.out_dir}: {f'{written} pictures written' if written else 'already there'}")


if __name__ == "__main__":
    dist_util.launch(main)
