import json
import math

import numpy as np
import pytest
import torch

from guided_diffusion_vae import checkpoint_util
from guided_diffusion_vae.data import open_npz
from guided_diffusion_vae.gaussian_diffusion import (
    DiffusionConfig, GaussianDiffusion, LossType, ModelMeanType, ModelVarType,
)
from guided_diffusion_vae.runs.factories import create_diffusion
from guided_diffusion_vae.sampling import SAMPLERS
from guided_diffusion_vae.sampling.solvers import applicable_samplers

STEPS = 4096    # a power of two, so that respacings are exact fractions of it
CENTERS, STD, WEIGHTS = torch.tensor([-1.2, 0.3, 1.5]).double(), 0.25, torch.tensor([0.3, 0.5, 0.2]).double()


def flow(respacing="", **flags):
    return create_diffusion({"process": "rectified_flow", "diffusion_steps": STEPS, "timestep_respacing": respacing,
                             **flags}, discrete_data=False)


def exact_velocity(x, t):
    """Return E[eps - x_0 | x_s] of the mixture of Gaussians, elementwise.  [N x 1 x 1] -> same"""
    s = ((t.double() + 1) / STEPS).view(-1, 1, 1, 1)
    offsets, variance = x.double()[..., None] - (1 - s) * CENTERS, ((1 - s) * STD) ** 2 + s**2
    posterior = torch.softmax(WEIGHTS.log() - offsets**2 / (2 * variance), -1)
    x_0 = (posterior * (CENTERS + (1 - s) * STD**2 / variance * offsets)).sum(-1)
    return (x - x_0) / s[..., 0]


def exact_map(noise):
    """Return where the flow takes noise: it keeps the order of numbers, so that quantiles go to the same quantiles."""
    quantile = 0.5 * (1 + torch.erf(noise / math.sqrt(2)))
    low, high = torch.full_like(noise, -6), torch.full_like(noise, 6)
    for _ in range(60):
        middle = (low + high) / 2
        below = (WEIGHTS * 0.5 * (1 + torch.erf((middle[..., None] - CENTERS) / (STD * math.sqrt(2))))).sum(-1)
        low, high = torch.where(below < quantile, middle, low), torch.where(below < quantile, high, middle)
    return low


def map_error(sampler, respacing):
    noise = torch.linspace(-2.2, 2.2, 101).double().view(-1, 1, 1)
    x_0 = SAMPLERS[sampler][1](flow(respacing), exact_velocity, noise.shape, noise=noise, clip_denoised=False,
                               device="cpu")
    return (x_0 - exact_map(noise)).square().mean().sqrt().item()


@pytest.mark.parametrize("sampler, order, tolerance", [("euler", 1, 0.03), ("heun", 2, 0.0005)])
def test_sampler_converges_to_the_exact_map_with_its_order(sampler, order, tolerance):
    coarse, fine = map_error(sampler, "64"), map_error(sampler, "128")
    assert fine < tolerance and abs(math.log2(coarse / fine) - order) < 0.2


def test_multistep_solvers_follow_the_exact_map_more_closely_than_euler():
    assert max(map_error(solver, "32") for solver in ("dpmpp", "unipc")) < map_error("euler", "32") / 10
    assert map_error("unipc", "logsnr64") < 1e-3


def test_one_step_gives_the_mean_of_the_data():
    noise = torch.tensor([-1.0, 2.0]).double().view(2, 1, 1)
    for sampler in ("euler", "heun", "dpmpp", "unipc"):
        x_0 = SAMPLERS[sampler][1](flow("1"), exact_velocity, noise.shape, noise=noise, clip_denoised=False,
                                   device="cpu")
        torch.testing.assert_close(x_0, torch.full_like(x_0, (WEIGHTS * CENTERS).sum().item()), atol=1e-3, rtol=0)


def test_stochastic_solver_samples_the_mixture():
    torch.manual_seed(0)
    x = SAMPLERS["dpmpp_sde"][1](flow("64"), exact_velocity, (4000, 1, 1), noise=torch.randn(4000, 1, 1).double(),
                                 clip_denoised=False, device="cpu").flatten()
    nearest = (x[:, None] - CENTERS).abs().argmin(1)
    assert torch.bincount(nearest).div(4000).sub(WEIGHTS).abs().max() < 0.03
    assert (x - CENTERS[nearest]).std().sub(STD).abs() < 0.03


