"""Interleaved measurements, paired ratios, and reports with machine and versions, shared by all benchmarks.

On a CPU the clock is the CPU time of the process, which concurrent load affects little. On a GPU it is that of CUDA
events. All variants of a comparison run interleaved in one process, and ratios are computed pair by pair. Set
OMP_NUM_THREADS=1: waiting threads consume CPU time, too.
"""

import contextlib
import dataclasses
import functools
import gc
import importlib.metadata
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

from guided_diffusion_vae import logger
from guided_diffusion_vae.config import option
from guided_diffusion_vae.files import write_json
from guided_diffusion_vae.runs.flags import drop_fields, parse

import torch  # isort: skip


@dataclasses.dataclass
class BenchConfig:
    SECTION = "benchmark"

    repetitions: int = option(7, "measurements per variant, interleaved with the other variants")
    out: str = option("runs/benchmarks", "output folder of the JSON files")
    device: str = option("", "cpu or cuda; empty: cuda if available")


@dataclasses.dataclass
class ComparisonConfig:
    SECTION = "benchmark"

    reference: str = option("", "baseline: a checkout of openai/guided-diffusion, or (train_step.py) diffusers for the "
                                "same network in diffusers; empty: this project's plain float32 form")
    profile: bool = option(False, "print the most expensive operators of each variant")


def configure(doc, *classes, without=()):
    """Return (config instances, device), and print the benchmark's title and machine.

    :param without: names of the common flags that the benchmark does not use.
    """
    bench, *configs = parse(doc, drop_fields(BenchConfig, *without), *classes)
    device = torch.device(bench.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    variables = " ".join(f"{name}={value}" for name, value in environment()["environment"].items())
    print(f"{doc.splitlines()[0]}\n{machine(device)}\n{variables}\n", flush=True)
    return (bench, *configs), device


def machine(device):
    """Return a line with the hardware and the versions."""
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return (f"{chip}; {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}; "
            f"Python {platform.python_version()}, torch {torch.__version__}")


@functools.cache
def environment():
    """Return the package versions and environment variables that affect speed."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "diffusers")}
    variables = {name: value for name, value in sorted(os.environ.items())
                 if name.startswith(("OMP_", "MKL_", "MALLOC_", "CUDA_", "LD_PRELOAD"))}
    return {"versions": {"python": platform.python_version(), **versions}, "environment": variables}


def _processor():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def seconds(function, device):
    """Return the seconds of a call, on the clock of the device."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    start = time.process_time()
    function()
    return time.process_time() - start


def time_interleaved(variants, repetitions, device, warmup=1):
    """Return {name: [seconds, ...]} of functions by name, after `warmup` unmeasured calls of each."""
    measured = {name: [] for name in variants}
    gc.collect()
    gc.disable()
    try:
        for repetition in range(-warmup, repetitions):
            for name, function in variants.items():
                elapsed = seconds(function, device)
                if repetition >= 0:
                    measured[name].append(elapsed)
    finally:
        gc.enable()
    return measured


def speedup_table(measured, baseline, per=1):
    """Return table rows: median milliseconds of a call divided by `per`, and the speed relative to the baseline.

    The ratio is the median over pairs measured directly after each other, with its interquartile range.
    """
    rows = []
    for name, elapsed in measured.items():
        ratios = sorted(base / own for base, own in zip(measured[baseline], elapsed))
        quarter = len(ratios) // 4
        rows.append({"variant": name, "ms": 1e3 * statistics.median(elapsed) / per,
                     "speedup": statistics.median(ratios), "from": ratios[quarter], "to": ratios[-1 - quarter]})
    return rows


def matrix_product(device, dtype=torch.bfloat16, side=0, count=20):
    """Return a function that multiplies large matrices; its attribute `flops` is the operation count.

    :param side: rows and columns of the matrices; 0: 8192 on a GPU, 1024 on a CPU.
    """
    side = side or (8192 if device.type == "cuda" else 1024)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def product():
        for _ in range(count):
            torch.mm(a, b)

    product.flops = 2 * side**3 * count
    return product


def peak_memory(function):
    """Return the peak GPU memory of a call in bytes, beyond the memory allocated before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def print_operators(variants, device, rows=10):
    """Print the operators with the most self time in a call, for functions by name."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    self_ms = lambda event: (event.self_device_time_total if device.type == "cuda"
                             else event.self_cpu_time_total) / 1e3
    for name, function in variants.items():
        with profile(activities=activities) as profiler:
            function()
        events = sorted(profiler.key_averages(), key=self_ms, reverse=True)
        total = sum(map(self_ms, events))
        print(f"{name}: {total:,.0f} ms, {sum(event.count for event in events):,} calls\n")
        print(table([{"operator": event.key, "ms": self_ms(event), "fraction": f"{self_ms(event) / total:.0%}",
                      "calls": event.count} for event in events[:rows]]) + "\n", flush=True)


def report(name, rows, bench, device, **settings):
    """Print rows (dictionaries) as a Markdown table, and write them with settings as JSON."""
    print(table(rows), flush=True)
    print(f"\nwrote {write(name, bench, device, settings=settings, rows=rows)}\n", flush=True)


def write(name, bench, device, **content):
    """Write a dictionary with the command, the machine and the versions as JSON; return the path."""
    path = Path(bench.out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"benchmark": name, "command": " ".join(sys.argv), "machine": machine(device), **environment(),
                      **content})
    return path


def table(rows):
    """Return rows as a Markdown table, with numbers to three digits; a value that a row does not have is empty."""
    text = lambda value: f"{value:.3g}" if isinstance(value, float) and abs(value) < 100 else (
        f"{value:,.0f}" if isinstance(value, float) else "" if value is None else str(value))
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys)] + [[text(row.get(key)) for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@contextlib.contextmanager
def silent():
    """Log to a temporary folder instead of the terminal, and yield the folder."""
    with tempfile.TemporaryDirectory() as folder, logger.scoped_configure(folder, ["csv"]):
        yield folder


def randomize_zero_parameters(model, seed=0):
    """Initialize all-zero parameters with small random values, as no gradient passes them; return the model."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                p.copy_(0.02 * torch.randn(p.shape, generator=rng))
    return model


def open_reference(folder):
    """Return the package guided_diffusion of a checkout, in a process group of this process only."""
    import torch.distributed as dist

    if not (Path(folder) / "guided_diffusion").is_dir():
        raise FileNotFoundError(f"{folder} is not a checkout of openai/guided-diffusion; check --reference")
    sys.path.insert(0, str(folder))
    if not dist.is_initialized():
        # guided-diffusion reduces gradients even in a single process.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    names = "gaussian_diffusion resample respace script_util train_util unet logger fp16_util".split()
    package = importlib.import_module("guided_diffusion")
    for name in names:
        importlib.import_module(f"guided_diffusion.{name}")
    return package
