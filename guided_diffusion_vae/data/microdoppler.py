"""Simulate radar micro-Doppler spectrograms of hand motions, and write them as a labelled folder of grey PNG files.

A hand is a cloud of point scatterers. The range history R_i(t) of scatterer i sets the phase of its echo, the echoes
add up, receiver noise is added, and a short-time Fourier transform over slow time makes the picture:

    s(t) = sum_i a_i exp(+j 4 pi R_i(t) / wavelength) + noise,        Doppler frequency f_i = (2 / wavelength) dR_i/dt

so motion away from the sensor shows at positive frequencies (upper half: row 0 is the highest) and motion towards it
at negative ones, as in recordings of common pulsed coherent sensors. (V. C. Chen, The Micro-Doppler Effect in Radar,
2nd ed. 2019, ch. 1 and 2, derives the phase history; its sign of f is the opposite one.)

Two simplifications: the lines of sight are those of the hand at rest (first order in displacement over range), and a
scatterer's amplitude does not change along its way. With them `tapin` and `tapout` differ in the direction of time and
in nothing else. Turning a recording round, t -> T - t, would flip Doppler too, because a hand that comes back along its
way has the opposite velocity. The picture alone is flipped by v'(t) = v(T - t), that is by the displacement
d'(t) = -d(T - t): the echo is then the complex conjugate of the reversed one. A tap towards the sensor becomes a tap
away from it, so the class with the mirrored pictures is a motion a hand can make.
"""

import json
import math
import os
import shutil
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .. import files
from ..config import as_dict, option, size
from .config import parse_size

SIMULATION = 1              # raise it when the same parameters and seed give other pictures than before
SPEED_OF_LIGHT = 299_792_458.0
SPLITS = ("train", "val")
WAVEFORMS = ("cw", "fmcw")
METADATA_FILE = "dataset.json"
STAGING = ".microdoppler.part"

SLOWER_STROKE = 0.65        # of a tap's two strokes one has the full speed, the other down to this share of it
LONGEST_PAUSE_S = 0.06      # between a tap's two strokes
LONGEST_GAP_S = 0.12        # between the taps of a double tap
DOUBLE_TAP_PACE = 0.75      # strokes of a double tap are shorter by this factor
PUSH_PACE = 1.4             # a one-way stroke is longer by this one
DRIFT_HZ = (0.2, 0.5)       # breathing


def _stroke(t, start, length):
    """Integrate a sin^2 lobe of velocity with unit peak that begins at `start` and lasts `length` seconds."""
    x = np.clip((t - start) / length, 0, 1)
    return length * (x / 2 - np.sin(2 * np.pi * x) / (4 * np.pi))


def _tap_times(rng, config, pace=1.0):
    """Draw one tap's two strokes and pause: (first length, first speed, pause, second length, second speed)."""
    length = rng.uniform(config.stroke_min_s, config.stroke_max_s) * pace
    speed = rng.uniform(config.speed_min_mps, config.speed_max_mps)
    slower = rng.uniform(SLOWER_STROKE, 1)
    strokes = [(length, speed), (length / slower, speed * slower)]      # the same way there and back
    if rng.random() < 0.5:                                              # as often first fast as first slow, so that the
        strokes.reverse()                                               # set of all taps is its own mirror image
    return (*strokes[0], rng.uniform(0, LONGEST_PAUSE_S), *strokes[1])


def _tap(t, start, first_s, first_mps, pause, second_s, second_mps):
    return second_mps * _stroke(t, start + first_s + pause, second_s) - first_mps * _stroke(t, start, first_s)


def _tapin(t, span, rng, config):
    times = _tap_times(rng, config)
    return _tap(t, rng.uniform(0, span - times[0] - times[2] - times[3]), *times)


def _tapout(t, span, rng, config):
    return -_tapin(span - t, span, rng, config)


def _doubletapin(t, span, rng, config):
    times = _tap_times(rng, config, DOUBLE_TAP_PACE)
    second = times[0] + times[2] + times[3] + rng.uniform(0, LONGEST_GAP_S)
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


