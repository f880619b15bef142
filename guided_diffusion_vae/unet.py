"""The UNet of ADM (Dhariwal and Nichol 2021, arXiv:2105.05233), its upsampler and its classifier.

Constructor arguments, state-dict keys and numbers are those of openai/guided-diffusion, so its checkpoints load. One to
three spatial axes; `resample_depth`, which downsamples the first axis of volumes as well, is specific to this project.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn as nn
import torch.nn.functional as F

from .config import integers, numbers, option, require, size, words
from .nn import (
    SiLU, adaptive_avg_pool_nd, avg_pool_nd, cast_convolutions, checkpoint, conv_nd, linear, norm_act, normalization,
    per_axis, recomputed_conv, resampling_factors, resize_linear, timestep_embedding, upsample_conv, upsample_nearest,
    zero_module,
)

POOLS = ("adaptive", "attention", "spatial", "spatial_v2")
SPATIAL_WIDTH = 2048        # hidden units of the "spatial" pools
TRANSPOSED_MIN_POSITIONS = 64   # grids of at least this size upsample faster by a transposed convolution (on CPUs)
MATMUL_TOKENS = 1024        # up to here, bfloat16 attention on CPUs is computed by matrix products; see `attend`


@dataclass
class ModelConfig:
    """Options of the diffusion network, a `UNetModel` or `SuperResModel`."""

    num_channels: int = option(128, "width of the first level; times each entry of channel_mult it must be a multiple "
                                    "of 32", minimum=1, essential="lr")
    num_res_blocks: int = option(
        2, "residual blocks per level of the downsampling path; the upsampling path has one more", minimum=1)
    num_heads: int = option(4, "attention heads if num_head_channels is -1", minimum=1)
    num_heads_upsample: int = option(
        -1, "attention heads of the upsampling path if num_head_channels is -1; -1: same as num_heads", minimum=-1)
    num_head_channels: int = option(
        -1, "channels per attention head, which determine the number of heads; -1: use num_heads", minimum=-1)
    attention_resolutions: Annotated[str, integers] = option("16,8", "comma-separated grid sizes that have attention")
    channel_mult: Annotated[str, numbers] = option(
        "", "comma-separated width of each level in units of num_channels; empty: by image size", essential="lr")
    dropout: float = option(0.0, "dropout probability inside residual blocks in training", minimum=0, maximum=1)
    class_cond: bool = option(False, "condition on class labels", essential="lr")
    use_checkpoint: bool = option(False, "recompute whole blocks in the backward pass: less memory, a third more time")
    recompute_norms: bool = option(
        False, "recompute norms and activations in the backward pass: less memory, up to a tenth more time")
    use_scale_shift_norm: bool = option(True, "scale and shift norms by the timestep embedding instead of adding it")
    resblock_updown: bool = option(
        False, "resample inside residual blocks instead of by strided convolutions between them")
    use_fp16: bool = option(False, "run convolutions and attention in float16, with loss scaling")
    use_new_attention_order: bool = option(False, "split qkv before heads; must match the checkpoint")
    in_channels: int = option(0, "channels of x0; 0: those of the data (3 without data)", minimum=0)
    num_classes: int = option(0, "classes to condition on; 0: those of the data or the checkpoint", minimum=0)
    class_dropout: float = option(0.0, "probability of dropping class, attributes and --condition_dir of a training "
                                       "sample, which --cfg_scale requires; usually 0.1", minimum=0, below=1)
    condition_on: Annotated[str, words] = option(
        "", "comma-separated attributes to condition on, numeric columns of the label file; unknown values are allowed")
    dims: int = option(
        0, "spatial axes: 2 for images, 3 for volumes; 0: those of the data (2 without data)", choices=(0, 1, 2, 3))
    resample_depth: bool = option(False, "also halve the first spatial axis of volumes (guided-diffusion does not)")


@dataclass
class SuperResConfig:
    """Options of an upsampler in addition to `ModelConfig`."""

    SECTION = "super_res"

    large_size: Annotated[int | str, size] = option(256, "size of the high-resolution images, N or HxW", essential="lr")
    small_size: Annotated[int | str, size] = option(64, "size of the low-resolution images", essential="lr")
    cond_noise_steps: int = option(
        0, "noise the low-resolution images in training to a random timestep below this, which is passed to the "
           "network (cascaded diffusion, arXiv:2106.15282, Sec. 4.2); 0: disabled", minimum=0)


@dataclass
class ClassifierConfig:
    """Options of the noise-aware classifier that guides sampling, an `EncoderUNetModel`."""

    classifier_use_fp16: bool = option(False, "run convolutions and attention of the classifier in float16")
    classifier_width: int = option(
        128, "width of the classifier's first level, a multiple of 32", minimum=1, essential="iterations")
    classifier_depth: int = option(2, "residual blocks per level of the classifier", minimum=1)
    classifier_attention_resolutions: Annotated[str, integers] = option(
        "32,16,8", "comma-separated grid sizes of the classifier that have attention")
    classifier_use_scale_shift_norm: bool = option(
        True, "scale and shift norms of the classifier by the timestep embedding instead of adding it")
    classifier_resblock_updown: bool = option(True, "resample inside the residual blocks of the classifier")
    classifier_pool: str = option("attention", "pooling of the last grid of the classifier to logits", choices=POOLS)
    classifier_in_channels: int = option(
        0, "channels of the classifier's input; 0: those of the data (3 without data)", minimum=0)
    classifier_num_classes: int = option(
        0, "classes to discriminate; 0: those of the data or the checkpoint", minimum=0)
    classifier_channel_mult: Annotated[str, numbers] = option(
        "", "comma-separated width of each level in units of classifier_width; empty: by image size, from 64 "
            "up", essential="iterations")
    classifier_dims: int = option(0, "spatial axes; 0: those of the data (2 without data)", choices=(0, 1, 2, 3))
    classifier_resample_depth: bool = option(False, "also halve the first spatial axis of volumes")


# --- Attention ---


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return softmax(q k^T / sqrt(C)) v (Vaswani et al. 2017, Eq. 1); all [N x H x T x C]."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[-2] <= MATMUL_TOKENS:
        # The fused kernel of PyTorch 2.13 takes 2 to 5 times as long here, backward pass included.
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


def count_flops_attn(model, _x, y):
    """Add the operations of attention's two matrix products to `model.total_ops` (a counter for `thop`).

    :param y: the attention's output, [N x (H*C) x T].
    """
    count, channels, tokens = y.shape
    model.total_ops += torch.tensor([2.0 * count * channels * tokens**2], dtype=torch.float64)


class QKVAttention(nn.Module):
    """Attention with channels ordered (q, k, v), then heads."""

    count_flops = staticmethod(count_flops_attn)

    def __init__(self, n_heads):
        super().__init__()
        self.n_heads = n_heads

    def split(self, qkv):
        """Split tokens into queries, keys and values.  [N x T x 3*H*C] -> three of [N x T x H x C]."""
        return qkv.unflatten(2, (3, self.n_heads, -1)).unbind(2)

    def attend_tokens(self, qkv):
        """Return the result of attention for channels-last tokens.  [N x T x 3*H*C] -> [N x T x H*C]."""
        q, k, v = (part.transpose(1, 2) for part in self.split(qkv))
        return attend(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, qkv):
        """[N x 3*H*C x T] -> [N x H*C x T]."""
        return self.attend_tokens(qkv.transpose(1, 2)).transpose(1, 2)


class QKVAttentionLegacy(QKVAttention):
    """Attention with channels ordered by heads, then (q, k, v): the order of most released checkpoints."""

    def split(self, qkv):
        return qkv.unflatten(2, (self.n_heads, 3, -1)).unbind(3)


def pointwise(convolution, tokens):
    """Apply a convolution of kernel size 1 to channels-last tokens [N x T x C], 15% faster than conv1d on CPUs."""
    return F.linear(tokens, convolution.weight.squeeze(-1), convolution.bias)


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a grid, added to the input.

    :raises ValueError: if the channels do not divide into heads.
    """

    def __init__(
        self, channels, num_heads=1, num_head_channels=-1, use_checkpoint=False, use_new_attention_order=False,
        recompute_norms=False,
    ):
        super().__init__()
        if num_head_channels != -1:
            require((
                channels % num_head_channels == 0,
                f"{channels} channels do not divide into heads of {num_head_channels}; change --num_head_channels, or "
                "the width of this level (--num_channels and --channel_mult); a classifier's heads have 64: change "
                "--classifier_width, --classifier_channel_mult or --classifier_attention_resolutions",
            ))
            num_heads = channels // num_head_channels
        require((
            channels % num_heads == 0,
            f"{channels} channels do not divide into {num_heads} heads; change --num_heads (--num_heads_upsample), or "
            "the width of this level (--num_channels, --channel_mult)",
        ))
        self.channels = channels
        self.num_heads = num_heads
        self.use_checkpoint, self.recompute_norms = use_checkpoint, recompute_norms
        self.norm = normalization(channels)
        self.qkv = conv_nd(1, channels, 3 * channels, 1)
        self.attention = (QKVAttention if use_new_attention_order else QKVAttentionLegacy)(num_heads)
        self.proj_out = zero_module(conv_nd(1, channels, channels, 1))

    def forward(self, x):
        """[N x C x ...] -> same."""
        return checkpoint(self._residual, (x,), self.parameters(), self.use_checkpoint)

    def _residual(self, x):
        # The backward pass of a linear layer does not need its output, so only the norm has to be recomputed.
        qkv = checkpoint(self._project, (x,), self.qkv.parameters(), self.recompute_norms and torch.is_grad_enabled())
        mixed = self.attention.attend_tokens(qkv)
        return x + pointwise(self.proj_out, mixed).transpose(1, 2).reshape(x.shape)

    def _project(self, x):
        tokens = self.norm(x).flatten(2).transpose(1, 2).contiguous()   # otherwise the bias takes a second pass
        return pointwise(self.qkv, tokens)                              # [N x T x 3*C]


