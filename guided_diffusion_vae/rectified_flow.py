"""Rectified flow: straight paths between data and noise, whose velocity a network predicts.

Rectified flow (arXiv:2209.03003, Eq. 1) with time s from data, s = 0, to noise, s = 1: x_s = (1 - s) x_0 + s eps. The
network is trained to predict eps - x_0. Samples solve dx/ds = v(x, s) from noise to data. Tensors and the arguments of
functions are those of `gaussian_diffusion`.
"""


import numpy as np
import torch

from .gaussian_diffusion import (
    GaussianDiffusion, LossType, ModelMeanType, ModelVarType, ScheduledProcess, last_sample, sample_progressive,
)
from .nn import mean_flat


class RectifiedFlow(ScheduledProcess):
    """The process at the times s = (t + 1) / steps of its timesteps t: the last one is pure noise.

    The network gets t, as it does from a Gaussian process.

    :param use_timesteps: collection of timesteps to keep of the original process of `steps`.
    :param rescale_timesteps: pass timesteps in [0, 1000) to models for any number of steps.
    :param discrete_data: x_0 are 8-bit values mapped to [-1, 1], see `GaussianDiffusion`.
    """

    def __init__(self, use_timesteps, steps, rescale_timesteps=False, discrete_data=True):
        super().__init__(sorted(use_timesteps), steps, rescale_timesteps)
        self.discrete_data = discrete_data
        self.times = (np.array(self.timestep_map) + 1) / steps
        self._signal = 1.0 - self.times
        self._scales = self.scales()
        with np.errstate(divide="ignore"):      # guidance is undefined if no signal is left
            self._xstart_per_score = np.where(self._signal > 0, self.times**2 / self._signal, 0.0)

    def noise_levels(self):
        """Return sigma_t = s / (1 - s), the noise-to-signal ratio, float64 [T]."""
        with np.errstate(divide="ignore"):
            return (self.times / self._signal)[:self.num_timesteps]

    def scales(self):
        """Return sqrt((1 - s)^2 + s^2), float64 [T]."""
        return np.hypot(self._signal, self.times)[:self.num_timesteps]

    def q_sample(self, x_start, t, noise=None):
        """Return x_s, [N x C x ...].

        :param noise: standard normal, [N x C x ...]; None: sample it.
        :raises ValueError: if the shapes of noise and data differ.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(f"noise: expected shape {tuple(x_start.shape)}, got {tuple(noise.shape)}")
        return self._extract("_signal", t, x_start) * x_start + self._extract("times", t, x_start) * noise

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Return {"loss", "mse"}: the squared error of the velocity (Eq. 1), [N] each.

        :param noise: standard normal noise of x_s, [N x C x ...]; None: sample it.
        :raises ValueError: if the output channels of the network or the shape of the noise do not match.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        velocity = self._predict_velocity(model, self.q_sample(x_start, t, noise), t, model_kwargs)
        mse = mean_flat((noise - x_start - velocity) ** 2)
        return {"loss": mse, "mse": mse}

    def predict_xstart(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None
    ):
        """Return x_0 = x_s - s v as the network predicts it, guided by `cond_fn`.  [N x C x ...] -> same"""
        x_0 = x - self._extract("times", t, x) * self._predict_velocity(model, x, t, model_kwargs)
        if denoised_fn is not None:
            x_0 = denoised_fn(x_0)
        if clip_denoised:
            x_0 = x_0.clamp(-1, 1)
        if cond_fn is None:
            return x_0
        # As if the network had predicted eps - s times the gradient (ADM, arXiv:2105.05233, Alg. 2); not clipped again.
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        return x_0 + self._extract("_xstart_per_score", t, x) * gradient

    def _predict_velocity(self, model, x, t, model_kwargs):
        velocity = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        if velocity.shape != x.shape:
            raise ValueError(f"model output of a rectified flow: expected shape {tuple(x.shape)}, got "
                             f"{tuple(velocity.shape)}; set --learn_sigma False")
        return velocity

    # --- Sampling loops, from noise to data ---

    def euler_sample_loop(self, model, shape, **arguments):
        """Return x_0 of `shape` [N, C, ...], in T steps of Euler's method; `arguments` are those of `p_sample_loop`."""
        return self._sample_loop(range(self.num_timesteps - 1, -1, -1), self._move, model, shape, **arguments)

    def heun_sample_loop(self, model, shape, **arguments):
        """Return the same by Heun's method of second order, which averages the velocities at both ends of a step.

        The last step is one of Euler's, as networks are not trained at s = 0: T steps are 2T - 1 evaluations.
        """
        timesteps = [self.num_timesteps - 1, *(i for i in range(self.num_timesteps - 2, -1, -1) for _ in range(2))]
        start = []      # x and velocity at the start of a step while its end is evaluated

        def advance(i, x, velocity):
            if not start:
                start.append((x, velocity))
                return self._move(i, x, velocity)
            x, before = start.pop()
            return self._move(i + 1, x, 0.5 * (before + velocity))

        return self._sample_loop(timesteps, advance, model, shape, **arguments)

    def _move(self, i, x, velocity):
        """Return x at timestep i, moved along a velocity to the timestep below."""
        return x - velocity * float(self.times[i] - (self.times[i - 1] if i > 0 else 0.0))

    def _sample_loop(self, timesteps, advance, model, shape, noise=None, device=None, progress=False, noise_fn=None,
                     **prediction):
        """Return the last advance(i, x, velocity) of `timesteps`; `prediction` are arguments of `predict_xstart`."""
        remaining = iter(timesteps)

        def step(model, x, t):
            x_0, i = self.predict_xstart(model, x, t, **prediction), next(remaining)
            return {"sample": advance(i, x, (x - x_0) / float(self.times[i])), "pred_xstart": x_0}

        return last_sample(
            sample_progressive(self, step, model, shape, noise, device, progress, noise_fn, timesteps))

    # --- Likelihood ---

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        """Return the variational lower bound in bits per dimension, and its terms, as `GaussianDiffusion` does.

        It is that of the Gaussian process with the same noise-to-signal ratios, whose x_t are x_s divided by
        sqrt((1 - s)^2 + s^2). Its reverse steps have the variance beta: with beta-tilde, the long steps in log-SNR
        close to the data cost about two bits.
        """
        alpha_bar = (self._signal / self._scales) ** 2
        gaussian = GaussianDiffusion(
            betas=1.0 - alpha_bar / np.append(1.0, alpha_bar[:-1]), model_mean_type=ModelMeanType.START_X,
            model_var_type=ModelVarType.FIXED_LARGE, loss_type=LossType.MSE, discrete_data=self.discrete_data,
        )

        def predict_xstart(x, t, **conditioning):
            x_s = self._extract("_scales", t, x) * x
            return self.predict_xstart(model, x_s, t, clip_denoised=False, model_kwargs=conditioning)

        return gaussian.calc_bpd_loop(predict_xstart, x_start, clip_denoised, model_kwargs)
