"""Building blocks of all networks: layers by rank, norms, embeddings, EMA, checkpointing, keyed random numbers.

This is the only file that branches on the number of spatial axes; everywhere else `dims` is passed through.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from . import deprecated_names

NORM_GROUPS = 32


def _too_flat(x, kernel_size):
    """Return whether oneDNN computes wrong gradients of a padded convolution of x [N x C x D x H x W], see `Conv3d`."""
    if x.device.type != "cpu" or all(n >= kernel for n, kernel in zip(x.shape[2:], kernel_size)):
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return dtype in (torch.bfloat16, torch.float16)


class Conv3d(nn.Conv3d):
    """nn.Conv3d with correct gradients on grids that are flatter than the kernel.

    If the kernel has no position along an axis that is free of padding, oneDNN (PyTorch 2.13, CPU, half precision)
    leaves gradients of weights uninitialized, and writes out of bounds. With explicit zeros it has no padding to do.
    """

    def forward(self, x):
        if not self.needs_explicit_padding(x):
            return super().forward(x)
        return F.conv3d(self.pad_explicitly(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def needs_explicit_padding(self, x):
        """Return whether the convolution of x [N x C x D x H x W] needs explicit zeros as padding."""
        return any(self.padding) and _too_flat(x, self.kernel_size)

    def pad_explicitly(self, x):
        """Return x with the zeros around it that the convolution would add."""
        return F.pad(x, [n for padding in reversed(self.padding) for n in (padding, padding)])

    def crop_padding(self, x):
        """Return x without the border that `pad_explicitly` added."""
        return x[(..., *(slice(padding, n - padding) for n, padding in zip(x.shape[2:], self.padding)))]


class ConvTranspose3d(nn.ConvTranspose3d):
    """nn.ConvTranspose3d with the same fix as `Conv3d`: on such flat grids it computes in float32."""

    def forward(self, x):
        if not _too_flat(x, self.kernel_size):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            y = F.conv_transpose3d(x.float(), self.weight.float(), bias, self.stride, self.padding, self.output_padding,
                                   self.groups, self.dilation)
        return y.to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype)


class AvgPool3d(nn.AvgPool3d):
    """nn.AvgPool3d that also has a deterministic gradient on GPUs and half precision on CPUs, unlike PyTorch 2.13's.

    Means of blocks are used if deterministic algorithms are on, and for half precision: equal up to rounding.
    """

    def forward(self, x):
        factors = per_axis(self.kernel_size, 3)
        are_blocks = factors == per_axis(self.stride, 3) and not any(per_axis(self.padding, 3))
        half_on_cpu = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16)
        if not (are_blocks and (half_on_cpu or torch.are_deterministic_algorithms_enabled())):
            return super().forward(x)
        for axis, factor in zip((-3, -2, -1), factors):
            blocks = x.shape[axis] // factor
            x = x.narrow(axis, 0, blocks * factor).unflatten(axis, (blocks, factor))
        return x.mean((-5, -3, -1))


_LAYERS = {
    "convolution": (nn.Conv1d, nn.Conv2d, Conv3d),
    "transposed convolution": (nn.ConvTranspose1d, nn.ConvTranspose2d, ConvTranspose3d),
    "average pooling": (nn.AvgPool1d, nn.AvgPool2d, AvgPool3d),
    "adaptive average pooling": (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
}
_LINEAR_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


# --- Random numbers that depend on a key, not on a history ---


def keyed_rng(*key: int) -> np.random.Generator:
    """Return a new NumPy generator that depends only on the integers of `key` and their order.

    The key is hashed by SHA-256 to the 128-bit key of Philox, so that streams do not collide. PyTorch's CPU generator
    keeps 32 bits of its seed: among 50,000 samples, two would be identical with a probability of 25%.
    """
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_digest(key)[:16], "little")))


def keyed_seed(*key: int) -> int:
    """Return a seed below 2^63 for `torch.manual_seed` that depends only on the integers of `key` and their order."""
    return int.from_bytes(_digest(key)[:8], "little") >> 1


def keyed_randn(shape, keys) -> torch.Tensor:
    """Sample one standard normal tensor per key; [len(keys) x *shape], float32 on the CPU.

    Row i is a sample from `keyed_rng(*keys[i])`, independent of the other rows: it does not change with the size of a
    batch or with the rank.
    """
    rows = np.empty((len(keys), *shape), np.float32)
    # One generator, reset to the start of each key's stream: a new one takes as long as a thousand samples.
    philox = np.random.Philox(key=0)
    rng, start = np.random.Generator(philox), philox.state
    for row, key in zip(rows, keys):
        start["state"]["key"] = np.frombuffer(_digest(key), "<u8", 2)
        philox.state = start
        rng.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(rows)


def _digest(key):
    return hashlib.sha256(repr(tuple(int(part) for part in key)).encode()).digest()


# --- Precision ---


def allow_tf32(allowed: bool) -> None:
    """Let GPUs round the operands of float32 convolutions and matrix products to 10 bits of mantissa (TF32), or not."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


