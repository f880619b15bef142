"""Configuration of image and volume folders, and the types of its text fields."""

import dataclasses
import math
from dataclasses import dataclass
from collections.abc import Sequence
from typing import Annotated, ClassVar

from ..config import CommaSeparated, ParsedText, decibels, option, require, size, translate_pairs
from ..files import MAX_PIXELS

_AXES = dict(zip("RLAPSI", (0, 0, 1, 1, 2, 2)))     # the axis of each direction
interval = CommaSeparated("lo,hi", "two finite numbers, the lower first, such as -80,0", float,
                          lambda ends: not ends or len(ends) == 2 and -math.inf < ends[0] < ends[1] < math.inf)
distances = CommaSeparated("mm", "one or three distances above 0 in mm, such as 2,1.5,1.5", float,
                           lambda given: len(given) in (0, 1, 3) and all(0 < mm < math.inf for mm in given))
directions = ParsedText("code", "three letters, one each of R or L, A or P, S or I, such as RAS, or as_stored", str,
                        lambda text: text in ("", "as_stored") or len(text) == len({_AXES.get(c) for c in text}) == 3
                        and set(text) <= set(_AXES), lambda text: text if text == "as_stored" else text.upper())

# Fields of later versions: recorded only if set, so that the digests of earlier caches stay the same.
RECORDED_IF_SET = ("label_column", "alpha", "array_key", "colormap", "colormap_tolerance")


@dataclass
class DataConfig:
    """Options of a dataset, and of the conversion of file values to [0, 1]."""

    data_dir: str = option("", "folder of images or volumes (jpg, png, gif, tiff, webp, bmp, npy, npz, mat, h5, nii, "
                               "dcm, nrrd, mha, mhd; subfolders are classes), a .zip or .tar of images, or an .npz, "
                               ".mat or .h5 with images "
                               "[N x H x W (x C)] and labels", essential=True)
    image_size: Annotated[int | str, size] = option(
        64, "size of images as N or HxW, of volumes or their patches as DxHxW; larger images are "
            "downsampled", essential=True)
    voxel_size: tuple = option((), "size of volumes as a list such as [128,128,64]; another name of --image_size")
    image_channels: int = option(0, "convert all images to 1 (grayscale) or 3 (RGB) channels; 0: keep the channels of "
                                    "the files, which must agree", choices=(0, 1, 3), essential="budget_gb")
    value_range: Annotated[str, interval] = option(
        "", "lo,hi: file values that become 0 and 1 (write --value_range=-80,0), required for float and 32-bit files; "
            "values outside are an error; empty: full range of the integer type")
    value_window: Annotated[str, interval] = option(
        "", "lo,hi: as --value_range, but values outside are clipped (--value_window=-1000,400 for CT in Hounsfield "
            "units)")
    dynamic_range_db: float = option(0.0, "dynamic range D of complex arrays, which require it: magnitudes in "
                                          "[reference - D, reference] dB become [0, 1], lower ones 0", minimum=0)
    reference_db: Annotated[str, decibels] = option(
        "", "level in dB that becomes 1 in complex arrays; empty: maximum of each array")
    alpha: str = option("refuse",   # alias
                        "transparent pixels: refuse: an error; white, black: composited onto that color",   # alias
                        choices=("refuse", "white", "black"))   # alias
    colormap: str = option(
        "", "colormap of RGB images (jet, parula, viridis, turbo, hot, plasma, inferno, magma, cividis, gray_r, or a "
            "table such as jet/matlab64): they become scalars in [0, 1] of one channel, and samples are colored again; "
            "auto: the nearest one; empty: none, images remain RGB")
    colormap_tolerance: float = option(2.0, "largest distance of a color from --colormap in 8-bit values (at most "
                                            "441); artifacts of JPEG require more", minimum=0)
    crop: str = option("center", "how inputs of another size are fitted: center or random crop; none: resize, ignoring "
                                 "the aspect ratio (volumes must match); grid: cover volumes with patches",
                       choices=("center", "random", "none", "grid"))
    random_flip: bool = option(
        False, "flip images horizontally with probability 0.5 (a spectrogram is then reversed in time)")
    pad: bool = option(False, "repeat the last row and column until the autoencoder's downsampling factors divide the "
                              "size; results are cropped back")
    max_pixels: int = option(MAX_PIXELS, "pixels or voxels of the largest image or compressed volume that is decoded, "
                                         "bytes of the largest array that is unpacked from an .npz at more than 100 "
                                         "times its size; larger ones are an error before memory is allocated",
                             minimum=1)
    patches_per_volume: int = option(1, "patches per volume and epoch with --crop random", minimum=1)
    spacing: Annotated[str, distances] = option(
        "", "voxel spacing of volumes in mm, one number or one per axis, instead of that of the files; empty: that of "
            "the files, which must agree within 1%, 1 if they state none (npy, npz)")
    orientation: Annotated[str, directions] = option(
        "RAS", "directions in which the axes D, H, W of volumes increase, to which the axes of files are flipped and "
               "permuted, such as RAS (right, anterior, superior) or LPS; as_stored: those of the files, which must "
               "agree. Files without directions (npy, npz) are read as stored")
    resample_spacing: Annotated[str, distances] = option(
        "", "voxel spacing in mm, one number or one per axis, to which volumes are resampled (linear, low-pass "
            "filtered where it increases); empty: none")
    frames: str = option(
        "", "fourth axis of volume files; all: each frame is an item; first: the first frame is read; channels: up to "
            "4 channels of one volume; empty: channels, if there are up to 4 and the file states no unit of time",
        choices=("", "all", "first", "channels"))
    label_column: str = option(
        "", "column with the classes in a label file of the folder (dataset.json, labels.csv, metadata.csv or "
            "metadata.jsonl); empty: the first of label, labels, class, class_name, category, target, y; none: classes "
            "from names")
    array_key: str = option("", "name of the array in .mat and HDF5 files, with / between groups; empty: the only one "
                                "of two or three axes, in a single file of all images also images or arr_0")
    allow_ignored: bool = option(False, "accept a folder of which more than 10% of the files are not read")
    verify_data: bool = option(False, "decode every file once before anything else, and list all faulty ones")

    # Options of volumes that version 0.2 did not have, with the values that read files as it did. A header or a cache
    # without an entry means these. None is recorded for them, so that the digests of earlier caches remain valid.
    VOLUME_OPTIONS: ClassVar = {"orientation": "", "resample_spacing": "", "frames": "channels"}

    def __post_init__(self):
        vars(self).update(translate_pairs(vars(self)))     # voxel_size is another name of image_size

    def unset_later_fields(self):
        """Return the names and defaults of the fields of `RECORDED_IF_SET` that have their default."""
        defaults = {name: getattr(DataConfig, name) for name in RECORDED_IF_SET}
        return {name: default for name, default in defaults.items() if getattr(self, name) == default}

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
    """Options of the low-resolution latents that an upsampler is conditioned on."""

    SECTION = "latents"

    low_res_cache_dir: str = option(
        "", "cache of the same images as --cache_dir, encoded at a smaller --image_size", essential=True)


