"""Axes and scale of spectrograms: which Doppler frequency, time and level in dB a pixel stands for."""

import contextlib
import math
import os
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np

from ..config import decibels, format_shape, option, require
from ..files import read_record

AXES_FILE, SIMULATION_FILE = "spectrogram.json", "dataset.json"     # beside the images, or in the folder above
SIGNS = "positive", "negative"


@dataclass
class SpectrogramConfig:
    """Axes and scale of spectrograms whose data do not record them."""

    SECTION = "spectrogram"

    doppler_hz: float = option(0.0, "range of the Doppler axis in Hz, rows times their spacing: of two-sided spectra "
                                    "the sample rate (PRF); 0: as the data record it", minimum=0)
    frame_s: float = option(0.0, "duration of a frame, which is one column, in s: the hop of the transform; 0: as the "
                                 "data record it", minimum=0)
    zero_row: int = option(-1, "row of zero Doppler, counted from 0 at the top; -1: as the data record it, else "
                               "(rows - 1) // 2", minimum=-1)
    first_row: str = option("", "sign of the Doppler frequency in row 0, the top; empty: as the data record it, else "
                                "positive", choices=("", *SIGNS))
    db_range: float = option(0.0, "dB between pixel values 0 and 1; 0: as the data record it", minimum=0)
    db_floor: Annotated[str, decibels] = option(
        "", "level in dB of pixel value 0; empty: as the data record it, else 0")


@dataclass(frozen=True)
class SpectrogramAxes:
    """Doppler axis, time axis and scale of spectrograms [rows x columns]; None where unknown.

    Row r is the frequency (zero_row - r) row_hz, with `first_row` negative (r - zero_row) row_hz. Column k is the time
    k column_s. Value v in [0, 1] is the level db_floor + v db_range.
    """

    rows: int
    columns: int
    row_hz: float | None = None
    column_s: float | None = None
    zero_row: int | None = None
    first_row: str = "positive"
    db_floor: float = 0.0
    db_range: float | None = None

    @property
    def doppler(self):
        """Doppler frequency of each row in Hz, float64 [rows]."""
        below = self.row_hz * (self.zero_row - np.arange(self.rows))
        return below if self.first_row == "positive" else -below

    @property
    def seconds(self):
        """Time of each column in s, float64 [columns]."""
        return self.column_s * np.arange(self.columns)

    def to_db(self, values):
        """Return levels in dB of values in [0, 1], float32.  [...] -> same"""
        return np.asarray(self.db_floor + values * self.db_range, np.float32)

    def to_dict(self):
        """Return a JSON-able dictionary, the "image" entry of `AXES_FILE` and "spectrogram" of headers."""
        return asdict(self)


def find_axes(folder: str, sides) -> tuple[dict, str]:
    """Return (axes that local images state, as `SpectrogramAxes.to_dict`, or {}; a note for the log or "").

    They are in `AXES_FILE` of `make_spectrograms.py` or `SIMULATION_FILE` of `make_microdoppler.py`, in the folder or
    the one above.

    :param sides: (height, width) at which images are read; axes of another size do not apply.
    :raises ValueError: if `AXES_FILE` is corrupt.
    """
    folder = os.path.abspath(folder) if "://" not in folder else ""
    paths = [os.path.join(place, name) for place in (folder, os.path.dirname(folder))
             for name in (AXES_FILE, SIMULATION_FILE)] if folder else []
    for path in filter(os.path.isfile, paths):
        axes = _read_axes(path)
        if axes and (axes["rows"], axes["columns"]) == tuple(sides):
            return axes, ""
        if axes:
            return {}, (f"{path} describes spectrograms of {axes['rows']}x{axes['columns']}, which are read as "
                        f"{format_shape(sides)}: their axes are not recorded")
    return {}, ""


def find_simulation(folder: str) -> str:
    """Return the path of the `SIMULATION_FILE` of simulated images, in their folder or the one above; "" if none."""
    folder = os.path.abspath(folder)
    for path in (os.path.join(place, SIMULATION_FILE) for place in (folder, os.path.dirname(folder))):
        with contextlib.suppress(OSError, ValueError):      # label files of other programs have this name, too
            if "simulation" in read_record(path):
                return path
    return ""


def _read_axes(path):
    simulated = os.path.basename(path) == SIMULATION_FILE
    try:
        record = read_record(path)
    except ValueError:
        if simulated:       # label files of other programs have this name, too
            return {}
        raise
    image, parameters = record.get("image"), record.get("parameters", {})
    if simulated and ("simulation" not in record or not image):
        return {}
    try:
        axes = image if not simulated else {
            **{name: image[name] for name in ("rows", "columns", "row_hz", "column_s")},
            "zero_row": image["zero_doppler_row"], "db_range": parameters["dynamic_range_db"]}
        return SpectrogramAxes(**axes).to_dict()
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe the axes of spectrograms ({error}); remove it, or create the "
                         "dataset again") from error


# Flags of a `SpectrogramConfig` and what they are, for messages.
_FLAGS = {"doppler_hz": "range of the Doppler axis in Hz", "frame_s": "duration of a column in s",
          "zero_row": "row of zero Doppler", "first_row": "sign of Doppler in row 0",
          "db_range": "dB between pixel values 0 and 1", "db_floor": "level in dB of pixel value 0"}


def resolve_axes(config: SpectrogramConfig, recorded: dict, sides, source: str = "the data",
                 required=("doppler_hz", "frame_s", "db_range")) -> SpectrogramAxes:
    """Return the axes of spectrograms of size `sides` (rows, columns): what is recorded, else what flags state.

    :param recorded: what `find_axes` returns for the data, or a header has; {} if nothing is known.
    :param source: what has recorded them, for messages.
    :param required: flags that must be set if nothing is recorded.
    :raises ValueError: if a flag contradicts what is recorded, a required one is not set, or zero Doppler is outside.
    """
    rows, columns = sides
    known = {**recorded, "doppler_hz": recorded.get("row_hz") and recorded["row_hz"] * rows,
             "frame_s": recorded.get("column_s")}
    given = {"doppler_hz": config.doppler_hz or None, "frame_s": config.frame_s or None,
             "zero_row": None if config.zero_row < 0 else config.zero_row, "first_row": config.first_row or None,
             "db_range": config.db_range or None, "db_floor": decibels.parse(config.db_floor, "db_floor")}
    found = {"zero_row": (rows - 1) // 2, "first_row": "positive", "db_floor": 0.0}
    for flag, meaning in _FLAGS.items():
        stated, value = known.get(flag), given[flag]
        same = value == stated or flag not in ("first_row", "zero_row") and math.isclose(value or 0, stated or 0)
        require((None in (stated, value) or same, f"--{flag} {value} conflicts with {source}: expected {stated}, the "
                                                  f"{meaning}; omit the flag"),
                (stated is not None or value is not None or flag not in required,
                 f"--{flag} is not set, and {source} does not record it: expected the {meaning}"))
        found[flag] = next((each for each in (stated, value, found.get(flag)) if each is not None), None)
    require((0 <= found["zero_row"] < rows, f"--zero_row {found['zero_row']}: expected a row of images of {rows} rows"))
    return SpectrogramAxes(rows, columns, found["doppler_hz"] and found["doppler_hz"] / rows, found["frame_s"],
                           *(found[name] for name in ("zero_row", "first_row", "db_floor", "db_range")))
