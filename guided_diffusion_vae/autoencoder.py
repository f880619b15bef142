"""A KL autoencoder with freely chosen downsampling factors, for signals, images and volumes.

Kingma and Welling 2014 (arXiv:1312.6114) as used for latent diffusion by Rombach et al. 2022 (arXiv:2112.10752). The
names of arguments and weights are those of MONAI GenerativeModels' AutoencoderKL, so that its weights load.
"""

import dataclasses
import math

import torch
import torch.nn as nn

from . import deprecated_names
from .config import as_dict, option, require
from .nn import checkpoint, per_axis
from .vae.blocks import (
    Attention, ChannelToSpace, Conv, Downsample, ResBlock, Residual, ShuffledConv, SpaceToChannel, Upsample,
    UpsampledConv,
)
from .vae.posterior import LOGVAR_RANGE


@dataclasses.dataclass
class AutoencoderConfig:
    spatial_dims: int = option(2, "spatial axes: 2 for images, 3 for volumes; --image_size implies it")
    in_channels: int = option(0, "channels of the images; 0: those of the data", minimum=0)
    out_channels: int = option(0, "channels of the reconstruction; 0: same as in_channels", minimum=0)
    num_channels: tuple = option(
        (32, 64, 64), "width of every level, a multiple of norm_num_groups each", essential=True)
    num_res_blocks: tuple = option(1, "residual blocks per level: one number, or one per level")
    attention_levels: tuple = option((), "whether each level has attention: one true or false per level; empty: none")
    latent_channels: int = option(
        4, "channels of the latent; the encoder predicts mean and log-variance of each", minimum=1, essential=True)
    norm_num_groups: int = option(16, "groups of every norm", minimum=1)
    norm_eps: float = option(1e-6, "added to the variance in every norm", minimum=0)
    with_encoder_nonlocal_attn: bool = option(False, "add attention at the end of the encoder")
    with_decoder_nonlocal_attn: bool = option(False, "add attention at the start of the decoder")
    use_convtranspose: bool = option(
        False, "upsample by transposed convolution instead of nearest-neighbor upsampling followed by a convolution")
    use_checkpointing: bool = option(False, "recompute whole blocks in the backward pass: less memory, more time")
    downsample_factors: tuple = option((), "downsampling factor between levels, one fewer than num_channels, each a "
                                           "number or one per axis; empty: all 2", essential=True)
    initial_downsample_factor: tuple = option(
        1, "downsampling factor of the first convolution: a number, or one per axis", essential=True)
    final_upsample: str = option("nearest", "how initial_downsample_factor is inverted: nearest (nearest-neighbor "
                                            "upsampling followed by a convolution) or shuffle (pixel shuffle, with a "
                                            "kernel for each new element)", choices=("nearest", "shuffle"))
    space_to_channel: bool = option(False, "add shortcuts around every change of size that move elements between space "
                                           "and channels (DC-AE), which preserve detail at large factors")
    recompute_norms: bool = option(
        False, "recompute norms and activations in the backward pass: less memory, up to a tenth more time")
    downsample_kernel_size: int = option(0, "kernel size of strided convolutions; 0: large enough to see every input; "
                                            "3: for checkpoints with a fixed 3", minimum=0)
    image_range: tuple = option((-1.0, 1.0), "minimum and maximum intensity inside the network (0,1 for MONAI's)")


def total_factors(config: AutoencoderConfig, dims: int) -> tuple[int, ...]:
    """Return the total downsampling factor of each of `dims` axes, without allocating the network."""
    with torch.device("meta"):
        return create_autoencoder(
            dataclasses.replace(config, spatial_dims=dims, in_channels=config.in_channels or 1)
        ).factors


def create_autoencoder(config: AutoencoderConfig) -> "AutoencoderKL":
    """Build the network that an AutoencoderConfig describes.

    :raises ValueError: if in_channels is still 0 (to be taken from the data), or as in `AutoencoderKL`.
    """
    require((config.in_channels >= 1,
             f"in_channels is {config.in_channels}: expected the channels of the data; set --in_channels"))
    arguments = as_dict(config)
    del arguments["image_range"]
    arguments.update(
        out_channels=config.out_channels or config.in_channels,
        attention_levels=config.attention_levels or False,
        downsample_factors=config.downsample_factors or None,
        downsample_kernel_size=config.downsample_kernel_size or None,
    )
    return AutoencoderKL(**arguments)


