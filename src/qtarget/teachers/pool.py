"""Several teachers as one: the log-linear pool softmax(Σ_m w_m z_m).

A sum of logits from hidden states and heads is one matmul: Σ w_m h_m W_mᵀ = [w_1 h_1, w_2 h_2, …] [W_1, W_2, …]ᵀ, so a
pool reaches the engine as a single ``Head`` and is formed chunk by chunk as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from qtarget.errors import ConfigError, raise_together
from qtarget.losses.heads import Head

_KEYS = ("model_name_or_path", "weight", "revision", "init_kwargs")


@dataclass(frozen=True)
class PoolMember:
    """One teacher of a pool, by name."""

    name: str
    weight: float
    revision: str | None = None
    init_kwargs: dict[str, Any] = field(default_factory=dict)


def read_pool(value: Any) -> list[PoolMember]:
    """The setting ``teachers``: {name: weight}, or a list of {model_name_or_path, weight, revision, init_kwargs}.

    Raises:
        ConfigError: an unknown key, a weight that is not above 0, or weights that do not sum to 1.
    """
    if value is None:
        return []
    if isinstance(value, Mapping):
        value = [{"model_name_or_path": name, "weight": weight} for name, weight in value.items()]
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise ConfigError(f"teachers is {value!r}; write a weight for each, as in {{org/large: 0.7, org/maths: 0.3}}")
    faults, pool = [], []
    for entry in value:
        if not isinstance(entry, Mapping) or not {"model_name_or_path", "weight"} <= entry.keys() <= {*_KEYS}:
            faults.append(
                f"teachers holds {entry!r}; write model_name_or_path and weight, and revision and init_kwargs"
            )
            continue
        name, weight, kwargs = entry["model_name_or_path"], entry["weight"], entry.get("init_kwargs") or {}
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < 1e9:
            faults.append(f"teachers: the weight of {name} is {weight!r}; use a number above 0, below 1e9")
        elif not isinstance(kwargs, Mapping):
            faults.append(f"teachers: init_kwargs of {name} is {kwargs!r}; write a mapping, as in {{dtype: bfloat16}}")
        else:
            pool.append(PoolMember(str(name), float(weight), entry.get("revision"), dict(kwargs)))
    total = sum(member.weight for member in pool)
    if not faults and abs(total - 1) > 1e-6:
        faults.append(
            f"teachers: the weights sum to {total:g}; let them sum to 1 (a temperature belongs to the target: "
            "teacher_temperature)"
        )
    raise_together(faults)
    return pool


def pooled_head(heads: Sequence[tuple[float, Head]], weight: Tensor | None = None) -> Head:
    """The pool of heads over the same positions, as one head.

    Args:
        heads: (weight in the pool, head). weight: the joined matrix of an earlier call with the same heads.

    Raises:
        ConfigError: a head with a softcap, whose logits are no longer linear in its hidden states.
    """
    if any(head.logit_softcap is not None for _, head in heads):
        raise ConfigError("teachers holds a model with a softcap on its logits, which cannot be pooled; leave it out")
    width = min(head.width for _, head in heads)
    kinds = {tensor.dtype for _, head in heads for tensor in (head.hidden, head.weight)}
    dtype = kinds.pop() if len(kinds) == 1 else torch.float64 if torch.float64 in kinds else torch.float32
    hidden = torch.cat([head.hidden.to(dtype) * (share * head.logit_scale) for share, head in heads], -1)
    if weight is None:
        weight = torch.cat([head.weight[:width].to(dtype) for _, head in heads], 1)
    biases = [head.bias[:width] * (share * head.logit_scale) for share, head in heads if head.bias is not None]
    return Head(hidden, weight, torch.stack(biases).sum(0) if biases else None, vocab_size=width)


def with_exchanged_rows(head: Head, a: int, b: int, weight: Tensor | None = None) -> Head:
    """The head with two ids exchanged; ``weight``: that of an earlier call with the same head."""
    if max(a, b) >= head.weight.shape[0]:
        raise ConfigError(
            f"teacher_end_token is 'map', but the teacher has no row for token {max(a, b)} (its head has "
            f"{head.weight.shape[0]}); use 'label'"
        )
    order = torch.arange(head.weight.shape[0], device=head.weight.device)
    order[a], order[b] = b, a
    if weight is None:
        weight = head.weight.index_select(0, order)
    return replace(head, weight=weight, bias=None if head.bias is None else head.bias[order])