@contextlib.contextmanager
def without_tf32():
    """Return a context, or decorator, in which float32 has its full precision on GPUs, too."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


# --- Layers by rank ---


def per_axis(value, dims: int) -> tuple:
    """Return `value` as a tuple of `dims` integers: a scalar means every axis, a sequence one value per axis."""
    values = tuple(value) if isinstance(value, (tuple, list, torch.Size)) else (value,) * dims
    if len(values) != dims:
        raise ValueError(
            f"{value} has {len(values)} values for {dims} spatial axes: expected one per axis, or one number for all"
        )
    return values


def conv_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Build a convolution over `dims` axes (1 to 3); kernel_size, stride and padding are scalars or one per axis."""
    return _layer("convolution", dims)(*args, **kwargs)


def conv_transpose_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Build a transposed convolution over `dims` axes (1 to 3) from the arguments of PyTorch's class."""
    return _layer("transposed convolution", dims)(*args, **kwargs)


def avg_pool_nd(dims: int, *args, **kwargs) -> nn.Module:
    """Build an average pooling over `dims` axes (1 to 3); kernel_size and stride are scalars or one per axis."""
    return _layer("average pooling", dims)(*args, **kwargs)


def adaptive_avg_pool_nd(dims: int, output_size) -> nn.Module:
    """Build an average pooling over `dims` axes (1 to 3) to `output_size` along each."""
    return _layer("adaptive average pooling", dims)(output_size)


def linear(*args, **kwargs) -> nn.Linear:
    """Build a fully connected layer."""
    return nn.Linear(*args, **kwargs)


def resampling_factors(dims: int, resample_depth: bool = False) -> tuple[int, ...]:
    """Return the factor by which a level of the UNet downsamples or upsamples each axis.

    As in guided-diffusion, volumes keep the size of their first axis unless `resample_depth`.
    """
    return (2 if resample_depth or dims != 3 else 1,) + (2,) * (dims - 1)


def upsample_nearest(x: torch.Tensor, factors) -> torch.Tensor:
    """Upsample by nearest neighbor, by a scalar or one factor per axis.  [N x C x ...] -> [N x C x ... * factors]."""
    grid = x.shape[2:]
    size = [n * factor for n, factor in zip(grid, per_axis(factors, len(grid)))]
    return F.interpolate(x, size=size, mode="nearest")


def upsample_conv(conv: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: torch.Tensor, factors) -> torch.Tensor:
    """Return conv(upsample_nearest(x, factors)) without materializing the upsampled input.

    Equal inputs can share one multiplication by the sum of their weights, which gives a transposed convolution of
    stride s and kernel size s + 2: for s = 2 in 2D (3D), 4 (8) multiplications per output instead of 9 (27). Of the
    outputs of one input element along an axis only the first and the last depend on adjacent elements; the others are
    equal, so at most 3 are computed. Grids that are too flat for `Conv3d` are upsampled explicitly.

    :param conv: a convolution of kernel size 3, stride 1 and padding 1 along every axis.
    """
    factors = per_axis(factors, x.dim() - 2)
    if set(factors) == {1}:
        return conv(x)
    if isinstance(conv, Conv3d) and conv.needs_explicit_padding(x):
        return conv(upsample_nearest(x, factors))
    strides = [min(factor, 3) for factor in factors]
    axes = tuple(range(2, x.dim()))
    kernel = F.pad(conv.weight.flip(axes), [n for stride in reversed(strides) for n in (stride - 1, stride - 1)])
    for axis, stride in zip(axes, strides):
        windows = (kernel.narrow(axis, start, kernel.shape[axis] + 1 - stride) for start in range(stride))
        kernel = functools.reduce(torch.add, windows)
    y = _TRANSPOSED[len(axes)](x, kernel.transpose(0, 1), conv.bias, stride=strides, padding=1)
    for axis, factor in reversed(list(zip(axes, factors))):
        if factor > 3:
            first, between, last = y.unflatten(axis, (-1, 3)).split(1, axis + 1)
            repeats = [-1] * between.dim()
            repeats[axis + 1] = factor - 2
            y = torch.cat([first, between.expand(repeats), last], axis + 1).flatten(axis, axis + 1)
    return y


