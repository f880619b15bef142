"""Feed latents to diffusion training: a cache on disk, a folder of single files, or pictures encoded as they come.

All three sources hand out scaled latents (z * scale_factor; README, the scale of latents) and share one
interface: `read` gathers a batch on any thread, `latents` turns it into latents on the device, `batch` does both.
`LatentStream` adds the normalisation and says which latents form which step.
"""

import re
import resource
from dataclasses import dataclass

import numpy as np
import torch

from .config import option
from .data.batching import Prefetcher, permute_indices
from .data.listing import infer_classes
from .data.manifest import CACHE_FLAG, FILENAMES, LABELS, MANIFEST, _REENCODE_HINT, _inside, _read_manifest, _stored_shape
from .data.statistics import RunningMoments
from .files import require_folder, sha256_of_file
from .interfaces import LatentSource
from .nn import to_device
from .vae.posterior import sample_moments

MAX_CHANNELS = 16      # of latents over one axis: what has more is taken for a picture without an axis for channels


_SHARD_NAME = re.compile(r"latents-\d{5,}-of-\d{5,}\.npy")
SPARE_FILES = 256  # that a process has open besides a cache


@dataclass
class LatentConfig:
    """Where training finds its latents."""

    SECTION = "latents"

    cache_dir: str = option("", "cache of encode_dataset.py, or a folder with one .npy per picture, to train from")
    stats_samples: int = option(2048, "pictures over which latents are measured where they are encoded on the fly",
                             minimum=1)


@torch.no_grad()
def _encode(codec, images, store):
    encoded = codec.encode_moments(images) if store == "moments" else codec.encode_batch(images)
    return encoded.float()


def _group_name(pictures, group):
    return f"{pictures.names[group[0] % len(pictures)]} (or one of the {len(group) - 1} encoded with it)"


def _not_finite(names):
    return f"{names}: the autoencoder gives latents that are not finite; check it with check_roundtrip.py"


def _add(moments, stored, store):
    """Count stored entries in; the variance of z is that of the means plus the posterior's own."""
    if store == "moments":
        mean, logvar = np.split(stored.astype(np.float64), 2, axis=1)
        moments.add(mean, np.exp(logvar))
    else:
        moments.add(stored)


