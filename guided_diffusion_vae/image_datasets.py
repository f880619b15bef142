"""Load image files as batches of 8-bit RGB in [-1, 1], as guided-diffusion does.

The scripts of this project read images with `data.ImageFolder` instead, which keeps grayscale, 16-bit, float and
complex values.
"""

import math
import random

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from . import deprecated_names
from .config import require
from .data.decoding import open_image
from .data.labels import name_prefix, number_classes
from .data.listing import REFERENCE_EXTENSIONS, require_data_dir, walk_files
from .data.resizing import center_window, downsample_to_cover
from .files import file_extension


def load_data(*, data_dir, batch_size, image_size, class_cond=False, deterministic=False, random_crop=False,
              random_flip=True, shard=None, num_shards=None):
    """Return an endless generator of (images [N x 3 x S x S] float32 in [-1, 1], {"y": labels [N]} or {}).

    Classes are the sorted distinct parts of the file names before the first underscore, an empty one included. Each
    rank reads every num_shards-th file; `shard` and `num_shards` default to those of torch.distributed, else to 0 of 1.

    :raises FileNotFoundError: if there is no folder, or no image in it.
    :raises ValueError: if this shard has fewer images than a batch (the reference waits indefinitely).
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if shard is None:
        shard = torch.distributed.get_rank() if distributed else 0
    if num_shards is None:
        num_shards = torch.distributed.get_world_size() if distributed else 1
    require_data_dir(data_dir)
    files = _list_image_files_recursively(data_dir)
    require((files, f"{data_dir} contains no image ({', '.join(REFERENCE_EXTENSIONS)}); check --data_dir"),
            error=FileNotFoundError)
    labels = number_classes([name_prefix(path) for path in files], sorted)[1] if class_cond else None
    dataset = ImageDataset(image_size, files, classes=labels, shard=shard, num_shards=num_shards,
                           random_crop=random_crop, random_flip=random_flip)
    require((len(dataset) >= batch_size,
             f"rank {shard} of {num_shards} has {len(dataset)} of the {len(files)} images in {data_dir}, fewer than "
             f"--batch_size {batch_size}; use a smaller batch or more images"))
    return _endless(DataLoader(dataset, batch_size, shuffle=not deterministic, num_workers=1, drop_last=True))


class ImageDataset(Dataset):
    """Every num_shards-th image as RGB; an item is (float32 [3 x S x S] in [-1, 1], {"y": int64 label} or {})."""

    def __init__(self, resolution, image_paths, classes=None, shard=0, num_shards=1, random_crop=False,
                 random_flip=True):
        super().__init__()
        own = slice(shard, None, num_shards)
        self.resolution = resolution
        self.local_images = image_paths[own]
        self.local_classes = classes[own] if classes is not None else None
        self.random_crop = random_crop
        self.random_flip = random_flip

    def __len__(self):
        return len(self.local_images)

    def __getitem__(self, idx):
        with open_image(self.local_images[idx]) as image:
            rgb = image.convert("RGB")
        crop = random_crop_arr if self.random_crop else center_crop_arr
        pixels = crop(rgb, self.resolution)
        # Sample the flip after the crop: the reference uses this order of random numbers, so seeds match.
        if self.random_flip and random.random() < 0.5:
            pixels = pixels[:, ::-1]
        signed = pixels.astype(np.float32) / 127.5 - 1
        extra = {} if self.local_classes is None else {"y": np.array(self.local_classes[idx], np.int64)}
        return np.moveaxis(signed, -1, 0), extra


def center_crop_arr(pil_image, image_size):
    """Return the central square of an image, resized to cover it, as an array [S x S] or [S x S x C]."""
    pixels = np.array(downsample_to_cover(pil_image, image_size, image_size))
    return center_window(pixels, image_size, image_size)


def random_crop_arr(pil_image, image_size, min_crop_frac=0.8, max_crop_frac=1.0):
    """Return a random square of an image as an array [S x S] or [S x S x C].

    Its side is a fraction, between the two given, of the smaller side of the image. Samples from Python's `random`, in
    this order: the smaller side after resizing, the top, the left.
    """
    low, high = (math.ceil(image_size / fraction) for fraction in (max_crop_frac, min_crop_frac))
    side = random.randrange(low, high + 1)
    pixels = np.array(downsample_to_cover(pil_image, side, side))
    top = random.randrange(pixels.shape[0] - image_size + 1)
    left = random.randrange(pixels.shape[1] - image_size + 1)
    return pixels[top:top + image_size, left:left + image_size]


def _list_image_files_recursively(data_dir):
    """Return the paths of all jpg, jpeg, png and gif files below a folder, in sorted order per folder."""
    return [path for path in walk_files(data_dir, REFERENCE_EXTENSIONS) if file_extension(path) in REFERENCE_EXTENSIONS]


def _endless(loader):
    while True:
        yield from loader


__getattr__ = deprecated_names("image_datasets")
