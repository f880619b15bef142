import diffusers
import numpy as np
import pytest
import torch

from guided_diffusion_vae.gaussian_diffusion import ModelMeanType
from guided_diffusion_vae.runs.factories import create_gaussian_diffusion
from guided_diffusion_vae.sampling import SAMPLERS, SOLVERS, STOCHASTIC, multistep_sample_loop
from guided_diffusion_vae.sampling.solvers import UniPC, applicable_samplers

SHAPE, SPREAD = (16, 2, 8, 8), 0.3
DETERMINISTIC = [solver for solver in SOLVERS if solver not in STOCHASTIC]


class Mixture:
    """Exact network of data around six points of a grid, each with standard deviation SPREAD."""

    def __init__(self, process, heads=1):
        self.mean_type, self.heads, self.calls = process.model_mean_type, heads, []
        self.alpha_bar = torch.from_numpy(process.alphas_cumprod)
        self.centers = 0.9 * torch.from_numpy(np.random.default_rng(0).normal(size=(6, *SHAPE[1:])))

    def __call__(self, x, t):
        self.calls.append(int(t[0]))
        a = self.alpha_bar[t].view(-1, 1, 1, 1, 1)
        offset = x[:, None] - a.sqrt() * self.centers
        variance = a * SPREAD**2 + 1 - a
        weights = torch.softmax(-(offset**2).sum((2, 3, 4)) / (2 * variance.view(-1, 1)), 1)[..., None, None, None]
        x_0 = (weights * (self.centers + a.sqrt() * SPREAD**2 / variance * offset)).sum(1)
        a = a[:, 0]
        prediction = {
            ModelMeanType.START_X: lambda: x_0,
            ModelMeanType.EPSILON: lambda: (x - a.sqrt() * x_0) / (1 - a).sqrt(),
            ModelMeanType.VELOCITY: lambda: (a.sqrt() * x - x_0) / (1 - a).sqrt(),
        }[self.mean_type]()
        return prediction if self.heads == 1 else torch.cat([prediction, torch.full_like(prediction, 7.0)], 1)


def sample(solver, respacing, **flags):
    """Return (samples in float64, the network), always from the same x_T."""
    network = Mixture(create_gaussian_diffusion(**flags), 2 if flags.get("learn_sigma") else 1)
    process = create_gaussian_diffusion(timestep_respacing=respacing, **flags)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(1)
    x = SAMPLERS[solver][1](process, network, SHAPE, noise=noise, clip_denoised=False, device="cpu")
    return x, network


@pytest.fixture(scope="module")
def converged():
    return sample("ddim", "")[0]


def error(x, converged):
    return ((x - converged).square().mean().sqrt() / converged.std()).item()


def test_20_solver_steps_are_as_accurate_as_250_of_ddim(converged):
    ddim = {steps: error(sample("ddim", f"ddim{steps}")[0], converged) for steps in (20, 250)}
    solved = {solver: error(sample(solver, "logsnr20")[0], converged) for solver in DETERMINISTIC}
    assert solved["unipc"] < 0.7 * ddim[250] and solved["dpmpp"] < 2 * ddim[250]
    assert max(solved.values()) < ddim[20] / 8


