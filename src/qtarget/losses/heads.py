"""Where other distributions come from: a live head, or top-k log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget.errors import ConfigError, check_range


@dataclass(frozen=True)
class Head:
    """A model's last hidden states and its output head; its logits are formed chunk by chunk, never whole.

    Args:
        hidden: [..., d_m], in the labels' shape, of any width. No gradient flows into it.
        weight: [V_m, d_m]; V_m may differ from the student's by padded rows.
        bias: [V_m] or None.
        logit_scale: multiplies the logits before the softcap.
        logit_softcap: cap · tanh(logits / cap), or None.
        vocab_size: real tokens of a padded head, or None for all rows.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    vocab_size: int | None = None

    def __post_init__(self):
        check_head(self.hidden, self.weight, self.bias, self.logit_softcap, where="Head: ")
        if self.vocab_size is not None and not 0 < self.vocab_size <= self.weight.shape[0]:
            raise ConfigError(
                f"Head: vocab_size is {self.vocab_size}; use a number from 1 to the weight's {self.weight.shape[0]} rows"
            )

    @property
    def width(self) -> int:
        """Entries of the real vocabulary."""
        return self.weight.shape[0] if self.vocab_size is None else self.vocab_size

    @property
    def token_shape(self) -> torch.Size:
        return self.hidden.shape[:-1]


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, *, where: str = "", prefix: str = ""
) -> None:
    """Raise where the parts of a head do not fit; ``prefix`` is that of their names."""
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[-1]:
        raise ConfigError(
            f"{where}hidden has shape {list(hidden.shape)} and {prefix}weight {list(weight.shape)}; "
            f"{prefix}weight must be [vocabulary, width] with hidden's width"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ConfigError(
            f"{where}{prefix}bias has shape {list(bias.shape)}; {prefix}weight requires [{weight.shape[0]}]"
        )
    if softcap is not None:
        check_range(f"{where}logit_softcap", softcap, 0, open_low=True)


@dataclass(frozen=True)
class TopK:
    """A distribution stored as its k largest entries and the mass of the rest.

    Args:
        ids: [..., k] token ids, all different within a token.
        logprobs: [..., k] their log-probabilities.
        tail_logprob: [...] log of the mass outside the k, or None to take 1 − Σ exp(logprobs).
        tail: shape of that mass: "student" (∝ p outside the k, the default) or "even".
    """

    ids: Tensor
    logprobs: Tensor
    tail_logprob: Tensor | None = None
    tail: str = "student"

    def __post_init__(self):
        if self.ids.shape != self.logprobs.shape:
            raise ConfigError(
                f"TopK: ids has shape {list(self.ids.shape)}, logprobs {list(self.logprobs.shape)}; they must agree"
            )
        if self.ids.dtype not in (torch.int64, torch.int32):
            raise ConfigError(f"TopK: ids has dtype {self.ids.dtype}; use torch.int64 or torch.int32")
        if self.ids.ndim < 1 or self.ids.shape[-1] < 1:
            raise ConfigError(f"TopK: ids has shape {list(self.ids.shape)}; the last axis holds one token or more")
        if self.tail not in ("student", "even"):
            raise ConfigError(f"TopK: tail is {self.tail!r}; use 'student' or 'even'")
        if self.tail_logprob is not None and self.tail_logprob.shape != self.ids.shape[:-1]:
            raise ConfigError(
                f"TopK: tail_logprob has shape {list(self.tail_logprob.shape)}; ids require {list(self.ids.shape[:-1])}"
            )

    @property
    def token_shape(self) -> torch.Size:
        return self.ids.shape[:-1]

    def log_tail(self) -> Tensor:
        """Log of the mass outside the k, [...]."""
        if self.tail_logprob is not None:
            return self.tail_logprob
        kept = self.logprobs.double().exp().sum(-1).clamp(max=1)
        return torch.log1p(-kept).to(self.logprobs.dtype)
