"""Random flips and affine augmentation, keyed by (seed, step, slot)."""

import itertools
import math

import torch
import torch.nn.functional as F

from ..nn import to_device

FLIP = 12  # and one number more for every further axis; evaluation has 11


AUGMENT = 16  # and one number more for every angle, shift and scale


def random_flips(images, draws):
    """Return pictures mirrored along every axis by a coin of its own.  [N x C x ...] -> same."""
    for axis in range(2, images.dim()):
        heads = draws.uniform(FLIP + axis - 2, images.device) < 0.5
        images = torch.where(heads.view(-1, *(1,) * (images.dim() - 1)), images.flip(axis), images)
    return images


def random_affine(images, draws, config):
    """Return pictures or volumes of which a share `config.augment` is turned, scaled and shifted a little.

    Angles (in every plane), scales and shifts are evenly spread within the bounds of an AutoencoderTrainConfig; edges
    are repeated.  [N x C x ...] -> same.
    """
    dims = images.dim() - 2
    streams = itertools.count(AUGMENT)
    share = lambda: draws.uniform(next(streams), images.device)
    chosen = share() < config.augment
    within = lambda bound: torch.where(chosen, bound * (2 * share() - 1), 0.0)

    turn = torch.eye(dims, dtype=torch.float64, device=images.device).repeat(len(images), 1, 1)
    for a, b in itertools.combinations(range(dims), 2):
        angle = within(math.radians(config.augment_rotation))
        plane = torch.eye(dims, dtype=torch.float64, device=images.device).repeat(len(images), 1, 1)
        plane[:, a, a] = plane[:, b, b] = angle.cos()
        plane[:, a, b], plane[:, b, a] = -angle.sin(), angle.sin()
        turn = turn @ plane
    turn = turn / (1 + within(config.augment_scale))[:, None, None]
    shift = torch.stack([within(config.augment_translation) for _ in range(dims)], dim=1)
    # affine_grid measures every axis from -1 to 1, the last axis first.
    half = to_device(torch.tensor(images.shape[:1:-1], dtype=torch.float64), images.device) / 2
    theta = torch.cat([turn * half / half[:, None], (shift / half)[..., None]], dim=2)
    # In float64, which autocast leaves alone: in bfloat16 the grid would be off by half a pixel.
    grid = F.affine_grid(theta, images.shape, align_corners=False).to(images.dtype)
    moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    return torch.where(chosen.view(-1, *(1,) * (images.dim() - 1)), moved, images)
