"""The loss inside a model's own forward, where DDP, FSDP2 and DeepSpeed hooks run.

A patched model called with ``qtarget=call`` runs its backbone and hands the last hidden states to the call instead of
forming logits. Everything the call holds crosses mixed-precision wrappers in one opaque object: such wrappers cast
tensors inside dicts, lists, tuples and dataclasses, and a log-probability of −5.1234 would arrive as −5.125.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput

from qtarget.data.columns import SOURCE_ID, columns_of
from qtarget.errors import ConfigError, DataError
from qtarget.losses import Head, TopK, linear_target_loss
from qtarget.models import positions
from qtarget.targets import Target


@dataclass(frozen=True)
class HeadTransform:
    """What an architecture does to hidden @ weight.T: a factor, then a softcap."""

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> HeadTransform:
        """As the model's configuration says, by the names the architectures use."""
        text = config.get_text_config()
        factors = (getattr(text, name, None) for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"))
        scale = next((factor for factor in factors if factor is not None), None)
        scaling = getattr(text, "logits_scaling", None)
        if scale is None and scaling is not None:  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
            scale = scaling if text.model_type == "hyperclovax" else 1 / scaling
        return cls(1.0 if scale is None else float(scale), getattr(text, "final_logit_softcapping", None))

    def apply(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class TokenRecord:
    """What a loss says of itself: its value and per-token statistics of the shifted labels' shape, without a graph."""

    def __init__(self, loss: Tensor, stats: dict[str, Tensor]):
        self.loss = loss.detach()
        self.stats = {name: value.detach() for name, value in stats.items()}


@dataclass
class TargetLossOutput(ModelOutput):
    """What leaves the wrapped forward, which mixed precision may round on the way out (``output_dtype``).

    loss: a scalar with a graph. aux_loss: of a mixture of experts, unweighted. record: opaque, so that none of its digits
    is lost.
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    record: TokenRecord | None = None

    @property
    def exact_loss(self) -> Tensor:
        """The loss with its graph and with every digit of its value."""
        assert self.loss is not None and self.record is not None
        exact = self.record.loss
        rounded = self.loss.to(exact.dtype)
        return rounded + (exact - rounded.detach())


@dataclass
class StatesOutput(ModelOutput):
    """hidden: [batch, length, width] before the head. weight, bias: the head's."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class LossCall:
    """Ask a patched model for its loss. Not a dataclass on purpose: see the module's docstring.

    Args:
        targets: one for all tokens, or one per data source.
        labels: [batch, length], before the shift.
        columns: of the labels' shape: those that the targets read, the number of the source, and any others.
        others: teacher and reference.
        aux_loss: also return the auxiliary loss of a mixture of experts.
        backend, z_loss: as in ``qtarget.linear_target_loss``.
        virtual_tokens: that an adapter puts before the batch's own; hidden states may be so many more than labels.

    Raises:
        DataError: any other number of labels than there are tokens.
    """

    def __init__(
        self,
        targets: list[Target],
        labels: Tensor,
        columns: dict[str, Tensor],
        others: dict[str, Head | TopK],
        vocab_size: int | None,
        num_items: Tensor | float | None,
        stats: str,
        aux_loss: bool = False,
        backend: str = "auto",
        z_loss: float = 0.0,
        virtual_tokens: int = 0,
    ):
        self.targets, self.labels, self.columns, self.others = targets, labels, columns, others
        self.vocab_size, self.num_items, self.stats = vocab_size, num_items, stats
        self.aux_loss, self.backend, self.z_loss = aux_loss, backend, z_loss
        self.virtual_tokens = virtual_tokens
        self.gathered = False

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadTransform) -> ModelOutput:
        labels = self.labels[:, 1:].to(hidden.device)
        before = hidden.shape[1] - self.labels.shape[1]
        if before not in (0, self.virtual_tokens):  # those of prompt tuning come first; prefix tuning shows none
            raise DataError(
                f"the batch has {self.labels.shape[1]} labels a row and {hidden.shape[1]} tokens, {self.virtual_tokens} "
                "of them virtual; give one label for each input_id"
            )
        hidden = hidden[:, before:-1]
        source = None if len(self.targets) == 1 else self.columns.get(SOURCE_ID)
        output = linear_target_loss(
            hidden,
            weight,
            labels,
            self.targets[0] if len(self.targets) == 1 else self.targets,
            which=None if source is None else source[:, 1:].to(hidden.device),
            head_bias=bias,
            **self.others,  # type: ignore[arg-type]
            **{name: self.columns[name][:, 1:] for name in columns_of(*self.targets)},  # type: ignore[arg-type]
            vocab_size=None if self.vocab_size is None else min(self.vocab_size, weight.shape[0]),
            logit_scale=transform.scale,
            logit_softcap=transform.softcap,
            num_items=self.num_items,
            z_loss=self.z_loss,
            stats=self.stats,
            backend=self.backend,
        )
        return TargetLossOutput(loss=output.loss, record=TokenRecord(output.loss, output.stats))


class StatesCall:
    """Ask a patched model for its last hidden states and its head: see ``CausalLM``.

    ``gathered``: set by the model where its head was a shard, so that what is handed out is whole and stays valid.
    """

    aux_loss = False
    gathered = False

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadTransform) -> ModelOutput:
        if is_deepspeed_zero3_enabled():  # the gathered head is partitioned again once the forward ends
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return StatesOutput(hidden=hidden, weight=weight, bias=bias)


