"""One execution of a script: its configs, the flags that were set, its folder, log, header and report."""

import contextlib
import copy
import dataclasses
import datetime
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

from .. import __version__, dist_util, logger
from ..checkpoint_util import committed_steps
from ..config import as_dict, changed_fields, option, require, section_name
from ..data.config import DataConfig, recorded_options, take_recorded_options
from ..evaluation.report_page import COMMANDS_FILE, PAGE_FILE, read_commands, write_page
from ..files import read_record, remove_stale_parts, require_writable_folder, write_json, write_record
from ..locks import LOCK_FILE, locked_folder
from ..train_util import find_checkpoint, format_names
from .flags import argparser, find_config_flag, flag_names, from_python, parse_explicit
from .flags import drop_fields as drop_fields, select_fields as select_fields  # scripts take all they need from here


CONFIG_FILE = "config.json"
MAX_COMMANDS = 20   # that commands.json keeps
ENDINGS = SystemExit, dist_util.StoppedBySignal     # not errors: a check that has failed, and a training to be resumed
FIRST_FILES = re.compile(r"log(-rank\d+)?\.txt|progress(-rank\d+)?\.(csv|json)|commands\.json")   # before any result


@dataclasses.dataclass
class RunConfig:
    logdir: str = option("", "run folder; empty: $OPENAI_LOGDIR, else runs/<script>-<date>", essential=True)
    dry_run: bool = option(
        False, "print the resolved configuration, the data and the size of the model, then exit", essential=True)
    report: bool = option(True, "write report.html into the run folder at the end: configuration, curves, samples and "
                                "metrics on one page (requires plotly)")


