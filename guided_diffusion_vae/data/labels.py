"""Class labels and attributes of files: from label files beside the data, else by rules from their names."""

import csv
import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..config import require
from ..files import MAX_PIXELS, bf, file_errors, sha256_of_json
from ..interfaces import ImageSource, LatentSource
from .archives import is_archive, open_file, path_exists

LABEL_FILES = ("dataset.json", "labels.csv", "metadata.csv", "metadata.jsonl")
FILE_COLUMNS = ("file_name", "filename", "file", "image", "path", "name")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target", "y")
COLUMN_FLAG, NO_COLUMN = "--label_column", "none"
SPLITS = {"train": "train", "training": "train", "trn": "train", "test": "test", "testing": "test", "tst": "test",
          "val": "val", "valid": "val", "validation": "val", "dev": "val", "development": "val", "eval": "val",
          "evaluation": "val", "holdout": "holdout", "heldout": "holdout", "imagestr": "train", "labelstr": "train",
          "imagests": "test"}    # the last three are of the Medical Segmentation Decathlon
_NOT_SPLITTING = {"set", "data", "dataset", "split", "images", "image", "img", "imgs"}    # as in train_set, val-images
MAX_SHOWN = 8       # columns or folders in a message
_INTEGRAL = re.compile(r"([+-]?\d+)\.0*")
# By which a row names a file, in the order in which they are tried.
_KEYS = (lambda name: name, lambda name: name.rpartition(".")[0], lambda name: name.rpartition("/")[2],
         lambda name: name.rpartition("/")[2].rpartition(".")[0])


class Labels(NamedTuple):
    """Labels of N files: int64 [N] in the order of `class_names` or None, and attributes {name: float32 [N]}.

    `notes` are sentences for the log, `record` describes the label file in caches, {} if there is none.
    """

    class_names: list[str] | None
    labels: np.ndarray | None
    attributes: dict
    notes: Sequence[str]
    record: dict


class Table(NamedTuple):
    """Rows of a label file: names of files, and {column: one text per row}, "" where it is empty."""

    files: list[str]
    columns: dict[str, list[str]]


def find_labels(names: Sequence[str], folder: str, label_column: str = "") -> Labels:
    """Return the `Labels` of relative file names: from one of `LABEL_FILES` in the folder, else from the names.

    Files with a .cls file beside them, as in webdataset, have its content as class; names of shards are no classes. A
    folder that contains all files in one subfolder, of several classes or with a label file, is entered.

    :param label_column: column of the label file; empty: the first of `LABEL_COLUMNS`; "none": classes from names.
    :raises ValueError: if there are dataset splits, two label files, or one that is not understood; a file has no row,
        or two that differ.
    """
    if label_column != NO_COLUMN and path_exists(bf.join(folder, _class_file(names[0]))):
        return _labels_of_samples(names, folder)
    if not is_archive(folder) and all(".tar/" in name for name in names):
        names = [name.partition(".tar/")[2] for name in names]
    prefix, path = _enter(names, folder, label_column)
    place, notes = bf.join(folder, prefix[:-1]) if prefix else folder, []
    if prefix:
        names = _below(names, prefix)
        notes.append(f"{folder}: labels are those of {place}, which contains all files")
    if path:
        _check_splits(names, place)
        return _labels_from_file(names, path, label_column, notes)
    if label_column not in ("", NO_COLUMN):
        notes.append(f"{folder} contains no label file ({_shorten(LABEL_FILES)}): {COLUMN_FLAG} {label_column} is not "
                     "used, classes are those of the names")
    return Labels(*infer_classes(names, place), {}, notes, {})


def class_files(paths: Sequence[str]) -> set[str]:
    """Return the paths of the .cls files beside files, the empty set if the first has none."""
    return set(map(_class_file, paths)) if path_exists(_class_file(paths[0])) else set()


def _class_file(name):
    """Return the .cls file of a sample of webdataset, whose files have the same name up to the first dot."""
    folder, slash, name = name.rpartition("/")
    return folder + slash + name.partition(".")[0] + ".cls"


