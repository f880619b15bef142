"""Sample a diffusion model: sample i depends on (seed, i) alone."""

from dataclasses import dataclass, field

import numpy as np
import torch

from ..config import option, resolve
from ..gaussian_diffusion import noised_condition
from ..nn import keyed_randn, keyed_rng
from ..vae_wrapper import PixelCodec
from .solvers import SAMPLE_LOOPS

START, CONDITION = 5, 8  # second number of the keys of sampling noise, apart from those of training


@dataclass
class SamplingConfig:
    model_path: str = option("", "run of image_train_vae.py, or one weights file of it (ema_... or model...)")
    num_samples: int = option(64, "how many samples to draw", minimum=1)
    batch_size: int = option(16, "samples at a time on each rank; does not change the samples", minimum=1)
    sampler: str = option("", "how steps are taken: ddpm (random), ddim (deterministic), or a multi-step solver, which 10 "
                           "to 25 steps are enough for: dpmpp_sde (random, forgives a model's errors), dpmpp, unipc; "
                           "empty: ddpm, or ddim with --use_ddim",
                       choices=("", *SAMPLE_LOOPS))
    use_ddim: bool = option(False, "the same as --sampler ddim, usually with --timestep_respacing ddim50")
    clip_denoised: bool = option(False, "clip the predicted x0 to [-1, 1]: right for pixels, where it is the default, and "
                                     "wrong for latents, a third of which it would cut")
    cfg_scale: float = option(1.0, "classifier-free guidance, for a model trained with --class_dropout: 1 is none, 2 to 4 "
                                "shows classes more clearly and with less variety")
    cfg_interval: str = option("", "lo,hi: noise levels (noise per signal) between which --cfg_scale acts, such as 0.3,3; "
                                "empty: all")
    sample_dtype: str = option("float32", "what the network computes in: bfloat16 is about twice as fast, and its samples "
                                       "differ a little", choices=("float32", "bfloat16"))
    classes: str = option("", "names or numbers of the classes to draw, in turn: tapin,tapout; empty: all of them")
    seed: int = option(0, "seed; sample i depends on (seed, i) alone")
    png: bool = option(True, "write every sample as a PNG file too, and every volume as .nii.gz")


@dataclass
class PixelSamplingConfig(SamplingConfig):
    """The same with the defaults of guided-diffusion's sampling scripts."""

    SECTION = "sampling"

    model_path: str = option("", "run of image_train.py or image_train_vae.py, or one weights file of it, or one of "
                              "guided-diffusion, which the flags of the model describe")
    num_samples: int = option(10000, "how many samples to draw", minimum=1)
    clip_denoised: bool = option(True, "clip the predicted x0 to [-1, 1]; never done to latents unless the flag is given")


@dataclass
class BaseConfig:
    SECTION = "sampling"

    base_samples: str = option("", "the small pictures to start from: an .npz of a sampling script (arr_0, and arr_1 "
                                "for an upsampler with classes)")
    cond_noise_level: int = option(0, "noise them to this time first, below the --cond_noise_steps of training; hides the "
                                   "faults of samples", minimum=0)


class KeyedNoise:
    """Standard normal noise for the samples `indices`, each from a stream of its own.

    Called with x [N x C x ...], it returns the next draw of every stream, on the device of x.
    """

    def __init__(self, seed, indices):
        self.streams = [keyed_rng(seed, START, i) for i in indices]

    def __call__(self, x):
        draws = np.stack([s.standard_normal(x.shape[1:], dtype=np.float32) for s in self.streams])
        return torch.from_numpy(draws).to(x.device, x.dtype)


def parse_classes(text, num_classes, names=None):
    """Return the class numbers that `--classes` asks for: names or numbers with commas between; empty: all.

    :raises ValueError: for a class that the model does not have.
    """
    if not num_classes:
        if text:
            raise ValueError(f"--classes {text}: this model was trained without classes; leave the flag away")
        return None
    wanted = []
    for word in [w.strip() for w in text.split(",") if w.strip()]:
        if names and word in names:
            wanted.append(names.index(word))
        elif word.isdigit() and int(word) < num_classes:
            wanted.append(int(word))
        else:
            known = ", ".join(names) if names else f"0 to {num_classes - 1}"
            raise ValueError(f"--classes: the model has no class {word!r}; it has {known}")
    return wanted or list(range(num_classes))


def resolve_sampler(config):
    """Return the key of `SAMPLE_LOOPS` of a SamplingConfig.

    :raises ValueError: if --use_ddim contradicts --sampler.
    """
    config, = resolve(config)
    return config.sampler or "ddpm"


