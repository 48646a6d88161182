#!/usr/bin/env bash
# Four GPUs of 48 GB (A40): all weights of ChatGLM2-6B or ChatGLM3-6B with ZeRO-3. ChatGLM-6B needs the offload file.
#   MODEL=THUDM/chatglm2-6b MODE=glm2 bash scripts/train_four_gpus.sh [more flags of train.py]
# Stopped or killed? The same line again goes on from the last state.
set -euo pipefail
MODEL=${MODEL:-ChatGLM3-6B/}
MODE=${MODE:-glm3}
TRAIN_TYPE=${TRAIN_TYPE:-all}
TRAIN_PATH=${TRAIN_PATH:-data/spo_0.json}
OUTPUT=${OUTPUT:-output-$MODE-$TRAIN_TYPE}
case "$MODE-$TRAIN_TYPE" in
    glm-all) DS_FILE=${DS_FILE:-ds_zero3_offload.json} ;;
    *-all) DS_FILE=${DS_FILE:-ds_zero3_no_offload.json} ;;
    *) DS_FILE=${DS_FILE:-ds_zero2_no_offload.json} ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1,2,3}
exec bash scripts/job.sh deepspeed --master_port "${MASTER_PORT:-29500}" train.py \
    --train_path "$TRAIN_PATH" --model_name_or_path "$MODEL" --mode "$MODE" --train_type "$TRAIN_TYPE" \
    --max_len 1560 --max_src_len 1024 \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 4 --num_train_epochs 2 \
    --learning_rate 1e-4 --weight_decay 0.1 --warmup_ratio 0.1 --seed 1234 \
    --ds_file "$DS_FILE" --gradient_checkpointing \
    --show_loss_step 10 --save_state_step 200 --resume auto --output_dir "$OUTPUT" "$@"
