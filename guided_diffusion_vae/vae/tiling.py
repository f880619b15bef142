"""Apply a function tile by tile and blend the overlaps."""

import itertools
from typing import Any

import torch


def blend_tiles(function, x: torch.Tensor, grid, window, gain_in, gain_out) -> torch.Tensor:
    """Apply `function` to tiles that overlap by a quarter, and blend the results linearly.

    Sizes are counted in cells of `grid`: along each axis a cell has `gain_in` elements of the input and `gain_out` of
    the result, and a tile has `window` cells.  [N x C x ... grid * gain_in] -> [N x C' x ... grid * gain_out].
    """
    overlaps = [max(w // 4, 1) for w in window]
    starts = [[*range(0, n - w, max(w - overlap, 1)), n - w] for n, w, overlap in zip(grid, window, overlaps)]
    total: Any = None   # allocated for the shape of the first result
    weights: Any = None
    for corner in itertools.product(*starts):
        y = function(x[(..., *_region(corner, window, gain_in))]).to(x.device)  # results collect on the input's device
        weight = torch.ones((), device=y.device)
        for start, n, w, overlap, gain in zip(corner, grid, window, overlaps, gain_out):
            profile = _profile(w * gain, overlap * gain, start > 0, start + w < n).to(y.device)
            weight = weight.unsqueeze(-1) * profile
        if total is None:
            sizes = [n * gain for n, gain in zip(grid, gain_out)]
            total, weights = y.new_zeros(*y.shape[:2], *sizes), y.new_zeros(sizes)
        region = (..., *_region(corner, window, gain_out))
        total[region] += y * weight
        weights[region] += weight
    return total / weights


def _region(corner, window, gain):
    return [slice(start * g, (start + w) * g) for start, w, g in zip(corner, window, gain)]


def _profile(length, overlap, rises, falls):
    """Return the weights of a tile along one axis: 1, with ramps where an adjacent tile overlaps."""
    ramp = (torch.arange(overlap) + 0.5) / overlap
    profile = torch.ones(length)
    if rises:
        profile[:overlap] *= ramp
    if falls:
        profile[length - overlap:] *= ramp.flip(0)
    return profile
