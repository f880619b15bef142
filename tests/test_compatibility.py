"""Runs, caches and samples of commit 07e6ab7 load, go on bit for bit and sample the same; see data/old_runs/README.md.

The scripts are started as on a command line, with flags and YAML as they were spelled then, so that nothing here
depends on a name inside the package.
"""

import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[1]
ARCHIVE = Path(__file__).parent / "data" / "old_runs" / "old_runs.tar.xz"
# Every x86 processor then adds in one order; the archive was made with these.
ONE_ARITHMETIC = {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41",
                  "MKL_CBWR": "COMPATIBLE", "CUDA_VISIBLE_DEVICES": ""}
# Imports torch once, says what it computes with, and runs a script for every line, each in a process of its own.
STARTER = """
import json, os, platform, runpy, sys
import torch._dynamo    # which the first step of an optimizer imports
print(json.dumps([torch.__version__, torch.backends.cpu.get_cpu_capability(), platform.machine()]), flush=True)
for line in sys.stdin:
    sys.argv, folder, output = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Unpack the old runs; what changes one of them works on a copy."""
    folder = tmp_path_factory.mktemp("old_runs")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def starter():
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    environ = {**kept, **ONE_ARITHMETIC, "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", STARTER], env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True) as process:
        process.computes_with = json.loads(process.stdout.readline())
        yield process
        process.stdin.close()


@pytest.fixture
def run(starter, old, tmp_path):
    """Run a script in the folder of the old runs, whose headers name each other by paths relative to it."""
    def call(script, **flags):
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        argv = [str(ROOT / "scripts" / f"{script}.py"), *words]
        starter.stdin.write(json.dumps([argv, str(old), str(tmp_path / "output.txt")]) + "\n")
        starter.stdin.flush()
        status, output = int(starter.stdout.readline()), (tmp_path / "output.txt").read_text()
        assert status == 0 and "Traceback" not in output, output
    return call


def arrays(path):
    with np.load(path) as content:
        return dict(content)


def assert_as_recorded(old, name, folder):
    """Compare the one .npz of a folder with the recorded one: images within one of 256 levels, labels as they are."""
    (path,) = folder.glob("*.npz")
    found, wanted = arrays(path), arrays(old / "expected" / f"{name}.npz")
    assert found.keys() == wanted.keys() and found["arr_0"].shape == wanted["arr_0"].shape
    assert np.abs(found.pop("arr_0").astype(int) - wanted.pop("arr_0")).max() <= 1
    assert all(np.array_equal(found[key], wanted[key]) for key in wanted)


def tensors(folder, step):
    """Return all tensors of a step by file and name: weights, averages and what the optimizers remember."""
    found = {}
    for path in sorted(folder.glob(f"*{step:06d}.pt")):
        content = torch.load(path, weights_only=True)
        states = content.get("state")
        named = content if states is None else {f"{i}.{k}": v for i, state in states.items() for k, v in state.items()}
        found.update({f"{path.stem}/{name}": value for name, value in named.items()})
    return found


