"""Export a model as a .safetensors file with its header, or as a folder that diffusers loads.

    python scripts/export.py --model_path runs/diffusion --out diffusion.safetensors
    python scripts/export.py --model_path runs/autoencoder --format diffusers --out exported/autoencoder
    python scripts/export.py --model_path runs/diffusion --format diffusers --out exported/pipeline

A diffusers model is compared with the original on random data before it is written. The export fails with the reason
if the architectures do not match. A model card, README.md, is written with it; --license states the license. All
scripts also accept a .safetensors file as a model."""

from .. import dist_util
from ..logger import log_rank0
from ..runs import export, loading
from ..runs.configs import ExportConfig, VAEConfig
from ..runs.run import script, select_fields


@script(__doc__, ExportConfig, select_fields(VAEConfig, "vae_path", "scale_factor"))
def main(run):
    config = run[ExportConfig]
    weights = loading.open_weights(config.model_path)   # a collective call
    if dist_util.rank() == 0:
        summary = export.export_model(config, weights, run[VAEConfig])
        log_rank0(f"wrote {config.out}: {summary}")


create_argparser = main.argparser
