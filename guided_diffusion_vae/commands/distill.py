"""Distill a diffusion model: train a student that samples in few steps.

    python scripts/distill.py --teacher_path runs/diffusion --cache_dir latents_cache/NAME --student_steps 4 \\
        --teacher_steps 20 --lr 2e-4 --lr_anneal_steps 2000 --logdir runs/student4
    python scripts/distill.py --teacher_path runs/student4 --cache_dir latents_cache/NAME --student_steps 2
    python scripts/distill.py --teacher_path runs/pixels --data_dir DIR --cfg_scale 2
    python scripts/image_sample_vae.py --model_path runs/student4

Each step of the student is several of its teacher (progressive distillation, arXiv:2202.00512). Model, process,
autoencoder, classes, attributes and conditions are those of the teacher. The student is an ordinary run, and is sampled
in its steps, with ddim or euler, without further flags."""

from ..runs.configs import (
    ConditionConfig, DataConfig, DiffusionTrainConfig, DistillConfig, LatentConfig, ModelConfig, RunConfig, VAEConfig,
)
from ..runs.run import drop_fields, script, select_fields
from ..runs.teacher import open_teacher, open_teacher_data
from ..runs.training import train_diffusion


@script(
    __doc__, DistillConfig, LatentConfig, VAEConfig, DataConfig, select_fields(ConditionConfig, "condition_dir"),
    select_fields(ModelConfig, "use_fp16", "use_checkpoint", "recompute_norms", "dropout"),
    drop_fields(DiffusionTrainConfig, "init_from", "fsdp"), RunConfig, trains=True,
)
def main(run):
    teacher = open_teacher(run)
    train_diffusion(*open_teacher_data(run, teacher), teacher=teacher)


create_argparser = main.argparser
