import numpy as np
import pytest
import torch

from guided_diffusion_vae import checkpoint_util, logger
from guided_diffusion_vae.ema_profiles import (
    profile_decay, profile_exponent, reconstruct, reconstruction_weights, snapshot_name,
)
from guided_diffusion_vae.interfaces import BatchSource
from guided_diffusion_vae.objectives import PlainObjective
from guided_diffusion_vae.train_util import TrainConfig, TrainLoop, TrainTask

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
