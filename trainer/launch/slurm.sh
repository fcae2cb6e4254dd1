#!/usr/bin/env bash
# Slurm: sbatch --nodes=4 --gpus-per-node=8 trainer/launch/slurm.sh RECIPE.toml [--section.key=value ...], or `run PIPELINE.toml`
#SBATCH --job-name=tokenmill
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the limit this script (B:) tells every trainer to write a checkpoint and leave, which they do with
# status 75; the requeued job goes on from it. After a SIGTERM, as by scancel, there is less time: torchrun passes it on
# and kills its trainers 30 s later.
#SBATCH --signal=B:USR1@120
set -euo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# USR1 would end torchrun itself, so only the processes that it started are signalled, on every node: theirs are the
# command lines with "-u -m".
checkpoint() {
  srun --overlap --ntasks-per-node=1 pkill -USR1 -f -- '-u -m tokenmill[.]trainer' || true
  wait
  scontrol requeue "$SLURM_JOB_ID"
}
trap checkpoint USR1
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=gpu \
  --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="$SLURM_JOB_ID" \
  --max-restarts=0 -m tokenmill.trainer "$@" &
wait $!
