"""From a dataset's rows to batches: TRL's preparation, with qtarget's columns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from datasets import Dataset
from trl.data_utils import get_dataset_column_names, maybe_convert_to_chatml
from trl.trainer.utils import global_then_local_main_first

from qtarget.data.batch import Batch
from qtarget.data.columns import REFERENCE, UID, TokenColumnCollator, TokenColumns
from qtarget.data.counting import Source, of
from qtarget.data.messages import RowReader, trained_columns
from qtarget.data.picture import Picture
from qtarget.data.preparation import Preparation
from qtarget.data.tokenising import Tokeniser, tokenised
from qtarget.data.validation import checked_tokens, without_padding, without_tokens
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
        self._source: Source | None = None
        self._picture: Picture | None = None
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
            tokenise: TRL's ``_prepare_dataset``, which makes labels of what is tokenised here.
            name: of the dataset, "train" for the one that is trained.

        Raises:
            DataError: a row that cannot be trained, a missing column, a cache that lacks a row; each names the row.
        """
        objective = self._objective if name == "train" else self._eval_objective
        columns = get_dataset_column_names(dataset)
        formatted = formatting_func is not None
        raise_together(checks.faults_of_columns(name, columns, objective, args, formatted))
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        read = None
        if "input_ids" in columns:
            dataset = checked_tokens(dataset, name, real_vocabulary_size(tokenizer))
            dataset = without_padding(dataset, name, self._carried, args.dataset_num_proc)
        elif not _made_when_read(dataset):
            asked = trainer.chat_template, args.dataset_text_field, dataset.features
            read = RowReader.of(processing_class, *asked, formatting=formatting_func)
            tokeniser = Tokeniser(processing_class, read, trainer.chat_template, args.assistant_only_loss, name)
            with global_then_local_main_first():
                dataset = tokenised(dataset, tokeniser, args.dataset_num_proc)
        # TRL would cut, pack and shuffle input_ids and labels alone.
        tokenise_only = copy.copy(args)
        tokenise_only.max_length, tokenise_only.shuffle_dataset = None, False
        dataset = tokenise(dataset, processing_class, tokenise_only, False, None, name)
        if self._asks(objective.requires):
            if self._unknown is None:
                self._unknown = teacher_settings.unknown_tokens(args, tokenizer)
            why = (
                "an added token that the teacher does not know; remove it from the row, or use a teacher that knows it"
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
        if name == "train" and self._picture is None:
            self._source = Source(
                dataset,
                tokenizer,
                seen=slice(None) if "seq_lengths" in columns else prepare.seen,
                drops=args.max_length is not None and not packing,
                split=args.max_length if packing and args.packing_strategy == "bfd_split" else None,
                as_tokens="input_ids" in columns,
                reader=read,
                chat_template=trainer.chat_template,
                assistant_only=args.assistant_only_loss,
                completion_only=trainer.completion_only_loss,
            )
        return prepare(dataset, name, self.without_labels)

    def picture(self, stops: Collection[int], tokenizer: Any, prepared: Any) -> Picture | None:
        """What will be trained, counted once; None where neither the rows nor their labels are known.

        Args:
            stops: ids at which the saved model will stop generating. prepared: the rows, where preparation was skipped.
        """
        skipped = self._source is None and self._picture is None and isinstance(prepared, Dataset)
        if skipped and {"input_ids", "labels"} <= {*prepared.column_names} and prepared.format["type"] != "custom":
            self._source = Source(prepared, tokenizer, as_tokens=True)
        if self._source is not None:
            self._picture, self._source = of(replace(self._source, stops=stops)), None
        return self._picture

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
        """What a step is given, taken apart.

        Raises:
            DataError: as many labels as there are no token ids; a collator of one's own may do that.
        """
        rest, columns = self._taken_apart(inputs)
        labels, ids = rest.pop("labels"), rest.get("input_ids")
        if ids is not None and ids.shape != labels.shape:
            raise DataError(
                f"labels of a batch have the shape {[*labels.shape]} for input_ids of {[*ids.shape]}; give one label for "
                "each input_id"
            )
        return Batch(rest, labels, columns)

    def _taken_apart(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """What models read, and the columns."""
        columns = {name: inputs[name] for name in (*self._carried, *reader.COLUMNS) if name in inputs}
        return {name: value for name, value in inputs.items() if name not in columns}, columns


def as_conversations(dataset: Any, text_field: str) -> Any:
    """Raw rows with their messages alone, under TRL's names: it asks any of several columns for a conversation.

    Raises:
        DataError: the first row has no message.
    """
    columns = [] if dataset is None else get_dataset_column_names(dataset)
    trained = () if "input_ids" in columns else trained_columns(columns, text_field)
    if not trained:
        return dataset
    first: dict[str, Any] = next(iter(dataset), {})
    messages = first.get(trained[0])
    if messages == []:
        raise DataError(f"row 0 of the train dataset: {trained[0]} is []; write messages, or remove the row")
    others = {"prompt", "completion", "chosen", "rejected", "messages"}.intersection(columns).difference(trained)
    dataset = dataset.remove_columns([*others])
    if isinstance(messages, list) and isinstance(messages[0], dict) and "from" in messages[0]:
        return dataset.map(maybe_convert_to_chatml, remove_columns={"conversations"}.intersection(columns) or None)
    return dataset.rename_column("conversations", "messages") if trained == ("conversations",) else dataset


def _made_when_read(dataset: Any) -> bool:
    """Whether rows come through a transform, which TRL refuses."""
    return getattr(dataset, "format", {}).get("type") == "custom"
