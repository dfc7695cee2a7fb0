"""``qtarget env``: prints the versions and hardware that a bug report needs."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from qtarget.cli.arguments import Verb

VERB = Verb("env", __doc__, bare=True)
_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "peft", "deepspeed", "vllm", "liger-kernel")


@VERB.command()
def show(options: Any) -> int:
    import torch

    from qtarget import __version__
    from qtarget.losses import engine

    lines = [("qtarget", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    for package in _PACKAGES:
        try:
            lines.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(("gpu", ", ".join(gpus) or "none"))
    lines.append(("cpu threads", f"{torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"))
    device = torch.device("cuda" if gpus else "cpu")
    lines.append(("engine backends", ", ".join(engine.available(device))))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")
    return 0
