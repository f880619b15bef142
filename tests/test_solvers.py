import numpy as np
import pytest
import torch

from guided_diffusion_vae.gaussian_diffusion import ModelMeanType
from guided_diffusion_vae.runs.factories import create_gaussian_diffusion
from guided_diffusion_vae.sampling.solvers import SAMPLE_LOOPS, STOCHASTIC, SOLVERS, multistep_sample_loop

SHAPE, SPREAD = (16, 2, 8, 8), 0.3
OF_A_PATH = [solver for solver in SOLVERS if solver not in STOCHASTIC]


class Mixture:
    """The exact network of data around six points of a grid, each with standard deviation SPREAD."""

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
        said = {
            ModelMeanType.START_X: lambda: x_0,
            ModelMeanType.EPSILON: lambda: (x - a.sqrt() * x_0) / (1 - a).sqrt(),
            ModelMeanType.VELOCITY: lambda: (a.sqrt() * x - x_0) / (1 - a).sqrt(),
        }[self.mean_type]()
        return said if self.heads == 1 else torch.cat([said, torch.full_like(said, 7.0)], 1)


def sampled(solver, respacing, **flags):
    """Return (samples in float64, the network) from one start, whatever is asked."""
    network = Mixture(create_gaussian_diffusion(**flags), 2 if flags.get("learn_sigma") else 1)
    process = create_gaussian_diffusion(timestep_respacing=respacing, **flags)
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).double()
    torch.manual_seed(1)
    x = SAMPLE_LOOPS[solver](process, network, SHAPE, noise=noise, clip_denoised=False, device="cpu")
    return x, network


@pytest.fixture(scope="module")
def converged():
    return sampled("ddim", "")[0]


def error(x, converged):
    return ((x - converged).square().mean().sqrt() / converged.std()).item()


def test_twenty_steps_of_a_solver_are_as_near_to_the_converged_path_as_250_of_ddim(converged):
    ddim = {steps: error(sampled("ddim", f"ddim{steps}")[0], converged) for steps in (20, 250)}
    solved = {solver: error(sampled(solver, "logsnr20")[0], converged) for solver in OF_A_PATH}
    assert solved["unipc"] < 0.7 * ddim[250] and solved["dpmpp"] < 2 * ddim[250]
    assert max(solved.values()) < ddim[20] / 8


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_network_is_asked_once_at_every_kept_time_of_the_long_process(solver):
    for respacing in ("logsnr12", "10"):
        _, network = sampled(solver, respacing)
        kept = create_gaussian_diffusion(timestep_respacing=respacing).timestep_map
        assert network.calls == kept[::-1]


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("flags", [{"predict_xstart": True}, {"predict_v": True}, {"learn_sigma": True}])
def test_whatever_the_network_predicts_the_samples_are_the_same(solver, flags):
    plain, other = sampled(solver, "logsnr8")[0], sampled(solver, "logsnr8", **flags)[0]
    torch.testing.assert_close(other, plain, atol=1e-3, rtol=0)


@pytest.mark.parametrize("solver, respacing", [("dpmpp_sde", "logsnr20"), ("ddpm", "250")])
def test_random_steps_end_in_the_data(solver, respacing):
    x, network = sampled(solver, respacing)
    offsets = x[:, None] - network.centers
    nearest = offsets[torch.arange(len(x)), offsets.square().sum((2, 3, 4)).argmin(1)]
    assert abs(nearest.std().item() / SPREAD - 1) < 0.05 and abs(nearest.mean().item()) < 0.05 * SPREAD


@pytest.mark.parametrize("solver", STOCHASTIC)
def test_a_random_solver_takes_its_noise_from_whom_it_is_told(solver):
    process = create_gaussian_diffusion(timestep_respacing="logsnr6")
    draw = lambda noise_fn: multistep_sample_loop(process, lambda x, t: 0.1 * x, (2, 1, 4), solver, device="cpu",
                                                  noise=torch.ones(2, 1, 4), noise_fn=noise_fn)
    one, same = draw(torch.ones_like), draw(torch.ones_like)
    assert torch.equal(one, same) and not torch.equal(one, draw(torch.zeros_like))


@pytest.mark.parametrize("solver", OF_A_PATH)
def test_schedules_that_end_in_pure_noise_can_be_solved(solver):
    x, _ = sampled(solver, "logsnr20", noise_schedule="linear_zero_snr", predict_v=True)
    converged = sampled("ddim", "500", noise_schedule="linear_zero_snr", predict_v=True)[0]
    assert error(x, converged) < 0.05


@pytest.mark.parametrize("solver", SOLVERS)
def test_guidance_and_denoising_reach_the_solver(solver):
    process = create_gaussian_diffusion(timestep_respacing="logsnr6")
    whole, told = create_gaussian_diffusion(), []

    def pull(x, t, y):
        told.append((t[0].item(), y.tolist()))
        return 0.5 * float(whole.sqrt_alphas_cumprod[t[0]]) * torch.ones_like(x)

    network = lambda x, t, y: torch.zeros_like(x)
    draw = lambda **more: multistep_sample_loop(process, network, (2, 1, 4), solver, noise=torch.zeros(2, 1, 4),
                                                noise_fn=torch.zeros_like, device="cpu",
                                                model_kwargs={"y": torch.tensor([1, 2])}, **more)
    assert (draw(cond_fn=pull) > draw() + 0.1).all()
    assert [t for t, _ in told] == process.timestep_map[::-1] and told[0][1] == [1, 2]
    assert (draw(denoised_fn=lambda x_0: x_0 * 0 + 0.25) == 0.25).all()
    torch.testing.assert_close(draw(denoised_fn=lambda x_0: x_0 * 0 + 3), torch.ones(2, 1, 4))  # and is clipped


def test_the_loops_of_the_process_stand_beside_the_solvers():
    assert set(SAMPLE_LOOPS) == {"ddpm", "ddim", *SOLVERS}
    process = create_gaussian_diffusion(steps=25)
    torch.manual_seed(0)
    mine = SAMPLE_LOOPS["ddpm"](process, lambda x, t: 0 * x, (1, 1, 3), device="cpu")
    torch.manual_seed(0)
    assert torch.equal(mine, process.p_sample_loop(lambda x, t: 0 * x, (1, 1, 3), device="cpu"))
