"""Read volume files as patches for training or as full volumes, as float32 in [0, 1]."""

import collections
import contextlib
import dataclasses
import functools
import math
import threading
from typing import NamedTuple

import numpy as np

from ..config import format_shape, require
from ..files import MAX_PIXELS, bf, file_errors, file_extension, open_npy
from ..nn import keyed_rng
from .archives import file_stamp, file_stamps
from .arrays import EXTENSIONS as ARRAY_EXTENSIONS
from .arrays import find_array, read_array_file
from .config import DataConfig, directions, format_spacing, parse_spacing
from .decoding import FULL_RANGE, load_npy, unit_scale
from .labels import find_labels
from .listing import FileSource, LabelMaps
from .medical import (
    VolumeHeader, align_axes, axis_codes, data_files, is_medical, load_medical, merge_series, orient, path_stamp,
    read_medical_header, split_frames, tilt_degrees,
)
from .npz import open_archive, read_archive_headers
from .statistics import evenly_spaced

EXTENSIONS = ("npy", "npz", "nii", "gz", "dcm", "nrrd", "mha", "mhd", *ARRAY_EXTENSIONS)
CENSUS_VOLUMES = 4          # of which some slices are read to compare their values with their type
CACHE_BYTES = 4 * 2**30     # of unpacked volumes kept in memory, as patches come from the same files again
SPACING_TOLERANCE = 1.01    # ratio of spacings that count as the same
TILT_DEGREES = 1.0          # above which oblique axes are logged
DEFAULT_DIRECTIONS = "RAS"  # of files that state none, as --orientation as_stored
AXES = (0, 1), (1, 1), (2, 1)


class Arrangement(NamedTuple):
    """Steps from the values of a file to a volume: its axes (see `align_axes`), then the size it is resampled to.

    :param ratios: target voxel spacing per axis as a multiple of the file's; None: not resampled.
    """

    axes: tuple = AXES
    sides: tuple = ()
    ratios: tuple | None = None


