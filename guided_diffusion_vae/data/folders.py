"""Open the images or volumes that a DataConfig describes."""

import dataclasses

from .image_folders import ImageFolder
from .volume_folders import VolumeFolder


def open_folder(config, multiple=None, flag="--data_dir", **fields):
    """Return the PictureFolder or, where `image_size` has three sizes, the VolumeFolder that a DataConfig describes.

    Messages name `flag` as the one that the folder was given as.
    """
    config = dataclasses.replace(config, **fields)
    return (VolumeFolder if len(config.sides) == 3 else ImageFolder)(config, multiple, flag)
