"""Three worked tokens, of which the pages' pictures are drawn: known and right, known and wrong, free to choose."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import qtarget as qt
from qtarget import Target

ALIKE = 20  # tokens beside the named ones, each as likely as the next: enough for every top-k statistic of a default
OTHERS = "all others"


@dataclass(frozen=True)
class Token:
    """words: the named tokens, the label among them. Probabilities are theirs; what is left is spread over the others."""

    title: str
    words: tuple[str, ...]
    label: int
    student: tuple[float, ...]
    teacher: tuple[float, ...]
    reference: tuple[float, ...]
    weight: float
    critical: bool


TOKENS = (
    Token(
        "The student knows it, and the label is right",
        ("56", "54", "48", "63"),
        0,
        student=(0.90, 0.04, 0.02, 0.01),
        teacher=(0.96, 0.01, 0.01, 0.01),
        reference=(0.70, 0.10, 0.06, 0.04),
        weight=1.5,
        critical=True,
    ),
    Token(
        "The student knows it, and the label is wrong",
        ("56", "54", "48", "63"),
        1,
        student=(0.90, 0.04, 0.02, 0.01),
        teacher=(0.96, 0.01, 0.01, 0.01),
        reference=(0.70, 0.10, 0.06, 0.04),
        weight=0.5,
        critical=True,
    ),
    Token(
        "Free to choose: several words would do",
        ("So", "Thus", "Then", "Hence"),
        1,
        student=(0.35, 0.25, 0.15, 0.10),
        teacher=(0.30, 0.28, 0.22, 0.12),
        reference=(0.30, 0.20, 0.18, 0.12),
        weight=1.0,
        critical=False,
    ),
)


def probabilities(whose: str) -> Tensor:
    """[tokens, vocabulary] of ``student``, ``teacher`` or ``reference``, float64."""
    named = torch.tensor([getattr(token, whose) for token in TOKENS], dtype=torch.float64)
    rest = (1 - named.sum(-1, keepdim=True)) / ALIKE
    return torch.cat([named, rest.expand(-1, ALIKE)], -1)


def labels() -> Tensor:
    return torch.tensor([token.label for token in TOKENS])


def inputs(target: Target) -> dict[str, Tensor]:
    """What the target needs beside logits and labels, by the names of ``qtarget.target_loss``."""
    reference = probabilities("reference").log()
    every = {
        "teacher": ("teacher_logits", probabilities("teacher").log()),
        "reference": ("reference_logits", reference),
        "old_policy": ("old_logps", reference.gather(-1, labels()[:, None]).squeeze(-1)),
        "weight": ("weight", torch.tensor([token.weight for token in TOKENS], dtype=torch.float64)),
        "critical": ("critical", torch.tensor([token.critical for token in TOKENS])),
    }
    return dict(every[name] for name in sorted(target.requires))


def taught(target: Target) -> list[list[tuple[str, float, float]]]:
    """Of each token its (word, p, Q), the others added up: what the library says of them, nothing of its own."""
    p = probabilities("student")
    Q = qt.target_distribution(p.log(), labels(), target, **inputs(target))
    return [
        [
            *zip(token.words, p_row.tolist(), Q_row.tolist(), strict=False),
            (OTHERS, float(p_row[-ALIKE:].sum()), float(Q_row[-ALIKE:].sum())),
        ]
        for token, p_row, Q_row in zip(TOKENS, p, Q, strict=True)
    ]


def trusts(target: Target) -> list[float]:
    """a of each token."""
    logits = probabilities("student").log()
    return qt.target_loss(logits, labels(), target, reduction="none", **inputs(target)).stats["trust"].tolist()
