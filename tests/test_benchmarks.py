import copy
import gc
import importlib
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion_vae.autoencoder import AutoencoderConfig, create_autoencoder

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Return a function that imports a benchmark by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_benchmark_imports_and_documents_its_command(benchmark, path):
    module = benchmark(path.stem)
    assert path.stem == "common" or callable(module.main) and f"benchmarks/{path.name}" in module.__doc__


@pytest.mark.parametrize("name, argv", [
    ("sample", ["--bench_batch_size", "1", "--whole_runs", "1", "--written_runs", "1"]),
    ("train_step", ["--bench_batch_size", "2"]),
    ("train_step", ["--bench_batch_size", "2", "--reference", "diffusers"]),
    ("encode", ["--bench_batch_sizes", "1,2", "--bench_image_size", "16"]),
    ("encode", ["--bench_batch_sizes", "1", "--bench_image_size", "16x16x16"]),
    ("evaluation", ["--counts", "9", "--features", "2"]),
])
def test_benchmark_prints_a_table_and_writes_json(benchmark, monkeypatch, tmp_path, capsys, name, argv):
    if name in ("sample", "train_step"):  # small networks for tests
        sizes = benchmark("train_step").SIZES
        tiny = (4, 8, 8), {"num_channels": 32, "channel_mult": "1,2", "attention_resolutions": "4"}
        for size in ("16m122", "radar64"):
            monkeypatch.setitem(sizes, size, tiny)
        monkeypatch.setattr(benchmark("sample"), "ANCESTRAL_STEPS", 4)
    monkeypatch.setattr(sys, "argv", [name, *argv, "--repetitions", "1", "--out", str(tmp_path)])
    benchmark(name).main()
    assert "| variant |" in capsys.readouterr().out
    assert list(tmp_path.glob("*.json"))


def test_doppler_extent_ends_between_two_rows(benchmark):
    extent = benchmark("doppler_extent").doppler_extent
    image = np.zeros((9, 4))
    assert extent(image, 0.25, 4) == 0
    image[1:5, :3], image[5, 1] = [[0.5], [0.6], [0.9], [1.0]], 1.0     # a single column is noise
    assert extent(image, 0.25, 4) == pytest.approx(3.5)
    image[4:8, 2:] = 0.75
    assert extent(image, 0.25, 4) == pytest.approx(3 + 2 / 3)
    image[8, 2:] = 0.75
    assert extent(image, 0.25, 4) == 4


@pytest.mark.parametrize("dims", [2, 3])
def test_every_variant_of_strides_builds_and_has_a_curve(benchmark, dims):
    strides = benchmark("strides")
    for changes in strides.variants(dims).values():
        with torch.device("meta"):
            network = create_autoencoder(AutoencoderConfig(spatial_dims=dims, in_channels=1, **changes))
        assert network.latent_shape((64,) * dims)
    curves = {name: strides.curve_name(name) for name in strides.variants(dims)}
    assert curves["8x: [4,2], space_to_channel"] == "between levels, space_to_channel"
    assert curves["8x: 2 + [2,2], shuffle"] == "initial factor" != curves["8x: [4,2], 16 channels"]


@pytest.fixture
def gpu(benchmark):
    return benchmark("gpu")


def test_gpu_benchmark_runs_all_sections_on_a_cpu(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # requires a C++ compiler, and minutes
    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(gpu, "TRAININGS", {case: run for case, run in gpu.TRAININGS.items() if case != "UNet"})
    monkeypatch.setattr(gpu, "SAMPLERS", {name: gpu.SAMPLERS[name] for name in ("ddpm", "euler", "dpmpp_sde")})
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")   # restored afterwards
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "True", "--repetitions", "1",
                                      "--minutes", "60", "--out", str(tmp_path)])
    gpu.main()
    content = json.loads((tmp_path / "gpu.json").read_text())
    assert content["sections"].keys() == gpu.SECTIONS.keys()
    assert [row for rows in content["sections"].values() for row in rows if "error" in row] == []
    assert {row["outputs, float32"] for row in content["sections"]["agreement"]} == {0}
    assert {row["same bits resumed"] for row in content["sections"]["resumption"]} == {True}
    assert {row["measured MiB"] for row in content["sections"]["planner"]} == {None}
    assert max(row["difference"] for row in content["sections"]["slabs"]) < 1e-5
    assert "| no training step waits | 0 | True |" in capsys.readouterr().out