def _labels_of_samples(names, folder):
    """Return the `Labels` in the .cls files beside all files."""
    classes, owner = [], {}
    for name in names:
        path = bf.join(folder, _class_file(name))
        require((path not in owner, f"{bf.join(folder, name)} and {owner.get(path)} are images of one sample: expected "
                                    "one image per sample; remove the others"),
                (path_exists(path), f"{bf.join(folder, name)} has no class: expected it in {path}, as the first file "
                                    f"has one; add it, or set {COLUMN_FLAG} {NO_COLUMN}"))
        owner[path] = name
        with file_errors(path):
            classes.append(_read_text(path).strip())
            require((classes[-1], "it is empty: expected a class"))
    class_names, labels = number_classes(classes)
    record = {"column": "cls", "sha256": sha256_of_json([class_names, labels.tolist()])}
    return Labels(class_names, labels, {}, [f"{folder}: classes are those of the .cls files"], record)


# --- Folders ---


def _enter(names, folder, label_column):
    """Return (the folders that contain all files and are no class, as "a/b/" or "", path of a label file or None)."""
    path = _find_label_file(folder, label_column)
    top, slash, _ = names[0].partition("/")
    if path or not slash or not all(name.startswith(top + slash) for name in names):
        return "", path
    inner = _below(names, top + slash)
    prefix, path = _enter(inner, bf.join(folder, top), label_column)
    if path or prefix or _split_kind(top) or _split_folders(inner) or len(set(_classes_by_name(inner) or ())) > 1:
        return top + slash + prefix, path
    return "", None


def _below(names, prefix):
    return [name[len(prefix):] for name in names]


