"""Train on synthetic samples, test on real images."""

import dataclasses

from .. import dist_util, logger
from ..data import DataConfig, hash_lines, map_labels, open_folder
from ..evaluation import comparison, features, label_metrics
from ..gaussian_diffusion import DiffusionConfig
from ..train_util import ClassifierTrainConfig
from ..unet import ClassifierConfig
from .factories import build_classifier
from .loading import load_classifier
from .spaces import open_pixels
from .training import infer_classifier_config, train_classifier


def open_tstr_datasets(run, datasets):
    """Return {name: images} of `run_tstr` from the opened {"real", "samples", "training"} sets of an evaluation.

    :raises ValueError: if images have no classes, are too few, or no classifier can be built for them.
    """
    config = run[comparison.EvaluateConfig]
    images = {}
    for name, dataset in datasets.items():
        if isinstance(dataset, comparison.SampleFile):
            problem = "contains statistics" if dataset.shape is None else "contains volumes"
            if dataset.shape is None or len(dataset.shape) == 4:
                raise ValueError(f"{dataset.folder} {problem}: --tstr_iterations expects images, or for volumes the folder "
                                 "volumes/ next to it; set another path or omit --tstr_iterations")
            dataset = open_folder(run[DataConfig], data_dir=str(dataset.folder), value_range="", value_window="")
        source, _ = open_pixels(dataset)
        build_classifier(infer_classifier_config(run[ClassifierConfig], source), DiffusionConfig(), source.latent_shape)
        step = config.tstr_batch_size * dist_util.world_size()
        if name != "real" and len(dataset) < step:
            raise ValueError(f"{dataset.folder} has {len(dataset)} images: expected at least {step}, one training step; "
                             "lower --tstr_batch_size")
        images[name] = dataset
    return images


def run_tstr(run, datasets):
    """Train one classifier on samples and one on training images; return their reports on the real images.

    The accuracy of the first, relative to the second, measures how much class information the samples carry. Each
    classifier has a folder below `run.folder`, named by a hash of its data and settings, so that it is resumed by the
    same evaluation and by no other.
    """
    config, real, reports = run[comparison.EvaluateConfig], datasets["real"], {}
    train = dataclasses.replace(
        run[ClassifierTrainConfig], iterations=config.tstr_iterations, save_interval=config.tstr_iterations,
        batch_size=config.tstr_batch_size, noised=False, val_data_dir="",
    )
    configs = train, run[ClassifierConfig], DiffusionConfig()
    for name, images in datasets.items():
        if name == "real":
            continue
        settings = hash_lines([images.fingerprint, *map(repr, (*configs, dist_util.world_size()))])
        folder = run.folder / f"trained_on_{name}_{settings[:8]}"
        inner = run.derive("classifier_train", configs, folder)
        marker = inner.checkpoint[0]
        with logger.scoped_configure(str(folder), ["log", "csv"], resume_step=marker and marker["step"]):
            train_classifier(inner, *open_pixels(images))
        model, header = load_classifier(str(folder), dist_util.dev())
        starts = range(0, len(real), config.batch_size)
        batches = (real.batch(range(start, min(start + config.batch_size, len(real)))) for start in starts)
        logits = features.collect_features(features.classifier_features(model), batches).logits
        labels = map_labels(real, header["classes"])
        report = label_metrics.classification_report(logits.argmax(1), labels, header["classes"])
        reports[f"train_on_{name}_test_on_real"] = report
    return reports
