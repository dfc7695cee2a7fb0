#!/bin/sh
# Makes lm_eval/ and lighteval/ beside it, with an environment for each (Python 3.11):
#   lm_eval 0.4.13, torch 2.13.0, transformers 5.24.0, datasets 5.2.0
#   lighteval 0.13.0, torch 2.13.0, transformers 5.24.0, datasets 5.2.0, xxhash 3.7.3 (it cannot be run with 4)
# lighteval fetches tinyBenchmarks.pkl as its tasks are imported: where there is no network, an empty file of that name in its
# tasks/tasks folder will do.
# Names of lighteval's files hold a bar, which not every file system takes: details_birds_0_TIME is details_birds|0_TIME.
# Use: make.sh PYTHON_WITH_QTARGET PYTHON_WITH_LM_EVAL PYTHON_WITH_LIGHTEVAL
set -e
cd "$(dirname "$0")"
made=$(mktemp -d)
cp -r tasks yaml lighteval_tasks.py offline_lighteval.py make_models.py "$made"
PYTHONPATH=$(cd ../../helpers && pwd) && export PYTHONPATH
cd "$made"
"$1" make_models.py
for model in first second; do
  "$2" -m lm_eval --model hf --model_args "pretrained=$model,dtype=float32" --tasks sums,birds --include_path yaml \
    --device cpu --batch_size 4 --output_path "lm_eval/$model" --log_samples
  "$3" offline_lighteval.py accelerate "model_name=$model,dtype=float32,device=cpu" "sums|0,birds|0" \
    --custom-tasks lighteval_tasks.py --output-dir "lighteval/$model" --save-details
done
find "$made/lm_eval" "$made/lighteval" -name 'samples_*' -o -name 'details_*'
