"""Hold the bricks of all networks: layers by rank, norms, embeddings, averaging, checkpointing, keyed random numbers.

This is the only file that asks how many spatial axes there are; everywhere else `dims` is passed through.
"""

import contextlib
import functools
import hashlib
import math

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

NORM_GROUPS = 32


def _too_flat(x, kernel_size):
    """Say whether oneDNN gets gradients of a padded convolution of x [N x C x D x H x W] wrong, see `Conv3d`."""
    if x.device.type != "cpu" or all(n >= kernel for n, kernel in zip(x.shape[2:], kernel_size)):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype in (torch.bfloat16, torch.float16)


class Conv3d(nn.Conv3d):
    """nn.Conv3d whose gradients are right on grids that are flatter than the kernel, too.

    Where the kernel finds no place along an axis that is free of padding, oneDNN (PyTorch 2.13, CPU, half precision)
    leaves gradients of weights as they were in memory, and writes beyond it. With zeros written out it has no padding
    to do.
    """

    def forward(self, x):
        if not self.needs_explicit_padding(x):
            return super().forward(x)
        return F.conv3d(self.pad_explicitly(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def needs_explicit_padding(self, x):
        """Say whether the convolution of x [N x C x D x H x W] needs its padding written out."""
        return any(self.padding) and _too_flat(x, self.kernel_size)

    def pad_explicitly(self, x):
        """Return x with the zeros around it that the convolution would add."""
        return F.pad(x, [n for padding in reversed(self.padding) for n in (padding, padding)])

    def crop_padding(self, x):
        """Return x without what `pad_explicitly` has added."""
        return x[(..., *(slice(padding, n - padding) for n, padding in zip(x.shape[2:], self.padding)))]


class ConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d with the same care as `Conv3d`: on grids that flat it computes in float32."""

    def forward(self, x):
        if not _too_flat(x, self.kernel_size):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            y = F.conv_transpose3d(x.float(), self.weight.float(), bias, self.stride, self.padding, self.output_padding,
                                   self.groups, self.dilation)
        return y.to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)


_LAYERS = {
    "convolution": (nn.Conv1d, nn.Conv2d, Conv3d),
    "transposed convolution": (nn.ConvTranspose1d, nn.ConvTranspose2d, ConvTranspose3d),
    "average pooling": (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    "adaptive average pooling": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
}
_LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


# Random numbers that depend on a key, not on a history.


def keyed_rng(*key):
    """Return a fresh NumPy generator whose draws depend on the integers of `key` and their order alone.

    The key is hashed by SHA-256 to the 128-bit key of Philox, so that no two streams meet; PyTorch's CPU generator
    keeps 32 bits of its seed, and among 50 000 samples two would be alike with a chance of one in four.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(key)[:16], "little")))


def keyed_seed(*key):
    """Return a seed below 2^63 for `torch.manual_seed` that depends on the integers of `key` and their order alone."""
    return int.from_bytes(_digest(key)[:8], "little") >> 1


def keyed_randn(shape, keys):
    """Draw one standard normal tensor per key; [len(keys) x *shape], float32 on the CPU.

    Row i is what `keyed_rng(*keys[i])` draws, whatever the other rows are: it does not change with the size of a batch
    or with the rank that draws it.
    """
    rows = np.empty((len(keys), *shape), np.float32)
    # One generator set to each key's beginning: making a new one takes as long as a thousand draws.
    philox = np.random.Philox(key=0)
    rng, beginning = np.random.Generator(philox), philox.state
    for row, key in zip(rows, keys):
        beginning["state"]["key"] = np.frombuffer(_digest(key), "<u8", 2)
        philox.state = beginning
        rng.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def _digest(key):
    return hashlib.sha256(repr(tuple(int(part) for part in key)).encode()).digest()


# Layers by rank.


def per_axis(value, dims):
    """Return `value` as a tuple of `dims` integers: a scalar means every axis, a sequence one value per axis."""
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,) * dims
    if len(values) != dims:
        raise ValueError(
            f"{value} holds {len(values)} values for {dims} spatial axes; give one per axis, or a single number for all"
        )
    return values