def format_strides(network: "AutoencoderKL") -> str:
    """Return the strides of an AutoencoderKL as `initial=2, layers=(4, 2), total downsampling: 16x`.

    One number stands for all axes if they agree.
    """
    short = lambda axes: axes[0] if len(set(axes)) == 1 else tuple(axes)
    layers = tuple(short(strides) for strides in network.strides)
    total = "x".join(map(str, dict.fromkeys(network.factors) if len(set(network.factors)) == 1 else network.factors))
    return f"initial={short(network.initial_strides)}, layers={layers}, total downsampling: {total}x"


class AutoencoderKL(nn.Module):
    """Encode images or volumes as a diagonal normal distribution over latents, and decode latents.

    Level i has `num_channels[i]` channels and `num_res_blocks[i]` residual blocks, with attention if
    `attention_levels[i]`. From level i to i + 1 each axis is downsampled by `downsample_factors[i]`, an integer or one
    per axis (None: 2 everywhere); a single value instead of any of these lists applies to every level. Before level 0
    each axis is downsampled by `initial_downsample_factor`. The decoder mirrors all of it. Convolutions of stride s
    have a kernel that sees every input, s + 1 (2s - 1 at the start), unless `downsample_kernel_size` fixes it.

    State dicts of MONAI GenerativeModels, of MONAI core and of this class load; see `Attention` for their difference.
    The state dict's `_metadata` shows which of them it is: save and copy the object that `state_dict()` returns, not a
    plain dictionary of its items.

    `final_upsample`, `space_to_channel` and `recompute_norms` are described in `AutoencoderConfig`.

    :raises ValueError: for lists of the wrong length, widths that `norm_num_groups` does not divide, factors or numbers
        of blocks below 1.
    """

    def __init__(
        self, spatial_dims, in_channels=1, out_channels=1, num_res_blocks=(2, 2, 2, 2), num_channels=(32, 64, 64, 64),
        attention_levels=(False, False, True, True), latent_channels=3, norm_num_groups=32, norm_eps=1e-6,
        with_encoder_nonlocal_attn=True, with_decoder_nonlocal_attn=True, use_convtranspose=False,
        use_checkpointing=False, downsample_factors=None, initial_downsample_factor=1, downsample_kernel_size=None,
        final_upsample="nearest", space_to_channel=False, recompute_norms=False,
    ):
        super().__init__()
        num_channels = per_level(num_channels, 1)
        count = len(num_channels)
        num_res_blocks, attention_levels = per_level(num_res_blocks, count), per_level(attention_levels, count)
        downsample_factors = per_level(2 if downsample_factors is None else downsample_factors, count - 1)
        require(
            *((len(entries) == expected,
               f"{name} {entries} has {len(entries)} entries: expected {expected} for num_channels {num_channels}")
              for name, entries, expected in (("num_res_blocks", num_res_blocks, count),
                                              ("attention_levels", attention_levels, count),
                                              ("downsample_factors", downsample_factors, count - 1))),
            (not any(width % norm_num_groups for width in num_channels),
             f"num_channels {num_channels} must be multiples of norm_num_groups {norm_num_groups}"),
            (all(blocks >= 1 for blocks in num_res_blocks), f"num_res_blocks must be >= 1, got {num_res_blocks}"),
            (downsample_kernel_size is None or downsample_kernel_size > 0 and downsample_kernel_size % 2,
             f"downsample_kernel_size must be odd, or None to see every input, got {downsample_kernel_size}"),
        )
        strides = tuple(_strides(factor, spatial_dims, "downsample_factors") for factor in downsample_factors)
        first = _strides(initial_downsample_factor, spatial_dims, "initial_downsample_factor")

        self.in_channels, self.out_channels, self.latent_channels = in_channels, out_channels, latent_channels
        self.initial_strides, self.strides = first, strides
        self.factors = tuple(math.prod(axis) for axis in zip(first, *strides))
        build = _Builder(
            spatial_dims, norm_num_groups, norm_eps, recompute_norms, space_to_channel,
            tuple(zip(num_channels, num_res_blocks, attention_levels)), first, strides, downsample_kernel_size,
            use_convtranspose, final_upsample == "shuffle",
        )
        encoder = build.encoder(in_channels, latent_channels, with_encoder_nonlocal_attn)
        self.encoder = _Blocks(use_checkpointing, encoder)
        decoder = build.decoder(latent_channels, out_channels, with_decoder_nonlocal_attn)
        self.decoder = _Blocks(use_checkpointing, decoder)
        self.quant_conv_mu = Conv(spatial_dims, latent_channels, latent_channels, kernel=1)
        self.quant_conv_log_sigma = Conv(spatial_dims, latent_channels, latent_channels, kernel=1)
        self.post_quant_conv = Conv(spatial_dims, latent_channels, latent_channels, kernel=1)

    @property
    def last_layer(self) -> torch.Tensor:
        """The weight of the last convolution, at which the gradients of losses are compared (VQGAN)."""
        return [module for module in self.decoder.modules() if isinstance(module, Conv)][-1].conv.weight

    def moments(self, x):
        """Return mean and log-variance (within LOGVAR_RANGE) of the latent.  [N x C x ...] -> two of [N x Z x ...].

        :raises ValueError: if the channels differ, or a size is not a multiple of its axis's factor.
        """
        if x.shape[1] != self.in_channels:
            raise ValueError(f"images of shape {tuple(x.shape)} have {x.shape[1]} channels: the autoencoder expects "
                             f"{self.in_channels} (--in_channels)")
        self.latent_shape(x.shape[2:])
        return self.to_moments(self.encoder(x))

    def to_moments(self, h):
        """Return mean and log-variance of the encoder's output, two of [N x Z x ...]."""
        return self.quant_conv_mu(h), self.quant_conv_log_sigma(h).clamp(*LOGVAR_RANGE)

    def encode(self, x):
        """Return mean and standard deviation of the latent.  [N x C x ...] -> two of [N x Z x ...]."""
        mean, logvar = self.moments(x)
        return mean, torch.exp(0.5 * logvar)

    def sampling(self, mu, sigma, eps=None):
        """Return a sample of the latent, mu + sigma * eps; eps None: standard normal noise."""
        return mu + sigma * (torch.randn_like(sigma) if eps is None else eps)

    def decode(self, z):
        """Return the decoded image of a latent.  [N x Z x ...] -> [N x C x ... * factors]."""
        return self.decoder(self.post_quant_conv(z))

    def reconstruct(self, x):
        """Return the decoded posterior mode of `x`."""
        return self.decode(self.moments(x)[0])

    def forward(self, x, eps=None):
        """Return (reconstruction from a sampled latent, mu, sigma); `eps` [N x Z x ...] as in `sampling`."""
        mu, sigma = self.encode(x)
        return self.decode(self.sampling(mu, sigma, eps)), mu, sigma

    def latent_shape(self, spatial) -> tuple[int, ...]:
        """Return the latent's (Z, ...) for images of the sizes `spatial`.

        :raises ValueError: if a size is not a multiple of the factor of its axis.
        """
        return (self.latent_channels, *latent_grid(spatial, self.factors))


