"""Log numbers, images and messages of a run to the terminal, text files, TensorBoard and Weights & Biases.

Functions and files are named as in guided-diffusion's logger. Numbers may be tensors: they stay on their device until
`dumpkvs`, so that logging a loss at every step does not synchronize the GPU.
"""

import contextlib
import csv
import datetime
import functools
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator
from numbers import Number
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from . import dist_util
from .files import atomic_path

DEBUG, INFO, WARN, ERROR, DISABLED = 10, 20, 30, 40, 50
HISTOGRAM_VALUES = 2**16  # at most about this many elements are read from the device
MAX_WARNINGS = 100      # that a Logger keeps
_quiet = False          # inside of `quiet`


class KVWriter:
    """Interface of formats that write rows of numbers."""

    name = "custom"     # for messages: the key in FORMATS

    def writekvs(self, kvs):
        """Write one row, {name: number or text}."""
        raise NotImplementedError


class SeqWriter:
    """Interface of formats that write messages."""

    name = "custom"

    def writeseq(self, seq):
        """Write one message, a sequence of strings, on a line."""
        raise NotImplementedError


class MediaWriter:
    """Interface of formats that show images and histograms."""

    name = "custom"

    def writeimage(self, key, image, step):
        """Write a PIL image."""
        raise NotImplementedError

    def writehistogram(self, key, values, step):
        """Write the histogram of a float array [N]."""
        raise NotImplementedError


class HumanOutputFormat(KVWriter, SeqWriter):
    """Readable tables and messages, appended to a file or written to an open stream."""

    def __init__(self, filename_or_file):
        self._own = not hasattr(filename_or_file, "write")
        self._stream = open(filename_or_file, "a", encoding="utf-8") if self._own else filename_or_file
        self._is_stdout = filename_or_file is sys.stdout
        self.name = "log" if self._own else "stdout"

    def _write(self, text):
        # sys.stdout is looked up at each write: it may have been redirected since (contextlib, pytest).
        stream = sys.stdout if self._is_stdout else self._stream
        encoding = getattr(stream, "encoding", None) or "utf-8"     # names with other letters must not end a run
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()

    def writekvs(self, kvs):
        """Write a table with one line per name, sorted by name."""
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
        """Close the file unless it was opened by the caller."""
        if self._own:
            self._stream.close()


class JSONOutputFormat(KVWriter):
    """JSON lines, one object per row; with `resume_step` an existing file is continued after that step."""

    name = "json"

    def __init__(self, filename, resume_step=None):
        if resume_step is not None and os.path.exists(filename):
            lines = [line for line in _complete_lines(filename) if _before(json.loads(line).get("step"), resume_step)]
            with atomic_path(filename) as part:
                part.write_text("".join(lines), "utf-8")
        self._stream = open(filename, "w" if resume_step is None else "a", encoding="utf-8")

    def writekvs(self, kvs):
        """Append one line."""
        self._stream.write(json.dumps({key: _plain(value) for key, value in sorted(kvs.items())}) + "\n")
        self._stream.flush()

    def close(self):
        """Close the file."""
        self._stream.close()


class CSVOutputFormat(KVWriter):
    """CSV table, one line per row under a header that is extended by new names.

    With `resume_step` an existing file is continued. Rows of later steps, which the resumed run writes again, and a
    truncated last row are removed.
    """

    name = "csv"

    def __init__(self, filename, resume_step=None):
        self._path = Path(filename)
        self._columns = []
        if resume_step is not None and self._path.exists():
            rows = [row for row in csv.reader(_complete_lines(self._path)) if row]
            header, rows = (rows[0], rows[1:]) if rows else ([], [])
            column = header.index("step") if "step" in header else None
            self._rewrite(header, [row for row in rows if column is None or _before(row[column], resume_step)])
        else:
            self._stream = open(self._path, "w", newline="", encoding="utf-8")

    def writekvs(self, kvs):
        """Append one row; columns without a value stay empty."""
        new = sorted(set(kvs) - set(self._columns))
        if new:
            self._stream.close()
            with open(self._path, newline="", encoding="utf-8") as stream:
                rows = list(csv.reader(stream))[1:]
            self._rewrite(self._columns + new, rows)
        row = [_plain(kvs.get(column)) for column in self._columns]
        csv.writer(self._stream, lineterminator="\n").writerow(row)
        self._stream.flush()

    def _rewrite(self, columns, rows):
        """Replace the file by these rows, padded to the width of the header, and open it for appending."""
        with atomic_path(self._path) as part, open(part, "w", newline="", encoding="utf-8") as stream:
            table = csv.writer(stream, lineterminator="\n")
            table.writerows([columns] * bool(columns))
            table.writerows(row + [""] * (len(columns) - len(row)) for row in rows)
        self._columns = columns
        self._stream = open(self._path, "a", newline="", encoding="utf-8")

    def close(self):
        """Close the file."""
        self._stream.close()


