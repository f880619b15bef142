"""Hold samples against real pictures: distances between sets, class agreement, copies, what a classifier learns.

    python scripts/evaluate.py --samples samples_300x64x64x3.npz --reference DIR/val --train_dir DIR/train \\
        --classifier_path runs/classifier/model002000.pt
    python scripts/evaluate.py --samples samples_50000x256x256x3.npz --reference VIRTUAL_imagenet256_labeled.npz \\
        --inception_path weights-inception-2015-12-05-6726825d.pth

Features come from the Inception network of FID (a local weights file), from a classifier of yours (classifier_train.py
--noised False), or from an autoencoder's latents, for which no pretrained network is needed. Writes metrics.json,
confusion matrices and nearest training pictures to the run folder.
"""

import dataclasses

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.data import DataConfig
from guided_diffusion_vae.evaluation import comparison
from guided_diffusion_vae.gaussian_diffusion import DiffusionConfig
from guided_diffusion_vae.runs import loading, tstr
from guided_diffusion_vae.runs.flags import argparser, parse_explicit, drop_fields
from guided_diffusion_vae.runs.run import RunConfig, start_run, finish_run, print_report
from guided_diffusion_vae.train_util import ClassifierTrainConfig
from guided_diffusion_vae.unet import ClassifierConfig
from guided_diffusion_vae.vae_wrapper import VAEConfig

CONFIGS = (comparison.EvaluateConfig, VAEConfig, DataConfig, ClassifierConfig,
           drop_fields(ClassifierTrainConfig, "batch_size", "iterations", "val_data_dir", "noised",
                                    "resume_checkpoint"),
           RunConfig)


def create_argparser():
    return argparser(__doc__, *CONFIGS)


def main():
    configs, given = parse_explicit(__doc__, *CONFIGS)
    config, vae, data, flags, train, run = configs
    folder = start_run(run, configs, trains=False)
    comparison.require_dataset(config.reference, "--reference")
    comparison.require_dataset(config.samples, "--samples")
    if config.train_dir:
        comparison.require_dataset(config.train_dir, "--train_dir")
    if run.dry_run:
        return

    extract, judge, header, data = loading.open_extractors(config, vae, data, given)
    train = dataclasses.replace(train, batch_size=config.tstr_batch_size)
    process = DiffusionConfig()
    sets = tstr.open_tstr_datasets(config, data, flags, process) if config.tstr_iterations else {}
    report = comparison.evaluate(config, data, extract, folder, judge, header["classes"], header["image_shape"])
    if config.tstr_iterations:
        report.update(tstr.run_tstr(config, sets, given, data, flags, process, train, folder))
        comparison.write_report(report, folder)
    print_report(report)
    finish_run(folder)


if __name__ == "__main__":
    dist_util.launch(main)
