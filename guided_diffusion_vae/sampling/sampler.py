"""Sample a diffusion model: sample i depends on (seed, i) only."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch

from ..config import CommaSeparated, option, require, resolve, words
from ..data.axes import SpectrogramAxes
from ..data.attributes import Attributes, attribute_ranges, sample_attributes
from ..interfaces import Codec, ConditionSource, Process
from ..nn import keyed_randn, keyed_rng, to_device, without_tf32
from .solvers import SAMPLERS, applicable_samplers

_drawing = ThreadPoolExecutor(1, "noise")
START, CONDITION = 5, 8  # second number of the keys of sampling noise; training uses others
noise_levels = CommaSeparated("lo,hi", "two noise levels, the lower first, such as 0.3,3", float,
                              lambda ends: not ends or len(ends) == 2 and 0 <= ends[0] < ends[1])


@dataclass
class SamplingConfig:
    model_path: str = option(
        "", "run of image_train_vae.py, or a weights file of one (ema_... or model...)", essential=True)
    num_samples: int = option(64, "number of samples", minimum=1, essential=True)
    batch_size: int = option(16, "samples in a batch per rank; does not change the samples", minimum=1, essential=True)
    sampler: str = option("", "ddpm (stochastic), ddim (deterministic), or a multi-step solver for 10 to 25 steps: "
                              "dpmpp_sde (stochastic, tolerates model errors), dpmpp, unipc; of rectified flows euler, "
                              "heun or one of these; empty: ddpm, with --use_ddim ddim; euler", choices=("", *SAMPLERS),
                          essential="classes")
    use_ddim: bool = option(False, "same as --sampler ddim, usually with --timestep_respacing ddim50")
    clip_denoised: bool = option(False, "clip the predicted x0 to [-1, 1]: right for pixels, the default there, but "
                                        "wrong for latents, a third of which are outside")
    cfg_scale: float = option(1.0, "scale of classifier-free guidance, for models trained with --class_dropout; 1: "
                                   "none; 2 to 4: clearer classes with less variety; 0: samples without a class",
                              essential="classes")
    cfg_interval: Annotated[str, noise_levels] = option(
        "", "lo,hi: noise levels (sigma) in which --cfg_scale is active, such as 0.3,3; empty: all")
    cfg_rescale: float = option(0.0, "fraction in which predictions guided by --cfg_scale are rescaled to the standard "
                                     "deviation of unguided ones, against oversaturation; such as 0.7; 0: none",
                                minimum=0, maximum=1)
    guide_model_path: str = option(
        "", "weaker model that --cfg_scale guides away from instead of the unconditional prediction (autoguidance), an "
            "earlier or smaller one of the same data: run or weights file; requires no --class_dropout; empty: none")
    sample_dtype: str = option("float32", "precision of the network, and of the autoencoder unless --vae_dtype is set; "
                                          "bfloat16 is about twice as fast, with slightly different samples",
                               choices=("float32", "bfloat16"))
    compile: bool = option(False, "compile the network, which takes minutes and makes steps 1.1 to 1.3 times as fast: "
                                  "pays off after 3,700 to 6,700 samples of a small model")
    classes: Annotated[str, words] = option(
        "", "comma-separated names or indices of the classes to sample cyclically; empty: all", essential=True)
    attributes: Annotated[str, attribute_ranges] = option(
        "", "comma-separated NAME=VALUE, NAME=LOW..HIGH (uniformly distributed) or NAME=unknown, of a model trained "
            "with --condition_on; omitted ones are distributed over the range of training")
    seed: int = option(0, "seed; sample i depends on (seed, i) only", essential="classes")
    project_colormap: str = option(
        "", "move RGB samples to the nearest colors of a colormap, so that they can be read as scalars: True: the one "
            "of the training images, or the name of one, see --colormap")
    save_db: bool = option(False, "also write every sample of a spectrogram in dB, on the scale of the training data, "
                                  "as db/*.npy float32 [H x W], and its axes as db/spectrogram.json")
    save_individual: bool = option(True, "also write every sample as a PNG file, every volume as .nii.gz")


@dataclass
class PixelSamplingConfig(SamplingConfig):
    """The same with the defaults of guided-diffusion's sampling scripts."""

    SECTION = "sampling"

    model_path: str = option("", "run of image_train.py or image_train_vae.py, a weights file of one, or one of "
                                 "guided-diffusion described by the model flags", essential=True)
    num_samples: int = option(10000, "number of samples", minimum=1, essential=True)
    clip_denoised: bool = option(True, "clip the predicted x0 to [-1, 1]; for latents only if set explicitly")