class TensorBoardOutputFormat(KVWriter, MediaWriter):
    """TensorBoard event file in `dir`; scalars are written at the value of "step", else by row number."""

    name = "tensorboard"

    def __init__(self, dir, resume_step=None):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError("log format tensorboard requires the package tensorboard; install it or remove the "
                              "format from OPENAI_LOG_FORMAT or --log_formats") from error
        # Opened with the first row or image: opening writes the event that hides steps after `purge_step`, and a run
        # that ends before its first row must not hide those of its predecessor.
        purge_step = None if resume_step is None else resume_step + 1
        self._make = lambda: SummaryWriter(dir, purge_step=purge_step)
        self._dir, self._dumps, self._writer = dir, 0, None

    def _open(self):
        os.stat(self._dir)  # raises if it was removed: the thread of tensorboard would print a traceback
        self._writer = self._writer or self._make()
        return self._writer

    def writekvs(self, kvs):
        """Write the numbers in `kvs`; text is skipped."""
        self._dumps += 1
        step = int(kvs.get("step", self._dumps))
        writer = self._open()
        for key, value in kvs.items():
            if isinstance(value, Number):
                writer.add_scalar(key, value, step)
        writer.flush()

    def writeimage(self, key, image, step):
        """Write a PIL image."""
        self._open().add_image(key, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def writehistogram(self, key, values, step):
        """Write the histogram of an array [N]."""
        self._open().add_histogram(key, values, step)

    def close(self):
        """Close the event file."""
        if self._writer:
            self._writer.close()


class WandbOutputFormat(KVWriter, MediaWriter):
    """Run of Weights & Biases with its files in `dir`/wandb; its variables apply, such as WANDB_MODE=offline.

    It is started with the first row or image, once: without a connection, each attempt may take minutes. Its id is
    in `dir`/wandb_id.txt. With `resume_step` the run of that id is continued.
    """

    name = "wandb"

    def __init__(self, dir, resume_step=None):
        try:
            import wandb
        except ImportError as error:
            raise ImportError(f"log format wandb requires the package wandb ({error}): pip install "
                              "'guided-diffusion-vae[wandb]', or remove the format from OPENAI_LOG_FORMAT or "
                              "--log_formats") from error
        self._package, self._dir, self._continues = wandb, Path(dir), resume_step is not None
        self._run, self._attempted, self._dumps = None, False, 0

    def _start(self):
        if self._attempted:
            raise ConnectionError("it could not be started before")
        self._attempted = True
        id_file, config_file = self._dir / "wandb_id.txt", self._dir / "config.json"
        run_id = id_file.read_text("utf-8").strip() if self._continues and id_file.exists() else None
        run = self._package.init(
            dir=str(self._dir), name=self._dir.name, id=run_id, resume="allow" if run_id else None,
            config=json.loads(config_file.read_bytes()).get("flags") if config_file.exists() else None,
            settings=self._package.Settings(console="off"),     # log.txt has the messages
        )
        with atomic_path(id_file) as part:
            part.write_text(run.id + "\n", "utf-8")
        # Its own counter of rows only increases; a resumed run writes the rows after its checkpoint again.
        run.define_metric("*", step_metric="step")
        return run

    def _log(self, content, step):
        self._run = self._run or self._start()
        self._run.log({**content, "step": step})

    def writekvs(self, kvs):
        """Write the numbers in `kvs`; text is skipped."""
        self._dumps += 1
        step = int(kvs.get("step", self._dumps))
        self._log({key: value for key, value in kvs.items() if isinstance(value, Number)}, step)

    def writeimage(self, key, image, step):
        """Write a PIL image."""
        self._log({key: self._package.Image(image)}, step)

    def writehistogram(self, key, values, step):
        """Write the histogram of an array [N]."""
        self._log({key: self._package.Histogram(values)}, step)

    def close(self):
        """End the run; online, this waits until all is sent."""
        if self._run:
            self._run.finish()


class _LazyWriter(KVWriter):
    """Writer that is created with its first row: a command that fails before changes no file."""

    def __init__(self, name, make):
        self.name, self._make, self._writer = name, make, None

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
    "wandb": lambda folder, suffix, resume_step: WandbOutputFormat(folder, resume_step),
}