_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def resize_linear(x: torch.Tensor, size) -> torch.Tensor:
    """Interpolate linearly along every axis, with aligned outer edges.  [N x C x ...] -> [N x C x *size]."""
    size = tuple(size)
    return F.interpolate(x, size=size, mode=_LINEAR_MODES[len(size)], align_corners=False)


def adaptive_channel_mean(x: torch.Tensor, count: int) -> torch.Tensor:
    """Average adjacent channels to `count` of them, as adaptive_avg_pool1d does.  [N x C x ...] -> [N x count x ...].

    If deterministic algorithms are on, by other operations, equal up to rounding: PyTorch's has no such gradient on
    GPUs.
    """
    channels = x.shape[1]
    if not torch.are_deterministic_algorithms_enabled():
        pooled = F.adaptive_avg_pool1d(x.flatten(2).mT, count)          # [N x positions x count]
        return pooled.mT.reshape(len(x), count, *x.shape[2:])
    starts = np.arange(count) * channels // count
    lengths = -(-np.arange(1, count + 1) * channels // count) - starts
    window = np.arange(lengths.max())
    inside = window < lengths[:, None]                                  # [count x W], W channels in the longest window
    index = (starts[:, None] + window).clip(max=channels - 1).flatten()
    on_device = lambda array: to_device(torch.from_numpy(array), x.device)
    over_grid = lambda array: on_device(array).to(x.dtype).view(*array.shape, *(1,) * (x.dim() - 2))
    windows = x.index_select(1, on_device(index)).unflatten(1, inside.shape)
    return (windows * over_grid(inside)).sum(2) / over_grid(lengths)


def _layer(name, dims):
    if dims not in (1, 2, 3):
        raise ValueError(f"there is no {name} over {dims} spatial axes: --dims must be 1, 2 or 3")
    return _LAYERS[name][dims - 1]


def to_device(tensor: torch.Tensor, device) -> torch.Tensor:
    """Copy a tensor to a device without synchronizing it; CUDA requires pinned memory for that.

    A copy to the host does synchronize: it would be read there before it is complete.
    """
    device = torch.device(device)
    return pin(tensor, device).to(device, non_blocking=device.type != "cpu")


def pin(tensor: torch.Tensor, device) -> torch.Tensor:
    """Return a CPU tensor in pinned memory if `device` is a GPU, which takes a copy; other tensors unchanged."""
    needed = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory() if needed else tensor


def float64_device(device: torch.device) -> torch.device:
    """Return the device for computations in float64: the CPU for the GPU of a Mac (MPS), else `device`."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor in float64 on its `float64_device`."""
    return x.to(float64_device(x.device)).double()


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Round images in [0, 1] to 0..255; a NumPy array.  [N x C x ...] -> same."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


# --- Activations and norms ---


class SiLU(nn.SiLU):
    """The activation x * sigmoid(x) (Hendrycks and Gimpel 2016, arXiv:1606.08415, Sec. 4)."""


# (device, dtype) for which the kernel itself accumulates in float32 and accepts float32 weights with such an input.
NORMS_ADD_IN_FLOAT32 = {("cpu", torch.bfloat16)}


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm for `norm_act`, which computes both in one kernel if `is_fused`."""

    is_fused = False

    def forward(self, x):
        return self.over(self.num_groups, x, self.weight, self.bias)

    def over(self, groups, x, weight, bias):
        """Normalize a subset of the groups, with their part of weight and bias [C]."""
        return F.group_norm(x, groups, weight, bias, self.eps)


class GroupNorm32(GroupNorm):
    """Normalize in float32 for any dtype of input and weights; the result has the input's dtype."""

    def over(self, groups, x, weight, bias):
        wide = x if (x.device.type, x.dtype) in NORMS_ADD_IN_FLOAT32 else x.float()
        return F.group_norm(wide, groups, weight.float(), bias.float(), self.eps).to(x.dtype)


def normalization(channels: int) -> GroupNorm32:
    """Build the norm of all UNets: 32 groups, eps 1e-5.

    :raises ValueError: if `channels` is not a multiple of 32.
    """
    if channels % NORM_GROUPS:
        raise ValueError(
            f"{channels} channels do not divide into the norm's {NORM_GROUPS} groups; set widths (--num_channels or "
            f"--classifier_width, times every --channel_mult) that are multiples of {NORM_GROUPS}"
        )
    return GroupNorm32(NORM_GROUPS, channels)


def norm_act(norm: GroupNorm, x, scale=None, shift=None, subset=None) -> torch.Tensor:
    """Return silu(norm(x) * (1 + scale) + shift) in the dtype of x.  [N x C x ...] -> same.

    :param scale, shift: [N x C x 1 ...], or both None: without them (adaptive group norm, ADM, Sec. 3, Eq. 3).
    :param subset: (groups, weight, bias) if x contains only some of the norm's groups.
    """
    if norm.is_fused:
        groups, weight, bias = subset or (norm.num_groups, norm.weight, norm.bias)
        return _FusedNormAct.apply(x, weight, bias, scale, shift, groups, norm.eps)
    # Autocast on CUDA returns norms in float32: the activation would write twice as much as the convolution reads.
    h = (norm.over(subset[0], x, *subset[1:]) if subset else norm(x)).to(x.dtype)
    return F.silu(h if scale is None else h * (1 + scale) + shift)


def fuse_norms(network: nn.Module) -> None:
    """Let `norm_act` compute all norms inside a network in one compiled kernel per pass, in float32 up to its result.

    Of eager kernels, the norm alone reads and writes a tensor in float32 several times under autocast on CUDA.
    """
    for module in network.modules():
        if isinstance(module, GroupNorm):
            module.is_fused = True


def use_channels_last(network: nn.Module) -> None:
    """Store the weights of convolutions with their channels last, in which layout they then also return features.

    :raises ValueError: for signals, which have no such layout.
    """
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    axes = max(p.dim() for p in network.parameters())
    if axes not in layouts:
        raise ValueError("--channels_last True requires images or volumes, got signals; omit the flag")
    network.to(memory_format=layouts[axes])  # type: ignore[call-overload]  # not declared by PyTorch


class _FusedNormAct(torch.autograd.Function):
    """Forward and backward pass of `norm_act` in a compiled function each; only x and the statistics are saved."""

    @staticmethod
    def forward(ctx, x, weight, bias, scale, shift, groups, eps):
        y, mean, rstd = _compiled(_norm_act)(x, weight, bias, scale, shift, groups, eps)
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *_compiled(_norm_act_gradients)(grad, *ctx.saved_tensors, ctx.groups), None, None


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=True)    # for all sizes of a network


