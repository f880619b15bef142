import json
from pathlib import Path

import numpy as np
import pytest
import torch

from guided_diffusion_vae import checkpoint_util, logger
from guided_diffusion_vae.ema_profiles import (
    profile_decay, profile_exponent, reconstruct, reconstruction_weights, snapshot_name,
)
from guided_diffusion_vae.evaluation import Features
from guided_diffusion_vae.interfaces import BatchSource
from guided_diffusion_vae.objectives import PlainObjective
from guided_diffusion_vae.runs import ema_sweep, loading
from guided_diffusion_vae.train_util import TrainConfig, TrainLoop, TrainTask
from forks import FORKS

pytestmark = pytest.mark.usefixtures("one_process")
STEPS, EVERY = 96, 2


def density(std, step, count):
    """Return the weights that the recursion of a profile gives the steps 1 to `count`, float64 [count]."""
    weights = np.zeros(count)
    for at in range(1, step + 1):
        decay = profile_decay(std, at)
        weights *= decay
        weights[at - 1] += 1 - decay
    return weights


@pytest.mark.parametrize("std", [0.03, 0.05, 0.1, 0.25])
def test_profile_has_its_relative_standard_deviation(std):
    weights, steps = density(std, 4000, 4000), np.arange(1, 4001) / 4000
    mean = weights @ steps
    assert weights.sum() == pytest.approx(1) and (weights @ (steps - mean) ** 2) ** 0.5 == pytest.approx(std, rel=1e-3)
    assert mean == pytest.approx((profile_exponent(std) + 1) / (profile_exponent(std) + 2), rel=1e-3)


def test_first_update_discards_the_initialization():
    assert profile_decay(0.05, 1) == 0


@pytest.mark.parametrize("std, step, tolerance", [
    (0.05, 64, 1e-9), (0.1, 40, 1e-9), (0.075, 64, 2e-3), (0.15, 64, 5e-3),
])
def test_weights_reproduce_a_profile(std, step, tolerance):
    snapshots = [(stored, at) for at in range(2, 66, 2) for stored in (0.05, 0.1)]
    weights, error = reconstruction_weights(snapshots, std, step)
    expected = density(std, step, 64)
    found = weights @ np.array([density(stored, at, 64) for stored, at in snapshots])
    assert weights.sum() == pytest.approx(1, abs=1e-9) and error < tolerance
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_fewer_snapshots_have_a_larger_error():
    error = lambda every: reconstruction_weights(
        [(std, at) for at in range(every, 65, every) for std in (0.05, 0.1)], 0.075, 64)[1]
    assert error(2) < error(8) / 5 and error(8) < error(32) / 3


# --- Training ---


class Points(BatchSource):
    """Batches of points of a plane."""

    def __next__(self):
        self.step += 1
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.step))
        return x, {"y": x @ torch.tensor([1.0, -2.0, 0.5])}

    def seek(self, step):
        self.step = step

    def close(self):
        pass


