"""The loss inside a model's own forward, so that DDP, FSDP2, DeepSpeed and checkpointing hooks run around it.

A patched model called with ``qtarget=call`` runs its backbone and hands the last hidden states to the call instead of
forming logits. Everything the call holds crosses mixed-precision wrappers in one opaque object: such wrappers cast
tensors inside dicts, lists, tuples and dataclasses, and a log-probability of −5.1234 would arrive as −5.125.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import ModelOutput
from trl.trainer.utils import maybe_gather_lm_head_ctx

from qtarget.data.columns import SOURCE_ID, columns_of
from qtarget.errors import ConfigError
from qtarget.losses import Head, TopK, linear_target_loss
from qtarget.models.sharded_head import whole
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
        scale = getattr(text, "logit_scale", None)
        for name in ("output_multiplier", "lm_head_multiplier"):
            if scale is None:
                scale = getattr(text, name, None)
        scaling = getattr(text, "logits_scaling", None)
        if scale is None and scaling is not None:  # Granite and MiniCPM3 divide by it, HyperCLOVA X multiplies
            scale = scaling if text.model_type == "hyperclovax" else 1 / scaling
        return cls(1.0 if scale is None else float(scale), getattr(text, "final_logit_softcapping", None))

    def apply(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class Figures:
    """What a loss says of itself: its value and per-token statistics of the shifted labels' shape, without a graph."""

    def __init__(self, loss: Tensor, stats: dict[str, Tensor]):
        self.loss = loss.detach()
        self.stats = {name: value.detach() for name, value in stats.items()}


@dataclass
class TargetLossOutput(ModelOutput):
    """What leaves the wrapped forward, which mixed precision may round on the way out (``output_dtype``).

    loss: a scalar with a graph. aux_loss: of a mixture of experts, unweighted. figures: opaque, so that no digit of them
    is lost.
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    figures: Figures | None = None

    @property
    def exact_loss(self) -> Tensor:
        """The loss with its graph and with every digit of its value."""
        assert self.loss is not None and self.figures is not None
        exact = self.figures.loss
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
        columns: weight, critical, old_logps and the source's number, of the labels' shape.
        others: teacher and reference.
        aux_loss: also return the auxiliary loss of a mixture of experts.
        backend: who does the rows' mathematics; see ``qtarget.linear_target_loss``.
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
    ):
        self.targets = targets
        self.labels = labels
        self.columns = columns
        self.others = others
        self.vocab_size = vocab_size
        self.num_items = num_items
        self.stats = stats
        self.aux_loss = aux_loss
        self.backend = backend
        self.gathered = False

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadTransform) -> ModelOutput:
        labels = self.labels[:, 1:].to(hidden.device)
        # Virtual tokens of prompt tuning come first: the last positions are the labels'.
        hidden = hidden[:, -self.labels.shape[1] :][:, :-1]
        columns = {name: column[:, 1:] for name, column in self.columns.items()}
        source = columns.pop(SOURCE_ID, None)
        num_items = self.num_items
        if num_items is None:  # the mean over this batch, whatever its sources
            num_items = (labels != -100).sum()
        single = len(self.targets) == 1
        output = linear_target_loss(
            hidden,
            weight,
            labels,
            self.targets[0] if single else self.targets,
            which=None if single or source is None else source.to(hidden.device),
            head_bias=bias,
            **self.others,  # type: ignore[arg-type]
            **{name: columns[name] for name in columns_of(*self.targets)},  # type: ignore[arg-type]
            vocab_size=None if self.vocab_size is None else min(self.vocab_size, weight.shape[0]),
            logit_scale=transform.scale,
            logit_softcap=transform.softcap,
            num_items=num_items,
            stats=self.stats,
            backend=self.backend,
        )
        return TargetLossOutput(loss=output.loss, figures=Figures(output.loss, output.stats))


class StatesCall:
    """Ask a patched model for its last hidden states and its head: see ``states_and_head``.

    ``gathered``: set by the model where its head was a shard, so that what is handed out is whole and stays valid.
    """

    aux_loss = False
    gathered = False

    def __call__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, transform: HeadTransform) -> ModelOutput:
        if is_deepspeed_zero3_enabled():  # the gathered head is partitioned again once the forward ends
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        return StatesOutput(hidden=hidden, weight=weight, bias=bias)


def add_target_forward(model: nn.Module) -> None:
    """Let ``model(..., qtarget=call)`` hand its hidden states to ``call``; any other call is as before."""
    if getattr(model, "_qtarget_forward", False):
        return
    original = model.forward
    transform = HeadTransform.of(model.config)

    # Keep the original signature: ``generate`` validates its arguments against it.
    @functools.wraps(type(model).forward)
    def forward(self, *args, qtarget=None, **kwargs):
        if qtarget is None:
            return original(*args, **kwargs)
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
        with maybe_gather_lm_head_ctx(weight, bias):  # type: ignore[arg-type]  # ZeRO-3
            weight, bias = whole(weight, hidden), None if bias is None else whole(bias, hidden)
            output = qtarget(hidden.to(weight.device), weight, bias, transform)
        if qtarget.aux_loss:
            output.aux_loss = _load_balancing_loss(self, states.router_logits, kwargs.get("attention_mask"))
        return output

    model.forward = types.MethodType(forward, model)
    model._qtarget_forward = True  # type: ignore[assignment]


@torch.no_grad()
def states_and_head(call: Any, base: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """(last hidden states, weight and bias of the head, whole) of a teacher, a reference or the student as it is now.

    ``call``: the patched model, wrapped where it is; ``base``: the causal language model inside.
    """
    asked = StatesCall()
    states = call(**inputs, qtarget=asked)
    weight, bias = head_parameters(base)
    if isinstance(weight, DTensor) and not asked.gathered:
        # FSDP2 gathered the head itself and freed it when the forward ended
        return states.hidden, whole(weight, states.hidden), None if bias is None else whole(bias, states.hidden)
    return states.hidden, states.weight, states.bias


def _load_balancing_loss(model: Any, router_logits: Any, attention_mask: Tensor | None) -> Any:
    """The auxiliary loss of a mixture of experts, as the architecture's own forward computes it (arXiv:2101.03961)."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    config = model.config.get_text_config()
    return load_balancing_loss_func(router_logits, config.num_experts, config.num_experts_per_tok, attention_mask)


