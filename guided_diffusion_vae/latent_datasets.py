"""Feed latents to diffusion training: a cache on disk, a folder of single files, or pictures encoded as they come.

All three sources hand out scaled latents (z * scale_factor; README, the scale of latents) and share one
interface: `read` gathers a batch on any thread, `latents` turns it into latents on the device, `batch` does both.
`LatentStream` adds the normalisation and says which latents form which step.
"""

import hashlib
import json
import math
import re
import resource
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .config import opt
from .files import (
    atomic_path, require_folder, require_writable_folder, sha256_of_file, sweep_parts, write_json,
)
from .image_datasets import BatchStream, Prefetcher, classes_of, permuted, require_labels
from .nn import keyed_randn, send
from .vae_wrapper import sample_moments

CACHE_FLAG = "--cache_dir"
FORMAT, VERSION = "guided_diffusion_vae latent cache", 1
MOST_CHANNELS = 16      # of latents over one axis: what has more is taken for a picture without an axis for channels
MANIFEST, LABELS, FILENAMES = "manifest.json", "labels.npy", "filenames.txt"
_SHARD_NAME = re.compile(r"latents-\d{5,}-of-\d{5,}\.npy")
SPARE_FILES = 256  # that a process has open besides a cache
_REDO = "remove the cache and encode it again"
_EXACT = {"vae_dtype": "float32", "vae_tile": 0}
BULK, BULK_NUMBERS = 1024, 2**23  # latents that are read, drawn and normalised in one go, and the numbers in them
_POSTERIOR = 1  # sets the posterior's noise apart from other draws of the same seed and step


@dataclass
class LatentCacheConfig:
    """How latents are kept on disk."""

    SECTION = "latents"

    cache_dir: str = opt("", "folder of the cache, such as latents_cache/NAME")
    store: str = opt("moments", "moments: mean and log-variance, so that every visit draws a fresh posterior sample; "
                                "mode: the mean alone, half the size", choices=("moments", "mode"))
    latent_dtype: str = opt("float16", "type of the numbers on disk", choices=("float16", "float32"))
    shard_size: int = opt(0, "latents per file; 0: a 64th of them, at least 256 and at most 4096", least=0)


@dataclass
class LatentConfig:
    """Where training finds its latents."""

    SECTION = "latents"

    cache_dir: str = opt("", "cache of encode_dataset.py, or a folder with one .npy per picture, to train from")
    stats_samples: int = opt(2048, "pictures over which latents are measured where they are encoded on the fly",
                             least=1)


@dataclass
class SmallCacheConfig:
    """Where an upsampler finds the latents that it starts from."""

    SECTION = "latents"

    small_cache_dir: str = opt("", "cache of the same pictures as --cache_dir, encoded at a smaller --image_size")


class Moments:
    """Accumulate mean and variance per channel in float64 (Chan, Golub and LeVeque 1979, pairwise update)."""

    def __init__(self, count=0, mean=0.0, squares=0.0):
        self.count, self.mean, self.squares = count, np.asarray(mean, np.float64), np.asarray(squares, np.float64)

    def add(self, values, variances=None):
        """Take in values [n x C x ...]; `variances`, alike, is spread around them that counts too (a posterior's)."""
        flat = np.moveaxis(np.asarray(values, np.float64), 1, 0).reshape(values.shape[1], -1)
        mean = flat.mean(1)
        squares = ((flat - mean[:, None]) ** 2).sum(1)
        if variances is not None:
            squares = squares + np.moveaxis(variances, 1, 0).reshape(len(mean), -1).sum(1)
        self.merge(Moments(flat.shape[1], mean, squares))

    def merge(self, other):
        total = self.count + other.count
        apart = other.mean - self.mean
        self.squares = self.squares + other.squares + apart**2 * (self.count * other.count / total)
        self.mean = self.mean + apart * (other.count / total)
        self.count = total

    def to_dict(self):
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    def statistics(self):
        """Return mean and standard deviation over all values and per channel."""
        variance = self.squares / self.count
        overall = self.mean.mean()
        return {"mean": float(overall), "std": float(np.sqrt((variance + (self.mean - overall) ** 2).mean())),
                "channel_mean": self.mean.tolist(), "channel_std": np.sqrt(variance).tolist()}


