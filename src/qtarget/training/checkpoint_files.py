"""Whether a checkpoint can be gone on from, looked at before a model is loaded: pickles only as far as tensors go."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import safe_globals

from qtarget import json_text
from qtarget.errors import reason

STATE = "trainer_state.json"
# Written by Transformers for people to look at; nothing reads it again.
_NEVER_READ = ("training_args.bin",)


def faults(folder: str | Path) -> list[str]:
    """Sentences on files that are missing, cut short, or pickles of more than tensors; none where all can be read."""
    folder = Path(folder)
    told = f"resume_from_checkpoint is {str(folder)!r}"
    if not folder.is_dir():
        return [f"{told}, which is no folder; name a checkpoint folder, or true for the latest of output_dir"]
    state = folder / STATE
    if not state.is_file():
        return [f"{told}, which has no {STATE} and so is no whole checkpoint; name another one"]
    try:
        if not isinstance(json_text.loads(state.read_bytes()), dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as error:
        return [f"{told}, whose {STATE} cannot be read ({error}); name another checkpoint"]
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
        except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
            found.append(f"{told}, whose {file.name} cannot be loaded: {reason(error)}; name another checkpoint")
        except Exception as error:  # UnpicklingError, and what a pickle that is none makes of the unpickler
            found.append(f"{told}, whose {file.name} is not loaded: {reason(error)}; name another checkpoint")
    return found
