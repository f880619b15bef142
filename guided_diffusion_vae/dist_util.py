"""Start one process per device and move tensors between them.

MPI (or torchrun, or Slurm) starts the ranks and tells each its place; from then on torch.distributed carries
everything, NCCL between GPUs and Gloo between CPUs. One process alone needs none of them: every function here then
returns what it was given.

OpenMP threads that spin while they wait take the cores of other ranks. `OMP_WAIT_POLICY=PASSIVE` ends that, but libgomp
reads it when torch is imported, so it belongs into the environment or before the first `import torch`, not here.
"""

import atexit
import contextlib
import datetime
import os
import re
import signal
import socket
import sys
import time
import traceback
from typing import NamedTuple

import torch
import torch.distributed as dist

from .files import load_tensors

RENDEZVOUS_TIMEOUT = datetime.timedelta(minutes=10)    # for all ranks to turn up
# Rank 0 may write a checkpoint, and one rank encode a large shard, while the others wait. A rank that dies does not
# need this limit: its connections break, and the launcher ends the rest.
COLLECTIVE_TIMEOUT = datetime.timedelta(hours=12)
BUCKET_MIB = 32

# Where launchers write rank, size, local rank and local size, in the order in which they are believed.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "Open MPI": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                 "OMPI_COMM_WORLD_LOCAL_SIZE"),
    "Slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
}
MPI_LAUNCHERS = ("MPICH", "Open MPI")


class LaunchError(RuntimeError):
    """Say that the ranks could not be brought together, and what to start differently."""


class RankInfo(NamedTuple):
    """Where this process stands among all; `local_rank` is None where the launcher does not tell."""

    launcher: str
    rank: int
    size: int
    local_rank: int | None


MEMORY_ADVICE = "lower --batch_size or --microbatch (with an autoencoder: set --vae_batch_size or --vae_tile)"

_active_rank_info = None  # the Place agreed on by setup_dist; until then the environment is asked


# Who am I

def read_rank_info(environ):
    """Return the Place that the launcher's variables in `environ` describe; raise LaunchError where they are wrong."""
    found = [_place_from(launcher, environ) for launcher in LAUNCHERS]
    found = [place for place in found if place is not None]
    if not found:
        return RankInfo("none", 0, 1, 0)
    first, slurm = found[0], found[-1]
    # srun hands out PMI variables too on some clusters. Where both agree, Slurm's are enough and MPI is not needed.
    if first.launcher in MPI_LAUNCHERS and slurm.launcher == "Slurm" and first[1:3] == slurm[1:3]:
        return slurm
    return first


def _place_from(launcher, environ):
    rank, size, local_rank, local_size = LAUNCHERS[launcher]
    if launcher == "Slurm":
        # A batch script itself sees SLURM_NTASKS and rank 0 without being a task: only srun sets the step's variables.
        if "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ:
            return None
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else size
    if rank not in environ or size not in environ:
        return None
    try:
        place = RankInfo(launcher, int(environ[rank]), int(environ[size]),
                      int(environ[local_rank]) if local_rank in environ else None)
    except ValueError as error:
        raise LaunchError(f"{rank}={environ[rank]!r}, {size}={environ[size]!r}: {launcher} should have set whole "
                          "numbers; unset them to run a single process") from error
    if not 0 <= place.rank < place.size:
        raise LaunchError(f"{rank}={place.rank} is not below {size}={place.size}; start the ranks with mpiexec, "
                          "torchrun or srun, or unset both to run a single process")
    return place


def _rank_info():
    return _active_rank_info or read_rank_info(os.environ)


def rank():
    """Return this process's number among all, 0 where it is alone."""
    return _rank_info().rank


def world_size():
    """Return how many processes work together, 1 where this one is alone."""
    return _rank_info().size


def local_rank():
    """Return this process's number on its machine, the number among all where nobody told."""
    place = _rank_info()
    return place.rank if place.local_rank is None else place.local_rank


