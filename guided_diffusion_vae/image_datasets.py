"""Turn picture files into batches: the reference's loader, and one that keeps grey, 16-bit, float and complex values.

`load_data` and `ImageDataset` are guided-diffusion's: 8-bit RGB in [-1, 1]. `PictureFolder` is what the rest of this
project reads: float32 in [0, 1], as many channels as the files have, nothing clipped or enlarged unasked. Which
pictures form a batch is computed by `BatchPlan` from (seed, step) alone.
"""

import collections
import dataclasses
import hashlib
import io
import math
import os
import queue
import random
import shutil
import struct
import tempfile
import threading
import weakref
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from .config import as_dict, opt, size
from .files import bf

REFERENCE_ENDINGS = ("jpg", "jpeg", "png", "gif")
ENDINGS = REFERENCE_ENDINGS + ("tif", "tiff", "npy")
SMALLEST_CROP = 0.8
ORDERED_AHEAD = 2**14   # items whose order is drawn at once

# Channels that a Pillow mode is read as; a palette stands for colours, an opaque alpha channel is left out.
_MODE_CHANNELS = {"1": 1, "L": 1, "LA": 1, "I;16": 1, "I;16B": 1, "I;16L": 1, "I": 1, "F": 1,
                  "P": 3, "PA": 3, "RGB": 3, "RGBA": 3, "CMYK": 3, "YCbCr": 3}
_MODE_DTYPES = {"I;16": "uint16", "I;16B": "uint16", "I;16L": "uint16", "I": "int32", "F": "float32"}
_FULL_RANGE = {"bool": (0, 1), "uint8": (0, 255), "int8": (-128, 127), "uint16": (0, 65535), "int16": (-32768, 32767)}
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as Pillow's conversion to grey
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


# The reference's interface: 8-bit RGB in [-1, 1], Python's `random` for crops and flips.


def load_data(*, data_dir, batch_size, image_size, class_cond=False, deterministic=False, random_crop=False,
              random_flip=True, shard=None, num_shards=None):
    """Return an endless generator of (images [N x 3 x S x S] float32 in [-1, 1], {"y": labels [N]} or {}).

    Classes are the sorted distinct parts of the file names before the first underscore. Each rank reads every
    num_shards-th file; without `shard` and `num_shards` they are those of torch.distributed, else 0 of 1.

    :raises FileNotFoundError: no folder, or no picture in it.
    :raises ValueError: this shard has fewer pictures than a batch (the reference waits for ever).
    """
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    if shard is None:
        shard = torch.distributed.get_rank() if running else 0
    if num_shards is None:
        num_shards = torch.distributed.get_world_size() if running else 1
    require_data_dir(data_dir)
    files = _list_image_files_recursively(data_dir)
    if not files:
        raise FileNotFoundError(f"{data_dir} holds no picture ({', '.join(REFERENCE_ENDINGS)}); check --data_dir")
    labels = None
    if class_cond:
        prefixes = [_prefix(path) for path in files]
        number = {name: label for label, name in enumerate(sorted(set(prefixes)))}
        labels = [number[name] for name in prefixes]
    pictures = ImageDataset(image_size, files, classes=labels, shard=shard, num_shards=num_shards,
                            random_crop=random_crop, random_flip=random_flip)
    if len(pictures) < batch_size:
        raise ValueError(f"rank {shard} of {num_shards} has {len(pictures)} of the {len(files)} pictures in "
                         f"{data_dir}, less than --batch_size {batch_size}; lower it or give more pictures")
    return _endless(DataLoader(pictures, batch_size, shuffle=not deterministic, num_workers=1, drop_last=True))


class ImageDataset(Dataset):
    """Read every num_shards-th picture as RGB; item: (float32 [3 x S x S] in [-1, 1], {"y": int64 label} or {})."""

    def __init__(self, resolution, image_paths, classes=None, shard=0, num_shards=1, random_crop=False,
                 random_flip=True):
        super().__init__()
        mine = slice(shard, None, num_shards)
        self.resolution = resolution
        self.local_images = image_paths[mine]
        self.local_classes = classes[mine] if classes is not None else None
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __len__(self):
        return len(self.local_images)

    def __getitem__(self, idx):
        with bf.BlobFile(self.local_images[idx], "rb") as stream, Image.open(stream) as picture:
            colours = picture.convert("RGB")
        cut = random_crop_arr if self.random_crop else center_crop_arr
        pixels = cut(colours, self.resolution)
        # The flip's coin is thrown after the crop's draws: a seed then means what it means in the reference.
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        signed = pixels.astype(np.float32) / 127.5 - 1
        extra = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], np.int64)}
        return np.moveaxis(signed, -1, 0), extra


