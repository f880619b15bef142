"""The life cycle of a run: folder, log, configuration, report."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

from .. import dist_util, logger
from ..config import as_dict, option, section_name
from ..files import require_writable_folder, remove_stale_parts, write_json
from ..logger import log_rank0
from ..train_util import find_checkpoint


@dataclasses.dataclass
class RunConfig:
    logdir: str = option("", "folder of the run; default $OPENAI_LOGDIR, else runs/<script>-<date>")
    dry_run: bool = option(False, "print the resolved configuration, the data and the model's size, then stop")


def start_run(run, configs=(), trains=True):
    """Start the ranks, the run folder and the log; return the folder.

    The folder is printed first and, by `finish_run`, last. Where a training run goes on in it, so do its curves; scripts
    that do not train (`trains` is False, or their configs have no `resume_checkpoint`) leave them alone and write log.txt only.
    """
    dist_util.setup_dist()
    folder = run.logdir or os.environ.get("OPENAI_LOGDIR")
    if run.dry_run:
        print_configuration(configs)
        return folder
    resume_step = None
    trains = [c.resume_checkpoint for c in configs if hasattr(c, "resume_checkpoint")] if trains else []
    if folder and any(getattr(c, "fast_dev_run", False) for c in configs):
        folder = Path(folder) / "fast_dev_run"  # so that no run goes on from a trial
        if dist_util.rank() == 0 and folder.exists():
            shutil.rmtree(folder)
        dist_util.barrier()
    if folder:
        require_writable_folder(folder, "--logdir")
        if dist_util.rank() == 0:
            remove_stale_parts(folder)
        found = find_checkpoint(folder, trains[0])[0] if trains else None
        resume_step = found["step"] if found else None
    logger.configure(dir=folder, format_strs=None if trains else _text_formats(), resume_step=resume_step)
    logger.log(f"run folder: {logger.get_dir()}")
    return Path(logger.get_dir())


def _text_formats():
    """Return the formats of the log that hold no curves, as far as the environment wants them."""
    return [name for name in os.environ.get("OPENAI_LOG_FORMAT", "stdout,log").split(",") if name in ("stdout", "log")]


def finish_run(folder):
    """Say once more where everything is."""
    if dist_util.rank() == 0 and folder and Path(folder).is_dir():   # a dry run makes none
        print(f"run folder: {folder}", flush=True)


def write_config(folder, script, configs, header):
    """Write config.json, all that rebuilds the run; called once the run is known to fit what its folder holds."""
    if dist_util.rank() == 0:
        write_json(Path(folder) / "config.json", {"script": script, "header": header, "flags": _by_section(configs)})


def print_configuration(configs):
    """Print all flags with their values (rank 0)."""
    if dist_util.rank() == 0:
        for section, flags in _by_section(configs).items():
            print(f"{section}:")
            for key, value in flags.items():
                print(f"  {key}: {json.dumps(value)}")


def _by_section(configs):
    flags = {}
    for config in configs:
        flags.setdefault(section_name(type(config)), {}).update(as_dict(config))
    return flags


def print_report(report, indent=""):
    """Print numbers by name, nested ones further in (rank 0)."""
    for key, value in report.items():
        if isinstance(value, dict):
            log_rank0(f"{indent}{key}:")
            print_report(value, indent + "  ")
        else:
            log_rank0(f"{indent}{key}: {f'{value:.5g}' if isinstance(value, float) else value}")
