import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.runs import doctor

MIB = 2**20


@pytest.fixture
def folder(tmp_path):
    for i in range(4):
        values = np.random.default_rng(i).integers(0, 256, (16, 16), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{'ab'[i % 2]}_{i}.png")
    return tmp_path


def fail_to_start(*words, **settings):
    raise AssertionError("started a process")


@pytest.mark.parametrize("free, status", [(1 * MIB, "problem"), (64 * MIB, "warning"), (300 * MIB, "ok")])
def test_shared_memory_is_graded(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr(doctor, "SHARED_MEMORY", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))
    check = doctor.check_shared_memory()
    assert check.status == status and ("--shm-size" in check.text) == (status != "ok")


@pytest.mark.parametrize("free, status", [(0.5, "problem"), (5, "warning"), (50, "ok")])
def test_disk_is_graded(monkeypatch, tmp_path, free, status):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free * 2**30))
    check = doctor.check_disk(tmp_path)
    assert check.status == status and str(tmp_path) in check.text and ("--logdir" in check.text) == (status != "ok")


@pytest.mark.parametrize("limit, status", [
    (64, "problem"), (256, "warning"), (1024, "ok"), (resource.RLIM_INFINITY, "ok"),
])
def test_limit_of_open_files_is_graded(monkeypatch, limit, status):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    check = doctor.check_open_files()
    assert check.status == status and ("ulimit -n" in check.text) == (status != "ok")


def test_missing_mpiexec_or_mpi4py_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor.subprocess, "run", fail_to_start)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    check = doctor.check_mpi()
    assert check.status == "warning" and "mpiexec is not found" in check.text and "torchrun" in check.text
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None)
    check = doctor.check_mpi()
    assert check.status == "warning" and "pip install mpi4py mpich" in check.text


@pytest.mark.parametrize("result, status, text", [
    (types.SimpleNamespace(returncode=0, stdout="", stderr=""), "ok", "two ranks of /bin/mpiexec connect"),
    (types.SimpleNamespace(returncode=1, stdout="x\n", stderr="----\nerror: sees 1\n"), "problem", "error: sees 1"),
    (types.SimpleNamespace(returncode=1, stdout="", stderr="--\nas root\nno\n--\n"), "problem", "connect: as root no"),
    (subprocess.TimeoutExpired("mpiexec", 1), "problem", "within 120 s"),
])
def test_mpi_is_checked_by_connecting_two_ranks(monkeypatch, result, status, text):
    def run(command, **settings):
        assert command[:3] == ["/bin/mpiexec", "-n", "2"]
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(doctor.subprocess, "run", run)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(doctor.Path, "exists", lambda path: True)
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: name)
    check = doctor.check_mpi()
    assert check.status == status and text in check.text
    assert (f"put {Path(sys.executable).parent} before /bin in PATH" in check.text) == (status == "problem")


@pytest.mark.parametrize("cuda, text", [(None, "build without CUDA"), ("12.8", "built for CUDA 12.8, but finds no")])
def test_unused_gpu_is_a_problem(monkeypatch, tmp_path, cuda, text):
    (tmp_path / "version").touch()
    assert doctor.check_torch().status == "ok"
    monkeypatch.setattr(doctor, "NVIDIA_DRIVER", str(tmp_path / "version"))
    monkeypatch.setattr(torch.version, "cuda", cuda)
    check = doctor.check_torch()
    assert check.status == "problem" and text in check.text