def train(folder, steps=STEPS, **options):
    torch.manual_seed(0)
    logger.configure(str(folder), [])
    config = TrainConfig(**{"max_steps": steps, "save_interval": EVERY, "batch_size": 4, "ema_rate": "0.9", "lr": 0.01,
                            "ema_profiles": "0.05,0.10", **options})
    objective = PlainObjective(lambda model, x, cond, rng: {"loss": (model(x)[:, 0] - cond["y"]) ** 2})
    loop = TrainLoop.from_config(torch.nn.Linear(3, 1), Points(), config,
                                 TrainTask(objective, {"kind": "line"}))
    loop.run_loop()
    return loop


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train with two stored profiles, and in another folder with the ones that are reconstructed."""
    folder = tmp_path_factory.mktemp("profiles")
    train(folder / "stored", keep_checkpoints=2)
    train(folder / "direct", save_interval=STEPS // 2, ema_profiles="0.05,0.06,0.075,0.09,0.1,0.15")
    logger.reset()      # which has no outputs, also for the first test
    return folder


def direct(folder, std, step):
    return checkpoint_util.load_weights(folder / "direct" / snapshot_name(std, step))[0]


@pytest.mark.parametrize("std, step", [(0.05, STEPS), (0.1, STEPS), (0.1, STEPS // 2), (0.075, STEPS), (0.09, STEPS),
                                       (0.06, STEPS), (0.15, STEPS)])
def test_reconstruction_equals_ema_weights_computed_directly(trained, std, step):
    state_dict, header, _ = reconstruct(trained / "stored", std, step)
    for name, value in direct(trained, std, step).items():
        torch.testing.assert_close(state_dict[name], value, atol=1e-6, rtol=0)
    assert (header["kind"], header["step"], header["ema_std"]) == ("line", step, std)


def test_pruning_keeps_the_snapshots_that_the_latest_marker_records(trained):
    folder, steps = trained / "stored", range(EVERY, STEPS + 1, EVERY)
    expected = {snapshot_name(std, step) for std in (0.05, 0.1) for step in steps}
    assert {path.name for path in folder.glob("ema_profile*")} == expected
    assert checkpoint_util.committed_steps(folder) == [STEPS - EVERY, STEPS]
    assert set(checkpoint_util.read_marker(folder, STEPS)["profiles"]) == expected
    assert checkpoint_util.find_weights(folder)[0].name == f"ema_0.9_{STEPS:06d}.pt"


def test_resumed_run_continues_its_profiles(trained, tmp_path):
    train(tmp_path, 8)
    assert train(tmp_path, 16, ema_profiles="0.05,0.10").resume_step == 8
    for std in (0.05, 0.1):
        name = snapshot_name(std, 16)
        assert len(checkpoint_util.read_marker(tmp_path, 16)["profiles"]) == 16
        torch.testing.assert_close(checkpoint_util.load_weights(tmp_path / name)[0],
                                   checkpoint_util.load_weights(trained / "stored" / name)[0], atol=1e-6, rtol=0)
    with pytest.raises(FileNotFoundError, match="ema_profile0.2_000016.pt does not exist; --ema_profiles must list st"):
        train(tmp_path, 20, ema_profiles="0.2")


def test_script_writes_weights_that_can_be_opened(trained, call):
    folder = trained / "stored"
    status, out, err = call("reconstruct_ema", model_path=folder, ema_std="0.06,0.15")
    assert status == 0 and f"wrote {folder}/reconstructed_ema_0.06_{STEPS:06d}.pt: error of the profile" in out, err
    path = folder / f"reconstructed_ema_0.15_{STEPS:06d}.pt"
    assert checkpoint_util.find_weights(path)[0] == path and checkpoint_util.load_weights(path)[1]["ema_std"] == 0.15


def test_unusable_runs_are_rejected(trained, tmp_path, call):
    with pytest.raises(FileNotFoundError, match="no complete checkpoint .*: --model_path expects a run folder"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(ValueError, match=f"no snapshots of EMA profiles for step 1: expected .* up to {STEPS}"):
        reconstruct(trained / "stored", 0.1, 1)
    with pytest.raises(ValueError, match="no snapshots of EMA profiles for step 500"):
        reconstruct(trained / "stored", 0.1, 500)
    train(tmp_path / "plain", 4, ema_profiles="")
    with pytest.raises(ValueError, match="expected a run trained with --ema_profiles"):
        reconstruct(tmp_path / "plain", 0.1)
    train(tmp_path / "short", 4)
    damaged = tmp_path / "short" / snapshot_name(0.05, 4)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="ema_profile0.05_000004.pt is corrupt: its SHA-256"):
        reconstruct(tmp_path / "short", 0.1)
    damaged.unlink()
    with pytest.raises(FileNotFoundError, match="ema_profile0.05_000004.pt is missing"):
        reconstruct(tmp_path / "short", 0.1)
    for text in ("0", "0.3", "a"):
        status, _, err = call("reconstruct_ema", model_path=tmp_path, ema_std=text)
        assert status != 0 and "--ema_std must be comma-separated relative standard deviations in (0, 0.28]" in err


# --- The best length ---


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Train a model of images with two classes and two profiles; return its run folder."""
    folder = tmp_path_factory.mktemp("model")
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 1), np.uint8)
    np.savez(folder / "data.npz", arr_0=images, arr_1=np.arange(8) % 2)
    flags = {"data_dir": folder / "data.npz", "image_size": 8, "num_channels": 32, "channel_mult": 1,
             "num_res_blocks": 1, "attention_resolutions": "", "class_cond": True, "diffusion_steps": 8,
             "noise_schedule": "cosine", "batch_size": 4, "lr": 0.05, "ema_profiles": "0.05,0.1", "max_steps": 8,
             "save_interval": 2, "preview_interval": -1, "logdir": folder / "run"}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    process = FORKS.run([Path(__file__).parents[1] / "scripts" / "image_train.py", *words], 1)
    assert process.returncode == 0, process.stderr
    return folder / "run"


