"""Stand between pictures in [0, 1] and the latents that diffusion works on: codecs and the latents' scale.

    pictures --encode_batch--> z * scale_factor --LatentNormalizer.normalise--> x0     and back by the inverses

A codec is `VAEInterface` (an autoencoder on disk, whichever project wrote it) or `PixelCodec` (no autoencoder). This is
the only place where the scale factor and the range that an autoencoder wants are applied, and where they are undone.
"""

import dataclasses
import functools
import hashlib
import json
import math

import torch
import torch.nn.functional as F

from .autoencoder import latent_grid
from .config import option
from .interfaces import Codec
from .nn import to_device
from .vae import LOGVAR_RANGE, blend_tiles, from_image_range, sample_moments, to_image_range
from .vae.foreign import FLAG, _open
from .vae.streaming import Streamer

SCALE_FACTOR = 0.18215
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMAGE_TOLERANCE = 1e-4
LATENT_STD_LIMITS = (0.9, 1.1)


@dataclasses.dataclass
class VAEConfig:
    vae_path: str = option("", "autoencoder: a run of train_autoencoder.py or a weights file of one, a diffusers folder "
                            "(or hub:owner/name to download one), or MONAI weights with a YAML file beside them")
    scale_factor: float = option(0.0, "what latents are multiplied by; 0: what the autoencoder states, else 0.18215",
                              minimum=0)
    vae_config: str = option("", "YAML file with the arguments of MONAI weights; empty: the one beside them")
    vae_dtype: str = option("float32", "precision inside the autoencoder", choices=tuple(DTYPES))
    vae_batch_size: int = option(0, "pictures that the autoencoder takes at a time; 0: all it is given", minimum=0)
    vae_tile: int = option(0, "have no more than this many pixels of the longest side on the device at a time, for "
                           "pictures and volumes larger than its memory; exact for autoencoders of this project and of "
                           "MONAI, overlapping tiles for those of diffusers; 0: the whole", minimum=0)


@dataclasses.dataclass
class NormalizerConfig:
    SECTION = "latents"

    normalizer: str = option("auto", "what latents are divided by before diffusion: auto (their measured standard "
                                  "deviation), channel (mean and standard deviation per channel), a number, or none")
    allow_latent_std: bool = option(False, "train although the standard deviation of x0 is outside 0.9 to 1.1")


def create_vae(config, device=None):
    """Open the autoencoder that a VAEConfig names."""
    return VAEInterface(
        config.vae_path, scale_factor=config.scale_factor or None, device=device, dtype=config.vae_dtype,
        batch_size=config.vae_batch_size, tile=config.vae_tile, vae_config=config.vae_config or None,
    )


class BaseCodec(Codec):
    """The members that all codecs share; subclasses add `config`, `encode_moments`, `decode_batch`, `fingerprint`."""

    has_posterior, is_pixels = True, False

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

    def pad_to_factors(self, images):
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

    def approximations(self, sides):
        """Return the flags under which latents of images of size `sides` are less exact than in float32, {} if none."""
        return {}

    def _channels_taken(self):
        return (self.in_channels,)


class PixelCodec(BaseCodec):
    """Use the images themselves as latents: x in [0, 1] becomes 2 x - 1."""

    has_posterior, is_pixels = False, True
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
        _check_unit_range(images)
        self.latent_shape(images.shape[1:])
        mean = to_image_range(images, self.image_range)
        return torch.cat([mean, torch.full_like(mean, LOGVAR_RANGE[0])], dim=1)

    def decode_batch(self, latents, channels=None):
        """Return pictures in [0, 1]; inverse of `encode_batch`. `channels` is there for the interface."""
        return from_image_range(latents, self.image_range).clamp(0, 1)


class VAEInterface(BaseCodec):
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
        self._gray_input = False
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
        _check_unit_range(images)
        grid = self.latent_shape(images.shape[1:])[1:]
        self._gray_input = images.shape[1] < self.in_channels
        mean, logvar = self._smaller_forward(self._encode_part, images, grid, self.factors, (1,) * len(grid)).chunk(2, dim=1)
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
        values = self._smaller_forward(self._decode_part, z, grid, (1,) * len(grid), self.factors)
        images = from_image_range(values, self.image_range)
        if self._gray_input if channels is None else channels < self.in_channels:
            images = images.mean(dim=1, keepdim=True)
        return images.clamp(0, 1)

    def approximations(self, sides):
        """Return the flags under which latents of images of size `sides` are less exact than in float32, {} if none."""
        flags = {"vae_dtype": str(self.dtype).removeprefix("torch.")} if self.dtype is not torch.float32 else {}
        # A tile that covers the whole image is the image; slabs give the exact result.
        return {**flags, "vae_tile": self.tile} if 0 < self.tile < max(sides) else flags

    def _channels_taken(self):
        return (3, 1) if self.in_channels == 3 else (self.in_channels,)

    def _encode_part(self, images):
        stream = self._streams(images.shape[2:])
        x = to_image_range(to_device(images, "cpu" if stream else self.device).float(), self.image_range)
        x = x.expand(-1, self.in_channels, *x.shape[2:])
        return torch.cat(self._streamer.moments(x) if stream else self._moments(x), dim=1).float()

    def _decode_part(self, z):
        if self._streams([n * factor for n, factor in zip(z.shape[2:], self.factors)]):
            return self._streamer.decode(z.cpu()).float()
        return self._decode(z.to(self.device)).float()

    def _streams(self, sides):
        return self._streamer is not None and max(sides) > self.slab

    def _smaller_forward(self, function, x, grid, gain_in, gain_out):
        """Apply `function` to batches of batch_size and, where the picture is larger than a tile, to tiles."""
        window = [min(self.tile // factor, n) if self.tile else n for factor, n in zip(self.factors, grid)]
        parts = []
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            for rows in x.split(self.batch_size or max(len(x), 1)):
                tiled = list(window) != list(grid)
                parts.append(blend_tiles(function, rows, grid, window, gain_in, gain_out) if tiled else function(rows))
        return torch.cat(parts)


def _check_unit_range(images):
    if not images.is_floating_point():
        raise ValueError(f"pictures are {images.dtype}; needed are float values in [0, 1] (8-bit values / 255)")
    low, high = (float(v) for v in images.aminmax())
    if not (low >= -IMAGE_TOLERANCE and high <= 1 + IMAGE_TOLERANCE):       # so written, NaN is refused too
        raise ValueError(f"pictures hold values from {low:.4g} to {high:.4g}; needed are values in [0, 1] without NaN "
                         "(a [-1, 1] loader wants (x + 1) / 2; float files: set --value_range)")


def _sha256(config, tensors):
    """Hash a configuration and tensors, sorted by name, with their types and shapes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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

    def normalize(self, latents):
        """Return x0 of scaled latents; inverse of `denormalize`.  [N x C x ...] -> same."""
        return (latents - self._column(self.shift, latents)).div_(self._column(self.std, latents))

    def denormalize(self, x0):
        """Return the scaled latents of x0; inverse of `normalize`.  [N x C x ...] -> same."""
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
        return to_device(torch.tensor(values, dtype=like.dtype).reshape(-1, *(1 for _ in like.shape[2:])), like.device)


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
