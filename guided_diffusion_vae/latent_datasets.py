"""Sources of latents for diffusion training: a cache on disk, a folder of single files, or images encoded on the fly.

All three return scaled latents (z * scale_factor; see docs/training.md on their scale) and implement `LatentSource`:
`read` gathers values on any thread, `latents` turns them into latents on the device. `data.LatentStream` normalizes
them and selects the items of each step.
"""

import functools
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import deprecated_names, logger
from .config import option, require
from .data import Prefetcher, RunningMoments, evenly_spaced, missing_classes, permute_indices
from .data.archives import file_stamp
from .data.labels import find_labels
from .data.listing import is_skipped
from .data.manifest import (
    ATTRIBUTES, CACHE_FLAG, FILENAMES, LABELS, MANIFEST, REENCODE_HINT, path_inside, read_manifest, stored_shape,
)
from .files import file_errors, hash_lines, open_npy, require_folder, sha256_of_file
from .interfaces import Codec, Device, Flips, ImageSource, Indices, LatentSource, Rngs
from .nn import to_device, without_tf32
from .vae.posterior import sample_moments

try:
    import resource
except ImportError:     # Windows, whose processes may open any number of files
    resource = None  # type: ignore[assignment]

MAX_CHANNELS = 16       # of latents with one spatial axis: an array with more is an image without a channel axis
SPARE_FILES = 256       # files that a process may open in addition to its caches
_SHARD_NAME = re.compile(r"latents-\d{5,}-of-\d{5,}\.npy")


@dataclass
class LatentConfig:
    """Options of the latents to train on."""

    SECTION = "latents"

    cache_dir: str = option(
        "", "latent cache of encode_dataset.py, or folder with one .npy per image, to train on", essential=True)
    stats_samples: int = option(
        2048, "images whose latents are measured for the normalizer if images are encoded on the fly", minimum=1)


