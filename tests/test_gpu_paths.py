"""Without a GPU: steps do not mix devices, and the host neither reads from the GPU nor waits for copies to it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu_paths import SCENARIOS

FOLDER = Path(__file__).parent
pytestmark = pytest.mark.skipif(sys.platform != "linux" or torch.version.cuda is not None,
                                reason="the device is registered in a build of torch for Linux that has none")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The compiled device of steps with a backward pass, "" without a C++ compiler."""
    path = tmp_path_factory.mktemp("library") / "fake_cuda.so"
    headers = Path(torch.__file__).parent / "include"
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler):
        return ""
    done = subprocess.run([compiler, "-std=c++20", "-shared", "-fPIC", f"-I{headers}", FOLDER / "fake_cuda.cpp", "-o",
                           path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return str(path)


@pytest.fixture(scope="module")
def faults(library):
    """{scenario: faults}, found in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, FOLDER / "fake_cuda.py", *filter(None, [library])], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


@pytest.mark.parametrize("name", SCENARIOS)
def test_step_does_not_wait_for_the_device(faults, library, name):
    _, backward, known = SCENARIOS[name]
    if backward and not library:
        pytest.skip("a backward pass requires a C++ compiler")
    assert [fault for fault in faults[name] if not (known and re.match(known, fault))] == []
    assert faults[name] or not known
