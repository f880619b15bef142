"""Read a folder or an .npz of images as float32 in [0, 1]."""

import collections
import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from ..config import as_dict
from ..files import bf
from ..interfaces import ImageSource
from .config import DataConfig, resolve_value_range
from .decoding import _FULL_RANGE, _Header, _as_channels, _load, _read_header, to_unit
from .listing import EXTENSIONS, infer_classes, hash_lines, file_extension, relative_names, require_data_dir, file_stamp, walk_files
from .npz import open_archive
from .resizing import _fit


class ImageFolder(ImageSource):
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
        self.random_flip, self.random_crop = config.random_flip, config.crop == "random"
        if len(config.sides) != 2 or config.crop == "grid":
            raise ValueError(f"--image_size {config.image_size} --crop {config.crop}: pictures have two sizes and no "
                             "grid of patches; volumes are read by volume_datasets")
        self.height, self.width = config.sides
        self.value_range = resolve_value_range(config)
        self.reference_db = float(config.reference_db) if str(config.reference_db) else None
        require_data_dir(config.data_dir, flag)
        self._stack = None  # the pictures of an .npz, which is read whole
        self._pool = None
        if config.data_dir.endswith(".npz") and not bf.isdir(config.data_dir):
            headers = self._open_archive(config.data_dir)
        else:
            headers = self._open_folder(config.data_dir)
        channels = self._check_consistent(headers)
        self.kinds = dict(collections.Counter(header.dtype for header in headers))
        self.unpadded_shape = (channels, self.height, self.width)
        self.shape = self.unpadded_shape
        if config.pad and multiple is not None:
            multiple = (multiple, multiple) if isinstance(multiple, int) else tuple(multiple)
            self.shape = (channels, *(-(-n // step) * step for n, step in zip((self.height, self.width), multiple)))

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
        return torch.from_numpy(flip_last_axis(pictures, flips, self.width))

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
        found = list(walk_files(data_dir, EXTENSIONS))
        self.paths = [p for p in found if file_extension(p) in EXTENSIONS and not bf.basename(p).startswith(".")]
        self.ignored = len(found) - len(self.paths)
        if not self.paths:
            hint = "; give the .npz file itself" if any(file_extension(p) == "npz" for p in found) else ""
            raise FileNotFoundError(f"{data_dir} holds no picture ({', '.join(EXTENSIONS)}) among {len(found)} files{hint}"
                                    f"; check {self._flag}")
        self.names = relative_names(data_dir, self.paths)
        self.class_names, self.labels = infer_classes(self.names, data_dir)
        with ThreadPoolExecutor(8) as pool:  # opening files waits for the disk or the network
            headers, stamps = zip(*pool.map(lambda path: (_read_header(path), file_stamp(path)), self.paths))
        self.fingerprint = hash_lines(f"{name} {stamp}" for name, stamp in zip(self.names, stamps))
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
        self.fingerprint = hash_lines([file_stamp(path)])
        return [_Header(*self._stack.shape[1:], str(images.dtype))] * len(images)

    def _check_consistent(self, headers):
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


def flip_last_axis(pictures, flips, width):
    """Mirror those of `flips` (bools, or None) along the last axis, in place.  [n x C x ... x W] -> same.

    What is padded beyond `width` stays on its side and repeats the new edge.
    """
    if flips is not None and any(flips):
        chosen = np.asarray(flips, bool)
        seen = pictures[chosen][..., :width][..., ::-1]
        pictures[chosen, ..., :width] = seen
        pictures[chosen, ..., width:] = seen[..., -1:]
    return pictures
