"""Compare samples with real images."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .. import dist_util
from ..config import option
from ..data import map_labels, open_archive, open_folder, open_npz, require_data_dir
from ..files import write_json
from ..sampling.generate import OWNED_MARKER
from . import features, figures, image_metrics, label_metrics, set_metrics

_SAMPLES_FILE = re.compile(r"samples_(\d+x)+\d+\.npz")


@dataclass
class EvaluateConfig:
    SECTION = "evaluation"

    samples: str = option("", "what is judged: the run of a sampling script, an .npz of it, or a folder of pictures")
    reference: str = option("", "what it is held against: a folder of real pictures, an .npz of them, or with "
                             "--inception_path an .npz of guided-diffusion with statistics (mu, sigma, mu_s, sigma_s)")
    train_dir: str = option("", "the training pictures, to look for copies and to measure them against the reference")
    inception_path: str = option("", "weights file of the Inception network (its name and SHA-256 are said where it is "
                                  "missing): distances are then FID, sFID, KID, and the Inception Score is given")
    classifier_path: str = option("", "run of classifier_train.py, or one weights file of it: its classes are compared "
                                   "with those asked for, and without --inception_path its features are measured")
    paired: bool = option(False, "sample i is a version of reference picture i: report PSNR, SSIM and L1 too")
    tstr_iterations: int = option(0, "train a new classifier for so many steps on the samples (and one on --train_dir), "
                                  "and report its accuracy on the reference; 0: do not", minimum=0)
    tstr_batch_size: int = option(32, "pictures in a step of that training, on each rank", minimum=1)
    batch_size: int = option(64, "pictures at a time on each rank", minimum=1)


def evaluate(config, data, extract, folder, judge=None, class_names=None, image_shape=None, seed=0):
    """Hold samples against real pictures; return the report, after writing it and its figures to `folder`.

    The ranks share the work of reading features; all of them call this, and rank 0 writes.

    :param extract: images [N x C x ...] in [0, 1] -> `metrics.Features`, between which distances are taken; where they
        hold spatial features too, these are Inception's and the distances go by the names of FID and its kin.
    :param judge: the same of a classifier whose logits mean `class_names`; may be `extract` itself.
    :param image_shape: the only shape (C, ...) that the classifier takes; None: any.
    :raises ValueError: before any is read, where the pictures differ in shape or have classes that `class_names` lacks.
    """
    reference = open_images(config.reference, data, "--reference")
    samples = open_images(config.samples, data, "--samples")
    training = open_images(config.train_dir, data, "--train_dir") if config.train_dir else None
    for flag, path, pictures in (("--samples", config.samples, samples), ("--train_dir", config.train_dir, training)):
        if pictures is not None and len(pictures) == 0:
            raise ValueError(f"{path} holds statistics and no pictures; {flag} wants the pictures themselves")
    if not len(reference) and not config.inception_path:
        raise ValueError(f"{config.reference} holds statistics of Inception features; give --inception_path to compare "
                         "with them, or pictures as --reference")
    for path, pictures in ((config.reference, reference), (config.train_dir, training)):
        if pictures is not None and len(pictures) and pictures.shape != samples.shape:
            raise ValueError(f"{config.samples} holds pictures of shape {samples.shape}, {path} of {pictures.shape} "
                             "(channels, height, width); set --image_size or --image_channels")
    if image_shape and samples.shape != tuple(image_shape):
        raise ValueError(f"{config.samples} holds pictures of shape {samples.shape}, {config.classifier_path} was "
                         f"trained on {tuple(image_shape)} (channels, height, width); set --image_size or "
                         "--image_channels, or take another --classifier_path")
    if config.paired and len(reference) != len(samples):
        raise ValueError("--paired True wants as many samples as reference pictures, "
                         f"found {len(samples)} and {len(reference)}")
    judged_sets = [(name, pictures, map_labels(pictures, class_names))
                   for name, pictures in (("reference", reference), ("samples", samples))
                   if judge is not None and len(pictures) and pictures.labels is not None]
    real = _measure(extract, reference, config.batch_size, "reference")
    made = _measure(extract, samples, config.batch_size, "samples")
    report = {"num_reference": len(reference), "num_samples": len(samples), **_distances(real, made, seed)}
    if config.paired:
        report.update(_paired_scores(reference, samples, config.batch_size))
    for name, pictures, labels in judged_sets:
        known = real.features if name == "reference" else made.features
        features = known if judge is extract else _read(judge, pictures, config.batch_size, "classes")
        judged = label_metrics.classification_report(features.logits.argmax(1), labels, class_names)
        report["classifier_accuracy" if name == "reference" else "class_agreement"] = judged
        if dist_util.rank() == 0 and len(class_names) <= figures.MAX_CLASSES:
            sheet = figures.confusion_plot(np.array(judged["confusion"]), class_names)
            figures.save_image(Path(folder) / f"confusion_{name}.png", sheet)
    if training is not None:
        bank = _measure(extract, training, config.batch_size, "training")
        between = _distances(real, bank, seed)
        report["training_to_reference"] = {"num_training": len(training), **between}
        if dist_util.rank() == 0:
            report["neighbours"] = _nearest_neighbor_report(samples, made, real, training, bank, folder)
    write_report(report, folder)
    return report


def write_report(report, folder):
    """Write metrics.json (on rank 0)."""
    if dist_util.rank() == 0:
        write_json(Path(folder) / "metrics.json", report)


@dataclass
class _SetFeatures:
    """What is known of a set: features (None where only statistics were given) and their statistics."""

    features: features.Features | None
    statistics: set_metrics.FeatureStatistics
    spatial: set_metrics.FeatureStatistics | None


def _measure(extract, pictures, batch_size, what):
    """Return the `_SetFeatures` of a set; statistics that came with it are taken for Inception's, as they were made."""
    known = pictures.statistics if isinstance(pictures, SampleFile) else {}
    features = _read(extract, pictures, batch_size, what) if len(pictures) else None
    inception = features is None or features.spatial is not None
    if known and inception:
        return _SetFeatures(features, known["pooled"], known.get("spatial", features and features.spatial))
    return _SetFeatures(features, set_metrics.FeatureStatistics().update(features.pooled), features.spatial)


