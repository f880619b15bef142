"""Say what memory an autoencoder will take to train, encode and decode, and what fits in the memory there is.

    python scripts/plan_memory.py --config configs/volumes/high.yaml
    python scripts/plan_memory.py --image_size 256x256x64 --image_channels 1 --downsample_factors 4,2 \\
        --mixed_precision True --budget_gb 12,24

Nothing is allocated and no data are needed; --data_dir gives the channels where flags do not. For a diffusion model,
`image_train_vae.py --dry_run True` says the same."""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.runs import planning
from guided_diffusion_vae.runs.configs import (
    AutoencoderConfig, AutoencoderLossConfig, AutoencoderTrainConfig, DataConfig, DiscriminatorConfig, PerceptualConfig,
    PlanConfig,
)
from guided_diffusion_vae.runs.run import script


@script(
    __doc__, DataConfig, AutoencoderConfig, AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig,
    AutoencoderTrainConfig, PlanConfig,
)
def main(run):
    for line in planning.report_autoencoder(run):
        print(line, flush=True)


create_argparser = main.argparser

if __name__ == "__main__":
    dist_util.launch(main)
