"""Decode image files to arrays, and map stored values to [0, 1]."""

import collections
import contextlib
import functools
import io
import math
import re
import struct
import sys
import zlib

import numpy as np
from PIL import Image

from ..config import require
from ..files import (
    MAX_PIXELS, check_array_size, check_size, file_errors, file_extension, read_npy_header, require_regular_file,
)
from .archives import is_member, open_file

# Channels of each Pillow mode as decoded here; palettes, CMYK and YCbCr become RGB, an alpha channel is dropped.
_MODE_CHANNELS = {"1": 1, "L": 1, "LA": 1, "I;16": 1, "I;16B": 1, "I;16L": 1, "I": 1, "F": 1,
                  "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
_MODE_DTYPES = {"I;16": "uint16", "I;16B": "uint16", "I;16L": "uint16", "I": "int32", "F": "float32"}
# Raw modes of 16 bits per channel, of which Pillow keeps the higher byte -> those that keep the lower byte.
_LOWER_BYTE = {f"{mode};16{order}": f"{mode};16{other}" for mode in ("RGB", "RGBA") for order, other in
               (("B", "L"), ("L", "B"), ("N", "B" if sys.byteorder == "little" else "L"))}
BACKGROUNDS = {"white": 1, "black": 0}
FULL_RANGE = {"bool": (0, 1), "uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BITS, _PLANES, _TILE_WIDTH, _TILE_LENGTH = 258, 284, 322, 323  # tags of TIFF
_ORIENTATION = 274      # tag of TIFF and EXIF
_INTEGERS = {1: "B", 3: "H", 4: "I"}    # types of values in EXIF
_START_BYTES = 4096     # that `read_plain_header` reads
# (bits, color type) of a PNG: channels and type as decoded here; and the lengths of chunks that change neither.
_PNG_TYPES = {**{(bits, color): (channels, "uint8") for bits in (1, 2, 4, 8) for color, channels in ((0, 1), (3, 3))},
              (16, 0): (1, "uint16"), (8, 2): (3, "uint8"), (16, 2): (3, "uint16"), (8, 4): (1, "uint8"),
              (8, 6): (3, "uint8"), (16, 6): (3, "uint16")}
_PNG_CHUNKS = {b"IHDR": 13, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32, b"pHYs": 9, b"tIME": 7}
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow's conversion to grayscale

# Read without decoding a file: channels, sizes per spatial axis, NumPy type name.
FileHeader = collections.namedtuple("FileHeader", "channels sides dtype")


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
    """Return the `FileHeader` of an image file, its sides after the EXIF orientation is applied.

    :raises ValueError: if it cannot be read, or describes more than `max_pixels` or than the file can contain.
    """
    return read_plain_header(path, max_pixels) or _read_header(path, max_pixels)


def read_plain_header(path, max_pixels=MAX_PIXELS):
    """Return the `FileHeader` of a plain PNG or JPEG as `read_header` does, ten times as fast; None for other files.

    A plain file is a local one or in an archive, has nothing unusual before its pixels and no EXIF data.
    """
    if file_extension(path) not in ("png", "jpg", "jpeg") or "://" in path:
        return None
    try:
        with _open_unbuffered(path, max_pixels) as stream:
            start = stream.read(_START_BYTES)
            header = _plain_png_header(start, stream) if start.startswith(PNG_SIGNATURE) else (
                _plain_jpeg_header(start) if start.startswith(b"\xff\xd8") else None)
            if header is not None:
                check_size(math.prod(header.sides), 64, stream.seek(0, io.SEEK_END), max_pixels)    # of at most 64 bits
            return header
    except (OSError, LookupError, ValueError, struct.error, zlib.error):
        return None     # `_read_header` names the problem, if it is one


def _open_unbuffered(path, max_pixels):
    if is_member(path):
        return open_file(path, max_pixels)
    require_regular_file(path)      # opening a named pipe waits
    return open(path, "rb", buffering=0)


def _plain_png_header(start, stream):
    """Return the `FileHeader` of a PNG from its first bytes, None if a chunk before its pixels is unusual."""
    width, height, *kind = struct.unpack_from(">IIBBBBB", start, len(PNG_SIGNATURE) + 8)
    channels, dtype = _PNG_TYPES[tuple(kind[:2])]
    position, chunk = len(PNG_SIGNATURE), 0
    while True:
        length, name = struct.unpack_from(">I4s", start, position)
        if (chunk == 0) != (name == b"IHDR"):
            return None
        if name == b"IDAT":
            break
        data = start[position + 4:position + 8 + length]
        plain_text = name == b"tEXt" and b"\0" in data and not data.startswith(b"tEXtRaw profile")
        crc, = struct.unpack_from(">I", start, position + 8 + length)
        if crc != zlib.crc32(data) or _PNG_CHUNKS.get(name) != length and name != b"PLTE" and not plain_text:
            return None
        position, chunk = position + 12 + length, chunk + 1
    if kind[2:4] != [0, 0] or width * height == 0:
        return None
    while name != b"IEND":      # EXIF data may follow the pixels
        position += 12 + length
        head = start[position:position + 8]
        if len(head) < 8:
            stream.seek(position)
            head = stream.read(8)
        if len(head) < 8:
            break
        length, name = struct.unpack(">I4s", head)
        if name == b"eXIf":
            return None
    return FileHeader(channels, (height, width), dtype)


def _plain_jpeg_header(start):
    """Return the `FileHeader` of a JPEG from its first bytes, None if a segment before its pixels is unusual."""
    position, header = 2, None
    while True:
        mark, kind, length = struct.unpack_from(">BBH", start, position)
        data = start[position + 4:position + 2 + length]
        if mark != 0xFF or length < 2 or len(data) != length - 2:
            return None
        if kind == 0xDA:    # the pixels follow
            return header
        if kind in (0xC0, 0xC1, 0xC2) and header is None:
            bits, height, width, components = struct.unpack_from(">BHHB", data)
            header = FileHeader(components, (height, width), "uint8")
            if bits != 8 or components not in (1, 3) or len(data) != 6 + 3 * components or width * height == 0:
                return None
        elif kind == 0xDB:  # tables of 8-bit numbers
            if len(data) % 65 or any(table >> 4 for table in data[::65]):
                return None
        elif kind not in (0xC4, 0xDD, 0xFE) and not (kind == 0xE0 and data.startswith(b"JFIF\0") and len(data) >= 14):
            return None
        position += 2 + length


def _read_header(path, max_pixels):
    with file_errors(path), open_file(path, max_pixels) as stream:
        size = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        if file_extension(path) == "npy":
            shape, _, dtype = read_npy_header(stream)
            check_array_size(shape, dtype, size - stream.tell())
            *sides, channels = channels_last(shape)[1]
            return FileHeader(channels, tuple(sides), dtype.name)
        with _open_pillow(stream, size, max_pixels) as image:
            _check_readable(image)
            # Pillow orients a TIFF, depending on its version its size when it is opened or when it is decoded.
            is_tiff = image.format == "TIFF"
            sides = (image.tag_v2[257], image.tag_v2[256]) if is_tiff else (image.height, image.width)
            orientation = image.tag_v2.get(_ORIENTATION, 1) if is_tiff else _orientation(image, stream)
            sides = sides[::-1] if orientation in (5, 6, 7, 8) else sides
            return FileHeader(_MODE_CHANNELS[image.mode], sides, _dtype(image))


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
    """Return the bits per pixel in a file, from the raw mode of its tiles such as L, L;4, 1;I or RGB;16B.

    0 for webp, which has no largest ratio of compression.
    """
    if image.format == "WEBP":
        return 0
    args = image.tile[0][3] if image.tile else ""
    depth = re.search(r"^1|(?<=;)\d+", str(args if isinstance(args, str) else args[0]))
    return (int(depth[0]) if depth else 8) * len(image.getbands())


@contextlib.contextmanager
def open_image(path, max_pixels=MAX_PIXELS):
    """Yield an image file as a Pillow image after comparing all CRCs of a PNG, of which Pillow skips the pixels'.

    :raises ValueError: if the file cannot be read, or describes more than `max_pixels` or than the file can contain;
        the message names it.
    """
    with file_errors(path), open_file(path, max_pixels) as stream:
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


def read_values(path, max_pixels=MAX_PIXELS, alpha=""):
    """Return the values of an image file [H x W x C] in their own type; 8-bit images are uint8, grayscale or RGB.

    The EXIF orientation is applied. Palettes, CMYK and YCbCr become RGB, without color profiles.

    :param alpha: a key of `BACKGROUNDS`, the color onto which transparent pixels are composited.
    :raises ValueError: if a pixel is transparent and `alpha` is another text.
    """
    if file_extension(path) == "npy":
        with file_errors(path), open_file(path, max_pixels) as stream:
            values = load_npy(stream.read())
            order, shape = channels_last(values.shape)
            return np.transpose(values, order).reshape(shape)
    with open_image(path, max_pixels) as image:
        _check_readable(image)
        orientation = 1 if image.format == "TIFF" else _orientation(image, image.fp)    # Pillow orients a TIFF
        values, opacity = _layers(image)
        if opacity is not None:
            values = _composite(values, opacity, alpha)
    return _orient(values if values.ndim == 3 else values[..., None], orientation)


def _layers(image):
    """Return (values [H x W] or [H x W x C], opacity [H x W x 1] of the same type or None) of a Pillow image."""
    if _drops_bits(image):
        values = _wide_color(image)
        if values.shape[-1] == 4:
            return values[..., :3], values[..., 3:]
    elif image.mode in _MODE_DTYPES:
        values = np.asarray(image).astype(_dtype(image))
    else:
        channels = _MODE_CHANNELS[image.mode]
        if "A" in image.getbands() or "transparency" in image.info:
            layers = np.asarray(image.convert("LA" if channels == 1 else "RGBA"))
            return layers[..., :-1], layers[..., -1:]
        values = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    key = image.info.get("transparency")    # the transparent color of a 16-bit PNG
    if key is None or values.dtype != np.uint16:
        return values, None
    values = values if values.ndim == 3 else values[..., None]
    return values, np.where((values == key).all(-1, keepdims=True), 0, 65535).astype(np.uint16)


def _wide_color(image):
    """Return all 16 bits of a Pillow image in color, uint16 [H x W x C]: decoded once per byte of its values."""
    content = image.fp.getvalue()
    with Image.open(io.BytesIO(content)) as lower:
        make = getattr(type(lower.tile[0]), "_make", tuple)     # tiles are plain tuples before Pillow 11
        lower.tile = [make((codec, box, offset, _LOWER_BYTE[args] if isinstance(args, str) else
                            (_LOWER_BYTE[args[0]], *args[1:]))) for codec, box, offset, args in lower.tile]
        return np.asarray(image).astype(np.uint16) << 8 | np.asarray(lower)


def _composite(values, opacity, alpha):
    """Return values [H x W x C] on a background, rounded to integers."""
    top, low = np.iinfo(values.dtype).max, opacity.min()
    require((low == top or alpha in BACKGROUNDS,
             f"transparent pixels (alpha down to {low} of {top}): set --alpha white or --alpha black to composite them "
             "onto that color, or flatten the image onto a background"))
    if low == top:
        return values
    weight = opacity / top
    return np.rint(weight * values + (1 - weight) * top * BACKGROUNDS[alpha]).astype(values.dtype)


def _orientation(image, stream):
    """Return the EXIF orientation, 1 to 8, of an image other than TIFF, of which nothing is decoded."""
    return exif_orientation(_png_exif(stream) if image.format == "PNG" else image.info.get("exif", b""))


def exif_orientation(exif):
    """Return the orientation in the bytes of EXIF data, 1 to 8; 1 if there is none or the data are corrupt."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2], "<")
    with contextlib.suppress(struct.error):
        start, = struct.unpack_from(f"{order}I", exif, 4)
        count, = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, entry)
            if tag == _ORIENTATION:
                value, = struct.unpack_from(order + _INTEGERS.get(kind, "H"), exif, entry + 8)
                return value if 1 <= value <= 8 else 1
    return 1


def _png_exif(stream):
    """Return the EXIF data of a PNG, empty if it has none; the chunk may follow the pixels, which are skipped."""
    stream.seek(len(PNG_SIGNATURE))
    while len(head := stream.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind in (b"eXIf", b"IEND"):
            return stream.read(length)
        stream.seek(length + 4, io.SEEK_CUR)
    return b""


def _orient(values, orientation):
    """Return values [H x W x C] as the EXIF orientation displays them."""
    values = values.swapaxes(0, 1) if orientation >= 5 else values
    values = values[::-1] if orientation in (3, 4, 7, 8) else values
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


def _dtype(image):
    # Older Pillow versions open a 16-bit PNG as 32-bit integers.
    if _drops_bits(image) or (image.format, image.mode) == ("PNG", "I"):
        return "uint16"
    return _MODE_DTYPES.get(image.mode, "uint8")


def _drops_bits(image):
    """Return whether Pillow reads 16-bit color by dropping the lower byte; only the raw mode of its tiles shows it."""
    return ";16" in str(image.tile) and image.mode not in _MODE_DTYPES


def _check_readable(image):
    raw_modes = {args if isinstance(args, str) else str(args[0]) for *_, args in image.tile}
    is_tiff = image.format == "TIFF"
    pages = image.n_frames if is_tiff else 1
    # Pillow takes each plane as 8 bits per value, whatever it has.
    deep_planes = is_tiff and image.tag_v2.get(_PLANES) == 2 and max(image.tag_v2.get(_BITS, (1,))) > 8
    require(
        (image.mode in _MODE_CHANNELS, f"color mode {image.mode}: expected one of: {', '.join(_MODE_CHANNELS)}"),
        (not deep_planes, "more than 8 bits per channel in separate planes; save the image with interleaved channels "
                          "(planar configuration 1)"),
        (not _drops_bits(image) or raw_modes <= _LOWER_BYTE.keys(),
         f"16 bits per channel as {', '.join(sorted(raw_modes))}, of which Pillow keeps 8: expected RGB or RGBA; save "
         "the image as .npy [H x W x C] uint16"),
        (pages == 1, f"{pages} pages; save one image per file"),
    )


def channels_last(shape):
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
