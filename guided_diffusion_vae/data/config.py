"""Configuration of image and volume folders, and the types of its text fields."""

import math
from dataclasses import dataclass

from ..config import CommaSeparated, ParsedText, option, require, size, translate_pairs

interval = CommaSeparated("lo,hi", "two finite numbers, the lower first, such as -80,0", float,
                          lambda ends: not ends or len(ends) == 2 and -math.inf < ends[0] < ends[1] < math.inf)
distances = CommaSeparated("mm", "one or three distances above 0 in mm, such as 2,1.5,1.5", float,
                           lambda given: len(given) in (0, 1, 3) and all(0 < mm < math.inf for mm in given))
decibels = ParsedText("db", "a finite number, or empty", lambda text: float(text) if text else None,
                      lambda level: level is None or math.isfinite(level))


@dataclass
class DataConfig:
    """What to read, and how file values become numbers in [0, 1]."""

    data_dir: str = option("", "folder of pictures (jpg, png, gif, tiff, npy; sub-folders are classes), or one .npz "
                            "with images [N x H x W (x C)] and labels")
    image_size: size = option(64, "size of the pictures: 64, or height x width as 64x128; larger ones are shrunk. Three "
                               "sizes, such as 128x128x64, are those of volumes, or of patches cut out of them")
    voxel_size: tuple = option((), "the same for volumes as a list: [128,128,64]")
    image_channels: int = option(0, "1 or 3: convert every picture to grey or colour; 0: as the files are, all alike",
                              choices=(0, 1, 3))
    value_range: interval = option("", "lo,hi: file values that become 0 and 1 (write --value_range=-80,0); needed for float "
                               "and 32-bit files, else the integer type's full range; values outside are refused")
    value_window: interval = option("", "the same, and what lies outside is cut off, as in a window of a CT in Hounsfield "
                                "units (--value_window=-1000,400)")
    dynamic_range_db: float = option(0.0, "complex .npy: [reference - D, reference] dB of the magnitude become [0, 1], "
                                       "what lies below is 0; needed for complex files", minimum=0)
    reference_db: decibels = option("", "complex .npy: the level in dB that becomes 1; empty: each array's own maximum")
    crop: str = option("center", "what happens to a picture of another shape; center or random: cut to the shape asked "
                              "for; none: squeezed into it whole, while volumes must have that shape; grid (volumes): "
                              "cut into as many patches as cover it", choices=("center", "random", "none", "grid"))
    random_flip: bool = option(False, "mirror every other picture left to right (a spectrogram then runs back in time)")
    pad: bool = option(False, "repeat the last row and column until the autoencoder's strides divide the size; results "
                           "are cropped back")
    patches_per_volume: int = option(1, "volumes with --crop random: patches that each gives in an epoch", minimum=1)
    spacing: distances = option("", "volumes: distance of neighbouring voxels in mm, one number or one an axis; empty: what the "
                           "file says (.nii), else 1")

    def __post_init__(self):
        vars(self).update(translate_pairs(vars(self)))     # voxel_size is another name of image_size

    @property
    def sides(self):
        """The sizes per spatial axis, (height, width) or (depth, height, width)."""
        return parse_size(self.image_size)

    @property
    def value_limits(self):
        """(lo, hi), the values that become 0 and 1; None if the type of the files defines them."""
        require((not (self.value_range and self.value_window),
                 "--value_range and --value_window are mutually exclusive: the first rejects values outside, the "
                 "second clips them"))
        limits = interval.parse(self.value_window, "value_window") or interval.parse(self.value_range, "value_range")
        return limits or None

    @property
    def reference_level(self):
        """`reference_db` as a number, None if each array has its own."""
        return decibels.parse(self.reference_db, "reference_db")


@dataclass
class SmallCacheConfig:
    """Where an upsampler finds the latents that it starts from."""

    SECTION = "latents"

    small_cache_dir: str = option("", "cache of the same pictures as --cache_dir, encoded at a smaller --image_size")


def unpad(images, unpadded_shape):
    """Return images [N x C x ...] cropped to `unpadded_shape` (C, ...), without the padding of `--pad`."""
    return images[(..., *(slice(n) for n in unpadded_shape[1:]))]


def parse_size(text, name="image_size"):
    """Return (height, width) from 64, "64" or "64x128", and (depth, height, width) from "32x64x128"."""
    return size.parse(text, name)


def parse_spacing(text):
    """Return the voxel spacing in mm per axis, from one number or one per axis."""
    spacing = distances.parse(text, "spacing")
    return spacing * 3 if len(spacing) == 1 else spacing
