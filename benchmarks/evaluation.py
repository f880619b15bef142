"""Time the comparison of two sets of samples in features of Inception's length, and its peak memory.

    OMP_NUM_THREADS=1 python benchmarks/evaluation.py
    OMP_NUM_THREADS=1 python benchmarks/evaluation.py --counts 1000,10000,50000 --repetitions 1 --reference ../earlier

Every evaluation is a process, which reads two .npz files of 8 x 8 images, the samples and the reference. Features are a
random nonlinear map of the images, so that almost all of the time is that of the distances between sets. Memory is the
largest resident set of the process.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np

from guided_diffusion_vae.config import integers, option
from guided_diffusion_vae.data import write_npz

EVALUATE = """
import json, resource, sys, time, warnings
import torch
from guided_diffusion_vae.evaluation import EvaluateConfig, Features, evaluate, open_sample_file

warnings.simplefilter("ignore")     # about distances of few samples
count, length = map(int, sys.argv[1:])
sets = {name: open_sample_file(f"{name}_{count}.npz") for name in ("reference", "samples")}
weights = torch.randn(192, length, generator=torch.Generator().manual_seed(0)) / 8
extract = lambda images: Features((images.flatten(1) @ weights).relu())
wall, cpu = time.perf_counter(), time.process_time()
report = evaluate(EvaluateConfig(batch_size=64), sets, extract, ".")
print(json.dumps({"wall s": time.perf_counter() - wall, "CPU s": time.process_time() - cpu,
                  "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "report": report}))
"""


@dataclasses.dataclass
class EvaluationConfig:
    SECTION = "benchmark"

    counts: integers = option("1000,10000", "comma-separated numbers of samples, and of reference images")
    features: int = option(2048, "length of the features")
    reference: str = option("", "baseline: a checkout of this project at another commit; empty: none")
    reference_timeout_min: float = option(12.0, "CPU minutes after which an evaluation of the baseline is stopped")


def main():
    (bench, config), device = common.configure(__doc__, EvaluationConfig, without=("device",))
    rows, variants = [], {"this": (Path(__file__).parents[1], 0.0)}
    if config.reference:
        variants["reference"] = config.reference, 60 * config.reference_timeout_min
    with tempfile.TemporaryDirectory() as folder:
        for count in integers.parse(config.counts, "counts"):
            for seed, name in enumerate(("reference", "samples")):
                write_images(Path(folder) / f"{name}_{count}.npz", count, seed)
            measured = {name: [] for name in variants}
            for _ in range(bench.repetitions):
                for name, (package, limit) in variants.items():
                    measured[name].append(evaluate_in_process(package, folder, count, config.features, limit))
            for name, results in measured.items():
                rows.append({"variant": name, "samples": count, **summarize(results, "reference" in name and limit)})
                print(common.table(rows[-1:]), flush=True)
    common.report("evaluation", rows, bench, device, **dataclasses.asdict(config))


def summarize(results, limit):
    """Return the medians of measurements, and the report of the last; None among them is one that was stopped."""
    if None in results:
        return {"wall s": "", "CPU s": f"more than {limit:g}", "peak MiB": "", "frechet": "", "kernel": "",
                "precision": "", "recall": ""}
    return {**{key: statistics.median(each[key] for each in results) for key in ("wall s", "CPU s", "peak MiB")},
            **{key: repr(results[-1]["report"][key]) for key in ("frechet", "kernel", "precision", "recall")}}


def write_images(path, count, seed):
    """Write noisy mixtures of eight patterns of 8 x 8 RGB pixels, whose contrast depends on the seed."""
    patterns, rng = np.random.default_rng(9).random((8, 192)), np.random.default_rng(seed)
    mixtures = rng.dirichlet(np.ones(8), count) @ patterns + rng.normal(0, 0.05 + 0.01 * seed, (count, 192))
    images = (mixtures.clip(0, 1) * 255).astype(np.uint8).reshape(count, 8, 8, 3)
    write_npz(path, images.shape, [images])


def evaluate_in_process(package, folder, count, length, limit):
    """Return what EVALUATE prints with the package of a checkout, or None if it took more than `limit` CPU seconds."""
    command = [sys.executable, "-c", EVALUATE, str(count), str(length)]
    if limit:
        command = ["bash", "-c", f'ulimit -t {limit:.0f}; exec "$@"', "bash", *command]
    environ = {**os.environ, "PYTHONPATH": str(Path(package).resolve())}
    done = subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True)
    if limit and done.returncode < 0:   # ended by the signal of the limit
        return None
    if done.returncode:
        raise RuntimeError(f"{package}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
