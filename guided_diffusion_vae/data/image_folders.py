"""Read a folder, an archive or an array file of images as float32 in [0, 1]."""

import contextlib
import dataclasses
import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch.nn.functional as F

from ..config import require
from ..files import bf, file_errors, file_extension, hash_lines
from ..interfaces import ImageSource
from .archives import file_stamp
from .arrays import EXTENSIONS as ARRAY_EXTENSIONS
from .arrays import find_array, open_image_set, read_array_file
from .axes import find_axes
from .colormaps import MAX_COLORS, count_colors, fit_colormap, recognize_colormap
from .config import DataConfig, unpad
from .decoding import (
    FULL_RANGE, FileHeader, channels_last, match_channels, open_image, read_header, read_values, unit_scale,
)
from .labels import class_files, find_labels
from .listing import REFERENCE_EXTENSIONS, FileSource, ItemNames, LabelMaps
from .npz import archive_classes, open_archive
from .resizing import fit
from .statistics import evenly_spaced

EXTENSIONS = (*REFERENCE_EXTENSIONS, "tif", "tiff", "webp", "bmp", "npy", *ARRAY_EXTENSIONS)
# Read to examine value ranges and colors of a folder, at most.
CENSUS_FILES, CENSUS_PIXELS = 256, 2**26
COLOR_FILES, COLOR_PIXELS = 64, 2**22
_USUAL_BITS = 8, 10, 12, 14     # of values in 16-bit files


