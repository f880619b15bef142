"""Export a model as .safetensors or for diffusers."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

from .. import checkpoint_util
from ..config import require
from ..vae.foreign import open_autoencoder
from ..vae_wrapper import VAEConfig, create_vae
from .cards import model_card, write_card
from .diffusers_export import ExportConfig, codec_to_diffusers, pipeline_to_diffusers, save_folder
from .loading import load_classifier, load_diffusion_model
from .spaces import open_space


LOADERS: dict[str, Callable] = {
    "diffusion": load_diffusion_model,
    "super_res": functools.partial(load_diffusion_model, kind="super_res"),
    "classifier": load_classifier,
    "autoencoder": lambda weights: open_autoencoder(str(weights.path)),
}


def export_model(config: ExportConfig, weights: checkpoint_util.Weights, vae: VAEConfig) -> str:
    """Write the model of opened weights and its card as an ExportConfig describes; return a summary for the log.

    :raises ValueError: for a kind of model, or an architecture, that the format does not support; if the weights do not
        fit their header, or are not finite.
    """
    path, header, out = weights.path, weights.header, config.out
    require((out, "no output path is specified; set --out"), error=FileNotFoundError)
    require((header is not None, f"{path} has no header: --model_path expects a run or a weights file of this project"))
    library = "diffusers" if config.format == "diffusers" else "guided-diffusion-vae"
    require((header["kind"] in LOADERS, f"{path} contains a {header['kind']}: expected one of: {', '.join(LOADERS)}"))
    card = model_card(Path(out).name, weights, library, config.license, config.metrics)
    if config.format == "safetensors":
        require((out.endswith(".safetensors"), f"--out {out}: expected a file name that ends in .safetensors"))
        kind = header["kind"]
        LOADERS[kind](weights)      # a file whose weights do not fit its header could not be used
        checkpoint_util.save_safetensors(out, weights.state_dict, header)
        return f"{kind} of {path} with its header; model card: {write_card(card, out)}"
    if header["kind"] == "autoencoder":
        codec = create_vae(dataclasses.replace(vae, vae_path=str(path)), "cpu")
        save_folder(codec_to_diffusers(codec), out, card)
        return f"AutoencoderKL of {path}, scaling_factor {codec.scale_factor}"
    checkpoint_util.require_kind(header, "diffusion", path, "--format diffusers")
    require((not header.get("condition"), f"{path} was trained with --condition_dir, which pipelines of diffusers do "
             "not support; set --format safetensors"))
    network, _ = load_diffusion_model(weights)
    space = open_space(header, vae, "cpu")
    pipeline = pipeline_to_diffusers(network.cpu(), header, space.codec, space.normalizer)
    save_folder(pipeline, out, card)
    return f"{type(pipeline).__name__} of {path}"
