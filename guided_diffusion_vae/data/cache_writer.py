"""Encode images or volumes into a latent cache."""

import contextlib
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..config import option, require, validate
from ..files import (
    atomic_stream, read_record, remove_stale_parts, require_writable_folder, sha256_of_file, sha256_of_json,
    write_record,
)
from ..interfaces import Codec, ImageSource
from ..locks import locked_folder
from ..latent_datasets import (
    LatentCache, add_stored, encode_for_storage, group_name, is_cache, require_finite, require_same_autoencoder,
)
from . import Prefetcher, RunningMoments, keep_numbers, recorded_options
from .manifest import (
    ATTRIBUTES, CACHE_FLAG, EXACT, FILENAMES, FORMAT, LABELS, MANIFEST, VERSION, read_manifest, stored_shape,
)


@dataclass
class LatentCacheConfig:
    """Options of a latent cache."""

    SECTION = "latents"

    cache_dir: str = option("", "folder of the cache, such as latents_cache/NAME", essential=True)
    store: str = option("moments", "moments: mean and log-variance, so that every epoch draws new posterior samples; "
                                   "mode: mean only, half the size", choices=("moments", "mode"), essential=True)
    latent_dtype: str = option("float16", "data type on disk", choices=("float16", "float32"), essential=True)
    shard_size: int = option(0, "latents per file; 0: 1/64 of them, in [256, 4096]", minimum=0)


def write_cache(dataset: ImageSource, codec: Codec, config: LatentCacheConfig, part: tuple[int, int] = (0, 1),
                progress=None, barrier=None, batch_size: int = 32) -> LatentCache:
    """Encode all images into `config.cache_dir` and return the `LatentCache`; called by all ranks at once.

    Shard k is encoded by rank k modulo num_ranks and renamed to its final name when complete, next to a record of its
    settings. A shard whose record and SHA-256 match is kept, so that an interrupted encoding resumes; one of another
    autoencoder, other data or other settings is encoded again. Rank 0 writes the manifest last. A complete cache with
    the same settings is returned as it is.

    :param part: (rank, num_ranks).
    :param progress: called with (latents done, latents in total) of this rank.
    :param barrier: waits for all ranks; required for more than one.
    :raises FileExistsError: if the folder contains other files and no cache.
    :raises ValueError: if there is a complete cache with other settings, or latents are not finite or exceed the type.
    :raises OSError: if there is not enough space, the folder is not writable, or another process encodes into it.
    """
    rank, num_ranks = part
    validate(config)
    require(
        (num_ranks == 1 or barrier, f"{num_ranks} ranks encode together and require a barrier"),
        (not dataset.random_crop, "--crop random cannot be cached, as a cache would contain one crop per image; use "
                                  "--crop center, --crop grid (volumes), or encode on the fly"),
    )
    require((config.cache_dir, f"no folder specified for the cache; set {CACHE_FLAG}"), error=FileNotFoundError)
    folder = require_writable_folder(config.cache_dir, CACHE_FLAG)
    remove_stale_parts(folder)
    others = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    latents = any(name == MANIFEST or name.startswith("latents-") for name in others)
    require((latents or not others, f"{folder} contains files of no cache ({', '.join(others[:1])}, {len(others)} in "
                                     f"total); set {CACHE_FLAG} to a separate folder"), error=FileExistsError)
    if is_cache(folder):    # version 0.2 sorted numeric class names as text
        keep_numbers(dataset, read_manifest(folder)["class_names"])
    fields = _manifest_fields(dataset, codec, config)
    key = _digest(fields)
    barrier = barrier or (lambda: None)
    with locked_folder(folder, CACHE_FLAG, "encode_dataset") if rank == 0 else contextlib.nullcontext():
        barrier()   # no rank writes before rank 0 holds the lock
        if not is_cache(folder):
            _encode(folder, key, fields, dataset, codec, config, part, progress, barrier, batch_size)
        elif rank == 0:
            _check_finished(folder, fields, key, codec)
        if rank == 0:
            _remove_leftovers(folder)
        barrier()
    return LatentCache(folder)


