"""Decode image files to arrays, and map stored values to [0, 1]."""

import collections
import contextlib
import functools
import io
import math
import re
import struct
import zlib

import numpy as np
from PIL import Image

from ..config import require
from ..files import MAX_PIXELS, bf, check_array_size, file_errors, file_extension, read_npy_header

# Channels of each Pillow mode as decoded here; palettes become RGB, an opaque alpha channel is dropped.
_MODE_CHANNELS = {"1": 1, "L": 1, "LA": 1, "I;16": 1, "I;16B": 1, "I;16L": 1, "I": 1, "F": 1,
                  "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
_MODE_DTYPES = {"I;16": "uint16", "I;16B": "uint16", "I;16L": "uint16", "I": "int32", "F": "float32"}
FULL_RANGE = {"bool": (0, 1), "uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
FREE_PIXELS = 2**22     # decoded whatever the size of the file
MAX_EXPANSION = 1032    # bytes that DEFLATE decodes from one byte, at most
_TILE_WIDTH, _TILE_LENGTH = 322, 323    # tags of TIFF
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow's conversion to grayscale

# Read without decoding a file: channels, sizes per spatial axis, NumPy type name, voxel spacing in mm.
FileHeader = collections.namedtuple("FileHeader", "channels sides dtype spacing", defaults=[None])


def read_array(path: str, value_range: tuple[float, float] | None = None, dynamic_range_db: float = 0.0,
               reference_db: float | None = None) -> np.ndarray:
    """Return one image file as float32 [C x H x W] in [0, 1], at its own size.

    Real values: `value_range` (lo, hi) is mapped to (0, 1); by default the full range of an 8- or 16-bit type. Complex
    values: 20 log10 |x| from reference - `dynamic_range_db` to the reference is mapped to [0, 1], lower values become
    0; the reference is `reference_db`, by default the array's own maximum.

    :raises ValueError: if values are not finite or outside the range, or a required range is missing.
    """
    pixels = to_unit(read_values(path), path, value_range, dynamic_range_db, reference_db)
    return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))


def read_header(path, max_pixels=MAX_PIXELS):
    """Return the `FileHeader` of an image file.

    :raises ValueError: if it cannot be read, or describes more than `max_pixels` or than the file can contain.
    """
    with file_errors(path), bf.BlobFile(path, "rb") as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if file_extension(path) == "npy":
            shape, _, dtype = read_npy_header(stream)
            check_array_size(shape, dtype, size - stream.tell())
            *sides, channels = _channels_last(shape)[1]
            return FileHeader(channels, tuple(sides), dtype.name)
        with _open_pillow(stream, size, max_pixels) as image:
            _check_readable(image)
            return FileHeader(_MODE_CHANNELS[image.mode], (image.height, image.width), _dtype(image))


def check_size(count, bits, stored_bytes, max_pixels=MAX_PIXELS):
    """Check how many pixels or voxels of how many bits a header describes before memory is allocated for them.

    :param stored_bytes: size of the file, which a header cannot exceed by more than the ratio of DEFLATE.
    :raises ValueError: if there are more than `max_pixels`, or more than so few bytes can contain.
    """
    require(
        (count <= max_pixels, f"the header describes {count} pixels: expected at most --max_pixels {max_pixels}; set a "
                              "larger number if the header is right"),
        (count <= FREE_PIXELS or count * bits <= 8 * MAX_EXPANSION * stored_bytes,
         f"the header describes {count} pixels of {bits} bits, more than {stored_bytes} bytes can contain; it is "
         "corrupt, or the image is empty"),
    )


def load_npy(content):
    """Return the array of the bytes of an .npy file.

    :raises ValueError: if it contains Python objects, or fewer values than its header describes.
    """
    stream = io.BytesIO(content)
    shape, _, dtype = read_npy_header(stream)
    check_array_size(shape, dtype, len(content) - stream.tell())
    stream.seek(0)
    return np.load(stream, allow_pickle=False)


