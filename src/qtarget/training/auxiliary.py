"""The models a target needs beside the student: a teacher, a reference, psft's old policy.

Each sees the student's inputs without labels, through its own wrapped forward, in evaluation mode and before the
student's forward; what comes back is joined to the labels by position, and by supervised token in the loss.
"""

from __future__ import annotations

import gc
import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from qtarget.errors import ConfigError, loading
from qtarget.losses import Head, TopK
from qtarget.models.forward import (
    HeadTransform,
    LossCall,
    add_target_forward,
    check_head_transform,
    head_parameters,
    states_and_head,
)
from qtarget.models.frozen import adapters_off, evaluation_mode, freeze, frozen_copy, load_frozen
from qtarget.models.snapshots import EmaWeights, OldPolicy, WeightSnapshot
from qtarget.targets import presets
from qtarget.teachers.joins import CacheJoin, ContextJoin
from qtarget.teachers.settings import end_tokens
from qtarget.teachers.sources import Teacher
from qtarget.teachers.vocabulary import real_vocabulary_size


class AuxiliaryModels:
    """Loads what is required and asks it.

    Args:
        args: the run's QTargetConfig. accelerator: its Accelerator. student: the model as the trainer holds it.
        requires: of teacher, reference and old_policy, those to load. tokenizer: the student's.
        teacher, reference: models the user made, in place of names in ``args``. uids: how the teacher is joined to
            tokens, where it is not by position.
    """

    def __init__(
        self,
        args: Any,
        accelerator: Any,
        student: Any,
        requires: frozenset[str],
        tokenizer: Any,
        teacher: nn.Module | None,
        reference: nn.Module | None,
        uids: CacheJoin | ContextJoin | None = None,
    ):
        self._args, self._accelerator = args, accelerator
        self._vocab_size, self._end = real_vocabulary_size(tokenizer), tokenizer.eos_token_id
        self.ends_with: int | None = None
        self._student = accelerator.unwrap_model(student)
        self.teacher_name, self.reference_name = _name_of(teacher), _name_of(reference)
        self.has_adapters = hasattr(self._student, "disable_adapter")
        self.teacher_source = self._teacher(teacher, uids) if "teacher" in requires else None
        self.reference = self._reference(reference) if "reference" in requires else None
        self.old_policy = None
        if "old_policy" in requires:
            self.old_policy = OldPolicy(self._student, args.psft_refresh)

    # -- loading -------------------------------------------------------------------------------------------------

    @property
    def teacher(self) -> nn.Module | None:
        """The teacher as a model of its own, the first of a pool; None where there is none or it has none."""
        models = [] if self.teacher_source is None else self.teacher_source.models
        return models[0][1] if models else None

    @property
    def average(self) -> EmaWeights | None:
        """The student's average that is the teacher, where it is."""
        return None if self.teacher_source is None else self.teacher_source.average

    @property
    def kept_weights(self) -> list[WeightSnapshot]:
        """Copies of the student's weights that a resumed run needs."""
        average = None if self.average is None or self.average.decay == 0 else self.average
        return [kept for kept in (self.old_policy, average) if kept is not None]

    def _teacher(self, given: nn.Module | None, uids: CacheJoin | ContextJoin | None) -> Teacher:
        args, models, average = self._args, [], None
        if given is not None:
            models = [(1.0, self._prepared("teacher", given))]
        elif args.teacher_ema_decay is not None:
            average = EmaWeights(self._student, args.teacher_ema_decay)
        elif args.teachers is not None:
            for one in args.pool_members():
                with loading("teachers", one.name):
                    loaded = load_frozen(one.name, one.revision, one.init_kwargs, args.device)
                models.append((one.weight, self._prepared("teacher", loaded)))
        elif not isinstance(uids, CacheJoin):
            models = [(1.0, self._load("teacher", None))]
        self.ends_with = self._end_token(given, uids)
        exchanged = None
        if args.teacher_end_token == "map" and self.ends_with not in (None, self._end):
            exchanged = (self.ends_with, self._end)
        if isinstance(uids, CacheJoin):
            uids.cache.swapped = exchanged
        return Teacher(models, average, uids, lambda *asked: self._head(*asked), exchanged)

    def _end_token(self, given: nn.Module | None, uids: Any) -> int | None:
        """The token the teacher ends a text with; None where that is not known or the student's by construction."""
        if isinstance(uids, CacheJoin):
            return uids.cache.manifest["end_token"]
        if given is None and self._args.teacher_ema_decay is not None:
            return None
        ends = sorted(end for end in end_tokens(self._args, given, self._end) if end < self._vocab_size)
        if len(ends) > 1 and self._args.teacher_end_token == "map":
            raise ConfigError(
                f"teacher_end_token is 'map', but the teachers end with different tokens ({ends}); use 'label'"
            )
        others = [end for end in ends if end != self._end]
        return next(iter(others or ends), None)

    def _load(self, role: str, given: nn.Module | None) -> nn.Module:
        args = self._args
        if given is None:
            name = getattr(args, f"{role}_model_name_or_path")
            revision, kwargs = (getattr(args, f"{role}_model_{what}") for what in ("revision", "init_kwargs"))
            with loading(f"{role}_model_name_or_path", name):
                given = load_frozen(name, revision, kwargs, args.device)
        return self._prepared(role, given)

    def _reference(self, given: nn.Module | None) -> nn.Module | None:
        """A model of its own, or None where the reference is the student with its adapters off."""
        if given is not None or self._args.reference_model_name_or_path:
            return self._load("reference", given)
        if self.has_adapters:
            return None
        if any(parameter.is_meta for parameter in self._student.parameters()):
            raise ConfigError(
                "the reference is the model as it starts, but this process holds no weights to copy (FSDP's "
                "cpu_ram_efficient_loading); set reference_model_name_or_path to the model's own name"
            )
        if is_deepspeed_zero3_enabled():
            raise ConfigError(
                "the reference is the model as it starts, which ZeRO-3 keeps in pieces; set "
                "reference_model_name_or_path to the model's own name, or use ZeRO-2 or FSDP2"
            )
        copy = frozen_copy(self._student)
        self.reference_name = f"the weights at the start, {fingerprint(copy)}"
        copy.__dict__.pop("_qtarget_forward", None)
        return self._prepared("reference", copy)

    def _prepared(self, role: str, model: nn.Module) -> nn.Module:
        """Frozen, on the student's device or sharded as the student is, and able to hand out its hidden states."""
        placed = getattr(model, "hf_device_map", None)
        freeze(model)
        add_target_forward(model)
        plugins = self._accelerator.state
        if getattr(plugins, "deepspeed_plugin", None) is not None:
            from trl.models.utils import prepare_deepspeed

            return prepare_deepspeed(model, self._accelerator)
        if getattr(plugins, "fsdp_plugin", None) is not None:
            return self._sharded(model)
        if placed is None:
            return model.to(self._args.device)
        head = head_parameters(model)[0]
        if head.device != self._args.device and head.device.type != torch.device(self._args.device).type:
            raise ConfigError(
                f"{role}_model_init_kwargs.device_map left the {role}'s head on {head.device.type!r}, where it cannot be "
                f"multiplied beside the student's on {str(self._args.device)!r}; leave device_map out, or map the head "
                "to that device"
            )
        return model

    def _sharded(self, model: nn.Module) -> nn.Module:
        """By FSDP, layer by layer as the student is."""
        plugin = self._accelerator.state.fsdp_plugin
        if plugin.fsdp_version == 1:
            from trl.models.utils import prepare_fsdp

            sharded: Any = prepare_fsdp(model, self._accelerator)
            return sharded
        # TRL's would make one group of it, so that every forward gathers the whole model.
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        policy = plugin.auto_wrap_policy  # set to the layers of whichever model comes first
        try:
            return fsdp2_prepare_model(self._accelerator, model).eval()
        finally:
            plugin.auto_wrap_policy = policy

    def release(self, requires: frozenset[str]) -> None:
        """Free the models that nothing asks for from now on."""
        freed = "teacher" not in requires and self.teacher_source is not None
        if freed:
            self.teacher_source = None
        if "reference" not in requires and self.reference is not None:
            self.reference, freed = None, True
        if freed:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # -- asking --------------------------------------------------------------------------------------------------

    def base(self, model: Any) -> nn.Module:
        """The causal language model itself, without wrappers or adapters."""
        model = self._accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def check_head_transforms(self, inputs: dict[str, Any]) -> None:
        """Logits rebuilt from hidden states are the models' own."""
        teachers = [] if self.teacher_source is None else [model for _, model in self.teacher_source.models]
        for other in (*teachers, self.reference):
            if other is not None:
                self._check_ids(self.base(other), inputs["input_ids"])
                check_head_transform(other, self.base(other), inputs)

    @torch.no_grad()
    def heads(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        requires: frozenset[str],
        labels: Tensor,
        columns: dict[str, Tensor],
    ) -> dict[str, Head | TopK]:
        """Teacher and reference at positions 0 to the last but one of the student's batch.

        Args:
            model: the wrapped student. inputs: its inputs without labels. labels: [B, T], before the shift.
            columns: the batch's own; a teacher may be joined by their uids.
        """
        heads: dict[str, Head | TopK] = {}
        if "teacher" in requires:
            assert self.teacher_source is not None
            heads["teacher"] = self.teacher_source.distribution(model, inputs, labels, columns)
        if "reference" in requires and self.reference is not None:
            heads["reference"] = self._head(self.reference, inputs)
        elif "reference" in requires:
            with adapters_off(self._student):
                heads["reference"] = self._head(model, inputs)
        return heads

    def _head(self, model: Any, inputs: dict[str, Any]) -> Head:
        base = self.base(model)
        self._check_ids(base, inputs["input_ids"])
        hidden, weight, bias = states_and_head(model, base, inputs)
        transform = HeadTransform.of(base.config)
        # Virtual tokens of prompt tuning come first: the last positions are the labels'.
        hidden = hidden[:, -inputs["input_ids"].shape[1] :][:, :-1]
        return Head(
            hidden,
            weight,
            bias,
            logit_scale=transform.scale,
            logit_softcap=transform.softcap,
            vocab_size=min(weight.shape[0], self._vocab_size),
        )

    def _check_ids(self, base: Any, ids: Tensor) -> None:
        """A model with fewer embeddings than the tokenizer has tokens cannot read them all."""
        rows = base.get_input_embeddings().num_embeddings
        if rows < self._vocab_size and int(ids.max()) >= rows:
            raise ConfigError(
                f"a teacher or reference has embeddings for {rows} tokens, fewer than the tokenizer's "
                f"{self._vocab_size}, and the batch holds token {int(ids.max())}; use one with the same tokenizer"
            )

    @torch.no_grad()
    def old_logps(self, model: nn.Module, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        """log p_y of psft's old policy, of the labels' shape; 0 where nothing is trained."""
        assert self.old_policy is not None
        with self.old_policy.in_place(), evaluation_mode(model):
            return self._label_logps(model, inputs, labels)

    @torch.no_grad()
    def online_weights(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        labels: Tensor,
        temperature: float,
        reference: Tensor | None = None,
    ) -> Tensor:
        """iw-SFT's weights, of the labels' shape: one number per sequence, taken from the model as it is now.

        w = exp(temperature · mean over its supervised tokens of (log p_θ − log p_ref)), clamped to [0, 16]
        (arXiv:2507.12856; the mean and the clamp are those of the paper's code).

        ``reference``: its mean per sequence, of the labels' shape, in place of a model.
        """
        with evaluation_mode(model):
            student = self._label_logps(model, inputs, labels)
        if reference is not None:
            reference = reference.to(student.device)
        elif self.reference is not None:
            reference = self._label_logps(self.reference, inputs, labels)
        else:
            with adapters_off(self._student):
                reference = self._label_logps(model, inputs, labels)
        trained = labels != -100
        trained[:, 0] = False
        sequence = _sequence_numbers(inputs, labels)
        size = int(sequence.max()) + 1
        zeros = torch.zeros(size, dtype=torch.float64, device=labels.device)
        gap = torch.where(trained, (student - reference).double(), 0.0)
        total = zeros.index_add(0, sequence.flatten(), gap.flatten())
        count = zeros.index_add(0, sequence.flatten(), trained.double().flatten()).clamp(min=1)
        return (temperature * total / count).exp().clamp(0, 16).float()[sequence]

    def _label_logps(self, model: Any, inputs: dict[str, Any], labels: Tensor) -> Tensor:
        call = LossCall([presets.build("sft")], labels, {}, {}, self._vocab_size, None, "basic")
        nll = model(**inputs, qtarget=call).figures.stats["nll"]
        return torch.nn.functional.pad(-nll.nan_to_num(0.0), (1, 0))


def _name_of(model: Any) -> str | None:
    """What to call a model the user made."""
    if model is None:
        return None
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__
    return f"{name}, weights {fingerprint(model)}"


def fingerprint(model: nn.Module) -> str:
    """Eight digits that tell other weights of the same shape: of the first numbers of every parameter."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().flatten()[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:8]


def _sequence_numbers(inputs: dict[str, Any], labels: Tensor) -> Tensor:
    """Which sequence each token belongs to: a row, or a document of a padding-free row."""
    if "position_ids" in inputs:
        return (inputs["position_ids"] == 0).flatten().cumsum(0).view(labels.shape) - 1
    return torch.arange(len(labels), device=labels.device)[:, None].expand(labels.shape)
