"""Check an installation, a machine and a data folder, and state what to change."""

import contextlib
import importlib.util
import io
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from .. import KEEPS_FREED_MEMORY, dist_util
from ..data import DataConfig, evenly_spaced, open_folder
from ..data.listing import FileSource
from ..files import READ_ERRORS
from ..interfaces import ImageSource
from ..train_util import OPTIMIZERS
from .memory import GIB
from .planning import Plan, advice

OK, WARNING, PROBLEM = "ok", "warning", "problem"
NVIDIA_DRIVER = "/proc/driver/nvidia/version"
CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
SHARED_MEMORY = "/dev/shm"
MPI_TIMEOUT_S = 120
LONG_STEP_S = 20    # longer steps are not repeated with the full batch
TIMED_STEPS = 3
DECODED_FILES, DECODING_S = 64, 5   # evenly spaced files of a folder, fewer if these take longer
# Below the first bound a run fails, below the second one it may.
DISK_GIB, SHARED_GIB, OPEN_FILES = (1, 10), (1 / 32, 1 / 4), (128, 1024)
CONNECT_RANKS = """
from guided_diffusion_vae import dist_util
dist_util.launch(dist_util.setup_dist)
"""


class Check(NamedTuple):
    """Result of a check: its subject, OK, WARNING or PROBLEM, and a line of text that ends with what to change."""

    subject: str
    status: str
    text: str

    def __str__(self):
        return f"{self.status:<8} {self.subject}: {self.text}"


def check_machine(folders: list[Path]) -> Iterator[Check]:
    """Yield the checks of the installation and of the machine.

    :param folders: existing folders, on whose disks free space is checked.
    """
    yield check_torch()
    yield from check_gpus()
    yield check_threads()
    yield check_allocator()
    yield check_open_files()
    yield check_shared_memory()
    yield from map(check_disk, folders)
    yield check_mpi()


def check_torch() -> Check:
    """Check that the build of PyTorch uses the GPU of the machine."""
    version = f"{torch.__version__} with Python {sys.version.split()[0]}"
    if not os.path.exists(NVIDIA_DRIVER) or torch.cuda.is_available():
        return Check("torch", OK, version)
    if torch.version.cuda is None:
        return Check("torch", PROBLEM, f"{version} is a build without CUDA, and the machine has an NVIDIA driver; "
                     "install a CUDA build of torch (https://pytorch.org/get-started), see docs/getting_started.md")
    return Check("torch", PROBLEM, f"{version} is built for CUDA {torch.version.cuda}, but finds no GPU; update the "
                 "driver, unset CUDA_VISIBLE_DEVICES, or pass the GPU to the container (--gpus all)")


def check_gpus() -> Iterator[Check]:
    """Yield one check per GPU: its memory, and whether the build of PyTorch has code for it."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        yield Check("GPU", OK, f"none; the device is {dist_util.dev().type}")
    for i in range(count):
        properties = torch.cuda.get_device_properties(i)
        name = f"{properties.name}, {properties.total_memory / GIB:.1f} GiB"
        built = {arch.rpartition("_")[2][:-1] for arch in torch.cuda.get_arch_list()}   # major versions
        if built and str(properties.major) not in built:
            yield Check(f"GPU {i}", PROBLEM, f"{name}: this build of torch has no code for compute capability "
                        f"{properties.major}.{properties.minor}; install another build of torch")
        else:
            yield Check(f"GPU {i}", OK, name)


def _usable_cores():
    """Return the number of cores that this process may use, limited by affinity and by the quota of a container."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):      # ValueError: the quota is "max"
        quota, period = Path(CPU_QUOTA).read_text("utf-8").split()
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def check_threads() -> Check:
    """Check that PyTorch has no more threads than there are cores."""
    threads, cores = torch.get_num_threads(), _usable_cores()
    if threads > cores:
        return Check("threads", WARNING, f"{threads} threads on {cores} usable cores; set OMP_NUM_THREADS={cores}")
    return Check("threads", OK, f"{threads} on {cores} usable cores")


def check_allocator() -> Check:
    """Check that freed memory is kept, which saves zeroing its pages in every step."""
    if KEEPS_FREED_MEMORY:
        return Check("allocator", OK, "glibc keeps freed memory")
    preloaded = os.environ.get("LD_PRELOAD", "")
    if "malloc" in preloaded:
        return Check("allocator", OK, f"preloaded: {preloaded}")
    if not sys.platform.startswith("linux"):
        return Check("allocator", OK, f"that of {sys.platform}")
    return Check("allocator", WARNING, "freed memory returns to the system in every step, which slows down CPUs; unset "
                 "GDVAE_KEEP_MEMORY, MALLOC_ variables and LD_PRELOAD, or preload jemalloc")


def check_open_files() -> Check:
    """Check the limit of open files of this process."""
    try:
        import resource
    except ImportError:     # Windows
        return Check("open files", OK, "no limit is known")
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return Check("open files", OK, "unlimited")
    return Check("open files", _grade(limit, OPEN_FILES), f"at most {limit}"
                 + ("" if limit >= OPEN_FILES[1] else "; run `ulimit -n 4096` before"))


def check_shared_memory() -> Check:
    """Check the free shared memory, which MPI and NCCL exchange data through."""
    if not os.path.isdir(SHARED_MEMORY):
        return Check("shared memory", OK, f"{SHARED_MEMORY} does not exist on this system")
    free = shutil.disk_usage(SHARED_MEMORY).free / GIB
    return Check("shared memory", _grade(free, SHARED_GIB), f"{free:.2f} GiB free in {SHARED_MEMORY}"
                 + ("" if free >= SHARED_GIB[1] else "; remove files there, or start the container with --shm-size 2g"))


