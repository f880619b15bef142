"""The interfaces of the project: image source, latent source, codec, diffusion process, batch source, objective.

A new data source, autoencoder kind or process implements one of these and is entered in one table. Other code relies on
the members below and on nothing else; no member is probed for. A class that derives from its interface takes over the
defaults given here, and cannot be constructed while an abstract method is missing. Defaults without effect end in
`return`, as type checkers take a method of a protocol for abstract if it has a docstring only.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

Indices: TypeAlias = Sequence[int] | np.ndarray
Flips: TypeAlias = Sequence[bool] | np.ndarray | None
Rngs: TypeAlias = Sequence[np.random.Generator] | None
Device: TypeAlias = torch.device | str
Model: TypeAlias = Callable[..., torch.Tensor]
Conditioning: TypeAlias = dict[str, Any]

@runtime_checkable
class ImageSource(Protocol):
    """Images or volumes of one size, float32 in [0, 1], accessed by index; `data.SOURCES` lists the implementations.

    `shape` is (C, ...) of the result of `batch` and `unpadded_shape` the same without the padding of `--pad`. `labels`
    are int64 [N] in the order of `class_names`, both None if the data has no classes; `attributes` are further numbers
    of each item by name, float32 [N] with NaN where unknown. `names` holds one name per item, `preprocessing` the
    settings that checkpoints record, `fingerprint` a hash of the names and sizes of the files.
    """

    folder: str
    shape: tuple[int, ...]
    unpadded_shape: tuple[int, ...]
    names: Sequence[str]
    labels: np.ndarray | None
    class_names: list[str] | None
    preprocessing: dict[str, Any]
    fingerprint: str
    attributes: Mapping[str, np.ndarray] = MappingProxyType({})
    random_flip: bool = False   # training passes flips to `batch`
    random_crop: bool = False   # training passes rngs to `batch`

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.names)

    @abstractmethod
    def batch(self, indices: Indices, flips: Flips = None, rngs: Rngs = None) -> torch.Tensor:
        """Return items as float32 [n x C x ...] in [0, 1] on the CPU.

        :param indices: integers [n].
        :param flips: booleans [n]; flip these items along the last axis. None: flip none.
        :param rngs: one NumPy Generator per item for random crops. None: deterministic crops.
        """

    def describe(self) -> dict[str, Any]:
        """Return the files and settings that were read, JSON-able; the `preprocessing` entry of a latent cache."""
        return {**self.preprocessing, "data_dir": self.folder, "files": len(self), "fingerprint": self.fingerprint,
                "shape": list(self.shape), "unpadded_shape": list(self.unpadded_shape)}

    def summary(self) -> str:
        """Return one line for the log: count, shape, types, classes."""
        return f"{len(self)} images {'x'.join(map(str, self.shape))} in {self.folder}"


@runtime_checkable
class LatentSource(Protocol):
    """Scaled latents accessed by index: a cache, a folder of `.npy` files, or images that are encoded on the fly.

    `read` gathers values on any thread, `latents` turns them into latents on the device. `latent_shape` is (Z, ...),
    `image_shape` and `unpadded_shape` (C, ...) or None if unknown, `statistics` mean and standard deviation over all
    values and per channel ({} for pixels), `attributes` are those of `ImageSource`, `autoencoder` is the description by
    its codec (None if unknown), `fingerprint` a hash of the files (None for a cache, which records it).
    """

    folder: Any
    count: int
    latent_shape: tuple[int, ...]
    image_shape: tuple[int, ...] | None
    unpadded_shape: tuple[int, ...] | None
    labels: np.ndarray | None
    class_names: list[str] | None
    filenames: Sequence[str] | None
    preprocessing: dict[str, Any]
    scale_factor: float
    autoencoder: dict[str, Any] | None
    statistics: dict[str, Any]
    fingerprint: str | None = None
    attributes: Mapping[str, np.ndarray] = MappingProxyType({})
    random_flip: bool = False           # `read` accepts flips
    random_crop: bool = False           # `read` uses rngs
    draws_posterior: bool = False       # `latents` uses eps
    supports_bulk_reads: bool = False   # reading thousands of items at once is as fast per item as reading few
    nbytes: int = 0                     # of stored latents that can be kept on a device

    def __len__(self) -> int:
        """Return the number of items."""
        return self.count

    @abstractmethod
    def read(self, indices: Indices, flips: Flips = None, rngs: Rngs = None) -> torch.Tensor:
        """Return the stored values, or images, of some items; safe to call on a background thread."""

    @abstractmethod
    def latents(self, values: torch.Tensor, eps: torch.Tensor | None = None, device: Device = "cpu") -> torch.Tensor:
        """Return scaled latents [n x Z x ...] float32 on `device` from the result of `read`.

        :param eps: standard normal noise [n x Z x ...] of a posterior sample. None: the posterior mode.
        """

    def labels_of(self, indices: Indices) -> torch.Tensor | None:
        """Return labels int64 [n], None without classes."""
        return None if self.labels is None else torch.from_numpy(self.labels[np.asarray(indices)])

    def batch(self, indices: Indices, eps: torch.Tensor | None = None,
              flips: Flips = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (scaled latents float32 [n x Z x ...] on the CPU, labels int64 [n] or None)."""
        return self.latents(self.read(indices, flips), eps), self.labels_of(indices)

    def verify(self, progress: Callable[[int, int], Any] | None = None) -> None:
        """Compare the files with their recorded hashes, if there are any.

        :param progress: called with (files done, files in total).
        :raises ValueError: if a file differs; the message names it.
        """
        return

    def on_device(self, device: Device, limit_bytes: int = 2**31) -> bool:
        """Keep all latents on `device` if they take at most `limit_bytes`; return whether they are kept there."""
        return False


