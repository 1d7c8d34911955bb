#!/usr/bin/env bash
# The whole real road at the reference size on this machine, from published data to a report:
#
#   bash scripts/speedrun.sh --hardware=a100-80gx8 [--size=d20] [--name=speedrun] [--yes] [--config.FIELD=VALUE …]
#
# It plans first, and asks before it spends (--yes: it does not). Fields are given to every stage. What is finished is
# skipped; what was interrupted goes on where it stopped. llava_instruct wants COCO's train2017.zip: see the README.
set -euo pipefail
hardware='' size=d20 name=speedrun yes=''
fields=()
for argument in "$@"; do
  case "$argument" in
    --hardware=*|--size=*|--name=*) declare "$(cut -d= -f1 <<< "${argument#--}")=${argument#*=}";;
    --yes) yes=1;;
    --config.*) fields+=("$argument");;
    -h|--help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0;;
    *) echo "error: unknown argument '$argument'. See --help." >&2; exit 2;;
  esac
done
[ -n "$hardware" ] || { echo "error: which hardware? Say --hardware=a100-80gx8, h100x8 …" >&2; exit 2; }
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}

"$python" -m nanovision_jax.plan --config="configs/pretrain.py:$size" --hardware="$hardware" --road ${fields[@]+"${fields[@]}"}
if [ -z "$yes" ]; then
  read -r -p "Spend that? [y/N] " answer || answer=''
  case "$answer" in [yY]*) ;; *) echo "nothing was spent"; exit 0;; esac
fi
for set in fineweb_edu magpie llava_pretrain llava_instruct; do
  "$python" -m nanovision_jax.prepare "$set"  # which does nothing where that is done
done
for stage in clip pretrain sft vision_pretrain vision_instruct; do
  echo; echo "== $stage"
  "$python" -m nanovision_jax.train --config="configs/$stage.py:$size" --config.name="$name" ${fields[@]+"${fields[@]}"}
done
"$python" -m nanovision_jax.evaluate --run="runs/$name/pretrain" --task=bpb
"$python" -m nanovision_jax.evaluate --run="runs/$name/vision_instruct" --task=vqa --limit=2400
"$python" -m nanovision_jax.report "runs/$name"
