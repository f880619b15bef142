"""Convert images in [0, 1] to the latents that diffusion works on, and back: codecs and the latent scale.

    images --encode_batch--> z * scale_factor --LatentNormalizer.normalize--> x0
    images <--decode_batch-- z * scale_factor <--LatentNormalizer.denormalize-- x0

A codec is `VAEInterface` (an autoencoder on disk) or `PixelCodec` (no autoencoder). The scale factor, and the range of
values that an autoencoder expects, are applied and inverted here and nowhere else.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated, Any, Literal, overload

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from . import deprecated_method, deprecated_names, dist_util, logger
from .autoencoder import latent_grid
from .config import ParsedText, option, require
from .interfaces import Codec, Device
from .nn import to_device, to_uint8
from .vae import blend_tiles, from_image_range, sample_moments, to_image_range
from .vae.foreign import FLAG, deterministic_moments, open_autoencoder
from .vae.streaming import Streamer

SCALE_FACTOR = 0.18215      # of the first Stable Diffusion, whose latents it brings to unit variance
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
IMAGE_TOLERANCE = 1e-4      # values this far outside [0, 1] are rounding errors of a loader
LATENT_STD_LIMITS = (0.9, 1.1)


@dataclasses.dataclass
class VAEConfig:
    vae_path: str = option(
        "", "autoencoder: run of train_autoencoder.py or a weights file of one, a diffusers folder or a file in one "
            "(or hub:owner/name to download one), a checkpoint of Stable Diffusion, or MONAI weights in a bundle "
            "or next to a YAML file", essential=True)
    scale_factor: float = option(0.0, "factor that latents are multiplied by; 0: that of the autoencoder, else 0.18215",
                                 minimum=0, essential="out")
    vae_config: str = option("", "YAML or JSON file with the arguments of MONAI weights; empty: the one next to them, "
                                 "or of their bundle")
    vae_dtype: str = option("float32", "precision of the autoencoder", choices=tuple(DTYPES))
    vae_batch_size: int = option(
        0, "images per forward pass of the autoencoder; 0: whole batches", minimum=0, essential="store")
    vae_tile: int = option(0, "maximum number of pixels on the longest axis per forward pass, for inputs larger than "
                              "memory: exact for autoencoders of this project and MONAI, overlapping tiles for "
                              "diffusers; 0: untiled", minimum=0, essential="store")


normalization = ParsedText(
    "mode", "auto, channel, none, or a number > 0 such as 0.18215, which inverts that scale factor",
    lambda text: text if text in ("auto", "channel", "none") else float(text),
    lambda mode: isinstance(mode, str) or 0 < mode < math.inf,
)


@dataclasses.dataclass
class NormalizerConfig:
    SECTION = "latents"

    normalizer: Annotated[str, normalization] = option(
        "auto", "what latents are divided by before diffusion: auto (their measured standard deviation), channel (mean "
                "and standard deviation per channel), a number, or none")
    allow_latent_std: bool = option(False, "train even if the standard deviation of x0 is outside [0.9, 1.1]")


def create_vae(config: VAEConfig, device: Device | None = None) -> "VAEInterface":
    """Open the autoencoder that a VAEConfig names."""
    codec = VAEInterface(
        config.vae_path, scale_factor=config.scale_factor or None, device=device, dtype=config.vae_dtype,
        batch_size=config.vae_batch_size, tile=config.vae_tile, vae_config=config.vae_config or None,
    )
    if codec.remark:
        logger.log_rank0(f"{FLAG} {config.vae_path}: {codec.remark}")
    return codec


class BaseCodec(Codec):
    """The members common to all codecs, computed from `in_channels`, `latent_channels`, `factors`, `preprocessing`."""

    def encode_batch(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        return sample_moments(self.encode_moments(images), eps)

    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        channels, *spatial = image_shape
        require((channels in self._accepted_channels(),
                 f"images have {channels} channels: {self.path or 'the pixel codec'} expects "
                 f"{' or '.join(map(str, self._accepted_channels()))}; set --image_channels or another {FLAG}"))
        return (self.latent_channels, *latent_grid(spatial, self.factors))

    def pad_to_factors(self, images: torch.Tensor) -> torch.Tensor:
        missing = [-n % factor for n, factor in zip(images.shape[2:], self.factors)]
        if not any(missing) or not self.preprocessing.get("pad"):
            return images
        return F.pad(images, [n for after in reversed(missing) for n in (0, after)], mode="replicate")

    def _accepted_channels(self) -> tuple[int, ...]:
        return (self.in_channels,)


class PixelCodec(BaseCodec):
    """Use the images themselves as latents: x in [0, 1] becomes 2 x - 1."""

    has_posterior, is_pixels = False, True
    scale_factor, shift_factor, path = 1.0, 0.0, ""
    image_range = (-1.0, 1.0)

    def __init__(self, channels: int = 3, dims: int = 2) -> None:
        self.preprocessing = {}
        self.in_channels = self.latent_channels = channels
        self.factors = (1,) * dims
        self.config = {"class": "PixelCodec", "channels": channels, "dims": dims}

    @property
    def fingerprint(self) -> str:  # type: ignore[override]  # read-only
        return _sha256(self.config, {})

    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        """Return mean and log-variance (its minimum).  [N x C x ...] in [0, 1] -> [N x 2C x ...]."""
        _check_unit_range(images)
        self.latent_shape(images.shape[1:])
        return torch.cat(deterministic_moments(to_image_range(images, self.image_range)), dim=1)

    def decode_batch(self, latents: torch.Tensor, channels: int | None = None) -> torch.Tensor:
        """Return images in [0, 1]; inverts `encode_batch`. `channels` is part of the interface and not used."""
        return from_image_range(latents, self.image_range).clamp(0, 1)


class VAEInterface(BaseCodec):
    """An autoencoder on disk as a codec, in eval mode and without gradients.

    `vae_path` names one of these (see `vae.foreign.KINDS`):

    - a run folder of `train_autoencoder.py`, of which the EMA weights are used, or one of its weights files;
    - a folder saved by diffusers (AutoencoderKL, AutoencoderTiny, AutoencoderDC), a weights file in one, or
      `hub:owner/name`, the only spelling that uses the network;
    - a checkpoint of Stable Diffusion in the layout of CompVis, or of its autoencoder alone (.ckpt, .pt, .safetensors);
    - weights of MONAI's AutoencoderKL (.pt, .pth, .safetensors) with its arguments in a YAML file of the same stem, or
      in `vae_config` (a path or a dictionary), which may set `image_range` and `scale_factor` as well; or a bundle of
      MONAI or weights inside of one, whose configs/inference.json or .yaml has the arguments.

    Latents are (z - shift_factor) * scale_factor. The scale factor is the argument, else the autoencoder's own, else
    0.18215; the shift is the autoencoder's own, else 0.

    An autoencoder of three channels accepts grayscale images, repeated to three channels. `decode_batch` averages the
    three channels if `channels` is 1, or if it is None and the last images encoded were grayscale.

    :param dtype: "float32", or "bfloat16" for autocast inside the networks; results are float32.
    :param batch_size: images per forward pass; 0: all at once.
    :param tile: pixels along the longest side that are on the device at a time; 0: all. An AutoencoderKL streams larger
        images slab by slab, with the same result (see `vae.streaming`). Networks of diffusers process tiles, which
        overlap by a quarter and are blended linearly: an approximation, since norms and attention see one tile only.
    :raises FileNotFoundError: if the path, or a part of what belongs there, does not exist.
    :raises ValueError: if the path contains something else, or an argument is out of range.
    """

    def __init__(
        self, vae_path: str | os.PathLike[str], scale_factor: float | None = None, device: Device | None = None,
        dtype: str = "float32", batch_size: int = 0, tile: int = 0,
        vae_config: str | os.PathLike[str] | dict[str, Any] | None = None,
    ) -> None:
        require((dtype in DTYPES, f"--vae_dtype must be one of {', '.join(DTYPES)}, got {dtype!r}"))
        opened = open_autoencoder(str(vae_path), vae_config)
        streams = opened.architecture is not None
        remark = opened.remark if scale_factor is None else ""
        if scale_factor is None:
            scale_factor = opened.scale_factor or SCALE_FACTOR
        require(
            (tile >= 0 and (streams or tile == 0 or tile >= 2 * max(opened.factors)
                            and not any(tile % factor for factor in opened.factors)),
             f"--vae_tile must be 0, or a multiple of the downsampling factors {opened.factors} and at least twice as "
             f"large, got {tile}"),
            (float(scale_factor) > 0, f"--scale_factor must be > 0, got {scale_factor}"),
        )
        self.path, self.config, self.factors = opened.path, opened.config, opened.factors
        self.in_channels, self.latent_channels = opened.in_channels, opened.latent_channels
        self.scale_factor, self.shift_factor = float(scale_factor), float(opened.shift_factor)
        self.remark = remark
        self.preprocessing = opened.preprocessing or {}
        self.architecture, self.image_range = opened.architecture, opened.image_range
        self.device = torch.device(device or dist_util.dev())
        self.dtype, self.batch_size = DTYPES[dtype], batch_size
        self.tile, self.slab = (0, tile) if streams else (tile, 0)
        self.max_side = tile
        self.network = opened.network.float().eval().requires_grad_(False).to(self.device)
        if self.dtype is not torch.float32:
            # The layout in which convolutions in half precision are fastest.
            layout = {2: torch.channels_last, 3: torch.channels_last_3d}.get(len(self.factors))
            self.network.to(memory_format=layout)  # type: ignore[call-overload]  # not declared by PyTorch
        self.nbytes = sum(p.nbytes for p in self.network.parameters())
        self._moments, self._decode = opened.moments, opened.decode
        self._streamer: Any = Streamer(self.network, self.device, tile) if self.slab else None
        self._gray_input = False

    @functools.cached_property
    def fingerprint(self) -> str:  # type: ignore[override]  # read-only
        """SHA-256 over the configuration and the tensors by name: it identifies the function, not the file."""
        return _sha256(self.config, self.network.state_dict())

    @torch.no_grad()
    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        """Return mean and log-variance of the scaled latents.  [N x C x ...] in [0, 1] -> [N x 2Z x ...].

        :raises ValueError: for values outside [0, 1], NaN, and channels or sizes that do not match.
        """
        _check_unit_range(images)
        grid = self.latent_shape(images.shape[1:])[1:]
        self._gray_input = images.shape[1] < self.in_channels
        moments = self._smaller_forward(self._encode_part, images, grid, self.factors, (1,) * len(grid))
        mean, logvar = moments.chunk(2, dim=1)
        scaled = (mean - self.shift_factor) * self.scale_factor
        return torch.cat([scaled, logvar + 2 * math.log(self.scale_factor)], dim=1)

    @torch.no_grad()
    def decode_batch(self, latents: torch.Tensor, channels: int | None = None) -> torch.Tensor:
        """Return the images of scaled latents, clamped to [0, 1].  [N x Z x ...] -> [N x C x ...].

        :raises ValueError: if the latents do not have the autoencoder's channels and axes.
        """
        require((latents.ndim == len(self.factors) + 2 and latents.shape[1] == self.latent_channels,
                 f"latents of shape {tuple(latents.shape)}: {self.path} decodes {self.latent_channels} channels over "
                 f"{len(self.factors)} axes; check {FLAG}"))
        grid = latents.shape[2:]
        z = latents.float() / self.scale_factor + self.shift_factor
        values = self._smaller_forward(self._decode_part, z, grid, (1,) * len(grid), self.factors)
        images = from_image_range(values, self.image_range)
        if self._gray_input if channels is None else channels < self.in_channels:
            images = images.mean(dim=1, keepdim=True)
        return images.clamp(0, 1)

    def encode(
        self, images: torch.Tensor | np.ndarray | Image.Image | Sequence[Image.Image]
    ) -> torch.Tensor:
        """Return the scaled latents [N x Z x ...] of images, the modes of their posteriors, on the device.

        :param images: a PIL image in mode L or RGB, or a list of such; a NumPy array [N x ... x C] as in samples_*.npz,
            or of one image [... x C], of 8 bits or float in [0, 1]; or a float tensor [N x C x ...] in [0, 1].
        :raises ValueError: for other values, and channels or sizes that do not match.
        """
        return self.encode_batch(_to_unit_tensor(images, len(self.factors)))

    @overload
    def decode(self, latents: torch.Tensor | np.ndarray, pil: Literal[False] = False) -> np.ndarray: ...

    @overload
    def decode(self, latents: torch.Tensor | np.ndarray, pil: Literal[True]) -> list[Image.Image]: ...

    def decode(self, latents: torch.Tensor | np.ndarray, pil: bool = False) -> np.ndarray | list[Image.Image]:
        """Return the images of scaled latents, as `encode` returns them: uint8 [N x ... x C].

        :param latents: a tensor or array [N x Z x ...].
        :param pil: return a list of PIL images; not of volumes.
        """
        images = np.moveaxis(to_uint8(self.decode_batch(torch.as_tensor(latents))), 1, -1)
        return to_pil_images(images) if pil else images

    def approximations(self, sides: Sequence[int]) -> dict[str, Any]:
        flags: dict[str, Any] = {}
        if self.dtype is not torch.float32:
            flags["vae_dtype"] = str(self.dtype).removeprefix("torch.")
        if self.device.type == "cuda" and torch.backends.cudnn.allow_tf32 and not flags:
            flags["tf32"] = True
        # A tile that covers the image changes nothing; slabs give the exact result.
        return {**flags, "vae_tile": self.tile} if 0 < self.tile < max(sides) else flags

    def _accepted_channels(self) -> tuple[int, ...]:
        return (3, 1) if self.in_channels == 3 else (self.in_channels,)

    def _encode_part(self, images: torch.Tensor) -> torch.Tensor:
        stream = self._streams(images.shape[2:])
        x = to_image_range(to_device(images, "cpu" if stream else self.device).float(), self.image_range)
        x = x.expand(-1, self.in_channels, *x.shape[2:])
        return torch.cat(self._streamer.moments(x) if stream else self._moments(x), dim=1).float()

    def _decode_part(self, z: torch.Tensor) -> torch.Tensor:
        if self._streams([n * factor for n, factor in zip(z.shape[2:], self.factors)]):
            return self._streamer.decode(z.cpu()).float()
        return self._decode(z.to(self.device)).float()

    def _streams(self, sides: Sequence[int]) -> bool:
        return self._streamer is not None and max(sides) > self.slab

    def _smaller_forward(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, grid: Sequence[int],
                         gain_in: Sequence[int], gain_out: Sequence[int]) -> torch.Tensor:
        """Apply `function` to at most batch_size items at a time and, if they are larger than a tile, to tiles."""
        window = [min(self.tile // factor, n) if self.tile else n for factor, n in zip(self.factors, grid)]
        tiled = list(window) != list(grid)
        parts = []
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            for part in x.split(self.batch_size or max(len(x), 1)):
                parts.append(blend_tiles(function, part, grid, window, gain_in, gain_out) if tiled else function(part))
        return torch.cat(parts)


def _to_unit_tensor(images: Any, dims: int) -> torch.Tensor:
    """Return images in one of the forms of `VAEInterface.encode` as float32 [N x C x ...] in [0, 1]."""
    if isinstance(images, torch.Tensor):
        return images
    if not isinstance(images, np.ndarray):
        listed = [images] if isinstance(images, Image.Image) else list(images)
        kinds = {image.mode if isinstance(image, Image.Image) else type(image).__name__ for image in listed}
        require((kinds <= {"L", "RGB"}, "images: expected an array, a tensor, or PIL images in mode L or RGB, got "
                 f"{', '.join(sorted(kinds))}; convert them"))
        images = np.stack([np.asarray(image).reshape(image.height, image.width, -1) for image in listed])
    images = images[None] if images.ndim == dims + 1 else images
    require((images.ndim == dims + 2, f"images: expected an array of {dims + 1} or {dims + 2} axes, the channels last, "
             f"got {tuple(images.shape)}"))
    values = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1)))
    return values.float() / 255 if values.dtype is torch.uint8 else values.float()


def to_pil_images(images: np.ndarray) -> list[Image.Image]:
    """Return uint8 images [N x H x W x C], C 1 or 3, as PIL images in mode L or RGB."""
    require((images.ndim == 4, f"pil: expected images [N x H x W x C], got {tuple(images.shape)}; use the array"))
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in images]


def _check_unit_range(images: torch.Tensor) -> None:
    require((images.is_floating_point(),
             f"images: expected float values in [0, 1], got {images.dtype}; divide 8-bit values by 255"))
    low, high = (float(v) for v in images.aminmax())
    require((low >= -IMAGE_TOLERANCE and high <= 1 + IMAGE_TOLERANCE,       # false for NaN, too
             f"images: expected values in [0, 1] without NaN, got values from {low:.4g} to {high:.4g}; map [-1, 1] by "
             "(x + 1) / 2, for float files set --value_range"))


def _sha256(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> str:
    """Hash a configuration and tensors, sorted by name, with their types and shapes."""
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class LatentNormalizer:
    """Bring scaled latents to mean about 0 and standard deviation about 1: x0 = (latent - shift) / std.

    `shift` and `std` contain one number for all channels or one per channel; `mode` is the --normalizer they come from.
    """

    def __init__(self, shift: Iterable[float], std: Iterable[float], mode: str | float) -> None:
        self.shift, self.std, self.mode = [float(v) for v in shift], [float(v) for v in std], str(mode)
        require((all(map(math.isfinite, self.shift)) and all(0 < v < math.inf for v in self.std),
                 f"latents have shift {self.shift} and std {self.std}: expected finite numbers and std above 0"))

    @classmethod
    def fit(cls, mode: str | float, statistics: dict[str, Any]) -> "LatentNormalizer":
        """Choose shift and std for latents with these statistics (mean, std, channel_mean, channel_std).

        auto: the std over all channels, shift 0. channel: mean and std of each channel. A number: that std, shift 0;
        with the scale factor itself the diffusion model sees z. none: the latents as they are.

        :raises ValueError: for another mode, and for mode channel if a channel is constant.
        """
        mode, std = str(mode), normalization.parse(mode, "normalizer")
        if mode == "channel":
            dead = [i for i, std in enumerate(statistics["channel_std"]) if not std > 1e-4 * statistics["std"]]
            require((not dead, f"latent channels {dead} are constant: they cannot be divided by their standard "
                               "deviation; set --normalizer auto, or use an autoencoder with fewer --latent_channels"))
            return cls(statistics["channel_mean"], statistics["channel_std"], mode)
        if mode in ("none", "auto"):
            return cls([0], [1 if mode == "none" else statistics["std"]], mode)
        return cls([0], [std], mode)

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Return x0 of scaled latents; inverts `denormalize`.  [N x C x ...] -> same."""
        return (latents - self._column(self.shift, latents)).div_(self._column(self.std, latents))

    def denormalize(self, x0: torch.Tensor) -> torch.Tensor:
        """Return the scaled latents of x0; inverts `normalize`.  [N x C x ...] -> same."""
        return x0 * self._column(self.std, x0) + self._column(self.shift, x0)

    normalise = deprecated_method("normalise", "normalize")  # alias
    inverse = deprecated_method("inverse", "denormalize")  # alias

    def to_dict(self) -> dict[str, Any]:
        return {"mode": self.mode, "shift": self.shift, "std": self.std}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "LatentNormalizer":
        return cls(values["shift"], values["std"], values["mode"])

    def _column(self, values: list[float], like: torch.Tensor) -> torch.Tensor | float:
        if len(values) == 1:
            return values[0]
        require((len(values) == like.shape[1], f"latents of shape {tuple(like.shape)} do not match a normalizer of "
                                               f"{len(values)} channels, which belongs to another autoencoder"))
        return to_device(torch.tensor(values, dtype=like.dtype).reshape(-1, *(1 for _ in like.shape[2:])), like.device)


def check_latent_std(measured_std_of_x0: float, normalizer: LatentNormalizer, allow: bool = False) -> None:
    """Check that the measured standard deviation of x0 is within LATENT_STD_LIMITS, unless `allow`.

    :raises ValueError: otherwise, with a --normalizer that would give 1.
    """
    low, high = LATENT_STD_LIMITS
    number = measured_std_of_x0 * normalizer.std[0]
    suggested = f" or {number:.5g}" if len(normalizer.std) == 1 and math.isfinite(number) else ""
    require((
        allow or low <= measured_std_of_x0 <= high,
        f"x0 has a measured standard deviation of {measured_std_of_x0:.4g} with --normalizer {normalizer.mode}: "
        f"expected {low} to {high}; set --normalizer auto{suggested}, or continue with --allow_latent_std True",
    ))


__getattr__ = deprecated_names("vae_wrapper")
