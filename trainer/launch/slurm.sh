#!/usr/bin/env bash
# Slurm: sbatch --nodes=4 --gpus-per-node=8 trainer/launch/slurm.sh RECIPE.toml [--section.key=value ...]
#SBATCH --job-name=tokenmill
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=%x-%j.out
#SBATCH --requeue
# Two minutes before the limit every process writes a checkpoint and leaves; the requeued job goes on from it.
#SBATCH --signal=USR1@120
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# torchrun passes on only SIGTERM, so the trainers themselves are signalled, which srun's children are on every node.
trap 'srun --overlap --ntasks-per-node=1 pkill -USR1 -f "[t]okenmill.trainer" || true; wait; scontrol requeue "$SLURM_JOB_ID"' USR1
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=gpu \
  --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" -m tokenmill.trainer "$@" &
wait $!
