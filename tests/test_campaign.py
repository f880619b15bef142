"""The short form of the fault campaign, and that the campaign notices what it looks for."""

import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import corruption
from corruption import Failure, Format

ROOT = Path(__file__).parents[1]


def test_short_campaign_finds_no_fault():
    process = subprocess.run([sys.executable, ROOT / "tests" / "campaign.py"], capture_output=True, text=True,
                             env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=500)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "kills/train" in process.stdout and "mutations/yaml" in process.stdout


def read_carelessly(path):
    """Read bytes, with a fault for some values of the first one."""
    content = path.read_bytes()
    faults = {
        1: lambda: {}["missing"],
        2: lambda: np.load(path.parent / "nothing.npy"),
        3: lambda: int("nothing"),
        4: lambda: os.kill(os.getpid(), signal.SIGKILL),
        5: lambda: time.sleep(60),
        6: lambda: mmap.mmap(-1, 2**27).write(bytes(2**27)),    # not from the memory that malloc keeps
    }
    faults.get(content[0], lambda: None)()
    return content


@pytest.fixture
def root(tmp_path):
    for name in ("source", "cases", "work"):
        (tmp_path / name).mkdir()
    (tmp_path / "source" / "file").write_bytes(b"\0" * 8)
    return tmp_path


@pytest.mark.parametrize("first, checksum, result", [
    (0, True, "harmless"), (9, False, "accepted"), (2, True, "rejected"), (9, True, "unnoticed: file"),
    (1, True, "KeyError: 'missing'"), (3, True, "error without file: ValueError"),
])
def test_assess_distinguishes_results(root, first, checksum, result):
    path = root / "source" / "file"
    expected = corruption.digest(path.read_bytes())
    path.write_bytes(bytes([first]) + b"\0" * 7)
    kind = Format("source", "*", read_carelessly, checksum)
    if ":" not in result:
        assert corruption.assess(kind, path, expected) == result
        return
    with pytest.raises(Failure, match=f"^{result}"):
        corruption.assess(kind, path, expected)


class Chosen:
    """Random numbers of a case whose name ends in the first byte to write."""

    def __init__(self, seed, name):
        self.first = int(name.partition("#")[2])

    def integers(self, high):
        return 0


def set_first(content, rng):
    content[0] = rng.first


def test_corrupt_all_continues_after_a_crash_a_hang_and_a_large_allocation(root, monkeypatch):
    monkeypatch.setattr(corruption, "fork", os.fork)    # pytest may have threads, whose locks this reader does not use
    monkeypatch.setattr(corruption, "HANG_S", 2)
    monkeypatch.setattr(corruption, "MEMORY_MIB", 64)
    monkeypatch.setattr(corruption, "keyed_rng", Chosen)
    names, kind = [f"mutations/x#{first}" for first in (0, 4, 5, 6, 1, 9)], Format("source", "*", read_carelessly)
    results = list(corruption.corrupt_all(root, 0, kind, names, [set_first]))
    assert [name for name, *_ in results] == names
    failures = [failure.partition(":")[0] for _, failure, _ in results]
    assert failures == ["", "crash", "hang", "memory", "KeyError", ""]
    assert [note for *_, note in results] == ["harmless", "", "", "accepted", "", "accepted"]
    assert sorted(path.name for path in (root / "cases").iterdir()) == ["mutations-x#1-file", "mutations-x#6-file"]
