"""Gaussian diffusion process: forward noising, the learned reverse process, its sampling loops and losses.

Notation follows the papers: x_0 data, x_t noised data, t timestep (0 is the least noisy), eps noise, beta and alpha-bar
the noise schedule, q the fixed forward process, p the learned reverse process. Equations are cited by paper: DDPM
(arXiv:2006.11239), iDDPM (arXiv:2102.09672), DDIM (arXiv:2010.02502), ADM (arXiv:2105.05233), progressive distillation
(arXiv:2202.00512), zero terminal SNR (arXiv:2305.08891), min-SNR (arXiv:2303.09556).

Tensors are [N x C x ...] with any number of spatial axes, t is int64 [N]. Arguments of many functions:

* `model`: called as model(x, timesteps, **model_kwargs), returns the prediction [N x C x ...], with learned variances
  followed by their channels, [N x 2C x ...].
* `denoised_fn`: maps the predicted x_0 to the one that is used.
* `cond_fn`: called as cond_fn(x, timesteps, **model_kwargs), returns the gradient of log p(y | x_t), [N x C x ...].
* `clip_denoised`: clamp the predicted x_0 to [-1, 1]; correct for images in that range, wrong for latents.
* `noise_fn`: noise_fn(x) returns standard normal noise shaped like x, and is called for noise that has an effect; None:
  torch.randn_like, called as often as in guided-diffusion.
"""

import collections
import copy
import enum
import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

from . import deprecated_names
from .config import ParsedText, option, require
from .interfaces import PerTimestep, Process
from .losses import discretized_gaussian_log_likelihood, gaussian_log_density, normal_kl
from .nn import mean_flat, to_device


def betas_for_alpha_bar(num_diffusion_timesteps: int, alpha_bar, max_beta=0.999) -> np.ndarray:
    """Return the betas, float64 [T], whose cumulative product of 1 - beta follows `alpha_bar`, a function of [0, 1].

    :param max_beta: upper bound of beta, which avoids a singularity at the last timesteps (iDDPM, Sec. 3.2).
    """
    grid = [alpha_bar(i / num_diffusion_timesteps) for i in range(num_diffusion_timesteps + 1)]
    return np.array([min(1 - after / before, max_beta) for before, after in itertools.pairwise(grid)])


def _linear_betas(steps):
    """Return the betas of DDPM, Sec. 4: 1e-4 to 0.02 in 1000 steps; other lengths have the same total noise."""
    return np.linspace(0.1 / steps, 20.0 / steps, steps, dtype=np.float64)


