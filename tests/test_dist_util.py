import copy
import ctypes
import datetime
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from guided_diffusion_vae import dist_util, launchers
from guided_diffusion_vae.dist_util import FastLaunchConfig, LaunchConfig, LaunchError, RankInfo, read_rank_info
from guided_diffusion_vae.runs.run import script
from forks import FORKS

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
VARIABLES = [name for names in launchers.LAUNCHERS.values() for name in names]


@pytest.fixture(autouse=True)
def single_process(monkeypatch):
    monkeypatch.setattr(dist_util, "_active_rank_info", None)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


# Starts two tasks with the variables of srun, through a shell that survives it.
SRUN = """
import os, subprocess, sys
for rank in "01":
    step = dict(SLURM_JOB_ID=str(os.getpid()), SLURM_STEP_ID="0", SLURM_NTASKS="2")
    subprocess.Popen(["sh", "-c", '"$0" -c "$1"; true', sys.executable, sys.argv[1]],
                     env={**os.environ, **step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank})
os.wait()
"""


def start_under(launcher, script, restarts="0", **variables):
    """Start Python source under a launcher and return the running process."""
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | as_root | variables
    command = {
        "mpiexec": [BIN / "mpiexec", "-n", "2", sys.executable, "-c", script],
        "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "--max_restarts", restarts,
                     "--no_python", sys.executable, "-c", script],
        "Open MPI": [shutil.which("mpirun.openmpi") or "mpirun.openmpi", "--oversubscribe", "-n", "2", sys.executable,
                     "-c", script],
        "srun": [sys.executable, "-c", SRUN, script],
        "python": [sys.executable, "-c", script],
    }[launcher]
    if not Path(command[0]).exists():
        pytest.skip(f"{launcher} is not installed")
    return subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_under(launcher, script, restarts="0", **variables):
    """Run Python source under a launcher and return the completed process."""
    process = start_under(launcher, script, restarts, **variables)
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()      # only if the time is over: the launcher then ends its ranks
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


EXCHANGE = """
import torch
from guided_diffusion_vae import dist_util
def main():
    dist_util.setup_dist()
    rank = dist_util.rank()
    dist_util.BUCKET_MIB = 0                                           # one bucket per tensor
    wide = torch.arange(24.).view(1, 2, 3, 4).to(memory_format=torch.channels_last) * (rank + 1)
    half = torch.full((2,), 40000. * (1 - 0.5 * rank), dtype=torch.half)
    weights = [torch.nn.Parameter(torch.full((2,), 5. + rank)), torch.full((2,), rank), wide, half]
    dist_util.sync_params(weights)
    assert (weights[0] == 5).all() and (weights[1] == 0).all() and (half == 40000).all()
    assert torch.equal(wide, torch.arange(24.).view(1, 2, 3, 4))
    assert dist_util.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert dist_util.broadcast_object(rank, source=1) == 1
    assert dist_util.any_rank(rank == 1) and not dist_util.any_rank(False)
    assert (dist_util.world_size(), dist_util.local_rank()) == (2, rank)
    dist_util.barrier()
    print("all good\\n", end="")
dist_util.launch(main)
"""


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun", "Open MPI"])
def test_two_ranks_exchange_tensors_and_objects_under_any_launcher(launcher):
    process = run_under(launcher, EXCHANGE)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("all good") == 2
    assert "rank 1 of 2" in process.stdout and "all-reduce of 4 MiB over 2 ranks" in process.stdout


FAILING = """
from guided_diffusion_vae import dist_util
def main():
    dist_util.setup_dist()
    if dist_util.rank() == 1:
        raise {error}
    dist_util.barrier()
{call}
"""


@pytest.mark.parametrize("launcher, call", [("mpiexec", "dist_util.launch(main)"), ("", "main()")])
def test_launch_exception_on_one_rank_ends_all(launcher, call):
    failing = FAILING.format(error="ValueError('--lr 0')", call=call)
    process = run_under(launcher, failing) if launcher else FORKS.run_source(failing, ranks=2)
    assert process.returncode == 1
    assert "error: rank 1: --lr 0\n" in process.stderr and "Traceback" not in process.stderr


