"""Convert models to diffusers, verified before they are written.

The networks of diffusers support other architectures, but compute the same functions: weights are renamed and
rearranged, and an export whose outputs differ from the original raises an error.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from ..autoencoder import AutoencoderConfig, AutoencoderKL, per_level
from ..config import option, require
from ..files import write_errors
from ..gaussian_diffusion import get_named_beta_schedule
from ..unet import AttentionBlock, Downsample, ResBlock, UNetModel, Upsample
from ..vae import blocks

FORMATS = ("safetensors", "diffusers")
MAX_RELATIVE_DIFFERENCE = 1e-4   # between the outputs of export and original, relative to the largest value


@dataclass
class ExportConfig:
    model_path: str = option(
        "", "run folder (its EMA weights of the largest decay) or weights file of this project", essential=True)
    format: str = option("safetensors", "safetensors: one file with weights and header; diffusers: a folder for "
                                        "from_pretrained, with an autoencoder, or a pipeline of UNet, scheduler and "
                                        "autoencoder", choices=FORMATS, essential=True)
    out: str = option("", "file or folder to write", essential=True)
    license: str = option("", "license of the weights for the model card, an identifier of the Hugging Face hub such "
                              "as mit or cc-by-nc-4.0; empty: not stated", essential=True)
    metrics: str = option("", "metrics.json of an evaluation for the model card; empty: that of the run folder, if any")


def _check_supported(*rules):
    """Check (holds, property of the model that diffusers does not support otherwise) pairs."""
    require(*((holds, f"this model has no counterpart in diffusers: {problem}; set --format safetensors")
              for holds, problem in rules))


def _check_equal(name, expected, actual):
    difference = (expected - actual).abs().max().item() / max(expected.abs().max().item(), 1e-12)
    require((difference <= MAX_RELATIVE_DIFFERENCE,
             f"the exported {name} differs from the original by {difference:.2g} of its largest value; it was not "
             "written: please report this model's configuration"))


def autoencoder_to_diffusers(network: AutoencoderKL, config: AutoencoderConfig, scale_factor: float, normalizer=None):
    """Return a diffusers AutoencoderKL that computes the same as our `AutoencoderKL`; verified on random images.

    MONAI's networks have no activation before their last convolutions, diffusers' networks apply SiLU there. As
    silu(x) - silu(-x) = x, every inner channel is duplicated and the last norm negates the copies, which gives the same
    function in a network of twice the width. A channel and its copy are in the same group of a norm, whose statistics
    therefore do not change. Additional blocks of diffusers become identities.

    :param normalizer: a LatentNormalizer to fold into the network, whose latents are then x0, with scaling_factor 1.
    :raises ValueError: for volumes, strides other than 2 and other architectures without a counterpart.
    """
    import diffusers

    levels = len(config.num_channels)
    _check_supported(
        (config.spatial_dims == 2, f"it has {config.spatial_dims} spatial axes instead of 2"),
        (network.factors == (2 ** (levels - 1),) * 2 and config.initial_downsample_factor == 1,
         f"it downsamples by {network.factors} over {levels} levels, not by 2 from each level to the next"),
        (config.downsample_kernel_size in (0, 3),
         f"its strided convolutions have kernel size {config.downsample_kernel_size}"),
        (not config.use_convtranspose, "it upsamples by transposed convolution"),
        (not config.space_to_channel, "it has shortcuts between space and channels"),
        (config.norm_eps == 1e-6, f"its norms add {config.norm_eps}, not 1e-6, to the variance"),
        (tuple(config.image_range) == (-1.0, 1.0),
         f"its image_range is {tuple(config.image_range)} instead of (-1, 1)"),
    )
    attends = per_level(config.attention_levels or False, levels)
    repeats = per_level(config.num_res_blocks, levels)
    middle = config.with_encoder_nonlocal_attn, config.with_decoder_nonlocal_attn
    exported = diffusers.AutoencoderKL(
        in_channels=network.in_channels, out_channels=network.out_channels, latent_channels=network.latent_channels,
        block_out_channels=[2 * width for width in config.num_channels], layers_per_block=max(repeats),
        down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
        up_block_types=["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)],
        norm_num_groups=config.norm_num_groups, mid_block_add_attention=any(middle),
        scaling_factor=1.0 if normalizer else scale_factor, sample_size=16 * 2 ** (levels - 1),
    ).eval()
    state = {name: torch.zeros_like(value) for name, value in exported.state_dict().items()}
    for side, half, with_middle in (("encoder", network.encoder, middle[0]), ("decoder", network.decoder, middle[1])):
        names = _diffusers_block_names(side, list(zip(repeats, attends)), with_middle)
        for name, block in zip(names, half.blocks, strict=True):
            _write_block(state, f"{side}.{name}", block)
    _write_latents(state, network, scale_factor, normalizer)
    exported.load_state_dict(state)

    x = torch.rand(2, network.in_channels, *(4 * factor for factor in network.factors)) * 2 - 1
    with torch.no_grad():
        mean, logvar = network.moments(x)
        posterior = exported.encode(x).latent_dist
        scale, shift = _affine(network, scale_factor, normalizer)
        _check_equal("encoder", mean * scale + shift, posterior.mean)
        _check_equal("posterior", logvar + 2 * scale.log(), posterior.logvar)
        _check_equal("decoder", network.decode(mean), exported.decode(posterior.mean).sample)
    return exported


def _diffusers_block_names(side, levels, with_middle):
    """Return diffusers' names of the blocks of an encoder or a decoder, in our order.

    :param levels: (number of residual blocks, whether they attend) per level.
    """
    path, steps = ("down_blocks", "downsamplers") if side == "encoder" else ("up_blocks", "upsamplers")
    middle = ["mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"] if with_middle else []
    inside = []
    for i, (repeats, attends) in enumerate(levels if side == "encoder" else levels[::-1]):
        for r in range(repeats):
            inside += [f"{path}.{i}.resnets.{r}"] + [f"{path}.{i}.attentions.{r}"] * attends
        inside += [f"{path}.{i}.{steps}.0"] * (i + 1 < len(levels))
    inside = inside + middle if side == "encoder" else middle + inside
    return ["conv_in", *inside, "conv_norm_out", "conv_out"]


def _write_block(state, name, block):
    """Write one of our blocks under diffusers' name, with every inner channel duplicated."""
    if name.endswith("conv_in"):
        _write(state, name, _duplicate_channels(block.conv.weight), _duplicate_channels(block.conv.bias))
    elif name.endswith("conv_norm_out"):
        signs = torch.tensor([1.0, -1.0]).repeat(len(block.weight))
        _write(state, name, _duplicate_channels(block.weight) * signs, _duplicate_channels(block.bias) * signs)
    elif name.endswith("conv_out"):
        signs = torch.tensor([1.0, -1.0]).repeat(block.conv.in_channels).view(-1, 1, 1)
        weight = block.conv.weight.repeat_interleave(2, 1) * signs
        moments = 2 if name.startswith("encoder") else 1    # quant_conv separates mean and log-variance
        _write(state, name, weight.repeat(moments, 1, 1, 1), block.conv.bias.repeat(moments))
    elif isinstance(block, blocks.ResBlock):
        for norm in ("norm1", "norm2"):
            _write_duplicated(state, f"{name}.{norm}", getattr(block, norm))
        for own, other in (("conv1", "conv1"), ("conv2", "conv2"), ("nin_shortcut", "conv_shortcut")):
            for conv in getattr(block, own).children():
                _write_duplicated(state, f"{name}.{other}", conv)
    elif isinstance(block, blocks.Attention):
        _write_duplicated(state, f"{name}.group_norm", block.norm)
        for own, other in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("proj_attn", "to_out.0")):
            # Copies double the products of queries and keys; twice the width divides them by the root of 2 only.
            _write_duplicated(state, f"{name}.{other}", getattr(block, own), 0.5**0.5 if own == "to_q" else 1.0)
    else:  # Downsample and Upsample, whose convolutions are at different depths
        _write_duplicated(state, f"{name}.conv", block.conv.conv)


