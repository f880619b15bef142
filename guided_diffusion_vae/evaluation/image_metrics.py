"""Compare images one by one: PSNR, SSIM, L1."""

import numpy as np
import torch
from PIL import Image


def psnr(a, b):
    """Return the peak signal-to-noise ratio in dB per sample, [N] float64; at most 100, where two pictures are equal.

    The peak is 1 and the squared error is averaged over channels and positions of one sample. A set is reported by
    the mean over its samples, which one equal pair (a patch of air) must not make infinite. Raises ValueError where the
    shapes differ.
    """
    mean_square = (_difference(a, b) ** 2).mean(1)
    return -10 * torch.log10(mean_square.clamp(min=1e-10))


def l1(a, b):
    """Return the mean absolute difference per sample, [N] float64."""
    return _difference(a, b).abs().mean(1)


def max_error(a, b):
    """Return the largest absolute difference per sample, [N] float64."""
    return _difference(a, b).abs().amax(1)


def ssim(a, b, window=11, sigma=1.5, k1=0.01, k2=0.03):
    """Return the structural similarity per sample, [N] float64 (Wang et al. 2004, equation 13, averaged as in 17).

    Local moments are weighted by a Gaussian of `window` points and standard deviation `sigma` along every spatial
    axis, only where the window lies inside the picture. An axis shorter than the window takes the largest odd window
    that fits; ValueError where that leaves one point on every axis. Channels are compared one by one and averaged.
    """
    a, b = _paired(a, b)
    sizes = [min(window, n - 1 + n % 2) for n in a.shape[2:]]
    if max(sizes) < 3:
        raise ValueError(f"pictures of {format_shape(a.shape[2:])} are too small for SSIM; one axis must have 3 points or more")
    kernels = [_gaussian(size, sigma, a.device) for size in sizes]
    # One sample after the other: five float64 maps of a volume are as much as should be in memory.
    one_by_one = zip(a, b)
    return torch.stack([_ssim_of_one(x.double(), y.double(), kernels, k1**2, k2**2) for x, y in one_by_one])


def _ssim_of_one(x, y, kernels, c1, c2):
    mean_x, mean_y, square_x, square_y, product = (_smooth(m, kernels) for m in (x, y, x * x, y * y, x * y))
    both_means = mean_x * mean_y
    sum_of_squares = mean_x**2 + mean_y**2
    variances = square_x + square_y - sum_of_squares
    luminance = (2 * both_means + c1) / (sum_of_squares + c1)
    structure = (2 * (product - both_means) + c2) / (variances + c2)
    return (luminance * structure).mean()


def _gaussian(size, sigma, device):
    offsets = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _smooth(x, kernels):
    """Average [C x ...] under one kernel per spatial axis, at the positions where the window fits."""
    for axis, kernel in enumerate(kernels, start=1):
        inside = x.shape[axis] - len(kernel) + 1
        # Shifted sums rather than a convolution call: the same line serves one, two and three axes.
        x = sum(weight * x.narrow(axis, shift, inside) for shift, weight in enumerate(kernel))
    return x


def bicubic_baseline(images, factor):
    """Return `images` shrunk by `factor` and enlarged again with Pillow's bicubic filter, float32 in [0, 1].

    This is what a picture keeps when only its size is reduced: the bar for an autoencoder of the same total stride.
    `factor` is an integer or one per spatial axis. Pictures are rounded to 8 bits first and after every pass, as
    Pillow does to pictures read from files (Keys 1981 with a = -1/2, widened when shrinking); volumes go through the
    same filter axis by axis. Raises ValueError where `factor` does not divide the size.
    """
    images = _tensor(images)
    sizes = tuple(images.shape[2:])
    factors = (factor,) * len(sizes) if isinstance(factor, int) else tuple(factor)
    if len(factors) != len(sizes) or any(n % f for n, f in zip(sizes, factors)):
        raise ValueError(f"a factor of {format_shape(factors)} does not divide pictures of {format_shape(sizes)}; crop or choose another")
    levels = _bytes(images)
    for wanted in ([n // f for n, f in zip(sizes, factors)], sizes):
        for axis in reversed(range(len(sizes))):
            levels = _resize_axis(levels, axis + 2, wanted[axis])
    return levels.astype(np.float32) / 255


def _resize_axis(levels, axis, size):
    rows = np.moveaxis(levels, axis, -1)
    flat = Image.fromarray(np.ascontiguousarray(rows).reshape(-1, rows.shape[-1]))
    resized = np.asarray(flat.resize((size, flat.height), Image.Resampling.BICUBIC))
    return np.moveaxis(resized.reshape(*rows.shape[:-1], size), -1, axis)


def _tensor(values):
    if isinstance(values, torch.Tensor):
        return values.detach()
    # Torch warns of arrays it could write to but must not, such as a memory-mapped cache: only those are copied.
    return torch.from_numpy(np.require(values, requirements="W"))


def _paired(a, b):
    a, b = _tensor(a), _tensor(b)
    if a.shape != b.shape or a.ndim < 3:
        raise ValueError(f"pictures {list(a.shape)} against {list(b.shape)}; both must be the same [N x C x ...]")
    return a, b.to(a.device)


def _difference(a, b):
    a, b = _paired(a, b)
    return (a.double() - b.double()).flatten(1)


def _bytes(images):
    return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def format_shape(sizes):
    return "x".join(map(str, sizes))