class Run:
    """Configs of one execution by class (`run[DataConfig]`), the flags that were set, and its folder.

    :param script: name of the script, recorded in config.json.
    :param configs: config instances; a config is found by its class or a base class.
    :param explicit: {flag: value} of the flags set in YAML or on the command line. Fields of `configs` that differ from
        their defaults are set, too. The data, a checkpoint or a cache may replace a default; an explicit value that
        conflicts with them is an error.
    :param folder: folder of the run, None for scripts and dry runs without one.
    :param checkpoint: (marker, folder) of the verified step to resume from, (None, None) if training starts.
    :param flags: names of the flags of the script, None if all fields of the configs are flags.
    :param config_file: YAML file of --config, which may have sections of other scripts, "" if there is none.
    """

    def __init__(self, script, configs, explicit=(), folder=None, checkpoint=(None, None), flags=None, config_file=""):
        self.script, self.configs, self.explicit = script, tuple(configs), dict(explicit)
        for config in filter(dataclasses.is_dataclass, self.configs):
            self.explicit = {**changed_fields(config), **self.explicit}
        self.folder, self.checkpoint, self.flags, self.config_file = folder, checkpoint, flags, config_file
        self.record = {}    # of the command, in commands.json; shared by the copies
        self.created = []   # the folder and its parents that `open_folder` has created

    def __getitem__(self, cls):
        for config in self.configs:
            if isinstance(config, cls):
                return config
        raise KeyError(f"{self.script} has no {cls.__name__}")

    def __contains__(self, cls):
        return any(isinstance(config, cls) for config in self.configs)

    def setting(self, name):
        """Return the value of a field of the first config that has it, None if none has."""
        return next((vars(config)[name] for config in self.configs if name in vars(config)), None)

    def override(self, config, **explicit):
        """Return a run in which `config` replaces the config of its class; only `explicit` flags count as set."""
        run = copy.copy(self)
        run.configs = tuple(config if type(old) is type(config) else old for old in self.configs)
        run.explicit = {**self.explicit, **explicit}
        return run

    def resolve(self, config):
        """Return `override(config)`; commands.json records its settings instead of those of the command line."""
        run = self.override(config)
        self.record["flags"] = run._by_section()
        return run

    def derive(self, script, configs, folder):
        """Return a training run with other configs, none of which count as set, that resumes in another folder."""
        run = copy.copy(self)
        run.script, run.configs, run.folder, run.checkpoint = script, tuple(configs), folder, find_checkpoint(folder)
        run.flags = None
        return run

    def create_inner(self, script, config=None, **settings):
        """Return the Run of another script that is a part of this one, with its settings of the device and the report.

        :param config: a YAML file; `settings`: flags, which win over it. The script has a folder of its own, --logdir.
        """
        shared = dist_util.LaunchConfig, *([RunConfig] if "logdir" in settings else [])
        names = {field.name for cls in shared for field in dataclasses.fields(cls)} - {"dry_run"}
        flags = {name: value for name, value in self.explicit.items() if name in names}
        return _find_script(script).create_run(config, **{**flags, **settings})

    def execute_inner(self, inner):
        """Execute a run of `create_inner` on all ranks and return its result; log and precision are then as before."""
        with logger.suspend() if RunConfig in inner else contextlib.nullcontext():
            result = _find_script(inner.script).execute(inner)
        dist_util.set_numerics(self[dist_util.LaunchConfig])
        return result

    def changed_settings(self, folder):
        """Return the names of the settings that differ from those in the config.json of a run folder."""
        recorded = read_config_file(folder, "remove the folder").get("flags", {})
        return sorted(name for section, flags in self._by_section().items() for name, value in flags.items()
                      if name in recorded.get(section, {}) and recorded[section][name] != value)

    @property
    def dry_run(self):
        """Whether only the configuration, the data and the size of the model are reported."""
        return RunConfig in self and self[RunConfig].dry_run

    @property
    def resumed_header(self):
        """The header of the run that is resumed in the folder, {} if none is."""
        return _read_header(self.folder) if self.folder and committed_steps(self.folder) else {}

    @property
    def previous_header(self):
        """The header of the run that is resumed, in the folder or from --resume_checkpoint, {} if none is."""
        marker, folder = self.checkpoint
        return self.resumed_header or (_read_header(folder) if marker else {})

    def save_config(self, header):
        """Write config.json, from which the run can be rebuilt (rank 0).

        Call it once the run is known to fit its folder: a rejected one must leave the config.json of its predecessor.
        """
        if dist_util.rank() == 0:
            content = {"script": self.script, "header": header, "flags": self._by_section()}
            write_record(self.folder / CONFIG_FILE, content)

    def write_report(self, report):
        """Write metrics.json (rank 0), renamed keys under their old names too, and print the numbers by name."""
        if dist_util.rank() == 0:
            write_json(self.folder / "metrics.json", {**report, **_renamed(report)})
        _print_nested(report)

    @contextlib.contextmanager
    def recorded(self):
        """Record the command in commands.json, and write report.html at the end of the block (rank 0).

        Nothing is written by dry runs and scripts without a run folder. If the block ends with an error, the record
        stays as it was at the start; ENDINGS are none.
        """
        if RunConfig not in self or self.dry_run:
            yield
            return
        program = sys.argv[0] if " " in sys.argv[0] else shlex.quote(sys.argv[0])  # `gdvae evaluate` is one word there
        self.record.update(
            command=" ".join([program, *map(shlex.quote, sys.argv[1:])]), script=self.script, version=__version__,
            started=f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}", working_folder=os.getcwd(),
            ranks=dist_util.world_size(), flags=self._by_section())
        clock, stopped, commands = time.perf_counter(), None, []
        self._write_accessory(COMMANDS_FILE, lambda path: commands.extend(read_commands(path)))
        commands = [*commands, self.record][-MAX_COMMANDS:]
        write = lambda path: write_record(path, {"commands": commands})
        self._write_accessory(COMMANDS_FILE, write)
        try:
            yield
        except ENDINGS as stop:
            stopped = stop
        self.record.update(seconds=time.perf_counter() - clock, peak_memory_mib=dist_util.peak_memory_mib(),
                           warnings=logger.get_current().warnings)
        self._write_accessory(COMMANDS_FILE, write)
        if self[RunConfig].report:
            self._write_accessory(PAGE_FILE, lambda path: write_page([path.parent], path))
        if stopped:
            raise stopped

    def _write_accessory(self, name, write):
        """Call `write` with a path in the run folder on rank 0; a failure is logged and the run continues."""
        if dist_util.rank() == 0:
            try:
                write(self.folder / name)
            except Exception as error:
                logger.warn(f"{name}: cannot be written ({type(error).__name__}: {error}); the run continues")

    def finish(self):
        """Print the run folder again, as the last line (rank 0)."""
        if dist_util.rank() == 0 and self.folder and self.folder.is_dir():   # a dry run creates none
            print(f"run folder: {self.folder}", flush=True)

    def open_folder(self, trains, held):
        """Open and lock the folder, and open its log; a dry run prints the configuration instead.

        :param trains: True if the script resumes the checkpoint in the folder and continues its curves.
        :param held: ExitStack that releases the lock.
        :raises OSError: if the folder cannot be written, or another process writes into it.
        """
        folder = self[RunConfig].logdir or os.environ.get("OPENAI_LOGDIR")
        self.folder = Path(folder) if folder else None
        if self.dry_run:
            return self._print_configuration()
        if folder and self.setting("fast_dev_run"):
            self.folder = self.folder / "fast_dev_run"  # separate, so that no run resumes from a smoke test
        if folder:
            self.created = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
            dist_util.barrier()     # then the ranks create them
            require_writable_folder(self.folder, "--logdir")
            self._lock(held, clear=self.setting("fast_dev_run"))
            if trains:
                self.checkpoint = find_checkpoint(self.folder, self.setting("resume_checkpoint"))
        self._take_recorded_options()
        marker = self.checkpoint[0]
        # Only training has curves; other scripts must not truncate those of a run in whose folder they write.
        formats = [name for name in os.environ.get("OPENAI_LOG_FORMAT", "stdout,log").split(",")
                   if name in ("stdout", "log")]
        if trains:
            formats = format_names.parse(self.setting("log_formats"), "log_formats") or None
        logger.configure(self.folder or logger.default_dir(self.script), formats, resume_step=marker and marker["step"])
        logger.log(f"run folder: {logger.get_dir()}")
        self.folder = Path(logger.get_dir())
        if not folder:
            self.created = [self.folder]
            self._lock(held)
        if trains and not folder:   # a new folder has no curves to continue, but may branch off another run
            self.checkpoint = find_checkpoint(self.folder, self.setting("resume_checkpoint"))
            self._take_recorded_options()

    def discard_folder(self):
        """Remove the folder that `open_folder` has created if nothing but logs is in it (rank 0)."""
        if dist_util.rank() == 0 and self.created:
            logger.reset()
            with contextlib.suppress(OSError):
                files = list(self.folder.iterdir())
                if all(FIRST_FILES.fullmatch(path.name) for path in files):
                    for path in files:
                        path.unlink()
                    for path in self.created:
                        path.rmdir()

    def _take_recorded_options(self):
        """Read volumes as the run that is resumed did: one of version 0.2 read all of them as stored.

        :raises ValueError: if a flag conflicts with that.
        """
        marker, folder = self.checkpoint
        recorded = marker and self.previous_header.get("data") or {}
        options = recorded_options(recorded)
        for name in options.keys() & self.explicit.keys() - recorded.keys():
            require((self.explicit[name] == options[name],
                     f"--{name} {self.explicit[name]} conflicts with the run in {folder}, which was trained without "
                     "it; omit the flag or set another --logdir"))
        self.configs = tuple(take_recorded_options(config, self.explicit, recorded) if isinstance(config, DataConfig)
                             else config for config in self.configs)

    def _lock(self, held, clear=False):
        """Lock the folder on rank 0 and remove what killed runs left in it, or all; other ranks wait until then."""
        if dist_util.rank() == 0:
            held.enter_context(locked_folder(self.folder, "--logdir", self.script, logger.warn))
            remove_stale_parts(self.folder)
            for path in self.folder.iterdir() if clear else ():
                if path.name != LOCK_FILE:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        dist_util.barrier()

    def _print_configuration(self):
        if dist_util.rank() == 0:
            for section, flags in self._by_section().items():
                print(f"{section}:")
                for key, value in flags.items():
                    print(f"  {key}: {json.dumps(value)}")

    def _by_section(self):
        flags = {}
        for config in self.configs:
            values = {k: v for k, v in as_dict(config).items() if self.flags is None or k in self.flags}
            flags.setdefault(section_name(type(config)), {}).update(values)
        return flags


