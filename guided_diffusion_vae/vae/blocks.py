"""Building blocks of the strided KL autoencoder."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..nn import (
    GroupNorm, adaptive_channel_mean, conv_nd, conv_transpose_nd, norm_act, per_axis, recomputed_conv, upsample_conv,
)


class Conv(nn.Module):
    """A convolution with its weights below the name `conv`, as in MONAI. An odd kernel of stride 1 keeps the grid."""

    def __init__(self, dims, in_channels, out_channels, kernel=3, stride=1, padding=None):
        super().__init__()
        if padding is None:
            padding = tuple(k // 2 for k in per_axis(kernel, dims))
        self.conv = conv_nd(dims, in_channels, out_channels, kernel, stride, padding)

    def forward(self, x):
        return self.conv(x)


class Residual(nn.Module):
    """A chain of blocks, to whose output a shortcut without weights is added."""

    def __init__(self, blocks, shortcut):
        super().__init__()
        self.main = nn.Sequential(*blocks)
        self.shortcut = shortcut

    def forward(self, x):
        return self.main(x) + self.shortcut(x)


class SpaceToChannel(nn.Module):
    """Move the elements of a block of space into channels, and average or repeat adjacent channels to out_channels.

    [N x C x ...] -> [N x out_channels x ... / factors], the shortcut of downsampling in DC-AE (Chen et al. 2024,
    arXiv:2410.10733, Sec. 3.2).
    """

    def __init__(self, factors, out_channels):
        super().__init__()
        self.factors, self.out_channels = tuple(factors), out_channels

    def forward(self, x):
        dims = len(self.factors)
        for axis, factor in enumerate(self.factors):
            x = x.unflatten(2 + 2 * axis, (-1, factor))                 # [N x C x (n / f) x f ...]
        within, blocks = range(3, 3 + 2 * dims, 2), range(2, 2 + 2 * dims, 2)
        return _match_channels(x.permute(0, 1, *within, *blocks).flatten(1, 1 + dims), self.out_channels)


class ChannelToSpace(nn.Module):
    """Move channels into blocks of space; the inverse of `SpaceToChannel` if nothing is averaged or repeated.

    [N x C x ...] -> [N x out_channels x ... * factors], the shortcut of upsampling in DC-AE.
    """

    def __init__(self, factors, out_channels):
        super().__init__()
        self.factors, self.out_channels = tuple(factors), out_channels

    def forward(self, x):
        x = _match_channels(x, self.out_channels * math.prod(self.factors))
        return _pixel_shuffle(x.unflatten(1, (self.out_channels, *self.factors)).movedim(1, len(self.factors) + 1))


def _match_channels(x, count):
    """Average or repeat adjacent channels until there are `count`; their order stays."""
    return x if x.shape[1] == count else adaptive_channel_mean(x, count)


def _pixel_shuffle(y):
    """Interleave the phases of a grid (depth to space).  [N x factors x C x grid] -> [N x C x grid * factors]."""
    dims = (y.ndim - 2) // 2
    factors, grid = y.shape[1:1 + dims], y.shape[2 + dims:]
    order = [axis for a in range(dims) for axis in (2 + dims + a, 1 + a)]
    return y.permute(0, 1 + dims, *order).reshape(len(y), -1, *(n * factor for n, factor in zip(grid, factors)))


class Downsample(nn.Module):
    """Downsample each axis by a convolution of stride s.  [N x C x ...] -> [N x out_channels x ... / strides].

    A kernel of size s + 1 sees every input; one zero is padded at the far end (for s = 2 this is MONAI's layer). A
    fixed kernel size k pads max(k - s, 0), the odd one at the far end.
    """

    def __init__(self, dims, channels, strides, kernel=None, out_channels=None):
        super().__init__()
        kernels = tuple(kernel or s + 1 for s in strides)
        surplus = [max(k - s, 0) for k, s in zip(kernels, strides)]
        self.padding = [side for n in reversed(surplus) for side in (n // 2, n - n // 2)]
        self.conv = Conv(dims, channels, out_channels or channels, kernels, strides, padding=0)

    def forward(self, x):
        return self.conv(F.pad(x, self.padding))


class ShuffledConv(Conv):
    """Convolve to prod(factors) times the channels, then interleave them (pixel shuffle).

    Shi et al. 2016 (arXiv:1609.05158, Sec. 3.2). Each new element has its own kernel; `UpsampledConv` shares one.
    """

    def __init__(self, dims, in_channels, out_channels, factors):
        super().__init__(dims, in_channels, out_channels * math.prod(factors))
        self.factors = factors

    def forward(self, x):
        return _pixel_shuffle(self.conv(x).unflatten(1, (*self.factors, -1)))


class UpsampledConv(Conv):
    """Nearest-neighbor upsampling followed by a convolution.  [N x C x ...] -> [N x C' x ... * factors]."""

    def __init__(self, dims, in_channels, out_channels, factors):
        super().__init__(dims, in_channels, out_channels)
        self.factors = factors

    def forward(self, x):
        return upsample_conv(self.conv, x, self.factors)


class TransposedConv(nn.Module):
    """Upsample each axis by its factor s with a transposed convolution of kernel size 2s - 1, at least 3."""

    def __init__(self, dims, in_channels, out_channels, factors, kernel=None):
        super().__init__()
        kernels = tuple(kernel or max(2 * s - 1, 3) for s in factors)
        self.conv = conv_transpose_nd(
            dims, in_channels, out_channels, kernels, factors, padding=tuple(k // 2 for k in kernels),
            output_padding=tuple(s - 1 for s in factors),
        )

    def forward(self, x):
        return self.conv(x)


class Upsample(nn.Module):
    """Upsample each axis by its factor; in shape the inverse of `Downsample`."""

    def __init__(self, dims, channels, factors, transposed=False, kernel=None, out_channels=None):
        super().__init__()
        out_channels = out_channels or channels
        if transposed:
            self.conv = TransposedConv(dims, channels, out_channels, factors, kernel)
        else:
            self.conv = UpsampledConv(dims, channels, out_channels, factors)

    def forward(self, x):
        return self.conv(x)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # MONAI core has one name for this convolution, and another one for the transposed convolution.
        _rename(state_dict, prefix, {"postconv.": "conv.", "deconv.": "conv.conv."})
        super()._load_from_state_dict(state_dict, prefix, *args)


class ResBlock(nn.Module):
    """Add two convolutions, each after a norm and an activation, to the input.  [N x C x ...] -> [N x C' x ...]."""

    def __init__(self, in_channels, out_channels, dims, groups, eps, recompute_norms=False):
        super().__init__()
        self.recompute_norms = recompute_norms
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv(dims, in_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.conv2 = Conv(dims, out_channels, out_channels)
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else Conv(dims, in_channels, out_channels, kernel=1)

    def forward(self, x):
        h = self._norm_and_convolve(self.norm1, self.conv1, x)
        return self.nin_shortcut(x) + self._norm_and_convolve(self.norm2, self.conv2, h)

    def _norm_and_convolve(self, norm, conv, x):
        if not self.recompute_norms:
            return conv(norm_act(norm, x))
        cheap = lambda groups, x, *weights: norm_act(norm, x, subset=(groups, *weights))
        return recomputed_conv(cheap, conv.conv, (x,), (norm.weight, norm.bias), norm.num_groups)


class Attention(nn.Module):
    """Add one head of self-attention over all positions, projected, to the input.  [N x C x ...] -> same.

    GenerativeModels has a projection `proj_attn` that it never applies, so its weights load with the identity instead.
    MONAI core's weights (`attn.to_q`, ..., `attn.out_proj`, absent with include_fc=False) load with their projection,
    and so do this class's own, which are identified by the version in the state dict's metadata.
    """

    _version = 2    # saved with the weights by PyTorch; GenerativeModels' classes have none

    def __init__(self, channels, groups, eps):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.proj_attn = nn.Linear(channels, channels)

    def forward(self, x):
        tokens = self.norm(x).flatten(2).mT.unsqueeze(1)                # [N x 1 x T x C], one head
        mixed = F.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return x + self.proj_attn(mixed).squeeze(1).mT.reshape(x.shape)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        own = (local_metadata.get("version") or 0) >= 2
        applied = own or f"{prefix}attn.out_proj.weight" in state_dict
        _rename(state_dict, prefix, {"attn.out_proj.": "proj_attn.", "attn.to_": "to_"})
        if not applied and f"{prefix}to_q.weight" in state_dict:
            weight = state_dict[f"{prefix}to_q.weight"]
            state_dict[f"{prefix}proj_attn.weight"] = torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
            state_dict[f"{prefix}proj_attn.bias"] = torch.zeros_like(weight[0])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


def _rename(state_dict, prefix, heads):
    """Replace, in place, the starts of names below `prefix` according to `heads`, {old: new}."""
    for name in [n for n in state_dict if n.startswith(prefix)]:
        for old, new in heads.items():
            if name.startswith(prefix + old):
                state_dict[prefix + new + name[len(prefix + old):]] = state_dict.pop(name)