def _split_kind(folder):
    """Return the kind of dataset split that a folder name means, such as "val" for Valid-2017; None if none."""
    words = (word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", folder))
    kind = "".join(word.removesuffix("set") for word in words if word not in _NOT_SPLITTING)
    return SPLITS.get(kind, SPLITS.get(folder.lower()))


def _split_folders(names):
    """Return the top folders of files if they are dataset splits: of two kinds, or two and no other folder; else []."""
    tops = sorted({name.partition("/")[0] for name in names if "/" in name})
    kinds = [_split_kind(top) for top in tops]
    return tops if len({*kinds} - {None}) > 1 or len(tops) > 1 and None not in kinds else []


def _check_splits(names, folder):
    splits = _split_folders(names)
    require((not splits, f"{folder} contains dataset splits, not classes: {_shorten(splits)}; set --data_dir to one of "
                         f"them, such as {bf.join(folder, *splits[:1])}"))


def infer_classes(names: Sequence[str], folder: str) -> tuple[list[str] | None, np.ndarray | None]:
    """Return (class names, int64 labels) of relative file names, (None, None) if one of them has no class.

    :raises ValueError: if the subfolders are dataset splits (train, val), not classes, or a class has an empty name.
    """
    _check_splits(names, folder)
    classes = _classes_by_name(names)
    if classes is None:
        return None, None
    empty = [name for name, label in zip(names, classes) if not label]
    if empty:
        raise ValueError(f"{bf.join(folder, empty[0])} has an empty class name: expected CLASS_rest, got nothing "
                         f"before the first underscore in {len(empty)} of {len(names)} files; rename them")
    return number_classes(classes)


def _classes_by_name(names):
    """Return one class name per file: its first folder, else the start of its name; None if a file has neither."""
    if all("/" in name for name in names):
        return [name.partition("/")[0] for name in names]
    stems = [name.rpartition("/")[2] for name in names]
    return [name.partition("_")[0] for name in stems] if all("_" in name for name in stems) else None


def name_prefix(path):
    """Return the part of a file name before the first underscore, guided-diffusion's class name."""
    return os.path.basename(path).partition("_")[0]


def number_classes(classes: Sequence[str], order: Callable | None = None) -> tuple[list[str], np.ndarray]:
    """Return (distinct class names, int64 labels) of one class name per file.

    :param order: function that sorts the names; None: as numbers if all are, else as text.
    """
    class_names = (order or _sort_classes)(set(classes))
    number = {name: label for label, name in enumerate(class_names)}
    return class_names, np.array([number[name] for name in classes], np.int64)


def _sort_classes(names):
    numeric = all(re.fullmatch(r"[+-]?\d+(\.\d+)?", name) for name in names)
    return sorted(names, key=lambda name: (float(name), name)) if numeric else sorted(names)


# --- Label files ---


def _find_label_file(folder, label_column):
    """Return the path of the label file in a folder, None if there is none.

    dataset.json of `make_microdoppler.py` is none; with the column "none", no dataset.json is.

    :raises ValueError: if there are two, or a dataset.json is not understood.
    """
    paths = [bf.join(folder, name) for name in LABEL_FILES]
    found = [path for path in paths if path_exists(path)
             and (path != paths[0] or label_column != NO_COLUMN and "simulation" not in _read_json(path))]
    require((len(found) < 2, f"{folder} contains two label files, {_shorten(map(bf.basename, found))}: expected one; "
                             "remove the others"),
            (not path_exists(bf.join(folder, "metadata.parquet")), f"{folder}/metadata.parquet is not read: expected "
             f"one of {_shorten(LABEL_FILES)}; convert it to metadata.csv, or move it to another folder"))
    return found[0] if found else None


def _labels_from_file(names, path, label_column, notes):
    """Return the `Labels` that a label file has for relative file names."""
    table = _read_table(path)
    if table is None:
        return Labels(None, None, {}, [*notes, f"{path} states that there are no labels"], {"file": bf.basename(path)})
    column = _find_label_column(path, table, label_column)
    rows, unmatched = _match_rows(names, path, table, column)
    if unmatched:
        notes = [*notes, f"{path}: {len(unmatched)} of {len(table.files)} rows name no file of the folder (first "
                         f"{unmatched[0]})"]
    numeric = {name: _numbers(texts) for name, texts in table.columns.items() if name != column}
    attributes = {name: np.array([math.nan if row is None else values[row] for row in rows], np.float32)
                  for name, values in numeric.items() if values is not None}
    unused = [name for name, values in numeric.items() if values is None]
    if unused:
        notes = [*notes, f"{path}: columns that are neither labels nor numbers are not used: {_shorten(unused)}"]
    if column is None:
        class_names, labels = infer_classes(names, bf.dirname(path))
    else:
        class_names, labels = number_classes(_labels_of_rows(names, rows, path, table.columns[column], column))
    content = [column, class_names, None if labels is None else labels.tolist(),
               {name: values.tolist() for name, values in attributes.items()}]
    used = column is not None or attributes
    record = {"file": bf.basename(path), "column": column, "sha256": sha256_of_json(content)} if used else {}
    return Labels(class_names, labels, attributes, notes, record)


def _find_label_column(path, table, label_column):
    """Return the name of the column with the labels, None for --label_column none."""
    columns = list(table.columns)
    if label_column == NO_COLUMN:
        return None
    found = [name for name in columns if name == label_column] if label_column else [
        name for known in LABEL_COLUMNS for name in columns if name.lower() == known]
    expected = label_column or "one of " + _shorten(LABEL_COLUMNS)
    require((found, f"{path} has no column of labels: expected {expected}, got {_shorten(columns) or 'no column'}; set "
                    f"{COLUMN_FLAG} to the right one, or {COLUMN_FLAG} {NO_COLUMN} to take classes from names"))
    return found[0]


def _match_rows(names, path, table, column):
    """Return (the row of each file or None, the names of rows that belong to no file)."""
    files = [file.replace("\\", "/").removeprefix("./") for file in table.files]
    own = bf.basename(bf.dirname(path)) + "/"   # of a table that was written for the folder above
    numbers = [{key(name): index for index, name in enumerate(names)} for key in _KEYS]
    number, files = next(((number, tried) for tried in (files, [file.removeprefix(own) for file in files])
                          for number in numbers if len(number) == len(names) and not number.keys().isdisjoint(tried)),
                         (None, files))
    require((number, f"{path}: none of its {len(files)} rows names a file of the folder: expected names such as "
                     f"{names[0]}, got {_shorten(table.files[:1]) or 'none'}; write them relative to the folder"))
    rows, unmatched = [None] * len(names), []
    for row, file in enumerate(files):
        index = number.get(file)
        if index is None:
            unmatched.append(table.files[row])
            continue
        first = rows[index]
        differing = [] if first is None else [name for name, texts in table.columns.items()
                                              if texts[first] != texts[row]]
        require((not differing, f"{path} has two rows for {file} that differ: {_shorten(differing[:1])} is "
                                f"{differing and table.columns[differing[0]][first]!r} and "
                                f"{differing and table.columns[differing[0]][row]!r}; remove one"))
        rows[index] = row
    without = [name for name, row in zip(names, rows) if row is None]
    require((column is None or not without,
             f"{bf.join(bf.dirname(path), *without[:1])} has no row in {path}: expected one per file, got none for "
             f"{len(without)} of {len(names)} files; add them or remove the files"))
    return rows, unmatched


def read_column(names: Sequence[str], folder: str, column: str) -> list[str] | None:
    """Return the text that each file has in a column of the label file of a folder, None if there is no such column.

    :raises ValueError: if a file has no row.
    """
    prefix, path = _enter(names, folder, NO_COLUMN)
    table = path and _read_table(path)
    if not table or column not in table.columns:
        return None
    rows, _ = _match_rows(_below(names, prefix), path, table, column)
    return [table.columns[column][row] for row in rows]


def _labels_of_rows(names, rows, path, texts, column):
    """Return the class name of each file; 3.0 is 3.

    :raises ValueError: if a label is empty, or labels are numbers that are not integers.
    """
    labels = [_INTEGRAL.sub(r"\1", texts[row]) if _INTEGRAL.fullmatch(texts[row]) else texts[row] for row in rows]
    empty = [name for name, label in zip(names, labels) if not label]
    fraction = next((label for label in labels if not label.lstrip("+-").isdecimal()), "")
    require(
        (not empty, f"{path}: column {column} is empty for {len(empty)} of {len(names)} files (first "
                    f"{_shorten(empty[:1])}); add their labels or remove the files"),
        (not fraction or _numbers(labels) is None,
         f"{path}: column {column} has numbers that are not integers, such as {fraction}: expected classes; set "
         f"{COLUMN_FLAG} to another column, or {COLUMN_FLAG} {NO_COLUMN} to keep it as an attribute"))
    return labels


def _numbers(texts):
    """Return texts as numbers, NaN where they are empty; None if one is not a finite number, or all are empty."""
    try:
        values = [float(text) if text else math.nan for text in texts]
        require((not any("_" in text for text in texts), "an underscore, which Python permits in numbers"))
    except ValueError:
        return None
    filled = [value for value, text in zip(values, texts) if text and text.lower() != "nan"]
    return values if filled and all(map(math.isfinite, filled)) else None


def _read_table(path):
    """Return the `Table` of a label file, None if it states that there are no labels."""
    read = {"json": _table_of_json, "csv": _table_of_csv, "jsonl": _table_of_json_lines}[path.rpartition(".")[2]]
    with file_errors(path, "is not understood as a label file", f"fix it or move it to another folder; {COLUMN_FLAG} "
                     "selects the column of labels"):
        return read(path)


def _read_text(path):
    with open_file(path, MAX_PIXELS) as stream:
        content = stream.read()
    try:
        require((b"\0" not in content, "it contains null bytes, as UTF-16 does"))
        return content.decode("utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def _read_json(path):
    with file_errors(path, "invalid JSON", f"fix it, or set {COLUMN_FLAG} {NO_COLUMN} to ignore it"):
        content = json.loads(_read_text(path))
        found = f"the keys {_shorten(content)}" if content and isinstance(content, dict) else json.dumps(content)[:40]
        require((isinstance(content, dict) and ("labels" in content or "simulation" in content),
                 f'not understood: expected an object {{"labels": [[file, class], ...]}}, got {found}'))
        return content


def _table_of_json(path):
    """Return the `Table` of dataset.json in the layout of StyleGAN and EDM: integers or one-hot lists as labels."""
    labels = _read_json(path)["labels"]
    if labels is None:
        return None
    valid = isinstance(labels, list) and all(
        isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) for row in labels)
    require((valid, 'expected "labels": [[file, class], ...]'))
    return Table([file for file, _ in labels], {"labels": [_class_of(file, label) for file, label in labels]})


def _class_of(file, label):
    """Return the text of an integer or one-hot label."""
    if isinstance(label, list):
        one_hot = [*map(label.count, (0, 1))] == [len(label) - 1, 1]
        require((one_hot, f"{file} has the label {str(label)[:60]}: expected an integer or a list with a single 1"))
        label = label.index(1)
    number = isinstance(label, (int, float)) and not isinstance(label, bool) and label == label // 1
    require((number, f"{file} has the label {str(label)[:60]!r}: expected an integer or a list with a single 1"))
    return str(int(label))


def _table_of_csv(path):
    text = _read_text(path)
    header = text.lstrip("\r\n").partition("\n")[0]
    delimiter = max(",;\t", key=lambda mark: len(next(csv.reader([header], delimiter=mark), ())))
    try:
        cells = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        rows = [[cell.strip() for cell in row] for row in cells]
    except csv.Error as error:
        raise ValueError(f"invalid CSV: {error}") from error
    columns, *rows = [row for row in rows if any(row)] or [[]]
    wrong = next((number for number, row in enumerate(rows, 2) if len(row) != len(columns)), None)
    require((wrong is None, f"row {wrong} has {len(rows[(wrong or 2) - 2]) if rows else 0} cells: expected "
                            f"{len(columns)} as in the first"))
    return _to_table(path, columns, rows)


def _table_of_json_lines(path):
    content = [json.loads(line) for line in _read_text(path).splitlines() if line.strip()]
    require((all(isinstance(row, dict) for row in content), "expected one object per line"))
    columns = list({name: None for row in content for name in row})
    text = lambda value: "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return _to_table(path, columns, [[text(row.get(name)) for name in columns] for row in content])


def _to_table(path, columns, rows):
    repeated = [name for name in columns if columns.count(name) > 1]
    known = FILE_COLUMNS if bf.basename(path) == "labels.csv" else FILE_COLUMNS[:1]
    files = [name for known_name in known for name in columns if name.lower() == known_name]
    require(
        (not repeated, f"two columns are named {_shorten(repeated[:1])}"),
        (files, f"no column of file names: expected {'one of ' * (len(known) > 1)}{_shorten(known)}, got "
                f"{_shorten(columns) or 'no column'}"))
    by_name = dict(zip(columns, map(list, zip(*rows)))) if rows else {name: [] for name in columns}
    return Table(by_name.pop(files[0]), by_name)


def _shorten(names):
    names = list(map(str, names))
    return ", ".join([*names[:MAX_SHOWN], *(["..."] if len(names) > MAX_SHOWN else [])])


# --- Labels of a source ---


def missing_classes(source: ImageSource | LatentSource) -> str:
    """Return a message on the files for which a source has no classes, an empty text if it has, or no file has one."""
    if source.labels is not None:
        return ""
    names = _item_names(source)
    # The rule that most files follow: in a subfolder, or CLASS_rest.
    rules = (lambda name: "/" in name), (lambda name: "_" in os.path.basename(name))
    without = min(([name for name in names if not rule(name)] for rule in rules), key=len)
    return "" if len(without) in (0, len(names)) else (
        f"{bf.join(str(source.folder), without[0])} has no class: expected CLASS_rest or a subfolder for each file, "
        f"got none for {len(without)} of {len(names)} files; rename or remove them to use classes")


def _item_names(source):
    """Return the names of the items below the folder of a source; () if they are in one file, or have none."""
    if str(source.folder).endswith((".npz", ".mat", ".h5", ".hdf5")):
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


def keep_numbers(source: ImageSource | LatentSource, class_names: list[str] | None) -> bool:
    """Number the classes of a source in the order of `class_names` if these are the same classes; return whether."""
    found = source.class_names
    if found is None or class_names is None or found == class_names or set(found) != set(class_names):
        return False
    source.labels, source.class_names = map_labels(source, class_names), list(class_names)
    return True


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
