"""Simulate radar micro-Doppler spectrograms of hand motions, and write them as a labeled folder of grayscale PNG files.

A hand is a cloud of point scatterers. The range history R_i(t) of scatterer i determines the phase of its echo; the
echoes are summed, receiver noise is added, and a short-time Fourier transform over slow time gives the image:

    s(t) = sum_i a_i exp(+j 4 pi R_i(t) / wavelength) + noise,        Doppler frequency f_i = (2 / wavelength) dR_i/dt

so motion away from the sensor appears at positive frequencies (upper half: row 0 is the highest) and motion toward it
at negative ones, as in recordings of common pulsed coherent sensors. (V. C. Chen, The Micro-Doppler Effect in Radar,
2nd ed. 2019, ch. 1 and 2, derives the phase history; its sign of f is the opposite one.)

Two simplifications: the lines of sight are those of the hand at rest (first order in displacement over range), and the
amplitude of a scatterer does not change along its path. With them `tapin` and `tapout` differ only in the direction of
time. Reversing a recording, t -> T - t, would also flip Doppler, because a hand that returns along its path has the
opposite velocity. Only the image is flipped by v'(t) = v(T - t), that is by the displacement d'(t) = -d(T - t): the
echo is then the complex conjugate of the reversed one. A tap toward the sensor becomes a tap away from it, so the
class with the flipped images is a motion that a hand can make.
"""

import math
import os
import shutil
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from PIL import Image

from .. import files, locks
from ..config import CommaSeparated, as_dict, option, require, size, validate
from .config import parse_size
from .spectrograms import TABLE_FILE, stft_power, write_table

SIMULATION = 1              # increased when the same parameters and seed give other images than before
SPEED_OF_LIGHT = 299_792_458.0
SPLITS = ("train", "val")
WAVEFORMS = ("cw", "fmcw")
METADATA_FILE, BASEBAND = "dataset.json", "baseband"
STAGING = ".microdoppler.part"

SLOWER_STROKE = 0.65        # minimum speed of the slower stroke of a tap, as a fraction of the faster one
MAX_PAUSE_S = 0.06          # between the two strokes of a tap
MAX_GAP_S = 0.12            # between the taps of a double tap
DOUBLE_TAP_PACE = 0.75      # duration of the strokes of a double tap, relative to a single one
PUSH_PACE = 1.4             # duration of a one-way stroke, relative to a stroke of a tap
DRIFT_HZ = (0.2, 0.5)       # breathing


def _stroke(t, start, length):
    """Integrate a sin^2 lobe of velocity with unit peak that starts at `start` and takes `length` seconds."""
    x = np.clip((t - start) / length, 0, 1)
    return length * (x / 2 - np.sin(2 * np.pi * x) / (4 * np.pi))


def _tap_times(rng, config, pace=1.0):
    """Sample a tap: (first length, first speed, pause, second length, second speed)."""
    length = rng.uniform(config.stroke_min_s, config.stroke_max_s) * pace
    speed = rng.uniform(config.speed_min_mps, config.speed_max_mps)
    slower = rng.uniform(SLOWER_STROKE, 1)
    strokes = [(length, speed), (length / slower, speed * slower)]      # equal distances back and forth
    if rng.random() < 0.5:      # either order is equally likely, so the distribution of taps is its own flip in time
        strokes.reverse()
    return (*strokes[0], rng.uniform(0, MAX_PAUSE_S), *strokes[1])


def _tap(t, start, first_s, first_mps, pause, second_s, second_mps):
    return second_mps * _stroke(t, start + first_s + pause, second_s) - first_mps * _stroke(t, start, first_s)


def _tapin(t, span, rng, config):
    times = _tap_times(rng, config)
    return _tap(t, rng.uniform(0, span - times[0] - times[2] - times[3]), *times)


def _tapout(t, span, rng, config):
    return -_tapin(span - t, span, rng, config)