def conv_nd(dims, *args, **kwargs):
    """Build a convolution over `dims` axes (1 to 3); kernel_size, stride and padding are scalars or one per axis."""
    return _layer("convolution", dims)(*args, **kwargs)


def conv_transpose_nd(dims, *args, **kwargs):
    """Build a transposed convolution over `dims` axes (1 to 3); the arguments are those of torch's class."""
    return _layer("transposed convolution", dims)(*args, **kwargs)


def avg_pool_nd(dims, *args, **kwargs):
    """Build an average pooling over `dims` axes (1 to 3); kernel_size and stride are scalars or one per axis."""
    return _layer("average pooling", dims)(*args, **kwargs)


def adaptive_avg_pool_nd(dims, output_size):
    """Build an average pooling over `dims` axes (1 to 3) whose result has `output_size` on each."""
    return _layer("adaptive average pooling", dims)(output_size)


def linear(*args, **kwargs):
    """Build a fully connected layer."""
    return nn.Linear(*args, **kwargs)


def resampling_factors(dims, resample_depth=False):
    """Return by how much a halving or doubling level of the UNet changes each axis.

    Volumes keep their first axis unless `resample_depth`, as the networks of guided-diffusion do.
    """
    return (2 if resample_depth or dims != 3 else 1,) + (2,) * (dims - 1)


def upsample_nearest(x, factors):
    """Repeat every element `factors` (scalar or one per axis) times.  [N x C x ...] -> [N x C x ... * factors]."""
    grid = x.shape[2:]
    size = [n * factor for n, factor in zip(grid, per_axis(factors, len(grid)))]
    return F.interpolate(x, size=size, mode="nearest")


def upsample_conv(conv, x, factors):
    """Return conv(upsample_nearest(x, factors)) without making the enlarged input.

    A repeated element meets sums of the kernel's taps, so the whole is a transposed convolution of stride s with s + 2
    taps an axis: for s = 2 in 2D (3D) 4 (8) multiplications an output in place of 9 (27). Of what an element becomes
    along an axis the first and the last see its neighbours, all between them are alike: no more than 3 are computed.
    Grids that are too flat for `Conv3d` are too flat for a transposed convolution, and are enlarged after all.

    :param conv: a convolution of 3 taps, stride 1 and padding 1 along every axis.
    """
    factors = per_axis(factors, x.dim() - 2)
    if set(factors) == {1}:
        return conv(x)
    if isinstance(conv, Conv3d) and conv.needs_explicit_padding(x):
        return conv(upsample_nearest(x, factors))
    strides = [min(factor, 3) for factor in factors]
    axes = tuple(range(2, x.dim()))
    taps = F.pad(conv.weight.flip(axes), [n for stride in reversed(strides) for n in (stride - 1, stride - 1)])
    for axis, stride in zip(axes, strides):
        windows = (taps.narrow(axis, start, taps.shape[axis] + 1 - stride) for start in range(stride))
        taps = functools.reduce(torch.add, windows)
    y = _TRANSPOSED[len(axes)](x, taps.transpose(0, 1), conv.bias, stride=strides, padding=1)
    for axis, factor in reversed(list(zip(axes, factors))):
        if factor > 3:
            first, between, last = y.unflatten(axis, (-1, 3)).split(1, axis + 1)
            repeats = [-1] * between.dim()
            repeats[axis + 1] = factor - 2
            y = torch.cat([first, between.expand(repeats), last], axis + 1).flatten(axis, axis + 1)
    return y


_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def resize_linear(x, size):
    """Interpolate linearly along every axis; [N x C x ...] -> [N x C x *size], with the same outer edges."""
    size = tuple(size)
    return F.interpolate(x, size=size, mode=_LINEAR_MODES[len(size)], align_corners=False)


def _layer(name, dims):
    if dims not in (1, 2, 3):
        raise ValueError(f"there is no {name} over {dims} spatial axes; --dims is 1, 2 or 3")
    return _LAYERS[name][dims - 1]


