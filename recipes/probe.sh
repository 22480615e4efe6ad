#!/usr/bin/env bash
# Choose the modules that a selection tunes fully, and write the allocation to
# OUTPUT/allocations/TASK-MODEL-SELECTION:
#
#   probe.sh MODEL SELECTION [OPTIONS OF hybrid-lora-probe ...]
#
#   MODEL      qwen2_5_1_5b, qwen2_5_3b, qwen2_5_7b, falcon_h1_0_5b, qwen3_5_0_8b
#   SELECTION  hybrid_lora, adalora, autolora, lora_drop, lora_ffn, random, gradient_norm, o_proj
#
# Variables: those of settings.sh, and
#   FROM  an allocation that was probed already: the choice is made from its measurements, in seconds
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

[ $# -ge 2 ] || usage
MODEL=$1 SELECTION=$2
shift 2
require model "$MODEL"
require selection "$SELECTION"

FROM=${FROM:-}
criterion=$(value_in "selection/$SELECTION" criterion)
[ -n "$criterion" ] || { echo "probe.sh: $SELECTION tunes by verl alone and has no allocation" >&2; exit 2; }
arguments=("criterion=$criterion" "output_dir=$OUTPUT/allocations/$TASK-$MODEL-$SELECTION")

if [ -n "$FROM" ]; then
  run "$PYTHON" -m hybrid_lora_plugin.cli.allocate "artifact=$FROM" "${arguments[@]}" "$@"
  exit
fi
arguments+=("model.path=$(model_path "$MODEL")")
case $MODEL in qwen3_5_*) arguments+=(lora.rank=8 lora.alpha=16) ;; esac  # as run.sh trains it
start=("$PYTHON")
case $criterion in
  random | lora_ffn | spread) ;;  # these read no measurement
  *)
    arguments+=("probe.files=[$DATA/$TASK/sft/train.parquet]")
    [ "$TASK" != stand_ins ] || arguments+=(probe.warmup_steps=2 probe.partitions=4 probe.max_length=512)
    [ "$GPUS" = 1 ] || start+=(-m torch.distributed.run --standalone "--nproc-per-node=$GPUS")
    ;;
esac
run exec "${start[@]}" -m hybrid_lora_plugin.cli.probe "${arguments[@]}" "$@"
