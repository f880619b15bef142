"""Hand models to diffusers: folders that it loads, verified before they are written.

diffusers' networks differ from ours in what they can be, not in what they compute, so weights are renamed and
rearranged, and an export whose outputs differ from the original's is refused.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import autoencoder, unet
from ..config import option
from ..gaussian_diffusion import get_named_beta_schedule
from ..vae import blocks

FORMATS = ("safetensors", "diffusers")
MAX_RELATIVE_DIFFERENCE = 1e-4   # of what an export computes from the original, relative to the largest value


@dataclass
class ExportConfig:
    model_path: str = option("", "a run folder of this project (its slowest average is taken) or one weights file of it")
    format: str = option("safetensors", "safetensors: the weights with their header in one file; diffusers: a folder "
                                     "for from_pretrained, with an autoencoder, or a pipeline of UNet, scheduler and "
                                     "autoencoder",
                      choices=FORMATS)
    out: str = option("", "the file or folder to write")


def _check_supported(agreements):
    """Raise ValueError naming the first of (holds, what is in the way) that does not hold."""
    for holds, problem in agreements:
        if not holds:
            raise ValueError(f"this model has no counterpart in diffusers: {problem}; export it with --format "
                             "safetensors")


def _require_equal(what, ours, theirs):
    difference = (ours - theirs).abs().max().item() / max(ours.abs().max().item(), 1e-12)
    if not difference <= MAX_RELATIVE_DIFFERENCE:
        raise ValueError(f"the exported {what} differs from the original by {difference:.2g} of its largest value; it "
                         "was not written: please report this model's configuration")


def autoencoder_to_diffusers(network, config, scale_factor, normalizer=None):
    """Return a diffusers AutoencoderKL that computes what our `AutoencoderKL` does; verified on random pictures.

    MONAI's networks have no activation before their last convolutions, diffusers' have SiLU there. As silu(x) -
    silu(-x) = x, every channel inside gets a copy, and the last norm turns the copies around: the same function, in a
    network of twice the width. A group of a norm holds channels beside their copies, which leaves its statistics as
    they are. Blocks that diffusers has beyond ours become identities.

    :param config: the AutoencoderConfig of the network.
    :param normalizer: a LatentNormalizer to work into the network, whose latents are then x0, with scaling_factor 1.
    :raises ValueError: for volumes, strides other than 2 and whatever else has no counterpart.
    """
    from diffusers import AutoencoderKL

    levels = len(config.num_channels)
    _check_supported([
        (config.spatial_dims == 2, f"it works on {config.spatial_dims} axes, not on pictures"),
        (network.factors == (2 ** (levels - 1),) * 2 and config.initial_downsample_factor == 1,
         f"it shrinks pictures by {network.factors} over {levels} levels, not by 2 from each level to the next"),
        (config.downsample_kernel_size in (0, 3),
         f"its strided convolutions have {config.downsample_kernel_size} taps"),
        (not config.use_convtranspose, "it upsamples by transposed convolution"),
        (not config.space_to_channel, "it has shortcuts between space and channels"),
        (config.norm_eps == 1e-6, f"its norms add {config.norm_eps}, not 1e-6, to the variance"),
        (tuple(config.image_range) == (-1.0, 1.0),
         f"black and white are {tuple(config.image_range)} inside, not -1 and 1"),
    ])
    attends = autoencoder.per_level(config.attention_levels or False, levels)
    repeats = autoencoder.per_level(config.num_res_blocks, levels)
    middle = config.with_encoder_nonlocal_attn, config.with_decoder_nonlocal_attn
    theirs = AutoencoderKL(
        in_channels=network.in_channels, out_channels=network.out_channels, latent_channels=network.latent_channels,
        block_out_channels=[2 * width for width in config.num_channels], layers_per_block=max(repeats),
        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        up_block_types=["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        norm_num_groups=config.norm_num_groups, mid_block_add_attention=any(middle),
        scaling_factor=1.0 if normalizer else scale_factor, sample_size=16 * 2 ** (levels - 1),
    ).eval()
    state = {name: torch.zeros_like(value) for name, value in theirs.state_dict().items()}
    for side, blocks, with_middle in (("encoder", network.encoder.blocks, middle[0]),
                                      ("decoder", network.decoder.blocks, middle[1])):
        names = _diffusers_block_names(side, list(zip(repeats, attends)), with_middle)
        for name, block in zip(names, blocks, strict=True):
            _write_block(state, f"{side}.{name}", block)
    _write_latents(state, network, scale_factor, normalizer)
    theirs.load_state_dict(state)

    x = torch.rand(2, network.in_channels, *(4 * factor for factor in network.factors)) * 2 - 1
    with torch.no_grad():
        mean, logvar = network.moments(x)
        posterior = theirs.encode(x).latent_dist
        scale, shift = _affine(network, scale_factor, normalizer)
        _require_equal("encoder", mean * scale + shift, posterior.mean)
        _require_equal("posterior", logvar + 2 * scale.log(), posterior.logvar)
        _require_equal("decoder", network.decode(mean), theirs.decode(posterior.mean).sample)
    return theirs


def _diffusers_block_names(side, levels, with_middle):
    """Return what diffusers calls the blocks of an encoder or a decoder, in our order.

    :param levels: of each level how many residual blocks it has, and whether they attend.
    """
    blocks, steps = ("down_blocks", "downsamplers") if side == "encoder" else ("up_blocks", "upsamplers")
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"] if with_middle else []
    inside = []
    for i, (repeats, attends) in enumerate(levels if side == "encoder" else levels[::-1]):
        for r in range(repeats):
            inside += [f"{blocks}.{i}.resnets.{r}"] + [f"{blocks}.{i}.attentions.{r}"] * attends
        inside += [f"{blocks}.{i}.{steps}.0"] * (i + 1 < len(levels))
    inside = inside + middle if side == "encoder" else middle + inside
    return ["conv_in", *inside, "conv_norm_out", "conv_out"]


def _write_block(state, name, block):
    """Write one of our blocks under diffusers' name, every channel inside beside its copy."""
    if name.endswith("conv_in"):
        _write(state, name, _duplicate_channels(block.conv.weight, rows=True), _duplicate_channels(block.conv.bias))
    elif name.endswith("conv_norm_out"):
        turned = torch.tensor([1.0, -1.0]).repeat(len(block.weight))
        _write(state, name, _duplicate_channels(block.weight) * turned, _duplicate_channels(block.bias) * turned)
    elif name.endswith("conv_out"):
        difference = torch.tensor([1.0, -1.0]).repeat(block.conv.in_channels).view(-1, 1, 1)
        weight = block.conv.weight.repeat_interleave(2, 1) * difference
        moments = 2 if name.startswith("encoder") else 1    # mean and log-variance are told apart by quant_conv
        _write(state, name, weight.repeat(moments, 1, 1, 1), block.conv.bias.repeat(moments))
    elif isinstance(block, blocks.ResBlock):
        for norm in ("norm1", "norm2"):
            _write(state, f"{name}.{norm}", *(_duplicate_channels(p) for p in getattr(block, norm).parameters()))
        for ours, theirs in (("conv1", "conv1"), ("conv2", "conv2"), ("nin_shortcut", "conv_shortcut")):
            for conv in getattr(block, ours).children():
                _write(state, f"{name}.{theirs}", _duplicate_channels(conv.weight, rows=True, columns=True), _duplicate_channels(conv.bias))
    elif isinstance(block, blocks.Attention):
        _write(state, f"{name}.group_norm", _duplicate_channels(block.norm.weight), _duplicate_channels(block.norm.bias))
        for ours, theirs in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("proj_attn", "to_out.0")):
            layer = getattr(block, ours)
            # Copies double the products of queries and keys, of which twice the width takes a root of 2 away.
            gain = 0.5**0.5 if ours == "to_q" else 1.0
            _write(state, f"{name}.{theirs}", gain * _duplicate_channels(layer.weight, rows=True, columns=True),
                   gain * _duplicate_channels(layer.bias))
    else:  # Downsample and Upsample, whose convolutions lie one level apart
        conv = block.conv.conv
        _write(state, f"{name}.conv", _duplicate_channels(conv.weight, rows=True, columns=True), _duplicate_channels(conv.bias))


