"""The report page: one self-contained report.html of a run folder, or of several that are compared.

`collect` reads the files of the runs into one dictionary of plain values, `render` fills report.html.j2 with it. The
page requests nothing from a network. Images are data URIs within fixed budgets, so that its size has a bound.
"""

import base64
import contextlib
import csv
import dataclasses
import datetime
import functools
import gzip
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from PIL import Image

from .. import __version__
from ..config import option, require, words
from ..data import (
    DataConfig, ImageFolder, Samples, VolumeFolder, evenly_spaced, evenly_spaced_per_class, open_archive, open_colormap,
    open_npz,
)
from ..files import OWNED_MARKER, READ_ERRORS, file_errors, read_record
from ..sampling.sheets import to_pil
from .figures import MAX_CLASSES, MAX_IMAGES, MAX_VOLUMES, NEIGHBORS_FILE, study_table, study_title

PAGE_FILE = "report.html"
COMMANDS_FILE = "commands.json"
RUN_FILES = ("config.json", COMMANDS_FILE, "progress.csv", "log.txt", "metrics.json", "samples_*.npz", "previews/*.png")

# Bounds of a page. Text of base64 is 4/3 of its bytes: 13.3 MiB of images, beside 4.6 MiB of plotly.js.
SAMPLE_BYTES, PREVIEW_BYTES, FIGURE_BYTES = 6 * 2**20, 5 * 2**19, 3 * 2**19
MAX_PREVIEWS, MAX_FIGURES = 24, 12      # per run
MAX_POINTS = 1000       # rows of progress.csv
MAX_LINES = 300         # of log.txt, without tables
MAX_TEXT = 300          # characters of a value of the configuration
STRIDES = (1, 2, 3, 4, 6, 8, 12, 16)    # of the voxels of a volume

# {number of samples in metrics.json: the same number of real images}
REAL = {
    **{name: f"training_to_reference.{name}"
       for name in ("frechet", "kernel", "fid", "sfid", "kid", "inception_score", "precision", "recall")},
    "class_agreement.accuracy": "classifier_accuracy.accuracy",
    "nearest_neighbors.median_distance_samples": "nearest_neighbors.median_distance_reference",
    "train_on_samples_test_on_real.accuracy": "train_on_training_test_on_real.accuracy",
}
# Settings by which a folder of evaluated images or volumes is read: their values, and the grid of volumes.
VALUES = {"value_range", "value_window", "dynamic_range_db", "reference_db", "alpha", "label_column", "array_key",
          "max_pixels"}
GRID = {"image_size", "crop", "patches_per_volume", "spacing", "orientation", "resample_spacing", "frames"}
# Not numbers to compare: lists, what the page shows elsewhere, and keys of version 0.1.
HIDDEN = {"confusion", "per_class", "example_indices", "example_pixel_l1", "pictures", "neighbours"}  # alias


@dataclasses.dataclass
class ReportConfig:
    SECTION = "report"

    runs: Annotated[str, words] = option(
        "", "run folders; curves of several are in the same plots", essential=True, positional=True)
    gallery_samples: int = option(
        MAX_IMAGES, "most samples in the gallery, evenly spaced ones of each class; of volumes a tenth",
        minimum=10, essential=True)
    out: str = option("", "path of the page; empty: report.html in the run folder, of several runs in the current "
                          "folder", essential=True)

    @property
    def folders(self):
        """The run folders.

        :raises ValueError: if there are none.
        """
        folders = words.parse(self.runs, "runs")
        require((folders, "no run folder is set: expected at least one; use report.py runs/NAME"))
        return folders


def write_page(folders: Sequence, path=None, gallery_samples: int = MAX_IMAGES) -> Path:
    """Write the page of run folders and return its path.

    :param gallery_samples: most images in the gallery.
    :param path: of the page; default report.html in the run folder, of several runs in the current folder.
    :raises ImportError: for curves without plotly (the extra `report`).
    :raises ValueError: if a folder is not that of a run. A file that cannot be read is a warning on the page.
    """
    folders = [Path(folder) for folder in folders]
    path = Path(path or (folders[0] / PAGE_FILE if len(folders) == 1 else PAGE_FILE))
    text = render(collect(folders, gallery_samples))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")     # not flushed to disk: it can be written again
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return path


