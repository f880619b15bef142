"""Open what --vae_path names: autoencoders of this project, of diffusers, of Stable Diffusion and of MONAI.

`KINDS` is the table of what can be opened. A new kind of autoencoder is one function that returns an
`OpenedAutoencoder`, and one line in that table; `VAEInterface` makes a codec of it.
"""

import functools
import inspect
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import checkpoint_util
from ..autoencoder import AutoencoderConfig, AutoencoderKL, create_autoencoder
from ..config import as_dict, from_dict, require, to_tuple
from ..files import MAX_YAML_NODES, READ_ERRORS, file_errors, read_record, read_yaml_file
from ..state_dicts import choose_place, iter_state_dicts
from . import compvis
from .posterior import LOGVAR_RANGE

FLAG = "--vae_path"


@dataclass
class OpenedAutoencoder:
    """A network with its two functions, and the properties of its latents.

    `moments` maps images in `image_range` [N x C x ...] to (mean, log-variance), each [N x Z x ...], and `decode` maps
    z [N x Z x ...] to images in `image_range`. `config` is hashed into the fingerprint with the weights: JSON-able, and
    stable over versions. `architecture` is set for an AutoencoderKL, which can be streamed and exported. `remark` is a
    sentence for the log, on what the scale factor is if the file does not state it.
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
    remark: str = ""


class Source:
    """A value of --vae_path and the properties that `KINDS` recognize it by, each read once."""

    def __init__(self, name: str, vae_config: str | os.PathLike | dict | None = None):
        self.name, self.path, self.vae_config = name, Path(name), vae_config

    @property
    def is_run(self) -> bool:
        """Whether this is a run folder; `config.json` is written before the first checkpoint."""
        known = self.path.is_dir() and checkpoint_util.committed_steps(self.path)
        return bool(known) or (self.path / "config.json").is_file() and not any(self.path.glob(f"{DIFFUSERS_STEM}*"))

    @property
    def is_bundle(self) -> bool:
        """Whether this is a bundle of MONAI."""
        return all((self.path / name).is_dir() for name in ("configs", "models"))

    @functools.cached_property
    def diffusers_class(self) -> str | None:
        """The class that the config.json of a diffusers folder names, None for anything else."""
        try:
            return _read_config(self.path).get("_class_name")
        except ValueError:
            if checkpoint_util.committed_steps(self.path):  # of a run, whose weights describe themselves
                return None
            raise

    @functools.cached_property
    def weights(self) -> tuple[dict, dict | None]:
        """(state dict, header) of a weights file; the header is None for files of other projects and for folders."""
        if not self.path.is_file():
            return {}, None
        return checkpoint_util.load_weights(checkpoint_util.latest_weights(self.path, FLAG), flag=FLAG)

    @functools.cached_property
    def compvis(self) -> dict:
        """The autoencoders in the layout of CompVis that a weights file contains; see `compvis.find_autoencoders`."""
        return compvis.find_autoencoders(self.weights[0])

    @property
    def has_diffusers_names(self) -> bool:
        """Whether a weights file contains an AutoencoderKL of diffusers, or the network of a config next to it."""
        named = (name for _, weights in iter_state_dicts(self.weights[0]) for name in weights)
        return self.path.is_file() and not self.vae_config and (
            _class_name(self.path.parent) in _DIFFUSERS or any(name.endswith(DIFFUSERS_MARKER) for name in named)
        )


def open_autoencoder(name: str, vae_config: str | os.PathLike | dict | None = None) -> OpenedAutoencoder:
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


def _read_config(folder):
    """Return the config.json of a folder, {} if there is none.

    :raises ValueError: if it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    with file_errors(path, "is not JSON", f"check {FLAG}"):
        config = json.loads(path.read_bytes())
        require((isinstance(config, dict), f"expected an object, got {type(config).__name__}"))
    return config


def _class_name(folder):
    """Return the class that the config.json of a folder names, None if it cannot be read."""
    try:
        return _read_config(folder).get("_class_name")
    except ValueError:
        return None


# --- AutoencoderKL, of this project or of MONAI ---


def _open_run(source):
    """Open the EMA weights of a run folder's best or latest step."""
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


def _open_bundle(source):
    """Open the weights of the autoencoder in a bundle of MONAI."""
    files = sorted(path.name for path in (source.path / "models").iterdir() if path.suffix in WEIGHTS_SUFFIXES)
    named = [name for name in files if "autoencoder" in name.lower()]
    require((len(named) == 1, f"{source.path / 'models'} contains {', '.join(files) or 'no weights'}: expected one "
             f"file with autoencoder in its name; set {FLAG} to the weights file"))
    return open_autoencoder(str(source.path / "models" / named[0]), source.vae_config)


# Arguments of MONAI that do not change the function of the weights (`include_fc` shows in the weights' names).
_NO_EFFECT = ("_target_", "_desc_", "_requires_", "_disabled_", "_mode_", "use_flash_attention", "include_fc",
              "use_combined_linear", "training")