def to_device(tensor, device):
    """Copy a tensor to a device without waiting for what that is doing (from pinned memory, as CUDA wants it).

    To the host it is waited for: whoever reads there would not know that the numbers are still on their way.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type != "cpu")


# Activations and norms.


class SiLU(nn.SiLU):
    """Multiply by the logistic function, x * sigmoid(x) (Hendrycks and Gimpel 2016, arXiv 1606.08415, section 4)."""


# Where the kernel itself adds up in float32, and takes weights of that type beside such an input.
NORMS_ADD_IN_FLOAT32 = {("cpu", torch.bfloat16)}


class GroupNorm32(nn.GroupNorm):
    """Normalise in float32, whatever the type of the input or of the weights; the result has the input's type."""

    def forward(self, x):
        return self.over(self.num_groups, x, self.weight, self.bias)

    def over(self, groups, x, weight, bias):
        """Normalise some of the groups, with their part of weight and bias [C]."""
        wide = x if (x.device.type, x.dtype) in NORMS_ADD_IN_FLOAT32 else x.float()
        return F.group_norm(wide, groups, weight.float(), bias.float(), self.eps).to(x.dtype)


def normalization(channels):
    """Build the norm of all UNets: 32 groups, eps 1e-5.

    :raises ValueError: where `channels` is not a multiple of 32.
    """
    if channels % NORM_GROUPS:
        raise ValueError(
            f"{channels} channels do not divide into the norm's {NORM_GROUPS} groups; choose widths (--num_channels or "
            f"--classifier_width, times every --channel_mult) that are multiples of {NORM_GROUPS}"
        )
    return GroupNorm32(NORM_GROUPS, channels)


# Memory.


