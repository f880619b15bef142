"""Edit images with a diffusion model: inpainting, variation, interpolation, and inversion by deterministic steps.

An edit is a `Sampler` whose samples belong to images of a source, so that files, resuming and ranks are those of
sampling. The steps use nothing of a process but its noise levels and its prediction of x0.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F

from .. import logger
from ..config import CommaSeparated, integers, option, require
from ..data import unpad
from ..gaussian_diffusion import last_sample, sample_progressive
from ..interfaces import ImageSource
from ..nn import to_device, without_tf32
from .guidance import Autoguidance, ClassifierFreeGuidance
from .sampler import KeyedNoise, Sampler, SamplingConfig
from .sheets import contact_sheet
from .solvers import levels

SHEET_COLUMNS = 8       # images on a sheet of inputs and results


# --- Steps on x [N x C x ...] ---


def resampling_timesteps(count: int, section: int, times: int) -> list[int]:
    """Return the timesteps of RePaint (arXiv:2201.09865, Alg. 1 and App. B), from count - 1 down to 0.

    Sections of `section` steps are walked `times` times each, and after each but the last time noised to their start.
    """
    tops = range(count - 1, -1, -section)
    return [t for top in tops for _ in range(times) for t in range(top, max(top - section, -1), -1)]


def inpaint(
    diffusion, model, x, known, region, noise_fn, section=1, times=1, device=None, progress=False, **prediction
):
    """Return x0 that equals `known` outside `region` and is sampled inside.

    Ancestral steps (DDIM, arXiv:2010.02502, Eq. 12 with eta 1), after each of which the rest is replaced by `known` at
    the same noise level (RePaint, Eq. 8).

    :param x: x_T, [N x C x ...]; `known`: x0, same shape; `region`: bool [N x 1 x ...].
    :param section, times: see `resampling_timesteps`.
    :param prediction: arguments of `Process.predict_xstart`.
    """
    signal, noise = levels(diffusion)
    timesteps = resampling_timesteps(diffusion.num_timesteps, section, times)
    transitions = iter(zip(timesteps, [*timesteps[1:], -1]))
    replace = lambda x, t: torch.where(region, x, signal[t] * known + noise[t] * noise_fn(x) if noise[t] else known)

    def step(model, x, t):
        i, following = next(transitions)
        x_0 = diffusion.predict_xstart(model, x, t, **prediction)
        eps = (x - signal[i] * x_0) / noise[i]
        below = i - 1       # of the first timestep: -1, the clean end of the levels
        kept = signal[i] / signal[below]
        std = noise[below] / noise[i] * math.sqrt(max(noise[i] ** 2 - (kept * noise[below]) ** 2, 0.0))
        x = signal[below] * x_0 + math.sqrt(max(noise[below] ** 2 - std**2, 0.0)) * eps
        x = replace(x + std * noise_fn(x) if std else x, below)
        if following >= i:
            kept = signal[following] / signal[below]
            x = kept * x + math.sqrt(max(noise[following] ** 2 - (kept * noise[below]) ** 2, 0.0)) * noise_fn(x)
        return {"sample": x, "pred_xstart": x_0}

    x = replace(x, diffusion.num_timesteps - 1)
    return last_sample(
        sample_progressive(diffusion, step, model, x.shape, x, device, progress, noise_fn, timesteps))


def invert(diffusion, model, x_0, refinements=0, device=None, progress=False, **prediction):
    """Return x_T from which deterministic steps sample `x_0`.  [N x C x ...] -> same

    Steps of DDIM in reverse (arXiv:2010.02502, Eq. 14), which are those of Euler for a rectified flow. They use the
    prediction at their start. Each of the `refinements` repeats a step with the prediction at its end, which the steps
    of sampling use: a fixed-point iteration, whose solution the sampling inverts exactly. It iterates the predicted
    noise where there is more signal than noise, else the predicted x0, with which it converges.

    :param prediction: arguments of `Process.predict_xstart`.
    """
    signal, noise = levels(diffusion)
    starts = range(-1, diffusion.num_timesteps - 1)     # -1 is clean x0, at which the network predicts as at timestep 0
    remaining = iter(starts)

    def predict(model, x, i, t):
        x_0 = diffusion.predict_xstart(model, x, torch.full_like(t, i), **prediction)
        return x_0, (x - signal[i] * x_0) / noise[i]

    def step(model, x, t):
        i = next(remaining)
        x_0, eps = predict(model, x, max(i, 0), t)
        for refinement in range(refinements + 1):
            if i < 0 or signal[i + 1] > noise[i + 1]:
                x_0 = (x - noise[i] * eps) / signal[i]
            else:
                eps = (x - signal[i] * x_0) / noise[i]
            end = signal[i + 1] * x_0 + noise[i + 1] * eps
            if refinement < refinements:
                x_0, eps = predict(model, end, i + 1, t)
        return {"sample": end, "pred_xstart": x_0}

    timesteps = [max(i, 0) for i in starts]
    return last_sample(
        sample_progressive(diffusion, step, model, x_0.shape, x_0, device, progress, None, timesteps))


def slerp(a, b, weights):
    """Return points on the arc from a to b (spherical interpolation, Shoemake 1985).  [N x C x ...] twice -> same

    Normal noise stays of its norm on the way, unlike on a straight line.

    :param weights: [N] in [0, 1], where 0 is `a`.
    """
    column = lambda values: values.view(-1, *(1,) * (a.dim() - 1))
    cosine = F.cosine_similarity(a.flatten(1), b.flatten(1)).clamp(-1, 1)
    angle = cosine.acos().clamp(min=1e-4)       # the limit of equal ends is a straight line
    w = weights.to(angle)
    return column(((1 - w) * angle).sin() / angle.sin()) * a + column((w * angle).sin() / angle.sin()) * b


# --- Samplers ---


@dataclass(frozen=True)
class ImageEdit(Sampler):
    """A Sampler of which sample i belongs to image i of `source`, modulo their number.

    :param source: an `ImageSource`, read as in the training of the model; `source_labels`: the classes of its images in
        the numbering of the model, int64 [N], or None. Results have these classes unless others are requested.
    :param source_attributes: the attributes of its images, float32 [N x A], or None. Results have these unless
        `attribute_ranges` are set.
    """

    source: ImageSource | None = None
    source_labels: np.ndarray | None = None
    source_attributes: np.ndarray | None = None

    @property
    def count(self):
        """The number of results if none is requested."""
        return len(self.source)

    def items(self, indices):
        """Return the images of the source that samples belong to."""
        return [i % len(self.source) for i in indices]

    def parse_classes(self, text):
        if text or not (self.num_classes or self.guided_classes):
            return super().parse_classes(text)
        require((self.source_labels is not None, "--classes is not set: expected classes of the results, as the images "
                 "have none"))
        return None

    def labels(self, indices, classes):
        if classes is None:
            return None if self.source_labels is None else self.source_labels[self.items(indices)]
        return super().labels(self.items(indices), classes)

    def attribute_values(self, indices):
        if self.source_attributes is None or self.attribute_ranges:
            return super().attribute_values(indices)
        return self.source_attributes[self.items(indices)]

    def images(self, items):
        """Return images of the source.  [n x *image_shape] in [0, 1]"""
        return unpad(self.source.batch(np.array(items)), self.image_shape)

    @without_tf32()     # latents as in training
    def encode(self, images, device):
        """Return x0 of images of the source.  [n x *image_shape] -> [n x *shape]"""
        return self.normalizer.normalize(self.codec.encode_batch(self.codec.pad_to_factors(images)).to(device))

    def report(self, samples) -> dict:
        """Return numbers about all results, uint8 [N x *image_shape]: their distance from the images."""
        errors = [samples[i] / np.float32(255) - self.images(self.items([i]))[0].numpy() for i in range(len(samples))]
        psnr = [-10 * math.log10(max(np.square(error).mean(), 1e-10)) for error in errors]
        return {"num_images": len(samples), "psnr": float(np.mean(psnr)),
                "l1": float(np.mean([np.abs(error).mean() for error in errors]))}

    def sheet(self, samples):
        """Return a contact sheet of the first results, uint8 [N x *image_shape], below the images they belong to."""
        chosen = range(min(SHEET_COLUMNS, len(samples)))
        return self._sheet(self.rows(chosen, samples[chosen] / np.float32(255)))

    def rows(self, indices, results):
        """Return {label: images [n x *image_shape]} of the rows of a sheet."""
        return {"image": self.images(self.items(indices)).numpy(), "result": results}

    def _sheet(self, rows):
        images = list(rows.values())
        return contact_sheet(np.concatenate(images), len(images[0]), list(rows), colormap=self.colormap)


@dataclass(frozen=True)
class Inpainting(ImageEdit):
    """Fill a region of each image (RePaint, arXiv:2201.09865); all pixels outside are those of the image.

    The network does not see the pixels of the region. Of latents, those are sampled whose pixels belong to it in part.

    :param region: an `ImageSource` of masks, one per image or one for all, or bool [*sides]: which pixels are filled.
    :param section, times: see `resampling_timesteps`.
    """

    region: ImageSource | np.ndarray | None = None
    section: int = 1
    times: int = 1

    def regions(self, items):
        """Return which pixels are filled, bool [n x 1 x *sides]: those above half of the maximum of a mask."""
        if isinstance(self.region, np.ndarray):
            return torch.from_numpy(self.region).expand(len(items), 1, *self.region.shape)
        masks = self.region.batch(np.array(items) % len(self.region))
        return masks > masks.amax(tuple(range(1, masks.dim())), keepdim=True) / 2

    def walk(self, indices, x, noise_fn=None, device=None, progress=False, **prediction):
        images, region = self.images(self.items(indices)), self.regions(self.items(indices))
        axes = tuple(range(2, images.dim()))
        mean = (images * ~region).sum(axes, keepdim=True) / (~region).sum(axes, keepdim=True).clamp(min=1)
        known = self.encode(torch.where(region, mean, images), device)
        missing = [-n % factor for n, factor in zip(region.shape[2:], self.codec.factors)]      # added by --pad
        region = F.pad(region.float(), [n for after in reversed(missing) for n in (0, after)])
        pool = {2: F.max_pool2d, 3: F.max_pool3d}[len(axes)]
        region = to_device(pool(region, self.codec.factors).bool(), device)
        return inpaint(self.diffusion, self.model, x, known, region, noise_fn, self.section, self.times, device,
                       progress, clip_denoised=self.clip_denoised, **prediction)

    def complete(self, indices, images):
        items = self.items(indices)
        return torch.where(self.regions(items).to(images.device), images, self.images(items).to(images))

    def report(self, samples):
        """Return numbers about all results: known pixels, and steps across the edge of the region beside the image's.

        `seam` is the mean absolute difference of neighboring pixels of which one is filled, `seam_of_images` the same
        in the images, whose filled pixels the network did not see.
        """
        seams, errors, filled = [], [], []
        for i in range(len(samples)):
            image, region = self.images(self.items([i]))[0].numpy(), self.regions(self.items([i]))[0, 0].numpy()
            result = samples[i] / np.float32(255)
            seams.append([seam(result, region), seam(image, region)])
            errors.append(np.abs(result - image)[:, ~region].max(initial=0))
            filled.append(region.mean())
        own, images = np.mean([each for each in seams if each[0] is not None] or [(0.0, 0.0)], axis=0).tolist()
        return {**super().report(samples), "seam": own, "seam_of_images": images,
                "max_error_of_known_pixels": float(np.max(errors)), "filled_fraction": float(np.mean(filled))}

    def rows(self, indices, results):
        region = self.regions(self.items(indices)).numpy()
        shown = np.broadcast_to(region, (len(region), self.image_shape[0], *region.shape[2:])).astype(np.float32)
        rows = super().rows(indices, results)
        return {"image": rows["image"], "mask": shown, "result": results}


@dataclass(frozen=True)
class Variation(ImageEdit):
    """Noise images to the last timestep of a truncated process, and sample from there (SDEdit, arXiv:2108.01073).

    :param strength: 0 returns the images as the codec decodes them.
    """

    strength: float = 1.0

    def walk(self, indices, x, **arguments):
        x_0 = self.encode(self.images(self.items(indices)), x.device)
        if not self.strength:
            return x_0
        t = torch.full((len(x),), self.diffusion.num_timesteps - 1, device=x.device)
        return super().walk(indices, self.diffusion.q_sample(x_0, t, x), **arguments)


@dataclass(frozen=True)
class Inversion(ImageEdit):
    """Find the noise of images, and sample it again: what is lost of an image is the error of its inversion.

    An image is inverted with its own class and attributes, without guidance, and sampled with those that are requested.

    :param refinements: see `invert`.
    """

    refinements: int = 0

    def walk(self, indices, x, **arguments):
        x_0 = self.encode(self.images(self.items(indices)), x.device)
        noise = self.noise_of(self.items(indices), x_0, arguments["progress"])
        result = super().walk(indices, noise, **arguments)
        logger.log(f"round trip of x0: RMS error {(result - x_0).square().mean().sqrt():.3g}; the noise has mean "
                   f"{noise.mean():.3f} and standard deviation {noise.std():.3f}")
        return result

    def noise_of(self, items, x_0, progress):
        """Return x_T of x0 [n x *shape] of images of the source."""
        labels = None if self.source_labels is None else self.source_labels[items]
        conditioning, _ = self.conditioning(items, labels, x_0.device)
        if self.source_attributes is not None:
            own = self.attributes.normalize(self.source_attributes[items])
            conditioning["attributes"] = to_device(torch.from_numpy(own), x_0.device)
        model = self.model
        if isinstance(model, (Autoguidance, ClassifierFreeGuidance)):
            model = model.model
        return invert(self.diffusion, model, x_0, self.refinements, x_0.device, progress,
                      clip_denoised=self.clip_denoised, model_kwargs=conditioning)


@dataclass(frozen=True)
class Interpolation(Inversion):
    """Sample the noise on the arc between that of two images, or of two seeds.

    Sample i is frame i % frames of pair i // frames, which consists of an image and the next one.

    :param seeds: two seeds, or () for images.
    """

    frames: int = 2
    seeds: tuple = ()

    @property
    def count(self):
        return self.frames * (SHEET_COLUMNS if self.seeds else len(self.source) - 1)

    def items(self, indices):
        """Return the image that is closer to each frame; of seeds the pair."""
        position = [i % self.frames for i in indices]
        return [i // self.frames + (not self.seeds and 2 * k >= self.frames) for i, k in zip(indices, position)]

    def parse_classes(self, text):
        return Sampler.parse_classes(self, text) if self.seeds else super().parse_classes(text)

    def walk(self, indices, x, **arguments):
        pairs = [i // self.frames for i in indices]
        first, last = min(pairs), max(pairs)
        rows = torch.tensor(pairs) - first
        if self.seeds:
            shape = last + 1 - first, *self.shape
            start, end = (KeyedNoise(seed, range(first, last + 1))(torch.empty(shape, device=x.device))
                          for seed in self.seeds)
        else:
            items = list(range(first, last + 2))
            noise = self.noise_of(items, self.encode(self.images(items), x.device), arguments["progress"])
            start, end = noise[:-1], noise[1:]
        weights = torch.tensor([i % self.frames / (self.frames - 1) for i in indices])
        return Sampler.walk(self, indices, slerp(start[rows], end[rows], weights), **arguments)

    def report(self, samples):
        """Return numbers about all results: the mean and largest step from frame to frame (L1), and the ends."""
        frames = samples.reshape(-1, self.frames, *samples.shape[1:]) / np.float32(255)
        steps = np.abs(np.diff(frames, axis=1)).mean(tuple(range(2, frames.ndim)))
        report = {"num_images": len(samples), "mean_step": float(steps.mean()), "largest_step": float(steps.max())}
        if self.seeds:
            return report
        ends = [i for i in range(len(samples)) if i % self.frames in (0, self.frames - 1)]
        errors = [samples[i] / np.float32(255) - self.images(self.items([i]))[0].numpy() for i in ends]
        return {**report, "l1_of_ends": float(np.mean([np.abs(error).mean() for error in errors]))}

    def sheet(self, samples):
        """Return a contact sheet with a pair per row: the first image, the frames, the second image."""
        pairs = min(SHEET_COLUMNS, len(samples) // self.frames)
        frames = samples[:pairs * self.frames].reshape(pairs, self.frames, *samples.shape[1:]) / np.float32(255)
        if not self.seeds:
            images = self.images(range(pairs + 1)).numpy()
            frames = np.concatenate([images[:-1, None], frames, images[1:, None]], axis=1)
        return self._sheet({f"{p}": row for p, row in enumerate(frames)})


def seam(image, region) -> float | None:
    """Return the mean absolute difference of neighboring pixels on both sides of the edge of a region.

    [C x ...], bool [...]; None if the region has no edge.
    """
    steps = []
    for axis in range(region.ndim):
        edge = np.diff(region, axis=axis)
        steps.append(np.abs(np.diff(image, axis=axis + 1))[:, edge].ravel())
    differences = np.concatenate(steps)
    return float(differences.mean()) if len(differences) else None


EDITS = {"inpaint": Inpainting, "variation": Variation, "interpolate": Interpolation, "invert": Inversion}


# --- Options ---


def _range(text):
    start, stop = map(int, text.split(":"))
    return start, stop


box = CommaSeparated("a:b,c:d", "a range start:stop per axis (height, width; of volumes depth first), such as "
                     "16:48,0:32", _range, lambda ranges: all(0 <= start < stop for start, stop in ranges))


@dataclass
class EditingConfig(SamplingConfig):
    """Options of edits, and of sampling as in the other scripts."""

    SECTION = "sampling"

    mode: str = option(
        "", "inpaint (--mask_dir or --mask_box); variation (--strength): noise and denoise; interpolate (--num_frames) "
            "between consecutive images or two --seeds; invert: find the noise of an image and sample it again",
        choices=("", *EDITS), essential=True)
    num_samples: int = option(0, "number of results; 0: one per image, or all frames", minimum=0, essential=True)
    batch_size: int = option(16, "results in a batch per rank", minimum=1)
    cfg_scale: float = option(1.0, "scale of classifier-free guidance; 1: none; inversions do not use it")
    seed: int = option(0, "seed; result i depends on (seed, i) only")
    mask_dir: str = option("", "inpaint: folder of masks with the names of the images, or one mask for all; white is "
                               "filled")
    mask_box: Annotated[str, box] = option(
        "", "inpaint: box of pixels that is filled in each image, instead of --mask_dir, as start:stop per axis "
            "(16:48,0:32)")
    resampling: int = option(5, "inpaint: number of times that each section of steps is walked, so that the filled "
                                "region agrees with the rest", minimum=1)
    resampling_steps: int = option(5, "inpaint: steps of such a section", minimum=1)
    strength: float = option(0.5, "variation: part of the steps that are walked; 0: the image as the autoencoder "
                                  "reconstructs it; 1: nearly any sample", minimum=0, maximum=1)
    num_frames: int = option(8, "interpolate: images from one end to the other, both included", minimum=2)
    seeds: Annotated[str, integers] = option(
        "", "interpolate: two seeds whose samples are the ends, instead of images of --data_dir")
    refinements: int = option(2, "invert and interpolate: evaluations that correct each step of the inversion",
                              minimum=0)


# Flags that have an effect in some modes only.
OWN_FLAGS = {
    **dict.fromkeys(("mask_dir", "mask_box", "resampling", "resampling_steps"), ("inpaint",)),
    "strength": ("variation",), "num_frames": ("interpolate",), "seeds": ("interpolate",),
    "refinements": ("interpolate", "invert"),
}


def require_mode(config: EditingConfig, explicit, data_dir) -> None:
    """Check that the flags of an edit fit its mode, before anything slow starts.

    :param explicit: {flag: value} of the flags that were set.
    :raises ValueError: otherwise; the message names the flag.
    """
    mode, given = config.mode, integers.parse(config.seeds, "seeds")
    require((mode, f"--mode is not set: expected one of: {', '.join(EDITS)}"))
    for flag, modes in OWN_FLAGS.items():
        require((flag not in explicit or mode in modes,
                 f"--{flag} {explicit.get(flag)} has no effect with --mode {mode}; omit it, or set --mode "
                 f"{' or '.join(modes)}"))
    require(
        (mode != "inpaint" or bool(config.mask_dir) != bool(config.mask_box),
         "--mode inpaint: expected either --mask_dir or --mask_box, the pixels to fill"),
        (len(given) in (0, 2), f"--seeds {config.seeds}: expected two seeds, such as 1,2"),
        (not (given and data_dir), f"--seeds {config.seeds} and --data_dir {data_dir} are mutually exclusive: the ends "
                                   "are samples or images; set only one"),
        (given or data_dir, f"--data_dir is not set: --mode {mode} expects images to edit"),
        (mode in ("variation", "inpaint") or config.sampler in ("", "ddim", "euler"),
         f"--sampler {config.sampler} does not apply to --mode {mode}, whose steps are deterministic; omit it"),
        (mode != "inpaint" or not (config.sampler or config.use_ddim),
         "--sampler does not apply to --mode inpaint, whose steps are those of ddpm; omit it"),
    )