def _cosine_betas(steps):
    """Return the betas of iDDPM, Eq. 17, with the offset s = 0.008."""
    return betas_for_alpha_bar(steps, lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


def zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Return `betas` rescaled to zero signal at the last timestep; float64 [T], the last one is 1.

    Zero terminal SNR, Alg. 1: sqrt(alpha-bar) is shifted to end at 0 and scaled to start at its old value. Training at
    the last timestep then matches sampling, which starts from pure noise; otherwise the mean intensity leaks.
    """
    root = np.sqrt(np.cumprod(1.0 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return 1.0 - (root / np.append(1.0, root[:-1])) ** 2


# The choices of --noise_schedule.
NOISE_SCHEDULES = {
    "linear": _linear_betas,
    "cosine": _cosine_betas,
    "linear_zero_snr": lambda steps: zero_terminal_snr(_linear_betas(steps)),
    "cosine_zero_snr": lambda steps: zero_terminal_snr(_cosine_betas(steps)),
}


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """Return the betas of a key of NOISE_SCHEDULES, float64 [T].

    :raises NotImplementedError: if there is no such schedule.
    """
    if schedule_name not in NOISE_SCHEDULES:
        raise NotImplementedError(f"--noise_schedule {schedule_name}: expected one of: {', '.join(NOISE_SCHEDULES)}")
    return NOISE_SCHEDULES[schedule_name](num_diffusion_timesteps)


respacing = ParsedText("steps", "a count (250), counts per section (10,15,20), ddimN (ddim25), logsnrN (logsnr20) or "
                       "trailingN (trailing4)",
                       re.compile(r"((ddim|logsnr|trailing)?\d+|\d+( *, *\d+)*|) *").fullmatch, bool)


@dataclass
class DiffusionConfig:
    """The noise schedule, what the network predicts, and how it is trained and sampled."""

    process: str = option("gaussian", "diffusion process: gaussian, or rectified_flow (straight paths between data and "
                                      "noise, of which the network predicts the velocity; for few sampling steps)")
    learn_sigma: bool = option(False, "predict the variance of each reverse step too (twice the output channels), as "
                                      "good samples in few steps and likelihoods require")
    diffusion_steps: int = option(1000, "timesteps of the process that the network is trained on", minimum=1)
    noise_schedule: str = option(
        "linear", "noise schedule: linear (DDPM) or cosine (slower at both ends); _zero_snr: ends in pure noise, which "
                  "requires --predict_v or --predict_xstart", choices=tuple(NOISE_SCHEDULES))
    timestep_respacing: Annotated[str, respacing] = option(
        "", "steps to sample: a count (250), counts per equal section (10,15,20), ddimN (N steps at an integer stride, "
            "for DDIM), logsnrN (N steps evenly spaced in log-SNR, for solvers) or trailingN (N equal steps from the "
            "last timestep, as a count for rectified_flow); empty: all",
        essential="num_samples")
    use_kl: bool = option(False, "train on the variational lower bound only, the loss of the best likelihood, instead "
                                 "of the squared error")
    predict_xstart: bool = option(False, "predict the denoised x_0 instead of the noise")
    predict_v: bool = option(False, "predict the velocity, a mixture of noise and x_0 (v-prediction)")
    min_snr_gamma: float = option(0.0, "weight the squared error by min(SNR, gamma), so that low noise levels do not "
                                       "dominate; usually 5; 0: disabled", minimum=0)
    rescale_timesteps: bool = option(False, "scale the timesteps passed to the network to [0, 1000]")
    rescale_learned_sigmas: bool = option(False, "weight the variance term of the loss by steps / 1000, so that it "
                                                 "never exceeds the squared error (with learn_sigma)")


class ModelMeanType(enum.Enum):
    """Prediction of the network's first C channels."""

    PREVIOUS_X = "the mean of x_{t-1}"
    START_X = "x_0"
    EPSILON = "the noise in x_t"
    VELOCITY = "sqrt(alpha-bar) noise - sqrt(1 - alpha-bar) x_0 (progressive distillation, Sec. 4)"


class ModelVarType(enum.Enum):
    """Source of the variance of a reverse step."""

    LEARNED = "the network's second C channels are its logarithm"
    FIXED_SMALL = "beta-tilde, the variance of q(x_{t-1} | x_t, x_0)"
    FIXED_LARGE = "beta"
    LEARNED_RANGE = "the second C channels interpolate from log beta-tilde (-1) to log beta (1), iDDPM Eq. 15"


class LossType(enum.Enum):
    """Training loss."""

    MSE = "squared error of the prediction, plus the variational lower bound (VLB) with learned variances"
    RESCALED_MSE = "the same, with the VLB weighted by T / 1000"
    MIN_SNR = "squared error weighted by min(SNR, gamma) of the corresponding x_0 error (min-SNR, Sec. 3.4)"
    KL = "term L_t of the variational lower bound"
    RESCALED_KL = "the same times T, an estimate of the full bound"

    def is_vb(self):
        """Return whether the loss is the variational lower bound only."""
        return self in (LossType.KL, LossType.RESCALED_KL)


# Lowest alpha-bar of the first sampling step from which x_0 can be predicted from eps without clipping: the error of
# eps is amplified by 1 / sqrt(alpha-bar). The cosine schedule ends at 2e-9, the linear one at 4e-5.
MIN_UNCLIPPED_ALPHA_BAR = 1e-6

_HAS_VARIANCE_HEAD = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)

# (variance, log variance) of the reverse step, as names of schedules.
_FIXED_VARIANCES = {
    ModelVarType.FIXED_SMALL: ("posterior_variance", "posterior_log_variance_clipped"),
    ModelVarType.FIXED_LARGE: ("_large_variance", "_large_log_variance"),
}


