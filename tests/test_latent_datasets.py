import functools
import gc
import json
import os
import runpy
import threading
import time
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from guided_diffusion_vae import checkpoint_util, data, dist_util, latent_datasets
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict
from guided_diffusion_vae.data import (
    BatchPlan, DataConfig, DownsampledImages, ImageFolder, ImageStream, LatentStream, VolumeFolder, batching,
    cache_writer, open_folder,
)
from guided_diffusion_vae.data.cache_writer import LatentCacheConfig, write_cache
from guided_diffusion_vae.files import read_record, write_record
from guided_diffusion_vae.interfaces import Codec, ImageSource, LatentSource
from guided_diffusion_vae.latent_datasets import (
    EncodedImages, LatentCache, LatentFolder, open_latents, require_same_autoencoder,
)
from guided_diffusion_vae.nn import allow_tf32, keyed_randn
from guided_diffusion_vae.vae.posterior import sample_moments
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec, VAEInterface
from launches import Launches

COUNT = 11


class HalvingCodec(PixelCodec):
    """A codec with a posterior: means are block averages, scaled, and the variance depends on them."""

    has_posterior, scale_factor, path, fingerprint = True, 0.5, "somewhere/vae", "a" * 64

    def __init__(self, gain=1.0, fail_after=None):
        super().__init__(channels=1)
        self.factors, self.gain, self.left = (2, 2), gain, fail_after

    def encode_moments(self, images):
        if self.left is not None:
            if self.left <= 0:
                raise KeyboardInterrupt
            self.left -= len(images)
        mean = F.avg_pool2d(2 * images - 1, 2) * self.scale_factor * self.gain
        return torch.cat([mean, -2 + mean], dim=1)


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    for i in range(COUNT):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{'ab'[i % 2]}_{i:02d}.png")
    return ImageFolder(data_dir=str(folder), image_size=8)


@pytest.fixture
def cached(tmp_path, dataset):
    def write(name="cache", codec=None, **fields):
        options = {"cache_dir": str(tmp_path / name), "shard_size": 4, "latent_dtype": "float32", **fields}
        read = ImageFolder(dataset.config, random_flip=options.pop("random_flip", False))
        run = {key: options.pop(key) for key in list(options) if key not in LatentCacheConfig.__dataclass_fields__}
        return write_cache(read, codec or HalvingCodec(), LatentCacheConfig(**options), **{"batch_size": 3, **run})
    return write


def test_more_shards_than_files_may_be_open_are_rejected(cached, monkeypatch):
    folder = cached().folder
    limits = []
    monkeypatch.setattr(latent_datasets.resource, "setrlimit", lambda kind, new: limits.append(new))
    monkeypatch.setattr(latent_datasets.resource, "getrlimit", lambda kind: (100, 1000))
    opened = len(os.listdir("/dev/fd"))
    caches = [LatentCache(folder), LatentCache(folder)]     # such as those of training and validation data
    # Three shards, what is open, and what else may be opened; the labels of the first are mapped, too.
    assert limits == [(opened + 3 + 256, 1000), (opened + 4 + 3 + 256, 1000)]
    hard = opened + 8 + 256
    monkeypatch.setattr(latent_datasets.resource, "getrlimit", lambda kind: (100, hard))
    message = (f"{folder} has 3 shards, and this process has {opened + 8} open files and may open {hard}; raise the "
               f"limit .ulimit -n {hard + 3}., or encode with a larger --shard_size")
    with pytest.raises(ValueError, match=message):
        LatentCache(folder)
    del caches
    LatentCache(folder)


def test_large_latents_are_read_fewer_steps_at_once(cached, monkeypatch):
    cache = cached()
    whiten = LatentNormalizer.fit("auto", cache.statistics)
    for numbers, together in ((2**23, 512), (6 * 16, 3), (1, 1)):
        monkeypatch.setattr(batching, "BULK_ELEMENTS", numbers)
        stream = LatentStream(cache, whiten, BatchPlan(COUNT, 2), "cpu")
        next(stream)
        assert len(stream._finished) == together - 1
        stream.close()


def everything(source):
    return source.batch(np.arange(source.count))[0]


# Writing and reading


def test_cache_returns_what_the_codec_encodes(cached, dataset):
    cache, codec = cached(), HalvingCodec()
    images, order = dataset.batch(range(COUNT)), [7, 0, 3, 10, 3]
    eps = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mode, labels = cache.batch(order)
    drawn, _ = cache.batch(order, eps)
    assert torch.equal(mode, codec.encode_batch(images)[order])
    assert torch.equal(drawn, codec.encode_batch(images[order], eps))
    assert labels.tolist() == dataset.labels[order].tolist() and cache.filenames == dataset.names
    assert (cache.count, cache.latent_shape, cache.image_shape) == (COUNT, (1, 4, 4), (1, 8, 8))
    assert cache.class_names == ["a", "b"] and cache.scale_factor == 0.5 and cache.draws_posterior


