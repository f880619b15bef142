import json
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from guided_diffusion_vae.resample import (
    LogitNormalSampler, LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler,
)


def process(steps):
    return types.SimpleNamespace(num_timesteps=steps)


def warmed(steps=3, history=2):
    sampler = LossSecondMomentResampler(process(steps), history_per_term=history, uniform_prob=0.1)
    for t in range(steps):
        sampler.update_with_all_losses([t] * history, [float(t + 1)] * history)
    return sampler


def test_uniform_sampler_gives_weights_of_one():
    t, weights = UniformSampler(process(5)).sample(200, "cpu", np.random.default_rng(0))
    assert t.dtype == torch.int64 and weights.dtype == torch.float32
    assert set(t.tolist()) == set(range(5)) and (weights == 1).all()


def test_logit_normal_sampler_has_the_quantiles_of_a_sigmoid_of_a_normal():
    t, weights = LogitNormalSampler(process(1000)).sample(20000, "cpu", np.random.default_rng(0))
    quantiles = np.quantile((t.numpy() + 0.5) / 1000, [0.0228, 0.1587, 0.5, 0.8413, 0.9772])
    np.testing.assert_allclose(quantiles, 1 / (1 + np.exp(-np.arange(-2.0, 3.0))), atol=0.01)
    assert (weights == 1).all()     # the distribution is meant to weight the losses


def test_sample_depends_on_the_generator_by_default_the_global_one():
    sampler = warmed()
    first, again = (sampler.sample(20, "cpu", np.random.RandomState(3))[0] for _ in range(2))
    np.random.seed(3)  # noqa: NPY002  (the global generator is the claim)
    assert first.equal(again) and first.equal(sampler.sample(20, "cpu")[0])


def test_weights_follow_the_root_mean_square_with_full_history():
    sampler = LossSecondMomentResampler(process(2), history_per_term=2, uniform_prob=0.1)
    sampler.update_with_all_losses([0, 0, 1], [3.0, 4.0, 1.0])
    assert sampler.weights().tolist() == [1, 1]
    sampler.update_with_all_losses([1], [1.0])
    rms = np.array([12.5**0.5, 1.0])
    np.testing.assert_allclose(sampler.weights(), 0.9 * rms / rms.sum() + 0.05)


def test_defaults_are_ten_losses_and_a_uniform_part_of_one_in_a_thousand():
    sampler = LossSecondMomentResampler(process(2))
    sampler.update_with_all_losses([0, 1] * 9 + [0], [3.0, 1.0] * 9 + [3.0])
    assert sampler.weights().tolist() == [1, 1]
    sampler.update_with_all_losses([1], [1.0])
    np.testing.assert_allclose(sampler.weights(), 0.999 * np.array([0.75, 0.25]) + 0.0005, rtol=1e-12)


def test_weights_use_the_latest_losses():
    sampler = warmed()
    sampler.update_with_all_losses([0, 0], [2.0, 2.0])
    sampler.update_with_all_losses([1, 1, 1], [9.0, 3.0, 3.0])
    np.testing.assert_allclose(sampler.weights(), 0.9 * np.array([2, 3, 3]) / 8 + 0.1 / 3)


def test_a_loss_replaces_the_oldest_one_of_its_timestep():
    sampler = LossSecondMomentResampler(process(1), history_per_term=3)
    sampler.update_with_all_losses([0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert sampler.state_dict() == {"losses": [[3.0, 4.0, 5.0]], "counts": [3]}


def test_importance_weights_keep_the_mean_loss():
    sampler = warmed()
    t, weights = sampler.sample(20000, "cpu", np.random.default_rng(0))
    assert abs((weights * (t + 1.0)).mean() - 2.0) < 0.02


def test_update_ignores_losses_that_are_not_finite():
    sampler, untouched = warmed(), warmed()
    sampler.update_with_all_losses([0, 1], [float("nan"), float("inf")])
    assert sampler.state_dict() == untouched.state_dict()


def test_state_dict_survives_json_bit_exactly():
    sampler = warmed(history=3)
    sampler.update_with_local_losses(torch.tensor([0, 2]), torch.tensor([0.1, 1 / 3], requires_grad=True))
    resumed = LossSecondMomentResampler(process(3), history_per_term=3, uniform_prob=0.1)
    resumed.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    assert resumed.weights().tolist() == sampler.weights().tolist()
    for each in (sampler, resumed):
        each.update_with_all_losses([1], [7.5])
    assert resumed.state_dict() == sampler.state_dict()


def test_load_state_dict_rejects_another_process():
    with pytest.raises(ValueError, match=r"expected .* \[4, 2\], got \[3, 2\] and 3 counts; resume"):
        LossSecondMomentResampler(process(4), history_per_term=2).load_state_dict(warmed().state_dict())


def test_uniform_sampler_ignores_the_state_of_another_sampler():
    sampler = UniformSampler(process(3))
    sampler.load_state_dict(warmed().state_dict())
    assert sampler.state_dict() == {}


def test_unknown_sampler_error_lists_the_choices():
    assert isinstance(create_named_schedule_sampler("loss-second-moment", process(2)), LossSecondMomentResampler)
    with pytest.raises(NotImplementedError, match="importance .*: expected one of: uniform, loss-second-moment"):
        create_named_schedule_sampler("importance", process(2))


def _update_on_one_rank(rank, rendezvous, folder):
    dist.init_process_group("gloo", init_method=rendezvous.as_uri(), rank=rank, world_size=2)
    sampler = LossSecondMomentResampler(process(3), history_per_term=2)
    ts, losses = ([0, 1, 2], [1.0, 2.0, 3.0]) if rank == 0 else ([0], [5.0])
    sampler.update_with_local_losses(torch.tensor(ts), torch.tensor(losses))
    with open(f"{folder}/{rank}.json", "w") as stream:
        json.dump(sampler.state_dict(), stream)
    dist.destroy_process_group()


def test_ranks_with_unequal_batches_update_equally(tmp_path):
    mp.spawn(_update_on_one_rank, args=(tmp_path / "rendezvous", tmp_path), nprocs=2)
    expected = LossSecondMomentResampler(process(3), history_per_term=2)
    expected.update_with_all_losses([0, 1, 2, 0], [1.0, 2.0, 3.0, 5.0])
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == expected.state_dict()
