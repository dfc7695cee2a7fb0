"""Rows of a dataset: its files, its shapes, what stands in a row."""

from __future__ import annotations

from typing import Any

from bench import Bench, Case

import tiny_models

GOOD = {"prompt": [{"role": "user", "content": "1 + 1?"}], "completion": [{"role": "assistant", "content": "It is 2."}]}
IDS = tiny_models.tokenizer()(tiny_models.SENTENCES[0])["input_ids"][:20]


def case_of_rows(id: str, wrong: str, made: list[Any], *says: str, reads: bool = False, **settings: Any) -> Case:
    """A dataset of these rows, trained on."""
    return Case(id, wrong, lambda bench: bench.train(dataset_name=bench.rows(*made), **settings), says, reads)


def file(id: str, wrong: str, name: str, content: str | bytes, *says: str) -> Case:
    """A dataset of one file."""

    def do(bench: Bench) -> list[object]:
        bench.file(f"rows/{name}", content)
        return bench.train(dataset_name=bench.folder / "rows")

    return Case(id, wrong, do, says)


def talk(*messages: Any) -> dict[str, Any]:
    return {"messages": [*messages]}


USER, ANSWER = {"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}

CASES = [
    # files
    Case(
        "no-folder",
        "no such folder",
        lambda b: b.train(dataset_name=b.folder / "no"),
        ("dataset_name is", "cannot be loaded"),
    ),
    Case(
        "an-empty-folder",
        "nothing in it",
        lambda b: b.train(dataset_name=b.file("rows/.keep", "").parent),
        ("dataset_name is", "cannot be loaded"),
    ),
    Case(
        "a-file-by-its-name",
        "a file for a folder: read",
        lambda b: b.train(dataset_name=b.rows(GOOD) / "train.jsonl"),
        reads=True,
    ),
    Case(
        "a-file-of-another-kind",
        "a file that is no json, csv or parquet",
        lambda b: b.train(dataset_name=b.file("rows.txt", "a")),
        ("dataset_name is", "a file type that qtarget does not read", ".jsonl, .json, .csv, .parquet"),
    ),
    Case(
        "a-broken-file-by-its-name",
        "half a line of JSON in a file that is named",
        lambda b: b.train(dataset_name=b.file("rows.jsonl", '{"text": "a"}\n{"te')),
        ("dataset_name is", "cannot be loaded"),
    ),
    Case(
        "no-such-split",
        "a split that is not there",
        lambda b: b.train(dataset_train_split="trian"),
        ("dataset_train_split is 'trian'", "has train, test"),
    ),
    Case(
        "no-such-configuration",
        "a configuration that is not there",
        lambda b: b.train(dataset_config="fr"),
        ("cannot be loaded",),
    ),
    file(
        "a-broken-line",
        "half a line of JSON",
        "train.jsonl",
        '{"text": "a"}\n{"text": "b',
        "dataset_name is",
        "cannot be loaded",
    ),
    file("a-list-a-line", "a list where an object belongs", "train.jsonl", "[1, 2]\n[3, 4]\n", "dataset_name is"),
    file("no-line", "an empty file", "train.jsonl", "", "dataset_name is"),
    file("blank-lines", "nothing but blank lines", "train.jsonl", "\n\n\n", "dataset_name is"),
    file(
        "a-cut-parquet",
        "half a Parquet file",
        "train.parquet",
        b"PAR1\x15\x04\x15\x10",
        "dataset_name is",
        "cannot be loaded",
    ),
    file(
        "a-picture",
        "a picture called Parquet",
        "train.parquet",
        b"\x89PNG\r\n\x1a\n" * 9,
        "dataset_name is",
        "cannot be loaded",
    ),
    file(
        "not-utf-8",
        "Latin-1",
        "train.jsonl",
        '{"text": "caf\xe9"}\n'.encode("latin-1"),
        "dataset_name is",
        "is not UTF-8",
    ),
    file(
        "a-script",
        "a loading script, which is never run",
        "rows.py",
        "raise SystemExit('ran')\n",
        "dataset_name is",
        "cannot be loaded",
    ),
    file(
        "csv-of-two-widths",
        "lines of different widths",
        "train.csv",
        "text,weight\na,1\nb,1,2,3\n",
        "dataset_name is",
        "cannot be loaded",
    ),
    file(
        "half-a-character",
        "one half of an emoji",
        "train.jsonl",
        '{"text": "a"}\n{"text": "b \\ud83d c"}\n',
        "dataset_name is",
        "cannot be loaded",
        "surrogate pair",
        "row 1",
    ),
    # shapes
    case_of_rows(
        "no-shape",
        "columns nothing can be trained on",
        [{"question": "1?", "answer": "1"}],
        "has columns answer, question; give it one of messages",
    ),
    case_of_rows(
        "prompts-alone", "no completion", [{"prompt": "1 + 1?"}], "has columns prompt; give it one of messages"
    ),
    case_of_rows("no-column", "empty objects", [{}, {}], "dataset"),
    case_of_rows(
        "prompt-text-completion-messages",
        "two shapes in a row",
        [{"prompt": "1?", "completion": [ANSWER]}],
        "row 0 of the train dataset",
    ),
    case_of_rows(
        "prompt-of-numbers",
        "a number for text",
        [{"prompt": 1, "completion": 2}],
        "row 0 of the train dataset",
        "prompt is 1",
    ),
    case_of_rows(
        "text-of-numbers", "a number for text", [{"text": 5}, {"text": 6}], "row 0 of the train dataset", "text is 5"
    ),
    case_of_rows(
        "text-that-is-null",
        "null in the second row",
        [{"text": "Tom has 3 apples."}, {"text": None}],
        "row 1 of the train dataset",
        "text is None",
    ),
    case_of_rows(
        "completion-that-is-null",
        "null for an answer",
        [GOOD, {**GOOD, "completion": None}],
        "row 1 of the train dataset",
        "completion is None",
    ),
    case_of_rows(
        "messages-of-text",
        "text for a list",
        [{"messages": "hello"}],
        "row 0 of the train dataset",
        "messages is 'hello'",
    ),
    case_of_rows(
        "no-message",
        "an empty conversation",
        [talk(USER, ANSWER), talk()],
        "row 1 of the train dataset",
        "messages is []",
    ),
    case_of_rows(
        "message-without-content",
        "no content",
        [talk({"role": "user"}, {"role": "assistant"})],
        "row 0 of the train dataset",
        "content",
    ),
    case_of_rows(
        "message-without-role",
        "no role",
        [talk({"content": "a"}, {"content": "b"})],
        "row 0 of the train dataset",
        "role",
    ),
    case_of_rows(
        "content-that-is-a-number",
        "a number for content",
        [talk(USER, {"role": "assistant", "content": "2"}), talk({"role": "user", "content": None}, ANSWER)],
        "row 1 of the train dataset",
        "content is None",
    ),
    case_of_rows(
        "ids-of-text",
        "words for token ids",
        [{"input_ids": ["a", "b"], "labels": ["a", "b"]}],
        "row 0 of the train dataset",
        "input_ids holds 'a'",
    ),
    case_of_rows(
        "ids-of-fractions",
        "fractions for token ids",
        [{"input_ids": [1.5, 2.0], "labels": [1, 2]}],
        "row 0 of the train dataset",
        "input_ids holds 1.5",
    ),
    case_of_rows(
        "a-negative-id",
        "-3 for a token",
        [{"input_ids": [5, -3, 7], "labels": [5, 6, 7]}] * 2,
        "row 0 of the train dataset: input_ids holds -3, outside the vocabulary",
    ),
    case_of_rows(
        "an-id-too-far",
        "a token of another vocabulary",
        [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [5, 99999, 7], "labels": [5, 6, 7]}],
        "row 1 of the train dataset: input_ids holds 99999, outside the vocabulary",
    ),
    case_of_rows(
        "a-label-too-far",
        "a label of another vocabulary",
        [{"input_ids": [5, 6, 7], "labels": [5, 9999, 7]}] * 2,
        "row 0 of the train dataset: labels holds 9999, outside the vocabulary",
    ),
    case_of_rows(
        "a-label-of-minus-one",
        "-1 where -100 is meant",
        [{"input_ids": [5, 6, 7], "labels": [5, -1, 7]}] * 2,
        "row 0 of the train dataset: labels holds -1, outside the vocabulary",
        "-100",
    ),
    case_of_rows(
        "labels-too-short",
        "two labels for three tokens",
        [{"input_ids": [5, 6, 7], "labels": [5, 6]}] * 2,
        "row 0 of the train dataset: labels has 2 entries for 3 input_ids",
    ),
    case_of_rows(
        "labels-too-long",
        "four labels for three tokens",
        [{"input_ids": [5, 6, 7], "labels": [5, 6, 7, 8]}] * 2,
        "row 0 of the train dataset: labels has 4 entries for 3 input_ids",
    ),
    case_of_rows(
        "labels-that-are-null",
        "null for labels",
        [{"input_ids": IDS, "labels": IDS}, {"input_ids": IDS, "labels": None}],
        "row 1 of the train dataset",
        "labels is None",
    ),
    case_of_rows(
        "ids-that-are-null",
        "null for token ids",
        [{"input_ids": IDS, "labels": IDS}, {"input_ids": None, "labels": IDS}],
        "row 1 of the train dataset",
        "input_ids is None",
    ),
    case_of_rows(
        "a-row-without-tokens",
        "an empty row beside a good one: it teaches nothing, the other is trained",
        [{"input_ids": [], "labels": []}, {"input_ids": IDS, "labels": IDS}],
    ),
    case_of_rows(
        "only-rows-without-tokens",
        "nothing but empty rows",
        [{"input_ids": [], "labels": []}] * 2,
        "the train dataset has no supervised token",
    ),
    case_of_rows(
        "one-token-each",
        "rows of one token, which nothing predicts",
        [{"input_ids": [5], "labels": [5]}] * 2,
        "the train dataset has no supervised token",
    ),
    case_of_rows(
        "empty-texts", "empty texts", [{"text": ""}, {"text": ""}], "the train dataset has no supervised token"
    ),
    case_of_rows("one-row", "a single row: it is trained", [GOOD]),
    case_of_rows(
        "odd-characters",
        "emoji, right-to-left and NUL: trained as they are",
        [{"text": "a\U0001f600\u202eb\u0000c " * 4}],
    ),
    case_of_rows(
        "an-unknown-role",
        "a role that nobody would prompt with",
        [talk(USER, ANSWER), talk({"role": "oracle", "content": "hm"}, ANSWER)],
        "row 1 of the train dataset: message 0 of messages: role is 'oracle'",
        "user, assistant or system",
        "chat_template_path",
    ),
    case_of_rows(
        "a-column-of-ours",
        "a column with a name that is made here",
        [{"input_ids": IDS, "labels": IDS, "qtarget_source": 1}],
    ),
]
