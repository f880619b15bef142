"""Connect one process per device and exchange tensors and objects between them.

A launcher (MPI, torchrun or Slurm) starts the ranks and passes their rank information in environment variables. All
communication is torch.distributed's: NCCL between GPUs, Gloo between CPUs. A single process needs neither: the
functions below then return their arguments unchanged. Ranks end with their launcher, and together.

OpenMP threads that spin while they wait take cores from other ranks. `OMP_WAIT_POLICY=PASSIVE` prevents it, but libgomp
reads the variable when torch is imported: set it in the environment, it has no effect here.
"""

import atexit
import contextlib
import ctypes
import datetime
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from . import deprecated_names
from .config import option, require
from .files import load_tensors
from .launchers import (
    LAUNCHERS as LAUNCHERS, MPI_LAUNCHERS, OPEN_MPI_LIBRARY, LaunchError, RankInfo, end_with_launcher, read_rank_info,
    first_host as first_host, select_mpi_library, slurm_address,
)
from .nn import allow_tf32
from .programs import call_as_started

RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)    # until all ranks are connected
HEARTBEAT_S = 20    # between two signs of life of a rank
REPORT_S = 300      # between two reports of a rank that waits for others
BUCKET_MIB = 32     # tensors are copied into buckets of about this size: one collective per bucket, not per tensor

CUBLAS_WORKSPACES = ":4096:8", ":16:8"     # with which cuBLAS is deterministic, the faster first
TF32_HELP = ("compute float32 convolutions and matrix products on GPUs in TF32: several times as fast, but operands "
             "have 10 bits of mantissa instead of 23")


@dataclass
class LaunchConfig:
    """Options of all scripts: connection of the ranks, precision and determinism of their GPUs."""

    SECTION = "device"

    collective_timeout_minutes: float = option(
        30.0, "minutes after which a rank ends if another one does not take part in a tensor exchange or, if it waits "
              "for the work of another rank, which may take longer, gives no sign of life", above=0, maximum=10**6)
    tf32: bool = option(False, TF32_HELP)
    deterministic: bool = option(
        False, "use GPU kernels that give the same bits each time, as those of CPUs do, so that a run can be repeated "
               "and resumed bitwise; slower")


@dataclass
class FastLaunchConfig(LaunchConfig):
    """The LaunchConfig of scripts that train or sample, which differ from others in their default of `tf32`."""

    tf32: bool = option(True, TF32_HELP)


# The package raises these for flags and files, with a message that states what to change.
EXPECTED_ERRORS = ValueError, OSError, ImportError, NotImplementedError
MEMORY_ADVICE = "lower --batch_size or --microbatch (with an autoencoder: set --vae_batch_size or --vae_tile)"

# Both are set by setup_dist; until then rank and world size are read from the environment.
_active_rank_info = None
_control_group = None


# --- Rank information ---


def _rank_info():
    return _active_rank_info or read_rank_info(os.environ)


def rank():
    """Return the rank of this process, 0 for a single process."""
    return _rank_info().rank


def world_size():
    """Return the number of processes."""
    return _rank_info().size


def local_rank():
    """Return the rank of this process on its node; the global rank if the launcher does not provide it."""
    info = _rank_info()
    return info.rank if info.local_rank is None else info.local_rank


