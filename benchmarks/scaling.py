"""Time training steps on several ranks of this machine: weak scaling (batch per rank) and strong scaling (in total).

    OMP_NUM_THREADS=1 python benchmarks/scaling.py --ranks 1,2
    python benchmarks/scaling.py --ranks 1,2,4,8 --bench_batch_size 64              # with GPUs

Ranks are started by mpiexec. Times are wall-clock times, because they include the time ranks wait for each other.
"""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import common
import torch
from train_step import SIZES

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.config import integers, option
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs.factories import create_model_and_diffusion_vae
from guided_diffusion_vae.runs.flags import parse
from guided_diffusion_vae.train_util import DiffusionTrainConfig, TrainLoop
from guided_diffusion_vae.unet import ModelConfig

RESULT = "seconds per step: "


@dataclasses.dataclass
class ScalingConfig:
    SECTION = "benchmark"

    ranks: integers = option("1,2,4", "comma-separated numbers of ranks; the first must be 1")
    size: str = option("16m122", "latent grid and network", choices=tuple(SIZES))
    bench_batch_size: int = option(8, "batch size per rank (weak scaling) and in total (strong scaling)")
    fsdp: bool = option(False, "shard the model over the ranks")
    mixed_precision: bool = option(True, "train in bfloat16")
    worker: int = option(0, "internal: batch size of a worker process; 0: start the workers")


def main():
    bench, config = parse(__doc__, common.BenchConfig, ScalingConfig)
    if config.worker:
        return run_worker(bench, config)
    device = torch.device(bench.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"{__doc__.splitlines()[0]}\n{common.machine(device)}\n", flush=True)
    counts = integers.parse(config.ranks, "ranks")
    rows, single_rank_rates = [], {}
    for kind in ("weak", "strong"):
        for n in counts:
            each = config.bench_batch_size if kind == "weak" else config.bench_batch_size // n
            if not each:
                continue
            step_s = start_workers(n, each, bench, config)
            rate = n * each / step_s
            single_rank_rates.setdefault(kind, rate)
            rows.append({"scaling": kind, "ranks": n, "latents per rank": each, "ms per step": 1e3 * step_s,
                         "latents/s": rate, "efficiency": f"{rate / single_rank_rates[kind] / n:.0%}"})
    common.report("scaling", rows, bench, device, **dataclasses.asdict(config))


def start_workers(ranks, batch_size, bench, config):
    """Return the seconds per step of this script as a worker on a number of ranks."""
    launcher = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or "mpiexec"
    command = [launcher, "-n", str(ranks)] if ranks > 1 else []
    command += [sys.executable, __file__, "--worker", str(batch_size), "--size", config.size,
                "--fsdp", str(config.fsdp and ranks > 1), "--mixed_precision", str(config.mixed_precision),
                "--repetitions", str(bench.repetitions)]
    out = subprocess.run(command, capture_output=True, text=True)
    for line in out.stdout.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    raise RuntimeError(f"{' '.join(command)} exited with status {out.returncode}:\n{out.stdout}{out.stderr}")


def run_worker(bench, config):
    """Time training steps on this rank; rank 0 prints the median."""
    dist_util.setup_dist()
    device = dist_util.dev()
    shape, flags = SIZES[config.size]
    model, diffusion = create_model_and_diffusion_vae(shape, ModelConfig(**flags), DiffusionConfig())
    batch = torch.randn(config.worker, *shape)
    with common.silent():
        loop = TrainLoop(model=common.randomize_zero_parameters(model).to(device), diffusion=diffusion, data=iter(()),
                         batch_size=config.worker, lr=1e-4, log_interval=10**9, save_interval=10**9,
                         config=DiffusionTrainConfig(fsdp=config.fsdp, mixed_precision=config.mixed_precision))
        times = []
        for _ in range(bench.repetitions + 2):
            dist_util.barrier()
            start = time.perf_counter()
            loop.run_step(batch, {})
            if device.type == "cuda":
                torch.cuda.synchronize()
            dist_util.barrier()
            times.append(time.perf_counter() - start)
    if dist_util.rank() == 0:
        print(f"{RESULT}{statistics.median(times[2:])}", flush=True)


if __name__ == "__main__":
    dist_util.launch(main)
