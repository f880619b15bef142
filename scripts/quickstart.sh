#!/usr/bin/env bash
# Run the whole pipeline on simulated radar data, with output in ./quickstart.
# `make quickstart` installs the packages and then calls this script. All settings are in configs/quickstart.yaml.
# A second call keeps the data, the cache and the trained models, resumes an interrupted training from its latest
# checkpoint, and repeats sampling and evaluation. `make clean` deletes everything.

set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=configs/quickstart.yaml
RUN=quickstart
SAMPLES=192

# Waiting threads must not spin: they would occupy the core of the other rank.
export OMP_WAIT_POLICY=PASSIVE

heading() { printf '\n=== %s  (%d min %02d s so far)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
one_rank() { OMP_NUM_THREADS=2 python "$@"; }
two_ranks() { OMP_NUM_THREADS=1 mpiexec -n 2 python "$@"; }

# A training that receives SIGTERM saves a checkpoint and ends with status 0, as schedulers expect: the next step must not
# take its model for a finished one.
require_finished() {
    if tail -n 3 "$1/log.txt" | grep -q "received a termination signal"; then
        echo "error: training into $1 was interrupted: expected a finished model; run the same command again" >&2
        exit 143
    fi
}

heading "1/9  Simulate radar spectrograms of six hand motions: labeled images for training and validation"
one_rank scripts/make_microdoppler.py --config $CONFIG --out_dir $RUN/data

heading "2/9  Train an autoencoder that compresses images to latents"
one_rank scripts/train_autoencoder.py --config $CONFIG --data_dir $RUN/data/train --val_data_dir $RUN/data/val --logdir $RUN/autoencoder
require_finished $RUN/autoencoder

heading "3/9  Measure the reconstruction quality on validation images"
one_rank scripts/check_roundtrip.py --config $CONFIG --vae_path $RUN/autoencoder --data_dir $RUN/data/val --logdir $RUN/roundtrip

heading "4/9  Encode the training images into a latent cache"
one_rank scripts/encode_dataset.py --config $CONFIG --vae_path $RUN/autoencoder --data_dir $RUN/data/train --cache_dir $RUN/latents

heading "5/9  Train a class-conditional diffusion model on the latents, with two ranks"
two_ranks scripts/image_train_vae.py --config $CONFIG --cache_dir $RUN/latents --logdir $RUN/diffusion
require_finished $RUN/diffusion

heading "6/9  Train a classifier on the real images, for the evaluation of the samples"
one_rank scripts/classifier_train.py --config $CONFIG --data_dir $RUN/data/train --val_data_dir $RUN/data/val --logdir $RUN/classifier
require_finished $RUN/classifier

heading "7/9  Sample all motions cyclically, with two ranks"
two_ranks scripts/image_sample_vae.py --model_path $RUN/diffusion --num_samples $SAMPLES --batch_size 48 --timestep_respacing ddim100 --logdir $RUN/samples

heading "8/9  Evaluate: agreement with the requested motion, and distances to the real images"
one_rank scripts/evaluate.py --config $CONFIG --samples $RUN/samples/samples_${SAMPLES}x64x64x1.npz --reference $RUN/data/val --train_dir $RUN/data/train --classifier_path $RUN/classifier --logdir $RUN/evaluation

# Each simulated image is a recording of its own: no --group_by. The step of the autoencoder was chosen by the validation
# images, which are the test images here; that is allowed by name.
heading "9/9  Study: what are the samples worth as training images of a classifier"
two_ranks scripts/augmentation_study.py --config $CONFIG --data_dir $RUN/data/train --val_data_dir $RUN/data/val --samples $RUN/samples --allow_networks $RUN/autoencoder --logdir $RUN/study

heading "Done"
one_rank scripts/report.py $RUN/{autoencoder,roundtrip,diffusion,classifier,samples,evaluation,study} --out $RUN/report.html || true
python - $RUN/evaluation/metrics.json $RUN/study/study.json <<'PYTHON'
import json, sys
report, study = (json.load(open(path)) for path in sys.argv[1:])
print(f"samples classified as the requested motion: {report['class_agreement']['accuracy']:.0%}"
      f" (accuracy on validation images: {report['classifier_accuracy']['accuracy']:.0%})")
print(f"Frechet distance of samples to validation images: {report['frechet']:.3g} (of training images:"
      f" {report['training_to_reference']['frechet']:.3g})")
share = study["shares"]["all"]
errors = {name: values["error"][0] for name, values in share["arms"].items()}
print(f"error of a small classifier on validation images: {errors[share['baseline']]:.1%} with augmented training images,"
      f" {errors['classical + synthetic 1:1']:.1%} with samples in addition, {errors['synthetic']:.1%} with samples alone")
PYTHON
cat <<TEXT
results:
  $RUN/samples/contact_sheet.png            samples, one row per motion
  $RUN/evaluation/confusion_samples.png     requested and predicted motions of the samples
  $RUN/evaluation/nearest_neighbors.png     samples and their nearest training images
  $RUN/roundtrip/roundtrip.png              validation images before and after the autoencoder
  $RUN/evaluation/metrics.json              all metrics
  $RUN/study/study.png                      errors of classifiers of real, augmented and synthetic images
  $RUN/report.html                          all of it on one page: open it in a browser
TEXT
