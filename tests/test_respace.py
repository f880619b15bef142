import numpy as np
import pytest
import torch

from guided_diffusion_vae.gaussian_diffusion import (
    GaussianDiffusion, LossType, ModelMeanType, ModelVarType, get_named_beta_schedule,
)
from guided_diffusion_vae.respace import SpacedDiffusion, space_by_log_snr, space_timesteps, space_trailing
from guided_diffusion_vae.runs.factories import choose_timesteps


def settings(steps, rescale=False):
    return dict(
        betas=get_named_beta_schedule("cosine", steps), model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE, loss_type=LossType.MSE, rescale_timesteps=rescale,
    )


@pytest.mark.parametrize("steps, text, expected", [
    (10, "10", range(10)),
    (10, "4", [0, 3, 6, 9]),
    (10, "1", [0]),
    (10, "2,3", [0, 4, 5, 7, 9]),
    (7, "3,2", [0, 2, 3, 4, 6]),
    (50, "0,5", [25, 31, 37, 43, 49]),
    (10, "ddim5", [0, 2, 4, 6, 8]),
    (10, "ddim3", [0, 4, 8]),
])
def test_space_timesteps_returns_known_timesteps(steps, text, expected):
    assert space_timesteps(steps, text) == set(expected)


@pytest.mark.parametrize("steps, text, expected", [
    (10, "1", [9]), (10, "trailing1", [9]), (10, "2", [4, 9]), (10, "ddim5", [1, 3, 5, 7, 9]), (10, "3", [2, 6, 9]),
    (10, "1,5", [4, 5, 6, 7, 8, 9]), (7, [7], range(7)),
])
def test_trailing_spacing_keeps_the_last_timestep_of_each_part(steps, text, expected):
    assert space_trailing(steps, text) == set(expected)


def test_list_and_text_of_counts_are_equivalent():
    assert space_timesteps(300, [10, 15, 20]) == space_timesteps(300, "10,15,20")


