#!/usr/bin/env bash
# Save the text model of a multimodal checkpoint alone, in DATA/models/MODEL, where the other scripts look for it:
#
#   prepare_model.sh MODEL
#
#   MODEL  qwen3_5_0_8b; the other models need no preparation
#
# What is there stays. Variables: those of settings.sh, and
#   SOURCE  a folder with the checkpoint as it is published; empty: the hub
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

[ $# -eq 1 ] || usage
require model "$1"
case $1 in
  qwen3_5_0_8b) published=Qwen/Qwen3.5-0.8B ;;
  *) echo "prepare_model.sh: $1 is used as it is published; give qwen3_5_0_8b" >&2; exit 2 ;;
esac
folder=$DATA/models/$1
if [ -e "$folder/config.json" ]; then
  echo "prepare_model.sh: $folder is there"
  exit
fi
run exec env -C "$here/.." "$PYTHON" -m recipes.text_model "${SOURCE:-$published}" "$folder"
