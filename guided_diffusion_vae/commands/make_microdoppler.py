"""Simulate a labeled dataset of radar micro-Doppler spectrograms of hand motions.

    python scripts/make_microdoppler.py --out_dir runs/microdoppler --num_train 300 --num_val 60 --seed 0

Writes 8-bit grayscale images <class>_<index>.png to train/ and val/, with speed, range and aspect of each in
metadata.csv, and all parameters to dataset.json. Rows are Doppler frequencies: the highest positive one is at the top,
motion toward the sensor is below the middle. Columns are time. An existing dataset is not changed."""

from .. import dist_util
from ..data.microdoppler import BASEBAND, write_dataset
from ..runs.configs import MicrodopplerConfig
from ..runs.run import script


@script(__doc__, MicrodopplerConfig)
def main(run):
    config = run[MicrodopplerConfig]
    if dist_util.rank() == 0:  # one writer: other ranks would compete for the folder
        counts = write_dataset(config)
        recordings = counts.pop(BASEBAND, 0)
        written = [f"{n} {kind}" for n, kind in ((sum(counts.values()), "images"), (recordings, "recordings")) if n]
        print(f"{config.out_dir}: {' and '.join(written) + ' written' if written else 'already exists'}")


create_argparser = main.argparser
