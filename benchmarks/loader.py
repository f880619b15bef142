"""Time how fast latents reach the model: from a cache, from one file a picture, and the limit of copying memory.

    OMP_NUM_THREADS=1 python benchmarks/loader.py
    OMP_NUM_THREADS=1 python benchmarks/loader.py --grid 32

A million a second is a million latents drawn in the order of training, in batches, as float32 tensors on the device.
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

BATCHES = 50        # in a measurement
HUGE = 10**9


@dataclasses.dataclass
class LoaderConfig:
    SECTION = "benchmark"

    grid: int = option(16, "latents are 4 x grid x grid")
    count: int = option(8192, "latents")
    bench_batch_size: int = option(64, "latents in a batch")


class FourFold(PixelCodec):
    """A codec that costs nothing: four copies of a grey picture, with a posterior."""

    has_posterior, scale_factor, path, fingerprint = True, 1.0, "", "0" * 64

    def encode_batch(self, images):
        return (2 * images - 1).repeat(1, 4, *(1,) * (images.dim() - 2))

    def encode_moments(self, images):
        latents = self.encode_batch(images)
        return torch.cat([latents, latents - 3], dim=1)

    def latent_shape(self, image_shape):
        return (4, *image_shape[1:])


class Files(Dataset):
    """One .npy file a latent, as data sets are often kept."""

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
    with tempfile.TemporaryDirectory() as place:
        place, n = Path(place), config.bench_batch_size
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (config.count, config.grid, config.grid), np.uint8)
        np.savez(place / "pictures.npz", images=images)
        pictures = ImageFolder(DataConfig(data_dir=str(place / "pictures.npz"), image_size=config.grid))
        sources = {}
        for store, dtype in (("mode", "float32"), ("mode", "float16"), ("moments", "float16")):
            cache = LatentCacheConfig(str(place / f"{store}-{dtype}"), store, dtype)
            sources[f"cache, {store}, {dtype}"] = write_cache(pictures, FourFold(1), cache, batch_size=512)
        resident = write_cache(pictures, FourFold(1), LatentCacheConfig(str(place / "mode-float32"), "mode", "float32"))
        resident.on_device(device)
        sources["cache, mode, float32, on the device"] = resident

        (place / "files").mkdir()
        latents = sources["cache, mode, float32"].batch(np.arange(config.count))[0]
        files = Files(place / "files", latents.numpy())
        loader = iter_for_ever(DataLoader(files, n, shuffle=True, drop_last=True))
        target = torch.empty(n, *latents.shape[1:], device=device)
        copies = iter_for_ever(latents.split(n)[:-1])

        reads = {"one file a latent": lambda: [next(loader).to(device) for _ in range(BATCHES)]}
        for name, source in sources.items():
            reads[name] = reader(source, n, device)
        reads["copying memory (the limit)"] = lambda: [target.copy_(next(copies)) for _ in range(BATCHES)]
        rows = common.speedup_table(common.time_interleaved(reads, bench.repetitions, device), "one file a latent", BATCHES)
    limit = rows[-1]["ms"]
    for row in rows:
        row["latents/s"] = n / row["ms"] * 1e3
        row["of the limit"] = f"{limit / row['ms']:.0%}"
    common.report(f"loader_{config.grid}", rows, bench, device, **dataclasses.asdict(config))
    huge_plan(n)


def reader(source, n, device):
    """Return a function that draws BATCHES batches as training does."""
    whiten = LatentNormalizer.fit("auto", source.statistics, source.scale_factor)
    stream = LatentStream(source, whiten, BatchPlan(source.count, n), device)
    return lambda: [next(stream) for _ in range(BATCHES)]


def iter_for_ever(batches):
    while True:
        yield from batches


def huge_plan(n):
    """Print what drawing the order of a billion items costs, and of a small set beside it."""
    for count in (1000 * n, HUGE):
        begun = time.process_time()
        drawn_in_order(count, n)
        taken = (time.process_time() - begun) / 1000
        tracemalloc.start()
        drawn_in_order(count, n)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        print(f"order of {count:,} items: {1e6 * taken:.0f} us for a batch of {n}, {peak / 2**20:.2f} MiB at the peak")


def drawn_in_order(count, n):
    plan = BatchPlan(count, n)
    for step in range(1000):
        plan.indices(step)


if __name__ == "__main__":
    main()
