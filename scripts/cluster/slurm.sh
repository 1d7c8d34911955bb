#!/usr/bin/env bash
# A stage on Slurm, one process a node with all its GPUs; a run that is told to stop or loses a node goes on by itself:
#
#   sbatch scripts/cluster/slurm.sh --config=configs/pretrain.py --config.mesh.fsdp=8
#
# From the repository's folder, on a file system that all nodes share, installed there: pip install -e '.[cuda]'.
# Two minutes before its time is over Slurm sends SIGUSR1: the state is saved, and code 75 puts the job into the queue
# again. A mistake in the command (2) does not.
#SBATCH --job-name=nanovision
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
code=0
srun --cpus-per-task="${SLURM_CPUS_PER_TASK:-32}" --kill-on-bad-exit=0 .venv/bin/python -m nanovision_jax.train "$@" || code=$?
if [ "$code" -eq 75 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