def _duplicate_channels(values, rows=True, columns=False):
    """Put a copy beside every channel: of outputs (rows), and of inputs (columns), which then count half each."""
    values = values.repeat_interleave(2, 0) if rows else values
    return values.repeat_interleave(2, 1) / 2 if columns else values


def _write(state, name, weight, bias):
    for key, value in ((f"{name}.weight", weight), (f"{name}.bias", bias)):
        if state[key].shape != value.shape:
            raise ValueError(f"{key} has shape {tuple(state[key].shape)} in diffusers, {tuple(value.shape)} here")
        state[key] = value.detach().clone()


def _affine(network, scale_factor, normalizer):
    """Return (scale, shift), each [Z x 1 x 1], from z to what the exported encoder gives."""
    scale, shift = torch.ones(network.latent_channels), torch.zeros(network.latent_channels)
    if normalizer is not None:
        std, mean = (torch.tensor(v).expand(network.latent_channels) for v in (normalizer.std, normalizer.shift))
        scale, shift = scale_factor / std, -mean / std
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)


def _write_latents(state, network, scale_factor, normalizer):
    """Write the convolutions around the latents, with the change of scale worked in."""
    scale, shift = (v.flatten() for v in _affine(network, scale_factor, normalizer))
    mu, log_sigma, back = network.quant_conv_mu.conv, network.quant_conv_log_sigma.conv, network.post_quant_conv.conv
    mean = mu.weight * scale.view(-1, 1, 1, 1)
    nothing = torch.zeros_like(mean)
    weight = torch.cat([torch.cat([mean, nothing], 1), torch.cat([nothing, log_sigma.weight], 1)])
    bias = torch.cat([mu.bias * scale + shift, log_sigma.bias + 2 * scale.log()])
    _write(state, "quant_conv", weight, bias)
    undone = back.weight / scale.view(1, -1, 1, 1)
    _write(state, "post_quant_conv", undone, back.bias - (undone * shift.view(1, -1, 1, 1)).sum((1, 2, 3)))