def unpad(images, unpadded_shape: Sequence[int]):
    """Return images [N x C x ...] cropped to `unpadded_shape` (C, ...), without the padding of `--pad`."""
    return images[(..., *(slice(n) for n in unpadded_shape[1:]))]


def parse_size(text: str | int, name: str = "image_size") -> tuple[int, ...]:
    """Return (height, width) from 64, "64" or "64x128", and (depth, height, width) from "32x64x128"."""
    return size.parse(text, name)


def parse_spacing(text: str, name: str = "spacing") -> tuple[float, ...]:
    """Return the voxel spacing in mm per axis, from one number or one per axis."""
    spacing = distances.parse(text, name)
    return spacing * 3 if len(spacing) == 1 else spacing


def format_spacing(spacing: Sequence[float]) -> str:
    """Return a voxel spacing as headers and caches record it, such as 2,1.5,1.5."""
    return ",".join(f"{s:g}" for s in spacing)


def recorded_options(preprocessing: dict) -> dict:
    """Return the options of volumes that a header or a cache states or implies, {} for images or without a record."""
    if len(parse_size(preprocessing.get("image_size", 64))) != 3:
        return {}
    return {name: preprocessing.get(name, implied) for name, implied in DataConfig.VOLUME_OPTIONS.items()}


def take_recorded_options(data: DataConfig, explicit, preprocessing: dict) -> DataConfig:
    """Return a config with the options of volumes of a header or a cache, except for flags that were set."""
    recorded = recorded_options(preprocessing)
    return dataclasses.replace(data, **{name: value for name, value in recorded.items() if name not in explicit})


def state_options(header: dict) -> dict:
    """Return a header in which the options of volumes are stated that it implies, to compare it with another."""
    data = header.get("data") or {}
    return {**header, "data": {**data, **recorded_options(data)}} if data else header