class ImageFolder(FileSource):
    """Images of one size as float32 [C x H x W] in [0, 1]; their headers are read and checked on construction.

    Classes are the subfolders if every image is in one, else the parts of the file names before the first underscore;
    if a name has no underscore, `labels` and `class_names` are None. Of an animated GIF the first frame is read. Hidden
    files and other extensions are counted in `ignored`.

    :param config: a `DataConfig`; `fields` replace single fields of it.
    :param multiple: factors (one, or one per axis) that must divide the size, used if `config.pad` is True.
    :raises FileNotFoundError: if there is no folder, or no image in it.
    :raises ValueError: if a header cannot be read, an image is smaller than the size, grayscale and RGB are mixed, a
        required range is missing, or colors are not on `config.colormap`; the message names the file and the flag.
    """

    header_type = FileHeader

    def __init__(self, config=None, multiple=None, flag="--data_dir", **fields):
        config = dataclasses.replace(config or DataConfig(), **fields)
        require((len(config.sides) == 2 and config.crop != "grid",
                 f"--image_size {config.image_size} --crop {config.crop}: expected two sizes and no grid for images; "
                 "volumes are read by VolumeFolder"))
        self._to_unit = unit_scale(config)
        super().__init__(config, flag)
        self._archive = self._pool = self.colormap = self.recognized_colormap = None
        if file_extension(config.data_dir) in ("npz", *ARRAY_EXTENSIONS) and not bf.isdir(config.data_dir):
            headers = self._open_archive(config.data_dir)
        else:
            headers = self._list_files(EXTENSIONS, lambda path: file_extension(path) in EXTENSIONS,
                                       functools.partial(_read_header, max_pixels=config.max_pixels,
                                                         array_key=config.array_key),
                                       " (an .npz is specified by its own path, and volumes require three sizes in "
                                       "--image_size)", find_labels)
        self._headers = headers
        self._check_files(headers, FULL_RANGE)
        if config.colormap and not (self._archive is not None and headers[0].channels == 1):    # scalars already
            self._open_colormap()
        channels = [header.channels for header in headers]
        if not config.image_channels and not self.colormap and len(set(channels)) > 1:
            gray, color = (self.paths[channels.index(number)] for number in (1, 3))
            raise ValueError(f"{gray} is grayscale and {color} is RGB; set --image_channels 1 or --image_channels 3")
        self._set_shape(1 if self.colormap else config.image_channels or headers[0].channels, headers, multiple)
        if set(channels) == {3} and not self.colormap:
            self._recognize_colormap()
        self._open_axes()

    def read(self, index, rng=None):
        """Return image `index` as float32 [C x H x W] in [0, 1]; `rng` (NumPy Generator) positions a random crop.

        :raises ValueError: if the file is corrupt, transparent, or has values outside the range or the colormap.
        """
        path, (_, height, width) = self.paths[index], self.unpadded_shape
        pixels = self._values(index)
        # 8-bit images are resized as 8-bit values, like guided-diffusion's; other types as float32 without rounding.
        as_stored = pixels.dtype == np.uint8 and not self.value_limits
        if self.colormap:
            pixels = self._to_scalars(pixels, path)
        else:
            pixels = match_channels(pixels if as_stored else self._to_unit(pixels, path), self.shape[0])
        pixels = fit(pixels, height, width, self.config.crop, rng)
        pixels = self._to_unit(pixels, path) if pixels.dtype == np.uint8 else pixels
        return np.ascontiguousarray(self._pad(np.moveaxis(pixels, -1, 0)))

    def read_full_size(self, index):
        """Return image `index` as `read` does, but with the size and the colors of its file."""
        return np.moveaxis(self._to_unit(self._values(index), self.paths[index]), -1, 0)

    def _parts(self, paths):
        return class_files(paths)

    def read_file(self, file):
        """Return image `file` as `read` does."""
        return self.read(file)

    def _values(self, index):
        """Return the stored values [H x W x C] of image `index`."""
        if self._archive is not None:
            return self._archive[index]
        path, config = self.paths[index], self.config
        if file_extension(path) in ARRAY_EXTENSIONS:
            values = read_array_file(path, config.array_key, max_pixels=config.max_pixels)
            order, shape = channels_last(values.shape)
            return np.transpose(values, order).reshape(shape)
        return read_values(path, config.max_pixels, config.alpha)

    def _open_colormap(self):
        """Set `colormap`, and in the config the name of its table, and check the colors of some images.

        :raises ValueError: if colors are farther from it than --colormap_tolerance; the message names the file.
        """
        config = self.config
        require((not self.value_limits and config.image_channels in (0, 1),
                 f"--colormap {config.colormap} gives one channel in [0, 1]: omit --value_range, --value_window and "
                 "--image_channels 3"))
        chosen = evenly_spaced(len(self.paths), COLOR_FILES)
        images = list(self._census(chosen, COLOR_PIXELS))
        for i, values in zip(chosen, images):
            self._require_colors(values, self.paths[i])
        self.colormap = fit_colormap(*count_colors([match_channels(values, 3) for values in images]), config.colormap)
        self.config = dataclasses.replace(config, colormap=self.colormap.name)
        distances = [self._distances(values)[1] for values in images]
        farthest = int(np.argmax([each.max() for each in distances]))
        self._to_scalars(images[farthest], self.paths[chosen[farthest]])
        mean = np.mean([each.mean() for each in distances])
        self.notes = (*self.notes, f"colormap {self.colormap.name}: colors of {len(images)} files are at most "
                                   f"{distances[farthest].max():.1f} and on average {mean:.2f} (of 441) from it")

    def _recognize_colormap(self):
        """Set `recognized_colormap` to the table on which all colors of some RGB images lie, if there is one."""
        colors, images = (), []
        # An error is reported when the image is read for its values.
        with contextlib.suppress(ValueError, OSError):
            for values in self._census(evenly_spaced(len(self.paths), COLOR_FILES), COLOR_PIXELS):
                if values.dtype != np.uint8:
                    return
                images.append(values)
                colors = count_colors([values, *([] if len(images) == 1 else [colors[0]])])
                if len(colors[0]) > MAX_COLORS:
                    return
            recognized = recognize_colormap(*count_colors(images))
            if recognized:
                self.recognized_colormap, name = recognized.name, recognized.name.partition("/")[0]
                self.notes = (*self.notes, f"all pixels of {len(images)} RGB files lie on colormap {name} "
                                           f"({recognized.name}): --colormap {name} reads them as scalars")

    def _open_axes(self):
        """Set `axes` to what the folder states about the axes and the scale of spectrograms, {} if it does not."""
        self.axes, note = find_axes(self.folder, self.unpadded_shape[1:])
        self.notes = (*self.notes, note) if note else self.notes
        scale = self.axes and (self.axes["db_floor"], self.axes["db_floor"] + self.axes["db_range"])
        if self.axes and self.value_limits not in (None, scale):    # levels of which another range became [0, 1]
            self.axes = {}

    def _require_colors(self, values, path):
        require((values.dtype == np.uint8, f"{path}: --colormap {self.config.colormap} requires 8-bit RGB images, got "
                                           f"{values.dtype}; omit the flag"))

    def _distances(self, values):
        return self.colormap.to_scalars(match_channels(values, 3))

    def _to_scalars(self, values, path):
        """Return the scalars float32 [H x W x 1] of 8-bit colors [H x W x C]."""
        self._require_colors(values, path)
        scalars, distances = self._distances(values)
        farthest, tolerance = distances.max(), self.config.colormap_tolerance
        require((farthest <= tolerance,
                 f"{path}: a color is {farthest:.1f} (of 441) from colormap {self.colormap.name}: expected at most "
                 f"--colormap_tolerance {tolerance:g}; set a larger tolerance for artifacts of JPEG, or omit "
                 "--colormap"))
        return scalars[..., None]

    @property
    def preprocessing(self):
        """The settings that map files to values, the colormap that RGB images lie on, and the axes of spectrograms."""
        found = {"recognized_colormap": self.recognized_colormap, "spectrogram": self.axes}
        return {**super().preprocessing, **{name: value for name, value in found.items() if value}}

    def warnings(self):
        """Return lines for the log on value ranges that are probably not meant; up to `CENSUS_FILES` are read."""
        warnings, types = [], [header.dtype for header in self._headers]
        if self.value_limits:
            return warnings
        if len(self.kinds) > 1:
            each = ", ".join(f"{count} {kind} ({self.names[types.index(kind)]})" for kind, count in self.kinds.items())
            warnings.append(f"files have several types of values: {each}; the full range of each type becomes [0, 1], "
                            "convert them to one type if that is not meant")
        if "uint16" in types:
            deep = [i for i, kind in enumerate(types) if kind == "uint16"]
            chosen = [deep[i] for i in evenly_spaced(len(deep), CENSUS_FILES)]
            highest = max(int(values.max()) for values in self._census(chosen, CENSUS_PIXELS))
            bits = next((bits for bits in _USUAL_BITS if highest < 2**bits), 16)
            if bits < 16:
                warnings.append(f"values reach {highest:,} of 65,535: set --value_range 0,{2**bits - 1} if these are "
                                f"{bits}-bit data")
        return warnings

    def _census(self, items, max_pixels):
        """Yield the stored values of items until they have `max_pixels` in all."""
        pixels = 0
        for i in items:
            if pixels < max_pixels:
                values = self._values(i)
                pixels += values.shape[0] * values.shape[1]
                yield values

    def batch(self, indices, flips=None, rngs=None):
        """Return images as float32 [n x C x H x W] in [0, 1]; see `ImageSource`."""
        if self._archive is None and self._pool is None:
            self._pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))
        apply = self._pool.map if self._archive is None else map
        rngs = [None] * len(indices) if rngs is None else rngs
        return self._stack(list(apply(self.read, (int(i) for i in indices), rngs)), flips)

    def __getstate__(self):
        return {**super().__getstate__(), "_pool": None, "_archive": self._archive is not None}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._archive = self._open_images(self._open_arrays(self.folder)) if state["_archive"] else None

    def _open_arrays(self, path):
        if file_extension(path) in ARRAY_EXTENSIONS:
            return open_image_set(path, self.config.array_key, self.config.max_pixels)
        return open_archive(path, max_pixels=self.config.max_pixels)

    @staticmethod
    def _open_images(arrays):
        """Return the images of an archive [N x H x W x C], None if it has none."""
        images = arrays.get("images", arrays.get("arr_0"))
        return images if images is None or images.ndim != 3 else images[..., None]

    def _open_archive(self, path):
        arrays = self._open_arrays(path)
        images, labels = self._open_images(arrays), arrays.get("labels", arrays.get("arr_1"))
        shapes = {name: array.shape for name, array in arrays.items()}
        require((images is not None and images.ndim == 4 and images.shape[3] in (1, 3),
                 f"{path}: expected 'images' (or 'arr_0') of shape [N x H x W] or [N x H x W x 1 or 3], got {shapes}"))
        require((len(images), f"{path} contains no image; check {self._flag}"), error=FileNotFoundError)
        self._archive = images
        self.names, self.paths = ItemNames(bf.basename(path), len(images)), ItemNames(path, len(images))
        self.ignored = 0
        self.labels = self.class_names = None
        if labels is not None:
            self.class_names = archive_classes(path, labels, len(images), arrays.get("class_names"))
            self.labels = labels.astype(np.int64)
        self.fingerprint = hash_lines([file_stamp(path)])
        *sides, channels = self._archive.shape[1:]
        return [FileHeader(channels, tuple(sides), str(images.dtype))] * len(images)


