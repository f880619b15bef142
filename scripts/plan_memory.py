"""Say what memory an autoencoder will take to train, encode and decode, and what fits in the memory there is.

    python scripts/plan_memory.py --config configs/volumes/high.yaml
    python scripts/plan_memory.py --image_size 256x256x64 --image_channels 1 --downsample_factors 4,2 \\
        --mixed_precision True --budget_gb 12,24

Nothing is allocated and no data are needed; --data_dir gives the channels where flags do not. For a diffusion model,
`image_train_vae.py --dry_run True` says the same.
"""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.autoencoder import AutoencoderConfig, total_factors
from guided_diffusion_vae.data import DataConfig, open_folder
from guided_diffusion_vae.runs import planning
from guided_diffusion_vae.runs.flags import argparser, parse
from guided_diffusion_vae.train_util import AutoencoderTrainConfig
from guided_diffusion_vae.vae import AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig

CONFIGS = (DataConfig, AutoencoderConfig, AutoencoderLossConfig, DiscriminatorConfig, PerceptualConfig,
           AutoencoderTrainConfig, planning.PlanConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    data, autoencoder, loss, discriminator_config, perceptual, train, wanted = parse(__doc__, *CONFIGS)
    channels = autoencoder.in_channels or data.image_channels
    if not channels:
        channels = open_folder(data).shape[0] if data.data_dir else 1
    sides = data.sides
    if data.pad:
        sides = [-(-n // factor) * factor for n, factor in zip(sides, total_factors(autoencoder, len(sides)))]
    plan = planning.AutoencoderPlan((channels, *sides), autoencoder, train, loss, discriminator_config)
    if perceptual.use_perceptual_loss:
        print("the perceptual term is not counted: its backbone takes memory of its own")
    for line in planning.report(plan, numbers(wanted.plan_batch_sizes, int), numbers(wanted.budget_gb, float)):
        print(line, flush=True)


def numbers(text, kind):
    """Read numbers with commas between; the plan needs at least one, above zero."""
    try:
        found = [kind(number) for number in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) <= 0:
        raise ValueError(f"{text!r} is not a list of numbers above 0; --budget_gb and --plan_batch_sizes want such as "
                         "12,24")
    return found


if __name__ == "__main__":
    dist_util.launch(main)
