"""Records made from full logits by plain sorting, beside which the capture and the replay are tested."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qtarget.lens.record import Record


def logits(tokens: int, vocab: int, seed: int = 0, sharpness: float = 3.0) -> Tensor:
    """Rows from nearly flat to nearly certain, as language models give them."""
    generator = torch.Generator().manual_seed(seed)
    scale = sharpness * torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
    return scale * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)


def labels_for(z: Tensor, seed: int = 0) -> Tensor:
    """Half of them drawn from the student, half from anywhere."""
    generator = torch.Generator().manual_seed(seed)
    likely = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(1)
    anywhere = torch.randint(0, z.shape[1], (len(z),), generator=generator)
    return torch.where(torch.rand(len(z), generator=generator) < 0.5, likely, anywhere)


def from_logits(
    z: Tensor,
    labels: Tensor,
    *,
    teacher: Tensor | None = None,
    reference: Tensor | None = None,
    k: int = 20,
    rows: int = 4,
    **columns: Tensor,
) -> Record:
    """The record of these tokens, split over so many rows, with a masked token before each row's own."""
    models = {"student": z, "teacher": teacher, "reference": reference}
    log_p = {name: logits.double().log_softmax(-1) for name, logits in models.items() if logits is not None}
    tokens: dict[str, list[Any]] = {"row": [], "position": [], "label": labels.tolist(), "ids": []}
    for name in log_p:
        tokens[name], tokens[f"{name}_tail"], tokens[f"{name}_floor"] = [], [], []
    row_of = [number * rows // len(z) for number in range(len(z))]
    for number, label in enumerate(labels.tolist()):
        ids = {label}
        for values in log_p.values():
            ids.update(values[number].topk(k).indices.tolist())
        listed = sorted(ids)
        tokens["ids"].append(listed)
        for name, values in log_p.items():
            outside = values[number].exp().clone()
            outside[listed] = 0
            tokens[name].append(values[number, listed].tolist())
            tokens[f"{name}_tail"].append(float(outside.sum().log()))
            tokens[f"{name}_floor"].append(float(values[number].topk(k).values[-1]))
        tokens["row"].append(row_of[number])
        tokens["position"].append(1 + row_of[:number].count(row_of[number]))
    student = log_p["student"]
    at_label = student.gather(1, labels[:, None])
    tokens["log_p_y"] = at_label.squeeze(1).tolist()
    tokens["rank"] = (student > at_label).sum(1).tolist()
    tokens["entropy"] = (-(student.exp() * student).sum(1)).tolist()
    for name, values in log_p.items():
        if name != "student":
            tokens[f"{name}_log_p_y"] = values.gather(1, labels[:, None]).squeeze(1).tolist()
    for name, column in columns.items():
        tokens[name] = column.double().tolist()
    listed_rows = [
        {
            "row": row,
            "input_ids": [0, *(label for label, r in zip(labels.tolist(), row_of, strict=True) if r == row)],
            "supervised": [False, *(True for r in row_of if r == row)],
        }
        for row in range(rows)
    ]
    vocab = {i: (f"tok{i} ", i == 0) for i in range(z.shape[1])}
    manifest = {
        "format": 1,
        "vocab_size": z.shape[1],
        "top_k": k,
        "rows": rows,
        "tokens": len(z),
        "model": "made from logits",
        "teacher": "made from logits" if teacher is not None else None,
        "reference": "made from logits" if reference is not None else None,
    }
    return Record(manifest, listed_rows, tokens, vocab)