@contextlib.contextmanager
def _open_pillow(stream, size, max_pixels):
    """Yield the Pillow image of a stream of `size` bytes after checking its number of pixels."""
    Image.MAX_IMAGE_PIXELS = None   # of Pillow and of the whole process, which `max_pixels` could not exceed
    with Image.open(stream) as image:
        pixels, is_tiff = math.prod(image.size), image.format == "TIFF"
        # One tile is decoded at a time, and may be larger than the image.
        tile = math.prod(image.tag_v2.get(tag, 1) for tag in (_TILE_WIDTH, _TILE_LENGTH)) if is_tiff else 1
        check_size(max(pixels, tile), _bits_per_pixel(image), size, max_pixels)
        covered = sum((right - left) * (bottom - top) for _, (left, top, right, bottom), *_ in image.tile)
        require((not is_tiff or covered >= pixels,      # Pillow leaves the rest black
                 f"the file contains {covered} of {pixels} pixels"))
        yield image


def _bits_per_pixel(image):
    """Return the bits per pixel in a file, from the raw mode of its tiles such as L, L;4, 1;I or RGB;16B."""
    args = image.tile[0][3] if image.tile else ""
    depth = re.search(r"^1|(?<=;)\d+", str(args if isinstance(args, str) else args[0]))
    return (int(depth[0]) if depth else 8) * len(image.getbands())


@contextlib.contextmanager
def open_image(path, max_pixels=MAX_PIXELS):
    """Yield an image file as a Pillow image after comparing all CRCs of a PNG, of which Pillow skips the pixels'.

    :raises ValueError: if the file cannot be read, or describes more than `max_pixels` or than the file can contain;
        the message names it.
    """
    with file_errors(path), bf.BlobFile(path, "rb") as stream:
        content = stream.read()
        if content.startswith(PNG_SIGNATURE):
            _check_png(content)
        with _open_pillow(io.BytesIO(content), len(content), max_pixels) as image:
            yield image


def _check_png(content):
    start, kind = len(PNG_SIGNATURE), b""
    while kind != b"IEND":
        require((len(content) >= start + 12, "PNG is truncated: expected a last chunk IEND, got the end of the file"))
        length, kind = struct.unpack_from(">I4s", content, start)
        end, name = start + 8 + length, kind.decode("ascii", "backslashreplace")
        require((len(content) >= end + 4, f"PNG is truncated: expected {length} bytes in chunk {name}, got "
                                          f"{len(content) - start - 8}"))
        crc, = struct.unpack_from(">I", content, end)
        found = zlib.crc32(memoryview(content)[start + 4:end])
        require((found == crc, f"PNG is corrupt: expected CRC {crc:08x} in chunk {name}, got {found:08x}"))
        start = end + 4


def read_values(path, max_pixels=MAX_PIXELS):
    """Return the values of an image file [H x W x C] in their own type; 8-bit images are uint8, grayscale or RGB."""
    if file_extension(path) == "npy":
        with file_errors(path), bf.BlobFile(path, "rb") as stream:
            values = load_npy(stream.read())
            order, shape = _channels_last(values.shape)
            return np.transpose(values, order).reshape(shape)
    with open_image(path, max_pixels) as image:
        _check_readable(image)
        values = _pixels(image)
    return values if values.ndim == 3 else values[..., None]


def _pixels(image):
    if image.mode in _MODE_DTYPES:
        return np.asarray(image).astype(_dtype(image))
    channels = _MODE_CHANNELS[image.mode]
    if "A" in image.getbands() or "transparency" in image.info:
        layers = np.asarray(image.convert("LA" if channels == 1 else "RGBA"))
        low = layers[..., -1].min()
        require((low == 255, f"transparent pixels (alpha down to {low}); flatten the image onto a background"))
        return layers[..., :-1]
    return np.asarray(image.convert("L" if channels == 1 else "RGB"))


def _dtype(image):
    # Older Pillow versions open a 16-bit PNG as 32-bit integers.
    return "uint16" if (image.format, image.mode) == ("PNG", "I") else _MODE_DTYPES.get(image.mode, "uint8")