def test_gpu_benchmark_records_a_failure_and_stops_a_section_at_its_deadline(gpu, monkeypatch):
    clock = iter(range(0, 10**6, 10))                       # every look at the clock takes 10 s
    monkeypatch.setattr(gpu.time, "monotonic", lambda: next(clock))
    saved = []

    def cases(setup):
        yield "fails", lambda: 1 / 0
        yield "measured", lambda: {"ms": 1.0}
        for number in range(100):
            yield f"{number}", dict

    def broken(setup):
        yield from ()
        raise ValueError("no set-up")

    setup = gpu.Setup(torch.device("cpu"), gpu.TINY)
    results = gpu.run_sections({"first": (1, cases), "second": (1, broken)}, setup, 4,
                               lambda sections: saved.append(copy.deepcopy(sections)))
    first, measured, *_, last = results["first"]
    assert first["error"].startswith("ZeroDivisionError: division by zero (test_benchmarks.py:")
    assert measured["ms"] == 1 and "error" not in measured and "out of time" in last["error"]
    assert len(results["first"]) < 10 and results["second"][0]["error"].startswith("ValueError: no set-up")
    assert [sum(map(len, sections.values())) for sections in saved] == list(range(1, len(saved) + 1))
    assert saved[-1] == results


def test_gpu_benchmark_rejects_unknown_sections(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--only", "waits,speed", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        gpu.main()
    assert "--only must be comma-separated names among matrix_rate, agreement," in capsys.readouterr().err


def test_gpu_benchmark_lists_the_places_of_waits(gpu, monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu.recorded_waits(torch.device("cuda")) as places:
        for message in ("called a synchronizing CUDA operation", "called a synchronizing CUDA operation", "slow"):
            warnings.warn(message, stacklevel=1)
    assert modes == ["warn", "default"]
    assert [place.split(":")[0] for place in places] == ["test_benchmarks.py"] * 2


def test_goals_are_compared_with_the_best_rows_of_this_project(gpu):
    step = lambda case, **row: {"case": case, "relative to": "guided-diffusion, float32", **row}
    results = {
        "train_step": [step("32adm256, batch of 64, guided-diffusion, float16", speedup=9.0, **{"matrix rate": 0.9}),
                       step("32adm256, batch of 64, diffusers, bfloat16", speedup=9.0, **{"matrix rate": 0.9}),
                       step("32adm256, batch of 64, bfloat16", speedup=4.0, **{"matrix rate": 0.4}),
                       step("32adm256, batch of 256, bfloat16", error="out of memory")],
        "compiled_step": [step("32m1224, batch of 64, bfloat16, compiled", speedup=6.0, **{"matrix rate": 0.7})],
        "planner": [{"case": "a", "planned / measured": 1.1}, {"case": "b", "planned / measured": 0.5}],
        "waits": [{"case": "training step, UNet", "waits": 0}, {"case": "encoding", "waits": 3}],
        "agreement": [{"case": "UNet 2D, TF32 off", "outputs, float32": 1e-6},
                      {"case": "UNet 2D, TF32 on", "outputs, float32": 1e-3}],
    }
    found = {row["goal"].split()[0]: (row["measured"], row["reached"]) for row in gpu.goals(results)}
    assert found["5"] == (6.0, True) and found["3"] == (None, None) and found["50%"] == (0.4, False)
    assert found["planned"] == (2.0, False) and found["no"] == (0, True) and found["deterministic"] == (None, None)
    assert found["float32"] == (1e-6, True)
