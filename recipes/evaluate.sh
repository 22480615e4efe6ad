#!/usr/bin/env bash
# Evaluate the export of a run on the paper's benchmarks, or, of a model alone, the untrained model:
#
#   evaluate.sh MODEL [ALGORITHM SELECTION] [OPTIONS OF hybrid-lora-eval ...]
#
# The results are in OUTPUT/evaluations/RUN, or OUTPUT/evaluations/TASK-MODEL. Two of them are compared by
#   hybrid-lora-eval 'compare=[A,B]'
# Variables: those of settings.sh.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

[ $# -ge 1 ] || usage
MODEL=$1
shift
require model "$MODEL"
if [ $# -ge 2 ] && [[ $1 != *=* && $2 != *=* ]]; then
  name_run "$MODEL" "$1" "$2"
  model=$OUTPUT/$RUN/exported label="$1 $2"
  shift 2
else
  RUN=${RUN:-$TASK-$MODEL}
  model=$(model_path "$MODEL") label=untrained
fi

arguments=("model=$model" "output_dir=$OUTPUT/evaluations/$RUN" "label=$label")
case $TASK in
  gsm8k) arguments+=("benchmarks=[gsm8k]" sampling.temperature=0 max_response_length=1024) ;;
  stand_ins)
    arguments+=("benchmarks=[math500,gsm8k]" "data.math500=$DATA/stand_ins/math500.jsonl"
      "data.gsm8k=$DATA/stand_ins/gsm8k.jsonl" max_prompt_length=512 max_response_length=16
      engine.enforce_eager=true engine.max_num_seqs=8)
    ;;
esac
run exec "$PYTHON" -m hybrid_lora_plugin.cli.eval "${arguments[@]}" "$@"