def _write_duplicated(state, name, layer, gain=1.0):
    weight = gain * _duplicate_channels(layer.weight)
    if weight.dim() > 1:    # the inputs are duplicated as well, so each of them counts half
        weight = weight.repeat_interleave(2, 1) / 2
    _write(state, name, weight, gain * _duplicate_channels(layer.bias))


def _duplicate_channels(values):
    """Insert a copy after every output channel."""
    return values.repeat_interleave(2, 0)


def _write(state, name, weight, bias):
    for key, value in ((f"{name}.weight", weight), (f"{name}.bias", bias)):
        require((state[key].shape == value.shape,
                 f"{key} has shape {tuple(state[key].shape)} in diffusers, {tuple(value.shape)} here"))
        state[key] = value.detach().clone()


def _affine(network, scale_factor, normalizer):
    """Return (scale, shift), each [Z x 1 x 1], from z to the latents of the exported encoder."""
    scale, shift = torch.ones(network.latent_channels), torch.zeros(network.latent_channels)
    if normalizer is not None:
        std, mean = (torch.tensor(v).expand(network.latent_channels) for v in (normalizer.std, normalizer.shift))
        scale, shift = scale_factor / std, -mean / std
    return scale.view(-1, 1, 1), shift.view(-1, 1, 1)


