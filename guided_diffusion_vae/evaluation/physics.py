"""Physical quantities of spectrograms, and the distances between their distributions in two sets.

Power is that above the floor: a pixel of value v and a dynamic range of D dB has the power 10^(D v / 10) - 1, in units
of the power at value 0, so that black has none. Doppler frequencies, times and levels are those of `SpectrogramAxes`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config import require
from ..data.axes import SpectrogramAxes
from ..data.colormaps import Colormap
from ..nn import to_uint8

ENERGY = 0.95           # part of the energy within an extent or a duration
EDGE_DB = 10            # above the floor: the level at which the highest Doppler frequency ends
_TINY = 1e-12


class Spectra(NamedTuple):
    """Spectrograms: values [n x H x W] in [0, 1], power above the floor [n x H x W], the axes, and the sums of power
    over time [n x H] and over Doppler [n x W]."""

    values: np.ndarray
    power: np.ndarray
    axes: Any       # SpectrogramAxes, all of them known
    profile: np.ndarray
    envelope: np.ndarray


def spectra(values, axes: SpectrogramAxes, clutter_hz: float = 0.0) -> Spectra:
    """Return the `Spectra` of values [n x H x W] in [0, 1]; rows up to `clutter_hz` from zero Doppler are left out."""
    kept = np.abs(axes.doppler) > clutter_hz if clutter_hz else np.ones(axes.rows)
    values = np.asarray(values, np.float64) * kept[:, None]
    power = 10 ** (values * axes.db_range / 10) - 1
    return Spectra(values, power, axes, power.sum(2), power.sum(1))


def centroid(s: Spectra):
    """Return the mean Doppler frequency in Hz, weighted by power.  -> [n]"""
    return s.profile @ s.axes.doppler / np.maximum(s.profile.sum(1), _TINY)


def bandwidth(s: Spectra):
    """Return the standard deviation of the Doppler frequency in Hz, weighted by power.  -> [n]"""
    squares = (s.axes.doppler - centroid(s)[:, None]) ** 2
    return np.sqrt((s.profile * squares).sum(1) / np.maximum(s.profile.sum(1), _TINY))


def doppler_range(s: Spectra):
    """Return the width in Hz of the range between the 2.5% and 97.5% quantiles of energy over Doppler.  -> [n]"""
    return s.axes.row_hz * energy_extent(s.profile)


def duration(s: Spectra):
    """Return the width in s of the range between the 2.5% and 97.5% quantiles of energy over time.  -> [n]"""
    return s.axes.column_s * energy_extent(s.envelope)


def delay(s: Spectra):
    """Return the mean time in s, weighted by power.  -> [n]"""
    return s.envelope @ s.axes.seconds / np.maximum(s.envelope.sum(1), _TINY)


def highest_doppler(s: Spectra):
    """Return the magnitude in Hz of the highest Doppler frequency `EDGE_DB` above the floor.  -> [n]"""
    threshold = EDGE_DB / s.axes.db_range
    return s.axes.row_hz * np.array([doppler_extent(image, threshold, s.axes.zero_row) for image in s.values])


def symmetry(s: Spectra):
    """Return the overlap of power with its mirror image about zero Doppler, 0 to 1; 1 without power.  -> [n]

    2 sum min(P(f, t), P(-f, t)) / sum (P(f, t) + P(-f, t)) over the frequencies f > 0 with a row of -f: 0 if at each
    time all moves in one direction, 1 for both alike and for receivers without quadrature. NaN if no f has such a row.
    """
    count = min(s.axes.zero_row, s.axes.rows - 1 - s.axes.zero_row)
    above = s.power[:, s.axes.zero_row - count:s.axes.zero_row]
    below = s.power[:, s.axes.zero_row + 1:s.axes.zero_row + 1 + count][:, ::-1]
    total = (above + below).sum((1, 2))
    shared = 2 * np.minimum(above, below).sum((1, 2))
    if not count:
        return np.full(len(s.power), np.nan)
    return np.where(total > 0, shared / np.maximum(total, _TINY), 1.0)


def frame_energy(s: Spectra):
    """Return the mean power over the rows of each frame in dB, the floor included.  -> [n x W]"""
    return s.axes.db_floor + 10 * np.log10(1 + s.power.mean(1))


# {name in metrics.json: (function of Spectra, label with unit)}
QUANTITIES = {
    "centroid_hz": (centroid, "centroid (Hz)"),
    "bandwidth_hz": (bandwidth, "bandwidth (Hz)"),
    "extent_hz": (doppler_range, "extent, 95% energy (Hz)"),
    "highest_doppler_hz": (highest_doppler, "highest Doppler (Hz)"),
    "symmetry": (symmetry, "symmetry"),
    "delay_s": (delay, "mean time (s)"),
    "duration_s": (duration, "duration, 95% energy (s)"),
}
FRAMES, ENVELOPE = "frame_energy_db", "envelope_db"


def energy_extent(energy, part: float = ENERGY):
    """Return the number of bins between the quantiles (1 - part) / 2 and (1 + part) / 2 of energy [n x B].  -> [n]

    Energy is distributed uniformly within a bin, so that all energy in one bin gives `part`.
    """
    widths = np.zeros(len(energy))
    for i, bins in enumerate(energy):
        if bins.sum() > 0:
            cumulative = np.concatenate([[0], np.cumsum(bins) / bins.sum()])
            low, high = np.interp([(1 - part) / 2, (1 + part) / 2], cumulative, np.arange(len(cumulative)))
            widths[i] = high - low
    return widths


def doppler_extent(image, threshold, zero):
    """Return the distance in rows from `zero`, the row of zero Doppler, to the end of the signature.  [H x W] in [0, 1]

    It ends where the second brightest column of a row falls below the threshold, interpolated between rows.
    """
    rows = np.sort(image, axis=1)[:, -2]
    return max(_end(side, threshold) for side in (rows[zero::-1], rows[zero:]))


def _end(rows, threshold):
    above = np.flatnonzero(rows > threshold)
    if not len(above):
        return 0.0
    last = above[-1]
    return last + ((rows[last] - threshold) / (rows[last] - rows[last + 1]) if last + 1 < len(rows) else 0.0)


def wasserstein_distance(a, b) -> float:
    """Return the 1-Wasserstein distance of two sets of numbers [n] and [m]: the area between their distributions."""
    both = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(values), both[:-1], side="right") / len(values) for values in (a, b)]
    return float(np.abs(below[0] - below[1]) @ np.diff(both))


@dataclass(frozen=True)
class Physics:
    """The physical quantities of spectrograms that `evaluate` compares.

    :param clutter_hz: rows up to this Doppler frequency are left out; 0: none.
    :param colormap: by which RGB images become scalars; None for grayscale.
    """

    axes: SpectrogramAxes
    clutter_hz: float = 0.0
    colormap: Colormap | None = None

    def measure(self, images):
        """Return `QUANTITIES` and the energy of each frame.  [n x C x H x W] in [0, 1] -> float64 [n x (7 + W)]"""
        values = np.asarray(images, np.float32)[:, 0]
        if self.colormap:
            values = self.colormap.to_scalars(np.moveaxis(to_uint8(images), 1, -1))[0]
        found = spectra(values, self.axes, self.clutter_hz)
        return np.column_stack([*(function(found) for function, _ in QUANTITIES.values()), frame_energy(found)])

    def report(self, measured, classes):
        """Return the entry "physics" of metrics.json.

        :param measured: {set: result of `measure`}, of "reference", "samples" and optionally "training".
        :param classes: {set: class name of each image, or None}; sets are compared class by class if all have names.
        """
        axes = self.axes
        report = {"doppler_hz": axes.row_hz * axes.rows, "frame_s": axes.column_s, "zero_row": axes.zero_row,
                  "first_row": axes.first_row, "db_range": axes.db_range, "db_floor": axes.db_floor,
                  "clutter_hz": self.clutter_hz}
        for name in measured:
            if name != "reference":
                report[f"{name}_to_reference"] = self._compare(measured, classes, name)
        return report

    def _compare(self, measured, classes, name):
        groups = class_rows(classes, ("reference", name))
        report = {"classes": list(groups)}
        pairs = [(measured["reference"][rows["reference"]], measured[name][rows[name]]) for rows in groups.values()]
        for column, quantity in enumerate(QUANTITIES):
            values = [(real[:, column], other[:, column]) for real, other in pairs]
            if not any(np.isnan(each).any() for pair in values for each in pair):
                report[quantity] = _distances(values, wasserstein_distance)
        frames = [(real[:, len(QUANTITIES):], other[:, len(QUANTITIES):]) for real, other in pairs]
        report[FRAMES] = _distances(frames, lambda real, other: wasserstein_distance(real.ravel(), other.ravel()))
        report[ENVELOPE] = _distances(frames, lambda real, other: np.mean(
            [wasserstein_distance(*columns) for columns in zip(real.T, other.T)]))
        return report

    def curves(self, measured, classes):
        """Return {class: {label: {set: (x, y)}}}: cumulative distributions, and the mean energy over time."""
        groups = class_rows(classes, tuple(measured))
        labels = [label for _, label in QUANTITIES.values()]
        curves = {}
        for group, rows in groups.items():
            parts = {name: values[rows[name]] for name, values in measured.items()}
            row = {label: {name: _distribution(part[:, column]) for name, part in parts.items()}
                   for column, label in enumerate(labels)}
            frames = {name: part[:, len(QUANTITIES):] for name, part in parts.items()}
            row["energy per frame (dB)"] = {name: _distribution(part.ravel()) for name, part in frames.items()}
            row["mean energy (dB) over time (s)"] = {name: (self.axes.seconds, part.mean(0))
                                                     for name, part in frames.items()}
            curves[group] = row
        return curves


def class_rows(classes, names):
    """Return {class: {set: indices}} of the classes that all sets `names` have, {"all": ...} if one has no classes.

    :raises ValueError: if they have none in common.
    """
    if any(classes[name] is None for name in names):
        return {"all": dict.fromkeys(names, slice(None))}
    common = sorted(set.intersection(*(set(classes[name]) for name in names)))
    require((common, f"the sets {', '.join(names)} have no class in common; compare sets of the same classes"))
    return {group: {name: np.flatnonzero(np.array(classes[name]) == group) for name in names} for group in common}


def _distances(pairs, distance):
    """Return distances of (reference, other) per class, their mean, and the same in units of the reference's deviation.

    None stands for a class of equal values, which has none.
    """
    found = [float(distance(*pair)) for pair in pairs]
    deviations = [float(real.std()) for real, _ in pairs]
    normalized = [value / deviation if deviation > 0 else None for value, deviation in zip(found, deviations)]
    known = [value for value in normalized if value is not None]
    return {"wasserstein": float(np.mean(found)), "normalized": float(np.mean(known)) if known else None,
            "mean": float(np.mean(np.concatenate([np.ravel(other) for _, other in pairs]))),
            "reference_mean": float(np.mean(np.concatenate([np.ravel(real) for real, _ in pairs]))),
            "per_class": found, "per_class_normalized": normalized}


def _distribution(values):
    """Return the cumulative distribution (values, fraction up to each) of numbers [n]."""
    return np.sort(values), np.arange(1, len(values) + 1) / len(values)