def _doubletapin(t, span, rng, config):
    times = _tap_times(rng, config, DOUBLE_TAP_PACE)
    second = times[0] + times[2] + times[3] + rng.uniform(0, MAX_GAP_S)
    start = rng.uniform(0, span - second - times[0] - times[2] - times[3])
    return _tap(t, start, *times) + rng.uniform(0.8, 1) * _tap(t, start + second, *times)


def _pull(t, span, rng, config):
    length = rng.uniform(config.stroke_min_s, config.stroke_max_s) * PUSH_PACE
    speed = rng.uniform(config.speed_min_mps, config.speed_max_mps)
    return speed * _stroke(t, rng.uniform(0, span - length), length)


def _push(t, span, rng, config):
    return -_pull(t, span, rng, config)


def _circle(t, span, rng, config):
    radius = rng.uniform(0.06, 0.1)
    turn = rng.choice([-1, 1]) * rng.uniform(config.speed_min_mps, config.speed_max_mps) / radius
    return radius * np.exp(1j * (turn * t + rng.uniform(0, 2 * np.pi)))


def _burst(t, span, rng, config, rate_hz, fraction, ramp_s):
    """Return an oscillation over a fraction of the recording, with raised-cosine ends, up to a sampled speed."""
    length = rng.uniform(*fraction) * span
    start = rng.uniform(0, span - length)
    turn = 2 * np.pi * rng.uniform(*rate_hz)
    edge = np.clip(np.minimum(t - start, start + length - t) / ramp_s, 0, 1)
    speed = rng.uniform(config.speed_min_mps, config.speed_max_mps)
    reach = speed / (turn + np.pi / (2 * ramp_s))       # the slope of the ends adds to the speed
    return reach * np.sin(np.pi * edge / 2) ** 2 * np.sin(turn * t + rng.uniform(0, 2 * np.pi))


def _wave(t, span, rng, config):
    return _burst(t, span, rng, config, rate_hz=(1.2, 2.4), fraction=(0.6, 0.9), ramp_s=0.2)


def _wiggle(t, span, rng, config):
    return _burst(t, span, rng, config, rate_hz=(2.5, 4.5), fraction=(0.3, 0.6), ramp_s=0.1)


def _still(t, span, rng, config):
    return np.zeros_like(t)


def _swinging(u):
    return 0.35 + 0.65 * np.sqrt((1 + u) / 2)       # the fingertips (u = 1) move most, the wrist least


def _rocking(u):
    return np.sign(u) * np.sqrt(np.abs(u))          # the two sides of the palm move in opposite directions


MOTIONS = {
    "circle": (_circle, _swinging, "the hand moves in a circle in a plane through the line of sight"),
    "doubletapin": (_doubletapin, _swinging, "two quick taps toward the sensor, each with its return"),
    "pull": (_pull, _swinging, "one stroke away from the sensor"),
    "push": (_push, _swinging, "one stroke toward the sensor"),
    "still": (_still, _swinging, "the hand is still, except for its slow drift"),
    "tapin": (_tapin, _swinging, "toward the sensor, then away; the flip of tapout in time"),
    "tapout": (_tapout, _swinging, "away from the sensor, then toward it; the flip of tapin in time"),
    "wave": (_wave, _swinging, "a slow wave, fingertips faster than the wrist"),
    "wiggle": (_wiggle, _rocking, "the palm rocks quickly: one side approaches while the other recedes"),
}


motion_names = CommaSeparated(
    "motions", f"comma-separated distinct names of: {', '.join(MOTIONS)}", str,
    lambda names: 0 < len(names) == len(set(names)) and set(names) <= set(MOTIONS))


