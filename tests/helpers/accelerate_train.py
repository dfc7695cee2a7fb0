"""``qtarget train`` under Accelerate's FSDP2 or DeepSpeed, in processes on CPUs. test_fsdp2_and_deepspeed.py starts it.

    torchrun --nproc_per_node 2 tests/helpers/accelerate_train.py fsdp2|zero2|zero3 RUNS.json

RUNS.json: a list of argument lists, one for each run. Accelerate takes these engines only where it sees GPUs, so the two
functions by which it looks are replaced; all that follows is Accelerate's, Transformers', DeepSpeed's and qtarget's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENGINES = {
    "fsdp2": {  # as accelerate launch spells recipes/scale/fsdp2_1x8.yaml
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    },
    "zero2": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
    "zero3": {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    },
}


def main(engine: str, runs: list[list[str]]) -> None:
    os.environ |= ENGINES[engine]
    import torch
    from accelerate import Accelerator, state
    from accelerate.utils import DistributedType

    def backend(self: Any, *given: Any, **named: Any) -> tuple[str, Any]:
        return "gloo", DistributedType.MULTI_GPU

    def set_device(self: Any) -> None:
        self.device = torch.device("cpu")

    state.PartialState._prepare_backend = backend  # type: ignore[method-assign]
    state.PartialState.set_device = set_device  # type: ignore[method-assign]
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # the processes stay together
    from qtarget.cli.__main__ import main as qtarget

    for words in runs:
        os.environ |= ENGINES[engine]  # Transformers takes them away where it has read them
        print("\n==", " ".join(words), flush=True)
        status = qtarget(["train", *words])
        assert status == 0, words
        kind = state.AcceleratorState().distributed_type
        assert kind == {"fsdp2": DistributedType.FSDP}.get(engine, DistributedType.DEEPSPEED), kind
        state.AcceleratorState._reset_state()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
