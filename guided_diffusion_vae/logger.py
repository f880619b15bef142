"""Collect named numbers during a run and write them, and messages, to terminal, files and TensorBoard.

Names, functions and files are those of the logger that guided-diffusion users know. Numbers may be tensors: they stay
on their device until `dumpkvs`, so that logging a loss at every step never waits for the GPU.
"""

import contextlib
import csv
import datetime
import functools
import json
import math
import os
import sys
import time
from numbers import Number
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from . import dist_util
from .files import atomic_path

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50


class KVWriter:
    """Take a dictionary of numbers at a time."""

    def writekvs(self, kvs):
        """Write one row of names and numbers."""
        raise NotImplementedError


class SeqWriter:
    """Take a message at a time."""

    def writeseq(self, seq):
        """Write the parts of one message on a line."""
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """Write tables and messages to read, to a file that is appended to or to an open stream."""

    def __init__(self, filename_or_file):
        self._own = not hasattr(filename_or_file, "write")
        self._stream = open(filename_or_file, "a") if self._own else filename_or_file
        self._is_stdout = filename_or_file is sys.stdout

    def _write(self, text):
        # sys.stdout is looked up anew, as it may have been redirected since.
        stream = sys.stdout if self._is_stdout else self._stream
        stream.write(text)
        stream.flush()

    def writekvs(self, kvs):
        """Write a table of one row a name, sorted by name."""
        cells = [(key, _format_value(kvs[key])) for key in sorted(kvs, key=str.lower)]
        if not cells:
            return
        left, right = (max(map(len, column)) for column in zip(*cells))
        rule = "-" * (left + right + 7)
        rows = [f"| {key:<{left}} | {value:<{right}} |" for key, value in cells]
        self._write("\n".join([rule, *rows, rule]) + "\n")

    def writeseq(self, seq):
        """Write a message on one line."""
        self._write(" ".join(seq) + "\n")

    def close(self):
        """Close the file if this opened it."""
        if self._own:
            self._stream.close()


class JSONOutputFormat(KVWriter):
    """Write one JSON object a line; with `resume_step`, go on after that step of a file that is there."""

    def __init__(self, filename, resume_step=None):
        if resume_step is not None and os.path.exists(filename):
            kept = [line for line in _complete_lines(filename) if _before(json.loads(line).get("step"), resume_step)]
            with atomic_path(filename) as part:
                part.write_text("".join(kept))
        self._stream = open(filename, "w" if resume_step is None else "a")

    def writekvs(self, kvs):
        """Append one line."""
        self._stream.write(json.dumps({key: _plain(value) for key, value in sorted(kvs.items())}) + "\n")
        self._stream.flush()

    def close(self):
        """Close the file."""
        self._stream.close()


class CSVOutputFormat(KVWriter):
    """Write one row a dump under a header that grows when a new name turns up.

    With `resume_step`, a file that is there is continued: rows of later steps, which the resumed run writes again, and
    a row that a kill cut short are dropped.
    """

    def __init__(self, filename, resume_step=None):
        self._path = Path(filename)
        self._columns = []
        if resume_step is not None and self._path.exists():
            rows = [row for row in csv.reader(_complete_lines(self._path)) if row]
            header, rows = (rows[0], rows[1:]) if rows else ([], [])
            at = header.index("step") if "step" in header else None
            self._rewrite(header, [row for row in rows if at is None or _before(row[at], resume_step)])
        else:
            self._stream = open(self._path, "w", newline="")

    def writekvs(self, kvs):
        """Append one row, empty in the columns that `kvs` lacks."""
        new = sorted(set(kvs) - set(self._columns))
        if new:
            self._stream.close()
            with open(self._path, newline="") as stream:
                rows = list(csv.reader(stream))[1:]
            self._rewrite(self._columns + new, rows)
        row = [_plain(kvs.get(column)) for column in self._columns]
        csv.writer(self._stream, lineterminator="\n").writerow(row)
        self._stream.flush()

    def _rewrite(self, columns, rows):
        """Replace the file by these rows, filled up to the width of the header, and leave it open at its end."""
        with atomic_path(self._path) as part, open(part, "w", newline="") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerows([columns] * bool(columns))
            table.writerows(row + [""] * (len(columns) - len(row)) for row in rows)
        self._columns = columns
        self._stream = open(self._path, "a", newline="")

    def close(self):
        """Close the file."""
        self._stream.close()