class LatentCache(LatentSource):
    """Hand out the latents of a cache; memory does not grow with their number, as the shards are memory-mapped.

    :raises FileNotFoundError: no folder, or one without a manifest.
    :raises ValueError: a manifest of another format or version, shards that are not what it says.
    """

    supports_bulk_reads = True

    def __init__(self, folder):
        self.folder = require_folder(folder, CACHE_FLAG)
        self.manifest = manifest = _read_manifest(self.folder)
        self.count = manifest["count"]
        self.latent_shape = tuple(manifest["latent_shape"])
        self.image_shape = tuple(manifest["image_shape"])
        self.unpadded_shape = tuple(manifest["preprocessing"].get("unpadded_shape", self.image_shape))
        self.class_names = manifest["class_names"]
        self.scale_factor = manifest["scale_factor"]
        self.autoencoder = manifest["autoencoder"]
        self.statistics = manifest["statistics"]
        self.draws_posterior = manifest["store"] == "moments"
        self.random_flip = manifest["flips"]
        _allow_open_files(len(manifest["shards"]))
        self._shards = [self._open_shard(shard) for shard in manifest["shards"]]
        self._entries = sum(len(shard) for shard in self._shards)  # with mirrored ones
        self._firsts = np.array([shard["first"] for shard in manifest["shards"]])
        self._require_whole()
        self.labels = self._read_labels() if self.class_names is not None else None
        self._resident = None

    @property
    def nbytes(self):
        """Bytes of all shards."""
        return sum(shard.nbytes for shard in self._shards)

    @property
    def preprocessing(self):
        """How the pictures were read before they were encoded."""
        return {k: v for k, v in self.manifest["preprocessing"].items() if k != "data_dir"}

    @property
    def filenames(self):
        """The pictures' names, one per latent."""
        return (self.folder / FILENAMES).read_text().splitlines()

    def read(self, indices, flips=None, rngs=None):
        """Return what `latents` needs of some items: stored values, float32 on the CPU, or rows of the device's copy.

        :param flips: bools; where true the mirrored picture's latent is taken.
        """
        rows = np.asarray(indices, np.int64)
        if flips is not None:
            if not self.random_flip:
                raise ValueError(f"{self.folder} holds no mirrored pictures; encode again with --random_flip True")
            rows = rows + self.count * np.asarray(flips, np.int64)
        if len(rows) and not 0 <= rows.min() <= rows.max() < self._entries:
            raise IndexError(f"{self.folder} has {self._entries} latents, asked for were {rows.min()} to {rows.max()}")
        if self._resident is not None:
            return torch.from_numpy(rows)
        values = torch.from_numpy(self._gather(rows)).float()
        if not values.sum().isfinite() and not values.isfinite().all():  # the first alone is fast
            bad = int(rows[~values.isfinite().flatten(1).all(1).numpy()][0])
            raise ValueError(f"{self.folder}: latent {bad} is not finite; the cache is damaged, encode it again")
        return values

    def _gather(self, rows):
        """Return the stored values of `rows`, [n x ...]: one gather a shard, in their order, then one over all."""
        if len(self._shards) == 1:
            return self._shards[0].take(rows, axis=0)
        owners = np.searchsorted(self._firsts, rows, side="right") - 1
        order = np.argsort(owners, kind="stable")
        ends = np.flatnonzero(np.diff(owners[order], append=len(self._shards))) + 1
        by_shard = np.empty((len(rows), *_stored_shape(self.manifest)), self._shards[0].dtype)
        for begin, end in zip([0, *ends[:-1]], ends):
            owner = owners[order[begin]]
            # mode "clip" because numpy writes by way of a copy where it has to look for rows that are not there
            self._shards[owner].take(rows[order[begin:end]] - self._firsts[owner], axis=0, out=by_shard[begin:end],
                                     mode="clip")
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return by_shard.take(back, axis=0)

    def latents(self, values, eps=None, device="cpu"):
        """Return scaled latents [n x C x ...] on `device` of what `read` gave.

        `eps` is the posterior's noise, None the mode.
        """
        if self._resident is None:
            values = to_device(values, device)
        else:
            values = to_device(self._resident.index_select(0, to_device(values, self._resident.device)), device).float()
        return sample_moments(values, eps) if self.draws_posterior else values

    def on_device(self, device, limit_bytes=2**31):
        """Keep the whole cache on `device` if it takes at most `limit_bytes`; return whether it does."""
        if self.nbytes > limit_bytes:
            return False
        dtype = getattr(torch, self.manifest["dtype"])
        shape = self._entries, *_stored_shape(self.manifest)
        resident = torch.empty(shape, dtype=dtype, device=device)
        for first, shard in zip(self._firsts, self._shards):
            resident[first:first + len(shard)] = torch.from_numpy(np.array(shard)).to(device)
        if not torch.isfinite(resident).all():
            raise ValueError(f"{self.folder}: some latents are not finite; the cache is damaged, encode it again")
        self._resident = resident
        return True

    def verify(self, progress=None):
        """Compare every file with its SHA-256 in the manifest; raise ValueError naming the first that differs."""
        files = [(shard["file"], shard["sha256"]) for shard in self.manifest["shards"]]
        files += self.manifest["files"].items()
        for done, (name, sha256) in enumerate(files, 1):
            if sha256_of_file(self.folder / name) != sha256:
                raise ValueError(f"{self.folder / name} is not what was written there (SHA-256 differs); {_REENCODE_HINT}")
            if progress:
                progress(done, len(files))

    def _open_shard(self, shard):
        path = _inside(self.folder, shard["file"])
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {_REENCODE_HINT}") from error
        wanted = (shard["count"], *_stored_shape(self.manifest))
        if values.shape != wanted or values.dtype != np.dtype(self.manifest["dtype"]):
            raise ValueError(f"{path} holds {values.dtype} {list(values.shape)}, the manifest says "
                             f"{self.manifest['dtype']} {list(wanted)}; {_REENCODE_HINT}")
        return values

    def _require_whole(self):
        entries = self.count * (2 if self.random_flip else 1)
        starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        if starts[-1] != entries or (starts[:-1] != self._firsts).any():
            raise ValueError(f"{self.folder / MANIFEST}: its shards hold {starts[-1]} latents in a row, not the "
                             f"{entries} it says; {_REENCODE_HINT}")

    def _read_labels(self):
        path = self.folder / LABELS
        try:
            labels = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {_REENCODE_HINT}") from error
        right = labels.dtype == np.int64 and labels.shape == (self.count,)
        if not right or labels.min() < 0 or labels.max() >= len(self.class_names):
            raise ValueError(f"{path} holds {labels.dtype} {list(labels.shape)}, not {self.count} int64 labels of "
                             f"{len(self.class_names)} classes; {_REENCODE_HINT}")
        return labels


