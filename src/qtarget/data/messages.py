"""Reads rows as people write them: roles, content in parts, tools, Arrow's nulls."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from datasets import Json

from qtarget.errors import DataError

# ShareGPT's and OpenAssistant's names of roles → the names that chat templates know.
ROLES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "chatbot", "model", "ai"), "assistant"),
    "observation": "tool",
}
_KNOWN_ROLES = ("user", "assistant", "system", "tool", "function", "developer", "ipython")
# What a message may hold in place of content.
INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking")
# By which other libraries leave a message untrained.
_MASKS = ("weight", "train", "loss")
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_AS_MESSAGES = "messages, as in [{role: user, content: text}]"
_PROBE = "How many apples?"


def trained_columns(columns: Iterable[str], text_field: str = "text") -> tuple[str, ...]:
    """The columns of rows without ``input_ids`` that are trained; columns beside them are not read.

    Example:
        >>> trained_columns(["prompt", "messages"])
        ('messages',)
    """
    shapes = ("prompt", "completion"), ("messages",), ("conversations",), (text_field,)
    have = set(columns)
    return next((shape for shape in shapes if have.issuperset(shape)), ())


@dataclass(frozen=True)
class RowReader:
    """Reads raw rows for a chat template.

    Attributes:
        template: its source. content: changes a list of text parts into what the template reads.
        text_field: the column of plain text.
        features: the dataset's, which tell Arrow's nulls from those of JSON. checked: rows were read with them before.
        formatting: makes a row's text in place of all its columns.
    """

    template: str = ""
    content: Callable[[list[str]], Any] = "".join
    text_field: str = "text"
    features: Mapping[str, Any] = field(default_factory=dict)
    checked: bool = False
    formatting: Callable[[dict[str, Any]], str] | None = None

    @classmethod
    def of(
        cls,
        processing_class: Any,
        chat_template: str | None,
        text_field: str = "text",
        features: Any = None,
        **how: Any,
    ) -> RowReader:
        """For the template of a tokenizer or processor, or ``chat_template`` in its place; ``how``: attributes."""
        template = chat_template or getattr(processing_class, "chat_template", None) or ""
        source = "\n".join(template.values()) if isinstance(template, Mapping) else template
        source = re.sub(r"\{#.*?#\}", "", source, flags=re.S)  # in comments, words such as train mean nothing

        def reads(content: Callable[[list[str]], Any]) -> bool:
            said = [{"role": role, "content": content([_PROBE])} for role in ("user", "assistant")]
            try:
                text = processing_class.apply_chat_template(said, chat_template=chat_template, tokenize=False)
            except Exception:  # templates raise whatever they like
                return False
            return text.count(_PROBE) > 1 and "'text'" not in text and '"text"' not in text

        content = _as_parts if source and not reads("".join) and reads(_as_parts) else "".join
        return cls(source, content, text_field, features or {}, **how)

    def read(self, row: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """(what is trained of a row, what is odd about it).

        The first holds text under ``text_field``, or text or messages under ``prompt`` and ``completion``, or
        ``messages``; with messages also ``tools``, a list or None, and ``chat_template_kwargs``.

        Raises:
            DataError: a value that is neither text nor messages, an unknown role, content that is no text, tools or
                template arguments that cannot be read.
        """
        notes: list[str] = []
        made: dict[str, Any] = {}
        if self.formatting is not None:
            made["text"] = self.formatting(dict(row))
            if not isinstance(made["text"], str):
                raise DataError(f"formatting_func returns {shown(made['text'])}; let it return the text of a row")
            return made, notes
        alone = ("prompt",) if "prompt" in row else ()  # of rows whose answers are still to be made
        for column in trained_columns(row, self.text_field) or alone:
            value = row[column]
            if isinstance(value, str) and column not in ("messages", "conversations"):
                made[column] = value
                continue
            if column == self.text_field:
                raise DataError(f"{column} is {shown(value)}; write text")
            messages = self._messages(column, self._without_nulls(column, row), notes)
            made["messages" if column == "conversations" else column] = messages
        kinds = {isinstance(value, str) for value in made.values()}
        if len(kinds) > 1:
            raise DataError(
                f"prompt is {shown(row['prompt'])} and completion {shown(row['completion'])}; write text in both, or "
                "messages in both"
            )
        if False in kinds and isinstance(row.get("system"), str):
            notes.append("column system is not read; write it as the first message")
        if False in kinds:
            made["tools"] = _tools(self._without_nulls("tools", row))
            made["chat_template_kwargs"] = _arguments(self._without_nulls("chat_template_kwargs", row))
        return made, notes

    def _without_nulls(self, column: str, row: Mapping[str, Any]) -> Any:
        return _without_nulls(row.get(column), self.features.get(column))

    def _mixes(self, column: str) -> bool:
        """Whether content is text here and parts there: datasets keeps that as JSON, and gives back "7" as 7."""
        if self.checked:
            return True
        message = getattr(self.features.get(column), "feature", None)
        return isinstance(message, Mapping) and any(
            isinstance(message.get(name), Json) for name in ("content", "value")
        )

    def _messages(self, column: str, value: Any, notes: list[str]) -> list[dict[str, Any]]:
        either = "" if column in ("messages", "conversations") else "text, or "
        if not isinstance(value, list) or not value:
            raise DataError(f"{column} is {shown(value)}; write {either}{_AS_MESSAGES}")
        if odd := [message for message in value if not isinstance(message, Mapping)]:
            raise DataError(f"{column} holds {shown(odd[0])}; write {either}{_AS_MESSAGES}")
        mixes = self._mixes(column)
        return [self._message(f"message {i} of {column}", message, mixes, notes) for i, message in enumerate(value)]

    def _message(self, where: str, message: Mapping[str, Any], mixes: bool, notes: list[str]) -> dict[str, Any]:
        read = {name: value for name, value in message.items() if value or name not in INSTEAD_OF_CONTENT}
        for name, other in (("role", "from"), ("content", "value")):  # ShareGPT's names
            if read.get(name) is None and other in read:
                read[name] = read.pop(other)
        read["role"] = self._role(where, read.get("role"), notes)
        unread = [n for n in _MASKS if not read.get(n, True) and not re.search(rf"\b{n}\b", self.template)]
        if unread:
            notes.append(f"{unread[0]} of a message is not read: assistant_only_loss and completion_only_loss mask")
        content = read.get("content")
        if mixes and isinstance(content, int):
            content = json.dumps(content)
        if not content and any(name in read for name in INSTEAD_OF_CONTENT):
            read["content"] = ""
        elif isinstance(content, list):
            read["content"] = self.content(_texts(where, content))
        elif isinstance(content, str):
            read["content"] = content if self.content == "".join else self.content([content])
        else:
            as_json = ", or parts in every row: text that looks like JSON is read as JSON beside parts" * mixes
            raise DataError(f"{where}: content is {shown(content)}; write text{as_json}")
        return read

    def _role(self, where: str, role: Any, notes: list[str]) -> str:
        if not isinstance(role, str):
            raise DataError(f"{where}: role is {shown(role)}; write user, assistant or system")
        usual = role.strip().lower()
        usual = ROLES.get(usual, usual)
        if role == usual and role in _KNOWN_ROLES:
            return role
        quoted = rf"['\"]{re.escape(role)}['\"]"
        if usual in _KNOWN_ROLES:
            if re.search(rf"==\s*{quoted}", self.template):  # a template with names of its own
                return role
            notes.append(f"role {role!r} is read as {usual!r}")
            return usual
        if not re.search(quoted, self.template):
            raise DataError(
                f"{where}: role is {role!r}, which the chat template does not know, so that nobody would prompt with "
                "it; write user, assistant or system, or name a template that knows it (chat_template_path)"
            )
        return role


def _as_parts(texts: list[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


def _texts(where: str, parts: list) -> list[str]:
    """The text of content in parts."""
    for number, part in enumerate(parts):
        is_text = isinstance(part, Mapping) and part.get("type") in _TEXT_PARTS and isinstance(part.get("text"), str)
        if not is_text:
            raise DataError(
                f"{where}: part {number} of content is {shown(part)}; only text can be trained: write content as text, "
                "or as parts {type: text, text: ...}"
            )
    if not parts:
        raise DataError(f"{where}: content is []; write text")
    return [part["text"] for part in parts]


def _tools(value: Any) -> list | None:
    tools = value
    if isinstance(value, str):
        try:
            tools = json.loads(value)
        except ValueError as error:
            raise DataError(
                f"tools is {shown(value)}, which is no JSON ({error}); write a list of tools, or null for none"
            ) from None
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise DataError(f"tools is {shown(value)}; write a list of tools, each a mapping, or null for none")
    return tools


def _arguments(value: Any) -> dict[str, Any]:
    if value is not None and not isinstance(value, Mapping):
        raise DataError(
            f"chat_template_kwargs is {shown(value)}; write a mapping, such as {{enable_thinking: false}}, or null"
        )
    return dict(value or {})


def _without_nulls(value: Any, feature: Any) -> Any:
    """The value without the nulls by which Arrow gives every mapping of a column the same keys.

    ``feature``: the column's type. Where it is JSON, which keeps what was written, nothing is taken out.
    """
    if isinstance(feature, Json):
        return value
    if isinstance(value, Mapping):
        of = feature if isinstance(feature, Mapping) else {}
        return {name: _without_nulls(inner, of.get(name)) for name, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(inner, getattr(feature, "feature", None)) for inner in value]
    return value


def half_character(value: Any) -> str | None:
    """Half of an emoji, which no tokenizer reads: JSON writes emojis as two halves, and text may be cut between them."""
    found = re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False, default=str))
    return found and found[0]


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