class AttentionPool2d(nn.Module):
    """Pool a grid by the attention of its mean, as CLIP does (Radford et al. 2021, arXiv:2103.00020, Sec. 2.4).

    :param spacial_dim: size of the grid: one number for a square, or one per axis.
    :raises ValueError: if the channels do not divide into heads, or for an input of another size.
    """

    def __init__(self, spacial_dim, embed_dim, num_heads_channels, output_dim=None):
        super().__init__()
        require((
            num_heads_channels >= 1 and embed_dim % max(num_heads_channels, 1) == 0,
            f"num_head_channels must divide the {embed_dim} channels of the attention pool, got {num_heads_channels}; "
            "set a divisor, or another --classifier_pool",
        ))
        self.grid = spacial_dim if isinstance(spacial_dim, tuple) else (spacial_dim, spacial_dim)
        self.positional_embedding = nn.Parameter(torch.randn(embed_dim, math.prod(self.grid) + 1) / embed_dim**0.5)
        self.qkv_proj = conv_nd(1, embed_dim, 3 * embed_dim, 1)
        self.c_proj = conv_nd(1, embed_dim, output_dim or embed_dim, 1)
        self.num_heads = embed_dim // num_heads_channels
        self.attention = QKVAttention(self.num_heads)

    def forward(self, x):
        """[N x C x *grid] -> [N x output_dim]."""
        if tuple(x.shape[2:]) != self.grid:
            raise ValueError(
                f"the attention pool expects a last grid of {self.grid}, got {tuple(x.shape[2:])}; set --image_size to "
                "the size of the input, or set another --classifier_pool"
            )
        tokens = x.flatten(2).transpose(1, 2)                   # [N x T x C]
        tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
        tokens = tokens + self.positional_embedding.t().to(tokens.dtype)
        pooled = self.attention.attend_tokens(pointwise(self.qkv_proj, tokens))
        return pointwise(self.c_proj, pooled[:, 0])


