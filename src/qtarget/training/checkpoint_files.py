"""Whether the files of a whole checkpoint can be loaded, looked at before a model is: pickles only as far as tensors go.

Whether it is whole, ``checkpoints.fault`` tells.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME, safe_globals

from qtarget import json_text
from qtarget.errors import reason

# Written by Transformers for people to look at; nothing reads it again.
_NEVER_READ = ("training_args.bin",)


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
    for file in sorted(folder.iterdir()):
        if file.name in _NEVER_READ or not file.is_file():
            continue
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt"):
                    pass
            elif file.suffix in (".pt", ".pth", ".bin"):
                with safe_globals():
                    torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a pickle that is none may make anything of the unpickler
            found.append(f"{told}, whose {file.name} cannot be loaded: {reason(error)}; name another checkpoint")
    return found
