"""Sample in few steps: the multi-step solvers of diffusers, driven by this project's process.

The process says which times are visited (its respacing), what the network means by its output (noise, x_0, velocity,
with or without learned variances, of which solvers of an ODE have no use) and what guidance and clipping make of it;
the solver is handed predictions of x_0 and the noise level of every step.
"""

import numpy as np
import torch

from ..gaussian_diffusion import GaussianDiffusion, initial_noise

# What starts a run counts as noise alone where alpha-bar is below this; a solver cannot divide by 0.
MIN_ALPHA_BAR = 2.0**-24


def _dpmpp(**settings):
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2, **settings)


def _dpmpp_sde(**settings):
    from diffusers import DPMSolverMultistepScheduler

    return DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_order=2, **settings)


def _unipc(**settings):
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(solver_order=3, **settings)


# DPM-Solver++(2M) and SDE-DPM-Solver++(2M), arXiv 2211.01095, algorithm 2 and appendix A; UniPC-3, arXiv 2302.04867,
# algorithm 2.
SOLVERS = {"dpmpp": _dpmpp, "dpmpp_sde": _dpmpp_sde, "unipc": _unipc}
STOCHASTIC = ("dpmpp_sde",)  # draw noise at every step


def multistep_sample_loop(
    diffusion, model, shape, solver, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
    device=None, progress=False, noise_fn=None,
):
    """Sample x_0 of `shape` [N, C, ...] with a key of SOLVERS; the other arguments are those of `p_sample_loop`.

    The network is called once for each time of `diffusion`; `logsnrN` spaces them as these solvers like it. Nothing is
    random but the start, except for solvers in RANDOM.
    """
    if device is None:
        device = next(model.parameters()).device
    x = initial_noise(tuple(shape), noise, device, noise_fn)
    alpha_bar = np.maximum(diffusion.alphas_cumprod, MIN_ALPHA_BAR)
    scheduler = SOLVERS[solver](num_train_timesteps=len(alpha_bar), trained_betas=diffusion.betas.tolist(),
                                prediction_type="sample", timestep_spacing="trailing")
    scheduler.set_timesteps(len(alpha_bar), device=device)
    # In place of its own, which are rounded to single precision before the subtraction from 1.
    sigmas = np.append(np.sqrt((1 - alpha_bar) / alpha_bar)[::-1], 0.0)
    scheduler.sigmas = torch.from_numpy(sigmas.astype(np.float32))
    scheduler.set_begin_index(0)            # else it looks for the first time on the device, and waits
    times = scheduler.timesteps.tolist()
    if progress:
        from tqdm.auto import tqdm
        times = tqdm(times)
    for i in times:
        t = torch.full((len(x),), int(i), device=device)
        with torch.no_grad():
            p = diffusion.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
            if cond_fn is not None:
                p = diffusion.condition_score(cond_fn, p, x, t, model_kwargs)
            drawn = {"variance_noise": (noise_fn or torch.randn_like)(x)} if solver in STOCHASTIC else {}
            x = scheduler.step(p["pred_xstart"], i, x, return_dict=False, **drawn)[0]
    return x


# The choices of --sampler: loops that take (diffusion, model, shape, ...).
SAMPLE_LOOPS = {
    "ddpm": GaussianDiffusion.p_sample_loop,
    "ddim": GaussianDiffusion.ddim_sample_loop,
    **{name: (lambda diffusion, model, shape, name=name, **kwargs:
              multistep_sample_loop(diffusion, model, shape, name, **kwargs)) for name in SOLVERS},
}
