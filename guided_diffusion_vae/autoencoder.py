"""A KL autoencoder whose strides the user chooses, for signals, pictures and volumes.

Kingma and Welling 2014 (arXiv 1312.6114) as used for latent diffusion by Rombach et al. 2022 (arXiv 2112.10752). The
names of arguments and weights are those of MONAI GenerativeModels' AutoencoderKL, so that its weights load.
"""

import dataclasses
import math

import torch
import torch.nn as nn

from .config import as_dict, option
from .nn import checkpoint, per_axis
from .vae.blocks import (
    Attention, ChannelToSpace, Conv, Downsample, ResBlock, Residual, ShuffledConv, SpaceToChannel, Upsample,
    UpsampledConv,
)
from .vae.posterior import LOGVAR_RANGE


@dataclasses.dataclass
class AutoencoderConfig:
    spatial_dims: int = option(2, "spatial axes: 2 for pictures, 3 for volumes; --image_size says it too")
    in_channels: int = option(0, "channels of the pictures; 0: as the data has", minimum=0)
    out_channels: int = option(0, "channels of the reconstruction; 0: as in_channels", minimum=0)
    num_channels: tuple = option((32, 64, 64), "width of every level, each a multiple of norm_num_groups")
    num_res_blocks: tuple = option(1, "residual blocks of a level: one number, or one per level")
    attention_levels: tuple = option((), "which levels attend: one true or false per level; empty: none")
    latent_channels: int = option(4, "channels of the latent; the encoder predicts mean and log-variance of each", minimum=1)
    norm_num_groups: int = option(16, "groups of every norm", minimum=1)
    norm_eps: float = option(1e-6, "added to the variance in every norm", minimum=0)
    with_encoder_nonlocal_attn: bool = option(False, "attend once at the end of the encoder")
    with_decoder_nonlocal_attn: bool = option(False, "attend once at the start of the decoder")
    use_convtranspose: bool = option(False, "upsample by transposed convolution, not by repeating and convolving")
    use_checkpointing: bool = option(False, "recompute blocks in the backward pass: less memory, more time")
    downsample_factors: tuple = option(
        (), "stride from level to level, one entry less than num_channels, each a number or one per axis; empty: all 2"
    )
    initial_downsample_factor: tuple = option(1, "stride of the first convolution: a number, or one per axis")
    final_upsample: str = option(
        "nearest", "how initial_downsample_factor is undone: nearest repeats elements and convolves them; shuffle has "
                   "a kernel of its own for each of the new elements", choices=("nearest", "shuffle")
    )
    space_to_channel: bool = option(
        False, "shortcuts around every change of size that move elements between space and channels (DC-AE), which "
               "keep detail where strides are large"
    )
    recompute_norms: bool = option(False, "recompute norms and activations in the backward pass: less memory, little time")
    downsample_kernel_size: int = option(
        0, "kernel of strided convolutions; 0: wide enough to see every input; 3 for checkpoints made with a fixed 3",
        minimum=0
    )
    image_range: tuple = option((-1.0, 1.0), "values that black and white have inside the network (0,1 for MONAI's)")


def total_factors(config, dims):
    """Return by what every one of `dims` axes shrinks in the network that a config describes; nothing is allocated."""
    with torch.device("meta"):
        return create_autoencoder(
            dataclasses.replace(config, spatial_dims=dims, in_channels=config.in_channels or 1)
        ).factors


def create_autoencoder(config):
    """Build the network that an AutoencoderConfig describes.

    :raises ValueError: where in_channels is still 0, that is, nobody has looked at the data yet, and whatever
        `AutoencoderKL` refuses.
    """
    if config.in_channels < 1:
        raise ValueError(f"in_channels is {config.in_channels}; set it to the channels of the data (--in_channels)")
    arguments = as_dict(config)
    del arguments["image_range"]
    arguments.update(
        out_channels=config.out_channels or config.in_channels,
        attention_levels=config.attention_levels or False,
        downsample_factors=config.downsample_factors or None,
        downsample_kernel_size=config.downsample_kernel_size or None,
    )
    return AutoencoderKL(**arguments)


def format_strides(network):
    """Return the strides of an AutoencoderKL as `initial=2, layers=(4, 2), total downsampling: 16x`.

    One number stands for all axes where they agree.
    """
    short = lambda axes: axes[0] if len(set(axes)) == 1 else tuple(axes)
    layers = tuple(short(strides) for strides in network.strides)
    total = "x".join(map(str, dict.fromkeys(network.factors) if len(set(network.factors)) == 1 else network.factors))
    return f"initial={short(network.initial_strides)}, layers={layers}, total downsampling: {total}x"


