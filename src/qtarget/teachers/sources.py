"""The run's teacher, wherever it comes from, asked about a batch.

Each gives a distribution for every supervised position of the student's batch. Models are forwarded without gradient, in
evaluation mode and before the student; under a context they read their own prompt and then the student's ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qtarget.data.batch import Batch
from qtarget.errors import ConfigError, loading
from qtarget.losses import Head, TopK
from qtarget.models.causal_lm import CausalLM, Inputs
from qtarget.models.frozen import evaluation_mode, load_frozen, place_as_student
from qtarget.models.snapshots import EmaWeights
from qtarget.teachers.joins import CacheJoin, ContextJoin
from qtarget.teachers.pool import pooled_head, with_exchanged_rows
from qtarget.teachers.settings import end_tokens, teacher_tokenizer
from qtarget.teachers.vocabulary import real_vocabulary_size

# (model, its inputs) → the model's own logits [B, T, V]
AskLogits = Callable[[Any, Inputs], Tensor]
# (rows, positions), [n] each
Places = tuple[Tensor, Tensor]


class TeacherSource(ABC):
    """A teacher that is asked about a batch.

    Attributes:
        models: those of its own, frozen. average: the student's, where that is the teacher.
        ends_with: the token it ends a text with; None where that is not known, or the student's by construction.
    """

    models: Sequence[CausalLM] = ()
    average: EmaWeights | None = None
    ends_with: int | None = None

    @abstractmethod
    def distribution(self, student: CausalLM, batch: Batch) -> Head | TopK:
        """The teacher at positions 0 to the last but one of the student's batch, [B, T − 1]."""

    @abstractmethod
    def logits(self, ask: AskLogits, student: Any, batch: Batch, at: Places) -> Tensor | TopK:
        """The same from the models' own logits, [n, V] at n positions; a cache gives what it keeps of them.

        For verification: nothing of it goes through hidden states × head. ``student``: the model itself. A position whose
        target asks no teacher may hold zeros.
        """


class ModelSource(TeacherSource):
    """A teacher that reads the ids it is given."""

    frozen = True  # its weights stay as they are for the whole run

    @abstractmethod
    def head(self, student: CausalLM, inputs: Inputs) -> Head:
        """At positions 0 to the last but one of what it reads."""

    @abstractmethod
    def logits_of(self, ask: AskLogits, student: Any, inputs: Inputs, at: Places) -> Tensor:
        """[n, V] from the models' own logits."""

    @torch.no_grad()
    def distribution(self, student: CausalLM, batch: Batch) -> Head:
        return self.head(student, batch.inputs)

    def logits(self, ask: AskLogits, student: Any, batch: Batch, at: Places) -> Tensor:
        return self.logits_of(ask, student, batch.inputs, at)


class Live(ModelSource):
    """One frozen model."""

    def __init__(self, model: CausalLM):
        self.models = [model]

    def head(self, student: CausalLM, inputs: Inputs) -> Head:
        return self.models[0].head(inputs)

    def logits_of(self, ask: AskLogits, student: Any, inputs: Inputs, at: Places) -> Tensor:
        return ask(self.models[0].model, inputs)[at][:, : self.models[0].head_size]


class Pool(ModelSource):
    """A log-linear pool of frozen models, softmax(Σ w z).

    Args:
        members: (weight, model); the weights sum to 1.
    """

    def __init__(self, members: Sequence[tuple[float, CausalLM]]):
        self.members = list(members)
        self.models = [model for _, model in members]
        self._made = _MadeOnce()

    def head(self, student: CausalLM, inputs: Inputs) -> Head:
        heads = [(weight, model.head(inputs)) for weight, model in self.members]
        return self._made.head([head for _, head in heads], lambda made: pooled_head(heads, made))

    def logits_of(self, ask: AskLogits, student: Any, inputs: Inputs, at: Places) -> Tensor:
        each = [(weight, ask(model.model, inputs)[at].double()) for weight, model in self.members]
        width = min(*(model.head_size for model in self.models), *(z.shape[-1] for _, z in each))
        return torch.stack([weight * z[:, :width] for weight, z in each]).sum(0)