def _encode(folder, key, fields, dataset, codec, config, part, progress, barrier, batch_size):
    """Write the shards of this rank that are missing and, on rank 0, the manifest."""
    rank, num_ranks = part
    entries = len(dataset) * (2 if dataset.random_flip else 1)      # the second half are the flipped images
    shards = _shard_table(entries, config.shard_size or _usual_shard_size(entries))
    own = shards[rank::num_ranks]
    missing = [shard for shard in own if _record(folder, shard, key) is None]
    _require_space(folder, missing, fields)
    report = progress or (lambda done, total: None)
    total = sum(shard["count"] for shard in own)
    done = total - sum(shard["count"] for shard in missing)
    report(done, total)
    for shard in missing:
        for count in _encode_shard(folder, shard, key, fields, dataset, codec, batch_size):
            done += count
            report(done, total)
    barrier()
    if rank == 0:
        _write_manifest(folder, shards, key, fields, dataset)


def _manifest_fields(dataset, codec, config):
    """Return the part of the manifest that is known before encoding."""
    return {
        "format": FORMAT, "version": VERSION, "autoencoder": codec.describe(), "scale_factor": codec.scale_factor,
        "store": config.store, "dtype": config.latent_dtype, "latent_shape": list(codec.latent_shape(dataset.shape)),
        "image_shape": list(dataset.shape), "count": len(dataset), "flips": dataset.random_flip,
        "class_names": dataset.class_names, "preprocessing": dataset.describe(),
        **codec.approximations(dataset.shape[1:]),
        **({"attributes": list(dataset.attributes)} if dataset.attributes else {}),
    }


def _digest(fields):
    """Return the digest of everything that determines the latents; paths of autoencoder and images do not."""
    preprocessing = {name: value for name, value in fields["preprocessing"].items()
                     if name not in ("data_dir", "recognized_colormap", "spectrogram")}
    hashed = {**fields, "autoencoder": fields["autoencoder"]["sha256"], "preprocessing": preprocessing}
    return sha256_of_json(hashed)