def render(report: dict) -> str:
    """Return the page of what `collect` returns; all its text is escaped.

    :raises ImportError: for curves without plotly (the extra `report`).
    """
    plotlyjs = _pack_plotlyjs() if any(run["curves"] for run in report["runs"]) else ""
    return _open_template().render(report=report, plotlyjs=plotlyjs)


@functools.cache
def _pack_plotlyjs():
    """Return plotly.js, packed by gzip, as base64."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("curves on a report page require plotly: pip install guided-diffusion-vae[report]") from error
    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 3, mtime=0)).decode()


@functools.cache
def _open_template():
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                                     trim_blocks=True, lstrip_blocks=True)
    environment.filters["text"] = _text
    return environment.get_template("report.html.j2")


def _text(value):
    """Return the text of a value in a table."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else f"{value:.5g}" if isinstance(value, float) else json.dumps(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


def collect(folders: Iterable, gallery_samples: int = MAX_IMAGES) -> dict:
    """Return the content of the page of run folders: dictionaries, lists, text, and finite numbers or None.

    :raises ValueError: if a folder is not that of a run.
    """
    folders = list(dict.fromkeys(map(Path, folders)))
    for folder in folders:
        require((any(any(folder.glob(pattern)) for pattern in RUN_FILES), f"{folder} is not a run folder: expected one "
                 f"of {', '.join(RUN_FILES)}; use the --logdir of a run"))
    parent = os.path.commonpath([folder.resolve().parent for folder in folders])
    runs = [{"name": str(folder.resolve().relative_to(parent) if len(folders) > 1 else folder),
             **_collect_run(folder, 1 / len(folders))} for folder in folders]
    report = {"version": __version__, "written": f"{datetime.datetime.now():%Y-%m-%d %H:%M}", "runs": runs,
              "gallery": _collect_gallery(folders, runs, gallery_samples), "metrics": _compare(runs, "metrics"),
              "config": _compare(runs, "config"), "data": _compare(runs, "data")}
    return _plain(report)


# --- A run ---


def _collect_run(folder, share):
    """Return what the files of a run folder state; its images take the part `share` of the budgets."""
    problems = []
    attempt = lambda read, path, default: _attempt(problems, read, path, default)
    record = attempt(read_record, folder / "config.json", {})
    commands = attempt(read_commands, folder / COMMANDS_FILE, [])
    metrics = attempt(lambda path: json.loads(path.read_bytes()), folder / "metrics.json", {})
    header, last = record.get("header", {}), commands[-1] if commands else {}
    columns, rows = attempt(_read_curves, folder / "progress.csv", ({}, 0))
    previews = sorted(folder.glob("previews/*.png"))
    chosen = [previews[i] for i in evenly_spaced(len(previews), MAX_PREVIEWS)] if previews else []
    drawn = {"contact_sheet.png": "samples_*.npz", "nearest_neighbors.png": NEIGHBORS_FILE,
             "confusion_*.png": "metrics.json"}     # figures whose content the page shows itself
    left_out = {path for name, file in drawn.items() if any(folder.glob(file)) for path in folder.glob(name)}
    figures = sorted(set(folder.glob("*.png")) - left_out)[:MAX_FIGURES]
    embed = lambda paths, budget: [
        {"name": path.stem, "image": image} for path in paths
        if (image := attempt(lambda path: _embed_file(path, budget * share / len(paths)), path, None))]
    real = {name: key for name, key in REAL.items() if key in (flat := _flatten(metrics))}
    return {
        "path": str(folder), "script": record.get("script") or last.get("script", ""), "commands": commands,
        "kind": header.get("kind", ""), "curves": columns, "rows": rows,
        "previews": embed(chosen, PREVIEW_BYTES), "num_previews": len(previews),
        "figures": embed(figures, FIGURE_BYTES),
        "metrics": {name: {"value": value, "real": flat.get(real.get(name))} for name, value in flat.items()
                    if name not in real.values()},
        "confusion": _confusions(metrics), "study": attempt(_read_study, folder / "study.json", []),
        "data": _census(header),
        "config": {**_flatten(last.get("flags", {})), **_flatten(record.get("flags", {})),
                   **_flatten({key: header.get(key) for key in ("model", "diffusion", "normalizer", "autoencoder")
                               if header.get(key)}, "header.")},
        "log": attempt(_read_log, folder / "log.txt", []),
        "warnings": [*last.get("warnings", []), *problems],
    }


