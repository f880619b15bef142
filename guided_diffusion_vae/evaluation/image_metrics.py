"""Metrics of pairs of images in [0, 1], [N x C x ...] with one to three spatial axes: PSNR, SSIM, L1."""

import numpy as np
import torch
from PIL import Image

from ..config import format_shape, require
from ..nn import float64_device, to_float64, to_uint8


def paired_metrics(a, b, prefix="") -> dict[str, torch.Tensor]:
    """Return every metric of PAIRED_METRICS per sample, {prefix + name: float64 [N]} on the CPU."""
    a, b = _paired(a, b)
    return {prefix + name: metric(a, b).cpu() for name, metric in PAIRED_METRICS.items()}


def average_metrics(batches: list[dict]) -> dict[str, float]:
    """Return the means over all samples of a list of {name: [n]}, one dictionary per batch; {name: number}."""
    return {name: torch.cat([batch[name] for batch in batches]).mean().item() for name in batches[0]}


def psnr(a, b) -> torch.Tensor:
    """Return the peak signal-to-noise ratio in dB per sample, float64 [N]; at most 100, for two equal images.

    The peak is 1, the squared error is averaged over channels and positions of one sample. The bound keeps the mean
    over a set finite if one pair is equal (a constant patch).

    :raises ValueError: if the shapes differ.
    """
    mean_square = (_difference(a, b) ** 2).mean(1)
    return -10 * torch.log10(mean_square.clamp(min=1e-10))


def l1(a, b) -> torch.Tensor:
    """Return the mean absolute difference per sample, float64 [N]."""
    return _difference(a, b).abs().mean(1)


def max_error(a, b) -> torch.Tensor:
    """Return the largest absolute difference per sample, float64 [N]."""
    return _difference(a, b).abs().amax(1)


def ssim(a, b, window=11, sigma=1.5, k1=0.01, k2=0.03) -> torch.Tensor:
    """Return the structural similarity per sample, float64 [N] (Wang et al. 2004, Eq. 13, averaged as in Eq. 17).

    Local moments are weighted by a Gaussian of `window` points and standard deviation `sigma` along every spatial axis,
    at the positions where the window is inside the image. Axes shorter than the window use the largest odd window that
    fits. Channels are averaged.

    :raises ValueError: if no axis has 3 points.
    """
    a, b = _paired(a, b)
    sizes = [min(window, n - 1 + n % 2) for n in a.shape[2:]]
    require((max(sizes) >= 3, f"SSIM of size {format_shape(a.shape[2:])}: at least one axis must have 3 points"))
    kernels = [_gaussian(size, sigma, float64_device(a.device)) for size in sizes]
    # One sample at a time, to bound memory: there are five float64 maps per volume.
    return torch.stack([_ssim_of_sample(to_float64(x), to_float64(y), kernels, k1**2, k2**2) for x, y in zip(a, b)])


def _ssim_of_sample(x, y, kernels, c1, c2):
    mean_x, mean_y, square_x, square_y, product = (_smooth(m, kernels) for m in (x, y, x * x, y * y, x * y))
    mean_product = mean_x * mean_y
    sum_of_squares = mean_x**2 + mean_y**2
    variances = square_x + square_y - sum_of_squares
    luminance = (2 * mean_product + c1) / (sum_of_squares + c1)
    structure = (2 * (product - mean_product) + c2) / (variances + c2)
    return (luminance * structure).mean()


def _gaussian(size, sigma, device):
    offsets = torch.arange(size, dtype=torch.float64, device=device) - (size - 1) / 2
    weights = torch.exp(-0.5 * (offsets / sigma) ** 2)
    return weights / weights.sum()


def _smooth(x, kernels):
    """Return [C x ...] filtered by one kernel per spatial axis, at the positions where the window fits."""
    for axis, kernel in enumerate(kernels, start=1):
        inside = x.shape[axis] - len(kernel) + 1
        # Shifted sums instead of a convolution work for one, two and three axes.
        x = sum(weight * x.narrow(axis, shift, inside) for shift, weight in enumerate(kernel))
    return x


def bicubic_baseline(images, factor) -> np.ndarray:
    """Return `images` downsampled by `factor` and upsampled again with Pillow's bicubic filter, float32 in [0, 1].

    The baseline of an autoencoder with the same total downsampling factor. Images are rounded to 8 bits first and after
    every pass, as Pillow does with images from files (Keys 1981 with a = -1/2, widened when downsampling). Volumes are
    filtered axis by axis.

    :param factor: an integer, or one per spatial axis.
    :raises ValueError: if `factor` does not divide the size.
    """
    images = to_tensor(images)
    sizes = tuple(images.shape[2:])
    factors = (factor,) * len(sizes) if isinstance(factor, int) else tuple(factor)
    require((len(factors) == len(sizes) and not any(n % f for n, f in zip(sizes, factors)),
             f"factor {format_shape(factors)} does not divide size {format_shape(sizes)}; crop, or use another factor"))
    values = to_uint8(images)
    for target in ([n // f for n, f in zip(sizes, factors)], sizes):
        for axis in reversed(range(len(sizes))):
            values = _resize_axis(values, axis + 2, target[axis])
    return values.astype(np.float32) / 255


def _resize_axis(values, axis, size):
    rows = np.moveaxis(values, axis, -1)
    flat = Image.fromarray(np.ascontiguousarray(rows).reshape(-1, rows.shape[-1]))
    resized = np.asarray(flat.resize((size, flat.height), Image.Resampling.BICUBIC))
    return np.moveaxis(resized.reshape(*rows.shape[:-1], size), -1, axis)


def to_tensor(values):
    if isinstance(values, torch.Tensor):
        return values.detach()
    # Torch warns about read-only arrays, such as a memory-mapped cache: only those are copied.
    return torch.from_numpy(np.require(values, requirements="W"))


def _paired(a, b):
    a, b = to_tensor(a), to_tensor(b)
    require((a.shape == b.shape and a.ndim >= 3,
             f"paired images: expected equal shapes [N x C x ...], got {list(a.shape)} and {list(b.shape)}"))
    return a, b.to(a.device)


def _difference(a, b):
    a, b = _paired(a, b)
    return (to_float64(a) - to_float64(b)).flatten(1)


# Metrics of image pairs: functions of two equal tensors [N x C x ...] that return float64 [N].
PAIRED_METRICS = {"psnr": psnr, "ssim": ssim, "l1": l1}