@pytest.mark.parametrize("steps, counts, message", [
    (10, [6, 6], "keeps 6 steps of section 0 of 2, which has 5 of the 10"),
    (10, "ddim7", "ddim7: no integer stride keeps 7 of 10"),
    (10, "ddim", "'ddim': expected a count"),
    (10, "many", "'many': expected a count"),
])
def test_impossible_spacings_raise(steps, counts, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(steps, counts)


def alpha_bar_by_name(schedule, steps=1000):
    return np.cumprod(1 - get_named_beta_schedule(schedule, steps))


@pytest.mark.parametrize("count", [2, 10, 20])
def test_log_snr_spacing_is_even_from_end_to_end(count):
    alpha_bar = alpha_bar_by_name("linear")
    times = sorted(space_by_log_snr(alpha_bar, count))
    assert len(times) == count and times[0] == 0 and times[-1] == 999
    log_snr = np.log(alpha_bar) - np.log1p(-alpha_bar)
    gaps, nearest = -np.diff(log_snr[times]), -np.diff(log_snr)
    even = (log_snr[0] - log_snr[-1]) / (count - 1)
    # Integer timesteps approximate even distances up to the distance of two adjacent timesteps.
    assert all(abs(gap - even) <= max(nearest[a], nearest[b - 1]) + 1e-9 for gap, a, b in zip(gaps, times, times[1:])
               if even > nearest[a])


def test_log_snr_spacing_omits_lowest_snr_except_pure_noise():
    cosine = alpha_bar_by_name("cosine")
    last = max(space_by_log_snr(cosine, 20))
    assert cosine[last] / (1 - cosine[last]) > np.exp(-10.2) >= cosine[last + 1] / (1 - cosine[last + 1])
    zero = sorted(space_by_log_snr(alpha_bar_by_name("cosine_zero_snr"), 20))
    assert zero[-1] == 999 and len(zero) == 20


def test_log_snr_spacing_can_keep_every_timestep():
    assert space_by_log_snr(alpha_bar_by_name("linear"), 1000) == set(range(1000))
    assert len(space_by_log_snr(alpha_bar_by_name("linear"), 100)) == 100


@pytest.mark.parametrize("count", [1, 47])
def test_impossible_log_snr_counts_raise(count):
    with pytest.raises(ValueError, match=rf"logsnr{count}: N must be in \[2, 46\], the number of the 50"):
        space_by_log_snr(alpha_bar_by_name("linear", 50), count)


def test_choose_timesteps_accepts_every_format():
    betas = get_named_beta_schedule("linear", 50)
    assert choose_timesteps(betas, "logsnr7") == space_by_log_snr(alpha_bar_by_name("linear", 50), 7)
    assert choose_timesteps(betas, "ddim5") == space_timesteps(50, "ddim5")
    assert choose_timesteps(betas, "trailing5") == {9, 19, 29, 39, 49}
    assert choose_timesteps(betas, "") == set(range(50))
    with pytest.raises(ValueError, match="'logsnr': expected a count .*logsnrN"):
        choose_timesteps(betas, "logsnr")


def test_kept_timesteps_keep_their_alpha_bar():
    whole, short = GaussianDiffusion(**settings(60)), SpacedDiffusion({0, 7, 30, 59}, **settings(60))
    assert short.num_timesteps == 4 and short.original_num_steps == 60 and short.timestep_map == [0, 7, 30, 59]
    np.testing.assert_allclose(short.alphas_cumprod, whole.alphas_cumprod[[0, 7, 30, 59]], rtol=1e-9)


def test_keeping_every_timestep_changes_nothing():
    whole, same = GaussianDiffusion(**settings(40)), SpacedDiffusion(range(40), **settings(40))
    np.testing.assert_allclose(same.betas, whole.betas, rtol=1e-9)


@pytest.mark.parametrize("rescale, expected", [(False, [0, 7, 30]), (True, [0.0, 7 * 25.0, 30 * 25.0])])
def test_models_and_guidance_receive_original_timesteps(rescale, expected):
    process, seen = SpacedDiffusion([0, 7, 30], **settings(40, rescale)), []

    def spy(x, t):
        seen.append(t.tolist())
        return torch.zeros_like(x)

    x, t = torch.zeros(3, 1, 2), torch.arange(3)
    process.p_mean_variance(spy, x, t)
    process.training_losses(spy, x, t)
    process.p_sample(spy, x, t, cond_fn=spy)
    process.ddim_sample(spy, x, t, cond_fn=spy)
    process.ddim_reverse_sample(spy, x, t)
    process._vb_terms_bpd(spy, x, x, t)
    assert seen == [expected] * 8


def test_rescaled_bound_is_weighted_by_the_kept_steps():
    options = {**settings(40), "model_var_type": ModelVarType.LEARNED}
    x, t, noise = torch.randn(3, 1, 2), torch.arange(3), torch.randn(3, 1, 2)
    vb = {loss: SpacedDiffusion([0, 7, 30], **{**options, "loss_type": loss}).training_losses(
        lambda x, t: torch.cat([x, x], 1), x, t, noise=noise)["vb"] for loss in (LossType.MSE, LossType.RESCALED_MSE)}
    torch.testing.assert_close(vb[LossType.RESCALED_MSE], vb[LossType.MSE] * 3 / 1000)


def test_a_single_kept_step_can_be_sampled():
    process = SpacedDiffusion(space_timesteps(20, "1"), **settings(20))
    sample = process.p_sample_loop(lambda x, t: torch.zeros_like(x), (2, 1, 3), device="cpu")
    assert sample.isfinite().all()


@pytest.mark.parametrize("timesteps, actual", [([], "none"), ([0, 20], "0 to 20"), ([-1, 3], "-1 to 3")])
def test_timesteps_outside_the_process_raise(timesteps, actual):
    with pytest.raises(ValueError, match=rf"use_timesteps: expected integers in \[0, 19\], got {actual}"):
        SpacedDiffusion(timesteps, **settings(20))