class VolumeFolder(FileSource):
    """Patches of one size from volumes as float32 [C x D x H x W] in [0, 1].

    Files are `.npy` [D x H x W] or [C x D x H x W], `.npz` with one such array, `.nii` and `.nii.gz`, whose axes are
    permuted and flipped to `config.orientation`. `config.crop` defines an item: the center of a volume (center), a
    patch at a random position of each access (random), each of the evenly spaced patches that cover a volume (grid), or
    the full volume, which then must have the size (none). Uncompressed files on disk are read patch by patch.
    Compressed and resampled ones are unpacked on the first access, which compares their checksums, and kept in memory
    up to `CACHE_BYTES` per process. Classes are inferred from names as in `ImageFolder`.

    :param config: a `DataConfig`; `fields` replace single fields of it.
    :param multiple: factors per axis that must divide the size, used if `config.pad` is True.
    :raises FileNotFoundError: if there is no folder, or no volume in it.
    :raises ValueError: if a file cannot be read, a volume is smaller than the size, directions or voxel spacings of the
        files differ, or a required range is missing; the message names the file and the flag.
    """

    kind = "volume"
    header_type = VolumeHeader

    def __init__(self, config=None, multiple=None, flag="--data_dir", **fields):
        config = dataclasses.replace(config or DataConfig(), **fields)
        require((config.image_channels in (0, 1),
                 f"--image_channels {config.image_channels}: volumes are not converted, omit the flag"))
        self._to_unit = unit_scale(config)
        super().__init__(config, flag)
        self.sides = config.sides
        stored = self._list_files(EXTENSIONS, _is_volume,
                                  functools.partial(read_header, max_pixels=config.max_pixels, frames=config.frames,
                                                    array_key=config.array_key),
                                  ", or set --image_size to two sizes for images", find_labels)
        headers = self._resample(self._orient(stored))
        self._check_files(headers, FULL_RANGE)
        self._check_volumes(headers)
        self._set_shape(headers[0].channels, headers, multiple)
        # An item is (file, frame, corner of a patch); the corner None is chosen on access.
        repeats = config.patches_per_volume if config.crop == "random" else 1
        corners = [_patch_corners(header.sides, self.sides) if config.crop == "grid" else [None] * repeats
                   for header in headers]
        self.items = [(file, frame, corner) for file, header in enumerate(headers) for frame in range(header.frames)
                      for corner in corners[file]]
        self.names = [self.names[file] + (f"[{frame}]" if headers[file].frames > 1 else "")
                      + ("" if corner is None else "[{},{},{}]".format(*corner)) for file, frame, corner in self.items]
        files = [file for file, _, _ in self.items]
        self.labels = None if self.labels is None else self.labels[files]
        self.attributes = {name: values[files] for name, values in self.attributes.items()}

    @property
    def spacing(self):
        """Voxel spacing per axis in mm, the median over the files."""
        return tuple(np.median(self.spacings, axis=0).tolist())

    @property
    def preprocessing(self):
        """The settings that map files to values, as recorded by checkpoints."""
        options = {"orientation": self.orientation, "resample_spacing": self.config.resample_spacing,
                   "frames": self.config.frames or "channels"}
        return {**super().preprocessing, "spacing": format_spacing(self.spacing),
                **{name: value for name, value in options.items() if value != self.config.VOLUME_OPTIONS[name]}}

    def read(self, index, rng=None):
        """Return item `index` as float32 [C x D x H x W]; `rng` (NumPy Generator) positions a random patch.

        By default a random patch has a fixed position that depends on the index.
        """
        file, frame, corner = self.items[index]
        volume = self._values(file, frame)
        if corner is None:
            room = [n - m for n, m in zip(volume.shape[1:], self.sides)]
            if self.random_crop:
                rng = keyed_rng(index) if rng is None else rng
                corner = [int(rng.integers(r + 1)) for r in room]
            else:
                corner = [r // 2 for r in room]
        window = tuple(slice(start, start + n) for start, n in zip(corner, self.sides))
        return self._pad(self._unit(volume[(slice(None), *window)], file))

    def item_sides(self, index):
        return self.file_sides[self.items[index][0]]

    def read_volume(self, file):
        """Return volume `file` (not an item), its first frame, as float32 [C x D x H x W] at its own size."""
        return self._unit(self._values(file), file)

    def read_file(self, file):
        """Return volume `file` as `read_volume` does."""
        return self.read_volume(file)

    def batch(self, indices, flips=None, rngs=None):
        """Return items as float32 [n x C x D x H x W] in [0, 1]; see `ImageSource`."""
        rngs = [None] * len(indices) if rngs is None else rngs
        return self._stack([self.read(int(i), rng) for i, rng in zip(indices, rngs)], flips)

    def _content(self):
        directions = f" {self.orientation}" if self.orientation else ""
        return (f"{len(self)} items {format_shape(self.shape)} of {len(self.paths)} volumes{directions}, "
                f"{' x '.join(f'{s:g}' for s in self.spacing)} mm")

    def _note(self, sentence):
        self.notes = [*self.notes, sentence]

    def _values(self, file, frame=0):
        """Return a volume [C x D x H x W] in the directions and spacing of all, a view of its file if possible."""
        path, arrangement = self.paths[file], self._arrangements[file]
        source = path, self.config.max_pixels, self.config.array_key
        if arrangement.ratios is None:
            values = orient(read_volume(*source), arrangement.axes)
        else:
            load = lambda: _resample(orient(load_volume(*source), arrangement.axes), arrangement)
            values = cached(path, load, (arrangement, self.config.array_key))
        return values if self.shape[0] > 1 else values[frame:frame + 1]

    def warnings(self):
        """Return a line for the log if 16-bit values fill less than a quarter of their range, in a few slices."""
        deep = [file for file, kind in enumerate(self._dtypes) if kind in ("int16", "uint16")]
        if self.value_limits or not deep:
            return []
        slices = [values[:, ::max(values.shape[1] // 8, 1)] for values in
                  (self._values(deep[i], 0) for i in evenly_spaced(len(deep), CENSUS_VOLUMES))]
        low, high = min(int(values.min()) for values in slices), max(int(values.max()) for values in slices)
        least, most = FULL_RANGE[self._dtypes[deep[0]]]
        if (high - low) * 4 >= most - least:
            return []
        return [f"values reach from {low:,} to {high:,}, and {least:,} to {most:,} become 0 to 1: set --value_window "
                "lo,hi to the values of interest, such as -1000,400 for CT"]

    def _merge(self, paths, names):
        return merge_series(paths, names)

    def _parts(self, paths):
        return data_files(paths)

    def _stamps(self, path):
        if not is_medical(path):
            return super()._stamps(path)
        return path_stamp(path, file_stamp), path_stamp(path, lambda file: file_stamps(file)[1])

    def _unit(self, values, file):
        # A resampled volume is float32, whatever the type of the file was.
        limits = self.value_limits or FULL_RANGE.get(self._dtypes[file])
        return self._to_unit(np.asarray(values), self.paths[file], value_range=limits)

    def _orient(self, headers):
        """Return the headers with the axes D, H, W in the order of `--orientation`; set what brings files to it."""
        requested = directions.parse(self.config.orientation, "orientation")
        oriented = [file for file, header in enumerate(headers) if header.directions is not None]
        if not requested:   # as version 0.2 did
            self.orientation, self._arrangements = "", [Arrangement()] * len(headers)
            return headers
        codes = {file: axis_codes(self.paths[file], headers[file].directions) for file in oriented}
        if requested == "as_stored":
            other = next((file for file in oriented if codes[file] != codes[oriented[0]]), None)
            require((other is None, other is None or f"{self.paths[other]}: expected axes in the directions "
                     f"{codes[oriented[0]]} as in {self.paths[oriented[0]]}, got {codes[other]}; set --orientation "
                     f"{codes[oriented[0]]} instead of as_stored"))
            requested = codes[oriented[0]] if oriented else DEFAULT_DIRECTIONS
        self.orientation = requested
        self._arrangements = [
            Arrangement(align_axes(path, header.directions, requested) if file in codes else AXES)
            for file, (path, header) in enumerate(zip(self.paths, headers))]
        if oriented and len(oriented) < len(headers):
            first = next(path for file, path in enumerate(self.paths) if file not in codes)
            self._note(f"{len(headers) - len(oriented)} of {len(headers)} volumes state no directions, such as "
                              f"{first}: they are read as stored, and "
                              f"count as {requested} with the voxel spacing of the others")
        tilts = {file: tilt_degrees(headers[file].directions) for file in oriented}
        if tilted := [file for file in oriented if tilts[file] > TILT_DEGREES]:
            most = max(tilted, key=tilts.get)
            self._note(f"{len(tilted)} of {len(headers)} volumes have oblique axes, up to {tilts[most]:.1f} "
                              f"degrees in {self.paths[most]}: their voxels are not rotated, and count as those of the "
                              f"nearest axes of {requested}")
        return [_permuted(header, arrangement.axes) for header, arrangement in zip(headers, self._arrangements)]

    def _resample(self, headers):
        """Return the headers with the sizes and spacing after `--resample_spacing`; set how files are resampled."""
        config, self._dtypes = self.config, [header.dtype for header in headers]
        stated = [parse_spacing(config.spacing) if config.spacing else header.spacing for header in headers]
        target = config.resample_spacing and parse_spacing(config.resample_spacing, "resample_spacing")
        if not target:
            self._check_spacings(stated)
            known = [spacing for spacing in stated if spacing]
            # Version 0.2 took the median over 1 mm where a file states none.
            usual = tuple(np.median(known, axis=0).tolist()) if known and self.orientation else (1.0, 1.0, 1.0)
            self.spacings = [spacing or usual for spacing in stated]
            return headers
        resampled = []
        for file, (path, header, spacing) in enumerate(zip(self.paths, headers, stated)):
            require(
                (spacing, f"{path} states no voxel spacing, which --resample_spacing requires; set --spacing"),
                (not header.dtype.startswith("complex"), f"{path}: complex values are not resampled; omit "
                                                         "--resample_spacing"),
            )
            ratios = tuple(to / since for to, since in zip(target, spacing))
            sides = tuple(max(1, round(n / ratio)) for n, ratio in zip(header.sides, ratios))
            require((math.prod(sides) <= config.max_pixels,
                     f"{path}: size {format_shape(header.sides)} at {format_spacing(spacing)} mm becomes "
                     f"{format_shape(sides)} at --resample_spacing {format_spacing(target)}: expected at most "
                     f"--max_pixels {config.max_pixels} voxels, got {math.prod(sides)}; set a wider spacing"))
            if max(max(ratio, 1 / ratio) for ratio in ratios) > SPACING_TOLERANCE:
                self._arrangements[file] = self._arrangements[file]._replace(sides=sides, ratios=ratios)
                header = header._replace(sides=sides)
            resampled.append(header)
        self.spacings = [target] * len(headers)
        return resampled

    def _check_spacings(self, spacings):
        """Check that all files which state a voxel spacing have the same one; for old models a warning is noted."""
        known = [file for file, spacing in enumerate(spacings) if spacing]
        if not known:
            return
        values = np.array([spacings[file] for file in known])
        axis = int(np.argmax(values.max(0) / values.min(0)))
        low, high = sorted(known[i] for i in (values[:, axis].argmin(), values[:, axis].argmax()))
        same = values[:, axis].max() <= SPACING_TOLERANCE * values[:, axis].min()
        finest = ",".join(f"{s:g}" for s in values.min(0))
        problem = (f"{self.paths[high]}: expected a voxel spacing of {format_spacing(spacings[low])} mm as in "
                   f"{self.paths[low]}, got {format_spacing(spacings[high])} mm")
        if not same and not self.orientation:
            self._note(f"{problem}; {format_spacing(np.median(values, axis=0))} mm is recorded")
        require((same or not self.orientation, f"{problem}; set --resample_spacing, such as {finest}, or --spacing to "
                                               "ignore those of the files"))

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


class LabelVolumes(LabelMaps, VolumeFolder):
    """Label maps of volumes, or of their patches."""

    def _unit(self, values, file):
        return np.moveaxis(self.one_hot(np.asarray(values)[0], self.paths[file]), -1, 0)


def _patch_corners(sides, patch):
    """Return the corners of the fewest patches that cover a volume, evenly spaced from one end to the other."""
    axes = []
    for n, m in zip(sides, patch):
        count = -(-n // m)
        axes.append(np.linspace(0, n - m, count).round().astype(int) if count > 1 else np.array([0]))
    return [tuple(int(v) for v in corner) for corner in np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)]


def _permuted(header, axes):
    """Return a header with its sizes and spacing in another order of the axes."""
    order = [axis for axis, _ in axes]
    return header._replace(sides=tuple(header.sides[axis] for axis in order),
                           spacing=header.spacing and tuple(header.spacing[axis] for axis in order))


def _resample(values, arrangement):
    """Return values [C x D x H x W] as float32 at the sides and ratios of an `Arrangement`, around the same center.

    Axis by axis, with the triangular filter of bilinear resizing: linear interpolation where voxels become smaller, an
    average over the width of the new voxels where they become larger.
    """
    low, high = values.min(), values.max()
    values = values.astype(np.float32)
    for axis, (count, ratio) in enumerate(zip(arrangement.sides, arrangement.ratios), 1):
        n = values.shape[axis]
        centers = (n - 1) / 2 + (np.arange(count) - (count - 1) / 2) * ratio
        weights = np.maximum(0, 1 - np.abs(np.arange(n) - centers.clip(0, n - 1)[:, None]) / max(ratio, 1))
        weights = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
        values = np.moveaxis(np.tensordot(weights, values, (1, axis)), 0, axis)
    return np.ascontiguousarray(values.clip(float(low), float(high)))   # rounding may exceed the range of the file


def _is_volume(path):
    extension = file_extension(path)
    return extension in EXTENSIONS and (extension != "gz" or path.lower().endswith(".nii.gz"))


def volume_stamp(path):
    """Return sizes and modification times of the files of a volume as text."""
    return path_stamp(path, file_stamp) if is_medical(path) else file_stamp(path)


def read_header(path, max_pixels=MAX_PIXELS, frames="", array_key=""):
    """Return the `VolumeHeader` of a file, or of the folder of a DICOM series.

    :raises ValueError: if it cannot be read, or describes more than `max_pixels` or than the file can contain.
    """
    with _volume_errors(path):
        if is_medical(path):
            return read_medical_header(path, max_pixels, frames)
        if file_extension(path) == "npz":
            shape, _, dtype, *_ = _volume_in_archive(path)[1]
        elif file_extension(path) in ARRAY_EXTENSIONS:
            shape, dtype, *_ = find_array(path, array_key, (3, 4), max_pixels)[1]
        else:
            values = _open_npy(path)
            shape, dtype = values.shape, values.dtype
        count, channels, *sides = split_frames(shape, frames)
        return VolumeHeader(channels, tuple(sides), str(dtype), frames=count)


def read_volume(path, max_pixels=MAX_PIXELS, array_key=""):
    """Return the channels or frames of a file [N x D x H x W]; memory-mapped, or kept in memory, if possible."""
    return cached(path, functools.partial(load_volume, path, max_pixels, array_key), array_key)


def load_volume(path, max_pixels=MAX_PIXELS, array_key=""):
    """Return the channels or frames of a file [N x D x H x W], axes as stored; memory-mapped if possible."""
    with _volume_errors(path):
        if is_medical(path):
            values = load_medical(path, max_pixels)
        elif file_extension(path) == "npz":
            name = _volume_in_archive(path)[0]
            values = open_archive(path, [name], in_memory=True, max_pixels=max_pixels)[name]
        elif file_extension(path) in ARRAY_EXTENSIONS:
            values = read_array_file(path, array_key, (3, 4), max_pixels)
        else:
            values = _open_npy(path)
        return values.reshape((-1, *values.shape[-3:]))


def _volume_errors(path):
    """Return a context that names the file in errors; a series names its slices itself."""
    return contextlib.nullcontext() if path.endswith("/") else file_errors(path)


# (path, stamp, ...) -> unpacked values, the least recently used first
_recent: collections.OrderedDict = collections.OrderedDict()
_recent_lock = threading.Lock()     # training and validation data are read on different threads


def cached(path, load, variant=None):
    """Return what `load` returns for a file; recently used values stay in memory, unless they are memory-mapped.

    :param variant: distinguishes other values made of the same file.
    """
    key = str(path), volume_stamp(path), variant
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


def _open_npy(path):
    if "://" in str(path):
        with bf.BlobFile(str(path), "rb") as stream:
            return load_npy(stream.read())
    return open_npy(path)


def _volume_in_archive(path):
    """Return (name, `ArrayHeader`) of the volume in an .npz."""
    headers = [item for item in read_archive_headers(path).items() if len(item[1].shape) in (3, 4)]
    require((len(headers) == 1, f"expected one array of three or four axes, got {len(headers)}"))
    return headers[0]