class TensorBoardOutputFormat(KVWriter):
    """Write scalars to an event file in `dir`, at the step named "step" among them, else counting dumps from 1."""

    def __init__(self, dir, resume_step=None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("the log format tensorboard needs the package tensorboard: pip install it, or leave "
                              "tensorboard out of OPENAI_LOG_FORMAT") from error
        # Opened with the first row: what hides the steps that a resumed run repeats is written on opening.
        purge_step = None if resume_step is None else resume_step + 1
        self._open = functools.cache(lambda: SummaryWriter(dir, purge_step=purge_step))
        self._dumps = 0

    def writekvs(self, kvs):
        """Write the numbers among `kvs`."""
        self._dumps += 1
        step = int(kvs.get("step", self._dumps))
        for key, value in kvs.items():
            if isinstance(value, Number):
                self._open().add_scalar(key, value, step)
        self._open().flush()

    def close(self):
        """Close the event file."""
        if self._dumps:
            self._open().close()


class _LazyWriter(KVWriter):
    """Open a file of curves that is there when a row is to be written: a command refused before leaves it as it is."""

    def __init__(self, make):
        self._make, self._writer = make, None

    def writekvs(self, kvs):
        self._writer = self._writer or self._make()
        self._writer.writekvs(kvs)

    def close(self):
        if self._writer:
            self._writer.close()


FORMATS = {
    "stdout": lambda folder, suffix, resume_step: HumanOutputFormat(sys.stdout),
    "log": lambda folder, suffix, resume_step: HumanOutputFormat(os.path.join(folder, f"log{suffix}.txt")),
    "json": lambda folder, suffix, resume_step: JSONOutputFormat(
        os.path.join(folder, f"progress{suffix}.json"), resume_step),
    "csv": lambda folder, suffix, resume_step: CSVOutputFormat(
        os.path.join(folder, f"progress{suffix}.csv"), resume_step),
    "tensorboard": lambda folder, suffix, resume_step: TensorBoardOutputFormat(str(folder), resume_step),
}


def make_output_format(format, ev_dir, log_suffix="", resume_step=None):
    """Return the writer called `format` (a key of FORMATS) that writes into `ev_dir`, which is made if need be."""
    if format not in FORMATS:
        raise ValueError(f"log format {format!r} is none of {', '.join(FORMATS)}; "
                         "check OPENAI_LOG_FORMAT or format_strs")
    os.makedirs(ev_dir, exist_ok=True)
    return FORMATS[format](ev_dir, log_suffix, resume_step)


def _complete_lines(filename):
    """Return the lines of a file that end in a newline: the last one may have been cut by a kill."""
    with open(filename, newline="") as stream:
        return [line for line in stream if line.endswith("\n")]


def _before(step, resume_step):
    try:
        return float(step) <= resume_step
    except (TypeError, ValueError):
        return True  # a row without a step cannot be repeated by the resumed run


def _plain(value):
    """Return a value as JSON and CSV hold it: numpy's scalars become Python's."""
    return value.item() if hasattr(value, "item") else value


def _format_value(value):
    value = _plain(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_MEAN = object()


class Logger:
    """Hold numbers between two dumps, and pass them and messages on to the output formats.

    With several ranks that `dist_util.setup_dist` has connected, `dumpkvs` is called on all of them and averages;
    `comm=False` keeps each rank's own numbers. Any other `comm` stands for all ranks.
    """

    DEFAULT = None  # what is used before configure(): the terminal alone
    CURRENT = None

    def __init__(self, dir, output_formats, comm=None):
        self._pending_values = {}  # name -> ([(value, weight), ...], _MEAN), or (value, None) where logkv has set it
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm

    def logkv(self, key, val):
        """Set a number or text, in place of what the name held."""
        self._pending_values[key] = _detached(key, val), None

    def logkv_mean(self, key, val, weight=1):
        """Add a number to the weighted mean of those logged under this name since the last dump.

        `weight` may be a tensor too, and 0; a name that has no weight at the dump is left out of it. Tensors are kept
        as they are and read at the dump, so that a step that does not log asks nothing of the device: log a result,
        not memory that the next step writes to.
        """
        pairs, weights = self._pending_values.get(key, (None, None))
        if weights is not _MEAN:  # nothing, or a value of logkv, which starts no mean
            pairs = []
            self._pending_values[key] = pairs, _MEAN
        pairs.append((_detached(key, val), _detached(key, weight)))

    def add(self, key, val):
        """Add a number to the sum under this name since the last dump."""
        held, kind = self._pending_values.get(key, (0.0, None))
        self._pending_values[key] = (0.0 if kind is _MEAN else held) + val, None

    def getkvs(self):
        """Return what is held as plain numbers, on this rank; waits for the device."""
        return {key: value for key, (value, _) in self._means().items()}

    def _means(self):
        """Return name -> (mean, weight), tensors read out."""
        means = {}
        for key, (held, kind) in self._pending_values.items():
            if kind is not _MEAN:
                means[key] = _plain(held), 1
                continue
            values, weights = (_read([pair[i] for pair in held]) for i in (0, 1))
            if weights.sum():
                means[key] = float((values * weights).sum() / weights.sum()), float(weights.sum())
        return means

    def dumpkvs(self):
        """Write what is held, averaged over ranks by their weights, start anew, and return it."""
        kvs = self._over_ranks(self._means())
        self._pending_values = {}
        if self.level != DISABLED:
            for out in self.output_formats:
                if isinstance(out, KVWriter):
                    out.writekvs(kvs)
        return kvs

    def _over_ranks(self, means):
        together = self.comm is not False and dist.is_initialized()
        gathered = dist_util.gather_objects(means) if together else [means]
        pooled = {}
        for means in gathered:
            for key, pair in means.items():
                pooled.setdefault(key, []).append(pair)
        return {key: _weighted_mean(pairs) for key, pairs in pooled.items()}

    def log(self, *args, level=INFO):
        """Write a message unless its level is below the logger's."""
        if level >= self.level:
            for out in self.output_formats:
                if isinstance(out, SeqWriter):
                    out.writeseq([str(arg) for arg in args])

    def set_level(self, level):
        """Write messages of this level and above; DISABLED writes nothing at all."""
        self.level = level

    def set_comm(self, comm):
        """Choose whether dumps average over ranks (anything but False)."""
        self.comm = comm

    def get_dir(self):
        """Return the run folder, None before configure()."""
        return self.dir

    def close(self):
        """Close all files."""
        for out in self.output_formats:
            out.close()


def _detached(key, val):
    if not isinstance(val, torch.Tensor):
        return val
    if val.numel() != 1:
        raise ValueError(f"{key!r} was logged as a tensor of shape {list(val.shape)}; "
                         "log one number, such as its mean()")
    return val.detach().reshape(())


def _read(numbers):
    """Return numbers and tensors of one element as a float64 array, read from their device at once."""
    tensors = [n for n in numbers if isinstance(n, torch.Tensor)]
    read = iter(torch.stack([t.double() for t in tensors]).tolist() if tensors else ())
    return np.array([next(read) if isinstance(n, torch.Tensor) else n for n in numbers], np.float64)


def _weighted_mean(pairs):
    """Return the mean of (value, weight); values that all agree, or that are no numbers, as the first one is."""
    first = pairs[0][0]
    if all(value == first for value, _ in pairs) or not all(isinstance(value, Number) for value, _ in pairs):
        return first
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def get_current():
    """Return the logger in use; before configure() one that writes to the terminal alone."""
    if Logger.CURRENT is None:
        Logger.DEFAULT = Logger.DEFAULT or Logger(None, [HumanOutputFormat(sys.stdout)])
        Logger.CURRENT = Logger.DEFAULT
    return Logger.CURRENT


def logkv(key, val):
    """Set a number of the current row; a tensor of one element is read at the dump."""
    get_current().logkv(key, val)


record_tabular = logkv


def logkv_mean(key, val, weight=1):
    """Add to the weighted mean under this name in the current row; tensors of one element are read at the dump."""
    get_current().logkv_mean(key, val, weight)


def logkvs(d):
    """Set several numbers of the current row."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs():
    """Write the current row, averaged over ranks (all of them call this), and return it."""
    return get_current().dumpkvs()


dump_tabular = dumpkvs


def getkvs():
    """Return the current row of this rank as plain numbers."""
    return get_current().getkvs()


def log(*args, level=INFO):
    """Write a message."""
    get_current().log(*args, level=level)


debug, info, warn, error = (functools.partial(log, level=level) for level in (DEBUG, INFO, WARN, ERROR))


def set_level(level):
    """Leave out messages below this level."""
    get_current().set_level(level)


def set_comm(comm):
    """Choose whether dumps average over ranks (anything but False)."""
    get_current().set_comm(comm)


def get_dir():
    """Return the run folder, None before configure()."""
    return get_current().get_dir()


@contextlib.contextmanager
def profile_kv(scopename):
    """Add the seconds spent in the block to `wait_<scopename>`."""
    start = time.perf_counter()
    try:
        yield
    finally:
        get_current().add(f"wait_{scopename}", time.perf_counter() - start)


def profile(n):
    """Decorate a function so that its seconds add up in `wait_<n>`."""
    def decorate(function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            with profile_kv(n):
                return function(*args, **kwargs)
        return timed
    return decorate


def configure(dir=None, format_strs=None, comm=None, log_suffix="", resume_step=None):
    """Start logging into a run folder and say which; closes the logger before.

    dir: the folder, else $OPENAI_LOGDIR, else runs/<script>-<date>, the same on all ranks.
    format_strs: keys of FORMATS, else $OPENAI_LOG_FORMAT, else stdout,log,csv,tensorboard. Ranks other than 0 write
    log-rankNNN.txt alone ($OPENAI_LOG_FORMAT_MPI names other formats for them).
    resume_step: continue the files that are there after this step; without it progress files start anew.
    """
    fresh = _build(dir, format_strs, comm, log_suffix, resume_step)
    _close_current()
    Logger.CURRENT = fresh
    log(f"Logging to {fresh.dir}")


def _build(dir, format_strs, comm, log_suffix="", resume_step=None):
    number = dist_util.rank()
    dir = os.path.expanduser(dir or os.environ.get("OPENAI_LOGDIR") or _default_dir())
    if format_strs is None:
        chosen = (os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv,tensorboard") if number == 0
                  else os.environ.get("OPENAI_LOG_FORMAT_MPI", "log"))
        format_strs = chosen.split(",")
    elif number:
        format_strs = [name for name in format_strs if name == "log"]
    if number:
        log_suffix += f"-rank{number:03d}"
    os.makedirs(dir, exist_ok=True)
    outputs = []
    for name in filter(None, format_strs):
        make = functools.partial(make_output_format, name, dir, log_suffix, resume_step)
        there = name in ("csv", "json") and os.path.exists(os.path.join(dir, f"progress{log_suffix}.{name}"))
        outputs.append(_LazyWriter(make) if there else make())
    return Logger(dir, outputs, comm)


def _default_dir():
    """Make runs/<script>-<date> on rank 0, whose clock names it, and return it on all."""
    if dist_util.world_size() > 1 and not dist.is_initialized():
        raise RuntimeError("ranks cannot agree on a run folder yet: call dist_util.setup_dist() before "
                           "logger.configure(), or give the folder (--logdir or OPENAI_LOGDIR)")
    folder = None
    if dist_util.rank() == 0:
        script = Path(sys.argv[0]).stem.strip("-") or "run"
        base = Path("runs", f"{script}-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S}")
        folder, another = base, 1
        while True:
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:  # a run that started within the same second
                another += 1
                folder = base.with_name(f"{base.name}-{another}")
    return str(dist_util.broadcast_object(folder))


def _close_current():
    if Logger.CURRENT is not None and Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
    Logger.CURRENT = None


def reset():
    """Close the current logger; from here on messages go to the terminal alone."""
    _close_current()
    get_current()


@contextlib.contextmanager
def scoped_configure(dir=None, format_strs=None, comm=None, resume_step=None):
    """Log into another folder inside the block; the arguments are those of `configure`."""
    outer, Logger.CURRENT = Logger.CURRENT, _build(dir, format_strs, comm, resume_step=resume_step)
    try:
        yield
    finally:
        _close_current()
        Logger.CURRENT = outer


def log_rank0(text):
    """Print on rank 0, and into the log where there is one."""
    if dist_util.rank() == 0:
        log(text)


def progress_bar(total, initial, what):
    """Return a tqdm bar with time left, on rank 0 only; its `advance_to(done, total)` suits progress callbacks."""
    from tqdm import tqdm

    total = None if total == math.inf else total
    elsewhere = dist_util.rank() != 0
    bar = tqdm(total=total, initial=initial, desc=what, disable=elsewhere, dynamic_ncols=True, mininterval=1)

    def advance_to(done, total):
        bar.total = total
        bar.update(done - bar.n)

    bar.advance_to = advance_to
    return bar
