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
# Windows lacks are hidden, torch asks for them by the system and comes first; and libraries that a user may lack.
IMPORT_ALL = """
import importlib, signal, sys
import numpy, torch
sys.modules.update(resource=None, fcntl=None)
del signal.SIGUSR1
sys.modules.update(dict.fromkeys(["mpi4py", "tensorboard", "matplotlib", "scipy", "diffusers"]))
folder, *names = sys.argv[1:]
for name in names:
    file = importlib.import_module(name).__file__
    assert file.startswith(folder), f"{name} comes from {file}"

from guided_diffusion_vae.__main__ import main
numpy.savez("images.npz", numpy.zeros([4, 8, 8, 1], numpy.uint8))
common = "--logdir run --image_size 8 --batch_size 2".split()
sys.argv = ["gdvae", "image-train", *common, *"--data_dir images.npz --max_steps 1 --num_channels 32 --channel_mult 1 "
            "--num_res_blocks 1 --attention_resolutions= --config quickstart --class_cond False".split()]
main()
sys.argv = ["gdvae", "image-sample", *common, *"--model_path run --num_samples 2 --timestep_respacing 2".split()]
main()
"""


def module_name(path):
    """Return the module name of a file below ROOT."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def run(*command, **kwargs):
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, **kwargs)
    assert process.returncode == 0, process.stdout + process.stderr
    return process


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
    run("-c", IMPORT_ALL, installed, *modules, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "OPENAI_LOG_FORMAT": "log", "OMP_NUM_THREADS": "1"})
    assert (tmp_path / "run" / "samples_2x8x8x1.npz").is_file()


def test_wheel_contains_only_the_package_and_its_command(installed):
    found = sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info")
    assert found == ["bin", PACKAGE.name] and [path.name for path in (installed / "bin").iterdir()] == ["gdvae"]


def test_wheel_contains_the_configurations(installed):
    files = {path.relative_to(ROOT / "configs"): path.read_text() for path in (ROOT / "configs").rglob("*.yaml")}
    folder = installed / PACKAGE.name / "configs"
    assert files and {path.relative_to(folder): path.read_text() for path in folder.rglob("*.yaml")} == files


@pytest.mark.parametrize("words, start", [([], "usage: gdvae COMMAND"),
                                          (["image-sample-vae"], "usage: gdvae image-sample-vae ")])
def test_installed_command_prints_help_in_another_folder(installed, words, start, tmp_path):
    done = run(installed / "bin" / "gdvae", *words, "--help", cwd=tmp_path,
               env={**os.environ, "PYTHONPATH": str(installed)})
    assert done.stdout.startswith(start) and "image-sample-vae" in done.stdout


def test_wheel_has_version_license_and_lower_bounds(installed):
    distribution, = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.metadata["Name"] == "guided-diffusion-vae"
    assert distribution.version == guided_diffusion_vae.__version__
    assert distribution.metadata["License-Expression"] == "MIT"
    # Without lower bounds, the workflow's lowest versions would be of 2006.
    tested = [line for line in distribution.requires if not re.search("extra == '(?!test|mpi)", line.replace('"', "'"))]
    assert len(tested) > 15 and [line for line in tested if ">=" not in line.partition(";")[0]] == []
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
    assert {step.get("run") for job in jobs.values() for step in job["steps"]} >= {"make test", "make lint"}


def test_version_is_a_literal_readable_without_torch():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    literals = [ast.literal_eval(node.value) for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"]
    assert literals == [guided_diffusion_vae.__version__]


def test_ruff_reports_nothing():
    pytest.importorskip("ruff")
    run("-m", "ruff", "check", "--quiet", "--no-cache", "--output-format", "concise", "guided_diffusion_vae", "scripts",
        "benchmarks", "tests", cwd=ROOT)
