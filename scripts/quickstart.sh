#!/usr/bin/env bash
# Run the main job on simulated radar data, into ./quickstart: `make quickstart` sets up first and then calls this.
# Settings are those of configs/quickstart.yaml. Called again, it keeps the data, the cache and the trained models (an
# interrupted training goes on where it was saved), and samples and measures anew.

set -euo pipefail
cd "$(dirname "$0")/.."

# Threads that spin while they wait take the core of the other rank.
export OMP_WAIT_POLICY=PASSIVE
one_process() { OMP_NUM_THREADS=2 python "$@"; }
two_ranks() { OMP_NUM_THREADS=1 mpiexec -n 2 python "$@"; }
heading() { printf '\n=== %s  [%d:%02d]\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

CONFIG=configs/quickstart.yaml
RUN=quickstart

heading "1/9 Simulate a radar that watches a hand: 6 motions, 1500 pictures to learn from and 300 to check with"
one_process scripts/make_microdoppler.py --config $CONFIG --out_dir $RUN/data

heading "2/9 Train an autoencoder: pictures 1x64x64 -> latents 4x16x16 -> pictures"
one_process scripts/train_autoencoder.py --config $CONFIG --data_dir $RUN/data/train --val_data_dir $RUN/data/val --logdir $RUN/autoencoder

heading "3/9 Check that held-out pictures survive the round trip through the latents"
one_process scripts/check_roundtrip.py --config $CONFIG --vae_path $RUN/autoencoder --data_dir $RUN/data/val --logdir $RUN/roundtrip

heading "4/9 Encode the training pictures once, into a latent cache"
one_process scripts/encode_dataset.py --config $CONFIG --vae_path $RUN/autoencoder --data_dir $RUN/data/train --cache_dir $RUN/latents

heading "5/9 Train a class-conditional diffusion model on the latents, with 2 ranks"
two_ranks scripts/image_train_vae.py --config $CONFIG --cache_dir $RUN/latents --logdir $RUN/diffusion

heading "6/9 Train a small classifier of real pictures, to judge the samples"
one_process scripts/classifier_train.py --config $CONFIG --data_dir $RUN/data/train --val_data_dir $RUN/data/val --logdir $RUN/classifier

heading "7/9 Sample pictures of every motion, with 2 ranks"
two_ranks scripts/image_sample_vae.py --config $CONFIG --model_path $RUN/diffusion/ema_*.pt --timestep_respacing ddim50 --logdir $RUN/samples

heading "8/9 Measure the samples: do they show the motion that was asked for, and how far are they from real ones?"
one_process scripts/evaluate.py --config $CONFIG --samples $RUN/samples/samples_*.npz --reference $RUN/data/val --train_dir $RUN/data/train --classifier_path $RUN/classifier/model*.pt --logdir $RUN/evaluation

heading "9/9 Done; look at"
