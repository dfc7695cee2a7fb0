"""``apply_target`` in two processes of half a batch each, by DDP and FSDP2. Run by torchrun; the first writes OUT.json.

    torchrun --nproc_per_node 2 tests/helpers/applied_processes.py OUT.json

For each case the largest relative difference to the gradients of one process. In float64.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import qtarget as qt
import tiny_models

TARGETS = ("dft", "target-sft", "asft")
IDS = torch.arange(3, 35).reshape(4, 8) % 20 + 3
LABELS = torch.where(torch.arange(8) < torch.tensor([[2], [5], [3], [1]]), -100, IDS)  # uneven between the halves
COUNT = int((LABELS[:, 1:] != -100).sum())


def model() -> nn.Module:
    return tiny_models.trained_model(tied=False).double().train()


def teacher() -> nn.Module:
    return tiny_models.llama(seed=3, tied=False).double()


def applied(target: str) -> nn.Module:
    return qt.apply_target(model(), target, teacher=teacher() if target == "target-sft" else None)


def backward(called: nn.Module, rows: slice, processes: int) -> None:
    """As Transformers' trainer: divided by all labels, and times the processes that will average."""
    loss = called(input_ids=IDS[rows], labels=LABELS[rows], num_items_in_batch=torch.tensor(COUNT)).loss
    (loss * processes).backward()


def gradients(of: nn.Module) -> dict[str, torch.Tensor]:
    made = {name.removeprefix("module."): p.grad for name, p in of.named_parameters() if p.grad is not None}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in made.items()}


def wrapped(kind: str, whole: nn.Module) -> nn.Module:
    if kind == "ddp":
        return DistributedDataParallel(whole)
    for layer in whole.model.layers:
        fully_shard(layer)
    if kind == "fsdp2, head of its own":
        fully_shard(whole.lm_head)
    return fully_shard(whole)


def main() -> None:
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for target in TARGETS:
        alone = applied(target)
        backward(alone, slice(0, 4), 1)
        wanted = gradients(alone)
        for kind in ("ddp", "fsdp2", "fsdp2, head of its own"):
            called = wrapped(kind, applied(target))
            backward(called, slice(2 * rank, 2 * rank + 2), 2)
            got = gradients(called)
            assert {*got} == {*wanted}, {*got} ^ {*wanted}
            errors = [float((got[name] - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted]
            found[f"{target}, {kind}"] = max(errors)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
