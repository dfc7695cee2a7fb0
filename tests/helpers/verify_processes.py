"""``qtarget verify`` in every process of a launcher: as it is, then with faults between processes. Run by torchrun.

torchrun --nproc_per_node 2 tests/helpers/verify_processes.py FOLDER WORD...

writes FOLDER/right.json and FOLDER/MUTANT.json
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from accelerate import Accelerator
from torch import nn

from qtarget.cli.__main__ import main
from qtarget.training import QTargetTrainer, denominator


def own_labels_only(patch: pytest.MonkeyPatch) -> None:
    """Each process divides by its own labels."""

    def count(self, batches, device):
        return denominator.count(batches, self.args.denominator, self.objective).to(device)

    patch.setattr(QTargetTrainer, "_get_num_items_in_batch", count)


def not_together(patch: pytest.MonkeyPatch) -> None:
    """Gradients that are never averaged over the processes."""
    patch.setattr(QTargetTrainer, "_wrap_model", lambda self, model, *_: model)
    real = Accelerator.prepare

    def prepare(self, *objects, **how):
        return objects[0] if isinstance(objects[0], nn.Module) else real(self, *objects, **how)

    patch.setattr(Accelerator, "prepare", prepare)


def run(folder: Path, words: list[str]) -> None:
    statuses = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "end_training", lambda self: None)  # there is more to come
        for mutant in (None, not_together, own_labels_only):
            name = "right" if mutant is None else mutant.__name__
            with pytest.MonkeyPatch.context() as faults:
                if mutant is not None:
                    mutant(faults)
                statuses[name] = main(["verify", *words, "--json", str(folder / f"{name}.json")])
    Accelerator().end_training()
    assert statuses == {"right": 0, "not_together": 1, "own_labels_only": 1}, statuses


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2:])
