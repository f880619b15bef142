"""Sampling loops by name, among them the multi-step solvers of diffusers, driven by this project's processes.

The process defines the timesteps (its respacing), the meaning of the network's output (noise, x_0 or velocity, with or
without learned variances) and the effect of guidance and clipping. A solver receives predictions of x_0 and the noise
level of every step.
"""

import functools

import numpy as np
import torch

from ..gaussian_diffusion import GaussianDiffusion, initial_noise

# Noise level from which x_T counts as pure noise: solvers compute with its logarithm, and need a finite one.
MAX_NOISE_LEVEL = np.sqrt((1 - 2.0**-24) / 2.0**-24)


# Schedulers of diffusers and their settings: DPM-Solver++(2M) and SDE-DPM-Solver++(2M), arXiv:2211.01095, Alg. 2 and
# App. A; UniPC-3, arXiv:2302.04867, Alg. 2.
SOLVERS = {
    "dpmpp": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "unipc": ("UniPCMultistepScheduler", {"solver_order": 3}),
}
STOCHASTIC = ("dpmpp_sde",)  # sample noise at every step


def multistep_sample_loop(
    diffusion, model, shape, solver, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
    device=None, progress=False, noise_fn=None,
) -> torch.Tensor:
    """Return x_0 of `shape` [N, C, ...], sampled by a key of SOLVERS; other arguments as in `p_sample_loop`.

    The network is evaluated once per timestep of `diffusion`; spacing them by `logsnrN` suits these solvers. Only x_T
    is random, except for the STOCHASTIC solvers.
    """
    import diffusers

    if device is None:
        device = next(model.parameters()).device
    x = initial_noise(tuple(shape), noise, device, noise_fn)
    name, settings = SOLVERS[solver]
    scheduler = getattr(diffusers, name)(num_train_timesteps=diffusion.num_timesteps, prediction_type="sample",
                                         timestep_spacing="trailing", **settings)
    scheduler.set_timesteps(diffusion.num_timesteps, device=device)
    # The noise levels of the process replace those of the scheduler: its own are of another schedule, and rounded.
    sigmas = np.append(np.minimum(diffusion.noise_levels(), MAX_NOISE_LEVEL)[::-1], 0.0)
    scheduler.sigmas = torch.from_numpy(sigmas.astype(np.float32))
    scheduler.set_begin_index(0)            # otherwise it searches the first timestep on the device and synchronizes
    timesteps = scheduler.timesteps.tolist()
    if progress:
        from tqdm.auto import tqdm
        timesteps = tqdm(timesteps)
    for i in timesteps:
        t = torch.full((len(x),), int(i), device=device)
        with torch.no_grad():
            x_0 = diffusion.predict_xstart(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
            variance = {"variance_noise": (noise_fn or torch.randn_like)(x)} if solver in STOCHASTIC else {}
            x = scheduler.step(x_0, i, x, return_dict=False, **variance)[0]
    return x


# The choices of --sampler: (class of the processes, loop(diffusion, model, shape, ...)). The first entry that applies
# to a process is its default.
SAMPLERS = {
    "ddpm": (GaussianDiffusion, GaussianDiffusion.p_sample_loop),
    "ddim": (GaussianDiffusion, GaussianDiffusion.ddim_sample_loop),
    **{name: (GaussianDiffusion, functools.partial(multistep_sample_loop, solver=name)) for name in SOLVERS},
}


def applicable_samplers(diffusion) -> list[str]:
    """Return the keys of SAMPLERS that apply to a process, the default first."""
    return [name for name, (process, _) in SAMPLERS.items() if isinstance(diffusion, process)]