def _usual_shard_size(entries):
    """Return the number of latents per file: enough shards for many ranks, none of them tiny or huge."""
    return min(max(-(-entries // 64), 256), 4096)


def _shard_table(entries, size):
    number = -(-entries // size)
    return [{"file": f"latents-{k:05d}-of-{number:05d}.npy", "first": k * size, "count": min(size, entries - k * size)}
            for k in range(number)]


def _record_path(folder, shard):
    return folder / (shard["file"].removesuffix(".npy") + ".json")


def _record(folder, shard, key):
    """Return the record of a shard that is complete and has the settings of `key`, else None."""
    try:
        record = read_record(_record_path(folder, shard))
        matches = record["made_from"] == key and {name: record[name] for name in shard} == shard
        return record if matches and sha256_of_file(folder / shard["file"]) == record["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_space(folder, missing, fields):
    size = np.dtype(fields["dtype"]).itemsize * int(np.prod(stored_shape(fields))) * sum(s["count"] for s in missing)
    free = shutil.disk_usage(folder).free
    require((size <= free, f"{folder}: the remaining latents require {size / 2**20:.0f} MiB, {free / 2**20:.0f} MiB "
                           f"are free; free some space, choose another {CACHE_FLAG}, or use --store mode or "
                           "--latent_dtype float16"), error=OSError)


def _encode_shard(folder, shard, key, fields, dataset, codec, batch_size):
    """Write one shard and its record; yield the size of every batch that is encoded.

    Reading the next batch, encoding this one and writing the previous one happen at the same time.
    """
    count, dtype = shard["count"], np.dtype(fields["dtype"])
    entries = np.arange(shard["first"], shard["first"] + count)
    groups = [entries[start:start + batch_size] for start in range(0, count, batch_size)]
    read = lambda k: dataset.batch(groups[k] % len(dataset), groups[k] >= len(dataset))
    ahead = Prefetcher(read, end_step=len(groups))
    moments = RunningMoments()

    def write(stored, group, stream):
        narrow = _cast_and_write(stored.cpu().numpy(), dtype, group_name(dataset, group), stream)
        add_stored(moments, narrow, fields["store"])

    try:
        with atomic_stream(folder / shard["file"]) as stream, ThreadPoolExecutor(1, "write") as writer:
            layout = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                      "shape": (count, *stored_shape(fields))}
            np.lib.format.write_array_header_1_0(stream, layout)
            written = None
            for group in groups:
                stored = encode_for_storage(codec, ahead.next(), fields["store"])
                if written:
                    written.result()    # at most one batch waits to be written
                written = writer.submit(write, stored, group, stream)
                yield len(group)
            written.result()
    finally:
        ahead.close()
    record = {**shard, "sha256": stream.entry["sha256"], "made_from": key, "moments": moments.to_dict()}
    write_record(_record_path(folder, shard), record)


def _cast_and_write(stored, dtype, name, stream):
    """Write float32 latents to `stream` as `dtype` and return them in that type."""
    require_finite(stored, name)
    with np.errstate(over="ignore"):
        narrow = stored.astype(dtype)
    if not np.isfinite(narrow).all():
        raise ValueError(f"{name}: latents up to {np.abs(stored).max():.6g} do not fit into {dtype}; set "
                         "--latent_dtype float32")
    stream.write(narrow.tobytes())
    return narrow


def _write_manifest(folder, shards, key, fields, dataset):
    moments, table, files = RunningMoments(), [], {}
    for shard in shards:
        record = read_record(_record_path(folder, shard), f"all ranks must use the same {CACHE_FLAG}")
        moments.merge(RunningMoments.from_dict(record["moments"]))
        table.append({**shard, "sha256": record["sha256"]})
    arrays = {} if dataset.labels is None else {LABELS: np.asarray(dataset.labels, np.int64)}
    if dataset.attributes:
        arrays[ATTRIBUTES] = np.stack(list(dataset.attributes.values()), axis=1).astype(np.float32)     # [N x A]
    for name, array in arrays.items():
        with atomic_stream(folder / name) as stream:
            np.save(stream, array)
        files[name] = stream.entry["sha256"]
    with atomic_stream(folder / FILENAMES) as stream:
        stream.write("".join(f"{name}\n" for name in dataset.names).encode())
    files[FILENAMES] = stream.entry["sha256"]
    manifest = {**fields, "statistics": moments.statistics(), "made_from": key, "files": files, "shards": table}
    write_record(folder / MANIFEST, manifest)
    missing = [shard["file"] for shard in shards if not (folder / shard["file"]).is_file()]
    if missing:
        for name in (MANIFEST, *files):
            (folder / name).unlink(missing_ok=True)
        raise FileNotFoundError(f"{folder / missing[0]} was removed while the cache was written; rerun the command")


def _remove_leftovers(folder):
    """Remove the records of encoding, and the shards that they belong to if these are not those of the manifest."""
    files = {shard["file"] for shard in read_manifest(folder)["shards"]}
    for record in folder.glob("latents-*-of-*.json"):
        shard = record.with_suffix(".npy")
        if shard.name not in files:
            shard.unlink(missing_ok=True)
        record.unlink()


def _check_finished(folder, fields, key, codec):
    """Check that a complete cache has the settings `fields` of `key`, and its files."""
    cache = LatentCache(folder)
    if cache.manifest["made_from"] != key:
        require_same_autoencoder(cache, codec)
        settings = {"store": cache.manifest["store"], "latent_dtype": cache.manifest["dtype"],
                    **{name: cache.manifest.get(name, exact) for name, exact in EXACT.items()}}
        flags = ", ".join(f"--{name} {value}" for name, value in settings.items())
        stored, current = ({**data, **recorded_options(data)}
                           for data in (cache.manifest["preprocessing"], fields["preprocessing"]))
        changes = "".join(f"; {name} is {current.get(name)!r} now, {stored.get(name)!r} in the cache"
                          for name in sorted(stored.keys() | current.keys())
                          if stored.get(name) != current.get(name) and name != "data_dir")
        raise ValueError(f"{folder} contains a cache of other images or settings ({cache.count} images of shape "
                         f"{cache.image_shape}, {flags}{changes}); choose another {CACHE_FLAG} or remove it")
    cache.verify()