def _burst(t, span, rng, config, rate_hz, share, ramp_s):
    """Oscillate for a share of the recording, with raised-cosine ends; no faster than the speed that was drawn."""
    length = rng.uniform(*share) * span
    start = rng.uniform(0, span - length)
    turn = 2 * np.pi * rng.uniform(*rate_hz)
    edge = np.clip(np.minimum(t - start, start + length - t) / ramp_s, 0, 1)
    speed = rng.uniform(config.speed_min_mps, config.speed_max_mps)
    reach = speed / (turn + np.pi / (2 * ramp_s))       # the slope of the ends adds to the speed
    return reach * np.sin(np.pi * edge / 2) ** 2 * np.sin(turn * t + rng.uniform(0, 2 * np.pi))


def _wave(t, span, rng, config):
    return _burst(t, span, rng, config, rate_hz=(1.2, 2.4), share=(0.6, 0.9), ramp_s=0.2)


def _wiggle(t, span, rng, config):
    return _burst(t, span, rng, config, rate_hz=(2.5, 4.5), share=(0.3, 0.6), ramp_s=0.1)


def _still(t, span, rng, config):
    return np.zeros_like(t)


def _swinging(u):
    return 0.35 + 0.65 * np.sqrt((1 + u) / 2)       # the finger tips (u = 1) lead, the wrist follows


def _rocking(u):
    return np.sign(u) * np.sqrt(np.abs(u))          # two sides of the palm, counter-moving about its middle line


MOTIONS = {
    "circle": (_circle, _swinging, "the hand goes round and round in a plane through the line of sight"),
    "doubletapin": (_doubletapin, _swinging, "two quick taps towards the sensor, each with its way back"),
    "pull": (_pull, _swinging, "one stroke away from the sensor"),
    "push": (_push, _swinging, "one stroke towards the sensor"),
    "still": (_still, _swinging, "the hand is held still, but for its slow drift"),
    "tapin": (_tapin, _swinging, "towards the sensor, then away; tapout's mirror image in time"),
    "tapout": (_tapout, _swinging, "away from the sensor, then towards it; tapin's mirror image in time"),
    "wave": (_wave, _swinging, "a slow wave to and fro, finger tips faster than the wrist"),
    "wiggle": (_wiggle, _rocking, "the palm rocks quickly: one side comes while the other goes"),
}


@dataclass
class MicrodopplerConfig:
    out_dir: str = option("", "folder for train/, val/ and dataset.json; empty, new, or holding this very data set")
    classes: str = option("circle,doubletapin,push,tapin,tapout,wiggle",
                       f"motions to simulate, comma separated; known: {', '.join(MOTIONS)}")
    num_train: int = option(300, "training pictures per class")
    num_val: int = option(60, "validation pictures per class; 0 writes no val folder")
    seed: int = option(0, "picture i of a class and split depends on (seed, split, class, i) and the parameters alone")
    image_size: size = option(64, "Doppler rows x time columns, as HxW or one number for both")
    waveform: str = option("fmcw", "cw: one complex sample per pulse; fmcw: a sweep per pulse, a Fourier transform to "
                        "range, and the power of the gated range bins added up", choices=WAVEFORMS)
    carrier_ghz: float = option(60.5, "carrier frequency in GHz; the middle of the sweep for fmcw")
    prf_hz: float = option(1000.0, "pulses or sweeps per second; the pictures span Doppler -prf/2 to prf/2")
    duration_s: float = option(2.048, "time across a picture in seconds (columns x hop)")
    window_ms: float = option(64.0, "length of the periodic Hann window of the short-time Fourier transform in ms")
    dynamic_range_db: float = option(40.0, "dB over the mean noise power that are white; the noise power is black")
    snr_db: float = option(29.0, "level of the whole hand over the noise in a spectrogram bin in dB, at the middle range; "
                        "it falls with range^4")
    clutter_db: float = option(28.0, "level of what stands still (leakage, arm, room) over the noise in a bin in dB, "
                            "+-3 dB")
    range_min_m: float = option(0.25, "nearest resting place of the hand in metres")
    range_max_m: float = option(0.45, "farthest resting place of the hand in metres")
    speed_min_mps: float = option(0.4, "lowest peak speed of a motion in m/s")
    speed_max_mps: float = option(1.0, "highest peak speed of a motion in m/s")
    stroke_min_s: float = option(0.14, "shortest time of one stroke of a tap in seconds")
    stroke_max_s: float = option(0.26, "longest time of one stroke of a tap at full speed in seconds")
    aspect_max_deg: float = option(40.0, "largest angle between the direction of motion and the line of sight in degrees")
    hand_size_m: float = option(0.09, "width of the hand in metres; it is half as deep")
    drift_mm: float = option(4.0, "amplitude of the slow drift (0.2 to 0.5 Hz) under every motion in mm")
    scatterers_min: int = option(8, "smallest number of point scatterers on the hand")
    scatterers_max: int = option(24, "largest number of point scatterers on the hand")
    bandwidth_ghz: float = option(4.0, "fmcw: swept bandwidth in GHz; a range bin is c / (2 bandwidth)")
    fast_samples: int = option(32, "fmcw: complex samples per sweep, and range bins")
    gate_min_m: float = option(0.1, "fmcw: nearest range added up in metres")
    gate_max_m: float = option(0.6, "fmcw: farthest range added up in metres")


