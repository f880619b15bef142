"""Compare samples with real images: set distances, class agreement, memorization, training utility.

    python scripts/evaluate.py --samples samples_300x64x64x3.npz --reference DIR/val --train_dir DIR/train \\
        --classifier_path runs/classifier/model002000.pt
    python scripts/evaluate.py --samples samples_50000x256x256x3.npz --reference VIRTUAL_imagenet256_labeled.npz \\
        --inception_path weights-inception-2015-12-05-6726825d.pth
    python scripts/evaluate.py --samples runs/samples --reference DIR/val --train_dir DIR/train --physics True \\
        --doppler_hz 1000 --frame_s 0.032 --db_range 40

Features come from one of three sources: the Inception network of FID (a local weights file), a classifier
(classifier_train.py --noised False), or the latents of an autoencoder, which require no pretrained network.
--physics True compares physical quantities of spectrograms and requires none of them. Writes metrics.json, confusion
matrices, the nearest training images and the distributions of physical quantities to the run folder."""

from ..evaluation import evaluate
from ..runs import loading, tstr
from ..runs.configs import (
    ClassifierConfig, ClassifierTrainConfig, DataConfig, EvaluateConfig, RunConfig, SpectrogramConfig, VAEConfig,
)
from ..runs.run import drop_fields, script


@script(
    __doc__, EvaluateConfig, VAEConfig, DataConfig, ClassifierConfig,
    drop_fields(ClassifierTrainConfig, "batch_size", "iterations", "val_data_dir", "noised", "resume_checkpoint",
                "init_from"),
    SpectrogramConfig, RunConfig,
)
def main(run):
    loading.require_sets(run[EvaluateConfig])
    if run.dry_run:
        return None

    extract, classifier, data = loading.open_extractors(run)
    run = run.resolve(data)
    sets = loading.open_sets(run)
    physics = loading.open_physics(run, sets)
    tstr_sets = tstr.open_tstr_datasets(run, sets) if run[EvaluateConfig].tstr_iterations else {}
    report = evaluate(run[EvaluateConfig], sets, extract, run.folder, classifier, physics=physics)
    if tstr_sets:
        report.update(tstr.run_tstr(run, tstr_sets))
    run.write_report(report)
    return report


create_argparser = main.argparser
