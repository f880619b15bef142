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


def normal(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_timesteps(n, low=0):
    return torch.randint(low, STEPS, (n,), generator=torch.Generator().manual_seed(n))


def constant_model(value):
    """Return a model that returns `value` for every input."""
    return lambda x, t, **_: value


class Timeless(torch.nn.Module):
    """Model that ignores the timestep."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, t):
        return self.inner(x)


# --- Schedules ---


def test_linear_schedule_total_noise_is_independent_of_steps():
    ends = [np.prod(1 - get_named_beta_schedule("linear", n)) for n in (500, 1000, 4000)]
    np.testing.assert_allclose(np.log(ends), math.log(ends[1]), rtol=0.02)


def test_named_schedules_are_those_of_the_papers():
    linear, cosine = (get_named_beta_schedule(name, 1000) for name in ("linear", "cosine"))
    assert (linear[0], linear[-1]) == pytest.approx((1e-4, 0.02)) and np.ptp(np.diff(linear)) < 1e-12
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(np.cumprod(1 - cosine)[:-1], f[1:-1] / f[0], rtol=1e-6)
    assert cosine[-1] == 0.999


def test_betas_follow_alpha_bar_up_to_max_beta():
    betas = betas_for_alpha_bar(10, lambda u: 1 - u, max_beta=0.6)
    np.testing.assert_allclose(np.cumprod(1 - betas)[:8], 1 - np.arange(1, 9) / 10)
    assert betas[-1] == 0.6


def test_unknown_schedule_raises_with_known_ones():
    with pytest.raises(NotImplementedError, match="--noise_schedule sigmoid: expected one of: linear, cosine"):
        get_named_beta_schedule("sigmoid", 10)


@pytest.mark.parametrize("betas, message", [
    ([0.1, 0.0], r"beta 1 of 2 must be in \(0, 1\], got 0.0"),
    ([0.1, float("nan")], r"beta 1 of 2 must be in \(0, 1\], got nan"),
    (get_named_beta_schedule("linear", 10), "--diffusion_steps > 20"),
    ([[0.1]], r"betas: expected shape \[T\], got \[1, 1\]"),
    ([], r"expected shape \[T\], got \[0\]"),
])
def test_betas_outside_range_raise(betas, message):
    with pytest.raises(ValueError, match=message):
        process(betas=betas)


def test_schedules_are_float64_attributes():
    p = process()
    for name in ("betas", "alphas_cumprod", "posterior_log_variance_clipped", "sqrt_recipm1_alphas_cumprod"):
        assert getattr(p, name).dtype == np.float64 and getattr(p, name).shape == (STEPS,)


def test_defaults_are_those_of_guided_diffusion():
    assert dataclasses.asdict(DiffusionConfig()) == {
        "learn_sigma": False, "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "",
        "use_kl": False, "predict_xstart": False, "rescale_timesteps": False, "rescale_learned_sigmas": False,
        "predict_v": False, "min_snr_gamma": 0.0, "process": "gaussian",
    }


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_zero_snr_schedules_start_unchanged_and_end_in_pure_noise(name):
    plain, zero = (np.cumprod(1 - get_named_beta_schedule(n, 1000)) for n in (name, f"{name}_zero_snr"))
    assert zero[0] == pytest.approx(plain[0]) and zero[-1] == 0 and (np.diff(zero) < 0).all()
    # Lin et al., Alg. 1: sqrt(alpha-bar) changes linearly, so that ratios of its differences are kept.
    steps_plain, steps_zero = np.diff(np.sqrt(plain)), np.diff(np.sqrt(zero))
    np.testing.assert_allclose(steps_zero / steps_zero[0], steps_plain / steps_plain[0], rtol=1e-6)


@pytest.mark.parametrize("mean", ["EPSILON", "PREVIOUS_X"])
def test_pure_noise_schedule_rejects_predictions_undefined_there(mean):
    with pytest.raises(ValueError, match="ends in pure noise, .* set --predict_v True or --predict_xstart True"):
        process(mean, betas=get_named_beta_schedule("linear_zero_snr", 50))


# --- Forward process ---


def test_variance_preserving_steps_compose_to_q():
    p, x = process(), torch.ones(STEPS, 1, 1)
    mean, variance = 1.0, 0.0
    wanted_mean, wanted_variance, log_variance = p.q_mean_variance(x, torch.arange(STEPS))
    for t, beta in enumerate(p.betas):
        mean, variance = mean * (1 - beta) ** 0.5, variance * (1 - beta) + beta
        assert wanted_mean[t].item() == pytest.approx(mean, rel=1e-5)
        assert wanted_variance[t].item() == pytest.approx(variance, rel=1e-5)
    torch.testing.assert_close(log_variance.exp(), wanted_variance)


def test_posterior_follows_bayes_rule():
    p, t = process(), 9
    x_0, x_t = torch.full((1, 1, 1), 0.3), torch.full((1, 1, 1), -0.8)
    mean, variance, log_variance = p.q_posterior_mean_variance(x_0, x_t, torch.tensor([t]))
    # q(x_{t-1} | x_0) times q(x_t | x_{t-1}): precisions add, means are averaged by precision
    prior, step = 1 / (1 - p.alphas_cumprod[t - 1]), (1 - p.betas[t]) / p.betas[t]
    wanted = prior * p.alphas_cumprod[t - 1] ** 0.5 * 0.3 + step * -0.8 / (1 - p.betas[t]) ** 0.5
    assert variance.item() == pytest.approx(1 / (prior + step), rel=1e-5)
    assert mean.item() == pytest.approx(wanted / (prior + step), rel=1e-5)
    assert log_variance.item() == pytest.approx(-math.log(prior + step), rel=1e-5)


def test_noise_of_another_shape_raises():
    with pytest.raises(ValueError, match=r"noise: expected shape \(1, 2, 5\), got \(1, 2, 4\)"):
        process().q_sample(torch.zeros(1, 2, 5), torch.tensor([0]), torch.zeros(1, 2, 4))


# --- Conversions and the reverse process ---


@pytest.mark.parametrize("shape", SHAPES)
def test_eps_and_xstart_convert_both_ways(shape):
    p, x_t, x_0, t = process(), normal(shape), normal(shape, 1), random_timesteps(3)
    eps = p._predict_eps_from_xstart(x_t, t, x_0)
    torch.testing.assert_close(p._predict_xstart_from_eps(x_t, t, eps), x_0, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(p.q_sample(x_0, t, eps), x_t, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("var", ModelVarType)
def test_exact_predictions_of_all_kinds_agree(shape, var):
    x_0, eps, t = normal(shape).clamp(-1, 1), normal(shape, 1), random_timesteps(3)
    x_t = process().q_sample(x_0, t, eps)
    previous = process().q_posterior_mean_variance(x_0, x_t, t)[0]
    head = [normal(shape, 2)] if var in LEARNED else []
    for mean, prediction in [("EPSILON", eps), ("START_X", x_0), ("PREVIOUS_X", previous)]:
        model = constant_model(torch.cat([prediction, *head], dim=1))
        out = process(mean, var.name).p_mean_variance(model, x_t, t, clip_denoised=False)
        torch.testing.assert_close(out["pred_xstart"], x_0, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(out["mean"], previous, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(out["variance"].log(), out["log_variance"], rtol=1e-4, atol=1e-5)
        assert out["variance"].shape == shape


@pytest.mark.parametrize("v, limit", [(-1.0, "FIXED_SMALL"), (1.0, "FIXED_LARGE")])
def test_learned_range_ends_at_the_fixed_variances(v, limit):
    x, t = normal((3, 1, 4)), random_timesteps(3, low=1)
    model = constant_model(torch.cat([x, torch.full_like(x, v)], 1))
    ranged = process(var="LEARNED_RANGE").p_mean_variance(model, x, t)
    fixed = process(var=limit).p_mean_variance(constant_model(x), x, t)
    torch.testing.assert_close(ranged["log_variance"], fixed["log_variance"])


def test_xstart_is_denoised_and_then_clipped():
    x, t = torch.ones(2, 1, 3), torch.tensor([0, 5])
    p, model = process("START_X"), constant_model(torch.full((2, 1, 3), 0.8))
    assert (p.p_mean_variance(model, x, t, True, lambda x: 3 * x)["pred_xstart"] == 1).all()
    assert p.p_mean_variance(model, x, t, False, lambda x: 3 * x)["pred_xstart"].mean() > 2


@pytest.mark.parametrize("var, channels, heads", [("LEARNED_RANGE", 2, 4), ("FIXED_LARGE", 4, 2)])
def test_channels_that_do_not_match_the_variance_raise(var, channels, heads):
    x = torch.zeros(1, 2, 3)
    message = rf"output for {var}: expected shape \(1, {heads}, 3\), got \(1, {channels}, 3\); --learn_sigma"
    with pytest.raises(ValueError, match=message):
        process(var=var).p_mean_variance(constant_model(torch.zeros(1, channels, 3)), x, torch.tensor([0]))


def test_rescaled_timesteps_are_below_1000():
    seen = []
    model = lambda x, t: seen.append(t.tolist()) or x
    process(rescale_timesteps=True).p_mean_variance(model, torch.zeros(2, 1, 1), torch.tensor([0, 12]))
    assert seen == [[0.0, 500.0]]


def test_guidance_shifts_the_mean_by_variance_times_gradient():
    p, x, t = process(), normal((2, 1, 3)), torch.tensor([3, 20])
    out = p.p_mean_variance(constant_model(x), x, t)
    moved = p.condition_mean(lambda x, t, y: y * torch.ones_like(x), out, x, t, {"y": 2.0})
    torch.testing.assert_close(moved, out["mean"] + 2 * out["variance"])


def test_guided_score_adds_the_gradient_to_the_score():
    p, x, t = process(), normal((2, 1, 3)), torch.tensor([3, 20])
    out = p.p_mean_variance(constant_model(x), x, t, clip_denoised=False)
    gradient = normal((2, 1, 3), 1)
    guided = p.condition_score(lambda x, t: gradient, out, x, t)
    sigma = torch.tensor(p.sqrt_one_minus_alphas_cumprod[[3, 20]]).float().view(2, 1, 1)
    scores = [-p._predict_eps_from_xstart(x, t, each["pred_xstart"]) / sigma for each in (out, guided)]
    torch.testing.assert_close(scores[1], scores[0] + gradient, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(guided["mean"], p.q_posterior_mean_variance(guided["pred_xstart"], x, t)[0])


# --- Steps and loops ---


@pytest.mark.parametrize("shape", SHAPES)
def test_ddim_with_full_noise_is_ddpm_with_the_small_variance(shape):
    p, x, t, noise = process("START_X"), normal(shape), random_timesteps(3, low=1), normal(shape, 1)
    model = constant_model(normal(shape, 2))
    ddpm = p.p_sample(model, x, t, noise_fn=lambda x: noise)
    ddim = p.ddim_sample(model, x, t, eta=1.0, noise_fn=lambda x: noise)
    torch.testing.assert_close(ddim["sample"], ddpm["sample"], rtol=1e-4, atol=1e-4)


def test_reverse_step_after_the_last_timestep_is_pure_noise():
    p, x, t = process("START_X"), normal((2, 1, 4)), torch.full((2,), STEPS - 1)
    x_0 = normal((2, 1, 4), 1).clamp(-1, 1)
    eps = p._predict_eps_from_xstart(x, t, x_0)
    torch.testing.assert_close(p.ddim_reverse_sample(constant_model(x_0), x, t)["sample"], eps)


def test_ddim_forward_undoes_reverse():
    p, x = process("START_X"), normal((2, 1, 4))
    model = constant_model(normal((2, 1, 4), 1).clamp(-1, 1))
    for t in range(3, 15):
        up = p.ddim_reverse_sample(model, x, torch.full((2,), t))["sample"]
        back = p.ddim_sample(model, up, torch.full((2,), t + 1))["sample"]
        torch.testing.assert_close(back, x, rtol=1e-4, atol=1e-4)
        x = up


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_model_samples_the_data(loop, shape):
    x_0 = normal(shape).clamp(-1, 1)
    sample = getattr(process("START_X", "FIXED_LARGE"), loop)(constant_model(x_0), shape, device="cpu")
    torch.testing.assert_close(sample, x_0)


@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_loops_return_last_sample_of_progressive_forms(loop):
    p, model, start = process(), torch.nn.Conv1d(1, 1, 3, padding=1), normal((2, 1, 4))
    call = lambda x, t: model(x)
    torch.manual_seed(0)
    steps = list(getattr(p, loop + "_progressive")(call, start.shape, noise=start, device="cpu"))
    torch.manual_seed(0)
    final = getattr(p, loop)(call, start.shape, noise=start, device="cpu")
    assert len(steps) == STEPS and final.equal(steps[-1]["sample"]) and not final.requires_grad


def test_sampling_uses_device_of_model_and_keeps_gradients_enabled():
    model = torch.nn.Linear(4, 4)
    steps = process().p_sample_loop_progressive(Timeless(model), (2, 1, 4))
    for step in steps:
        assert torch.is_grad_enabled() and not step["sample"].requires_grad


@pytest.mark.parametrize("loop, options, draws", [
    ("p_sample_loop", {}, 1 + STEPS), ("ddim_sample_loop", {"eta": 0.5}, 1 + STEPS), ("ddim_sample_loop", {}, 1),
])
def test_keyed_noise_makes_a_sample_independent_of_its_batch(loop, options, draws):
    model = torch.nn.Linear(4, 4)

    def run(slots):
        calls = iter(range(draws))

        def noise_fn(x):
            step = next(calls)
            return nn.keyed_randn(x.shape[1:], [(7, step, slot) for slot in slots]).to(x.device)

        sample = getattr(process(), loop)(Timeless(model), (len(slots), 1, 4), noise_fn=noise_fn, **options)
        assert next(calls, None) is None      # once for the start, once per step that adds noise
        return sample

    whole = run([0, 1, 2])
    torch.testing.assert_close(torch.cat([run([0]), run([1, 2])]), whole)


@pytest.mark.parametrize("loop, options", [("p_sample_loop", {}), ("ddim_sample_loop", {"eta": 0.0})])
def test_noise_is_sampled_once_per_step(loop, options, monkeypatch):
    count, kept = [], torch.randn_like
    monkeypatch.setattr(torch, "randn_like", lambda x: count.append(1) or kept(x))
    getattr(process(), loop)(constant_model(torch.zeros(1, 1, 2)), (1, 1, 2), device="cpu", **options)
    assert len(count) == STEPS


def test_no_step_reads_a_value_back_from_the_device():
    # Tensors on the meta device have no values: reading one on the host fails.
    p, x = process(var="LEARNED_RANGE", loss="RESCALED_MSE"), torch.empty(2, 1, 4, device="meta")
    t = torch.empty(2, dtype=torch.int64, device="meta")
    model, guide = constant_model(torch.empty(2, 2, 4, device="meta")), constant_model(x)
    assert p.p_sample_loop(model, x.shape, device="meta", cond_fn=guide).shape == x.shape
    assert p.ddim_sample_loop(model, x.shape, device="meta", cond_fn=guide, eta=0.5).shape == x.shape
    p.ddim_reverse_sample(model, x, t)
    p.training_losses(model, x, t)
    p.calc_bpd_loop(model, x)


def test_schedules_are_uploaded_once():
    p, uploads, kept = process(), [], torch.from_numpy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "from_numpy", lambda a: uploads.append(a.shape) or kept(a))
        steps = p.p_sample_loop_progressive(constant_model(torch.zeros(2, 1, 3)), (2, 1, 3), device="cpu")
        next(steps)
        first = len(uploads)
        for _ in steps:
            pass
    assert first == len(uploads) <= 8


def test_schedules_first_used_in_inference_work_in_training():
    p, x, t = process(), normal((2, 1, 4)), random_timesteps(2)
    weight = torch.nn.Parameter(torch.ones(1))
    with torch.inference_mode():
        p.training_losses(constant_model(x * weight), x, t)
        p.p_sample(constant_model(x), x, t)
    total = p.p_mean_variance(constant_model(x * weight), x, t)["mean"].sum()
    assert torch.autograd.grad(total, weight)[0].isfinite()


def test_progress_shows_a_bar(capsys):
    process().ddim_sample_loop(constant_model(torch.zeros(1, 1, 2)), (1, 1, 2), device="cpu", progress=True)
    assert f"{STEPS}/{STEPS}" in capsys.readouterr().err


def test_start_of_another_shape_raises():
    with pytest.raises(ValueError, match=r"noise: expected shape \(1, 1, 2\), got \(1, 1, 3\)"):
        process().p_sample_loop(constant_model(None), (1, 1, 2), noise=torch.zeros(1, 1, 3), device="cpu")


def test_eta_outside_range_raises():
    x, t = torch.zeros(1, 1, 2), torch.tensor([4])
    with pytest.raises(ValueError, match=r"eta must be in \[0, 1\], got 1.5"):
        process().ddim_sample(constant_model(x), x, t, eta=1.5)
    with pytest.raises(ValueError, match="eta must be 0 in reverse steps, got 0.5"):
        process().ddim_reverse_sample(constant_model(x), x, t, eta=0.5)


# --- Losses ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mean", ModelMeanType)
def test_an_exact_prediction_has_no_loss(shape, mean):
    p, x_0, eps, t = process(mean.name), normal(shape), normal(shape, 1), random_timesteps(3)
    x_t = p.q_sample(x_0, t, eps)
    exact = {"EPSILON": eps, "START_X": x_0, "PREVIOUS_X": p.q_posterior_mean_variance(x_0, x_t, t)[0],
             "VELOCITY": p._velocity(x_0, t, eps)}[mean.name]
    terms = p.training_losses(constant_model(exact), x_0, t, noise=eps)
    assert sorted(terms) == ["loss", "mse"] and terms["loss"].shape == (3,) and (terms["loss"] < 1e-10).all()


def test_vlb_gradient_reaches_the_variance_head_only():
    p, x, t = process(var="LEARNED_RANGE", loss="RESCALED_MSE"), normal((3, 1, 4)), torch.tensor([0, 5, 20])
    prediction, head = normal((3, 1, 4), 1).requires_grad_(), normal((3, 1, 4), 2).requires_grad_()
    terms = p.training_losses(constant_model(torch.cat([prediction, head], 1)), x, t, noise=normal((3, 1, 4), 3))
    assert sorted(terms) == ["loss", "mse", "vb"]
    torch.testing.assert_close(terms["loss"], terms["mse"] + terms["vb"])
    grads = torch.autograd.grad(terms["vb"].sum(), [prediction, head], retain_graph=True, allow_unused=True)
    assert (grads[0] == 0).all() and (grads[1] != 0).any(dim=(1, 2)).all()
    assert (torch.autograd.grad(terms["mse"].sum(), head)[0] == 0).all()


def test_velocity_is_the_derivative_of_x_t_by_its_angle():
    # x = cos(phi) x_0 + sin(phi) eps (progressive distillation, appendix D)
    p, x_0, eps, t = process(), normal((2, 1, 3)).double(), normal((2, 1, 3), 1).double(), torch.tensor([3, 20])
    phi = torch.from_numpy(np.arccos(p.sqrt_alphas_cumprod))[t].view(2, 1, 1).requires_grad_()
    x = phi.cos() * x_0 + phi.sin() * eps
    slope = torch.stack([torch.autograd.grad(v, phi, retain_graph=True)[0].sum() for v in x.flatten()]).view_as(x)
    torch.testing.assert_close(p._velocity(x_0, t, eps), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [True, False])
def test_noise_x0_and_velocity_give_the_same_reverse_step(clip):
    t, x_0, eps = random_timesteps(3), normal((3, 1, 5)), normal((3, 1, 5), 1)
    x_t = process().q_sample(x_0, t, eps)
    predictions = {"EPSILON": eps, "START_X": x_0, "VELOCITY": process()._velocity(x_0, t, eps)}
    steps = [process(mean).p_mean_variance(constant_model(value), x_t, t, clip_denoised=clip)
             for mean, value in predictions.items()]
    for step in steps[1:]:
        for name in ("mean", "variance", "pred_xstart"):
            torch.testing.assert_close(step[name], steps[0][name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("respacing", ["", "10"])
def test_sampling_from_pure_noise_returns_exact_x0(respacing):
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
    gradient = lambda x, t: torch.ones_like(x)  # guidance is undefined without signal and must stay finite
    assert torch.isfinite(p.ddim_sample_loop(model, (4, 1, 2), device="cpu", cond_fn=gradient)).all()


@pytest.mark.parametrize("mean", ["EPSILON", "START_X", "VELOCITY"])
def test_min_snr_weight_of_x0_error_is_independent_of_prediction(mean):
    p = process(mean, loss="MIN_SNR", min_snr_gamma=2.0)
    x_0, eps, t = normal((4, 1, 5)), normal((4, 1, 5), 1), random_timesteps(4)
    x_t = p.q_sample(x_0, t, eps)
    wrong = x_0 + 0.3
    predictions = {"EPSILON": p._predict_eps_from_xstart(x_t, t, wrong), "START_X": wrong}
    predictions["VELOCITY"] = p._velocity(wrong, t, predictions["EPSILON"])
    snr = torch.from_numpy(p.alphas_cumprod / (1 - p.alphas_cumprod))[t].float()
    loss = p.training_losses(constant_model(predictions[mean]), x_0, t, noise=eps)["loss"]
    torch.testing.assert_close(loss, 0.09 * snr.clamp(max=2), rtol=1e-3, atol=1e-5)


def test_min_snr_weights_the_squared_error_only():
    x, t, eps = normal((3, 1, 4)), torch.tensor([0, 5, 20]), normal((3, 1, 4), 1)
    model = constant_model(normal((3, 2, 4), 2))
    plain, weighted = (process(var="LEARNED", loss=loss).training_losses(model, x, t, noise=eps)
                       for loss in ("MSE", "MIN_SNR"))
    torch.testing.assert_close(weighted["vb"], plain["vb"])
    torch.testing.assert_close(weighted["loss"], weighted["mse"] + weighted["vb"])
    snr = process().alphas_cumprod[[0, 5, 20]] / (1 - process().alphas_cumprod[[0, 5, 20]])
    torch.testing.assert_close(weighted["mse"], plain["mse"] * torch.tensor(np.minimum(snr, 5.0) / snr).float())


def test_min_snr_without_bound_or_defined_prediction_raises():
    with pytest.raises(ValueError, match="expected --min_snr_gamma > 0 .*got -1.0 and EPSILON"):
        process(loss="MIN_SNR", min_snr_gamma=-1.0)
    with pytest.raises(ValueError, match="a prediction of noise, x_0 or velocity, .* PREVIOUS_X"):
        process("PREVIOUS_X", loss="MIN_SNR")


def test_real_data_has_a_density_and_8_bit_data_a_probability():
    x, t = normal((3, 1, 6)), torch.zeros(3, dtype=torch.long)
    p = process("START_X", discrete_data=False)
    bound = p._vb_terms_bpd(constant_model(x + 0.01), x, p.q_sample(x, t), t, clip_denoised=False)
    out = p.p_mean_variance(constant_model(x + 0.01), p.q_sample(x, t), t, clip_denoised=False)
    assert process("START_X").discrete_data and bound["output"].shape == (3,)
    density = torch.distributions.Normal(out["mean"], (0.5 * out["log_variance"]).exp()).log_prob(x)
    levels = process("START_X")._vlb_term(out, x, p.q_sample(x, t), t)
    torch.testing.assert_close(p._vlb_term(out, x, p.q_sample(x, t), t), -density.mean((1, 2)) / math.log(2))
    assert (levels - p._vlb_term(out, x, p.q_sample(x, t), t)).abs().min() > 0.1


def test_vlb_of_latents_is_exact_for_gaussian_data():
    # Data N(0, 1): the exact network is linear, and every reverse step but the last has the variance beta, which is
    # FIXED_LARGE. So the bound is the entropy plus the cost of the variance of another timestep at the last step.
    p = create_gaussian_diffusion(discrete_data=False)
    std = torch.from_numpy(p.sqrt_one_minus_alphas_cumprod).float()
    exact = lambda x, t: std[t].view(-1, 1, 1) * x
    torch.manual_seed(0)
    bits = p.calc_bpd_loop(exact, normal((64, 1, 64)), clip_denoised=False)
    nats = bits["total_bpd"].mean().item() * math.log(2)
    ratio = p.betas[0] / p.posterior_variance[1]
    expected = 0.5 * math.log(2 * math.pi * math.e) + 0.5 * (ratio - 1 - math.log(ratio))
    assert nats == pytest.approx(expected, abs=0.03)


def test_rescaled_losses_are_multiples_of_plain_losses():
    x, t, eps = normal((3, 1, 4)).clamp(-1, 1), torch.tensor([0, 5, 20]), normal((3, 1, 4), 1)
    model = constant_model(normal((3, 2, 4), 2))
    terms = {loss: process(var="LEARNED", loss=loss.name).training_losses(model, x, t, noise=eps) for loss in LossType}
    torch.testing.assert_close(terms[LossType.RESCALED_KL]["loss"], STEPS * terms[LossType.KL]["loss"])
    torch.testing.assert_close(terms[LossType.RESCALED_MSE]["vb"], STEPS / 1000 * terms[LossType.MSE]["vb"])
    torch.testing.assert_close(terms[LossType.KL]["loss"], terms[LossType.MSE]["vb"])
    bound = process(var="LEARNED")._vb_terms_bpd(model, x, process().q_sample(x, t, eps), t, clip_denoised=False)
    torch.testing.assert_close(terms[LossType.KL]["loss"], bound["output"])


def test_vlb_of_exact_prediction_is_zero():
    p, x_0, t = process("START_X"), normal((4, 1, 5)).clamp(-1, 1), torch.tensor([1, 2, 10, 23])
    bound = p._vb_terms_bpd(constant_model(x_0), x_0, p.q_sample(x_0, t), t)
    assert bound["output"].abs().max() < 1e-6 and bound["pred_xstart"].equal(x_0)


def test_bits_per_dimension_are_terms_plus_prior():
    x = (torch.arange(16.0).view(2, 1, 8) * 17 / 127.5 - 1).clamp(-1, 1)
    bits = process("START_X").calc_bpd_loop(constant_model(x), x)
    assert {name: tuple(value.shape) for name, value in bits.items()} == {
        "total_bpd": (2,), "prior_bpd": (2,), "vb": (2, STEPS), "xstart_mse": (2, STEPS), "mse": (2, STEPS),
    }
    torch.testing.assert_close(bits["total_bpd"], bits["vb"].sum(dim=1) + bits["prior_bpd"])
    assert (bits["xstart_mse"] == 0).all() and (bits["mse"] < 1e-6).all()
    assert bits["vb"][:, :-1].abs().max() < 1e-6 < bits["vb"][:, -1].min()      # column 0 is the last timestep


def test_errors_of_the_bound_are_means_of_squares():
    p, x = process("START_X"), normal((2, 1, 8)).clamp(-1, 1)
    bits = p.calc_bpd_loop(constant_model(x + 0.1), x, clip_denoised=False)
    snr = torch.from_numpy(p.alphas_cumprod / (1 - p.alphas_cumprod)).float().flip(0)
    torch.testing.assert_close(bits["xstart_mse"], torch.full((2, STEPS), 0.01))
    torch.testing.assert_close(bits["mse"], 0.01 * snr.expand(2, -1), rtol=1e-3, atol=1e-6)


def test_prior_of_unit_variance_data_is_zero_without_signal():
    p = process(betas=get_named_beta_schedule("linear", 1000))
    assert p._prior_bpd(normal((2, 1, 500))).abs().max() < 1e-4
