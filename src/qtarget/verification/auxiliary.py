"""Do teacher and reference see what the student sees, and does the loss get their answer?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qtarget.data.batch import Batch
from qtarget.losses import TopK
from qtarget.models.causal_lm import CausalLM
from qtarget.teachers.sources import Cached, WithContext
from qtarget.verification.check import Finding, check, expect, not_applicable
from qtarget.verification.expected import Expected, label_log_p, logits_of
from qtarget.verification.subject import Subject

# Of log-probabilities, absolute: float32 through a whole model, and half precision.
_CLOSE, _CLOSE_IN_HALF = 5e-3, 0.25


@check(
    "teacher sees the same ids",
    "the teacher is asked about other tokens: check its tokenizer and teacher_context, or rebuild its cache",
)
def teacher(subject: Subject) -> Finding:
    """The teacher reads the same ids as the student, and the loss is given its answers."""
    if "teacher" not in subject.requires:
        return not_applicable("the target needs no teacher")
    source = subject.trainer.aux.teacher
    if isinstance(source, Cached):
        return _cached(subject, source)
    assert source is not None
    models = source.models or [subject.trainer.student]
    return _asked(subject, "teacher", models, source if isinstance(source, WithContext) else None)


@check(
    "reference sees the same ids",
    "the reference is asked about other tokens: check its tokenizer and how it is loaded",
)
def reference(subject: Subject) -> Finding:
    """The reference reads the same ids as the student, and the loss is given its answers."""
    if "reference" not in subject.requires:
        return not_applicable("the target needs no reference")
    return _asked(subject, "reference", [subject.trainer.aux.reference or subject.trainer.student], None)


def _asked(subject: Subject, name: str, models: Sequence[CausalLM], context: WithContext | None) -> Finding:
    """Watch what reaches the embeddings, and hold what comes out against the model's own logits of a document alone."""
    batch = subject.trainer.batch(subject.rows)
    seen: list[Tensor] = []

    def watch(module: nn.Module, given: Any) -> None:
        seen.append(given[0].detach())

    with ExitStack() as hooks, subject.without_dropout(), torch.no_grad():
        for model in models:
            hooks.enter_context(model.base.get_input_embeddings().register_forward_pre_hook(watch))
        subject.trainer.ask(batch, {name})
    wrong = [_differences(subject, ids, batch, context) for ids in seen]
    error, count = _of_labels(subject, name)
    allowed = _CLOSE if subject.dtype in (torch.float32, torch.float64) else _CLOSE_IN_HALF
    if not count:
        return not_applicable(f"no label in the rows used asks the {name}; use more rows")
    read = len(seen) >= len(models) and not any(wrong)
    what = "its own prompt, then the student's ids" if context else "the student's ids"
    told = f"{what}: {sum(wrong)} differ" if seen else "nothing was read"
    told += f"; log p of {count} labels off by {error:.1e} at most"
    return expect(
        read and error <= allowed, told, differing_ids=sum(wrong), labels=count, log_p_error=error, allowed=allowed
    )


def _differences(subject: Subject, ids: Tensor, batch: Batch, context: WithContext | None) -> int:
    """How many ids that a model read are not the student's."""
    student = subject.step.batch["input_ids"].to(ids.device)
    if context is None:
        mask = subject.step.batch.get("attention_mask", torch.ones_like(student)).to(ids.device).bool()
        ids = ids[:, -student.shape[1] :]
        return int((ids != student)[mask].sum()) if ids.shape == student.shape else student.numel()
    _, (b, t, d, at) = context.join.batch(student, batch.labels, batch.columns[context.join.column])
    if len(ids) <= int(d.max()) or ids.shape[1] <= int(at.max()):
        return len(t)
    # A label may be the last that is read: what the teacher had before it is the student's token before it.
    first = torch.zeros_like(t, dtype=torch.bool)
    first[1:] = (d[1:] == d[:-1]) & (t[1:] == t[:-1] + 1)
    return int((ids[d, at] != student[b, t - 1])[first].sum())


def _of_labels(subject: Subject, name: str) -> tuple[float, int]:
    """(the largest difference of log p_y between what the loss was given and the model's own logits, labels)."""
    expected, gaps = Expected(subject), [torch.zeros(0)]
    for sample in subject.samples:
        own, head = expected.given(sample).get(f"{name}_logits"), sample.heads.get(name)
        if name not in sample.target.requires or own is None or head is None:
            continue
        given = expected.dense(head, logits_of(sample.student))
        width = min(given.shape[1], own.shape[1])
        log_p, own_log_p = (label_log_p(logits[:, :width], sample.labels) for logits in (given, own))
        gaps.append((log_p - own_log_p).abs().cpu())
    gap = torch.cat(gaps)
    return float(gap.max()) if len(gap) else 0.0, len(gap)


def _cached(subject: Subject, source: Cached) -> Finding:
    """Every supervised token has a place of its own in the cache, and the loss was given the contents of that place."""
    batch, join = subject.step.batch, source.join
    trained = batch["labels"][:, 1:] != -100
    uids = batch[join.column][:, 1:][trained]
    placed = uids[uids >= 0]
    targets = [subject.targets[number] for *_, number in subject.supervised()]
    missing = sum("teacher" in target.requires for target, uid in zip(targets, uids, strict=True) if uid < 0)
    if not len(placed) and not missing:
        return not_applicable("no label in the rows used asks the teacher; use more rows")
    shared = len(placed) - len(placed.unique())  # rows that are repeated in the data have one place in the cache
    given, cached = subject.step.call.others.get("teacher"), join.cache.gather(uids)
    same = isinstance(given, TopK) and all(
        torch.equal(values[trained.to(values.device)].cpu(), wanted)
        for values, wanted in zip((given.ids, given.logprobs), list(cached.values())[:2], strict=True)
    )
    told = f"{len(placed)} labels have a place in the cache, {missing} have none, {shared} share one"
    told += "" if same else "; what the loss was given is not what the cache contains"
    return expect(same and not missing, told, labels=len(placed), missing=missing, shared=shared)


CHECKS = [teacher, reference]
