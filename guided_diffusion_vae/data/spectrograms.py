"""Spectrograms of complex baseband: recordings become a labeled folder of 16-bit images that states its axes."""

import csv
import os
import re
import shutil
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
from PIL import Image

from .. import files, locks
from ..config import as_dict, decibels, option, require
from .archives import file_stamp
from .arrays import KEY_FLAG, list_arrays, load_array
from .axes import AXES_FILE, SpectrogramAxes
from .labels import find_labels
from .listing import is_skipped, relative_names, walk_files

SPECTROGRAMS = 1        # increased when the same recordings and settings give other images than before
TABLE_FILE, STAGING = "metadata.csv", ".spectrograms.part"
EXTENSIONS, SPLITS = ("npy", "mat"), ("train", "val")
NOISE_FROM = 0.8        # of half the sample rate: the frequencies from which the noise floor is taken
_UNSAFE = re.compile(r'[\\/_:*?"<>|\x00-\x1f\s]+')


@dataclass
class StftConfig:
    """Recordings of complex baseband, and the short-time Fourier transform that makes them spectrograms."""

    SECTION = "spectrogram"

    data_dir: str = option("", "folder of recordings, complex .npy or .mat of shape [samples] or [channels x samples], "
                               "whose power is summed over channels; classes as of images: subfolders, names "
                               "CLASS_rest or a label file", essential=True)
    out_dir: str = option("", "folder for train/, val/ and spectrogram.json; empty, new, or with this very set",
                          essential=True)
    val_recordings: str = option("", "regular expression found in the names of the recordings whose images become "
                                     "val/; no recording is in both; empty: no val/", essential=True)
    sample_rate_hz: float = option(0.0, "complex samples per second, over slow time the PRF", minimum=0, essential=True)
    window_s: float = option(0.064, "length of the Hann window in s", above=0, essential=True)
    hop_s: float = option(0.032, "time from one column to the next in s", above=0, essential=True)
    num_frequencies: int = option(64, "rows, from just below half the sample rate at the top to minus half; at least "
                                      "the samples of the window, which is zero-padded", minimum=2, essential=True)
    duration_s: float = option(2.048, "time across an image in s: columns x hop", above=0, essential=True)
    overlap: float = option(0.0, "part of an image that the next one of the same recording repeats", minimum=0, below=1,
                            essential=True)
    db_range: float = option(40.0, "dB above the floor that become white; higher levels are clipped", above=0,
                             essential=True)
    floor: Annotated[str, decibels] = option(
        "", "level in dB (of the power in a bin, 0 for a tone of amplitude 1) that becomes black; empty: for each "
            "recording the median of the frequencies from --noise_from_hz on", essential=True)
    noise_from_hz: float = option(0.0, "lowest magnitude of the frequencies whose median is the noise floor; 0: 0.8 of "
                                       "half the sample rate", minimum=0)
    time_axis: int = option(1, "axis of the samples in arrays of two axes, 0 for [samples x channels]", choices=(0, 1))
    array_key: str = option("", "name of the array in .mat files; empty: the only complex one")
    label_column: str = option("", "column of the label file with the classes; empty: as of images; none: classes from "
                                   "names")


def stft_power(samples, window: int, hop: int, rows: int):
    """Return the power of the short-time Fourier transform of samples [C x T], summed over C: float [rows x columns].

    A tone of amplitude a has power a^2 (periodic Hann window, scaled by its sum). Row r is the frequency
    ((rows - 1) // 2 - r) rate / rows, the highest first; column k is the window that starts at sample k * hop.
    """
    from scipy.signal import stft

    _, _, bins = stft(samples, window="hann", nperseg=window, noverlap=window - hop, nfft=rows,
                      boundary=None, padded=False, return_onesided=False, scaling="spectrum")
    return np.fft.fftshift((bins.real ** 2 + bins.imag ** 2).sum(axis=0), axes=0)[::-1]


def stft_settings(config):
    """Return (window, hop, samples, columns): of the window, of a hop and of an image in samples, and its columns.

    :raises ValueError: if they do not fit each other; the message names the flag to change.
    """
    rate, rows = config.sample_rate_hz, config.num_frequencies
    require((rate > 0, "--sample_rate_hz is not set: expected the complex samples per second"))
    window, hop = round(config.window_s * rate), round(config.hop_s * rate)
    require(
        (4 <= window <= rows, f"--window_s {config.window_s:g} is {window} samples at --sample_rate_hz {rate:g}: "
         f"expected 4 to --num_frequencies {rows}, {4 / rate:g} to {rows / rate:g} s"),
        (1 <= hop <= window, f"--hop_s {config.hop_s:g} is {hop} samples at --sample_rate_hz {rate:g}: expected 1 to "
         f"the {window} of the window, {1 / rate:g} to {window / rate:g} s"),
        (config.noise_from_hz < rate / 2, f"--noise_from_hz {config.noise_from_hz:g}: expected less than half of "
         f"--sample_rate_hz {rate:g}"))
    columns = round(config.duration_s * rate / hop)
    require((columns >= 2, f"--duration_s {config.duration_s:g} is {columns} columns of {hop} samples: expected at "
             f"least 2, {2 * hop / rate:g} s"))
    return window, hop, (columns - 1) * hop + window, columns