def dev():
    """Return the torch.device of this rank: GPU number local rank modulo the visible ones, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return torch.device("cpu")


# Start and end

def setup_dist():
    """Bring all ranks together, report their devices and time one all-reduce; a second call does nothing.

    A process alone needs no process group and none is made. Raises LaunchError where the ranks cannot meet.
    """
    global _active_rank_info
    if _active_rank_info is not None:
        return
    place = read_rank_info(os.environ)
    if place.size > 1:
        place, store = _rendezvous(place)
    _active_rank_info = place
    if dev().type == "cuda":
        torch.cuda.set_device(dev())
    if place.size > 1:
        _connect(store)
        sys.excepthook = lambda kind, error, trace: _fail(error)  # init_process_group sets one of its own
    _report()


def _rendezvous(place):
    """Return (place, store): the Place with MPI's local rank filled in, and the store all ranks are connected to."""
    if place.launcher in MPI_LAUNCHERS:
        return _meet_through_mpi(place)
    if place.launcher == "torchrun":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise LaunchError(f"WORLD_SIZE={place.size} but {' and '.join(missing)} not set; start with torchrun, or "
                              "set them to rank 0's host and a free port")
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # torchrun's agent may already serve a store at that address; env:// knows, a second server would collide.
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            return place, _open_store(place, address, port, serve=False)
    else:
        address, port = slurm_address(os.environ)
    return place, _open_store(place, address, port, serve=place.rank == 0)


def _meet_through_mpi(place):
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(f"{place.launcher}'s mpiexec started {place.size} ranks, but mpi4py cannot be used here "
                          f"({error}); pip install mpi4py mpich, or start with torchrun --nproc_per_node N") from error
    world = MPI.COMM_WORLD
    if world.size != place.size:
        library = MPI.Get_library_version().split("\n")[0].strip()
        raise LaunchError(
            f"mpiexec ({place.launcher}) started {place.size} ranks, but mpi4py's MPI ({library}) sees {world.size}: "
            "launcher and library are of different MPIs. Use the mpiexec that belongs to mpi4py's library (for the "
            f"mpich wheel {os.path.join(os.path.dirname(sys.executable), 'mpiexec')}; `which mpiexec` shows the one "
            "in use), or build mpi4py against the system's MPI (pip install --no-binary mpi4py mpi4py), or start "
            "with torchrun --nproc_per_node N"
        )
    hosts = world.allgather(socket.gethostname())
    if place.local_rank is None:
        place = place._replace(local_rank=hosts[:world.rank].count(hosts[world.rank]))
    place = place._replace(rank=world.rank)
    meeting, store = None, None
    if world.rank == 0:
        address = os.environ.get("MASTER_ADDR") or ("127.0.0.1" if len(set(hosts)) == 1 else _own_address())
        # Port 0: the system picks a free one while binding, so that nobody can take it in between.
        store = _open_store(place, address, int(os.environ.get("MASTER_PORT", 0)), serve=True)
        meeting = address, store.port
    address, port = world.bcast(meeting)
    return place, store or _open_store(place, address, port, serve=False)


def _open_store(place, address, port, serve):
    try:
        return dist.TCPStore(address, port, place.size, serve, timeout=RENDEZVOUS_TIMEOUT, wait_for_workers=False)
    except RuntimeError as error:
        raise _rendezvous_error(place, f"{address}:{port}", error) from error


def _rendezvous_error(place, where, error):
    minutes = RENDEZVOUS_TIMEOUT.total_seconds() / 60
    reason = str(error).strip().split("\n")[0]
    return LaunchError(
        f"rank {place.rank} of {place.size} did not meet the others at {where} within {minutes:g} min ({reason}); "
        "check that all ranks were started and can reach that host, or set MASTER_ADDR and MASTER_PORT to another one"
    )


def _connect(store):
    # A group that torchrun starts anew after a failure must not read what the former one left in the store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt{attempt}", store)
    # Objects and flags travel by Gloo even between GPUs, so that asking a question never waits for the device.
    # NCCL refuses two ranks on one GPU; Gloo carries their tensors too, more slowly.
    shared = torch.cuda.is_available() and len(set(_all_devices(store))) < world_size()
    backend = "cpu:gloo,cuda:nccl" if dev().type == "cuda" and not shared else "gloo"
    try:
        dist.init_process_group(backend, store=dist.PrefixStore("group", store), rank=rank(), world_size=world_size(),
                                timeout=COLLECTIVE_TIMEOUT)
    except RuntimeError as error:
        raise _rendezvous_error(_rank_info(), "their common store", error) from error


def _all_devices(store):
    """Return "host device" of every rank, read from the store: the backend is chosen before there is a group."""
    try:
        store.set(f"device/{rank()}", f"{socket.gethostname()} {dev()}")
        return [store.get(f"device/{other}").decode() for other in range(world_size())]
    except RuntimeError as error:
        raise _rendezvous_error(_rank_info(), "their common store", error) from error


def _own_address():
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not address.startswith("127."):
        return address
    # Many systems map the own name to loopback. Connecting a datagram socket sends nothing, but picks the interface.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError as error:
            raise LaunchError(f"host {socket.gethostname()} knows no address that other hosts can reach; set "
                              "MASTER_ADDR to one") from error
        return probe.getsockname()[0]


