"""Iterate over normalized latents and their conditioning for training."""

import math
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from ..config import option
from ..interfaces import ImageSource
from ..nn import keyed_randn, to_device
from .batching import BatchStream
from .config import unpad
from .listing import require_labels

BULK, BULK_NUMBERS = 1024, 2**23  # latents that are read, drawn and normalised in one go, and the numbers in them
_POSTERIOR = 1  # sets the posterior's noise apart from other draws of the same seed and step


@dataclass
class SmallCacheConfig:
    """Where an upsampler finds the latents that it starts from."""

    SECTION = "latents"

    small_cache_dir: str = option("", "cache of the same pictures as --cache_dir, encoded at a smaller --image_size")


class DownsampledImages(ImageSource):
    """The pictures of a `ImageFolder` averaged down to `sides` (height, width): what an upsampler starts from."""

    def __init__(self, dataset, sides):
        self.dataset, self.sides = dataset, tuple(sides)
        self.shape = self.unpadded_shape = (dataset.shape[0], *self.sides)
        for name in ("folder", "names", "labels", "class_names", "preprocessing", "fingerprint", "random_flip", "random_crop"):
            setattr(self, name, getattr(dataset, name))

    def batch(self, indices, flips=None, rngs=None):
        """Return images as float32 [n x C x *sides] in [0, 1]; the padding of the high-resolution images is omitted."""
        images = unpad(self.dataset.batch(indices, flips, rngs), self.dataset.unpadded_shape)
        return F.interpolate(images, size=self.sides, mode="area")

    def describe(self):
        return {**self.dataset.describe(), "shape": list(self.shape), "unpadded_shape": list(self.shape)}

    def summary(self):
        return f"{self.dataset.summary()}; downsampled to {'x'.join(map(str, self.sides))}"


class LatentStream(BatchStream):
    """Iterate over (x0 [n x C x ...] normalised on `device`, what the model is told) for training.

    The model is told {"y": int64 [n]} `with_labels` and {"low_res": [n x C x smaller ...]} where there is the source of
    `small` pictures, item by item those of `source`; it may be told nothing.

    Items, flips and posterior noise depend on (seed, step, place in the batch of all ranks) alone. Reading and drawing
    run ahead in the background, encoding and normalising happen on the caller's thread.
    """

    def __init__(self, source, normalizer, plan, seed, device, with_labels=False, small=None, start_step=0):
        require_labels(source, with_labels)
        for of in (source, small or source):
            if plan.count != of.count:
                raise ValueError(f"the plan is for {plan.count} items, {of.folder} has {of.count}")

        # Latents of a cache are so small that handing them over by the batch would take longer than reading them.
        numbers = plan.batch_size * math.prod(source.latent_shape)
        together = max(1, min(BULK // plan.batch_size, BULK_NUMBERS // numbers)) if source.supports_bulk_reads else 1

        def make_batches(step):
            steps = range(step, step + together)
            indices = plan.indices(step, together)

            def read(of):
                flips = np.concatenate([plan.flip_mask(s) for s in steps]) if of.random_flip else None
                return of.read(indices, flips, plan.generators(step) if of.random_crop else None)

            eps = None
            if source.draws_posterior:
                keys = [(seed, _POSTERIOR, s, slot) for s in steps for slot in plan.slots]
                eps = keyed_randn(source.latent_shape, keys)
            labels = source.labels_of(indices) if with_labels else None
            return read(source), eps, labels, None if small is None else read(small)

        def finish(prepared):
            values, eps, labels, small_values = prepared
            latents = source.latents(values, eps, device)
            told = {} if labels is None else {"y": to_device(labels, device)}
            if small is not None:
                told["low_res"] = normalizer.normalize(small.latents(small_values, device=device))
            x0 = normalizer.normalize(latents)
            if together == 1:
                return x0, told
            parts = zip(*(values.split(plan.batch_size) for values in told.values())) if told else [()] * together
            return [(x, dict(zip(told, part))) for x, part in zip(x0.split(plan.batch_size), parts)]

        super().__init__(make_batches, start_step, finish, together=together)
