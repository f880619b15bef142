"""Random flips and affine augmentation of images or volumes, keyed by (seed, step, slot)."""

import itertools
import math

import torch
import torch.nn.functional as F

from ..nn import float64_device, to_device

# First random streams (see `objectives`): FLIP has one per axis, AUGMENT one per angle, translation and scale.
FLIP, AUGMENT = 12, 16


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
    grid = F.affine_grid(theta, images.shape, align_corners=False).to(images)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return torch.where(_per_image(augmented, images), moved, images)


def _per_image(mask, images):
    """Return a mask [N] that broadcasts over images [N x ...], on their device."""
    return mask.to(images.device).view(-1, *(1,) * (images.dim() - 1))
