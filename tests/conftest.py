import contextlib
import importlib.util
import os
import stat
import sys
import threading
from pathlib import Path

import pytest

# Bits and recorded numbers are those of CPUs, on a machine with a GPU, too.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
if "PYTEST_XDIST_WORKER" in os.environ:     # the other cores run tests, too
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

from guided_diffusion_vae import dist_util, logger
from forks import FORKS, LAUNCHER_NAMES

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def forks():
    """Processes for scripts on several ranks that share one import of the package."""
    yield FORKS
    FORKS.close()


@pytest.fixture
def one_process(monkeypatch):
    """Remove variables of launchers and logging from the environment; reset rank information and logger afterwards."""
    for name in (*LAUNCHER_NAMES, "OPENAI_LOGDIR", "OPENAI_LOG_FORMAT", "GDVAE_TRACEBACK"):
        monkeypatch.delenv(name, raising=False)
    yield
    dist_util._active_rank_info = None
    logger.reset()


@pytest.fixture
def numerics(monkeypatch):
    """Restore the settings of PyTorch that `dist_util.set_numerics` changes; start without TF32 and determinism."""
    cudnn, cuda = torch.backends.cudnn, torch.backends.cuda
    before = (cudnn.allow_tf32, cuda.matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark,
              torch.utils.deterministic.fill_uninitialized_memory, cuda.cudnn_sdp_enabled())
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn.allow_tf32 = cuda.matmul.allow_tf32 = False
    yield
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    torch.use_deterministic_algorithms(False)
    (cudnn.allow_tf32, cuda.matmul.allow_tf32, cudnn.deterministic, cudnn.benchmark,
     torch.utils.deterministic.fill_uninitialized_memory, sdp) = before
    cuda.enable_cudnn_sdp(sdp)


def to_words(flags):
    """Return the words of a command line that sets flags."""
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run main() of a script in this process; return (exit status, standard output, standard error)."""
    def call(script, **flags):
        spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *to_words(flags)])
        monkeypatch.setattr(dist_util, "_active_rank_info", None)
        status = 0
        try:
            dist_util.launch(module.main)
        except SystemExit as stop:
            status = stop.code
        logger.reset()
        return (status, *capsys.readouterr())
    return call


@pytest.fixture
def yaml_file(tmp_path):
    """Write text to a YAML file and return its path."""
    def write(text, name="file.yaml"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)
    return write


@pytest.fixture
def named_pipe():
    """Create named pipes and check that none is opened for reading, which waits only briefly here."""
    paths, opened, done = [], [], threading.Event()

    def release_readers():
        while not done.wait(0.05):
            for path in paths:
                with contextlib.suppress(OSError):  # no reader waits
                    with open(os.open(path, os.O_WRONLY | os.O_NONBLOCK), "wb") as stream:
                        if stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):    # else a file has replaced it
                            opened.append(path)

    def create(path):
        os.mkfifo(path)
        paths.append(path)
        return path

    thread = threading.Thread(target=release_readers)
    thread.start()
    yield create
    done.set()
    thread.join()
    assert opened == []
