"""Draw samples: which class sample i has and what noise it sees depend on (seed, i) alone, not on batches or ranks."""

import zipfile
import math
import shutil
from dataclasses import dataclass

import numpy as np
import torch

from . import dist_util, figures, logger
from .config import opt
from .files import atomic_path
from .gaussian_diffusion import ModelMeanType
from .nn import keyed_rng

# Share of x0's variance at the first sampling step below which its prediction from the noise is unsafe unclipped: the
# cosine schedule ends at 2e-9, the linear one at 4e-5.
FAINTEST = 1e-6
START = 5  # first number of the keys of sampling noise, apart from those of training


@dataclass
class SamplingConfig:
    model_path: str = opt("", "run of image_train_vae.py, or one weights file of it (ema_... or model...)")
    num_samples: int = opt(64, "how many samples to draw")
    batch_size: int = opt(16, "samples at a time on each rank; does not change the samples")
    use_ddim: bool = opt(False, "deterministic DDIM steps (eta 0), usually with --timestep_respacing ddim50")
    clip_denoised: bool = opt(False, "clip the predicted latent to [-1, 1]; cuts a third of a unit-variance latent")
    classes: str = opt("", "names or numbers of the classes to draw, in turn: tapin,tapout; empty: all of them")
    seed: int = opt(0, "seed; sample i depends on (seed, i) alone")


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


class Sampler:
    """A diffusion model with what turns its x0 into pictures.

    :param shape: of x0, [C x ...]; `image_shape`: of the pictures, which the decoder's padding is cropped to.
    """

    def __init__(self, model, diffusion, shape, codec, normalizer, image_shape, num_classes=0, class_names=None):
        self.model, self.diffusion, self.shape = model, diffusion, shape
        self.codec, self.normalizer, self.image_shape = codec, normalizer, image_shape
        self.num_classes, self.class_names = num_classes, class_names

    @torch.no_grad()
    def x0(self, indices, classes, config, device, progress=False):
        """Draw the samples `indices`; return (x0 [N x *shape], labels int64 [N] or None)."""
        labels, kwargs = None, {}
        if classes is not None:
            labels = torch.tensor([classes[i % len(classes)] for i in indices], device=device)
            kwargs["y"] = labels
        noise = KeyedNoise(config.seed, indices)
        x = noise(torch.empty(len(indices), *self.shape, device=device))
        loop = self.diffusion.ddim_sample_loop if config.use_ddim else self.diffusion.p_sample_loop
        x0 = loop(self.model, tuple(x.shape), noise=x, clip_denoised=config.clip_denoised, model_kwargs=kwargs,
                  device=device, noise_fn=noise, progress=progress)
        return x0, labels

    def decode(self, x0):
        """Turn x0 [N x *shape] into pictures [N x *image_shape] in [0, 1]."""
        images = self.codec.decode_batch(self.normalizer.inverse(x0), channels=self.image_shape[0])
        return images[(..., *(slice(n) for n in self.image_shape[1:]))]

    def summary(self):
        """Return one line for the log."""
        classes = f"{self.num_classes} classes" if self.num_classes else "no classes"
        latents, pictures = ("x".join(map(str, shape)) for shape in (self.shape, self.image_shape))
        return f"latents {latents} -> pictures {pictures}, {classes}, {self.diffusion.num_timesteps} steps"