def test_cache_folder_contains_the_documented_files_only(cached):
    cache = cached()
    shards = [f"latents-0000{i}-of-00003.npy" for i in range(3)]
    found = sorted(path.name for path in cache.folder.iterdir())
    assert found == ["filenames.txt", "labels.npy", *shards, "manifest.json"]
    manifest = json.loads((cache.folder / "manifest.json").read_text())
    assert [(s["first"], s["count"]) for s in manifest["shards"]] == [(0, 4), (4, 4), (8, 3)]
    assert manifest["preprocessing"]["files"] == COUNT and manifest["autoencoder"]["sha256"] == "a" * 64
    cache.verify()


def test_mode_and_float16_are_smaller_and_differ_by_rounding_only(cached):
    exact = everything(cached("exact"))
    mode = cached("mode", store="mode", latent_dtype="float16")
    assert not mode.draws_posterior and np.load(mode.folder / mode.manifest["shards"][0]["file"]).shape == (4, 1, 4, 4)
    assert everything(mode).dtype == torch.float32 and (everything(mode) - exact).abs().max() < 1e-3


def test_statistics_are_those_of_posterior_samples(cached, dataset):
    statistics = cached().statistics
    moments = HalvingCodec().encode_moments(dataset.batch(range(COUNT))).double()
    mean, variance = moments[:, 0], moments[:, 1].exp()
    assert statistics["mean"] == pytest.approx(mean.mean().item(), rel=1e-6)
    assert statistics["std"] == pytest.approx((mean.var(correction=0) + variance.mean()).sqrt().item(), rel=1e-6)
    assert statistics["channel_std"] == [pytest.approx(statistics["std"])]


def test_statistics_over_all_include_the_variance_between_channels(tmp_path):
    latents = np.random.default_rng(0).normal([[[2.0]], [[-3.0]]], [[[1.0]], [[0.1]]], (9, 2, 3, 3))
    for i, latent in enumerate(latents):
        np.save(tmp_path / f"{i}.npy", latent)
    statistics = LatentFolder(tmp_path).statistics
    assert statistics["std"] == pytest.approx(latents.std(), rel=1e-5)
    assert statistics["channel_mean"] == pytest.approx(latents.mean((0, 2, 3)), rel=1e-5)
    assert statistics["channel_std"] == pytest.approx(latents.std((0, 2, 3)), rel=1e-5)


def test_statistics_and_shards_do_not_depend_on_the_number_of_ranks(tmp_path, dataset, cached):
    alone = cached("alone")
    wait, caches = threading.Barrier(2, timeout=20), {}
    config = LatentCacheConfig(str(tmp_path / "both"), latent_dtype="float32", shard_size=4)

    def encode(rank):
        caches[rank] = write_cache(dataset, HalvingCodec(), config, (rank, 2), barrier=wait.wait, batch_size=3)

    second = threading.Thread(target=encode, args=(1,))
    second.start()
    while not wait.n_waiting and second.is_alive():
        time.sleep(0.01)
    encode(0)
    second.join()
    assert caches[0].manifest == caches[1].manifest == alone.manifest
    with pytest.raises(ValueError, match="2 ranks encode together and require a barrier"):
        write_cache(dataset, HalvingCodec(), config, (0, 2))


def test_flips_are_stored_as_separate_entries(cached, dataset):
    cache = cached(random_flip=True)
    flips = np.arange(COUNT) % 3 == 0
    latents, labels = cache.batch(np.arange(COUNT), flips=flips)
    flipped = HalvingCodec().encode_batch(dataset.batch(range(COUNT), flips))
    assert torch.equal(latents, flipped) and labels.tolist() == dataset.labels.tolist()
    with pytest.raises(ValueError, match="no flipped images; re-encode with --random_flip True"):
        cached("plain").batch([0], flips=[True])


def test_cache_on_a_device_is_equal_and_respects_its_limit(cached):
    cache, plain = cached(latent_dtype="float16"), cached(latent_dtype="float16")
    assert not cache.on_device("cpu", limit_bytes=10) and cache.on_device("cpu")
    eps = torch.ones(3, 1, 4, 4)
    assert torch.equal(cache.batch([9, 1, 4], eps)[0], plain.batch([9, 1, 4], eps)[0])


def test_progress_counts_up_to_all(cached):
    seen = []
    cached(progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, COUNT) and seen[-1] == (COUNT, COUNT) and seen == sorted(seen)


# Interrupted, repeated, changed


def interrupted(cached, **fields):
    with pytest.raises(KeyboardInterrupt):
        cached(codec=HalvingCodec(fail_after=6), **fields)


