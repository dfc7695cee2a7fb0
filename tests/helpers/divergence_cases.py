"""Divergences beside residuals, for the tests of the engine's passes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import qtarget as qt
from engine_and_oracle import Batch, as_head, hard_batch

DIVERGENCES = {
    "reverse_kl": qt.divergence.reverse_kl(),
    "jsd": qt.divergence.jsd(beta=0.3),
    "skew_kl": qt.divergence.skew_kl(),
    "skew_reverse_kl": qt.divergence.skew_reverse_kl(),
    "total_variation": qt.divergence.total_variation(),
    "alpha": qt.divergence.alpha(alpha=0.3),
    "alpha 0": qt.divergence.alpha(alpha=0.0),
    "alpha 1": qt.divergence.alpha(alpha=1.0),
    "todi": qt.divergence.todi(slope=1.5),
}
RESIDUALS = {
    "teacher": qt.residual.teacher(),
    "reference": qt.residual.reference(),
    "guided": qt.residual.guided(0.4),
    "uniform": qt.residual.uniform(),
}


def toward(residual: str, divergence: str) -> qt.Target:
    """A target with both parts: half the label's pull, and the divergence from the residual."""
    return qt.Target(0.5, [(0.7, RESIDUALS[residual], DIVERGENCES[divergence])])


def hard_rows(**options) -> Batch:
    """A hopeless label; a teacher nearly equal, equal, sure of something else, far away."""
    batch = hard_batch(**options)
    rows = torch.tensor([2, 4, 5, 6, 7])
    return replace(
        batch,
        hidden=batch.hidden[rows],
        labels=batch.labels[rows],
        columns={name: column[rows] for name, column in batch.columns.items()},
        dense={name: logits[rows] for name, logits in batch.dense.items()},
    )


def given_logits(student: Tensor, teacher: Tensor) -> Batch:
    """A student and a teacher of these very logits: dH is the gradient on them."""
    labels = torch.arange(len(student)) % student.shape[1]
    eye = torch.eye(student.shape[1], dtype=student.dtype)
    return Batch(student, eye, labels, dense={"teacher": teacher})


def ruling_out(batch: Batch, token: int) -> Batch:
    """The teacher's head has a bias that rules out a token."""
    teacher = batch.dense["teacher"]
    bias = torch.zeros_like(teacher[0])
    bias[token] = -torch.inf
    return replace(batch, dense={"teacher": teacher + bias}, heads={"teacher": as_head(teacher, bias=bias)})