@dataclass
class StudySamplingConfig(SamplingConfig):
    """The same for several models, whose number of samples follows from their training images."""

    SECTION = "sampling"

    model_path: str = option(
        "", "comma-separated runs of image_train_vae.py, or weights files of them, to sample from, each "
            "trained on the images of a share; empty: none", essential=True)
    num_samples: int = option(0, "samples of each model; 0: as many as it has training images", minimum=0)


@dataclass
class BaseConfig:
    SECTION = "sampling"

    base_samples: str = option("", "low-resolution images to upsample: .npz of a sampling script (arr_0, and arr_1 for "
                                   "an upsampler with classes)", essential=True)
    cond_noise_level: int = option(0, "timestep to which they are noised first, below the --cond_noise_steps of "
                                      "training; hides artifacts of samples", minimum=0)


class KeyedNoise:
    """Standard normal noise for the samples `indices`, each from a separate stream.

    Called with x [N x C x ...], it returns the next draw of every stream, on the device of x.

    :param shape: of a sample, [C x ...]: draws are then prepared on a background thread, the first one (x_T) at once,
        and from the second one on (a solver that samples noise) the next one while this one is used.
    :param pinned: prepare them in memory from which a GPU copies without waiting.
    """

    def __init__(self, seed, indices, shape=None, pinned=False):
        self.streams = [keyed_rng(seed, START, i) for i in indices]
        self.shape, self.pinned, self.draws = shape, pinned, 0
        self.ahead = _drawing.submit(self._draw, shape) if shape else None

    def __call__(self, x):
        drawn = self.ahead.result() if self.ahead else self._draw(x.shape[1:])
        self.draws += 1
        self.ahead = _drawing.submit(self._draw, self.shape) if self.shape and self.draws > 1 else None
        return to_device(drawn, x.device).to(x.dtype)

    def _draw(self, shape):
        drawn = torch.empty(len(self.streams), *shape, pin_memory=self.pinned)
        for stream, row in zip(self.streams, drawn.numpy()):
            stream.standard_normal(out=row, dtype=np.float32)
        return drawn


class CompiledNetwork:
    """A network that is compiled for batches of `sizes`; others, such as the last batch, use it as it is.

    :raises RuntimeError: at the first call, if torch.compile has no working compiler.
    """

    def __init__(self, network, sizes):
        self.network, self.sizes = network, sizes
        self.compiled = torch.compile(network, dynamic=False)

    def __call__(self, x, timesteps, **conditioning):
        if len(x) not in self.sizes:
            return self.network(x, timesteps, **conditioning)
        try:
            return self.compiled(x, timesteps, **conditioning)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            reason = str(error.inner_exception).splitlines()[0]
            raise RuntimeError(f"--compile True does not work here: expected a compiler for {x.device.type}, got "
                               f"{reason}; install one (for the CPU g++, or set $CXX), or omit the flag") from error


def parse_classes(text: str, num_classes: int, names: list[str] | None = None) -> list[int] | None:
    """Return the class indices of comma-separated names or indices; empty: all; None if there are no classes.

    A number that is the name of a class means that class.

    :raises ValueError: for a class that does not exist.
    """
    require((num_classes or not text, f"--classes {text}: the samples have no classes; omit the flag"))
    known = ", ".join(names) if names else f"0 to {num_classes - 1}"
    classes = []
    for word in words.parse(text, "classes"):
        named = names.index(word) if names and word in names else None
        require((named is not None or word.isdigit() and int(word) < num_classes,
                 f"--classes: there is no class {word!r}: expected one of: {known}"))
        classes.append(int(word) if named is None else named)
    return classes or list(range(num_classes)) or None


def resolve_sampler(config: SamplingConfig, diffusion) -> str:
    """Return the key of SAMPLERS that a SamplingConfig requests for a process.

    :raises ValueError: if --use_ddim conflicts with --sampler, or the sampler does not apply to the process.
    """
    samplers, name = applicable_samplers(diffusion), resolve(config)[0].sampler
    require((name in ("", *samplers), f"--sampler {name} does not apply to the process of the model: expected one of: "
             f"{', '.join(samplers)}"))
    return name or samplers[0]


def decoded_shape(header: dict, codec) -> tuple[int, ...]:
    """Return the shape (C, ...) of decoded images: that of the header, else as the codec upsamples its latents."""
    grid = zip(header["latent_shape"][1:], codec.factors)
    return tuple(header["image_shape"] or (codec.in_channels, *(n * factor for n, factor in grid)))