def check_disk(folder: Path) -> Check:
    """Check the free space on the disk of an existing folder."""
    free = shutil.disk_usage(folder).free / GIB
    return Check("disk", _grade(free, DISK_GIB), f"{free:.1f} GiB free on the disk of {folder}"
                 + ("" if free >= DISK_GIB[1] else "; free some, or set --logdir to another disk"))


def _grade(value, bounds):
    return PROBLEM if value < bounds[0] else WARNING if value < bounds[1] else OK


def check_mpi() -> Check:
    """Check that the mpiexec in use starts two ranks that connect, which shows that it matches mpi4py."""
    launcher = shutil.which("mpiexec")
    alternative = "a single process and torchrun --nproc_per_node N need neither"
    if importlib.util.find_spec("mpi4py") is None:
        return Check("MPI", WARNING, f"mpi4py is not installed; for mpiexec, pip install mpi4py mpich ({alternative})")
    own = Path(sys.executable).with_name("mpiexec")
    if launcher is None:
        remedy = f"add {own.parent} to PATH" if own.exists() else "pip install mpich"
        return Check("MPI", WARNING, f"mpiexec is not found, mpi4py is installed; {remedy} ({alternative})")
    command = [launcher, "-n", "2", sys.executable, "-c", CONNECT_RANKS]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [
        str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))}
    remedy = "use the mpiexec of mpi4py's library, or torchrun"
    if own.exists() and own != Path(launcher):
        remedy = f"mpi4py has its own: put {own.parent} before {Path(launcher).parent} in PATH, or use torchrun"
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=MPI_TIMEOUT_S, env=environ)
    except subprocess.TimeoutExpired:
        return Check("MPI", PROBLEM, f"two ranks of {launcher} do not connect within {MPI_TIMEOUT_S} s; {remedy}")
    if process.returncode:
        lines = [line for line in (process.stderr + process.stdout).splitlines() if line.strip("- ")]
        reason = next((line for line in lines if line.startswith("error:")), " ".join(lines)[:100])
        return Check("MPI", PROBLEM, f"two ranks of {launcher} do not connect: {reason}; {remedy}")
    return Check("MPI", OK, f"two ranks of {launcher} connect")


def check_data(config: DataConfig) -> tuple[list[Check], ImageSource | None]:
    """Return the checks of a data folder, with the census and the warnings that training logs, and its images.

    They are None if the folder cannot be read.
    """
    logged = io.StringIO()
    try:
        with contextlib.redirect_stdout(logged):
            source = open_folder(config)
    except (OSError, ValueError) as error:
        return [Check("data", PROBLEM, str(error))], None
    notes = source.notes if isinstance(source, FileSource) else ()
    checks = [Check("data", OK if line in notes else WARNING, line) for line in logged.getvalue().splitlines()]
    if isinstance(source, FileSource) and not config.verify_data:
        checks.append(check_files(source))
    return [*checks, Check("data", OK, source.summary())], source


def check_files(source: FileSource) -> Check:
    """Check that evenly spaced files of a folder can be decoded."""
    started, faults, done, count = time.monotonic(), [], 0, len(source.paths)
    for file in evenly_spaced(count, DECODED_FILES).tolist():
        try:
            source.read_file(file)
        except READ_ERRORS as error:
            faults.append(str(error))
        done += 1
        if time.monotonic() - started > DECODING_S:
            break
    rest = "" if done == count else "; --verify_data True decodes all"
    if faults:
        return Check("data", PROBLEM, f"{len(faults)} of {done} decoded files cannot be read: {faults[0]}{rest}")
    return Check("data", OK, f"{done} of {count} files are decoded{rest}")


def check_step(plan: Plan, name: str) -> Check:
    """Check that a training step fits the memory of the device, and measure its time on random weights.

    A step that would take long is computed for a single sample.

    :param name: of the network.
    """
    device, size = dist_util.dev(), plan.train.batch_size
    budget, required = dist_util.memory_bytes(), plan.training().required_on(device.type)
    if required > budget:
        return Check("training step", PROBLEM, advice(plan, budget, device.type))
    memory = f"takes about {required / GIB:.1f} of {budget / GIB:.1f} GiB on {device}"
    single = plan.with_flags(batch_size=1, microbatch=-1, gradient_accumulation_steps=1)
    seconds = time_step(single, device)
    is_long = seconds * size > LONG_STEP_S
    seconds = seconds * size if is_long else -(-size // plan.forward_size) * time_step(plan, device)
    steps = plan.train.max_steps or plan.train.lr_anneal_steps
    total = f"; {steps:,} steps take about {_format_duration(steps * seconds)}" if steps else ""
    if is_long:
        return Check("training step", WARNING, f"{memory} and about {seconds:.0f} s (batch size {size}, from one "
                     f"sample, {name}){total}; use a GPU, smaller images or a smaller network")
    return Check("training step", OK, f"{memory} and {seconds:.3g} s (batch size {size}, {name}){total}")


def _format_duration(seconds):
    unit, length = next(((unit, length) for unit, length in (("days", 86400), ("h", 3600), ("min", 60))
                         if seconds >= 2 * length), ("s", 1))
    return f"{seconds / length:.3g} {unit}"


def time_step(plan: Plan, device: torch.device) -> float:
    """Return the median time of one forward pass of a plan with its gradients and an optimizer step, in seconds."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    dtype, times = plan.train.autocast_dtype, []
    with torch.device(device):
        networks = plan.build()
        optimizer = OPTIMIZERS["adamw"](networks[0].parameters())
        for _ in range(1 + TIMED_STEPS):    # the first one warms up
            started = time.perf_counter()
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                plan.step(*networks)
            optimizer.step()
            optimizer.zero_grad()
            synchronize()
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
