"""Config values of models on the hub, laid out as the hub's cache keeps them: what a plan reads where no hub answers.

Where the values are from: a model's config.json; numbers that other public code states for it; or, for the two of 70
billion parameters and more, general knowledge that was not looked up. The papers' tables (arXiv:2412.15115, 2505.09388,
2407.21783) have layers, heads and tying, and a test compares counts of parameters with the model cards'. A Qwen2.5-Math
model has the shape of the Qwen2.5 model it was trained from, as its card says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0" * 40


def config(kind: str, numbers: tuple[int, int, int, int, int], tied: bool, vocab: int, **more: Any) -> dict[str, Any]:
    """numbers: layers, width, width of the feed-forward block, heads, key-value heads."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    made = {"model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], "dtype": "bfloat16"}
    return {**made, **dict(zip(names, numbers, strict=True)), "vocab_size": vocab, "tie_word_embeddings": tied, **more}


def qwen3(*numbers: int, tied: bool = False) -> dict[str, Any]:
    return config("qwen3", (*numbers, 8), tied, 151936, head_dim=128)


def llama(*numbers: int, tied: bool = False) -> dict[str, Any]:
    return config("llama", (*numbers, 8), tied, 128256, head_dim=128)


QWEN25_1B = config("qwen2", (28, 1536, 8960, 12, 2), True, 151936)  # other public code
QWEN25_7B = config("qwen2", (28, 3584, 18944, 28, 4), False, 152064)
LLAMA_8B = llama(32, 4096, 14336, 32)
CONFIGS = {
    "Qwen/Qwen3-1.7B-Base": qwen3(28, 2048, 6144, 16, tied=True),  # other public code
    "Qwen/Qwen3-8B": qwen3(36, 4096, 12288, 32),
    "Qwen/Qwen3-8B-Base": qwen3(36, 4096, 12288, 32),
    "Qwen/Qwen3-32B": qwen3(64, 5120, 25600, 64),
    "Qwen/Qwen2.5-1.5B": QWEN25_1B,
    "Qwen/Qwen2.5-Math-1.5B": QWEN25_1B,
    "Qwen/Qwen2.5-7B": QWEN25_7B,
    "Qwen/Qwen2.5-7B-Instruct": QWEN25_7B,
    "Qwen/Qwen2.5-Math-7B": QWEN25_7B,
    "Qwen/Qwen2.5-Math-7B-Instruct": QWEN25_7B,
    "Qwen/Qwen2.5-14B-Instruct": config("qwen2", (48, 5120, 13824, 40, 8), False, 152064),
    "Qwen/Qwen2.5-Math-72B-Instruct": config("qwen2", (80, 8192, 29568, 64, 8), False, 152064),  # general knowledge
    "meta-llama/Llama-3.2-3B": llama(28, 3072, 8192, 24, tied=True),
    "meta-llama/Llama-3.1-8B": LLAMA_8B,
    "meta-llama/Llama-3.1-8B-Instruct": LLAMA_8B,
    "meta-llama/Llama-3.1-70B-Instruct": llama(80, 8192, 28672, 64),  # general knowledge
}


@pytest.fixture(scope="module")
def hub_configs(tmp_path_factory):
    """The hub's cache, holding these configs and nothing else."""
    cache: Path = tmp_path_factory.mktemp("hub")
    for name, values in CONFIGS.items():
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "snapshots" / COMMIT).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
        (folder / "snapshots" / COMMIT / "config.json").write_text(json.dumps(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield cache