# --- Residual blocks ---


class TimestepBlock(nn.Module, ABC):
    """A module whose `forward` takes the time embedding as its second argument."""

    @abstractmethod
    def forward(self, x, emb):
        """Apply the module to `x` [N x C x ...] at the timesteps embedded in `emb` [N x E]."""


class TimestepEmbedSequential(nn.Sequential, TimestepBlock):
    """A chain of modules that passes the time embedding to those that accept it."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, TimestepBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Upsample by 2 (nearest), then convolve if `use_conv`; volumes keep axis 0 unless `resample_depth`."""

    def __init__(self, channels, use_conv, dims=2, out_channels=None, resample_depth=False):
        super().__init__()
        self.channels = channels
        self.factors = resampling_factors(dims, resample_depth)
        self.conv = conv_nd(dims, channels, out_channels or channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x):
        _require_channels(self, x)
        if isinstance(self.conv, nn.Identity) or x[0].numel() < TRANSPOSED_MIN_POSITIONS * self.channels:
            return self.conv(upsample_nearest(x, self.factors))
        return upsample_conv(self.conv, x, self.factors)


class Downsample(nn.Module):
    """Downsample by 2 with a strided convolution or average pooling; volumes keep axis 0 unless `resample_depth`.

    :raises ValueError: if pooling (`use_conv=False`) would have to change the number of channels.
    """

    def __init__(self, channels, use_conv, dims=2, out_channels=None, resample_depth=False):
        super().__init__()
        self.channels = channels
        factors = resampling_factors(dims, resample_depth)
        if use_conv:
            self.op = conv_nd(dims, channels, out_channels or channels, 3, stride=factors, padding=1)
        elif out_channels in (None, channels):
            self.op = avg_pool_nd(dims, kernel_size=factors, stride=factors)
        else:
            raise ValueError(f"average pooling keeps {channels} channels, got out_channels={out_channels}; set "
                             "use_conv=True")

    def forward(self, x):
        _require_channels(self, x)
        return self.op(x)


