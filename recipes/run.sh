#!/usr/bin/env bash
# Train a row of the paper's Table 1, or a control:
#
#   run.sh MODEL ALGORITHM SELECTION [SETTINGS OF verl OR hybrid_lora ...]
#
#   MODEL      qwen2_5_1_5b, qwen2_5_3b, qwen2_5_7b, falcon_h1_0_5b, qwen3_5_0_8b
#   ALGORITHM  grpo, gspo, gspo_narrow_clip, or sft
#   SELECTION  hybrid_lora, adalora, autolora, lora_drop, lora_ffn, random, gradient_norm, o_proj; full and lora are
#              verl's own, without the plugin
#
# Where the allocation of a selection is not there yet, probe.sh makes it first. The same command resumes a run.
# Variables: those of settings.sh, and
#   ALLOCATION  another allocation; empty: the run probes for itself, by hybrid_lora.probe settings that you add
#   LOGGER      wandb, tensorboard or swanlab, beside the console and metrics.jsonl
#   NODES       machines of a Ray cluster that runs already
#   TORCHRUN    command that starts SFT
#   PLAN        1: say what the run will need, by hybrid-lora-plan, and run nothing
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/settings.sh"

[ $# -ge 3 ] || usage
MODEL=$1 ALGORITHM=$2 SELECTION=$3
shift 3

name_run "$MODEL" "$ALGORITHM" "$SELECTION"
ALLOCATION=${ALLOCATION-$OUTPUT/allocations/$TASK-$MODEL-$SELECTION}
LOGGER=${LOGGER:-}
NODES=${NODES:-1}
PLAN=${PLAN:-}
TORCHRUN=${TORCHRUN:-$PYTHON -m torch.distributed.run --standalone --nproc-per-node=$GPUS}

case $ALGORITHM in
  sft) groups=recipe/sft/ at=_global_ model=model ;;
  *) groups=recipe/ at=actor_rollout_ref model=actor_rollout_ref.model ;;
esac
case $SELECTION in
  full | lora) selection=${groups#recipe/}selection ALLOCATION= ;;
  *) selection=selection ;;
esac

require model "$MODEL"
require "$selection" "$SELECTION"
require "${groups#recipe/}task" "$TASK"
require "${groups#recipe/}machine" "$MACHINE"
[ "$ALGORITHM" = sft ] || require algorithm "$ALGORITHM"

# Later parts win over earlier ones, and settings over all parts.
parts=("+recipe/model@$at=$MODEL" "+${groups}task=$TASK")
[ "$ALGORITHM" = sft ] || parts+=("+recipe/algorithm=$ALGORITHM")
parts+=("+${groups}machine=$MACHINE")
! is_recurrent "$MODEL" || parts+=("+${groups}layout=padded")
parts+=("+recipe/$selection=$SELECTION")

settings=(
  "trainer.n_gpus_per_node=$GPUS"
  "trainer.experiment_name=$RUN"
  "trainer.default_local_dir=$OUTPUT/$RUN/checkpoints"
  "hydra.run.dir=$OUTPUT/$RUN/hydra"
  "trainer.logger=[console,file${LOGGER:+,$LOGGER}]"
)
rows=$DATA/$TASK/rl
[ "$ALGORITHM" != sft ] || rows=$DATA/$TASK/sft
train=$rows/train.parquet
[ -z "$CODE" ] || [ "$ALGORITHM" = sft ] || train="[$train,$DATA/leetcode/rl/train.parquet]"
settings+=("data.train_files=$train" "data.val_files=$rows/validation.parquet")
case $MODEL-$SELECTION in
  # A fused kernel reads this weight in training, so that PEFT refuses an adapter there.
  falcon_h1_*-lora) settings+=("$model.exclude_modules=[out_proj]") ;;
  # Of some modules of 16 rows an adapter of rank 16 would be larger than the weight.
  qwen3_5_*-full) MODEL_PATH=$(model_path "$MODEL") ;;
  qwen3_5_*-lora) MODEL_PATH=$(model_path "$MODEL") settings+=("$model.lora_rank=8" "$model.lora_alpha=16") ;;
  qwen3_5_*) MODEL_PATH=$(model_path "$MODEL") settings+=(hybrid_lora.lora.rank=8 hybrid_lora.lora.alpha=16) ;;
esac
[ -z "$MODEL_PATH" ] || settings+=("$model.path=$MODEL_PATH")
# A plan needs none: it goes by the budget.
[ -z "$PLAN" ] || [ -e "$ALLOCATION" ] || ALLOCATION=
[ -z "$ALLOCATION" ] || settings+=("hybrid_lora.allocation=$ALLOCATION")
if [ "$NODES" != 1 ]; then
  [ "$ALGORITHM" != sft ] || { echo "run.sh: NODES is for Ray; start SFT on several machines by TORCHRUN" >&2; exit 2; }
  export NODES
  parts+=("+recipe/cluster=several_nodes")
fi

if [ -n "$ALLOCATION" ] && [ ! -e "$ALLOCATION" ] && [ -z "$PLAN" ]; then
  "$here/probe.sh" "$MODEL" "$SELECTION"
fi

if [ "$ALGORITHM" = sft ]; then
  read -ra start <<<"$TORCHRUN"
  start+=(-m verl.trainer.sft_trainer)
else
  start=("$PYTHON" -m verl.trainer.main_ppo)
fi
command=("${start[@]}" --config-dir "$here" "${parts[@]}" "${settings[@]}" "$@")
if [ -n "$PLAN" ]; then
  run "$PYTHON" -m hybrid_lora_plugin.cli.plan -- "${command[@]}"
  exit
fi

export VERL_FILE_LOGGER_PATH=$OUTPUT/$RUN/metrics.jsonl TENSORBOARD_DIR=${TENSORBOARD_DIR:-$OUTPUT/$RUN/tensorboard}
if [ -z "$DRY_RUN" ]; then
  mkdir -p "$OUTPUT/$RUN"
  # verl begins the file anew, also when a run resumes.
  [ ! -e "$VERL_FILE_LOGGER_PATH" ] || mv "$VERL_FILE_LOGGER_PATH" "$OUTPUT/$RUN/metrics-until-$(date -u +%FT%T).jsonl"
fi
# In the place of this script, so that a signal reaches it.
run exec "${command[@]}"