def center_crop_arr(pil_image, image_size):
    """Return the middle square of a picture as an array [S x S] or [S x S x C], resampled so that it fits."""
    pixels = np.array(_shrink(pil_image, image_size, image_size))
    return _window(pixels, image_size, image_size)


def random_crop_arr(pil_image, image_size, min_crop_frac=0.8, max_crop_frac=1.0):
    """Return a random square as an array [S x S] or [S x S x C].

    Its side is a share between the two fractions of the picture's smaller side. Draws from Python's `random`, in
    this order: the smaller side after resampling, the top, the left.
    """
    least, most = (math.ceil(image_size / fraction) for fraction in (max_crop_frac, min_crop_frac))
    side = random.randrange(least, most + 1)
    pixels = np.array(_shrink(pil_image, side, side))
    top = random.randrange(pixels.shape[0] - image_size + 1)
    left = random.randrange(pixels.shape[1] - image_size + 1)
    return pixels[top:top + image_size, left:left + image_size]


def _list_image_files_recursively(data_dir):
    """Return the paths of all jpg, jpeg, png and gif files below a folder, entries sorted folder by folder."""
    return [path for path in walk_files(data_dir, REFERENCE_ENDINGS) if ending_of(path) in REFERENCE_ENDINGS]


def walk_files(folder, endings):
    for entry in sorted(bf.listdir(folder)):
        path = bf.join(folder, entry)
        # A name that ends like a picture is taken for one without asking the file system, which is slow on clouds.
        if ending_of(entry) in endings or not bf.isdir(path):
            yield path
        else:
            yield from walk_files(path, endings)


def _endless(loader):
    while True:
        yield from loader


def ending_of(path):
    stem, dot, ending = bf.basename(path).rpartition(".")
    return ending.lower() if dot else ""


def _prefix(path):
    return bf.basename(path).partition("_")[0]


# The project's own loader: [0, 1], values kept.


@dataclass
class DataConfig:
    """What to read, and how file values become numbers in [0, 1]."""

    data_dir: str = opt("", "folder of pictures (jpg, png, gif, tiff, npy; sub-folders are classes), or one .npz "
                            "with images [N x H x W (x C)] and labels")
    image_size: size = opt(64, "size of the pictures: 64, or height x width as 64x128; larger ones are shrunk. Three "
                               "sizes, such as 128x128x64, are those of volumes, or of patches cut out of them")
    voxel_size: tuple = opt((), "the same for volumes as a list: [128,128,64]")
    image_channels: int = opt(0, "1 or 3: convert every picture to grey or colour; 0: as the files are, all alike",
                              choices=(0, 1, 3))
    value_range: str = opt("", "lo,hi: file values that become 0 and 1 (write --value_range=-80,0); needed for float "
                               "and 32-bit files, else the integer type's full range; values outside are refused")
    value_window: str = opt("", "the same, and what lies outside is cut off, as in a window of a CT in Hounsfield "
                                "units (--value_window=-1000,400)")
    dynamic_range_db: float = opt(0.0, "complex .npy: [reference - D, reference] dB of the magnitude become [0, 1], "
                                       "what lies below is 0; needed for complex files", least=0)
    reference_db: str = opt("", "complex .npy: the level in dB that becomes 1; empty: each array's own maximum")
    crop: str = opt("center", "what happens to a picture of another shape; center or random: cut to the shape asked "
                              "for; none: squeezed into it whole, while volumes must have that shape; grid (volumes): "
                              "cut into as many patches as cover it", choices=("center", "random", "none", "grid"))
    random_flip: bool = opt(False, "mirror every other picture left to right (a spectrogram then runs back in time)")
    pad: bool = opt(False, "repeat the last row and column until the autoencoder's strides divide the size; results "
                           "are cropped back")
    patches_per_volume: int = opt(1, "volumes with --crop random: patches that each gives in an epoch", least=1)
    spacing: str = opt("", "volumes: distance of neighbouring voxels in mm, one number or one an axis; empty: what the "
                           "file says (.nii), else 1")

    def __post_init__(self):
        if self.voxel_size:
            self.image_size, self.voxel_size = "x".join(str(int(n)) for n in self.voxel_size), ()

    @property
    def sides(self):
        """The sizes along every axis, (height, width) or (depth, height, width)."""
        return parse_size(self.image_size)


