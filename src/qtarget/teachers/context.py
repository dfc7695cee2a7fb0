"""A teacher that reads more than the student: a solution, a system prompt, retrieved text.

The teacher's sequence is its own prompt, made by a template over the row's columns, followed by exactly the student's
token ids from the first supervised one on, so that teacher and student are joined by ids and nothing is tokenised twice.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtarget.data.messages import RowReader
from qtarget.errors import ConfigError, DataError, unknown
from qtarget.teachers.cache.index import supervised_positions
from qtarget.teachers.mapping import from_json

_LONGEST, _LARGEST_POWER = 1_000_000, 1000
_PLACES = ("prompt", "system")


def read_template(value: Any) -> dict[str, str] | None:
    """The setting as a mapping: text is the template of the prompt.

    Raises:
        ConfigError: another key, or a template that cannot be read.
    """
    if value is None:
        return None
    value = from_json(value)  # no template is a mapping in JSON
    templates = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(templates, Mapping) or not templates:
        raise ConfigError(f"teacher_context is {value!r}; write text, or {{system: text, prompt: text}}")
    for place, text in templates.items():
        if place not in _PLACES:
            raise unknown("teacher_context's key", place, _PLACES)
        if not isinstance(text, str) or not text:
            raise ConfigError(f"teacher_context.{place} is {text!r}; write a template, such as '{{{{ prompt }}}}'")
        _compiled(place, text)
    return dict(templates)


def _compiled(place: str, text: str) -> Any:
    from jinja2 import TemplateError

    try:
        return _environment().from_string(text)
    except TemplateError as error:
        raise ConfigError(f"teacher_context.{place} is not a template: {error}; the syntax is Jinja's") from None


@functools.cache
def _environment() -> Any:
    """Jinja's sandbox: a template may come with a config somebody else wrote. It bounds ranges; multiplied texts and
    powers, of which a few letters fill the memory, are bounded here."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            size = max((len(side) for side in (left, right) if isinstance(side, (str, list, tuple))), default=None)
            if operator == "*" and size is not None:
                count = next((side for side in (left, right) if isinstance(side, int)), 0)
                if size * count > _LONGEST:
                    raise ValueError(f"a text or list of {size * count} parts; the limit is {_LONGEST}")
            if operator == "**" and isinstance(left, int) and isinstance(right, int) and abs(right) > _LARGEST_POWER:
                raise ValueError(f"a power of {right}; the limit is {_LARGEST_POWER}")
            return super().call_binop(context, operator, left, right)

    return Bounded(undefined=StrictUndefined, keep_trailing_newline=True)


@dataclass(frozen=True)
class Context:
    """What the teacher reads in place of a row's prompt.

    Attributes:
        templates: {"prompt": ..., "system": ...}, Jinja over the row's columns; ``prompt`` stands for the original text.
        tokenizer: the student's. chat_template: in place of the tokenizer's own, or None.
    """

    templates: Mapping[str, str]
    tokenizer: Any
    chat_template: str | None = None

    def of(self, row: Mapping[str, Any], input_ids: Sequence[int], labels: Sequence[int]) -> tuple[list[int], int]:
        """(ids the teacher reads first, begin): its sequence is these ids and then ``input_ids[begin:]``.

        Raises:
            ConfigError: a column the template names is not there, or tokens before the answer are supervised.
        """
        positions = supervised_positions(labels)
        if not len(positions):
            return [], len(input_ids)
        first = int(positions[0])
        read, _ = self._reader.read(row)
        messages = read.get("messages") or read.get("prompt")
        if isinstance(messages, list) and messages and isinstance(messages[0], Mapping):
            turns = _before_the_answer(messages, "prompt" in read)
            own = self._ids(read, turns)
            return self._ids(read, self._turns(row, turns)), self._begin(own, input_ids, first)
        if "system" in self.templates:
            raise ConfigError(
                "teacher_context.system is set, but rows of plain text have no system message; use prompt"
            )
        prompt = read.get("prompt")
        ids = list(self.tokenizer(self._render("prompt", row, {}))["input_ids"])
        if prompt is None:  # text or token ids: the context comes before all of it
            return [*ids, *input_ids[:first]], first
        return ids, self._begin(self.tokenizer(prompt)["input_ids"], input_ids, first)

    def _begin(self, own: list[int], input_ids: Sequence[int], first: int) -> int:
        """Where the student's ids go on behind the teacher's prompt: after the row's own prompt."""
        same = next((i for i, (a, b) in enumerate(zip(own, input_ids, strict=False)) if a != b), len(own))
        if first < same:
            raise DataError(
                "teacher_context replaces the prompt, but tokens of the prompt are supervised; set completion_only_loss "
                "or assistant_only_loss"
            )
        # A template may render a prompt alone differently, and a prompt's last token merge with the answer's first.
        return same if same == len(own) else first

    def _turns(self, row: Mapping[str, Any], turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        question = next((message for message in reversed(turns) if message["role"] == "user"), None)
        content = "" if question is None else _text_of(question["content"])
        if "prompt" in self.templates:
            if question is None:
                raise DataError("teacher_context.prompt is set, but a row has no user message before its answer")
            question["content"] = self._render("prompt", row, {"prompt": content})
        if "system" in self.templates:
            system = self._render("system", row, {"prompt": content})
            if turns and turns[0]["role"] == "system":
                turns[0]["content"] = f"{_text_of(turns[0]['content'])}\n\n{system}"
            else:
                turns.insert(0, {"role": "system", "content": system})
        return turns

    @functools.cached_property
    def _reader(self) -> RowReader:
        return RowReader.of(self.tokenizer, self.chat_template, checked=True)

    def _ids(self, read: Mapping[str, Any], turns: list[dict[str, Any]]) -> list[int]:
        ids = self.tokenizer.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            chat_template=self.chat_template,
            tools=read.get("tools"),
            **(read.get("chat_template_kwargs") or {}),
        )
        return list(ids["input_ids"])

    def _render(self, place: str, row: Mapping[str, Any], more: Mapping[str, Any]) -> str:
        from jinja2 import UndefinedError

        # Preparation has put the end token behind plain text by now; the dataset has not.
        end = self.tokenizer.eos_token or ""
        texts = {name: value.removesuffix(end) if isinstance(value, str) else value for name, value in row.items()}
        try:
            return _compiled(place, self.templates[place]).render({**texts, **more})
        except UndefinedError as error:
            raise ConfigError(f"teacher_context.{place}: {error}; the rows have {', '.join({**row, **more})}") from None
        except Exception as error:  # a template may do anything: add a number to a text, divide by zero
            reason = str(error) or type(error).__name__
            raise ConfigError(f"teacher_context.{place} cannot be filled in: {reason}; fix the template") from None


def _text_of(content: Any) -> str:
    """A message's text; of content in parts, the text of its parts."""
    if isinstance(content, str) or content is None:
        return content or ""
    return "".join(str(part.get("text") or "") for part in content)


def _before_the_answer(messages: Sequence[Mapping[str, Any]], is_prompt: bool) -> list[dict[str, Any]]:
    """Copies of the messages before the first one that may be trained."""
    before = itertools.takewhile(lambda message: is_prompt or message["role"] != "assistant", messages)
    return [dict(message) for message in before]