def wavelength_m(config):
    """Return the carrier's wavelength in metres."""
    return SPEED_OF_LIGHT / (config.carrier_ghz * 1e9)


def class_names(config):
    """Return the list of motions in `config.classes`; ValueError for one that is unknown or named twice."""
    names = [name.strip() for name in config.classes.split(",")]
    unknown = [name for name in names if name not in MOTIONS]
    if unknown:
        raise ValueError(f"--classes: no motion is called {', '.join(map(repr, unknown))}; "
                         f"known are {', '.join(MOTIONS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"--classes {config.classes} names a motion twice; name each one once")
    return names


def sampling(config):
    """Return (window, hop, samples) in pulses: window length, pulses from column to column, pulses in a recording."""
    window = round(config.window_ms * 1e-3 * config.prf_hz)
    columns = parse_size(config.image_size)[1]
    hop = round(config.duration_s * config.prf_hz / columns)
    return window, hop, (columns - 1) * hop + window


def range_gate(config):
    """Return the range bins of an FMCW sweep between `gate_min_m` and `gate_max_m`, as an integer array."""
    meters = np.arange(config.fast_samples) * SPEED_OF_LIGHT / (2e9 * config.bandwidth_ghz)
    return np.flatnonzero((meters >= config.gate_min_m) & (meters <= config.gate_max_m))


def validate(config):
    """Raise ValueError, naming the flag to change, for parameters that no recording can have."""
    _validate_each(config)
    names = class_names(config)
    window, hop, samples = sampling(config)
    rows, columns = parse_size(config.image_size)
    if not 4 <= window <= rows:
        raise ValueError(f"--window_ms {config.window_ms} is {window} pulses at --prf_hz {config.prf_hz:g}; "
                         f"{rows} Doppler rows (--image_size) take 4 to {rows} pulses, "
                         f"{4e3 / config.prf_hz:g} to {rows * 1e3 / config.prf_hz:g} ms")
    if not 1 <= hop <= window:
        raise ValueError(f"--duration_s {config.duration_s} over {columns} columns is a hop of {hop} pulses; "
                         f"it must be 1 to {window} (the window), so {columns / config.prf_hz:g} to "
                         f"{columns * window / config.prf_hz:g} s")
    speed = config.speed_max_mps + 2e-3 * np.pi * DRIFT_HZ[1] * config.drift_mm
    doppler = 2 * speed / wavelength_m(config)
    if doppler >= config.prf_hz / 2:
        raise ValueError(f"motions of up to {speed:.3g} m/s (drift included) have a Doppler frequency of up to "
                         f"{doppler:.0f} Hz at {config.carrier_ghz:g} GHz, beyond half of --prf_hz {config.prf_hz:g}: "
                         f"they would alias. Raise --prf_hz above {2 * doppler:.0f} or lower --speed_max_mps below "
                         f"{config.speed_max_mps * config.prf_hz / 2 / doppler:.3g}")
    tap_s = config.stroke_max_s * (1 + 1 / SLOWER_STROKE) + LONGEST_PAUSE_S
    double_s = 2 * (config.stroke_max_s * DOUBLE_TAP_PACE * (1 + 1 / SLOWER_STROKE) + LONGEST_PAUSE_S) + LONGEST_GAP_S
    durations = {"tapin": tap_s, "tapout": tap_s, "doubletapin": double_s,
             "push": config.stroke_max_s * PUSH_PACE, "pull": config.stroke_max_s * PUSH_PACE}
    longest = max((durations.get(name, 0), name) for name in names)
    if longest[0] > samples / config.prf_hz:
        raise ValueError(f"a {longest[1]} takes up to {longest[0]:.2f} s, a recording {samples / config.prf_hz:.2f} s; "
                         "raise --duration_s or lower --stroke_max_s")
    reach = max(0.5 * PUSH_PACE * config.stroke_max_s * config.speed_max_mps, 0.1) + config.hand_size_m / 2
    if reach >= config.range_min_m:
        raise ValueError(f"the hand reaches up to {reach:.3f} m towards the sensor, --range_min_m is "
                         f"{config.range_min_m}; raise it, or lower --speed_max_mps or --stroke_max_s")
    if config.waveform == "fmcw":
        farthest = config.fast_samples * SPEED_OF_LIGHT / (2e9 * config.bandwidth_ghz)
        if config.range_max_m + reach > farthest:
            raise ValueError(f"the hand is up to {config.range_max_m + reach:.2f} m away, an fmcw sweep is unambiguous "
                             f"up to {farthest:.2f} m; raise --fast_samples or lower --bandwidth_ghz or --range_max_m")
        if not len(range_gate(config)):
            raise ValueError(f"no range bin lies between --gate_min_m {config.gate_min_m} and --gate_max_m "
                             f"{config.gate_max_m}; bins are {farthest / config.fast_samples:.3f} m apart, "
                             f"up to {farthest:.2f} m")


def _validate_each(config):
    at_least = {"num_train": 1, "num_val": 0, "seed": 0, "drift_mm": 0, "gate_min_m": 0, "scatterers_min": 1,
                "fast_samples": 2}
    for name, low in at_least.items():
        if not getattr(config, name) >= low:
            raise ValueError(f"--{name} is {getattr(config, name)}; it must be {low} or more")
    for name in ("carrier_ghz", "prf_hz", "duration_s", "window_ms", "dynamic_range_db", "range_min_m", "speed_min_mps",
                 "stroke_min_s", "hand_size_m", "bandwidth_ghz"):
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"--{name} is {getattr(config, name)}; it must be a number above 0")
    for name in ("snr_db", "clutter_db"):
        if not math.isfinite(getattr(config, name)):
            raise ValueError(f"--{name} is {getattr(config, name)}; it must be a number")
    for low, high in (("range_min_m", "range_max_m"), ("speed_min_mps", "speed_max_mps"),
                      ("stroke_min_s", "stroke_max_s"), ("scatterers_min", "scatterers_max"),
                      ("gate_min_m", "gate_max_m")):
        if not getattr(config, low) <= getattr(config, high) < math.inf:
            raise ValueError(f"--{low} is {getattr(config, low)}, --{high} is {getattr(config, high)}; the first must "
                             "not be the larger one, and both must be numbers")
    if not 0 <= config.aspect_max_deg <= 80:
        raise ValueError(f"--aspect_max_deg is {config.aspect_max_deg}; it must be 0 to 80 (at 90 nothing moves "
                         "along the line of sight)")
    if config.waveform not in WAVEFORMS:
        raise ValueError(f"--waveform is {config.waveform}; it must be {' or '.join(WAVEFORMS)}")


