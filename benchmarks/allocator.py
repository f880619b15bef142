"""Time what glibc's allocator costs: steps with freed memory kept (the default of the package) and returned.

    OMP_NUM_THREADS=1 python benchmarks/allocator.py

Two processes per case, one with GDVAE_KEEP_MEMORY=0, take turns. Linux with glibc only.
"""

import dataclasses
import functools
import os
import resource
import subprocess
import sys
import time

import common
import torch

from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder
from guided_diffusion_vae.config import option, words
from guided_diffusion_vae.unet import UNetModel

VARIANTS = {"returned": "0", "kept": "1"}


@dataclasses.dataclass
class AllocatorConfig:
    SECTION = "benchmark"

    cases: words = option("", "comma-separated names of CASES; empty: all")
    worker: str = option("", "used internally: measure this case whenever a line is read")


def autoencoder_step(shape, work, dtype=torch.float32, channels=(64, 128, 128)):
    """Return a function that encodes, decodes or trains on images [N x C x ...]."""
    network = create_autoencoder(AutoencoderConfig(
        spatial_dims=len(shape) - 2, in_channels=shape[1], num_channels=channels, num_res_blocks=1,
    ))
    images, latents = torch.rand(shape), torch.randn(shape[0], *network.latent_shape(shape[2:]))

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            if work == "train":
                network.decode(network.moments(images)[0]).square().mean().backward()
                return network.zero_grad()
            with torch.no_grad():
                return network.decode(latents) if work == "decode" else network.moments(images)

    return step


def unet_step(dtype):
    """Return a function that trains a UNet of 64 channels on latents 16 x 4 x 32 x 32."""
    network = UNetModel(32, 4, 64, 4, 2, (2, 4), channel_mult=(1, 2, 2), num_head_channels=32)
    x, timesteps = torch.randn(16, 4, 32, 32), torch.arange(16)

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
            network(x, timesteps).square().mean().backward()
        network.zero_grad()

    return step


CASES = {
    "decode 4 images 256x256": functools.partial(autoencoder_step, (4, 3, 256, 256), "decode"),
    "encode 4 images 256x256": functools.partial(autoencoder_step, (4, 3, 256, 256), "encode"),
    "train on 2 images 256x256": functools.partial(autoencoder_step, (2, 3, 256, 256), "train"),
    "train on 2 images 256x256 in bfloat16": functools.partial(
        autoencoder_step, (2, 3, 256, 256), "train", torch.bfloat16),
    "train on a volume 64x64x64": functools.partial(
        autoencoder_step, (1, 1, 64, 64, 64), "train", channels=(32, 64, 64)),
    "train a UNet": functools.partial(unet_step, torch.float32),
    "train a UNet in bfloat16": functools.partial(unet_step, torch.bfloat16),
}


def work(case):
    """Print seconds and peak MiB of one step for every line that is read, after a first step."""
    torch.manual_seed(0)
    step = CASES[case]()
    step()
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.process_time()
        step()
        elapsed = time.process_time() - start
        print(elapsed, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, flush=True)


def measure(case, repetitions):
    """Return ({variant: [seconds]}, {variant: peak MiB}), the two processes taking turns."""
    processes = {name: subprocess.Popen(
        [sys.executable, __file__, "--worker", case], env={**os.environ, "GDVAE_KEEP_MEMORY": keep},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    ) for name, keep in VARIANTS.items()}
    measured, peaks = {name: [] for name in processes}, {}
    for process in processes.values():
        while process.stdout.readline().strip() != "ready":
            if process.poll() is not None:
                raise RuntimeError(f"the process that measures {case!r} has ended with status {process.returncode}")
    for _ in range(repetitions):
        for name, process in processes.items():
            process.stdin.write("\n")
            elapsed, peaks[name] = map(float, process.stdout.readline().split())
            measured[name].append(elapsed)
    for process in processes.values():
        process.communicate()
    return measured, peaks


def main():
    if "--worker" in sys.argv:      # without the title that `configure` prints
        return work(sys.argv[-1])
    (bench, config), device = common.configure(__doc__, AllocatorConfig)
    rows = []
    for case in words.parse(config.cases, "cases") or CASES:
        measured, peaks = measure(case, bench.repetitions)
        _, kept = common.speedup_table(measured, "returned")
        rows.append({"case": case, "ms": kept["ms"], "speed, kept / returned": kept["speedup"], "from": kept["from"],
                     "to": kept["to"], "peak MiB": peaks["kept"], "memory, kept / returned":
                     peaks["kept"] / peaks["returned"]})
        print(common.table(rows[-1:]), flush=True)
    common.report("allocator", rows, bench, device)


if __name__ == "__main__":
    main()
