"""``apply_target``: a model whose own forward returns the loss of a target."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qtarget.errors import ConfigError, DataError
from qtarget.losses import Head, TopK
from qtarget.targets import Target
from qtarget.targets.schedule import ScheduledTarget

_STATE = "_qtarget_applied"
_PATCHED = ("forward", "_qtarget_forward")  # what a patched model has on itself
# What a forward that forms no logits has no use for.
_OF_LOGITS = ("num_logits_to_keep", "return_dict", "output_attentions", "output_hidden_states")
_KEPT = "logits_to_keep"
_LOGGED = ("nll", "trust", "update", "entropy", "accuracy")
_TOKENS = "supervised_tokens"


def apply_target(
    model: nn.Module,
    target: Target | str | Mapping[str, Any],
    *,
    teacher: nn.Module | str | None = None,
    reference: nn.Module | str | None = None,
    vocab_size: int | None = None,
    eval_logits: bool = False,
    backend: str = "auto",
) -> nn.Module:
    """Make ``model(input_ids, attention_mask, labels=...)`` return the loss of a target, in place; see ``remove_target``.

    The rest works as in Transformers: labels are shifted inside, −100 is ignored, and the loss is the mean over labels
    or, with ``num_items_in_batch``, the sum divided by it. So any trainer that uses the model's own loss trains the
    target, also with DDP, FSDP2, adapters and gradient checkpointing. No logits are formed: ``output.logits`` is None.

    Calls without labels work as before. Pass the columns that the target reads (weight, critical, old_logps) as keyword
    arguments, in the labels' shape.

    Args:
        model: a causal language model of Transformers, or one with PEFT's adapters. Apply the target before DDP, FSDP or
            an ``Accelerator`` wraps it.
        target: a preset's name, its form in a recipe, or a ``Target``.
        teacher: for a target that needs one: a model, or the name or path of one. It is frozen.
        reference: likewise. By default, the model as it is now: with its adapters off, or as a frozen copy.
        vocab_size: number of tokens in the tokenizer, if the head is padded beyond them; by default the head's rows.
        eval_logits: in evaluation mode, also return logits, from a second pass.
        backend: as in ``qtarget.linear_target_loss``.

    Returns:
        The model.

    Raises:
        ConfigError: the target needs a model that is not given; the model already has a target; or its logits are not its
            hidden states times its head (checked at the first call with labels).

    Example:
        >>> qt.apply_target(model, {"preset": "target-sft", "eta": 0.5}, teacher=teacher)  # doctest: +SKIP
        >>> model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()  # doctest: +SKIP
    """
    from qtarget.models.forward import add_target_forward

    base = _base(model)
    if hasattr(base, _STATE):
        raise ConfigError(
            f"{type(base).__name__} has target {getattr(base, _STATE).target} already; remove it first "
            "with qt.remove_target(model)"
        )
    read = ScheduledTarget.read(target)
    before = {name: base.__dict__[name] for name in _PATCHED if name in base.__dict__}
    add_target_forward(base)
    others = _others(model, read, teacher, reference, vocab_size)
    applied = AppliedTarget(read, others, vocab_size, eval_logits, backend, before)
    _replace_forward(base, applied)
    setattr(base, _STATE, applied)
    return model


def remove_target(model: nn.Module) -> nn.Module:
    """Restore a model's own forward pass, and release the teacher and the reference.

    Raises:
        ConfigError: the model has no target.

    Example:
        >>> qt.remove_target(model)  # doctest: +SKIP
    """
    base = _base(model)
    applied = applied_to(base)
    for name in (*_PATCHED, _STATE):
        base.__dict__.pop(name, None)
    base.__dict__.update(applied.before)
    return model


def applied_to(model: nn.Module) -> AppliedTarget:
    """The ``AppliedTarget`` of a model: set its ``step`` and ``total_steps``, and read its ``figures()``.

    Raises:
        ConfigError: the model has no target.
    """
    found = getattr(_base(model), _STATE, None)
    if found is None:
        raise ConfigError(f"{type(_base(model)).__name__} has no target; apply one with qt.apply_target(model, target)")
    return found


@dataclass
class AppliedTarget:
    """A target on a model, and what it did.

    Attributes:
        target: as configured, with its schedules. others: {teacher, reference: who is asked}.
        before: what the model had on itself in place of what was patched.
        step, total_steps: where the run is, on which schedules depend; a host's callback sets them.
        backward_passes: how often a loss of this target was back-propagated.
    """

    target: ScheduledTarget
    others: dict[str, Any]
    vocab_size: int | None
    eval_logits: bool
    backend: str
    before: dict[str, Any]
    step: int = 0
    total_steps: int = 0
    backward_passes: int = 0
    _sums: dict[str, Tensor] = field(default_factory=dict)
    _begun: bool = False

    def now(self) -> Target:
        """The target of the present step.

        Raises:
            ConfigError: it has a schedule, and ``total_steps`` is not set.
        """
        if self.target.schedules and not self.total_steps:
            raise ConfigError(
                f"target {self.target} has a schedule, but the length of the run is not known; train with "
                "qt.TargetCallback, or set qt.applied_to(model).total_steps and .step"
            )
        return self.target.at(self.step, self.total_steps)

    def loss(self, base: Any, inner: Any, inputs: dict[str, Any]) -> Any:
        """The output of a forward with labels.

        Args:
            base: the model. inner: its forward that takes ``qtarget=``. inputs: of the call, by name.
        """
        from qtarget.models.forward import LossCall

        target = self.now()
        kept = {_KEPT: inputs.pop(_KEPT)} if _KEPT in inputs else {}
        labels, columns, count = self._taken(inputs, target, kept.get(_KEPT))
        if not self._begun:
            self._begin(base, inner, inputs, labels.device)
        config, router = base.config.get_text_config(), inputs.pop("output_router_logits", None)
        if router is None or not hasattr(config, "output_router_logits"):  # that of a dense model asks for nothing
            router = getattr(config, "output_router_logits", False)
        heads: dict[str, Head | TopK] = {
            role: other.head(inputs) for role, other in self.others.items() if role in target.requires
        }
        aux = bool(router and base.training)
        call = LossCall([target], labels, columns, heads, self.vocab_size, count, "basic", aux, self.backend)
        output = inner(**inputs, qtarget=call)
        loss = output.exact_loss
        if output.aux_loss is not None:
            loss = loss + config.router_aux_loss_coef * output.aux_loss.to(loss.device)
        if base.training:
            self._note(output.record.stats)
        if loss.requires_grad:
            loss.register_hook(self._count)
        return self._output(base, inner, inputs | kept, loss)

    def figures(self) -> dict[str, float]:
        """Means over training tokens since the last call: nll, trust, update, entropy, accuracy."""
        tokens = float(self._sums.pop(_TOKENS, 0))
        means = {name: float(total) / tokens for name, total in self._sums.items() if tokens}
        self._sums = {}
        return means

    def _count(self, gradient: Tensor) -> None:
        self.backward_passes += 1

    def _note(self, stats: dict[str, Tensor]) -> None:
        # Sums stay on the device: a number read in every micro-batch would make the host wait for it.
        added = {name: stats[name].nansum() for name in _LOGGED if name in stats}
        added[_TOKENS] = (~stats["nll"].isnan()).sum()
        self._sums = {name: self._sums.get(name, 0) + total for name, total in added.items()}

    def _taken(
        self, inputs: dict[str, Any], target: Target, kept: int | Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | float | None]:
        """Labels, the target's columns and the count of labels, taken out of a call's inputs; one label a token.

        Raises:
            DataError: labels that are shifted already, or a column that is missing or has another shape.
        """
        from qtarget.data.columns import COLUMN_OF, columns_of

        if inputs.pop("shift_labels", None) is not None:
            raise DataError("shift_labels is given, labels that are shifted already; pass labels and leave it out")
        labels = inputs.pop("labels")
        columns = {name: inputs.pop(name) for name in COLUMN_OF.values() if inputs.get(name) is not None}
        for name in columns_of(target):
            if name not in columns:
                raise DataError(f"target {target} needs the column {name!r}; pass it beside labels, of their shape")
            if columns[name].shape != labels.shape:
                shapes = f"{tuple(columns[name].shape)}, labels {tuple(labels.shape)}"
                raise DataError(f"the column {name!r} has shape {shapes}; give one number a label")
        for name in _OF_LOGITS:
            inputs.pop(name, None)
        tokens = [inputs[name] for name in ("input_ids", "inputs_embeds") if inputs.get(name) is not None]
        if kept is not None and tokens:
            length = tokens[0].shape[1]
            labels = _one_a_token(labels, kept, length, -100)
            columns = {name: _one_a_token(columns[name], kept, length, 0) for name in columns_of(target)}
        return labels, columns, inputs.pop("num_items_in_batch", None)

    def _begin(self, base: Any, inner: Any, inputs: dict[str, Any], device: torch.device) -> None:
        """Once: the others go where the student is by now, and logits rebuilt from hidden states are the models' own."""
        from qtarget.models.causal_lm import CausalLM, WithoutAdapters
        from qtarget.models.frozen import evaluation_mode

        plain = {name: inputs[name] for name in ("input_ids", "position_ids") if inputs.get(name) is not None}
        student = CausalLM(inner, 0)  # from inside its own forward: the hooks of FSDP have run, and run once
        student.unwrapped = student.base = base
        student.vocab_size = base.get_output_embeddings().weight.shape[0]
        rounded = torch.is_autocast_enabled(device.type)
        with evaluation_mode(base):
            student.check_head(plain, rounded)
        for other in self.others.values():
            if not isinstance(other, WithoutAdapters) and getattr(other.model, "hf_device_map", None) is None:
                other.model.to(device)
            other.check_head(plain, rounded)
        self._begun = True

    def _output(self, base: Any, inner: Any, inputs: dict[str, Any], loss: Tensor) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        logits = None
        if self.eval_logits and not base.training:
            with torch.no_grad():
                logits = inner(**inputs).logits
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def _one_a_token(cut: Tensor, kept: int | Tensor, length: int, fill: int) -> Tensor:
    """Labels that a host cut together with its logits, each back at its token; the first has no logits before it."""
    at = torch.arange(length, device=cut.device)[slice(-kept, None) if isinstance(kept, int) else kept]
    if cut.shape[1] == length or cut.shape[1] != len(at):
        return cut
    whole = cut.new_full((len(cut), length), fill)
    whole[:, at[:-1] + 1] = cut[:, 1:]
    return whole