def add_target_forward(model: nn.Module) -> None:
    """Let ``model(..., qtarget=call)`` hand its hidden states to ``call``; any other call is as before.

    Such a call raises DataError where a row is longer than the model's table of learned positions.
    """
    if getattr(model, "_qtarget_forward", False):
        return
    original = model.forward
    transform = HeadTransform.of(model.config)
    limit = positions.learned(model)

    # Keep the original signature: ``generate`` validates its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, qtarget=None, **kwargs):
        if qtarget is None:
            return original(*args, **kwargs)
        if limit is not None:
            _check_length(self, limit, kwargs)
        kwargs["use_cache"] = False
        kwargs.pop("labels", None)
        if qtarget.aux_loss:
            kwargs["output_router_logits"] = True
        states = self.base_model(*args, **kwargs)
        hidden = states.last_hidden_state
        weight, bias = head_parameters(self)
        qtarget.gathered = isinstance(weight, DTensor)
        if getattr(getattr(weight, "ds_status", None), "name", "") == "INFLIGHT":
            # ZeRO-3 fetches ahead what the last forward used, and only the head's own forward waits for it
            with torch.no_grad():
                self.get_output_embeddings()(hidden[:, :1])
        with _gathered(weight, bias):
            weight, bias = whole(weight, hidden), None if bias is None else whole(bias, hidden)
            output = qtarget(hidden.to(weight.device), weight, bias, transform)
        if qtarget.aux_loss:  # of a mixture of experts, as its own forward computes it (arXiv:2101.03961)
            from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

            config, mask = self.config.get_text_config(), kwargs.get("attention_mask")
            experts = config.num_experts, config.num_experts_per_tok
            output.aux_loss = load_balancing_loss_func(states.router_logits, *experts, mask)
        return output

    model.forward = types.MethodType(forward, model)
    model._qtarget_forward = True  # type: ignore[assignment]


def _gathered(*parameters: Tensor | None) -> contextlib.AbstractContextManager[Any]:
    """Parameters that ZeRO-3 keeps in pieces, whole for the duration; one that is whole already is left alone.

    TRL has such a helper, by another name from version to version; a model in another trainer may come without TRL.
    """
    pieces = [p for p in parameters if getattr(getattr(p, "ds_status", None), "name", "AVAILABLE") != "AVAILABLE"]
    if not pieces:
        return contextlib.nullcontext()
    import deepspeed

    whole_for_now: contextlib.AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(pieces)
    return whole_for_now


def _check_length(model: Any, limit: int, inputs: dict[str, Any]) -> None:
    """Raise where a batch is longer than a model's table of positions, which would answer with an IndexError."""
    ids, places = (inputs.get(name) for name in ("input_ids", "position_ids"))
    length = 0 if ids is None else ids.shape[1]
    if length > limit and places is not None:  # several documents in a row
        length = int(places.max()) + 1
    if length > limit:
        name = model.config._name_or_path or type(model).__name__
        raise DataError(
            f"a row has {length} tokens, but {name} takes {limit} positions; set max_length: {limit} or less"
        )


def head_parameters(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the output head, as they apply now: adapters' saved head, or the original with adapters off."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        adapter = head.active_adapters[0] if head.active_adapters else None
        head = head.original_module if head.disable_adapters or adapter is None else head.modules_to_save[adapter]
    if hasattr(head, "get_base_layer"):
        raise ConfigError(
            "the model has an adapter on its head, but losses and reports use the head's own weight; merge the "
            "adapter first (qtarget merge FOLDER -o OTHER), or train the whole head with lora_modules_to_save"
        )
    return head.weight, getattr(head, "bias", None)


def whole(parameter: Tensor, like: Tensor) -> Tensor:
    """A head's parameter as a plain tensor, gathered where FSDP2 shards it.

    A head in a group of its own reaches the loss as a shard: its module is never called, so nothing gathers it. A bare
    ``full_tensor()`` would give each process only its own gradient; marked as partial they are summed over the mesh, and
    divided by its size as FSDP divides every other gradient. A head in the root group is gathered by FSDP already and
    comes through as it is.

    Args:
        parameter: weight or bias of the head. like: hidden states, whose precision a gathered head takes: the
            mixed-precision policy has cast them and never saw the head.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    sharded: Any = parameter.detach()
    placements = None
    if torch.is_grad_enabled() and parameter.requires_grad:
        sharded = _Divided.apply(parameter, parameter.device_mesh.size())
        placements = [Partial()] * parameter.device_mesh.ndim
    full: Tensor = sharded.full_tensor(grad_placements=placements)
    lower = like.is_floating_point() and torch.finfo(like.dtype).bits < torch.finfo(full.dtype).bits
    return full.to(like.dtype) if lower else full


class _Divided(torch.autograd.Function):
    """The tensor itself; its gradient divided by a number."""

    @staticmethod
    def forward(ctx, tensor, divisor):
        ctx.divisor = divisor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return gradient / ctx.divisor, None


def accepted(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs a model's own forward takes; one without ``**kwargs`` refuses what the trainer adds."""
    parameters = inspect.signature(type(model).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}