class PictureFolder:
    """Read pictures of one size as float32 [C x H x W] in [0, 1]; counted and checked by their headers when made.

    Classes are the sub-folders where every picture stands in one, else the parts of the names before the first
    underscore; without either (some name has no underscore) `labels` and `class_names` are None. An animated GIF
    gives its first frame. Hidden files and other endings are left out and counted in `ignored`.

    :param config: a `DataConfig`; single fields may be given as keywords.
    :param multiple: strides (per axis) that shall divide the size; used where `config.pad` is True. Then `shape` is
        the padded and `unpadded_shape` the picture's own shape, and `unpad` goes back.
    :raises FileNotFoundError: no folder, or no picture in it.
    :raises ValueError: a header that cannot be read, a picture smaller than asked for, grey and colour mixed, a range
        that is needed and not given; the message names the file and the flag.
    """

    def __init__(self, config=None, multiple=None, flag="--data_dir", **fields):
        self.config = config = dataclasses.replace(config or DataConfig(), **fields)
        self.folder, self._flag = config.data_dir, flag
        if len(config.sides) != 2 or config.crop == "grid":
            raise ValueError(f"--image_size {config.image_size} --crop {config.crop}: pictures have two sizes and no "
                             "grid of patches; volumes are read by volume_datasets")
        self.height, self.width = config.sides
        self.value_range = range_of(config)
        self.reference_db = float(config.reference_db) if str(config.reference_db) else None
        require_data_dir(config.data_dir, flag)
        self._stack = None  # the pictures of an .npz, which is read whole
        self._pool = None
        if config.data_dir.endswith(".npz") and not bf.isdir(config.data_dir):
            headers = self._open_archive(config.data_dir)
        else:
            headers = self._open_folder(config.data_dir)
        channels = self._require_alike(headers)
        self.kinds = dict(collections.Counter(header.dtype for header in headers))
        self.unpadded_shape = (channels, self.height, self.width)
        self.shape = self.unpadded_shape
        if config.pad and multiple is not None:
            multiple = (multiple, multiple) if isinstance(multiple, int) else tuple(multiple)
            self.shape = (channels, *(-(-n // step) * step for n, step in zip((self.height, self.width), multiple)))

    def __len__(self):
        return len(self.names)

    def read(self, index, rng=None):
        """Return picture `index` as float32 [C x H x W] in [0, 1]; `rng` (numpy Generator) places a random crop.

        :raises ValueError: a damaged file, transparency, values outside the stated range; the message names the file.
        """
        where = self.paths[index]
        pixels = self._stack[index] if self._stack is not None else _load(where)
        if pixels.dtype != np.uint8 or self.value_range:
            pixels = self._unit(pixels, where)
        pixels = _as_channels(pixels, self.shape[0])
        pixels = _fit(pixels, self.height, self.width, self.config.crop, rng)
        if pixels.dtype == np.uint8:  # 8-bit pictures are resampled as such, like the reference's
            pixels = self._unit(pixels, where)
        below, right = self.shape[1] - self.height, self.shape[2] - self.width
        if below or right:
            pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="edge")
        return np.ascontiguousarray(np.moveaxis(pixels, -1, 0))

    def batch(self, indices, flips=None, rngs=None):
        """Return pictures as float32 [n x C x H x W] in [0, 1], those of `flips` (bools) mirrored left to right."""
        rngs = rngs if rngs is not None else [None] * len(indices)
        if self._stack is None and self._pool is None:
            self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        decode = map if self._stack is not None else self._pool.map
        pictures = np.stack(list(decode(self.read, (int(i) for i in indices), rngs)))
        return torch.from_numpy(mirrored(pictures, flips, self.width))

    @property
    def preprocessing(self):
        """How files become numbers: what a checkpoint remembers of the configuration."""
        return {k: v for k, v in as_dict(self.config).items() if k not in ("data_dir", "random_flip")}

    def describe(self):
        """Return what was read and how, as a plain dictionary (the preprocessing entry of a latent cache)."""
        return {**dataclasses.asdict(self.config), "files": len(self), "ignored": self.ignored, "kinds": self.kinds,
                "shape": list(self.shape), "unpadded_shape": list(self.unpadded_shape), "fingerprint": self.fingerprint}

    def summary(self):
        """Return one line for the log: count, shape, types and classes."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        text = f"{len(self)} pictures {'x'.join(map(str, self.shape))} ({kinds}) in {self.config.data_dir}"
        if self.labels is not None:
            counts = np.bincount(self.labels, minlength=len(self.class_names))
            parts = [f"{name} {count}" for name, count in zip(self.class_names[:20], counts)]
            text += f"; {len(self.class_names)} classes: " + ", ".join(parts) + (", ..." if len(counts) > 20 else "")
        return text + (f"; {self.ignored} other files ignored" if self.ignored else "")

    def _open_folder(self, data_dir):
        found = list(walk_files(data_dir, ENDINGS))
        self.paths = [p for p in found if ending_of(p) in ENDINGS and not bf.basename(p).startswith(".")]
        self.ignored = len(found) - len(self.paths)
        if not self.paths:
            hint = "; give the .npz file itself" if any(ending_of(p) == "npz" for p in found) else ""
            raise FileNotFoundError(f"{data_dir} holds no picture ({', '.join(ENDINGS)}) among {len(found)} files{hint}"
                                    f"; check {self._flag}")
        self.names = names_below(data_dir, self.paths)
        self.class_names, self.labels = classes_of(self.names, data_dir)
        with ThreadPoolExecutor(8) as pool:  # opening files waits for the disk or the network
            headers, stamps = zip(*pool.map(lambda path: (_read_header(path), stamp_of(path)), self.paths))
        self.fingerprint = digest_of(f"{name} {stamp}" for name, stamp in zip(self.names, stamps))
        return headers

    def _open_archive(self, path):
        arrays = open_archive(path)
        images = arrays.get("images", arrays.get("arr_0"))
        labels = arrays.get("labels", arrays.get("arr_1"))
        if images is None or images.ndim not in (3, 4) or images.ndim == 4 and images.shape[3] not in (1, 3):
            held = {name: array.shape for name, array in arrays.items()}
            raise ValueError(f"{path}: wanted 'images' (or 'arr_0') of shape [N x H x W] or [N x H x W x 1 or 3], "
                             f"found {held}")
        if not len(images):
            raise FileNotFoundError(f"{path} holds no picture; check {self._flag}")
        fits = labels is None or labels.shape == images.shape[:1] and labels.dtype.kind in "iu" and labels.min() >= 0
        if not fits:
            raise ValueError(f"{path}: 'labels' must be {len(images)} integers from 0 up, found {labels.dtype} of "
                             f"shape {labels.shape}")
        self._stack = images if images.ndim == 4 else images[..., None]
        self.names = [f"{bf.basename(path)}[{i}]" for i in range(len(images))]
        self.paths = [f"{path}[{i}]" for i in range(len(images))]
        self.ignored = 0
        self.labels = None if labels is None else labels.astype(np.int64)
        self.class_names = None
        if labels is not None:
            names = arrays.get("class_names")
            self.class_names = [str(i) for i in range(int(labels.max()) + 1)] if names is None else names.tolist()
        self.fingerprint = digest_of([stamp_of(path)])
        return [_Header(*self._stack.shape[1:], str(images.dtype))] * len(images)

    def _require_alike(self, headers):
        """Return the number of channels, or raise ValueError where the files do not suit each other or the flags."""
        grey, colour = (next((p for p, h in zip(self.paths, headers) if h.channels == c), None) for c in (1, 3))
        if grey and colour and not self.config.image_channels:
            raise ValueError(f"{grey} is grey and {colour} is in colour; give --image_channels 1 or --image_channels "
                             "3 to convert all pictures")
        small = [(p, h) for p, h in zip(self.paths, headers) if h.height < self.height or h.width < self.width]
        if small:
            path, header = small[0]
            raise ValueError(f"{path} is {header.height}x{header.width} (height x width), smaller than --image_size "
                             f"{self.height}x{self.width}, as {len(small)} of {len(headers)} pictures are; nothing is "
                             "enlarged: lower --image_size or leave them out")
        for path, header in zip(self.paths, headers):
            if header.dtype.startswith("complex"):
                if self.config.dynamic_range_db <= 0:
                    raise ValueError(f"{path} is complex; give --dynamic_range_db (say 40) to map its magnitude to "
                                     "[0, 1]")
            elif not self.value_range and header.dtype not in _FULL_RANGE:
                raise ValueError(f"{path} holds {header.dtype} values; give --value_range lo,hi, the values that "
                                 "become 0 and 1")
        return self.config.image_channels or (1 if grey else 3)

    def _unit(self, pixels, where):
        clip = bool(self.config.value_window)
        return to_unit(pixels, where, self.value_range, self.config.dynamic_range_db, self.reference_db, clip)


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


def range_of(config):
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


def names_below(folder, paths):
    """Return the paths relative to `folder`, with forward slashes."""
    start = len(folder.rstrip("/")) + 1
    return [path[start:].replace(os.sep, "/") for path in paths]


def classes_of(names, folder):
    """Return (sorted class names, int64 labels) of relative file names, or (None, None) where they tell no class.

    :raises ValueError: the sub-folders are parts of a data set (train, val), not classes.
    """
    if all("/" in name for name in names):
        classes = [name.partition("/")[0] for name in names]
        if "train" in classes and {"val", "valid", "validation", "test"} & set(classes):
            parts = ", ".join(sorted(set(classes)))
            raise ValueError(f"{folder} holds {parts}: parts of a data set, not classes; give --data_dir one of them")
    elif all("_" in bf.basename(name) for name in names):
        classes = [_prefix(name) for name in names]
    else:
        return None, None
    known = sorted(set(classes))
    number = {name: label for label, name in enumerate(known)}
    return known, np.array([number[name] for name in classes], np.int64)


# Files to arrays.

_Header = collections.namedtuple("_Header", "height width channels dtype")


def require_data_dir(data_dir, flag="--data_dir"):
    """Raise FileNotFoundError, naming the flag that it was given as, where no data can be."""
    if not data_dir:
        raise FileNotFoundError(f"no folder of pictures given; set {flag}")
    if not bf.exists(data_dir):
        raise FileNotFoundError(f"{data_dir} is not there; check {flag}")
    if not bf.isdir(data_dir) and ending_of(data_dir) != "npz":
        raise FileNotFoundError(f"{data_dir} is a file; give its folder (or an .npz) as {flag}")


def _read_header(path):
    """Return height, width, channels and value type of a file without decoding it."""
    with naming(path), bf.BlobFile(path, "rb") as stream:
        if ending_of(path) == "npy":
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(stream)
            return _Header(*_channels_last(shape)[1], dtype.name)
        with Image.open(stream) as picture:
            _require_readable(picture)
            return _Header(picture.height, picture.width, _MODE_CHANNELS[picture.mode], _dtype(picture))


def _load(path):
    """Return a file's values [H x W x C] in their own type; 8-bit pictures are uint8, grey or RGB."""
    with naming(path), bf.BlobFile(path, "rb") as stream:
        if ending_of(path) == "npy":
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


def open_archive(path):
    """Return {name: array} of an .npz; of local files, arrays of more than one axis are memory-mapped.

    :raises ValueError: where it is none, or holds Python objects; names the file.
    """
    try:
        with bf.BlobFile(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
            return {info.filename.removesuffix(".npy"): _member(path, archive, info) for info in archive.infolist()}
    except (*_UNREADABLE, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: cannot be read as an .npz archive ({error})") from error


def _member(path, archive, info):
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(stream)
        header_size = stream.tell()
    if "://" in str(path) or dtype.hasobject or len(shape) < 2 or 0 in shape:
        with archive.open(info) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)
    if info.compress_type != zipfile.ZIP_STORED:
        # From an unpacked copy that has no name any more and goes with the last look at it.
        with archive.open(info) as packed, tempfile.NamedTemporaryFile() as copy:
            shutil.copyfileobj(packed, copy, 1 << 22)
            copy.flush()
            return np.load(copy.name, mmap_mode="r", allow_pickle=False)
    with open(path, "rb") as stream:
        stream.seek(info.header_offset + 26)    # in the local header: the lengths of name and extra field
        start = info.header_offset + 30 + int(np.frombuffer(stream.read(4), "<u2").sum(dtype=int)) + header_size
    return np.memmap(path, dtype, mode="r", offset=start, shape=shape, order="F" if fortran_order else "C")


class naming:
    """Turn whatever goes wrong while reading a file into a ValueError that names it."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, _UNREADABLE):
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "its content is no picture that Pillow knows" if unknown else error
            raise ValueError(f"{self.path}: cannot be read ({reason}); mend it or take it out of the folder") from error


def mirrored(pictures, flips, width):
    """Mirror those of `flips` (bools, or None) along the last axis, in place.  [n x C x ... x W] -> same.

    What is padded beyond `width` stays on its side and repeats the new edge.
    """
    if flips is not None and any(flips):
        chosen = np.asarray(flips, bool)
        seen = pictures[chosen][..., :width][..., ::-1]
        pictures[chosen, ..., :width] = seen
        pictures[chosen, ..., width:] = seen[..., -1:]
    return pictures


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


def _fit(pixels, height, width, crop, rng):
    """Return [height x width x C] of a picture at least that large; one of the very size is returned as it is."""
    if pixels.shape[:2] == (height, width) and (crop != "random" or rng is None):
        return pixels
    if crop == "none":
        return _resample(pixels, lambda picture: _squeeze(picture, height, width))
    if crop == "random" and rng is not None:
        # Never above the picture's own size: that would enlarge it.
        room = min(pixels.shape[0] / height, pixels.shape[1] / width)
        zoom = min(room, 1 / rng.uniform(SMALLEST_CROP, 1))
        tall, wide = math.ceil(height * zoom - 1e-9), math.ceil(width * zoom - 1e-9)
        shrunk = _resample(pixels, lambda picture: _shrink(picture, tall, wide))
        top, left = (int(rng.integers(n - m + 1)) for n, m in zip(shrunk.shape, (height, width)))
        return shrunk[top:top + height, left:left + width]
    return _window(_resample(pixels, lambda picture: _shrink(picture, height, width)), height, width)


def _resample(pixels, change):
    """Apply a change of size to [H x W x C]: uint8 as a picture, float32 channel by channel without rounding."""
    if pixels.dtype == np.uint8:
        whole = pixels if pixels.shape[-1] == 3 else pixels[..., 0]
        changed = np.asarray(change(Image.fromarray(np.ascontiguousarray(whole))))
        return changed if changed.ndim == 3 else changed[..., None]
    layers = [change(Image.fromarray(np.ascontiguousarray(layer))) for layer in np.moveaxis(pixels, -1, 0)]
    # Bicubic weights overshoot at edges, by the interpolation and not by the data; 8-bit pictures saturate likewise.
    return np.clip(np.stack([np.asarray(layer) for layer in layers], axis=-1), 0, 1)


def _shrink(picture, height, width):
    """Resample until height x width is just covered: box halvings while twice as large, then one bicubic step."""
    picture = _halve(picture, height, width)
    scale = max(height / picture.height, width / picture.width)
    size = round(scale * picture.width), round(scale * picture.height)
    return picture.resize(size, Image.Resampling.BICUBIC)


def _squeeze(picture, height, width):
    return _halve(picture, height, width).resize((width, height), Image.Resampling.BICUBIC)


def _halve(picture, height, width):
    while picture.height >= 2 * height and picture.width >= 2 * width:
        half = picture.width // 2, picture.height // 2
        picture = picture.resize(half, Image.Resampling.BOX)
    return picture


def _window(pixels, height, width):
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top:top + height, left:left + width]


def stamp_of(path):
    known = bf.stat(path)
    return f"{known.size} {known.mtime}"


def digest_of(rows):
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


# Batches: which pictures, when, and read ahead.


def permuted(positions, count, seed, epoch):
    """Return where a permutation of range(count), keyed by (seed, epoch), sends `positions` (uint64 array).

    A Feistel network (Luby and Rackoff 1988) permutes the next power of four; values beyond `count` are sent through
    again until they fall inside (cycle walking, Black and Rogaway 2002). No table is stored, whatever `count` is.
    """
    half = np.uint64(max(2, ((count - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.frombuffer(hashlib.sha512(f"permutation {seed} {epoch}".encode()).digest(), "<u8")
    values = np.array(positions, np.uint64)
    outside = np.ones(values.shape, bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        values[outside] = left << half | right
        outside = values >= count
    return values


def _mix(values):
    """Return uint64 values scrambled one by one (the finaliser of SplitMix64, Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class BatchPlan:
    """Say which items form batch `step` on this rank, from (seed, step) alone.

    The items of all epochs form one stream, each epoch a permutation of its own; slot k of step s is position
    s * batch_size * num_ranks + k of the stream, and rank r holds the slots from r * batch_size. So two ranks with
    batch B see what one rank with batch 2B sees, and a batch may reach over the end of an epoch.

    :raises ValueError: fewer items than one step takes.
    """

    def __init__(self, count, batch_size, rank=0, num_ranks=1, seed=0, shuffle=True):
        if batch_size < 1 or count < batch_size * num_ranks:
            raise ValueError(f"{count} items are fewer than one step takes: --batch_size {batch_size} on {num_ranks} "
                             f"ranks is {batch_size * num_ranks}; lower it, use fewer ranks or give more data")
        self.count = count
        self.batch_size = batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.seed = seed
        self.shuffle = shuffle
        # The last rounds of `permuted` go around with few items: of many at once they cost next to nothing.
        self._together = max(1, min(ORDERED_AHEAD, count) // (batch_size * num_ranks))
        self._ordered = {}

    def summary(self):
        """Return one line for the log: how many items a step and steps an epoch take."""
        together = self.batch_size * self.num_ranks
        ranks = f"{self.num_ranks} rank{'s'[:self.num_ranks > 1]} with {self.batch_size}"
        return f"{ranks} take {together} of {self.count} items a step, {self.count / together:.1f} steps an epoch"

    @property
    def slots(self):
        """This rank's places in the batch of all ranks."""
        return range(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)

    def indices(self, step, steps=1):
        """Return the items of batch `step`, and of the `steps` from there on, on this rank, int64 [steps * batch_size].
        """
        blocks = range(step // self._together, (step + steps - 1) // self._together + 1)
        self._ordered = {b: self._ordered[b] if b in self._ordered else self._order(b) for b in blocks}
        begin = (step - blocks.start * self._together) * self.batch_size
        return np.concatenate(list(self._ordered.values()))[begin:begin + steps * self.batch_size]

    def _order(self, block):
        """Return the items of the `_together` batches of a block on this rank."""
        steps = np.arange(block * self._together, (block + 1) * self._together, dtype=np.int64)
        firsts = steps * (self.batch_size * self.num_ranks)
        positions = (firsts[:, None] + np.array(self.slots, np.int64)).reshape(-1)
        epochs, places = np.divmod(positions, self.count)
        if not self.shuffle:
            return places
        items = np.empty_like(places)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            items[now] = permuted(places[now], self.count, self.seed, int(epoch)).astype(np.int64)
        return items

    def coins(self, step):
        """Return one fair coin per item of batch `step`, bool [batch_size]; they depend on (seed, step, slot) alone."""
        key = np.frombuffer(hashlib.sha256(f"coins {self.seed} {step}".encode()).digest()[:8], "<u8")
        return _mix(key + np.array(self.slots, np.uint64)) >> np.uint64(63) == 1

    def generators(self, step):
        """Return one numpy Generator per item of batch `step`, keyed likewise."""
        return [np.random.default_rng([self.seed % 2**64, step, slot]) for slot in self.slots]


class Prefetcher:
    """Make the batches of successive steps ahead in a background thread.

    :param make_batch: step -> batch; called for start_step, start_step + stride, ... by one thread.
    :param depth: batches that may wait.
    :param end_step: where to stop; None never.
    """

    def __init__(self, make_batch, start_step=0, depth=2, end_step=None, stride=1):
        self._ready = queue.Queue()
        self._room = threading.Semaphore(depth)
        self._stop = threading.Event()
        self._error = None
        arguments = make_batch, start_step, end_step, stride, self._ready, self._room, self._stop
        self._thread = threading.Thread(target=_produce, args=arguments, daemon=True, name="prefetch")
        self._thread.start()
        # Also at exit: a thread still inside numpy or torch while the interpreter ends would crash it.
        self._finalizer = weakref.finalize(self, _halt, self._stop, self._room, self._thread)

    def next(self):
        """Return the next batch; an exception of `make_batch` is raised here, again at every further call."""
        if self._error is None and not self._stop.is_set():
            batch, self._error = self._ready.get()
            self._room.release()
            if self._error is None:
                return batch
        if self._error is not None:
            raise self._error
        raise RuntimeError("this Prefetcher is closed")

    def close(self):
        """Stop the thread after the batch it is at."""
        self._finalizer()


def _produce(make_batch, step, end_step, stride, ready, room, stop):
    while end_step is None or step < end_step:
        room.acquire()
        if stop.is_set():
            return
        try:
            ready.put((make_batch(step), None))
        except Exception as error:
            ready.put((None, error))
            return
        step += stride


def _halt(stop, room, thread):
    stop.set()
    room.release()
    if thread is not threading.current_thread():
        thread.join()


class BatchStream:
    """Iterate endlessly over (batch, extra), made ahead in the background; `seek` goes to the batch of any step.

    :param make_batch: step -> prepared batch, on a background thread.
    :param finish: prepared batch -> (batch, extra), on the caller's thread (what touches a device belongs here).
    :param together: where it is more than 1, so many steps are prepared and finished in one go, since small batches
        cost more to hand over than to read: `make_batch` is given the first step, `finish` returns a list.
    """

    def __init__(self, make_batch, start_step=0, finish=None, depth=2, together=1):
        self.step = start_step
        self._make_batch = make_batch
        self._finish = finish
        self._depth = depth
        self._together = together
        self._ahead = None
        self._finished = collections.deque()

    def __iter__(self):
        return self

    def __next__(self):
        if not self._finished:
            if self._ahead is None:
                self._ahead = Prefetcher(self._make_batch, self.step, self._depth, stride=self._together)
            made = self._ahead.next()
            made = self._finish(made) if self._finish else made
            self._finished.extend(made if self._together > 1 else [made])
        self.step += 1
        return self._finished.popleft()

    def seek(self, step):
        """Make `step` the next batch."""
        if step != self.step:
            self.close()
            self.step = step

    def close(self):
        """Stop reading ahead; the next batch starts it again."""
        self._finished.clear()
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None


def picture_batches(folder, plan, start_step=0, with_labels=False):
    """Return a `BatchStream` of (pictures [n x C x H x W] in [0, 1], {"y": int64 [n]} or {}).

    Flips and random crops, where the folder's configuration asks for them, depend on (plan.seed, step, slot) alone.
    """
    require_labels(folder, with_labels)

    def make_batch(step):
        indices = plan.indices(step)
        rngs = plan.generators(step) if folder.config.crop == "random" else None
        flips = plan.coins(step) if folder.config.random_flip else None
        extra = {"y": torch.from_numpy(folder.labels[indices])} if with_labels else {}
        return folder.batch(indices, flips, rngs), extra

    return BatchStream(make_batch, start_step)


def require_labels(source, wanted):
    """Raise ValueError where labels are wanted and `source` has none."""
    if wanted and source.labels is None:
        raise ValueError(f"{source.folder} has no classes, which are needed here (--class_cond True, or a classifier): "
                         "name the files CLASS_rest.png, or put them into one folder per class (or, for an .npz, give "
                         "it 'labels')")


def labels_in(pictures, class_names):
    """Return the labels of pictures in the numbering of `class_names`, those of a model.

    :raises ValueError: where the pictures have classes that the model does not know.
    """
    if pictures.class_names is None:
        return pictures.labels
    unknown = sorted(set(pictures.class_names) - set(class_names))
    if unknown:
        raise ValueError(f"the pictures of {pictures.folder} have classes {', '.join(unknown)} that the model does not "
                         f"know; it knows {', '.join(class_names)}")
    return np.array([class_names.index(name) for name in pictures.class_names])[pictures.labels]