def unet_to_diffusers(network, flags):
    """Return a diffusers UNet2DModel that computes what our `UNetModel` does; verified on random data.

    :param flags: the "model" flags of the network's header, a dictionary.
    :raises ValueError: where the architectures do not agree, naming the flag.
    """
    from diffusers import UNet2DModel

    repeats = flags["num_res_blocks"]
    levels = [network.input_blocks[first] for first in range(1, len(network.input_blocks), repeats + 1)]
    widths = [level[0].out_channels for level in levels]
    attends = [any(isinstance(block, unet.AttentionBlock) for block in level) for level in levels]
    heads = {block.channels // block.num_heads for block in network.modules() if isinstance(block, unet.AttentionBlock)}
    _check_supported([
        (type(network) is unet.UNetModel, "it is an upsampler, which is told small pictures too"),
        (len(network.spatial_divisors) == 2, f"it works on {len(network.spatial_divisors)} axes, not on pictures"),
        (widths[0] == network.model_channels,
         f"its first level is {widths[0]} wide and its times are embedded in {network.model_channels} numbers "
         "(--channel_mult does not begin with 1)"),
        (len(heads) == 1, f"its attention heads have {sorted(heads)} channels, and diffusers knows one size for all "
                          "(--num_head_channels)"),
    ])
    resampling = "resnet" if flags["resblock_updown"] else "conv"
    plain = "Resnet{}sampleBlock2D" if flags["resblock_updown"] else "{}Block2D"
    theirs = UNet2DModel(
        sample_size=network.image_size, in_channels=network.in_channels, out_channels=network.out_channels,
        block_out_channels=widths, layers_per_block=repeats, dropout=flags["dropout"],
        down_block_types=["AttnDownBlock2D" if a else plain.format("Down") for a in attends],
        up_block_types=["AttnUpBlock2D" if a else plain.format("Up") for a in reversed(attends)],
        downsample_type=resampling, upsample_type=resampling, attention_head_dim=heads.pop(),
        norm_num_groups=32, attn_norm_num_groups=32, norm_eps=1e-5, num_class_embeds=network.num_classes,
        resnet_time_scale_shift="scale_shift" if flags["use_scale_shift_norm"] else "default",
    ).eval()
    state, shapes = unet_state(network, repeats), theirs.state_dict()
    if missing := sorted(shapes.keys() - state.keys()):
        raise ValueError(f"diffusers' UNet2DModel has {missing[0]} and {len(missing) - 1} more that ours has not")
    theirs.load_state_dict({key: value.reshape(shapes[key].shape).clone() for key, value in state.items()})

    x, t = torch.randn(2, network.in_channels, *(2 * step for step in network.spatial_divisors)), torch.tensor([3, 500])
    y = None if network.num_classes is None else torch.tensor([0, network.num_classes - 1])
    with torch.no_grad():
        _require_equal("UNet", network.eval()(x, t, y), theirs(x, t, class_labels=y).sample)
    return theirs


def unet_state(network, repeats):
    """Return {diffusers' key: value} of all weights of a `UNetModel` with so many residual blocks a level.

    1x1 convolutions keep the shape that they have in ours.
    """
    return {key: value.detach() for name, layer in _unet_layers(network, repeats)
            for key, value in _unet_entries(name, layer)}


def _unet_layers(network, repeats):
    """Yield (diffusers' name, layer) of everything in our UNet that has weights."""
    yield "time_embedding.linear_1", network.time_embed[0]
    yield "time_embedding.linear_2", network.time_embed[2]
    if network.num_classes is not None:
        yield "class_embedding", network.label_emb
    down, up = iter(network.input_blocks), iter(network.output_blocks)
    levels = len(network.output_blocks) // (repeats + 1)
    yield "conv_in", next(down)[0]
    for level in range(levels):
        if level:
            yield f"down_blocks.{level - 1}.downsamplers.0", next(down)[0]
        for repeat in range(repeats):
            yield from _section(f"down_blocks.{level}", repeat, next(down))
    before, attention, after = network.middle_block
    yield from (("mid_block.resnets.0", before), ("mid_block.attentions.0", attention), ("mid_block.resnets.1", after))
    for level in range(levels):
        for repeat in range(repeats + 1):
            yield from _section(f"up_blocks.{level}", repeat, next(up))
    yield "conv_norm_out", network.out[0]
    yield "conv_out", network.out[2]


def _section(name, repeat, section):
    yield f"{name}.resnets.{repeat}", section[0]
    for layer in section[1:]:
        of_attention = isinstance(layer, unet.AttentionBlock)
        yield f"{name}.attentions.{repeat}" if of_attention else f"{name}.upsamplers.0", layer


def _unet_entries(name, layer):
    """Yield (key, value) of diffusers' state dict for one of our layers."""
    if isinstance(layer, unet.ResBlock):
        parts = {"norm1": layer.in_layers[0], "conv1": layer.in_layers[2], "time_emb_proj": layer.emb_layers[1],
                 "norm2": layer.out_layers[0], "conv2": layer.out_layers[3], "conv_shortcut": layer.skip_connection}
    elif isinstance(layer, unet.AttentionBlock):
        parts = {"group_norm": layer.norm, "to_out.0": layer.proj_out}
        for key, value in layer.qkv.named_parameters():
            # `split` knows where queries, keys and values lie: taken to rows of weights as it is applied to tokens.
            rows = layer.attention.split(value.flatten(1).T[None] if value.dim() > 1 else value[None, None])
            for i, part in enumerate(("to_q", "to_k", "to_v")):
                flat = rows[i].flatten(2)[0]
                yield f"{name}.{part}.{key}", flat.T if value.dim() > 1 else flat[0]
    elif isinstance(layer, unet.Downsample):
        parts = {"conv": layer.op}
    elif isinstance(layer, unet.Upsample):
        parts = {"conv": layer.conv}
    else:
        parts = {"": layer}
    for part, module in parts.items():
        for key, value in module.named_parameters():
            yield ".".join(filter(None, (name, part, key))), value


def create_scheduler(flags, pixels):
    """Return a diffusers DDPMScheduler with the process that "diffusion" flags describe; others follow `from_config`.

    :raises ValueError: where the network is shown other times than diffusers would show it.
    """
    from diffusers import DDPMScheduler

    steps = flags["diffusion_steps"]
    _check_supported([(not flags["rescale_timesteps"] or steps == 1000,
               f"its times run to 1000 over {steps} steps (--rescale_timesteps)")])
    prediction = "v_prediction" if flags.get("predict_v") else "sample" if flags["predict_xstart"] else "epsilon"
    return DDPMScheduler(
        num_train_timesteps=steps, trained_betas=get_named_beta_schedule(flags["noise_schedule"], steps).tolist(),
        variance_type="learned_range" if flags["learn_sigma"] else "fixed_large", prediction_type=prediction,
        clip_sample=pixels, timestep_spacing="trailing" if flags["noise_schedule"].endswith("_zero_snr") else "leading",
    )


def pipeline_to_diffusers(network, header, codec, normalizer):
    """Return a diffusers pipeline of a diffusion model: DDPMPipeline in pixels, LDMPipeline in latents.

    In latents its autoencoder takes and gives x0 itself, so that nobody has to know the normalizer. A class-conditional
    model loads from it too, and is then asked with `class_labels`, which these pipelines themselves do not pass on.

    :param codec: what the latents were made with; `PixelCodec` for pixels.
    """
    from diffusers import DDPMPipeline, LDMPipeline

    made_by = header["autoencoder"] or {"config": {}}   # nothing is known of a plain folder of latents
    pixels = made_by["config"].get("class") == "PixelCodec"
    theirs = unet_to_diffusers(network, header["model"])
    scheduler = create_scheduler(header["diffusion"], pixels)
    if pixels:
        return DDPMPipeline(unet=theirs, scheduler=scheduler)
    return LDMPipeline(vqvae=codec_to_diffusers(codec, normalizer), unet=theirs, scheduler=scheduler)


def codec_to_diffusers(codec, normalizer=None):
    """Return the diffusers AutoencoderKL of a codec, with a normalizer worked in where one is given."""
    if isinstance(codec.network, autoencoder.AutoencoderKL):
        return autoencoder_to_diffusers(codec.network.cpu(), codec.architecture, codec.scale_factor, normalizer)
    network = codec.network.cpu()
    if normalizer is not None:
        _check_supported([(len(normalizer.std) == 1 and normalizer.shift == [0.0] and not codec.shift_factor,
                   f"its latents are normalised by --normalizer {normalizer.mode}, which {type(network).__name__} "
                   "has no place for")])
        network.register_to_config(scaling_factor=codec.scale_factor / normalizer.std[0])
    return network


def save_folder(model, folder):
    """Have a diffusers model or pipeline write itself into a new folder, which is there whole or not at all."""
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already; give --out another name, or remove it")
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    part.rename(folder)