def draw(sampler, classes, config, device):
    """Draw all samples over the ranks; return (images uint8 [N x C x ...], labels or None), complete on every rank.

    :raises ValueError: where there is nothing to draw.
    :raises FloatingPointError: where samples are not finite.
    """
    if config.num_samples < 1 or config.batch_size < 1:
        raise ValueError(f"--num_samples {config.num_samples} --batch_size {config.batch_size}: both are at least 1")
    first = sampler.diffusion.alphas_cumprod[-1]
    if first < FAINTEST and not config.clip_denoised and sampler.diffusion.model_mean_type is ModelMeanType.EPSILON:
        logger.warn(f"the first step sees {math.sqrt(first):.1g} of the latent and the rest is noise: an unclipped "
                    "prediction of it may run away and leave noisy pictures; --timestep_respacing ddim100 begins a "
                    "little later")
    mine = []
    starts = range(0, config.num_samples, config.batch_size)
    for start in starts[dist_util.rank()::dist_util.world_size()]:
        indices = range(start, min(start + config.batch_size, config.num_samples))
        x0, labels = sampler.x0(indices, classes, config, device, progress=dist_util.rank() == 0)
        if not torch.isfinite(x0).all():
            raise FloatingPointError(f"samples {indices.start} to {indices.stop - 1} are not finite: the model has "
                                     "diverged (take an earlier one), or its noise schedule ends in pure noise (train "
                                     "with more --diffusion_steps or --noise_schedule cosine)")
        mine.append((start, to_uint8(sampler.decode(x0)), None if labels is None else labels.cpu().numpy()))
    parts = sorted((p for rank in dist_util.gather_objects(mine) for p in rank), key=lambda p: p[0])
    labels = None if classes is None else np.concatenate([p[2] for p in parts])
    return np.concatenate([p[1] for p in parts]), labels


def write_samples(folder, images, labels, classes=None, names=None):
    """Write the .npz of guided-diffusion, a PNG a sample, a contact sheet; return the path of the .npz."""
    stems = [f"{i:06d}" for i in range(len(images))]
    if labels is not None:
        name_of = {c: names[c] if names else str(c) for c in classes}
        stems = [f"{name_of[label]}_{stem}" for label, stem in zip(labels.tolist(), stems)]
    unit = images.astype(np.float32) / 255
    unfinished = folder / "png.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    for stem, image in zip(stems, unit):
        figures.save_picture(unfinished / f"{stem}.png", figures.picture(image))
    shutil.rmtree(folder / "png", ignore_errors=True)
    unfinished.rename(folder / "png")
    rows = None if labels is None else [name_of[c] for c in dict.fromkeys(classes)]
    shown = unit[:64]
    if rows:
        per_row = min(12, min(int((labels == c).sum()) for c in dict.fromkeys(classes)))
        shown = np.concatenate([unit[labels == c][:per_row] for c in dict.fromkeys(classes)]) if per_row else shown
        rows = rows if per_row else None
    columns = per_row if rows else min(8, len(shown))
    figures.save_picture(folder / "contact_sheet.png", figures.contact_sheet(shown, columns, row_labels=rows))
    return write_npz(folder, images, labels, names)


def to_uint8(images):
    """Round images in [0, 1] to 0..255; a NumPy array.  [N x C x ...] -> same."""
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def write_npz(folder, images, labels, names=None):
    """Write samples_NxHxWxC.npz in the layout of guided-diffusion: arr_0 [N x H x W x C] uint8, arr_1 labels [N].

    Class names, where there are any, stand beside them as `class_names`.
    """
    channels_last = np.moveaxis(images, 1, -1)
    path = folder / f"samples_{'x'.join(map(str, channels_last.shape))}.npz"
    arrays = [channels_last] if labels is None else [channels_last, labels]
    named = {"class_names": np.array(names)} if names and labels is not None else {}
    with atomic_path(path) as part, open(part, "wb") as stream:
        np.savez(stream, *arrays, **named)
    return path


def read_npz(path):
    """Return (images float32 [N x C x ...] in [0, 1], labels or None, names or None) from a file of `write_npz`."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as content:
            images = np.moveaxis(content["arr_0"], -1, 1)
            labels = content["arr_1"] if "arr_1" in content else None
            names = content["class_names"].tolist() if "class_names" in content else None
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no batch of samples (.npz with arr_0 [N x H x W x C] uint8): {error}") from error
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: arr_0 is {images.dtype}, needed is uint8 in 0..255")
    return torch.from_numpy(images.astype(np.float32) / 255), labels, names