def latent_grid(spatial, factors) -> tuple[int, ...]:
    """Return the size of each axis divided by its factor.

    :raises ValueError: if the numbers of axes differ, or a factor does not divide a size.
    """
    if len(spatial) != len(factors):
        raise ValueError(f"sizes {tuple(spatial)} have {len(spatial)} axes: the autoencoder expects {len(factors)} "
                         "(--image_size has one number per axis)")
    for axis, (size, factor) in enumerate(zip(spatial, factors)):
        if size % factor or size < 1:
            below = size // factor * factor
            nearest = f"{below} or {below + factor}" if below else f"{factor}"
            raise ValueError(
                f"axis {axis} has size {size}, which the autoencoder's total downsampling factor {factor} "
                f"(--initial_downsample_factor times all --downsample_factors) does not divide: expected e.g. {nearest}"
                "; change --image_size, or set --pad True"
            )
    return tuple(size // factor for size, factor in zip(spatial, factors))


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Yield the blocks of the encoder or the decoder, from their common options.

    `levels` lists (channels, residual blocks, whether to attend), `strides` the stride per axis of each transition.
    """

    dims: int
    groups: int
    eps: float
    recompute_norms: bool
    shortcuts: bool
    levels: tuple
    initial_strides: tuple
    strides: tuple
    kernel: int | None
    transposed: bool
    shuffled: bool

    def encoder(self, channels, latent_channels, nonlocal_attn):
        first, width = self.initial_strides, self.levels[0][0]
        kernels = tuple(3 if s == 1 else self.kernel or 2 * s - 1 for s in first)
        yield self._around(Conv(self.dims, channels, width, kernels, first), SpaceToChannel(first, width), first)
        downsample = lambda width, strides, out: (Downsample(self.dims, width, strides, self.kernel, out),
                                                  SpaceToChannel(strides, out))
        width = yield from self._levels(self.levels, self.strides, downsample)
        if nonlocal_attn:
            yield from self._nonlocal(width)
        last = nn.GroupNorm(self.groups, width, self.eps), Conv(self.dims, width, latent_channels)
        yield from self._ends(last, SpaceToChannel((1,) * self.dims, latent_channels))

    def decoder(self, latent_channels, channels, nonlocal_attn):
        first, width = self.initial_strides, self.levels[-1][0]
        yield from self._ends((Conv(self.dims, latent_channels, width),), ChannelToSpace((1,) * self.dims, width))
        if nonlocal_attn:
            yield from self._nonlocal(width)
        # A fixed kernel size is that of strided convolutions; nearest-neighbor upsampling always convolves by 3.
        kernel = self.kernel if self.transposed else None
        upsample = lambda width, strides, out: (Upsample(self.dims, width, strides, self.transposed, kernel, out),
                                                ChannelToSpace(strides, out))
        width = yield from self._levels(self.levels[::-1], self.strides[::-1], upsample)
        final = (ShuffledConv if self.shuffled else UpsampledConv)(self.dims, width, channels, first)
        yield nn.GroupNorm(self.groups, width, self.eps)
        yield self._around(final, ChannelToSpace(first, channels), first)

    def _levels(self, levels, strides, resample):
        """Yield the blocks of all levels with `resample(channels, strides, out)` in between; return the last width."""
        width = levels[0][0]
        for i, (out, repeats, attends) in enumerate(levels):
            for _ in range(repeats):
                yield self._residual(width, out)
                if attends:
                    yield Attention(out, self.groups, self.eps)
                width = out
            if i < len(strides):
                # With shortcuts the width changes here, as the elements of space become channels.
                out = levels[i + 1][0] if self.shortcuts else width
                yield self._around(*resample(width, strides[i], out), strides[i])
                width = out
        return width

    def _around(self, step, shortcut, strides):
        return Residual((step,), shortcut) if self.shortcuts and math.prod(strides) > 1 else step

    def _ends(self, blocks, shortcut):
        yield from [Residual(blocks, shortcut)] if self.shortcuts else blocks

    def _residual(self, width, out):
        return ResBlock(width, out, self.dims, self.groups, self.eps, self.recompute_norms)

    def _nonlocal(self, width):
        yield self._residual(width, width)
        yield Attention(width, self.groups, self.eps)
        yield self._residual(width, width)


class _Blocks(nn.Module):
    """A chain of blocks, each recomputed in the backward pass if `use_checkpointing`."""

    def __init__(self, use_checkpointing, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.use_checkpointing = use_checkpointing

    def forward(self, h):
        for block in self.blocks:
            h = checkpoint(block, (h,), block.parameters(), self.use_checkpointing and torch.is_grad_enabled())
        return h


def _strides(factor, dims, name):
    values = per_axis(factor, dims)
    require((all(isinstance(v, int) and v >= 1 for v in values), f"{name} must be integers >= 1, got {factor!r}"))
    return values


def per_level(value, count: int) -> tuple:
    """Return one entry per level: a single number or boolean applies to every level."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * count


__getattr__ = deprecated_names("autoencoder")
