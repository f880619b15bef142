import numpy as np
import pytest
import torch

from guided_diffusion_vae.gaussian_diffusion import (
    GaussianDiffusion, LossType, ModelMeanType, ModelVarType, get_named_beta_schedule,
)
from guided_diffusion_vae.respace import SpacedDiffusion, space_by_log_snr, space_timesteps
from guided_diffusion_vae.runs.factories import choose_timesteps


def settings(steps, rescale=False):
    return dict(
        betas=get_named_beta_schedule("cosine", steps), model_mean_type=ModelMeanType.EPSILON,
        model_var_type=ModelVarType.FIXED_LARGE, loss_type=LossType.MSE, rescale_timesteps=rescale,
    )


@pytest.mark.parametrize("steps, text, wanted", [
    (10, "10", range(10)),
    (10, "4", [0, 3, 6, 9]),
    (10, "1", [0]),
    (10, "2,3", [0, 4, 5, 7, 9]),
    (7, "3,2", [0, 2, 3, 4, 6]),
    (50, "0,5", [25, 31, 37, 43, 49]),
    (10, "ddim5", [0, 2, 4, 6, 8]),
    (10, "ddim3", [0, 4, 8]),
])
def test_chosen_times_are_known(steps, text, wanted):
    assert space_timesteps(steps, text) == set(wanted)


def test_a_list_means_what_the_text_means():
    assert space_timesteps(300, [10, 15, 20]) == space_timesteps(300, "10,15,20")


@pytest.mark.parametrize("steps, counts, message", [
    (10, [6, 6], "section 0 of 2 has 5 of the 10 steps, not the 6"),
    (10, "ddim7", "no whole-number stride takes 7 of 10"),
    (10, "ddim", "'ddim' is not a count"),
    (10, "many", "'many' is not a count"),
])
def test_impossible_spacings_are_refused(steps, counts, message):
    with pytest.raises(ValueError, match=message):
        space_timesteps(steps, counts)


def alpha_bar_of(schedule, steps=1000):
    return np.cumprod(1 - get_named_beta_schedule(schedule, steps))


@pytest.mark.parametrize("count", [2, 10, 20])
def test_log_snr_spacing_takes_even_distances_from_end_to_end(count):
    alpha_bar = alpha_bar_of("linear")
    times = sorted(space_by_log_snr(alpha_bar, count))
    assert len(times) == count and times[0] == 0 and times[-1] == 999
    log_snr = np.log(alpha_bar) - np.log1p(-alpha_bar)
    gaps, nearest = -np.diff(log_snr[times]), -np.diff(log_snr)
    even = (log_snr[0] - log_snr[-1]) / (count - 1)
    # A whole number of times is as near to an even distance as the distance of two neighbours.
    assert all(abs(gap - even) <= max(nearest[a], nearest[b - 1]) + 1e-9 for gap, a, b in zip(gaps, times, times[1:])
               if even > nearest[a])


def test_log_snr_spacing_leaves_the_faintest_times_out_but_for_pure_noise():
    assert max(space_by_log_snr(alpha_bar_of("cosine"), 20)) < 999
    zero = sorted(space_by_log_snr(alpha_bar_of("cosine_zero_snr"), 20))
    assert zero[-1] == 999 and len(zero) == 20


def test_every_time_can_be_taken_by_log_snr():
    assert space_by_log_snr(alpha_bar_of("linear"), 1000) == set(range(1000))
    assert len(space_by_log_snr(alpha_bar_of("linear"), 100)) == 100


@pytest.mark.parametrize("count", [1, 47])
def test_impossible_counts_by_log_snr_are_refused(count):
    with pytest.raises(ValueError, match=f"--timestep_respacing logsnr{count}: choose from 2 to 46, the times of"):
        space_by_log_snr(alpha_bar_of("linear", 50), count)


def test_spacings_are_chosen_by_one_text():
    betas = get_named_beta_schedule("linear", 50)
    assert choose_timesteps(betas, "logsnr7") == space_by_log_snr(alpha_bar_of("linear", 50), 7)
    assert choose_timesteps(betas, "ddim5") == space_timesteps(50, "ddim5")
    assert choose_timesteps(betas, "") == set(range(50))
    with pytest.raises(ValueError, match="'logsnr' is not a count .*logsnrN"):
        choose_timesteps(betas, "logsnr")


def test_kept_times_keep_their_alpha_bar():
    whole, short = GaussianDiffusion(**settings(60)), SpacedDiffusion({0, 7, 30, 59}, **settings(60))
    assert short.num_timesteps == 4 and short.original_num_steps == 60 and short.timestep_map == [0, 7, 30, 59]
    np.testing.assert_allclose(short.alphas_cumprod, whole.alphas_cumprod[[0, 7, 30, 59]], rtol=1e-9)


def test_keeping_every_time_changes_nothing():
    whole, same = GaussianDiffusion(**settings(40)), SpacedDiffusion(range(40), **settings(40))
    np.testing.assert_allclose(same.betas, whole.betas, rtol=1e-9)


@pytest.mark.parametrize("rescale, wanted", [(False, [0, 7, 30]), (True, [0.0, 7 * 25.0, 30 * 25.0])])
def test_models_and_guidance_see_the_times_of_the_long_process(rescale, wanted):
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
    assert seen == [wanted] * 8


def test_a_single_kept_step_can_be_sampled():
    process = SpacedDiffusion(space_timesteps(20, "1"), **settings(20))
    sample = process.p_sample_loop(lambda x, t: torch.zeros_like(x), (2, 1, 3), device="cpu")
    assert sample.isfinite().all()


@pytest.mark.parametrize("times, found", [([], "none"), ([0, 20], "0 to 20"), ([-1, 3], "-1 to 3")])
def test_times_outside_the_process_are_refused(times, found):
    with pytest.raises(ValueError, match=f"from 0 to 19, found {found}"):
        SpacedDiffusion(times, **settings(20))