def _check_readable(image):
    # Pillow reads 16-bit color by dropping the lower byte; only the raw mode of its tiles shows it.
    drops_bits = ";16" in str(image.tile) and image.mode not in _MODE_DTYPES
    pages = image.n_frames if image.format == "TIFF" else 1
    require(
        (image.mode in _MODE_CHANNELS, f"color mode {image.mode}: expected one of: {', '.join(_MODE_CHANNELS)}"),
        (not drops_bits, "16 bits per channel in color or with alpha, of which Pillow keeps 8; save the image as .npy "
                         "[H x W x C] uint16"),
        (pages == 1, f"{pages} pages; save one image per file"),
    )


def _channels_last(shape):
    """Return (the order of axes that moves channels last, the shape [H x W x C] in that order).

    [H x W] is grayscale; of three axes the last, else the first one is the channel axis, with size 1 or 3.
    """
    if len(shape) == 2:
        return (0, 1), (*shape, 1)
    if len(shape) == 3 and shape[2] in (1, 3):
        return (0, 1, 2), tuple(shape)
    require((len(shape) == 3 and shape[0] in (1, 3),
             f"shape {tuple(shape)}: expected [H x W], [H x W x C] or [C x H x W] with 1 or 3 channels; volumes "
             "require --image_size DxHxW"))
    return (1, 2, 0), (*shape[1:], shape[0])


def unit_scale(config):
    """Return the function (values, path) -> float32 in [0, 1] that a DataConfig describes; see `read_array`."""
    return functools.partial(to_unit, value_range=config.value_limits, dynamic_range_db=config.dynamic_range_db,
                             reference_db=config.reference_level, clip=bool(config.value_window))


def to_unit(values, path, value_range=None, dynamic_range_db=0.0, reference_db=None, clip=False):
    """Return values as float32 in [0, 1]; see `read_array`. `clip`: values outside the range become 0 or 1."""
    if values.dtype.kind in "fc":
        finite = np.isfinite(values)
        require((finite.all(), f"{path}: {values.size - finite.sum()} of {values.size} values are not finite"))
    if values.dtype.kind == "c":
        return _decibels_to_unit(values, path, dynamic_range_db, reference_db)
    lo, hi = value_range or FULL_RANGE.get(values.dtype.name, (None, None))
    require((lo is not None, f"{path}: {values.dtype} values require --value_range lo,hi, which become 0 and 1"))
    if clip:
        values = values.clip(lo, hi)
    low, high = values.min(), values.max()
    require((lo <= low and high <= hi,
             f"{path}: values from {low:.6g} to {high:.6g} are outside --value_range {lo:g},{hi:g}; set a wider range, "
             "or --value_window to clip values"))
    # float32 represents 16-bit integers exactly; wider types need float64 for the subtraction.
    wide = np.float32 if values.dtype.itemsize <= 2 else np.float64
    return ((values.astype(wide) - wide(lo)) / wide(hi - lo)).astype(np.float32)


def _decibels_to_unit(values, path, dynamic_range_db, reference_db):
    magnitude = np.abs(values).astype(np.float64)
    peak = magnitude.max()
    peak_db = 20 * math.log10(peak) if peak else -math.inf
    reference = peak_db if reference_db is None else reference_db
    require(
        (dynamic_range_db > 0, f"{path}: complex values require --dynamic_range_db > 0, got {dynamic_range_db}"),
        (reference > -math.inf, f"{path}: all values are 0, so the maximum has no level in dB; remove the file, or set "
                                "--reference_db to the level that becomes 1"),
        (peak_db <= reference, f"{path}: the maximum, {peak_db:.2f} dB, is above --reference_db {reference:g}; set a "
                               "higher reference (values are not clipped)"),
    )
    floor_db = reference - dynamic_range_db
    level_db = 20 * np.log10(np.maximum(magnitude, 10 ** (floor_db / 20)))
    return np.clip((level_db - floor_db) / dynamic_range_db, 0, 1).astype(np.float32)   # clips rounding errors


def match_channels(pixels, channels):
    """Return [H x W x C'] as [H x W x channels]: grayscale is repeated, RGB becomes luma (ITU-R BT.601)."""
    if pixels.shape[-1] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=-1)
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    return np.clip(pixels @ _LUMA, 0, 1)[..., None]  # the float32 weights sum to slightly more than 1
