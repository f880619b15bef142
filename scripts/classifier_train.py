"""Train a classifier of pictures: noised ones, to guide sampling, or clean ones (--noised False), to judge samples.

    python scripts/classifier_train.py --data_dir DIR/train --val_data_dir DIR/val --noised False --iterations 2000 \\
        --classifier_width 32 --classifier_attention_resolutions 8 --batch_size 32
"""

import torch

from guided_diffusion_vae import dist_util, script_util
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.image_datasets import BatchPlan, DataConfig, PictureFolder, picture_batches
from guided_diffusion_vae.previews import Accuracy
from guided_diffusion_vae.resample import create_named_schedule_sampler
from guided_diffusion_vae.train_util import ClassifierTrainConfig, TrainLoop, classifier_objective, seed_weights
from guided_diffusion_vae.unet import ClassifierConfig

CONFIGS = (DataConfig, ClassifierConfig, DiffusionConfig, ClassifierTrainConfig, script_util.RunConfig)


def create_argparser():
    return script_util.argparser(__doc__, *CONFIGS)


def main():
    data, flags, process, train, run = configs = script_util.parse(__doc__, *CONFIGS)
    folder = script_util.begin_run(run, configs)

    pictures = PictureFolder(data)
    flags = script_util.classifier_for(flags, pictures)
    seed_weights(train.seed)
    model, diffusion = script_util.build_classifier(flags, process, pictures.shape)
    script_util.say(pictures.summary())
    plan = BatchPlan(len(pictures), train.batch_size, dist_util.rank(), dist_util.world_size(), train.seed)
    script_util.say(plan.summary())
    if run.dry_run:
        zero = lambda m: m(torch.zeros(1, *pictures.shape), torch.zeros(1, dtype=torch.long))
        return script_util.print_model_size(model, zero, train.batch_size)

    header = script_util.classifier_header(pictures, flags, process, data)
    model.to(dist_util.dev())
    sampler = create_named_schedule_sampler(train.schedule_sampler, diffusion)
    held_out = PictureFolder(data, data_dir=train.val_data_dir) if train.val_data_dir else None
    loop = TrainLoop(
        model=model, data=picture_batches(pictures, plan, with_labels=True), header=header,
        objective=classifier_objective(sampler, diffusion if train.noised else None),
        preview=held_out and Accuracy(model, held_out, pictures.class_names), preview_interval=train.eval_interval,
        max_steps=train.iterations, ema_rate="", lr_anneal_steps=train.iterations if train.anneal_lr else 0,
        use_fp16=flags.classifier_use_fp16, **script_util.loop_arguments(train, "schedule_sampler"),
    )
    script_util.write_config(folder, "classifier_train", configs, header)
    loop.run_loop()
    script_util.end_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
