"""Time the startup of the scripts: to the output of --help, and to the first training step from a cache.

    python benchmarks/startup.py
    python benchmarks/startup.py --cache_dir latents_cache/mine --train_flags "--config configs/microdoppler_small.yaml"

The baseline is `import torch`. The package imports torch with garbage collection disabled, which is faster.
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

    cache_dir: str = option("", "latent cache of a training run; empty: time --help only")
    train_flags: str = option("", "additional flags of image_train_vae.py")


def main():
    (bench, config), device = common.configure(__doc__, StartupConfig, without=("device",))
    commands = {"import torch": [sys.executable, "-c", "import torch"]}
    commands |= {f"{script.stem} --help": [sys.executable, str(script), "--help"] for script in SCRIPTS}
    if config.cache_dir:
        train = SCRIPTS[0].with_name("image_train_vae.py")
        commands[FIRST_STEP] = [sys.executable, str(train), "--cache_dir", config.cache_dir, "--log_interval", "1",
                                *shlex.split(config.train_flags)]
    times = {name: [] for name in commands}
    for _ in range(bench.repetitions):
        for name, command in commands.items():
            times[name].append(elapsed(command, until="| step " if name == FIRST_STEP else None))
    rows = [{"command": name, "wall s": statistics.median(w for w, _ in pairs),
             "CPU s": statistics.median(c for _, c in pairs)} for name, pairs in times.items()]
    common.report("startup", rows, bench, device)


def elapsed(command, until=None):
    """Return (wall-clock seconds, CPU seconds) of a command until it exits, or prints a line with `until`."""
    with tempfile.TemporaryDirectory() as folder:
        # Cache byte code as on a user's machine: without the cache, every run compiles all modules again.
        environ = {**os.environ, "OPENAI_LOGDIR": folder, "PYTHONDONTWRITEBYTECODE": ""}
        before, start = os.times(), time.perf_counter()
        if until is None:
            subprocess.run(command, check=True, capture_output=True, env=environ)
        else:
            with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                                  env=environ) as process:
                reached = any(until in line for line in process.stdout)
                process.kill()
            if not reached:
                raise RuntimeError(f"{' '.join(command)} exited without printing {until!r}")
        wall, after = time.perf_counter() - start, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return wall, cpu


if __name__ == "__main__":
    main()
