"""Tokenises raw rows as TRL does, one at a time, so that a fault names its row."""

from __future__ import annotations

import itertools
import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from datasets import IterableDataset
from trl.data_utils import _tokenize, common_prefix_length

from qtarget.data.messages import INSTEAD_OF_CONTENT, RowReader, half_character
from qtarget.data.validation import readable
from qtarget.errors import ConfigError, DataError, reason

logger = logging.getLogger(__name__)

_NOTES = "qtarget_notes"  # what is odd about each row, a line each; in the dataset until it is logged


@dataclass(frozen=True)
class Tokeniser:
    """A raw row's ``input_ids``, and a mask of what is trained of them, as TRL's SFTTrainer makes them.

    Attributes:
        processing_class: tokenizer or processor. reader: reads the rows. chat_template: in place of the tokenizer's own,
            or None. assistant_only: mask all but the assistant's tokens. name: of the dataset, for errors.
    """

    processing_class: Any
    reader: RowReader
    chat_template: str | None
    assistant_only: bool
    name: str

    def __call__(self, row: Mapping[str, Any], number: int) -> dict[str, Any]:
        where = f"row {number} of the {self.name} dataset"
        try:
            read, notes = self.reader.read(row)
            tokens = self._tokens(read, notes)
        except ConfigError as error:
            error.during(where)
            raise
        return {**tokens, _NOTES: "\n".join(dict.fromkeys(notes))}

    def _tokens(self, read: dict[str, Any], notes: list[str]) -> dict[str, list[int]]:
        try:
            return self._of_messages(read, notes) if "tools" in read else self._of_text(read, notes)
        except ConfigError:
            raise
        except Exception as error:  # a template raises whatever it likes
            if half := half_character(read):
                raise DataError(f"it holds half a character, {half!r}; fix that text") from error
            what = "the chat template cannot be applied" if "tools" in read else "it cannot be tokenised"
            raise DataError(f"{what}: {reason(error)}; fix that row, or the template (chat_template_path)") from error

    def _of_messages(self, read: dict[str, Any], notes: list[str]) -> dict[str, list[int]]:
        render = {"tools": read["tools"], **read["chat_template_kwargs"]}
        messages = read["messages"] if "messages" in read else read["prompt"] + read["completion"]
        self._note_what_is_left_out(messages, render, notes)
        masked = {"return_assistant_tokens_mask": True} if self.assistant_only else {}
        whole = self._ids(messages, **masked, **render)
        made: dict[str, list[int]] = {name: whole[name] for name in ("input_ids", "assistant_masks") if name in whole}
        if "prompt" in read:
            prompt = self._ids(read["prompt"], add_generation_prompt=True, **render)["input_ids"]
            made["completion_mask"] = _completion_mask(prompt, made["input_ids"], notes)
        return made

    def _of_text(self, read: dict[str, Any], notes: list[str]) -> dict[str, list[int]]:
        end = getattr(self.processing_class, "tokenizer", self.processing_class).eos_token
        if end is None:
            raise DataError("the tokenizer has no token that ends a text; set eos_token")
        if self.assistant_only:
            raise DataError("assistant_only_loss is true, but the row is text; write messages, or set it to false")
        *prompt, text = read.values()  # prompt and completion, or text alone
        ids, added = self._ids_of_text("".join(prompt) + text + end * (not text.endswith(end)), end)
        if added:
            notes.append(f"the tokenizer adds {end} to a text that has its {end} already; one of the two is trained")
        if not prompt:
            return {"input_ids": ids}
        return {"input_ids": ids, "completion_mask": _completion_mask(self._ids_of_text(prompt[0], end)[0], ids, notes)}

    def _ids_of_text(self, text: str, end: str) -> tuple[list[int], bool]:
        """(ids, whether the tokenizer added an end that the text has not); they are without it."""
        ids = self._ids(text)["input_ids"]
        token = getattr(self.processing_class, "tokenizer", self.processing_class).eos_token_id
        written = len(text) - len(re.sub(rf"(?:{re.escape(end)})+\Z", "", text))
        ends = sum(1 for _ in itertools.takewhile(lambda index: index == token, reversed(ids)))
        added = ends - written // len(end)
        return (ids[:-added], True) if added > 0 else (ids, False)

    def _ids(self, given: Any, **how: Any) -> dict[str, list[int]]:
        return _tokenize(self.processing_class, given, **{"chat_template": self.chat_template, **how})

    def _note_what_is_left_out(self, messages: list[dict[str, Any]], render: dict[str, Any], notes: list[str]) -> None:
        """What the template does not write of tools, calls, reasoning, and roles beside user and assistant; of reasoning
        also what it writes in the last turns alone. And text that it writes in quotes.

        Raises:
            DataError: nothing is left of a message.
        """

        def text(messages: list[dict[str, Any]], **how: Any) -> str:
            how = {"chat_template": self.chat_template, **render, **how}
            return self.processing_class.apply_chat_template(messages, tokenize=False, **how)

        def is_left_out(without: list[dict[str, Any]], **how: Any) -> bool:
            try:
                return text(without, **how) == whole
            except Exception:  # so the template reads it
                return False

        names = [name for name in INSTEAD_OF_CONTENT if any(name in message for message in messages)]
        others = [message for message in messages if message["role"] not in ("user", "assistant")]
        thoughts = [
            message["content"].partition("</think>")[0].split("<think>")[-1].strip()
            for message in messages
            if isinstance(message["content"], str) and "</think>" in message["content"]
        ]
        if not (names or others or thoughts or render["tools"]):
            return
        whole = text(messages)
        left = {name for name in names if is_left_out([_without(message, name) for message in messages])}
        for number, message in enumerate(messages):
            instead = left.intersection(message)
            if instead and not message["content"] and not set(names).intersection(message) - left:
                raise DataError(
                    f"message {number} holds {', '.join(sorted(instead))}, which the chat template leaves out, so that "
                    "an empty turn would be trained; name a template that writes it (chat_template_path), or drop the row"
                )
        for name in set(names) - left:
            first = next(number for number, message in enumerate(messages) if name in message)
            if is_left_out([*messages[:first], _without(messages[first], name), *messages[first + 1 :]]):
                left.add(f"{name} of earlier turns")
        if any(thought not in whole for thought in thoughts):
            left.add("<think> parts of content")
        if render["tools"] and is_left_out(messages, tools=None):
            left.add("tools")
        for message in others:
            content = message["content"]
            if isinstance(content, str) and not any(
                form in whole for form in (content.strip(), json.dumps(content)[1:-1])
            ):
                left.add(f"messages of role {message['role']!r}")
        notes += [f"the chat template leaves out {what}" for what in sorted(left)]
        if any(json.dumps(given, ensure_ascii=False) in whole for given in _arguments_as_text(messages)):
            notes.append(
                "arguments of a tool call are text, which the chat template puts in quotes; write them as a mapping"
            )