def head_parameters(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of the output head, as they apply now: adapters' saved head, or the original with adapters off."""
    head = model.get_output_embeddings()
    if hasattr(head, "modules_to_save"):
        adapter = head.active_adapters[0] if head.active_adapters else None
        head = head.original_module if head.disable_adapters or adapter is None else head.modules_to_save[adapter]
    return head.weight, getattr(head, "bias", None)


def accepted(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs a model's own forward takes; one without ``**kwargs`` refuses what the trainer adds."""
    parameters = inspect.signature(type(model).forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name in parameters}


@torch.no_grad()
def check_head_transform(
    call: Any, base: nn.Module, inputs: dict[str, Any], mixed_precision: bool = False, tokens: int = 16
) -> None:
    """Compare logits rebuilt from hidden states with the model's own on a few tokens of the first row.

    ``mixed_precision``: the call computes in half precision and returns float32, so that dtypes do not tell.
    NaN is left to the loss, which names step and row. Of a row with several documents the first is looked at: a model
    that is called without this trainer's settings may let them see each other.

    Raises:
        ConfigError: they differ; the architecture does something to its logits that is not known here.
    """
    few = {"input_ids": inputs["input_ids"][:1, :tokens]}
    if "position_ids" in inputs:
        starts = (inputs["position_ids"][0, 1:tokens] == 0).nonzero()
        tokens = int(starts[0]) + 1 if len(starts) else tokens
        few = {name: inputs[name][:1, :tokens] for name in ("input_ids", "position_ids")}
    own = call(**few).logits.float()
    hidden, weight, bias = states_and_head(call, base, few)
    transform = HeadTransform.of(base.config)
    rebuilt = hidden.float() @ weight.float().T
    if bias is not None:
        rebuilt = rebuilt + bias.float()
    rebuilt = transform.apply(rebuilt)[:, -own.shape[1] :]
    if rebuilt.shape != own.shape:
        raise ConfigError(
            f"{type(base).__name__}'s head has {rebuilt.shape[-1]} rows in this process and the model {own.shape[-1]} "
            "tokens: it is split over processes in a form that cannot be gathered here; leave tensor parallelism out "
            "(tp_plan), or shard with FSDP2"
        )
    if own.isnan().any():
        return
    difference = (own - rebuilt).abs()
    rounded = mixed_precision or hidden.dtype not in (torch.float32, torch.float64)
    allowed = (5e-2 if rounded else 1e-3) * (1 + float(own.abs().max()))
    if not float(difference.max()) <= allowed:
        place = divmod(int(difference.argmax()), own.shape[-1])
        raise ConfigError(
            f"{type(base).__name__}'s logits cannot be rebuilt from its hidden states: token {place[0]}, id {place[1]} "
            f"is {float(own.flatten()[difference.argmax()]):.4f} in the model and "
            f"{float(rebuilt.flatten()[difference.argmax()]):.4f} from hidden states × head (scale {transform.scale}, "
            f"softcap {transform.softcap}); this architecture is not supported"
        )