def _require_channels(module, x):
    if x.shape[1] != module.channels:
        raise ValueError(f"{type(module).__name__} expects {module.channels} channels, got shape {tuple(x.shape)}")


class ResBlock(TimestepBlock):
    """Two convolutions, conditioned on the timestep in between, added to the input.

    :param use_conv: change the number of channels on the skip path with kernel size 3 instead of 1.
    :param use_scale_shift_norm: the embedding scales and shifts the output of the second norm (adaptive group norm,
        ADM, Sec. 3, Eq. 3) instead of being added to its input.
    :param up: upsample by 2; `down`: downsample by 2; both on both paths, before the first convolution.
    :param emb_is_activated: SiLU was already applied to the embedding, once for all blocks.
    """

    def __init__(
        self, channels, emb_channels, dropout, out_channels=None, use_conv=False, use_scale_shift_norm=False, dims=2,
        use_checkpoint=False, up=False, down=False, resample_depth=False, recompute_norms=False,
        emb_is_activated=False,
    ):
        super().__init__()
        out_channels = out_channels or channels
        self.channels, self.out_channels = channels, out_channels
        self.emb_is_activated = emb_is_activated
        self.use_checkpoint, self.recompute_norms = use_checkpoint, recompute_norms
        self.use_scale_shift_norm = use_scale_shift_norm

        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), conv_nd(dims, channels, out_channels, 3, padding=1)
        )
        self.resample = nn.Identity()
        if up or down:
            self.resample = (Upsample if up else Downsample)(channels, False, dims, resample_depth=resample_depth)
        self.emb_layers = nn.Sequential(SiLU(), linear(emb_channels, out_channels * (2 if use_scale_shift_norm else 1)))
        self.out_layers = nn.Sequential(
            normalization(out_channels),
            SiLU(),
            nn.Dropout(p=dropout),
            zero_module(conv_nd(dims, out_channels, out_channels, 3, padding=1)),
        )
        if out_channels == channels:
            self.skip_connection = nn.Identity()
        else:
            kernel = 3 if use_conv else 1
            self.skip_connection = conv_nd(dims, channels, out_channels, kernel, padding=kernel // 2)

    def forward(self, x, emb):
        """[N x C x ...], [N x E] -> [N x out_channels x ...]."""
        return checkpoint(self._residual, (x, emb), self.parameters(), self.use_checkpoint)

    def _residual(self, x, emb):
        norm, _, convolve = self.in_layers
        prepare = lambda groups, x, *weights: self.resample(norm_act(norm, x, subset=(groups, *weights)))
        # Resampling layers check their number of channels, so they cannot be recomputed a few groups at a time.
        h = self._convolve(prepare, norm, convolve, (x,), at_once=not isinstance(self.resample, nn.Identity))

        modulation = (self.emb_layers[-1] if self.emb_is_activated else self.emb_layers)(emb).to(h.dtype)
        modulation = modulation.view(*modulation.shape, *(1,) * (h.dim() - 2))      # [N x C x 1 ...]
        norm, _, dropout, convolve = self.out_layers
        random = dropout.p > 0 and self.training
        if self.use_scale_shift_norm:
            modulated = lambda groups, h, scale, shift, *weights: dropout(
                norm_act(norm, h, scale, shift, (groups, *weights))
            )
            h = self._convolve(modulated, norm, convolve, (h, *modulation.chunk(2, dim=1)), random=random)
        else:
            biased = lambda groups, h, shift, *weights: dropout(norm_act(norm, h + shift, subset=(groups, *weights)))
            h = self._convolve(biased, norm, convolve, (h, modulation), random=random)
        return self.skip_connection(self.resample(x)) + h

    def _convolve(self, cheap, norm, convolve, inputs, **how):
        weights = norm.weight, norm.bias
        if self.recompute_norms:
            return recomputed_conv(cheap, convolve, inputs, weights, norm.num_groups, **how)
        return convolve(cheap(norm.num_groups, *inputs, *weights))


# --- Networks ---


@dataclass(frozen=True)
class _Blocks:
    """Build the blocks of one network from their common options."""

    emb_channels: int
    dropout: float
    conv_resample: bool
    dims: int
    use_checkpoint: bool
    recompute_norms: bool
    num_head_channels: int
    use_scale_shift_norm: bool
    resblock_updown: bool
    use_new_attention_order: bool
    resample_depth: bool

    def residual(self, channels, out_channels, **resampling):
        return ResBlock(
            channels, self.emb_channels, self.dropout, out_channels, use_scale_shift_norm=self.use_scale_shift_norm,
            dims=self.dims, use_checkpoint=self.use_checkpoint, resample_depth=self.resample_depth,
            recompute_norms=self.recompute_norms, emb_is_activated=True, **resampling,
        )

    def attention(self, channels, num_heads):
        return AttentionBlock(
            channels, num_heads, self.num_head_channels, self.use_checkpoint, self.use_new_attention_order,
            self.recompute_norms,
        )

    def halve(self, channels):
        if self.resblock_updown:
            return self.residual(channels, channels, down=True)
        return Downsample(channels, self.conv_resample, self.dims, resample_depth=self.resample_depth)

    def double(self, channels):
        if self.resblock_updown:
            return self.residual(channels, channels, up=True)
        return Upsample(channels, self.conv_resample, self.dims, resample_depth=self.resample_depth)

    def contracting(self, in_channels, widths, num_res_blocks, attention_factors, num_heads):
        """Return the blocks of the downsampling path and the output channels of each."""
        sections, skips = [[conv_nd(self.dims, in_channels, widths[0], 3, padding=1)]], [widths[0]]
        for level, width in enumerate(widths):
            if level:
                sections.append([self.halve(skips[-1])])
                skips.append(skips[-1])
            for _ in range(num_res_blocks):
                attention = [self.attention(width, num_heads)] if 2**level in attention_factors else []
                sections.append([self.residual(skips[-1], width), *attention])
                skips.append(width)
        return nn.ModuleList(TimestepEmbedSequential(*section) for section in sections), skips

    def middle(self, channels, num_heads):
        """Return the blocks of the coarsest grid: two residual blocks around attention."""
        before, after = self.residual(channels, channels), self.residual(channels, channels)
        return TimestepEmbedSequential(before, self.attention(channels, num_heads), after)

    def expanding(self, skips, widths, num_res_blocks, attention_factors, num_heads):
        """Return the blocks of the upsampling path; each also receives the output of a downsampling block."""
        sections, channels, waiting = [], skips[-1], list(skips)
        for level, width in reversed(list(enumerate(widths))):
            for repeat in range(num_res_blocks + 1):
                section = [self.residual(channels + waiting.pop(), width)]
                channels = width
                if 2**level in attention_factors:
                    section.append(self.attention(width, num_heads))
                if level and repeat == num_res_blocks:
                    section.append(self.double(width))
                sections.append(TimestepEmbedSequential(*section))
        return nn.ModuleList(sections)


class AttributeEmbedding(nn.Module):
    """Embed A numbers per sample, each by a network of its own, an unknown one (NaN) by a learned vector.

    The result is the sum over the attributes.  [N x A] -> [N x width].
    """

    def __init__(self, count, width):
        super().__init__()
        self.known = nn.ModuleList(nn.Sequential(linear(1, width), SiLU(), linear(width, width)) for _ in range(count))
        self.unknown = nn.Parameter(torch.zeros(count, width))

    def forward(self, values):
        filled = values.nan_to_num(0.0).to(self.unknown.dtype)
        columns = zip(self.known, self.unknown, filled.split(1, dim=1), values.isnan().split(1, dim=1))
        return sum(torch.where(is_unknown, null, embed(value)) for embed, null, value, is_unknown in columns)


class _TimeConditionedNetwork(nn.Module):
    """The common parts of UNet and classifier: the time embedding, and the dtype of the inner layers."""

    def _init_time_embedding(self, model_channels):
        self.model_channels = model_channels
        self.time_embed = nn.Sequential(
            linear(model_channels, 4 * model_channels), SiLU(), linear(4 * model_channels, 4 * model_channels)
        )

    def embed(self, timesteps):
        """Return the embedding of (possibly fractional) timesteps.  [N] -> [N x 4 * model_channels]."""
        waves = timestep_embedding(timesteps, self.model_channels)
        return self.time_embed(waves.to(self.time_embed[0].weight.dtype))

    @property
    def dtype(self):
        """The intended dtype of the torso: float16 with `use_fp16`, otherwise that of its weights."""
        return torch.float16 if self.use_fp16 else self.torso_dtype

    @property
    def torso_dtype(self):
        """The current dtype of the torso's weights."""
        return self.input_blocks[0][0].weight.dtype

    def convert_to_fp16(self):
        """Cast convolutions and attention of all inner blocks to float16; norms and embeddings stay float32."""
        self._cast_torso(torch.float16)

    def convert_to_bf16(self):
        """Cast them to bfloat16, which has the range of float32 and is also fast on CPUs."""
        self._cast_torso(torch.bfloat16)

    def convert_to_fp32(self):
        """Cast them back to float32; the rounding to half precision remains."""
        self._cast_torso(torch.float32)

    def _cast_torso(self, dtype):
        for name in ("input_blocks", "middle_block", "output_blocks"):
            if hasattr(self, name):
                cast_convolutions(getattr(self, name), dtype)

    def _finish(self, x, h):
        """Apply the last layers in their own dtype and return the result in the dtype of the input `x`."""
        return self.out(h.to(next(self.out.parameters()).dtype)).to(x.dtype)


class UNetModel(_TimeConditionedNetwork):
    """Predict the noise (and, with twice as many output channels, the variances) of x_t at timestep t.

    :param image_size: size of the grid, recorded only: the network runs at other sizes as well.
    :param in_channels: channels of the input.
    :param model_channels: base width; its product with each of `channel_mult` must be a multiple of 32.
    :param out_channels: channels of the output.
    :param num_res_blocks: residual blocks per level.
    :param attention_resolutions: downsampling factors with attention: 4 is the third level.
    :param dropout: probability of dropping a feature in training.
    :param channel_mult: width of each level in units of `model_channels`; its length is the number of levels.
    :param conv_resample: resample by learned convolutions instead of pooling and nearest neighbors.
    :param dims: spatial axes, 1 to 3.
    :param num_classes: number of classes to condition on; None: unconditional.
    :param num_attributes: number of continuous attributes to condition on.
    :param use_checkpoint: recompute blocks in the backward pass.
    :param recompute_norms: recompute only norms, activations and dropout.
    :param use_fp16: recorded for the caller, who has to call `convert_to_fp16`.
    :param num_heads: attention heads if `num_head_channels` is -1.
    :param num_head_channels: channels per head.
    :param num_heads_upsample: heads in the upsampling path; -1: same as `num_heads`.
    :param use_scale_shift_norm: scale and shift norms by the embedding.
    :param resblock_updown: resample inside residual blocks.
    :param use_new_attention_order: see `QKVAttention`.
    :param resample_depth: volumes: downsample the first spatial axis as well.
    :param condition_channels: channels of an image or label map that is concatenated to the input.
    """

    def __init__(
        self, image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout=0,
        channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, num_classes=None, use_checkpoint=False, use_fp16=False,
        num_heads=1, num_head_channels=-1, num_heads_upsample=-1, use_scale_shift_norm=False, resblock_updown=False,
        use_new_attention_order=False, resample_depth=False, recompute_norms=False, condition_channels=0,
        num_attributes=0,
    ):
        super().__init__()
        blocks = _Blocks(
            4 * model_channels, dropout, conv_resample, dims, use_checkpoint, recompute_norms, num_head_channels,
            use_scale_shift_norm, resblock_updown, use_new_attention_order, resample_depth,
        )
        widths = [int(mult * model_channels) for mult in channel_mult]
        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.image_size, self.use_fp16 = image_size, use_fp16
        self.in_channels, self.out_channels, self.num_classes = in_channels, out_channels, num_classes
        self.condition_channels, self.num_attributes = condition_channels, num_attributes
        factors = resampling_factors(dims, resample_depth)
        self.spatial_divisors = tuple(factor ** (len(widths) - 1) for factor in factors)

        self._init_time_embedding(model_channels)
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, 4 * model_channels)
        if num_attributes:
            self.attribute_emb = AttributeEmbedding(num_attributes, 4 * model_channels)
        self.input_blocks, skips = blocks.contracting(
            in_channels + condition_channels, widths, num_res_blocks, attention_resolutions, num_heads
        )
        self.middle_block = blocks.middle(widths[-1], num_heads)
        self.output_blocks = blocks.expanding(skips, widths, num_res_blocks, attention_resolutions, heads_up)
        last = zero_module(conv_nd(dims, widths[0], out_channels, 3, padding=1))
        self.out = nn.Sequential(normalization(widths[0]), SiLU(), last)

    def forward(self, x, timesteps, y=None, condition=None, attributes=None):
        """Apply the network.  x [N x C x ...], timesteps [N], y [N] class indices -> [N x out_channels x ...].

        :param condition: [N x condition_channels x ...] on the grid of x.
        :param attributes: normalized values [N x A], NaN where they are unknown; None: all are.
        :raises ValueError: if labels or a condition are missing or unexpected, attributes are unexpected, or the levels
            do not divide the grid.
        """
        return self._denoise(self._concatenate(x, condition), self._embed_conditioning(timesteps, y, attributes))

    def _concatenate(self, x, condition):
        """Return the input with its condition, if the network has one.  [N x C x ...] -> [N x C + K x ...]"""
        expected = (len(x), self.condition_channels, *x.shape[2:])
        found = (len(x), 0, *x.shape[2:]) if condition is None else tuple(condition.shape)
        require((found == expected, f"condition: expected shape {expected}, got {found}; a network that was trained "
                 "with --condition_dir requires it, no other one has a condition"))
        return x if condition is None else torch.cat([x, condition.to(x.dtype)], dim=1)

    def _embed_conditioning(self, timesteps, y, attributes=None):
        """Return the embedding of timesteps, classes and attributes.  [N], [N], [N x A] -> [N x E]."""
        self._require_labels(y, len(timesteps))
        emb = self.embed(timesteps)
        if y is not None:
            emb = emb + self.label_emb(y)
        expected = len(timesteps), self.num_attributes
        if attributes is not None and attributes.shape != expected:
            raise ValueError(f"attributes: expected {self.num_attributes} per sample (--condition_on), shape "
                             f"{expected}, got {tuple(attributes.shape)}")
        if not self.num_attributes:
            return emb
        return emb + self.attribute_emb(emb.new_full(expected, math.nan) if attributes is None else attributes)

    def _denoise(self, x, emb):
        self.require_grid(x.shape[2:])
        emb = F.silu(emb)       # once here instead of once in every block
        h, skips = x.to(self.torso_dtype), []
        for block in self.input_blocks:
            h = block(h, emb)
            skips.append(h)
        h = self.middle_block(h, emb)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return self._finish(x, h)

    def _require_labels(self, y, count):
        if self.num_classes is None:
            if y is not None:
                raise ValueError("the network has no classes, got labels y; omit y, or set --class_cond True")
        elif y is None:
            raise ValueError(
                f"the network is conditioned on {self.num_classes} classes, got no labels y; pass one per sample, or "
                "set --class_cond False"
            )
        elif y.shape != (count,):
            raise ValueError(f"labels y: expected one class per sample, shape ({count},), got {tuple(y.shape)}")

    def require_grid(self, grid):
        """Check that the levels divide the sizes of a grid.

        :raises ValueError: otherwise, with the nearest sizes.
        """
        for axis, (length, step) in enumerate(zip(grid, self.spatial_divisors)):
            if length % step:
                below = length - length % step
                nearest = f"{below} or {below + step}" if below else str(step)
                raise ValueError(
                    f"spatial axis {axis} has size {length}: expected a multiple of {step}, by which the levels "
                    f"downsample it; use fewer levels (--channel_mult), or data of size {nearest}"
                )


