"""Images and label maps that a diffusion model is conditioned on, found by the names of the images they belong to."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import torch.nn.functional as F

from ..config import format_shape, integers, option, require
from ..interfaces import ConditionSource, ImageSource
from ..nn import to_device, without_tf32
from .config import interval
from .listing import FileSource

FLAG = "--condition_dir"
_EXTENSION = re.compile(r"(\.nii)?\.\w+(?=(\[[\d,]*\])*/?$)")      # of a name such as a/scan.nii.gz[0,0,32]


@dataclasses.dataclass
class ConditionConfig:
    """Options of images or label maps that a model is conditioned on."""

    SECTION = "data"

    condition_dir: str = option(
        "", "images, volumes or label maps to condition on, one for each image, of the same name; in sampling those of "
            "the samples, used cyclically", essential="lr")
    condition_labels: Annotated[str, integers] = option(
        "", "values of the label maps in --condition_dir, comma-separated, such as 0,1,2 or 0,255; empty: images")
    condition_value_range: Annotated[str, interval] = option(
        "", "--value_range of the images in --condition_dir; empty: full range of the integer type")


class Conditions(ConditionSource):
    """The conditions of items, read from files.

    :param source: `ImageSource` of the images or label maps.
    :param rows: index in `source` for each item.
    :param shape: (K, ...) on the grid of x0.
    :param encode: function of images [n x C x ...] that returns x0 of them; None for label maps, whose one-hot maps are
        averaged over each element of the grid.
    """

    def __init__(self, source: ImageSource, rows: np.ndarray, shape: tuple[int, ...], encode: Callable | None):
        self.source, self.rows, self.shape, self.encode = source, rows, shape, encode
        self.names, self.fingerprint = [source.names[row] for row in rows], source.fingerprint
        self.random_flip, self.random_crop = source.random_flip, source.random_crop

    def read(self, indices, flips=None, rngs=None):
        images = self.source.batch(self.rows[np.asarray(indices)], flips, rngs)
        return F.interpolate(images, size=self.shape[1:], mode="area") if self.encode is None else images

    @without_tf32()     # the same latents in training and in sampling
    def on_device(self, values, device):
        return to_device(values if self.encode is None else self.encode(values), device)

    def select(self, items) -> "Conditions":
        """Return the conditions of some items."""
        return Conditions(self.source, self.rows[items], self.shape, self.encode)


def match_conditions(names: Sequence[str], conditions: ImageSource, folder) -> np.ndarray:
    """Return the index in `conditions` of the item with each of `names`, extensions aside, int64 [N].

    :param folder: of `names`, for errors.
    :raises ValueError: for items without a condition, or with several.
    """
    positions: dict[str, int] = {}
    for i, name in enumerate(conditions.names):
        other = positions.setdefault(_stem(name), i)
        require((other == i, f"{conditions.folder} ({FLAG}): {conditions.names[other]} and {name} are conditions of "
                 "one image; remove one of them"))
    missing = [name for name in names if _stem(name) not in positions]
    require((not missing, f"{conditions.folder} ({FLAG}) has no condition for {len(missing)} of {len(names)} items of "
             f"{folder}, such as {', '.join(missing[:3])}: expected files of the same names, extensions aside, such as "
             f"{', '.join(conditions.names[:3])}"))
    return np.array([positions[_stem(name)] for name in names], np.int64)


def require_same_sizes(images: ImageSource, conditions: FileSource, rows: np.ndarray) -> None:
    """Check that conditions are resized and cropped like the images that they belong to.

    :param rows: index in `conditions` for each item of `images`.
    :raises ValueError: if the sizes of their files differ, and these are cropped.
    """
    if conditions.config.crop == "none" or not isinstance(images, FileSource):
        return
    for i, row in enumerate(rows):
        expected, found = images.item_sides(i), conditions.item_sides(row)
        require((expected == found, f"{conditions.names[row]} in {conditions.folder} ({FLAG}): expected size "
                 f"{format_shape(expected)} as {images.names[i]}, got {format_shape(found)}; resize it"))


def _stem(name):
    return _EXTENSION.sub("", name, count=1)