def _read_header(path, max_pixels, array_key):
    if file_extension(path) not in ARRAY_EXTENSIONS:
        return read_header(path, max_pixels)
    header = find_array(path, array_key, max_pixels=max_pixels)[1]
    with file_errors(path):
        *sides, channels = channels_last(header.shape)[1]
    return FileHeader(channels, tuple(sides), header.dtype.name)


class DownsampledImages(ImageSource):
    """The images of another source, averaged down to `sides` (height, width): the condition of an upsampler."""

    def __init__(self, dataset, sides):
        self.dataset, self.sides = dataset, tuple(sides)
        self.folder, self.names, self.fingerprint = dataset.folder, dataset.names, dataset.fingerprint
        self.labels, self.class_names, self.preprocessing = dataset.labels, dataset.class_names, dataset.preprocessing
        self.attributes = dataset.attributes
        self.random_flip, self.random_crop = dataset.random_flip, dataset.random_crop
        self.shape = self.unpadded_shape = (dataset.shape[0], *self.sides)

    def batch(self, indices, flips=None, rngs=None):
        """Return images as float32 [n x C x *sides] in [0, 1], computed without the padding of the other source."""
        images = unpad(self.dataset.batch(indices, flips, rngs), self.dataset.unpadded_shape)
        return F.interpolate(images, size=self.sides, mode="area")


class LabelImages(LabelMaps, ImageFolder):
    """Label maps of images; of an image with a palette the indices are read."""

    def read(self, index, rng=None):
        """Return one-hot maps of item `index`, float32 [K x H x W]; `rng` positions a random crop."""
        path, (_, height, width) = self.paths[index], self.unpadded_shape
        labels = self._values(index)
        require((labels.shape[-1] == 1, f"{path}: expected a label map of one channel, got colors; save the labels as "
                 "grayscale values or with a palette"))
        maps = fit(self.one_hot(labels[..., 0], path), height, width, self.config.crop, rng)
        return np.ascontiguousarray(self._pad(np.moveaxis(maps, -1, 0)))

    def _recognize_colormap(self):
        """Palettes of label maps are not looked up."""

    def _values(self, index):
        path = self.paths[index]
        if self._archive is None and file_extension(path) not in ("npy", *ARRAY_EXTENSIONS):
            with open_image(path, self.config.max_pixels) as image:
                if image.mode == "P":
                    return np.asarray(image)[..., None]
        return super()._values(index)
