#!/usr/bin/env bash
# Export the best checkpoint of a run to OUTPUT/RUN/exported, a model that transformers and vLLM load:
#
#   export.sh MODEL ALGORITHM SELECTION [OPTIONS OF hybrid-lora-export, or of verl.model_merger ...]
#
# Best is what the run's validations say; full and lora have no such record and export their last one.
# Variables: those of settings.sh, and
#   STEP  another checkpoint than the best, e.g. 150
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

[ $# -ge 3 ] || usage
name_run "$1" "$2" "$3"
ALGORITHM=$2 SELECTION=$3
shift 3

checkpoints=$OUTPUT/$RUN/checkpoints out=$OUTPUT/$RUN/exported
step=${STEP:-}
if [ -z "$step" ] && [ -f "$checkpoints/best_checkpoint.json" ]; then
  step=$(sed -n 's/^ *"step": \([0-9]*\).*/\1/p' "$checkpoints/best_checkpoint.json")
fi
if [ -z "$step" ]; then
  step=$(cat "$checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null) || step=
fi
if [ -z "$step" ]; then
  [ -n "$DRY_RUN" ] || { echo "export.sh: no checkpoint in $checkpoints; train first, or give RUN" >&2; exit 2; }
  step=STEP
fi
checkpoint=$checkpoints/global_step_$step

case $SELECTION in
  full | lora)
    [ "$ALGORITHM" = sft ] || checkpoint=$checkpoint/actor
    run "$PYTHON" -m verl.model_merger merge --backend fsdp --local_dir "$checkpoint" --target_dir "$out" "$@"
    # verl leaves the adapter beside the base model.
    [ "$SELECTION" = full ] || run env -C "$here/.." "$PYTHON" -m recipes.merge_lora "$out"
    ;;
  *) run "$PYTHON" -m hybrid_lora_plugin.cli.export "checkpoint=$checkpoint" "output_dir=$out" "$@" ;;
esac
