"""Class labels of files: the rules by which names give classes, and the checks of labels against a model."""

from collections.abc import Sequence

import numpy as np

from ..config import require
from ..files import bf
from ..interfaces import ImageSource, LatentSource


def name_prefix(path):
    """Return the part of a file name before the first underscore, guided-diffusion's class name."""
    return bf.basename(path).partition("_")[0]


def infer_classes(names: Sequence[str], folder: str) -> tuple[list[str] | None, np.ndarray | None]:
    """Return (sorted class names, int64 labels) of relative file names, (None, None) if one of them has no class.

    :raises ValueError: if the subfolders are dataset splits (train, val), not classes, or a class has an empty name.
    """
    if all("/" in name for name in names):
        classes = [name.partition("/")[0] for name in names]
        splits = "train" in classes and {"val", "valid", "validation", "test"} & set(classes)
        require((not splits, f"{folder} contains dataset splits, not classes: {', '.join(sorted(set(classes)))}; set "
                             "--data_dir to one of them"))
    elif all("_" in bf.basename(name) for name in names):
        classes = [name_prefix(name) for name in names]
        empty = [name for name, prefix in zip(names, classes) if not prefix]
        if empty:
            raise ValueError(f"{bf.join(folder, empty[0])} has an empty class name: expected CLASS_rest, got nothing "
                             f"before the first underscore in {len(empty)} of {len(names)} files; rename them")
    else:
        return None, None
    return number_classes(classes)


def number_classes(classes: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return (sorted distinct class names, int64 labels) of one class name per file."""
    class_names = sorted(set(classes))
    number = {name: label for label, name in enumerate(class_names)}
    return class_names, np.array([number[name] for name in classes], np.int64)


def missing_classes(source: ImageSource | LatentSource) -> str:
    """Return a message on the files for which a source has no classes, an empty text if it has, or no file has one."""
    if source.labels is not None:
        return ""
    names = _item_names(source)
    # The rule that most files follow: in a subfolder, or CLASS_rest.
    rules = (lambda name: "/" in name), (lambda name: "_" in bf.basename(name))
    without = min(([name for name in names if not rule(name)] for rule in rules), key=len)
    return "" if len(without) in (0, len(names)) else (
        f"{bf.join(str(source.folder), without[0])} has no class: expected CLASS_rest or a subfolder for each file, "
        f"got none for {len(without)} of {len(names)} files; rename or remove them to use classes")


def _item_names(source):
    """Return the names of the items below the folder of a source; () if they are in one file, or have none."""
    if str(source.folder).endswith(".npz"):
        return ()
    return source.names if isinstance(source, ImageSource) else getattr(source, "filenames", None) or ()


def require_labels(source: ImageSource | LatentSource, with_labels: bool) -> None:
    """Check that a source has labels if they are required.

    :raises ValueError: if not.
    """
    if with_labels and source.labels is None:
        missing = missing_classes(source)
        rule = "name the files CLASS_rest.png, use one subfolder per class, or add 'labels' to an .npz"
        raise ValueError(f"{source.folder} has no classes, required by --class_cond True and classifiers; "
                         f"{missing or rule}")


def map_labels(source: ImageSource | LatentSource, class_names: list[str]) -> np.ndarray | None:
    """Return the labels of a source as indices into `class_names` of a model.

    :raises ValueError: if the source has a class that the model does not have, with the first of its files.
    """
    if source.class_names is None:
        highest = -1 if source.labels is None else np.max(source.labels, initial=-1)
        require((highest < len(class_names), f"{source.folder} has labels up to {highest}: expected 0 to "
                 f"{len(class_names) - 1}, the classes of the model ({', '.join(class_names)}), as it has no names"))
        return source.labels
    unknown = sorted(set(source.class_names) - set(class_names))
    if unknown:
        files = np.flatnonzero(source.labels == source.class_names.index(unknown[0]))
        names = _item_names(source)
        first = f" (first {bf.join(str(source.folder), names[files[0]])})" if names and len(files) else ""
        raise ValueError(f"{source.folder} has classes {', '.join(unknown)} that the model does not have{first}; "
                         f"expected some of: {', '.join(class_names)}")
    return np.array([class_names.index(name) for name in source.class_names])[source.labels]