def slurm_address(environ):
    """Return (address, port) where the tasks of a Slurm step meet: its first node, a port made from the job's id."""
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_NODELIST") or ""
    count = int(environ.get("SLURM_STEP_NUM_NODES") or environ.get("SLURM_NNODES") or 1)
    address = environ.get("MASTER_ADDR") or (first_host(nodes) if count > 1 else "127.0.0.1")
    job, step = int(environ.get("SLURM_JOB_ID", 0)), environ.get("SLURM_STEP_ID", "0")
    chosen = 20000 + (job * 16 + (int(step) if step.isdigit() else 0)) % 12000
    return address, int(environ.get("MASTER_PORT", chosen))


def first_host(nodes):
    """Return the first name of a Slurm node list: `gpu[07-09,12],login` gives `gpu07`."""
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", re.match(r"(?:[^,\[]|\[[^]]*\])*", nodes).group())


def _report():
    """Print which rank has which device, share the cores among ranks on CPUs, and time an all-reduce."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count()))
    rows = gather_objects((socket.gethostname(), str(dev()), cores))
    host, device, _ = rows[rank()]
    if len(rows) > 1 and device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        sharers = sum(row[0] == host and row[2] == cores for row in rows)  # a launcher may have bound ranks to cores
        torch.set_num_threads(max(1, len(cores) // sharers))
    if rank() == 0:
        for number, (name, where, _) in enumerate(rows):
            card = f" ({torch.cuda.get_device_name(where)})" if where != "cpu" and name == host else ""
            print(f"rank {number} of {len(rows)}: {name} {where}{card}", flush=True)
    if len(rows) > 1:
        _time_all_reduce()


def _time_all_reduce():
    ones = torch.ones(1 << 20, device=dev())
    dist.all_reduce(ones)  # the first one opens the connections
    ones.fill_(1)
    if ones.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    dist.all_reduce(ones)
    total = ones.mean().item()
    milliseconds = 1e3 * (time.perf_counter() - start)
    if total != world_size():
        raise LaunchError(f"an all-reduce of ones over {world_size()} ranks gave {total:g}; the links between the "
                          "devices do not work (try NCCL_P2P_DISABLE=1)")
    if rank() == 0:
        print(f"all-reduce of 4 MiB over {world_size()} ranks ({dist.get_backend_config()}): {milliseconds:.1f} ms",
              flush=True)


def launch(main):
    """Call `main()`, and end all ranks together: the clean way after it, at once when it raises on any rank.

    A mistake in flags, files or memory prints one line `error: ...`, anything else its traceback as well; the exit
    status is 1. GDVAE_TRACEBACK=1 prints the traceback always.
    """
    try:
        main()
        shutdown()
        _leave()
    except SystemExit as stop:
        if stop.code in (0, None):
            shutdown()
            raise
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr, flush=True)
        _end(stop.code if isinstance(stop.code, int) else 1)
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr, flush=True)
        _end(130)
    except BaseException as error:
        _fail(error)


def shutdown():
    """Wait for all ranks and close the process group."""
    if dist.is_initialized():
        barrier()
        dist.destroy_process_group()


def _leave():
    """Among several ranks, end the process in order but without unloading libraries.

    Threads of Gloo that outlive the process group abort a process that is torn down around them ("terminate called
    without an active exception"), now and then, on an idle machine.
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
    text = str(error) or type(error).__name__
    explained = isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, LaunchError))
    if is_out_of_memory(error):
        text, explained = f"out of memory; {MEMORY_ADVICE} ({text})", True
    elif "gloo/transport" in text:  # what a rank sees when another one has left
        text, explained = "another rank ended while this one waited for it; its own error says why", True
    if not explained or os.environ.get("GDVAE_TRACEBACK") == "1":
        traceback.print_exception(error)
    place = _place_at_the_end()
    which = f"rank {place.rank}: " if place.size > 1 else ""
    print(f"error: {which}{text}", file=sys.stderr, flush=True)
    _end(1)


def is_out_of_memory(error):
    """Say whether an error came of too little memory, of the GPU's or of the host's."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


@contextlib.contextmanager
def oom_advice(advise):
    """Where memory runs out inside, let the error end in advise(bytes of memory), beside the memory's own message."""
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"{advise(memory_bytes())}; {error}") from error


def memory_bytes():
    """Return how much memory the device has that this process works on."""
    if dev().type == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _place_at_the_end():
    try:
        return _rank_info()
    except LaunchError:  # the very reason why the program ends
        return RankInfo("none", 0, 1, 0)