def digest(named):
    found = hashlib.sha256()
    for name, value in named.items():
        found.update(name.encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


def contents(folder):
    """Return (time of last change, bytes) of every file of a folder, by name."""
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("name, script, flags", [
    ("diffusion", "image_train_vae", {"config": "pipeline.yaml", "cache_dir": "cache"}),
    ("autoencoder", "train_autoencoder", {"config": "pipeline.yaml", "data_dir": "images"}),
    ("volume_autoencoder", "train_autoencoder", {"config": "volumes.yaml", "data_dir": "volumes"}),
])
def test_an_old_run_goes_on_to_the_recorded_weights(old, starter, run, tmp_path, name, script, flags):
    folder = shutil.copytree(old / name, tmp_path / "run")
    before = contents(folder)
    run(script, **flags, logdir=folder, max_steps=4)
    after = contents(folder)
    assert all(after[file] == before[file] for file in before if file.endswith("000002.pt"))
    with open(folder / "progress.csv", newline="") as stream:
        assert [row["step"] for row in csv.DictReader(stream)] == ["2", "4"]
    recorded, found = json.loads((old / "expected" / "resumed.json").read_text()), tensors(folder, 4)
    for tensor, (mean, rms) in recorded[name]["mean_and_rms"].items():
        value = found[tensor].double()
        assert abs(value.mean().item() - mean) < 1e-6 and abs(value.square().mean().sqrt().item() - rms) < 1e-6, tensor
    if starter.computes_with == recorded["computed_with"]:
        assert digest(found) == recorded[name]["sha256"]


@pytest.mark.parametrize("name, data", [("autoencoder", "images"), ("volume_autoencoder", "volumes")])
def test_an_old_autoencoder_reconstructs_as_it_did(old, run, tmp_path, name, data):
    run("check_roundtrip", vae_path=name, data_dir=data, save_npz=True, logdir=tmp_path / "check")
    assert_as_recorded(old, f"{name}_roundtrip", tmp_path / "check")


@pytest.mark.parametrize("cache, flags", [
    ("cache", {"vae_path": "autoencoder", "data_dir": "images", "shard_size": 5}),
    ("volume_cache", {"vae_path": "volume_autoencoder", "data_dir": "volumes"}),
])
def test_an_old_cache_is_verified_and_kept(old, run, cache, flags):
    before = contents(old / cache)
    run("encode_dataset", **flags, cache_dir=cache)
    assert contents(old / cache) == before


def test_an_old_unfinished_encoding_goes_on(old, run, tmp_path):
    folder = shutil.copytree(old / "unfinished_cache", tmp_path / "cache")
    before = contents(folder)
    run("encode_dataset", vae_path="autoencoder", data_dir="images", shard_size=5, cache_dir=folder)
    after, whole = contents(folder), contents(old / "cache")
    assert all(after[name] == before[name] for name in before if name.endswith(".npy"))
    assert after.keys() == whole.keys()
    found, wanted = (np.load(place / "latents-00002-of-00003.npy") for place in (folder, old / "cache"))
    assert np.allclose(found, wanted, rtol=2e-3, atol=1e-4)  # a last bit of half precision


SAMPLE = {"config": "pipeline.yaml", "model_path": "diffusion"}


@pytest.mark.parametrize("name, script, flags", [
    ("ddpm", "image_sample_vae", SAMPLE),
    ("ddim", "image_sample_vae", {**SAMPLE, "use_ddim": True, "timestep_respacing": "ddim4"}),
    ("dpmpp", "image_sample_vae", {**SAMPLE, "sampler": "dpmpp", "timestep_respacing": "logsnr4"}),
    ("cfg", "image_sample_vae", {**SAMPLE, "cfg_scale": 3, "classes": "b,a", "vae_path": "autoencoder.safetensors"}),
    ("volumes", "image_sample_vae", {"config": "volumes.yaml", "model_path": "volume_diffusion"}),
    ("upsampled", "super_res_sample", {"model_path": "upsampler", "base_samples": "small.npz", "num_samples": 2}),
])
def test_old_models_give_the_recorded_samples(old, run, tmp_path, name, script, flags):
    run(script, **flags, logdir=tmp_path / "samples")
    assert_as_recorded(old, name, tmp_path / "samples")


def test_an_old_classifier_guides_as_it_did(old, run, tmp_path):
    run("classifier_sample", **SAMPLE, classifier_path="classifier", classifier_scale=1000, logdir=tmp_path / "samples")
    assert_as_recorded(old, "guided", tmp_path / "samples")
    guided, plain = (arrays(old / "expected" / f"{name}.npz")["arr_0"].astype(int) for name in ("guided", "ddpm"))
    assert np.abs(guided - plain).max() > 4


def test_an_old_unfinished_sampling_goes_on(old, run, tmp_path):
    folder = shutil.copytree(old / "unfinished_samples", tmp_path / "samples")
    (shard,) = (folder / "shards").glob("0*.npy")
    kept = np.load(shard)
    np.save(shard, np.zeros_like(kept))  # to tell what was kept from what was made again
    run("image_sample_vae", **SAMPLE, seed=7, logdir=folder)
    (path,) = folder.glob("*.npz")
    images, wanted = (arrays(file)["arr_0"].astype(int) for file in (path, old / "expected" / "unfinished.npz"))
    assert np.abs(kept - wanted[:len(kept)]).max() <= 1 and not images[:len(kept)].any()
    assert np.abs(images[len(kept):] - wanted[len(kept):]).max() <= 1
    assert len(list((folder / "png").glob("*.png"))) == len(images) and not (folder / "shards").exists()
