"""Previews and validation during training: image grids in the run folder, and metrics of held-out images in its log."""

import numpy as np
import torch

from .. import logger
from ..data import VolumeFolder, evenly_spaced, map_labels, require_labels, unpad
from ..nn import without_tf32
from ..objectives import StepRNG
from ..vae import blend_tiles, from_image_range, kl_divergence, to_image_range
from .figures import MAX_ROWS, contact_sheet, reconstruction_grid, save_image
from .image_metrics import average_metrics, paired_metrics

PREVIEW_IMAGES = 16  # images in a preview


class ReconstructionValidation:
    """Write input, reconstruction and difference of held-out images; log PSNR, SSIM, L1 and KL over all of them.

    :param count: number of images, evenly spaced over the source; `batch_size` of them at a time.
    """

    def __init__(self, model, image_range, source, count, folder, device, batch_size):
        self.model, self.image_range, self.source = model, image_range, source
        self.folder, self.device, self.batch_size = folder, device, batch_size
        # Autoencoders trained on patches of volumes are measured on full volumes.
        self.full_volumes = isinstance(source, VolumeFolder) and source.config.crop != "none" and not source.config.pad
        items = len(source.paths) if self.full_volumes else len(source)
        self.chosen = evenly_spaced(items, count)

    @torch.no_grad()
    @without_tf32()     # the metrics select a step, and are compared with those of a round trip
    def __call__(self, step):
        scores, grid = [], None
        for images in self._batches():
            decoded, kl = self._reconstruct(images)
            images = images.to(decoded.device)
            images, decoded = (unpad(x, self._unpadded(images)) for x in (images, decoded))
            if grid is None:
                grid = reconstruction_grid(*(x[:PREVIEW_IMAGES].cpu().numpy() for x in (images, decoded)))
                _write_preview(self.folder, step, grid)
            scores.append({**paired_metrics(images, decoded, "val_"), "val_kl": kl})
        measured = average_metrics(scores)
        logger.logkvs(measured)
        return measured

    def _batches(self):
        """Yield batches of images, or one full volume at a time."""
        if self.full_volumes:
            yield from (torch.from_numpy(self.source.read_volume(file))[None] for file in self.chosen)
        else:
            for start in range(0, len(self.chosen), self.batch_size):
                yield self.source.batch(self.chosen[start:start + self.batch_size])

    def _reconstruct(self, images):
        """Return (reconstructions, KL [n]); full volumes in overlapping windows of the size of training."""
        grid, ones, divergences = images.shape[2:], (1,) * (images.dim() - 2), []

        def reconstruct(part):
            mean, logvar = self.model.moments(to_image_range(part.to(self.device), self.image_range))
            divergences.append(kl_divergence(mean, logvar).cpu())
            return from_image_range(self.model.decode(mean), self.image_range).clamp(0, 1)

        if tuple(grid) == tuple(self.source.shape[1:]):
            decoded = reconstruct(images)
        else:
            decoded = blend_tiles(reconstruct, images, grid, self.source.sides, ones, ones)
        return decoded, torch.stack(divergences).mean(0)

    def _unpadded(self, images):
        return images.shape[1:] if self.full_volumes else self.source.unpadded_shape


class SamplePreview:
    """Write a contact sheet of samples, one row per class, always from the same noise."""

    def __init__(self, sampler, folder, device, decode_batch=PREVIEW_IMAGES, columns=6):
        self.sampler, self.folder, self.device, self.columns = sampler, folder, device, columns
        self.decode_batch = decode_batch

    def __call__(self, step):
        classes = list(range(self.sampler.num_classes)) or None
        rows = min(len(classes), MAX_ROWS) if classes else 2
        images = []
        for start in range(0, rows * self.columns, PREVIEW_IMAGES):
            indices = range(start, min(start + PREVIEW_IMAGES, rows * self.columns))
            x0 = self.sampler.sample_x0(indices, classes and classes[:rows], self.device)
            images += [self.sampler.decode(part).cpu().numpy() for part in x0.split(self.decode_batch)]
        images = np.concatenate(images)
        # Classes change fastest along the samples; on the sheet they are rows.
        images = images.reshape(self.columns, rows, *images.shape[1:]).swapaxes(0, 1).reshape(images.shape)
        names = self.sampler.class_names or [str(c) for c in classes or ()]
        sheet = contact_sheet(images, self.columns, row_labels=names[:rows] if classes else None,
                              colormap=self.sampler.colormap)
        _write_preview(self.folder, step, sheet)


class ClassifierValidation:
    """Log the metrics of a classifier's objective on held-out data, noised as in training.

    :param source: a source of x0 before `normalizer`; `class_names` are those of the model.
    :param train: a ClassifierTrainConfig: `max_val_samples` evenly spaced items are measured each time; 0: `batch_size`
        of them, the next ones each time.
    :raises ValueError: if the source has no classes, or others than the model.
    """

    def __init__(self, model, objective, source, normalizer, class_names, train, device):
        require_labels(source, True)
        self.model, self.objective, self.source, self.normalizer = model, objective, source, normalizer
        self.batch_size, self.seed, self.device = train.batch_size, train.seed, device
        self.interval = train.eval_interval or train.save_interval
        self.labels = map_labels(source, class_names)
        self.chosen = evenly_spaced(len(source), train.max_val_samples) if train.max_val_samples else None

    @torch.no_grad()
    def __call__(self, step):
        chosen = self.chosen
        if chosen is None:
            first = step // self.interval * self.batch_size
            chosen = np.arange(first, first + self.batch_size) % len(self.source)
        measured = []
        for start in range(0, len(chosen), self.batch_size):
            items = chosen[start:start + self.batch_size]
            # The same noise each time, so that the curve shows changes of the classifier only.
            draws = StepRNG(self.seed, 0, range(start, start + len(items)), len(chosen))
            x0 = self.normalizer.normalize(self.source.latents(self.source.read(items), device=self.device))
            labels = torch.from_numpy(self.labels[items]).to(self.device)
            measured.append(self.objective(self.model, x0, {"y": labels}, draws))
        terms = {name: torch.cat([terms[name] for terms, _ in measured]) for name in measured[0][0]}
        self.objective.log(None, torch.cat([t for _, t in measured]), terms)


def _write_preview(folder, step, image):
    """Write the image of a preview into the run folder, and to the formats of the log that show images."""
    save_image(folder / "previews" / f"{step:06d}.png", image)
    logger.logimage("preview", image, step)
