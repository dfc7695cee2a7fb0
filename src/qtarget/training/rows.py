"""From a dataset's rows to the batches a step takes: TRL's preparation, with qtarget's columns beside the tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError
from torch import Tensor
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names

from qtarget.data.columns import UID, TokenColumns
from qtarget.data.preparation import Preparation
from qtarget.data.validation import checked_texts, checked_tokens
from qtarget.errors import ConfigError
from qtarget.targets.objective import Objective
from qtarget.teachers.cache import reader
from qtarget.teachers.joins import CacheJoin, ContextJoin, RowsThatAsk
from qtarget.teachers.settings import open_uids
from qtarget.teachers.vocabulary import real_vocabulary_size
from qtarget.training import checks
from qtarget.training.config import QTargetConfig


class ColumnsTrainer(SFTTrainer):
    """TRL's trainer whose per-token columns follow the tokens into every batch; its subclass trains."""

    args: QTargetConfig
    _objective: Objective
    _eval_objective: Objective
    _columns: TokenColumns
    _uids: CacheJoin | ContextJoin | None
    rows_without_labels: dict[str, int]
    _always_opens_teacher = False

    def pop_columns(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The per-token columns of a batch, taken out of what the model is called with."""
        names = [*self._columns.carried, UID, *reader.COLUMNS]
        return {name: inputs.pop(name) for name in names if name in inputs}

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """TRL's preparation, with the steps that would leave columns behind done for all columns alike."""
        objective = self._objective if dataset_name == "train" else self._eval_objective
        checks.raise_together(
            checks.missing_columns(
                dataset_name, get_dataset_column_names(dataset), objective, args, dataset_name != "train"
            )
        )
        vocab_size = real_vocabulary_size(getattr(processing_class, "tokenizer", processing_class))
        if formatting_func is None and not (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
            dataset = checked_texts(dataset, dataset_name, args.dataset_text_field)
            dataset = checked_tokens(dataset, dataset_name, vocab_size)
        tokenise_only = copy.copy(args)
        tokenise_only.max_length, tokenise_only.shuffle_dataset = None, False
        try:
            dataset = super()._prepare_dataset(
                dataset, processing_class, tokenise_only, False, formatting_func, dataset_name
            )
        except TemplateError as error:
            raise ConfigError(
                f"the chat template cannot be applied to a row of the {dataset_name} dataset: {error}; mend that row or "
                "the template (chat_template_path)"
            ) from error
        self._open_teacher(args, processing_class)
        asks = "teacher" in objective.requires or self._always_opens_teacher
        prepare = Preparation(
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            packing=packing,
            packing_strategy=args.packing_strategy,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
            num_proc=args.dataset_num_proc,
            columns=self._columns,
            uids=self._uids if asks else None,
        )
        return prepare(dataset, dataset_name, self.rows_without_labels)

    def _open_teacher(self, args: QTargetConfig, tokenizer: Any) -> None:
        """Once, before the first rows are prepared: how tokens find a teacher that is not joined by position."""
        requires = self._objective.requires | self._eval_objective.requires
        if self._uids is None and ("teacher" in requires or self._always_opens_teacher):
            tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
            self._uids = open_uids(
                args, tokenizer, self.chat_template, self.completion_only_loss, self._asking_rows(args)
            )
        if self._uids is not None:
            self._columns = replace(self._columns, made=(self._uids.column,))

    def _asking_rows(self, args: QTargetConfig) -> RowsThatAsk | None:
        """The data sources whose target asks a teacher; None where every row may."""
        if not self._objective.sources or args.eval_target is not None or self._always_opens_teacher:
            return None
        named = self._objective.targets.items()
        return RowsThatAsk(args.source_column, frozenset(str(name) for name, t in named if "teacher" in t.requires))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept: list[str] = self._signature_columns or []
        carried = [*self._columns.carried, UID]
        self._signature_columns = [*kept, *(name for name in carried if name not in kept)]  # type: ignore[assignment]

    def _reject_skip_prepare_without_labels(self, datasets: dict[str, Any], data_collator: Any) -> None:
        """TRL's guard knows its own collator only, which this trainer wraps."""
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "inner", data_collator))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Columns keep their digits: DeepSpeed would cast whatever is a float to its own precision."""
        inputs = dict(inputs)
        columns = self.pop_columns(inputs)
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared | {name: column.to(self.args.device) for name, column in columns.items()}
