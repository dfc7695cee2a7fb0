"""Do the prepared rows fit the positions and embeddings of the models that read them?"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
from datasets import Dataset

from qtarget import hub
from qtarget.models import positions
from qtarget.models.causal_lm import CausalLM
from qtarget.models.loading import load_config
from qtarget.teachers import settings as teacher_settings

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer

logger = logging.getLogger(__name__)

_BATCH = 10_000  # rows looked at at once


def faults(trainer: QTargetTrainer, name: str, dataset: Any) -> list[str]:
    """Sentences on rows of a prepared dataset that a model cannot read; a stream's are looked at as they come.

    A row beyond the window of a model whose positions are computed is warned of.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return []
    student = CausalLM(trainer.model, 0).base
    embedding = student.get_input_embeddings()
    rows = getattr(embedding, "original_module", embedding).num_embeddings
    found = []
    if len(trainer.tokenizer) > rows:
        highest, row = _most(dataset, "input_ids", lambda ids: pc.max(ids.flatten()))
        if highest >= rows:
            token = trainer.tokenizer.convert_ids_to_tokens(highest)
            found.append(
                f"row {row} of the {name} dataset holds token {token!r} (id {highest}), but the model has embeddings for "
                f"{rows} tokens and the tokenizer {len(trainer.tokenizer)}: tokens were added to the tokenizer alone; "
                "call model.resize_token_embeddings(len(tokenizer)) and save the model, or use its own tokenizer"
            )
    models: list[tuple[str, Any, Callable[[], int | None]]] = [
        ("the model", student.config, functools.partial(positions.learned, student))
    ]
    models += _others(trainer.args, trainer.objective.requires | trainer.eval_objective.requires)
    for who, config, learned in models:
        found += _too_long(who, positions.window(config), learned, trainer.args.max_length, name, dataset)
    return found


def _others(args: Any, requires: frozenset[str]) -> list[tuple[str, Any, Callable[[], int | None]]]:
    """(what to call it, its configuration, its learned positions) of each frozen model that is asked about these rows."""
    roles = args.models_for(requires)
    named = []
    if "teacher" in roles and args.teacher_cache is None and args.teacher_context is None:
        named += [("teacher", *one) for one in teacher_settings.named_models(args)]
    if "reference" in roles and args.reference_model_name_or_path is not None:
        settings = args.reference_model_revision, args.reference_model_init_kwargs or {}
        named.append(("reference", args.reference_model_name_or_path, *settings))
    found: list[tuple[str, Any, Callable[[], int | None]]] = []
    for role, model, revision, init_kwargs in named:
        if hub.nowhere(model):  # a server's name, or what is refused where it is loaded
            continue
        trust = bool(init_kwargs.get("trust_remote_code", False))
        try:
            config = load_config(model, revision, trust_remote_code=trust)
        except Exception:  # refused where it is loaded
            continue
        found.append((f"the {role} {model}", config, functools.partial(positions.learned_by, config, trust)))
    return found


def _too_long(
    who: str, window: int | None, learned: Callable[[], int | None], max_length: int | None, name: str, dataset: Dataset
) -> Iterator[str]:
    """A sentence where rows have more tokens than a table of positions; a warning beyond a window."""
    if window is None or (max_length is not None and max_length <= window):
        return
    by_document = "seq_lengths" in dataset.column_names
    longest, row = _most(
        dataset,
        "seq_lengths" if by_document else "input_ids",
        lambda column: pc.max(column.flatten() if by_document else pc.list_value_length(column)),
    )
    table = learned()
    limit = window if table is None else table
    if longest <= limit:
        return
    what = f"row {row} of the {name} dataset has {longest} tokens"
    if table is None:
        logger.warning(
            f"{what}, and {who} was made for {limit}: beyond that its outputs are unreliable; set max_length: {limit}"
        )
        return
    now = "null" if max_length is None else max_length
    yield f"max_length is {now} and {what}, but {who} takes {limit} positions; set max_length: {limit} or less"


def _most(dataset: Dataset, column: str, of: Callable[[Any], Any]) -> tuple[int, int]:
    """(the highest number that ``of`` finds in a column of lists, the first row that has it)."""
    highest, at, begin = -1, 0, 0
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=_BATCH):
        lists = table[column].combine_chunks()
        number = of(lists).as_py()
        if number is not None and number > highest:
            row = next(row for row in range(len(lists)) if of(lists.slice(row, 1)).as_py() == number)
            highest, at = number, begin + row
        begin += len(lists)
    return highest, at
