"""Hand a model to other programs: a .safetensors file with its header, or a folder that diffusers loads.

    python scripts/export.py --model_path runs/diffusion --out diffusion.safetensors
    python scripts/export.py --model_path runs/autoencoder --format diffusers --out exported/autoencoder
    python scripts/export.py --model_path runs/diffusion --format diffusers --out exported/pipeline

What goes to diffusers is compared with the original on random data before it is written; where the architectures do not
agree the export is refused with the reason. A .safetensors file is taken by all scripts here as well.
"""

from guided_diffusion_vae import dist_util, logger
from guided_diffusion_vae.runs import export, loading
from guided_diffusion_vae.runs.diffusers_export import ExportConfig
from guided_diffusion_vae.runs.flags import argparser, parse, select_fields
from guided_diffusion_vae.vae_wrapper import VAEConfig

CONFIGS = (ExportConfig, select_fields(VAEConfig, "vae_path", "scale_factor"))


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    config, vae = parse(__doc__, *CONFIGS)
    dist_util.setup_dist()
    config.model_path = loading.resolve_weights(config.model_path, "--model_path")  # asked by all ranks
    if dist_util.rank() == 0:
        made = export.export_model(config, vae)
        logger.log_rank0(f"wrote {config.out}: {made}")


if __name__ == "__main__":
    dist_util.launch(main)