@dataclass
class MicrodopplerConfig:
    """Parameters of a simulated dataset."""

    out_dir: str = option("", "folder for train/, val/ and dataset.json; empty, new, or with this very dataset",
                          essential=True)
    classes: Annotated[str, motion_names] = option(
        "circle,doubletapin,push,tapin,tapout,wiggle",
        f"motions to simulate, comma-separated: {', '.join(MOTIONS)}", essential=True)
    num_train: int = option(300, "training images per class", essential=True, minimum=1)
    num_val: int = option(60, "validation images per class; 0: no val folder", essential=True, minimum=0)
    seed: int = option(0, "random seed; image i of a class and split depends on it and the parameters alone",
                       essential=True, minimum=0)
    image_size: Annotated[int | str, size] = option(
        64, "Doppler rows x time columns, as HxW or one number for both", essential=True)
    baseband: bool = option(False, "also write the complex samples of each image, [channels x pulses] complex64, to "
                                   "baseband/, which make_spectrograms.py reads; 230 KB per image with the defaults",
                           essential=True)
    waveform: str = option("fmcw", "cw: one complex sample per pulse; fmcw: one sweep per pulse, a Fourier transform "
                           "to range, and the sum of the power of the gated range bins", choices=WAVEFORMS)
    carrier_ghz: float = option(60.5, "carrier frequency in GHz; for fmcw the center of the sweep", above=0)
    prf_hz: float = option(1000.0, "pulses or sweeps per second; images span Doppler -prf/2 to prf/2", above=0)
    duration_s: float = option(2.048, "time across an image in s (columns x hop)", above=0)
    window_ms: float = option(64.0, "length of the Hann window of the short-time Fourier transform in ms", above=0)
    dynamic_range_db: float = option(40.0, "dB above the mean noise power that become white; the noise power is black",
                                     above=0)
    snr_db: float = option(29.0, "level of the full hand above the noise in a spectrogram bin in dB, at the mean "
                           "range; it decreases with range^4")
    clutter_db: float = option(28.0, "level of static echoes (leakage, arm, room) above the noise in dB, +-3 dB")
    range_min_m: float = option(0.25, "minimum range of the hand at rest in m", above=0)
    range_max_m: float = option(0.45, "maximum range of the hand at rest in m")
    speed_min_mps: float = option(0.4, "minimum peak speed of a motion in m/s", above=0)
    speed_max_mps: float = option(1.0, "maximum peak speed of a motion in m/s")
    stroke_min_s: float = option(0.14, "minimum duration of one stroke of a tap in s", above=0)
    stroke_max_s: float = option(0.26, "maximum duration of one stroke of a tap at full speed in s")
    aspect_max_deg: float = option(40.0, "maximum angle between motion and line of sight in degrees; at 90 nothing "
                                   "moves along the line of sight", minimum=0, maximum=80)
    hand_size_m: float = option(0.09, "width of the hand in m; its depth is half of it", above=0)
    drift_mm: float = option(4.0, "amplitude of a slow drift (0.2 to 0.5 Hz) under every motion in mm", minimum=0)
    scatterers_min: int = option(8, "minimum number of point scatterers on the hand", minimum=1)
    scatterers_max: int = option(24, "maximum number of point scatterers on the hand")
    bandwidth_ghz: float = option(4.0, "fmcw: swept bandwidth in GHz; a range bin is c / (2 bandwidth)", above=0)
    fast_samples: int = option(32, "fmcw: complex samples per sweep, which is the number of range bins", minimum=2)
    gate_min_m: float = option(0.1, "fmcw: minimum range that is summed in m", minimum=0)
    gate_max_m: float = option(0.6, "fmcw: maximum range that is summed in m")


def wavelength_m(config):
    """Return the wavelength of the carrier in m."""
    return SPEED_OF_LIGHT / (config.carrier_ghz * 1e9)


def class_names(config):
    """Return the motions of `config.classes`."""
    return motion_names.parse(config.classes, "classes")


def sampling(config):
    """Return (window, hop, samples) in pulses: window length, pulses per column, pulses per recording."""
    window = round(config.window_ms * 1e-3 * config.prf_hz)
    columns = parse_size(config.image_size)[1]
    hop = round(config.duration_s * config.prf_hz / columns)
    return window, hop, (columns - 1) * hop + window