def _base(model: Any) -> Any:
    """The causal language model itself, without adapters.

    Raises:
        ConfigError: a model that something wraps already, or that is none of Transformers'.
    """
    base = getattr(model, "get_base_model", lambda: model)()
    if not hasattr(base, "get_output_embeddings") or not hasattr(base, "base_model"):
        raise ConfigError(
            f"the model is a {type(model).__name__}, not a causal language model of Transformers; apply the target to "
            "the model itself, before DDP, FSDP or an Accelerator wraps it"
        )
    return base


def _others(
    model: Any,
    target: ScheduledTarget,
    teacher: nn.Module | str | None,
    reference: nn.Module | str | None,
    vocab_size: int | None,
) -> dict[str, Any]:
    """Who is asked for teacher and reference, those that the target requires."""
    from qtarget.models.causal_lm import CausalLM, WithoutAdapters
    from qtarget.models.forward import add_target_forward
    from qtarget.models.frozen import copy_of_the_start, freeze, load_frozen

    base = _base(model)
    tokens, device = vocab_size or base.get_output_embeddings().weight.shape[0], base.device

    def asked(found: nn.Module | str) -> CausalLM:
        one: Any = load_frozen(found, None, None, device) if isinstance(found, str) else freeze(found)
        add_target_forward(_base(one))
        return CausalLM(one, tokens)

    others: dict[str, Any] = {}
    if "teacher" in target.requires:
        if teacher is None:
            raise ConfigError(f"target {target} needs a teacher; give one: qt.apply_target(model, ..., teacher=model)")
        others["teacher"] = asked(teacher)
    if "reference" in target.requires:
        if reference is not None:
            others["reference"] = asked(reference)
        elif hasattr(model, "disable_adapter"):
            others["reference"] = WithoutAdapters(model, tokens)
        else:
            others["reference"] = asked(copy_of_the_start(base))
    return others


def _replace_forward(base: Any, applied: AppliedTarget) -> None:
    inner = base.forward  # takes qtarget=
    names = list(inspect.signature(type(base).forward).parameters)[1:]

    # Keep the original signature: Transformers' trainer asks it whether num_items_in_batch may come along.
    @functools.wraps(type(base).forward)
    def forward(self, *args, qtarget=None, **kwargs):
        if qtarget is not None:
            return inner(*args, qtarget=qtarget, **kwargs)
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}  # also those given by position
        if inputs.get("labels") is None:
            return inner(*args, **kwargs)
        return applied.loss(self, inner, inputs)

    base.forward = types.MethodType(forward, base)
