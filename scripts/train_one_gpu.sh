#!/usr/bin/env bash
# One GPU: LoRA on ChatGLM3-6B. Change the first lines; everything else is the README's table.
#   MODEL=THUDM/chatglm3-6b MODE=glm3 TRAIN_TYPE=lora bash scripts/train_one_gpu.sh [more flags of train.py]
# Stopped or killed? The same line again goes on from the last state.
set -euo pipefail
MODEL=${MODEL:-ChatGLM3-6B/}
MODE=${MODE:-glm3}
TRAIN_TYPE=${TRAIN_TYPE:-lora}
TRAIN_PATH=${TRAIN_PATH:-data/spo_0.json}
OUTPUT=${OUTPUT:-output-$MODE-$TRAIN_TYPE}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0}
exec bash scripts/job.sh deepspeed --master_port "${MASTER_PORT:-29500}" train.py \
    --train_path "$TRAIN_PATH" --model_name_or_path "$MODEL" --mode "$MODE" --train_type "$TRAIN_TYPE" \
    --max_len 1560 --max_src_len 1024 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --num_train_epochs 2 \
    --learning_rate 1e-4 --weight_decay 0.1 --warmup_ratio 0.1 --seed 1234 \
    --ds_file ds_zero2_no_offload.json --gradient_checkpointing \
    --show_loss_step 10 --save_state_step 200 --resume auto --output_dir "$OUTPUT" "$@"
