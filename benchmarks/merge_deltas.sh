#!/usr/bin/env bash
# Train SmolLM2 twice, on arithmetic and on ARC-Easy, merge the two deltas, and validate all four models on both.
#
# LIFT_SMOLLM2_DIR is the model's folder, LIFT_DATA_DIR has math_gsm8k_train.json and llm_adapters/ARC-Easy/train.json;
# deltas and models go to the current folder. Half an hour on two cores; the record is docs/results/smollm2.md.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
main=("$root/.venv/bin/python" "$root/main.py")
declare -A rows=(
    [math10k]="$LIFT_DATA_DIR/math_gsm8k_train.json"
    [commonsense170k]="$LIFT_DATA_DIR/llm_adapters/ARC-Easy/train.json"
)
settings=(
    --trainer.accelerator cpu --trainer.precision 32-true --trainer.max_steps 40 --trainer.val_check_interval 1.0
    --trainer.logger false --trainer.enable_checkpointing false --trainer.enable_progress_bar false
    --lift.rank 16 --lift.lra_rank 16 --lift.interval 20 --model.lr 5e-4 --model.accumulate_grad_batches 1
    --data.batch_size 8 --data.max_length 256 --data.val_size 64 --data.max_samples 2000
)
for task in math10k commonsense170k; do
    "${main[@]}" fit --config "configs/$task.yaml" "${settings[@]}" --data.path "${rows[$task]}" \
        --model.model_name_or_path "$LIFT_SMOLLM2_DIR" --trainer.callbacks \
        "[{class_path: lift_lightning.callbacks.DeltaExport, init_args: {output: $task-delta}}]"
done
"${main[@]}" delta merge --inputs "[math10k-delta, commonsense170k-delta]" --output both-delta --overlap sum \
    --base "$LIFT_SMOLLM2_DIR"
for delta in math10k commonsense170k both; do
    "${main[@]}" delta apply --delta "$delta-delta" --base "$LIFT_SMOLLM2_DIR" --output "$delta-model"
done
for model in "$LIFT_SMOLLM2_DIR" math10k-model commonsense170k-model both-model; do
    for task in math10k commonsense170k; do
        echo "$model on $task"
        "${main[@]}" validate --config "configs/$task.yaml" "${settings[@]}" --data.path "${rows[$task]}" \
            --trainer.callbacks "[]" --model.model_name_or_path "$model"
    done
done
