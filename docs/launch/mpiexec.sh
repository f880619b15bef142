#!/bin/bash
# One machine, or the machines of a host file, with MPI: a rank for every GPU (or, without GPUs, for some of the cores).
#   RANKS=8 docs/launch/mpiexec.sh --config configs/images/512.yaml --cache_dir latents_cache/mine --logdir runs/it
#   RANKS=16 HOSTS=hosts.txt docs/launch/mpiexec.sh ...          # hosts.txt: one line a machine, such as node1:8
set -euo pipefail

RANKS=${RANKS:-2}
CORES=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > RANKS ? CORES / RANKS : 1))} OMP_WAIT_POLICY=PASSIVE
mpiexec ${HOSTS:+-f "$HOSTS"} -n "$RANKS" python scripts/image_train_vae.py "$@"
