"""Decode image files to arrays, and map stored values to [0, 1]."""

import collections
import io
import math

import numpy as np
from PIL import Image

from ..files import bf
from .listing import file_extension, file_errors

# Channels that a Pillow mode is read as; a palette stands for colours, an opaque alpha channel is left out.
_MODE_CHANNELS = {"1": 1, "L": 1, "LA": 1, "I;16": 1, "I;16B": 1, "I;16L": 1, "I": 1, "F": 1,
                  "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
_MODE_DTYPES = {"I;16": "uint16", "I;16B": "uint16", "I;16L": "uint16", "I": "int32", "F": "float32"}
_FULL_RANGE = {"bool": (0, 1), "uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's conversion to grey


def read_array(path, value_range=None, dynamic_range_db=0.0, reference_db=None):
    """Return one file of any kind as float32 [C x H x W] in [0, 1], at its own size.

    Real values: `value_range` (lo, hi) becomes (0, 1); without it the full range of an 8- or 16-bit type. Complex
    values: 20 log10 |x|, the reference less `dynamic_range_db` up to the reference becomes [0, 1] and what lies below
    is 0, as a stated floor; the reference is the array's own maximum unless `reference_db` states it.

    :raises ValueError: values that are not finite or outside the range, or a range that is needed and missing; names
        the file, what was found and the flag.
    """
    pixels = to_unit(_load(path), path, value_range, dynamic_range_db, reference_db)
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


_Header = collections.namedtuple("_Header", "height width channels dtype")


def _read_header(path):
    """Return height, width, channels and value type of a file without decoding it."""
    with file_errors(path), bf.BlobFile(path, "rb") as stream:
        if file_extension(path) == "npy":
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            return _Header(*_channels_last(shape)[1], dtype.name)
        with Image.open(stream) as picture:
            _require_readable(picture)
            return _Header(picture.height, picture.width, _MODE_CHANNELS[picture.mode], _dtype(picture))


def _load(path):
    """Return a file's values [H x W x C] in their own type; 8-bit pictures are uint8, grey or RGB."""
    with file_errors(path), bf.BlobFile(path, "rb") as stream:
        if file_extension(path) == "npy":
            values = np.load(io.BytesIO(stream.read()), allow_pickle=False)
            order, shape = _channels_last(values.shape)
            return np.transpose(values, order).reshape(shape)
        with Image.open(stream) as picture:
            _require_readable(picture)
            values = _pixels(picture)
    return values if values.ndim == 3 else values[..., None]


def _pixels(picture):
    if picture.mode in _MODE_DTYPES:
        return np.asarray(picture).astype(_dtype(picture))
    channels = _MODE_CHANNELS[picture.mode]
    if "A" in picture.getbands() or "transparency" in picture.info:
        layers = np.asarray(picture.convert("LA" if channels == 1 else "RGBA"))
        if layers[..., -1].min() < 255:
            raise ValueError(f"it is transparent in places (alpha down to {layers[..., -1].min()}); flatten it onto a "
                             "background first")
        return layers[..., :-1]
    return np.asarray(picture.convert("L" if channels == 1 else "RGB"))


def _dtype(picture):
    # Older Pillow versions open a 16-bit PNG as 32-bit integers.
    return "uint16" if (picture.format, picture.mode) == ("PNG", "I") else _MODE_DTYPES.get(picture.mode, "uint8")


def _require_readable(picture):
    if picture.mode not in _MODE_CHANNELS:
        raise ValueError(f"its colour mode {picture.mode} is not one of {', '.join(_MODE_CHANNELS)}")
    # Pillow reads 16-bit colour by dropping the lower byte; the raw mode of its tiles is where that shows.
    if ";16" in str(picture.tile) and picture.mode not in _MODE_DTYPES:
        raise ValueError("it has 16 bits a channel in colour or with alpha, of which Pillow keeps 8; save it as .npy "
                         "[H x W x C] uint16")
    if picture.format == "TIFF" and picture.n_frames > 1:
        raise ValueError(f"it has {picture.n_frames} pages; save one picture a file")


def _channels_last(shape):
    """Return the order of axes that puts channels last, and the shape [H x W x C] then.

    [H x W] is grey; three axes have 1 or 3 channels at the end or, failing that, at the beginning.
    """
    if len(shape) == 2:
        return (0, 1), (*shape, 1)
    if len(shape) == 3 and shape[2] in (1, 3):
        return (0, 1, 2), tuple(shape)
    if len(shape) == 3 and shape[0] in (1, 3):
        return (1, 2, 0), (*shape[1:], shape[0])
    raise ValueError(f"its shape {tuple(shape)} is not [H x W], [H x W x C] or [C x H x W] with 1 or 3 channels, "
                     "volumes want --image_size DxHxW")


def to_unit(values, where, value_range=None, dynamic_range_db=0.0, reference_db=None, clip=False):
    """Return values as float32 in [0, 1]; see `read_array`. With `clip` values outside the range become 0 or 1."""
    if values.dtype.kind in "fc" and not np.isfinite(values).all():
        raise ValueError(f"{where}: {(~np.isfinite(values)).sum()} of {values.size} values are not finite")
    if values.dtype.kind == "c":
        return _decibels_to_unit(values, where, dynamic_range_db, reference_db)
    lo, hi = value_range or _FULL_RANGE.get(values.dtype.name, (None, None))
    if lo is None:
        raise ValueError(f"{where}: {values.dtype} values need --value_range lo,hi, the values that become 0 and 1")
    least, most = values.min(), values.max()
    if clip:
        values = values.clip(lo, hi)
    elif least < lo or most > hi:
        raise ValueError(f"{where}: values from {least:.6g} to {most:.6g} leave --value_range {lo:g},{hi:g}; widen it "
                         "(nothing is clipped), or give --value_window to cut values off")
    # float32 holds 16-bit integers exactly; only wider types need more for the subtraction.
    wide = np.float32 if values.dtype.itemsize <= 2 else np.float64
    return ((values.astype(wide) - wide(lo)) / wide(hi - lo)).astype(np.float32)


def _decibels_to_unit(values, where, dynamic_range_db, reference_db):
    if dynamic_range_db <= 0:
        raise ValueError(f"{where}: complex values need --dynamic_range_db above 0 (found {dynamic_range_db})")
    magnitude = np.abs(values).astype(np.float64)
    peak = magnitude.max()
    if peak == 0 and reference_db is None:
        raise ValueError(f"{where}: all values are 0, which has no level in dB; take it out of the folder, or say with "
                         "--reference_db which level becomes 1")
    peak_db = 20 * math.log10(peak) if peak else -math.inf
    if reference_db is None:
        reference_db = peak_db
    elif peak_db > reference_db:
        raise ValueError(f"{where}: its maximum, {peak_db:.2f} dB, is above --reference_db {reference_db:g}; raise it "
                         "(nothing is clipped)")
    floor_db = reference_db - dynamic_range_db
    level_db = 20 * np.log10(np.maximum(magnitude, 10 ** (floor_db / 20)))
    return np.clip((level_db - floor_db) / dynamic_range_db, 0, 1).astype(np.float32)  # the clip removes rounding


def _as_channels(pixels, channels):
    """Return [H x W x C'] as [H x W x channels]: grey is repeated, colours become luma (ITU-R BT.601)."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    return np.clip(pixels @ _LUMA, 0, 1)[..., None]  # the weights' sum rounds to just above 1