class LatentCache(LatentSource):
    """The latents of a cache; shards are memory-mapped, so memory does not grow with their number.

    :raises FileNotFoundError: if there is no folder, or no manifest in it.
    :raises ValueError: if the manifest has another format or version, or a file differs from it.
    """

    supports_bulk_reads = True

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> "LatentCache":
        """Return the cache in a folder of encode_dataset.py; its files are mapped into memory, not read."""
        return cls(folder)

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = require_folder(folder, CACHE_FLAG)
        self.manifest = manifest = read_manifest(self.folder)
        self.count = manifest["count"]
        self.latent_shape = tuple(manifest["latent_shape"])
        self.image_shape = tuple(manifest["image_shape"])
        self.unpadded_shape = tuple(manifest["preprocessing"].get("unpadded_shape", self.image_shape))
        self.preprocessing = {k: v for k, v in manifest["preprocessing"].items() if k != "data_dir"}
        self.class_names = manifest["class_names"]
        self.scale_factor = manifest["scale_factor"]
        self.autoencoder = manifest["autoencoder"]
        self.statistics = manifest["statistics"]
        self.draws_posterior = manifest["store"] == "moments"
        self.random_flip = manifest["flips"]
        _allow_open_files(len(manifest["shards"]), self.folder)
        self._shards = [self._open_shard(shard) for shard in manifest["shards"]]
        self._firsts = np.array([shard["first"] for shard in manifest["shards"]])
        self._entries = self.count * (2 if self.random_flip else 1)     # the second half are the flipped images
        starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        require((starts[-1] == self._entries and (starts[:-1] == self._firsts).all(),
                 f"{self.folder / MANIFEST}: expected {self._entries} consecutive latents, the shards contain "
                 f"{starts[-1]}; {REENCODE_HINT}"))
        self.labels = None if self.class_names is None else self._open_labels()
        self.attributes = self._open_attributes(manifest.get("attributes", []))
        self.nbytes = sum(shard.nbytes for shard in self._shards)
        self._resident: torch.Tensor | None = None

    @property
    def filenames(self) -> list[str]:  # type: ignore[override]  # read-only
        """The names of the images, one per latent."""
        path = self.folder / FILENAMES
        with file_errors(path, action=REENCODE_HINT):
            return path.read_text("utf-8").splitlines()

    def read(self, indices: Indices, flips: Flips = None, rngs: Rngs = None) -> torch.Tensor:
        """Return the stored values of some items, float32 on the CPU; rows if the latents are kept on a device.

        :param flips: booleans; True selects the latent of the flipped image.
        """
        rows = np.asarray(indices, np.int64)
        if flips is not None:
            require((self.random_flip, f"{self.folder} contains no flipped images; re-encode with --random_flip True"))
            rows = rows + self.count * np.asarray(flips, np.int64)
        low, high = (rows.min(), rows.max()) if len(rows) else (0, 0)
        require((0 <= low and high < self._entries, f"{self.folder}: expected indices of {self._entries} latents, got "
                                                    f"{low} to {high}"), error=IndexError)
        if self._resident is not None:
            return torch.from_numpy(rows)
        values = torch.from_numpy(self._gather(rows)).float()
        if not values.sum().isfinite():     # much faster than looking at each value
            bad = rows[~values.isfinite().flatten(1).all(1).numpy()].tolist()
            require((not bad, f"{self._shard_path(bad)}: latents {bad[:3]} are not finite; {REENCODE_HINT}"))
        return values

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        """Return the stored values of `rows` [n x ...]: one gather per shard, in their order, then one over all."""
        if len(self._shards) == 1:
            return self._shards[0].take(rows, axis=0)
        owners = np.searchsorted(self._firsts, rows, side="right") - 1
        order = np.argsort(owners, kind="stable")
        ends = np.flatnonzero(np.diff(owners[order], append=len(self._shards))) + 1
        by_shard = np.empty((len(rows), *stored_shape(self.manifest)), self._shards[0].dtype)
        for start, end in zip([0, *ends[:-1]], ends):
            owner = owners[order[start]]
            # mode "clip": with bounds checks NumPy writes to `out` through a copy.
            self._shards[owner].take(rows[order[start:end]] - self._firsts[owner], axis=0, out=by_shard[start:end],
                                     mode="clip")
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return by_shard.take(inverse, axis=0)

    def latents(self, values: torch.Tensor, eps: torch.Tensor | None = None, device: Device = "cpu") -> torch.Tensor:
        """Return scaled latents [n x Z x ...] on `device`; see `LatentSource`."""
        if self._resident is None:
            values = to_device(values, device)
        else:
            values = to_device(self._resident.index_select(0, to_device(values, self._resident.device)), device).float()
        return sample_moments(values, eps) if self.draws_posterior else values

    def on_device(self, device: Device, limit_bytes: int = 2**31) -> bool:
        """Keep the full cache on `device` if it takes at most `limit_bytes`; return whether it is kept there."""
        if self.nbytes > limit_bytes:
            return False
        dtype = getattr(torch, self.manifest["dtype"])
        resident = torch.empty((self._entries, *stored_shape(self.manifest)), dtype=dtype, device=device)
        for first, shard in zip(self._firsts, self._shards):
            resident[first:first + len(shard)] = torch.from_numpy(np.array(shard)).to(device)
        bad = (~torch.isfinite(resident).flatten(1).all(1)).nonzero().flatten().tolist()
        require((not bad, f"{self._shard_path(bad)}: latents {bad[:3]} are not finite; {REENCODE_HINT}"))
        self._resident = resident
        return True

    def verify(self, progress: Callable[[int, int], Any] | None = None) -> None:
        """Compare every file with its SHA-256 in the manifest.

        :param progress: called with (files done, files in total).
        :raises ValueError: if a file differs; the message names it.
        """
        files = [(shard["file"], shard["sha256"]) for shard in self.manifest["shards"]]
        files += self.manifest["files"].items()
        for done, (name, sha256) in enumerate(files, 1):
            require((sha256_of_file(self.folder / name) == sha256,
                     f"{self.folder / name} is corrupt: its SHA-256 differs from the manifest; {REENCODE_HINT}"))
            if progress:
                progress(done, len(files))

    def _shard_path(self, rows: list[int]) -> Path:
        """Return the path of the shard of the first of `rows`, the folder if there is none."""
        owners = np.searchsorted(self._firsts, rows[:1], side="right") - 1
        return self.folder / "".join(self.manifest["shards"][owner]["file"] for owner in owners)

    def _open_shard(self, shard: dict[str, Any]) -> np.ndarray:
        path, dtype = path_inside(self.folder, shard["file"]), self.manifest["dtype"]
        values, expected = _open_array(path, REENCODE_HINT), (shard["count"], *stored_shape(self.manifest))
        require((values.shape == expected and values.dtype == np.dtype(dtype),
                 f"{path}: expected {dtype} {expected} as in the manifest, got {values.dtype} {values.shape}; "
                 f"{REENCODE_HINT}"))
        return values

    def _open_labels(self) -> np.ndarray:
        path, classes = self.folder / LABELS, len(self.class_names)
        labels = _open_array(path, REENCODE_HINT)
        valid = labels.dtype == np.int64 and labels.shape == (self.count,)
        ends = f" from {labels.min()} to {labels.max()}" if valid else ""
        require((valid and 0 <= labels.min() and labels.max() < classes,
                 f"{path}: expected {self.count} int64 labels of {classes} classes, got {labels.dtype} {labels.shape}"
                 f"{ends}; {REENCODE_HINT}"))
        return labels


    def _open_attributes(self, names: list[str]) -> dict[str, np.ndarray]:
        if not names:
            return {}
        path, expected = self.folder / ATTRIBUTES, (self.count, len(names))
        values = _open_array(path, REENCODE_HINT)
        require((values.dtype == np.float32 and values.shape == expected,
                 f"{path}: expected float32 {expected} as in the manifest, got {values.dtype} {values.shape}; "
                 f"{REENCODE_HINT}"))
        return dict(zip(names, values.T))


