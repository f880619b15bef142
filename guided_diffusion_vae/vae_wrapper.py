"""Stand between pictures in [0, 1] and the latents that diffusion works on: codecs and the latents' scale.

    pictures --encode_batch--> z * scale_factor --LatentNormalizer.normalise--> x0     and back by the inverses

A codec is `VAEInterface` (an autoencoder on disk, whichever project wrote it) or `PixelCodec` (no autoencoder). This is
the only place where the scale factor and the range that an autoencoder wants are applied, and where they are undone.
"""

import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from . import checkpoint_util
from .autoencoder import (
    LOGVAR_RANGE, AutoencoderConfig, AutoencoderKL, create_autoencoder, from_image_range, latent_grid, to_image_range,
)
from .config import as_dict, from_dict, frozen, opt
from .nn import send
from .streaming import Streamer

SCALE_FACTOR = 0.18215
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMAGE_SLACK = 1e-4
LATENT_STD_LIMITS = (0.9, 1.1)
FLAG = "--vae_path"


@dataclasses.dataclass
class VAEConfig:
    vae_path: str = opt("", "autoencoder: a run of train_autoencoder.py or a weights file of one, a diffusers folder "
                            "(or hub:owner/name to download one), or MONAI weights with a YAML file beside them")
    scale_factor: float = opt(0.0, "what latents are multiplied by; 0: what the autoencoder states, else 0.18215",
                              least=0)
    vae_config: str = opt("", "YAML file with the arguments of MONAI weights; empty: the one beside them")
    vae_dtype: str = opt("float32", "precision inside the autoencoder", choices=tuple(DTYPES))
    vae_batch_size: int = opt(0, "pictures that the autoencoder takes at a time; 0: all it is given", least=0)
    vae_tile: int = opt(0, "have no more than this many pixels of the longest side on the device at a time, for "
                           "pictures and volumes larger than its memory; exact for autoencoders of this project and of "
                           "MONAI, overlapping tiles for those of diffusers; 0: the whole", least=0)


@dataclasses.dataclass
class NormalizerConfig:
    SECTION = "latents"

    normalizer: str = opt("auto", "what latents are divided by before diffusion: auto (their measured standard "
                                  "deviation), channel (mean and standard deviation per channel), a number, or none")
    allow_latent_std: bool = opt(False, "train although the standard deviation of x0 is outside 0.9 to 1.1")


def create_vae(config, device=None):
    """Open the autoencoder that a VAEConfig names."""
    return VAEInterface(
        config.vae_path, scale_factor=config.scale_factor or None, device=device, dtype=config.vae_dtype,
        batch_size=config.vae_batch_size, tile=config.vae_tile, vae_config=config.vae_config or None,
    )


def sample_moments(moments, eps=None):
    """Draw latents, mean + std * eps, from their moments; the mean where eps is None.

    [N x 2Z x ...], mean and log-variance -> [N x Z x ...].
    """
    mean, logvar = moments.chunk(2, dim=1)
    return mean if eps is None else mean + torch.exp(0.5 * logvar) * send(eps, mean.device).to(mean)


class _Codec:
    """What all codecs share; they add `encode_moments`, `decode_batch` and `fingerprint`."""

    has_posterior = True    # whether a picture has more than one latent

    def encode_batch(self, images, eps=None):
        """Encode pictures in [0, 1] as scaled latents: the mode, or with noise `eps` a draw from the posterior.

        [N x C x ...] -> [N x Z x ...]; eps is standard normal, of the latents' shape.
        """
        return sample_moments(self.encode_moments(images), eps)

    def latent_shape(self, image_shape):
        """Return the latent's (Z, ...) for pictures of shape (C, ...).

        :raises ValueError: where the channels or the sizes do not fit.
        """
        channels, *spatial = image_shape
        if channels not in self._channels_taken():
            raise ValueError(
                f"pictures have {channels} channels, {self.path or 'the pixel codec'} takes "
                f"{' or '.join(map(str, self._channels_taken()))}; set --image_channels, or choose another {FLAG}"
            )
        return (self.latent_channels, *latent_grid(spatial, self.factors))

    def fitted(self, images):
        """Return pictures padded at their far edges to sizes that the factors divide, where the autoencoder had such.

        [N x C x ...] -> same or larger. What was trained with --pad True meets pictures of their own size here.
        """
        beyond = [-n % factor for n, factor in zip(images.shape[2:], self.factors)]
        if not any(beyond) or not self.preprocessing.get("pad"):
            return images
        return F.pad(images, [n for after in reversed(beyond) for n in (0, after)], mode="replicate")

    def describe(self):
        """Return what a cache or a run records of the codec; the path is a hint, the SHA-256 names the function."""
        return {"config": self.config, "sha256": self.fingerprint, "path": self.path,
                "scale_factor": self.scale_factor, "shift_factor": self.shift_factor}

    def _channels_taken(self):
        return (self.in_channels,)


