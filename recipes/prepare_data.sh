#!/usr/bin/env bash
# Prepare the rows of TASK, in DATA/TASK: for reinforcement learning in rl, for the probe and SFT in sft.
#
#   prepare_data.sh [OPTIONS OF hybrid-lora-data ...]
#
# Each folder gets a datasheet with all that was left out. What is there stays; an interrupted preparation goes on.
# Variables: those of settings.sh, and
#   SOURCE  a file or folder with the set as it is published; empty: the hub
#   FORMATS rl sft, or one of them
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

SOURCE=${SOURCE:-}
FORMATS=${FORMATS:-rl sft}
require task "$TASK"

prepare() {  # prepare FOLDER ARGUMENTS ...: unless it is there
  local folder=$1
  shift
  if [ -e "$folder/README.md" ]; then
    echo "prepare_data.sh: $folder is there"
  else
    run "$PYTHON" -m hybrid_lora_plugin.cli.data "output_dir=$folder" "$@"
  fi
}

for format in $FORMATS; do
  case $TASK in
    reasoning)
      arguments=(set=mixture_of_thoughts)
      # Answers of code have no tests there; CODE=1 takes problems that do.
      [ "$format" = sft ] || arguments+=("configs=[math,science]")
      ;;
    gsm8k)
      # Of 7473 rows about 370, so that the best checkpoint is not chosen on the test.
      arguments=(set=gsm8k validation=0.05)
      ;;
    stand_ins)
      run env -C "$here/.." "$PYTHON" -m recipes.stand_ins "$DATA/stand_ins"
      arguments=(set=mixture_of_thoughts "source=$DATA/stand_ins/mixture" "configs=[math,science]" validation=0.1
        "decontaminate=[gsm8k=$DATA/stand_ins/gsm8k.jsonl,math500=$DATA/stand_ins/math500.jsonl]")
      ;;
    *)
      echo "prepare_data.sh: it knows no data of $TASK; write $DATA/$TASK/{rl,sft}/{train,validation}.parquet" >&2
      exit 2
      ;;
  esac
  [ -z "$SOURCE" ] || arguments+=("source=$SOURCE")
  prepare "$DATA/$TASK/$format" "${arguments[@]}" "format=$format" "$@"
done
if [ -n "$CODE" ]; then
  prepare "$DATA/leetcode/rl" set=leetcode
fi