@pytest.fixture
def sweep(model, call, monkeypatch, tmp_path):
    """Return a function that sweeps lengths; the reference are samples of the length 0.1."""
    extract = lambda images: Features(images[:, 0, ::3, 3])
    monkeypatch.setattr(loading, "open_extractors", lambda run: (extract, None, None))
    sampling = {"num_samples": 12, "seed": 3, "batch_size": 5}
    for path in model.glob("reconstructed*"):
        path.unlink()
    assert call("reconstruct_ema", model_path=model, ema_std=0.1)[0] == 0
    weights = model / "reconstructed_ema_0.1_000008.pt"
    assert call("image_sample", model_path=weights, **sampling, logdir=tmp_path, save_individual=False)[0] == 0
    flags = {"model_path": model, "ema_std": "0.05,0.1,0.2", "reference": tmp_path / "samples_12x8x8x1.npz", **sampling}
    return lambda **other: call("reconstruct_ema", **{**flags, **other})


def test_sweep_keeps_the_length_whose_samples_are_the_reference(model, sweep):
    status, out, err = sweep()
    assert status == 0, err
    record = json.loads((model / "ema_sweep.json").read_text())
    found = record["frechet"]
    assert record["best"] == "0.1" and found["0.1"] < 1e-9 and min(found["0.05"], found["0.2"]) > 1e-4
    assert f"0.2    {found['0.2']:.5g}\n" in out and f"0.1    {found['0.1']:.5g}  best\n" in out
    assert [path.name for path in model.glob("reconstructed*")] == ["reconstructed_ema_0.1_000008.pt"]
    sweep(seed=4)
    assert json.loads((model / "ema_sweep.json").read_text())["frechet"]["0.1"] > 1e-4


def test_sweep_is_resumed_with_the_same_settings_only(model, sweep, monkeypatch):
    measure, labels = ema_sweep.feature_statistics, []

    def interrupted(images, extract, batch_size, label):
        labels.append(label)
        if label == stop:
            raise KeyboardInterrupt
        return measure(images, extract, batch_size, label)
    monkeypatch.setattr(ema_sweep, "feature_statistics", interrupted)
    for stop, seed, expected in (
        ("samples, 0.2", 3, ["reference", "samples, 0.05", "samples, 0.1", "samples, 0.2"]),
        ("samples, 0.05", 4, ["reference", "samples, 0.05"]),
        ("", 3, ["reference", "samples, 0.2"]),
        ("", 3, ["reference", "samples, 0.05", "samples, 0.1", "samples, 0.2"]),
    ):
        labels.clear()
        assert (sweep(seed=seed)[0] == 0) == (not stop) and labels == expected


def test_sweep_rejects_what_does_not_fit(trained, model, sweep, call, tmp_path):
    np.savez(tmp_path / "large.npz", arr_0=np.zeros((4, 9, 9, 1), np.uint8))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "bare.pt")
    before = sorted(model.iterdir())
    for flags, message in (
        ({"ema_std": "0.1"}, "--ema_std 0.1: expected two lengths or more"),
        ({"reference": tmp_path / "none"}, "--reference"),
        ({"reference": tmp_path / "large.npz"}, "contains images of shape (1, 8, 8), but"),
        ({"model_path": trained / "stored"}, "--model_path expects a model of kind 'diffusion', got 'line'"),
        ({"model_path": tmp_path / "bare.pt"}, "bare.pt has no header; --model_path expects a run folder"),
        ({"classes": 2}, "--classes: there is no class '2'"),
        ({"sampler": "euler"}, "--sampler euler does not apply"),
    ):
        status, _, err = sweep(**flags)
        assert status != 0 and message in err
    status, _, err = call("reconstruct_ema", model_path=model, num_samples=4)
    assert status != 0 and "--num_samples 4 has no effect without --reference" in err
    assert sorted(model.iterdir()) == before
