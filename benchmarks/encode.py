"""Time the encoding of images or volumes: one by one and in batches, in float32 and in bfloat16.

    OMP_NUM_THREADS=1 python benchmarks/encode.py
    OMP_NUM_THREADS=1 python benchmarks/encode.py --bench_image_size 32x32x32 --bench_batch_sizes 1,4      # volumes
    OMP_NUM_THREADS=1 python benchmarks/encode.py --vae_path FOLDER                # of diffusers, or a run folder
    python benchmarks/encode.py --bench_image_size 256 --bench_batch_sizes 1,16,64                 # on a GPU

The plain loop is model.encode(x) in float32 with the same batch size. Speeds are relative to the plain loop one by one.
In bfloat16, images use the channels-last memory format.
"""

import dataclasses
import tempfile
from pathlib import Path

import common
import torch

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict, integers, option
from guided_diffusion_vae.data import parse_size
from guided_diffusion_vae.vae_wrapper import VAEConfig, create_vae

NETWORKS = {
    2: AutoencoderConfig(in_channels=3, num_channels=(128, 256, 512), num_res_blocks=2, norm_num_groups=32),
    3: AutoencoderConfig(in_channels=1, num_channels=(32, 64, 64), spatial_dims=3),
}


@dataclasses.dataclass
class EncodeConfig:
    SECTION = "benchmark"

    vae_path: str = option("", "autoencoder to measure, as in the other scripts; empty: random weights, with channels "
                               "128, 256, 512 and two blocks per level for images, 32, 64, 64 for volumes")
    bench_image_size: str = option("64", "size of square images, or of volumes, e.g. 32x32x32")
    bench_batch_sizes: integers = option("1,4,16", "comma-separated batch sizes; the last: number of encoded items")


def main():
    (bench, config), device = common.configure(__doc__, EncodeConfig)
    sides, batches = parse_size(config.bench_image_size), integers.parse(config.bench_batch_sizes, "bench_batch_sizes")
    with tempfile.TemporaryDirectory() as folder:
        path = config.vae_path or random_network(Path(folder) / "vae.pt", NETWORKS[len(sides)])
        codecs = {dtype: create_vae(VAEConfig(vae_path=str(path), vae_dtype=dtype), device)
                  for dtype in ("float32", "bfloat16")}
    exact = codecs["float32"]
    x = torch.rand(batches[-1], exact.in_channels, *sides).to(device)
    plain = torch.no_grad()(lambda x: exact.network.encode(2 * x - 1))
    encoders = {"plain loop": plain,
                **{f"VAEInterface, {dtype}": codec.encode_batch for dtype, codec in codecs.items()}}
    variants = {f"{name}, batch of {n}": lambda encode=encode, n=n: [encode(part) for part in x.split(n)]
                for name, encode in encoders.items() for n in batches}
    half, full = (codec.encode_batch(x) for codec in (codecs["bfloat16"], exact))
    print(f"bfloat16 differs by {((half - full).norm() / full.norm()):.1e} (relative)\n", flush=True)
    measured = common.time_interleaved(variants, bench.repetitions, device)
    rows = common.speedup_table(measured, next(iter(variants)), len(x))
    for row in rows:
        row["samples/s"] = 1e3 / row["ms"]
    common.report(f"encode_{len(sides)}d", rows, bench, device, **dataclasses.asdict(config))


def random_network(path, config):
    checkpoint_util.save_weights(path, create_autoencoder(config).state_dict(),
                                 {"kind": "autoencoder", "autoencoder": as_dict(config)})
    return path


if __name__ == "__main__":
    main()
