# What the scripts of this folder share; sourced by them. Every variable can be set in the environment.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

MACHINE=${MACHINE:-a800x8}            # a file in recipe/machine: a800x8, h100x8, rtx4090x2, cpu
TASK=${TASK:-reasoning}               # a file in recipe/task: reasoning, gsm8k, stand_ins
DATA=${DATA:-data}                    # where prepare_data.sh writes
OUTPUT=${OUTPUT:-outputs/recipes}     # where runs, allocations and evaluations go
RUN=${RUN:-}                          # folder of a run in OUTPUT; empty: TASK-MODEL-ALGORITHM-SELECTION
MODEL_PATH=${MODEL_PATH:-}            # folder of the model's weights; empty: by name from the hub
CODE=${CODE:-}                        # 1: train on the problems of LeetCodeDataset too, which needs bubblewrap
DRY_RUN=${DRY_RUN:-}                  # 1: print the commands, one a line, and run nothing
PYTHON=${PYTHON:-python3}

case $MACHINE in
  *x[0-9]*) GPUS=${GPUS:-${MACHINE##*x}} ;;
  *) GPUS=${GPUS:-1} ;;
esac

if [ "$MACHINE" = cpu ] && [ -z "${VERL_PLATFORM:-}" ]; then
  # What verl, Ray and vLLM need where there is no GPU.
  eval "$(cd "$here/.." && "$PYTHON" -c \
    'from recipes.demo.environment import CPU_ENVIRONMENT as e; print("export", *(f"{k}={v}" for k, v in e.items()))')"
fi

usage() {  # the comment at the top of the script, and exit status 2
  sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0" >&2
  exit 2
}

require() {  # require FOLDER NAME: a part of that name is there
  [ -f "$here/recipe/$1/$2.yaml" ] && return
  echo "$(basename "$0"): $2 is no file in recipe/$1; give one of:" \
    "$(cd "$here/recipe/$1" && ls -- *.yaml | sed 's/\.yaml$//' | tr '\n' ' ')" >&2
  exit 2
}

value_in() {  # value_in FILE KEY: the value of a key that the file has once
  sed -n "s/^ *$2: *//p" "$here/recipe/$1.yaml"
}

model_path() {  # model_path MODEL
  case $1 in
    qwen3_5_*) echo "${MODEL_PATH:-$DATA/models/$1}" ;;  # as prepare_model.sh writes it
    *) echo "${MODEL_PATH:-$(value_in "model/$1" path)}" ;;
  esac
}

DATA=$(realpath -m -- "$DATA") OUTPUT=$(realpath -m -- "$OUTPUT")  # workers may start in another folder

[ "$TASK" != stand_ins ] || MODEL_PATH=${MODEL_PATH:-$DATA/stand_ins/model}

is_recurrent() {  # is_recurrent MODEL: it has recurrent layers beside attention
  case $1 in falcon_h1_* | qwen3_5_*) return 0 ;; *) return 1 ;; esac
}

name_run() {  # name_run MODEL ALGORITHM SELECTION
  RUN=${RUN:-$TASK-$1-$2-$3}
}

run() {  # run [exec] COMMAND ARGUMENTS ...: unless DRY_RUN, which prints it as it can be pasted
  if [ -n "$DRY_RUN" ]; then
    [ "$1" != exec ] || shift
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
