"""Adapters on disk that do something, made by PEFT alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny_models

IDS = torch.tensor([tiny_models.tokenizer()("Tom has 3 apples and buys 4")["input_ids"]])


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **more})


def write_base(folder: Path, **settings: Any) -> Path:
    """A model and its tokenizer."""
    tiny_models.trained_model(**settings).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def write_adapter(
    folder: Path, base: Path, kind: PeftConfig | None = None, rows: int | None = None, seed=1
) -> PeftModel:
    """An adapter with random weights, as it is in memory too. ``rows``: of a resized embedding."""
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    torch.manual_seed(seed)  # adapters begin at random
    adapted = get_peft_model(model, copy.deepcopy(kind) or lora())
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(folder)
    return adapted


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits
