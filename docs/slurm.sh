#!/bin/bash
# Trains RECIPE on all nodes of the job; resumes if an earlier job was stopped:
#
#     sbatch --nodes 4 --gpus-per-node 8 docs/slurm.sh RECIPE.toml [--section.key value]
#
# Submit it several times: one job runs at a time, and jobs after the end of the run exit at once.
# (--requeue repeats a job whose node failed, not one that reached its time limit.)
#SBATCH --job-name=redi
#SBATCH --dependency=singleton
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

# One torchrun on each node, with the first node as the endpoint. If a rank dies, all are restarted
# and resume from the newest checkpoint. 150 of the 180 s before the time limit are for the last
# save. SLURM's SIGTERM reaches torchrun too, which then restarts nothing and returns 1 even if all
# ranks stopped normally (it does not pass on their 75): the next job in the queue resumes the run.
#
# Each node has one task, which gets all its CPUs and memory: without --cpus-per-task SLURM binds
# all ranks, with their loader workers, to a single core. If gloo and NCCL choose a network that does
# not connect the nodes, name the right one of `ip -brief address`:
# sbatch --export=ALL,INTERFACE=ib0 ...
if [ -n "${INTERFACE:-}" ]; then
    export GLOO_SOCKET_IFNAME="$INTERFACE" NCCL_SOCKET_IFNAME="$INTERFACE"
fi
# If torchrun and redi are not in the PATH of a node's shell, activate its environment here:
# source /shared/venv/bin/activate; module load ...
# The token cache must be on a file system that all nodes share: export REDI_CACHE=/shared/cache
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-1}" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first:${PORT:-29400}" \
    --max-restarts 3 \
    --shutdown-timeout 150 \
    --no-python redi train "$@"