def range_gate(config):
    """Return the range bins of an FMCW sweep between `gate_min_m` and `gate_max_m`, as an integer array."""
    meters = np.arange(config.fast_samples) * SPEED_OF_LIGHT / (2e9 * config.bandwidth_ghz)
    return np.flatnonzero((meters >= config.gate_min_m) & (meters <= config.gate_max_m))


def check_parameters(config):
    """Check that a recording with these parameters exists.

    :raises ValueError: if a parameter is out of bounds, or parameters conflict; the message names the flag to change.
    """
    validate(config)
    pairs = [(f"{name}_min_{unit}", f"{name}_max_{unit}") for name, unit in
             (("range", "m"), ("speed", "mps"), ("stroke", "s"), ("gate", "m"))]
    pairs.append(("scatterers_min", "scatterers_max"))
    values = vars(config)
    require(*((values[low] <= values[high], f"--{low} must be <= --{high}, got {values[low]} and {values[high]}")
              for low, high in pairs))
    window, hop, samples = sampling(config)
    rows, columns = parse_size(config.image_size)
    speed = config.speed_max_mps + 2e-3 * np.pi * DRIFT_HZ[1] * config.drift_mm
    doppler = 2 * speed / wavelength_m(config)
    tap_s = config.stroke_max_s * (1 + 1 / SLOWER_STROKE) + MAX_PAUSE_S
    double_s = 2 * (config.stroke_max_s * DOUBLE_TAP_PACE * (1 + 1 / SLOWER_STROKE) + MAX_PAUSE_S) + MAX_GAP_S
    durations = {"tapin": tap_s, "tapout": tap_s, "doubletapin": double_s,
                 "push": config.stroke_max_s * PUSH_PACE, "pull": config.stroke_max_s * PUSH_PACE}
    longest_s, longest = max((durations.get(name, 0), name) for name in class_names(config))
    reach = max(0.5 * PUSH_PACE * config.stroke_max_s * config.speed_max_mps, 0.1) + config.hand_size_m / 2
    require(
        (4 <= window <= rows,
         f"--window_ms {config.window_ms} is {window} pulses at --prf_hz {config.prf_hz:g}: {rows} Doppler rows "
         f"(--image_size) require 4 to {rows} pulses, {4e3 / config.prf_hz:g} to {rows * 1e3 / config.prf_hz:g} ms"),
        (1 <= hop <= window,
         f"--duration_s {config.duration_s} over {columns} columns is a hop of {hop} pulses: expected 1 to {window} "
         f"(the window), which is {columns / config.prf_hz:g} to {columns * window / config.prf_hz:g} s"),
        (doppler < config.prf_hz / 2,
         f"motions of up to {speed:.3g} m/s (drift included) have a Doppler frequency of up to {doppler:.0f} Hz at "
         f"{config.carrier_ghz:g} GHz, beyond half of --prf_hz {config.prf_hz:g}, and would alias; set --prf_hz above "
         f"{2 * doppler:.0f} or --speed_max_mps below {config.speed_max_mps * config.prf_hz / 2 / doppler:.3g}"),
        (longest_s <= samples / config.prf_hz,
         f"a {longest} takes up to {longest_s:.2f} s, a recording {samples / config.prf_hz:.2f} s; use a larger "
         "--duration_s or a smaller --stroke_max_s"),
        (reach < config.range_min_m,
         f"the hand moves up to {reach:.3f} m toward the sensor, --range_min_m is {config.range_min_m}; use a larger "
         "one, or a smaller --speed_max_mps or --stroke_max_s"),
    )
    if config.waveform == "fmcw":
        max_range = config.fast_samples * SPEED_OF_LIGHT / (2e9 * config.bandwidth_ghz)
        require(
            (config.range_max_m + reach <= max_range,
             f"the hand is up to {config.range_max_m + reach:.2f} m away, an fmcw sweep is unambiguous up to "
             f"{max_range:.2f} m; use more --fast_samples, or a smaller --bandwidth_ghz or --range_max_m"),
            (len(range_gate(config)),
             f"no range bin is between --gate_min_m {config.gate_min_m} and --gate_max_m {config.gate_max_m}; bins are "
             f"{max_range / config.fast_samples:.3f} m apart, up to {max_range:.2f} m"),
        )


