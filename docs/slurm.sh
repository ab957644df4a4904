#!/bin/bash
# Trains RECIPE on all nodes of the job, and goes on where an earlier job was stopped:
#
#     sbatch --nodes 4 --gpus-per-node 8 docs/slurm.sh RECIPE.toml [--section.key value]
#
# Submit it several times: one runs at a time, and when the run is finished the rest end at once.
#SBATCH --job-name=redi
#SBATCH --dependency=singleton
#SBATCH --ntasks-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# One torchrun on each node; they meet at the first one. When a rank dies all are started again, and
# go on from the newest checkpoint. 150 of the 180 s before the time limit are for the last save.
# SLURM's SIGTERM reaches torchrun too, which then starts nothing again and returns 1, also where all
# ranks stopped in order (their 75 does not get through): the next job in line takes over.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first:${PORT:-29400}" \
    --max-restarts 3 \
    --shutdown-timeout 150 \
    -m redi.engine.cli train "$@"
