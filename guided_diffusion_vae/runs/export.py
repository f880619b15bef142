"""Export a model as .safetensors or for diffusers."""

import dataclasses

from .. import checkpoint_util
from ..vae_wrapper import create_vae
from . import diffusers_export
from .loading import load_diffusion_model
from .spaces import open_space


def export_model(config, vae):
    """Write a model, a weights file, as ExportConfig says; return what it was made of, for the log.

    :raises ValueError: for a kind of model, or an architecture, that the format has no place for.
    """
    if not config.out:
        raise FileNotFoundError("nowhere to write to; set --out")
    path = config.model_path
    weights, header = checkpoint_util.load_weights(path, "cpu")
    if header is None:
        raise ValueError(f"{path} does not say how it is built; --model_path wants a run or a weights file of this "
                         "project")
    if config.format == "safetensors":
        if not config.out.endswith(".safetensors"):
            raise ValueError(f"--out {config.out}: the file's name ends in .safetensors")
        checkpoint_util.save_safetensors(config.out, weights, header)
        return f"{header['kind']} of {path} with its header"
    if header["kind"] == "autoencoder":
        codec = create_vae(dataclasses.replace(vae, vae_path=str(path)), "cpu")
        diffusers_export.save_folder(diffusers_export.codec_to_diffusers(codec), config.out)
        return f"AutoencoderKL of {path}, scaling_factor {codec.scale_factor}"
    checkpoint_util.require_kind(header, "diffusion", path, "--format diffusers")
    network, _, header = load_diffusion_model(path, {}, None, None)
    space = open_space(header, vae, "cpu")
    made = diffusers_export.pipeline_to_diffusers(network.cpu(), header, space.codec, space.normalizer)
    diffusers_export.save_folder(made, config.out)
    return f"{type(made).__name__} of {path}"