def test_launch_rank_waiting_for_an_ended_one_names_the_cause():
    failing = FAILING.format(error="KeyError('bug')", call="dist_util.launch(main)")
    process = FORKS.run_source(failing, ranks=2)    # no launcher ends the other rank
    assert process.returncode == 1
    assert "KeyError: 'bug'" in process.stderr
    assert "rank 0: another rank ended" in process.stderr


def test_setup_dist_connects_again_after_a_torchrun_restart():
    failing_once = """
import os
from guided_diffusion_vae import dist_util
def main():
    dist_util.setup_dist()
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        raise ValueError("once")
    print(f"sum {sum(dist_util.gather_objects(1))}\\n", end="")
dist_util.launch(main)
"""
    process = run_under("torchrun", failing_once, restarts="1")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("sum 2") == 2


@pytest.mark.parametrize("launcher, number", [("torchrun", signal.SIGUSR1), ("srun", signal.SIGKILL)])
def test_rank_ends_as_soon_as_its_launcher_has_ended(launcher, number):
    process = start_under(launcher, """
import time
from guided_diffusion_vae import dist_util
dist_util.setup_dist()
print("ready\\n", end="", flush=True)
time.sleep(60)
""")
    seen = 0
    while seen < 2:     # counted, as a rank may write within the line of another one
        line = process.stdout.readline()
        assert line, "the ranks have ended"
        seen += line.count("ready")
    process.send_signal(number)
    _, err = process.communicate(timeout=20)    # returns when the ranks, which hold the pipes, have ended
    for rank in range(2):
        assert f"error: rank {rank}: ended without saving, as its launcher has ended" in err
    assert f"process {process.pid}" in err


def test_launcher_pid_ranks_without_a_launcher_have_none(monkeypatch):
    assert launchers.launcher_pid(RankInfo("none", 0, 1, 0)) is None
    assert launchers.launcher_pid(RankInfo("Slurm", 0, 1, 0)) is None
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert launchers.launcher_pid(RankInfo("torchrun", 0, 2, 0)) is None
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert launchers.launcher_pid(RankInfo("torchrun", 0, 2, 0)) == os.getppid()


def test_barrier_waits_for_ranks_that_work_but_not_for_stopped_ones():
    script = """
import os, signal, time
from guided_diffusion_vae import dist_util, nn
def main():
    dist_util.setup_dist(collective_timeout_minutes=0.035)
    if dist_util.rank() == 0:
        exec(compile("time.sleep(3)", nn.__file__, "exec"))      # a line of the package, as far as frames show
    dist_util.barrier()
    print("met\\n", end="", flush=True)
    if dist_util.rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    dist_util.barrier()
dist_util.launch(main)
"""
    process = run_under("mpiexec", script)
    assert process.returncode == 1 and process.stdout.count("met\n") == 2
    assert "rank 1 has waited 0.0 min for rank 0 (in <module>, nn.py line 1)" in process.stdout
    assert "error: rank 0: no sign of life of rank 1 within --collective_timeout_minutes 0.035" in process.stderr


def test_objects_are_exchanged_once_all_ranks_have_arrived(monkeypatch):
    calls = []
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    monkeypatch.setattr(dist_util, "barrier", lambda: calls.append("barrier"))
    for name in ("all_gather_object", "broadcast_object_list"):
        monkeypatch.setattr(dist_util.dist, name, lambda *args, name=name, **kwargs: calls.append(name))
    dist_util.gather_objects(1)
    dist_util.broadcast_object(1)
    assert calls == ["barrier", "all_gather_object", "barrier", "broadcast_object_list"]