SECTIONS = ("autoencoder_def", "autoencoder")   # in a bundle, `autoencoder` may be an expression about the first
MAX_REFERENCES = 50     # from one to the next
WEIGHTS_SUFFIXES = (".pt", ".pth", ".ckpt", ".safetensors")


def _monai_arguments(source):
    """Return (the keyword arguments of AutoencoderKL, `image_range` and `scale_factor` if they are there, the path)."""
    contents, where = (source.vae_config,) * 2 if isinstance(source.vae_config, dict) else _read_arguments(source)
    values, place = contents, ""
    while section := next((name for name in SECTIONS if name in values), None):
        place = f"{place}{section}::"
        values = values[section]
        if isinstance(values, str):
            values = _resolve(values, contents, where, place.removesuffix("::"))
        require((isinstance(values, dict), f"{where}: expected arguments of AutoencoderKL as keys with values, got "
                                           f"{values!r}"))
    arguments = {{"channels": "num_channels"}.get(key, key): to_tuple(_resolve(value, contents, where, f"{place}{key}"))
                 for key, value in values.items() if key not in _NO_EFFECT}
    known = sorted({*inspect.signature(AutoencoderKL).parameters, "image_range", "scale_factor"})
    unknown = [key for key in arguments if key not in known]
    require(
        (not unknown, f"{where} contains {unknown}: expected arguments of AutoencoderKL: {', '.join(known)}"),
        ("spatial_dims" in arguments, f"{where} contains no spatial_dims: expected arguments of MONAI's AutoencoderKL"),
    )
    return arguments, where


def _resolve(value, contents, where, key, followed=(), visited=None):
    """Return a value of a bundle of MONAI with its references, such as @latent_channels or @net::channels::0, followed.

    :raises ValueError: naming the key, for an expression, which is not evaluated, and for references to nothing, to
        themselves or to more than `MAX_YAML_NODES` values.
    """
    visited = visited or itertools.count()
    name = f"{key}, through {followed[-1]}," if followed else key
    require((next(visited) < MAX_YAML_NODES and len(followed) < MAX_REFERENCES, f"{where}: {name} refers to too many "
             "values; set --vae_config to a YAML file of the arguments"))
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        values = {k: _resolve(v, contents, where, key if followed else f"{key}::{k}", followed, visited)
                  for k, v in items}
        return values if isinstance(value, dict) else list(values.values())
    if not isinstance(value, str) or not value.startswith(("@", "$", "%")):
        return value
    require((value.startswith("@"), f"{where}: {name} is {value!r}: expected a value, as expressions are not run; "
             "replace it, or set --vae_config to a YAML file of the arguments"))
    require((value not in followed, f"{where}: {name} is {value!r}, which refers to itself; correct it or set "
             "--vae_config"))
    target = contents
    for part in re.split("::|#", value[1:]):
        try:
            target = target[int(part) if isinstance(target, list) else part]
        except (LookupError, TypeError, ValueError):
            raise ValueError(f"{where}: {name} is {value!r}: expected a reference to a key of the file; correct it or "
                             "set --vae_config") from None
    return _resolve(target, contents, where, key, (*followed, value), visited)


