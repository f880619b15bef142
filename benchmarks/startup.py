"""Time from typing a command to its help, and to the first step of training from a cache.

    python benchmarks/startup.py
    python benchmarks/startup.py --cache_dir latents_cache/mine --train_flags "--config configs/microdoppler_small.yaml"

`import torch` alone is the baseline. The package does that with garbage collection off, which is faster.
"""

import dataclasses
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

from guided_diffusion_vae.config import option

FIRST_STEP = "image_train_vae, first step"
SCRIPTS = sorted((Path(__file__).parents[1] / "scripts").glob("*.py"))


@dataclasses.dataclass
class StartupConfig:
    SECTION = "benchmark"

    cache_dir: str = option("", "a latent cache, for a training run; empty: leave that out")
    train_flags: str = option("", "further flags of image_train_vae.py")


def main():
    (bench, config), device = common.configure(__doc__, StartupConfig, without=("device",))
    commands = {"import torch": [sys.executable, "-c", "import torch"]}
    commands |= {f"{script.stem} --help": [sys.executable, str(script), "--help"] for script in SCRIPTS}
    if config.cache_dir:
        train = SCRIPTS[0].with_name("image_train_vae.py")
        commands[FIRST_STEP] = [sys.executable, str(train), "--cache_dir", config.cache_dir, "--log_interval", "1",
                                *shlex.split(config.train_flags)]
    taken = {name: [] for name in commands}
    for _ in range(bench.repetitions):
        for name, command in commands.items():
            taken[name].append(elapsed(command, until="| step " if name == FIRST_STEP else None))
    rows = [{"command": name, "wall s": statistics.median(w for w, _ in times),
             "CPU s": statistics.median(c for _, c in times)} for name, times in taken.items()]
    common.report("startup", rows, bench, device)


def elapsed(command, until=None):
    """Return (seconds on the wall, seconds of CPU time) of a command to its end, or until it prints a line."""
    with tempfile.TemporaryDirectory() as folder:
        # Users have the byte code of earlier runs; an environment that forbids to keep it compiles everything anew.
        environ = {**os.environ, "OPENAI_LOGDIR": folder, "PYTHONDONTWRITEBYTECODE": ""}
        before, begun = os.times(), time.perf_counter()
        if until is None:
            subprocess.run(command, check=True, capture_output=True, env=environ)
        else:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                  env=environ) as process:
                found = any(until in line for line in process.stdout)
                process.kill()
            if not found:
                raise RuntimeError(f"{' '.join(command)} ended without {until!r}")
        taken, after = time.perf_counter() - begun, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return taken, cpu


if __name__ == "__main__":
    main()
