"""Parity with recorded numbers of the reference implementation, and originality; skipped without ../shared."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PARITY, ORIGINALITY = ROOT.parent / "shared/parity/check.py", ROOT.parent / "shared/originality/check.py"
GROUPS = ("autoencoder", "diffusers_vae", "factories", "functions", "images", "process", "resampling", "respacing",
          "sampling", "schedules", "training", "unet", "variants")


def run(*command):
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *command]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def results():
    """Replay all groups in one process; return {case: line with its result}."""
    if not PARITY.exists():
        pytest.skip("no recorded numbers")
    process = run(str(PARITY), *(word for group in GROUPS for word in ("--only", f"{group}/")))
    lines = re.findall(r"^(?:PASS|FAIL) .*$", process.stdout, re.MULTILINE)
    assert lines, process.stdout + process.stderr
    return {re.split("[ :]", line)[1]: line for line in lines}


@pytest.mark.parametrize("group", GROUPS)
def test_parity_with_the_reference(results, group):
    if group == "diffusers_vae" and importlib.util.find_spec("diffusers") is None:
        pytest.skip("no diffusers")
    cases = [case for case in results if case.startswith(f"{group}/") and not needs_missing_script(case)]
    assert cases and [results[case] for case in cases if not results[case].startswith("PASS")] == []


def needs_missing_script(case):
    script = case.partition("factories/script_")[2]
    return bool(script) and not (ROOT / "scripts" / f"{script}.py").exists()


def test_parity_covers_every_recorded_group(results):
    manifests = {path.stem for path in PARITY.parent.glob("*.json")}
    assert manifests == set(GROUPS)


def test_originality_finds_no_coincidence():
    if not ORIGINALITY.exists():
        pytest.skip("no digests")
    process = run(str(ORIGINALITY), "guided_diffusion_vae", "scripts")
    assert re.match(r"0 of \d+ runs coincide", process.stdout), process.stdout + process.stderr
