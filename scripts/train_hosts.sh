#!/usr/bin/env bash
# Several hosts. Needs the same clone, environment, data and model folder on all of them, ssh without a password, and
# a hostfile with a line for each: "HOST slots=NUMBER_OF_GPUS".
#   HOSTFILE=hostfile MODEL=ChatGLM3-6B/ bash scripts/train_hosts.sh [more flags of train.py]
# Where ssh or pdsh is missing, start this line on each host, with its number and an address of the first one that all
# reach: LAUNCHER_FLAGS="--no_ssh --node_rank 1 --master_addr 10.0.0.1" (0 on the first host).
# Stopped or killed? The same line again goes on from the last state. OUTPUT must be a folder that all hosts see.
set -euo pipefail
HOSTFILE=${HOSTFILE:-hostfile}
MODEL=${MODEL:-ChatGLM3-6B/}
MODE=${MODE:-glm3}
TRAIN_TYPE=${TRAIN_TYPE:-all}
TRAIN_PATH=${TRAIN_PATH:-data/spo_0.json}
OUTPUT=${OUTPUT:-output-$MODE-$TRAIN_TYPE}
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ -f "$HOSTFILE" ] || { echo "error: HOSTFILE=$HOSTFILE: no such file: write a line \"HOST slots=GPUS\" for each host" >&2; exit 2; }
awk -v name="error: HOSTFILE=$HOSTFILE" '
    /^[[:space:]]*(#|$)/ { next }
    !/^[^[:space:]]+[[:space:]]+slots=[1-9][0-9]*[[:space:]]*$/ { print name ":" FNR ": write HOST slots=GPUS: " $0; exit bad = 2 }
    seen[$1]++ { print name ":" FNR ": the host stands there twice, give it one line: " $1; exit bad = 2 }
    { hosts++ }
    END { if (!bad && !hosts) { print name ": holds no host: write a line HOST slots=GPUS for each"; bad = 2 }; exit bad }
' "$HOSTFILE" >&2

# Without the launcher's own lines, the last of which reads like a failure where a run leaves because it was asked to.
# shellcheck disable=SC2086  # several flags
deepspeed --hostfile "$HOSTFILE" ${LAUNCHER_FLAGS:-} --log_level critical --master_port "${MASTER_PORT:-29500}" train.py \
    --train_path "$TRAIN_PATH" --model_name_or_path "$MODEL" --mode "$MODE" --train_type "$TRAIN_TYPE" \
    --max_len 1560 --max_src_len 1024 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --num_train_epochs 2 \
    --learning_rate 1e-4 --weight_decay 0.1 --warmup_ratio 0.1 --seed 1234 \
    --ds_file "${DS_FILE:-ds_zero3_no_offload.json}" --gradient_checkpointing \
    --show_loss_step 10 --save_state_step 200 --resume auto --output_dir "$OUTPUT" "$@"
