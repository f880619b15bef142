"""Stream images or volumes larger than the device's memory through an autoencoder, with the exact result.

Tiles that are encoded independently show seams, since a norm sees the statistics of one tile only. Here one layer after
the other processes the full input, a slab of its longest axis at a time: convolutions see as many rows beyond the slab
as they need, and norms use statistics gathered over all slabs before. Full feature maps stay in host memory, slabs are
on the device. The result equals that of a single pass up to rounding. On a GPU, slabs are copied while others are
processed.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn

from ..nn import to_float64
from .blocks import (
    Attention, ChannelToSpace, Conv, Downsample, ResBlock, Residual, ShuffledConv, SpaceToChannel, Upsample,
    UpsampledConv,
)


class Streamer:
    """Encode and decode with an `AutoencoderKL` on `device`, `rows` image rows at a time; tensors are on the host.

    The longest axis is split into slabs. Rows are counted in the image; on a coarser grid a slab has fewer.
    """

    def __init__(self, network, device, rows: int):
        self.network, self.device, self.rows = network, device, rows
        self.copies = _Copies(device)

    @torch.no_grad()
    def moments(self, x):
        """Return mean and log-variance of the latent, as `AutoencoderKL.moments` does."""
        return self.network.to_moments(self._run(self.network.encoder.blocks, x, (1,) * (x.dim() - 2)).to(self.device))

    @torch.no_grad()
    def decode(self, z):
        """Return the decoded image of a latent, on the host, as `AutoencoderKL.decode` does."""
        h = self.network.post_quant_conv(z.to(self.device)).to(z.device)
        return self._run(self.network.decoder.blocks, h, self.network.factors)

    def _run(self, blocks, x, scales):
        """Return the output of the blocks for `x`; `scales` are image rows per row of x along every axis."""
        self.axis = max(range(2, x.dim()), key=lambda axis: x.shape[axis])
        self.scale = scales[self.axis - 2]
        for block in blocks:
            x = self._apply(block, x)
        return x

    def _apply(self, block, x):
        if isinstance(block, ResBlock):
            h = self._apply_local(self._normed(block.norm1, block.conv1, x), x)
            h = self._apply_local(self._normed(block.norm2, block.conv2, h), h)
            shortcut = block.nin_shortcut
            return h.add_(x if isinstance(shortcut, nn.Identity) else self._apply_local(shortcut, x))
        if isinstance(block, nn.GroupNorm):
            return self._apply_local(_norm_from_statistics(block, *self._statistics(block, x)), x)
        if isinstance(block, Residual):
            before = self.scale
            h = x
            for inner in block.main:
                h = self._apply(inner, h)
            after, self.scale = self.scale, before
            h = h.add_(self._apply(block.shortcut, x))
            self.scale = after
            return h
        if isinstance(block, Attention):
            return block(x.to(self.device)).to(x.device)    # every position attends to all; the grid is coarse here
        if isinstance(block, (Upsample, UpsampledConv, ShuffledConv, ChannelToSpace)):
            return self._apply_local(block, x, up=_factor_of(block, self.axis), kernel=_kernel_of(block, self.axis))
        if isinstance(block, (Conv, Downsample, SpaceToChannel)):
            return self._apply_local(block, x, down=_stride_of(block, self.axis), kernel=_kernel_of(block, self.axis))
        raise TypeError(f"streaming does not support blocks of type {type(block).__name__}")

    def _apply_local(self, function, x, down=1, up=1, kernel=3):
        """Apply a function with the receptive field of a kernel; `down` input rows become one, or one becomes `up`."""
        rows = max(int(self.rows / self.scale) // down, 1) * down
        halo = max(2, math.ceil((kernel - 1) / (down * up))) * down     # a multiple of the stride
        length, result, previous = x.shape[self.axis], None, None
        for start in range(0, length, rows):
            stop = min(start + rows, length)
            first, last = max(start - halo, 0), min(stop + halo, length)
            slab = self.copies.to_device(x.narrow(self.axis, first, last - first))
            y = function(slab).narrow(self.axis, (start - first) * up // down, (stop - start) * up // down)
            if result is None:
                shape = list(y.shape)
                shape[self.axis] = length * up // down
                result = x.new_empty(shape, dtype=y.dtype)
            target = result.narrow(self.axis, start * up // down, y.shape[self.axis])
            arrived = self.copies.to_host(y)
            if previous:    # a GPU has its next slab before the host waits for this one
                previous[0].copy_(previous[1]())
            previous = target, arrived
        previous[0].copy_(previous[1]())
        self.scale *= down / up
        return result

    def _normed(self, norm, conv, x):
        normed = _norm_from_statistics(norm, *self._statistics(norm, x))
        return lambda slab: conv(F.silu(normed(slab)))

    def _statistics(self, norm, x):
        """Return mean and reciprocal standard deviation of every group over all of `x`, each [N x G]."""
        rows = max(int(self.rows / self.scale), 1)
        parts = []
        for slab in x.split(rows, self.axis):
            grouped = self.copies.to_device(slab).float().reshape(len(x), norm.num_groups, -1)
            parts.append((grouped.shape[2], *(to_float64(s) for s in torch.var_mean(grouped, dim=2, correction=0))))
        count = sum(n for n, _, _ in parts)
        mean = sum(n * m for n, _, m in parts) / count
        # The law of total variance: deviations are taken from the final mean, which keeps precision at large means.
        variance = sum(n * (var + (m - mean) ** 2) for n, var, m in parts) / count
        return mean.float().to(grouped.device), torch.rsqrt(variance + norm.eps).float().to(grouped.device)


class _Copies:
    """Copies of slabs between host and device. A GPU makes them on two further streams, through pinned memory."""

    def __init__(self, device):
        self.device = torch.device(device)

    @functools.cached_property
    def _streams(self):
        return [torch.cuda.Stream(self.device) for _ in range(2)] if self.device.type == "cuda" else None

    def to_device(self, slab):
        """Return a slab on the device."""
        if self._streams is None:
            return slab.to(self.device)
        current, upload = torch.cuda.current_stream(self.device), self._streams[0]
        pinned = torch.empty(slab.shape, dtype=slab.dtype, pin_memory=True).copy_(slab)
        with torch.cuda.stream(upload):
            copied = pinned.to(self.device, non_blocking=True)
        current.wait_stream(upload)
        copied.record_stream(current)   # otherwise its memory would be free for the next upload when it is dropped here
        return copied

    def to_host(self, y):
        """Start a copy to the host; return a function that waits for it and returns it."""
        if self._streams is None:
            return lambda: y
        download, done = self._streams[1], torch.cuda.Event()
        download.wait_stream(torch.cuda.current_stream(self.device))
        pinned = torch.empty(y.shape, dtype=y.dtype, pin_memory=True)
        with torch.cuda.stream(download):
            pinned.copy_(y, non_blocking=True)
            done.record()
        y.record_stream(download)
        return lambda: done.synchronize() or pinned


def _norm_from_statistics(norm, mean, rstd):
    """Return the norm with known statistics, as a function of a slab."""

    def normed(slab):
        grouped = slab.float().unflatten(1, (norm.num_groups, -1))
        per_group = (*mean.shape, *(1,) * (grouped.dim() - 2))
        whitened = ((grouped - mean.view(per_group)) * rstd.view(per_group)).flatten(1, 2)
        per_channel = (-1, *(1,) * (slab.dim() - 2))
        return whitened * norm.weight.view(per_channel) + norm.bias.view(per_channel)

    return normed


def _stride_of(block, axis):
    if isinstance(block, SpaceToChannel):
        return block.factors[axis - 2]
    conv = block.conv.conv if isinstance(block, Downsample) else block.conv
    return conv.stride[axis - 2]


def _kernel_of(block, axis):
    return max((layer.kernel_size[axis - 2] for layer in block.modules() if hasattr(layer, "kernel_size")), default=1)


def _factor_of(block, axis):
    if isinstance(block, Upsample):
        inner = block.conv
        return inner.factors[axis - 2] if isinstance(inner, Conv) else inner.conv.stride[axis - 2]
    return block.factors[axis - 2]
