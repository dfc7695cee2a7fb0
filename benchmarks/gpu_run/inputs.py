"""Hidden states, heads and labels of one shape, and the targets that are timed and judged on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import qtarget as qt

# A cache's entries for each token.
KEPT = 32


@dataclass(frozen=True)
class Shape:
    """tokens N, width d of the student's and the teacher's hidden states, vocabulary V."""

    tokens: int
    width: int
    vocab: int

    def __str__(self) -> str:
        return f"N={self.tokens} d={self.width} V={self.vocab}"


class Inputs:
    """A student and a teacher that is near it, of one width.

    Attributes:
        hidden, teacher_hidden: [N, d]. weight, teacher_weight: [V, d]. labels: [N] int64, half of them likely ones.
        kept: the teacher's ``KEPT`` likeliest tokens of each position; formed when first asked for.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(seed)
        n, d, v = shape.tokens, shape.width, shape.vocab
        # tokens of every temper: logits with a spread of one to four nats
        temper = 0.5 + 1.5 * torch.rand(n, 1, device=device, generator=self._generator)
        hidden = self.randn(n, d) * temper
        weight = self.randn(v, d) * (2 * d**-0.5)
        self.teacher_hidden = (hidden + 0.3 * self.randn(n, d)).to(dtype)
        self.teacher_weight = (weight + 0.1 * d**-0.5 * self.randn(v, d)).to(dtype)
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_()
        self.labels = self._labels()
        self._kept: qt.TopK | None = None

    def randn(self, *size: int) -> Tensor:
        return torch.randn(*size, device=self.device, generator=self._generator)

    @torch.no_grad()
    def _labels(self) -> Tensor:
        likely = torch.cat([(h @ self.weight.T).argmax(-1) for h in self.hidden.split(256)])
        n, v = self.shape.tokens, self.shape.vocab
        drawn = torch.randint(0, v, (n,), device=self.device, generator=self._generator)
        return torch.where(torch.rand(n, device=self.device, generator=self._generator) < 0.5, likely, drawn)

    @property
    @torch.no_grad()
    def kept(self) -> qt.TopK:
        if self._kept is None:
            ids, logprobs = [], []
            for h in self.teacher_hidden.split(256):
                found = (h.float() @ self.teacher_weight.float().T).log_softmax(-1).topk(min(KEPT, self.shape.vocab))
                ids.append(found.indices)
                logprobs.append(found.values)
            self._kept = qt.TopK(torch.cat(ids), torch.cat(logprobs))
        return self._kept

    @property
    def teacher(self) -> qt.Head:
        return qt.Head(self.teacher_hidden, self.teacher_weight)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


@dataclass(frozen=True)
class Timed:
    """A target that is timed: preset, hyperparameters, and where its teacher comes from: "", "head" or "top-k"."""

    name: str
    preset: str
    source: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def target(self) -> qt.Target:
        return qt.preset(self.preset, **dict(self.options))

    @property
    def matmuls(self) -> int:
        """How many of the size N·d·V it cannot do without: logits, dH, dW, and a live teacher's logits."""
        return 4 if self.source == "head" else 3

    def teacher(self, x: Inputs) -> dict[str, Any]:
        if not self.source:
            return {}
        return {"teacher": x.teacher if self.source == "head" else x.kept}


TIMED = (
    Timed("sft", "sft"),
    Timed("dft", "dft"),
    Timed("eaft", "eaft"),
    Timed("kd", "kd", "head"),
    Timed("kd T=2", "kd", "head", (("temperature", 2.0),)),
    Timed("target-sft", "target-sft", "head"),
    Timed("target-sft top-k", "target-sft", "top-k"),
)


def timed(name: str) -> Timed:
    """The one of ``TIMED`` with this name."""
    (found,) = [one for one in TIMED if one.name == name]
    return found
