"""Time how fast an autoencoder encodes: picture by picture, in batches, in bfloat16 with channels last.

    OMP_NUM_THREADS=1 python benchmarks/encode.py
    OMP_NUM_THREADS=1 python benchmarks/encode.py --vae_path FOLDER                # one that diffusers saved, or a run
    python benchmarks/encode.py --bench_image_size 256 --bench_batch_size 64                       # on a GPU

The plain loop is what one would write: model.encode(x) in float32, for one picture or a batch at a time.
"""

import dataclasses
import tempfile
from pathlib import Path

import common
import torch

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import as_dict, opt
from guided_diffusion_vae.vae_wrapper import VAEConfig, create_vae

NETWORK = AutoencoderConfig(in_channels=3, num_channels=(128, 256, 512), num_res_blocks=2, norm_num_groups=32)


@dataclasses.dataclass
class EncodeConfig:
    SECTION = "benchmark"

    vae_path: str = opt("", "autoencoder to measure, as in the other scripts; empty: one of random weights, with "
                            "channels 128, 256, 512 and two blocks a level")
    bench_image_size: int = opt(64, "pictures are size x size")
    bench_batch_size: int = opt(16, "pictures at a time")


def main():
    (bench, config), device = common.configure(__doc__, EncodeConfig)
    with tempfile.TemporaryDirectory() as folder:
        path = config.vae_path or random_network(Path(folder) / "vae.pt")
        own = {dtype: create_vae(VAEConfig(vae_path=str(path), vae_dtype=dtype), device)
               for dtype in ("float32", "bfloat16")}
    exact = own["float32"]
    x = torch.rand(config.bench_batch_size, exact.in_channels, *(config.bench_image_size,) * 2).to(device)
    plain = torch.no_grad()(lambda x: exact.network.encode(2 * x - 1))
    ways = {"plain loop, batch 1": lambda: [plain(one[None]) for one in x],
            f"plain loop, batch {len(x)}": lambda: plain(x)}
    ways |= {f"VAEInterface, {dtype}": lambda vae=vae: vae.encode_batch(x) for dtype, vae in own.items()}
    found, wanted = own["bfloat16"].encode_batch(x), exact.encode_batch(x)
    print(f"bfloat16 differs by {((found - wanted).norm() / wanted.norm()):.1e} (relative)\n", flush=True)
    baseline = f"plain loop, batch {len(x)}"
    rows = common.compared(common.interleaved(ways, bench.repetitions, device), baseline, len(x))
    for row in rows:
        row["pictures/s"] = 1e3 / row["ms"]
    common.report("encode", rows, bench, device, **dataclasses.asdict(config))


def random_network(path):
    checkpoint_util.save_weights(path, create_autoencoder(NETWORK).state_dict(),
                                 {"kind": "autoencoder", "autoencoder": as_dict(NETWORK)})
    return path


if __name__ == "__main__":
    main()
