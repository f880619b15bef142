"""Open what --vae_path names: autoencoders of this project, of diffusers and of MONAI.

`KINDS` is the table of what can be opened. A new kind of autoencoder is one function that returns an
`OpenedAutoencoder`, and one line in that table; `VAEInterface` makes a codec of it.
"""

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import checkpoint_util
from ..autoencoder import AutoencoderConfig, AutoencoderKL, create_autoencoder
from ..config import as_dict, from_dict, require, to_tuple
from ..files import READ_ERRORS, file_errors, read_yaml_file
from .posterior import LOGVAR_RANGE

FLAG = "--vae_path"


@dataclass
class OpenedAutoencoder:
    """A network with its two functions, and the properties of its latents.

    `moments` maps images in `image_range` [N x C x ...] to (mean, log-variance), each [N x Z x ...], and `decode` maps
    z [N x Z x ...] to images in `image_range`. `config` is hashed into the fingerprint with the weights: JSON-able, and
    stable over versions. `architecture` is set for an AutoencoderKL, which can be streamed and exported.
    """

    network: torch.nn.Module
    moments: Callable
    decode: Callable
    config: dict
    in_channels: int
    latent_channels: int
    factors: tuple[int, ...]
    image_range: tuple[float, float]
    path: str
    scale_factor: float | None = None
    shift_factor: float = 0.0
    preprocessing: dict | None = None
    architecture: AutoencoderConfig | None = None


class Source:
    """A value of --vae_path and the properties that `KINDS` recognize it by, each read once."""

    def __init__(self, name: str, vae_config: str | dict | None = None):
        self.name, self.path, self.vae_config = name, Path(name), vae_config

    @property
    def is_run(self) -> bool:
        """Whether this is a run folder; `config.json` is written before the first checkpoint."""
        known = self.path.is_dir() and checkpoint_util.committed_steps(self.path)
        return bool(known) or (self.path / "config.json").is_file()

    @functools.cached_property
    def diffusers_class(self) -> str | None:
        """The class that the config.json of a diffusers folder names, None for anything else."""
        return _class_name(self.path)

    @functools.cached_property
    def weights(self) -> tuple[dict, dict | None]:
        """(state dict, header) of a weights file; the header is None for files of other projects and for folders."""
        if not self.path.is_file():
            return {}, None
        return checkpoint_util.load_weights(checkpoint_util.latest_weights(self.path, FLAG), flag=FLAG)


def open_autoencoder(name: str, vae_config: str | dict | None = None) -> OpenedAutoencoder:
    """Open the first of `KINDS` that recognizes `name`.

    :param vae_config: arguments of MONAI weights, a dictionary or the path of a YAML file; None: the file next to them.
    :raises FileNotFoundError: if the path, or a part of what belongs there, does not exist.
    :raises ValueError: if the path contains something else.
    """
    source = Source(name, vae_config)
    for recognizes, opens in KINDS.values() if name else ():
        if recognizes(source):
            return opens(source)
    problem = f"{name} does not exist" if name else "no autoencoder is specified"
    require((name and source.path.exists(), f"{problem}; {FLAG} expects one of: {', '.join(KINDS)}"),
            error=FileNotFoundError)
    inner = source.path / "vae"
    hint = f"; it has an autoencoder inside, {inner}" if _class_name(inner) else ""
    raise ValueError(f"{name} is neither a run of train_autoencoder.py (no stateNNNNNN.json) nor a diffusers folder "
                     f"(no config.json with _class_name){hint}; check {FLAG}")


def _class_name(folder):
    try:
        return json.loads((folder / "config.json").read_text()).get("_class_name")
    except (OSError, ValueError, AttributeError):
        return None


# --- AutoencoderKL, of this project or of MONAI ---


def _open_run(source):
    """Open the EMA weights of a run folder's best or latest step."""
    config = source.path / "config.json"
    if not checkpoint_util.committed_steps(source.path):    # or a diffusers folder whose config.json is damaged
        with file_errors(config, "is not JSON", f"check {FLAG}"):
            json.loads(config.read_text())
    return open_autoencoder(str(checkpoint_util.latest_weights(source.path, FLAG)), source.vae_config)


def _open_own(source):
    header = source.weights[1]
    checkpoint_util.require_kind(header, "autoencoder", source.path, FLAG)
    architecture = from_dict(AutoencoderConfig, header["autoencoder"])
    # Only values that differ from the defaults are hashed, so that a field added later keeps today's fingerprints.
    default = as_dict(AutoencoderConfig())
    config = {"class": "AutoencoderKL", **{k: v for k, v in as_dict(architecture).items() if v != default[k]}}
    for name in ("use_checkpointing", "recompute_norms"):   # these change memory, not results
        config.pop(name, None)
    return _opened_kl(source, create_autoencoder(architecture), config, architecture, header.get("scale_factor"),
                      header.get("data"))


def _open_monai(source):
    """Build an AutoencoderKL from the arguments in YAML, in the spelling of MONAI core or GenerativeModels."""
    arguments, where = _monai_arguments(source)
    image_range = arguments.pop("image_range", (0.0, 1.0))
    scale_factor = arguments.pop("scale_factor", None)
    try:
        config = {"class": "AutoencoderKL", **json.loads(json.dumps(arguments)), "image_range": list(image_range)}
        config.pop("use_checkpointing", None)
        architecture = from_dict(AutoencoderConfig, {**arguments, "image_range": image_range})
        network = AutoencoderKL(**arguments)
    except READ_ERRORS as error:
        raise ValueError(f"{where}: no AutoencoderKL has these arguments ({type(error).__name__}: {error}); check "
                         "--vae_config") from error
    return _opened_kl(source, network, config, architecture, scale_factor)