# Writing a cache.


def write_cache(folder, pictures, codec, config, rank=0, num_ranks=1, progress=None, barrier=None, batch_size=32):
    """Encode all pictures into `folder` and return the `LatentCache`; all ranks call it at once.

    Shard k is encoded by rank k modulo num_ranks and renamed into place when whole, with a record beside it of what
    made it. A shard whose record and SHA-256 still fit is kept, so that an interrupted encoding goes on where it
    stopped; one made by another autoencoder, from other data or otherwise is made again. Rank 0 writes the manifest
    last. Where a finished cache of the very same making is found, nothing is done.

    :param pictures: a `PictureFolder` or what has its interface.
    :param progress: called with (latents done, latents in all) of this rank.
    :param barrier: waits for all ranks; needed for more than one.
    :raises FileExistsError: a folder that holds other files and nothing of a cache.
    :raises ValueError: a finished cache of another making, latents that are not finite or exceed the type.
    :raises OSError: no space left, or a folder that cannot be written.
    """
    if num_ranks > 1 and barrier is None:
        raise ValueError(f"{num_ranks} ranks encode together and need a barrier")
    if config.shard_size < 0:
        raise ValueError(f"--shard_size {config.shard_size} must be at least 1, or 0 to have it chosen")
    if pictures.config.crop == "random":
        raise ValueError("--crop random cannot be cached (one crop would be drawn for ever); take --crop center, of "
                         "volumes --crop grid, or encode on the fly")
    if not folder:
        raise FileNotFoundError(f"no folder given for the cache; set {CACHE_FLAG}")
    folder = require_writable_folder(folder, CACHE_FLAG)
    sweep_parts(folder)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if others and not any(name == MANIFEST or name.startswith("latents-") for name in others):
        raise FileExistsError(f"{folder} holds what is no cache's ({others[0]}, {len(others)} in all); give "
                              f"{CACHE_FLAG} a folder of its own")
    head = _head(pictures, codec, config)
    key = _digest(head)
    if (folder / MANIFEST).exists():
        return _finished(folder, key, codec)
    entries = len(pictures) * (2 if pictures.config.random_flip else 1)  # the second half is the first, mirrored
    shards = _shard_table(entries, config.shard_size or _usual_shard_size(entries))
    mine = shards[rank::num_ranks]
    missing = [shard for shard in mine if _record(folder, shard, key) is None]
    _require_space(folder, missing, head)
    report = progress or (lambda done, total: None)
    total = sum(shard["count"] for shard in mine)
    done = total - sum(shard["count"] for shard in missing)
    report(done, total)
    for shard in missing:
        for count in _encode_shard(folder, shard, key, head, pictures, codec, batch_size):
            done += count
            report(done, total)
    if barrier:
        barrier()
    if rank == 0:
        _write_manifest(folder, shards, key, head, pictures)
    if barrier:
        barrier()
    return LatentCache(folder)


def _head(pictures, codec, config):
    """Return the part of the manifest that is known before encoding."""
    return {
        "format": FORMAT, "version": VERSION, "autoencoder": codec.describe(), "scale_factor": codec.scale_factor,
        "store": config.store, "dtype": config.latent_dtype, "latent_shape": list(codec.latent_shape(pictures.shape)),
        "image_shape": list(pictures.shape), "count": len(pictures), "flips": pictures.config.random_flip,
        "class_names": pictures.class_names, "preprocessing": pictures.describe(),
        **_inexactness(codec, pictures.shape[1:]),
    }


