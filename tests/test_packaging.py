"""The wheel contains every module, the version and the license; ruff reports nothing."""

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import guided_diffusion_vae

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "guided_diffusion_vae"
# Check the file of each module: an editable install may provide modules that the wheel lacks. Modules and signals that
# Windows lacks are hidden. torch asks for them by the system, so it comes first.
IMPORT_ALL = """
import importlib, signal, sys
import torch
sys.modules.update(resource=None, fcntl=None)
del signal.SIGUSR1
folder, *names = sys.argv[1:]
for name in names:
    file = importlib.import_module(name).__file__
    assert file.startswith(folder), f"{name} comes from {file}"
"""


def module_name(path):
    """Return the module name of a file below ROOT."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def run(*command, **kwargs):
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, **kwargs)
    assert process.returncode == 0, process.stdout + process.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return an empty folder with the installed wheel of a copy of the files that git tracks or would add."""
    if not (shutil.which("git") and all(map(importlib.util.find_spec, ("pip", "setuptools")))):
        pytest.skip("no git, pip or setuptools")
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("no git checkout")
    work = tmp_path_factory.mktemp("wheel")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():     # the index also lists deleted files
            (work / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, work / "copy" / name)
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", work,
        work / "copy")
    wheel, = work.glob("*.whl")
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--target", work / "site", wheel)
    return work / "site"


def test_wheel_contains_every_module_importable(installed, tmp_path):
    modules = sorted(map(module_name, PACKAGE.rglob("*.py")))
    run("-c", IMPORT_ALL, installed, *modules, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)})


def test_wheel_contains_only_the_package(installed):
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == [PACKAGE.name]


def test_wheel_has_version_and_license(installed):
    distribution, = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.metadata["Name"] == "guided-diffusion-vae"
    assert distribution.version == guided_diffusion_vae.__version__
    assert distribution.metadata["License-Expression"] == "MIT"
    assert distribution.read_text("licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_wheel_is_typed(installed):
    assert (installed / PACKAGE.name / "py.typed").is_file()


def test_citation_has_version_and_license():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], citation["license"]) == (guided_diffusion_vae.__version__, "MIT")


def test_workflow_covers_the_supported_versions_and_names_files_that_exist():
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
    jobs = yaml.safe_load(workflow)["jobs"]
    requires = re.search(r'requires-python = ">=(.+?)"', (ROOT / "pyproject.toml").read_text()).group(1)
    assert jobs["linux"]["strategy"]["matrix"]["python"][0] == requires
    assert all((ROOT / name).is_file() for name in re.findall(r"tests/\w+\.py", workflow))


def test_version_is_a_literal_readable_without_torch():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    literals = [ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"]
    assert literals == [guided_diffusion_vae.__version__]


def test_ruff_reports_nothing():
    pytest.importorskip("ruff")
    run("-m", "ruff", "check", "--quiet", "--no-cache", "--output-format", "concise", "guided_diffusion_vae", "scripts",
        "benchmarks", "tests", cwd=ROOT)
