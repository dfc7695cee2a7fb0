"""The environments that scripts install into, each with torch in its CPU build where that can be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def create(folder: Path, python: str = sys.executable) -> Path:
    """A new environment's Python."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    return folder / "bin" / "python"


def pip(python: Path, *words: str) -> list[str]:
    """The words of ``pip install``."""
    return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words]


def install_torch(python: Path, pinned: str, constraints: Path) -> str:
    """Install torch, and say which build it is.

    Plain torch on Linux brings gigabytes of CUDA libraries, so the CPU build is tried first, as scripts/setup_env.sh
    does: as pip is configured here, then from PyTorch's own index.
    """
    own_index = ["--retries", "1", "--timeout", "20", "--index-url", CPU_INDEX]
    for words in ([f"{pinned}+cpu"], [pinned, *own_index]):
        if subprocess.run(pip(python, "--no-deps", *words), stderr=subprocess.DEVNULL).returncode == 0:
            return "CPU build"
    subprocess.run(pip(python, "--constraint", str(constraints), pinned), check=True)
    return "build with the CUDA libraries it requires, as no CPU build was within reach"
