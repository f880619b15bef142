"""The recorded numbers of the reference implementation, and that no passage was copied; skipped without ../shared."""

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
def verdicts():
    """Replay all groups in one process; return {case: line of its verdict}."""
    if not PARITY.exists():
        pytest.skip("no recorded numbers here")
    done = run(str(PARITY), *(word for group in GROUPS for word in ("--only", f"{group}/")))
    lines = re.findall(r"^(?:PASS|FAIL) .*$", done.stdout, re.MULTILINE)
    assert lines, done.stdout + done.stderr
    return {re.split("[ :]", line)[1]: line for line in lines}


@pytest.mark.parametrize("group", GROUPS)
def test_the_numbers_are_those_of_the_reference(verdicts, group):
    if group == "diffusers_vae" and importlib.util.find_spec("diffusers") is None:
        pytest.skip("no diffusers")
    mine = [case for case in verdicts if case.startswith(f"{group}/") and not of_a_script_to_come(case)]
    assert mine and [verdicts[case] for case in mine if not verdicts[case].startswith("PASS")] == []


def of_a_script_to_come(case):
    script = case.partition("factories/script_")[2]
    return bool(script) and not (ROOT / "scripts" / f"{script}.py").exists()


def test_no_group_is_forgotten(verdicts):
    manifests = {path.stem for path in PARITY.parent.glob("*.json")}
    assert manifests == set(GROUPS)


def test_no_passage_coincides_with_the_reference():
    if not ORIGINALITY.exists():
        pytest.skip("no digests here")
    done = run(str(ORIGINALITY), "guided_diffusion_vae", "scripts")
    assert re.match(r"0 of \d+ runs coincide", done.stdout), done.stdout + done.stderr
