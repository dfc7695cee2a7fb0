"""Asks any causal language model about a batch: its head, or the labels' log-probabilities."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from qtarget.errors import ConfigError, NonFiniteLogits
from qtarget.losses import Head
from qtarget.models.forward import HeadTransform, LossCall, StatesCall, head_parameters, whole
from qtarget.models.frozen import adapters_off, evaluation_mode, loaded_from
from qtarget.models.snapshots import StartWeights
from qtarget.targets import presets

Inputs = dict[str, Any]


class CausalLM:
    """A model through its own wrapped forward, so that the hooks of DDP, FSDP2 and DeepSpeed run.

    Args:
        model: as it is called, with whatever wraps it, its forward patched by ``add_target_forward``.
        vocab_size: tokens of the student's tokenizer; a head may be padded beyond them.
        own_size: tokens of the model's own tokenizer, where that is known: what its head holds beyond is padding.
    """

    def __init__(self, model: Any, vocab_size: int, own_size: int | None = None):
        self.model, self.vocab_size = model, vocab_size
        self.head_size = vocab_size if own_size is None else min(vocab_size, own_size)

    # Found when first asked for: a training step makes one of these and seldom looks inside.

    @functools.cached_property
    def unwrapped(self) -> Any:
        """The model without what wraps it, adapters in place."""
        from accelerate.utils import extract_model_from_parallel

        return extract_model_from_parallel(self.model)

    @functools.cached_property
    def base(self) -> Any:
        """The causal language model itself, without wrappers or adapters."""
        get_base = getattr(self.unwrapped, "get_base_model", None)
        return self.unwrapped if get_base is None else get_base()

    @functools.cached_property
    def transform(self) -> HeadTransform:
        """What the architecture does to hidden @ weight.T."""
        return HeadTransform.of(self.base.config)

    @property
    def virtual_tokens(self) -> int:
        """How many an adapter of prompt tuning puts before a row's own."""
        return getattr(getattr(self.unwrapped, "active_peft_config", None), "num_virtual_tokens", None) or 0

    @property
    def name(self) -> str:
        """What it was loaded as, else its class."""
        return loaded_from(self.unwrapped) or type(self.base).__name__

    def stop_tokens(self, tokenizer: Any) -> list[int]:
        """Ids at which the saved model stops generating: the tokenizer's end, and those of its generation config."""
        ids = getattr(getattr(self.base, "generation_config", None), "eos_token_id", None)
        return sorted({tokenizer.eos_token_id, *(ids if isinstance(ids, list) else [ids])} - {None})

    @torch.no_grad()
    def head(self, inputs: Inputs) -> Head:
        """The distribution at positions 0 to the last but one, [B, T − 1], as hidden states and a head.

        Raises:
            ConfigError: the batch holds a token that the model has no embedding for.
        """
        hidden, weight, bias = self._states_and_head(self._readable(inputs))
        # Virtual tokens of prompt tuning come first: the last positions are the labels'.
        hidden = hidden[:, -inputs["input_ids"].shape[1] :][:, :-1]
        return Head(
            hidden,
            weight,
            bias,
            logit_scale=self.transform.scale,
            logit_softcap=self.transform.softcap,
            vocab_size=min(weight.shape[0], self.head_size),
        )

    @torch.no_grad()
    def label_log_p(self, inputs: Inputs, labels: Tensor) -> Tensor:
        """log p of each label, float32 [B, T] as ``labels``, dropout off; 0 where nothing is trained."""
        call = LossCall(
            [presets.build("sft")], labels, {}, {}, self.vocab_size, None, "basic", virtual_tokens=self.virtual_tokens
        )
        try:
            with evaluation_mode(self.model):
                nll = self.model(**self._readable(inputs), qtarget=call).record.stats["nll"]
        except NonFiniteLogits as error:
            error.what = f"the logits of {self.name}"
            raise
        return torch.nn.functional.pad(-nll.nan_to_num(0.0), (1, 0))

    def _states_and_head(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """(last hidden states, weight and bias of the head, whole)."""
        call = StatesCall()
        states = self.model(**inputs, qtarget=call)
        weight, bias = head_parameters(self.base)
        if isinstance(weight, DTensor) and not call.gathered:
            # FSDP2 gathered the head itself and freed it when the forward ended
            return states.hidden, whole(weight, states.hidden), None if bias is None else whole(bias, states.hidden)
        return states.hidden, states.weight, states.bias

    def _readable(self, inputs: Inputs) -> Inputs:
        """The inputs with another token at padding, where the model may have no embedding for the student's.

        Raises:
            ConfigError: a model with fewer embeddings than the tokenizer has tokens cannot read them all.
        """
        embeddings: Any = self.base.get_input_embeddings()
        for wrapped in ("original_module", "base_layer"):  # PEFT wraps them to train some tokens, or a LoRA of them
            embeddings = getattr(embeddings, wrapped, embeddings)
        rows = embeddings.num_embeddings
        if rows >= self.vocab_size:
            return inputs
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if mask is not None and mask.shape == ids.shape:
            ids = ids.masked_fill(mask == 0, 0)
        if int(ids.max()) >= rows:
            raise ConfigError(
                f"a teacher or reference has embeddings for {rows} tokens, fewer than the tokenizer's "
                f"{self.vocab_size}, and the batch holds token {int(ids.max())}; use one with the same tokenizer"
            )
        return {**inputs, "input_ids": ids}

    @torch.no_grad()
    def check_head(self, inputs: Inputs, mixed_precision: bool = False, tokens: int = 16) -> None:
        """Compare logits rebuilt from hidden states with the model's own on a few tokens of the first row.

        ``mixed_precision``: the call computes in half precision and returns float32, so that dtypes do not tell.
        NaN and infinity are left to the loss, which names step and row. Of a row with several documents the first is
        looked at: a model that is called without this trainer's settings may let them see each other.

        Raises:
            ConfigError: they differ; the architecture does something to its logits that is not known here.
        """
        inputs = self._readable(inputs)
        if "position_ids" in inputs:
            starts = (inputs["position_ids"][0, 1:tokens] == 0).nonzero()
            tokens = int(starts[0]) + 1 if len(starts) else tokens
        few: Inputs = {name: inputs[name][:1, :tokens] for name in ("input_ids", "position_ids") if name in inputs}
        logits = self.model(**few).logits.float()
        hidden, weight, bias = self._states_and_head(few)
        rebuilt = hidden.float() @ weight.float().T
        if bias is not None:
            rebuilt = rebuilt + bias.float()
        rebuilt = self.transform.apply(rebuilt)[:, -logits.shape[1] :]
        if rebuilt.shape != logits.shape:
            raise ConfigError(
                f"{type(self.base).__name__}'s head has {rebuilt.shape[-1]} rows in this process and the model "
                f"{logits.shape[-1]} tokens: it is split over processes in a form that cannot be gathered here; turn "
                "tensor parallelism off (tp_plan), or shard with FSDP2"
            )
        finite = logits.isfinite()
        difference = (logits - rebuilt).abs().masked_fill(~finite, 0.0)
        rounded = mixed_precision or hidden.dtype not in (torch.float32, torch.float64)
        allowed = (5e-2 if rounded else 1e-3) * (1 + float(logits.masked_fill(~finite, 0.0).abs().max()))
        if not float(difference.max()) <= allowed:
            token, index = divmod(int(difference.argmax()), logits.shape[-1])
            raise ConfigError(
                f"{type(self.base).__name__}'s logits cannot be rebuilt from its hidden states: token {token}, id "
                f"{index} is {float(logits[0, token, index]):.4f} in the model and {float(rebuilt[0, token, index]):.4f} "
                f"from hidden states × head (scale {self.transform.scale}, softcap {self.transform.softcap}); this "
                "architecture is not supported"
            )


class AsAtTheStart(CausalLM):
    """The student with the weights that it started from. ``start``: where they are kept."""

    def __init__(self, model: Any, vocab_size: int, start: StartWeights):
        super().__init__(model, vocab_size)
        self.start = start

    def head(self, inputs: Inputs) -> Head:
        with self.start.in_place(), evaluation_mode(self.model):
            head = super().head(inputs)
            if not head_parameters(self.base)[0].requires_grad:
                return head
            # What it was made of goes back to the present weights when the block ends.
            return replace(head, weight=head.weight.clone(), bias=None if head.bias is None else head.bias.clone())

    def label_log_p(self, inputs: Inputs, labels: Tensor) -> Tensor:
        with self.start.in_place():
            return super().label_log_p(inputs, labels)


class WithoutAdapters(CausalLM):
    """A PEFT model as it was before its adapters, dropout off."""

    def head(self, inputs: Inputs) -> Head:
        with adapters_off(self.unwrapped):
            return super().head(inputs)

    def label_log_p(self, inputs: Inputs, labels: Tensor) -> Tensor:
        with adapters_off(self.unwrapped):
            return super().label_log_p(inputs, labels)