@runtime_checkable
class ConditionSource(Protocol):
    """Conditions of items by index: images or label maps [K x ...] on the grid of x0; see `data.conditions`.

    `names` holds the name of each one, `shape` is (K, ...), `fingerprint` a hash of the files.
    """

    shape: tuple[int, ...]
    names: Sequence[str]
    fingerprint: str
    random_flip: bool       # `read` accepts flips
    random_crop: bool       # `read` uses rngs

    def __len__(self) -> int:
        """Return the number of conditions."""
        return len(self.names)

    @abstractmethod
    def read(self, indices: Indices, flips: Flips = None, rngs: Rngs = None) -> torch.Tensor:
        """Return what `on_device` needs of some items, on the CPU; safe to call on a background thread."""

    @abstractmethod
    def on_device(self, values: torch.Tensor, device: Device) -> torch.Tensor:
        """Return conditions [n x K x ...] float32 on `device` from the result of `read`."""

    def of_samples(self, indices: Indices, device: Device) -> torch.Tensor:
        """Return the conditions of samples, [n x K x ...]: that of sample i is condition i modulo their number."""
        return self.on_device(self.read([i % len(self) for i in indices]), device)


@runtime_checkable
class Codec(Protocol):
    """Encode images in [0, 1] as scaled latents and decode them; see `vae_wrapper`.

    `factors` are the total downsampling factors per spatial axis, `config` a JSON-able description that is hashed with
    the weights into `fingerprint`, `path` a hint where the autoencoder is stored, `preprocessing` the data settings of
    its training.
    """

    in_channels: int
    latent_channels: int
    factors: tuple[int, ...]
    scale_factor: float
    shift_factor: float
    config: dict[str, Any]
    path: str
    fingerprint: str
    preprocessing: dict[str, Any]
    has_posterior: bool = True      # an image has more than one latent
    is_pixels: bool = False         # latents are the images themselves, in [-1, 1]
    max_side: int = 0               # pixels of the longest axis that are processed at a time; 0: all
    nbytes: int = 0                 # of weights on a device

    @abstractmethod
    def encode_moments(self, images: torch.Tensor) -> torch.Tensor:
        """Return mean and log-variance of the scaled latents.  [N x C x ...] in [0, 1] -> [N x 2Z x ...]."""

    @abstractmethod
    def encode_batch(self, images: torch.Tensor, eps: torch.Tensor | None = None) -> torch.Tensor:
        """Return scaled latents, the posterior mode or with standard normal noise `eps` a posterior sample.

        [N x C x ...] in [0, 1], eps [N x Z x ...] -> [N x Z x ...].
        """

    @abstractmethod
    def decode_batch(self, latents: torch.Tensor, channels: int | None = None) -> torch.Tensor:
        """Return images clamped to [0, 1].  [N x Z x ...] -> [N x C x ...]; with `channels` 1 color is averaged."""

    @abstractmethod
    def latent_shape(self, image_shape: Sequence[int]) -> tuple[int, ...]:
        """Return (Z, ...) for images of shape (C, ...).

        :raises ValueError: if the channels differ or a factor does not divide a size.
        """

    @abstractmethod
    def pad_to_factors(self, images: torch.Tensor) -> torch.Tensor:
        """Return images padded at their far edges to sizes that the factors divide.  [N x C x ...] -> same or larger.

        Images stay as they are unless the autoencoder was trained with --pad True.
        """

    def describe(self) -> dict[str, Any]:
        """Return the entry of caches and run headers; the SHA-256 identifies the function, the path is a hint."""
        return {"config": self.config, "sha256": self.fingerprint, "path": self.path,
                "scale_factor": self.scale_factor, "shift_factor": self.shift_factor}

    def approximations(self, sides: Sequence[int]) -> dict[str, Any]:
        """Return the flags under which latents of images of size `sides` are less exact than in float32, {} if none."""
        return {}