class PixelCodec(_Codec):
    """Take the pictures themselves as latents: x in [0, 1] becomes 2 x - 1, and nothing is random about it."""

    has_posterior = False
    scale_factor, shift_factor, path = 1.0, 0.0, ""
    preprocessing = {}
    image_range = (-1.0, 1.0)

    def __init__(self, channels=3, dims=2):
        self.in_channels = self.latent_channels = channels
        self.factors = (1,) * dims
        self.config = {"class": "PixelCodec", "channels": channels, "dims": dims}

    @property
    def fingerprint(self):
        return _sha256(self.config, {})

    def encode_moments(self, images):
        """Return mean and log-variance (its least value).  [N x C x ...] in [0, 1] -> [N x 2C x ...]."""
        _require_pictures(images)
        self.latent_shape(images.shape[1:])
        mean = to_image_range(images, self.image_range)
        return torch.cat([mean, torch.full_like(mean, LOGVAR_RANGE[0])], dim=1)

    def decode_batch(self, latents, channels=None):
        """Return pictures in [0, 1]; inverse of `encode_batch`. `channels` is there for the interface."""
        return from_image_range(latents, self.image_range).clamp(0, 1)


class VAEInterface(_Codec):
    """An autoencoder on disk as a codec: eval mode, no gradients, pictures in [0, 1] outside.

    `vae_path` names one of these, told apart by what is found there:

    - a run folder of `train_autoencoder.py` (its newest averaged weights are taken) or one weights file of it;
    - a folder saved by diffusers (AutoencoderKL, AutoencoderTiny, AutoencoderDC), or `hub:owner/name`, the only
      spelling that uses the network;
    - weights of MONAI's AutoencoderKL (.pt, .pth, .safetensors) with its arguments in a YAML file of the same stem, or
      in `vae_config` (a path or a dictionary); `image_range` and `scale_factor` may stand there too.

    Latents are (z - shift_factor) * scale_factor. The scale is the argument, else what the autoencoder states, else
    0.18215; the shift is what the autoencoder states, else 0.

    A grey picture is repeated for an autoencoder of three channels. `decode_batch` averages the three where it is told
    that pictures have one channel, or is not told and the last pictures encoded had one.

    :param dtype: "float32", or "bfloat16" for autocast inside the networks; results are float32.
    :param batch_size: pictures the networks take at a time; 0: all at once.
    :param tile: pixels along the longest side that may be on the device at a time; 0: all. Our own networks stream
        larger pictures slab by slab with the same result (see `streaming`), and leave them on the host. Those of
        diffusers work on tiles that overlap by a quarter, blended linearly over their seams: an approximation, since
        norms and attention see one tile; `tile` is then a multiple of the factors.
    :raises FileNotFoundError: where there is no such path, or a part of what it should hold is missing.
    :raises ValueError: where something else is found there.
    """

    def __init__(
        self, vae_path, scale_factor=None, device=None, dtype="float32", batch_size=0, tile=0, vae_config=None
    ):
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}, possible are {', '.join(DTYPES)} (--vae_dtype)")
        found = _open(str(vae_path), vae_config)
        streams = found.architecture is not None
        fits = streams or not any(tile % factor for factor in found.factors) and not 0 < tile < 2 * max(found.factors)
        if tile < 0 or not fits:
            raise ValueError(f"tile is {tile}; it is a multiple of the autoencoder's factors {found.factors} and at "
                             "least twice as large, or 0 (--vae_tile)")
        self.path, self.config = found.path, found.config
        self.in_channels, self.latent_channels, self.factors = found.in_channels, found.latent_channels, found.factors
        self._grey = False
        stated = found.scale_factor or SCALE_FACTOR
        self.scale_factor = float(stated if scale_factor is None else scale_factor)
        if not self.scale_factor > 0:
            raise ValueError(f"scale_factor is {self.scale_factor}; it is a number above 0 (--scale_factor)")
        self.shift_factor = float(found.shift_factor)
        self.preprocessing = found.preprocessing or {}
        self.architecture = found.architecture
        self.image_range = found.image_range
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype, self.batch_size = DTYPES[dtype], batch_size
        self.tile, self.slab = (0, tile) if streams else (tile, 0)
        self.network = found.network.float().eval().requires_grad_(False).to(self.device)
        if self.dtype is not torch.float32:
            # The layout in which convolutions in half precision are fastest.
            self.network.to(memory_format={2: torch.channels_last, 3: torch.channels_last_3d}.get(len(self.factors)))
        self._moments, self._decode = found.moments, found.decode
        self._streamer = Streamer(self.network, self.device, tile) if streams and tile else None

    @functools.cached_property
    def fingerprint(self):
        """SHA-256 over the configuration and the tensors by name: what it names is the function, not the file."""
        return _sha256(self.config, self.network.state_dict())

    @torch.no_grad()
    def encode_moments(self, images):
        """Return mean and log-variance of the scaled latents.  [N x C x ...] in [0, 1] -> [N x 2Z x ...].

        :raises ValueError: for values outside [0, 1], NaN, and channels or sizes that do not fit.
        """
        _require_pictures(images)
        grid = self.latent_shape(images.shape[1:])[1:]
        self._grey = images.shape[1] < self.in_channels
        mean, logvar = self._in_parts(self._encode_part, images, grid, self.factors, (1,) * len(grid)).chunk(2, dim=1)
        scaled = (mean - self.shift_factor) * self.scale_factor
        return torch.cat([scaled, logvar + 2 * math.log(self.scale_factor)], dim=1)

    @torch.no_grad()
    def decode_batch(self, latents, channels=None):
        """Return the pictures of scaled latents, clamped to [0, 1].  [N x Z x ...] -> [N x C x ...].

        :raises ValueError: where the latents have other channels than the autoencoder's.
        """
        if latents.ndim != len(self.factors) + 2 or latents.shape[1] != self.latent_channels:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, {self.path} decodes {self.latent_channels} "
                             f"channels over {len(self.factors)} axes; check {FLAG}")
        grid = latents.shape[2:]
        z = latents.float() / self.scale_factor + self.shift_factor
        values = self._in_parts(self._decode_part, z, grid, (1,) * len(grid), self.factors)
        images = from_image_range(values, self.image_range)
        if self._grey if channels is None else channels < self.in_channels:
            images = images.mean(dim=1, keepdim=True)
        return images.clamp(0, 1)

    def _channels_taken(self):
        return (3, 1) if self.in_channels == 3 else (self.in_channels,)

    def _encode_part(self, images):
        stream = self._streams(images.shape[2:])
        x = to_image_range(send(images, "cpu" if stream else self.device).float(), self.image_range)
        x = x.expand(-1, self.in_channels, *x.shape[2:])
        return torch.cat(self._streamer.moments(x) if stream else self._moments(x), dim=1).float()

    def _decode_part(self, z):
        if self._streams([n * factor for n, factor in zip(z.shape[2:], self.factors)]):
            return self._streamer.decode(z.cpu()).float()
        return self._decode(z.to(self.device)).float()

    def _streams(self, sides):
        return self._streamer is not None and max(sides) > self.slab

    def _in_parts(self, function, x, grid, gain_in, gain_out):
        """Apply `function` to batches of batch_size and, where the picture is larger than a tile, to tiles."""
        window = [min(self.tile // factor, n) if self.tile else n for factor, n in zip(self.factors, grid)]
        parts = []
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            for rows in x.split(self.batch_size or max(len(x), 1)):
                tiled = list(window) != list(grid)
                parts.append(blend_tiles(function, rows, grid, window, gain_in, gain_out) if tiled else function(rows))
        return torch.cat(parts)


def blend_tiles(function, x, grid, window, gain_in, gain_out):
    """Apply `function` tile by tile and blend the results linearly where tiles overlap (a quarter of a tile).

    Sizes are counted in cells of `grid`: along each axis the input has `gain_in` elements a cell, the result
    `gain_out`, and a tile is `window` cells.  [N x C x ... grid * gain_in] -> [N x C' x ... grid * gain_out].
    """
    overlaps = [max(w // 4, 1) for w in window]
    starts = [[*range(0, n - w, max(w - overlap, 1)), n - w] for n, w, overlap in zip(grid, window, overlaps)]
    total = weights = None
    for corner in itertools.product(*starts):
        y = function(x[(..., *_region(corner, window, gain_in))]).to(x.device)  # the whole stays where it was
        weight = torch.ones((), device=y.device)
        for start, n, w, overlap, gain in zip(corner, grid, window, overlaps, gain_out):
            profile = _profile(w * gain, overlap * gain, start > 0, start + w < n).to(y.device)
            weight = weight.unsqueeze(-1) * profile
        if total is None:
            sizes = [n * gain for n, gain in zip(grid, gain_out)]
            total, weights = y.new_zeros(*y.shape[:2], *sizes), y.new_zeros(sizes)
        region = (..., *_region(corner, window, gain_out))
        total[region] += y * weight
        weights[region] += weight
    return total / weights


def _region(corner, window, gain):
    return [slice(start * g, (start + w) * g) for start, w, g in zip(corner, window, gain)]


def _profile(length, overlap, rises, falls):
    """Return the weights of a tile along one axis: 1, and ramps where a neighbour takes over."""
    ramp = (torch.arange(overlap) + 0.5) / overlap
    profile = torch.ones(length)
    if rises:
        profile[:overlap] *= ramp
    if falls:
        profile[length - overlap:] *= ramp.flip(0)
    return profile


def _require_pictures(images):
    if not images.is_floating_point():
        raise ValueError(f"pictures are {images.dtype}; needed are float values in [0, 1] (8-bit values / 255)")
    low, high = (float(v) for v in images.aminmax())
    if not (low >= -IMAGE_SLACK and high <= 1 + IMAGE_SLACK):       # so written, NaN is refused too
        raise ValueError(f"pictures hold values from {low:.4g} to {high:.4g}; needed are values in [0, 1] without NaN "
                         "(a [-1, 1] loader wants (x + 1) / 2; float files: set --value_range)")


# ---------------------------------------------------------------------------------------------------------------------
# what may be found at a path


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
    if checkpoint_util.steps(where) or (where / "config.json").is_file():
        return _open_file(checkpoint_util.newest_weights(where, FLAG), vae_config)
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
    return _ours(network, weights, path, described, config, header.get("scale_factor"), header.get("data"))


def _open_monai(path, weights, vae_config):
    """Build an AutoencoderKL from the arguments in YAML; core's and GenerativeModels' names of them are taken."""
    arguments = _monai_arguments(path, vae_config)
    image_range = arguments.pop("image_range", (0.0, 1.0))
    scale_factor = arguments.pop("scale_factor", None)
    config = {"class": "AutoencoderKL", **json.loads(json.dumps(arguments)), "image_range": list(image_range)}
    config.pop("use_checkpointing", None)
    architecture = from_dict(AutoencoderConfig, {**arguments, "image_range": image_range})
    return _ours(AutoencoderKL(**arguments), weights, path, config, architecture, scale_factor)


def _ours(network, weights, path, config, architecture, scale_factor, preprocessing=None):
    checkpoint_util.load_into(network, weights, path, FLAG)
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
            arguments[key] = frozen(value)
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
    return _certain(network.encode(x).latents)


def _dc_moments(network, x):
    return _certain(network.encode(x).latent)


def _certain(z):
    """Return moments of latents that nothing is random about."""
    return z, torch.full_like(z, LOGVAR_RANGE[0])


# Per class: how it encodes, and the entry of its configuration whose length tells how often it halves the grid.
_DIFFUSERS = {
    "AutoencoderKL": (_kl_moments, "block_out_channels"),
    "AutoencoderTiny": (_tiny_moments, "encoder_block_out_channels"),
    "AutoencoderDC": (_dc_moments, "encoder_block_out_channels"),
}


def _sha256(config, tensors):
    """Hash a configuration and tensors, sorted by name, with their types and shapes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# the scale that diffusion sees


class LatentNormalizer:
    """Bring scaled latents to mean about 0 and standard deviation about 1: x0 = (latent - shift) / std.

    `shift` and `std` hold one number for all channels or one per channel; `mode` says where they come from.
    """

    def __init__(self, shift, std, mode):
        self.shift, self.std, self.mode = [float(v) for v in shift], [float(v) for v in std], str(mode)
        if not all(math.isfinite(v) for v in self.shift) or not all(0 < v < math.inf for v in self.std):
            raise ValueError(f"the latents' shift is {self.shift}, their std {self.std}; needed are finite numbers, "
                             "and std above 0")

    @classmethod
    def fit(cls, mode, statistics, scale_factor):
        """Choose shift and std for latents with the given statistics (mean, std, channel_mean, channel_std).

        auto: the std over all channels, shift 0. channel: mean and std of each channel. A number: that std, shift 0;
        equal to `scale_factor` it gives the diffusion model z itself. none: the latents as they are.

        :raises ValueError: for another mode, and for channels of which one has no variance where each is normalised.
        """
        mode = str(mode)
        if mode == "none":
            return cls([0], [1], mode)
        if mode == "auto":
            return cls([0], [statistics["std"]], mode)
        if mode == "channel":
            dead = [i for i, std in enumerate(statistics["channel_std"]) if not std > 1e-4 * statistics["std"]]
            if dead:
                raise ValueError(f"latent channels {dead} are constant: there is no standard deviation to divide by; "
                                 "choose --normalizer auto, or an autoencoder with fewer --latent_channels")
            return cls(statistics["channel_mean"], statistics["channel_std"], mode)
        try:
            number = float(mode)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"--normalizer is {mode!r}, possible are auto, channel, none, or a number above 0 such as "
                             f"{scale_factor}, which undoes the scale factor")
        return cls([0], [number], mode)

    def normalise(self, latents):
        """Return x0 of scaled latents; inverse of `inverse`.  [N x C x ...] -> same."""
        return (latents - self._column(self.shift, latents)).div_(self._column(self.std, latents))

    def inverse(self, x0):
        """Return the scaled latents of x0; inverse of `normalise`.  [N x C x ...] -> same."""
        return x0 * self._column(self.std, x0) + self._column(self.shift, x0)

    def to_dict(self):
        return {"mode": self.mode, "shift": self.shift, "std": self.std}

    @classmethod
    def from_dict(cls, values):
        return cls(values["shift"], values["std"], values["mode"])

    def _column(self, values, like):
        if len(values) == 1:
            return values[0]
        if len(values) != like.shape[1]:
            raise ValueError(f"the normalizer knows {len(values)} channels, latents of shape {tuple(like.shape)} have "
                             f"{like.shape[1]}; it belongs to another autoencoder")
        return send(torch.tensor(values, dtype=like.dtype).reshape(-1, *(1 for _ in like.shape[2:])), like.device)


def check_latent_std(measured_std_of_x0, normalizer, allow=False):
    """Refuse x0 whose measured standard deviation is outside 0.9 to 1.1, unless `allow`.

    :raises ValueError: naming the standard deviation and the mode that would fit.
    """
    low, high = LATENT_STD_LIMITS
    if allow or low <= measured_std_of_x0 <= high:
        return
    number = measured_std_of_x0 * normalizer.std[0]
    fitting = f" or {number:.5g}" if len(normalizer.std) == 1 and math.isfinite(number) else ""
    raise ValueError(
        f"x0 has a measured standard deviation of {measured_std_of_x0:.4g} with --normalizer {normalizer.mode}, needed "
        f"is {low} to {high}; --normalizer auto{fitting} would fit (or go on with --allow_latent_std True)"
    )