def read_commands(path) -> list[dict]:
    """Return the commands that wrote into a run folder, [] if there is no commands.json.

    :raises ValueError: if it cannot be read.
    """
    return read_record(path, "remove it")["commands"] if Path(path).exists() else []


def _attempt(problems, read, path, default):
    """Return `read(path)`, or the default if there is no such file or, with an entry in `problems`, on an error."""
    if not path.exists():
        return default
    try:
        with contextlib.nullcontext() if path.is_dir() else file_errors(path):
            return read(path)
    except READ_ERRORS as error:
        problems.append(f"not on this page: {error}")
        return default


def _flatten(tree, start=""):
    """Return {dotted name: value} of nested dictionaries, without those in `HIDDEN`."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key not in HIDDEN:
            flat.update(_flatten(value, f"{start}{key}."))
        elif key not in HIDDEN:
            flat[start + str(key)] = value
    return flat


def _census(header):
    """Return what the header of a checkpoint states of the training data."""
    facts = {**_flatten(header.get("data", {})), "classes": header.get("classes"),
             **_flatten(header.get("attributes") or {}, "attributes."),
             **_flatten(header.get("statistics") or {}, "latents."),
             **{key: header.get(key) for key in ("image_shape", "latent_shape")}}
    return {name: value for name, value in facts.items() if value not in (None, "", [], ())}


def _confusions(metrics):
    """Return the confusion matrices of metrics.json, rows target and columns predicted."""
    found = {name: entry for name, entry in metrics.items() if isinstance(entry, dict) and "confusion" in entry}
    return [{"title": name.replace("_", " "), "names": list(entry["per_class"]), "matrix": entry["confusion"],
             "accuracy": entry["accuracy"]}
            for name, entry in found.items() if len(entry["confusion"]) <= MAX_CLASSES]


def _read_study(path):
    """Return the tables of an augmentation study, of which each share of the training images has one."""
    report = json.loads(path.read_bytes())
    return [{"title": study_title(report, name), "rows": study_table(report, name)} for name in report["shares"]]


def _read_curves(path):
    """Return ({column: numbers or None}, number of rows) of progress.csv, with at most MAX_POINTS rows."""
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    kept = [rows[i] for i in evenly_spaced(len(rows), MAX_POINTS)] if rows else []
    columns = {name: [_number(row.get(name)) for row in kept] for name in (rows[0] if rows else {}) if name}
    return {name: values for name, values in columns.items() if any(value is not None for value in values)}, len(rows)


def _number(text):
    try:
        value = float(f"{float(text):.6g}")     # 6 digits are enough to plot
        return value if math.isfinite(value) else None
    except (TypeError, ValueError):
        return None


def _read_log(path):
    """Return the messages of log.txt without its tables of numbers, the first and the last ones if there are many."""
    lines = [line for line in path.read_text("utf-8", "replace").splitlines()
             if line.strip() and not line.startswith(("|", "-----"))]
    if len(lines) > MAX_LINES:
        lines = [*lines[:MAX_LINES // 3], f"[{len(lines) - MAX_LINES} lines omitted]", *lines[-MAX_LINES * 2 // 3:]]
    return [line[:MAX_TEXT * 3] for line in lines]


def _compare(runs, part):
    """Return the rows of a table of runs: the name, the entry of each run or None, and whether those runs differ that
    have one."""
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run[part]):
        found = [run[part][name] for run in runs if name in run[part]]
        rows.append({"name": name, "values": [run[part].get(name) for run in runs],
                     "differs": any(value != found[0] for value in found)})
    return rows


# --- Samples ---


def _collect_gallery(folders, runs, count):
    """Return the sets of samples of runs, and items: evenly spaced samples of each class with their neighbors."""
    files, neighbors = {}, {}
    for folder, run in zip(folders, runs):
        evaluated = _evaluated(run)
        for file in [*(sorted(folder.glob("samples_*.npz")) or folder.glob("png")), *evaluated]:
            files.setdefault(file.resolve(), (file, run))
        if evaluated and (folder / NEIGHBORS_FILE).exists():
            read = _attempt(run["warnings"], open_archive, folder / NEIGHBORS_FILE, {})
            neighbors[evaluated[0].resolve()] = read
    sets, items, share = [], [], 1 / max(len(files), 1)
    for key, (file, run) in files.items():
        read = functools.partial(_collect_set, run, neighbors.get(key, {}), count * share, SAMPLE_BYTES * share)
        if found := _attempt(run["warnings"], read, file, None):
            sets.append({"name": str(file), **found[0]})
            items += [{"set": len(sets) - 1, **item} for item in found[1]]
    return {"sets": sets, "items": items}


def _collect_set(run, nearest, count, budget, path):
    """Return the facts of a file or folder of samples and its items, None if a folder contains no images."""
    samples = open_npz(path) if path.suffix == ".npz" else _open_folder(run, path)
    if samples is None:
        return None
    limit = int(max(count if samples.images.ndim == 4 else count * MAX_VOLUMES / MAX_IMAGES, 1))
    rows = evenly_spaced_per_class(samples.labels, len(samples.images), limit)
    items = _collect_samples(samples, rows, nearest, budget)
    return {"count": len(samples.images), "shown": len(rows), "shape": "x".join(map(str, samples.images.shape[1:])),
            "classes": _class_names(samples), "attributes": list(samples.attributes), "neighbors": bool(nearest),
            "voxel_stride": max((item["volume"]["stride"] for item in items if item["volume"]), default=1)}, items


def _evaluation(run):
    """Return the last command of a run that evaluated samples, {} if there is none."""
    return next((command for command in reversed(run["commands"])
                 if command.get("flags", {}).get("evaluation", {}).get("samples")), {})


def _evaluated(run):
    """Return the paths of the samples that a run evaluated: an .npz, a folder, or none if it does not exist."""
    if not (command := _evaluation(run)):
        return []
    path = Path(command.get("working_folder", ""), command["flags"]["evaluation"]["samples"])
    return sorted(path.glob("samples_*.npz"))[:1] or [path] if path.exists() else []


class _FolderItems:
    """Images or volumes of a folder that are read on access, uint8 [H x W x C] or [D x H x W x C].

    :param read: function of an item that returns it as float32 [C x ...] in [0, 1].
    """

    def __init__(self, read, ndim, shape):
        self.read, self.ndim, self.shape = read, ndim, shape

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, row):
        return np.rint(255 * np.moveaxis(self.read(row), 0, -1)).astype(np.uint8)


def _open_folder(run, path):
    """Return the items of a folder in the order in which a run has evaluated them, None if it contains none.

    Images have the size of their files, volumes that at which they were evaluated.
    """
    flags = _evaluation(run).get("flags", {}).get("data", {})
    names = GRID if (path / OWNED_MARKER).exists() else GRID | VALUES   # values of generated samples have 8 bits
    config = DataConfig(str(path), **{name: flags[name] for name in names & flags.keys()})
    try:
        if len(config.sides) == 3:
            source = VolumeFolder(config)
            channels, *sides = source.shape
            items = _FolderItems(source.read, 5, (len(source), *sides, channels))
        else:
            source = ImageFolder(config, image_size="1", image_channels=3)
            sizes = {source.item_sides(i) for i in range(len(source))}
            items = _FolderItems(source.read_full_size, 4, (len(source), *(sizes.pop() if len(sizes) == 1 else
                                                                          ["various sizes"])))
    except FileNotFoundError:
        return None
    return Samples(str(path), items, source.labels, source.class_names, attributes=source.attributes)


def _class_names(samples):
    if samples.labels is None:
        return []
    return samples.class_names or np.unique(samples.labels).astype(str).tolist()


def _collect_samples(samples, rows, nearest, budget):
    """Return the items of the samples `rows`; their images take at most `budget` bytes."""
    volumes = samples.images.ndim == 5
    places = {int(index): place for place, index in enumerate(nearest.get("indices", ()))}
    tiles = nearest.get("neighbors", np.zeros((0, 0)))
    share = budget / len(rows) / (1 + (0 if volumes else tiles.shape[1]))
    share *= 0.5 if volumes and len(tiles) else 1
    items = []
    for row in rows.tolist():
        image, place = np.moveaxis(samples.images[row], -1, 0), places.get(row)
        items.append({
            "index": row, "class": samples.labels is not None and _class_name(samples, row) or "",
            "attributes": {name: float(values[row]) for name, values in samples.attributes.items()},
            "image": None if volumes else _embed(to_pil(image / 255, samples.colormap), share),
            "volume": _embed_volume(image, samples.colormap, share) if volumes else None,
            "neighbors": [] if place is None else [
                {"image": _embed(Image.fromarray(tile), share / (tiles.shape[1] if volumes else 1)),
                 "distance": float(distance)}
                for tile, distance in zip(tiles[place], nearest["distances"][place])],
        })
    return items


def _class_name(samples, row):
    label = int(samples.labels[row])
    return samples.class_names[label] if samples.class_names else str(label)


# --- Images ---


def _embed_file(path, share):
    """Return the data URI of an image file, smaller or as JPEG if it has more than `share` bytes."""
    content = path.read_bytes() if path.stat().st_size <= share else b""
    if content.startswith(b"\x89PNG"):
        return _uri(content, "png")
    with Image.open(path) as image:
        return _embed(image, share)


def _embed(image, share):
    """Return the data URI of a PIL image: PNG if it has at most `share` bytes, else JPEG at a size that has."""
    image = image if image.mode in ("L", "RGB") else image.convert("RGB")
    if image.width * image.height * len(image.mode) <= 4 * share and len(content := _encode(image, "PNG")) <= share:
        return _uri(content, "png")
    while len(content := _encode(image, "JPEG", quality=85)) > share and min(image.size) > 16:
        image = image.resize((image.width // 2, image.height // 2))
    return _uri(content, "jpeg")


def _embed_volume(volume, colormap, share):
    """Return a volume uint8 [C x D x H x W] as an image of all its slices along the depth, in rows of `columns`.

    It contains every `stride`-th voxel of each axis, with the first of `STRIDES` that fits `share` bytes.
    """
    values = volume if len(volume) == 3 else volume[:1]
    if colormap and len(values) == 1:
        values = np.moveaxis(open_colormap(colormap).to_colors(values[0] / 255), -1, 0)
    for stride in STRIDES:
        part = values[:, ::stride, ::stride, ::stride]
        channels, depth, height, width = part.shape
        columns = math.ceil(math.sqrt(depth))
        padded = np.zeros((channels, columns * math.ceil(depth / columns), height, width), np.uint8)
        padded[:, :depth] = part
        tiled = padded.reshape(channels, -1, columns, height, width).transpose(1, 3, 2, 4, 0)
        tiled = tiled.reshape(-1, columns * width, channels)
        if tiled.size > 20 * share and stride < STRIDES[-1]:
            continue
        image = Image.fromarray(tiled[..., 0] if channels == 1 else np.ascontiguousarray(tiled))
        content, kind = _encode(image, "PNG"), "png"
        if len(content) > share:
            content, kind = _encode(image, "JPEG", quality=85), "jpeg"
        if len(content) <= share:
            break
    return {"image": _uri(content, kind), "shape": [depth, height, width], "columns": columns, "stride": stride}


def _encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _uri(content, kind):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _plain(value):
    """Return a value as JSON can hold it: no NaN, no infinity, no text that is not Unicode."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value
