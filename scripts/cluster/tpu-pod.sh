#!/usr/bin/env bash
# A stage on all hosts of a TPU slice, through gcloud:
#
#   bash scripts/cluster/tpu-pod.sh NAME ZONE FOLDER --config=configs/pretrain.py --config.mesh.fsdp=16
#
# FOLDER is this repository on a file system that all hosts have mounted (Filestore or another NFS), installed there:
# pip install -e '.[tpu]'. A slice of one host (v5e-8, v6e-8) needs neither: log in, and run the command. A host that is
# taken away ends the others with code 75; the same command goes on.
set -euo pipefail
if [ $# -lt 4 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit 2
fi
name=$1 zone=$2 folder=$3
shift 3
printf -v arguments '%q ' "$@"
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="cd $(printf %q "$folder") &&
  .venv/bin/python -m nanovision_jax.train $arguments --coordinator=auto"
