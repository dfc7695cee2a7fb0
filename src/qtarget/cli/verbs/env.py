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

    lines = {"qtarget": __version__, "python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            lines[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            lines[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines["gpu"] = ", ".join(gpus) or "none"
    lines["cpu threads"] = f"{torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}"
    lines["engine backends"] = ", ".join(engine.available(torch.device("cuda" if gpus else "cpu")))
    width = max(map(len, lines))
    for name, value in lines.items():
        print(f"{name:<{width}}  {value}")
    return 0