def dev():
    """Return the device of this rank: the GPU with index local rank modulo their number, else the CPU.

    A single process uses the GPU of a Mac (MPS); several ranks do not, as Gloo exchanges no tensors of it.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    if torch.backends.mps.is_available() and world_size() == 1:
        return torch.device("mps")
    return torch.device("cpu")


# --- Precision and determinism ---


def set_numerics(config: LaunchConfig) -> None:
    """Set how GPUs compute; call it before `setup_dist`, which initializes CUDA.

    :raises ValueError: if it is too late for deterministic kernels, or the environment conflicts with them.
    """
    allow_tf32(config.tf32)
    if not config.deterministic:
        return
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    default, _ = CUBLAS_WORKSPACES
    require(
        (workspace or not torch.cuda.is_initialized(), "--deterministic True was set after CUDA was initialized: "
         f"cuBLAS does not read CUBLAS_WORKSPACE_CONFIG any more; set CUBLAS_WORKSPACE_CONFIG={default} before"),
        (workspace in (None, "", *CUBLAS_WORKSPACES), f"CUBLAS_WORKSPACE_CONFIG={workspace} conflicts with "
         f"--deterministic True: expected {' or '.join(CUBLAS_WORKSPACES)}; unset it"),
    )
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace or default
    # Flash and memory-efficient attention then use their deterministic gradients; cuDNN's has none.
    torch.use_deterministic_algorithms(True)
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # No result depends on memory that was not initialized, and filling it would write every tensor twice.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def peak_memory_mib() -> dict[str, float]:
    """Return the peak memory of this process, {"host": MiB, "GPU": MiB}, as far as the system reports it."""
    peaks = {}
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10
        peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    if torch.cuda.is_initialized():
        peaks["GPU"] = torch.cuda.max_memory_allocated() / 2**20
    return peaks


def describe_numerics(config: LaunchConfig, explicit=()) -> list[str]:
    """Return lines for the log: precision and determinism of a GPU, and which of the flags set a CPU does not need."""
    if dev().type == "cuda":
        lines = ["float32 on GPUs: " + ("TF32 with 10 bits of mantissa (--tf32 False: 23 bits)" if config.tf32 else
                                        "23 bits of mantissa (--tf32 True: 10 bits, faster)")]
        return [*lines, "deterministic kernels on GPUs"] if config.deterministic else lines
    no_effect = ["--tf32 True has no effect on CPUs"] if config.tf32 and "tf32" in explicit else []
    return [*no_effect, "CPUs are deterministic without --deterministic True"] if config.deterministic else no_effect


# --- Start and end ---


def setup_dist(collective_timeout_minutes=LaunchConfig.collective_timeout_minutes):
    """Connect all ranks, print their devices and time one all-reduce; a second call has no effect.

    A single process creates no process group. A rank ends as soon as its launcher has ended.

    :param collective_timeout_minutes: see `LaunchConfig`.
    :raises LaunchError: if the launcher's variables are inconsistent or the ranks cannot connect.
    """
    global _active_rank_info
    if _active_rank_info is not None:
        return
    info = read_rank_info(os.environ)
    end_with_launcher(info)
    if info.size > 1:
        info, store = _rendezvous(info)
    _active_rank_info = info
    if dev().type == "cuda":
        torch.cuda.set_device(dev())    # NCCL, and kernels launched without a device, use the current one
    if info.size > 1:
        _connect(store, datetime.timedelta(minutes=collective_timeout_minutes))
        # Set after init_process_group, which replaces the hook by its own.
        sys.excepthook = lambda kind, error, trace: _fail(error)
    _report()


def _rendezvous(info):
    """Return (info, store): the RankInfo completed by MPI, and the store that all ranks are connected to."""
    if info.launcher in MPI_LAUNCHERS:
        return _rendezvous_through_mpi(info)
    if info.launcher == "torchrun":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise LaunchError(f"WORLD_SIZE={info.size} but {' and '.join(missing)} not set; start with torchrun, or "
                              "set them to the host of rank 0 and a free port")
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's agent may already serve a store at that address: a second server could not bind the port.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return info, _open_store(info, address, port, serve=False)
    else:
        address, port = slurm_address(os.environ)
    return info, _open_store(info, address, port, serve=info.rank == 0)


def _rendezvous_through_mpi(info):
    """Return (info, store); MPI is only used to exchange the address of the store."""
    select_mpi_library(info, os.environ)
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        remedy = f"set MPI4PY_LIBMPI to {info.launcher}'s {OPEN_MPI_LIBRARY}" if info.launcher == "Open MPI" else (
            "pip install mpi4py mpich")
        raise LaunchError(f"{info.launcher}'s mpiexec started {info.size} ranks, but mpi4py cannot be imported "
                          f"({' '.join(str(error).split())}); {remedy}, or start with torchrun --nproc_per_node N"
                          ) from error
    world = MPI.COMM_WORLD
    if world.size != info.size:
        library = MPI.Get_library_version().split("\n")[0].strip()
        raise LaunchError(
            f"mpiexec ({info.launcher}) started {info.size} ranks, but mpi4py's MPI ({library}) sees {world.size}: "
            "launcher and library belong to different MPIs; use the mpiexec of mpi4py's library (for the mpich wheel "
            f"{os.path.join(os.path.dirname(sys.executable), 'mpiexec')}; `which mpiexec` shows the one in use), "
            "set MPI4PY_LIBMPI to the library of the launcher, build mpi4py against the system's MPI (pip install "
            "--no-binary mpi4py mpi4py), or start with torchrun --nproc_per_node N"
        )
    hosts = world.allgather(socket.gethostname())
    if info.local_rank is None:
        info = info._replace(local_rank=hosts[:world.rank].count(hosts[world.rank]))
    info = info._replace(rank=world.rank)
    served_at, store = None, None
    if world.rank == 0:
        address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if len(set(hosts)) == 1 else _own_address())
        # Port 0: the system picks a free port while binding, so that no other process can take it in between.
        store = _open_store(info, address, int(os.environ.get("MASTER_PORT", 0)), serve=True)
        served_at = address, store.port
    address, port = world.bcast(served_at)
    return info, store or _open_store(info, address, port, serve=False)


def _open_store(info, address, port, serve):
    try:
        return dist.TCPStore(address, port, info.size, serve, timeout=RENDEZVOUS_TIMEOUT, wait_for_workers=False)
    except RuntimeError as error:
        raise _rendezvous_error(info, f"{address}:{port}", error) from error


def _rendezvous_error(info, location, error):
    minutes = RENDEZVOUS_TIMEOUT.total_seconds() / 60
    reason = str(error).strip().split("\n")[0]
    return LaunchError(
        f"rank {info.rank} of {info.size} did not connect to the others at {location} within {minutes:g} min "
        f"({reason}); check that all ranks were started and can reach that host, or set MASTER_ADDR and MASTER_PORT"
    )


def _connect(store, timeout):
    """Create the process group, and that of waits which may exceed its timeout."""
    global _control_group
    # A group that torchrun restarts after a failure must not read the keys of its predecessor.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt{attempt}", store)
    # Send Python objects and flags over Gloo even with GPUs: control messages must not synchronize the device.
    # NCCL does not support two ranks on one GPU; Gloo transfers their tensors, too, more slowly.
    names = [name for names in _all_devices(store) for name in names]
    shared = len(set(names)) < len(names)
    if dev().type == "cuda" and shared and rank() == 0:
        print("ranks share a GPU, so that tensors are exchanged through Gloo, which is slow; start one rank per GPU",
              flush=True)
    backend = "cpu:gloo,cuda:nccl" if dev().type == "cuda" and not shared else "gloo"
    try:
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank(), world_size=world_size(),
                                timeout=timeout)
    except RuntimeError as error:
        raise _rendezvous_error(_rank_info(), "the common store", error) from error
    _control_group = _ControlGroup(dist.PrefixStore("signs", store), timeout.total_seconds())


def _all_devices(store):
    """Return `_device_names()` of every rank, exchanged through the store: there is no group yet."""
    try:
        store.set(f"device/{rank()}", json.dumps(_device_names()))
        return [json.loads(store.get(f"device/{other}")) for other in range(world_size())]
    except RuntimeError as error:
        raise _rendezvous_error(_rank_info(), "the common store", error) from error


def _device_names():
    """Return names of the GPU of this rank that all ranks on it have, and no others; [] on a CPU.

    Its index is none: each rank may see its own GPU alone, as cuda:0. NCCL accepts one rank per PCI address, which the
    slices of a GPU (MIG) share, although each has its UUID.
    """
    if dev().type != "cuda":
        return []
    properties = torch.cuda.get_device_properties(dev())
    names = [str(properties.uuid)]
    if hasattr(properties, "pci_bus_id"):   # not in all versions of PyTorch
        address = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
        names.append(f"{socket.gethostname()} {address}")
    return names


def _own_address():
    """Return an address of this host that other hosts can reach."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not address.startswith("127."):
        return address
    # Many systems map their own name to loopback. Connecting a datagram socket sends nothing, but selects an interface:
    # that of the default route, as 192.0.2.1 is reserved for documentation (RFC 5737).
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            raise LaunchError(f"host {socket.gethostname()} has no address that other hosts can reach; set "
                              "MASTER_ADDR") from error
        return probe.getsockname()[0]


