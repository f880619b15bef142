"""Measure what samples are worth as training images of a classifier, beside real and augmented ones.

    python scripts/augmentation_study.py --data_dir DIR/train --val_data_dir DIR/val --group_by "_r(\\d+)_" \\
        --samples runs/samples --logdir runs/study
    python scripts/augmentation_study.py --data_dir DIR/train --val_data_dir DIR/val --group_by recording \\
        --model_path runs/diffusion --sampler ddim --timestep_respacing trailing20 --cfg_scale 1.5
    mpiexec -n 2 python scripts/augmentation_study.py --data_dir DIR/train --val_data_dir DIR/val \\
        --group_by recording --shares 1,2,all --train_models True --config configs/microdoppler_small.yaml

All classifiers have equal optimizer steps, schedule and seeds. The strength of classical augmentation and the number
of steps are chosen by a part of the training recordings, never by the test images. The networks of samples may have
seen the real images of their share only: their checkpoints are checked. Samples are given, or generated here from
given models, or from models that are trained on each share (models/, samples/). Writes study.json, study.csv (one row
per training), study.png, and folders of the images of each share for training generative models (shares/). Rerun the
same command to resume: finished trainings are not repeated."""

from ..runs.configs import DataConfig, RunConfig, StudyConfig, VAEConfig
from ..runs.run import script, select_fields
from ..runs.study import study
from ..runs.study_models import SAMPLING


@script(__doc__, StudyConfig, DataConfig, *SAMPLING, select_fields(VAEConfig, "vae_path"), RunConfig)
def main(run):
    return study(run)


create_argparser = main.argparser