class SuperResModel(UNetModel):
    """A UNet conditioned on a low-resolution image, which is upsampled linearly and concatenated to the input.

    :param in_channels: channels of the data; the low-resolution image has as many.
    :param noised_condition: condition also on the timestep to which the low-resolution image was diffused.
    """

    def __init__(self, image_size, in_channels, *args, noised_condition=False, **kwargs):
        super().__init__(image_size, 2 * in_channels, *args, **kwargs)
        self.noised_condition = noised_condition
        if noised_condition:
            width = 4 * self.model_channels
            last = zero_module(linear(width, width))    # at first this timestep has no effect
            self.low_res_embed = nn.Sequential(linear(self.model_channels, width), SiLU(), last)

    def forward(self, x, timesteps, low_res=None, low_res_times=None, y=None, attributes=None):
        """x [N x C x ...], low_res [N x C x smaller ...], low_res_times [N] (None: 0); otherwise as in `UNetModel`.

        :raises ValueError: if `low_res` is missing, or `low_res_times` is passed without `noised_condition`.
        """
        if low_res is None:
            raise ValueError("an upsampler requires low-resolution images (low_res); set --base_samples")
        upsampled = resize_linear(low_res, x.shape[2:]).to(x.dtype)
        emb = self._embed_conditioning(timesteps, y, attributes)
        if self.noised_condition:
            low_res_times = torch.zeros_like(timesteps) if low_res_times is None else low_res_times
            waves = timestep_embedding(low_res_times, self.model_channels)
            emb = emb + self.low_res_embed(waves.to(emb.dtype))
        elif low_res_times is not None:
            raise ValueError("this upsampler was trained on low-resolution images without noise (--cond_noise_steps "
                             "0); set --cond_noise_level 0")
        return self._denoise(torch.cat([x, upsampled], dim=1), emb)


