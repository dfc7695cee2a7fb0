"""How many tokens a model can read: its learned positions, or the window of its RoPE."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn


def learned(model: nn.Module) -> int | None:
    """Positions in a model's table of learned absolute ones (GPT-2, OPT); None where they are computed (RoPE, ALiBi).

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> learned(GPT2LMHeadModel(GPT2Config(n_positions=64, n_layer=1, n_embd=8, n_head=1)))
    64
    """
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and re.search(r"(^|\.)wpe$|position", name):
            before = getattr(table, "offset", 0) or (0 if table.padding_idx is None else table.padding_idx + 1)
            return table.num_embeddings - int(before)
    return None


def window(config: Any) -> int | None:
    """Positions that a model's configuration names, stretched as its RoPE is; None where it names none."""
    text = config.get_text_config()
    named: int | None = getattr(text, "max_position_embeddings", None)
    rope: Any = getattr(text, "rope_parameters", None) or {}
    original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    return named if not (named and original and factor) else max(named, int(original * factor))


def without_numbers(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """A model that has its configuration's shapes and no weights, on the meta device."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import set_zero3_state

    # Under ZeRO-3 Transformers would cut it in pieces and fill them, which a model without numbers has not.
    with torch.device("meta"), set_zero3_state():
        model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return model


def learned_by(config: Any, trust_remote_code: bool = False) -> int | None:
    """``learned`` of a model that only its configuration is known of."""
    return learned(without_numbers(config, trust_remote_code))