def _arguments_as_text(messages: list[dict[str, Any]]) -> Iterator[str]:
    """Those of tool calls that are text: OpenAI's form, which few templates read."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            function = call.get("function", call) if isinstance(call, Mapping) else call
            if isinstance(function, Mapping) and isinstance(given := function.get("arguments"), str):
                yield given


def _without(message: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: value for other, value in message.items() if other != name}


def _completion_mask(prompt: list[int], ids: list[int], notes: list[str]) -> list[int]:
    """Ones from where prompt alone and the whole part: a template may render a prompt alone differently, and the prompt's
    last token merge with the completion's first."""
    begin = common_prefix_length(prompt, ids)
    if begin < len(prompt):
        notes.append(
            "the prompt alone is tokenised differently than before its completion; the completion is trained from where "
            "they part"
        )
    return [0] * begin + [1] * (len(ids) - begin)


def tokenised(dataset: Any, tokeniser: Tokeniser, num_proc: int | None) -> Any:
    """Raw rows with the columns of ``Tokeniser``; of a stream as they come. What is odd about rows is logged.

    Raises:
        DataError: the first row that cannot be read.
    """
    notes = _Notes(tokeniser.name)
    if isinstance(dataset, IterableDataset):
        return dataset.map(tokeniser, with_indices=True).map(notes.of_stream, remove_columns=[_NOTES])
    with readable(tokeniser.name):
        # Another format would make tensors of the numbers in messages.
        plain = dataset.with_format(None)
        what = f"Tokenizing {tokeniser.name} dataset"
        plain = plain.map(tokeniser, with_indices=True, num_proc=num_proc, desc=what)
    for lines in plain[_NOTES]:
        notes.add(lines)
    for note in notes.counts:
        notes.log(note)
    return plain.remove_columns(_NOTES).with_format(dataset.format["type"])


class _Notes:
    """What is odd about rows, with how many and the first of them."""

    def __init__(self, name: str):
        self.name, self.rows = name, 0
        self.counts: Counter[str] = Counter()
        self.first: dict[str, int] = {}

    def add(self, lines: str) -> list[str]:
        """Count a row's notes, and return them."""
        notes = lines.splitlines()
        for note in notes:
            self.first.setdefault(note, self.rows)
        self.counts.update(notes)
        self.rows += 1
        return notes

    def log(self, note: str, so_far: str = "") -> None:
        count, first = self.counts[note], self.first[note]
        logger.warning(f"{count} of {self.rows} rows of the {self.name} dataset{so_far}, row {first} first: {note}")

    def of_stream(self, row: dict[str, Any]) -> dict[str, Any]:
        """A stream has no end at which to log: it is done at 1, 10, 100, ... rows."""
        for note in self.add(row[_NOTES]):
            if str(self.counts[note]).strip("0") == "1":
                self.log(note, " so far")
        return row