class LatentFolder(LatentSource):
    """Latents stored as one `.npy` [Z x ...] per image; labels and attributes are found as in `ImageFolder`.

    The files do not record their autoencoder: they must be scaled by `scale_factor` already, as `encode_batch` returns
    them. Statistics are measured over up to `max_measured` files, evenly spaced.
    """

    image_shape = unpadded_shape = autoencoder = None

    def __init__(self, folder: str | os.PathLike[str], scale_factor: float = 0.18215, max_measured: int = 4096) -> None:
        self.folder = require_folder(folder, CACHE_FLAG)
        self.scale_factor, self.preprocessing = scale_factor, {}
        self.paths = sorted(path for path in self.folder.rglob("*.npy")
                            if not is_skipped(path.relative_to(self.folder).as_posix()))
        require((self.paths, f"{self.folder} contains neither {MANIFEST} nor .npy files; check {CACHE_FLAG}, "
                 "or encode images by encode_dataset.py"),
                error=FileNotFoundError)
        self.count = len(self.paths)
        self.latent_shape = self._open(self.paths[0]).shape
        channels, *grid = self.latent_shape or (0,)
        is_image = len(grid) == 1 and (channels > MAX_CHANNELS or channels == grid[0])
        require((grid and not is_image,
                 f"{self.paths[0]}: expected a latent [Z x ...] with at most {MAX_CHANNELS} channels, got shape "
                 f"{self.latent_shape}; check {CACHE_FLAG} (images are read by --data_dir with --vae_path)"))
        self.filenames = [path.relative_to(self.folder).as_posix() for path in self.paths]
        self.class_names, self.labels, self.attributes, self.notes, _ = find_labels(self.filenames, str(self.folder))
        stamps = map(file_stamp, map(str, self.paths))
        self.fingerprint = hash_lines(f"{name} {stamp}" for name, stamp in zip(self.filenames, stamps))
        moments = RunningMoments()
        for index in evenly_spaced(self.count, max_measured):
            moments.add(self.read([index]).numpy())
        self.statistics = moments.statistics()

    def read(self, indices: Indices, flips: Flips = None, rngs: Rngs = None) -> torch.Tensor:
        """Return the latents of some items, float32 [n x Z x ...] on the CPU."""
        require((flips is None, f"{self.folder} contains no flipped images; encode with scripts/encode_dataset.py"))
        values = np.empty((len(indices), *self.latent_shape), np.float32)
        for row, index in enumerate(indices):
            path = self.paths[index]
            latent = self._open(path)
            require((latent.shape == self.latent_shape, f"{path}: expected shape {self.latent_shape} as in "
                                                        f"{self.paths[0]}, got {latent.shape}; re-encode its image"))
            values[row] = latent
            require((np.isfinite(values[row]).all(), f"{path}: values are not finite; re-encode its image"))
        return torch.from_numpy(values)

    def latents(self, values: torch.Tensor, eps: torch.Tensor | None = None, device: Device = "cpu") -> torch.Tensor:
        """Return `values` on `device`: the files contain no posterior to sample from."""
        return to_device(values, device)

    def _open(self, path: Path) -> np.ndarray:
        latent = _open_array(path, "re-encode its image")
        require((latent.dtype.kind == "f", f"{path}: expected floating-point latents, got {latent.dtype}; check "
                                           f"{CACHE_FLAG}"))
        return latent


