"""What the benchmarks share: interleaved measurements, paired ratios, and reports that name machine and versions.

On a CPU the clock is the process's own CPU time, which a busy neighbour disturbs little; on a GPU it is that of CUDA
events. All variants of a comparison run in one process in turn, one repetition of each after the other, and ratios are
taken pair by pair. Set OMP_NUM_THREADS=1: threads that wait burn CPU time, too.
"""

import contextlib
import dataclasses
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from guided_diffusion_vae import logger
from guided_diffusion_vae.config import option
from guided_diffusion_vae.runs.flags import parse, drop_fields

import torch  # isort: skip



@dataclasses.dataclass
class BenchConfig:
    SECTION = "benchmark"

    repetitions: int = option(7, "how often every variant is measured, in turn with the others")
    out: str = option("runs/benchmarks", "folder for the JSON files")
    device: str = option("", "cpu or cuda; empty: cuda where there is one")


@dataclasses.dataclass
class ComparisonConfig:
    SECTION = "benchmark"

    reference: str = option("", "checkout of openai/guided-diffusion to measure against, or (train_step.py) diffusers for "
                             "the same network in diffusers; empty: this project's plain float32 form is the baseline")
    profile: bool = option(False, "print the operators that each side spends its time in")


def configure(doc, *classes, without=()):
    """Return (config instances, device) and print what is measured on what; flags `without` use are left away."""
    bench, *configs = parse(doc, drop_fields(BenchConfig, *without), *classes)
    device = torch.device(bench.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    said = " ".join(f"{name}={value}" for name, value in environment()["environment"].items())
    print(f"{doc.splitlines()[0]}\n{machine(device)}\n{said}\n", flush=True)
    return (bench, *configs), device


def machine(device):
    """Return the hardware and versions in one line."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return (f"{chip}; {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}; "
            f"Python {platform.python_version()}, torch {torch.__version__}")


def environment():
    """Return the packages and the environment that speed depends on."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "diffusers")}
    said = {name: value for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "MALLOC_", "CUDA_", "LD_PRELOAD"))}
    return {"versions": {"python": platform.python_version(), **versions}, "environment": said}


def _processor():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def seconds(function, device):
    """Return how long a call takes, on the clock of the device."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = time.process_time()
    function()
    return time.process_time() - begin


def time_interleaved(variants, repetitions, device, warmup=1):
    """Return {name: [seconds, ...]} of functions by name, each called once before it counts."""
    times = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        for repetition in range(-warmup, repetitions):
            for name, function in variants.items():
                taken = seconds(function, device)
                if repetition >= 0:
                    times[name].append(taken)
    finally:
        gc.enable()
    return times


def speedup_table(times, baseline, per=1):
    """Return rows of a table: median milliseconds (a `per`-th of a call), and how much faster than the baseline.

    The ratio is the median over pairs measured next to each other; its spread is that of the middle half.
    """
    rows = []
    for name, taken in times.items():
        ratios = sorted(base / own for base, own in zip(times[baseline], taken))
        quarter = len(ratios) // 4
        rows.append({"variant": name, "ms": 1e3 * statistics.median(taken) / per,
                     "speedup": statistics.median(ratios), "from": ratios[quarter], "to": ratios[-1 - quarter]})
    return rows


def matrix_product(device):
    """Return a function that multiplies large bfloat16 matrices, with the operations that it takes as `flops`."""
    side, times = (8192, 20) if device.type == "cuda" else (1024, 20)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def product():
        for _ in range(times):
            torch.mm(a, b)

    product.flops = 2 * side**3 * times
    return product


def peak_of(function):
    """Return the bytes that a call takes on a GPU beyond what is allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def print_operators(variants, device, rows=10):
    """Print, for functions by name, the operators that a call spends most of its own time in."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    own = lambda event: (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1e3
    for name, function in variants.items():
        with profile(activities=activities) as profiler:
            function()
        events = sorted(profiler.key_averages(), key=own, reverse=True)
        total = sum(map(own, events))
        print(f"{name}: {total:,.0f} ms, {sum(event.count for event in events):,} calls\n")
        print(table([{"operator": event.key, "ms": own(event), "share": f"{own(event) / total:.0%}",
                      "calls": event.count} for event in events[:rows]]) + "\n", flush=True)


def report(name, rows, bench, device, **settings):
    """Print rows (dictionaries with the same keys) as a Markdown table and write them, with settings, as JSON."""
    print(table(rows), flush=True)
    folder = Path(bench.out)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"benchmark": name, "command": " ".join(sys.argv), "machine": machine(device), **environment(),
               "settings": settings, "rows": rows}
    (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    print(f"\nwritten to {folder / name}.json\n", flush=True)


def table(rows):
    """Return rows as a Markdown table, numbers to three digits."""
    text = lambda value: f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else (
        f"{value:,.0f}" if isinstance(value, float) else str(value))
    lines = [list(rows[0]), ["---"] * len(rows[0])] + [[text(v) for v in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextlib.contextmanager
def silent():
    """Let training loops log into a folder that vanishes, and not to the terminal."""
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["csv"]):
        yield folder


def randomize_zero_parameters(model, seed=0):
    """Give parameters that are zero small random values: networks begin with zeros, which no gradient passes."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=draw))
    return model


def open_reference(folder):
    """Import guided_diffusion from a checkout, with one process as its world; return the package."""
    import torch.distributed as dist

    if not (Path(folder) / "guided_diffusion").is_dir():
        raise FileNotFoundError(f"{folder} is no checkout of openai/guided-diffusion; check --reference")
    sys.path.insert(0, str(folder))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # it reduces gradients even when alone
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    names = "gaussian_diffusion resample respace script_util train_util unet logger fp16_util".split()
    package = importlib.import_module("guided_diffusion")
    for name in names:
        importlib.import_module(f"guided_diffusion.{name}")
    return package