class ScheduledProcess(Process):
    """Base of processes whose schedules are NumPy float64 attributes [T].

    Steps gather from float32 copies, which are uploaded once per device.

    :param timestep_map: kept timesteps of the original process of `original_num_steps`, ascending.
    :param rescale_timesteps: pass timesteps in [0, 1000) to models for any T.
    """

    def __init__(self, timestep_map, original_num_steps, rescale_timesteps=False):
        self.num_timesteps, self.original_num_steps = len(timestep_map), original_num_steps
        self.timestep_map, self.rescale_timesteps = timestep_map, rescale_timesteps
        self._tables = {}       # (name of a schedule, device) -> tensor [T]

    def truncated(self, count):
        """Return the process on its first `count` timesteps; see `Process.truncated`."""
        part = copy.copy(self)
        part.num_timesteps, part.timestep_map = count, self.timestep_map[:count]
        part._tables = {}   # those of another length
        return part

    def _schedule_on(self, name, device):
        """Return schedule `name` on `device`: float32, or int64 for integers; uploaded once."""
        key = name, device
        if key not in self._tables:
            values = np.asarray(getattr(self, name))
            dtype = np.int64 if values.dtype.kind == "i" else np.float32
            with torch.inference_mode(False):       # a table created in a preview must work in training too
                self._tables[key] = to_device(torch.from_numpy(values.astype(dtype)), device)
        return self._tables[key]

    def _extract(self, name, t, x):
        """Return schedule `name` at timesteps t, broadcastable to x.  [N] -> [N x 1 x ...]"""
        return self._schedule_on(name, t.device)[t].view(-1, *(1,) * (x.dim() - 1))

    def model_timesteps(self, t):
        """Return the timesteps that are passed to networks and guidance for t.  [N] -> [N]"""
        original = self._schedule_on("timestep_map", t.device)[t]
        return original.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else original

    def model_timestep(self, t):
        """Return the number that `model_timesteps` returns for timestep t, computed on the host."""
        original = np.float32(self.timestep_map[t])
        return float(original * np.float32(1000.0 / self.original_num_steps) if self.rescale_timesteps else original)


