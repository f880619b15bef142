"""Check an installation, the machine and a data folder, and state what to change.

    python scripts/doctor.py
    python scripts/doctor.py --data_dir DIR/train --image_size 64
    python scripts/doctor.py --config configs/microdoppler_small.yaml --data_dir DIR/train

One line per check: ok, warning or problem. The exit status is 1 if there is a problem. With flags of the data or the
autoencoder, a training step of the autoencoder is timed. --fast_dev_run True of a training command times its steps."""

from pathlib import Path

from ..runs import doctor
from ..runs.configs import (
    AutoencoderConfig, AutoencoderLossConfig, AutoencoderTrainConfig, DataConfig, DiscriminatorConfig,
)
from ..runs.run import script
from ..runs.training import autoencoder_plan


@script(__doc__, DataConfig, AutoencoderConfig, AutoencoderLossConfig, DiscriminatorConfig, AutoencoderTrainConfig)
def main(run):
    checks, shape = [], None

    def report(check):
        checks.append(check)
        print(check, flush=True)

    for check in doctor.check_machine([Path.cwd()]):
        report(check)
    if run[DataConfig].data_dir:
        found, shape = doctor.check_data(run[DataConfig])
        for check in found:
            report(check)
    if run.explicit and (shape or not run[DataConfig].data_dir):
        report(doctor.check_step(autoencoder_plan(run, shape and shape[0])))
    statuses = [check.status for check in checks]
    problems, warnings = statuses.count(doctor.PROBLEM), statuses.count(doctor.WARNING)
    print(f"{len(checks)} checks, warnings: {warnings}, problems: {problems}")
    if problems:
        raise SystemExit(1)


create_argparser = main.argparser