def make_output_format(format, ev_dir, log_suffix="", resume_step=None):
    """Return a writer of the given format into `ev_dir`, which is created if it does not exist.

    :raises ValueError: if `format` is not a key of FORMATS.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown log format {format!r}: expected one of: {', '.join(FORMATS)}; "
                         "check --log_formats, OPENAI_LOG_FORMAT or format_strs")
    os.makedirs(ev_dir, exist_ok=True)
    return FORMATS[format](ev_dir, log_suffix, resume_step)


def _complete_lines(filename):
    """Return the lines of a file without a truncated last one, which a killed process may leave."""
    with open(filename, newline="", encoding="utf-8") as stream:
        return [line for line in stream if line.endswith("\n")]


def _before(step, resume_step):
    try:
        return float(step) <= resume_step
    except (TypeError, ValueError):
        return True     # a row without a step is not written again by the resumed run


def _plain(value):
    """Return a value that JSON and CSV can represent: NumPy scalars and tensors become Python numbers."""
    return value.item() if hasattr(value, "item") else value


def _format_value(value):
    value = _plain(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_MEAN = object()    # marks the pairs (value, weight) of a mean among pending values


class Logger:
    """Numbers of the current row, and the formats that rows and messages are written to.

    If `dist_util.setup_dist` has connected several ranks, all of them must call `dumpkvs`, which averages over ranks.

    :param comm: False to keep the numbers of each rank separate; other values mean all ranks.
    """

    DEFAULT = None      # used before configure(): the terminal only
    CURRENT = None

    def __init__(self, dir, output_formats, comm=None):
        self._pending_values = {}   # {name: ([(value, weight), ...], _MEAN)}, or {name: (value, None)} if set by logkv
        self.level = INFO
        self.dir = dir
        self.output_formats = output_formats
        self.comm = comm
        self.warnings = []      # the first MAX_WARNINGS messages of level WARN or above
        self._failed = set()    # output formats whose failure is reported

    def logkv(self, key, val):
        """Set a number or text, replacing the previous value of this name."""
        self._pending_values[key] = _detached(key, val), None

    def logkv_mean(self, key, val, weight=1):
        """Add a number to the weighted mean of this name since the last dump.

        Tensors are kept and read at the dump, without synchronizing the device before. They must not be modified until
        then: log a result, not a buffer that the next step overwrites.

        :param val: a number or a tensor of one element.
        :param weight: a number or a tensor of one element, may be 0; a name of total weight 0 is omitted from the row.
        """
        pairs, kind = self._pending_values.get(key, (None, None))
        if kind is not _MEAN:   # the first value, or one set by logkv, which does not count toward the mean
            pairs = []
            self._pending_values[key] = pairs, _MEAN
        pairs.append((_detached(key, val), _detached(key, weight)))

    def add(self, key, val):
        """Add a number to the sum of this name since the last dump."""
        total, kind = self._pending_values.get(key, (0.0, None))
        self._pending_values[key] = (0.0 if kind is _MEAN else total) + val, None

    def getkvs(self):
        """Return the current row of this rank as plain numbers; synchronizes the device."""
        return {key: value for key, (value, _) in self._means().items()}

    def _means(self):
        """Return {name: (mean, weight)} of this rank as plain numbers."""
        means = {}
        for key, (content, kind) in self._pending_values.items():
            if kind is not _MEAN:
                means[key] = _plain(content), 1
                continue
            values, weights = (_read([pair[i] for pair in content]) for i in (0, 1))
            if weights.sum():
                means[key] = float((values * weights).sum() / weights.sum()), float(weights.sum())
        return means

    def dumpkvs(self):
        """Write the current row, its means weighted over ranks, clear it, and return it."""
        kvs = self._average_over_ranks(self._means())
        self._pending_values = {}
        if self.level != DISABLED:
            for out in self.output_formats:
                if isinstance(out, KVWriter):
                    self._attempt(out, "writekvs", kvs)
        return kvs

    def _average_over_ranks(self, means):
        distributed = self.comm is not False and dist.is_initialized()
        pairs_by_name = {}  # ranks may have logged different names
        for rank_means in dist_util.gather_objects(means) if distributed else [means]:
            for key, pair in rank_means.items():
                pairs_by_name.setdefault(key, []).append(pair)
        return {key: _weighted_mean(pairs) for key, pairs in pairs_by_name.items()}

    def log(self, *args, level=INFO):
        """Write a message unless its level is below the logger's."""
        if level >= WARN and len(self.warnings) < MAX_WARNINGS:
            self.warnings.append(" ".join(map(str, args)))
        if level >= WARN and _quiet:
            warnings.warn(" ".join(map(str, args)), stacklevel=3)
        if level >= self.level:
            for out in self.output_formats:
                if isinstance(out, SeqWriter):
                    self._attempt(out, "writeseq", [str(arg) for arg in args])

    def logimage(self, key, image, step):
        """Write a PIL image of this step at once, to the formats that show images."""
        for out in self._media_outputs():
            self._attempt(out, "writeimage", key, image, step)

    def loghistogram(self, key, tensors, step):
        """Write the histogram of the elements of tensors at once, to the formats that show histograms.

        Of many elements evenly spaced ones are read, about HISTOGRAM_VALUES; this synchronizes the device.
        """
        outputs, tensors = self._media_outputs(), list(tensors)
        count = sum(tensor.numel() for tensor in tensors)
        if not outputs or not count:
            return
        stride = -(-count // HISTOGRAM_VALUES)
        values = torch.cat([tensor.detach().flatten()[::stride].float() for tensor in tensors]).cpu().numpy()
        for out in outputs:
            self._attempt(out, "writehistogram", key, values, step)

    def _media_outputs(self):
        shown = self.output_formats if self.level != DISABLED else ()
        return [out for out in shown if isinstance(out, MediaWriter)]

    def set_level(self, level):
        """Write only messages of this level and above; DISABLED suppresses rows of numbers, too."""
        self.level = level

    def set_comm(self, comm):
        """Set whether dumps average over ranks: False disables it."""
        self.comm = comm

    def get_dir(self):
        """Return the run folder, None before configure()."""
        return self.dir

    def close(self):
        """Close all files."""
        for out in self.output_formats:
            self._attempt(out, "close")

    def _attempt(self, out, method, *content):
        """Call a method of an output format. The first failure is reported by the others: a log does not end a run."""
        try:
            getattr(out, method)(*content)
        except Exception as error:
            if out in self._failed:
                return
            self._failed.add(out)
            text = (f"log format {out.name} cannot be written to {self.dir} ({type(error).__name__}: {error}); the run "
                    "continues without these lines, and later failures are not reported: free some space or check the "
                    "folder, or remove the format from OPENAI_LOG_FORMAT or --log_formats")
            others = [other for other in self.output_formats if isinstance(other, SeqWriter) and other is not out]
            for other in others:
                self._attempt(other, "writeseq", [text])
            if not others:
                print(text, file=sys.stderr, flush=True)


def _detached(key, val):
    """Return a tensor of one element as a scalar without its graph, other values unchanged."""
    if not isinstance(val, torch.Tensor):
        return val
    if val.numel() != 1:
        raise ValueError(f"{key!r}: expected a tensor of one element, got shape {tuple(val.shape)}; "
                         "log a number, e.g. its mean()")
    return val.detach().reshape(())


def _read(numbers):
    """Return numbers and scalar tensors as a float64 array, with a single copy from the device."""
    tensors = [n for n in numbers if isinstance(n, torch.Tensor)]
    values = iter(torch.stack([t.double() for t in tensors]).tolist() if tensors else ())
    return np.array([next(values) if isinstance(n, torch.Tensor) else n for n in numbers], np.float64)


def _weighted_mean(pairs):
    """Return the weighted mean of (value, weight) pairs, the first value if all are equal or not numbers."""
    first = pairs[0][0]     # equal values stay as they are: a step count remains an integer
    if all(value == first for value, _ in pairs) or not all(isinstance(value, Number) for value, _ in pairs):
        return first
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def get_current():
    """Return the current logger; before configure() one that writes to the terminal only."""
    if Logger.CURRENT is None:
        Logger.DEFAULT = Logger.DEFAULT or Logger(None, [HumanOutputFormat(sys.stdout)])
        Logger.CURRENT = Logger.DEFAULT
    return Logger.CURRENT


def logkv(key, val):
    """Set a number of the current row, replacing the previous value; see `Logger.logkv`."""
    get_current().logkv(key, val)


record_tabular = logkv


def logkv_mean(key, val, weight=1):
    """Add a number to a weighted mean of the current row; see `Logger.logkv_mean`."""
    get_current().logkv_mean(key, val, weight)


def logkvs(d):
    """Set several numbers of the current row."""
    for key, val in d.items():
        logkv(key, val)


def dumpkvs():
    """Write the current row, averaged over ranks, and return it; all ranks must call this."""
    return get_current().dumpkvs()


dump_tabular = dumpkvs


def getkvs():
    """Return the current row of this rank as plain numbers."""
    return get_current().getkvs()


def logimage(key, image, step):
    """Write a PIL image of this step; see `Logger.logimage`."""
    get_current().logimage(key, image, step)


def loghistogram(key, tensors, step):
    """Write a histogram of the elements of tensors; see `Logger.loghistogram`."""
    get_current().loghistogram(key, tensors, step)


def log(*args, level=INFO):
    """Write a message of this level, its parts joined by spaces."""
    get_current().log(*args, level=level)


debug, info, warn, error = (functools.partial(log, level=level) for level in (DEBUG, INFO, WARN, ERROR))


def set_level(level):
    """Suppress messages below this level."""
    get_current().set_level(level)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Write nothing to the terminal inside the block: no messages, rows and progress bars. Warnings become Python's.

    Files of run folders are written as without it.
    """
    global _quiet
    before, _quiet = _quiet, True
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        _quiet = before


def set_comm(comm):
    """Set whether dumps average over ranks: False disables it."""
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
    """Return a decorator that adds the seconds spent in a function to `wait_<n>`."""
    def decorate(function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            with profile_kv(n):
                return function(*args, **kwargs)
        return timed
    return decorate


def configure(dir=None, format_strs=None, comm=None, log_suffix="", resume_step=None):
    """Start logging into a run folder, report it, and close the previous logger.

    :param dir: the folder; default $OPENAI_LOGDIR, else `runs/<script>-<date>`, the same on all ranks.
    :param format_strs: keys of FORMATS; default $OPENAI_LOG_FORMAT, else stdout,log,csv,tensorboard. Ranks other than 0
        only write log-rankNNN.txt, unless $OPENAI_LOG_FORMAT_MPI specifies other formats for them.
    :param comm: False to keep the numbers of each rank separate.
    :param log_suffix: inserted before the extension of log.txt and progress.*.
    :param resume_step: step after which existing progress files are continued; None overwrites them.
    :raises RuntimeError: if ranks are not connected and no folder is set.
    """
    logger = _build(dir, format_strs, comm, log_suffix, resume_step)
    _close_current()
    Logger.CURRENT = logger
    log(f"Logging to {logger.dir}")


def _build(dir, format_strs, comm, log_suffix="", resume_step=None):
    number = dist_util.rank()
    dir = os.path.expanduser(dir or os.environ.get("OPENAI_LOGDIR") or default_dir())
    if format_strs is None:
        names = (os.environ.get("OPENAI_LOG_FORMAT", "stdout,log,csv,tensorboard") if number == 0
                 else os.environ.get("OPENAI_LOG_FORMAT_MPI", "log"))
        format_strs = names.split(",")
    elif number:
        format_strs = [name for name in format_strs if name == "log"]
    if number:
        log_suffix += f"-rank{number:03d}"
    os.makedirs(dir, exist_ok=True)
    outputs = []
    for name in filter(None, format_strs):
        make = functools.partial(make_output_format, name, dir, log_suffix, resume_step)
        overwrites = name in ("csv", "json") and os.path.exists(os.path.join(dir, f"progress{log_suffix}.{name}"))
        outputs.append(_LazyWriter(name, make) if overwrites else make())
    return Logger(dir, outputs, comm)


def default_dir(script=""):
    """Create `runs/<script>-<date>` on rank 0, with the time of its clock, and return the path on all ranks.

    :param script: a name; empty: that of the file that Python runs.
    """
    if dist_util.world_size() > 1 and not dist.is_initialized():
        raise RuntimeError("ranks are not connected and cannot agree on a run folder; call dist_util.setup_dist() "
                           "before logger.configure(), or set --logdir or OPENAI_LOGDIR")
    folder = None
    if dist_util.rank() == 0:
        script = script or Path(sys.argv[0]).stem.strip("-") or "run"
        base = Path("runs", f"{script}-{datetime.datetime.now():%Y-%m-%d-%H-%M-%S}")
        folder, number = base, 1
        while True:
            try:
                folder.mkdir(parents=True)      # atomic: two runs never get the same folder
                break
            except FileExistsError:     # of a run that started within the same second
                number += 1
                folder = base.with_name(f"{base.name}-{number}")
    return str(dist_util.broadcast_object(folder))


def _close_current():
    if Logger.CURRENT is not None and Logger.CURRENT is not Logger.DEFAULT:
        Logger.CURRENT.close()
    Logger.CURRENT = None


def reset():
    """Close the current logger; later messages are written to the terminal only."""
    _close_current()
    get_current()


@contextlib.contextmanager
def suspend():
    """Keep the current logger open while others are configured inside the block, and return to it afterwards."""
    outer, Logger.CURRENT = Logger.CURRENT, None
    try:
        yield
    finally:
        _close_current()
        Logger.CURRENT = outer


@contextlib.contextmanager
def scoped_configure(dir=None, format_strs=None, comm=None, resume_step=None):
    """Log into another folder inside the block, with arguments as for `configure`."""
    inner = _build(dir, format_strs, comm, resume_step=resume_step)
    with suspend():
        Logger.CURRENT = inner
        yield


def log_rank0(text):
    """Log a message on rank 0; before configure() it is printed only."""
    if dist_util.rank() == 0:
        log(text)


def progress(items, description):
    """Return an iterator over items that shows a progress bar on rank 0."""
    from tqdm import tqdm

    return tqdm(items, desc=description, leave=False, mininterval=1, disable=_quiet or dist_util.rank() != 0)


def progress_bar(total, initial, description):
    """Return a tqdm bar with the remaining time, shown on rank 0 only.

    :param total: number of steps, None or infinity if unknown.
    :return: the bar, with a method `advance_to(done, total)` for progress callbacks.
    """
    from tqdm import tqdm

    total = None if total == math.inf else total
    disabled = _quiet or dist_util.rank() != 0
    bar = tqdm(total=total, initial=initial, desc=description, disable=disabled, dynamic_ncols=True, mininterval=1)

    def advance_to(done, total):
        bar.total = total
        bar.update(done - bar.n)

    bar.advance_to = advance_to
    return bar