def image_axes(config) -> SpectrogramAxes:
    """Return the axes of the images of a StftConfig; levels are relative to the noise floor, or to 1 with a --floor."""
    _, hop, _, columns = stft_settings(config)
    rows, rate = config.num_frequencies, config.sample_rate_hz
    return SpectrogramAxes(rows, columns, rate / rows, hop / rate, (rows - 1) // 2,
                           db_floor=decibels.parse(config.floor, "floor") or 0.0, db_range=config.db_range)


def spectrograms(samples, config, name="the recording"):
    """Return (values float [N x rows x columns] in [0, 1], first sample of each [N], floor in dB) of one recording.

    :param samples: complex [C x T]; images that do not fit into T are left out.
    :raises ValueError: if the samples are not finite, or have no noise floor.
    """
    window, hop, length, columns = stft_settings(config)
    rows, step = config.num_frequencies, max(1, round((1 - config.overlap) * columns)) * hop
    require((np.isfinite(samples).all(), f"{name} contains NaN or infinity; remove it or replace these samples"))
    starts = np.arange(0, samples.shape[-1] - length + 1, step)
    if not len(starts):
        return np.empty((0, rows, columns)), starts, 0.0
    levels = 10 * np.log10(np.maximum(stft_power(samples, window, hop, rows), 1e-30))
    floor = decibels.parse(config.floor, "floor")
    if floor is None:
        frequencies = image_axes(config).doppler
        least = config.noise_from_hz or NOISE_FROM * config.sample_rate_hz / 2
        floor = float(np.median(levels[np.abs(frequencies) >= least]))
        require((floor > -290, f"{name} has no noise at {least:g} Hz and above, so that its floor is unknown; set "
                               "--floor"))
    images = np.stack([levels[:, start // hop:start // hop + columns] for start in starts])
    return np.clip((images - floor) / config.db_range, 0, 1), starts, floor


def read_recording(path, config):
    """Return complex samples [C x T] of a .npy or .mat file.

    :raises ValueError: if it has no complex array of one or two axes, or several.
    """
    path, key = str(path), ""
    if files.file_extension(path) == "mat":
        with files.file_errors(path, action=f"fix or remove the file, or set {KEY_FLAG}"):
            headers = list_arrays(path)
            found = [name for name, header in headers.items() if header.dtype.kind == "c"]
            listed = ", ".join(f"{name} {header.dtype} {list(header.shape)}" for name, header in headers.items())
            require((config.array_key in headers if config.array_key else len(found) == 1,
                     f"expected one complex array, or one of {KEY_FLAG}, got {listed or 'none'}"))
            key = config.array_key or found[0]
            samples = load_array(path, key, headers[key])
    else:
        with files.file_errors(path):
            samples = np.asarray(files.open_npy(path))
    require((samples.dtype.kind == "c" and samples.ndim in (1, 2) and samples.size,
             f"{path}: expected complex baseband [samples] or [channels x samples], got {samples.dtype} "
             f"{list(samples.shape)}; combine the two quadratures to complex values"))
    if samples.ndim == 1 or 1 in samples.shape:     # MATLAB's vectors have two axes
        return samples.reshape(1, -1)
    return np.moveaxis(samples, config.time_axis, -1)


class _Recording(NamedTuple):
    """A file of baseband: its path, name below the folder, class or "", split, and attributes {name: text}."""

    path: str
    name: str
    label: str
    split: str
    attributes: dict


def make_spectrograms(config) -> dict:
    """Write `config.out_dir`: train/ and val/ with 16-bit images and metadata.csv, and spectrogram.json.

    Return {"train": number of images, "val": number, "skipped": names of recordings shorter than an image}, {} if the
    folder contains this very set. metadata.csv has the class, the recording and the attributes of each image, so that
    data can be split by recording: neighboring windows of one are alike.

    :raises ValueError: if a recording cannot be read, settings do not fit, or the folder contains something else.
    """
    axes, recordings = image_axes(config), _list_recordings(config)
    stamps = files.hash_lines(f"{each.name} {file_stamp(each.path)}" for each in recordings)
    record = {"spectrograms": SPECTROGRAMS, "image": axes.to_dict(), "stft": _settings(config), "recordings": stamps}
    require((config.out_dir, "no folder specified; set --out_dir"))
    folder = files.require_writable_folder(config.out_dir, "--out_dir")
    with locks.locked_folder(folder, "--out_dir", "make_spectrograms"):
        if _is_made(folder, record):
            return {}
        staging = folder / STAGING
        shutil.rmtree(staging, ignore_errors=True)
        try:
            counts, floors, skipped = _write_images(staging, recordings, config)
            for split in counts:
                os.replace(staging / split, folder / split)
            files.write_record(folder / AXES_FILE, {**record, "floors_db": floors})
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return {**counts, "skipped": skipped}


def _list_recordings(config):
    files.require_folder(config.data_dir, "--data_dir")
    paths = [path for path in walk_files(config.data_dir, EXTENSIONS) if files.file_extension(path) in EXTENSIONS]
    names = relative_names(config.data_dir, paths)
    chosen = [i for i, name in enumerate(names) if not is_skipped(name)]
    require((chosen, f"{config.data_dir} contains no recording ({', '.join(EXTENSIONS)}); check --data_dir"),
            error=FileNotFoundError)
    paths, names = ([each[i] for i in chosen] for each in (paths, names))
    labels = find_labels(names, config.data_dir, config.label_column)
    try:
        in_val = [bool(config.val_recordings and re.search(config.val_recordings, name)) for name in names]
    except re.error as error:
        raise ValueError(f"--val_recordings {config.val_recordings}: expected a regular expression "
                         f"({error})") from error
    require((any(in_val) == bool(config.val_recordings) and not all(in_val),
             f"--val_recordings {config.val_recordings}: expected to find it in some of {len(names)} recordings such "
             f"as {names[0]}, got {sum(in_val)}"))
    return [_Recording(path, name.rpartition(".")[0],
                       "" if labels.labels is None else labels.class_names[labels.labels[i]], SPLITS[in_val[i]],
                       {column: f"{values[i]:.6g}" for column, values in labels.attributes.items()})
            for i, (path, name) in enumerate(zip(paths, names))]


def _write_images(staging, recordings, config):
    """Write the images of recordings; return ({split: number}, {recording: floor in dB}, those without images)."""
    tables, floors = {}, {}
    for each in recordings:
        images, starts, floors[each.name] = spectrograms(read_recording(each.path, config), config, each.path)
        table = tables.setdefault(each.split, [])
        for image, start in zip(images, starts):
            name = _image_name(each, start)
            path = staging / each.split / name
            require((not path.exists(), f"{each.path}: another recording has images {name}, too; rename one of them"))
            with files.atomic_path(path) as part:
                Image.fromarray(np.rint(image * 65535).astype(np.uint16)).save(part, format="PNG")
            table.append({"file_name": name, **({"label": each.label} if each.label else {}), "recording": each.name,
                          **each.attributes})
    for split in tuple(tables):
        require((tables[split], f"{config.data_dir}: no recording of {split}/ is as long as an image of "
                                f"{config.duration_s:g} s; set a smaller --duration_s"))
        write_table(staging / split / TABLE_FILE, tables[split])
    made = {row["recording"] for table in tables.values() for row in table}
    return ({split: len(table) for split, table in tables.items()}, floors,
            [each.name for each in recordings if each.name not in made])


def _settings(config):
    window, hop, samples, _ = stft_settings(config)
    parameters = {name: value for name, value in as_dict(config).items() if name not in ("data_dir", "out_dir")}
    black = "level --floor" if config.floor else "noise floor of the recording, in floors_db"
    return {**parameters, "window": "periodic Hann", "window_samples": window, "hop_samples": hop,
            "image_samples": samples, "black": f"{black}; 0 dB is the power of a tone of amplitude 1"}


def _is_made(folder, record):
    """Return whether a folder contains the set of a record, False if it is empty.

    :raises ValueError: if it contains something else.
    """
    path = folder / AXES_FILE
    if path.exists():
        stored = files.read_record(path, "set --out_dir to another folder")
        differing = [name for name in record if stored.get(name) != record[name]]
        require((not differing, f"{folder} contains spectrograms of other recordings or settings "
                                f"({', '.join(differing)} differ); set --out_dir to another folder"))
        return True
    others = sorted(each.name for each in folder.iterdir() if each.name not in (STAGING, locks.LOCK_FILE))
    require((not others, f"{folder} contains other data ({', '.join(others[:3])}) and no {AXES_FILE}; set --out_dir to "
                         "a new or empty folder"))
    return False


def _image_name(recording, start):
    """Return CLASS_recording_00001234.png, whose class ends at the first underscore."""
    clean = lambda text: _UNSAFE.sub("-", text).strip("-.") or "-"
    label, name = recording.label, recording.name
    if not label:
        return f"{clean(name)}-{start:08d}.png"
    return f"{clean(label)}_{clean(name.removeprefix(label).strip('_/') or name)}_{start:08d}.png"


def write_table(path, rows):
    """Write dictionaries of the same keys as a .csv file, atomically."""
    with files.atomic_path(path) as part, open(part, "w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
