"""LLaMA-Factory trains a target: your recipe, run with one more callback.

    python examples/trainers/llama_factory_run.py my_recipe.yaml learning_rate=1e-5

Its arguments are those of ``llamafactory-cli train``: a recipe, and settings that override it.
"""

from llamafactory.train.tuner import run_exp

import qtarget as qt

if __name__ == "__main__":
    run_exp(callbacks=[qt.TargetCallback("dft")])  # the line