def _report():
    """Print the device of each rank, divide the cores among ranks on CPUs, and time an all-reduce."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    rows = gather_objects((socket.gethostname(), str(dev()), cores))
    host, own_device, _ = rows[rank()]
    if len(rows) > 1 and own_device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        # Ranks on this host with the same affinity; a launcher may have bound each rank to its own cores.
        sharers = sum(row[0] == host and row[2] == cores for row in rows)
        torch.set_num_threads(max(1, len(cores) // sharers))
    if rank() == 0:
        for number, (name, device, _) in enumerate(rows):
            gpu = f" ({torch.cuda.get_device_name(device)})" if device != "cpu" and name == host else ""
            print(f"rank {number} of {len(rows)}: {name} {device}{gpu}", flush=True)
    if len(rows) > 1:
        _time_all_reduce()


def _time_all_reduce():
    """Print the time of an all-reduce, which reveals a slow or broken connection before training starts."""
    ones = torch.ones(1 << 20, device=dev())
    dist.all_reduce(ones)   # not timed: the first collective opens the connections
    ones.fill_(1)
    if ones.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    dist.all_reduce(ones)
    total = ones.mean().item()
    milliseconds = 1e3 * (time.perf_counter() - start)
    if total != world_size():
        raise LaunchError(f"all-reduce of ones over {world_size()} ranks failed: expected {world_size()}, got "
                          f"{total:g}; check the links between the devices (try NCCL_P2P_DISABLE=1)")
    if rank() == 0:
        print(f"all-reduce of 4 MiB over {world_size()} ranks ({dist.get_backend_config()}): {milliseconds:.1f} ms",
              flush=True)


def launch(main):
    """Call `main()` and end all ranks together: after it returns, or as soon as it raises on any.

    Errors in flags or files and a lack of memory print one line `error: ...`, other errors their traceback, too. The
    exit status is then 1. GDVAE_TRACEBACK=1 always prints the traceback.
    """
    if hasattr(sys.stdout, "reconfigure"):      # letters that the terminal lacks are printed as \xNN, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with contextlib.suppress(StoppedBySignal):  # what was computed is saved
            main()
        shutdown()
        _leave()
    except SystemExit as stop:
        if stop.code in (0, None):
            shutdown()
            raise
        if isinstance(stop.code, str):      # sys.exit("message"), which the interpreter would print with status 1
            print(stop.code, file=sys.stderr, flush=True)
        _end(stop.code if isinstance(stop.code, int) else 1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        _end(130)
    except BaseException as error:
        _fail(error)


def shutdown():
    """Wait for all ranks and destroy the process group."""
    global _control_group
    if dist.is_initialized():
        barrier()
        _control_group.close()
        _control_group = None
        dist.destroy_process_group()


def _leave():
    """End one of several ranks: run exit handlers and flush, but do not unload libraries.

    Gloo threads that outlive the process group occasionally abort the interpreter's teardown ("terminate called without
    an active exception"). A single process returns and exits as usual.
    """
    if world_size() == 1:
        return
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _fail(error):
    """Print an error, with its traceback if it is a bug, and end this rank and the others."""
    text = re.sub(r"^\[Errno \d+\] ", "", str(error)) or type(error).__name__    # its text says the same
    expected = isinstance(error, (*EXPECTED_ERRORS, FloatingPointError, LaunchError))
    if is_out_of_memory(error):
        text, expected = f"out of memory; {MEMORY_ADVICE} ({text})", True
    elif "gloo/transport" in text and "Timed out" in text:
        text, expected = ("another rank did not take part in an exchange within --collective_timeout_minutes: it is "
                          "stopped, stuck or slow; in the last case, increase the flag"), True
    elif "gloo/transport" in text:  # Gloo's message if a connection is closed
        text, expected = "another rank ended while this one waited for it; see the error of that rank", True
    if not expected or os.environ.get("GDVAE_TRACEBACK") == "1":
        traceback.print_exception(error)
    info = _rank_info_or_single()
    prefix = f"rank {info.rank}: " if info.size > 1 else ""
    print(f"error: {prefix}{call_as_started(text)}", file=sys.stderr, flush=True)
    _end(1)


def is_out_of_memory(error):
    """Return whether the GPU or the host ran out of memory."""
    # The CPU allocator raises a plain RuntimeError that names it.
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def oom_advice(advise):
    """Add `advise(bytes of memory)` to the message if memory runs out inside the block.

    :raises torch.OutOfMemoryError: for an error of the GPU's or the CPU's allocator.
    """
    try:
        yield
    except RuntimeError as error:   # the base class of torch.OutOfMemoryError
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"{advise(memory_bytes())}; {error}") from error


def memory_bytes():
    """Return the total memory, in bytes, of the device of this process."""
    if dev().type == "cuda":
        return torch.cuda.mem_get_info()[1]
    if not hasattr(os, "sysconf"):      # Windows
        status = (ctypes.c_uint64 * 8)(64)      # MEMORYSTATUSEX: its own size in bytes, then the memory of the machine
        ctypes.windll.kernel32.GlobalMemoryStatusEx(status)
        return status[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _rank_info_or_single():
    try:
        return _rank_info()
    except LaunchError:     # possibly the error that is being reported
        return RankInfo("none", 0, 1, 0)


def _end(status):
    """Exit with `status`; with several ranks without cleanup, which could wait for ranks that have ended."""
    sys.stdout.flush()
    sys.stderr.flush()
    info = _rank_info_or_single()
    if info.size == 1:
        raise SystemExit(status)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and info.launcher in MPI_LAUNCHERS and mpi.Is_initialized() and mpi.COMM_WORLD.size > 1:
        time.sleep(0.5)     # on an abort mpiexec discards output that it has not forwarded, the error message included
        mpi.COMM_WORLD.Abort(status)
    os._exit(status)


# --- Tensors and objects between ranks ---


def barrier():
    """Return when every rank has called this, however long the others work (see `_ControlGroup`)."""
    any_rank(False)


def any_rank(flag):
    """Return on every rank whether `flag` is true on at least one; waits like `barrier`, but not for the GPU."""
    if world_size() == 1:
        return bool(flag)
    require((_control_group, "the ranks are not connected; call dist_util.setup_dist() first"), error=LaunchError)
    return _control_group.any_rank(flag)


def gather_objects(item):
    """Return on every rank the list of the picklable `item` of all ranks, ordered by rank; waits like `barrier`."""
    if world_size() == 1:
        return [item]
    barrier()
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item, source=0):
    """Return on every rank the picklable `item` of rank `source`; waits like `barrier`."""
    if world_size() == 1:
        return item
    barrier()
    box = [item]
    dist.broadcast_object_list(box, src=source)
    return box[0]


class _ControlGroup:
    """Gloo group for waits without a time limit: one rank may write a checkpoint or encode its shards for hours.

    A thread of each rank publishes a sign of life in the store. A wait fails only if a rank has given none within the
    timeout: its process is stopped, or its host unreachable. Meanwhile the first waiting rank reports which ranks are
    missing, and which function they execute.
    """

    def __init__(self, store, timeout_s):
        """Create the group and start the thread; all ranks must call this."""
        self._store, self._timeout_s = store.clone(), timeout_s
        self._interval_s, self._report_s = min(HEARTBEAT_S, timeout_s / 5), min(REPORT_S, timeout_s / 2)
        self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=365))
        self._num_waits, self._signs = 0, [""] * world_size()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._exchange_signs, daemon=True)
        self._thread.start()

    def any_rank(self, flag):
        """Return on every rank whether `flag` is true on at least one.

        :raises LaunchError: if a rank has given no sign of life within the timeout.
        """
        self._num_waits += 1
        raised = torch.tensor([int(flag)])
        work = dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        # Intervals are counted instead of reading a clock: if all ranks were suspended together, none is silent.
        waited, reported, silent = 0, 0, [0] * world_size()
        signs = self._signs
        while not self._is_done(work):
            waited += 1
            silent = [count + 1 if new == old else 0 for count, new, old in zip(silent, self._signs, signs)]
            signs = self._signs
            self._require_life(silent)
            if (waited - reported) * self._interval_s >= self._report_s:
                reported = waited
                self._report(waited * self._interval_s / 60, [sign.split(maxsplit=2) for sign in signs])
        return bool(raised.item())

    def _is_done(self, work):
        """Wait for at most one interval; return whether all ranks have arrived."""
        try:
            work.wait(datetime.timedelta(seconds=self._interval_s))
        except RuntimeError:
            if not work.is_completed():
                return False
            work.wait()     # raises if a connection broke
        return True

    def _require_life(self, silent):
        ranks = [other for other, count in enumerate(silent)
                 if count * self._interval_s > self._timeout_s and other != rank()]
        if ranks:
            raise LaunchError(f"no sign of life of {_format_ranks(ranks)} within --collective_timeout_minutes "
                              f"{self._timeout_s / 60:g}: stopped, or on an unreachable host; rerun the same command")

    def _report(self, minutes, signs):
        missing = [other for other, sign in enumerate(signs)
                   if sign and int(sign[0]) < self._num_waits and other != rank()]
        waiting = set(range(world_size())) - set(missing)
        if missing and rank() == min(waiting):
            places = "; ".join(signs[other][2] for other in missing[:8])
            print(f"rank {rank()} has waited {minutes:.1f} min for {_format_ranks(missing)} (in {places})", flush=True)

    def _exchange_signs(self):
        beat, keys = 0, [str(other) for other in range(world_size())]
        with contextlib.suppress(RuntimeError):     # rank 0, which may serve the store, has ended
            while not self._closed.wait(self._interval_s):
                beat += 1
                self._store.set(str(rank()), f"{self._num_waits} {beat} {_current_function()}")
                if self._store.check(keys):
                    self._signs = [sign.decode() for sign in self._store.multi_get(keys)]

    def close(self):
        """End the thread before the store ends; all ranks must call this."""
        self._closed.set()
        self._thread.join(self._interval_s)
        dist.all_reduce(torch.zeros(1), group=self._group)


def _format_ranks(ranks):
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{', ...' * (len(ranks) > 8)}"


def _current_function():
    """Return the function of this package that the main thread executes, such as `write_npz, npz.py line 64`."""
    frame, package = sys._current_frames().get(threading.main_thread().ident), Path(__file__).parent
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if package in path.parents and path != Path(__file__):
            return f"{frame.f_code.co_name}, {path.name} line {frame.f_lineno}"
        frame = frame.f_back
    return "a function outside of the package"


def sync_params(params):
    """Overwrite tensors of any shape with the values of rank 0."""
    if world_size() > 1:
        _exchange([p.detach() for p in params], lambda flat: dist.broadcast(flat, 0))


def data_parallel(model, static_graph=False):
    """Return the model with gradients averaged over the ranks (DDP); for a single process unchanged.

    :param model: a network, or a compiled one: PyTorch then splits its graph at the buckets of gradients, so that they
        are averaged during the backward pass, as they are with the wrappers in the opposite order.
    :param static_graph: True if every step uses the same parameters and synchronizes. Gradients of a compiled network
        would then be averaged only after its backward pass.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    # Gradients are views of the buckets: they are not copied and take no additional memory.
    return torch.nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None,
                                                     static_graph=static_graph, gradient_as_bucket_view=True)


