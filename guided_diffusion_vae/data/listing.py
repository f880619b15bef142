"""List the files of a folder: extensions, class labels, fingerprints."""

import hashlib
import os
import struct
import zlib

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..files import bf

REFERENCE_EXTENSIONS = ("jpg", "jpeg", "png", "gif")
EXTENSIONS = REFERENCE_EXTENSIONS + ("tif", "tiff", "npy")


_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def walk_files(folder, endings):
    for entry in sorted(bf.listdir(folder)):
        path = bf.join(folder, entry)
        # A name that ends like a picture is taken for one without asking the file system, which is slow on clouds.
        if file_extension(entry) in endings or not bf.isdir(path):
            yield path
        else:
            yield from walk_files(path, endings)


def file_extension(path):
    stem, dot, ending = bf.basename(path).rpartition(".")
    return ending.lower() if dot else ""


def _prefix(path):
    return bf.basename(path).partition("_")[0]


def relative_names(folder, paths):
    """Return the paths relative to `folder`, with forward slashes."""
    start = len(folder.rstrip("/")) + 1
    return [path[start:].replace(os.sep, "/") for path in paths]


def infer_classes(names, folder):
    """Return (sorted class names, int64 labels) of relative file names, or (None, None) where they tell no class.

    :raises ValueError: the sub-folders are parts of a data set (train, val), not classes.
    """
    if all("/" in name for name in names):
        classes = [name.partition("/")[0] for name in names]
        if "train" in classes and {"val", "valid", "validation", "test"} & set(classes):
            parts = ", ".join(sorted(set(classes)))
            raise ValueError(f"{folder} holds {parts}: parts of a data set, not classes; give --data_dir one of them")
    elif all("_" in bf.basename(name) for name in names):
        classes = [_prefix(name) for name in names]
    else:
        return None, None
    known = sorted(set(classes))
    number = {name: label for label, name in enumerate(known)}
    return known, np.array([number[name] for name in classes], np.int64)


def require_data_dir(data_dir, flag="--data_dir"):
    """Raise FileNotFoundError, naming the flag that it was given as, where no data can be."""
    if not data_dir:
        raise FileNotFoundError(f"no folder of pictures given; set {flag}")
    if not bf.exists(data_dir):
        raise FileNotFoundError(f"{data_dir} is not there; check {flag}")
    if not bf.isdir(data_dir) and file_extension(data_dir) != "npz":
        raise FileNotFoundError(f"{data_dir} is a file; give its folder (or an .npz) as {flag}")


class file_errors:
    """Turn whatever goes wrong while reading a file into a ValueError that names it."""

    def __init__(self, path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, _UNREADABLE):
            unknown = isinstance(error, UnidentifiedImageError)
            reason = "its content is no picture that Pillow knows" if unknown else error
            raise ValueError(f"{self.path}: cannot be read ({reason}); mend it or take it out of the folder") from error


def file_stamp(path):
    known = bf.stat(path)
    return f"{known.size} {known.mtime}"


def hash_lines(rows):
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def require_labels(source, wanted):
    """Raise ValueError where labels are wanted and `source` has none."""
    if wanted and source.labels is None:
        raise ValueError(f"{source.folder} has no classes, which are needed here (--class_cond True, or a classifier): "
                         "name the files CLASS_rest.png, or put them into one folder per class (or, for an .npz, give "
                         "it 'labels')")


def map_labels(pictures, class_names):
    """Return the labels of pictures in the numbering of `class_names`, those of a model.

    :raises ValueError: where the pictures have classes that the model does not know.
    """
    if pictures.class_names is None:
        return pictures.labels
    unknown = sorted(set(pictures.class_names) - set(class_names))
    if unknown:
        raise ValueError(f"the pictures of {pictures.folder} have classes {', '.join(unknown)} that the model does not "
                         f"know; it knows {', '.join(class_names)}")
    return np.array([class_names.index(name) for name in pictures.class_names])[pictures.labels]
