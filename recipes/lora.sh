#!/bin/sh
# A LoRA run from the first step to a merged model that is trained further: a few minutes on two cores.
#     sh recipes/lora.sh [FOLDER]
set -eu
OUT=${1:-build/lora}
BASE=build/quickstart/SmolLM2-135M-Instruct
python recipes/prepare_quickstart.py                                   # a small model, and rows to train on
python recipes/eval_demo.py --out "$OUT/sums.jsonl" --problems 8       # sums to score it with

# Train adapters: the folder holds them, the tokenizer and the name of the base.
qtarget train --config recipes/quickstart.yaml --use_peft true --lora_r 16 --lora_target_modules q_proj v_proj \
    --learning_rate 2e-4 --max_steps 4 --output_dir "$OUT/adapter"

# Look at an answer.
qtarget chat "$OUT/adapter" --prompt "What is 4 + 5?" --max_new_tokens 60

# Did it help? Score base and adapter on the same problems.
score() {
    qtarget eval --model "$1" --tasks "$OUT/sums.jsonl" --verifier math --n 2 --max_new_tokens 40 --batch_size 24 \
        --instruction "End with #### and the number." -o "$2"
}
score "$BASE" "$OUT/before"
score "$OUT/adapter" "$OUT/after"
qtarget compare before="$OUT/before" after="$OUT/after"

# Continue: the same adapter is trained further.
qtarget train --config recipes/quickstart.yaml --model_name_or_path "$OUT/adapter" \
    --learning_rate 2e-4 --max_steps 2 --output_dir "$OUT/adapter-2"

# Merge adapter and base into one plain model, for anything that reads Transformers models.
qtarget merge "$OUT/adapter-2" -o "$OUT/merged"
qtarget chat "$OUT/merged" --prompt "What is 4 + 5?" --max_new_tokens 60

# And new adapters on top of it.
qtarget train --config recipes/quickstart.yaml --model_name_or_path "$OUT/merged" --use_peft true \
    --learning_rate 2e-4 --max_steps 2 --output_dir "$OUT/adapter-3"
