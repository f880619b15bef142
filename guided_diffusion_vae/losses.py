"""Compute the likelihood terms of the variational bound, in nats per element."""

import math

import torch

# Below this a probability is treated as this, so that its logarithm stays finite.
_MIN_PROBABILITY = 1e-12


def normal_kl(mean1, logvar1, mean2, logvar2):
    """Return KL(N(mean1, exp logvar1) || N(mean2, exp logvar2)) element by element, in nats.

    The arguments broadcast against each other; any of them may be a number, but one has to be a tensor.

    Raises TypeError where no argument is a tensor.
    """
    if not any(isinstance(value, torch.Tensor) for value in (mean1, logvar1, mean2, logvar2)):
        raise TypeError("normal_kl got four numbers, needs at least one tensor among means and log variances")
    # A 0-dim CPU tensor joins tensors of any device without being copied there.
    logvar1, logvar2 = (v if isinstance(v, torch.Tensor) else torch.tensor(float(v)) for v in (logvar1, logvar2))
    variance_ratio = torch.exp(logvar1 - logvar2)
    distance = (mean1 - mean2) ** 2 * torch.exp(-logvar2)
    return 0.5 * (variance_ratio + distance - 1.0 - (logvar1 - logvar2))


def approx_standard_normal_cdf(x):
    """Return the standard normal distribution function at `x` to within 5e-4; the tanh form behind GELU.

    Source: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
    """
    return 0.5 + 0.5 * torch.tanh(math.sqrt(2.0 / math.pi) * x * (1.0 + 0.044715 * x * x))


def discretized_gaussian_log_likelihood(x, *, means, log_scales):
    """Return log P(x) where N(means, exp(log_scales)^2) is binned to the 256 levels of 8-bit pictures, in nats.

    x: levels mapped to [-1, 1], so a bin is 2/255 wide; the outermost bins reach to infinity. All three tensors have
    one shape, and so has the result.

    Source: DDPM, arXiv 2006.11239, equation 13.
    Raises ValueError where the shapes differ.
    """
    if not x.shape == means.shape == log_scales.shape:
        raise ValueError(
            f"discretized_gaussian_log_likelihood needs one shape, got x {tuple(x.shape)}, "
            f"means {tuple(means.shape)}, log_scales {tuple(log_scales.shape)}"
        )
    half_bin, offset, precision = 1.0 / 255.0, x - means, torch.exp(-log_scales)
    below_upper = approx_standard_normal_cdf(precision * (offset + half_bin))
    below_lower = approx_standard_normal_cdf(precision * (offset - half_bin))
    inside = torch.where(x > 0.999, 1.0 - below_lower, below_upper - below_lower)
    probability = torch.where(x < -0.999, below_upper, inside)
    return probability.clamp(min=_MIN_PROBABILITY).log()


def gaussian_log_density(x, *, means, log_scales):
    """Return log N(x; means, exp(log_scales)^2), in nats; what latents have in the place of 256 levels.

    A density, so it can be above 0. The three tensors have one shape, and so has the result.
    """
    return -0.5 * ((x - means) * torch.exp(-log_scales)) ** 2 - log_scales - 0.5 * math.log(2.0 * math.pi)
