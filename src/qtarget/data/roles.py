"""Which token of a rendered conversation belongs to which role's message."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

# What the template writes before the first message: a system prompt of its own, or tools.
TEMPLATE = "template"


def of_tokens(
    ids: Sequence[int], read: Mapping[str, Any], tokenizer: Any, chat_template: str | None
) -> list[str] | None:
    """The role of each token of a conversation, headers and ends of turns included.

    Args:
        ids: its tokens, before they are cut. read: as ``RowReader.read`` gives it. chat_template: in place of the
            tokenizer's own.

    Returns:
        None where it cannot be told: the template writes a turn another way when more follow, or joins two.
    """
    messages = read["messages"] if "messages" in read else read["prompt"] + read["completion"]
    how = {"tools": read["tools"], "chat_template": chat_template, **read["chat_template_kwargs"]}

    def render(some: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            return tokenizer.apply_chat_template(list(some), tokenize=False, **how)
        except Exception:  # a template may refuse the beginning of a conversation, by any kind of error
            return None

    text = render(messages)
    if text is None:
        return None
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    except (NotImplementedError, ValueError):  # a slow tokenizer has no offsets
        return None
    ends = _ends(messages, text, render, tokenizer.eos_token or "")
    if ends is None or list(encoded["input_ids"]) != list(ids):
        return None
    roles = [str(message["role"]) for message in messages]
    turn = _turn(messages, 0, render)
    preamble = text[: ends[0]].removesuffix(turn) if turn and text[: ends[0]].endswith(turn) else ""
    if (first := len(preamble)) and preamble.strip() != tokenizer.bos_token:
        roles, ends = [TEMPLATE, *roles], [first, *ends]
    last = [max(begin, end - 1) for begin, end in encoded["offset_mapping"]]
    return [roles[place] for place in np.searchsorted(ends, last, side="right")]


def _ends(
    messages: Sequence[Any], text: str, render: Callable[[Sequence[Any]], str | None], eos: str
) -> list[int] | None:
    """Where each message ends in the rendered text."""
    ends: list[int | None] = []
    for number in range(1, len(messages)):
        begun = render(messages[:number])
        if begun is not None and not text.startswith(begun) and text.endswith(eos):
            begun = begun.removesuffix(eos)  # some templates end a conversation with it, not a turn
        ends.append(len(begun) if begun is not None and text.startswith(begun) else None)
    ends.append(len(text))
    # A turn may be written another way while it is the last one (Qwen3 shows its thinking only then). It ends where
    # the next one begins, whose text is seen when the turn in question is left out.
    for number in reversed(range(len(messages) - 1)):
        after = ends[number + 1]
        if ends[number] is not None or after is None:
            continue
        before = (ends[number - 1] if number else 0) or 0
        joined = [place for place in range(number + 1, len(messages)) if ends[place] == after]
        without = render([*messages[:number], *(messages[place] for place in joined)])
        turn = without[before:] if number and without is not None and without.startswith(text[:before]) else ""
        turn = turn or _turn(messages, number + 1, render)
        if turn and text[before:after].endswith(turn):
            ends[number] = after - len(turn)
        elif messages[number]["role"] == messages[number + 1]["role"]:
            ends[number] = after  # whose it is does not depend on the place
    known = [end for end in ends if end is not None]
    return known if len(known) == len(ends) and known == sorted(known) else None


def _turn(messages: Sequence[Any], number: int, render: Callable[[Sequence[Any]], str | None]) -> str:
    """A message as it is written after another: what its template writes first of all is not in it."""
    for others in ([], messages[number + 1 : number + 2]):  # where roles have to alternate
        before = render([messages[number], *others])
        twice = render([messages[number], *others, messages[number]])
        if before and twice and twice.startswith(before):
            return twice[len(before) :]
    return ""