@dataclass(frozen=True)
class LowResConditioning:
    """Low-resolution images that an upsampler is conditioned on; sample i uses image i modulo their number.

    :param images: uint8 [N x C x ...], possibly memory-mapped; `labels`: int64 [N] or None.
    :param diffusion: the unspaced process of the upsampler.
    :param noise_level: timestep to which the encoded images are diffused; 0: none.
    """

    images: np.ndarray
    labels: np.ndarray | None
    codec: Codec
    normalizer: Any     # `vae_wrapper.LatentNormalizer`, of a higher layer
    diffusion: Process
    noise_level: int = 0
    seed: int = 0

    @without_tf32()     # low-resolution latents as in training
    def condition(self, indices, device):
        """Return the conditioning of the samples `indices`: {low_res [n x C x ...], low_res_times [n]}."""
        rows = [i % len(self.images) for i in indices]
        images = self.codec.pad_to_factors(torch.from_numpy(self.images[rows].astype(np.float32) / 255))
        low_res = self.normalizer.normalize(to_device(self.codec.encode_batch(images), device))
        if not self.noise_level:
            return {"low_res": low_res}
        noise = to_device(keyed_randn(low_res.shape[1:], [(self.seed, CONDITION, i) for i in indices]), device)
        t = torch.full((len(rows),), self.noise_level, device=device)
        return {"low_res": self.diffusion.noise_condition(low_res, t, noise), "low_res_times": t}