def draw_hand(motion, config, rng):
    """Draw a hand and a motion; return (ranges [S x T] in metres, amplitudes [S]) of its scatterers.

    The last scatterer is what stands still. Amplitudes are in units of the noise's standard deviation in one sample.
    """
    path, lever, _ = MOTIONS[motion]
    window, _, samples = sampling(config)
    t = np.arange(samples) / config.prf_hz
    away = path(t, samples / config.prf_hz, rng, config)                                # [T]

    rest = rng.uniform(config.range_min_m, config.range_max_m)
    aspect = np.deg2rad(rng.uniform(-config.aspect_max_deg, config.aspect_max_deg))
    count = rng.integers(config.scatterers_min, config.scatterers_max, endpoint=True)
    u = rng.uniform(-1, 1, count)                                                       # across the hand
    depth = rng.uniform(-1, 1, count) * config.hand_size_m / 4
    angle = aspect + np.arctan2(u * config.hand_size_m / 2, rest)                       # motion to line of sight, each
    drift = 1e-3 * config.drift_mm * np.sin(2 * np.pi * rng.uniform(*DRIFT_HZ) * t + rng.uniform(0, 2 * np.pi))
    along = np.outer(np.cos(angle), away.real) + np.outer(np.sin(angle), away.imag)
    ranges = rest + depth[:, None] + lever(u)[:, None] * along + drift

    # A tone of amplitude a stands at a^2; the noise in a bin at sum(w^2) / sum(w)^2, 1.5 / window for a Hann window w.
    bin_noise = 1.5 / window * (len(range_gate(config)) if config.waveform == "fmcw" else 1)
    amplitudes = rng.rayleigh(size=count)
    middle = math.sqrt(config.range_min_m * config.range_max_m)
    level = 10 ** (config.snr_db / 10) * bin_noise * (middle / rest) ** 4               # the radar equation
    amplitudes *= np.sqrt(level / np.sum(amplitudes ** 2))
    clutter = math.sqrt(10 ** ((config.clutter_db + rng.uniform(-3, 3)) / 10) * bin_noise)
    place = rng.uniform(config.range_min_m, config.range_max_m)
    return np.vstack([ranges, np.full(samples, place)]), np.append(amplitudes, clutter)


