"""Compare samples with real images."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import dist_util
from ..config import option, require
from ..data import (
    count_colors, evenly_spaced, evenly_spaced_per_class, fit_colormap, map_labels, open_archive, open_npz,
    read_archive_headers,
)
from ..files import atomic_path
from ..logger import progress
from ..sampling.sheets import to_pil
from . import features, figures, set_metrics
from .image_metrics import average_metrics, paired_metrics
from .physics import Physics

FITTED_IMAGES = 16      # to which the table of a colormap is fitted
NEIGHBORS = 3           # nearest training images of each sample in NEIGHBORS_FILE
NEIGHBOR_SIZE = 384, 128    # of a large one: width and height


@dataclass
class EvaluateConfig:
    SECTION = "evaluation"

    samples: str = option(
        "", "samples to evaluate: run of a sampling script, its .npz, or a folder of images", essential=True)
    reference: str = option("", "reference set: a folder or .npz of real images; with --inception_path also a "
                                "guided-diffusion .npz of statistics (mu, sigma, mu_s, sigma_s)", essential=True)
    train_dir: str = option("", "training images: find memorized ones among the samples, and compare them with the "
                                "reference", essential=True)
    inception_path: str = option("", "weights file of the Inception network (if it is missing, the error gives its "
                                     "name and SHA-256): report FID, sFID, KID and the Inception Score", essential=True)
    classifier_path: str = option(
        "", "run of classifier_train.py or a weights file of one: compare its classes with the requested ones, and "
            "without --inception_path use its features", essential=True)
    physics: bool = option(False, "compare Doppler centroid, bandwidth, extent, symmetry, time and energy of "
                                  "spectrograms; axes are those of the data, or --doppler_hz and --frame_s",
                           essential=True)
    clutter_hz: float = option(0.0, "--physics: Doppler frequencies up to this one, which contain static echoes, are "
                                    "left out; 0: none", minimum=0)
    paired: bool = option(
        False, "sample i is a version of reference image i: also report PSNR, SSIM and L1", essential=True)
    tstr_iterations: int = option(0, "steps to train a new classifier on the samples (and one on --train_dir) whose "
                                     "accuracy on the reference is reported; 0: disabled", minimum=0, essential=True)
    tstr_batch_size: int = option(32, "images per step of that training on each rank", minimum=1)
    batch_size: int = option(64, "images in a batch per rank", minimum=1, essential=True)


@dataclass(frozen=True)
class ImageSet:
    """A set of images to evaluate.

    `images` has a length and `shape`, `labels`, `class_names` and `batch` of an `interfaces.ImageSource`; None if only
    the `statistics` of Inception features are known, {"pooled": FeatureStatistics, "spatial": FeatureStatistics}.
    """

    path: str
    images: Any
    statistics: dict = field(default_factory=dict)

    def __len__(self):
        return 0 if self.images is None else len(self.images)

    @property
    def colormap(self):
        """Name of the table of a colormap by which files were read, or that an archive states; else an empty text."""
        if self.images is None or isinstance(self.images, SampleFile):
            return self.images.colormap if self.images else ""
        return self.images.preprocessing.get("colormap", "")


class EvaluationClassifier(NamedTuple):
    """A classifier: images [N x C x ...] in [0, 1] -> `Features` with logits of `class_names`.

    `image_shape` is the only shape (C, ...) that it accepts, None: any.
    """

    extract: Callable
    class_names: list
    image_shape: tuple | None = None


def evaluate(config: EvaluateConfig, sets: dict[str, ImageSet], extract: Callable | None, folder,
             classifier: EvaluationClassifier | None = None, seed: int = 0, physics: Physics | None = None) -> dict:
    """Compare samples with real images; return the report, after writing its figures to `folder`.

    The ranks share the extraction of features; all of them call this, and rank 0 writes.

    :param sets: {"reference": ImageSet, "samples": ImageSet} and optionally "training".
    :param extract: images [N x C x ...] in [0, 1] -> `Features`, between which distances are computed. With spatial
        features these are Inception's, and the distances are reported as FID, sFID and KID.
        None, together with `physics`: without such distances.
    :param classifier: an `EvaluationClassifier`, whose `extract` may be the same function.
    :param physics: what is measured of spectrograms, too; None: nothing.
    :raises ValueError: before any image is read, if shapes do not match or there are labels of unknown classes.
    """
    reference, samples, training = sets["reference"], sets["samples"], sets.get("training")
    check_sets(config, sets, classifier)
    classify, classes = classifier[:2] if classifier else (None, [])
    labels = {name: map_labels(sets[name].images, classes) for name in ("reference", "samples")
              if classifier and len(sets[name]) and sets[name].images.labels is not None}
    measured = {name: _measure(extract, classify if name in labels else None, images, config.batch_size, name, physics)
                for name, images in sets.items()}
    real, generated = measured["reference"], measured["samples"]
    report = {"num_reference": len(reference), "num_samples": len(samples),
              **(_distances(real, generated, seed) if extract else {})}
    if physics:
        report["physics"] = _physics_report(physics, sets, measured, folder)
    if config.paired:
        starts = range(0, len(samples), config.batch_size)
        batches = [range(start, min(start + config.batch_size, len(samples))) for start in starts]
        report.update(average_metrics([paired_metrics(reference.images.batch(rows), samples.images.batch(rows))
                                       for rows in batches]))
    for name in labels:
        result = set_metrics.classification_report(measured[name].classes, labels[name], classes)
        report["classifier_accuracy" if name == "reference" else "class_agreement"] = result
        if dist_util.rank() == 0 and len(classes) <= figures.MAX_CLASSES:
            plot = figures.confusion_plot(np.array(result["confusion"]), classes)
            figures.save_image(Path(folder) / f"confusion_{name}.png", plot)
    if training is not None and extract:
        report["training_to_reference"] = {"num_training": len(training),
                                           **_distances(real, measured["training"], seed)}
        if dist_util.rank() == 0:
            report["nearest_neighbors"] = _nearest_neighbor_report(sets, measured, folder)
    return report


def check_sets(config: EvaluateConfig, sets: dict[str, ImageSet], classifier: EvaluationClassifier | None) -> None:
    """Check before any image is read that sets can be compared; arguments as in `evaluate`.

    :raises ValueError: if not.
    """
    reference, samples = sets["reference"], sets["samples"]
    for name, images in sets.items():
        require((len(images) or name == "reference", f"{images.path} contains statistics and no images, which "
                 "--samples and --train_dir require"))
        _require_pooled(images.path, images.statistics)
    require((len(reference) or config.inception_path, f"{reference.path} contains statistics of Inception features; "
             "set --inception_path, or use images as --reference"))
    shape = tuple(samples.images.shape)
    shapes = {images.path: tuple(images.images.shape) for images in sets.values() if len(images)}
    if classifier and classifier.image_shape:
        shapes[config.classifier_path] = tuple(classifier.image_shape)
    for path, other in shapes.items():
        require((other == shape, f"{samples.path} contains images of shape {shape}, but {path} requires {other} "
                 "(channels, height, width); set --image_size or --image_channels, or use another path"))
    require((not config.paired or len(reference) == len(samples),
             f"--paired True: expected {len(reference)} samples, one per reference image, got {len(samples)}"))


@dataclass
class _SetFeatures:
    """Features of a set (None if only statistics are known), their statistics, and classes int64 [N] or None."""

    features: features.Features | None
    statistics: set_metrics.FeatureStatistics | None
    spatial: set_metrics.FeatureStatistics | None
    classes: np.ndarray | None
    physics: np.ndarray | None = None   # result of `Physics.measure`

    @functools.cached_property
    def radii(self):
        """The radii of the balls for precision and recall."""
        return set_metrics.ball_radii(self.features.pooled, progress=progress)


def _measure(extract, classify, images, batch_size, label, physics=None):
    """Return the `_SetFeatures` of an ImageSet; the statistics that it comes with are used for Inception features."""
    read, classes, quantities = (
        _extract(extract, classify, images, batch_size, label, physics) if len(images) else (None, None, None))
    if not extract:
        return _SetFeatures(None, None, None, classes, quantities)
    if images.statistics and (read is None or read.spatial is not None):
        spatial = images.statistics.get("spatial", read and read.spatial)
        return _SetFeatures(read, images.statistics["pooled"], spatial, classes, quantities)
    statistics = set_metrics.FeatureStatistics().update(read.pooled)
    return _SetFeatures(read, statistics, read.spatial, classes, quantities)


def feature_statistics(images: ImageSet, extract, batch_size, label) -> set_metrics.FeatureStatistics:
    """Return the statistics of the features of a set on all ranks, which share the work; `label` is for the log."""
    return _measure(extract, None, images, batch_size, label).statistics


def _distances(real, generated, seed):
    """Return the distances of two measured sets by name, as far as both sets allow."""
    inception = generated.spatial is not None
    names = ("fid", "kid") if inception else ("frechet", "kernel")
    report = {names[0]: set_metrics.frechet_distance(real.statistics, generated.statistics)}
    if real.spatial is not None and inception:
        report["sfid"] = set_metrics.frechet_distance(real.spatial, generated.spatial)
    if inception:
        report["inception_score"] = set_metrics.inception_score(generated.features.logits)
    if real.features is not None:
        pair = real.features.pooled, generated.features.pooled
        report[names[1]] = set_metrics.kernel_distance(*pair, seed=seed, progress=progress)
        report["precision"], report["recall"] = set_metrics.precision_recall(
            *pair, radii=(real.radii, generated.radii), progress=progress)
    return report


def _physics_report(physics, sets, measured, folder):
    """Return the report of physical quantities, after plotting their distributions on rank 0."""
    quantities = {name: part.physics for name, part in measured.items()}
    classes = {name: _classes_of_images(images.images) for name, images in sets.items()}
    report = physics.report(quantities, classes)
    if dist_util.rank() == 0:
        curves = dict(list(physics.curves(quantities, classes).items())[:figures.MAX_ROWS])
        figures.save_image(Path(folder) / "physics.png", figures.curve_grid(curves))
    return report


def _classes_of_images(images):
    """Return the class name of each image, None without classes."""
    if images.labels is None:
        return None
    return [images.class_names[label] if images.class_names else str(label) for label in images.labels]


def _nearest_neighbor_report(sets, measured, folder, examples=12):
    """Return distances to the nearest training image: of samples, and of held-out images as the baseline."""
    samples, training = sets["samples"].images, sets["training"].images
    bank = measured["training"].features.pooled
    pooled = measured["samples"].features.pooled
    distances, nearest = set_metrics.nearest_neighbors(pooled, bank, min(NEIGHBORS, len(bank)), progress=progress)
    _write_neighbors(Path(folder) / figures.NEIGHBORS_FILE, sets, distances, nearest)
    distances, nearest = distances[:, :1], nearest[:, :1]
    rows = evenly_spaced(len(samples), examples)
    chosen, neighbors = samples.batch(rows), training.batch(nearest[rows, 0])
    grid = figures.neighbor_grid(chosen.numpy(), neighbors.numpy()[:, None], distances[rows])
    figures.save_image(Path(folder) / "nearest_neighbors.png", grid)
    pixels = [float((sample - neighbor).abs().mean()) for sample, neighbor in zip(chosen, neighbors)]
    report = {"median_distance_samples": float(np.median(distances)), "example_indices": rows.tolist(),
              "example_pixel_l1": pixels}
    if measured["reference"].features is not None:
        held_out, _ = set_metrics.nearest_neighbors(measured["reference"].features.pooled, bank, progress=progress)
        report["median_distance_reference"] = float(np.median(held_out))
        # Samples closer to a training image than 99% of the held-out images are, which cannot be copies.
        report["memorized_fraction"] = float((distances[:, 0] < np.quantile(held_out, 0.01)).mean())
    return report


def _write_neighbors(path, sets, distances, nearest):
    """Write the nearest training images of evenly spaced samples of each class, for the report page.

    The arrays are `indices` int64 [n] of the samples, `distances` [n x k] in the space of the features, and `neighbors`
    uint8 [n x k x H x W] or [... x 3]: images as they are shown, of volumes the middle slices.
    """
    samples, training = sets["samples"].images, sets["training"].images
    limit = figures.MAX_IMAGES if len(samples.shape) == 3 else figures.MAX_VOLUMES
    rows, shown = evenly_spaced_per_class(samples.labels, len(samples), limit), []
    for row in rows:
        tiles = [to_pil(image, sets["training"].colormap) for image in training.batch(nearest[row])]
        for tile in tiles:
            tile.thumbnail(NEIGHBOR_SIZE)
        shown.append(np.stack(tiles))
    with atomic_path(path) as part, open(part, "wb") as stream:
        np.savez_compressed(stream, indices=rows, distances=distances[rows], neighbors=np.stack(shown))


class SampleFile:
    """Images of an .npz archive of samples, read on demand.

    :param colormap: a value of --colormap; RGB images become scalars of the nearest colors. Empty: they remain RGB.
    """

    def __init__(self, path, content=None, colormap=""):
        self.folder, samples = path, open_npz(path, content)
        self.images, self.labels, self.class_names = samples.images, samples.labels, samples.class_names
        self.colormap = samples.colormap
        self.set_colormap(colormap)

    def set_colormap(self, colormap):
        """Return RGB images as scalars of a value of --colormap from now on, or as they are with an empty text."""
        self._nearest = None
        if colormap and self.images.ndim == 4 and self.images.shape[-1] == 3:
            self._nearest = fit_colormap(*count_colors(list(self.images[:FITTED_IMAGES])), colormap)
        self.shape = 1 if self._nearest else self.images.shape[-1], *self.images.shape[1:-1]

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        """Return images as float32 [n x C x ...] in [0, 1]."""
        images = self.images[np.asarray(indices)]
        if self._nearest:
            return torch.from_numpy(self._nearest.to_scalars(images)[0])[:, None]
        return torch.from_numpy(np.moveaxis(images, -1, 1).astype(np.float32) / 255)


def open_sample_file(path, colormap: str = "") -> ImageSet | None:
    """Return the `ImageSet` of an .npz archive with samples, statistics of Inception features, or both.

    None if it has neither.

    :param colormap: see `SampleFile`.
    :raises ValueError: if it has statistics of spatial features only.
    """
    members = set(read_archive_headers(path))
    if not members & {"arr_0", "mu", "mu_s"}:   # not opened, as `open_folder` may unpack it
        return None
    content, statistics = open_archive(path), {}
    for name, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
        if mean in content and covariance in content:
            statistics[name] = set_metrics.FeatureStatistics.from_moments(content[mean], content[covariance])
    _require_pooled(path, statistics)
    if "arr_0" not in content and not statistics:
        return None
    return ImageSet(path, SampleFile(path, content, colormap) if "arr_0" in content else None, statistics)


def _require_pooled(path, statistics):
    require(("pooled" in statistics or not statistics,
             f"{path}: expected statistics mu and sigma with mu_s and sigma_s, got mu_s, sigma_s; use another file"))


def _extract(extract, classify, images, batch_size, label, physics=None):
    """Return on every rank (`Features`, classes, quantities of `physics`) of an ImageSet, which is read once.

    Without `extract`, `classify` or `physics` theirs is None.

    Each rank extracts every n-th batch. Logits are kept for the Inception Score, which a reference does not have.
    """
    batches = [range(start, min(start + batch_size, len(images))) for start in range(0, len(images), batch_size)]
    shares = [batches[rank::dist_util.world_size()] for rank in range(dist_util.world_size())]
    own, arrays, spatial, done = shares[dist_util.rank()], {}, None, 0
    for rows in progress(own, label):
        batch = images.images.batch(rows)
        read = features.collect_features(extract, [batch]) if extract else features.Features(None)
        parts = {"pooled": read.pooled} if extract else {}
        if physics:
            parts["physics"] = physics.measure(batch)
        if classify:
            classified = read if classify is extract else features.collect_features(classify, [batch])
            parts["classes"] = classified.logits.argmax(1)
        if read.spatial is not None:
            spatial = read.spatial if spatial is None else spatial.merge(read.spatial)
            if label != "reference":
                parts["logits"] = read.logits
        for name, part in parts.items():
            if name not in arrays:  # allocated once, as arrays that grow are copied
                arrays[name] = np.empty((sum(map(len, own)), *part.shape[1:]), part.dtype)
            arrays[name][done:done + len(rows)] = part
        done += len(rows)
    gathered = dist_util.gather_objects((arrays, spatial))
    if len(gathered) > 1:
        order = np.argsort(np.concatenate([list(rows) for share in shares for rows in share]))
        arrays = {name: np.concatenate([part[name] for part, _ in gathered if part])[order] for name in gathered[0][0]}
        spatial, *others = [part for _, part in gathered if part is not None] or [None]
        for part in others:
            spatial.merge(part)
    read = features.Features(arrays.get("pooled"), arrays.get("logits"), spatial)
    return read, arrays.get("classes"), arrays.get("physics")
