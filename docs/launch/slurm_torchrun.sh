#!/bin/bash
# Train with Slurm and torchrun: srun starts one torchrun per node, which starts the ranks of the node.
#   sbatch --nodes 2 docs/launch/slurm_torchrun.sh --config configs/images/512.yaml --cache_dir latents_cache/mine
#SBATCH --job-name=diffusion
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300          # torchrun forwards it to the ranks, which save; torchrun itself exits with an error

export OMP_NUM_THREADS=8 OMP_WAIT_POLICY=PASSIVE
RENDEZVOUS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --shutdown-timeout 280 \
    --nnodes "$SLURM_NNODES" --nproc_per_node 8 --rdzv_backend c10d \
    --rdzv_id "$SLURM_JOB_ID" --rdzv_endpoint "$RENDEZVOUS:29500" \
    scripts/image_train_vae.py --logdir "runs/$SLURM_JOB_NAME" "$@"
