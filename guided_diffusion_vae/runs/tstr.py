"""Train on synthetic samples, test on real images."""

import dataclasses

from .. import dist_util, logger
from ..data import DataConfig, hash_lines, map_labels, open_folder
from ..evaluation import EvaluateConfig, classification_report, classifier_features, collect_features
from ..train_util import ClassifierTrainConfig
from .factories import ClassifierConfig, DiffusionConfig, build_classifier
from .loading import load_classifier, open_weights
from .spaces import open_pixels
from .training import infer_classifier_config, train_classifier


def open_tstr_datasets(run, datasets):
    """Return {name: ImageSource} for `run_tstr` from the sets "reference", "samples" and "training".

    :raises ValueError: if images have no classes, are too few, or no classifier can be built for them.
    """
    config = run[EvaluateConfig]
    images = {}
    for name, dataset in datasets.items():
        dataset, path = dataset.images, str(dataset.path)
        if path.endswith(".npz"):
            problem = "contains statistics" if dataset is None else "contains volumes"
            if dataset is None or len(dataset.shape) == 4:
                raise ValueError(f"{path} {problem}: --tstr_iterations expects images, or for volumes the folder "
                                 "volumes/ next to it; set another path or omit --tstr_iterations")
            dataset = open_folder(run[DataConfig], data_dir=path, value_range="", value_window="")
        source, _ = open_pixels(dataset)
        build_classifier(infer_classifier_config(run[ClassifierConfig], source), DiffusionConfig(), source.latent_shape)
        step = config.tstr_batch_size * dist_util.world_size()
        if name != "reference" and len(dataset) < step:
            raise ValueError(f"{dataset.folder} has {len(dataset)} images: expected at least {step}, one training "
                             "step; lower --tstr_batch_size")
        images[name] = dataset
    return images


def run_tstr(run, datasets):
    """Train one classifier on samples and one on training images; return their reports on the real images.

    The accuracy of the first, relative to the second, measures how much class information the samples carry. Each
    classifier has a folder below `run.folder`, named by a hash of its data and settings, so that it is resumed by the
    same evaluation and by no other.
    """
    config, real, reports = run[EvaluateConfig], datasets["reference"], {}
    train = dataclasses.replace(
        run[ClassifierTrainConfig], iterations=config.tstr_iterations, save_interval=config.tstr_iterations,
        batch_size=config.tstr_batch_size, noised=False, val_data_dir="",
    )
    configs = train, run[ClassifierConfig], DiffusionConfig()
    for name, images in datasets.items():
        if name == "reference":
            continue
        # With the names that these fields had at first, so that evaluations begun then are resumed.
        texts = (repr(part).replace("max_val_samples=", "val_pictures=").replace("process='gaussian', ", "")    # alias
                 for part in (*configs, dist_util.world_size()))
        settings = hash_lines([images.fingerprint, *texts])
        folder = run.folder / f"trained_on_{name}_{settings[:8]}"
        inner = run.derive("classifier_train", configs, folder)
        marker = inner.checkpoint[0]
        with logger.scoped_configure(str(folder), ["log", "csv"], resume_step=marker and marker["step"]):
            train_classifier(inner, *open_pixels(images))
        weights = open_weights(folder, "--logdir")
        model, classes = load_classifier(weights), weights.header["classes"]
        starts = range(0, len(real), config.batch_size)
        batches = (real.batch(range(start, min(start + config.batch_size, len(real)))) for start in starts)
        logits = collect_features(classifier_features(model), batches).logits
        report = classification_report(logits.argmax(1), map_labels(real, classes), classes)
        reports[f"train_on_{name}_test_on_real"] = report
    return reports