@dataclass(frozen=True)
class Sampler:
    """A diffusion model with all that its samples depend on, and the codec that decodes them.

    :param shape: of x0, [C x ...]; `image_shape`: of the decoded images, to which the padding of the codec is cropped.
    :param num_classes: classes of the model, 0 if it is unconditional.
    :param solver: a key of `solvers.SAMPLERS`; empty: the default of the process.
    :param clip_denoised: clip the predicted x0 to [-1, 1]; None: if x0 are pixels.
    :param cond_fn: gradient of classifier guidance, toward one of `guided_classes`; the model may be unconditional.
    :param low_res: `LowResConditioning` of an upsampler.
    :param condition: `ConditionSource` of a model that was trained with --condition_dir, used cyclically.
    :param attributes: the `Attributes` that the model is conditioned on, None if there are none; `attribute_ranges` are
        (low, high) of each, within which samples have them; empty: as in training.
    :param spacing: voxel spacing of volumes in mm; `orientation`: directions in which their axes increase.
    :param colormap: name of the table that samples of one channel are scalars of; empty: none.
    :param projection: name of the table on whose colors RGB samples are moved; empty: none.
    :param spectrogram: axes and scale of samples that are also written in dB; None: they are not.
    :param settings: JSON-able dictionary of the other settings that the samples depend on.
    """

    model: Callable
    diffusion: Process
    shape: tuple
    codec: Codec
    normalizer: Any     # `vae_wrapper.LatentNormalizer`, of a higher layer
    image_shape: tuple
    num_classes: int = 0
    class_names: list | None = None
    solver: str = ""
    clip_denoised: bool | None = None
    seed: int = 0
    cond_fn: Callable | None = None
    guided_classes: int = 0
    low_res: LowResConditioning | None = None
    attributes: Attributes | None = None
    attribute_ranges: tuple = ()
    settings: dict = field(default_factory=dict)
    spacing: tuple = (1.0, 1.0, 1.0)
    orientation: str = "RAS"
    colormap: str = ""
    projection: str = ""
    condition: ConditionSource | None = None
    spectrogram: SpectrogramAxes | None = None

    def __post_init__(self):
        # Defaults that depend on other fields; a frozen dataclass sets them this way only.
        object.__setattr__(self, "solver", self.solver or applicable_samplers(self.diffusion)[0])
        if self.clip_denoised is None:
            object.__setattr__(self, "clip_denoised", self.codec.is_pixels)

    @classmethod
    def from_header(cls, model, diffusion, space, header, **fields):
        """Return the Sampler of a model described by the header of its checkpoint.

        :param space: the `Space` of its x0.
        :param fields: further fields.
        """
        image_shape, data = decoded_shape(header, space.codec), header.get("data") or {}
        if len(image_shape) == 4 and data.get("spacing"):
            fields["spacing"] = tuple(float(s) for s in data["spacing"].split(","))
            fields["orientation"] = data.get("orientation") or cls.orientation  # none in version 0.2
        fields.setdefault("colormap", data.get("colormap", ""))
        return cls(model, diffusion, tuple(header["latent_shape"]), space.codec, space.normalizer, image_shape,
                   **{"num_classes": header["model"]["num_classes"], "class_names": header["classes"],
                      "attributes": Attributes.from_dict(header.get("attributes")), **fields})

    def parse_classes(self, text):
        """Return the class indices that `--classes` requests; None without classes, or if `low_res` has the labels."""
        if self.low_res is not None and self.low_res.labels is not None:
            require((not text, f"--classes {text} conflicts with --base_samples, which specify the classes; omit it"))
            return None
        return parse_classes(text, self.num_classes or self.guided_classes, self.class_names)

    def format_classes(self, text):
        """Return "a -> number 0, 3 -> number 3 (d)" for the classes that `--classes` requests."""
        named = [f"{word} -> number {number}" + (f" ({self.class_names[number]})" if self.class_names
                                                 and self.class_names[number] != word else "")
                 for word, number in zip(words.parse(text, "classes"), self.parse_classes(text))]
        return ", ".join(named)

    def labels(self, indices, classes):
        """Return the classes of the samples `indices`, int64 [N], None without classes."""
        if self.low_res is not None and self.low_res.labels is not None:
            classes = self.low_res.labels
        return None if classes is None else np.array([classes[i % len(classes)] for i in indices], np.int64)

    def attribute_values(self, indices):
        """Return the attributes of the samples `indices`, float32 [N x A] with NaN if unknown; None without any."""
        if self.attributes is None:
            return None
        return sample_attributes(self.attribute_ranges or self.attributes.parse_ranges(""), self.seed, indices)

    def draw_noise(self, indices, device) -> KeyedNoise:
        """Return the noise of the samples `indices`; drawing it begins in the background."""
        return KeyedNoise(self.seed, indices, self.shape, pinned=torch.device(device).type == "cuda")

    @torch.no_grad()
    def sample_x0(self, indices, classes, device, progress=False, noise=None):
        """Sample x0 for `indices`; return [N x *shape].

        :param noise: the result of `draw_noise` for them, if it was called ahead.
        """
        conditioning, cond_fn = self.conditioning(indices, self.labels(indices, classes), device)
        noise = noise or self.draw_noise(indices, device)
        return self.walk(
            indices, noise(torch.empty(len(indices), *self.shape, device=device)), noise_fn=noise, cond_fn=cond_fn,
            model_kwargs=conditioning, device=device, progress=progress,
        )

    def walk(self, indices, x, **arguments):
        """Return x0 [N x *shape] of the samples `indices` by a sampling loop that starts at x_T = `x`."""
        _, sample_loop = SAMPLERS[self.solver]
        return sample_loop(self.diffusion, self.model, tuple(x.shape), noise=x, clip_denoised=self.clip_denoised,
                           **arguments)

    def conditioning(self, indices, labels, device):
        """Return (conditioning dictionary of the network, cond_fn or None) for samples with `labels` [N] or None."""
        conditioning = {} if self.low_res is None else self.low_res.condition(indices, device)
        if self.condition is not None:
            conditioning["condition"] = self.condition.of_samples(indices, device)
        values = self.attribute_values(indices)
        if values is not None:
            conditioning["attributes"] = to_device(torch.from_numpy(self.attributes.normalize(values)), device)
        cond_fn = self.cond_fn
        if labels is not None:
            y = to_device(torch.from_numpy(labels), device)
            if self.num_classes:
                conditioning["y"] = y
            elif cond_fn:
                cond_fn = functools.partial(cond_fn, y=y)
        return conditioning, cond_fn

    def decode(self, x0):
        """Return images in [0, 1].  [N x *shape] -> [N x *image_shape]"""
        images = self.codec.decode_batch(self.normalizer.denormalize(x0), channels=self.image_shape[0])
        return images[(..., *(slice(n) for n in self.image_shape[1:]))]

    def complete(self, indices, images):
        """Return the decoded images of the samples `indices` as they are written.  [N x *image_shape] -> same"""
        return images

    def summary(self):
        """Return one line for the log."""
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        if self.attributes:
            classes += f", attributes {', '.join(self.attributes.names)}"
        latents, images = ("x".join(map(str, shape)) for shape in (self.shape, self.image_shape))
        steps = f"{self.diffusion.num_timesteps} steps of {self.solver}"
        conditions = "" if self.condition is None else f", {len(self.condition)} conditions"
        return f"latents {latents} -> images {images}, {classes}{conditions}, {steps}"
