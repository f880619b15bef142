"""Encode images or volumes into a latent cache."""

import hashlib
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..config import option
from ..files import atomic_path, require_writable_folder, sha256_of_file, remove_stale_parts, write_json
from ..latent_datasets import LatentCache, _add, _encode, _group_name, _not_finite, require_same_autoencoder
from .batching import Prefetcher
from .manifest import CACHE_FLAG, _EXACT, FILENAMES, FORMAT, LABELS, MANIFEST, VERSION, _stored_shape
from .statistics import RunningMoments


@dataclass
class LatentCacheConfig:
    """How latents are kept on disk."""

    SECTION = "latents"

    cache_dir: str = option("", "folder of the cache, such as latents_cache/NAME")
    store: str = option("moments", "moments: mean and log-variance, so that every visit draws a fresh posterior sample; "
                                "mode: the mean alone, half the size", choices=("moments", "mode"))
    latent_dtype: str = option("float16", "type of the numbers on disk", choices=("float16", "float32"))
    shard_size: int = option(0, "latents per file; 0: a 64th of them, at least 256 and at most 4096", minimum=0)


def write_cache(folder, pictures, codec, config, rank=0, num_ranks=1, progress=None, barrier=None, batch_size=32):
    """Encode all pictures into `folder` and return the `LatentCache`; all ranks call it at once.

    Shard k is encoded by rank k modulo num_ranks and renamed into place when whole, with a record beside it of what
    made it. A shard whose record and SHA-256 still fit is kept, so that an interrupted encoding goes on where it
    stopped; one made by another autoencoder, from other data or otherwise is made again. Rank 0 writes the manifest
    last. Where a finished cache of the very same making is found, nothing is done.

    :param pictures: a `ImageFolder` or what has its interface.
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
    if pictures.random_crop:
        raise ValueError("--crop random cannot be cached (one crop would be drawn for ever); take --crop center, of "
                         "volumes --crop grid, or encode on the fly")
    if not folder:
        raise FileNotFoundError(f"no folder given for the cache; set {CACHE_FLAG}")
    folder = require_writable_folder(folder, CACHE_FLAG)
    remove_stale_parts(folder)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    if others and not any(name == MANIFEST or name.startswith("latents-") for name in others):
        raise FileExistsError(f"{folder} holds what is no cache's ({others[0]}, {len(others)} in all); give "
                              f"{CACHE_FLAG} a folder of its own")
    head = _manifest_fields(pictures, codec, config)
    key = _digest(head)
    if (folder / MANIFEST).exists():
        return _reuse_finished(folder, key, codec)
    entries = len(pictures) * (2 if pictures.random_flip else 1)  # the second half is the first, mirrored
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


def _manifest_fields(pictures, codec, config):
    """Return the part of the manifest that is known before encoding."""
    return {
        "format": FORMAT, "version": VERSION, "autoencoder": codec.describe(), "scale_factor": codec.scale_factor,
        "store": config.store, "dtype": config.latent_dtype, "latent_shape": list(codec.latent_shape(pictures.shape)),
        "image_shape": list(pictures.shape), "count": len(pictures), "flips": pictures.random_flip,
        "class_names": pictures.class_names, "preprocessing": pictures.describe(),
        **codec.approximations(pictures.shape[1:]),
    }


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
    moments = RunningMoments()

    def write(stored, group, stream):
        stored = stored.cpu().numpy()
        _add(moments, _cast_and_write(stored, dtype, _group_name(pictures, group), stream), head["store"])

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


def _cast_and_write(stored, dtype, names, stream):
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


def _write_manifest(folder, shards, key, head, pictures):
    moments, table = RunningMoments(), []
    for shard in shards:
        try:
            record = json.loads(_record_path(folder, shard).read_text())
        except OSError as error:
            raise FileNotFoundError(f"{_record_path(folder, shard)} is not there after encoding; all ranks must see "
                                    f"the same {CACHE_FLAG}") from error
        moments.merge(RunningMoments.from_dict(record["moments"]))
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


def _reuse_finished(folder, key, codec):
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
