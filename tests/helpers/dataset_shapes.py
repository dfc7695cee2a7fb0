"""Datasets in every form that TRL's SFTTrainer takes."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset, IterableDataset
from trl import pack_dataset

import tiny_models
from quick_runs import tokenised_dataset


def rows_of(data: Dataset | IterableDataset) -> list[dict[str, Any]]:
    """What a trainer trains, and no other columns."""
    kept = ("input_ids", "labels", "seq_lengths")
    return [{name: row[name] for name in kept if name in row} for row in data.with_format(None)]


def with_mask(name: str) -> Dataset:
    """input_ids, and ones where a label is trained."""
    masks = {name: lambda number, row: [int(label != -100) for label in row["labels"]]}
    return tokenised_dataset(tiny_models.conversation_dataset(8), **masks).remove_columns("labels")


def many_rows() -> Dataset:
    """More than the 1000 that are packed at a time."""
    return Dataset.from_list([{"input_ids": [1 + (i * k) % 250 for k in range(2 + i % 9)]} for i in range(1100)])


def one_long_row() -> Dataset:
    """A row of several times max_length among short ones."""
    return Dataset.from_list([{"text": " ".join(tiny_models.SENTENCES[:3])}, *tiny_models.text_dataset(7)])


def extra_columns() -> Dataset:
    """Columns that nobody reads, one of them named like an input of the model."""
    data = tiny_models.text_dataset(8).add_column("source", [f"page {i}" for i in range(8)])
    return data.add_column("position_ids", [[5, 7, 9]] * 8).add_column("score", [8, 3, 5, 1, 7, 2, 6, 4])


def as_from_a_tokenizer() -> Dataset:
    """input_ids with what else a tokenizer returns."""
    return tiny_models.text_dataset(8).map(
        lambda row: tiny_models.tokenizer()(row["text"], return_token_type_ids=True), remove_columns="text"
    )


def ended_already() -> Dataset:
    """Texts of which every second one has its end of sequence, and one is empty."""
    ended = [row["text"] + "<|im_end|>" * (i % 2) for i, row in enumerate(tiny_models.text_dataset(7))]
    return Dataset.from_list([{"text": text} for text in [*ended, ""]])


def completions_ended_already() -> Dataset:
    return tiny_models.prompt_dataset().map(lambda row: {"completion": row["completion"] + "<|im_end|>"})


def an_empty_row() -> Dataset:
    return tokenised_dataset(
        tiny_models.text_dataset(8), input_ids=lambda number, row: row["input_ids"] if number else []
    ).remove_columns("labels")


def tools() -> Dataset:
    """Messages with the tools of a conversation, if it has any, as JSON, which a table can hold."""
    listed = [json.dumps([{"type": "function", "function": {"name": name}}]) for name in ("add", "count")]
    return tiny_models.message_dataset(8).add_column("tools", [*listed, None, None] * 2)


def template_arguments() -> Dataset:
    return tiny_models.message_dataset(8).add_column(
        "chat_template_kwargs", [{"greeting": f"Hello {i}."} for i in range(8)]
    )


def labels_at_the_start() -> Dataset:
    """Every second row has labels at its start only: nothing is left of them where that is cut off."""

    def labels(number: int, row: dict[str, Any]) -> list[int]:
        return row["input_ids"][:6] + [-100] * (len(row["labels"]) - 6) if number % 2 else row["labels"]

    return tokenised_dataset(tiny_models.conversation_dataset(8), labels=labels)


def some_without_labels() -> Dataset:
    """Four rows with nothing to train, or only a first token, which nothing predicts; then some with labels."""

    def labels(number: int, row: dict[str, Any]) -> list[int]:
        nothing = row["input_ids"][: number % 2] + [-100] * (len(row["labels"]) - number % 2)
        return nothing if number < 4 else row["labels"]

    return tokenised_dataset(tiny_models.conversation_dataset(12), labels=labels)


def packed_already() -> Dataset:
    return pack_dataset(tokenised_dataset(tiny_models.conversation_dataset(16)), 120, "bfd")


def streamed(data: Callable[[], Dataset]) -> Callable[[], IterableDataset]:
    return lambda: data().to_iterable_dataset()


def generated() -> IterableDataset:
    """A stream that does not know its columns."""
    return IterableDataset.from_generator(functools.partial(iter, [*tiny_models.text_dataset(8)]))


def as_text(row: dict[str, Any]) -> str:
    """A formatting function."""
    return f"Q: {row['question']} A: {row['answer']}"


def questions() -> Dataset:
    return tiny_models.prompt_dataset().rename_columns({"prompt": "question", "completion": "answer"})


@dataclass(frozen=True)
class Shape:
    """A dataset as a user may bring it, with the settings and the chat template that go with it.

    ``max_length`` cuts some rows and leaves labels in some.
    """

    name: str
    data: Callable[[], Any]
    settings: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    formatting: Callable[[dict], str] | None = None
    max_length: int = 13

    def given(self) -> dict[str, Any]:
        """The trainer's arguments beside settings."""
        return {"processing_class": tokenizer_with_template(self.template), "formatting_func": self.formatting}


