"""From a dataset's rows to batches: TRL's preparation, with qtarget's columns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from trl.data_utils import get_dataset_column_names

from qtarget.data.batch import Batch
from qtarget.data.columns import REFERENCE, UID, TokenColumnCollator, TokenColumns
from qtarget.data.preparation import Preparation
from qtarget.data.validation import checked_texts, checked_tokens, without_tokens
from qtarget.errors import DataError, raise_together
from qtarget.targets.objective import Objective
from qtarget.teachers import settings as teacher_settings
from qtarget.teachers.cache import reader
from qtarget.teachers.joins import CacheJoin, ContextJoin, RowsThatAsk
from qtarget.teachers.vocabulary import real_vocabulary_size
from qtarget.training import checks
from qtarget.training.config import QTargetConfig

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer


class RowPreparer:
    """Prepares rows and takes their columns to the batch.

    Args:
        args: the run's. objective, eval_objective: what is trained, and what evaluation reports.
        reads_reference_column: whether iw-sft's reference is a column. opens_teacher: even where no target asks one.

    Attributes:
        columns: those that follow the tokens. join: how tokens find a teacher that is not joined by position, or None.
            Both are complete once the first rows are prepared.
        without_labels: dataset → its rows that have no supervised token left.
    """

    def __init__(
        self,
        args: QTargetConfig,
        objective: Objective,
        eval_objective: Objective,
        reads_reference_column: bool = False,
        opens_teacher: bool = False,
    ):
        self._objective, self._eval_objective, self._opens_teacher = objective, eval_objective, opens_teacher
        names = args.columns_for(objective.requires | eval_objective.requires)
        names += [REFERENCE] if reads_reference_column else []
        self.columns = TokenColumns(tuple(names), tuple(objective.sources), args.source_column)
        self.join: CacheJoin | ContextJoin | None = None
        self.without_labels: dict[str, int] = {}
        self._unknown: dict[int, str] | None = None  # tokens that the named teachers do not know

    # -- preparation ---------------------------------------------------------------------------------------------

    def prepare(
        self,
        trainer: QTargetTrainer,
        tokenise: Callable[..., Any],
        dataset: Any,
        processing_class: Any,
        args: QTargetConfig,
        packing: bool,
        formatting_func: Any,
        name: str,
    ) -> Any:
        """TRL's preparation, with the steps that would leave columns behind done for all columns alike.

        Args:
            tokenise: TRL's ``_prepare_dataset``. name: of the dataset, "train" for the one that is trained.

        Raises:
            DataError: a row that cannot be trained, a missing column, a cache that lacks a row; each names the row.
        """
        objective = self._objective if name == "train" else self._eval_objective
        raise_together(checks.missing_columns(name, get_dataset_column_names(dataset), objective, args))
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        kwargs: Any = args.dataset_kwargs or {}
        if formatting_func is None and not kwargs.get("skip_prepare_dataset"):
            dataset = checked_texts(dataset, name, args.dataset_text_field)
            dataset = checked_tokens(dataset, name, real_vocabulary_size(tokenizer))
        # TRL would cut, pack and shuffle input_ids and labels alone.
        tokenise_only = copy.copy(args)
        tokenise_only.max_length, tokenise_only.shuffle_dataset = None, False
        try:
            dataset = tokenise(dataset, processing_class, tokenise_only, False, formatting_func, name)
        except TemplateError as error:
            raise DataError(
                f"the chat template cannot be applied to a row of the {name} dataset: {error}; mend that row or "
                "the template (chat_template_path)"
            ) from error
        if self._asks(objective.requires):
            if self._unknown is None:
                self._unknown = teacher_settings.unknown_tokens(args, tokenizer)
            why = (
                "an added token that the teacher does not know; take it out of the row, or use a teacher that knows it"
            )
            dataset = without_tokens(dataset, name, self._unknown, why)
        self._open_join(trainer, args, tokenizer)
        prepare = Preparation(
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            packing=packing,
            packing_strategy=args.packing_strategy,
            shuffle=args.shuffle_dataset,
            seed=args.seed,
            num_proc=args.dataset_num_proc,
            columns=self.columns,
            join=self.join if self._asks(objective.requires) else None,
        )
        return prepare(dataset, name, self.without_labels)

    def _asks(self, requires: frozenset[str]) -> bool:
        return "teacher" in requires or self._opens_teacher

    def _open_join(self, trainer: QTargetTrainer, args: QTargetConfig, tokenizer: Any) -> None:
        """Once, before the first rows are prepared."""
        if self.join is None and self._asks(self._objective.requires | self._eval_objective.requires):
            asking = None  # every row may ask a teacher
            if self._objective.sources and args.eval_target is None and not self._opens_teacher:
                targets = self._objective.targets.items()
                sources = frozenset(str(source) for source, target in targets if "teacher" in target.requires)
                asking = RowsThatAsk(args.source_column, sources)
            self.join = teacher_settings.open_join(
                args, tokenizer, trainer.chat_template, trainer.completion_only_loss, asking
            )
        if self.join is not None:
            self.columns = replace(self.columns, made=(self.join.column,))

    # -- batches -------------------------------------------------------------------------------------------------

    @property
    def _carried(self) -> list[str]:
        return [*self.columns.carried, UID]

    def signature(self, columns: list[str] | None) -> list[str]:
        """The columns a dataset keeps: the host's and those that are carried."""
        return [*dict.fromkeys([*(columns or []), *self._carried])]

    def collator(self, inner: Any) -> TokenColumnCollator:
        """The host's collator, with the columns."""
        gather = self.join.gather if isinstance(self.join, CacheJoin) else None
        return TokenColumnCollator(inner, self._carried, gather)

    def on_device(self, to_device: Callable[..., dict[str, Any]], inputs: dict[str, Any]) -> dict[str, Any]:
        """The host's ``_prepare_inputs``, past which columns keep their digits: DeepSpeed would cast every float."""
        rest, columns = self._taken_apart(inputs)
        prepared = to_device(rest)
        device = prepared["input_ids"].device
        return prepared | {name: column.to(device) for name, column in columns.items()}

    def batch(self, inputs: dict[str, Any]) -> Batch:
        """What a step is given, taken apart."""
        rest, columns = self._taken_apart(inputs)
        return Batch(rest, rest.pop("labels"), columns)

    def _taken_apart(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What models read, and the columns."""
        columns = {name: inputs[name] for name in (*self._carried, *reader.COLUMNS) if name in inputs}
        return {name: value for name, value in inputs.items() if name not in columns}, columns