def receive(ranges, amplitudes, config, rng=None):
    """Return the slow-time samples [G x T] (complex) of scatterers at `ranges` [S x T] metres with `amplitudes` [S].

    G is 1 for a continuous wave, the number of gated range bins for FMCW (a sweep is taken to be so short that nothing
    moves in it). With a generator `rng`, white complex noise of power 1 per sample and bin is added.
    """
    samples = ranges.shape[1]
    echoes = amplitudes[:, None] * np.exp(4j * np.pi / wavelength_m(config) * ranges)
    if config.waveform == "cw":
        received = echoes.sum(axis=0, keepdims=True)
        return received if rng is None else received + _noise(received.shape, rng)

    # Sample n of N in a sweep is taken at the frequency carrier + bandwidth (n / N - 1/2).
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
    taper /= np.linalg.norm(taper) * math.sqrt(count)       # a scatterer has a^2 over all bins, noise 1 in each
    return np.fft.fft(sweeps * taper[:, None], axis=0)[range_gate(config)]


def _noise(shape, rng):
    return rng.standard_normal((*shape, 2)).view(complex)[..., 0] * math.sqrt(0.5)


def spectrogram_db(received, config):
    """Return dB over the mean noise power, [rows x columns], of slow-time samples [G x T]; row 0: highest frequency.

    Row r stands for the Doppler frequency ((rows - 1) // 2 - r) prf / rows, column k for the window that starts at
    pulse k * hop. The power of all G bins is added up.
    """
    from scipy.signal import stft

    window, hop, _ = sampling(config)
    rows, _ = parse_size(config.image_size)
    _, _, bins = stft(received, window="hann", nperseg=window, noverlap=window - hop, nfft=rows,
                      boundary=None, padded=False, return_onesided=False, scaling="spectrum")
    power = np.fft.fftshift((bins.real ** 2 + bins.imag ** 2).sum(axis=0), axes=0)[::-1]
    floor = len(received) * 1.5 / window
    return 10 * np.log10(np.maximum(power / floor, 1e-12))


def simulate(motion, split, index, config):
    """Return picture `index` of a motion in "train" or "val", uint8 [rows x columns]."""
    key = [config.seed, SPLITS.index(split), int.from_bytes(motion.encode(), "big"), index]
    rng = np.random.Generator(np.random.PCG64(key))
    decibels = spectrogram_db(receive(*draw_hand(motion, config, rng), config, rng), config)
    return np.rint(np.clip(decibels / config.dynamic_range_db, 0, 1) * 255).astype(np.uint8)


