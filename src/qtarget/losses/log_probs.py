"""Forms dense log-probabilities of a few tokens, for reports; training never does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qtarget.errors import DataError
from qtarget.losses.engine.matmuls import HeadMatmuls
from qtarget.losses.heads import Head, TopK

# What stands for a probability of 0: −inf would not survive a product.
_NOTHING = -1e4


def log_probs(other: Head | TopK, at: tuple[Tensor, ...], vocab: int, student: Tensor | None = None) -> Tensor:
    """[n, vocab] float32: log-probabilities over the real vocabulary at n positions.

    Args:
        other: a model's head, or its k likeliest tokens. at: indices of its leading axes, [n] each.
        vocab: real tokens; a model with fewer gives the others nothing.
        student: [n, vocab], which a top-k distribution's tail takes the shape of.
    """
    if isinstance(other, Head):
        hidden = other.hidden[at]
        z = torch.empty(len(hidden), other.weight.shape[0], dtype=torch.float32, device=hidden.device)
        HeadMatmuls.of(other, torch.float32).logits(hidden, z)
        log_p = z[:, : min(vocab, other.width)].log_softmax(-1)
        return torch.nn.functional.pad(log_p, (0, vocab - log_p.shape[1]), value=_NOTHING)
    ids, kept, tail = other.ids[at].long(), other.logprobs[at].float(), other.log_tail()[at].float()
    if other.tail == "even" or student is None:
        outside = math.log(max(1, vocab - ids.shape[1]))
        dense = (tail - outside)[:, None].expand(-1, vocab).clone()
    else:
        outside_lse = student.scatter(1, ids, -math.inf).logsumexp(-1).clamp(min=_NOTHING)
        dense = student + (tail - outside_lse)[:, None]
    dense = dense.scatter(1, ids, kept).clamp(min=_NOTHING)
    return dense - dense.logsumexp(-1, keepdim=True)  # what was kept was rounded


def refuse_nan(who: str, log_p: Tensor, at: tuple[Tensor, ...], rows: Sequence[int]) -> None:
    """An infinite logit is NaN once it is normalised; one of −∞ rules a token out and may be.

    Args:
        who: the model. log_p: as ``log_probs`` gave them for ``at``. rows: numbers of the batch's rows in their dataset.

    Raises:
        DataError: NaN, with the model, the row and the position.
    """
    for number in log_p.isnan().any(1).nonzero().flatten().tolist()[:1]:
        row, position = (int(index[number]) for index in at)
        raise DataError(
            f"the logits of {who} are NaN or infinite at row {rows[row]}, position {position + 1}; check its weights and "
            "that row, or load it in float32 or bfloat16 instead of float16"
        )


def importance_weight(gap: Tensor, temperature: float) -> Tensor:
    """iw-sft's weight of a sequence: exp(temperature · gap), at most 16 as in the paper's code (arXiv:2507.12856).

    Args:
        gap: mean over its supervised tokens of log p_θ − log p_ref.

    >>> importance_weight(torch.tensor([0.0, 1e4]), 1.0)
    tensor([ 1., 16.])
    """
    return (temperature * gap).exp().clamp(max=16)