class LatentFolder(LatentSource):
    """Hand out latents kept as one `.npy` [C x ...] per picture; classes as in `ImageFolder`.

    Such files say nothing of their autoencoder: they are taken to be scaled by `scale_factor` already, as
    `encode_batch` returns them. Statistics are measured over up to 4096 of them, evenly spread.
    """

    image_shape = unpadded_shape = autoencoder = None
    preprocessing = {}

    def __init__(self, folder, scale_factor=0.18215, most_measured=4096):
        self.folder = require_folder(folder, CACHE_FLAG)
        self.scale_factor = scale_factor
        self.paths = sorted(path for path in self.folder.rglob("*.npy") if not path.name.startswith("."))
        if not self.paths:
            raise FileNotFoundError(f"{self.folder} holds neither {MANIFEST} nor .npy files; check {CACHE_FLAG}")
        self.count = len(self.paths)
        self.latent_shape = self._open(self.paths[0]).shape
        channels, *grid = self.latent_shape or (0,)
        if not grid or len(grid) == 1 and (channels > MAX_CHANNELS or channels == grid[0]):
            raise ValueError(f"{self.paths[0]} has shape {list(self.latent_shape)}, which is no latent [C x ...] of at "
                             f"most {MAX_CHANNELS} channels; check {CACHE_FLAG} (pictures go to --data_dir, with "
                             "--vae_path)")
        self.filenames = [path.relative_to(self.folder).as_posix() for path in self.paths]
        self.class_names, self.labels = infer_classes(self.filenames, str(self.folder))
        moments = RunningMoments()
        for index in np.unique(np.linspace(0, self.count - 1, min(self.count, most_measured)).astype(int)):
            moments.add(self.read([index]).numpy())
        self.statistics = moments.statistics()

    def read(self, indices, flips=None, rngs=None):
        """Return the latents of some items, float32 [n x C x ...] on the CPU."""
        if flips is not None:
            raise ValueError(f"{self.folder} holds no mirrored pictures; encode them with encode_dataset.py")
        values = np.empty((len(indices), *self.latent_shape), np.float32)
        for row, index in enumerate(indices):
            path = self.paths[index]
            latent = self._open(path)
            if latent.shape != self.latent_shape:
                raise ValueError(f"{path} has shape {list(latent.shape)}, {self.paths[0]} {list(self.latent_shape)}; "
                                 "all latents must be alike")
            values[row] = latent
            if not np.isfinite(values[row]).all():
                raise ValueError(f"{path} holds values that are not finite; encode its picture again")
        return torch.from_numpy(values)

    def latents(self, values, eps=None, device="cpu"):
        """Return `values` on `device`: a folder of latents holds no posterior to draw from."""
        return to_device(values, device)

    def _open(self, path):
        try:
            latent = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); encode its picture again") from error
        if latent.dtype.kind != "f":
            raise ValueError(f"{path} holds {latent.dtype}, not floating-point latents; check {CACHE_FLAG}")
        return latent


