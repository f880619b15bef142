#!/bin/bash
# Train with Slurm on one or more nodes: srun starts one task per GPU, and ranks connect by Slurm's variables.
#   sbatch --nodes 2 docs/launch/slurm_srun.sh --config configs/images/512.yaml --cache_dir latents_cache/mine
#SBATCH --job-name=diffusion
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300          # 5 min before the time limit: save a checkpoint and exit with status 0
#SBATCH --requeue                  # the requeued job resumes the run

export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK OMP_WAIT_POLICY=PASSIVE
srun --kill-on-bad-exit=1 --cpus-per-task "$SLURM_CPUS_PER_TASK" \
    python scripts/image_train_vae.py --logdir "runs/$SLURM_JOB_NAME" "$@"
