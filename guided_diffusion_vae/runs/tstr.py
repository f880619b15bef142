"""Train on synthetic samples, test on real images."""

import dataclasses
from pathlib import Path

from .. import dist_util, logger
from ..data import hash_lines, map_labels, open_folder
from ..evaluation import comparison, features, label_metrics
from ..train_util import find_checkpoint
from .factories import build_classifier
from .loading import load_classifier
from .run import RunConfig
from .spaces import open_pixels
from .training import infer_classifier_config, train_classifier


def open_tstr_datasets(config, data, flags, process):
    """Return {name: pictures} of `run_tstr`, after looking for all that could keep it from training on them.

    :raises ValueError: for pictures without classes, too few of them, or flags that build no classifier for them.
    """
    sets = {}
    for name, flag in (("real", "reference"), ("samples", "samples"), ("training", "train_dir")):
        path = getattr(config, flag)
        if not path:
            continue
        pictures = comparison.open_images(path, data, f"--{flag}")
        if isinstance(pictures, comparison.SampleFile):
            if pictures.shape is None:
                raise ValueError(f"--tstr_iterations {config.tstr_iterations}: {path} holds statistics, no pictures to "
                                 f"train on; give pictures as --{flag}, or leave --tstr_iterations away")
            if len(pictures.shape) == 4:
                raise ValueError(f"--tstr_iterations {config.tstr_iterations}: {path} holds volumes; give the folder "
                                 "volumes/ beside it")
            pictures = open_folder(data, data_dir=str(pictures.folder), value_range="", value_window="")
        source, _ = open_pixels(pictures)
        build_classifier(infer_classifier_config(flags, source), process, source.latent_shape)
        together = config.tstr_batch_size * dist_util.world_size()
        if name != "real" and len(pictures) < together:
            raise ValueError(f"{path} has {len(pictures)} pictures, fewer than a step of {together} takes; lower "
                             "--tstr_batch_size")
        sets[name] = pictures
    return sets


def run_tstr(config, sets, given, data, flags, process, train, folder):
    """Train a classifier on samples, and one on the training pictures; return what share of real pictures they tell.

    The accuracy of the first, beside that of the second, says how much of what tells classes apart the samples have.
    `sets` are those of `open_tstr_datasets`. Each run stands in a folder below `folder` that is named after what it is
    made of, so that the same evaluation goes on with it and no other does.
    """
    real, report = sets["real"], {}
    once = dataclasses.replace(train, iterations=config.tstr_iterations, noised=False, val_data_dir="",
                               save_interval=config.tstr_iterations)
    for name, pictures in sets.items():
        if name == "real":
            continue
        made_from = hash_lines([pictures.fingerprint, *map(repr, (once, flags, process, dist_util.world_size()))])
        place = Path(folder) / f"trained_on_{name}_{made_from[:8]}"
        source, space = open_pixels(pictures)
        found, _ = find_checkpoint(place)
        with logger.scoped_configure(str(place), ["log", "csv"], resume_step=found and found["step"]):
            train_classifier(RunConfig(str(place)), place, (), given, source, space, data, flags, process, once)
        model, header = load_classifier(str(place), dist_util.dev())
        extract = features.classifier_features(model)
        starts = range(0, len(real), config.batch_size)
        batches = (real.batch(range(start, min(start + config.batch_size, len(real)))) for start in starts)
        predicted = features.collect_features(extract, batches).logits.argmax(1)
        judged = label_metrics.classification_report(predicted, map_labels(real, header["classes"]), header["classes"])
        report[f"train_on_{name}_test_on_real"] = judged
    return report
