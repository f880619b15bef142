"""Run scripts in forks of one process that has imported the package: importing torch takes seconds per process.

`Forks.run` starts this file as a server. It executes the scripts once, without their `main`. For each request it forks
one process per rank, which finds the others as a task of `srun` does. What depends on a launcher is tested under it.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from guided_diffusion_vae.launchers import LAUNCHERS

ROOT = Path(__file__).parents[1]
LAUNCHER_NAMES = [name for names in LAUNCHERS.values() for name in names]
# What commands import when they use it, beside the package: optimizers, logs, figures, pages and solvers.
PRELOADED = ("torch._dynamo", "torch.utils.tensorboard", "matplotlib.figure", "matplotlib.backends.backend_agg",
             "jinja2", "scipy.stats", "diffusers.schedulers.scheduling_dpmsolver_multistep")


class Forks:
    """Client of the server, which is started by the first `run`."""

    def __init__(self):
        self.server = None

    def run_source(self, source, *arguments, **options):
        """Run Python source like a script."""
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "script.py"
            script.write_text(source)
            return self.run([script, *arguments], **options)

    def run(self, words, ranks=1, environ=None, cwd=None, timeout=240):
        """Run a script (path, *arguments) on `ranks` ranks; return the CompletedProcess.

        Its environment is `environ`, by default this process's, with one thread per rank. The status is 0, or that of
        the first rank that failed; of a rank killed by a signal, minus its number.
        """
        environ = {name: value for name, value in (environ or os.environ).items()
                   if name not in LAUNCHER_NAMES and not name.startswith(("SLURM_", "MASTER_"))}
        environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        if self.server is None:
            self.server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           env=environ, text=True, start_new_session=True)
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / name for name in ("stdout", "stderr")]
            request = {"words": [str(word) for word in words], "ranks": ranks, "environ": environ,
                       "cwd": str(cwd or os.getcwd()), "files": [str(path) for path in files]}
            print(json.dumps(request), file=self.server.stdin, flush=True)
            if not select.select([self.server.stdout], [], [], timeout)[0]:
                self.close()
                raise subprocess.TimeoutExpired(words, timeout)
            status = int(self.server.stdout.readline())
            return subprocess.CompletedProcess(words, status, *(path.read_text() for path in files))

    def close(self):
        """End the server, and with it all ranks that run."""
        if self.server is not None:
            os.killpg(self.server.pid, signal.SIGKILL)
            self.server.communicate()
            self.server = None


def free_port():
    """Return a port that no process uses: those of two servers, by their process ids, could coincide."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve():
    """Answer requests, one line each, by a status; return the script in each fork, None at the end."""
    for step, line in enumerate(sys.stdin):
        request, status, port = json.loads(line), 0, free_port()
        for rank in range(request["ranks"]):
            if not os.fork():
                return become_rank(request, step, rank, port)
        for _ in range(request["ranks"]):
            _, ended = os.wait()
            status = status or os.waitstatus_to_exitcode(ended)
        print(status, flush=True)
    return None


def become_rank(request, step, rank, port):
    """Turn this process into a rank: output, environment and arguments are those of the request."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(request["files"], 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environ"])
    if request["ranks"] > 1:
        task = {"JOB_ID": os.getppid(), "STEP_ID": step, "NTASKS": request["ranks"], "PROCID": rank, "LOCALID": rank}
        os.environ.update({f"SLURM_{name}": str(value) for name, value in task.items()}, MASTER_PORT=str(port))
    sys.argv = request["words"]
    return sys.argv[0]


FORKS = Forks()     # of a test session, which closes it


if __name__ == "__main__":
    for path in sorted((ROOT / "scripts").glob("*.py")):
        runpy.run_path(str(path))
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("a process with several threads cannot be forked: an import has started one")
    gc.freeze()     # else each fork copies and visits all objects of the imports when it ends
    script = serve()
    if script:
        sys.path[0] = str(Path(script).parent)
        runpy.run_path(script, run_name="__main__")
