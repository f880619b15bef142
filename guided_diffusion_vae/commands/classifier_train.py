"""Train a classifier: on noised data for guidance, or on clean data for evaluation.

    mpiexec -n 2 python scripts/classifier_train.py --data_dir DIR/train --val_data_dir DIR/val --iterations 3000
    python scripts/classifier_train.py --cache_dir latents_cache/NAME --classifier_channel_mult 1,2,2 --iterations 3000
    python scripts/classifier_train.py --data_dir DIR/train --val_data_dir DIR/val --noised False --iterations 2000 \\
        --classifier_width 32 --classifier_attention_resolutions 8 --batch_size 32

The input is images, or latents if --cache_dir or --vae_path is set. For guidance, use the latents of the diffusion
model."""

from ..runs import spaces, training
from ..runs.configs import (
    ClassifierConfig, ClassifierTrainConfig, DataConfig, DiffusionConfig, LatentConfig, NormalizerConfig, RunConfig,
    VAEConfig,
)
from ..runs.run import script


@script(
    __doc__, DataConfig, LatentConfig, NormalizerConfig, VAEConfig, ClassifierConfig, DiffusionConfig,
    ClassifierTrainConfig, RunConfig, trains=True,
)
def main(run):
    training.train_classifier(run, *spaces.open_data(run))


create_argparser = main.argparser