def test_gpu_without_code_in_the_build_is_a_problem(monkeypatch):
    properties = types.SimpleNamespace(name="Old", total_memory=8 * 2**30, major=5, minor=2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_120", "compute_120"])
    check, = doctor.check_gpus()
    assert check.status == "problem" and "Old, 8.0 GiB" in check.text and "capability 5.2" in check.text
    properties.major = 12
    assert next(doctor.check_gpus()).status == "ok"


def test_threads_are_compared_with_the_quota_of_a_container(monkeypatch, tmp_path):
    (tmp_path / "cpu.max").write_text("100000 100000\n")
    monkeypatch.setattr(doctor, "CPU_QUOTA", str(tmp_path / "cpu.max"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    check = doctor.check_threads()
    assert check.status == "warning" and "set OMP_NUM_THREADS=1" in check.text
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor.check_threads().status == "ok"


def test_allocator_that_returns_memory_is_a_warning(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(doctor.sys, "platform", "linux")
    for keeps, status in ((True, "ok"), (False, "warning")):
        monkeypatch.setattr(doctor, "KEEPS_FREED_MEMORY", keeps)
        assert doctor.check_allocator().status == status
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so.2")
    assert doctor.check_allocator().status == "ok"


def test_data_is_checked_as_training_opens_it(folder):
    checks, source = doctor.check_data(DataConfig(str(folder), image_size="16"))
    assert source.shape == (1, 16, 16) and checks[-1].text.startswith("4 images 1x16x16 (4 uint8) in")
    assert all(check.status == "ok" for check in checks)
    (folder / "notes.txt").touch()
    Image.new("L", (16, 16)).save(folder / "unlabeled.png")
    checks, _ = doctor.check_data(DataConfig(str(folder), image_size="16"))
    assert "warning" in {check.status for check in checks} and checks[-1].status == "ok"
    checks, source = doctor.check_data(DataConfig(str(folder), image_size="64"))
    assert source is None and [check.status for check in checks] == ["problem"]
    assert "is smaller than --image_size 64x64" in checks[0].text


def test_corrupt_file_is_a_problem_unless_decoding_takes_long(folder, monkeypatch):
    content = (folder / "b_3.png").read_bytes()
    (folder / "b_3.png").write_bytes(content[:len(content) // 2])
    config = DataConfig(str(folder), image_size="16")
    check = doctor.check_data(config)[0][0]
    assert check.status == "problem" and "1 of 4 decoded files cannot be read: " in check.text
    assert "b_3.png" in check.text
    monkeypatch.setattr(doctor, "DECODING_S", -1)
    check = doctor.check_data(config)[0][0]
    assert (check.status, check.text) == ("ok", "1 of 4 files are decoded; --verify_data True decodes all")


@pytest.mark.parametrize("seconds, text", [(30, "30 s"), (150, "2.5 min"), (9000, "2.5 h"), (216000, "2.5 days")])
def test_durations_have_the_unit_that_fits(seconds, text):
    assert doctor._format_duration(seconds) == text


def test_step_of_the_diffusion_model_of_a_configuration_is_timed(call, folder, monkeypatch, yaml_file):
    monkeypatch.setattr(doctor, "check_machine", lambda folders: [])
    monkeypatch.setattr(doctor, "time_step", lambda plan, device: 0.5)
    path = yaml_file("""
        data: {image_size: 16}
        autoencoder: {num_channels: [8, 8], norm_num_groups: 4, num_res_blocks: 1, training: {max_steps: 7200}}
        model: {num_channels: 32, num_res_blocks: 1, channel_mult: "1,2", class_cond: true}
        training: {batch_size: 4, microbatch: 2, lr_anneal_steps: 100}
    """)
    status, out, _ = call("doctor", config=path, data_dir=folder)
    assert status == 0 and "and 0.5 s (batch size 16, autoencoder); 7,200 steps take about 60 min" in out
    assert "and 1 s (batch size 4, diffusion model); 100 steps take about 100 s" in out
    for image in folder.iterdir():
        image.rename(image.with_name(image.name.replace("_", "")))
    status, out, _ = call("doctor", config=path, data_dir=folder)
    assert status == 1 and "problem  diffusion model: --class_cond True requires classes" in out


def test_doctor_prints_a_line_per_check_and_fails_on_problems(call, folder, monkeypatch):
    monkeypatch.setattr(doctor, "check_mpi", lambda: doctor.Check("MPI", "warning", "faked"))
    flags = dict(data_dir=folder, image_size=16, num_channels="8,8", norm_num_groups=4, num_res_blocks=1, batch_size=2)
    monkeypatch.setattr(doctor, "check_machine", lambda folders: [doctor.Check("disk", "ok", f"{folders}")])
    status, out, _ = call("doctor", **flags)
    assert status == 0 and "ok       disk: " in out and "data: 4 images 1x16x16" in out
    assert "ok       training step: takes about" in out and "warnings: 0, problems: 0" in out
    status, out, _ = call("doctor", **{**flags, "image_size": 64})
    assert status == 1 and "problem  data: " in out and "training step" not in out


def test_step_that_does_not_fit_is_a_problem_with_flags_that_do(call, folder, monkeypatch):
    monkeypatch.setattr(doctor, "check_machine", lambda folders: [])
    monkeypatch.setattr(doctor.dist_util, "memory_bytes", lambda: MIB)
    monkeypatch.setattr(doctor, "advice", lambda plan, budget, kind: f"{plan.shape} in {budget} bytes of {kind}")
    status, out, _ = call("doctor", image_size=16, num_channels="8,8", norm_num_groups=4, num_res_blocks=1)
    assert status == 1 and "problem  training step: (1, 16, 16) in 1048576 bytes of cpu" in out
