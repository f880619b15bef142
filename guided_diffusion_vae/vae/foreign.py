"""Open autoencoders of other projects: diffusers, MONAI."""

import dataclasses
import functools
import inspect
import json
from pathlib import Path

import torch

from .. import checkpoint_util
from ..autoencoder import AutoencoderConfig, AutoencoderKL, create_autoencoder
from ..config import as_dict, from_dict, to_tuple
from .posterior import LOGVAR_RANGE

FLAG = "--vae_path"


@dataclasses.dataclass
class _Found:
    """An autoencoder with its two functions on its own range: images -> (mean, logvar) and z -> images."""

    network: torch.nn.Module
    moments: callable
    decode: callable
    config: dict
    in_channels: int
    latent_channels: int
    factors: tuple
    image_range: tuple
    path: str
    scale_factor: float | None = None
    shift_factor: float = 0.0
    preprocessing: dict | None = None
    architecture: AutoencoderConfig | None = None   # of an AutoencoderKL of this project or of MONAI


def _open(path, vae_config):
    if path.startswith("hub:"):
        return _open_diffusers(path.removeprefix("hub:"), None, local=False)
    where = Path(path)
    if not path or not where.exists():
        problem = f"{path} is not there" if path else "no autoencoder is given"
        raise FileNotFoundError(f"{problem}; {FLAG} wants a run folder or a weights file of train_autoencoder.py, a "
                                "diffusers folder, hub:owner/name, or MONAI weights")
    if where.is_file():
        return _open_file(where, vae_config)
    named = _class_name(where)
    if named:
        return _open_diffusers(path, named, local=True)
    if checkpoint_util.committed_steps(where) or (where / "config.json").is_file():
        return _open_file(checkpoint_util.latest_weights(where, FLAG), vae_config)
    hint = f"; it has an autoencoder inside, {where / 'vae'}" if _class_name(where / "vae") else ""
    raise ValueError(f"{path} is neither a run of train_autoencoder.py (no stateNNNNNN.json) nor a diffusers folder "
                     f"(no config.json with _class_name){hint}; check {FLAG}")


def _class_name(folder):
    """Return the class that a diffusers folder says it holds, or None."""
    try:
        return json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None


def _open_file(path, vae_config):
    """Open a weights file: one with a header describes itself, any other is MONAI's."""
    path = Path(path)
    weights, header = checkpoint_util.load_weights(path, flag=FLAG)
    if header is None:
        return _open_monai(path, weights, vae_config)
    checkpoint_util.require_kind(header, "autoencoder", path, FLAG)
    config = from_dict(AutoencoderConfig, header["autoencoder"])
    # Defaults are left out, so that a knob of a later version does not rename the functions of today.
    default = as_dict(AutoencoderConfig())
    described = {"class": "AutoencoderKL", **{k: v for k, v in as_dict(config).items() if v != default[k]}}
    for name in ("use_checkpointing", "recompute_norms"):   # they change what is kept, not what is computed
        described.pop(name, None)
    network = create_autoencoder(config)
    return _found_autoencoder_kl(network, weights, path, described, config, header.get("scale_factor"), header.get("data"))


def _open_monai(path, weights, vae_config):
    """Build an AutoencoderKL from the arguments in YAML; core's and GenerativeModels' names of them are taken."""
    arguments = _monai_arguments(path, vae_config)
    image_range = arguments.pop("image_range", (0.0, 1.0))
    scale_factor = arguments.pop("scale_factor", None)
    config = {"class": "AutoencoderKL", **json.loads(json.dumps(arguments)), "image_range": list(image_range)}
    config.pop("use_checkpointing", None)
    architecture = from_dict(AutoencoderConfig, {**arguments, "image_range": image_range})
    return _found_autoencoder_kl(AutoencoderKL(**arguments), weights, path, config, architecture, scale_factor)


def _found_autoencoder_kl(network, weights, path, config, architecture, scale_factor, preprocessing=None):
    checkpoint_util.load_strict(network, weights, path, FLAG)
    return _Found(
        network, network.moments, network.decode, config, network.in_channels, network.latent_channels, network.factors,
        tuple(architecture.image_range), str(Path(path).resolve()), scale_factor, preprocessing=preprocessing,
        architecture=architecture,
    )