@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_evaluates_network_once_per_kept_timestep(solver):
    for respacing in ("logsnr12", "10"):
        _, network = sample(solver, respacing)
        kept = create_gaussian_diffusion(timestep_respacing=respacing).timestep_map
        assert network.calls == kept[::-1]


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_unipc_agrees_with_diffusers_to_the_last_bit(steps):
    sigmas = torch.cat([torch.logspace(2, -2, steps), torch.zeros(1)])
    scheduler = diffusers.UniPCMultistepScheduler(solver_order=3, prediction_type="sample", num_train_timesteps=steps)
    scheduler.set_timesteps(steps)
    scheduler.sigmas = sigmas
    scheduler.set_begin_index(0)
    mine, theirs, advance = *2 * [torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))], UniPC(sigmas)
    for t in scheduler.timesteps:
        mine, theirs = advance(mine.sin(), mine), scheduler.step(theirs.sin(), t, theirs).prev_sample
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_solver_reads_a_value_back_from_the_device(solver):
    # Tensors on the meta device have no values: reading one on the host fails.
    process = create_gaussian_diffusion(timestep_respacing="logsnr6")
    assert multistep_sample_loop(process, lambda x, t: 0 * x, (2, 1, 4), solver, device="meta").shape == (2, 1, 4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("flags", [{"predict_xstart": True}, {"predict_v": True}, {"learn_sigma": True}])
def test_samples_are_independent_of_the_kind_of_prediction(solver, flags):
    plain, other = sample(solver, "logsnr8")[0], sample(solver, "logsnr8", **flags)[0]
    torch.testing.assert_close(other, plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("solver, respacing", [("dpmpp_sde", "logsnr20"), ("ddpm", "250")])
def test_stochastic_steps_sample_the_data(solver, respacing):
    x, network = sample(solver, respacing)
    offsets = x[:, None] - network.centers
    nearest = offsets[torch.arange(len(x)), offsets.square().sum((2, 3, 4)).argmin(1)]
    assert abs(nearest.std().item() / SPREAD - 1) < 0.05 and abs(nearest.mean().item()) < 0.05 * SPREAD


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_stochastic_solver_uses_noise_fn(solver):
    process = create_gaussian_diffusion(timestep_respacing="logsnr6")
    draw = lambda noise_fn: multistep_sample_loop(process, lambda x, t: 0.1 * x, (2, 1, 4), solver, device="cpu",
                                                  noise=torch.ones(2, 1, 4), noise_fn=noise_fn)
    one, same = draw(torch.ones_like), draw(torch.ones_like)
    assert torch.equal(one, same) and not torch.equal(one, draw(torch.zeros_like))


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_solver_samples_schedules_that_end_in_pure_noise(solver):
    x, _ = sample(solver, "logsnr20", noise_schedule="linear_zero_snr", predict_v=True)
    converged = sample("ddim", "500", noise_schedule="linear_zero_snr", predict_v=True)[0]
    assert error(x, converged) < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_applies_guidance_and_denoising(solver):
    process = create_gaussian_diffusion(timestep_respacing="logsnr6")
    whole, calls = create_gaussian_diffusion(), []

    def gradient(x, t, y):
        calls.append((t[0].item(), y.tolist()))
        return 0.5 * float(whole.sqrt_alphas_cumprod[t[0]]) * torch.ones_like(x)

    network = lambda x, t, y: torch.zeros_like(x)
    draw = lambda **more: multistep_sample_loop(process, network, (2, 1, 4), solver, noise=torch.zeros(2, 1, 4),
                                                noise_fn=torch.zeros_like, device="cpu",
                                                model_kwargs={"y": torch.tensor([1, 2])}, **more)
    assert (draw(cond_fn=gradient) > draw() + 0.1).all()
    assert [t for t, _ in calls] == process.timestep_map[::-1] and calls[0][1] == [1, 2]
    assert (draw(denoised_fn=lambda x_0: x_0 * 0 + 0.25) == 0.25).all()
    torch.testing.assert_close(draw(denoised_fn=lambda x_0: x_0 * 0 + 3), torch.ones(2, 1, 4))  # and is clipped


def test_samplers_contain_loops_of_the_process_and_solvers():
    assert set(SAMPLERS) == {"ddpm", "ddim", "euler", "heun", *SOLVERS}
    process = create_gaussian_diffusion(steps=25)
    assert applicable_samplers(process) == ["ddpm", "ddim", *SOLVERS] and applicable_samplers(object()) == []
    torch.manual_seed(0)
    mine = SAMPLERS["ddpm"][1](process, lambda x, t: 0 * x, (1, 1, 3), device="cpu")
    torch.manual_seed(0)
    assert torch.equal(mine, process.p_sample_loop(lambda x, t: 0 * x, (1, 1, 3), device="cpu"))