def _distances(real, made, seed):
    """Return the distances of two measured sets by name, as far as both sets allow."""
    inception = made.spatial is not None
    names = ("fid", "kid") if inception else ("frechet", "kernel")
    report = {names[0]: set_metrics.frechet_distance(real.statistics, made.statistics)}
    if real.spatial is not None and inception:
        report["sfid"] = set_metrics.frechet_distance(real.spatial, made.spatial)
    if inception:
        report["inception_score"] = set_metrics.inception_score(made.features.logits)
    if real.features is not None:
        pair = real.features.pooled, made.features.pooled
        report[names[1]] = set_metrics.kernel_distance(*pair, seed=seed)
        report["precision"], report["recall"] = set_metrics.precision_recall(*pair)
    return report


def _nearest_neighbor_report(samples, made, real, training, bank, folder, shown=12):
    """Compare distances to the nearest training picture: of samples, and of held-out pictures (which are no copies)."""
    bank = bank.features.pooled
    distances, nearest = set_metrics.nearest_neighbors(made.features.pooled, bank, k=1)
    rows = np.linspace(0, len(samples) - 1, min(shown, len(samples))).round().astype(int)
    sheet = figures.neighbor_grid(
        samples.batch(rows).numpy(), training.batch(nearest[rows, 0]).numpy()[:, None], distances[rows]
    )
    figures.save_image(Path(folder) / "neighbours.png", sheet)
    pixels = [float((samples.batch([r]) - training.batch([nearest[r, 0]])).abs().mean()) for r in rows]
    report = {"median_distance_of_samples": float(np.median(distances)), "shown_samples": rows.tolist(),
              "shown_pixel_l1": pixels}
    if real.features is not None:
        held_out, _ = set_metrics.nearest_neighbors(real.features.pooled, bank, k=1)
        report["median_distance_of_reference"] = float(np.median(held_out))
        # Samples that stand nearer to a training picture than all but one in a hundred held-out pictures do.
        report["share_suspiciously_near"] = float((distances[:, 0] < np.quantile(held_out, 0.01)).mean())
    return report


