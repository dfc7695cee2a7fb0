"""Can a whole checkpoint's files be loaded? Read as far as the tensors, before a model is.

Whether it is whole, ``checkpoints.fault`` tells.
"""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME, safe_globals

from qtarget import json_text
from qtarget.errors import reason

# What a run that goes on unpickles, up to tensors. Copies of weights that a target keeps are looked at when they are
# loaded; training_args.bin and a callback's own files are never read.
_PICKLED = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "pytorch_model*.bin", "adapter_model.bin")


def faults(folder: str | Path) -> list[str]:
    """Sentences on files that cannot be read or are pickles of more than tensors; none where all can be loaded."""
    folder = Path(folder)
    told, state = f"resume_from_checkpoint is {str(folder)!r}", folder / TRAINER_STATE_NAME
    try:
        if not isinstance(json_text.loads(state.read_bytes()), dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as error:
        return [f"{told}, whose {TRAINER_STATE_NAME} cannot be read ({error}); name another checkpoint"]
    found = []
    pickled = {file for name in _PICKLED for file in folder.glob(name)}
    for file in sorted(pickled | {*folder.glob("*.safetensors")}):
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            else:
                with safe_globals():
                    torch.load(file, map_location="cpu", mmap=zipfile.is_zipfile(file), weights_only=True)
        except Exception as error:  # a pickle that is none may make anything of the unpickler
            found.append(f"{told}, whose {file.name} cannot be loaded: {reason(error)}; name another checkpoint")
    return found
