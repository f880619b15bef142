"""The data room: images and volumes from files, batches of them, latent streams, archives of samples.

Other rooms import from here. `cache_writer` and `microdoppler` are imported by their own names: the first imports
`latent_datasets`, which itself imports from this room.
"""

import dataclasses

from .. import logger
from ..interfaces import ImageSource
from .batching import BatchPlan, BatchStream, ImageStream, LatentStream, Prefetcher, permute_indices
from .config import DataConfig, SmallCacheConfig, parse_size, parse_spacing, unpad
from .decoding import read_array
from .image_folders import DownsampledImages, ImageFolder
from .labels import infer_classes, map_labels, missing_classes, require_labels
from .listing import format_classes, hash_lines, require_data_dir
from .npz import Samples, open_archive, open_npz, to_uint8, write_npz
from .statistics import RunningMoments
from .volume_folders import VolumeFolder, write_nifti

# Image sources: (whether a DataConfig describes one, class(config, multiple, flag)); the first that applies is opened.
SOURCES = [
    (lambda config: len(config.sides) == 3, VolumeFolder),
    (lambda config: len(config.sides) == 2, ImageFolder),
]


def open_folder(config: DataConfig, multiple=None, flag: str = "--data_dir", **fields) -> ImageSource:
    """Return the image source that a DataConfig describes, an entry of `SOURCES`; files without a class are logged.

    :param multiple: the factors per axis that must divide the size, used if `config.pad` is True.
    :param flag: the flag that specified the folder, for error messages.
    :param fields: fields of the config to replace.
    """
    config = dataclasses.replace(config, **fields)
    source = next(source for applies, source in SOURCES if applies(config))(config, multiple, flag)
    if missing := missing_classes(source):
        logger.warn(missing)
    return source