@functools.cache
def tokenizer_with_template(template: str | None) -> Any:
    """The tiny one with another chat template; trainers get copies."""
    made = copy.deepcopy(tiny_models.tokenizer())
    made.chat_template = template or made.chat_template
    return made


TOOLS_FIRST = "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}" + tiny_models.TEMPLATE
GREETING_FIRST = "{{ greeting }}" + tiny_models.TEMPLATE
MARKED = tiny_models.MARKED_TEMPLATE
ALL, COMPLETION, ASSISTANT = (
    {"completion_only_loss": False},
    {"completion_only_loss": True},
    {"assistant_only_loss": True},
)
SHAPES = [
    Shape("text", tiny_models.text_dataset),
    Shape(
        "text by another name",
        lambda: tiny_models.text_dataset().rename_column("text", "words"),
        {"dataset_text_field": "words"},
    ),
    Shape("text that has its end", ended_already),
    Shape("messages", tiny_models.message_dataset, max_length=44),
    Shape("messages, assistant only", tiny_models.message_dataset, ASSISTANT, MARKED, max_length=44),
    Shape("messages with tools", tools, template=TOOLS_FIRST, max_length=44),
    Shape("messages with template arguments", template_arguments, template=GREETING_FIRST, max_length=44),
    Shape("from and value", tiny_models.from_value_dataset, max_length=44),
    Shape("prompt, completion", tiny_models.prompt_dataset),
    Shape("prompt, completion that has its end", completions_ended_already),
    Shape("prompt, completion, all trained", tiny_models.prompt_dataset, ALL),
    Shape("prompt, completion of messages", tiny_models.conversation_dataset, max_length=30),
    Shape("prompt, completion of messages, all trained", tiny_models.conversation_dataset, ALL, max_length=30),
    Shape(
        "prompt, completion of messages, assistant only",
        tiny_models.conversation_dataset,
        ASSISTANT,
        MARKED,
        max_length=30,
    ),
    Shape("input_ids", lambda: tokenised_dataset(tiny_models.text_dataset()).remove_columns("labels")),
    Shape("input_ids from a tokenizer", as_from_a_tokenizer),
    Shape(
        "input_ids as tensors",
        lambda: tokenised_dataset(tiny_models.conversation_dataset(8)).with_format("torch"),
        max_length=30,
    ),
    Shape("input_ids, one row empty", an_empty_row),
    Shape("input_ids, labels", lambda: tokenised_dataset(tiny_models.conversation_dataset(8)), max_length=30),
    Shape("input_ids, completion_mask", lambda: with_mask("completion_mask"), COMPLETION, max_length=30),
    Shape("input_ids, a completion_mask not used", lambda: with_mask("completion_mask"), max_length=30),
    Shape("input_ids, assistant_masks", lambda: with_mask("assistant_masks"), max_length=30),
    Shape("formatting function", questions, ALL, formatting=as_text),
    Shape("extra columns", extra_columns),
    Shape("a uid for each row", lambda: tiny_models.text_dataset().add_column("uid", [f"u{i}" for i in range(8)])),
    Shape("a number as uid of each row", lambda: tiny_models.text_dataset().add_column("uid", list(range(8)))),
    Shape("one long row", one_long_row),
    Shape("labels at the start", labels_at_the_start, max_length=30),
    Shape("stream", streamed(tiny_models.text_dataset)),
    Shape("stream of prompt, completion", streamed(tiny_models.prompt_dataset)),
    Shape("stream of from and value", streamed(tiny_models.from_value_dataset), max_length=44),
    Shape("stream without column names", generated),
]