def connect_gpus(monkeypatch, ranks):
    """Return the backend of ranks (host, index of the GPU, its UUID, PCI address), which talk through one store."""
    store, backends = dist_util.dist.HashStore(), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist_util, "world_size", lambda: len(ranks))
    monkeypatch.setattr(dist_util, "_ControlGroup", lambda *arguments: None)
    monkeypatch.setattr(dist_util, "_control_group", None)
    monkeypatch.setattr(dist_util.dist, "init_process_group", lambda backend, **options: backends.append(backend))

    def become(rank):
        host, index, uuid, address = ranks[rank]
        pci = {} if address is None else dict(pci_domain_id=0, pci_bus_id=address, pci_device_id=0)
        monkeypatch.setattr(dist_util, "rank", lambda: rank)
        monkeypatch.setattr(dist_util.socket, "gethostname", lambda: host)
        monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cuda", index))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid, **pci))

    for other in range(1, len(ranks)):
        become(other)
        store.set(f"attempt0/device/{other}", json.dumps(dist_util._device_names()))
    become(0)
    dist_util._connect(store, datetime.timedelta(minutes=3))
    return backends


NCCL, GLOO = ["cpu:gloo,cuda:nccl"], ["gloo"]


@pytest.mark.parametrize("ranks, backend", [
    pytest.param([("a", 0, "u0", 1), ("a", 1, "u1", 2)], NCCL, id="two GPUs"),
    pytest.param([("a", 0, "u0", 1), ("a", 0, "u1", 2)], NCCL, id="srun --gpus-per-task=1"),
    pytest.param([("a", 0, "u0", 1), ("b", 0, "u1", 1)], NCCL, id="two hosts, equal addresses"),
    pytest.param([("a", 0, "u0", None), ("a", 0, "u1", None)], NCCL, id="no addresses"),
    pytest.param([("a", 0, "u0", 1), ("a", 0, "u0", 1)], GLOO, id="one GPU"),
    pytest.param([("a", 0, "u0", 1), ("a", 1, "u0", 1), ("a", 0, "u1", 2)], GLOO, id="one GPU, seen as two"),
    pytest.param([("a", 0, "u0", None), ("b", 0, "u0", None)], GLOO, id="one GPU, two containers"),
    pytest.param([("a", 0, "u0", 1), ("a", 0, "u1", 1)], GLOO, id="two slices of one GPU"),
])
def test_ranks_use_nccl_if_each_has_a_gpu_of_its_own(ranks, backend, monkeypatch, capsys):
    assert connect_gpus(monkeypatch, ranks) == backend
    assert ("ranks share a GPU" in capsys.readouterr().out) == (backend == GLOO)


def test_deterministic_sets_what_pytorch_requires(numerics):
    torch.backends.cudnn.benchmark = True
    dist_util.set_numerics(LaunchConfig())
    assert not torch.are_deterministic_algorithms_enabled() and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    dist_util.set_numerics(LaunchConfig(deterministic=True))
    cudnn = torch.backends.cudnn
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert cudnn.deterministic and not cudnn.benchmark and not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.utils.deterministic.fill_uninitialized_memory


