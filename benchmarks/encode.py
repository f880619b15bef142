"""Time how fast an autoencoder encodes: one by one, in batches, in bfloat16 with channels last (of pictures).

    OMP_NUM_THREADS=1 python benchmarks/encode.py
    OMP_NUM_THREADS=1 python benchmarks/encode.py --bench_image_size 32x32x32 --bench_batch_sizes 1,4      # volumes
    OMP_NUM_THREADS=1 python benchmarks/encode.py --vae_path FOLDER                # one that diffusers saved, or a run
    python benchmarks/encode.py --bench_image_size 256 --bench_batch_sizes 1,16,64                 # on a GPU

The plain loop is what one would write: model.encode(x) in float32, for as many pictures at a time. Ratios are to the
plain loop one by one.
"""

import dataclasses
import tempfile
from pathlib import Path

import common
import torch

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict, option
from guided_diffusion_vae.data import parse_size
from guided_diffusion_vae.vae_wrapper import VAEConfig, create_vae

NETWORKS = {
    2: AutoencoderConfig(in_channels=3, num_channels=(128, 256, 512), num_res_blocks=2, norm_num_groups=32),
    3: AutoencoderConfig(in_channels=1, num_channels=(32, 64, 64), spatial_dims=3),
}


@dataclasses.dataclass
class EncodeConfig:
    SECTION = "benchmark"

    vae_path: str = option("", "autoencoder to measure, as in the other scripts; empty: random weights, for pictures with "
                            "channels 128, 256, 512 and two blocks a level, for volumes with 32, 64, 64")
    bench_image_size: str = option("64", "pictures are size x size, volumes such as 32x32x32")
    bench_batch_sizes: str = option("1,4,16", "numbers of samples at a time, with commas between; the last one is encoded "
                                           "by every variant")


def main():
    (bench, config), device = common.configure(__doc__, EncodeConfig)
    sides, batches = parse_size(config.bench_image_size), [int(n) for n in config.bench_batch_sizes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        path = config.vae_path or random_network(Path(folder) / "vae.pt", NETWORKS[len(sides)])
        codecs = {dtype: create_vae(VAEConfig(vae_path=str(path), vae_dtype=dtype), device)
                  for dtype in ("float32", "bfloat16")}
    exact = codecs["float32"]
    x = torch.rand(batches[-1], exact.in_channels, *sides).to(device)
    plain = torch.no_grad()(lambda x: exact.network.encode(2 * x - 1))
    ways = {"plain loop": plain, **{f"VAEInterface, {dtype}": codec.encode_batch for dtype, codec in codecs.items()}}
    ways = {f"{name}, {n} at a time": lambda encode=encode, n=n: [encode(part) for part in x.split(n)]
            for name, encode in ways.items() for n in batches}
    found, wanted = (codec.encode_batch(x) for codec in (codecs["bfloat16"], exact))
    print(f"bfloat16 differs by {((found - wanted).norm() / wanted.norm()):.1e} (relative)\n", flush=True)
    rows = common.speedup_table(common.time_interleaved(ways, bench.repetitions, device), next(iter(ways)), len(x))
    for row in rows:
        row["samples/s"] = 1e3 / row["ms"]
    common.report(f"encode_{len(sides)}d", rows, bench, device, **dataclasses.asdict(config))


def random_network(path, config):
    checkpoint_util.save_weights(path, create_autoencoder(config).state_dict(),
                                 {"kind": "autoencoder", "autoencoder": as_dict(config)})
    return path


if __name__ == "__main__":
    main()