def _norm_act(x, weight, bias, scale, shift, groups, eps):
    """Return (result, mean and reciprocal standard deviation of every group [N x G x 1 ...])."""
    grouped = x.float().unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(grouped, tuple(range(2, grouped.dim())), correction=0, keepdim=True)
    rstd = torch.rsqrt(variance + eps)
    _, _, h = _modulated((grouped - mean) * rstd, weight, bias, scale, shift)
    return F.silu(h).to(x.dtype), mean, rstd


def _modulated(whitened, weight, bias, scale, shift):
    """Return (weight [C x 1 ...], norm, norm with scale and shift) of whitened groups [N x G x C / G x ...]."""
    weight, bias = (v.float().view(-1, *(1,) * (whitened.dim() - 3)) for v in (weight, bias))
    normed = whitened.flatten(1, 2) * weight + bias
    return weight, normed, normed if scale is None else normed * (1 + scale.float()) + shift.float()


def _norm_act_gradients(grad, x, weight, bias, scale, shift, mean, rstd, groups):
    """Return the gradients of x, weight, bias, scale and shift."""
    space = tuple(range(2, x.dim()))
    whitened = (x.float().unflatten(1, (groups, -1)) - mean) * rstd
    wide, normed, h = _modulated(whitened, weight, bias, scale, shift)
    gate = torch.sigmoid(h)
    of_h = grad.float() * gate * (1 + h * (1 - gate))
    of_normed, of_scale, of_shift = of_h, None, None
    if scale is not None:
        of_normed = of_h * (1 + scale.float())
        of_scale = (of_h * normed).sum(space, keepdim=True).to(scale.dtype)
        of_shift = of_h.sum(space, keepdim=True).to(shift.dtype)
    of_weight = (of_normed * whitened.flatten(1, 2)).sum((0, *space)).to(weight.dtype)
    of_bias = of_normed.sum((0, *space)).to(bias.dtype)
    of_whitened = (of_normed * wide).unflatten(1, (groups, -1))
    mean_of_group = lambda values: values.mean(tuple(range(2, values.dim())), keepdim=True)
    # The gradient through mean and standard deviation, as in batch norm (arXiv:1502.03167, Sec. 3).
    of_x = rstd * (of_whitened - mean_of_group(of_whitened) - whitened * mean_of_group(of_whitened * whitened))
    return of_x.flatten(1, 2).to(x.dtype), of_weight, of_bias, of_scale, of_shift


