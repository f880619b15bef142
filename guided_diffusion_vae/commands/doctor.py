"""Check an installation, the machine and a data folder, and state what to change.

    python scripts/doctor.py
    python scripts/doctor.py --data_dir DIR/train --image_size 64
    python scripts/doctor.py --config configs/microdoppler_small.yaml --data_dir DIR/train

One line per check: ok, warning or problem. The exit status is 1 if there is a problem. With flags of the data or the
autoencoder, a training step of the autoencoder is timed, and one of the diffusion model that --config describes.
--fast_dev_run True of a training command times its steps on the data."""

from pathlib import Path

from ..runs import doctor
from ..runs.configs import (
    AutoencoderConfig, AutoencoderLossConfig, AutoencoderTrainConfig, DataConfig, DiffusionConfig, DiffusionTrainConfig,
    DiscriminatorConfig, ModelConfig,
)
from ..runs.flags import read_config_flag
from ..runs.run import script
from ..runs.training import autoencoder_plan, latent_diffusion_plan


@script(__doc__, DataConfig, AutoencoderConfig, AutoencoderLossConfig, DiscriminatorConfig, AutoencoderTrainConfig)
def main(run):
    checks, source = [], None

    def report(check):
        checks.append(check)
        print(check, flush=True)

    for check in doctor.check_machine([Path.cwd()]):
        report(check)
    if run[DataConfig].data_dir:
        found, source = doctor.check_data(run[DataConfig])
        for check in found:
            report(check)
    if run.explicit and (source or not run[DataConfig].data_dir):
        plan = autoencoder_plan(run, source and source.shape[0])
        report(doctor.check_step(plan, "autoencoder"))
        if configs := read_config_flag(ModelConfig, DiffusionConfig, DiffusionTrainConfig):
            try:
                report(doctor.check_step(latent_diffusion_plan(*configs, plan, source), "diffusion model"))
            except ValueError as error:     # the model conflicts with the data or the latents
                report(doctor.Check("diffusion model", doctor.PROBLEM, str(error)))
    statuses = [check.status for check in checks]
    problems, warnings = statuses.count(doctor.PROBLEM), statuses.count(doctor.WARNING)
    print(f"{len(checks)} checks, warnings: {warnings}, problems: {problems}")
    if problems:
        raise SystemExit(1)


create_argparser = main.argparser
