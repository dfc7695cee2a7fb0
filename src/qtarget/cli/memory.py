"""How much memory a run takes on each GPU, by arithmetic. The formulas are written out in docs/reproduce.md."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qtarget.cli.shapes import Shape
from qtarget.losses.chunking import chunk_rows

PARTS = ("weights", "gradients", "AdamW", "gathered", "other models", "engine", "activations")
# DeepSpeed's reduce_bucket_size, of which overlap_comm holds two.
_BUCKET = 500_000_000
_SCRATCH = 128 << 20
_HALF = 2


@dataclass(frozen=True)
class Workload:
    """What is trained, on how many GPUs.

    Attributes:
        student: its shape. others: (shape, bytes of a number) of each frozen model. copies: further copies of the
            student's weights that a target keeps.
        tokens: of a micro-batch at most. bytes: of a number of the student's weights.
        trained: whether all weights are trained (with adapters their gradients and AdamW are left out here).
    """

    student: Shape
    gpus: int
    tokens: int
    bytes: int = 4
    others: list[tuple[Shape, int]] = field(default_factory=list)
    copies: int = 0
    checkpointing: bool = True
    trained: bool = True


def estimate(work: Workload, kind: str) -> dict[str, int]:
    """Bytes of each part on a GPU: {part: bytes}.

    Args:
        kind: "ddp", "zero2" or "fsdp2", as the files of recipes/scale are called.
    """
    student, gpus = work.student, work.gpus
    size, own = student.parameters, work.bytes
    trained = size if work.trained else 0
    parts = dict.fromkeys(PARTS, 0)
    if kind == "ddp":
        # autocast keeps half-precision copies of float32 weights; the reducer's buckets are a second gradient
        parts["weights"] = (own + (_HALF if own > _HALF else 0)) * size
        parts["gradients"] = own * trained * (1 if gpus == 1 else 2)
        parts["AdamW"] = 2 * own * trained
    elif kind == "zero2":
        # weights in bf16 whole; the float32 weights, gradients and AdamW's two in pieces
        parts["weights"] = _HALF * size + 4 * trained // gpus
        parts["gradients"] = 4 * trained // gpus + 2 * _HALF * min(_BUCKET, trained)
        parts["AdamW"] = 8 * trained // gpus
    else:
        parts["weights"], parts["gradients"] = own * size // gpus, own * trained // gpus
        parts["AdamW"] = 2 * own * trained // gpus
        # embedding and head with their gradient, two layers with the gradient of one
        parts["gathered"] = 2 * _HALF * student.root_parameters + 3 * _HALF * student.layer_parameters
    parts["weights"] += work.copies * own * size // (gpus if kind == "fsdp2" else 1)
    for shape, width in work.others:
        if kind == "fsdp2":
            parts["other models"] += width * shape.parameters // gpus
            parts["gathered"] += width * (shape.root_parameters + 2 * shape.layer_parameters)
        else:
            parts["other models"] += width * shape.parameters
    parts["engine"] = _engine(work)
    parts["activations"] = _activations(work, own if kind == "ddp" else _HALF)
    return parts


def _engine(work: Workload) -> int:
    """Logits of a chunk for each model, scratch, the head's gradient in float32, hidden states of every model."""
    vocab = max(work.student.vocab, *(shape.vocab for shape, _ in work.others), 0)
    buffers = 1 + len(work.others)
    rows = chunk_rows(work.tokens, vocab, buffers, 4, torch.device("cuda"))
    hidden = sum(_HALF * shape.width for shape, _ in work.others) + 2 * _HALF * work.student.width
    return buffers * rows * vocab * 4 + _SCRATCH + 4 * work.student.vocab * work.student.width + hidden * work.tokens


def _activations(work: Workload, width: int) -> int:
    """With checkpointing each layer's input and one layer whole, with its gradients; without it every layer."""
    shape = work.student
    layer = 4 * shape.width + 2 * (shape.heads + shape.kv_heads) * shape.head_dim + 4 * shape.ffn
    if work.checkpointing:
        return width * work.tokens * (shape.layers * shape.width + 2 * layer)
    return width * work.tokens * (shape.layers + 1) * layer
