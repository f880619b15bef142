"""Where x0 live: pixels or the latents of an autoencoder; and the data, opened in such a space.

Pixels and latents are one path. A run works in a `Space`: a codec between pictures and latents (`PixelCodec`, or an
autoencoder) and the normalizer between latents and the x0 that networks see. Headers carry it, and models are combined
only where their spaces agree.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import torch

from .. import checkpoint_util, dist_util
from ..config import to_tuple, size
from ..data import MANIFEST, DataConfig, DownsampledImages, open_folder, parse_size, parse_spacing
from ..latent_datasets import EncodedImages, open_latents
from ..logger import progress_bar, log_rank0
from ..vae_wrapper import LatentNormalizer, PixelCodec, check_latent_std, create_vae


@dataclasses.dataclass
class Space:
    """Where x0 lives. `codec` is None where a cache is trained on and its autoencoder is not at hand."""

    codec: object
    normalizer: LatentNormalizer

    @property
    def is_pixels(self):
        return self.codec.is_pixels

    def encode(self, images):
        """Return x0 of pictures in [0, 1].  [N x C x ...] -> [N x Z x ...]."""
        return self.normalizer.normalize(self.codec.encode_batch(self.codec.pad_to_factors(images)))


def open_data(latents, vae, scale, data, given, seed, folder=None):
    """Return (source, Space) of what a run trains on.

    A cache (`--cache_dir`); pictures that an autoencoder encodes as they come (`--vae_path`); without either, the
    pictures themselves.
    """
    if latents.cache_dir or vae.vae_path:
        source, codec = open_latent_source(latents, vae, data, given, seed, folder)
        return source, Space(codec, fit_normalizer(scale, source))
    return open_pixels(open_folder(data))


def open_pixels(pictures):
    """Return (source, Space) of pictures that are x0 themselves, in [-1, 1]."""
    codec = PixelCodec(pictures.shape[0], dims=len(pictures.shape) - 1)
    return EncodedImages(pictures, codec), Space(codec, LatentNormalizer([0], [1], "none"))


def open_latent_source(latents, vae, data, given, seed, folder=None):
    """Return (latent source, codec or None): a cache, or pictures that an autoencoder encodes on the fly.

    A cache needs no autoencoder to train from; without one there are no previews. A run that goes on in `folder` keeps
    the statistics it began with.
    """
    device = dist_util.dev()
    if bool(latents.cache_dir) == bool(data.data_dir):
        raise ValueError(f"--cache_dir is {latents.cache_dir!r} and --data_dir is {data.data_dir!r}; give one of them: "
                         "a cache of latents, or pictures together with --vae_path")
    if latents.cache_dir:
        source = open_cache(latents.cache_dir, given)
        codec = open_codec(source.autoencoder, vae, device, required=False)
        if dist_util.any_rank(codec is None):   # a disk that not all nodes share: previews are drawn by all or none
            log_rank0("the cache's autoencoder is not at hand on all ranks (--vae_path), so there are no previews")
            codec = None
        return source, codec
    codec = create_vae(vae, device)
    pictures = open_images(data, given, codec)
    encoded = functools.partial(EncodedImages, pictures, codec, latents.stats_samples, seed)
    measured = read_run_header(folder).get("statistics")
    if dist_util.rank() == 0 and measured is None:
        with progress_bar(None, 0, "measuring latents") as bar:
            measured = encoded(progress=bar.advance_to).statistics
    return encoded(statistics=dist_util.broadcast_object(measured)), codec


def open_cache(folder, given):
    """Return a cache that was verified, on the device where it fits, and does not contradict the flags of the data."""
    source = open_latents(folder)
    require_same_preprocessing(source, given)
    verify(source)
    device = dist_util.dev()
    if device.type == "cuda":
        source.on_device(device, torch.cuda.mem_get_info()[0] // 4)
    return source


def open_validation(path, space, data, given):
    """Return the source of held-out data in the `Space` of a run: a cache of the same autoencoder, or pictures."""
    if (Path(path) / MANIFEST).exists():
        cache = open_latents(path)
        same = space.codec is None or cache.autoencoder["sha256"] == space.codec.fingerprint
        if space.is_pixels or not same:
            raise ValueError(f"{path} is a cache of autoencoder {cache.autoencoder['path']}, which this run does not "
                             "train on; give pictures as --val_data_dir, or a cache of the same autoencoder")
        return cache
    if space.codec is None:
        raise FileNotFoundError(f"{path} holds pictures, and the autoencoder of the cache is not at hand to encode "
                                "them; set --vae_path, or give a cache as --val_data_dir")
    pictures = open_images(dataclasses.replace(data, data_dir=path, random_flip=False), given, space.codec,
                             "--val_data_dir")
    return EncodedImages(pictures, space.codec, statistics={})


def open_images(data, given, codec, flag="--data_dir"):
    """Return the pictures or volumes that a codec shall see, read as it was trained where the flags do not say."""
    return open_folder(apply_trained_preprocessing(data, given, codec.preprocessing), codec.factors, flag)


def open_low_res(source, space, small_size, small_cache, given):
    """Return the source of the small pictures that go with `source`, item by item.

    :raises ValueError: where they are not smaller, or a cache of small ones does not go with that of the large ones.
    """
    if small_cache:
        small = open_cache(small_cache, given)
        if small.filenames is None or small.filenames != source.filenames:
            raise ValueError(f"{small_cache} holds other pictures, or in another order, than {source.folder}; encode "
                             "the same folder twice, with two --image_size")
        if small.autoencoder != source.autoencoder:
            raise ValueError(f"{small_cache} and {source.folder} were made by different autoencoders, "
                             f"{small.autoencoder['path']} and {source.autoencoder['path']}")
        for key in ("random_flip", "crop", "image_channels", "value_range", "value_window"):
            if small.preprocessing.get(key) != source.preprocessing.get(key):
                raise ValueError(f"{small_cache} was encoded with --{key} {small.preprocessing.get(key)}, "
                                 f"{source.folder} with {source.preprocessing.get(key)}, so that its items would not "
                                 "go with these; encode both with the same flags but for --image_size")
    elif isinstance(source, EncodedImages):
        sides = parse_size(small_size)
        small = EncodedImages(DownsampledImages(source.dataset, sides), space.codec, statistics={})
    else:
        raise ValueError(f"{source.folder} is a cache; give that of the small pictures as --small_cache_dir")
    if any(a >= b for a, b in zip(small.latent_shape[1:], source.latent_shape[1:])):
        raise ValueError(f"small pictures give x0 of shape {small.latent_shape}, large ones of {source.latent_shape}; "
                         "--small_size must be below --large_size")
    return small


def infer_sizes(super_res, source, small, given):
    """Return a SuperResConfig with the sizes of the pictures of the two sources, which flags must not contradict."""
    found = {}
    for name, of in (("large_size", source), ("small_size", small)):
        if of.unpadded_shape:
            found[name] = size("x".join(map(str, of.unpadded_shape[1:])))
            if given.get(name, found[name]) != found[name]:
                raise ValueError(f"--{name} {given[name]}, but the pictures of {of.folder} are {found[name]}; leave "
                                 "the flag away or encode again")
    return dataclasses.replace(super_res, **found)


def apply_trained_preprocessing(data, given, preprocessing):
    """Return a DataConfig with the settings that a model was trained with, but for those that are given.

    How far voxels are apart is a fact of each file and no setting. Where patches were drawn at random, pictures are cut
    in the middle, and volumes into a grid of patches that covers them.
    """
    known = {f.name for f in dataclasses.fields(data)} - {"data_dir", "random_flip", "spacing"} - set(given)
    if "voxel_size" in given:
        known -= {"image_size"}
    data = dataclasses.replace(data, **{k: to_tuple(v) for k, v in preprocessing.items() if k in known})
    if data.crop == "random" and "crop" not in given:
        data = dataclasses.replace(data, crop="grid" if len(data.sides) == 3 else "center")
    return data


def require_same_preprocessing(cache, given):
    """Refuse flags of the data that contradict how the pictures of a cache were read."""
    read = cache.preprocessing
    if given.get("voxel_size"):
        given = {**given, "image_size": DataConfig(voxel_size=given["voxel_size"]).image_size}
    if given.get("spacing"):
        given = {**given, "spacing": ",".join(f"{s:g}" for s in parse_spacing(given["spacing"]))}
    for key, value in given.items():
        if key in read and key != "voxel_size" and to_tuple(read[key]) != value:
            raise ValueError(f"--{key} {value} contradicts the cache {cache.folder}, whose pictures were read with "
                             f"{key} {read[key]}; leave the flag away or encode again")


def verify(cache, limit_bytes=2**32):
    """Compare a cache with the SHA-256 of its files on rank 0, where that takes seconds."""
    if dist_util.rank() == 0:
        if cache.nbytes > limit_bytes:
            return log_rank0(f"{cache.folder} is large and taken as it is; encode_dataset.py with the same flags verifies it")
        with progress_bar(None, 0, "verifying the cache") as bar:
            cache.verify(bar.advance_to)


def log_source(source):
    """Print what a source holds: count, shape, classes, and for latents their statistics."""
    classes = spread = ""
    if source.class_names:
        counts = np.bincount(source.labels, minlength=len(source.class_names))
        classes = "; classes: " + ", ".join(f"{name} {n}" for name, n in zip(source.class_names, counts))
    if source.statistics:
        of = source.statistics
        by_channel = ", ".join(f"{std:.4f}" for std in of["channel_std"])
        spread = f"; mean {of['mean']:.4f}, std {of['std']:.4f}, std per channel {by_channel}"
    what = "latents" if source.statistics else "pictures"
    log_rank0(f"{source.count} {what} {'x'.join(map(str, source.latent_shape))} in {source.folder}{classes}{spread}")


def read_run_header(folder):
    """Return the header of the run that goes on in `folder`, an empty dictionary where none does."""
    if not folder or not checkpoint_util.committed_steps(folder):
        return {}
    try:
        return json.loads((Path(folder) / "config.json").read_text())["header"]
    except (OSError, ValueError, KeyError):
        return {}


def open_codec(described, vae, device, required=True):
    """Open the codec that x0 was made with: for latents `--vae_path`, else where the description says that it was.

    :raises ValueError: where another autoencoder is found, naming both.
    :raises FileNotFoundError: where none is found, unless `required` is False; then None is returned.
    """
    if described and described["config"].get("class") == "PixelCodec":
        return PixelCodec(described["config"]["channels"], described["config"]["dims"])
    described = described or {"path": "", "sha256": None, "scale_factor": vae.scale_factor or None}
    path = vae.vae_path or described["path"]
    if not path or not vae.vae_path and not path.startswith("hub:") and not Path(path).exists():
        if required:
            raise FileNotFoundError(f"the autoencoder is no longer at {path or 'any known place'}; say with --vae_path "
                                    "where it is")
        return None
    scale_factor = vae.scale_factor or described["scale_factor"]
    codec = create_vae(dataclasses.replace(vae, vae_path=path, scale_factor=scale_factor or 0.0), device)
    stale = not required and not vae.vae_path and codec.fingerprint != described["sha256"]
    if stale:
        log_rank0(f"{path} no longer holds the autoencoder {_format_value(described['sha256'])} that the latents were made with")
        return None
    for name, wanted, found in (("autoencoder", described["sha256"], codec.fingerprint),
                                ("scale_factor", described["scale_factor"], codec.scale_factor)):
        if wanted is not None and wanted != found:
            raise ValueError(f"the latents were made with {name} {_format_value(wanted)} ({described['path']}), {path} has "
                             f"{_format_value(found)}; give the autoencoder they were made with as --vae_path")
    return codec


def _format_value(value):
    return value[:16] if isinstance(value, str) else value


def open_space(header, vae, device):
    """Open the `Space` that a header describes."""
    return Space(open_codec(header["autoencoder"], vae, device), LatentNormalizer.from_dict(header["normalizer"]))


def fit_normalizer(config, source):
    """Return the LatentNormalizer of a latent source, after checking what it makes of the measured deviation."""
    normalizer = LatentNormalizer.fit(config.normalizer, source.statistics, source.scale_factor)
    std = source.statistics["std"] / normalizer.std[0] if len(normalizer.std) == 1 else 1.0
    check_latent_std(std, normalizer, config.allow_latent_std)
    return normalizer


def require_same_space(mine, other, path, flag):
    """Refuse a model whose x0 are not those of the first one; both are given by their headers."""
    ways = {"autoencoder": lambda h: h["autoencoder"] and h["autoencoder"]["sha256"],
            "normalizer": lambda h: (h["normalizer"]["shift"], h["normalizer"]["std"]),
            "shape of x0": lambda h: h["latent_shape"]}
    for what, read in ways.items():
        # Statistics that were measured over a sample of the pictures, and over all, are not quite the same.
        alike = _close(read(mine), read(other)) if what == "normalizer" else read(mine) == read(other)
        if not alike:
            places = [_format_value(read(h)) for h in (mine, other)]
            raise ValueError(f"{path} ({flag}) works on x0 of {what} {places[1]}, the diffusion model on {places[0]}; "
                             "train it on the same pictures, cache or autoencoder")


def _close(mine, other, share=0.02):
    """Say whether two normalizers, (shift, std) each, differ by no more than a share of the standard deviation."""
    by = share * np.array(mine[1])
    return all(len(a) == len(b) and (np.abs(np.subtract(a, b)) <= by).all() for a, b in zip(mine, other))


def space_header(source, space):
    """Return what headers say of the x0 of a run.

    A plain folder of latents does not know its autoencoder; then the one given as `--vae_path` is taken for it.
    """
    autoencoder = source.autoencoder or (space.codec and space.codec.describe())
    return {
        "latent_shape": list(source.latent_shape), "image_shape": source.unpadded_shape and list(source.unpadded_shape),
        "normalizer": space.normalizer.to_dict(), "autoencoder": autoencoder,
        "scale_factor": autoencoder["scale_factor"] if autoencoder else source.scale_factor,
        "statistics": source.statistics, "data": source.preprocessing,
    }


def works_on_pixels(header):
    """Say whether the x0 of a header's model are pictures."""
    return bool(header["autoencoder"]) and header["autoencoder"]["config"].get("class") == "PixelCodec"
