"""Time the opening of a folder of images: the first time, and again with the saved index.

    OMP_NUM_THREADS=1 python benchmarks/census.py
    OMP_NUM_THREADS=1 python benchmarks/census.py --counts 1000,10000,100000 --repetitions 3 --reference ../earlier

The images are 8 x 8 PNG files in ten classes. Every opening is a process, whose imports are not counted.
"""

import dataclasses
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import common
import numpy as np
from PIL import Image

from guided_diffusion_vae.config import integers, option

OPEN = """
import json, sys, time
from guided_diffusion_vae.data import DataConfig, open_folder
open_folder(DataConfig(sys.argv[2], 8))     # imports what is imported on first use
wall, cpu = time.perf_counter(), time.process_time()
open_folder(DataConfig(sys.argv[1], 8))
print(json.dumps([time.perf_counter() - wall, time.process_time() - cpu]))
"""


@dataclasses.dataclass
class CensusConfig:
    SECTION = "benchmark"

    counts: integers = option("1000,10000", "comma-separated numbers of files")
    reference: str = option("", "baseline: a checkout of this project at another commit; empty: none")


def main():
    (bench, config), device = common.configure(__doc__, CensusConfig, without=("device",))
    here, rows = Path(__file__).parents[1], []
    variants = {"first": here, "again": here, **({"reference": config.reference} if config.reference else {})}
    for count in integers.parse(config.counts, "counts"):
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            write_images(folder / "images", count)
            write_images(folder / "few", 10)
            times = {name: [] for name in variants}
            for _ in range(bench.repetitions):
                for name, package in variants.items():
                    if name == "first":
                        shutil.rmtree(folder / "index", ignore_errors=True)
                    times[name].append(open_in_process(package, folder))
        for name, pairs in times.items():
            ratios = [first[1] / own[1] for first, own in zip(times[list(variants)[-1]], pairs)]
            rows.append({"variant": name, "files": count, "wall s": statistics.median(wall for wall, _ in pairs),
                         "CPU s": statistics.median(cpu for _, cpu in pairs), "speedup": statistics.median(ratios)})
    common.report("census", rows, bench, device, **dataclasses.asdict(config))


def write_images(folder, count):
    """Write `count` images into ten subfolders."""
    for number in range(10):
        (folder / str(number)).mkdir(parents=True)
    for start in range(0, count, 10):
        stream = io.BytesIO()
        Image.fromarray(np.full((8, 8), start // 10 % 256, np.uint8)).save(stream, "PNG")
        for number in range(start, min(start + 10, count)):
            (folder / str(number % 10) / f"{number:07d}.png").write_bytes(stream.getvalue())


def open_in_process(package, folder):
    """Return (wall-clock seconds, CPU seconds) in which the package of a checkout opens folder/images."""
    environ = {**os.environ, "PYTHONPATH": str(Path(package).resolve()), "XDG_CACHE_HOME": str(folder / "index")}
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder / "images"), str(folder / "few")], env=environ,
                          cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{package}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