def _paired_scores(reference, samples, batch_size):
    scores = {"psnr": [], "ssim": [], "l1": []}
    for start in range(0, len(samples), batch_size):
        rows = range(start, min(start + batch_size, len(samples)))
        a, b = reference.batch(rows), samples.batch(rows)
        for name, values in scores.items():
            values.append(getattr(image_metrics, name)(a, b))
    return {name: torch.cat(values).mean().item() for name, values in scores.items()}


class SampleFile:
    """The pictures of an .npz of samples, with the interface of PictureFolder that is needed here; read as needed.

    Statistics of Inception features that stand beside them, or alone, are in `statistics`: {"pooled", "spatial"}.
    """

    def __init__(self, path):
        self.folder = path  # named so as that of PictureFolder, which may be an .npz too
        content = open_archive(path)
        self.statistics = {}
        for name, mean, covariance in (("pooled", "mu", "sigma"), ("spatial", "mu_s", "sigma_s")):
            if mean in content and covariance in content:
                self.statistics[name] = set_metrics.FeatureStatistics.from_moments(content[mean], content[covariance])
        if self.statistics and "arr_0" not in content:
            self.images, self.labels, self.class_names, self.shape = (), None, None, None
            return
        samples = open_npz(path)
        self.images, self.labels, self.class_names = samples.images, samples.labels, samples.class_names
        self.shape = self.images.shape[-1], *self.images.shape[1:-1]

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        """Return pictures as float32 [n x C x ...] in [0, 1]."""
        return torch.from_numpy(np.moveaxis(self.images[np.asarray(indices)], -1, 1).astype(np.float32) / 255)


def require_dataset(path, flag):
    """Raise FileNotFoundError where there is no such set of pictures."""
    if not path:
        raise FileNotFoundError(f"{flag} is not given; it wants a folder of pictures or an .npz of samples")
    require_data_dir(str(path), flag)


def open_images(path, data, flag):
    """Return the pictures of an .npz of samples, given itself or by its run, or of a folder, read as `data` says."""
    require_dataset(path, flag)
    if str(path).endswith(".npz") and {"arr_0", "mu"} & set(open_archive(path)):
        return SampleFile(path)
    found = sorted(Path(path).glob("samples_*.npz")) if flag == "--samples" else []
    drawn = [file for file in found if _SAMPLES_FILE.fullmatch(file.name)]
    if len(drawn) > 1:
        raise ValueError(f"{path} holds {', '.join(p.name for p in drawn)}; give one of them as {flag}")
    return SampleFile(drawn[0]) if drawn else open_folder(sample_data_config(path, data), flag=flag, data_dir=str(path))


def sample_data_config(path, data):
    """Return a DataConfig for a folder: what sampling has written has 8 bits, whatever the range of the real values."""
    if not (Path(path) / OWNED_MARKER).exists():
        return data
    return replace(data, value_range="", value_window="", dynamic_range_db=0.0, reference_db="", crop="center",
                   patches_per_volume=1)


def _read(extract, pictures, batch_size, what):
    """Return the `Features` of all pictures, on every rank; each rank reads every so many batches."""
    starts = range(0, len(pictures), batch_size)[dist_util.rank()::dist_util.world_size()]
    mine = []
    for start in _progress(starts, what):
        batch = pictures.batch(range(start, min(start + batch_size, len(pictures))))
        mine.append((start, features.collect_features(extract, [batch])))
    spatial = None
    if any(read.spatial for _, read in mine):
        spatial = set_metrics.FeatureStatistics()
        for _, read in mine:
            spatial.merge(read.spatial)
    rows = [(start, read.pooled, read.logits) for start, read in mine]
    gathered = dist_util.gather_objects((rows, spatial))
    rows = sorted((row for of_rank, _ in gathered for row in of_rank), key=lambda row: row[0])
    spatial = [of_rank for _, of_rank in gathered if of_rank is not None]
    for other in spatial[1:]:
        spatial[0].merge(other)
    logits = None if rows[0][2] is None else np.concatenate([row[2] for row in rows])
    return features.Features(np.concatenate([row[1] for row in rows]), logits, spatial[0] if spatial else None)


def _progress(starts, what):
    from tqdm import tqdm

    return tqdm(starts, desc=what, leave=False, mininterval=1, disable=dist_util.rank() != 0)