def _opened_kl(source, network, config, architecture, scale_factor, preprocessing=None):
    checkpoint_util.load_strict(network, source.weights[0], source.path, FLAG)
    return OpenedAutoencoder(
        network, network.moments, network.decode, config, network.in_channels, network.latent_channels, network.factors,
        tuple(architecture.image_range), str(source.path.resolve()), scale_factor, preprocessing=preprocessing,
        architecture=architecture,
    )


# Arguments of MONAI that do not change the function of the weights (`include_fc` shows in the weights' names).
_NO_EFFECT = ("_target_", "use_flash_attention", "include_fc", "use_combined_linear", "training")


def _monai_arguments(source):
    """Return (the keyword arguments of AutoencoderKL, `image_range` and `scale_factor` if they are there, the path)."""
    values, where = (source.vae_config,) * 2 if isinstance(source.vae_config, dict) else _read_yaml(source)
    for section in ("autoencoder", "autoencoder_def"):
        values = values.get(section, values)
        require((isinstance(values, dict), f"{where}: expected arguments of AutoencoderKL as keys with values, got "
                                           f"{values!r}"))
    arguments = {{"channels": "num_channels"}.get(key, key): to_tuple(value) for key, value in values.items()
                 if key not in _NO_EFFECT}
    known = sorted({*inspect.signature(AutoencoderKL).parameters, "image_range", "scale_factor"})
    unknown = [key for key in arguments if key not in known]
    require(
        (not unknown, f"{where} contains {unknown}: expected arguments of AutoencoderKL: {', '.join(known)}"),
        ("spatial_dims" in arguments, f"{where} contains no spatial_dims: expected arguments of MONAI's AutoencoderKL"),
    )
    return arguments, where


def _read_yaml(source):
    """Return (contents of the YAML file with a MONAI network's arguments, its path)."""
    candidates = [source.path.with_suffix(suffix) for suffix in (".yaml", ".yml")]
    path = Path(source.vae_config) if source.vae_config else next((p for p in candidates if p.is_file()), candidates[0])
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; check --vae_config" if source.vae_config else
            f"{source.path} has no header of train_autoencoder.py, and {path.name} with the arguments of MONAI's "
            "AutoencoderKL (spatial_dims, num_channels, ...) does not exist next to it; write one or set --vae_config"
        )
    return read_yaml_file(path), path


# --- diffusers ---


def _open_diffusers(source):
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{FLAG} {source.name} requires diffusers: pip install diffusers") from error
    local = not source.name.startswith("hub:")
    name = source.name.removeprefix("hub:")
    try:
        class_name = source.diffusers_class or diffusers.AutoencoderKL.load_config(name)["_class_name"]
        require((class_name in _DIFFUSERS, f"config.json contains a {class_name}: expected one of: "
                                           f"{', '.join(_DIFFUSERS)}"))
        network = getattr(diffusers, class_name).from_pretrained(name, local_files_only=local, low_cpu_mem_usage=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} cannot be read as a diffusers autoencoder: {reason}; check {FLAG}") from error
    config = {k: v for k, v in network.config.items() if k == "_class_name" or not k.startswith("_")}
    config = json.loads(json.dumps({"_class_name": class_name, **config}))
    moments, widths = _DIFFUSERS[class_name]
    return OpenedAutoencoder(
        network, functools.partial(moments, network), lambda z: network.decode(z).sample, config,
        config["in_channels"], config["latent_channels"], (2 ** (len(config[widths]) - 1),) * 2, (-1.0, 1.0),
        str(source.path.resolve()) if local else source.name, config.get("scaling_factor"),
        config.get("shift_factor") or 0.0,
    )


def _kl_moments(network, x):
    posterior = network.encode(x).latent_dist
    return posterior.mean, posterior.logvar


def deterministic_moments(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean, log-variance) of latents without a posterior."""
    return z, torch.full_like(z, LOGVAR_RANGE[0])


# Class of diffusers: (its encoder, the entry of its configuration with one width per level, each half the size).
_DIFFUSERS = {
    "AutoencoderKL": (_kl_moments, "block_out_channels"),
    "AutoencoderTiny": (lambda net, x: deterministic_moments(net.encode(x).latents), "encoder_block_out_channels"),
    "AutoencoderDC": (lambda net, x: deterministic_moments(net.encode(x).latent), "encoder_block_out_channels"),
}

# Kind: (whether a Source is of it, the function that opens it); the first match counts. Only hub: uses the network.
KINDS = {
    "hub:owner/name": (lambda source: source.name.startswith("hub:"), _open_diffusers),
    "a diffusers folder": (lambda source: source.diffusers_class, _open_diffusers),
    "a run folder of train_autoencoder.py": (lambda source: source.is_run, _open_run),
    "a weights file of one": (lambda source: source.weights[1] is not None, _open_own),
    "weights of MONAI's AutoencoderKL": (lambda source: source.path.is_file(), _open_monai),
}
