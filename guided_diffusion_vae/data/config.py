"""Settings of image and volume folders, and how their text fields are parsed."""

import math
from dataclasses import dataclass

from ..config import option, size


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
    value_range: str = option("", "lo,hi: file values that become 0 and 1 (write --value_range=-80,0); needed for float "
                               "and 32-bit files, else the integer type's full range; values outside are refused")
    value_window: str = option("", "the same, and what lies outside is cut off, as in a window of a CT in Hounsfield "
                                "units (--value_window=-1000,400)")
    dynamic_range_db: float = option(0.0, "complex .npy: [reference - D, reference] dB of the magnitude become [0, 1], "
                                       "what lies below is 0; needed for complex files", minimum=0)
    reference_db: str = option("", "complex .npy: the level in dB that becomes 1; empty: each array's own maximum")
    crop: str = option("center", "what happens to a picture of another shape; center or random: cut to the shape asked "
                              "for; none: squeezed into it whole, while volumes must have that shape; grid (volumes): "
                              "cut into as many patches as cover it", choices=("center", "random", "none", "grid"))
    random_flip: bool = option(False, "mirror every other picture left to right (a spectrogram then runs back in time)")
    pad: bool = option(False, "repeat the last row and column until the autoencoder's strides divide the size; results "
                           "are cropped back")
    patches_per_volume: int = option(1, "volumes with --crop random: patches that each gives in an epoch", minimum=1)
    spacing: str = option("", "volumes: distance of neighbouring voxels in mm, one number or one an axis; empty: what the "
                           "file says (.nii), else 1")

    def __post_init__(self):
        if self.voxel_size:
            self.image_size, self.voxel_size = "x".join(str(int(n)) for n in self.voxel_size), ()

    @property
    def sides(self):
        """The sizes along every axis, (height, width) or (depth, height, width)."""
        return parse_size(self.image_size)


def unpad(images, unpadded_shape):
    """Return pictures [N x C x ...] without the rows and columns that `--pad` added; `unpadded_shape`: (C, ...)."""
    return images[(..., *(slice(n) for n in unpadded_shape[1:]))]


def parse_size(text):
    """Return (height, width) from 64, "64" or "64x128", and (depth, height, width) from "32x64x128"."""
    sides = str(text).lower().split("x")
    if len(sides) > 3 or not all(side.strip().isdigit() and int(side) > 0 for side in sides):
        raise ValueError(f"--image_size {text} is not a size; write 64, height x width as 64x128, or for volumes "
                         "depth x height x width as 32x64x128")
    return tuple(int(side) for side in sides) if len(sides) > 1 else (int(text), int(text))


def resolve_value_range(config):
    """Return (lo, hi) of the values that become 0 and 1, or None where the type of the files says it."""
    if config.value_range and config.value_window:
        raise ValueError("--value_range refuses what --value_window cuts off; give one of them")
    return parse_range(config.value_window, "--value_window") or parse_range(config.value_range)


def parse_range(text, flag="--value_range"):
    """Return (lo, hi) from "lo,hi", or None from an empty text."""
    if not text:
        return None
    try:
        lo, hi = (float(part) for part in str(text).split(","))
    except ValueError:
        raise ValueError(f"{flag} {text} is not two numbers; write lo,hi as in {flag}=-80,0") from None
    if not (math.isfinite(lo) and math.isfinite(hi) and lo < hi):
        raise ValueError(f"{flag} {text}: the first number must be below the second")
    return lo, hi


def parse_spacing(text):
    """Read `--spacing`, one number or one an axis, in mm; return one an axis."""
    try:
        given = tuple(float(part) for part in text.split(","))
    except ValueError:
        given = ()
    if len(given) not in (1, 3) or not all(0 < s < math.inf for s in given):
        raise ValueError(f"--spacing {text}: needed are one or three distances in mm, such as 2,1.5,1.5")
    return given * 3 if len(given) == 1 else given