def draw_hand(motion, config, rng):
    """Sample a hand and its motion; return (ranges [S x T] in m, amplitudes [S]) of the scatterers.

    The last scatterer is the static clutter. Amplitudes are in units of the standard deviation of the noise in a
    sample.
    """
    return _draw_hand(motion, config, rng)[:2]


def _draw_hand(motion, config, rng):
    """Return what `draw_hand` does, the range of the hand at rest in m, and its aspect in radians."""
    path, lever, _ = MOTIONS[motion]
    window, _, samples = sampling(config)
    t = np.arange(samples) / config.prf_hz
    away = path(t, samples / config.prf_hz, rng, config)                                # [T]

    rest = rng.uniform(config.range_min_m, config.range_max_m)
    aspect = np.deg2rad(rng.uniform(-config.aspect_max_deg, config.aspect_max_deg))
    count = rng.integers(config.scatterers_min, config.scatterers_max, endpoint=True)
    u = rng.uniform(-1, 1, count)                                                       # across the hand
    depth = rng.uniform(-1, 1, count) * config.hand_size_m / 4
    angle = aspect + np.arctan2(u * config.hand_size_m / 2, rest)                       # motion to line of sight
    drift = 1e-3 * config.drift_mm * np.sin(2 * np.pi * rng.uniform(*DRIFT_HZ) * t + rng.uniform(0, 2 * np.pi))
    along = np.outer(np.cos(angle), away.real) + np.outer(np.sin(angle), away.imag)
    ranges = rest + depth[:, None] + lever(u)[:, None] * along + drift

    # A tone of amplitude a has power a^2 in its bin, noise sum(w^2) / sum(w)^2: 1.5 / window for a Hann window w.
    bin_noise = 1.5 / window * (len(range_gate(config)) if config.waveform == "fmcw" else 1)
    amplitudes = rng.rayleigh(size=count)
    mean_range = math.sqrt(config.range_min_m * config.range_max_m)
    level = 10 ** (config.snr_db / 10) * bin_noise * (mean_range / rest) ** 4               # the radar equation
    amplitudes *= np.sqrt(level / np.sum(amplitudes ** 2))
    clutter = math.sqrt(10 ** ((config.clutter_db + rng.uniform(-3, 3)) / 10) * bin_noise)
    clutter_range = rng.uniform(config.range_min_m, config.range_max_m)
    return np.vstack([ranges, np.full(samples, clutter_range)]), np.append(amplitudes, clutter), rest, aspect


def receive(ranges, amplitudes, config, rng=None):
    """Return the slow-time samples [G x T] (complex) of scatterers at `ranges` [S x T] in m.

    G is 1 for a continuous wave, the number of gated range bins for FMCW (motion within a sweep is neglected).

    :param rng: a Generator to add white complex noise of power 1 per sample and bin; None: no noise.
    """
    samples = ranges.shape[1]
    echoes = amplitudes[:, None] * np.exp(4j * np.pi / wavelength_m(config) * ranges)
    if config.waveform == "cw":
        received = echoes.sum(axis=0, keepdims=True)
        return received if rng is None else received + _noise(received.shape, rng)

    # Sample n of N in a sweep has the frequency carrier + bandwidth (n / N - 1/2).
    count = config.fast_samples
    per_sample = np.exp(4j * np.pi * config.bandwidth_ghz * 1e9 / SPEED_OF_LIGHT / count * ranges)
    echoes *= per_sample ** (-count / 2)
    sweeps = np.empty((count, samples), complex)
    for n in range(count):
        sweeps[n] = echoes.sum(axis=0)
        echoes *= per_sample
    if rng is not None:
        sweeps += _noise(sweeps.shape, rng) * math.sqrt(count)
    taper = np.hanning(count + 2)[1:-1]
    taper /= np.linalg.norm(taper) * math.sqrt(count)       # a scatterer has power a^2 over all bins, noise 1 per bin
    return np.fft.fft(sweeps * taper[:, None], axis=0)[range_gate(config)]