def _end(status):
    """Leave with `status`; among several ranks without any tidying, which could wait for ranks that never come."""
    sys.stdout.flush()
    sys.stderr.flush()
    place = _place_at_the_end()
    if place.size == 1:
        raise SystemExit(status)
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and place.launcher in MPI_LAUNCHERS and mpi.Is_initialized() and mpi.COMM_WORLD.size > 1:
        time.sleep(0.5)  # mpiexec throws away on an abort what it has not passed on yet, the message above too
        mpi.COMM_WORLD.Abort(status)
    os._exit(status)


# Tensors and objects between ranks

def barrier():
    """Return when every rank has called this."""
    any_rank(False)


def any_rank(flag):
    """Return on every rank whether `flag` holds on at least one of them; does not wait for the GPU."""
    if world_size() == 1:
        return bool(flag)
    raised = torch.tensor([int(flag)])
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())


def gather_objects(item):
    """Return on every rank the list of all ranks' picklable `item`, in the order of ranks."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def broadcast_object(item, source=0):
    """Return on every rank the picklable `item` of rank `source`."""
    if world_size() == 1:
        return item
    box = [item]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def sync_params(params):
    """Copy rank 0's values of these tensors into those of all other ranks."""
    if world_size() > 1:
        _exchange([p.detach() for p in params], lambda flat: dist.broadcast(flat, 0))


def data_parallel(model, static_graph=False):
    """Return a model whose gradients are averaged over the ranks in the backward pass; with one rank the model itself.

    :param static_graph: every step uses the same parameters and synchronizes.
    """
    if world_size() == 1:
        return model
    device = next(model.parameters()).device
    # Gradients that live in the buckets are not copied there and need no memory of their own.
    return torch.nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None,
                                                     static_graph=static_graph, gradient_as_bucket_view=True)


def shard_model(model):
    """Split weights, gradients and what is made of them over the ranks (FSDP2), layer by layer; return the model.

    Entries of module lists are gathered when their turn comes and let go afterwards; the rest stays together. Its
    parameters are DTensors from then on, on this rank's device.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(dev().type, (world_size(),))
    for blocks in (m for m in model.modules() if isinstance(m, torch.nn.ModuleList)):
        for block in blocks:
            fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def full_tensor(tensor):
    """Return a tensor that may be sharded with all its values; for a sharded one all ranks call this together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distribute_like(value, tensor):
    """Return a whole tensor, the same on all ranks, sharded as another one is; inverse of `full_tensor`."""
    if not hasattr(tensor, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)


def _exchange(tensors, collective):
    """Run a collective over flat buckets of the tensors and write the results back; all ranks pass the same shapes."""
    for bucket in _buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        collective(flat)
        parts = flat.split([t.numel() for t in bucket])
        torch._foreach_copy_(bucket, [part.view(t.shape) for part, t in zip(parts, bucket)])


def _buckets(tensors):
    """Split into lists of one dtype and device, each of about BUCKET_MIB, in the same order on every rank."""
    kinds = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    buckets = []
    for alike in kinds.values():
        room = 0
        for tensor in alike:
            size = tensor.numel() * tensor.element_size()
            if size > room:
                buckets.append([])
                room = BUCKET_MIB << 20
            buckets[-1].append(tensor)
            room -= size
    return buckets


# Files

def load_state_dict(path, **kwargs):
    """Read a state dict from a local or cloud path; `kwargs` and errors are those of `files.load_tensors`."""
    return load_tensors(path, **kwargs)


# Being told to stop

class StopSignal:
    """Notice SIGTERM and SIGUSR1 without dying of them: `received` turns True, for the loop to look at after its step.

    Further signals change nothing, because torchrun and Slurm together deliver each one twice. Leaving the `with` block
    restores the former handlers. mpiexec passes both signals on to its ranks, torchrun SIGTERM alone.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self):
        self.received, self._pending = False, None

    def received_on_any_rank(self):
        """Return on every rank whether any rank had received a signal when this was called before.

        So a loop stops a step later than it could, and no step waits for the slowest rank to answer. A process that is
        alone knows at once.
        """
        if world_size() == 1:
            return self.received
        asked, raised = self._pending, torch.tensor([int(self.received)])
        self._pending = raised, dist.all_reduce(raised, op=dist.ReduceOp.MAX, async_op=True)
        if asked is None:
            return False
        asked[1].wait()
        return bool(asked[0].item())

    def __enter__(self):
        self._former = {number: signal.signal(number, self._notice) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception):
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _notice(self, number, frame):
        self.received = True
