"""Floating-point operations of an optimiser step (formulas: docs/plan.md).

Matrix products and attention are counted, two operations for a multiplication and an addition; norms, activations, the
optimiser and the engine's row-wise mathematics are not. Causal attention counts the half that is needed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qtarget.planning.shapes import Shape


@dataclass(frozen=True)
class Work:
    """What is computed in a step.

    Attributes:
        student: its shape. positions: of all micro-batches and GPUs, padding included. length: of a sequence, on average.
            supervised: tokens with a label.
        teachers, references: shapes of models of their own. own_teacher: whether the teacher is the student's average.
        copies: forwards of the student without gradient beside that (psft's old policy, a reference with adapters off).
        checkpointing: whether the forward is computed twice. adapters: whether the model's own weights are frozen.
    """

    student: Shape
    positions: float
    length: float
    supervised: float
    teachers: list[Shape] = field(default_factory=list)
    references: list[Shape] = field(default_factory=list)
    own_teacher: bool = False
    copies: int = 0
    checkpointing: bool = True
    adapters: bool = False


def forward(shape: Shape, positions: float, length: float) -> float:
    """A forward pass without the head: 2 for each weight of a layer's matrices and token, and causal attention."""
    attention = shape.width * shape.head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    products = 2 * (attention + 3 * shape.width * shape.ffn)
    scores = 4 * shape.heads * shape.head_dim * length / 2
    return shape.layers * positions * (products + scores)


def head(shape: Shape, supervised: float) -> float:
    """Logits of the supervised tokens."""
    return 2.0 * shape.width * shape.vocab * supervised


def of_step(work: Work) -> dict[str, float]:
    """Operations of each part: {part: operations}.

    The backward pass takes two forwards, or one where weights are frozen beside adapters (whose own products, a rank's
    share, are left out); the head's backward pass is part of "student head".
    """
    once = forward(work.student, work.positions, work.length)
    logits = head(work.student, work.supervised)

    def asked(shapes: list[Shape]) -> tuple[float, float]:
        """A forward pass and the logits of each of these."""
        forwards = sum(forward(shape, work.positions, work.length) for shape in shapes)
        return forwards, sum(head(shape, work.supervised) for shape in shapes)

    teacher, teacher_head = (once, logits) if work.own_teacher else asked(work.teachers)
    return {
        "student forward": once,
        "student backward": once * (1 if work.adapters else 2),
        "recomputation": once if work.checkpointing else 0.0,
        "student head": logits * (2 if work.adapters else 3),
        "teacher": teacher,
        "teacher head": teacher_head,
        "reference and copies": work.copies * (once + logits) + sum(asked(work.references)),
    }


def teacher_share(parts: dict[str, float]) -> float:
    """The teacher's part of all operations, 0 to 1: the part of a step's time a cache saves, were all equally fast."""
    return (parts["teacher"] + parts["teacher head"]) / sum(parts.values())