def _noise(shape, rng):
    return rng.standard_normal((*shape, 2)).view(complex)[..., 0] * math.sqrt(0.5)


def spectrogram_db(received, config):
    """Return dB above the mean noise power [rows x columns] of slow-time samples [G x T], summed over all G bins.

    Row r is the Doppler frequency ((rows - 1) // 2 - r) prf / rows, the highest first; column k is the window that
    starts at pulse k * hop.
    """
    window, hop, _ = sampling(config)
    power = stft_power(received, window, hop, parse_size(config.image_size)[0])
    floor = len(received) * 1.5 / window
    return 10 * np.log10(np.maximum(power / floor, 1e-12))


def simulate_baseband(motion, split, index, config):
    """Return the slow-time samples [G x T] (complex) of recording `index` of a motion in "train" or "val"."""
    rng = _generator(motion, split, index, config)
    return receive(*draw_hand(motion, config, rng), config, rng)


def simulate(motion, split, index, config):
    """Return image `index` of a motion in "train" or "val", uint8 [rows x columns]."""
    decibels = spectrogram_db(simulate_baseband(motion, split, index, config), config)
    return np.rint(np.clip(decibels / config.dynamic_range_db, 0, 1) * 255).astype(np.uint8)


def physical_parameters(motion, split, index, config):
    """Return {name: number} of image `index` of a motion: what happened in front of the sensor.

    `speed_mps` is the highest speed of a scatterer of the hand along the line of sight, which determines the extent in
    Doppler frequency; `range_m` the range of the hand at rest, `aspect_deg` the angle of its motion to the line of
    sight.
    """
    ranges, _, rest, aspect = _draw_hand(motion, config, _generator(motion, split, index, config))
    speed = np.abs(np.diff(ranges)).max() * config.prf_hz
    return {"speed_mps": float(speed), "range_m": float(rest), "aspect_deg": float(np.rad2deg(aspect))}


def _generator(motion, split, index, config):
    key = [config.seed, SPLITS.index(split), int.from_bytes(motion.encode(), "big"), index]
    return np.random.Generator(np.random.PCG64(key))


def write_dataset(config):
    """Write `config.out_dir`: train/ and val/ with `CLASS_INDEX.png`, and dataset.json; return {subfolder: files}.

    With `config.baseband` also baseband/ with `CLASS_SPLIT-INDEX.npy`, which may be added to an existing dataset.
    Each of train/ and val/ also has a label file metadata.csv, with the class and `physical_parameters` of each image.
    A complete folder with this dataset is unchanged ({} is returned; those of version 0.3 have no metadata.csv), an
    interrupted one is completed. Each of train/ and val/ is renamed to its name when complete.

    :raises ValueError: if the folder contains anything else, or parameters conflict.
    :raises OSError: if the folder is not writable, or another process writes into it.
    """
    check_parameters(config)
    require((config.out_dir, "no folder specified; set --out_dir"))
    folder = files.require_writable_folder(config.out_dir, "--out_dir")
    with locks.locked_folder(folder, "--out_dir", "make_microdoppler"):
        return _write_missing(folder, config)