def test_deterministic_must_precede_cuda(numerics, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    dist_util.set_numerics(LaunchConfig())
    with pytest.raises(ValueError, match="--deterministic True was set after CUDA .*set CUBLAS_WORKSPACE_CONFIG=:4096"):
        dist_util.set_numerics(LaunchConfig(deterministic=True))
    assert not torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    dist_util.set_numerics(LaunchConfig(deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_deterministic_rejects_other_workspaces(numerics, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2")
    with pytest.raises(ValueError, match="CUBLAS_WORKSPACE_CONFIG=:4096:2 conflicts with --deterministic True"):
        dist_util.set_numerics(LaunchConfig(deterministic=True))


@pytest.mark.parametrize("device, config, explicit, lines", [
    ("cuda", LaunchConfig(), [], ["float32 on GPUs: 23 bits"]),
    ("cuda", FastLaunchConfig(deterministic=True), [], ["float32 on GPUs: TF32", "deterministic kernels on GPUs"]),
    ("cpu", FastLaunchConfig(), ["deterministic"], []),
    ("cpu", LaunchConfig(tf32=True), ["tf32"], ["--tf32 True has no effect on CPUs"]),
    ("cpu", LaunchConfig(deterministic=True), [], ["CPUs are deterministic without --deterministic True"]),
])
def test_log_states_precision_and_determinism(device, config, explicit, lines, monkeypatch):
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device(device))
    found = dist_util.describe_numerics(config, explicit)
    assert len(found) == len(lines) and all(line.startswith(start) for line, start in zip(found, lines))


def test_scripts_set_precision_before_they_use_a_gpu(numerics, monkeypatch, capsys):
    state = lambda: (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32,
                     torch.are_deterministic_algorithms_enabled())
    states = []
    monkeypatch.setattr(dist_util, "setup_dist", lambda minutes: states.append(state()))
    for words, options in ([], {"trains": True}), ([], {"samples": True}), ([], {}), (["--tf32", "True"], {}), (
            ["--tf32", "False", "--deterministic", "True"], {"trains": True}):
        monkeypatch.setattr(sys, "argv", ["script", *words])
        script("", **options)(lambda run: states.append(state()))()
    assert states[::2] == states[1::2]
    assert states[::2] == [(True, True, False)] * 2 + [(False, False, False), (True, True, False), (False, False, True)]
    printed = capsys.readouterr().out
    assert "--tf32 True has no effect on CPUs" in printed and "CPUs are deterministic without" in printed


def test_collective_timeout_is_that_of_the_process_group(monkeypatch):
    timeouts = []
    monkeypatch.setattr(dist_util.dist, "init_process_group", lambda *args, timeout, **kwargs: timeouts.append(timeout))
    monkeypatch.setattr(dist_util, "_ControlGroup", lambda store, timeout_s: timeouts.append(timeout_s))
    monkeypatch.setattr(dist_util, "_control_group", None)
    dist_util._connect(dist_util.dist.HashStore(), datetime.timedelta(minutes=3))
    assert timeouts == [datetime.timedelta(minutes=3), 180]


def test_any_rank_requires_connected_ranks(monkeypatch):
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    with pytest.raises(LaunchError, match=r"call dist_util.setup_dist\(\) first"):
        dist_util.any_rank(True)


def test_stop_signal_ends_all_ranks_at_the_same_step():
    script = """
import os, signal
from guided_diffusion_vae import dist_util
def main():
    dist_util.setup_dist()
    with dist_util.StopSignal() as stop:
        for step in range(9):
            if step == dist_util.rank() + 3:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.received_on_any_rank():
                return print(f"stopped after {step}\\n", end="")
dist_util.launch(main)
"""
    process = FORKS.run_source(script, ranks=2)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("stopped after 4") == 2


def test_setup_dist_single_process_does_not_import_mpi4py():
    process = FORKS.run_source("""
import sys
from guided_diffusion_vae import dist_util
dist_util.setup_dist()
dist_util.barrier()
assert "mpi4py" not in sys.modules and not dist_util.dist.is_initialized()
print(dist_util.dev())
""")
    assert process.returncode == 0, process.stderr


def test_setup_dist_rejects_the_launcher_of_another_mpi():
    process = run_under("python", "from guided_diffusion_vae import dist_util; dist_util.launch(dist_util.setup_dist)",
                   PMI_RANK="0", PMI_SIZE="2")
    assert process.returncode == 1
    assert "started 2 ranks, but mpi4py" in process.stderr and "torchrun" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("environ, info", [
    ({}, RankInfo("none", 0, 1, 0)),
    (dict(RANK=3, WORLD_SIZE=4, LOCAL_RANK=1, PMI_RANK=0, PMI_SIZE=1), RankInfo("torchrun", 3, 4, 1)),
    (dict(PMI_RANK=1, PMI_SIZE=2, MPI_LOCALRANKID=1), RankInfo("MPICH", 1, 2, 1)),
    (dict(PMI_RANK=1, PMI_SIZE=2), RankInfo("MPICH", 1, 2, None)),
    (dict(OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2, OMPI_COMM_WORLD_LOCAL_RANK=0), RankInfo("Open MPI", 1, 2, 0)),
    (dict(SLURM_PROCID=5, SLURM_NTASKS=8, SLURM_LOCALID=1), RankInfo("Slurm", 5, 8, 1)),
    # mpiexec inside a Slurm step with one task per node; srun that sets PMI variables, too; a batch script, not a task
    (dict(PMI_RANK=3, PMI_SIZE=4, SLURM_PROCID=0, SLURM_NTASKS=2, SLURM_LOCALID=0), RankInfo("MPICH", 3, 4, None)),
    (dict(PMI_RANK=3, PMI_SIZE=4, SLURM_PROCID=3, SLURM_NTASKS=4, SLURM_LOCALID=1), RankInfo("Slurm", 3, 4, 1)),
    (dict(SLURM_PROCID=0, SLURM_NTASKS=4, SLURM_LOCALID=0, SLURM_JOB_ID=7), RankInfo("none", 0, 1, 0)),
    (dict(SLURM_PROCID=1, SLURM_NTASKS=4, SLURM_LOCALID=0, SLURM_JOB_ID=7, SLURM_STEP_ID=0, SLURM_STEP_NUM_TASKS=2),
     RankInfo("Slurm", 1, 2, 0)),
])
def test_read_rank_info_reads_the_variables_of_the_launcher(environ, info):
    assert read_rank_info({name: str(value) for name, value in environ.items()}) == info


def test_select_mpi_library_follows_the_launcher_and_the_user():
    unset, library, abi = {}, {"MPI4PY_LIBMPI": "libmine.so"}, {"MPI4PY_MPIABI": "openmpi"}
    for environ in (unset, library, abi):
        launchers.select_mpi_library(RankInfo("Open MPI", 0, 2, 0), environ)
    launcher = Path(os.readlink(f"/proc/{os.getppid()}/exe"))
    assert unset == {"MPI4PY_LIBMPI": f"{launcher.parents[1]}/lib/libmpi.so.40:libmpi.so.40"}
    assert library == {"MPI4PY_LIBMPI": "libmine.so"} and abi == {"MPI4PY_MPIABI": "openmpi"}
    launchers.select_mpi_library(RankInfo("MPICH", 0, 2, 0), mpich := {})
    assert mpich == {}


def test_read_rank_info_rejects_invalid_variables():
    with pytest.raises(LaunchError, match="RANK=4 is not below WORLD_SIZE=4"):
        read_rank_info({"RANK": "4", "WORLD_SIZE": "4"})
    with pytest.raises(LaunchError, match="WORLD_SIZE='two': expected integers"):
        read_rank_info({"RANK": "0", "WORLD_SIZE": "two"})


def test_launch_reports_invalid_variables(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "4")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit):
        dist_util.launch(dist_util.setup_dist)
    assert capsys.readouterr().err.startswith("error: RANK=4 is not below")


def test_setup_dist_torchrun_requires_an_address(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        dist_util.setup_dist()


@pytest.mark.parametrize("nodes, host", [
    ("gpu[07-09,12],login", "gpu07"), ("a,b", "a"), ("n1", "n1"), ("r[1-2]n[3,5]", "r1n3"),
])
def test_first_host_expands_a_slurm_node_list(nodes, host):
    assert launchers.first_host(nodes) == host


def test_slurm_address_of_one_node_is_loopback():
    one = {"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "1", "SLURM_NNODES": "1", "SLURM_NODELIST": "gpu7"}
    two = one | {"SLURM_NNODES": "2", "SLURM_NODELIST": "gpu[7-8]"}
    assert launchers.slurm_address(one) == ("127.0.0.1", 20193)
    assert launchers.slurm_address(two) == ("gpu7", 20193)
    assert launchers.slurm_address(two | {"MASTER_ADDR": "ib7", "MASTER_PORT": "5"}) == ("ib7", 5)


def test_single_process_gets_its_arguments_back(capsys):
    dist_util.setup_dist()
    dist_util.setup_dist()
    tensor = torch.arange(3.0)
    dist_util.sync_params([tensor])
    assert torch.equal(tensor, torch.arange(3.0))
    assert dist_util.gather_objects(1) == [1] and dist_util.broadcast_object(2) == 2
    assert dist_util.any_rank(1) is True and dist_util.any_rank(False) is False
    assert (dist_util.rank(), dist_util.world_size(), dist_util.local_rank()) == (0, 1, 0)
    assert capsys.readouterr().out.count("rank 0 of 1") == 1


def test_dev_wraps_around_the_visible_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    assert dist_util.dev() == torch.device("cuda", 1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,6"


def test_dev_of_a_single_process_is_the_gpu_of_a_mac(monkeypatch, one_process):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert dist_util.dev() == torch.device("mps")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert dist_util.dev() == torch.device("cpu")


def test_buckets_contain_one_dtype_and_all_tensors(monkeypatch):
    monkeypatch.setattr(dist_util, "BUCKET_MIB", 1)
    tensors = [torch.zeros(size) for size in (1 << 17, 1 << 17, 1 << 19, 1)]
    tensors.insert(1, torch.zeros(3, dtype=torch.half))
    sizes = [[t.numel() for t in bucket] for bucket in dist_util._buckets(tensors)]
    assert sizes == [[1 << 17, 1 << 17], [1 << 19], [1], [3]]


@pytest.fixture
def group_of_one(monkeypatch):
    """Connect this process alone through Gloo; `dist_util` counts two ranks, so that it wraps networks."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(dist_util, "_active_rank_info", RankInfo("none", 0, 2, 0))
    yield
    torch.distributed.destroy_process_group()


class Linear(torch.nn.Linear):
    """A layer that records the dtypes of its input and of the weight it computes with."""

    def forward(self, x):
        self.dtypes = x.dtype, self.weight.dtype
        return super().forward(x)


class Layers(torch.nn.Module):
    """A chain of layers in a list."""

    def __init__(self, count, width):
        super().__init__()
        self.layers = torch.nn.ModuleList(Linear(width, width) for _ in range(count))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_sharded_parameters_are_gathered_in_the_dtype_of_autocast(group_of_one, monkeypatch):
    monkeypatch.setattr(dist_util, "world_size", lambda: 1)
    reference, x = Layers(2, 8), torch.randn(4, 8)
    model = copy.deepcopy(reference)
    dist_util.shard_model(model, torch.bfloat16)
    for network in (reference, model):
        with torch.autocast("cpu", torch.bfloat16):
            network(x).float().square().mean().backward()
    assert [layer.dtypes[1] for layer in reference.layers] == [torch.float32] * 2
    assert model.layers[0].dtypes == (torch.float32, torch.bfloat16) and model.layers[1].dtypes[1] == torch.bfloat16
    for expected, p in zip(reference.parameters(), model.parameters()):
        assert p.dtype == p.grad.dtype == torch.float32
        torch.testing.assert_close(dist_util.full_tensor(p.grad), expected.grad, rtol=2e-2, atol=1e-3)


def test_compiled_network_averages_gradients_during_its_backward_pass(group_of_one, monkeypatch):
    torch.manual_seed(0)
    model = Layers(3, 640)      # the first bucket of DDP has 1 MiB, each layer 1.6
    network = dist_util.data_parallel(torch.compile(model, backend="aot_eager", dynamic=False))
    ready, exchanged = [], []

    def exchange(_, bucket):
        exchanged.append(len(ready))
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    network.register_comm_hook(None, exchange)
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(ready.append)
    for _ in range(2):
        ready.clear(), exchanged.clear()
        network(torch.randn(2, 640)).sum().backward()
    assert len(ready) == 6 and exchanged[0] < 6 and exchanged == sorted(exchanged)


@pytest.mark.parametrize("error, message", [
    (ValueError("--batch_size 0"), "error: --batch_size 0\n"),
    (FileNotFoundError("x.pt does not exist"), "error: x.pt does not exist\n"),
])
def test_launch_user_errors_are_one_line(error, message, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.delenv("GDVAE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as stop:
        dist_util.launch(main)
    assert stop.value.code == 1 and capsys.readouterr().err == message
    monkeypatch.setenv("GDVAE_TRACEBACK", "1")
    with pytest.raises(SystemExit):
        dist_util.launch(main)
    assert "Traceback" in capsys.readouterr().err


def test_launch_escapes_letters_that_the_terminal_lacks(monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    dist_util.launch(lambda: print("Fréchet"))
    terminal.seek(0)
    assert terminal.read() == "Fr\\xe9chet\n"


def test_memory_of_a_machine_without_sysconf_is_that_of_windows(monkeypatch):
    monkeypatch.setattr(dist_util, "dev", lambda: torch.device("cpu"))
    assert dist_util.memory_bytes() > 2**28

    def global_memory_status(status):
        assert len(bytes(status)) == status[0] == 64    # its first entry
        status[0], status[1] = 64 | 37 << 32, 12345     # with the load in percent; then the memory
        return 1

    kernel = SimpleNamespace(kernel32=SimpleNamespace(GlobalMemoryStatusEx=global_memory_status))
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(ctypes, "windll", kernel, raising=False)
    assert dist_util.memory_bytes() == 12345


def test_launch_out_of_memory_names_the_flags_that_bound_it(capsys):
    def main():
        raise torch.OutOfMemoryError("1 GiB")

    with pytest.raises(SystemExit):
        dist_util.launch(main)
    hint = "lower --batch_size or --microbatch (with an autoencoder: set --vae_batch_size or --vae_tile)"
    assert capsys.readouterr().err == f"error: out of memory; {hint} (1 GiB)\n"


@pytest.mark.parametrize("reason, message", [
    ("Timed out waiting 1800000ms for recv operation to complete", "--collective_timeout_minutes: it is stopped"),
    ("Connection closed by peer [127.0.0.1]:15771", "another rank ended while this one waited for it"),
])
def test_launch_explains_a_failed_exchange(reason, message, capsys):
    def main():
        raise RuntimeError(f"[gloo/gloo/transport/tcp/unbound_buffer.cc:129] {reason}")

    with pytest.raises(SystemExit):
        dist_util.launch(main)
    printed = capsys.readouterr().err
    assert message in printed and "Traceback" not in printed


def test_scripts_pass_the_collective_timeout(monkeypatch):
    minutes = []
    monkeypatch.setattr(dist_util, "setup_dist", minutes.append)
    monkeypatch.setattr(sys, "argv", ["script"])
    script("")(lambda run: None)()
    monkeypatch.setattr(sys, "argv", ["script", "--collective_timeout_minutes", "90"])
    script("")(lambda run: None)()
    assert minutes == [30, 90]


def test_launch_bugs_print_a_traceback(capsys):
    with pytest.raises(SystemExit):
        dist_util.launch(lambda: {}["x"])
    assert "Traceback" in (printed := capsys.readouterr().err) and printed.endswith("error: 'x'\n")


@pytest.mark.parametrize("code, status", [(0, 0), (None, None), (3, 3), ("below the threshold", 1)])
def test_launch_preserves_the_exit_status(code, status):
    with pytest.raises(SystemExit) as stop:
        dist_util.launch(lambda: sys.exit(code))
    assert stop.value.code == status


def test_stop_signal_is_recorded_and_the_handler_restored():
    previous = signal.getsignal(signal.SIGUSR1)
    with dist_util.StopSignal() as stop:
        assert not stop.received
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.received
    assert signal.getsignal(signal.SIGUSR1) is previous


def test_load_state_dict_reads_only_tensors(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    assert torch.equal(dist_util.load_state_dict(tmp_path / "w.pt", map_location="cpu")["w"], torch.ones(2))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        dist_util.load_state_dict(tmp_path / "none.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "w.pt").read_bytes()[:400])
    with pytest.raises(ValueError, match="corrupt or truncated"):
        dist_util.load_state_dict(tmp_path / "short.pt")
    (tmp_path / "empty.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="corrupt or truncated"):
        dist_util.load_state_dict(tmp_path / "empty.pt")
    torch.save({"w": Path("x")}, tmp_path / "path.pt")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(print, protocol=2))
    for name in ("path.pt", "evil.pt"):
        with pytest.raises(ValueError, match="weights_only"):
            dist_util.load_state_dict(tmp_path / name)