class GaussianDiffusion(ScheduledProcess):
    """Forward process q, reverse process p of a network, their sampling loops and losses; see `interfaces.Process`.

    :param betas: variance added by each step, [T] in (0, 1].
    :param rescale_timesteps: pass timesteps in [0, 1000) to models for any T.
    :param min_snr_gamma: upper bound of the weight of LossType.MIN_SNR.
    :param discrete_data: x_0 are 8-bit values mapped to [-1, 1], whose likelihood at t = 0 is a probability. False: x_0
        are real numbers, such as latents, whose likelihood is a density.
    :raises ValueError: if `betas` is not a sequence of numbers in (0, 1], or the network predicts noise or x_{t-1} and
        the schedule ends in pure noise.
    """

    def __init__(self, *, betas, model_mean_type, model_var_type, loss_type, rescale_timesteps=False,
                 min_snr_gamma=5.0, discrete_data=True):
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.min_snr_gamma = min_snr_gamma
        self.discrete_data = discrete_data
        self.betas = np.array(betas, dtype=np.float64)
        steps = _check_betas(self.betas)
        super().__init__(list(range(steps)), steps, rescale_timesteps)
        with np.errstate(divide="ignore"):      # a last beta of 1 leaves no signal: 1 / sqrt(alpha-bar) is infinite
            self._derive_schedules()
        if loss_type is LossType.MIN_SNR:
            self._min_snr_weight = self._min_snr_weights()
        if self.betas[-1] == 1 and model_mean_type in (ModelMeanType.EPSILON, ModelMeanType.PREVIOUS_X):
            raise ValueError("the noise schedule ends in pure noise, where predicted noise does not determine x_0; set "
                             "--predict_v True or --predict_xstart True, or use another --noise_schedule")

    def _derive_schedules(self):
        alpha_bar = np.cumprod(1.0 - self.betas)
        self.alphas_cumprod = alpha_bar
        self.alphas_cumprod_prev = np.append(1.0, alpha_bar[:-1])       # x_{-1} is x_0
        self.alphas_cumprod_next = np.append(alpha_bar[1:], 0.0)        # x_T is pure noise

        # q(x_t | x_0), DDPM Eq. 4, and its inverses
        self.sqrt_alphas_cumprod = np.sqrt(alpha_bar)
        self.sqrt_one_minus_alphas_cumprod = np.sqrt(1.0 - alpha_bar)
        self.log_one_minus_alphas_cumprod = np.log(1.0 - alpha_bar)
        self.sqrt_recip_alphas_cumprod = np.sqrt(1.0 / alpha_bar)
        self.sqrt_recipm1_alphas_cumprod = np.sqrt(1.0 / alpha_bar - 1.0)
        self._one_minus_alphas_cumprod = 1.0 - alpha_bar
        # d x_0 / d eps times d eps / d score; 0 without signal, where guidance is undefined
        self._xstart_per_score = np.where(alpha_bar > 0, (1.0 - alpha_bar) * self.sqrt_recip_alphas_cumprod, 0.0)

        # q(x_{t-1} | x_t, x_0), DDPM Eq. 6 and 7. Its variance is 0 at t = 0: the logarithm uses that of t = 1 there
        # (iDDPM, Sec. 3.1), or beta if T = 1.
        noise_ratio = (1.0 - self.alphas_cumprod_prev) / (1.0 - alpha_bar)
        self.posterior_variance = self.betas * noise_ratio
        first = self.posterior_variance[1] if self.num_timesteps > 1 else self.betas[0]
        self.posterior_log_variance_clipped = np.log(np.append(first, self.posterior_variance[1:]))
        self.posterior_mean_coef1 = np.sqrt(self.alphas_cumprod_prev) * self.betas / (1.0 - alpha_bar)
        self.posterior_mean_coef2 = np.sqrt(1.0 - self.betas) * noise_ratio
        self._xprev_coef = 1.0 / self.posterior_mean_coef1
        self._xprev_x_t_coef = self.posterior_mean_coef2 / self.posterior_mean_coef1

        # variances of the reverse step
        self._log_betas = np.log(self.betas)
        self._large_variance = np.append(first, self.betas[1:])
        self._large_log_variance = np.log(self._large_variance)

        # DDIM steps from t to t - 1 and to t + 1
        self._sqrt_alphas_cumprod_prev = np.sqrt(self.alphas_cumprod_prev)
        self._one_minus_alphas_cumprod_prev = 1.0 - self.alphas_cumprod_prev
        self._posterior_std = np.sqrt(self.posterior_variance)
        self._sqrt_alphas_cumprod_next = np.sqrt(self.alphas_cumprod_next)
        self._sqrt_one_minus_alphas_cumprod_next = np.sqrt(1.0 - self.alphas_cumprod_next)

    # --- Interface to sampling and guidance, beyond the methods of guided-diffusion ---

    def noise_levels(self):
        """Return sigma_t = sqrt((1 - alpha-bar) / alpha-bar), the noise-to-signal ratio, float64 [T]."""
        with np.errstate(divide="ignore"):      # infinite if no signal is left
            return np.sqrt((1.0 - self.alphas_cumprod) / self.alphas_cumprod)[:self.num_timesteps]

    def unclipped_warning(self):
        """Return why sampling without clipping x0 may diverge from the first step on, None if it may not."""
        first = self.alphas_cumprod[self.num_timesteps - 1]
        if self.model_mean_type is not ModelMeanType.EPSILON or first >= MIN_UNCLIPPED_ALPHA_BAR:
            return None
        return (f"x0 is not clipped and {math.sqrt(first):.1g} of the signal is left at the first sampling step: x0 "
                "may diverge and samples stay noisy; --timestep_respacing ddim100 starts at lower noise")

    # --- Forward process q ---

    def q_mean_variance(self, x_start, t):
        """Return mean, variance and log variance of q(x_t | x_0), each [N x C x ...]; DDPM, Eq. 4."""
        return (
            self._extract("sqrt_alphas_cumprod", t, x_start) * x_start,
            self._extract("_one_minus_alphas_cumprod", t, x_start).expand_as(x_start),
            self._extract("log_one_minus_alphas_cumprod", t, x_start).expand_as(x_start),
        )

    def q_sample(self, x_start, t, noise=None):
        """Return x_t ~ q(x_t | x_0), [N x C x ...].

        :param noise: standard normal, [N x C x ...]; None: sample it.
        :raises ValueError: if the shapes of noise and data differ.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        if noise.shape != x_start.shape:
            raise ValueError(f"noise: expected shape {tuple(x_start.shape)}, got {tuple(noise.shape)}")
        std = self._extract("sqrt_one_minus_alphas_cumprod", t, x_start)
        return self._extract("sqrt_alphas_cumprod", t, x_start) * x_start + std * noise

    def q_posterior_mean_variance(self, x_start, x_t, t):
        """Return mean, variance and (clipped) log variance of q(x_{t-1} | x_t, x_0); DDPM, Eq. 6 and 7."""
        return (
            self._extract("posterior_mean_coef1", t, x_t) * x_start
            + self._extract("posterior_mean_coef2", t, x_t) * x_t,
            self._extract("posterior_variance", t, x_t).expand_as(x_t),
            self._extract("posterior_log_variance_clipped", t, x_t).expand_as(x_t),
        )

    # --- Conversions between the possible predictions of a network ---

    def _predict_xstart_from_eps(self, x_t, t, eps):
        """Solve x_t = sqrt(alpha-bar) x_0 + sqrt(1 - alpha-bar) eps for x_0; inverse: `_predict_eps_from_xstart`."""
        scaled = self._extract("sqrt_recip_alphas_cumprod", t, x_t) * x_t
        return scaled - self._extract("sqrt_recipm1_alphas_cumprod", t, x_t) * eps

    def _predict_eps_from_xstart(self, x_t, t, pred_xstart):
        """Solve the same equation for eps; inverse: `_predict_xstart_from_eps`."""
        signal = self._extract("sqrt_alphas_cumprod", t, x_t) * pred_xstart
        return (x_t - signal) / self._extract("sqrt_one_minus_alphas_cumprod", t, x_t)

    def _predict_xstart_from_v(self, x_t, t, v):
        """Return x_0 = sqrt(alpha-bar) x_t - sqrt(1 - alpha-bar) v; progressive distillation, appendix D."""
        std = self._extract("sqrt_one_minus_alphas_cumprod", t, x_t)
        return self._extract("sqrt_alphas_cumprod", t, x_t) * x_t - std * v

    def _velocity(self, x_start, t, noise):
        """Return v = sqrt(alpha-bar) eps - sqrt(1 - alpha-bar) x_0, [N x C x ...]."""
        std = self._extract("sqrt_one_minus_alphas_cumprod", t, x_start)
        return self._extract("sqrt_alphas_cumprod", t, x_start) * noise - std * x_start

    def _predict_xstart_from_xprev(self, x_t, t, xprev):
        """Solve DDPM, Eq. 7 for x_0; inverse: the mean of `q_posterior_mean_variance`."""
        return self._extract("_xprev_coef", t, x_t) * xprev - self._extract("_xprev_x_t_coef", t, x_t) * x_t

    # --- Reverse process p ---

    def p_mean_variance(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None):
        """Return p(x_{t-1} | x_t) as predicted by the network.

        :return: {"mean", "variance", "log_variance", "pred_xstart"}, each [N x C x ...]; x_0 is the source of the mean.
        :raises ValueError: if the output channels of the network do not match the variance type.
        """
        output = model(x, self.model_timesteps(t), **(model_kwargs or {}))
        return self._p_from_output(output, x, t, clip_denoised, denoised_fn)

    def _p_from_output(self, output, x, t, clip_denoised, denoised_fn=None):
        """Return p(x_{t-1} | x_t) for the network's output at x; see `p_mean_variance`."""
        prediction, sigma_head = self._split_heads(output, x)
        variance, log_variance = self._reverse_variance(sigma_head, x, t)
        to_xstart = {
            ModelMeanType.PREVIOUS_X: self._predict_xstart_from_xprev,
            ModelMeanType.START_X: lambda x_t, t, x_0: x_0,
            ModelMeanType.EPSILON: self._predict_xstart_from_eps,
            ModelMeanType.VELOCITY: self._predict_xstart_from_v,
        }[self.model_mean_type]
        pred_xstart = to_xstart(x, t, prediction)
        if denoised_fn is not None:
            pred_xstart = denoised_fn(pred_xstart)
        if clip_denoised:
            pred_xstart = pred_xstart.clamp(-1, 1)
        # A predicted mean is used as it is: clipping changes pred_xstart only.
        predicts_mean = self.model_mean_type is ModelMeanType.PREVIOUS_X
        mean = prediction if predicts_mean else self.q_posterior_mean_variance(pred_xstart, x, t)[0]
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _split_heads(self, output, x):
        """Return (prediction, variance head or None), [N x C x ...] each."""
        heads = 2 if self.model_var_type in _HAS_VARIANCE_HEAD else 1
        expected = (x.shape[0], heads * x.shape[1], *x.shape[2:])
        if output.shape != expected:
            raise ValueError(f"model output for {self.model_var_type.name}: expected shape {expected}, got "
                             f"{tuple(output.shape)}; --learn_sigma {heads == 2} requires {heads} x the input channels")
        return output.chunk(2, dim=1) if heads == 2 else (output, None)

    def _reverse_variance(self, sigma_head, x, t):
        """Return (variance, log variance) of p(x_{t-1} | x_t), [N x C x ...] each."""
        if self.model_var_type in _FIXED_VARIANCES:
            variance, log_variance = (self._extract(name, t, x) for name in _FIXED_VARIANCES[self.model_var_type])
            return variance.expand_as(x), log_variance.expand_as(x)
        if self.model_var_type is ModelVarType.LEARNED:
            return sigma_head.exp(), sigma_head
        v = 0.5 * (sigma_head + 1.0)        # [-1, 1] -> [0, 1]
        low, high = self._extract("posterior_log_variance_clipped", t, x), self._extract("_log_betas", t, x)
        log_variance = v * high + (1.0 - v) * low
        return log_variance.exp(), log_variance

    def condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Return the mean of a reverse step, shifted along the guidance gradient; ADM, Alg. 1.

        :param p_mean_var: the result of `p_mean_variance` for x and t.
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        return p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()

    def condition_score(self, cond_fn, p_mean_var, x, t, model_kwargs=None):
        """Return `p_mean_var` as if the network had predicted the guided noise; ADM, Alg. 2.

        The algorithm's eps - sqrt(1 - alpha-bar) gradient, expressed in x_0. `mean` and `pred_xstart` change; the new
        `pred_xstart` is not clipped again.
        """
        gradient = cond_fn(x, self.model_timesteps(t), **(model_kwargs or {}))
        pred_xstart = p_mean_var["pred_xstart"] + self._extract("_xstart_per_score", t, x) * gradient
        return {**p_mean_var, "pred_xstart": pred_xstart, "mean": self.q_posterior_mean_variance(pred_xstart, x, t)[0]}

    def predict_xstart(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None
    ):
        """Return x_0 as the network predicts it at x_t, guided by `cond_fn`.  [N x C x ...] -> same"""
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        return (p if cond_fn is None else self.condition_score(cond_fn, p, x, t, model_kwargs))["pred_xstart"]

    # --- Single sampling steps ---
    # As in guided-diffusion, torch.randn_like is called at every step, even if its noise is multiplied by zero.

    def p_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, noise_fn=None
    ):
        """Return {"sample": x_{t-1} ~ p(x_{t-1} | x_t), "pred_xstart"}; DDPM, Alg. 2. The mean at t = 0."""
        p = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        noise = (noise_fn or torch.randn_like)(x)
        mean = p["mean"] if cond_fn is None else self.condition_mean(cond_fn, p, x, t, model_kwargs)
        is_noisy = (t != 0).to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
        return {"sample": mean + is_noisy * (0.5 * p["log_variance"]).exp() * noise, "pred_xstart": p["pred_xstart"]}

    def ddim_sample(
        self, model, x, t, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None, eta=0.0, noise_fn=None
    ):
        """Return {"sample": x_{t-1}, "pred_xstart"} of a DDIM step; DDIM, Eq. 12.

        :param eta: fraction of DDPM's noise, from 0 (deterministic) to 1 (sigma = sqrt(beta-tilde)).
        :raises ValueError: if eta is outside [0, 1].
        """
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"DDIM eta must be in [0, 1], got {eta}")
        x_0 = self.predict_xstart(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, x_0)
        noise = torch.randn_like(x) if noise_fn is None else noise_fn(x) if eta > 0 else 0.0
        sigma = eta * self._extract("_posterior_std", t, x)        # Eq. 16; 0 at t = 0
        # With eta 1 rounding may leave the difference slightly below zero.
        along_eps = (self._extract("_one_minus_alphas_cumprod_prev", t, x) - sigma**2).clamp(min=0.0).sqrt()
        mean = self._extract("_sqrt_alphas_cumprod_prev", t, x) * x_0 + along_eps * eps
        return {"sample": mean + sigma * noise, "pred_xstart": x_0}

    def ddim_reverse_sample(self, model, x, t, clip_denoised=True, denoised_fn=None, model_kwargs=None, eta=0.0):
        """Return {"sample": x_{t+1}, "pred_xstart"} of a step of the reverse DDIM ODE; DDIM, Eq. 14.

        :raises ValueError: if eta is not 0: only deterministic steps are invertible.
        """
        if eta != 0.0:
            raise ValueError(f"DDIM eta must be 0 in reverse steps, got {eta}; with noise they are not invertible")
        x_0 = self.predict_xstart(model, x, t, clip_denoised, denoised_fn, model_kwargs=model_kwargs)
        eps = self._predict_eps_from_xstart(x, t, x_0)
        std = self._extract("_sqrt_one_minus_alphas_cumprod_next", t, x)
        return {"sample": self._extract("_sqrt_alphas_cumprod_next", t, x) * x_0 + std * eps, "pred_xstart": x_0}

    # --- Sampling loops, from t = T - 1 to t = 0 ---

    def p_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, noise_fn=None,
    ):
        """Return x_0 of `shape` [N, C, ...], sampled by DDPM; arguments as in `p_sample_loop_progressive`."""
        return last_sample(self.p_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, noise_fn
        ))

    def p_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, noise_fn=None,
    ):
        """Yield the result of `p_sample` at each step; the last `sample` is x_0.

        :param noise: x_T, [N x C x ...]; None: sample it, by `noise_fn` if set.
        :param device: None: that of the model's parameters.
        :param progress: show a progress bar.
        :raises ValueError: if `noise` does not have `shape`.
        """
        step = functools.partial(
            self.p_sample, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, noise_fn=noise_fn,
        )
        return sample_progressive(self, step, model, shape, noise, device, progress, noise_fn)

    def ddim_sample_loop(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0, noise_fn=None,
    ):
        """Return x_0 of `shape` [N, C, ...], sampled by DDIM; arguments as in `ddim_sample_loop_progressive`."""
        return last_sample(self.ddim_sample_loop_progressive(
            model, shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta, noise_fn
        ))

    def ddim_sample_loop_progressive(
        self, model, shape, noise=None, clip_denoised=True, denoised_fn=None, cond_fn=None, model_kwargs=None,
        device=None, progress=False, eta=0.0, noise_fn=None,
    ):
        """Yield the result of `ddim_sample` at each step; arguments as in `p_sample_loop_progressive`, and eta."""
        step = functools.partial(
            self.ddim_sample, clip_denoised=clip_denoised, denoised_fn=denoised_fn, cond_fn=cond_fn,
            model_kwargs=model_kwargs, eta=eta, noise_fn=noise_fn,
        )
        return sample_progressive(self, step, model, shape, noise, device, progress, noise_fn)

    # --- Losses and likelihoods ---

    def training_losses(self, model, x_start, t, model_kwargs=None, noise=None):
        """Return losses per sample, each [N]; "loss" is the one to minimize.

        Squared errors also return `mse` and, with learned variances, the weighted VLB term `vb` (L_hybrid, iDDPM,
        Eq. 16), whose gradient reaches the variance head only.

        :param noise: standard normal noise of x_t, [N x C x ...]; None: sample it.
        :raises ValueError: if the output channels of the network or the shape of the noise do not match.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise)
        output = model(x_t, self.model_timesteps(t), **(model_kwargs or {}))
        vb_weight = {
            LossType.MSE: 1.0,
            LossType.RESCALED_MSE: self.num_timesteps / 1000.0,
            LossType.MIN_SNR: 1.0,
            LossType.KL: 1.0,
            LossType.RESCALED_KL: self.num_timesteps,
        }[self.loss_type]
        if self.loss_type.is_vb():
            p = self._p_from_output(output, x_t, t, clip_denoised=False)
            return {"loss": vb_weight * self._vlb_term(p, x_start, x_t, t)}

        prediction, sigma_head = self._split_heads(output, x_t)
        terms = {"mse": mean_flat((self._target(x_start, x_t, t, noise) - prediction) ** 2)}
        if self.loss_type is LossType.MIN_SNR:
            terms["mse"] = terms["mse"] * self._schedule_on("_min_snr_weight", t.device)[t]
        if sigma_head is None:
            return {"loss": terms["mse"], **terms}
        p = self._p_from_output(torch.cat([prediction.detach(), sigma_head], dim=1), x_t, t, clip_denoised=False)
        terms["vb"] = vb_weight * self._vlb_term(p, x_start, x_t, t)
        return {"loss": terms["mse"] + terms["vb"], **terms}

    def _target(self, x_start, x_t, t, noise):
        """Return the target of the network's prediction, [N x C x ...]."""
        if self.model_mean_type is ModelMeanType.PREVIOUS_X:
            return self.q_posterior_mean_variance(x_start, x_t, t)[0]
        if self.model_mean_type is ModelMeanType.VELOCITY:
            return self._velocity(x_start, t, noise)
        return {ModelMeanType.START_X: x_start, ModelMeanType.EPSILON: noise}[self.model_mean_type]

    def _min_snr_weights(self):
        """Return min(SNR, gamma), the weight of the x_0 error, converted to the error of the prediction, [T]."""
        snr = self.alphas_cumprod / (1.0 - self.alphas_cumprod)
        bounded = np.minimum(snr, self.min_snr_gamma)
        # The eps error is sqrt(SNR) times, the v error sqrt(SNR + 1) times the x_0 error.
        ratios = {ModelMeanType.START_X: 1.0, ModelMeanType.EPSILON: snr, ModelMeanType.VELOCITY: snr + 1.0}
        if self.model_mean_type not in ratios or not self.min_snr_gamma > 0:
            raise ValueError("min-SNR weighting: expected --min_snr_gamma > 0 and a prediction of noise, x_0 or "
                             f"velocity, got {self.min_snr_gamma} and {self.model_mean_type.name}")
        return bounded / ratios[self.model_mean_type]

    def _vlb_term(self, p, x_start, x_t, t):
        """Return term L_t of the variational lower bound (iDDPM, Eq. 4 to 6) in bits per dimension, [N].

        The KL divergence of q(x_{t-1} | x_t, x_0) and p; at t = 0 the negative log-likelihood of x_start, as 8-bit data
        in [-1, 1] or as real numbers (see `discrete_data`).
        """
        mean, _, log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = normal_kl(mean, log_variance, p["mean"], p["log_variance"])
        likelihood = discretized_gaussian_log_likelihood if self.discrete_data else gaussian_log_density
        decoded = likelihood(x_start, means=p["mean"], log_scales=0.5 * p["log_variance"])
        return torch.where(t == 0, mean_flat(-decoded), mean_flat(kl)) / math.log(2.0)

    def _vb_terms_bpd(self, model, x_start, x_t, t, clip_denoised=True, model_kwargs=None):
        """Return {"output": L_t in bits per dimension [N], "pred_xstart": [N x C x ...]}."""
        p = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
        return {"output": self._vlb_term(p, x_start, x_t, t), "pred_xstart": p["pred_xstart"]}

    def _prior_bpd(self, x_start):
        """Return L_T = KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [N]; independent of the network."""
        last = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, last)
        return mean_flat(normal_kl(mean, log_variance, 0.0, 0.0)) / math.log(2.0)

    def calc_bpd_loop(self, model, x_start, clip_denoised=True, model_kwargs=None):
        """Return the variational lower bound of x_start (see `discrete_data`) in bits per dimension, and its terms.

        :return: a dictionary with `total_bpd` and `prior_bpd` [N]; `vb`, `xstart_mse` and `mse` (of the noise) [N x T],
            whose first column is timestep T - 1. Noise is sampled once per timestep, in this order.
        """
        columns = collections.defaultdict(list)
        for i in range(self.num_timesteps - 1, -1, -1):
            t = torch.full((len(x_start),), i, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            with torch.no_grad():
                term = self._vb_terms_bpd(model, x_start, x_t, t, clip_denoised, model_kwargs)
            eps = self._predict_eps_from_xstart(x_t, t, term["pred_xstart"])
            columns["vb"].append(term["output"])
            columns["xstart_mse"].append(mean_flat((term["pred_xstart"] - x_start) ** 2))
            columns["mse"].append(mean_flat((eps - noise) ** 2))
        table = {name: torch.stack(column, dim=1) for name, column in columns.items()}
        prior_bpd = self._prior_bpd(x_start)
        return {"total_bpd": table["vb"].sum(dim=1) + prior_bpd, "prior_bpd": prior_bpd, **table}


def _check_betas(betas):
    """Return the number of betas after checking that they are a 1D array of numbers in (0, 1]."""
    require((betas.ndim == 1 and len(betas) > 0, f"betas: expected shape [T], got {list(betas.shape)}"))
    wrong = np.flatnonzero(~((betas > 0) & (betas <= 1)))
    if len(wrong):
        raise ValueError(f"beta {wrong[0]} of {len(betas)} must be in (0, 1], got {betas[wrong[0]]}; the linear "
                         "schedule requires --diffusion_steps > 20")
    return len(betas)


def initial_noise(shape, noise, device, noise_fn):
    """Return x_T: `noise` if set, else sampled with `shape` on `device`."""
    if noise is None:
        return torch.randn(*shape, device=device) if noise_fn is None else noise_fn(torch.empty(shape, device=device))
    if tuple(noise.shape) != shape:
        raise ValueError(f"noise: expected shape {shape}, got {tuple(noise.shape)}")
    return noise


def sample_progressive(diffusion, step, model, shape, noise, device, progress, noise_fn, timesteps=None):
    """Yield step(model, x=x_t, t=t) for t from T - 1 to 0 of a process; x_{t-1} is the `sample` of step t.

    :param model: a network, or a `PerTimestep` of which `step` receives the network at t.
    :param timesteps: other timesteps to take in this order.
    """
    if device is None:
        device = next(model.parameters()).device
    x = initial_noise(tuple(shape), noise, device, noise_fn)
    timesteps = timesteps or range(diffusion.num_timesteps - 1, -1, -1)
    if progress:
        from tqdm.auto import tqdm
        timesteps = tqdm(timesteps)
    for i in timesteps:
        t = torch.full((len(x),), i, device=device)     # filled on the device, without a transfer
        network = model.at(diffusion.model_timestep(i)) if isinstance(model, PerTimestep) else model
        with torch.no_grad():
            out = step(network, x=x, t=t)
        yield out
        x = out["sample"]


def last_sample(steps):
    """Return the last sample of a sampling loop, without storing the others."""
    return collections.deque(steps, maxlen=1).pop()["sample"]


__getattr__ = deprecated_names("gaussian_diffusion")