class EncodedImages(LatentSource):
    """The latents of an image source, encoded on the fly in full batches on the device of the codec.

    With a `PixelCodec` the images themselves are x0, and no statistics are needed.

    :param stats_samples: number of images, selected by `seed`, over which mean and standard deviation are measured.
    :param statistics: statistics to use instead of measuring (of a resumed run); {} if unused; or a function of this
        source that returns them at their first use (of rank 0).
    :param progress: called with (images measured, images in total).
    """

    def __init__(self, dataset: ImageSource, codec: Codec, stats_samples: int = 2048, seed: int = 0,
                 batch_size: int = 32, statistics: dict[str, Any] | Callable[[Any], dict[str, Any]] | None = None,
                 progress: Callable[[int, int], Any] | None = None) -> None:
        self.dataset = dataset
        self.codec = codec
        self.folder = dataset.folder
        self.count = len(dataset)
        self.latent_shape = tuple(codec.latent_shape(dataset.shape))
        self.image_shape = tuple(dataset.shape)
        self.unpadded_shape = tuple(dataset.unpadded_shape)
        self.labels = dataset.labels
        self.class_names, self.attributes = dataset.class_names, dataset.attributes
        self.fingerprint = dataset.fingerprint
        self.filenames = dataset.names
        self.preprocessing = dataset.preprocessing
        self.scale_factor = codec.scale_factor
        self.autoencoder = codec.describe()
        self.draws_posterior = codec.has_posterior
        self.random_flip = dataset.random_flip
        self.random_crop = dataset.random_crop
        if not codec.has_posterior:
            statistics = {}
        elif statistics is None:
            statistics = self.measure(stats_samples, seed, batch_size, progress)
        self._statistics = statistics

    @functools.cached_property
    def statistics(self) -> dict[str, Any]:  # type: ignore[override]  # read-only
        """Mean and standard deviation of the latents."""
        return self._statistics(self) if callable(self._statistics) else self._statistics

    def read(self, indices: Indices, flips: Flips = None, rngs: Rngs = None) -> torch.Tensor:
        """Return the images of some items, float32 [n x C x ...] in [0, 1] on the CPU."""
        return self.dataset.batch(indices, flips, rngs)

    @torch.no_grad()
    @without_tf32()     # so that training on the fly computes the latents that a cache has
    def latents(self, values: torch.Tensor, eps: torch.Tensor | None = None, device: Device = "cpu") -> torch.Tensor:
        """Return scaled latents [n x Z x ...] of images on `device`; see `LatentSource`."""
        # The images stay on the host: the codec checks their values there without synchronizing a GPU.
        return to_device(self.codec.encode_batch(values, eps), device).float()

    @without_tf32()
    def measure(self, stats_samples: int, seed: int, batch_size: int = 32,
                progress: Callable[[int, int], Any] | None = None) -> dict[str, Any]:
        """Return the statistics of the latents of `stats_samples` images, or of all; arguments as of the class."""
        count = min(stats_samples, self.count)
        chosen = np.sort(permute_indices(np.arange(count), self.count, seed, 0).astype(np.int64))
        groups = [chosen[start:start + batch_size] for start in range(0, count, batch_size)]
        ahead = Prefetcher(lambda k: self.read(groups[k]), end_step=len(groups))
        moments, done = RunningMoments(), 0
        try:
            for group in groups:
                stored = encode_for_storage(self.codec, ahead.next(), "moments").cpu().numpy()
                require_finite(stored, group_name(self.dataset, group))
                add_stored(moments, stored, "moments")
                done += len(group)
                if progress:
                    progress(done, count)
        finally:
            ahead.close()
        return moments.statistics()


