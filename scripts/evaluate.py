"""Compare samples with real images: set distances, class agreement, memorization, training utility.

    python scripts/evaluate.py --samples samples_300x64x64x3.npz --reference DIR/val --train_dir DIR/train \\
        --classifier_path runs/classifier/model002000.pt
    python scripts/evaluate.py --samples samples_50000x256x256x3.npz --reference VIRTUAL_imagenet256_labeled.npz \\
        --inception_path weights-inception-2015-12-05-6726825d.pth

Features come from one of three sources: the Inception network of FID (a local weights file), a classifier
(classifier_train.py --noised False), or the latents of an autoencoder, which require no pretrained network. Writes
metrics.json, confusion matrices and the nearest training images to the run folder."""

from guided_diffusion_vae import dist_util
from guided_diffusion_vae.evaluation import comparison
from guided_diffusion_vae.runs import loading, tstr
from guided_diffusion_vae.runs.configs import (
    ClassifierConfig, ClassifierTrainConfig, DataConfig, EvaluateConfig, RunConfig, VAEConfig,
)
from guided_diffusion_vae.runs.run import drop_fields, script


@script(
    __doc__, EvaluateConfig, VAEConfig, DataConfig, ClassifierConfig,
    drop_fields(ClassifierTrainConfig, "batch_size", "iterations", "val_data_dir", "noised", "resume_checkpoint"),
    RunConfig,
)
def main(run):
    config = run[EvaluateConfig]
    for flag in ("reference", "samples", "train_dir"):
        if flag != "train_dir" or config.train_dir:
            comparison.require_dataset(vars(config)[flag], f"--{flag}")
    if run.dry_run:
        return

    extract, classifier, header, data = loading.open_extractors(run)
    run = run.override(data)
    datasets = {name: comparison.open_images(path, data, flag) for name, path, flag in (
        ("real", config.reference, "--reference"), ("samples", config.samples, "--samples"),
        ("training", config.train_dir, "--train_dir")) if path}
    tstr_datasets = tstr.open_tstr_datasets(run, datasets) if config.tstr_iterations else {}
    report = comparison.evaluate(config, data, extract, run.folder, classifier, header["classes"], header["image_shape"])
    if tstr_datasets:
        report.update(tstr.run_tstr(run, tstr_datasets))
    run.write_report(report)


create_argparser = main.argparser

if __name__ == "__main__":
    dist_util.launch(main)
