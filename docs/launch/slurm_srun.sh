#!/bin/bash
# One or many nodes with Slurm alone: srun starts a task for every GPU; ranks meet by Slurm's variables.
#   sbatch --nodes 2 docs/launch/slurm_srun.sh --config configs/images/512.yaml --cache_dir latents_cache/mine
#SBATCH --job-name=diffusion
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300          # five minutes before the end: save, and exit 0
#SBATCH --requeue                  # the same command goes on where the run stopped

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK OMP_WAIT_POLICY=PASSIVE
srun --kill-on-bad-exit=1 --cpus-per-task "$SLURM_CPUS_PER_TASK" \
    python scripts/image_train_vae.py --logdir "runs/$SLURM_JOB_NAME" "$@"