# --- Memory ---


def recomputed_conv(cheap, conv, inputs, params, groups: int, random=False, at_once=False) -> torch.Tensor:
    """Return conv(cheap(groups, *inputs, *params)), without saving the result of `cheap` for backward.

    A convolution saves its input for the gradient of its weights. If that input is a norm and an activation of a tensor
    that is saved anyway, it costs the memory of two tensors and is cheap to recompute. Results and gradients are equal.

    :param cheap: a function that processes each group of channels independently, so that large tensors are recomputed
        a few groups at a time, unless `at_once`.
    :param inputs: tensors [N x C x ...]; `params`: [C].
    :param random: whether `cheap` uses random numbers; the backward pass then reproduces them.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():    # a compiler chooses what to recompute itself
        return conv(cheap(groups, *inputs, *params))
    max_elements = math.inf if random or at_once else MAX_RECOMPUTED_ELEMENTS
    options = _Recomputation(cheap, conv, groups, max_elements, random, len(inputs))
    return _RecomputedConv.apply(options, conv.weight, conv.bias, *inputs, *params)


# Elements to recompute at a time; a few times their bytes are the memory overhead in the backward pass.
MAX_RECOMPUTED_ELEMENTS = 2**24


class _Recomputation(NamedTuple):
    """Arguments of `_RecomputedConv` that are not tensors; `num_inputs` tensors [N x C x ...] precede those of [C]."""

    cheap: Callable
    conv: nn.Module
    groups: int
    max_elements: float
    random: bool
    num_inputs: int


class _RecomputedConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, options, weight, bias, *tensors):
        device = tensors[0].device.type
        ctx.options = options
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        ctx.random_state = _random_state(tensors[0].device) if options.random else None
        ctx.save_for_backward(weight, *tensors)
        return options.conv(options.cheap(options.groups, *tensors))

    @staticmethod
    def backward(ctx, grad):
        weight, *tensors = ctx.saved_tensors
        cheap, conv, groups, max_elements, _, num_inputs = ctx.options
        count = tensors[0].numel()
        parts = next((n for n in range(1, groups) if groups % n == 0 and count <= n * max_elements), groups)
        split = [tensor.detach().chunk(parts, dim=1 if i < num_inputs else 0) for i, tensor in enumerate(tensors)]
        pieces = [[piece.requires_grad_() for piece in pieces] for pieces in zip(*split)]

        def compute(part):
            device, dtype, enabled = ctx.autocast
            with (torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled),
                  _restored_rng_state(ctx.random_state)):
                return cheap(groups // parts, *pieces[part]).to(grad.dtype)

        # A single part is computed once, for the convolution and for its own gradient; several are computed twice, so
        # that only one of their graphs is in memory at a time.
        only = compute(0) if parts == 1 else None
        value = torch.cat([compute(part).detach() for part in range(parts)], 1) if only is None else only.detach()
        flat = isinstance(conv, Conv3d) and conv.needs_explicit_padding(value)
        of_value, of_weight, of_bias = torch.ops.aten.convolution_backward(
            grad, conv.pad_explicitly(value) if flat else value, weight.to(grad.dtype), [weight.shape[0]], conv.stride,
            [0] * len(conv.stride) if flat else conv.padding, conv.dilation, False, [0] * len(conv.stride), conv.groups,
            [True, True, conv.bias is not None],
        )
        of_value = conv.crop_padding(of_value) if flat else of_value
        del value
        gradients = [torch.empty_like(tensor) for tensor in tensors]
        slots = [full.chunk(parts, dim=1 if i < num_inputs else 0) for i, full in enumerate(gradients)]
        for part, of_part in enumerate(of_value.chunk(parts, dim=1)):
            result = compute(part) if only is None else only
            for slot, gradient in zip(slots, torch.autograd.grad(result, pieces[part], of_part)):
                slot[part].copy_(gradient)
            del result
        of_bias = None if of_bias is None else of_bias.to(conv.bias.dtype)
        return None, of_weight.to(weight.dtype), of_bias, *gradients


def _random_state(device):
    """Return (device, RNG state) for `_restored_rng_state`."""
    if device.type == "cpu":
        return device, torch.get_rng_state()
    return device, getattr(torch, device.type).get_rng_state(device)


@contextlib.contextmanager
def _restored_rng_state(state):
    """Use a state of `_random_state` inside, and leave the random numbers outside unaffected."""
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


# --- Parameters ---


@torch.no_grad()
def update_ema(target_params, source_params, rate: float = 0.99) -> None:
    """Update EMA weights in place: target <- rate * target + (1 - rate) * source."""
    targets = list(target_params)
    sources = [source.to(target.dtype) for source, target in zip(source_params, targets, strict=True)]
    torch._foreach_lerp_(targets, sources, 1 - rate)


@torch.no_grad()
def zero_module(module: nn.Module) -> nn.Module:
    """Set all parameters of a module to zero and return it."""
    for parameter in module.parameters():
        parameter.zero_()
    return module


@torch.no_grad()
def scale_module(module: nn.Module, scale: float) -> nn.Module:
    """Multiply all parameters of a module by `scale` and return it."""
    for parameter in module.parameters():
        parameter.mul_(scale)
    return module


def cast_convolutions(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of all convolutions inside `module` to `dtype`; norms and linear layers are unchanged."""
    for layer in module.modules():
        if isinstance(layer, _LAYERS["convolution"]):
            layer.to(dtype)


