"""Compare labels: confusion matrix, class agreement."""

import numpy as np

from .image_metrics import _tensor


def confusion_matrix(predicted, target, num_classes):
    """Return counts [C x C] int64: row = the class that was target for (or true), column = the predicted one.

    Raises ValueError where the lengths differ or a label is outside 0 ... num_classes - 1.
    """
    predicted, target = _labels(predicted), _labels(target)
    if len(predicted) != len(target):
        raise ValueError(f"{len(predicted)} predictions for {len(target)} labels")
    both = np.concatenate([predicted, target])
    if both.size and not 0 <= both.min() <= both.max() < num_classes:
        found = f"labels {both.min()} to {both.max()}"
        raise ValueError(f"{found} among {num_classes} classes; check that both come from the same class names")
    pairs = np.bincount(target * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes).astype(np.int64)


def class_agreement(predicted, target):
    """Return the share, 0 to 1, of samples whose predicted class is the target one; ValueError where there are none."""
    predicted, target = _labels(predicted), _labels(target)
    if len(predicted) != len(target) or not len(target):
        raise ValueError(f"{len(predicted)} predictions for {len(target)} labels; need as many, and one at least")
    return float((predicted == target).mean())


def classification_report(predicted, labels, class_names):
    """Return {"accuracy", "count", "per_class", "confusion"}, plain numbers that JSON can hold.

    `per_class` maps every name to its share of right answers, None for a class without samples; `confusion` is
    `confusion_matrix` as lists, in the order of `class_names`.
    """
    matrix = confusion_matrix(predicted, labels, len(class_names))
    right_and_all = zip(class_names, matrix.diagonal().tolist(), matrix.sum(1).tolist())
    return {
        "accuracy": class_agreement(predicted, labels),
        "count": int(matrix.sum()),
        "per_class": {name: right / total if total else None for name, right, total in right_and_all},
        "confusion": matrix.tolist(),
    }


def _labels(values):
    return np.asarray(_tensor(values).cpu()).astype(np.int64)