def _inexactness(codec, sides):
    """Return the flags by which a codec encodes pictures less exactly than its autoencoder could, {} for exact latents.

    A tile that holds a whole picture changes nothing and is left out too.
    """
    tile = getattr(codec, "tile", 0)
    used = {"vae_dtype": str(getattr(codec, "dtype", "float32")).removeprefix("torch."),
            "vae_tile": tile if tile < max(sides) else 0}
    return {name: value for name, value in used.items() if value != _EXACT[name]}


def _digest(head):
    """Return the digest of all that shapes the latents; where autoencoder and pictures lie does not."""
    preprocessing = {name: value for name, value in head["preprocessing"].items() if name != "data_dir"}
    shaping = {**head, "autoencoder": head["autoencoder"]["sha256"], "preprocessing": preprocessing}
    return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()


def _usual_shard_size(entries):
    """Return how many latents go into a file: enough shards for many ranks to share, none of them tiny or huge."""
    return min(max(-(-entries // 64), 256), 4096)


def _shard_table(entries, size):
    number = -(-entries // size)
    return [{"file": f"latents-{k:05d}-of-{number:05d}.npy", "first": k * size, "count": min(size, entries - k * size)}
            for k in range(number)]


def _record_path(folder, shard):
    return folder / (shard["file"].removesuffix(".npy") + ".json")


def _record(folder, shard, key):
    """Return the record of a shard that is there, whole, and of this making; else None."""
    try:
        record = json.loads(_record_path(folder, shard).read_text())
        fits = record["made_from"] == key and {name: record[name] for name in shard} == shard
        return record if fits and sha256_of_file(folder / shard["file"]) == record["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stored_shape(head):
    channels, *grid = head["latent_shape"]
    return channels * (2 if head["store"] == "moments" else 1), *grid


def _require_space(folder, missing, head):
    size = np.dtype(head["dtype"]).itemsize * int(np.prod(_stored_shape(head))) * sum(s["count"] for s in missing)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"the latents still to be written to {folder} need {size / 2**20:.0f} MiB and "
                      f"{free / 2**20:.0f} MiB are left; free some space, choose another {CACHE_FLAG}, or take "
                      "--store mode or --latent_dtype float16")


def _encode_shard(folder, shard, key, head, pictures, codec, batch_size):
    """Write one shard and its record, yielding the size of every batch that is encoded.

    Reading the pictures of the next batch, encoding this one, and writing the one before happen at the same time.
    """
    count, dtype = shard["count"], np.dtype(head["dtype"])
    entries = np.arange(shard["first"], shard["first"] + count)
    groups = [entries[start:start + batch_size] for start in range(0, count, batch_size)]
    # The second half of the entries are the first half's pictures, mirrored.
    ahead = Prefetcher(lambda k: pictures.batch(groups[k] % len(pictures), groups[k] >= len(pictures)),
                       end_step=len(groups))
    moments = Moments()

    def write(stored, group, stream):
        stored = stored.cpu().numpy()
        _add(moments, _narrow(stored, dtype, _group_name(pictures, group), stream), head["store"])

    try:
        with (atomic_path(folder / shard["file"]) as part, open(part, "wb") as stream,
              ThreadPoolExecutor(1, "write") as writer):
            layout = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                      "shape": (count, *_stored_shape(head))}
            np.lib.format.write_array_header_1_0(stream, layout)
            written = None
            for group in groups:
                stored = _encode(codec, ahead.next(), head["store"])
                if written:
                    written.result()    # no more than one batch waits to be written
                written = writer.submit(write, stored, group, stream)
                yield len(group)
            written.result()
    finally:
        ahead.close()
    sha256 = sha256_of_file(folder / shard["file"])
    record = {**shard, "sha256": sha256, "made_from": key, "moments": moments.to_dict()}
    write_json(_record_path(folder, shard), record)


@torch.no_grad()
def _encode(codec, images, store):
    encoded = codec.encode_moments(images) if store == "moments" else codec.encode_batch(images)
    return encoded.float()


def _group_name(pictures, group):
    return f"{pictures.names[group[0] % len(pictures)]} (or one of the {len(group) - 1} encoded with it)"


def _not_finite(names):
    return f"{names}: the autoencoder gives latents that are not finite; check it with check_roundtrip.py"


def _narrow(stored, dtype, names, stream):
    """Write float32 latents to `stream` as `dtype` and return them as such."""
    with np.errstate(over="ignore"):
        narrow = stored.astype(dtype)
    if not np.isfinite(narrow).all():
        if np.isfinite(stored).all():
            raise ValueError(f"{names}: latents up to {np.abs(stored).max():.6g} do not fit into {dtype}; give "
                             "--latent_dtype float32")
        raise ValueError(_not_finite(names))
    stream.write(narrow.tobytes())
    return narrow


def _add(moments, stored, store):
    """Count stored entries in; the variance of z is that of the means plus the posterior's own."""
    if store == "moments":
        mean, logvar = np.split(stored.astype(np.float64), 2, axis=1)
        moments.add(mean, np.exp(logvar))
    else:
        moments.add(stored)


def _write_manifest(folder, shards, key, head, pictures):
    moments, table = Moments(), []
    for shard in shards:
        try:
            record = json.loads(_record_path(folder, shard).read_text())
        except OSError as error:
            raise FileNotFoundError(f"{_record_path(folder, shard)} is not there after encoding; all ranks must see "
                                    f"the same {CACHE_FLAG}") from error
        moments.merge(Moments(**record["moments"]))
        table.append({**shard, "sha256": record["sha256"]})
    files = {}
    if pictures.labels is not None:
        with atomic_path(folder / LABELS) as part, open(part, "wb") as stream:
            np.save(stream, np.asarray(pictures.labels, np.int64))
        files[LABELS] = sha256_of_file(folder / LABELS)
    with atomic_path(folder / FILENAMES) as part:
        part.write_text("".join(f"{name}\n" for name in pictures.names))
    files[FILENAMES] = sha256_of_file(folder / FILENAMES)
    manifest = {**head, "statistics": moments.statistics(), "made_from": key, "files": files, "shards": table}
    write_json(folder / MANIFEST, manifest)
    _sweep(folder, {shard["file"] for shard in shards})


def _sweep(folder, wanted):
    """Remove the records of encoding, and the shards that they prove to be leftovers of another one."""
    for record in folder.glob("latents-*-of-*.json"):
        shard = record.with_suffix(".npy")
        if shard.name not in wanted:
            shard.unlink(missing_ok=True)
        record.unlink()


def _finished(folder, key, codec):
    cache = LatentCache(folder)
    cache.verify()
    if cache.manifest["made_from"] != key:
        require_same_autoencoder(cache, codec)
        held = {"store": cache.manifest["store"], "latent_dtype": cache.manifest["dtype"],
                **{name: cache.manifest.get(name, exact) for name, exact in _EXACT.items()}}
        settings = ", ".join(f"--{name} {value}" for name, value in held.items())
        raise ValueError(f"{folder} holds a cache of other pictures or settings ({cache.count} pictures of shape "
                         f"{cache.image_shape}, {settings}); choose another {CACHE_FLAG} or remove it")
    return cache


# Reading.


class LatentCache:
    """Hand out the latents of a cache; memory does not grow with their number, as the shards are memory-mapped.

    :raises FileNotFoundError: no folder, or one without a manifest.
    :raises ValueError: a manifest of another format or version, shards that are not what it says.
    """

    random_crop = False
    in_bulk = True  # many items are read as quickly, one by one, as few

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

    def __len__(self):
        return self.count

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

    def read(self, indices, flips=None):
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
            values = send(values, device)
        else:
            values = send(self._resident.index_select(0, send(values, self._resident.device)), device).float()
        return sample_moments(values, eps) if self.draws_posterior else values

    def batch(self, indices, eps=None, flips=None):
        """Return (scaled latents float32 [n x C x ...], labels int64 [n] or None)."""
        return self.latents(self.read(indices, flips), eps), _labels_at(self, indices)

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
                raise ValueError(f"{self.folder / name} is not what was written there (SHA-256 differs); {_REDO}")
            if progress:
                progress(done, len(files))

    def _open_shard(self, shard):
        path = _inside(self.folder, shard["file"])
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {_REDO}") from error
        wanted = (shard["count"], *_stored_shape(self.manifest))
        if values.shape != wanted or values.dtype != np.dtype(self.manifest["dtype"]):
            raise ValueError(f"{path} holds {values.dtype} {list(values.shape)}, the manifest says "
                             f"{self.manifest['dtype']} {list(wanted)}; {_REDO}")
        return values

    def _require_whole(self):
        entries = self.count * (2 if self.random_flip else 1)
        starts = np.cumsum([0] + [len(shard) for shard in self._shards])
        if starts[-1] != entries or (starts[:-1] != self._firsts).any():
            raise ValueError(f"{self.folder / MANIFEST}: its shards hold {starts[-1]} latents in a row, not the "
                             f"{entries} it says; {_REDO}")

    def _read_labels(self):
        path = self.folder / LABELS
        try:
            labels = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); {_REDO}") from error
        right = labels.dtype == np.int64 and labels.shape == (self.count,)
        if not right or labels.min() < 0 or labels.max() >= len(self.class_names):
            raise ValueError(f"{path} holds {labels.dtype} {list(labels.shape)}, not {self.count} int64 labels of "
                             f"{len(self.class_names)} classes; {_REDO}")
        return labels


class LatentFolder:
    """Hand out latents kept as one `.npy` [C x ...] per picture; classes as in `PictureFolder`.

    Such files say nothing of their autoencoder: they are taken to be scaled by `scale_factor` already, as
    `encode_batch` returns them. Statistics are measured over up to 4096 of them, evenly spread.
    """

    random_crop = random_flip = draws_posterior = in_bulk = False
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
        if not grid or len(grid) == 1 and (channels > MOST_CHANNELS or channels == grid[0]):
            raise ValueError(f"{self.paths[0]} has shape {list(self.latent_shape)}, which is no latent [C x ...] of at "
                             f"most {MOST_CHANNELS} channels; check {CACHE_FLAG} (pictures go to --data_dir, with "
                             "--vae_path)")
        self.filenames = [path.relative_to(self.folder).as_posix() for path in self.paths]
        self.class_names, self.labels = classes_of(self.filenames, str(self.folder))
        moments = Moments()
        for index in np.unique(np.linspace(0, self.count - 1, min(self.count, most_measured)).astype(int)):
            moments.add(self.read([index]).numpy())
        self.statistics = moments.statistics()

    def __len__(self):
        return self.count

    def read(self, indices, flips=None):
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

    def on_device(self, device, limit_bytes=2**31):
        """Say that nothing was loaded: single files stay where they are."""
        return False

    def latents(self, values, eps=None, device="cpu"):
        """Return `values` on `device`: a folder of latents holds no posterior to draw from."""
        return send(values, device)

    def batch(self, indices, eps=None, flips=None):
        """Return (scaled latents float32 [n x C x ...], labels int64 [n] or None)."""
        return self.read(indices, flips), _labels_at(self, indices)

    def _open(self, path):
        try:
            latent = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} cannot be read ({error}); encode its picture again") from error
        if latent.dtype.kind != "f":
            raise ValueError(f"{path} holds {latent.dtype}, not floating-point latents; check {CACHE_FLAG}")
        return latent


class EncodedPictures:
    """Encode pictures as they come, a whole batch at a time, where the codec is; a latent source like `LatentCache`.

    With a `PixelCodec` the pictures themselves are x0, and there are no statistics to know.

    :param stats_samples: pictures over which mean and standard deviation are measured when made, chosen by `seed`.
    :param statistics: known ones (of a run that goes on, or of rank 0) instead of measuring; {}: nobody needs them.
    :param progress: called with (pictures measured, pictures in all).
    """

    in_bulk = False

    def __init__(self, pictures, codec, stats_samples=2048, seed=0, batch_size=32, statistics=None, progress=None):
        self.pictures = pictures
        self.codec = codec
        self.folder = pictures.config.data_dir
        self.count = len(pictures)
        self.latent_shape = tuple(codec.latent_shape(pictures.shape))
        self.image_shape = tuple(pictures.shape)
        self.unpadded_shape = tuple(pictures.unpadded_shape)
        self.labels = pictures.labels
        self.class_names = pictures.class_names
        self.preprocessing = pictures.preprocessing
        self.scale_factor = codec.scale_factor
        self.autoencoder = codec.describe()
        self.draws_posterior = codec.has_posterior
        self.random_flip = pictures.config.random_flip
        self.random_crop = pictures.config.crop == "random"
        if not codec.has_posterior:
            statistics = {}
        elif statistics is None:
            statistics = self._measure(min(stats_samples, self.count), seed, batch_size, progress)
        self.statistics = statistics

    def __len__(self):
        return self.count

    def read(self, indices, flips=None, rngs=None):
        """Return the pictures of some items, float32 [n x C x H x W] in [0, 1] on the CPU."""
        return self.pictures.batch(indices, flips, rngs)

    @torch.no_grad()
    def latents(self, images, eps=None, device="cpu"):
        """Return scaled latents [n x C x ...] of pictures on `device`; `eps` is the posterior's noise, None the mode.

        Pictures are handed over as they were read, on the host: the codec checks their values there, where nothing has
        to wait for a GPU.
        """
        return send(self.codec.encode_batch(images, eps), device).float()

    def batch(self, indices, eps=None, flips=None):
        """Return (scaled latents float32 [n x C x ...], labels int64 [n] or None)."""
        return self.latents(self.read(indices, flips), eps), _labels_at(self, indices)

    def _measure(self, number, seed, batch_size, progress):
        chosen = np.sort(permuted(np.arange(number), self.count, seed, 0).astype(np.int64))
        groups = [chosen[start:start + batch_size] for start in range(0, number, batch_size)]
        ahead = Prefetcher(lambda k: self.read(groups[k]), end_step=len(groups))
        moments, done = Moments(), 0
        try:
            for group in groups:
                stored = _encode(self.codec, ahead.next(), "moments").cpu().numpy()
                if not np.isfinite(stored).all():
                    raise ValueError(_not_finite(_group_name(self.pictures, group)))
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


class ShrunkPictures:
    """The pictures of a `PictureFolder` averaged down to `sides` (height, width): what an upsampler starts from."""

    def __init__(self, pictures, sides):
        self.pictures, self.sides = pictures, tuple(sides)
        self.config, self.labels, self.class_names = pictures.config, pictures.labels, pictures.class_names
        self.preprocessing = pictures.preprocessing
        self.shape = self.unpadded_shape = (pictures.shape[0], *self.sides)

    def __len__(self):
        return len(self.pictures)

    def batch(self, indices, flips=None, rngs=None):
        """Return pictures as float32 [n x C x *sides] in [0, 1]; what the large ones are padded with is left away."""
        large = self.pictures.batch(indices, flips, rngs)
        seen = tuple(slice(n) for n in self.pictures.unpadded_shape[1:])
        return F.interpolate(large[(..., *seen)], size=self.sides, mode="area")


class LatentStream(BatchStream):
    """Iterate over (x0 [n x C x ...] normalised on `device`, what the model is told) for training.

    The model is told {"y": int64 [n]} `with_labels` and {"low_res": [n x C x smaller ...]} where there is the source of
    `small` pictures, item by item those of `source`; it may be told nothing.

    Items, flips and posterior noise depend on (seed, step, place in the batch of all ranks) alone. Reading and drawing
    run ahead in the background, encoding and normalising happen on the caller's thread.
    """

    def __init__(self, source, normalizer, plan, seed, device, with_labels=False, small=None, start_step=0):
        require_labels(source, with_labels)
        for of in (source, small or source):
            if plan.count != of.count:
                raise ValueError(f"the plan is for {plan.count} items, {of.folder} has {of.count}")

        # Latents of a cache are so small that handing them over by the batch would take longer than reading them.
        numbers = plan.batch_size * math.prod(source.latent_shape)
        together = max(1, min(BULK // plan.batch_size, BULK_NUMBERS // numbers)) if source.in_bulk else 1

        def make_batches(step):
            steps = range(step, step + together)
            indices = plan.indices(step, together)

            def read(of):
                flips = np.concatenate([plan.coins(s) for s in steps]) if of.random_flip else None
                return of.read(indices, flips, **({"rngs": plan.generators(step)} if of.random_crop else {}))

            eps = None
            if source.draws_posterior:
                keys = [(seed, _POSTERIOR, s, slot) for s in steps for slot in plan.slots]
                eps = keyed_randn(source.latent_shape, keys)
            labels = _labels_at(source, indices) if with_labels else None
            return read(source), eps, labels, None if small is None else read(small)

        def finish(prepared):
            values, eps, labels, small_values = prepared
            latents = source.latents(values, eps, device)
            told = {} if labels is None else {"y": send(labels, device)}
            if small is not None:
                told["low_res"] = normalizer.normalise(small.latents(small_values, device=device))
            x0 = normalizer.normalise(latents)
            if together == 1:
                return x0, told
            parts = zip(*(values.split(plan.batch_size) for values in told.values())) if told else [()] * together
            return [(x, dict(zip(told, part))) for x, part in zip(x0.split(plan.batch_size), parts)]

        super().__init__(make_batches, start_step, finish, together=together)


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


def _labels_at(source, indices):
    return None if source.labels is None else torch.from_numpy(source.labels[np.asarray(indices)])


def _read_manifest(folder):
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{folder} is not a latent cache: it has no {MANIFEST}, so the encoding was "
                                "interrupted or this is another folder; run scripts/encode_dataset.py again, or check "
                                f"{CACHE_FLAG}")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {_REDO}") from error
    found = (manifest.get("format"), manifest.get("version")) if isinstance(manifest, dict) else (None, None)
    if found != (FORMAT, VERSION):
        raise ValueError(f"{path} has format {found[0]!r}, version {found[1]!r}; this program reads {FORMAT!r}, "
                         f"version {VERSION}: encode again")
    kinds = {"autoencoder": dict, "scale_factor": (int, float), "store": str, "dtype": str, "latent_shape": list,
             "image_shape": list, "count": int, "flips": bool, "class_names": (list, type(None)), "preprocessing": dict,
             "statistics": dict, "made_from": str, "files": dict, "shards": list}
    wrong = [name for name, kind in kinds.items() if not isinstance(manifest.get(name, ()), kind)]
    wrong = wrong or [name for name, fits in {
        "dtype": manifest["dtype"] in ("float16", "float32"),
        "store": manifest["store"] in ("moments", "mode"),
        "latent_shape": len(manifest["latent_shape"]) > 1 and all(_is_count(n) for n in manifest["latent_shape"]),
        "count": _is_count(manifest["count"]),
        "shards": all(isinstance(s, dict) and _is_count(s.get("count")) and "first" in s and "sha256" in s
                      and "file" in s for s in manifest["shards"]),
        "autoencoder": {"sha256", "path"} <= set(manifest["autoencoder"]),
        "statistics": {"mean", "std", "channel_mean", "channel_std"} <= set(manifest["statistics"]),
    }.items() if not fits]
    if wrong:
        raise ValueError(f"{path} is damaged: {', '.join(wrong)} missing or not what it should be; {_REDO}")
    for name in manifest["files"]:
        _inside(folder, name)
    return manifest


def _is_count(value):
    return isinstance(value, int) and value > 0


def _inside(folder, name):
    """Return folder/name for a bare file name; a manifest is input and must not lead elsewhere."""
    if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name:
        raise ValueError(f"{folder / MANIFEST} names the file {name!r} outside of its folder; do not use this cache")
    return folder / name
