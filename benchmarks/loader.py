"""Time the loading of latents: from a cache, from one file per latent, and the limit of copying memory.

    OMP_NUM_THREADS=1 python benchmarks/loader.py
    OMP_NUM_THREADS=1 python benchmarks/loader.py --grid 32

All readers return batches of float32 tensors on the device, in the order of training.
"""

import dataclasses
import tempfile
import time
import tracemalloc
from pathlib import Path

import common
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from guided_diffusion_vae.config import option
from guided_diffusion_vae.data import BatchPlan, DataConfig, ImageFolder, LatentStream
from guided_diffusion_vae.data.cache_writer import LatentCacheConfig, write_cache
from guided_diffusion_vae.vae_wrapper import LatentNormalizer, PixelCodec

BATCHES = 50        # per measurement
HUGE = 10**9        # items, for the time of computing their order


@dataclasses.dataclass
class LoaderConfig:
    SECTION = "benchmark"

    grid: int = option(16, "side of the latent grid; latents are 4 x grid x grid")
    count: int = option(8192, "number of latents")
    bench_batch_size: int = option(64, "batch size")


class RepeatCodec(PixelCodec):
    """Codec without a network: four copies of a grayscale image, with a posterior."""

    has_posterior, scale_factor, path, fingerprint = True, 1.0, "", "0" * 64

    def encode_batch(self, images):
        return (2 * images - 1).repeat(1, 4, *(1,) * (images.dim() - 2))

    def encode_moments(self, images):
        latents = self.encode_batch(images)
        return torch.cat([latents, latents - 3], dim=1)

    def latent_shape(self, image_shape):
        return (4, *image_shape[1:])


class Files(Dataset):
    """Dataset of one .npy file per latent, a common layout."""

    def __init__(self, folder, latents):
        self.paths = [folder / f"{i:06d}.npy" for i in range(len(latents))]
        for path, latent in zip(self.paths, latents):
            np.save(path, latent)

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return torch.from_numpy(np.load(self.paths[i]))


def main():
    (bench, config), device = common.configure(__doc__, LoaderConfig)
    with tempfile.TemporaryDirectory() as folder:
        folder, n = Path(folder), config.bench_batch_size
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (config.count, config.grid, config.grid), np.uint8)
        np.savez(folder / "images.npz", images=images)
        dataset = ImageFolder(DataConfig(data_dir=str(folder / "images.npz"), image_size=config.grid))
        sources = {}
        for store, dtype in (("mode", "float32"), ("mode", "float16"), ("moments", "float16")):
            cache = LatentCacheConfig(str(folder / f"{store}-{dtype}"), store, dtype)
            sources[f"cache, {store}, {dtype}"] = write_cache(dataset, RepeatCodec(1), cache, batch_size=512)
        resident = write_cache(dataset, RepeatCodec(1),
                               LatentCacheConfig(str(folder / "mode-float32"), "mode", "float32"))
        resident.on_device(device)
        sources["cache, mode, float32, on the device"] = resident

        (folder / "files").mkdir()
        latents = sources["cache, mode, float32"].batch(np.arange(config.count))[0]
        files = Files(folder / "files", latents.numpy())
        loader = cycle(DataLoader(files, n, shuffle=True, drop_last=True))
        target = torch.empty(n, *latents.shape[1:], device=device)
        copies = cycle(latents.split(n)[:-1])

        readers = {"one file per latent": lambda: [next(loader).to(device) for _ in range(BATCHES)]}
        for name, source in sources.items():
            readers[name] = reader(source, n, device)
        readers["copying memory (the limit)"] = lambda: [target.copy_(next(copies)) for _ in range(BATCHES)]
        times = common.time_interleaved(readers, bench.repetitions, device)
        rows = common.speedup_table(times, "one file per latent", BATCHES)
    limit = rows[-1]["ms"]
    for row in rows:
        row["latents/s"] = n / row["ms"] * 1e3
        row["fraction of the limit"] = f"{limit / row['ms']:.0%}"
    common.report(f"loader_{config.grid}", rows, bench, device, **dataclasses.asdict(config))
    huge_plan(n)


def reader(source, n, device):
    """Return a function that loads BATCHES batches as in training."""
    normalizer = LatentNormalizer.fit("auto", source.statistics)
    stream = LatentStream(source, normalizer, BatchPlan(source.count, n), device)
    return lambda: [next(stream) for _ in range(BATCHES)]


def cycle(batches):
    while True:
        yield from batches


def huge_plan(n):
    """Print the time and memory of computing the order of a billion items, and of a small dataset."""
    for count in (1000 * n, HUGE):
        start = time.process_time()
        compute_order(count, n)
        elapsed = (time.process_time() - start) / 1000
        tracemalloc.start()
        compute_order(count, n)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"order of {count:,} items: {1e6 * elapsed:.0f} us per batch of {n}, peak {peak / 2**20:.2f} MiB")


def compute_order(count, n):
    plan = BatchPlan(count, n)
    for step in range(1000):
        plan.indices(step)


if __name__ == "__main__":
    main()
