"""Turn picture files into batches: the reference's loader, and one that keeps grey, 16-bit, float and complex values.

`load_data` and `ImageDataset` are guided-diffusion's: 8-bit RGB in [-1, 1]. `ImageFolder` is what the rest of this
project reads: float32 in [0, 1], as many channels as the files have, nothing clipped or enlarged unasked. Which
pictures form a batch is computed by `BatchPlan` from (seed, step) alone.
"""

import math
import random

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .data.listing import REFERENCE_EXTENSIONS, file_extension, _prefix, require_data_dir, walk_files
from .data.resizing import _downsample_to_cover, _window
from .files import bf


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
        raise FileNotFoundError(f"{data_dir} holds no picture ({', '.join(REFERENCE_EXTENSIONS)}); check --data_dir")
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
    pixels = np.array(_downsample_to_cover(pil_image, image_size, image_size))
    return _window(pixels, image_size, image_size)


def random_crop_arr(pil_image, image_size, min_crop_frac=0.8, max_crop_frac=1.0):
    """Return a random square as an array [S x S] or [S x S x C].

    Its side is a share between the two fractions of the picture's smaller side. Draws from Python's `random`, in
    this order: the smaller side after resampling, the top, the left.
    """
    least, most = (math.ceil(image_size / fraction) for fraction in (max_crop_frac, min_crop_frac))
    side = random.randrange(least, most + 1)
    pixels = np.array(_downsample_to_cover(pil_image, side, side))
    top = random.randrange(pixels.shape[0] - image_size + 1)
    left = random.randrange(pixels.shape[1] - image_size + 1)
    return pixels[top:top + image_size, left:left + image_size]


def _list_image_files_recursively(data_dir):
    """Return the paths of all jpg, jpeg, png and gif files below a folder, entries sorted folder by folder."""
    return [path for path in walk_files(data_dir, REFERENCE_EXTENSIONS) if file_extension(path) in REFERENCE_EXTENSIONS]


def _endless(loader):
    while True:
        yield from loader