@torch.no_grad()
def encode_for_storage(codec: Codec, images: torch.Tensor, store: str) -> torch.Tensor:
    """Return the float32 values that a cache stores for images: moments [N x 2Z x ...] or modes [N x Z x ...]."""
    return (codec.encode_moments(images) if store == "moments" else codec.encode_batch(images)).float()


def add_stored(moments: RunningMoments, stored: np.ndarray, store: str) -> None:
    """Add stored values to `RunningMoments` of latents, whose variance is that of the means plus the posterior's."""
    if store == "moments":
        mean, logvar = np.split(stored.astype(np.float64), 2, axis=1)
        moments.add(mean, np.exp(logvar))
    else:
        moments.add(stored)


def group_name(dataset: ImageSource, group: Indices) -> str:
    """Return a name for the images of a batch, for error messages."""
    return f"{dataset.names[group[0] % len(dataset)]} (or one of {len(group) - 1} images in its batch)"


def require_finite(stored: np.ndarray, name: str) -> None:
    """Check encoded values.

    :raises ValueError: if one is not finite.
    """
    require((np.isfinite(stored).all(), f"{name}: the autoencoder returns latents that are not finite; check it with "
                                        "scripts/check_roundtrip.py"))


def open_latents(folder: str | os.PathLike[str]) -> LatentSource:
    """Return the `LatentCache` in a folder, or the `LatentFolder` for a plain folder with one `.npy` per image.

    It is logged where the labels of the latter come from, and which files have no class if others have one.

    :raises FileNotFoundError: if there is neither; an incomplete cache is not a plain folder of latents.
    """
    shards = require_folder(folder, CACHE_FLAG).glob("latents-*-of-*.npy")
    incomplete = any(_SHARD_NAME.fullmatch(path.name) for path in shards)
    if is_cache(folder) or incomplete:
        return LatentCache(folder)
    source = LatentFolder(folder)
    for message in (*source.notes, *filter(None, [missing_classes(source)])):
        logger.warn(message)
    return source


def is_cache(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains a complete cache."""
    return (Path(folder) / MANIFEST).exists()


def require_same_autoencoder(cache: LatentSource, codec: Codec) -> None:
    """Check that latents come from the autoencoder `codec`, with its scale factor.

    :raises ValueError: if not; the message names both.
    """
    if cache.autoencoder is None:
        return
    path, sha256 = cache.autoencoder["path"], cache.autoencoder["sha256"]
    require(
        (sha256 == codec.fingerprint,
         f"{cache.folder}: latents come from autoencoder {sha256[:16]} ({path}), --vae_path is "
         f"{codec.fingerprint[:16]} ({codec.path}); re-encode or use the first"),
        (cache.scale_factor == codec.scale_factor,
         f"{cache.folder}: latents are scaled by {cache.scale_factor}, the autoencoder {codec.path} scales by "
         f"{codec.scale_factor}; re-encode or set --scale_factor {cache.scale_factor}"),
    )


def _open_array(path: Path, action: str) -> np.ndarray:
    with file_errors(path, action=action):
        return open_npy(path)


def _allow_open_files(count: int, folder: Path) -> None:
    """Raise the limit of open files of this process by the shards of a cache, each of which is memory-mapped.

    :raises ValueError: if the limit cannot be raised that far.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/dev/fd"))     # among them the shards of other caches
    required = opened + count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < required:
        require((hard == resource.RLIM_INFINITY or hard >= required,
                 f"{folder} has {count} shards, and this process has {opened} open files and may open {hard}; raise "
                 f"the limit (ulimit -n {required}), or encode with a larger --shard_size"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (required, hard))


__getattr__ = deprecated_names("latent_datasets")
