"""Do two tokenizers give the same ids to the same tokens?"""

from __future__ import annotations

from typing import Any


def real_vocabulary_size(tokenizer: Any) -> int:
    """Entries of the real vocabulary, whatever the head's padding: the largest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary_difference(student: Any, teacher: Any, added_too: bool = False) -> str | None:
    """None where every id means the same token, else a sentence with the first that differs.

    Compared by real tokens and never by the size of the model's matrix, which may be padded differently.

    Args:
        added_too: whether an added token that only one of them has is a difference; see ``added_by_one``.
    """
    tolerated = {} if added_too else added_by_one(student, teacher)
    for index, (ours, theirs) in _differences(student, teacher).items():
        if index not in tolerated:
            return f"id {index} is {shown(ours)} for the student and {shown(theirs)} for the teacher"
    return None


def added_by_one(student: Any, teacher: Any) -> dict[int, tuple[str | None, str | None]]:
    """Added tokens that matter to no row without them: id → (the student's token, the teacher's), None for none.

    One that only the student has, as a pad token of its own; one of the teacher's beyond the student's vocabulary, where
    its mass is cut off; and an id that each pads with.
    """
    mine, theirs = student.added_tokens_decoder, teacher.added_tokens_decoder
    size, pads = real_vocabulary_size(student), (student.pad_token, teacher.pad_token)

    def matters_not(index: int, ours: str | None, other: str | None) -> bool:
        if other is None:
            return index in mine
        return index in theirs and (index >= size if ours is None else index in mine and (ours, other) == pads)

    return {index: pair for index, pair in _differences(student, teacher).items() if matters_not(index, *pair)}


def _differences(student: Any, teacher: Any) -> dict[int, tuple[str | None, str | None]]:
    """Ids that mean another token, in their order."""
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    pairs = {index: (ours.get(index), theirs.get(index)) for index in sorted(ours.keys() | theirs.keys())}
    return {index: pair for index, pair in pairs.items() if pair[0] != pair[1]}


def shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
