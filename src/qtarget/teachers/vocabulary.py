"""Do two tokenizers give the same ids to the same tokens?"""

from __future__ import annotations

from typing import Any


def real_vocabulary_size(tokenizer: Any) -> int:
    """Entries of the real vocabulary, whatever the head's padding: the largest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1


def vocabulary_difference(student: Any, teacher: Any) -> str | None:
    """None where every id means the same token, else a sentence with the first that differs.

    Compared by real tokens and never by the size of the model's matrix, which may be padded differently.
    """
    ours = {index: token for token, index in student.get_vocab().items()}
    theirs = {index: token for token, index in teacher.get_vocab().items()}
    for index in sorted(ours.keys() | theirs.keys()):
        if ours.get(index) != theirs.get(index):
            return (
                f"id {index} is {_shown(ours.get(index))} for the student and {_shown(theirs.get(index))} "
                "for the teacher"
            )
    return None


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)