class EncoderUNetModel(_TimeConditionedNetwork):
    """Map x_t and its timestep to one vector, such as class logits: the downsampling path of the UNet, and a pool.

    The arguments are those of `UNetModel`, and:

    :param image_size: size of the grid: one number, or one per axis; fixed for the "attention" pool.
    :param num_heads_upsample: not used, as there is no upsampling path.
    :param pool: "adaptive" averages the last grid, "attention" attends to it, "spatial" and "spatial_v2" average the
        grids of all levels.
    :raises NotImplementedError: for another pool.
    """

    def __init__(
        self, image_size, in_channels, model_channels, out_channels, num_res_blocks, attention_resolutions, dropout=0,
        channel_mult=(1, 2, 4, 8), conv_resample=True, dims=2, use_checkpoint=False, use_fp16=False, num_heads=1,
        num_head_channels=-1, num_heads_upsample=-1, use_scale_shift_norm=False, resblock_updown=False,
        use_new_attention_order=False, pool="adaptive", resample_depth=False, recompute_norms=False,
    ):
        super().__init__()
        blocks = _Blocks(
            4 * model_channels, dropout, conv_resample, dims, use_checkpoint, recompute_norms, num_head_channels,
            use_scale_shift_norm, resblock_updown, use_new_attention_order, resample_depth,
        )
        widths = [int(mult * model_channels) for mult in channel_mult]
        self.image_size, self.use_fp16, self.pool = image_size, use_fp16, pool
        self.in_channels, self.out_channels = in_channels, out_channels

        self._init_time_embedding(model_channels)
        self.input_blocks, skips = blocks.contracting(
            in_channels, widths, num_res_blocks, attention_resolutions, num_heads
        )
        self.middle_block = blocks.middle(widths[-1], num_heads)
        factors = resampling_factors(dims, resample_depth)
        grid = tuple(n // f ** (len(widths) - 1) for n, f in zip(per_axis(image_size, dims), factors))
        self.out = _pool(pool, dims, grid, widths[-1], sum(skips) + widths[-1], num_head_channels, out_channels)

    def forward(self, x, timesteps):
        """Apply the network.  x [N x C x ...], timesteps [N] -> [N x out_channels]."""
        emb = F.silu(self.embed(timesteps))
        h, averages = x.to(self.torso_dtype), []
        for block in (*self.input_blocks, self.middle_block):
            h = block(h, emb)
            if self.pool.startswith("spatial"):
                averages.append(h.to(x.dtype).flatten(2).mean(dim=2))
        return self._finish(x, torch.cat(averages, dim=1) if averages else h)


def _pool(name, dims, grid, channels, all_channels, num_head_channels, out_channels):
    """Return the last layers of `EncoderUNetModel`; `all_channels` is the sum over the averages of all levels."""
    if name == "adaptive":
        last = zero_module(conv_nd(dims, channels, out_channels, 1))
        return nn.Sequential(normalization(channels), SiLU(), adaptive_avg_pool_nd(dims, 1), last, nn.Flatten())
    if name == "attention":
        pool = AttentionPool2d(grid, channels, num_head_channels, out_channels)
        return nn.Sequential(normalization(channels), SiLU(), pool)
    if name == "spatial":
        hidden = (nn.ReLU(),)
    elif name == "spatial_v2":
        hidden = (normalization(SPATIAL_WIDTH), SiLU())
    else:
        raise NotImplementedError(f"--classifier_pool must be one of {', '.join(POOLS)}, got {name!r}")
    return nn.Sequential(linear(all_channels, SPATIAL_WIDTH), *hidden, linear(SPATIAL_WIDTH, out_channels))
