"""Sampling loops by name, among them multi-step solvers, driven by this project's processes.

The process defines the timesteps (its respacing), the meaning of the network's output (noise, x_0 or velocity, with or
without learned variances) and the effect of guidance and clipping. A solver receives predictions of x_0 and the noise
level of every step.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..gaussian_diffusion import GaussianDiffusion, last_sample, sample_progressive
from ..nn import to_device
from ..rectified_flow import RectifiedFlow

# Noise level from which x_T counts as pure noise: solvers compute with its logarithm, and need a finite one.
MAX_NOISE_LEVEL = np.sqrt((1 - 2.0**-24) / 2.0**-24)


class DPMSolver:
    """DPM-Solver++(2M) of diffusers (arXiv:2211.01095, Alg. 2): called with x_0 and x at each step, returns the next x.

    :param sigmas: noise levels of the steps, float32 [T + 1] on the CPU, the last one 0.
    :param algorithm_type: dpmsolver++, or sde-dpmsolver++ (App. A), which is called with noise too.
    """

    def __init__(self, sigmas, algorithm_type):
        import diffusers

        steps = len(sigmas) - 1
        self.scheduler = diffusers.DPMSolverMultistepScheduler(
            num_train_timesteps=steps, prediction_type="sample", timestep_spacing="trailing", solver_order=2,
            algorithm_type=algorithm_type,
        )
        self.scheduler.set_timesteps(steps)
        self.timesteps = iter(self.scheduler.timesteps.tolist())
        # The noise levels of the process replace those of the scheduler: its own are of another schedule, and rounded.
        self.scheduler.sigmas = sigmas
        self.scheduler.set_begin_index(0)

    def __call__(self, x_0, x, noise=None):
        return self.scheduler.step(x_0, next(self.timesteps), x, variance_noise=noise, return_dict=False)[0]


class UniPC:
    """UniPC-3, B(h) = e^h - 1 (arXiv:2302.04867, Alg. 1 and 2): called with x_0 and x at each step, returns the next x.

    The coefficients of a step depend on the noise levels alone. They are computed on the CPU: solving for them on a
    GPU, as diffusers does, waits for it.

    :param sigmas: noise levels of the steps, float32 [T + 1] on the CPU, the last one 0.
    """

    ORDER = 3

    def __init__(self, sigmas):
        self.alphas = 1 / (sigmas**2 + 1) ** 0.5
        self.stds = sigmas * self.alphas
        self.log_snr = self.alphas.log() - self.stds.log()
        self.outputs = []           # the last predictions of x_0, the newest first
        self.step = 0
        self.previous = None        # x and order of the previous step

    def __call__(self, x_0, x, noise=None):
        if self.previous:
            x = self._update(self.step - 1, *self.previous, x_0)
        self.outputs = [x_0, *self.outputs[:self.ORDER - 1]]
        self.previous = x, min(len(self.outputs), len(self.log_snr) - 1 - self.step)
        self.step += 1
        return self._update(self.step - 1, *self.previous)

    def _update(self, step, x, order, x_0=None):
        """Return x after `step`: predicted, or corrected by the prediction `x_0` made there."""
        h = self.log_snr[step + 1] - self.log_snr[step]
        ratios = [(self.log_snr[step - i] - self.log_snr[step]) / h for i in range(1, order)]
        slopes = [(older - self.outputs[0]) / ratio for older, ratio in zip(self.outputs[1:], ratios)]
        scale = self.alphas[step + 1] * torch.expm1(-h)
        moved = self.stds[step + 1] / self.stds[step] * x - scale * self.outputs[0]
        if x_0 is not None:
            ratios.append(torch.ones(()))
        if not ratios:
            return moved
        weights = to_device(_unipc_weights(-h, torch.stack(ratios)).to(x.dtype), x.device)
        change = torch.einsum("k,bkc...->bc...", weights[:len(slopes)], torch.stack(slopes, dim=1)) if slopes else 0
        if x_0 is not None:
            change = change + weights[-1] * (x_0 - self.outputs[0])
        return moved - scale * change


def _unipc_weights(h, ratios):
    """Return the weights of differences of outputs at `ratios` of a step (Theorem 3.1), float32 [K] for K ratios."""
    if len(ratios) == 1:
        return torch.full((1,), 0.5)        # the authors' choice, which keeps the order of accuracy
    phi, rows, values = torch.expm1(h) / h - 1, [], []
    for k in range(1, len(ratios) + 1):
        rows.append(ratios ** (k - 1))
        values.append(phi * math.factorial(k) / torch.expm1(h))
        phi = phi / h - 1 / math.factorial(k + 1)
    return torch.linalg.solve(torch.stack(rows), torch.stack(values))


# solver(sigmas) returns what is called as (x_0, x, noise) at each step.
SOLVERS: dict[str, Callable] = {
    "dpmpp": functools.partial(DPMSolver, algorithm_type="dpmsolver++"),
    "dpmpp_sde": functools.partial(DPMSolver, algorithm_type="sde-dpmsolver++"),
    "unipc": UniPC,
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
    sigmas = np.append(np.minimum(diffusion.noise_levels(), MAX_NOISE_LEVEL)[::-1], 0.0)
    advance = SOLVERS[solver](torch.from_numpy(sigmas.astype(np.float32)))
    scales = diffusion.scales()[::-1].tolist()      # solvers have x_t of a Gaussian process, whose scale is 1
    if noise is not None:
        noise = noise / scales[0]
    scales = iter(scales)

    def step(model, x, t):
        x_0 = diffusion.predict_xstart(model, next(scales) * x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        drawn = (noise_fn or torch.randn_like)(x) if solver in STOCHASTIC else None
        return {"sample": advance(x_0, x, drawn), "pred_xstart": x_0}

    return last_sample(sample_progressive(diffusion, step, model, shape, noise, device, progress, noise_fn))


# The choices of --sampler: (class or classes of the processes, loop(diffusion, model, shape, ...)). The first entry
# that applies to a process is its default.
SAMPLERS: dict[str, tuple[Any, Callable]] = {
    "ddpm": (GaussianDiffusion, GaussianDiffusion.p_sample_loop),
    "ddim": (GaussianDiffusion, GaussianDiffusion.ddim_sample_loop),
    "euler": (RectifiedFlow, RectifiedFlow.euler_sample_loop),
    "heun": (RectifiedFlow, RectifiedFlow.heun_sample_loop),
    **{name: ((GaussianDiffusion, RectifiedFlow), functools.partial(multistep_sample_loop, solver=name))
       for name in SOLVERS},
}


def applicable_samplers(diffusion) -> list[str]:
    """Return the keys of SAMPLERS that apply to a process, the default first."""
    return [name for name, (process, _) in SAMPLERS.items() if isinstance(diffusion, process)]


def deterministic_sampler(diffusion) -> str:
    """Return the key of SAMPLERS of first-order deterministic steps: ddim, or euler for a rectified flow."""
    return next(name for name in applicable_samplers(diffusion) if name in ("ddim", "euler"))


def levels(diffusion) -> tuple[list[float], list[float]]:
    """Return (signal, noise), lists of T + 1, of x_t = signal[t] x0 + noise[t] eps; the last entry is clean x0."""
    sigma = diffusion.noise_levels()
    signal = diffusion.scales() / np.hypot(1.0, sigma)
    noise = diffusion.scales() / np.hypot(1.0, 1.0 / sigma)     # sigma may be infinite
    return [*signal.tolist(), 1.0], [*noise.tolist(), 0.0]
