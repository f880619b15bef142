"""Likelihood terms of the variational lower bound (VLB), in nats per element."""

import math

import torch

# The lower limit of probabilities keeps their logarithms finite.
_MIN_PROBABILITY = 1e-12


def normal_kl(mean1, logvar1, mean2, logvar2) -> torch.Tensor:
    """Return the elementwise KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) in nats.

    The arguments broadcast, and may be numbers except for one.

    :raises TypeError: if no argument is a tensor.
    """
    if not any(isinstance(value, torch.Tensor) for value in (mean1, logvar1, mean2, logvar2)):
        raise TypeError("normal_kl expects at least one tensor among means and log-variances, got four numbers")
    # A 0-dim CPU tensor combines with tensors on any device without a copy.
    logvar1, logvar2 = (v if isinstance(v, torch.Tensor) else torch.tensor(float(v)) for v in (logvar1, logvar2))
    variance_ratio = torch.exp(logvar1 - logvar2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (variance_ratio + distance - 1.0 - (logvar1 - logvar2))


def approx_standard_normal_cdf(x) -> torch.Tensor:
    """Return the standard normal CDF at `x` to within 5e-4, by the tanh approximation of GELU.

    Source: Hendrycks and Gimpel, arXiv:1606.08415, Sec. 2.
    """
    return 0.5 + 0.5 * torch.tanh(math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * x * x))


def discretized_gaussian_log_likelihood(x, *, means, log_scales) -> torch.Tensor:
    """Return log P(x) in nats for N(means, exp(log_scales)^2) discretized to 8-bit values.

    x: 8-bit values mapped to [-1, 1], so that a bin is 2/255 wide; the outermost bins extend to infinity. The three
    tensors and the result have one shape.

    Source: DDPM, arXiv:2006.11239, Eq. 13.

    :raises ValueError: if the shapes differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"discretized_gaussian_log_likelihood expects one shape, got x {tuple(x.shape)}, "
            f"means {tuple(means.shape)}, log_scales {tuple(log_scales.shape)}"
        )
    half_bin, offset, precision = 1.0 / 255.0, x - means, torch.exp(-log_scales)
    below_upper = approx_standard_normal_cdf(precision * (offset + half_bin))
    below_lower = approx_standard_normal_cdf(precision * (offset - half_bin))
    inside = torch.where(x > 0.999, 1.0 - below_lower, below_upper - below_lower)
    probability = torch.where(x < -0.999, below_upper, inside)
    return probability.clamp(min=_MIN_PROBABILITY).log()


def gaussian_log_density(x, *, means, log_scales) -> torch.Tensor:
    """Return log N(x; means, exp(log_scales)^2) in nats, for latents, which are not discrete.

    A log-density can be above 0. The three tensors and the result have one shape.
    """
    return -0.5 * ((x - means) * torch.exp(-log_scales)) ** 2 - log_scales - 0.5 * math.log(2.0 * math.pi)