def _monai_arguments(path, vae_config):
    source = vae_config
    if not isinstance(vae_config, dict):
        import yaml

        beside = [path.with_suffix(s) for s in (".yaml", ".yml")]
        source = Path(vae_config) if vae_config else next((p for p in beside if p.is_file()), None)
        if source is None:
            raise FileNotFoundError(
                f"{path} has no header, so it is no file of train_autoencoder.py, and there is no {beside[0].name} "
                "beside it with the arguments of MONAI's AutoencoderKL; write one (spatial_dims, num_channels, ...) or "
                "set --vae_config"
            )
        if not source.is_file():
            raise FileNotFoundError(f"no file {source}; check --vae_config")
        try:
            vae_config = yaml.safe_load(source.read_text())
        except yaml.YAMLError as error:
            raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(vae_config, dict):
            raise ValueError(f"{source} holds no keys with values, but {type(vae_config).__name__}")
        source = str(source)
    for section in ("autoencoder", "autoencoder_def"):
        vae_config = vae_config.get(section, vae_config)
    known = {*inspect.signature(AutoencoderKL).parameters, "image_range", "scale_factor"}
    arguments = {}
    for key, value in vae_config.items():
        key = {"channels": "num_channels"}.get(key, key)
        if key in known:
            arguments[key] = to_tuple(value)
        elif key not in _NO_EFFECT:
            raise ValueError(f"{source} has {key!r}, which is no argument of AutoencoderKL; known are "
                             f"{', '.join(sorted(known))}")
    if "spatial_dims" not in arguments:
        raise ValueError(f"{source} has no spatial_dims; the arguments of MONAI's AutoencoderKL are needed")
    return arguments


# Arguments of MONAI that leave the function of given weights as it is (what include_fc means, the weights' names show).
_NO_EFFECT = ("_target_", "use_flash_attention", "include_fc", "use_combined_linear", "training")


def _open_diffusers(name, class_name, local):
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{FLAG} {name} needs diffusers: pip install diffusers") from error
    try:
        class_name = class_name or diffusers.AutoencoderKL.load_config(name)["_class_name"]
        if class_name not in _DIFFUSERS:
            raise ValueError(f"it holds a {class_name}, possible are {', '.join(_DIFFUSERS)}")
        network = getattr(diffusers, class_name).from_pretrained(name, local_files_only=local, low_cpu_mem_usage=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} cannot be read as a diffusers autoencoder: {reason}; check {FLAG}") from error
    config = {k: v for k, v in network.config.items() if k == "_class_name" or not k.startswith("_")}
    config = json.loads(json.dumps({"_class_name": class_name, **config}))
    moments, widths = _DIFFUSERS[class_name]
    path = str(Path(name).resolve()) if local else f"hub:{name}"
    return _Found(
        network, functools.partial(moments, network), lambda z: network.decode(z).sample, config,
        config["in_channels"], config["latent_channels"], (2 ** (len(config[widths]) - 1),) * 2, (-1.0, 1.0), path,
        config.get("scaling_factor"), config.get("shift_factor") or 0.0,
    )


def _kl_moments(network, x):
    posterior = network.encode(x).latent_dist
    return posterior.mean, posterior.logvar


def _tiny_moments(network, x):
    return _deterministic_moments(network.encode(x).latents)


def _dc_moments(network, x):
    return _deterministic_moments(network.encode(x).latent)


def _deterministic_moments(z):
    """Return moments of latents that nothing is random about."""
    return z, torch.full_like(z, LOGVAR_RANGE[0])


# Per class: how it encodes, and the entry of its configuration whose length tells how often it halves the grid.
_DIFFUSERS = {
    "AutoencoderKL": (_kl_moments, "block_out_channels"),
    "AutoencoderTiny": (_tiny_moments, "encoder_block_out_channels"),
    "AutoencoderDC": (_dc_moments, "encoder_block_out_channels"),
}