# Keys of metrics.json before version 0.2, which are written until 1.0.
OLD_KEYS = {
    "num_images": "pictures",  # alias
    "nearest_neighbors": "neighbours",  # alias
    "memorized_fraction": "share_suspiciously_near",  # alias
    "example_indices": "shown_samples",  # alias
    "example_pixel_l1": "shown_pixel_l1",  # alias
    "median_distance_samples": "median_distance_of_samples",  # alias
    "median_distance_reference": "median_distance_of_reference",  # alias
}


def read_config_file(folder, action) -> dict:
    """Return what the config.json of a run folder records, {} if there is none.

    :raises ValueError: if it cannot be read; the message ends in `action`.
    """
    path = Path(folder) / CONFIG_FILE
    return read_record(path, action) if path.exists() else {}


def _find_script(name):
    """Return the function of a script; by name, as scripts import this module."""
    return importlib.import_module(f"..commands.{name}", __package__).main


def _read_header(folder):
    return read_config_file(folder, "remove it: the checkpoints have their own headers").get("header", {})


def _renamed(report):
    return {OLD_KEYS[key]: _renamed(value) if isinstance(value, dict) else value
            for key, value in report.items() if key in OLD_KEYS}


def _print_nested(report, indent=""):
    for key, value in report.items():
        if isinstance(value, dict):
            logger.log_rank0(f"{indent}{key}:")
            _print_nested(value, indent + "  ")
        else:
            logger.log_rank0(f"{indent}{key}: {f'{value:.5g}' if isinstance(value, float) else value}")


