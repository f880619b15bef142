"""Train a KL autoencoder on a folder of images, optionally with a discriminator and LPIPS.

    python scripts/train_autoencoder.py --config configs/microdoppler_small.yaml --data_dir DIR \\
        --logdir runs/autoencoder
    python scripts/train_autoencoder.py --data_dir DIR --discriminator_weight 0.5 --discriminator_start 5000 \\
        --use_perceptual_loss True --perceptual_path vgg16-397923af.pth

Validation images (--val_data_dir) are measured with every preview. The step with the best PSNR is kept, and a run
folder used as --vae_path loads that step."""

from ..runs import training
from ..runs.configs import (
    AutoencoderConfig, AutoencoderLossConfig, AutoencoderTrainConfig, DataConfig, DiscriminatorConfig, PerceptualConfig,
    RunConfig,
)
from ..runs.run import script


@script(
    __doc__, DataConfig, AutoencoderConfig, AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig,
    AutoencoderTrainConfig, RunConfig, trains=True,
)
def main(run):
    training.train_autoencoder(run)


create_argparser = main.argparser
