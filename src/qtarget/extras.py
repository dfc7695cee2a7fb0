"""The optional groups of packages (extras), and the sentence when one is missing."""

from __future__ import annotations

# extra → import name → package. What it needs beside is qtarget[train]; pyproject.toml has the versions.
EXTRAS = {
    "train": {
        "accelerate": "accelerate",
        "datasets": "datasets",
        "filelock": "filelock",
        "huggingface_hub": "huggingface-hub",
        "jinja2": "jinja2",
        "numpy": "numpy",
        "pyarrow": "pyarrow",
        "pydantic": "pydantic",
        "rich": "rich",
        "safetensors": "safetensors",
        "transformers": "transformers",
        "trl": "trl",
        "typing_extensions": "typing-extensions",
        "xxhash": "xxhash",
        "yaml": "pyyaml",
    },
    "deepspeed": {"deepspeed": "deepspeed"},
    "eval": {"math_verify": "math-verify", "reasoning_gym": "reasoning-gym"},
    "peft": {"peft": "peft"},
    "plots": {"matplotlib": "matplotlib"},
    "server": {"requests": "requests", "urllib3": "urllib3"},
}
_PLACE = {module: (package, extra) for extra, names in EXTRAS.items() for module, package in names.items()}


def pip_line(extra: str) -> str:
    return f'pip install "qtarget[{extra}]"'


def missing(what: str, error: ImportError) -> str | None:
    """What needs which package, and how to install it; None where the error is about no package of an extra.

    Args:
        what: what was asked for, as in ``qtarget train``. error: as importing raised it.
    """
    module = error.name if isinstance(error, ModuleNotFoundError) else None
    if module not in _PLACE:
        return None
    package, extra = _PLACE[module]
    return f"{what} needs {package}, which is not installed; {pip_line(extra)}"