def recomputed_conv(cheap, conv, inputs, params, groups, random=False, whole=False):
    """Return conv(cheap(groups, *inputs, *params)), without keeping what `cheap` gave for the backward pass.

    A convolution keeps its input to learn its weights. Where that is a norm and an activation of something that is kept
    anyway, it costs two tensors to keep and little to compute again. Numbers and gradients stay the same.

    :param cheap: a function of any number of whole groups of channels, which it treats each by itself; what is large is
        worked on in a few of them at a time in the backward pass, unless `whole`.
    :param inputs: tensors [N x C x ...]; `params`: [C].
    :param random: whether `cheap` draws random numbers; the backward pass then draws the same.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():    # a compiler decides such things itself
        return conv(cheap(groups, *inputs, *params))
    at_once = math.inf if random or whole else _ConvOfRecomputed.AT_ONCE
    return _ConvOfRecomputed.apply(cheap, conv, groups, at_once, random, len(inputs), conv.weight, conv.bias, *inputs,
                                   *params)


class _ConvOfRecomputed(torch.autograd.Function):
    AT_ONCE = 2**24     # elements to recompute at a time; a few times their bytes come on top of everything else

    @staticmethod
    def forward(ctx, cheap, conv, groups, at_once, random, count, weight, bias, *tensors):
        ctx.cheap, ctx.conv, ctx.groups, ctx.at_once, ctx.count = cheap, conv, groups, at_once, count
        device = tensors[0].device.type
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.random_state = _random_state(tensors[0].device) if random else None
        ctx.save_for_backward(weight, *tensors)
        return conv(cheap(groups, *tensors))

    @staticmethod
    def backward(ctx, grad):
        weight, *tensors = ctx.saved_tensors
        parts = next((n for n in range(1, ctx.groups) if ctx.groups % n == 0
                      and tensors[0].numel() <= n * ctx.at_once), ctx.groups)
        split = [tensor.detach().chunk(parts, dim=1 if i < ctx.count else 0) for i, tensor in enumerate(tensors)]
        pieces = [[piece.requires_grad_() for piece in pieces] for pieces in zip(*split)]

        def compute(part):
            device, dtype, enabled = ctx.autocast
            with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled), _restored_rng_state(ctx.random_state):
                return ctx.cheap(ctx.groups // parts, *pieces[part]).to(grad.dtype)

        only = compute(0) if parts == 1 else None
        value = torch.cat([compute(part).detach() for part in range(parts)], 1) if only is None else only.detach()
        conv = ctx.conv
        flat = isinstance(conv, Conv3d) and conv.needs_explicit_padding(value)
        of_value, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grad, conv.pad_explicitly(value) if flat else value, weight.to(grad.dtype), [weight.shape[0]], conv.stride,
            [0] * len(conv.stride) if flat else conv.padding, conv.dilation, False, [0] * len(conv.stride), conv.groups,
            [True, True, conv.bias is not None],
        )
        of_value = conv.crop_padding(of_value) if flat else of_value
        del value
        further = [torch.empty_like(tensor) for tensor in tensors]
        slots = [whole.chunk(parts, dim=1 if i < ctx.count else 0) for i, whole in enumerate(further)]
        for part, of_part in enumerate(of_value.chunk(parts, dim=1)):
            result = compute(part) if only is None else only
            for slot, gradient in zip(slots, torch.autograd.grad(result, pieces[part], of_part)):
                slot[part].copy_(gradient)
            del result
        of_bias = None if of_bias is None else of_bias.to(conv.bias.dtype)
        return *(None,) * 6, of_weight.to(weight.dtype), of_bias, *further


def _random_state(device):
    """Return what `_restored_rng_state` needs to draw once more what will be drawn on this device now."""
    if device.type == "cpu":
        return device, torch.get_rng_state()
    return device, getattr(torch, device.type).get_rng_state(device)


@contextlib.contextmanager
def _restored_rng_state(state):
    """Draw inside from a state of `_random_state`, and outside go on as if nothing had been drawn."""
    if state is None:
        yield
        return
    device, numbers = state
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        if devices:
            getattr(torch, device.type).set_rng_state(numbers, device)
        else:
            torch.set_rng_state(numbers)
        yield


# Parameters.


@torch.no_grad()
def update_ema(target_params, source_params, rate=0.99):
    """Move averages towards the current parameters in place: target <- rate * target + (1 - rate) * source."""
    targets = list(target_params)
    sources = [source.to(target.dtype) for source, target in zip(source_params, targets, strict=True)]
    torch._foreach_lerp_(targets, sources, 1 - rate)


@torch.no_grad()
def zero_module(module):
    """Set all parameters of a module to zero and return it."""
    for parameter in module.parameters():
        parameter.zero_()
    return module


@torch.no_grad()
def scale_module(module, scale):
    """Multiply all parameters of a module by `scale` and return it."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def cast_convolutions(module, dtype):
    """Turn the weights of all convolutions inside `module` into `dtype`; norms and linear layers stay as they are."""
    for layer in module.modules():
        if isinstance(layer, _LAYERS["convolution"]):
            layer.to(dtype)


# Functions of tensors.


def mean_flat(tensor):
    """Average over all axes but the first.  [N x ...] -> [N]."""
    return tensor.flatten(1).mean(dim=1)


def timestep_embedding(timesteps, dim, max_period=10000):
    """Encode times as cosines, then sines, of geometrically spaced frequencies.  [N] -> [N x dim], float32.

    Vaswani et al. 2017 (arXiv 1706.03762), section 3.5, with w_k = max_period^(-k / (dim // 2)). Times need not be
    integers. An odd `dim` ends in a column of zeros.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    w = torch.exp(k * (-math.log(max_period) / max(half, 1)))       # [half]
    angles = torch.outer(timesteps.float(), w)                      # [N x half]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def checkpoint(func, inputs, params, flag):
    """Return func(*inputs); where `flag` is set, recompute its inner values in the backward pass, keeping none.

    Autocast and the random state (dropout) are as in the first pass. `params` is there for callers of
    guided-diffusion: gradients reach whatever `func` uses, named or not.
    """
    return recompute_in_backward(func, *inputs, use_reentrant=False) if flag else func(*inputs)
