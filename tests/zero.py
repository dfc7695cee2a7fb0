"""Ten steps under DeepSpeed's ZeRO in two processes, against ten in one. Run by torchrun; see test_zero.py.

    DS_ACCELERATOR=cpu torchrun --nproc_per_node 2 tests/zero.py STAGE OUT.json

DeepSpeed's own engine around a patched model, since Accelerate turns DeepSpeed into DDP where there is no accelerator.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers.integrations import HfDeepSpeedConfig
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

import tiny
from qtarget import presets
from qtarget.training.forward import LossCall, add_target_forward
from runs import count, distance, moved, rows, weights

STEPS, LR = 10, 0.3


def loss(model: Any, row: dict[str, Any], total: int) -> Tensor:
    ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
    call = LossCall([presets.build("dft")], labels, {}, {}, None, total, "basic")
    return model(input_ids=ids, qtarget=call).exact_loss


def made() -> nn.Module:
    model = tiny.llama(tied=False).train()
    add_target_forward(model)
    return model


def main(stage: int, out: str) -> None:
    torch.set_num_threads(1)
    deepspeed.init_distributed(dist_backend="gloo")
    data = rows(tiny.conversations(2))
    total = count(data)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    model, plain = made(), made()
    kept = HfDeepSpeedConfig(settings)  # as Transformers holds it: ZeRO-3 is told by it
    before = weights(plain)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=LR), config=settings
    )
    assert engine.zero_optimization_stage() == stage
    for _ in range(STEPS):
        engine.backward(2 * loss(engine, data[dist.get_rank()], total))  # DeepSpeed averages
        engine.step()
    gathered = contextlib.nullcontext()
    if stage == 3:
        assert model.lm_head.weight.numel() == 0, "in pieces between two steps"
        gathered = deepspeed.zero.GatheredParameters(list(model.parameters()))
    with gathered:
        got = {name: parameter.detach().clone() - before[name] for name, parameter in model.named_parameters()}
    del kept
    unset_hf_deepspeed_config()
    optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    for _ in range(STEPS):
        optimizer.zero_grad()
        sum(loss(plain, row, total) for row in data).backward()
        optimizer.step()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(distance(got, moved(before, plain))))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