class EncodedImages(LatentSource):
    """Encode pictures as they come, a whole batch at a time, where the codec is; a latent source like `LatentCache`.

    With a `PixelCodec` the pictures themselves are x0, and there are no statistics to know.

    :param stats_samples: pictures over which mean and standard deviation are measured when made, chosen by `seed`.
    :param statistics: known ones (of a run that goes on, or of rank 0) instead of measuring; {}: nobody needs them.
    :param progress: called with (pictures measured, pictures in all).
    """

    def __init__(self, dataset, codec, stats_samples=2048, seed=0, batch_size=32, statistics=None, progress=None):
        self.dataset = dataset
        self.codec = codec
        self.folder = dataset.folder
        self.count = len(dataset)
        self.latent_shape = tuple(codec.latent_shape(dataset.shape))
        self.image_shape = tuple(dataset.shape)
        self.unpadded_shape = tuple(dataset.unpadded_shape)
        self.labels = dataset.labels
        self.class_names = dataset.class_names
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
            statistics = self._measure(min(stats_samples, self.count), seed, batch_size, progress)
        self.statistics = statistics

    def read(self, indices, flips=None, rngs=None):
        """Return the pictures of some items, float32 [n x C x H x W] in [0, 1] on the CPU."""
        return self.dataset.batch(indices, flips, rngs)

    @torch.no_grad()
    def latents(self, images, eps=None, device="cpu"):
        """Return scaled latents [n x C x ...] of pictures on `device`; `eps` is the posterior's noise, None the mode.

        Pictures are handed over as they were read, on the host: the codec checks their values there, where nothing has
        to wait for a GPU.
        """
        return to_device(self.codec.encode_batch(images, eps), device).float()

    def _measure(self, number, seed, batch_size, progress):
        chosen = np.sort(permute_indices(np.arange(number), self.count, seed, 0).astype(np.int64))
        groups = [chosen[start:start + batch_size] for start in range(0, number, batch_size)]
        ahead = Prefetcher(lambda k: self.read(groups[k]), end_step=len(groups))
        moments, done = RunningMoments(), 0
        try:
            for group in groups:
                stored = _encode(self.codec, ahead.next(), "moments").cpu().numpy()
                if not np.isfinite(stored).all():
                    raise ValueError(_not_finite(_group_name(self.dataset, group)))
                _add(moments, stored, "moments")
                done += len(group)
                if progress:
                    progress(done, number)
        finally:
            ahead.close()
        return moments.statistics()


def open_latents(folder):
    """Return the `LatentCache` or, for a plain folder of one `.npy` per picture, the `LatentFolder` that is there.

    :raises FileNotFoundError: neither; an unfinished cache is never taken for a folder of latents.
    """
    folder = require_folder(folder, CACHE_FLAG)
    unfinished = any(_SHARD_NAME.fullmatch(path.name) for path in folder.glob("latents-*-of-*.npy"))
    if (folder / MANIFEST).exists() or unfinished:
        return LatentCache(folder)
    return LatentFolder(folder)


def require_same_autoencoder(cache, codec):
    """Raise ValueError where latents were made by another autoencoder, or on another scale, than `codec`."""
    if cache.autoencoder is None:
        return
    mine = codec.describe()
    if cache.autoencoder["sha256"] != codec.fingerprint:
        raise ValueError(f"{cache.folder}: latents come from autoencoder {cache.autoencoder['sha256'][:16]} "
                         f"({cache.autoencoder['path']}), --vae_path holds {codec.fingerprint[:16]} ({mine['path']}); "
                         "encode again or pass the first")
    if cache.scale_factor != codec.scale_factor:
        raise ValueError(f"{cache.folder}: latents are scaled by {cache.scale_factor}, the autoencoder {mine['path']} "
                         f"scales by {codec.scale_factor}; encode again or give the first as --scale_factor")


def _allow_open_files(count):
    """Raise this process's limit of open files: each shard that is mapped into memory holds one.

    :raises ValueError: where the limit cannot be raised so far.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ValueError(f"the cache has {count} shards and this process may open {hard} files; raise the limit "
                             f"(ulimit -n {needed}), or encode with a larger --shard_size")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))

