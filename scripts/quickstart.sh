#!/usr/bin/env bash
# Run the main job on simulated radar data, into ./quickstart; `make quickstart` sets up first and then calls this.
# Sizes and step counts stand in configs/quickstart.yaml. Called again, it keeps the data, the cache and the trained
# models (an interrupted training goes on where it last saved), and samples and measures anew; `make clean` starts over.

set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=configs/quickstart.yaml
RUN=quickstart
SAMPLES=192

# Threads that spin while they wait take the core of the other rank.
export OMP_WAIT_POLICY=PASSIVE

heading() { printf '\n=== %s  (%d min %02d s so far)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }
alone() { OMP_NUM_THREADS=2 python "$@"; }
two_ranks() { OMP_NUM_THREADS=1 mpiexec -n 2 python "$@"; }

heading "1/8  Simulate a radar that watches a hand: six motions, labelled pictures to train on and to check with"
alone scripts/make_microdoppler.py --config $CONFIG --out_dir $RUN/data

heading "2/8  Train an autoencoder that shrinks pictures to latents and back"
alone scripts/train_autoencoder.py --config $CONFIG --data_dir $RUN/data/train --val_data_dir $RUN/data/val --logdir $RUN/autoencoder

heading "3/8  Check how much of held-out pictures survives the round trip"
alone scripts/check_roundtrip.py --config $CONFIG --vae_path $RUN/autoencoder --data_dir $RUN/data/val --logdir $RUN/roundtrip

heading "4/8  Encode the training pictures into a latent cache"
alone scripts/encode_dataset.py --config $CONFIG --vae_path $RUN/autoencoder --data_dir $RUN/data/train --cache_dir $RUN/latents

heading "5/8  Train a class-conditional diffusion model on the latents, with two ranks"
two_ranks scripts/image_train_vae.py --config $CONFIG --cache_dir $RUN/latents --logdir $RUN/diffusion

heading "6/8  Train a classifier on the real pictures, to judge the samples by"
alone scripts/classifier_train.py --config $CONFIG --data_dir $RUN/data/train --val_data_dir $RUN/data/val --logdir $RUN/classifier

heading "7/8  Sample every motion in turn, with two ranks"
two_ranks scripts/image_sample_vae.py --model_path $RUN/diffusion --num_samples $SAMPLES --batch_size 48 --timestep_respacing ddim100 --logdir $RUN/samples

heading "8/8  Measure: do the samples show the motion that was asked for, and how far are they from real pictures?"
alone scripts/evaluate.py --config $CONFIG --samples $RUN/samples/samples_${SAMPLES}x64x64x1.npz --reference $RUN/data/val --train_dir $RUN/data/train --classifier_path $RUN/classifier --logdir $RUN/evaluation

heading "Done"
python - $RUN/evaluation/metrics.json <<'PYTHON'
import json, sys
report = json.load(open(sys.argv[1]))
print(f"samples that the classifier takes for the motion asked for: {report['class_agreement']['accuracy']:.0%}"
      f" (of real held-out pictures: {report['classifier_accuracy']['accuracy']:.0%})")
print(f"Frechet distance to the held-out pictures: {report['frechet']:.3g} (of the training pictures:"
      f" {report['training_to_reference']['frechet']:.3g})")
PYTHON
cat <<TEXT
look at
  $RUN/samples/contact_sheet.png            samples, one row a motion
  $RUN/evaluation/confusion_samples.png     which motion the classifier sees in them
  $RUN/evaluation/neighbours.png            samples beside the training pictures nearest to them
  $RUN/roundtrip/roundtrip.png              held-out pictures before and after the autoencoder
  $RUN/evaluation/metrics.json              all numbers
TEXT