def _read_arguments(source):
    """Return (contents of the YAML or JSON file with a MONAI network's arguments, its path)."""
    candidates = [source.path.with_suffix(suffix) for suffix in (".yaml", ".yml", ".json")]
    path = Path(source.vae_config) if source.vae_config else next((p for p in candidates if p.is_file()), None)
    if path is None:    # in a bundle, whose files describe other networks too
        described = ((_read_mapping(p), p) for p in _bundle_files(source.path.parent.parent))
        if found := next((each for each in described if set(SECTIONS) & each[0].keys()), None):
            return found
        raise FileNotFoundError(
            f"{source.path} has no header of train_autoencoder.py, and {candidates[0].name} with the arguments of "
            "MONAI's AutoencoderKL (spatial_dims, num_channels, ...) does not exist next to it; write one or set "
            "--vae_config"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; check --vae_config")
    return _read_mapping(path), path


def _bundle_files(folder):
    """Return the files of a bundle of MONAI that may define its autoencoder."""
    paths = (folder / "configs" / f"{stem}{suffix}" for stem in ("inference_autoencoder", "inference")
             for suffix in (".json", ".yaml", ".yml"))
    return [path for path in paths if path.is_file()]


def _read_mapping(path):
    # YAML 1.1 reads numbers such as 1e-06, which are valid in JSON, as text.
    return read_record(path, "check --vae_config") if path.suffix == ".json" else read_yaml_file(path)


# --- diffusers ---


DIFFUSERS_STEM = "diffusion_pytorch_model"
DIFFUSERS_MARKER = "encoder.down_blocks.0.resnets.0.conv1.weight"
# Names of attention weights in files of early versions of diffusers.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _import_diffusers(source):
    try:
        import diffusers
    except ImportError as error:
        raise ImportError(f"{FLAG} {source.name} requires diffusers: pip install diffusers") from error
    return diffusers


def _open_diffusers(source):
    diffusers = _import_diffusers(source)
    local = not source.name.startswith("hub:")
    name = source.name.removeprefix("hub:")
    variant = _variant(source.path) if local else None
    try:
        class_name = source.diffusers_class or diffusers.AutoencoderKL.load_config(name)["_class_name"]
        require((class_name in _DIFFUSERS, f"config.json contains a {class_name}: expected one of: "
                                           f"{', '.join(_DIFFUSERS)}"))
        network = getattr(diffusers, class_name).from_pretrained(
            name, variant=variant, local_files_only=local, low_cpu_mem_usage=False
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{name} cannot be read as a diffusers autoencoder: {reason}; check {FLAG}") from error
    return _opened_diffusers(network, class_name, str(source.path.resolve()) if local else source.name)


def _variant(folder):
    """Return the variant of the weights in a folder, such as fp16, None if there are some without.

    :raises ValueError: if there are several variants only.
    """
    pattern = rf"{DIFFUSERS_STEM}(?:\.(?!bin|safetensors)(\w+?))?(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    variants = {m[1] for path in folder.iterdir() if (m := re.fullmatch(pattern, path.name))}
    require((len(variants) < 2 or None in variants, f"{folder} contains weights of the variants "
             f"{', '.join(sorted(filter(None, variants)))} only; set {FLAG} to one of the files"))
    return variants.pop() if len(variants) == 1 else None


def _open_diffusers_weights(source):
    """Open a weights file of diffusers by the config.json next to it."""
    diffusers, config = _import_diffusers(source), _read_config(source.path.parent)
    class_name, where = config.get("_class_name"), source.path.parent / "config.json"
    require((class_name, f"{source.path} contains weights of diffusers, and {where} with their _class_name does not "
             "exist; download it to there"), error=FileNotFoundError)
    require((class_name in _DIFFUSERS, f"{where} describes a {class_name}: expected one of: {', '.join(_DIFFUSERS)}; "
             f"check {FLAG}"))
    try:
        network = getattr(diffusers, class_name).from_config(config)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: no {class_name} has this configuration ({reason}); check {FLAG}") from error
    weights = checkpoint_util.select_weights(network, source.weights[0], source.path, FLAG)
    if isinstance(network, diffusers.AutoencoderKL):
        for old, new in _OLD_ATTENTION.items():
            weights = {name.replace(old, new): value for name, value in weights.items()}
    checkpoint_util.load_strict(network, weights, source.path, FLAG)
    return _opened_diffusers(network, class_name, str(source.path.resolve()))


def _open_compvis(source):
    """Open the autoencoder of a Stable Diffusion checkpoint as one of diffusers."""
    diffusers, path = _import_diffusers(source), source.path
    weights, full = source.compvis[choose_place(list(source.compvis), path, FLAG, "autoencoders")]
    config = compvis.diffusers_config(weights, path)
    scale = compvis.latent_scale(weights, full, _read_config(path.parent))
    network = diffusers.AutoencoderKL(**config, scaling_factor=scale.scale_factor, shift_factor=scale.shift_factor)
    converted = compvis.to_diffusers(weights, len(config["block_out_channels"]))
    checkpoint_util.load_strict(network, converted, path, FLAG)
    opened = _opened_diffusers(network, "AutoencoderKL", str(path.resolve()))
    opened.remark = scale.remark
    return opened


def _opened_diffusers(network, class_name, path):
    config = {k: v for k, v in network.config.items() if k == "_class_name" or not k.startswith("_")}
    config = json.loads(json.dumps({"_class_name": class_name, **config}))
    moments, widths = _DIFFUSERS[class_name]
    return OpenedAutoencoder(
        network, functools.partial(moments, network), lambda z: network.decode(z).sample, config,
        config["in_channels"], config["latent_channels"], (2 ** (len(config[widths]) - 1),) * 2, (-1.0, 1.0),
        path, config.get("scaling_factor"), config.get("shift_factor") or 0.0,
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
    "a MONAI bundle": (lambda source: source.is_bundle, _open_bundle),
    "a run folder of train_autoencoder.py": (lambda source: source.is_run, _open_run),
    "a weights file of one": (lambda source: source.weights[1] is not None, _open_own),
    "a checkpoint of Stable Diffusion, or of its autoencoder": (lambda source: source.compvis, _open_compvis),
    "a weights file of diffusers next to its config.json": (
        lambda source: source.has_diffusers_names, _open_diffusers_weights),
    "weights of MONAI's AutoencoderKL": (lambda source: source.path.is_file(), _open_monai),
}