def _write_missing(folder, config):
    from tqdm import tqdm

    _claim(folder, config)
    items = {split: {f"{motion}_{i:05d}.png": (motion, split, i) for motion in class_names(config)
                     for i in range(count)}
             for split, count in zip(SPLITS, (config.num_train, config.num_val)) if count}
    if config.baseband:     # in one folder, as folders named train and val are no classes
        items[BASEBAND] = {f"{motion}_{split}-{i:05d}.npy": (motion, split, i)
                           for names in tuple(items.values()) for motion, split, i in names.values()}
    missing = {place: names for place, names in items.items() if not _is_complete(folder / place, names)}
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with tqdm(total=sum(map(len, missing.values())), desc="simulating", unit="file", disable=None) as progress:
            for place, names in missing.items():
                rows = []
                for name, item in names.items():
                    with files.atomic_path(staging / place / name) as part:
                        _write_item(part, place, *item, config)
                    rows.append({"file_name": name, "label": item[0],
                                 **{k: f"{v:.6g}" for k, v in physical_parameters(*item, config).items()}})
                    progress.update()
                write_table(staging / place / TABLE_FILE, rows)
                os.replace(staging / place, folder / place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return {place: len(names) for place, names in missing.items()}


def _write_item(path, place, motion, split, index, config):
    if place != BASEBAND:
        return Image.fromarray(simulate(motion, split, index, config)).save(path, format="PNG")
    with open(path, "wb") as stream:
        np.save(stream, simulate_baseband(motion, split, index, config).astype(np.complex64))


def _claim(folder, config):
    """Write dataset.json into an empty folder, or check that the existing one describes the same dataset."""
    path, record = folder / METADATA_FILE, _record(config)
    if not path.exists():
        others = sorted(other.name for other in folder.iterdir() if other.name not in (STAGING, locks.LOCK_FILE))
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        require((not others, f"{folder} contains other data ({names}) and no {METADATA_FILE}; set --out_dir to a new "
                             "or empty folder"))
        return files.write_record(path, record)
    try:
        stored = files.read_record(path, "set --out_dir to another folder")
        stored = {"simulation": stored["simulation"], **stored["parameters"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a simulated dataset; set --out_dir to another folder") from error
    requested = {"simulation": SIMULATION, **record["parameters"]}
    differing = [f"{key} is {stored.get(key)} there, {requested.get(key)} here" for key in {**requested, **stored}
                 if stored.get(key) != requested.get(key)]
    require((not differing, f"{folder} contains another dataset ({'; '.join(differing)}); set --out_dir to another "
                            "folder"))


def _record(config):
    # The baseband may be added later, and datasets of version 0.3 do not record it.
    parameters = {name: value for name, value in as_dict(config).items() if name not in ("out_dir", "baseband")}
    window, hop, samples = sampling(config)
    rows, columns = parse_size(config.image_size)
    return {
        "simulation": SIMULATION,
        "parameters": parameters,
        "classes": {name: MOTIONS[name][2] for name in class_names(config)},
        "image": {
            "rows": rows, "columns": columns,
            "window_samples": window, "hop_samples": hop, "recording_samples": samples,
            "wavelength_m": wavelength_m(config), "row_hz": config.prf_hz / rows,
            "row_mps": config.prf_hz / rows * wavelength_m(config) / 2, "column_s": hop / config.prf_hz,
            "zero_doppler_row": (rows - 1) // 2,
            "gray": f"0 is the mean noise power, 255 is {config.dynamic_range_db:g} dB above it",
            "doppler": "row 0 is the highest frequency; motion toward the sensor is negative (lower half)",
        },
    }


def _is_complete(folder, names):
    """Return whether `folder` exists and contains exactly the images `names`.

    :raises ValueError: if it contains some of them, or other files.
    """
    if not folder.exists():
        return False
    found = {path.name for path in folder.iterdir()} - {TABLE_FILE}
    require((found == set(names), f"{folder} contains {len(found & set(names))} of its {len(names)} images and "
                                  f"{len(found - set(names))} other files; delete that folder to recreate it, or set "
                                  "--out_dir to another one"))
    return True
