"""Shapes of models known without loading them: from a config, or as published."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError, loading


@dataclass(frozen=True)
class Shape:
    """What the memory of a decoder depends on.

    Attributes:
        layers, width, ffn, heads, kv_heads, head_dim, vocab: of its config; vocab counts padded rows.
        tied: whether the head is the embedding. qkv_bias, qk_norm: whether attention has them.
        tokenizer: models that share a name here share their tokens; None where it is not known.
        source: where the numbers are from. counted: the number of parameters, where it was counted.
        dtype: of the checkpoint's numbers; None where it is not known.
    """

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    tokenizer: str | None = None
    source: str = ""
    counted: int | None = None
    dtype: str | None = None

    @property
    def layer_parameters(self) -> int:
        """Attention, a gated feed-forward block and two norms."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        attention += self.head_dim * (self.heads + 2 * self.kv_heads) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        return attention + 3 * self.width * self.ffn + 2 * self.width

    @property
    def root_parameters(self) -> int:
        """Embedding, head and last norm."""
        return (1 if self.tied else 2) * self.vocab * self.width + self.width

    @property
    def parameters(self) -> int:
        return self.counted or self.layers * self.layer_parameters + self.root_parameters


_LLAMA = {"kv_heads": 8, "head_dim": 128, "vocab": 128256, "tokenizer": "Llama 3"}
_QWEN25 = {"head_dim": 128, "qkv_bias": True, "tokenizer": "Qwen2.5"}
_QWEN3 = {"kv_heads": 8, "head_dim": 128, "vocab": 151936, "qk_norm": True, "tokenizer": "Qwen3"}


def _shapes(numbers: tuple[int, int, int, int], tied: bool, source: str, **more: Any) -> Shape:
    layers, width, ffn, heads = numbers
    return Shape(layers=layers, width=width, ffn=ffn, heads=heads, tied=tied, source=source, dtype="bfloat16", **more)


# Where each is from: its config.json; numbers that other public code states for it; or what is generally known of it and
# was not looked up. The papers' tables have layers, heads and tying; the tests compare counts with the model cards'. That
# all these checkpoints are in bfloat16 is general knowledge.
_CODE, _GENERAL = "other public code, not its config.json", "general knowledge, not looked up"
# A Qwen2.5-Math model has the shape of the Qwen2.5 model it was trained from, as its model card says.
_Q15 = _shapes((28, 1536, 8960, 12), True, f"{_CODE}; arXiv:2412.15115", kv_heads=2, vocab=151936, **_QWEN25)
_Q7 = _shapes((28, 3584, 18944, 28), False, "config.json; arXiv:2412.15115", kv_heads=4, vocab=152064, **_QWEN25)
_Q14 = _shapes((48, 5120, 13824, 40), False, "config.json; arXiv:2412.15115", kv_heads=8, vocab=152064, **_QWEN25)
_Q72 = _shapes((80, 8192, 29568, 64), False, f"{_GENERAL}; arXiv:2412.15115", kv_heads=8, vocab=152064, **_QWEN25)
_L3 = _shapes((28, 3072, 8192, 24), True, "config.json", **_LLAMA)
_L8 = _shapes((32, 4096, 14336, 32), False, "config.json; arXiv:2407.21783", **_LLAMA)
_L70 = _shapes((80, 8192, 28672, 64), False, f"{_GENERAL}; arXiv:2407.21783", **_LLAMA)
KNOWN: dict[str, Shape] = {
    "Qwen/Qwen3-1.7B-Base": _shapes((28, 2048, 6144, 16), True, f"{_CODE}; arXiv:2505.09388", **_QWEN3),
    "Qwen/Qwen3-8B": _shapes((36, 4096, 12288, 32), False, "config.json; arXiv:2505.09388", **_QWEN3),
    "Qwen/Qwen3-8B-Base": _shapes((36, 4096, 12288, 32), False, "config.json; arXiv:2505.09388", **_QWEN3),
    "Qwen/Qwen3-32B": _shapes((64, 5120, 25600, 64), False, "config.json; arXiv:2505.09388", **_QWEN3),
    "Qwen/Qwen2.5-1.5B": _Q15,
    "Qwen/Qwen2.5-Math-1.5B": _Q15,
    "Qwen/Qwen2.5-7B": _Q7,
    "Qwen/Qwen2.5-7B-Instruct": _Q7,
    "Qwen/Qwen2.5-Math-7B": _Q7,
    "Qwen/Qwen2.5-Math-7B-Instruct": _Q7,
    "Qwen/Qwen2.5-14B-Instruct": _Q14,
    "Qwen/Qwen2.5-Math-72B-Instruct": _Q72,
    "meta-llama/Llama-3.2-3B": _L3,
    "meta-llama/Llama-3.1-8B": _L8,
    "meta-llama/Llama-3.1-8B-Instruct": _L8,
    "meta-llama/Llama-3.1-70B-Instruct": _L70,
}


def bytes_of(dtype: Any) -> int:
    """Bytes of a number of a dtype as settings name it; None is float32."""
    return {"bfloat16": 2, "float16": 2, "auto": 2}.get(str(getattr(dtype, "value", dtype)).removeprefix("torch."), 4)


def frozen_bytes(init_kwargs: dict[str, Any] | None, shape: Shape | None, cpu: bool) -> int:
    """Bytes of a number of a teacher or reference, as ``teachers.frozen.load_frozen`` loads it.

    Without a dtype that is the checkpoint's own on an accelerator and float32 on a CPU. A checkpoint whose dtype is not
    known is taken to be in half precision, as most are.
    """
    dtype = (init_kwargs or {}).get("dtype", "float32" if cpu else "auto")
    if getattr(dtype, "value", dtype) == "auto" and shape is not None and shape.dtype is not None:
        dtype = shape.dtype
    return bytes_of(dtype)


def is_path(name: str) -> bool:
    """Whether a name can only be a folder: no hub id looks like it."""
    return not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".")


def find(field: str, name: str, revision: str | None = None, trust_remote_code: bool = False) -> Shape | None:
    """The shape of a model: of a folder, of the table, or of a config on the hub; None where none is at hand.

    Raises:
        ConfigError: ``name`` is a folder that is not there, or holds no model.
    """
    from transformers import AutoConfig

    local = Path(name).is_dir()
    if not local and is_path(name):
        raise ConfigError(f"{field} is {name!r}, which is no folder here; make it, or name a hub id")
    if not local and name in KNOWN:
        return KNOWN[name]
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # no network, no such model, no permission, a broken file: many kinds
        if local:
            told = " ".join(str(error).split())
            raise ConfigError(f"{field} is {name!r}, whose config cannot be read: {told}") from error
        return None
    with loading(field, name, "config"):
        return of_config(config.get_text_config(), "its config.json", trust_remote_code)


def of_config(config: Any, source: str = "its config", trust_remote_code: bool = False) -> Shape:
    """From a config of Transformers, the parameters counted on a model that has a shape and no numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    heads = getattr(config, "num_attention_heads", 1)
    return Shape(
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        ffn=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=config.vocab_size,
        tied=bool(config.tie_word_embeddings),
        source=source,
        counted=sum(parameter.numel() for parameter in model.parameters()),
        dtype=None if config.dtype is None else str(config.dtype).removeprefix("torch."),
    )
