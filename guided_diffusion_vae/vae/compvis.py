"""Read the KL autoencoder of Stable Diffusion in the layout of CompVis: its configuration, weights and latent scale.

A file contains the autoencoder alone, or a model in which its names have a prefix such as `first_stage_model.`. Weights
are renamed to those of diffusers' AutoencoderKL (Rombach et al. 2022, arXiv:2112.10752).
"""

import re
from typing import NamedTuple

import torch

from ..config import require
from ..state_dicts import iter_state_dicts, without_prefix

MARKER = "encoder.down.0.block.0.conv1.weight"      # the end of a name that occurs in no other layout
PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")     # others are losses and copies for training
NORM_GROUPS = 32

# Model: (channels of its latents, what a name in a file of the full model contains, scale factor, shift factor).
MODELS = {
    "Stable Diffusion 3": (16, r"joint_blocks\.", 1.5305, 0.0609),
    "FLUX.1": (16, r"double_blocks\.", 0.3611, 0.1159),
    "Stable Diffusion XL": (4, r"^conditioner\.", 0.13025, 0.0),
    "the upscaler of Stable Diffusion 2": (4, r"^low_scale_model\.", 0.08333, 0.0),
    "Stable Diffusion 1 or 2": (4, r"^(cond_stage_model|model\.diffusion_model)\.", 0.18215, 0.0),
}
SDXL_WIDTHS = (2560, 2816)      # of the embedded sizes that its UNets (refiner, base) are conditioned on
# Renames from one layout to the other, in this order. Levels of the decoder are counted from the other end.
_RENAMES = (
    (r"\.(down|up)\.(\d+)\.block\.", r".\1_blocks.\2.resnets."),
    (r"\.(down|up)\.(\d+)\.attn\.", r".\1_blocks.\2.attentions."),
    (r"\.(down|up)\.(\d+)\.(\w+)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"(attentions\.\d+)\.norm\.", r"\1.group_norm."),
    (r"(attentions\.\d+)\.([qkv])\.", r"\1.to_\2."),
    (r"(attentions\.\d+)\.proj_out\.", r"\1.to_out.0."),
)


class LatentScale(NamedTuple):
    """Scale and shift of the latents; `remark` says what was assumed, and is empty if nothing was."""

    scale_factor: float | None
    shift_factor: float = 0.0
    remark: str = ""


def find_autoencoders(content: dict) -> dict[str, tuple[dict, dict]]:
    """Return {place: (weights of an autoencoder, state dict that contains it)} of what `load_weights` returned."""
    found = {}
    for place, state_dict in iter_state_dicts(content):
        for name in state_dict:
            if name.endswith(MARKER):
                prefix = name[:-len(MARKER)]
                weights = {k: v for k, v in without_prefix(state_dict, prefix).items() if k.startswith(PARTS)}
                found[f"{place}/{prefix}*".strip("/")] = weights, state_dict
    return found


def diffusers_config(weights: dict, path) -> dict:
    """Return the arguments of diffusers' AutoencoderKL for weights in this layout, from their names and shapes.

    :raises ValueError: if a part of the autoencoder is missing, or it has no KL posterior.
    """
    missing = [name for name in ("encoder.conv_in.weight", "encoder.conv_out.weight", "decoder.conv_in.weight",
                                 "decoder.conv_out.weight") if name not in weights]
    require((not missing, f"{path} contains an autoencoder without {', '.join(missing)}: expected encoder and decoder"))
    encoded, latent = len(weights["encoder.conv_out.weight"]), weights["decoder.conv_in.weight"].shape[1]
    require((encoded == 2 * latent, f"{path}: the encoder returns {encoded} channels and the decoder reads {latent}: "
             "expected a KL autoencoder, whose encoder returns mean and log-variance"))
    levels = 1 + max(int(m[1]) for name in weights if (m := re.match(r"encoder\.down\.(\d+)\.", name)))
    blocks = sum(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name) is not None for name in weights)
    has_attention = [f"encoder.down.{i}.attn.0.q.weight" in weights for i in range(levels)]
    down = [("Attn" if attention else "") + "DownEncoderBlock2D" for attention in has_attention]
    return {
        "in_channels": weights["encoder.conv_in.weight"].shape[1],
        "out_channels": len(weights["decoder.conv_out.weight"]),
        "block_out_channels": [len(weights[f"encoder.down.{i}.block.0.conv1.weight"]) for i in range(levels)],
        "down_block_types": down,
        "up_block_types": [name.replace("DownEncoder", "UpDecoder") for name in reversed(down)],
        "layers_per_block": blocks, "latent_channels": latent, "norm_num_groups": NORM_GROUPS,
        "use_quant_conv": "quant_conv.weight" in weights, "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
    }


def to_diffusers(weights: dict, levels: int) -> dict[str, torch.Tensor]:
    """Return the weights with the names and shapes of diffusers' AutoencoderKL."""
    converted = {}
    for name, value in weights.items():
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        name = re.sub(r"(?<=up_blocks\.)\d+", lambda match: str(levels - 1 - int(match[0])), name)
        is_projection = re.search(r"attentions\.\d+\.to_\w+(\.0)?\.weight", name)
        converted[name] = value.flatten(1) if is_projection else value      # 1x1 convolutions become matrices
    return converted


def latent_scale(weights: dict, full: dict, stated: dict) -> LatentScale:
    """Return the `LatentScale` of an autoencoder.

    :param full: the state dict that contains it.
    :param stated: the config.json of diffusers next to the file, {} if there is none.
    """
    latent = weights["decoder.conv_in.weight"].shape[1]
    measured = full.get("scale_factor")     # of latent diffusion models, measured at the start of their training
    if measured is not None and measured.numel() == 1:
        return LatentScale(float(measured))
    if stated.get("scaling_factor") and stated.get("latent_channels", 4) == latent:
        return LatentScale(stated["scaling_factor"], stated.get("shift_factor") or 0.0)
    embedding = full.get("model.diffusion_model.label_emb.0.0.weight")
    if latent == 4 and embedding is not None and embedding.shape[1] in SDXL_WIDTHS:
        return LatentScale(MODELS["Stable Diffusion XL"][2])
    for channels, pattern, scale, shift in MODELS.values():
        if channels == latent and any(re.search(pattern, name) for name in full):
            return LatentScale(scale, shift)
    if latent == 4:
        return LatentScale(0.18215, 0.0, "the scale factor 0.18215 of Stable Diffusion 1 and 2 is used; set "
                           "--scale_factor 0.13025 if this is the autoencoder of SDXL, which has the same shapes")
    if latent == 16 and "quant_conv.weight" not in weights:
        _, _, scale, shift = MODELS["FLUX.1"]
        return LatentScale(scale, shift, f"the scale {scale} and shift {shift} of FLUX.1 are used; if this is the "
                           "autoencoder of Stable Diffusion 3, which has the same shapes, set --vae_path to the full "
                           "model or to its diffusers folder, or put the config.json of that folder next to the file "
                           '({"scaling_factor": 1.5305, "shift_factor": 0.0609, "latent_channels": 16})')
    return LatentScale(None)
