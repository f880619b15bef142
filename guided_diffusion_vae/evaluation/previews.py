"""Draw the pictures that a run leaves while it trains, and measure it on held-out pictures."""

import numpy as np
import torch

from .. import logger
from ..data import VolumeFolder, map_labels, require_labels, unpad
from ..objectives import StepRNG
from ..sampling.generate import SHEET_ROWS
from ..vae import blend_tiles, from_image_range, kl_divergence, to_image_range
from . import figures, image_metrics

PREVIEW_IMAGES = 16  # pictures in a preview


class ReconstructionValidation:
    """Write input, reconstruction and difference of held-out pictures; log PSNR, SSIM, L1 and KL over all of them.

    :param count: how many pictures, evenly spread; `batch_size` of them at a time.
    """

    def __init__(self, model, image_range, pictures, count, folder, device, batch_size):
        if count < 1:
            raise ValueError(f"--val_pictures {count}: at least one picture is needed to measure")
        self.model, self.image_range, self.pictures = model, image_range, pictures
        self.folder, self.device, self.batch_size = folder, device, batch_size
        # Volumes of which patches are trained on are judged whole.
        self.whole = isinstance(pictures, VolumeFolder) and pictures.config.crop != "none" and not pictures.config.pad
        items = len(pictures.paths) if self.whole else len(pictures)
        self.chosen = np.linspace(0, items - 1, min(count, items)).round().astype(int)

    @torch.no_grad()
    def __call__(self, step):
        scores, sheet = {"psnr": [], "ssim": [], "l1": [], "kl": []}, None
        for images in self._batches():
            divergences = []

            def reconstruct(part):
                mean, logvar = self.model.moments(to_image_range(part.to(self.device), self.image_range))
                divergences.append(kl_divergence(mean, logvar).cpu())
                return from_image_range(self.model.decode(mean), self.image_range).clamp(0, 1)

            decoded = self._sliding_window(reconstruct, images)
            images = images.to(decoded.device)
            scores["kl"].append(torch.stack(divergences).mean(0))
            images, decoded = (unpad(x, self._unpadded(images)) for x in (images, decoded))
            if sheet is None:
                sheet = figures.reconstruction_grid(images[:PREVIEW_IMAGES].cpu().numpy(), decoded[:PREVIEW_IMAGES].cpu().numpy())
                figures.save_image(self.folder / "previews" / f"{step:06d}.png", sheet)
            for name in ("psnr", "ssim", "l1"):
                scores[name].append(getattr(image_metrics, name)(images, decoded).cpu())
        measured = {f"val_{name}": torch.cat(values).mean().item() for name, values in scores.items()}
        logger.logkvs(measured)
        return measured

    def _batches(self):
        """Yield batches of pictures, or one whole volume after the other."""
        if self.whole:
            yield from (torch.from_numpy(self.pictures.read_volume(file))[None] for file in self.chosen)
        else:
            for start in range(0, len(self.chosen), self.batch_size):
                yield self.pictures.batch(self.chosen[start:start + self.batch_size])

    def _sliding_window(self, reconstruct, images):
        """Reconstruct pictures at once, and whole volumes in overlapping windows of the size that is trained on."""
        grid, ones = images.shape[2:], (1,) * (images.dim() - 2)
        if tuple(grid) == tuple(self.pictures.shape[1:]):
            return reconstruct(images)
        return blend_tiles(reconstruct, images, grid, self.pictures.sides, ones, ones)

    def _unpadded(self, images):
        return images.shape[1:] if self.whole else self.pictures.unpadded_shape


class SamplePreview:
    """Write a contact sheet of samples, one row a class, each time from the same noise."""

    def __init__(self, sampler, folder, device, decode_batch=PREVIEW_IMAGES, columns=6):
        self.sampler, self.folder, self.device, self.columns = sampler, folder, device, columns
        self.decode_batch = decode_batch

    def __call__(self, step):
        classes = list(range(self.sampler.num_classes)) or None
        rows = min(len(classes), SHEET_ROWS) if classes else 2
        images = []
        for start in range(0, rows * self.columns, PREVIEW_IMAGES):
            indices = range(start, min(start + PREVIEW_IMAGES, rows * self.columns))
            x0 = self.sampler.sample_x0(indices, classes and classes[:rows], self.device)
            images += [self.sampler.decode(part).cpu().numpy() for part in x0.split(self.decode_batch)]
        images = np.concatenate(images)
        # Classes change fastest along the samples; on the sheet they are rows.
        images = images.reshape(self.columns, rows, *images.shape[1:]).swapaxes(0, 1).reshape(images.shape)
        names = self.sampler.class_names or [str(c) for c in classes or ()]
        sheet = figures.contact_sheet(images, self.columns, row_labels=names[:rows] if classes else None)
        figures.save_image(self.folder / "previews" / f"{step:06d}.png", sheet)


class ClassifierValidation:
    """Log what a classifier's objective measures on held-out data, noised like that of training.

    :param source: a source of x0 before `normalizer`; `class_names` are the model's.
    :param count: items that are measured each time, evenly spread; 0: `batch_size` of them, the next ones each time.
    :param interval: steps from one visit to the next.
    :raises ValueError: where the source has no classes, or others than the model.
    """

    def __init__(self, model, objective, source, normalizer, class_names, count, batch_size, interval, seed, device):
        require_labels(source, True)
        self.model, self.objective, self.source, self.normalizer = model, objective, source, normalizer
        self.batch_size, self.interval, self.seed, self.device = batch_size, interval, seed, device
        self.labels = map_labels(source, class_names)
        spread = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
        self.chosen = spread if count else None

    @torch.no_grad()
    def __call__(self, step):
        chosen = self.chosen
        if chosen is None:
            first = step // self.interval * self.batch_size
            chosen = np.arange(first, first + self.batch_size) % len(self.source)
        measured = []
        for start in range(0, len(chosen), self.batch_size):
            items = chosen[start:start + self.batch_size]
            # Every visit meets the same noise, so that the curve shows the classifier and not the draw.
            draws = StepRNG(self.seed, 0, range(start, start + len(items)), len(chosen))
            x0 = self.normalizer.normalize(self.source.latents(self.source.read(items), device=self.device))
            labels = torch.from_numpy(self.labels[items]).to(self.device)
            measured.append(self.objective(self.model, x0, {"y": labels}, draws))
        terms = {name: torch.cat([terms[name] for terms, _ in measured]) for name in measured[0][0]}
        self.objective.log(None, torch.cat([t for _, t in measured]), terms)
