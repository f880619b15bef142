"""Compare labels: confusion matrix, class agreement."""

import numpy as np

from ..config import require
from .image_metrics import to_tensor


def confusion_matrix(predicted, target, num_classes):
    """Return counts int64 [K x K]: row = the target (or true) class, column = the predicted one.

    :raises ValueError: if the lengths differ or a label is not in [0, num_classes).
    """
    predicted, target = _labels(predicted, target)
    both = np.concatenate([predicted, target])
    low, high = (both.min(), both.max()) if both.size else (0, 0)
    require((0 <= low <= high < num_classes or not both.size, f"labels: expected 0 to {num_classes - 1}, got {low} to "
             f"{high}; check that both have the same class names"))
    pairs = np.bincount(target * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes).astype(np.int64)


def class_agreement(predicted, target):
    """Return the fraction of samples, 0 to 1, that are classified as their target class.

    :raises ValueError: if the lengths differ or there are no samples.
    """
    predicted, target = _labels(predicted, target)
    require((len(target) > 0, "class agreement: expected at least one sample"))
    return float((predicted == target).mean())


def classification_report(predicted, labels, class_names):
    """Return {"accuracy", "count", "per_class", "confusion"}, JSON-able.

    `per_class` maps every name to its accuracy, None for a class without samples. `confusion` is `confusion_matrix` as
    lists, in the order of `class_names`.
    """
    matrix = confusion_matrix(predicted, labels, len(class_names))
    rows = zip(class_names, matrix.diagonal().tolist(), matrix.sum(1).tolist())
    return {
        "accuracy": class_agreement(predicted, labels),
        "count": int(matrix.sum()),
        "per_class": {name: correct / total if total else None for name, correct, total in rows},
        "confusion": matrix.tolist(),
    }


def _labels(predicted, target):
    pair = [np.asarray(to_tensor(values).cpu()).astype(np.int64) for values in (predicted, target)]
    require((len(pair[0]) == len(pair[1]), f"labels: expected equal counts, got {len(pair[0])} predictions for "
             f"{len(pair[1])} labels"))
    return pair