def test_interrupted_encoding_resumes(tmp_path, cached):
    interrupted(cached)
    folder = tmp_path / "cache"
    kept = (folder / "latents-00000-of-00003.npy").stat().st_mtime_ns
    assert not [path for path in folder.iterdir() if path.name.endswith(".part")]
    with pytest.raises(FileNotFoundError, match="not a latent cache.*interrupted, run scripts/encode_dataset.py again"):
        open_latents(folder)
    seen = []
    cache = cached(progress=lambda done, total: seen.append(done))
    assert seen[0] == 4 and (folder / "latents-00000-of-00003.npy").stat().st_mtime_ns == kept
    assert cache.manifest == cached("unbroken").manifest and not list(folder.glob("latents-*.json"))


def test_encoding_killed_after_its_manifest_leaves_no_records(tmp_path, cached, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        def kill(folder):
            raise KeyboardInterrupt
        patch.setattr(cache_writer, "_remove_leftovers", kill)
        cached()
    assert len(list((tmp_path / "cache").glob("latents-*.json"))) == 3
    cached()
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == sorted(
        path.name for path in cached("unbroken").folder.iterdir())


def test_encoding_into_a_folder_that_is_emptied_raises_and_starts_again(tmp_path, cached, monkeypatch):
    folder, write = tmp_path / "cache", cache_writer.write_record

    def empty(path, content):
        if path.name == "manifest.json":
            for shard in folder.glob("latents-*"):
                shard.unlink()
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(cache_writer, "write_record", empty)
        with pytest.raises(FileNotFoundError, match="latents-00000-of-00003.npy was removed while the cache"):
            cached()
    assert [path.name for path in folder.iterdir()] == []
    cached().verify()


def first_report(cached, **fields):
    seen = []
    cached(progress=lambda done, total: seen.append(done), **fields)
    return seen[0]


def test_shards_with_other_settings_are_not_reused(tmp_path, cached, dataset):
    interrupted(cached)
    other = HalvingCodec()
    other.fingerprint = "b" * 64
    assert first_report(cached, codec=other) == 0
    for change in ({"store": "mode"}, {"latent_dtype": "float16"}, {"shard_size": 5}):
        interrupted(cached, name=str(change))
        assert first_report(cached, name=str(change), **change) == 0
    interrupted(cached, name="data")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(dataset.paths[0])
    dataset.__init__(dataset.config)
    assert first_report(cached, name="data") == 0


def less_exact(dtype="float32", tile=0, device="cpu", **options):
    codec = HalvingCodec(**options)
    codec.dtype, codec.tile, codec.device = getattr(torch, dtype), tile, torch.device(device)
    codec.approximations = functools.partial(VAEInterface.approximations, codec)
    return codec


def test_shards_of_another_precision_are_not_reused(tmp_path, cached):
    for name, change in {"dtype": {"dtype": "bfloat16"}, "tile": {"tile": 4}}.items():
        interrupted(cached, name=name)
        assert first_report(cached, name=name, codec=less_exact(**change)) == 0
    interrupted(cached)
    assert first_report(cached, codec=less_exact(tile=8)) == 4  # a tile that covers the full image
    assert cached().manifest["made_from"] == cached("other").manifest["made_from"]


def test_complete_cache_of_another_precision_is_rejected(cached):
    cached(codec=less_exact("bfloat16", 4))
    assert cached(codec=less_exact("bfloat16", 4, fail_after=0)).manifest["vae_dtype"] == "bfloat16"
    with pytest.raises(ValueError, match="other images or settings .*--vae_dtype bfloat16, --vae_tile 4, --tf32 False.;"
                                         " choose"):
        cached()


def test_caches_record_tf32_on_gpus(cached, numerics):
    allow_tf32(True)
    assert "tf32" not in cached("cpu", codec=less_exact()).manifest
    assert "tf32" not in cached("half", codec=less_exact("bfloat16", device="cuda")).manifest
    assert cached(codec=less_exact(device="cuda")).manifest["tf32"] is True
    allow_tf32(False)
    with pytest.raises(ValueError, match="other images or settings .*--tf32 True.; choose"):
        cached(codec=less_exact(device="cuda"))


def test_images_are_encoded_on_the_fly_without_tf32(dataset, numerics):
    allowed = []

    class Codec(HalvingCodec):
        def encode_moments(self, images):
            allowed.append(torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32)
            return super().encode_moments(images)

    allow_tf32(True)
    source = EncodedImages(dataset, Codec(), batch_size=4)      # measures the statistics
    source.latents(source.read([0, 1]))
    assert len(allowed) > 1 and not any(allowed)
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


def test_parts_of_a_killed_encoding_are_removed(tmp_path, cached, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    (tmp_path / "cache").mkdir()
    for host in ("here", "there"):  # no process has a number this high
        (tmp_path / "cache" / f".latents-00000-of-00003.npy.{host}.99999999.part").write_bytes(b"half")
    cached()
    assert [path.name for path in (tmp_path / "cache").glob(".*")] == [
        ".latents-00000-of-00003.npy.there.99999999.part"]


@pytest.mark.parametrize("entries, size", [
    (1, 256), (256 * 64, 256), (256 * 64 + 1, 257), (100_000, 1563), (4096 * 64, 4096), (10**9, 4096),
])
def test_default_shard_is_one_64th_within_bounds(entries, size):
    assert cache_writer._usual_shard_size(entries) == size


def test_shard_size_0_is_the_default_and_less_is_rejected(tmp_path, cached):
    many = tmp_path / "many.npz"
    np.savez(many, images=np.zeros((300, 4, 4), np.uint8))
    cache = write_cache(ImageFolder(data_dir=str(many), image_size=4), HalvingCodec(),
                        LatentCacheConfig(str(tmp_path / "chosen")), batch_size=300)
    assert [shard["count"] for shard in cache.manifest["shards"]] == [256, 44]
    with pytest.raises(ValueError, match="--shard_size must be >= 0, got -1"):
        cached(shard_size=-1)


def test_corrupt_shard_is_encoded_again(tmp_path, cached):
    interrupted(cached)
    shard = tmp_path / "cache" / "latents-00000-of-00003.npy"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    assert first_report(cached) == 0
    LatentCache(tmp_path / "cache").verify()


def test_record_that_is_a_named_pipe_is_written_again(tmp_path, cached, named_pipe):
    interrupted(cached)
    record = tmp_path / "cache" / "latents-00000-of-00003.json"
    record.unlink()
    named_pipe(record)
    assert first_report(cached) == 0 and not record.exists()


def test_leftover_shards_of_another_size_are_removed(tmp_path, cached):
    interrupted(cached)
    cached(shard_size=100)
    assert [path.name for path in (tmp_path / "cache").glob("latents-*")] == ["latents-00000-of-00001.npy"]


def test_complete_cache_is_reused_if_equal_else_rejected(cached):
    cached()
    assert cached(codec=HalvingCodec(fail_after=0)).count == COUNT
    with pytest.raises(ValueError, match="cache of other images or settings .*--store moments.*choose another"):
        cached(store="mode")
    other = HalvingCodec()
    other.fingerprint, other.path = "b" * 64, "elsewhere"
    with pytest.raises(ValueError, match=r"autoencoder a{16} \(somewhere/vae\), --vae_path is b{16} \(elsewhere"):
        cached(codec=other)


@pytest.mark.parametrize("name", ["latents-00001-of-00003.npy", "labels.npy"])
def test_complete_cache_that_is_corrupt_is_rejected(cached, name):
    path = cached().folder / name
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is corrupt: .*; remove the cache and re-encode it"):
        cached()


def test_latents_out_of_range_or_not_finite_are_rejected(cached):
    with pytest.raises(ValueError, match="a_00.png .*do not fit into float16; set --latent_dtype float32"):
        cached(codec=HalvingCodec(gain=1e6), latent_dtype="float16")
    with pytest.raises(ValueError, match="a_00.png .*not finite; check it with scripts/check_roundtrip.py"):
        cached("other", codec=HalvingCodec(gain=float("nan")))


def test_unreadable_image_error_names_the_file(cached, dataset):
    assert dataset.names[9] == "b_07.png"
    with open(dataset.paths[9], "wb") as stream:
        stream.write(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match="b_07.png: cannot be read .not an image format"):
        cached()


def test_missing_disk_space_is_reported_before_encoding(cached, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("guided_diffusion_vae.data.cache_writer.shutil.disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="require 0 MiB, 0 MiB are free; free some space"):
        cached()


def test_random_crops_are_not_cached(tmp_path, dataset):
    random_crops = ImageFolder(dataset.config, crop="random")
    with pytest.raises(ValueError, match="--crop random cannot be cached"):
        write_cache(random_crops, HalvingCodec(), LatentCacheConfig(str(tmp_path / "cache")))


# Damaged and foreign caches


def change_manifest(cache, **changes):
    path = cache.folder / "manifest.json"
    write_record(path, {**read_record(path), **changes})


@pytest.mark.parametrize("changes, match", [
    ({"version": 2}, "expected format .*, version 1, got .*, version 2"), ({"format": "other"}, "got format 'other'"),
    ({"count": 12}, "expected 12 consecutive latents, the shards contain 11"), ({"count": "11"}, "corrupt: count"),
    ({"dtype": "float64"}, "corrupt: dtype"),
    ({"store": "both"}, "corrupt: store"), ({"autoencoder": {}}, "corrupt: autoencoder"),
    ({"latent_shape": [2, 4, 4]}, r"expected float32 \(4, 4, 4, 4\) as in the manifest"),
    ({"shards": [{"file": "x"}]}, "corrupt: shards"), ({"statistics": {}}, "corrupt: statistics"),
    ({"class_names": ["a"]}, r"labels.npy: expected 11 int64 labels of 1 classes, got int64 \(11,\) from 0 to 1; rem"),
    ({"shards": [{"file": "../x.npy", "first": 0, "count": 11, "sha256": ""}]}, "'../x.npy' outside of its folder"),
    ({"files": {"/etc/hosts": ""}}, "'/etc/hosts' outside of its folder"),
])
def test_invalid_manifest_is_rejected(cached, changes, match):
    cache = cached()
    change_manifest(cache, **changes)
    with pytest.raises(ValueError, match=match):
        open_latents(cache.folder)


def test_truncated_manifest_is_rejected(cached):
    path = cached().folder / "manifest.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="manifest.json: invalid JSON"):
        open_latents(path.parent)


def test_missing_truncated_or_changed_shard_error_names_it(cached):
    cache = cached()
    shard = cache.folder / "latents-00001-of-00003.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + b"?")
    with pytest.raises(ValueError, match="latents-00001-of-00003.npy is corrupt"):
        LatentCache(cache.folder).verify()
    shard.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="latents-00001-of-00003.npy: cannot be read"):
        LatentCache(cache.folder)
    shard.unlink()
    with pytest.raises(ValueError, match="latents-00001-of-00003.npy: cannot be read"):
        LatentCache(cache.folder)


def test_latents_that_are_not_finite_are_found_on_reading(cached):
    cache = cached()
    shard = np.load(cache.folder / "latents-00001-of-00003.npy", mmap_mode="r+")
    shard[1, 0, 0, 0] = np.nan
    shard.flush()
    assert LatentCache(cache.folder).batch([0, 4])[0].isfinite().all()
    with pytest.raises(ValueError, match=r"cache/latents-00001-of-00003.npy: latents \[5\] are not finite"):
        LatentCache(cache.folder).batch([0, 5])
    with pytest.raises(ValueError, match=r"cache/latents-00001-of-00003.npy: latents \[5\] are not finite"):
        LatentCache(cache.folder).on_device("cpu")


def test_folders_without_latents_are_rejected(tmp_path):
    with pytest.raises(FileNotFoundError, match="--cache_dir"):
        open_latents(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="neither manifest.json nor .npy files"):
        open_latents(tmp_path)


# A plain folder


def test_a_plain_folder_of_latents_is_read_with_classes_from_names(tmp_path):
    latents = np.random.default_rng(0).normal(size=(4, 3, 2, 2)).astype(np.float16)
    for i, latent in enumerate(latents):
        np.save(tmp_path / f"{'ba'[i % 2]}_{i}.npy", latent)
    source = open_latents(tmp_path)
    batch, labels = source.batch([0, 2])
    assert isinstance(source, LatentFolder) and source.latent_shape == (3, 2, 2) and source.class_names == ["a", "b"]
    assert torch.equal(batch, torch.from_numpy(latents[[1, 0]]).float()) and labels.tolist() == [0, 1]
    require_same_autoencoder(source, HalvingCodec())  # nothing is known of it
    np.save(tmp_path / "a_9.npy", np.zeros((3, 2, 3), np.float32))
    with pytest.raises(ValueError, match="a_9.npy: expected shape .3, 2, 2. as in .*, got .3, 2, 3."):
        open_latents(tmp_path)


def test_latents_without_a_class_are_logged(tmp_path, monkeypatch):
    for name in ("a_1", "b_2", "rest"):
        np.save(tmp_path / f"{name}.npy", np.arange(8.0).reshape(2, 2, 2))
    logged = []
    monkeypatch.setattr(latent_datasets.logger, "warn", logged.append)
    source = open_latents(tmp_path)
    assert source.labels is None and logged[0].startswith(f"{tmp_path}/rest.npy has no class: expected CLASS_rest")
    with pytest.raises(ValueError, match=f"{tmp_path}/rest.npy has no class: .*, got none for 1 of 3 files"):
        stream_of(source, batch=1)


def test_only_a_cache_is_kept_on_a_device(cached, dataset, tmp_path):
    (tmp_path / "plain").mkdir()
    np.save(tmp_path / "plain" / "a_1.npy", np.ones((1, 4, 4), np.float32))
    sources = cached(), LatentFolder(tmp_path / "plain"), EncodedImages(dataset, HalvingCodec())
    for source in sources:
        assert len(source) == source.count and source.batch([0])[0].shape == (1, *source.latent_shape)
    assert [source.on_device("cpu") for source in sources] == [True, False, False]
    assert sources[0].nbytes == COUNT * 2 * 16 * 4 and sources[1].nbytes == 0


@pytest.mark.parametrize("array, match", [
    (np.zeros((3, 2, 2), np.uint8), "expected floating-point latents, got uint8"),
    (np.full((3, 2, 2), np.inf), "not finite"),
    (np.zeros(3), r"expected a latent \[Z x ...\] .*, got shape \(3,\)"),
])
def test_files_other_than_latents_are_rejected(tmp_path, array, match):
    np.save(tmp_path / "a_1.npy", array)
    with pytest.raises(ValueError, match=f"a_1.npy.*{match}"):
        open_latents(tmp_path)


# On the fly, and the stream


def test_encoding_on_the_fly_equals_the_cache(cached, dataset):
    cache, live = cached(), EncodedImages(dataset, HalvingCodec(), batch_size=4)
    eps = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for noise in (None, eps):
        (a, y), (b, z) = cache.batch([3, 0, 8], noise), live.batch([3, 0, 8], noise)
        assert torch.equal(a, b) and torch.equal(y, z)
    same = "count", "latent_shape", "image_shape", "unpadded_shape", "scale_factor", "autoencoder", "class_names"
    assert [getattr(cache, name) for name in same] == [getattr(live, name) for name in same]
    assert live.statistics["std"] == pytest.approx(cache.statistics["std"], rel=1e-9)


def test_statistics_are_measured_on_a_seeded_sample(dataset):
    first, again, other = (EncodedImages(dataset, HalvingCodec(), stats_samples=4, seed=s) for s in (1, 1, 2))
    assert first.statistics == again.statistics != other.statistics
    known = EncodedImages(dataset, HalvingCodec(fail_after=0), statistics=first.statistics)
    assert known.statistics == first.statistics


def stream_of(source, rank=0, num_ranks=1, batch=4, **options):
    plan = BatchPlan(source.count, batch // num_ranks, rank, num_ranks, seed=3)
    normalizer = LatentNormalizer.fit("auto", source.statistics)
    return LatentStream(source, normalizer, plan, "cpu", with_labels=True, **options)


@pytest.mark.parametrize("kind", ["cache", "flips", "resident", "live", "live crops"])
def test_ranks_and_restarts_are_bit_exact(cached, dataset, kind):
    if kind.startswith("live"):
        fields = {"crop": "random", "random_flip": True} if "crops" in kind else {}
        source = EncodedImages(ImageFolder(dataset.config, image_size="6", **fields), HalvingCodec())
    else:
        source = cached(random_flip=kind == "flips")
        assert kind != "resident" or source.on_device("cpu")
    with_whole = stream_of(source)
    whole = [next(with_whole) for _ in range(5)]
    with_whole.close()
    assert whole[0][0].dtype == torch.float32 and whole[0][0].shape == (4, *source.latent_shape)
    halves = [stream_of(source, rank, 2, start_step=2) for rank in range(2)]
    for x0, extra in whole[2:]:
        parts = [next(half) for half in halves]
        assert torch.equal(torch.cat([part[0] for part in parts]), x0)
        assert torch.equal(torch.cat([part[1]["y"] for part in parts]), extra["y"])
    halves[0].seek(1)
    assert torch.equal(next(halves[0])[0], whole[1][0][:2])
    [half.close() for half in halves]


def test_stream_is_normalized_with_noise_keyed_by_seed_step_and_slot(cached):
    cache = cached()
    stream = stream_of(cache, start_step=1)
    x0, extra = next(stream)
    indices = BatchPlan(COUNT, 4, seed=3).indices(1)
    eps = keyed_randn(cache.latent_shape, [(3, 1, 1, slot) for slot in range(4)])
    expected = sample_moments(cache.read(indices), eps) / cache.statistics["std"]
    assert torch.allclose(x0, expected) and extra["y"].tolist() == cache.labels[indices].tolist()
    stream.close()


def test_every_step_and_slot_has_its_own_posterior_noise(cached):
    cache, steps = cached(), range(2, 5)
    stream = stream_of(cache, rank=1, num_ranks=2)
    stream.steps_per_read = len(steps)
    _, eps, *_ = stream.make_batch(2)
    assert torch.equal(eps, keyed_randn(cache.latent_shape, [(3, 1, step, slot) for step in steps for slot in (2, 3)]))


def test_low_resolution_latents_are_normalized_like_x0(cached):
    cache = cached(store="mode")
    plan = BatchPlan(COUNT, 4, seed=3)
    stream = LatentStream(cache, LatentNormalizer([0.5], [2.0], "none"), plan, "cpu", low_res=cache)
    x0, conditioning = next(stream)
    stream.close()
    expected = (cache.latents(cache.read(plan.indices(0)), device="cpu") - 0.5) / 2
    assert torch.allclose(x0, expected) and torch.allclose(conditioning["low_res"], expected)


@pytest.mark.parametrize("mode", ["auto", "channel"])
def test_batch_is_sent_to_the_device_without_synchronizing(cached, mode):
    """The meta device stands for a GPU: copies to it are seen, though nothing arrives."""
    cache = cached()
    normalizer = LatentNormalizer.fit(mode, cache.statistics)
    with Launches() as launches:
        stream = LatentStream(cache, normalizer, BatchPlan(COUNT, 4, seed=3), "meta", with_labels=True)
        x0, conditioning = next(stream)
    stream.close()
    assert x0.device.type == conditioning["y"].device.type == "meta" and launches.synchronizations == 0


def test_batches_for_a_gpu_are_pinned_by_the_thread_that_reads_them(cached, dataset, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor)
    cache, plan = cached(), BatchPlan(COUNT, 4, seed=3)
    normalizer = LatentNormalizer.fit("auto", cache.statistics)
    for device, expected in (("cpu", 0), ("cuda", 4)):
        stream = LatentStream(cache, normalizer, plan, device, with_labels=True, low_res=cache)
        prepared = stream.make_batch(0)     # values, noise, labels, low resolution
        assert len(pinned) == expected and set(map(id, pinned)) <= set(map(id, prepared))
    pinned.clear()
    for device, expected in (("cpu", 0), ("cuda", 1)):
        images, _ = ImageStream(dataset, plan, device=device).make_batch(0)
        assert [tensor is images for tensor in pinned] == [True] * expected


def test_cache_is_not_written_among_other_files(dataset, cached):
    with pytest.raises(FileExistsError, match=r"files of no cache \(.*, \d+ in total\); set --cache_dir to a sep"):
        write_cache(dataset, HalvingCodec(), LatentCacheConfig(dataset.folder))
    assert not list(Path(dataset.config.data_dir).glob("latents-*"))


def test_other_files_in_a_complete_cache_are_kept(cached):
    (cached().folder / "README.md").write_text("mine")
    assert cached().count == COUNT


def test_images_are_not_latents(tmp_path):
    for sides in ((64, 64), (32, 128), (16, 16)):
        np.save(tmp_path / "a.npy", np.zeros(sides, np.float32))
        with pytest.raises(ValueError, match="expected a latent .* at most 16 channels, .*images are read by --data"):
            LatentFolder(tmp_path)


def test_downsampled_images_exclude_the_padding(dataset):
    padded = ImageFolder(dataset.config, image_size=6, pad=True, multiple=4)
    low_res = DownsampledImages(padded, (3, 3)).batch([0])
    assert padded.shape == (1, 8, 8) and torch.equal(low_res, F.avg_pool2d(padded.batch([0])[..., :6, :6], 2))
    flipped_and_cropped = ImageFolder(dataset.config, image_size=6, random_flip=True, crop="random")
    low_res = EncodedImages(DownsampledImages(flipped_and_cropped, (3, 3)), PixelCodec(1))
    assert low_res.random_flip and low_res.random_crop and low_res.filenames == dataset.names


def test_dropped_stream_ends_its_thread(cached):
    cache = cached()
    before = set(threading.enumerate())     # threads of earlier tests may end at any time
    stream = stream_of(cache)
    next(stream)
    own, = set(threading.enumerate()) - before
    del stream      # it is collected after the batch in progress
    deadline = time.monotonic() + 60
    while own.is_alive() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert not own.is_alive()


def test_x0_has_a_standard_deviation_of_one(cached):
    stream = stream_of(cached(), batch=11)
    assert torch.cat([next(stream)[0] for _ in range(30)]).std().item() == pytest.approx(1, abs=0.02)
    stream.close()


def test_missing_labels_and_other_plans_are_rejected(tmp_path, cached):
    np.save(tmp_path / "latent.npy", np.arange(8.0).reshape(2, 2, 2))
    with pytest.raises(ValueError, match="has no classes, required by --class_cond True"):
        stream_of(LatentFolder(tmp_path), batch=1)
    cache = cached()
    with pytest.raises(ValueError, match="cache has 11 items, the batch plan is for 12"):
        LatentStream(cache, LatentNormalizer([0], [1], "none"), BatchPlan(12, 4), "cpu")


def test_another_autoencoder_or_scale_is_rejected(cached):
    cache, other = cached(), HalvingCodec()
    require_same_autoencoder(cache, other)
    other.scale_factor = 0.25
    with pytest.raises(ValueError, match="latents are scaled by 0.5, the autoencoder somewhere/vae scales by 0.25"):
        require_same_autoencoder(cache, other)
    with pytest.raises(ValueError, match="latents come from autoencoder a{16} .somewhere/vae., --vae_path is"):
        require_same_autoencoder(cache, PixelCodec(1))


def test_pixel_codec_is_cached_in_the_same_way(cached, dataset):
    cache = cached(codec=PixelCodec(1))
    assert torch.allclose(everything(cache), 2 * dataset.batch(range(COUNT)) - 1) and cache.scale_factor == 1


# Interfaces


def members(interface):
    """Return the names that an interface declares."""
    return {name for name in (*interface.__annotations__, *vars(interface)) if not name.startswith("_")}


def test_sources_and_codecs_have_every_member_of_their_interface(tmp_path, cached, dataset):
    (tmp_path / "plain").mkdir()
    (tmp_path / "volumes").mkdir()
    np.save(tmp_path / "plain" / "latent.npy", np.ones((1, 4, 4), np.float32))
    np.save(tmp_path / "volumes" / "volume.npy", np.ones((8, 8, 8), np.uint8))
    volumes = VolumeFolder(data_dir=str(tmp_path / "volumes"), image_size="8x8x8")
    config = AutoencoderConfig(in_channels=1, num_channels=(4, 4), norm_num_groups=2)
    header = {"kind": "autoencoder", "autoencoder": as_dict(config)}
    checkpoint_util.save_weights(tmp_path / "vae.pt", create_autoencoder(config).state_dict(), header)
    implementations = {
        ImageSource: [dataset, volumes, DownsampledImages(dataset, (4, 4)), Ramps(DataConfig(image_size=8))],
        LatentSource: [cached(), LatentFolder(tmp_path / "plain"), EncodedImages(dataset, HalvingCodec())],
        Codec: [PixelCodec(1), HalvingCodec(), VAEInterface(tmp_path / "vae.pt", device="cpu")],
    }
    for interface, objects in implementations.items():
        for implementation in objects:
            assert isinstance(implementation, interface)
            assert [name for name in members(interface) if not hasattr(implementation, name)] == []
    for source in implementations[ImageSource]:
        images = source.batch([0], flips=[True], rngs=[np.random.default_rng(0)])
        assert images.dtype == torch.float32 and images.shape == (1, *source.shape)
        assert 0 <= images.min() <= images.max() <= 1
        assert len(source) == len(source.names) and source.summary() and json.dumps(source.describe())


def test_source_without_an_abstract_method_cannot_be_constructed():
    class Incomplete(LatentSource):
        def read(self, indices, flips=None, rngs=None):
            return indices

    with pytest.raises(TypeError, match="abstract method '?latents"):
        Incomplete()


class Ramps:
    """A new image source, in memory and without a base class: gray ramps in two classes."""

    folder, class_names, preprocessing, fingerprint = "memory:ramps", ["falling", "rising"], {}, "ramps"
    attributes = MappingProxyType({})
    random_flip = random_crop = False

    def __init__(self, config, multiple=None, flag="--data_dir"):
        self.shape = self.unpadded_shape = (1, *config.sides)
        self.names = [f"ramp_{i}" for i in range(8)]
        self.labels = np.arange(8) % 2

    def __len__(self):
        return len(self.names)

    def batch(self, indices, flips=None, rngs=None):
        ramp = torch.linspace(0, 1, self.shape[-1]).expand(self.shape)
        return torch.stack([ramp if i % 2 else ramp.flip(-1) for i in indices])

    def describe(self):
        return {"fingerprint": self.fingerprint}

    def summary(self):
        return f"{len(self)} ramps"


def test_new_image_source_is_one_entry_of_the_table(tmp_path, monkeypatch):
    entry = (lambda config: config.data_dir.startswith("memory:"), Ramps)
    monkeypatch.setattr(data, "SOURCES", [entry, *data.SOURCES])
    source = open_folder(DataConfig(data_dir="memory:ramps", image_size=8))
    cache = write_cache(source, HalvingCodec(), LatentCacheConfig(str(tmp_path / "cache"), "mode", "float32"))
    assert cache.filenames == source.names and cache.labels.tolist() == [0, 1] * 4
    assert torch.equal(cache.batch([3])[0], HalvingCodec().encode_batch(source.batch([3])))

    script = Path(__file__).parents[1] / "scripts" / "image_train.py"
    flags = dict(data_dir="memory:ramps", image_size=8, class_cond=True, batch_size=4, max_steps=2, num_channels=32,
                 num_res_blocks=1, attention_resolutions="", channel_mult="1", diffusion_steps=20, predict_xstart=True,
                 ema_rate="0.9", logdir=tmp_path / "run")
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    monkeypatch.setattr("sys.argv", [str(script), *words])
    monkeypatch.setattr(dist_util, "_active_rank_info", None)
    runpy.run_path(str(script), run_name="__main__")
    header = checkpoint_util.load_weights(tmp_path / "run" / "model000002.pt")[1]
    assert header["classes"] == ["falling", "rising"] and header["image_shape"] == [1, 8, 8]
