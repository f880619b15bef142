"""Random flips, affine changes and changes of spectrograms, keyed by (seed, step, slot)."""

import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

from ..nn import float64_device, to_device

# First random streams (see `objectives`): FLIP has one per axis, AUGMENT one per angle, translation and scale,
# SPECTROGRAM one per number of `augment_spectrograms`.
FLIP, AUGMENT, SPECTROGRAM = 12, 16, 40
# Largest changes of `augment_spectrograms` at strength 1: parts of an axis, or of the range of values.
SPECTROGRAM_CHANGES = {"time_shift": 0.25, "doppler_shift": 0.03, "gain": 0.1, "noise": 0.05, "masks": 0.2}


def random_flips(images: torch.Tensor, rng) -> torch.Tensor:
    """Return images flipped along each axis independently with probability 0.5.  [N x C x ...] -> same."""
    for axis in range(2, images.dim()):
        flipped = rng.uniform(FLIP + axis - 2, images.device) < 0.5
        images = torch.where(_per_image(flipped, images), images.flip(axis), images)
    return images


def random_affine(images: torch.Tensor, rng, config) -> torch.Tensor:
    """Return images with random rotation, scale and translation, each image with probability `config.augment`.

    Angles (in every plane), scales and translations are uniformly distributed within the bounds of an
    AutoencoderTrainConfig; edge values are repeated outside.  [N x C x ...] -> same.
    """
    dims = images.dim() - 2
    streams, device = itertools.count(AUGMENT), float64_device(images.device)
    uniform = lambda: rng.uniform(next(streams), images.device)
    augmented = uniform() < config.augment
    within = lambda bound: torch.where(augmented, bound * (2 * uniform() - 1), 0.0)

    identity = torch.eye(dims, dtype=torch.float64, device=device).repeat(len(images), 1, 1)
    rotation = identity
    for a, b in itertools.combinations(range(dims), 2):
        angle = within(math.radians(config.augment_rotation))
        plane = identity.clone()
        plane[:, a, a] = plane[:, b, b] = angle.cos()
        plane[:, a, b], plane[:, b, a] = -angle.sin(), angle.sin()
        rotation = rotation @ plane
    linear = rotation / (1 + within(config.augment_scale))[:, None, None]
    shift = torch.stack([within(config.augment_translation) for _ in range(dims)], dim=1)
    # affine_grid measures every axis from -1 to 1, the last axis first.
    half = to_device(torch.tensor(images.shape[:1:-1], dtype=torch.float64), device) / 2
    theta = torch.cat([linear * half / half[:, None], (shift / half)[..., None]], dim=2)
    # In float64, which autocast does not cast: in bfloat16 the grid would be off by half a pixel.
    grid = F.affine_grid(theta, list(images.shape), align_corners=False).to(images)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return torch.where(_per_image(augmented, images), moved, images)


def augment_spectrograms(images: torch.Tensor, rng, strength: float, changes=tuple(SPECTROGRAM_CHANGES),
                         colormap=None) -> torch.Tensor:
    """Return spectrograms on a logarithmic scale with random changes.  [N x C x frequencies x frames] -> same.

    `changes` are names of SPECTROGRAM_CHANGES: a circular time shift, a Doppler shift (edges are repeated), gain (an
    offset in dB), Gaussian noise, and one mask of 0 along each axis as in SpecAugment (Park et al. 2019,
    arXiv:1904.08779). Each is uniformly distributed up to its bound there times `strength`, and is the same whichever
    others are chosen. Values stay in [0, 1].

    :param colormap: a `Colormap`: RGB images become its scalars, which are changed, and colors again. This takes place
        on the CPU.
    """
    if colormap:
        colors = images.mul(255).round().byte().movedim(1, -1).cpu().numpy()
        scalars = torch.from_numpy(colormap.to_scalars(colors)[0])[:, None]
        scalars = augment_spectrograms(scalars, rng, strength, changes)
        colors = colormap.to_colors(scalars[:, 0].numpy()).astype(np.float32) / 255
        return torch.from_numpy(colors).movedim(-1, 1).contiguous().to(images)

    n, _, rows, columns = images.shape
    device = images.device
    bounds = {name: strength * bound * (name in changes) for name, bound in SPECTROGRAM_CHANGES.items()}
    uniform = lambda stream: rng.uniform(SPECTROGRAM + stream, device).to(images)
    within = lambda name, stream: bounds[name] * (2 * uniform(stream) - 1)
    column = torch.arange(columns, device=device) + within("time_shift", 0).mul(columns).round().long()[:, None]
    row = torch.arange(rows, device=device) + within("doppler_shift", 1).mul(rows).round().long()[:, None]
    item, row, column = torch.arange(n, device=device)[:, None, None], row.clamp(0, rows - 1), column % columns
    images = images.movedim(1, -1)[item, row[:, :, None], column[:, None, :]].movedim(-1, 1)
    images = images + _per_image(within("gain", 2), images)
    if "noise" in changes:
        noise = rng.normal(images.shape[1:], device, SPECTROGRAM + 4)
        images = images + _per_image(bounds["noise"] * uniform(3), images) * noise
    images = images.clamp(0, 1)
    if "masks" in changes:
        for axis, length in ((2, rows), (3, columns)):
            width = min(1, bounds["masks"]) * length * uniform(2 * axis + 1)
            start = (length - width) * uniform(2 * axis + 2)
            position = torch.arange(length, device=device)
            masked = (position >= start[:, None]) & (position < (start + width)[:, None])
            images = images.masked_fill(masked[:, None, :, None] if axis == 2 else masked[:, None, None, :], 0)
    return images


def _per_image(mask, images):
    """Return a mask [N] that broadcasts over images [N x ...], on their device."""
    return mask.to(images.device).view(-1, *(1,) * (images.dim() - 1))
