"""Turn volume files into batches: patches to train on, whole volumes to judge by; values windowed as stated.

`VolumeFolder` has the interface of `ImageFolder`, of which it is the counterpart with three axes; `open_folder`
returns whichever a `DataConfig` asks for.
"""

import collections
import dataclasses
import io
import threading

import numpy as np
import torch

from ..files import bf
from ..interfaces import ImageSource
from ..nn import keyed_rng
from .config import DataConfig, parse_spacing, resolve_value_range
from .decoding import to_unit
from .image_folders import ImageFolder, flip_last_axis
from .listing import infer_classes, hash_lines, file_extension, relative_names, file_errors, require_data_dir, file_stamp, walk_files
from .npz import open_archive

EXTENSIONS = ("npy", "npz", "nii", "gz")
RECENT_BYTES = 4 * 2**30    # of volumes that have to be unpacked to be read at all, and are kept for the next patch

_Header = collections.namedtuple("_Header", "shape dtype spacing")


class VolumeFolder(ImageSource):
    """Read patches of one size out of volumes as float32 [C x D x H x W] in [0, 1].

    `.npy` [D x H x W] or [C x D x H x W], `.npz` with one such array, `.nii` and `.nii.gz` (its axes as they are
    stored). `config.crop` says what an item is: the volume's middle (center), a patch at a place drawn anew for each
    visit (random), each of the patches that cover the volume evenly (grid), or the whole volume, which must then have
    the size that is asked for (none). Files on disk that are not compressed are read patch by patch.

    Classes are told from names as in `ImageFolder`.

    :param multiple: strides per axis that shall divide the size, where `config.pad` is True.
    :raises FileNotFoundError: no folder, or no volume in it.
    :raises ValueError: a file that cannot be read, a volume smaller than asked for, ranges that are needed and not
        given; the message names the file and the flag.
    """

    def __init__(self, config=None, multiple=None, flag="--data_dir", **fields):
        self.config = config = dataclasses.replace(config or DataConfig(), **fields)
        self.folder = config.data_dir
        self.random_flip, self.random_crop = config.random_flip, config.crop == "random"
        self.sides = config.sides
        if config.image_channels not in (0, 1):
            raise ValueError(f"--image_channels {config.image_channels}: volumes keep the channels that they have")
        self.value_range = resolve_value_range(config)
        self.reference_db = float(config.reference_db) if config.reference_db else None
        require_data_dir(config.data_dir, flag)
        found = list(walk_files(config.data_dir, EXTENSIONS))
        self.paths = [p for p in found if _is_volume(p)]
        self.ignored = len(found) - len(self.paths)
        if not self.paths:
            raise FileNotFoundError(f"{config.data_dir} holds no volume (.npy, .npz, .nii, .nii.gz) among {len(found)} "
                                    f"files; check {flag}, or give --image_size two sizes for pictures")
        headers = [_read_header(path) for path in self.paths]
        files = relative_names(config.data_dir, self.paths)
        self.class_names, labels = infer_classes(files, config.data_dir)
        self.fingerprint = hash_lines(f"{name} {file_stamp(path)}" for name, path in zip(files, self.paths))
        self.kinds = dict(collections.Counter(header.dtype for header in headers))
        self.spacings = [self._spacing(header) for header in headers]
        self.unpadded_shape = self.shape = (self._check_consistent(headers), *self.sides)
        if config.pad and multiple is not None:
            self.shape = (self.shape[0], *(-(-n // step) * step for n, step in zip(self.sides, multiple)))
        # An item is a file, and of a grid the corner of a patch; None is chosen when it is read.
        visits = config.patches_per_volume if config.crop == "random" else 1
        corners = [_patch_corners(header.shape[1:], self.sides) if config.crop == "grid" else [None] * visits
                   for header in headers]
        self.items = [(file, corner) for file, of_file in enumerate(corners) for corner in of_file]
        self.names = [files[file] + ("" if corner is None else "[{},{},{}]".format(*corner))
                      for file, corner in self.items]
        self.labels = None if labels is None else labels[[file for file, _ in self.items]]

    @property
    def spacing(self):
        """Distance of neighbouring voxels along every axis in mm, the median over the files."""
        return tuple(np.median(self.spacings, axis=0).tolist())

    @property
    def preprocessing(self):
        """How files become numbers: what a checkpoint remembers of the configuration."""
        return {**ImageFolder.preprocessing.fget(self), "spacing": ",".join(f"{s:g}" for s in self.spacing)}

    def read(self, index, rng=None):
        """Return item `index` as float32 [C x D x H x W]; `rng` (numpy Generator) places a random patch.

        Without it the patch is at a place of its own that stays, so that items can be measured.
        """
        file, corner = self.items[index]
        volume = _values(self.paths[file])
        sizes = volume.shape[1:]
        if corner is None:
            room = [n - m for n, m in zip(sizes, self.sides)]
            if self.config.crop == "random":
                rng = keyed_rng(index) if rng is None else rng
                corner = [int(rng.integers(r + 1)) for r in room]
            else:
                corner = [r // 2 for r in room]
        window = tuple(slice(start, start + n) for start, n in zip(corner, self.sides))
        values = self._unit(np.asarray(volume[(slice(None), *window)]), self.paths[file])
        beyond = [(0, n - m) for n, m in zip(self.shape[1:], self.sides)]
        return np.pad(values, [(0, 0), *beyond], mode="edge") if any(after for _, after in beyond) else values

    def read_volume(self, file):
        """Return volume `file` (not an item) as float32 [C x D x H x W] at its own size."""
        return self._unit(np.asarray(_values(self.paths[file])), self.paths[file])

    def batch(self, indices, flips=None, rngs=None):
        """Return items as float32 [n x C x D x H x W] in [0, 1], those of `flips` mirrored along the last axis."""
        rngs = rngs if rngs is not None else [None] * len(indices)
        volumes = np.stack([self.read(int(i), rng) for i, rng in zip(indices, rngs)])
        return torch.from_numpy(flip_last_axis(volumes, flips, self.unpadded_shape[-1]))

    def describe(self):
        """Return what was read and how, as a plain dictionary (the preprocessing entry of a latent cache)."""
        return {**dataclasses.asdict(self.config), **self.preprocessing, "files": len(self.paths),
                "ignored": self.ignored, "kinds": self.kinds, "shape": list(self.shape),
                "unpadded_shape": list(self.unpadded_shape), "fingerprint": self.fingerprint}

    def summary(self):
        """Return one line for the log: count, shape, types, spacing and classes."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        text = (f"{len(self)} items {'x'.join(map(str, self.shape))} of {len(self.paths)} volumes ({kinds}) in "
                f"{self.folder}, {' x '.join(f'{s:g}' for s in self.spacing)} mm")
        if self.labels is not None:
            counts = np.bincount(self.labels, minlength=len(self.class_names))
            text += "; classes: " + ", ".join(f"{name} {n}" for name, n in zip(self.class_names, counts))
        return text + (f"; {self.ignored} other files ignored" if self.ignored else "")

    def _unit(self, values, where):
        clip = bool(self.config.value_window)
        return to_unit(values, where, self.value_range, self.config.dynamic_range_db, self.reference_db, clip)

    def _spacing(self, header):
        return parse_spacing(self.config.spacing) if self.config.spacing else header.spacing

    def _check_consistent(self, headers):
        """Return the number of channels, or raise ValueError where files do not suit each other or the flags."""
        channels = headers[0].shape[0]
        for path, header in zip(self.paths, headers):
            if header.shape[0] != channels:
                raise ValueError(f"{path} has {header.shape[0]} channels, {self.paths[0]} {channels}; take one of them "
                                 "out")
            if any(n < m for n, m in zip(header.shape[1:], self.sides)):
                raise ValueError(f"{path} is {format_shape(header.shape[1:])}, smaller than --image_size {format_shape(self.sides)}; "
                                 "nothing is enlarged: lower the size, or leave the volume out")
            if self.config.crop == "none" and header.shape[1:] != self.sides:
                raise ValueError(f"{path} is {format_shape(header.shape[1:])}, not {format_shape(self.sides)}, and --crop none takes "
                                 "volumes whole; choose center, grid or random")
            if header.dtype.startswith("complex"):
                if self.config.dynamic_range_db <= 0 or self.reference_db is None:
                    raise ValueError(f"{path} is complex; give --dynamic_range_db (say 40) and --reference_db, the "
                                     "level in dB that becomes 1: all patches of a volume share it")
            elif not self.value_range and header.dtype not in ("uint8", "int8", "uint16", "int16", "bool"):
                raise ValueError(f"{path} holds {header.dtype} values; give --value_range lo,hi, the values that "
                                 "become 0 and 1, or --value_window lo,hi, which cuts off what lies outside")
        return channels


def format_shape(sizes):
    return "x".join(map(str, sizes))


def _is_volume(path):
    name = bf.basename(path).lower()
    return not name.startswith(".") and (file_extension(path) in ("npy", "npz", "nii") or name.endswith(".nii.gz"))


def _patch_corners(sizes, patch):
    """Return the corners of the fewest patches that cover a volume, evenly spread from one end to the other."""
    along = []
    for n, m in zip(sizes, patch):
        count = -(-n // m)
        along.append(np.linspace(0, n - m, count).round().astype(int) if count > 1 else np.array([0]))
    return [tuple(int(v) for v in corner) for corner in np.stack(np.meshgrid(*along, indexing="ij"), -1).reshape(-1, 3)]


def _with_channels(shape):
    """Return [C x D x H x W] of a stored shape, or raise ValueError."""
    if len(shape) == 3:
        return (1, *shape)
    if len(shape) == 4 and shape[0] <= 4:
        return tuple(shape)
    raise ValueError(f"its shape {tuple(shape)} is not [D x H x W] or [C x D x H x W] with up to 4 channels")


def _read_header(path):
    with file_errors(path):
        if file_extension(path) in ("nii", "gz"):
            image = _nifti(path)
            spacing = tuple(float(s) for s in image.header.get_zooms()[:3])
            shape = image.shape
            return _Header(_with_channels((*shape[3:], *shape[:3])), str(_scaled_dtype(image)), spacing)
        values = _array(path)
        return _Header(_with_channels(values.shape), str(values.dtype), (1.0, 1.0, 1.0))


def _scaled_dtype(image):
    """Return the type of a NIfTI image's values: a slope and an intercept make numbers of stored integers."""
    plain = (image.dataobj.slope, image.dataobj.inter) == (1, 0)
    return image.get_data_dtype() if plain else np.dtype(np.float32)


def _values(path):
    """Return the values of a file, [C x D x H x W], memory-mapped where it can be."""
    with file_errors(path):
        values = _load_nifti_cached(path, file_stamp(path)) if file_extension(path) in ("nii", "gz") else _array(path)
        return values.reshape(_with_channels(values.shape))


def _array(path):
    if file_extension(path) == "npz":
        arrays = [array for array in open_archive(path).values() if array.ndim in (3, 4)]
        if len(arrays) != 1:
            raise ValueError(f"it holds {len(arrays)} arrays of three or four axes, needed is one")
        return arrays[0]
    if "://" in str(path):
        with bf.BlobFile(path, "rb") as stream:
            return np.load(io.BytesIO(stream.read()), allow_pickle=False)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def _nifti(path):
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"{path} needs nibabel: pip install 'guided-diffusion-vae[volumes]'") from error
    try:
        return nibabel.load(path)
    except nibabel.filebasedimages.ImageFileError as error:
        raise ValueError(str(error)) from error


_recent = collections.OrderedDict()     # (path, stamp) -> values of NIfTI files, the least recently used first
_one_reader = threading.Lock()          # training data are read on a thread of their own, held-out data on another


def _load_nifti_cached(path, stamp):
    """Return a NIfTI file's values, channels first; recent ones are kept, as patches come from the same files again."""
    key = str(path), stamp
    with _one_reader:
        if key not in _recent:
            image = _nifti(path)
            values = np.asarray(image.dataobj).astype(_scaled_dtype(image), copy=False)
            _recent[key] = values if values.ndim == 3 else np.moveaxis(values, -1, 0)
            while len(_recent) > 1 and sum(kept.nbytes for kept in _recent.values()) > RECENT_BYTES:
                _recent.popitem(last=False)
        _recent.move_to_end(key)
        return _recent[key]


def write_nifti(path, volume, spacing=(1.0, 1.0, 1.0)):
    """Write a volume [D x H x W] or [C x D x H x W] as .nii.gz, its axes as `VolumeFolder` reads them.

    :raises ImportError: without nibabel (the extra `volumes`).
    """
    try:
        import nibabel
    except ImportError as error:
        raise ImportError(f"{path} needs nibabel: pip install 'guided-diffusion-vae[volumes]'") from error
    if volume.ndim == 4:
        volume = volume[0] if len(volume) == 1 else np.moveaxis(volume, 0, -1)
    nibabel.save(nibabel.Nifti1Image(volume, np.diag([*spacing, 1.0])), path)