@runtime_checkable
class Process(Protocol):
    """A diffusion process over x0 [N x C x ...]: its interface to training, sampling, guidance and evaluation.

    Timesteps t are int64 [N] in [0, num_timesteps), 0 is the least noisy. `timestep_map` lists the timesteps of the
    original, unspaced process. A network is any callable `model(x, timesteps, **model_kwargs)`. The processes are
    listed in `runs.factories.PROCESSES`, the sampling loops, each with the processes that it applies to, in
    `sampling.solvers.SAMPLERS`.
    """

    num_timesteps: int
    timestep_map: Sequence[int]

    @abstractmethod
    def q_sample(self, x_start: torch.Tensor, t: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        """Return x_t: x_start diffused to timesteps t, with standard normal `noise` (None: sample it)."""

    @abstractmethod
    def training_losses(
        self, model: Model, x_start: torch.Tensor, t: torch.Tensor, model_kwargs: Conditioning | None = None,
        noise: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Return losses per sample, each [N]; "loss" is the one to minimize."""

    @abstractmethod
    def predict_xstart(
        self, model: Model, x: torch.Tensor, t: torch.Tensor, clip_denoised: bool = True,
        denoised_fn: Callable[[torch.Tensor], torch.Tensor] | None = None, cond_fn: Model | None = None,
        model_kwargs: Conditioning | None = None,
    ) -> torch.Tensor:
        """Return x0 as the network predicts it at x_t, guided by `cond_fn`.  [N x C x ...] -> same"""

    @abstractmethod
    def noise_levels(self) -> np.ndarray:
        """Return sigma_t, the noise-to-signal ratio at each timestep, float64 [T]."""

    @abstractmethod
    def model_timesteps(self, t: torch.Tensor) -> torch.Tensor:
        """Return the timesteps that are passed to networks and guidance for t.  [N] -> [N]"""

    def model_timestep(self, t: int) -> float:
        """Return the number that `model_timesteps` returns for timestep t, computed on the host."""
        return float(self.model_timesteps(torch.tensor([t])))

    def scales(self) -> np.ndarray:
        """Return sqrt(signal^2 + noise^2) of x_t at each timestep, float64 [T]: 1 in Gaussian processes."""
        return np.ones(self.num_timesteps)

    def truncated(self, count: int) -> "Process":
        """Return the process on its first `count` timesteps, whose sampling starts at data noised to the last of them.

        :raises NotImplementedError: if the process has no such part.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot start at noised data")

    def noise_condition(self, low_res: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return conditioning images [N x C x ...] diffused to timesteps t; timestep 0 leaves them unchanged."""
        clean = (t == 0).view(-1, *(1,) * (low_res.dim() - 1))
        return torch.where(clean, low_res, self.q_sample(low_res, t, noise))

    def unclipped_warning(self) -> str | None:
        """Return why sampling without clipping x0 may diverge from the first step on, None if it may not."""
        return None

    def calc_bpd_loop(self, model: Model, x_start: torch.Tensor, clip_denoised: bool = True,
                      model_kwargs: Conditioning | None = None) -> dict[str, torch.Tensor]:
        """Return a bound of the negative log-likelihood in bits per dimension, and its terms.

        :raises NotImplementedError: if the process defines no bound.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no likelihood")


@runtime_checkable
class PerTimestep(Protocol):
    """A model of which other parts are evaluated at other timesteps, chosen without reading the device."""

    @abstractmethod
    def at(self, timestep: float) -> Model:
        """Return the network to call at a timestep, a number as `Process.model_timestep` returns it."""


@runtime_checkable
class BatchSource(Protocol):
    """Endless iterator over (batch [N x C x ...], conditioning dictionary) for a TrainLoop; see `data.batching`."""

    def __iter__(self) -> "BatchSource":
        return self

    def __next__(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the next batch of this rank."""

    def seek(self, step: int) -> None:
        """Make the batch of `step` the next one."""

    def close(self) -> None:
        """Release threads and files; the next batch acquires them again."""


class Objective(Protocol):
    """Training objective: losses per sample, and the state and second network that belong to them.

    `discriminator` is None, or trained alongside the model (see `vae.objective.DiscriminatorTrainer`). The defaults are
    those of an objective without state.
    """

    discriminator: Any = None

    def __call__(
        self, model: Model, batch: torch.Tensor, cond: Conditioning, rng: Any, loss_scale: float = 1.0
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        """Return ({name: losses [n]}, timesteps [n] or None) of a microbatch; "loss" is the one to minimize.

        :param cond: conditioning dictionary of the batch.
        :param rng: an `objectives.StepRNG`, the only source of randomness.
        :param loss_scale: factor that keeps float16 gradients from vanishing, if gradients are computed in here.
        """

    def after_step(self, t: torch.Tensor | None, terms: dict[str, torch.Tensor]) -> None:
        """Adapt to the timesteps and losses of the whole batch of this rank; called by every rank."""
        return

    def log(self, batch: torch.Tensor, t: torch.Tensor | None, terms: dict[str, torch.Tensor]) -> None:
        """Log the losses of the whole batch of this rank."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Return the JSON-able state that a checkpoint stores."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the result of `state_dict`."""
        return
