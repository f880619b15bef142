#!/bin/bash
# Train with MPI on one machine or on the nodes of a host file: one rank per GPU, or several cores per rank on CPUs.
#   RANKS=8 docs/launch/mpiexec.sh --config configs/images/512.yaml --cache_dir latents_cache/mine --logdir runs/it
#   RANKS=16 HOSTS=hosts.txt docs/launch/mpiexec.sh ...          # hosts.txt: one line per node, e.g. node1:8
set -euo pipefail

RANKS=${RANKS:-2}
CORES=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((CORES > RANKS ? CORES / RANKS : 1))} OMP_WAIT_POLICY=PASSIVE
mpiexec ${HOSTS:+-f "$HOSTS"} -n "$RANKS" python scripts/image_train_vae.py "$@"
