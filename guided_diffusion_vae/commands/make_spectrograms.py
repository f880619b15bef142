"""Make a labeled set of spectrograms from recordings of complex baseband.

    python scripts/make_spectrograms.py --data_dir recordings --out_dir runs/spectrograms --sample_rate_hz 1000 \\
        --window_s 0.064 --hop_s 0.032 --num_frequencies 64 --duration_s 2.048 --overlap 0.5 --val_recordings subject7

Reads complex .npy or .mat files, one recording each. Writes 16-bit grayscale images <class>_<recording>_<first
sample>.png to train/ and val/, with class and recording of each in metadata.csv, and to spectrogram.json the settings
and the axes, which training, sampling and evaluation read. Rows are Doppler frequencies, the highest positive one at
the top; columns are time. No recording is in both train/ and val/. An existing set is not changed."""

from .. import dist_util
from ..data.spectrograms import make_spectrograms
from ..runs.configs import StftConfig
from ..runs.run import script


@script(__doc__, StftConfig)
def main(run):
    config = run[StftConfig]
    if dist_util.rank() == 0:   # one writer: other ranks would compete for the folder
        made = make_spectrograms(config)
        skipped = made.pop("skipped", ())
        if skipped:
            print(f"{len(skipped)} recordings are shorter than an image and were left out, such as {skipped[0]}")
        counts = ", ".join(f"{count} images in {split}/" for split, count in made.items())
        print(f"{config.out_dir}: {counts or 'already exists'}")


create_argparser = main.argparser
