"""Read volume files as patches for training or as full volumes, as float32 in [0, 1]."""

import collections
import dataclasses
import functools
import gzip
import math
import os
import threading
from collections.abc import Sequence

import numpy as np

from ..config import format_shape, require
from ..files import (
    MAX_PIXELS, bf, check_array_size, file_errors, file_extension, open_npy, read_to_end,
)
from ..nn import keyed_rng
from .config import DataConfig, parse_spacing
from .decoding import FULL_RANGE, FileHeader, check_size, load_npy, unit_scale
from .labels import find_labels
from .listing import FileSource, file_stamp
from .npz import open_archive, read_archive_headers

EXTENSIONS = ("npy", "npz", "nii", "gz")
CACHE_BYTES = 4 * 2**30     # of unpacked volumes kept in memory, as patches come from the same files again


class VolumeFolder(FileSource):
    """Patches of one size from volumes as float32 [C x D x H x W] in [0, 1].

    Files are `.npy` [D x H x W] or [C x D x H x W], `.npz` with one such array, `.nii` and `.nii.gz` (axes as stored).
    `config.crop` defines an item: the center of a volume (center), a patch at a random position of each access
    (random), each of the evenly spaced patches that cover a volume (grid), or the full volume, which then must have
    the size (none). Uncompressed files on disk are read patch by patch. Compressed ones are unpacked on the first
    access, which compares their checksums, and kept in memory up to `CACHE_BYTES` per process. Classes are inferred
    from names as in `ImageFolder`.

    :param config: a `DataConfig`; `fields` replace single fields of it.
    :param multiple: factors per axis that must divide the size, used if `config.pad` is True.
    :raises FileNotFoundError: if there is no folder, or no volume in it.
    :raises ValueError: if a file cannot be read, a volume is smaller than the size, or a required range is missing; the
        message names the file and the flag.
    """

    kind = "volume"

    def __init__(self, config=None, multiple=None, flag="--data_dir", **fields):
        config = dataclasses.replace(config or DataConfig(), **fields)
        require((config.image_channels in (0, 1),
                 f"--image_channels {config.image_channels}: volumes are not converted, omit the flag"))
        self._to_unit = unit_scale(config)
        super().__init__(config, flag)
        self.sides = config.sides
        headers = self._list_files(EXTENSIONS, _is_volume,
                                   functools.partial(_read_header, max_pixels=config.max_pixels),
                                   ", or set --image_size to two sizes for images", find_labels)
        self._check_files(headers, FULL_RANGE)
        self._check_volumes(headers)
        self.spacings = [parse_spacing(config.spacing) if config.spacing else header.spacing for header in headers]
        self._set_shape(headers[0].channels, headers, multiple)
        # An item is (file, corner of a patch); the corner None is chosen on access.
        repeats = config.patches_per_volume if config.crop == "random" else 1
        corners = [_patch_corners(header.sides, self.sides) if config.crop == "grid" else [None] * repeats
                   for header in headers]
        self.items = [(file, corner) for file, file_corners in enumerate(corners) for corner in file_corners]
        self.names = [self.names[file] + ("" if corner is None else "[{},{},{}]".format(*corner))
                      for file, corner in self.items]
        files = [file for file, _ in self.items]
        self.labels = None if self.labels is None else self.labels[files]
        self.attributes = {name: values[files] for name, values in self.attributes.items()}

    @property
    def spacing(self):
        """Voxel spacing per axis in mm, the median over the files."""
        return tuple(np.median(self.spacings, axis=0).tolist())

    @property
    def preprocessing(self):
        """The settings that map files to values, as recorded by checkpoints."""
        return {**super().preprocessing, "spacing": ",".join(f"{s:g}" for s in self.spacing)}

    def read(self, index, rng=None):
        """Return item `index` as float32 [C x D x H x W]; `rng` (NumPy Generator) positions a random patch.

        By default a random patch has a fixed position that depends on the index.
        """
        file, corner = self.items[index]
        volume = _values(self.paths[file], self.config.max_pixels)
        if corner is None:
            room = [n - m for n, m in zip(volume.shape[1:], self.sides)]
            if self.random_crop:
                rng = keyed_rng(index) if rng is None else rng
                corner = [int(rng.integers(r + 1)) for r in room]
            else:
                corner = [r // 2 for r in room]
        window = tuple(slice(start, start + n) for start, n in zip(corner, self.sides))
        return self._pad(self._to_unit(np.asarray(volume[(slice(None), *window)]), self.paths[file]))

    def read_volume(self, file):
        """Return volume `file` (not an item) as float32 [C x D x H x W] at its own size."""
        return self._to_unit(np.asarray(_values(self.paths[file], self.config.max_pixels)), self.paths[file])

    def batch(self, indices, flips=None, rngs=None):
        """Return items as float32 [n x C x D x H x W] in [0, 1]; see `ImageSource`."""
        rngs = [None] * len(indices) if rngs is None else rngs
        return self._stack([self.read(int(i), rng) for i, rng in zip(indices, rngs)], flips)

    def _content(self):
        return (f"{len(self)} items {format_shape(self.shape)} of {len(self.paths)} volumes, "
                f"{' x '.join(f'{s:g}' for s in self.spacing)} mm")

    def _check_volumes(self, headers):
        channels, config = headers[0].channels, self.config
        for path, header in zip(self.paths, headers):
            require(
                (header.channels == channels, f"{path}: expected {channels} channels as in {self.paths[0]}, got "
                                              f"{header.channels}; remove one of them"),
                (config.crop != "none" or header.sides == self.sides,
                 f"{path}: size {format_shape(header.sides)} is not {format_shape(self.sides)}, and --crop none reads "
                 "full volumes; use --crop center, grid or random"),
                (not header.dtype.startswith("complex") or config.reference_level is not None,
                 f"{path}: complex values require --reference_db, the level in dB that becomes 1 in all patches"),
            )


def _is_volume(path):
    return file_extension(path) in ("npy", "npz", "nii") or path.lower().endswith(".nii.gz")


def _patch_corners(sides, patch):
    """Return the corners of the fewest patches that cover a volume, evenly spaced from one end to the other."""
    axes = []
    for n, m in zip(sides, patch):
        count = -(-n // m)
        axes.append(np.linspace(0, n - m, count).round().astype(int) if count > 1 else np.array([0]))
    return [tuple(int(v) for v in corner) for corner in np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)]


def _with_channels(shape):
    """Return the shape [C x D x H x W] for a stored shape.

    :raises ValueError: if it is neither [D x H x W] nor [C x D x H x W].
    """
    require((len(shape) == 3 or len(shape) == 4 and shape[0] <= 4,
             f"shape {tuple(shape)}: expected [D x H x W] or [C x D x H x W] with up to 4 channels"))
    return (1, *shape) if len(shape) == 3 else tuple(shape)


def _read_header(path, max_pixels=MAX_PIXELS):
    with file_errors(path):
        spacing = 1.0, 1.0, 1.0
        if file_extension(path) in ("nii", "gz"):
            image = _nifti(path, max_pixels)
            spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
            require((all(map(math.isfinite, spacing)), f"expected a finite voxel spacing, got {spacing}"))
            shape, dtype = (*image.shape[3:], *image.shape[:3]), _scaled_dtype(image)
        elif file_extension(path) == "npz":
            shape, _, dtype, *_ = _volume_header(path)[1]
        else:
            values = _open_npy(path)
            shape, dtype = values.shape, values.dtype
        channels, *sides = _with_channels(shape)
        return FileHeader(channels, tuple(sides), str(dtype), spacing)


def _scaled_dtype(image):
    """Return the type of the values of a NIfTI image: a slope and an intercept turn stored integers into float32."""
    unscaled = (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    return image.get_data_dtype() if unscaled else np.dtype(np.float32)


def _values(path, max_pixels=MAX_PIXELS):
    """Return the values of a file [C x D x H x W], memory-mapped if possible."""
    with file_errors(path):
        if file_extension(path) == "npy":
            values = _open_npy(path)
        else:
            load = _load_archive if file_extension(path) == "npz" else _load_nifti
            values = _load_cached(path, functools.partial(load, path, max_pixels))
        return values.reshape(_with_channels(values.shape))


def _open_npy(path):
    if "://" in str(path):
        with bf.BlobFile(path, "rb") as stream:
            return load_npy(stream.read())
    return open_npy(path)


def _volume_header(path):
    """Return (name, `ArrayHeader`) of the volume in an .npz."""
    headers = [item for item in read_archive_headers(path).items() if len(item[1].shape) in (3, 4)]
    require((len(headers) == 1, f"expected one array of three or four axes, got {len(headers)}"))
    return headers[0]


def _load_archive(path, max_pixels):
    name = _volume_header(path)[0]
    return open_archive(path, [name], in_memory=True, max_pixels=max_pixels)[name]


def _import_nibabel(path):
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"{path} requires nibabel: pip install 'guided-diffusion-vae[volumes]'") from error
    return nibabel


def _nifti(path, max_pixels):
    """Return the nibabel image of a NIfTI file, whose values are not read, after checking its number of voxels."""
    nibabel = _import_nibabel(path)
    try:
        image = nibabel.load(path)
    except (nibabel.filebasedimages.ImageFileError, nibabel.spatialimages.HeaderDataError) as error:
        raise ValueError(str(error)) from error
    size, dtype, shape = os.path.getsize(path), image.get_data_dtype(), [int(n) for n in image.shape]
    require((min(shape, default=0) > 0, f"expected a shape of numbers above 0, got {tuple(shape)}"))
    if file_extension(path) == "gz":
        check_size(math.prod(shape), 8 * dtype.itemsize, size, max_pixels)
    else:
        check_array_size(shape, dtype, size - int(image.dataobj.offset))
    return image


_recent = collections.OrderedDict()     # (path, stamp) -> values of an unpacked file, the least recently used first
_recent_lock = threading.Lock()         # training and validation data are read on different threads


def _load_cached(path, load):
    """Return what `load` returns for a file; recently used volumes stay in memory, unless they are memory-mapped."""
    key = str(path), file_stamp(path)
    with _recent_lock:
        if key in _recent:
            _recent.move_to_end(key)
            return _recent[key]
        values = load()
        if not isinstance(values, np.memmap):
            _recent[key] = values
            while len(_recent) > 1 and sum(kept.nbytes for kept in _recent.values()) > CACHE_BYTES:
                _recent.popitem(last=False)
        return values


def _load_nifti(path, max_pixels):
    """Return the values of a NIfTI file, channels first."""
    image = _nifti(path, max_pixels)
    if file_extension(path) == "gz":
        image, values = _gzipped_values(path, type(image))
    else:
        values = np.asarray(image.dataobj)
    values = values.astype(_scaled_dtype(image), copy=False)
    return values if values.ndim == 3 else np.moveaxis(values, -1, 0)


def _gzipped_values(path, kind):
    """Return the image of class `kind` in a .nii.gz and its values; the stream is read to its checksum at the end."""
    nibabel = _import_nibabel(path)
    with gzip.open(path) as stream:
        image = kind.from_file_map({"image": nibabel.FileHolder(fileobj=stream)})
        values = np.asarray(image.dataobj)
        read_to_end(stream)
    return image, values


def write_nifti(path, volume: np.ndarray, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
    """Write a volume [D x H x W] or [C x D x H x W] as .nii.gz, with the axes that `VolumeFolder` reads.

    :raises ImportError: if nibabel is not installed (the extra `volumes`).
    """
    nibabel = _import_nibabel(path)
    if volume.ndim == 4:
        volume = volume[0] if len(volume) == 1 else np.moveaxis(volume, 0, -1)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([*spacing, 1.0])), path)