class SelfAverage(ModelSource):
    """The student with the average of its own weights; at decay 0 the student as it is."""

    frozen = False

    def __init__(self, average: EmaWeights):
        self.average: EmaWeights = average

    def head(self, student: CausalLM, inputs: Inputs) -> Head:
        as_it_is = self.average.decay == 0
        with nullcontext() if as_it_is else self.average.in_place(), evaluation_mode(student.model):
            head = student.head(inputs)
            if as_it_is:
                return head
            # What it was made of goes back to the present weights when the block ends.
            return replace(head, weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())

    def logits_of(self, ask: AskLogits, student: Any, inputs: Inputs, at: Places) -> Tensor:
        # Before the first step the average is the student as it is; weights put in place would break its graph.
        return ask(student, inputs)[at]


class WithExchangedIds(ModelSource):
    """A teacher whose tokens ``a`` and ``b`` change places, such as two end tokens."""

    def __init__(self, inner: ModelSource, a: int, b: int):
        self.inner, self.a, self.b = inner, a, b
        self.models, self.average, self.frozen = inner.models, inner.average, inner.frozen
        self._made = _MadeOnce()

    def head(self, student: CausalLM, inputs: Inputs) -> Head:
        head = self.inner.head(student, inputs)
        if not self.frozen:
            return with_exchanged_rows(head, self.a, self.b, None)
        return self._made.head([head], lambda made: with_exchanged_rows(head, self.a, self.b, made))

    def logits_of(self, ask: AskLogits, student: Any, inputs: Inputs, at: Places) -> Tensor:
        logits = self.inner.logits_of(ask, student, inputs, at).clone()
        logits[:, [self.a, self.b]] = logits[:, [self.b, self.a]]
        return logits


class WithContext(TeacherSource):
    """A teacher that reads a prompt of its own before the student's ids.

    Args:
        inner: who reads it. join: how its positions are joined to the student's.
    """

    def __init__(self, inner: ModelSource, join: ContextJoin):
        self.inner, self.join = inner, join
        self.models, self.average = inner.models, inner.average

    def _joined(self, batch: Batch) -> tuple[Inputs, tuple[Tensor, ...]]:
        return self.join.batch(batch.inputs["input_ids"], batch.labels, batch.columns[self.join.column])

    @torch.no_grad()
    def distribution(self, student: CausalLM, batch: Batch) -> Head:
        inputs, (b, t, d, at) = self._joined(batch)
        head = self.inner.head(student, inputs)
        hidden = head.hidden.new_zeros(*batch.shifted.shape, head.hidden.shape[-1])
        hidden[b, t - 1] = head.hidden[d, at]
        return replace(head, hidden=hidden)

    def logits(self, ask: AskLogits, student: Any, batch: Batch, at: Places) -> Tensor:
        inputs, (b, t, d, inner_at) = self._joined(batch)
        answers = self.inner.logits_of(ask, student, inputs, (d, inner_at))
        number = torch.full_like(batch.shifted, -1)
        number[b, t - 1] = torch.arange(len(b), device=number.device)
        answered = number[at] >= 0  # rows of a source without a teacher are not asked about
        logits = answers.new_zeros(len(answered), answers.shape[1])
        logits[answered] = answers[number[at][answered]]
        return logits


class Cached(TeacherSource):
    """A teacher read from disk.

    Args:
        join: how tokens find their place in the cache. exchanged: two ids that change places in it, or None.
    """

    def __init__(self, join: CacheJoin, exchanged: tuple[int, int] | None = None):
        self.join = join
        join.cache.swapped = exchanged

    def distribution(self, student: CausalLM, batch: Batch) -> TopK:
        return self.join.cache.top_k(batch.columns)

    def logits(self, ask: AskLogits, student: Any, batch: Batch, at: Places) -> TopK:
        kept = self.join.cache.top_k(batch.columns)
        at = at[0].cpu(), at[1].cpu()
        tail = None if kept.tail_logprob is None else kept.tail_logprob[at]
        return replace(kept, ids=kept.ids[at], logprobs=kept.logprobs[at], tail_logprob=tail)


