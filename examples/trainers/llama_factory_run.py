"""LLaMA-Factory trains a target: a recipe of its own, run with one callback more.

    python examples/trainers/llama_factory_run.py my_recipe.yaml learning_rate=1e-5

It takes the words of ``llamafactory-cli train``: a recipe, and settings that replace those in it.
"""

from llamafactory.train.tuner import run_exp

import qtarget as qt

if __name__ == "__main__":
    run_exp(callbacks=[qt.TargetCallback("dft")])  # the line
