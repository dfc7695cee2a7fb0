"""The models a target needs besides the student: teacher, reference, psft's old policy."""

from __future__ import annotations

import gc
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from qtarget.data.batch import Batch
from qtarget.data.columns import REFERENCE
from qtarget.errors import loading
from qtarget.losses import Head, TopK
from qtarget.losses.log_probs import importance_weight
from qtarget.models.causal_lm import AsAtTheStart, CausalLM, Inputs, WithoutAdapters
from qtarget.models.frozen import (
    copy_of_the_start,
    fingerprint,
    load_frozen,
    name_and_fingerprint,
    place_as_student,
)
from qtarget.models.loading import starts_as_its_base
from qtarget.models.snapshots import EmaWeights, OldPolicy, StartWeights, WeightSnapshot
from qtarget.teachers.joins import CacheJoin, ContextJoin
from qtarget.teachers.sources import TeacherSource, teacher_source


class AuxiliaryModels:
    """Loads what is required and asks it.

    Args:
        args: the run's QTargetConfig. accelerator: its Accelerator. student: the model as the trainer holds it.
        requires: of teacher, reference and old_policy, those to load. end_token: the student's.
        teacher, reference: models the user made, in place of names in ``args``. join: how the teacher is joined to
            tokens, where it is not by position.

    Attributes:
        teacher: who gives the teacher's distributions, or None. reference: a model of its own; None where there is none,
            or it is the student itself, with its adapters off or as they started. old_policy: psft's, or None.
        start: the weights of adapters that did something before the first step; they are the reference.
        teacher_name, reference_name: what to call a model that ``args`` does not name.
    """

    def __init__(
        self,
        args: Any,
        accelerator: Any,
        student: CausalLM,
        requires: Collection[str],
        end_token: int | None,
        teacher: nn.Module | None = None,
        reference: nn.Module | None = None,
        join: CacheJoin | ContextJoin | None = None,
    ):
        self.has_adapters = hasattr(student.unwrapped, "disable_adapter")
        self.teacher_name, self.reference_name = (
            None if model is None else name_and_fingerprint(model) for model in (teacher, reference)
        )
        self.teacher: TeacherSource | None = None
        if "teacher" in requires:
            self.teacher = teacher_source(args, accelerator, student, end_token, teacher, join)
        self.start: StartWeights | None = None
        self.reference = self._reference(args, accelerator, student, reference) if "reference" in requires else None
        self.old_policy = OldPolicy(student.unwrapped, args.psft_refresh) if "old_policy" in requires else None
        self._heads_checked = False

    def _reference(self, args: Any, accelerator: Any, student: CausalLM, model: nn.Module | None) -> CausalLM | None:
        name = args.reference_model_name_or_path
        if model is None and name:
            with loading("reference_model_name_or_path", name):
                model = load_frozen(name, args.reference_model_revision, args.reference_model_init_kwargs, args.device)
        elif model is None and self.has_adapters:
            if not starts_as_its_base(student.unwrapped):
                self.start = StartWeights(student.unwrapped)
                self.reference_name = f"the adapter at the start, {fingerprint(student.unwrapped, trained=True)}"
            return None
        elif model is None:
            model = copy_of_the_start(student.unwrapped)
            self.reference_name = f"the weights at the start, {fingerprint(model)}"
        return CausalLM(place_as_student(model, "reference", accelerator, args.device), student.vocab_size)

    @property
    def models(self) -> list[CausalLM]:
        """Every frozen model beside the student."""
        teachers = [] if self.teacher is None else self.teacher.models
        return [*teachers, *([] if self.reference is None else [self.reference])]

    def has(self, role: str) -> bool:
        """Whether teacher or reference can be asked."""
        return getattr(self, role) is not None or (role == "reference" and self.has_adapters)

    @property
    def average(self) -> EmaWeights | None:
        """The student's average that is the teacher, where it is."""
        return None if self.teacher is None else self.teacher.average

    @property
    def snapshots(self) -> list[WeightSnapshot]:
        """Copies of the student's weights that a resumed run needs."""
        average = None if self.average is None or self.average.decay == 0 else self.average
        return [snapshot for snapshot in (self.old_policy, average, self.start) if snapshot is not None]

    def advance(self, step: int, requires: Collection[str]) -> None:
        """Take the weights before optimiser step ``step`` (0 is the first) into the copies that are due."""
        if self.start is not None:
            self.start.start()
        if self.average is not None:
            self.average.update(step)
        if self.old_policy is not None and "old_policy" in requires:
            self.old_policy.refresh(step)

    def release(self, requires: Collection[str]) -> None:
        """Free the models that nothing asks for from now on."""
        for role in {"teacher", "reference"} - {*requires}:
            if getattr(self, role) is not None:
                setattr(self, role, None)
                gc.collect()
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()

    def check_heads(self, inputs: Inputs) -> None:
        """Once: logits rebuilt from hidden states are the models' own."""
        for model in [] if self._heads_checked else self.models:
            model.check_head(inputs)
        self._heads_checked = True

    @torch.no_grad()
    def ask(self, student: CausalLM, batch: Batch, of: Collection[str]) -> dict[str, Head | TopK]:
        """Distributions at positions 0 to the last but one of the batch, [B, T − 1].

        Args:
            student: as it is called now. of: some of teacher, reference and student, those that are loaded.
        """
        heads: dict[str, Head | TopK] = {}
        if "teacher" in of:
            assert self.teacher is not None
            heads["teacher"] = self.teacher.distribution(student, batch)
        if "reference" in of:
            heads["reference"] = self._reference_for(student).head(batch.inputs)
        if "student" in of:
            heads["student"] = student.head(batch.inputs)
        return heads

    def _reference_for(self, student: CausalLM) -> CausalLM:
        if self.reference is not None:
            return self.reference
        of_student = student.model, student.vocab_size
        return WithoutAdapters(*of_student) if self.start is None else AsAtTheStart(*of_student, self.start)

    def reference_log_p(self, student: CausalLM, inputs: Inputs, labels: Tensor) -> Tensor:
        """log p of each label under the reference, float32 [B, T]; 0 where nothing is trained."""
        return self._reference_for(student).label_log_p(inputs, labels)

    @torch.no_grad()
    def old_logps(self, student: CausalLM, batch: Batch) -> Tensor:
        """log p_y of psft's old policy, [B, T]; 0 where nothing is trained."""
        assert self.old_policy is not None
        with self.old_policy.in_place():
            return student.label_log_p(batch.inputs, batch.labels)

    @torch.no_grad()
    def online_weights(self, student: CausalLM, batch: Batch, temperature: float) -> Tensor:
        """iw-SFT's weights [B, T]: one number per sequence, taken from the model as it is now.

        w = exp(temperature · mean over its supervised tokens of (log p_θ − log p_ref)), clamped to [0, 16]
        (arXiv:2507.12856; the mean and the clamp are those of the paper's code). A column of the batch may hold the
        reference's mean per sequence, in place of a model.
        """
        log_p = student.label_log_p(batch.inputs, batch.labels)
        reference = batch.columns.get(REFERENCE)
        if reference is None:
            reference = self.reference_log_p(student, batch.inputs, batch.labels)
        trained = batch.labels != -100
        trained[:, 0] = False
        document = batch.documents()
        gap = torch.where(trained, (log_p - reference.to(log_p.device)).double(), 0.0)
        zeros = gap.new_zeros(int(document.max()) + 1)
        total = zeros.index_add(0, document.flatten(), gap.flatten())
        count = zeros.index_add(0, document.flatten(), trained.double().flatten()).clamp(min=1)
        return importance_weight(total / count, temperature).float()[document]
