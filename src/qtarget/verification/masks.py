"""Do the masks train the answer and its end token, and nothing of the prompt?

Rows are looked at as text: the prepared ids are decoded and their tokens' places in the text taken from the tokenizer;
where the row's own messages stand in that text says what each token is of. Nothing of how the mask was made takes part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from qtarget.verification.check import Finding, check, expect, not_applicable
from qtarget.verification.subject import Row, Subject

# An end of turn stands this many tokens after the answer's text at most: a template may put a space or a line first.
_NEAR = 3


@dataclass
class Reading:
    """Places of a prepared row's tokens, by what they are of.

    Attributes:
        row: the prepared row. prompt, answer: places inside a message that is asked, or answered. ends: of the token that
            ends each answer; None where it was cut off, −1 where there is none.
    """

    row: Row
    prompt: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)
    ends: list[int | None] = field(default_factory=list)

    def is_trained(self, place: int) -> bool:
        return self.row["labels"][place] != -100


@check(
    "prompt is not trained",
    "check completion_only_loss and assistant_only_loss, and the {% generation %} markers of the chat template",
)
def prompt(subject: Subject) -> Finding:
    """Nothing of the prompt has a label."""
    args, row = subject.trainer.args, subject.raw[0]
    if "prompt" in row and "completion" in row:
        everything = args.completion_only_loss is False
    else:
        everything = not (args.assistant_only_loss and {"messages", "conversations"} & row.keys())
    if everything:
        return not_applicable(
            "the run trains every token: its rows have no separate prompt, or completion_only_loss is false"
        )
    return _of_places(subject, "prompt", False)


@check(
    "answer is trained",
    "check assistant_only_loss, the {% generation %} markers of the chat template, and labels in the rows themselves",
)
def answer(subject: Subject) -> Finding:
    """Every token of the answers has a label."""
    return _of_places(subject, "answer", True)


@check(
    "end of turn is trained",
    "the chat template puts the end of turn outside {% generation %}, or the tokenizer's eos_token is another: set "
    "eos_token or chat_template_path; without it the model will not stop",
)
def end(subject: Subject) -> Finding:
    """The token that ends an answer has a label, so that the model learns to stop."""
    ends = [(reading, place) for reading in _readings(subject) for place in reading.ends]
    whole = [(reading, place) for reading, place in ends if place is not None]
    cut = len(ends) - len(whole)
    if not whole:
        why = "every answer that was found is cut off by max_length before its end" if cut else _WHY_NOT_FOUND
        return not_applicable(why, cut=cut)
    without = sum(place < 0 for _, place in whole)
    lost = sum(place >= 0 and not reading.is_trained(place) for reading, place in whole)
    tokens = {reading.row["input_ids"][place] for reading, place in whole if place >= 0}
    told = f"{len(whole) - without - lost} of {len(whole)} answers end with a trained token"
    told += "".join(f", {subject.text_of([token])}" for token in sorted(tokens)[:3])
    told += f"; {cut} more are cut off by max_length" if cut else ""
    told += f"; {without} end with no token of its own" if without else ""
    return expect(not lost and not without, told, answers=len(whole), untrained=lost, without_end=without, cut=cut)


def _of_places(subject: Subject, what: str, trained: bool) -> Finding:
    count, wrong, example = 0, 0, ""
    for reading in _readings(subject):
        places = getattr(reading, what)
        odd = [place for place in places if reading.is_trained(place) != trained]
        count, wrong = count + len(places), wrong + len(odd)
        if odd and not example:
            example = f", as {subject.text_of([reading.row['input_ids'][place] for place in odd[:8]])}"
    if not count:
        return not_applicable(_WHY_NOT_FOUND)
    told = f"{count} tokens of {what}s, {wrong} of them {'not trained' if trained else 'trained'}{example}"
    return expect(not wrong, told, tokens=count, wrong=wrong)


# -- reading rows ------------------------------------------------------------------------------------------------

_WHY_NOT_FOUND = "prompts and answers could not be found in the prepared rows"


def _readings(subject: Subject) -> Iterator[Reading]:
    """A reading of each prepared row whose own row is found by the texts in it; rows may have been dropped."""
    left = list(subject.raw)
    for row in subject.rows:
        for number, raw in enumerate(left):
            if (reading := _read(subject, row, raw)) is not None:
                del left[: number + 1]
                yield reading
                break


def _read(subject: Subject, row: Row, raw: Mapping[str, Any]) -> Reading | None:
    tokenizer, ids = subject.trainer.tokenizer, list(row["input_ids"])
    if not getattr(tokenizer, "is_fast", False):
        return None
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if again["input_ids"] != ids:
        return None
    spans = [tuple(span) for span in again["offset_mapping"]]
    parts = _parts(raw, subject.trainer.args.dataset_text_field)
    reading, cursor, last_asked = Reading(row), 0, 0
    for number, (asked, content) in enumerate(parts):
        begin = text.find(content, cursor)
        if begin < 0:
            # What max_length cut off is a beginning of the content, and the row's last.
            begin = next((at for at in range(cursor, len(text)) if content.startswith(text[at:])), -1)
            if begin < 0:
                return None if not number else reading
        cursor = min(begin + len(content), len(text))
        inside = [place for place, (a, b) in enumerate(spans) if begin <= a < b <= cursor]
        if asked:
            reading.prompt += inside
            last_asked = cursor
            continue
        reading.answer += inside
        if "completion" in raw and "prompt" in raw:  # what leads to the answer is the prompt's too
            reading.prompt += [place for place, (a, b) in enumerate(spans) if last_asked <= a < b <= begin]
        reading.ends.append(_end(tokenizer, ids, spans, cursor, begin + len(content) > len(text)))
    return reading


def _end(tokenizer: Any, ids: list[int], spans: list[tuple[int, ...]], cursor: int, cut: bool) -> int | None:
    """The place of the token that ends the answer whose text ends at ``cursor``."""
    after = [place for place, (a, b) in enumerate(spans) if a >= cursor and b > a]
    if cut or not after:
        return None
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, tokenizer.eos_token_id}
    return next((place for place in after[:_NEAR] if ids[place] in special), -1)


def _parts(raw: Mapping[str, Any], text_field: str) -> list[tuple[bool, str]]:
    """(whether it is asked, its text) of each message of a row, in order."""
    if "prompt" in raw and "completion" in raw:
        return [*_texts(raw["prompt"], True), *_texts(raw["completion"], False)]
    for name, asked in (("messages", None), ("conversations", None), (text_field, False)):
        if name in raw:
            return _texts(raw[name], asked)
    return []


def _texts(value: Any, asked: bool | None) -> list[tuple[bool, str]]:
    """``asked``: of every message alike, or None to tell by its role."""
    texts = []
    for message in [{"content": value}] if isinstance(value, str) else value:
        content, role = message.get("content", message.get("value")), message.get("role", message.get("from"))
        if isinstance(content, str) and content.strip():
            answers = role in ("assistant", "gpt", "model") if asked is None else not asked
            texts.append((not answers, content.strip()))
    return texts


CHECKS = [prompt, answer, end]
