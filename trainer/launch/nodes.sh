#!/usr/bin/env bash
# Several nodes by hand: run this on each of them, with the same HEAD and JOB.
#   HEAD=node0:29500 NODES=2 GPUS=8 JOB=run1 trainer/launch/nodes.sh RECIPE.toml [--section.key=value ...]
# RESTARTS=n starts the trainers again when one has failed, or has left with status 75 since it was told to stop (USR1);
# to stop them for good, end a torchrun: it sends them SIGTERM, and kills them 30 s later.
set -euo pipefail
exec torchrun --nnodes="${NODES:?number of nodes}" --nproc-per-node="${GPUS:-gpu}" \
  --rdzv-backend=c10d --rdzv-endpoint="${HEAD:?host:port of the first node}" --rdzv-id="${JOB:?a name for the job}" \
  --max-restarts="${RESTARTS:-0}" -m tokenmill.trainer "$@"