class AutoencoderKL(nn.Module):
    """Encode pictures or volumes as a diagonal normal distribution over latents, and decode latents.

    Level i has `num_channels[i]` channels and `num_res_blocks[i]` residual blocks, with attention where
    `attention_levels[i]`. From level i to i + 1 each axis shrinks by `downsample_factors[i]`, an integer or one per
    axis (None: 2 everywhere); a single value in place of any of these lists serves every level. Before level 0 each
    axis shrinks by `initial_downsample_factor`. The decoder undoes all. Convolutions that shrink an axis by s have a
    kernel that sees every input, s + 1 (2s - 1 at the start), unless `downsample_kernel_size` fixes it.

    State dicts of MONAI GenerativeModels, of MONAI core and of this class load; see `Attention` for their difference.
    It is told from the state dict's `_metadata`: save and copy the object that `state_dict()` returns, not a plain
    dictionary of its items.

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
        levels = len(num_channels)
        num_res_blocks, attention_levels = per_level(num_res_blocks, levels), per_level(attention_levels, levels)
        downsample_factors = per_level(2 if downsample_factors is None else downsample_factors, levels - 1)
        for name, entries, count in (
            ("num_res_blocks", num_res_blocks, levels), ("attention_levels", attention_levels, levels),
            ("downsample_factors", downsample_factors, levels - 1),
        ):
            if len(entries) != count:
                raise ValueError(
                    f"{name} {entries} has {len(entries)} entries; num_channels {num_channels} needs {count}"
                )
        if unfit := [c for c in num_channels if c % norm_num_groups]:
            raise ValueError(
                f"num_channels {num_channels}: {unfit[0]} is no multiple of norm_num_groups {norm_num_groups}"
            )
        if min(num_res_blocks) < 1:
            raise ValueError(f"num_res_blocks {num_res_blocks} holds {min(num_res_blocks)}; every level has at least 1")
        strides = [_strides(f, spatial_dims, "downsample_factors") for f in downsample_factors]
        first = _strides(initial_downsample_factor, spatial_dims, "initial_downsample_factor")
        if downsample_kernel_size is not None and (downsample_kernel_size < 1 or downsample_kernel_size % 2 == 0):
            raise ValueError(f"downsample_kernel_size is {downsample_kernel_size}; it is odd, or None for the rule")

        self.in_channels, self.out_channels, self.latent_channels = in_channels, out_channels, latent_channels
        self.initial_strides, self.strides = first, tuple(strides)
        self.factors = tuple(math.prod(axis) for axis in zip(first, *strides))
        build = _Builder(spatial_dims, norm_num_groups, norm_eps, recompute_norms, space_to_channel)
        levels = list(zip(num_channels, num_res_blocks, attention_levels))
        self.encoder = _Blocks(use_checkpointing, build.encoder(
            in_channels, latent_channels, levels, first, strides, downsample_kernel_size, with_encoder_nonlocal_attn,
        ))
        self.decoder = _Blocks(use_checkpointing, build.decoder(
            latent_channels, out_channels, levels[::-1], first, strides[::-1],
            downsample_kernel_size if use_convtranspose else None, use_convtranspose, with_decoder_nonlocal_attn,
            final_upsample == "shuffle",
        ))
        self.quant_conv_mu = Conv(spatial_dims, latent_channels, latent_channels, kernel=1)
        self.quant_conv_log_sigma = Conv(spatial_dims, latent_channels, latent_channels, kernel=1)
        self.post_quant_conv = Conv(spatial_dims, latent_channels, latent_channels, kernel=1)

    @property
    def last_layer(self):
        """The weight of the last convolution, at which losses are compared."""
        return [module for module in self.decoder.modules() if isinstance(module, Conv)][-1].conv.weight

    def moments(self, x):
        """Return mean and log-variance (within LOGVAR_RANGE) of the latent.  [N x C x ...] -> two of [N x Z x ...].

        :raises ValueError: where the channels are others, or a size is no multiple of the axis's factor.
        """
        if x.shape[1] != self.in_channels:
            raise ValueError(f"pictures of shape {tuple(x.shape)} have {x.shape[1]} channels, the autoencoder "
                             f"takes {self.in_channels} (--in_channels)")
        self.latent_shape(x.shape[2:])
        return self.to_moments(self.encoder(x))

    def to_moments(self, h):
        """Return mean and log-variance of what the encoder gave, [N x Z x ...]."""
        return self.quant_conv_mu(h), self.quant_conv_log_sigma(h).clamp(*LOGVAR_RANGE)

    def encode(self, x):
        """Return mean and standard deviation of the latent.  [N x C x ...] -> two of [N x Z x ...]."""
        mean, logvar = self.moments(x)
        return mean, torch.exp(0.5 * logvar)

    def sampling(self, mu, sigma, eps=None):
        """Draw a latent, mu + sigma * eps; a fresh standard normal eps where none is given."""
        return mu + sigma * (torch.randn_like(sigma) if eps is None else eps)

    def decode(self, z):
        """Return the picture of a latent.  [N x Z x ...] -> [N x C x ... * factors]."""
        return self.decoder(self.post_quant_conv(z))

    def reconstruct(self, x):
        """Return the picture of the most probable latent of `x`."""
        return self.decode(self.moments(x)[0])

    def forward(self, x, eps=None):
        """Return (reconstruction from a sampled latent, mu, sigma); `eps` [N x Z x ...] as in `sampling`."""
        mu, sigma = self.encode(x)
        return self.decode(self.sampling(mu, sigma, eps)), mu, sigma

    def latent_shape(self, spatial):
        """Return the latent's (Z, ...) for pictures of the sizes `spatial`.

        :raises ValueError: where a size is no multiple of the factor of its axis.
        """
        return (self.latent_channels, *latent_grid(spatial, self.factors))


def latent_grid(spatial, factors):
    """Divide every size by the factor of its axis.

    :raises ValueError: where there are more or fewer axes, or a factor does not divide the size.
    """
    if len(spatial) != len(factors):
        raise ValueError(f"sizes {tuple(spatial)} are {len(spatial)} axes, the autoencoder works on {len(factors)} "
                         "(--image_size has one number an axis)")
    for axis, (size, factor) in enumerate(zip(spatial, factors)):
        if size % factor or size < 1:
            below = size // factor * factor
            near = f"{below} and {below + factor}" if below else f"{factor}"
            raise ValueError(
                f"axis {axis} has size {size}, which the autoencoder's total factor {factor} "
                f"(--initial_downsample_factor times all --downsample_factors) does not divide; {near} would fit: "
                "resize or crop, or give --pad True"
            )
    return tuple(size // factor for size, factor in zip(spatial, factors))


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Yield the blocks of an encoder or a decoder, from the options that all of them share."""

    dims: int
    groups: int
    eps: float
    recompute_norms: bool
    shortcuts: bool

    def encoder(self, channels, latent_channels, levels, first, strides, kernel, nonlocal_attn):
        width = levels[0][0]
        kernels = tuple(3 if s == 1 else kernel or 2 * s - 1 for s in first)
        yield self._around(Conv(self.dims, channels, width, kernels, first), SpaceToChannel(first, width), first)
        for i, (out, repeats, attends) in enumerate(levels):
            yield from self._level(width, out, repeats, attends)
            width = out
            if i < len(strides):
                # With shortcuts widths change here, where channels can take in what space gives up.
                out = levels[i + 1][0] if self.shortcuts else width
                step = Downsample(self.dims, width, strides[i], kernel, out)
                yield self._around(step, SpaceToChannel(strides[i], out), strides[i])
                width = out
        if nonlocal_attn:
            yield from self._nonlocal(width)
        last = nn.GroupNorm(self.groups, width, self.eps), Conv(self.dims, width, latent_channels)
        yield from self._ends(last, SpaceToChannel((1,) * self.dims, latent_channels))

    def decoder(
        self, latent_channels, channels, levels, first, strides, kernel, transposed, nonlocal_attn, shuffled
    ):
        width = levels[0][0]
        yield from self._ends((Conv(self.dims, latent_channels, width),), ChannelToSpace((1,) * self.dims, width))
        if nonlocal_attn:
            yield from self._nonlocal(width)
        for i, (out, repeats, attends) in enumerate(levels):
            yield from self._level(width, out, repeats, attends)
            width = out
            if i < len(strides):
                out = levels[i + 1][0] if self.shortcuts else width
                step = Upsample(self.dims, width, strides[i], transposed, kernel, out)
                yield self._around(step, ChannelToSpace(strides[i], out), strides[i])
                width = out
        enlarge = ShuffledConv if shuffled else UpsampledConv
        last = enlarge(self.dims, width, channels, first)
        yield nn.GroupNorm(self.groups, width, self.eps)
        yield self._around(last, ChannelToSpace(first, channels), first)

    def _around(self, step, shortcut, strides):
        return Residual((step,), shortcut) if self.shortcuts and math.prod(strides) > 1 else step

    def _ends(self, blocks, shortcut):
        yield from [Residual(blocks, shortcut)] if self.shortcuts else blocks

    def _residual(self, width, out):
        return ResBlock(width, out, self.dims, self.groups, self.eps, self.recompute_norms)

    def _level(self, width, out, repeats, attends):
        for _ in range(repeats):
            yield self._residual(width, out)
            if attends:
                yield Attention(out, self.groups, self.eps)
            width = out

    def _nonlocal(self, width):
        yield self._residual(width, width)
        yield Attention(width, self.groups, self.eps)
        yield self._residual(width, width)


class _Blocks(nn.Module):
    """Run blocks one after the other, each recomputed in the backward pass where `use_checkpointing`."""

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
    if any(not isinstance(v, int) or v < 1 for v in values):
        raise ValueError(f"{name} holds {factor!r}; factors are integers from 1")
    return values


def per_level(value, count):
    """Return one entry per level: a single number or boolean serves every level."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * count