# --- Functions of tensors ---


def drop_conditioning(conditioning: dict, dropped: torch.Tensor, null_label: int | None) -> dict:
    """Return the conditioning of a network, replaced by that of an unconditional prediction for some samples.

    The class becomes `null_label`, attributes unknown (NaN), a condition image 0. What describes the data itself, such
    as `low_res`, stays.

    :param dropped: which samples, bool [N].
    """
    null = {}
    if "y" in conditioning:
        null["y"] = conditioning["y"].masked_fill(dropped, null_label)
    if "attributes" in conditioning:
        null["attributes"] = conditioning["attributes"].masked_fill(dropped[:, None], math.nan)
    if "condition" in conditioning:
        image = conditioning["condition"]
        null["condition"] = image.masked_fill(dropped.view(-1, *(1,) * (image.dim() - 1)), 0.0)
    return {**conditioning, **null}


def mean_flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return the mean over all axes except the first.  [N x ...] -> [N]."""
    return tensor.flatten(1).mean(dim=1)


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10000) -> torch.Tensor:
    """Encode timesteps as cosines, then sines, of geometrically spaced frequencies.  [N] -> [N x dim], float32.

    Vaswani et al. 2017 (arXiv:1706.03762), Sec. 3.5, with w_k = max_period^(-k / (dim // 2)). Timesteps may be
    fractional. An odd `dim` ends in a column of zeros.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    w = torch.exp(k * (-math.log(max_period) / max(half, 1)))       # [half]
    angles = torch.outer(timesteps.float(), w)                      # [N x half]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


def checkpoint(func: Callable, inputs, params, flag: bool):
    """Return func(*inputs); if `flag`, recompute its activations in the backward pass instead of saving them.

    Autocast and the random state (dropout) are as in the first pass. `params` is kept for callers of guided-diffusion:
    gradients reach all that `func` uses, listed or not.
    """
    return recompute_in_backward(func, *inputs, use_reentrant=False) if flag else func(*inputs)


__getattr__ = deprecated_names("nn")