def shard_model(model, autocast_dtype=None):
    """Shard weights, gradients and optimizer state over the ranks (FSDP2), and return the model.

    Each entry of a module list is gathered for its own forward and backward pass only, the remaining parameters for
    those of the whole model. The parameters become DTensors on the device of this rank.

    :param autocast_dtype: dtype of the autocast in which the model runs; None: none. Parameters are gathered in it,
        half the bytes of float32; shards, gradients and their sum over the ranks stay float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(dev().type, (world_size(),))
    # Autocast casts the inputs of the layers that compute in half precision, and no others.
    policy = MixedPrecisionPolicy(autocast_dtype, autocast_dtype and torch.float32, cast_forward_inputs=False)
    for blocks in (m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def full_tensor(tensor):
    """Return a sharded tensor in full (all ranks must call this), other tensors unchanged."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distribute_like(value, tensor):
    """Return the full tensor `value`, equal on all ranks, sharded like `tensor` (see `full_tensor`)."""
    if not hasattr(tensor, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def _exchange(tensors, collective):
    """Apply an in-place collective to tensors, bucket by bucket; shapes and order must agree on all ranks."""
    for bucket in _buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        collective(flat)
        parts = flat.split([t.numel() for t in bucket])
        torch._foreach_copy_(bucket, [part.view(t.shape) for part, t in zip(parts, bucket)])


def _buckets(tensors):
    """Return lists of tensors of one dtype and device, of about BUCKET_MIB, in one order on all ranks."""
    kinds = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    buckets = []
    for same_kind in kinds.values():
        room = 0    # bytes left in the last bucket; a larger tensor gets a bucket of its own
        for tensor in same_kind:
            size = tensor.numel() * tensor.element_size()
            if size > room:
                buckets.append([])
                room = BUCKET_MIB << 20
            buckets[-1].append(tensor)
            room -= size
    return buckets


# --- Files ---


def load_state_dict(path, **kwargs):
    """Return the state dict in a local or cloud file, with arguments as for `files.load_tensors`."""
    return load_tensors(path, **kwargs)


# --- Signals ---


class StoppedBySignal(KeyboardInterrupt):
    """A signal has ended a training early, whose last step is saved: raised on all ranks, so that nothing uses it.

    A command ends with status 0. In a notebook the following cells do not run.
    """


class StopSignal:
    """Context manager that records SIGTERM and SIGUSR1 in `received`, for a loop to end after its step.

    Repeated signals have no effect: torchrun and Slurm together deliver each one twice. On exit the previous handlers
    are restored. mpiexec forwards both signals to its ranks. torchrun forwards SIGTERM; SIGUSR1 ends it, and with it
    its ranks, unless it is started with --signals-to-handle.
    """

    SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))  # not on Windows

    def __init__(self):
        self.received, self._pending = False, None

    def received_on_any_rank(self):
        """Return on every rank whether any rank had received a signal at the previous call.

        The all-reduce of one call is read at the next: the loop ends one step later, but no step waits for the slowest
        rank. A single process returns `received`.
        """
        if world_size() == 1:
            return self.received
        previous, flag = self._pending, torch.tensor([int(self.received)])
        self._pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, async_op=True)
        if previous is None:
            return False
        flag, work = previous
        work.wait()
        return bool(flag.item())

    def __enter__(self):
        numbers = self.SIGNALS if threading.current_thread() is threading.main_thread() else ()     # which gets them
        self._previous_handlers = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, *exception):
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _record(self, number, frame):
        self.received = True


__getattr__ = deprecated_names("dist_util")