class LowResConditioning:
    """What an upsampler starts from: sample i is made from small picture i, over and over.

    :param images: uint8 [N x C x ...], possibly memory-mapped; `labels`: int64 [N] or None.
    :param noise_level: time to which the encoded pictures are noised first; 0: not at all.
    """

    def __init__(self, images, labels, codec, normalizer, diffusion, noise_level=0, seed=0):
        self.images, self.labels, self.codec, self.normalizer = images, labels, codec, normalizer
        self.diffusion, self.noise_level, self.seed = diffusion, noise_level, seed

    def condition(self, indices, device):
        """Return what the network is told of the samples `indices`: {low_res [n x C x ...], low_res_times [n]}."""
        rows = [i % len(self.images) for i in indices]
        images = self.codec.pad_to_factors(torch.from_numpy(self.images[rows].astype(np.float32) / 255))
        low_res = self.normalizer.normalize(self.codec.encode_batch(images).to(device))
        if not self.noise_level:
            return {"low_res": low_res}
        noise = keyed_randn(low_res.shape[1:], [(self.seed, CONDITION, i) for i in indices]).to(device)
        times = torch.full((len(rows),), self.noise_level, device=device)
        return {"low_res": noised_condition(self.diffusion, low_res, times, noise), "low_res_times": times}


@dataclass
class Sampler:
    """A diffusion model with what turns its x0 into pictures, and the way in which it is sampled.

    :param shape: of x0, [C x ...]; `image_shape`: of the pictures, which the decoder's padding is cropped to.
    :param solver: a key of `solvers.SAMPLE_LOOPS`.
    :param clip_denoised: clip predicted x0 to [-1, 1]; None: where x0 are pixels.
    :param cond_fn: a gradient of guidance towards one of `guided_classes`, which the model need not know itself.
    :param small: `LowResConditioning`, for an upsampler.
    :param spacing: distance of neighbouring voxels of a volume in mm.
    :param settings: what else than these settings makes the samples what they are, a dictionary for JSON.
    """

    model: callable
    diffusion: object
    shape: tuple
    codec: object
    normalizer: object
    image_shape: tuple
    num_classes: int = 0
    class_names: list | None = None
    solver: str = "ddpm"
    clip_denoised: bool | None = None
    seed: int = 0
    cond_fn: callable = None
    guided_classes: int = 0
    small: LowResConditioning | None = None
    settings: dict = field(default_factory=dict)
    spacing: tuple = (1.0, 1.0, 1.0)

    def __post_init__(self):
        if self.clip_denoised is None:
            self.clip_denoised = isinstance(self.codec, PixelCodec)

    def labels(self, indices, classes):
        """Return the classes of the samples `indices`, int64 [N], or None where there are none."""
        if self.small is not None and self.small.labels is not None:
            return np.array([self.small.labels[i % len(self.small.labels)] for i in indices], np.int64)
        return None if classes is None else np.array([classes[i % len(classes)] for i in indices], np.int64)

    @torch.no_grad()
    def sample_x0(self, indices, classes, device, progress=False):
        """Draw the samples `indices`; return x0 [N x *shape]."""
        labels = self.labels(indices, classes)
        told = {} if labels is None else {"y": torch.from_numpy(labels).to(device)}
        if self.small is not None:
            told.update(self.small.condition(indices, device))
        noise = KeyedNoise(self.seed, indices)
        x = noise(torch.empty(len(indices), *self.shape, device=device))
        return SAMPLE_LOOPS[self.solver](
            self.diffusion, self._model_fn, tuple(x.shape), noise=x, clip_denoised=self.clip_denoised, cond_fn=self.cond_fn,
            model_kwargs=told, device=device, noise_fn=noise, progress=progress,
        )

    def _model_fn(self, x, times, y=None, **told):
        """Call the network, which is told the class only if it has classes."""
        return self.model(x, times, **({"y": y} if self.num_classes else {}), **told)

    def decode(self, x0):
        """Turn x0 [N x *shape] into pictures [N x *image_shape] in [0, 1]."""
        images = self.codec.decode_batch(self.normalizer.denormalize(x0), channels=self.image_shape[0])
        return images[(..., *(slice(n) for n in self.image_shape[1:]))]

    def summary(self):
        """Return one line for the log."""
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        latents, pictures = ("x".join(map(str, shape)) for shape in (self.shape, self.image_shape))
        steps = f"{self.diffusion.num_timesteps} steps of {self.solver}"
        return f"latents {latents} -> pictures {pictures}, {classes}, {steps}"
