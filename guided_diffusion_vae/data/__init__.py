"""The data room: images and volumes from files, batches of them, latent streams, archives of samples.

Other rooms import from here. `cache_writer` and `microdoppler` are imported by their own names: the first imports
`latent_datasets`, which itself imports from this room.
"""

import dataclasses
import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from .. import dist_util, logger
from ..config import require
from ..files import READ_ERRORS
from ..interfaces import ImageSource
from ..nn import to_uint8 as to_uint8
from .attributes import Attributes, attribute_ranges, sample_attributes
from .batching import BatchPlan, BatchStream, ImageStream, LatentStream, Prefetcher, permute_indices
from .colormaps import count_colors, fit_colormap, open_colormap, same_colormap
from .conditions import ConditionConfig, Conditions, match_conditions, require_same_sizes
from .config import (
    DataConfig, SmallCacheConfig, format_spacing, parse_size, parse_spacing, recorded_options, take_recorded_options,
    unpad,
)
from .decoding import read_array
from .image_folders import DownsampledImages, ImageFolder, LabelImages
from .labels import infer_classes, keep_numbers, map_labels, missing_classes, require_labels
from .listing import FileSource, LabelMaps, format_classes, hash_lines, require_data_dir
from .medical import voxel_affine, write_nifti
from .npz import Samples, open_archive, open_npz, read_archive_headers, write_npz
from .statistics import RunningMoments, evenly_spaced, evenly_spaced_per_class
from .volume_folders import LabelVolumes, VolumeFolder

MAX_LEFT_OUT = 0.1      # part of the files of a folder
MAX_FAULTS = 20         # files that --verify_data lists
VERIFYING_THREADS = 4

# Image sources: (whether a DataConfig describes one, class(config, multiple, flag)); the first that applies is opened.
SOURCES = [
    (lambda config: len(config.sides) == 3, VolumeFolder),
    (lambda config: len(config.sides) == 2, ImageFolder),
]


def open_folder(config: DataConfig, multiple=None, flag: str = "--data_dir", **fields) -> ImageSource:
    """Return the image source that a DataConfig describes, an entry of `SOURCES`; called by all ranks at once.

    Logged are where its labels come from, the files that are left out, files without a class if others have one, and
    `warnings` of the source.

    :param multiple: the factors per axis that must divide the size, used if `config.pad` is True.
    :param flag: the flag that specified the folder, for error messages.
    :param fields: fields of the config to replace.
    :raises ValueError: if a file or label file is not understood, more than MAX_LEFT_OUT of the files are not read, or
        with `config.verify_data` a file cannot be decoded.
    """
    config = dataclasses.replace(config, **fields)
    make = next(source for applies, source in SOURCES if applies(config))
    return _open(make, isinstance(make, type) and issubclass(make, FileSource), config, multiple, flag)


def open_label_maps(config: DataConfig, values: Sequence[int], multiple=None, flag: str = "--condition_dir"):
    """Return the source of one-hot label maps with these label values; see `open_folder`."""
    make = functools.partial(LabelVolumes if len(config.sides) == 3 else LabelImages, values)
    return _open(make, True, config, multiple, flag)


def _open(make, is_file_source, config, multiple, flag):
    if is_file_source:      # one rank examines the files
        source = dist_util.broadcast_object(make(config, multiple, flag) if dist_util.rank() == 0 else None)
    else:
        source = make(config, multiple, flag)
    if isinstance(source, FileSource):
        for note in source.notes:
            logger.log_rank0(note)
        _report_left_out(source, config.allow_ignored)
        if config.verify_data:
            _verify(source)
        for warning in source.warnings() if dist_util.rank() == 0 else ():
            logger.warn(warning)
    if missing := missing_classes(source):
        logger.warn(missing)
    return source


def _verify(source):
    """Decode every file of a source once, each on one of the ranks.

    :raises ValueError: if any cannot be read, with the messages of up to MAX_FAULTS.
    """
    faults, count = [], len(source.paths)

    def verify(file):
        try:
            source.read_file(file)
        except READ_ERRORS as error:
            faults.append((file, str(error)))

    own = range(count)[dist_util.rank()::dist_util.world_size()]
    with logger.progress_bar(len(own), 0, "verifying files") as bar, ThreadPoolExecutor(VERIFYING_THREADS) as pool:
        for _ in pool.map(verify, own):
            bar.update()
    faults = sorted(fault for part in dist_util.gather_objects(faults) for fault in part)
    lines = [*(message for _, message in faults[:MAX_FAULTS]), *(["..."] if len(faults) > MAX_FAULTS else [])]
    require((not faults, "\n".join([f"{source.folder}: {len(faults)} of {count} files cannot be read:", *lines])))
    logger.log_rank0(f"{source.folder}: all {count} files are read")


def _report_left_out(source, allowed):
    """Log the files of a folder that are not read.

    :raises ValueError: if they are more than one and more than MAX_LEFT_OUT of all, unless that is `allowed`.
    """
    count = sum(source.left_out.values())
    if count:
        by_number = sorted(source.left_out.items(), key=lambda entry: -entry[1])
        endings = ", ".join(f"{number} {ending}" for ending, number in by_number)
        total = count + len(source.paths)
        require((allowed or count <= max(1, MAX_LEFT_OUT * total),
                 f"{source.folder}: {count} of {total} files are not read ({endings}), more than {MAX_LEFT_OUT:.0%}; "
                 "convert or remove them, or set --allow_ignored True"))
        logger.warn(f"{source.folder}: {count} file{'s' if count > 1 else ''} left out: {endings}")
