import importlib
import sys
from pathlib import Path

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
])
def test_benchmark_prints_a_table_and_writes_json(benchmark, monkeypatch, tmp_path, capsys, name, argv):
    if name in ("sample", "train_step"):  # small networks for tests
        sizes = benchmark("train_step").SIZES
        tiny = (4, 8, 8), {"num_channels": 32, "channel_mult": "1,2", "attention_resolutions": "4"}
        for size in ("16m122", "radar64"):
            monkeypatch.setitem(sizes, size, tiny)
    monkeypatch.setattr(sys, "argv", [name, *argv, "--repetitions", "1", "--out", str(tmp_path)])
    benchmark(name).main()
    assert "| variant |" in capsys.readouterr().out
    assert list(tmp_path.glob("*.json"))


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
