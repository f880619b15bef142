"""The space of x0 (pixels or normalized latents of an autoencoder), and the data in such a space.

Pixels and latents are one code path. A run works in a `Space`: a codec between images and latents, and a normalizer
between latents and x0 (images => latents => x0). Headers record the space; only models of one space are combined.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from .. import dist_util
from ..config import format_shape, integers, require, size, to_tuple
from ..data import (
    ConditionConfig, Conditions, DataConfig, DownsampledImages, LabelMaps, SmallCacheConfig,
    format_classes, format_spacing, keep_numbers, match_conditions, open_folder, open_label_maps, parse_size,
    parse_spacing, recorded_options, require_same_sizes, same_colormap, take_recorded_options,
)
from ..interfaces import Codec
from ..latent_datasets import EncodedImages, LatentConfig, is_cache, open_latents
from ..logger import log_rank0, progress_bar
from ..unet import SuperResConfig
from ..vae_wrapper import LatentNormalizer, NormalizerConfig, PixelCodec, VAEConfig, check_latent_std, create_vae

VERIFIED_BYTES = 2**32      # caches up to this size are hashed at every start, which takes seconds
NORMALIZER_TOLERANCE = 0.02     # of the standard deviation


class Space:
    """Codec and normalizer of x0.

    :param codec: None if the autoencoder of a cache is not available.
    :param normalizer: a LatentNormalizer, or a function that returns it at its first use.
    """

    def __init__(self, codec: Codec | None, normalizer: LatentNormalizer | Callable[[], LatentNormalizer]):
        self.codec, self._normalizer = codec, normalizer

    @functools.cached_property
    def normalizer(self) -> LatentNormalizer:
        """The LatentNormalizer."""
        return self._normalizer() if callable(self._normalizer) else self._normalizer

    @classmethod
    def of_pixels(cls, channels, dims=2):
        """Return the space of images with values in [-1, 1]."""
        return cls(PixelCodec(channels, dims), LatentNormalizer([0], [1], "none"))

    @property
    def is_pixels(self):
        """Whether x0 are the images themselves."""
        return self.codec is not None and self.codec.is_pixels

    def encode(self, images):
        """Return x0 of images in [0, 1].  [N x C x ...] -> [N x Z x ...]."""
        return self.normalizer.normalize(self.codec.encode_batch(self.codec.pad_to_factors(images)))


# --- Data in a space ---


def open_data(run):
    """Return (latent source, Space) of the training data.

    A cache (`--cache_dir`), images encoded on the fly by an autoencoder (`--vae_path`) or, without either, pixels.
    """
    if run[LatentConfig].cache_dir or run[VAEConfig].vae_path:
        return open_latent_data(run)
    return open_pixels(open_folder(run[DataConfig]))


def open_pixels(images):
    """Return (latent source, Space) of an ImageSource; x0 are its images, mapped to [-1, 1]."""
    space = Space.of_pixels(images.shape[0], dims=len(images.shape) - 1)
    return EncodedImages(images, space.codec), space


def open_latent_data(run):
    """Return (latent source, Space) of `open_encodings`, with a normalizer that is fitted to it at its first use."""
    source, codec = open_encodings(run)
    return source, Space(codec, functools.partial(fit_normalizer, run[NormalizerConfig], source))


def open_encodings(run):
    """Return (latent source, codec or None): a cache, or images that an autoencoder encodes on the fly.

    Training from a cache needs no autoencoder; without one there are no previews.

    :raises ValueError: if both or neither are specified.
    """
    cache_dir, data_dir = run[LatentConfig].cache_dir, run[DataConfig].data_dir
    if bool(cache_dir) == bool(data_dir):
        raise ValueError(f"--cache_dir {cache_dir!r} and --data_dir {data_dir!r}: specify one of them, a cache of "
                         "latents or images together with --vae_path")
    return _open_cached(run) if cache_dir else _open_encoded(run)


def _open_cached(run):
    source = open_cache(run[LatentConfig].cache_dir, run.explicit)
    codec = open_codec(source.autoencoder, run[VAEConfig], required=False)
    # All ranks preview or none: on a disk that not all nodes share, some may lack the autoencoder.
    if dist_util.any_rank(codec is None):
        log_rank0("previews disabled: the autoencoder of the cache is not available on all ranks (set --vae_path)")
        codec = None
    return source, codec


def _open_encoded(run):
    codec = create_vae(run[VAEConfig], dist_util.dev())
    images = open_images(run[DataConfig], run.explicit, codec)

    def measure(source):
        statistics = None
        if dist_util.rank() == 0:
            with progress_bar(None, 0, "measuring latents") as bar:
                statistics = source.measure(run[LatentConfig].stats_samples, run.setting("seed"),
                                            progress=bar.advance_to)
        return dist_util.broadcast_object(statistics)

    # A resumed run keeps its first statistics: another --stats_samples would rescale x0 under trained weights.
    statistics = dist_util.broadcast_object(run.resumed_header.get("statistics"))
    return EncodedImages(images, codec, statistics=measure if statistics is None else statistics), codec


def open_cache(folder, explicit):
    """Return a verified cache, on the device if it fits there.

    :param explicit: flags that were set; those of the data must agree with the cache.
    """
    source = open_latents(folder)
    require_same_preprocessing(source, explicit)
    if dist_util.rank() == 0:
        if source.nbytes > VERIFIED_BYTES:
            log_rank0(f"{source.folder}: not verified because of its size; encode_dataset.py with the same flags does")
        else:
            with progress_bar(None, 0, "verifying the cache") as bar:
                source.verify(bar.advance_to)
    device = dist_util.dev()
    if device.type == "cuda":   # at most a quarter of the free memory; training needs the rest
        source.on_device(device, torch.cuda.mem_get_info()[0] // 4)
    return source


def open_validation(run, source, space):
    """Return the latent source of `--val_data_dir` in the `Space` of `source`: a cache of its autoencoder, or images.

    :raises ValueError: if it is a cache of another autoencoder or scale factor, or its latents have another shape.
    :raises FileNotFoundError: if images must be encoded and the autoencoder is not available.
    """
    path = run.setting("val_data_dir")
    validation = _open_validation(run, path, source, space)
    found, expected = tuple(validation.latent_shape), tuple(source.latent_shape)
    require((found == expected, f"{path} (--val_data_dir): expected latents of shape {expected} as in {source.folder}, "
             f"got {found}; set --val_data_dir to images, or a cache of images, of the size of the training data"))
    return validation


def _open_validation(run, path, source, space):
    if is_cache(path):
        cache, expected = open_latents(path), describe_autoencoder(source, space)
        if expected and cache.autoencoder["sha256"] != expected["sha256"]:
            raise ValueError(f"{path}: expected latents of the autoencoder of this run ({_place(expected)}), got a "
                             f"cache of autoencoder {_place(cache.autoencoder)}; set --val_data_dir to images or "
                             "another cache")
        if expected and cache.scale_factor != expected["scale_factor"]:
            raise ValueError(f"{path}: expected latents scaled by {expected['scale_factor']} as those of this run, got "
                             f"{cache.scale_factor}; set --val_data_dir to images or another cache")
        return cache
    if space.codec is None:
        raise FileNotFoundError(f"{path}: the autoencoder that encodes these images is not available; set --vae_path, "
                                "or --val_data_dir to a cache")
    data = dataclasses.replace(run[DataConfig], data_dir=path, random_flip=False)
    data = take_recorded_options(data, run.explicit, source.preprocessing)
    return EncodedImages(open_images(data, run.explicit, space.codec, "--val_data_dir"), space.codec, statistics={})


def open_images(data, explicit, codec, flag="--data_dir"):
    """Return the images or volumes of a DataConfig, preprocessed as in the training of `codec`.

    Explicit flags take precedence.
    """
    return open_folder(apply_trained_preprocessing(data, explicit, codec.preprocessing), codec.factors, flag)


def open_low_res(run, source, space):
    """Return the latent source of the low-resolution images that belong to the items of `source`.

    :raises ValueError: if they are not smaller, or their cache has other items or settings than `source`.
    """
    cache_dir = run[SmallCacheConfig].low_res_cache_dir
    if cache_dir:
        low_res = open_cache(cache_dir, run.explicit)
        _check_same_items(low_res, source)
    elif isinstance(source, EncodedImages):
        sides = parse_size(run[SuperResConfig].small_size)
        low_res = EncodedImages(DownsampledImages(source.dataset, sides), space.codec, statistics={})
    else:
        raise ValueError(f"{source.folder} is a cache; set --low_res_cache_dir to a cache of its low-resolution images")
    if any(a >= b for a, b in zip(low_res.latent_shape[1:], source.latent_shape[1:])):
        raise ValueError(f"x0 of low-resolution images have shape {low_res.latent_shape}: expected less than "
                         f"{source.latent_shape}; set --small_size below --large_size")
    return low_res


def _check_same_items(low_res, source):
    if low_res.filenames is None or low_res.filenames != source.filenames:
        raise ValueError(f"{low_res.folder} contains other images than {source.folder}, or another order; encode the "
                         "same folder twice, with two values of --image_size")
    if low_res.autoencoder != source.autoencoder:
        raise ValueError(f"{low_res.folder} and {source.folder} have different autoencoders, "
                         f"{low_res.autoencoder['path']} and {source.autoencoder['path']}; re-encode one of them")
    for key in ("random_flip", "crop", "image_channels", "value_range", "value_window", "alpha", "colormap",
                "orientation", "resample_spacing", "frames"):
        values = low_res.preprocessing.get(key), source.preprocessing.get(key)
        if values[0] != values[1]:
            raise ValueError(f"{low_res.folder} was encoded with --{key} {values[0]}, {source.folder} with "
                             f"{values[1]}; encode both with the same flags except for --image_size")


def open_conditions(run, source, space):
    """Return the `Conditions` of the items of `source` from `--condition_dir`, None if it is not set.

    :raises ValueError: if an item has none, or they do not fit the items.
    """
    if ConditionConfig not in run:
        return None
    config = run[ConditionConfig]
    if not config.condition_dir:
        require((not config.condition_labels and not config.condition_value_range, "--condition_labels and "
                 "--condition_value_range have no effect without --condition_dir; set it, or omit them"))
        return None
    require((source.filenames is not None and source.image_shape, f"{source.folder} does not record the images of its "
             "latents, to which --condition_dir belongs; use a cache of encode_dataset.py"))
    opened = _open_condition_source(config, run[DataConfig], source.preprocessing, source.image_shape,
                                    random_flip=source.random_flip, random_crop=source.random_crop)
    rows = match_conditions(source.filenames, opened, source.folder)
    if isinstance(source, EncodedImages):
        require_same_sizes(source.dataset, opened, rows)
    log_rank0(f"conditions: {opened.summary()}")
    return _conditions(opened, rows, source.latent_shape, space)


def open_sample_conditions(config, data, header, space):
    """Return the `Conditions` of samples from the `--condition_dir` of a ConditionConfig, None for a model without.

    :raises ValueError: if the model requires conditions that are not set, or has none.
    """
    described, folder = header.get("condition"), config.condition_dir
    if not described:
        require((not folder, f"--condition_dir {folder}: the model was trained without conditions; omit the flag"))
        return None
    require((folder, f"--condition_dir is not set: the model was trained with {describe_conditions(described)}"),
            error=FileNotFoundError)
    config = dataclasses.replace(config, condition_labels=",".join(map(str, described["labels"])),
                                 condition_value_range=described["value_range"])
    sides = [n * factor for n, factor in zip(header["latent_shape"][1:], space.codec.factors)]
    opened = _open_condition_source(config, data, header["data"], (0, *sides))
    conditions = _conditions(opened, np.arange(len(opened)), header["latent_shape"], space)
    require((conditions.shape[0] == described["channels"], f"{folder} (--condition_dir): expected "
             f"{describe_conditions(described)}, got {conditions.shape[0]} channels"))
    return conditions


def condition_header(conditions, config):
    """Return the entry of a header that describes the conditions of a model."""
    return {"channels": conditions.shape[0], "value_range": config.condition_value_range,
            "labels": list(integers.parse(config.condition_labels, "condition_labels"))}


def describe_conditions(described):
    labels = ", ".join(map(str, described["labels"]))
    return f"label maps of {labels}" if labels else f"images of {described['channels']} channels on the grid of x0"


def _open_condition_source(config, data, preprocessing, padded_shape, random_flip=False, random_crop=False):
    """Return the image source of conditions, read like images of `preprocessing` that have `padded_shape`."""
    data = apply_trained_preprocessing(data, {}, preprocessing)
    labels = integers.parse(config.condition_labels, "condition_labels")
    require(
        (not labels or len(set(labels)) == len(labels) > 1,
         f"--condition_labels {config.condition_labels}: expected two or more different values"),
        (not labels or not data.resample_spacing, f"--resample_spacing {data.resample_spacing} conflicts with "
         "--condition_labels: label maps are not resampled; resample both beforehand"),
        (not labels or not config.condition_value_range, "--condition_labels and --condition_value_range are mutually "
         "exclusive; set only one"),
    )
    data = dataclasses.replace(
        data, data_dir=config.condition_dir, image_channels=0, value_range=config.condition_value_range,
        value_window="", dynamic_range_db=0.0, reference_db="", colormap="", label_column="none",
        random_flip=random_flip, crop="random" if random_crop else data.crop, patches_per_volume=1,
    )
    # The side itself as the multiple pads to it.
    multiple = tuple(padded_shape[1:])
    if labels:
        return open_label_maps(data, labels, multiple)
    try:
        return open_folder(data, multiple, "--condition_dir")
    except ValueError as error:
        advice = "; for --condition_dir the flag is --condition_value_range" if "--value_range" in str(error) else ""
        raise ValueError(f"{error}{advice}") from error


def _conditions(opened, rows, x0_shape, space):
    """Return the `Conditions` of an image source on the grid of x0."""
    grid = tuple(x0_shape[1:])
    if isinstance(opened, LabelMaps):
        return Conditions(opened, rows, (opened.shape[0], *grid), None)
    if space.is_pixels:
        return Conditions(opened, rows, opened.shape, Space.of_pixels(opened.shape[0], len(grid)).encode)
    require((space.codec is not None, f"{opened.folder} (--condition_dir): images are encoded by the autoencoder of "
             "the latents, which is not available; set --vae_path"), error=FileNotFoundError)
    try:
        return Conditions(opened, rows, tuple(space.codec.latent_shape(opened.shape)), space.encode)
    except ValueError as error:
        raise ValueError(f"{opened.folder} (--condition_dir): {error}") from error


def infer_sizes(run, source, low_res):
    """Return a SuperResConfig with the image sizes of the two sources.

    :raises ValueError: if explicit flags conflict with them.
    """
    sizes = {}
    for name, data in (("large_size", source), ("small_size", low_res)):
        if data.unpadded_shape:
            sizes[name] = size(format_shape(data.unpadded_shape[1:]))
            if run.explicit.get(name, sizes[name]) != sizes[name]:
                raise ValueError(f"--{name} {run.explicit[name]} conflicts with {data.folder}, whose images are "
                                 f"{sizes[name]}; omit the flag or re-encode")
    return dataclasses.replace(run[SuperResConfig], **sizes)


def apply_trained_preprocessing(data, explicit, preprocessing):
    """Return a DataConfig with the preprocessing of training; explicitly set flags take precedence.

    Voxel spacing is a fact of each file and is not taken over. Random crops become center crops, and for volumes the
    grid of patches that covers them.
    """
    known = {f.name for f in dataclasses.fields(data)} - {"data_dir", "random_flip", "spacing"} - set(explicit)
    if "voxel_size" in explicit:    # another flag for image_size, which is recorded
        known -= {"image_size"}
    recorded = {**preprocessing, **recorded_options(preprocessing)}
    data = dataclasses.replace(data, **{k: to_tuple(v) for k, v in recorded.items() if k in known})
    if same_colormap(data.colormap, preprocessing.get("colormap", "")):     # the table that --colormap jet was then
        data = dataclasses.replace(data, colormap=preprocessing["colormap"])
    if data.crop == "random" and "crop" not in explicit:
        data = dataclasses.replace(data, crop="grid" if len(data.sides) == 3 else "center")
    return data


def require_same_preprocessing(cache, explicit):
    """Check explicit flags against the preprocessing of a cache.

    :raises ValueError: if they conflict.
    """
    later = DataConfig().unset_later_fields() if cache.preprocessing else {}
    recorded = {**later, **recorded_options(cache.preprocessing), **cache.preprocessing}
    requested = dict(explicit)
    if requested.pop("voxel_size", None):
        requested["image_size"] = DataConfig(voxel_size=explicit["voxel_size"]).image_size
    if requested.get("orientation") == "as_stored":     # recorded are the directions that this was
        requested.pop("orientation")
    if same_colormap(requested.get("colormap", ""), recorded.get("colormap", "")):
        requested.pop("colormap", None)
    for values in (recorded, requested):
        for name in ("spacing", "resample_spacing"):
            if values.get(name):
                values[name] = format_spacing(parse_spacing(values[name], name))
    for key in requested.keys() & recorded.keys():
        if to_tuple(recorded[key]) != requested[key]:
            raise ValueError(f"--{key} {requested[key]} conflicts with the cache {cache.folder}, whose images were "
                             f"read with {key}={recorded[key]}; omit the flag or re-encode")


def log_source(source):
    """Log count, shape and classes of a source, and the statistics of latents."""
    statistics = ""
    if source.statistics:
        by_channel = ", ".join(f"{std:.4f}" for std in source.statistics["channel_std"])
        statistics = (f"; mean {source.statistics['mean']:.4f}, std {source.statistics['std']:.4f}, "
                      f"std per channel {by_channel}")
    kind = "latents" if source.statistics else "images"
    log_rank0(f"{source.count} {kind} {format_shape(source.latent_shape)} in {source.folder}{format_classes(source)}"
              f"{statistics}")


# --- Codecs, normalizers and headers ---


def open_codec(description, vae, required=True, device=None):
    """Open the codec of x0: for latents the autoencoder at `--vae_path`, else at the recorded path.

    :param description: the record of `Codec.describe` in a header or manifest, None if unknown.
    :raises ValueError: if another autoencoder or scale factor is found; the message names both.
    :raises FileNotFoundError: if none is found, unless `required` is False; then None is returned.
    """
    if works_on_pixels({"autoencoder": description}):
        return PixelCodec(description["config"]["channels"], description["config"]["dims"])
    recorded = description or {"path": "", "sha256": None, "scale_factor": vae.scale_factor or None}
    explicit_path, path = vae.vae_path, vae.vae_path or recorded["path"]
    if not path or not explicit_path and not path.startswith("hub:") and not Path(path).exists():
        if required:
            raise FileNotFoundError(f"{path or 'the autoencoder'} does not exist (any more); set --vae_path to the "
                                    "autoencoder of the latents")
        return None
    vae = dataclasses.replace(vae, vae_path=path, scale_factor=vae.scale_factor or recorded["scale_factor"] or 0.0)
    codec = create_vae(vae, device or dist_util.dev())
    # The file at the recorded path may have been replaced by another autoencoder.
    if not required and not explicit_path and codec.fingerprint != recorded["sha256"]:
        log_rank0(f"{path} no longer contains the autoencoder {_short(recorded['sha256'])} of the latents")
        return None
    for name, expected, value in (("autoencoder", recorded["sha256"], codec.fingerprint),
                                  ("scale_factor", recorded["scale_factor"], codec.scale_factor)):
        if expected is not None and expected != value:
            raise ValueError(f"{path} does not match the latents: expected {name} {_short(expected)} "
                             f"({recorded['path']}), got {_short(value)}; set --vae_path to the autoencoder of the "
                             "latents")
    return codec


def open_space(header, vae, device=None):
    """Open the `Space` that a header describes."""
    codec = open_codec(header["autoencoder"], vae, device=device)
    return Space(codec, LatentNormalizer.from_dict(header["normalizer"]))


def fit_normalizer(config, source):
    """Return the LatentNormalizer of a latent source.

    :raises ValueError: if the standard deviation of x0 is far from 1, unless `--allow_latent_std` is set.
    """
    normalizer = LatentNormalizer.fit(config.normalizer, source.statistics)
    # Per-channel normalizers are fitted to the same statistics: x0 have a standard deviation of 1 by construction.
    std = source.statistics["std"] / normalizer.std[0] if len(normalizer.std) == 1 else 1.0
    check_latent_std(std, normalizer, config.allow_latent_std)
    return normalizer


def require_same_space(header, other, path, flag):
    """Check that the model at `path` (`flag`), with the header `other`, works in the space of `header`.

    Normalizers may differ by 2%: statistics of a subset differ slightly from those of all images.

    :raises ValueError: if autoencoder, normalizer or shape of x0 differ.
    """
    facts = {"autoencoder": lambda h: h["autoencoder"] and h["autoencoder"]["sha256"],
             "normalizer": lambda h: (h["normalizer"]["shift"], h["normalizer"]["std"]),
             "x0 shape": lambda h: h["latent_shape"]}
    for name, read in facts.items():
        expected, value = read(header), read(other)
        if not (_normalizers_close(expected, value) if name == "normalizer" else expected == value):
            raise ValueError(f"{path} ({flag}) does not match the diffusion model: expected {name} {_short(expected)}, "
                             f"got {_short(value)}; train it on the same images, cache or autoencoder")


def _normalizers_close(a, b):
    """Return whether two normalizers, each (shift, std), differ by no more than NORMALIZER_TOLERANCE."""
    tolerance = NORMALIZER_TOLERANCE * np.array(a[1])
    return all(len(x) == len(y) and (np.abs(np.subtract(x, y)) <= tolerance).all() for x, y in zip(a, b))


def space_header(source, space):
    """Return the header entries that describe the x0 of a run.

    A plain folder of latents does not record its autoencoder; the one at `--vae_path` is then recorded.
    """
    autoencoder = describe_autoencoder(source, space)
    return {
        "latent_shape": list(source.latent_shape), "image_shape": source.unpadded_shape and list(source.unpadded_shape),
        "normalizer": space.normalizer.to_dict(), "autoencoder": autoencoder,
        "scale_factor": autoencoder["scale_factor"] if autoencoder else source.scale_factor,
        "statistics": source.statistics, "data": source.preprocessing, **data_header(source),
    }


def describe_autoencoder(source, space):
    """Return the record of the autoencoder of a source in a `Space`, None if it is unknown."""
    return source.autoencoder or (space.codec and space.codec.describe())


def data_header(source):
    """Return the header entries by which a resumed run notices that files of an image or latent source changed."""
    return {"data_count": len(source), "data_fingerprint": source.fingerprint} if source.fingerprint else {}


def compare_with_resumed_data(run, source):
    """Number the classes of a source as in the run that is resumed, and log if its files are not those of that run."""
    before, now = run.previous_header, data_header(source)
    if keep_numbers(source, before.get("classes")):
        log_rank0(f"{source.folder}: classes are numbered as in the run that is resumed{format_classes(source)}")
    if now and before.get("data_fingerprint", now["data_fingerprint"]) != now["data_fingerprint"]:
        change = now["data_count"] - before["data_count"]
        difference = f"items {'added' if change > 0 else 'removed'}: {abs(change)}" if change else (
            "the number of items is the same, but names, sizes or times of files changed")
        log_rank0(f"{source.folder} differs from the data of the run that is resumed: {difference}; training continues "
                  "with the data as they are now")


def works_on_pixels(header):
    """Return whether x0 of the model with this header are images."""
    return bool(header["autoencoder"]) and header["autoencoder"]["config"].get("class") == "PixelCodec"


def _place(autoencoder):
    return "none: pixels" if works_on_pixels({"autoencoder": autoencoder}) else autoencoder["path"]


def _short(value):
    """Return the first 16 digits of a SHA-256, other values unchanged."""
    return value[:16] if isinstance(value, str) else value
