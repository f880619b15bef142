import dataclasses
import math

import numpy as np
import pytest
import torch

from guided_diffusion_vae import nn
from guided_diffusion_vae.gaussian_diffusion import (
    DiffusionConfig, GaussianDiffusion, LossType, ModelMeanType, ModelVarType, betas_for_alpha_bar,
    get_named_beta_schedule,
)
from guided_diffusion_vae.runs.factories import create_gaussian_diffusion

STEPS = 24
SHAPES = [(3, 2, 5), (3, 2, 3, 4), (3, 2, 2, 3, 2)]      # one, two and three spatial axes
LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


def process(mean="EPSILON", var="FIXED_SMALL", loss="MSE", betas=None, **more):
    return GaussianDiffusion(
        betas=get_named_beta_schedule("cosine", STEPS) if betas is None else betas,
        model_mean_type=ModelMeanType[mean], model_var_type=ModelVarType[var], loss_type=LossType[loss], **more,
    )


def drawn(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_times(n, low=0):
    return torch.randint(low, STEPS, (n,), generator=torch.Generator().manual_seed(n))


def says(value):
    """A model that always answers `value`."""
    return lambda x, t, **_: value


class Timeless(torch.nn.Module):
    """A model that does not look at the time."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        return self.inner(x)


# Schedules.


def test_linear_schedule_adds_the_same_noise_in_any_number_of_steps():
    ends = [np.prod(1 - get_named_beta_schedule("linear", n)) for n in (500, 1000, 4000)]
    np.testing.assert_allclose(np.log(ends), math.log(ends[1]), rtol=0.02)


def test_betas_follow_alpha_bar_up_to_their_limit():
    betas = betas_for_alpha_bar(10, lambda u: 1 - u, max_beta=0.6)
    np.testing.assert_allclose(np.cumprod(1 - betas)[:8], 1 - np.arange(1, 9) / 10)
    assert betas[-1] == 0.6


def test_unknown_schedule_is_refused_with_the_known_ones():
    with pytest.raises(NotImplementedError, match="sigmoid is unknown; choose from linear, cosine"):
        get_named_beta_schedule("sigmoid", 10)


@pytest.mark.parametrize("betas, message", [
    ([0.1, 0.0], "beta 1 of 2 is 0.0"),
    ([0.1, float("nan")], "beta 1 of 2 is nan"),
    (get_named_beta_schedule("linear", 10), "--diffusion_steps above 20"),
    ([[0.1]], r"shape \(1, 1\)"),
    ([], "one row of numbers"),
])
def test_betas_outside_their_range_are_refused(betas, message):
    with pytest.raises(ValueError, match=message):
        process(betas=betas)


def test_schedules_stay_float64_attributes():
    p = process()
    for name in ("betas", "alphas_cumprod", "posterior_log_variance_clipped", "sqrt_recipm1_alphas_cumprod"):
        assert getattr(p, name).dtype == np.float64 and getattr(p, name).shape == (STEPS,)


def test_defaults_are_those_of_the_reference_and_everything_beyond_is_off():
    assert dataclasses.asdict(DiffusionConfig()) == {
        "learn_sigma": False, "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "",
        "use_kl": False, "predict_xstart": False, "rescale_timesteps": False, "rescale_learned_sigmas": False,
        "predict_v": False, "min_snr_gamma": 0.0,
    }


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_zero_snr_schedules_begin_as_the_plain_ones_and_end_in_noise(name):
    plain, zero = (np.cumprod(1 - get_named_beta_schedule(n, 1000)) for n in (name, f"{name}_zero_snr"))
    assert zero[0] == pytest.approx(plain[0]) and zero[-1] == 0 and (np.diff(zero) < 0).all()
    # Lin et al., algorithm 1: sqrt(alpha-bar) is changed linearly, so ratios of its differences stay.
    steps_plain, steps_zero = np.diff(np.sqrt(plain)), np.diff(np.sqrt(zero))
    np.testing.assert_allclose(steps_zero / steps_zero[0], steps_plain / steps_plain[0], rtol=1e-6)


@pytest.mark.parametrize("mean", ["EPSILON", "PREVIOUS_X"])
def test_a_schedule_that_ends_in_noise_refuses_predictions_that_say_nothing_there(mean):
    with pytest.raises(ValueError, match="ends in pure noise, .* set --predict_v True or --predict_xstart True"):
        process(mean, betas=get_named_beta_schedule("linear_zero_snr", 50))


# Forward process.


def test_variance_preserving_steps_compose_to_q():
    p, x = process(), torch.ones(STEPS, 1, 1)
    mean, variance = 1.0, 0.0
    wanted_mean, wanted_variance, log_variance = p.q_mean_variance(x, torch.arange(STEPS))
    for t, beta in enumerate(p.betas):
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        assert wanted_mean[t].item() == pytest.approx(mean, rel=1e-5)
        assert wanted_variance[t].item() == pytest.approx(variance, rel=1e-5)
    torch.testing.assert_close(log_variance.exp(), wanted_variance)


def test_posterior_is_what_bayes_says():
    p, t = process(), 9
    x_0, x_t = torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), -0.8)
    mean, variance, log_variance = p.q_posterior_mean_variance(x_0, x_t, torch.tensor([t]))
    # q(x_{t-1} | x_0) times q(x_t | x_{t-1}): precisions add, means are averaged by precision
    prior, step = 1 / (1 - p.alphas_cumprod[t - 1]), (1 - p.betas[t]) / p.betas[t]
    wanted = prior * p.alphas_cumprod[t - 1] ** 0.5 * 0.3 + step * -0.8 / (1 - p.betas[t]) ** 0.5
    assert variance.item() == pytest.approx(1 / (prior + step), rel=1e-5)
    assert mean.item() == pytest.approx(wanted / (prior + step), rel=1e-5)
    assert log_variance.item() == pytest.approx(-math.log(prior + step), rel=1e-5)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise is \(1, 2, 4\), the data \(1, 2, 5\)"):
        process().q_sample(torch.zeros(1, 2, 5), torch.tensor([0]), torch.zeros(1, 2, 4))


# Conversions and the reverse process.


@pytest.mark.parametrize("shape", SHAPES)
def test_eps_and_xstart_convert_both_ways(shape):
    p, x_t, x_0, t = process(), drawn(shape), drawn(shape, 1), some_times(3)
    eps = p._predict_eps_from_xstart(x_t, t, x_0)
    torch.testing.assert_close(p._predict_xstart_from_eps(x_t, t, eps), x_0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(p.q_sample(x_0, t, eps), x_t, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("var", ModelVarType)
def test_the_three_kinds_of_prediction_agree_where_they_are_exact(shape, var):
    x_0, eps, t = drawn(shape).clamp(-1, 1), drawn(shape, 1), some_times(3)
    x_t = process().q_sample(x_0, t, eps)
    previous = process().q_posterior_mean_variance(x_0, x_t, t)[0]
    head = [drawn(shape, 2)] if var in LEARNED else []
    for mean, prediction in [("EPSILON", eps), ("START_X", x_0), ("PREVIOUS_X", previous)]:
        model = says(torch.cat([prediction, *head], dim=1))
        out = process(mean, var.name).p_mean_variance(model, x_t, t, clip_denoised=False)
        torch.testing.assert_close(out["pred_xstart"], x_0, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(out["mean"], previous, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(out["variance"].log(), out["log_variance"], rtol=1e-4, atol=1e-5)
        assert out["variance"].shape == shape


@pytest.mark.parametrize("v, limit", [(-1.0, "FIXED_SMALL"), (1.0, "FIXED_LARGE")])
def test_learned_range_ends_at_the_fixed_variances(v, limit):
    x, t = drawn((3, 1, 4)), some_times(3, low=1)
    ranged = process(var="LEARNED_RANGE").p_mean_variance(says(torch.cat([x, torch.full_like(x, v)], 1)), x, t)
    fixed = process(var=limit).p_mean_variance(says(x), x, t)
    torch.testing.assert_close(ranged["log_variance"], fixed["log_variance"])


def test_xstart_is_denoised_and_then_clipped():
    x, t = torch.ones(2, 1, 3), torch.tensor([0, 5])
    p, model = process("START_X"), says(torch.full((2, 1, 3), 0.8))
    assert (p.p_mean_variance(model, x, t, True, lambda x: 3 * x)["pred_xstart"] == 1).all()
    assert p.p_mean_variance(model, x, t, False, lambda x: 3 * x)["pred_xstart"].mean() > 2


@pytest.mark.parametrize("var, channels, heads", [("LEARNED_RANGE", 2, 4), ("FIXED_LARGE", 4, 2)])
def test_channels_that_do_not_fit_the_variance_are_refused(var, channels, heads):
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=rf"gave \(1, {channels}, 3\).*{var} need \(1, {heads}, 3\) \(--learn_sigma"):
        process(var=var).p_mean_variance(says(torch.zeros(1, channels, 3)), x, torch.tensor([0]))


def test_rescaled_times_run_to_a_thousand():
    seen = []
    model = lambda x, t: seen.append(t.tolist()) or x     # noqa: E731
    process(rescale_timesteps=True).p_mean_variance(model, torch.zeros(2, 1, 1), torch.tensor([0, 12]))
    assert seen == [[0.0, 500.0]]


def test_guidance_moves_the_mean_by_variance_times_gradient():
    p, x, t = process(), drawn((2, 1, 3)), torch.tensor([3, 20])
    out = p.p_mean_variance(says(x), x, t)
    moved = p.condition_mean(lambda x, t, y: y * torch.ones_like(x), out, x, t, {"y": 2.0})
    torch.testing.assert_close(moved, out["mean"] + 2 * out["variance"])


def test_guided_score_adds_the_gradient_to_the_score():
    p, x, t = process(), drawn((2, 1, 3)), torch.tensor([3, 20])
    out = p.p_mean_variance(says(x), x, t, clip_denoised=False)
    gradient = drawn((2, 1, 3), 1)
    guided = p.condition_score(lambda x, t: gradient, out, x, t)
    sigma = torch.tensor(p.sqrt_one_minus_alphas_cumprod[[3, 20]]).float().view(2, 1, 1)
    scores = [-p._predict_eps_from_xstart(x, t, each["pred_xstart"]) / sigma for each in (out, guided)]
    torch.testing.assert_close(scores[1], scores[0] + gradient, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guided["mean"], p.q_posterior_mean_variance(guided["pred_xstart"], x, t)[0])


# Steps and loops.


@pytest.mark.parametrize("shape", SHAPES)
def test_ddim_with_full_noise_is_ddpm_with_the_small_variance(shape):
    p, x, t, noise = process("START_X"), drawn(shape), some_times(3, low=1), drawn(shape, 1)
    model = says(drawn(shape, 2))
    ddpm = p.p_sample(model, x, t, noise_fn=lambda x: noise)
    ddim = p.ddim_sample(model, x, t, eta=1.0, noise_fn=lambda x: noise)
    torch.testing.assert_close(ddim["sample"], ddpm["sample"], rtol=1e-4, atol=1e-4)


def test_ddim_forward_undoes_reverse():
    p, x = process("START_X"), drawn((2, 1, 4))
    model = says(drawn((2, 1, 4), 1).clamp(-1, 1))
    for t in range(3, 15):
        up = p.ddim_reverse_sample(model, x, torch.full((2,), t))["sample"]
        back = p.ddim_sample(model, up, torch.full((2,), t + 1))["sample"]
        torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
        x = up


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_that_knows_the_data_samples_it(loop, shape):
    x_0 = drawn(shape).clamp(-1, 1)
    sample = getattr(process("START_X", "FIXED_LARGE"), loop)(says(x_0), shape, device="cpu")
    torch.testing.assert_close(sample, x_0)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_end_where_their_progressive_forms_end(loop):
    p, model, start = process(), torch.nn.Conv1d(1, 1, 3, padding=1), drawn((2, 1, 4))
    call = lambda x, t: model(x)      # noqa: E731
    torch.manual_seed(0)
    steps = list(getattr(p, loop + "_progressive")(call, start.shape, noise=start, device="cpu"))
    torch.manual_seed(0)
    final = getattr(p, loop)(call, start.shape, noise=start, device="cpu")
    assert len(steps) == STEPS and final.equal(steps[-1]["sample"]) and not final.requires_grad


def test_sampling_takes_the_device_of_the_model_and_leaves_gradients_on():
    model = torch.nn.Linear(4, 4)
    steps = process().p_sample_loop_progressive(Timeless(model), (2, 1, 4))
    for step in steps:
        assert torch.is_grad_enabled() and not step["sample"].requires_grad


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_keyed_noise_makes_a_sample_independent_of_its_batch(loop):
    model = torch.nn.Linear(4, 4)

    def run(slots):
        calls = iter(range(1 + STEPS))

        def noise_fn(x):
            step = next(calls)
            return nn.keyed_randn(x.shape[1:], [(7, step, slot) for slot in slots]).to(x.device)

        sample = getattr(process(), loop)(Timeless(model), (len(slots), 1, 4), noise_fn=noise_fn)
        assert next(calls, None) is None      # once for the start, once a step
        return sample

    whole = run([0, 1, 2])
    torch.testing.assert_close(torch.cat([run([0]), run([1, 2])]), whole)


@pytest.mark.parametrize("loop, options", [("p_sample_loop", {}), ("ddim_sample_loop", {"eta": 0.0})])
def test_noise_is_drawn_once_a_step_whatever_becomes_of_it(loop, options, monkeypatch):
    count, kept = [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: count.append(1) or kept(x))
    getattr(process(), loop)(says(torch.zeros(1, 1, 2)), (1, 1, 2), device="cpu", **options)
    assert len(count) == STEPS


def test_no_step_reads_a_value_back_from_the_device():
    # Tensors on the meta device have no values: whatever needs one on the host fails.
    p, x = process(var="LEARNED_RANGE", loss="RESCALED_MSE"), torch.empty(2, 1, 4, device="meta")
    t = torch.empty(2, dtype=torch.int64, device="meta")
    model, guide = says(torch.empty(2, 2, 4, device="meta")), says(x)
    assert p.p_sample_loop(model, x.shape, device="meta", cond_fn=guide).shape == x.shape
    assert p.ddim_sample_loop(model, x.shape, device="meta", cond_fn=guide, eta=0.5).shape == x.shape
    p.ddim_reverse_sample(model, x, t)
    p.training_losses(model, x, t)
    p.calc_bpd_loop(model, x)


def test_schedules_are_uploaded_once():
    p, uploads, kept = process(), [], torch.from_numpy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "from_numpy", lambda a: uploads.append(a.shape) or kept(a))
        steps = p.p_sample_loop_progressive(says(torch.zeros(2, 1, 3)), (2, 1, 3), device="cpu")
        next(steps)
        first = len(uploads)
        for _ in steps:
            pass
    assert first == len(uploads) <= 8


def test_schedules_first_met_in_inference_serve_training():
    p, x, t = process(), drawn((2, 1, 4)), some_times(2)
    weight = torch.nn.Parameter(torch.ones(1))
    with torch.inference_mode():
        p.training_losses(says(x * weight), x, t)
        p.p_sample(says(x), x, t)
    total = p.p_mean_variance(says(x * weight), x, t)["mean"].sum()
    assert torch.autograd.grad(total, weight)[0].isfinite()


def test_progress_shows_a_bar(capsys):
    process().ddim_sample_loop(says(torch.zeros(1, 1, 2)), (1, 1, 2), device="cpu", progress=True)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


def test_start_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise is \(1, 1, 3\), the samples asked for are \(1, 1, 2\)"):
        process().p_sample_loop(says(None), (1, 1, 2), noise=torch.zeros(1, 1, 3), device="cpu")


def test_eta_outside_its_range_is_refused():
    x, t = torch.zeros(1, 1, 2), torch.tensor([4])
    with pytest.raises(ValueError, match="eta is 1.5"):
        process().ddim_sample(says(x), x, t, eta=1.5)
    with pytest.raises(ValueError, match="eta is 0.5, must be 0 to reverse"):
        process().ddim_reverse_sample(says(x), x, t, eta=0.5)


# Losses.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", ModelMeanType)
def test_an_exact_prediction_has_no_loss(shape, mean):
    p, x_0, eps, t = process(mean.name), drawn(shape), drawn(shape, 1), some_times(3)
    x_t = p.q_sample(x_0, t, eps)
    exact = {"EPSILON": eps, "START_X": x_0, "PREVIOUS_X": p.q_posterior_mean_variance(x_0, x_t, t)[0],
             "VELOCITY": p._velocity(x_0, t, eps)}[mean.name]
    terms = p.training_losses(says(exact), x_0, t, noise=eps)
    assert sorted(terms) == ["loss", "mse"] and terms["loss"].shape == (3,) and (terms["loss"] < 1e-10).all()


def test_bound_teaches_the_variance_alone_beside_a_squared_error():
    p, x, t = process(var="LEARNED_RANGE", loss="RESCALED_MSE"), drawn((3, 1, 4)), torch.tensor([0, 5, 20])
    prediction, head = drawn((3, 1, 4), 1).requires_grad_(), drawn((3, 1, 4), 2).requires_grad_()
    terms = p.training_losses(says(torch.cat([prediction, head], 1)), x, t, noise=drawn((3, 1, 4), 3))
    assert sorted(terms) == ["loss", "mse", "vb"]
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    grads = torch.autograd.grad(terms["vb"].sum(), [prediction, head], retain_graph=True, allow_unused=True)
    assert (grads[0] == 0).all() and (grads[1] != 0).any(dim=(1, 2)).all()
    assert (torch.autograd.grad(terms["mse"].sum(), head)[0] == 0).all()


def test_velocity_is_the_derivative_of_x_by_the_angle_of_its_noise():
    # x = cos(phi) x_0 + sin(phi) eps (progressive distillation, appendix D)
    p, x_0, eps, t = process(), drawn((2, 1, 3)).double(), drawn((2, 1, 3), 1).double(), torch.tensor([3, 20])
    phi = torch.from_numpy(np.arccos(p.sqrt_alphas_cumprod))[t].view(2, 1, 1).requires_grad_()
    x = phi.cos() * x_0 + phi.sin() * eps
    slope = torch.stack([torch.autograd.grad(v, phi, retain_graph=True)[0].sum() for v in x.flatten()]).view_as(x)
    torch.testing.assert_close(p._velocity(x_0, t, eps), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_noise_x_0_and_velocity_are_three_words_for_one_reverse_step(clip):
    t, x_0, eps = some_times(3), drawn((3, 1, 5)), drawn((3, 1, 5), 1)
    x_t = process().q_sample(x_0, t, eps)
    said = {"EPSILON": eps, "START_X": x_0, "VELOCITY": process()._velocity(x_0, t, eps)}
    steps = [process(mean).p_mean_variance(says(value), x_t, t, clip_denoised=clip) for mean, value in said.items()]
    for step in steps[1:]:
        for name in ("mean", "variance", "pred_xstart"):
            torch.testing.assert_close(step[name], steps[0][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("respacing", ["", "10"])
def test_sampling_from_pure_noise_on_finds_what_the_network_knows(respacing):
    known = torch.tensor([[[0.3, -0.8]]])
    p = create_gaussian_diffusion(steps=40, noise_schedule="linear_zero_snr", predict_v=True,
                                              timestep_respacing=respacing)
    whole = create_gaussian_diffusion(steps=40, noise_schedule="linear_zero_snr", predict_v=True)

    def model(x, t):
        eps = whole._predict_eps_from_xstart(x, t, known.expand_as(x))
        return whole._velocity(known.expand_as(x), t, eps)

    for loop in (p.p_sample_loop, p.ddim_sample_loop):
        x = loop(model, (4, 1, 2), device="cpu")
        torch.testing.assert_close(x, known.expand(4, 1, 2), atol=1e-4, rtol=0)
    pull = lambda x, t: torch.ones_like(x)  # guidance cannot bend what holds no signal, nor make it infinite
    assert torch.isfinite(p.ddim_sample_loop(model, (4, 1, 2), device="cpu", cond_fn=pull)).all()


@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "VELOCITY"])
def test_min_snr_weighs_an_error_of_x_0_alike_whatever_is_predicted(mean):
    p = process(mean, loss="MIN_SNR", min_snr_gamma=2.0)
    x_0, eps, t = drawn((4, 1, 5)), drawn((4, 1, 5), 1), some_times(4)
    x_t = p.q_sample(x_0, t, eps)
    wrong = x_0 + 0.3
    said = {"EPSILON": p._predict_eps_from_xstart(x_t, t, wrong), "START_X": wrong}
    said["VELOCITY"] = p._velocity(wrong, t, said["EPSILON"])
    snr = torch.from_numpy(p.alphas_cumprod / (1 - p.alphas_cumprod))[t].float()
    loss = p.training_losses(says(said[mean]), x_0, t, noise=eps)["loss"]
    torch.testing.assert_close(loss, 0.09 * snr.clamp(max=2), rtol=1e-3, atol=1e-5)


def test_min_snr_needs_a_bound_and_a_prediction_that_it_is_defined_for():
    with pytest.raises(ValueError, match="gamma -1.0 of EPSILON: gamma is above 0 .--min_snr_gamma"):
        process(loss="MIN_SNR", min_snr_gamma=-1.0)
    with pytest.raises(ValueError, match="of PREVIOUS_X: .* predicts noise, x_0 or the velocity"):
        process("PREVIOUS_X", loss="MIN_SNR")


def test_real_numbers_are_coded_by_a_density_and_levels_by_a_probability():
    x, t = drawn((3, 1, 6)), torch.zeros(3, dtype=torch.long)
    p = process("START_X", discrete_data=False)
    bound = p._vb_terms_bpd(says(x + 0.01), x, p.q_sample(x, t), t, clip_denoised=False)
    out = p.p_mean_variance(says(x + 0.01), p.q_sample(x, t), t, clip_denoised=False)
    assert process("START_X").discrete_data and bound["output"].shape == (3,)
    density = torch.distributions.Normal(out["mean"], (0.5 * out["log_variance"]).exp()).log_prob(x)
    levels = process("START_X")._vlb_term(out, x, p.q_sample(x, t), t)
    torch.testing.assert_close(p._vlb_term(out, x, p.q_sample(x, t), t), -density.mean((1, 2)) / math.log(2))
    assert (levels - p._vlb_term(out, x, p.q_sample(x, t), t)).abs().min() > 0.1


def test_the_bound_of_latents_is_that_of_the_exact_model_of_a_gaussian():
    # Data N(0, 1): the exact network is linear, and every reverse step but the last has the variance beta, which is
    # FIXED_LARGE. So the bound is the entropy and what the last step's variance of another time costs.
    p = create_gaussian_diffusion(discrete_data=False)
    spread = torch.from_numpy(p.sqrt_one_minus_alphas_cumprod).float()
    exact = lambda x, t: spread[t].view(-1, 1, 1) * x
    torch.manual_seed(0)
    bits = p.calc_bpd_loop(exact, drawn((64, 1, 64)), clip_denoised=False)
    nats = bits["total_bpd"].mean().item() * math.log(2)
    ratio = p.betas[0] / p.posterior_variance[1]
    expected = 0.5 * math.log(2 * math.pi * math.e) + 0.5 * (ratio - 1 - math.log(ratio))
    assert nats == pytest.approx(expected, abs=0.03)


def test_rescaled_losses_are_multiples_of_the_plain_ones():
    x, t, eps = drawn((3, 1, 4)).clamp(-1, 1), torch.tensor([0, 5, 20]), drawn((3, 1, 4), 1)
    model = says(drawn((3, 2, 4), 2))
    terms = {loss: process(var="LEARNED", loss=loss.name).training_losses(model, x, t, noise=eps) for loss in LossType}
    torch.testing.assert_close(terms[LossType.RESCALED_KL]["loss"], STEPS * terms[LossType.KL]["loss"])
    torch.testing.assert_close(terms[LossType.RESCALED_MSE]["vb"], STEPS / 1000 * terms[LossType.MSE]["vb"])
    torch.testing.assert_close(terms[LossType.KL]["loss"], terms[LossType.MSE]["vb"])
    bound = process(var="LEARNED")._vb_terms_bpd(model, x, process().q_sample(x, t, eps), t, clip_denoised=False)
    torch.testing.assert_close(terms[LossType.KL]["loss"], bound["output"])


def test_knowing_the_posterior_costs_no_bits():
    p, x_0, t = process("START_X"), drawn((4, 1, 5)).clamp(-1, 1), torch.tensor([1, 2, 10, 23])
    bound = p._vb_terms_bpd(says(x_0), x_0, p.q_sample(x_0, t), t)
    assert bound["output"].abs().max() < 1e-6 and bound["pred_xstart"].equal(x_0)


def test_bits_per_dimension_are_the_terms_and_the_prior():
    x = (torch.arange(16.0).view(2, 1, 8) * 17 / 127.5 - 1).clamp(-1, 1)
    bits = process("START_X").calc_bpd_loop(says(x), x)
    assert {name: tuple(value.shape) for name, value in bits.items()} == {
        "total_bpd": (2,), "prior_bpd": (2,), "vb": (2, STEPS), "xstart_mse": (2, STEPS), "mse": (2, STEPS),
    }
    torch.testing.assert_close(bits["total_bpd"], bits["vb"].sum(dim=1) + bits["prior_bpd"])
    assert (bits["xstart_mse"] == 0).all() and (bits["mse"] < 1e-6).all()
    assert bits["vb"][:, :-1].abs().max() < 1e-6 < bits["vb"][:, -1].min()      # column 0 is the last time


def test_data_of_unit_variance_has_no_prior_cost_once_all_signal_is_gone():
    p = process(betas=get_named_beta_schedule("linear", 1000))
    assert p._prior_bpd(drawn((2, 1, 500))).abs().max() < 1e-4
