"""Records made from full logits by plain sorting, beside which the capture and the replay are tested."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from published import label_log_p
from qtarget.lens.record import Record


def random_logits(tokens: int, vocab: int, seed: int = 0, sharpness: float = 3.0) -> Tensor:
    """Rows from nearly flat to nearly certain, as language models give them."""
    generator = torch.Generator().manual_seed(seed)
    scale = sharpness * torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
    return scale * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)


def random_labels(z: Tensor, seed: int = 0) -> Tensor:
    """Half of them drawn from the student, half from anywhere."""
    generator = torch.Generator().manual_seed(seed)
    likely = torch.multinomial(z.softmax(-1), 1, generator=generator).squeeze(1)
    anywhere = torch.randint(0, z.shape[1], (len(z),), generator=generator)
    return torch.where(torch.rand(len(z), generator=generator) < 0.5, likely, anywhere)


def record_from_logits(
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


def of_everything(n: int, vocab: int = 300, k: int = 20, seed: int = 7) -> Record:
    """A record with teacher, reference and every column."""
    z = random_logits(n, vocab, seed)
    labels = random_labels(z)
    generator = torch.Generator().manual_seed(3)
    return record_from_logits(
        z,
        labels,
        k=k,
        teacher=z + random_logits(n, vocab, 1, 1.5),
        reference=z + random_logits(n, vocab, 2, 0.3),
        weight=3 * torch.rand(n, generator=generator).double(),
        critical=torch.randint(0, 2, (n,), generator=generator).double(),
        old_logps=label_log_p(z, labels) - 0.3 * torch.randn(n, generator=generator).double(),
    )


def large_record(rows: int, length: int, ids: int = 33, vocab: int = 49_152, k: int = 20, seed: int = 0) -> Record:
    """A record of many tokens without logits behind it: plausible numbers, made at once. For sizes and times."""
    generator = np.random.default_rng(seed)
    n = rows * length
    steps = generator.integers(1, vocab // ids, n)
    listed = np.sort((generator.integers(0, vocab, n)[:, None] + steps[:, None] * np.arange(ids)) % vocab, axis=1)
    log_p = {}
    for name in ("student", "teacher"):
        scores = generator.gamma(1.0, 3.0, (n, 1)) * generator.standard_normal((n, ids))
        tail = generator.uniform(0.001, 0.1, (n, 1))
        log_p[name] = scores - np.log(np.exp(scores).sum(1, keepdims=True)) + np.log1p(-tail)
        log_p[f"{name}_tail"] = np.log(tail[:, 0])
        log_p[f"{name}_floor"] = np.sort(log_p[name], axis=1)[:, -k]
    at = np.where(generator.random(n) < 0.7, log_p["student"].argmax(1), generator.integers(0, ids, n))
    at_label = {name: log_p[name][np.arange(n), at] for name in ("student", "teacher")}
    labels = listed[np.arange(n), at]
    p = np.exp(log_p["student"])
    tokens = {
        "row": np.repeat(np.arange(rows), length).tolist(),
        "position": np.tile(np.arange(1, length + 1), rows).tolist(),
        "label": labels.tolist(),
        "ids": listed.tolist(),
        **{name: values.tolist() for name, values in log_p.items()},
        "log_p_y": at_label["student"].tolist(),
        "teacher_log_p_y": at_label["teacher"].tolist(),
        "rank": (log_p["student"] > at_label["student"][:, None]).sum(1).tolist(),
        "entropy": (-(p * log_p["student"]).sum(1)).tolist(),
    }
    listed_rows = [
        {
            "row": row,
            "input_ids": [0, *labels[row * length : (row + 1) * length].tolist()],
            "supervised": [False] + [True] * length,
        }
        for row in range(rows)
    ]
    manifest = {"format": 1, "vocab_size": vocab, "top_k": k, "rows": rows, "tokens": n, "model": "made at random"}
    manifest |= {"teacher": "made at random", "reference": None}
    return Record(manifest, listed_rows, tokens, {i: (f" w{i}", i == 0) for i in range(vocab)})
