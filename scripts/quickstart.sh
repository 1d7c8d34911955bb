#!/usr/bin/env bash
# The whole road on this machine: installs, trains the five stages at size tiny, evaluates, chats, writes a report.
#
#   bash scripts/quickstart.sh                                            generated pictures, runs in runs/tiny
#   bash scripts/quickstart.sh --name photos --data FOLDER --text PATH    your own, runs in runs/photos
#
# FOLDER holds pretrain.json and instruct.json in LLaVA's format, and images.zip or images/; PATH is a text file or a
# folder of them. What is finished is skipped; what was interrupted goes on where it stopped.
set -euo pipefail
started=$SECONDS
name=tiny data='' text=''
while [ $# -gt 0 ]; do
  case "$1" in
    --name|--data|--text) [ $# -ge 2 ] || { echo "error: $1 needs a value." >&2; exit 2; }; declare "${1#--}=$2"; shift 2;;
    -h|--help) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0;;
    *) echo "error: unknown argument '$1'. See --help." >&2; exit 2;;
  esac
done
if [ -n "$data$text" ]; then
  [ -n "$data" ] && [ -n "$text" ] || { echo "error: --data and --text go together." >&2; exit 2; }
  [ "$name" != tiny ] || name=photos
  for file in "$data/pretrain.json" "$data/instruct.json" "$text"; do
    [ -e "$file" ] || { echo "error: there is no $file." >&2; exit 2; }
  done
  data=$(realpath "$data") text=$(realpath "$text")
fi
cd "$(dirname "$0")/.."
source scripts/install.sh

train() {  # train STAGE [OVERRIDE ...]
  local stage=$1 before=$SECONDS; shift
  echo; echo "== $stage"
  $python -m nanovision_jax.train --config="configs/$stage.py:tiny" --config.name="$name" "$@"
  echo "== $stage took $((SECONDS - before)) s"
}
evaluate() {  # evaluate RUN TASK SPLIT [OPTION ...]; what is newer than the run's end is kept
  local run="runs/$name/$1" task=$2 split=$3; shift 3
  local part=''; [ "$split" = validation ] || part="-$split"
  local option; for option in "$@"; do case $option in --limit=*) part+="-limit${option#*=}";; esac; done
  local file="$run/eval/$task$part.json"
  [ "$file" -nt "$run/lineage.json" ] && return
  echo; echo "== evaluate $run: $task on $split"
  $python -m nanovision_jax.evaluate --run="$run" --task="$task" --split="$split" "$@"
}

if [ -z "$data" ]; then
  for stage in clip pretrain sft vision_pretrain vision_instruct; do train "$stage"; done
else
  captions=(--config.data.source=conversations --config.data.path="$data/pretrain.json")
  answers=(--config.data.source=conversations --config.data.path="$data/instruct.json")
  # Photographs want smaller patches than drawings, a deeper tower and a longer look at each. What clip is told, the
  # vision stages take over from it.
  vision=(--config.model.vision.image_size=64 --config.model.vision.patch_size=16 --config.model.vision.layers=4)
  # pretrain goes first here, so that the tokenizer is trained on the text.
  train pretrain --config.data.source=text --config.data.path="$text"
  train clip "${captions[@]}" "${vision[@]}" --config.data.augment=true --config.steps=2500
  train sft "${answers[@]}"
  train vision_pretrain "${captions[@]}"
  train vision_instruct "${answers[@]}" --config.steps=700
fi

evaluate pretrain bpb validation
evaluate vision_instruct vqa validation --limit=2400
[ -n "$data" ] || evaluate vision_instruct vqa heldout --limit=1200
$python scripts/sample_conversation.py "runs/$name"
$python -m nanovision_jax.report "runs/$name"
echo; echo "all of it took $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
echo "talk to it: $python -m nanovision_jax.chat --run=runs/$name/vision_instruct --image=runs/$name/pictures/1.png"