def script(doc, *classes, trains=False, samples=False):
    """Return a decorator that turns `body(run)` into a script with the flags of these config classes.

    Called without arguments, the function parses the command line, connects the ranks, opens the run folder and its log
    if there is a RunConfig, and runs the body. The folder is printed first and last. A script that `trains` resumes the
    run in its folder and continues its curves; others write log.txt only. One that `trains` or `samples` computes in
    TF32 by default.

    The function has the parts of this as members: `argparser()` returns the parser; `launch()` calls the function and
    ends all ranks together; `create_run(config, **settings)` returns a Run of values of Python (`flags.from_python`);
    `execute(run)` does all that follows, and returns the result of `body(run)`.

    :param doc: text of `--help`.
    :raises OSError: if the folder cannot be written.
    """
    classes = *classes, dist_util.FastLaunchConfig if trains or samples else dist_util.LaunchConfig

    def decorate(body):
        def execute(run):
            """Run the body; return its result."""
            try:
                return execute_in_folder(run)
            except dist_util.EXPECTED_ERRORS:   # mostly before there are results
                run.discard_folder()
                raise

        def execute_in_folder(run):
            launch = run[dist_util.LaunchConfig]
            dist_util.set_numerics(launch)
            dist_util.setup_dist(launch.collective_timeout_minutes)
            with contextlib.ExitStack() as held:
                if RunConfig in run:
                    run.open_folder(trains, held)
                for line in dist_util.describe_numerics(launch, run.explicit):
                    logger.log_rank0(line)
                try:
                    with run.recorded():
                        result = body(run)
                except ENDINGS:     # the folder is of interest, too
                    run.finish()
                    raise
                run.finish()
                return result

        def create(configs, explicit, config_file):
            return Run(Path(body.__code__.co_filename).stem, configs, explicit, flags=flag_names(*classes),
                       config_file=config_file)

        def create_run(config=None, **settings):
            config_file = config if isinstance(config, (str, os.PathLike)) else ""
            return create(*from_python(*classes, config=config, **settings), config_file)

        @functools.wraps(body)
        def main():
            execute(create(*parse_explicit(doc, *classes), find_config_flag()))

        main.body, main.execute, main.create_run = body, execute, create_run
        main.argparser = functools.partial(argparser, doc, *classes)
        main.launch = functools.partial(dist_util.launch, main)
        return main
    return decorate
