"""Edit images with a diffusion model: inpaint, vary, interpolate, or invert them.

    python scripts/image_edit.py --mode inpaint --model_path runs/diffusion --data_dir DIR/val --mask_box 16:48,16:48 \\
        --num_samples 16 --timestep_respacing 50
    python scripts/image_edit.py --mode variation --strength 0.6 --model_path runs/diffusion --data_dir DIR/val \\
        --classes tapout --sampler dpmpp_sde --timestep_respacing logsnr20
    python scripts/image_edit.py --mode interpolate --seeds 1,2 --model_path runs/diffusion --timestep_respacing 50
    python scripts/image_edit.py --mode invert --model_path runs/diffusion --data_dir DIR/val --timestep_respacing 50

Results are written as by image_sample_vae.py, with edits.png (images, masks, results) and metrics.json. They have the
class of their image unless --classes is set. Rerun the same command to resume an interrupted run."""

from ..runs import loading
from ..runs.configs import (
    DataConfig, DiffusionConfig, EditingConfig, ModelConfig, NormalizerConfig, RunConfig, SpectrogramConfig, VAEConfig,
)
from ..runs.run import script, select_fields


@script(
    __doc__, EditingConfig, DataConfig, VAEConfig, select_fields(NormalizerConfig, "normalizer"), ModelConfig,
    DiffusionConfig, SpectrogramConfig, RunConfig, samples=True,
)
def main(run):
    scale = run[NormalizerConfig] if run[VAEConfig].vae_path else None
    loading.edit(run, loading.load_sampler(run, scale=scale))


create_argparser = main.argparser