def write_dataset(config):
    """Write `config.out_dir`: train/ and val/ with <class>_<index>.png, and dataset.json; return how many pictures.

    A folder that holds this very data set is left as it is (0 is returned); one that an interrupted call left is
    finished. Each of train/ and val/ appears when it is whole. ValueError for a folder with anything else in it, and
    for parameters that do not go together; OSError where the folder cannot be written.
    """
    from tqdm import tqdm

    validate(config)
    if not config.out_dir:
        raise ValueError("no folder given; set --out_dir")
    folder = files.require_writable_folder(config.out_dir, "--out_dir")
    _claim(folder, config)
    names = {split: [f"{motion}_{i:05d}.png" for motion in class_names(config) for i in range(count)]
             for split, count in zip(SPLITS, (config.num_train, config.num_val)) if count}
    wanted = {split: pictures for split, pictures in names.items() if not _is_complete(folder / split, pictures)}
    staging = folder / STAGING
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with tqdm(total=sum(map(len, wanted.values())), desc="simulating", unit="picture", disable=None) as progress:
            for split, pictures in wanted.items():
                for name in pictures:
                    motion, index = name.removesuffix(".png").split("_")
                    with files.atomic_path(staging / split / name) as part:
                        Image.fromarray(simulate(motion, split, int(index), config)).save(part, format="PNG")
                    progress.update()
                os.replace(staging / split, folder / split)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return sum(map(len, wanted.values()))


def _claim(folder, config):
    """Write dataset.json into an empty folder, or check that the one that is there tells of the same data set."""
    record = _record(config)
    if (folder / METADATA_FILE).exists():
        try:
            held = json.loads((folder / METADATA_FILE).read_text())
            held = {"simulation": held["simulation"], **held["parameters"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder / METADATA_FILE} is not the record of a simulated data set; "
                             "give --out_dir another folder") from error
        asked = {"simulation": SIMULATION, **record["parameters"]}
        differing = [f"{key} is {held.get(key)} there and {asked.get(key)} here" for key in {**asked, **held}
                     if held.get(key) != asked.get(key)]
        if differing:
            raise ValueError(f"{folder} holds another data set ({'; '.join(differing)}); give --out_dir another folder")
        return
    others = sorted(path.name for path in folder.iterdir() if path.name != STAGING)
    if others:
        names = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise ValueError(f"{folder} holds other data ({names}) and no {METADATA_FILE}; give --out_dir a new or empty folder")
    files.write_json(folder / METADATA_FILE, record)


def _record(config):
    parameters = {name: value for name, value in as_dict(config).items() if name != "out_dir"}
    window, hop, samples = sampling(config)
    rows, columns = parse_size(config.image_size)
    return {
        "simulation": SIMULATION,
        "parameters": parameters,
        "classes": {name: MOTIONS[name][2] for name in class_names(config)},
        "picture": {
            "rows": rows, "columns": columns,
            "window_samples": window, "hop_samples": hop, "recording_samples": samples,
            "wavelength_m": wavelength_m(config), "row_hz": config.prf_hz / rows,
            "row_mps": config.prf_hz / rows * wavelength_m(config) / 2, "column_s": hop / config.prf_hz,
            "zero_doppler_row": (rows - 1) // 2,
            "grey": f"0 is the mean noise power, 255 is {config.dynamic_range_db:g} dB above it",
            "doppler": "row 0 is the highest frequency; motion towards the sensor is negative (lower half)",
        },
    }


def _is_complete(folder, names):
    """Tell whether `folder` holds exactly the pictures `names`; ValueError where it holds some, or others."""
    if not folder.exists():
        return False
    held = {path.name for path in folder.iterdir()}
    if held != set(names):
        raise ValueError(f"{folder} holds {len(held & set(names))} of its {len(names)} pictures and "
                         f"{len(held - set(names))} other files; delete that folder to have it made again, "
                         "or give --out_dir another one")
    return True