def _write_latents(state, network, scale_factor, normalizer):
    """Write the convolutions around the latents, with the change of scale folded in."""
    scale, shift = (v.flatten() for v in _affine(network, scale_factor, normalizer))
    mu, log_sigma, back = network.quant_conv_mu.conv, network.quant_conv_log_sigma.conv, network.post_quant_conv.conv
    mean = mu.weight * scale.view(-1, 1, 1, 1)
    zeros = torch.zeros_like(mean)
    weight = torch.cat([torch.cat([mean, zeros], 1), torch.cat([zeros, log_sigma.weight], 1)])
    bias = torch.cat([mu.bias * scale + shift, log_sigma.bias + 2 * scale.log()])
    _write(state, "quant_conv", weight, bias)
    inverse = back.weight / scale.view(1, -1, 1, 1)
    _write(state, "post_quant_conv", inverse, back.bias - (inverse * shift.view(1, -1, 1, 1)).sum((1, 2, 3)))


def unet_to_diffusers(network: UNetModel, flags: dict):
    """Return a diffusers UNet2DModel that computes the same as our `UNetModel`; verified on random data.

    :param flags: the "model" flags of the network's header.
    :raises ValueError: if the architecture has no counterpart; the message names the flag.
    """
    from diffusers import UNet2DModel

    repeats = flags["num_res_blocks"]
    levels = [network.input_blocks[first] for first in range(1, len(network.input_blocks), repeats + 1)]
    widths = [level[0].out_channels for level in levels]
    attends = [any(isinstance(block, AttentionBlock) for block in level) for level in levels]
    heads = {block.channels // block.num_heads for block in network.modules() if isinstance(block, AttentionBlock)}
    _check_supported(
        (type(network) is UNetModel, "it is an upsampler, which has low-resolution images as a second input"),
        (len(network.spatial_divisors) == 2, f"it has {len(network.spatial_divisors)} spatial axes instead of 2"),
        (widths[0] == network.model_channels,
         f"its first level has {widths[0]} channels and its timestep embedding {network.model_channels} "
         "(--channel_mult does not start with 1)"),
        (not network.num_attributes, "it is conditioned on attributes (--condition_on)"),
        (len(heads) == 1, f"its attention heads have {sorted(heads)} channels instead of one size "
                          "(--num_head_channels)"),
    )
    resampling = "resnet" if flags["resblock_updown"] else "conv"
    plain = "Resnet{}sampleBlock2D" if flags["resblock_updown"] else "{}Block2D"
    exported = UNet2DModel(
        sample_size=network.image_size, in_channels=network.in_channels, out_channels=network.out_channels,
        block_out_channels=widths, layers_per_block=repeats, dropout=flags["dropout"],
        down_block_types=["AttnDownBlock2D" if a else plain.format("Down") for a in attends],
        up_block_types=["AttnUpBlock2D" if a else plain.format("Up") for a in reversed(attends)],
        downsample_type=resampling, upsample_type=resampling, attention_head_dim=heads.pop(),
        norm_num_groups=32, attn_norm_num_groups=32, norm_eps=1e-5, num_class_embeds=network.num_classes,
        resnet_time_scale_shift="scale_shift" if flags["use_scale_shift_norm"] else "default",
    ).eval()
    state, shapes = unet_state(network, repeats), exported.state_dict()
    missing = sorted(shapes.keys() - state.keys())
    require((not missing, f"diffusers' UNet2DModel has weights that are missing here: {', '.join(missing[:3])}"))
    exported.load_state_dict({key: value.reshape(shapes[key].shape).clone() for key, value in state.items()})

    x, t = torch.randn(2, network.in_channels, *(2 * step for step in network.spatial_divisors)), torch.tensor([3, 500])
    y = None if network.num_classes is None else torch.tensor([0, network.num_classes - 1])
    with torch.no_grad():
        _check_equal("UNet", network.eval()(x, t, y), exported(x, t, class_labels=y).sample)
    return exported


def unet_state(network: UNetModel, repeats: int) -> dict[str, torch.Tensor]:
    """Return {diffusers' key: value} of all weights of a `UNetModel` with `repeats` residual blocks per level.

    1x1 convolutions keep their shape.
    """
    return {key: value.detach() for name, layer in _unet_layers(network, repeats)
            for key, value in _unet_entries(name, layer)}


def _unet_layers(network, repeats):
    """Yield (diffusers' name, layer) of all layers of our UNet with weights."""
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
        yield f"{name}.attentions.{repeat}" if isinstance(layer, AttentionBlock) else f"{name}.upsamplers.0", layer


def _unet_entries(name, layer):
    """Yield (key, value) of diffusers' state dict for one of our layers."""
    if isinstance(layer, ResBlock):
        parts = {"norm1": layer.in_layers[0], "conv1": layer.in_layers[2], "time_emb_proj": layer.emb_layers[1],
                 "norm2": layer.out_layers[0], "conv2": layer.out_layers[3], "conv_shortcut": layer.skip_connection}
    elif isinstance(layer, AttentionBlock):
        parts = {"group_norm": layer.norm, "to_out.0": layer.proj_out}
        for key, value in layer.qkv.named_parameters():
            # `split` defines the order of queries, keys and values; it applies to rows of weights as to tokens.
            rows = layer.attention.split(value.flatten(1).T[None] if value.dim() > 1 else value[None, None])
            for i, part in enumerate(("to_q", "to_k", "to_v")):
                flat = rows[i].flatten(2)[0]
                yield f"{name}.{part}.{key}", flat.T if value.dim() > 1 else flat[0]
    elif isinstance(layer, Downsample):
        parts = {"conv": layer.op}
    elif isinstance(layer, Upsample):
        parts = {"conv": layer.conv}
    else:
        parts = {"": layer}
    for part, module in parts.items():
        for key, value in module.named_parameters():
            yield ".".join(filter(None, (name, part, key))), value


def create_scheduler(flags: dict, pixels: bool):
    """Return a diffusers DDPMScheduler of the process that "diffusion" flags describe; others follow `from_config`.

    :raises ValueError: for another process, or one whose network gets other timesteps than diffusers would pass.
    """
    from diffusers import DDPMScheduler

    steps = flags["diffusion_steps"]
    process = flags.get("process", "gaussian")      # models before --process have no entry
    _check_supported(
        (process == "gaussian", f"its diffusion process is {process} (--process)"),
        (not flags["rescale_timesteps"] or steps == 1000,
         f"its timesteps are rescaled to 1000 over {steps} steps (--rescale_timesteps)"),
    )
    own = str(flags.get("timestep_respacing", ""))      # those of a student
    trailing = flags["noise_schedule"].endswith("_zero_snr") or own.startswith("trailing")
    prediction = "v_prediction" if flags.get("predict_v") else "sample" if flags["predict_xstart"] else "epsilon"
    return DDPMScheduler(
        num_train_timesteps=steps, trained_betas=get_named_beta_schedule(flags["noise_schedule"], steps).tolist(),
        variance_type="learned_range" if flags["learn_sigma"] else "fixed_large", prediction_type=prediction,
        clip_sample=pixels, timestep_spacing="trailing" if trailing else "leading",
    )


def pipeline_to_diffusers(network: UNetModel, header: dict, codec, normalizer):
    """Return a diffusers pipeline of a diffusion model: DDPMPipeline in pixels, LDMPipeline in latents.

    The latents of the pipeline's autoencoder are x0, so that the pipeline needs no normalizer. A class-conditional
    model can be loaded from it and called with `class_labels`; these pipelines do not pass labels themselves.
    """
    from diffusers import DDPMPipeline, LDMPipeline

    exported = unet_to_diffusers(network, header["model"])
    scheduler = create_scheduler(header["diffusion"], codec.is_pixels)
    if codec.is_pixels:
        return DDPMPipeline(unet=exported, scheduler=scheduler)
    return LDMPipeline(vqvae=codec_to_diffusers(codec, normalizer), unet=exported, scheduler=scheduler)


def codec_to_diffusers(codec, normalizer=None):
    """Return the diffusers autoencoder of a `VAEInterface`, with the normalizer folded in if there is one."""
    network = codec.network.cpu()
    if codec.architecture is not None:
        return autoencoder_to_diffusers(network, codec.architecture, codec.scale_factor, normalizer)
    _check_supported(("_class_name" in codec.config, f"its autoencoder is of class {codec.config.get('class')}"))
    if normalizer is not None:
        _check_supported((
            len(normalizer.std) == 1 and normalizer.shift == [0.0] and not codec.shift_factor,
            f"its latents are normalized by --normalizer {normalizer.mode}, which {type(network).__name__} cannot "
            "represent",
        ))
        network.register_to_config(scaling_factor=codec.scale_factor / normalizer.std[0])
    return network


def save_folder(model, folder: str | Path, card: str = "") -> None:
    """Save a diffusers model or pipeline as a new folder, atomically, with a model card unless it is empty."""
    folder = Path(folder)
    require((not folder.exists(), f"{folder} already exists; set another --out, or remove it"), error=FileExistsError)
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        with write_errors(folder):
            model.save_pretrained(part)
            if card:
                (part / "README.md").write_text(card, "utf-8")
            part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