class _MadeOnce:
    """A head weight made of frozen heads, as long as these are the same tensors."""

    def __init__(self) -> None:
        self._made_of: tuple | None = None
        self._weight: Tensor | None = None

    def head(self, heads: Sequence[Head], make: Callable[[Tensor | None], Head]) -> Head:
        """``make`` gets the weight that was made before, or None."""
        if any(head.weight.grad_fn is not None for head in heads):
            return make(None)
        made_of = tuple((head.weight.data_ptr(), head.weight._version, head.weight.shape) for head in heads)
        head = make(self._weight if self._made_of == made_of else None)
        self._made_of, self._weight = made_of, head.weight
        return head


def teacher_source(
    args: Any,
    accelerator: Any,
    student: CausalLM,
    end_token: int | None,
    given: Any = None,
    join: CacheJoin | ContextJoin | None = None,
) -> TeacherSource:
    """The teacher that a run's settings name; its models are loaded, frozen and placed as the student is.

    Args:
        args: QTargetConfig. accelerator: the run's. end_token: the student's. given: a model, in place of a name.
        join: how the teacher is joined to tokens, where it is not by position.

    Raises:
        ConfigError: a model cannot be loaded, or teachers that end differently are to be mapped.
    """

    def frozen(model: Any, own_size: int | None = None) -> CausalLM:
        placed = place_as_student(model, "teacher", accelerator, args.device)
        return CausalLM(placed, student.vocab_size, own_size)

    def loaded(setting: str, name: str, revision: str | None, init_kwargs: Any) -> CausalLM:
        with loading(setting, name):
            own_size = real_vocabulary_size(teacher_tokenizer(name, revision, init_kwargs or {}))
            return frozen(load_frozen(name, revision, init_kwargs, args.device), own_size)

    ends_with = _end_token(args, given, end_token, student.vocab_size, join)
    exchanged = None
    if args.teacher_end_token == "map" and end_token is not None and ends_with not in (None, end_token):
        exchanged = (ends_with, end_token)
    source: TeacherSource
    if given is not None:
        source = Live(frozen(given))
    elif args.teacher_ema_decay is not None:
        source = SelfAverage(EmaWeights(student.unwrapped, args.teacher_ema_decay))
    elif args.teachers is not None:
        members = [(m.weight, loaded("teachers", m.name, m.revision, m.init_kwargs)) for m in args.pool_members()]
        source = Live(members[0][1]) if len(members) == 1 and members[0][0] == 1 else Pool(members)
    elif isinstance(join, CacheJoin):
        source = Cached(join, exchanged)
    else:
        named = args.teacher_model_name_or_path, args.teacher_model_revision, args.teacher_model_init_kwargs
        source = Live(loaded("teacher_model_name_or_path", *named))
    if isinstance(source, ModelSource) and exchanged is not None:
        source = WithExchangedIds(source, *exchanged)
    if isinstance(source, ModelSource) and isinstance(join, ContextJoin):
        source = WithContext(source, join)
    source.ends_with = ends_with
    return source


def _end_token(args: Any, given: Any, own: int | None, vocab_size: int, join: Any) -> int | None:
    if isinstance(join, CacheJoin):
        end: int | None = join.cache.manifest["end_token"]
        return end
    if given is None and args.teacher_ema_decay is not None:
        return None
    ends = sorted(end for end in end_tokens(args, given, own) if end < vocab_size)
    if len(ends) > 1 and args.teacher_end_token == "map":
        raise ConfigError(
            f"teacher_end_token is 'map', but the teachers end with different tokens ({ends}); use 'label'"
        )
    others = [end for end in ends if end != own]
    return next(iter(others or ends), None)