def test_exact_velocity_has_the_lowest_loss():
    process, generator = flow(), torch.Generator().manual_seed(0)
    x_0 = CENTERS[torch.multinomial(WEIGHTS, 2000, True, generator=generator)].view(-1, 1, 1)
    x_0 = x_0 + STD * torch.randn(x_0.shape, generator=generator).double()
    noise, t = torch.randn(x_0.shape, generator=generator).double(), torch.full((2000,), STEPS // 4)
    loss = lambda model: process.training_losses(model, x_0, t, noise=noise)
    exact = loss(exact_velocity)
    assert set(exact) == {"loss", "mse"} and exact["loss"].shape == (2000,)
    assert all(exact["loss"].mean() < loss(lambda x, t, f=f: f * exact_velocity(x, t))["loss"].mean()
               for f in (0.7, 1.3))
    known = loss(lambda x, t: 0 * x)
    torch.testing.assert_close(known["loss"], (noise - x_0).square().flatten())


def test_timesteps_are_times_up_to_pure_noise():
    process = flow(diffusion_steps=10)
    np.testing.assert_allclose(process.times, np.arange(1, 11) / 10)
    assert process.noise_levels()[-1] == np.inf and process.noise_levels()[4] == 1
    x, noise = torch.zeros(2, 1, 2), torch.ones(2, 1, 2)
    assert process.q_sample(x, torch.tensor([4, 9]), noise)[:, 0, 0].tolist() == [0.5, 1]
    assert process.q_sample(noise, torch.tensor([4, 9]), x)[:, 0, 0].tolist() == [0.5, 0]
    with pytest.raises(ValueError, match=r"noise: expected shape \(2, 1, 2\), got \(2, 1, 3\)"):
        process.q_sample(x, torch.tensor([4, 9]), torch.ones(2, 1, 3))
    np.testing.assert_allclose(process.scales()[[4, 9]], [0.5**0.5, 1])
    assert flow(diffusion_steps=10, rescale_timesteps=True).model_timesteps(torch.tensor([5])).tolist() == [500]


@pytest.mark.parametrize("respacing, kept", [
    ("", range(20)), ("1", [19]), ("4", [4, 9, 14, 19]), ("ddim5", [3, 7, 11, 15, 19]), ("trailing2", [9, 19]),
    ("2,5", [4, 9, 11, 13, 15, 17, 19]),
])
def test_respacing_ends_in_pure_noise(respacing, kept):
    process = flow(respacing, diffusion_steps=20)
    assert process.timestep_map == list(kept) and process.num_timesteps == len(kept)
    np.testing.assert_allclose(process.times, (np.array(kept) + 1) / 20)


def test_log_snr_respacing_is_that_of_the_noise_levels():
    process = flow("logsnr8")
    assert process.timestep_map[-1] == STEPS - 1 and process.num_timesteps == 8
    gaps = np.diff(np.log(process.noise_levels()[:-1]))
    assert np.ptp(gaps) < 0.1 * gaps.mean()


@pytest.mark.parametrize("flags, message", [
    ({"learn_sigma": True}, "--learn_sigma True conflicts with --process rectified_flow"),
    ({"predict_v": True}, "--predict_v True conflicts"), ({"predict_xstart": True}, "--predict_xstart True conflicts"),
    ({"noise_schedule": "cosine"}, "--noise_schedule cosine conflicts .* expected linear"),
    ({"use_kl": True}, "--use_kl True conflicts"), ({"min_snr_gamma": 5.0}, "--min_snr_gamma 5.0 conflicts"),
    ({"rescale_learned_sigmas": True}, "--rescale_learned_sigmas True conflicts"),
    ({"timestep_respacing": "5000"}, "keeps 5000 steps of section 0 of 1, which has 4096"),
    ({"timestep_respacing": "many"}, "'many': expected a count"),
])
def test_flags_of_other_processes_are_rejected(flags, message):
    with pytest.raises(ValueError, match=message):
        flow(**flags)


def test_samplers_of_each_process():
    assert applicable_samplers(flow()) == ["euler", "heun", "dpmpp", "dpmpp_sde", "unipc"]
    assert applicable_samplers(create_diffusion({})) == ["ddpm", "ddim", "dpmpp", "dpmpp_sde", "unipc"]


def test_guidance_denoising_and_clipping_apply_to_x0():
    process, t = flow(), torch.tensor([STEPS // 4 - 1, STEPS - 1])
    x, gradient = torch.ones(2, 1, 1), lambda x, t, y: torch.full_like(x, 3.0) * y.view(-1, 1, 1)
    predict = lambda **more: process.predict_xstart(lambda x, t, y: 0 * x, x, t, model_kwargs={"y": t * 0 + 1}, **more)
    # s^2 / (1 - s) times the gradient; nothing without signal
    torch.testing.assert_close(predict(clip_denoised=False, cond_fn=gradient).flatten(), torch.tensor([1.25, 1.0]))
    assert (predict(denoised_fn=lambda x: x + 1) == 1).all() and (predict(denoised_fn=lambda x: x / 4) == 0.25).all()
    with pytest.raises(ValueError, match=r"expected shape \(2, 1, 1\), got \(2, 2, 1\); set --learn_sigma False"):
        process.predict_xstart(lambda x, t: torch.cat([x, x], 1), x, t)


def test_guided_x0_is_that_of_the_gaussian_process_with_the_same_noise_level():
    process, s = flow(diffusion_steps=4), 0.75
    scale = math.hypot(s, 1 - s)
    alpha_bar = np.array([0.9, ((1 - s) / scale) ** 2])
    gaussian = GaussianDiffusion(
        betas=1 - alpha_bar / np.append(1, alpha_bar[:-1]), model_mean_type=ModelMeanType.START_X,
        model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE)
    x = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    cond_fn = lambda x, t: torch.cos(x)     # of x_s; with respect to x_s / scale it is `scale` times that
    flowed = process.predict_xstart(lambda x, t: 0.3 * x, x, torch.full((3,), 2), False, cond_fn=cond_fn)
    expected = gaussian.predict_xstart(
        lambda y, t: scale * y * (1 - 0.3 * s), x / scale, torch.full((3,), 1), False,
        cond_fn=lambda y, t: scale * torch.cos(scale * y))
    torch.testing.assert_close(flowed, expected)


def test_bound_is_slightly_above_the_exact_likelihood_of_gaussian_data():
    std, steps = 0.5, 300

    def velocity(x, t):
        s = ((t + 1) / steps).view(-1, 1, 1)
        return (x - (1 - s) * std**2 / (((1 - s) * std) ** 2 + s**2) * x) / s

    torch.manual_seed(0)
    x_0 = std * torch.randn(64, 1, 64)
    exact = (0.5 * (x_0 / std) ** 2 + math.log(std * math.sqrt(2 * math.pi))).mean() / math.log(2)
    bound = flow(diffusion_steps=steps).calc_bpd_loop(velocity, x_0, clip_denoised=False)
    assert bound["vb"].shape == (64, steps) and bound["prior_bpd"].abs().max() < 1e-6
    assert exact < bound["total_bpd"].mean() < exact + 0.05
    worse = flow(diffusion_steps=steps).calc_bpd_loop(lambda x, t: 0.5 * velocity(x, t), x_0, clip_denoised=False)
    assert worse["total_bpd"].mean() > bound["total_bpd"].mean() + 0.3


FLAGS = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8", "batch_size": 4,
         "diffusion_steps": 20, "process": "rectified_flow", "schedule_sampler": "logit-normal", "class_cond": True,
         "class_dropout": 0.2, "ema_rate": "0.5", "max_steps": 2, "log_interval": 1}


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("sides", [(8, 8), (4, 8, 8)])
def test_scripts_train_sample_and_measure(sides, call, tmp_path):
    (tmp_path / "data").mkdir()
    rng = np.random.default_rng(0)
    if len(sides) == 2:
        np.savez(tmp_path / "data.npz", arr_0=rng.integers(0, 256, (8, *sides, 1), dtype=np.uint8),
                 arr_1=np.arange(8) % 2)
    for i in range(4 if len(sides) == 3 else 0):
        np.save(tmp_path / "data" / f"{'ab'[i % 2]}_{i}.npy", rng.integers(0, 256, sides, dtype=np.uint8))
    data = {"data_dir": tmp_path / ("data" if len(sides) == 3 else "data.npz"), "image_size": "x".join(map(str, sides))}
    run = tmp_path / "run"
    status, _, err = call("image_train", logdir=run, **data, **FLAGS)
    assert status == 0, err
    assert (run / "previews" / "000002.png").is_file()
    header = checkpoint_util.load_weights(run / "ema_0.5_000002.pt")[1]
    assert header["diffusion"]["process"] == "rectified_flow"
    columns = (run / "progress.csv").read_text().splitlines()[0].split(",")
    assert {"loss", "mse"} < set(columns) and any(name.startswith("loss_q") for name in columns)
    sample = {"model_path": run, "num_samples": 2, "save_individual": False, "timestep_respacing": "3"}
    status, out, err = call("image_sample", logdir=tmp_path / "samples", sampler="heun", cfg_scale=2,
                            cfg_interval="0.5,9", **sample)
    assert status == 0 and "3 steps of heun" in out, err
    samples = open_npz(tmp_path / "samples" / f"samples_2x{data['image_size']}x1.npz")
    assert samples.labels.tolist() == [0, 1] and samples.images.std() > 0
    status, _, err = call("image_nll", model_path=run, data_dir=data["data_dir"], num_samples=2,
                          logdir=tmp_path / "nll")
    assert status == 0 and json.loads((tmp_path / "nll" / "metrics.json").read_text())["bits_per_dim"] > 0, err
    if len(sides) == 3:
        return
    status, _, err = call("image_sample", logdir=tmp_path / "ddim", use_ddim=True, **sample)
    assert status == 1 and "--sampler ddim does not apply to the process of the model: expected one of: euler" in err
    status, _, err = call("image_train", logdir=tmp_path / "other", predict_v=True, **data, **FLAGS)
    assert status == 1 and "--predict_v True conflicts with --process rectified_flow" in err
    status, _, err = call("export", model_path=run, format="diffusers", out=tmp_path / "exported")
    assert status == 1 and "its diffusion process is rectified_flow (--process)" in err
    status, _, err = call("export", model_path=run, out=tmp_path / "exported.safetensors")
    assert status == 0 and checkpoint_util.load_weights(tmp_path / "exported.safetensors")[1] == header, err


def test_default_flags_are_accepted():
    assert flow(**{name: value for name, value in vars(DiffusionConfig()).items() if name not in (
        "process", "diffusion_steps", "timestep_respacing")}).num_timesteps == STEPS
