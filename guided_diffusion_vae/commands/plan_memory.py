"""Report the memory an autoencoder requires, and the memory optimizations that fit a budget.

    python scripts/plan_memory.py --config configs/volumes/high.yaml
    python scripts/plan_memory.py --image_size 256x256x64 --image_channels 1 --downsample_factors 4,2 \\
        --mixed_precision True --budget_gb 12,24

The report covers training, encoding and decoding. Nothing is allocated and no data are required; --data_dir supplies
the channels if no flag does. For a diffusion model, use `image_train_vae.py --dry_run True`."""

from ..runs.configs import (
    AutoencoderConfig, AutoencoderLossConfig, AutoencoderTrainConfig, DataConfig, DiscriminatorConfig, PerceptualConfig,
    PlanConfig,
)
from ..runs.run import script
from ..runs.training import report_autoencoder_memory


@script(
    __doc__, PlanConfig, DataConfig, AutoencoderConfig, AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig,
    AutoencoderTrainConfig,
)
def main(run):
    for line in report_autoencoder_memory(run):
        print(line, flush=True)


create_argparser = main.argparser
