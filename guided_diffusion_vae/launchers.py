"""Read rank information, address and MPI library from the environment of a launcher, and end with the launcher."""

import contextlib
import os
import re
import select
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

# Environment variables of rank, world size, local rank and local world size by launcher, in order of precedence: a
# process may inherit those of an outer launcher (mpiexec inside a Slurm step, torchrun inside either).
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}
MPI_LAUNCHERS = ("MPICH", "Open MPI")
OPEN_MPI_LIBRARY = "libmpi.so.40"   # of Open MPI 3 to 5


class LaunchError(RuntimeError):
    """The ranks cannot be connected; the message states how to start them instead."""


class RankInfo(NamedTuple):
    """Rank information of a process; `local_rank` is None if the launcher does not provide it."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None


def read_rank_info(environ):
    """Return the RankInfo in the launcher's variables of `environ`, by default a single process.

    :raises LaunchError: if the variables are not integers, or the rank is not below the world size.
    """
    candidates = [_read_launcher(launcher, environ) for launcher in LAUNCHERS]
    candidates = [info for info in candidates if info is not None]
    if not candidates:
        return RankInfo("none", 0, 1, 0)
    first, slurm = candidates[0], candidates[-1]
    # On some clusters srun sets PMI variables, too. If both agree, Slurm's are sufficient and MPI is not needed.
    if first.launcher in MPI_LAUNCHERS and slurm.launcher == "Slurm" and first[1:3] == slurm[1:3]:
        return slurm
    return first


def _read_launcher(launcher, environ):
    """Return the RankInfo of one launcher, None if its variables are not set."""
    rank, size, local_rank, _ = LAUNCHERS[launcher]
    if launcher == "Slurm":
        # A batch script has SLURM_NTASKS and rank 0 without being a task: only srun sets the variables of a step.
        if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
            return None
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else size
    if rank not in environ or size not in environ:
        return None
    try:
        info = RankInfo(launcher, int(environ[rank]), int(environ[size]),
                        int(environ[local_rank]) if local_rank in environ else None)
    except ValueError as error:
        raise LaunchError(f"{rank}={environ[rank]!r}, {size}={environ[size]!r}: expected integers from {launcher}; "
                          "unset them to run a single process") from error
    if not 0 <= info.rank < info.size:
        raise LaunchError(f"{rank}={info.rank} is not below {size}={info.size}; start the ranks with mpiexec, "
                          "torchrun or srun, or unset both to run a single process")
    return info


def slurm_address(environ):
    """Return the (address, port) at which the tasks of a Slurm step connect.

    The address is the step's first node. The port follows from the ids of job and step: all tasks compute the same one
    without communication, and jobs that share a node rarely collide.
    """
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or ""
    count = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    address = environ.get("MASTER_ADDR") or (first_host(nodes) if count > 1 else "127.0.0.1")
    job, step = int(environ.get("SLURM_JOB_ID", 0)), environ.get("SLURM_STEP_ID", "0")
    # Ports 20000 to 31999: below the ephemeral ports of Linux (from 32768), which any process may be assigned.
    default = 20000 + (job * 16 + (int(step) if step.isdigit() else 0)) % 12000
    return address, int(environ.get("MASTER_PORT", default))


def first_host(nodes):
    """Return the first host of a Slurm node list, e.g. `gpu07` of `gpu[07-09,12],login`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes).group())


def select_mpi_library(info, environ):
    """Set MPI4PY_LIBMPI in `environ` if the ranks were started by Open MPI, unless the user has chosen a library.

    mpi4py's wheels load the MPI of the same Python environment first: the MPICH wheel, which ends the process if Open
    MPI has started it.
    """
    if info.launcher == "Open MPI" and "MPI4PY_MPIABI" not in environ:
        names = [OPEN_MPI_LIBRARY]      # a list, of which mpi4py takes the first that can be loaded
        with contextlib.suppress(OSError):
            installation = Path(os.readlink(f"/proc/{launcher_pid(info)}/exe")).parents[1]
            names.insert(0, str(installation / "lib" / OPEN_MPI_LIBRARY))
        environ.setdefault("MPI4PY_LIBMPI", os.pathsep.join(names))


# --- The end of the launcher ---


def end_with_launcher(info):
    """Start a thread that ends this process when its launcher has ended: orphans would write into the next run's files.

    mpiexec ends its ranks even if it is killed; torchrun and srun leave them.
    """
    launcher = launcher_pid(info)
    if launcher is not None:
        threading.Thread(target=_end_after, args=(launcher, info), daemon=True).start()


def _end_after(launcher, info):
    _wait_for_process(launcher)
    with contextlib.suppress(OSError, ValueError):      # the launcher may have read the other end of this pipe
        print(f"error: rank {info.rank}: ended without saving, as its launcher has ended ({info.launcher}, process "
              f"{launcher}); rerun the same command to resume", file=sys.stderr, flush=True)
    os._exit(1)


def _wait_for_process(pid):
    """Return when a process has ended."""
    parent = os.getppid()
    try:
        select.select([os.pidfd_open(pid)], [], [])
    except ProcessLookupError:
        pass
    except (AttributeError, OSError):   # not Linux, or before 5.3: watch the parent alone
        while os.getppid() == parent:
            time.sleep(1)


def launcher_pid(info):
    """Return the process id of the launcher, None if there is none that can end before this process.

    It is the nearest ancestor without the variables of a rank: between both may be a shell or profiler, which would
    survive the launcher. Ranks started by hand have none.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ if info.launcher == "torchrun" else info.size > 1
    if not is_launched:
        return None
    pid = os.getppid()
    while pid > 1 and (parent := _parent_with(LAUNCHERS[info.launcher][0], pid)):
        pid = parent
    return pid if pid > 0 else None


def _parent_with(variable, pid):
    """Return the parent of a process if the environment of that process has a variable, else None."""
    try:
        environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if any(entry.startswith(f"{variable}=".encode()) for entry in environ):
            return int(Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()[1])
    except OSError:     # not Linux, or the process of another user, as Slurm's are
        pass
    return None
