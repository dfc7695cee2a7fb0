"""The run's teacher, wherever it comes from: a model, a pool of models, the student's own average, or a cache.

It gives a distribution for every supervised position of the student's batch. Models are forwarded without gradient, in
evaluation mode and before the student; under a context they read their own prompt and then the student's ids.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qtarget.losses import Head, TopK
from qtarget.models.frozen import evaluation_mode
from qtarget.models.snapshots import EmaWeights
from qtarget.teachers.joins import CacheJoin, ContextJoin
from qtarget.teachers.pool import pooled_head, with_exchanged_rows


class Teacher:
    """Asks the teacher about a batch.

    Args:
        models: (weight in the pool, frozen model able to hand out its hidden states); none for an average or a cache.
        average: the student's average, in place of models. uids: how tokens find a cache or a context of their own.
        head_of: (model, inputs) → Head of positions 0 to the last but one.
        exchanged: two ids to exchange in the teacher, or None.
    """

    def __init__(
        self,
        models: Sequence[tuple[float, nn.Module]],
        average: EmaWeights | None,
        uids: CacheJoin | ContextJoin | None,
        head_of: Callable[[Any, dict[str, Any]], Head],
        exchanged: tuple[int, int] | None = None,
    ):
        self.models = list(models)
        self.average, self.uids, self.exchanged = average, uids, exchanged
        self._head_of = head_of
        self._made: dict[str, tuple[tuple, Tensor]] = {}

    @torch.no_grad()
    def distribution(
        self, student: nn.Module, inputs: dict[str, Any], labels: Tensor, columns: dict[str, Tensor]
    ) -> Head | TopK:
        """The teacher at positions 0 to the last but one of the student's batch, [B, T − 1].

        Args:
            student: the wrapped student. inputs: its inputs without labels. labels: [B, T], before the shift.
            columns: the batch's columns of uids, and what was gathered from a cache.
        """
        if isinstance(self.uids, CacheJoin):
            return self.uids.cache.top_k(columns)
        if isinstance(self.uids, ContextJoin):
            uid = columns[self.uids.column]
            own, (b, t, d, at) = self.uids.batch(inputs["input_ids"], labels, uid)
            head = self._ask(student, own)
            hidden = head.hidden.new_zeros(*labels[:, 1:].shape, head.hidden.shape[-1])
            hidden[b, t - 1] = head.hidden[d, at]
            return replace(head, hidden=hidden)
        return self._ask(student, inputs)

    def _ask(self, student: nn.Module, inputs: dict[str, Any]) -> Head:
        if self.average is not None:
            head = self._ask_average(student, inputs)
        elif len(self.models) == 1 and self.models[0][0] == 1:
            head = self._head_of(self.models[0][1], inputs)
        else:
            heads = [(weight, self._head_of(model, inputs)) for weight, model in self.models]
            head = self._kept("pool", heads, lambda weight: pooled_head(heads, weight))
        if self.exchanged is not None:
            a, b = self.exchanged
            single = head
            head = self._kept("exchanged", [(1.0, single)], lambda weight: with_exchanged_rows(single, a, b, weight))
        return head

    def _ask_average(self, student: nn.Module, inputs: dict[str, Any]) -> Head:
        assert self.average is not None
        as_it_is = self.average.decay == 0
        with nullcontext() if as_it_is else self.average.in_place(), evaluation_mode(student):
            head = self._head_of(student, inputs)
            # What it was made of goes back to the present weights when the block ends.
            return head if as_it_is else replace(head, weight=head.weight.clone(), bias=_clone(head.bias))

    def _kept(self, name: str, heads: Sequence[tuple[float, Head]], make: Callable[[Tensor | None], Head]) -> Head:
        """Make a head whose weight is the same as long as the frozen weights it is made of are the same tensors."""
        if self.average is not None or any(head.weight.grad_fn is not None for _, head in heads):
            return make(None)
        made_of = tuple((head.weight.data_ptr(), head.weight._version, head.weight.shape) for _, head in heads)
        kept = self._made.get(name)
        head = make(kept[1] if kept is not None and kept[0] == made_of else None)
        self._made[name] = (made_of, head.weight)
        return head


def _clone(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.clone()
