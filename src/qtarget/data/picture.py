"""What will be trained, known before training: tokens by role, cuts, ends, rows as text."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

LISTED = 5  # end tokens


@dataclass(frozen=True)
class End:
    """A token that completions end with; whitespace after it is passed over. rows: so many; stops: generation does."""

    token: int
    text: str
    rows: int
    stops: bool

    def __str__(self) -> str:
        return self.text if self.text.startswith("<") and self.text.isprintable() else repr(self.text)


@dataclass
class Picture:
    """What a run trains on, counted on the tokenised rows, before packing.

    A trained token is a label that is not -100 and is predicted: not the first of its row.

    Attributes:
        rows: those that are trained on. given: those that were read. of_stream: whether they are a stream's first.
        tokens, trained: of ``rows``, as they are cut. longest: tokens of the longest row before it is cut.
        roles: role → (tokens, trained) of the first ``roles_rows`` rows; None where it is not known.
        setting: the setting that would train less, where whole conversations are trained.
        cut, labels_lost, ends_lost: rows that max_length cuts, trained tokens lost by it, rows that lost the last one.
        untrained: rows without a trained token. dropped: of them, those that are left out.
        ends: the tokens that completions end with, the most common first. ended: completions that were not cut.
        ends_masked: completions whose end follows and is not trained. stops: what generation stops at, as text.
        doubled: special token → (rows in which it stands twice in succession, the first of them).
    """

    of_stream: bool = False
    given: int = 0
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    longest: int = 0
    roles: dict[str, tuple[int, int]] | None = None
    roles_rows: int = 0
    setting: str | None = None
    cut: int = 0
    labels_lost: int = 0
    ends_lost: int = 0
    untrained: int = 0
    dropped: int = 0
    ends: list[End] = field(default_factory=list)
    ended: int = 0
    ends_masked: int = 0
    stops: list[str] = field(default_factory=list)
    doubled: dict[str, tuple[int, int]] = field(default_factory=dict)
    as_tokens: bool = field(default=False, repr=False, compare=False)  # whether the rows came as token ids
    printed: bool = field(
        default=False, repr=False, compare=False
    )  # whether somebody printed it, so that it need not be logged
    _shown: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list, repr=False, compare=False)
    _tokenizer: Any = field(default=None, repr=False, compare=False)

    def spans(self, number: int) -> Iterator[tuple[int, int, list[tuple[str, bool]]]]:
        """(row, its tokens, [(text, whether it is trained)]) of the first ``number`` rows with something to train."""
        for row, ids, trained in self._shown[:number]:
            yield row, len(ids), _spans(self._tokenizer, ids, trained)

    @property
    def warnings(self) -> list[str]:
        """What is odd, a sentence each, with the fix."""
        return [*self._cuts(), *self._ends(), *self._doubles()]

    def _cuts(self) -> Iterator[str]:
        if self.cut:
            yield (
                f"{self.cut:,} of {self.given:,} rows are cut at max_length (trained tokens lost: "
                f"{self.labels_lost:,}, ends of a row lost: {self.ends_lost:,}); the longest row has {self.longest:,} "
                "tokens: raise max_length, or leave out such rows"
            )

    def _ends(self) -> Iterator[str]:
        wrong = [end for end in self.ends if not end.stops]
        rows = self.ended - sum(end.rows for end in self.ends if end.stops)
        if not rows:
            return
        said = f"{rows:,} of {self.ended:,} completions end with {_listed(wrong)}, at which generation does not stop"
        stops = " or ".join(self.stops) or "nothing"
        if self.ends_masked:
            yield (
                f"{said}: the end of turn follows it in {self.ends_masked:,} rows and is not trained; put it inside the "
                "chat template's {% generation %} block, or set assistant_only_loss: false"
            )
        elif wrong and wrong[0].token in special_tokens(self._tokenizer):
            yield f'{said} (it stops at {stops}); set eos_token: "{wrong[0].text}", or end the rows with {stops}'
        else:
            where = "rows" if self.as_tokens else "assistant's turns in the chat template (chat_template_path)"
            yield f"{said} (it stops at {stops}): no end is taught; end the {where} with {stops}"

    def _doubles(self) -> Iterator[str]:
        for token, (rows, first) in self.doubled.items():
            yield (
                f"{token} appears twice in succession in {rows:,} of {self.given:,} rows, first in row {first}: the "
                "tokenizer or the template adds it, and the text holds it too; remove it from one of them"
            )

    def log(self) -> None:
        """A line on the screen and what is odd in the log, unless somebody printed it all."""
        if not self.printed:
            print(f"data: {self}")
            for sentence in self.warnings:
                logger.warning(sentence)

    def __str__(self) -> str:
        """Rows, tokens and those trained, by role, on one line.

        >>> str(Picture(rows=2, given=2, tokens=12, trained=3, roles={"user": (8, 0), "assistant": (4, 3)}, roles_rows=2))
        '2 rows, 12 tokens, 3 trained (25.0%): user 0 of 8, assistant 3 of 4'
        """
        first = "the first " if self.of_stream else ""
        share = f" ({self.trained / self.tokens:.1%})" if self.tokens else ""
        return f"{first}{self.rows:,} rows, {self.tokens:,} tokens, {self.trained:,} trained{share}: {self.by_role}"

    @property
    def by_role(self) -> str:
        if self.roles is None:
            return "roles not known"
        counts = ", ".join(f"{role} {trained:,} of {tokens:,}" for role, (tokens, trained) in self.roles.items())
        over = "" if self.roles_rows == self.rows else f" in {self.roles_rows:,} rows"
        return counts + over + (f"; {self.setting}" if self.setting else "")


def _listed(ends: list[End]) -> str:
    return " or ".join(map(str, ends)) or "another token"


def special_tokens(tokenizer: Any) -> set[int]:
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, about in added if about.special)}


# -- a row as text -----------------------------------------------------------------------------------------------


def _spans(tokenizer: Any, ids: np.ndarray, trained: np.ndarray) -> list[tuple[str, bool]]:
    """Runs of trained and untrained tokens as text. Texts of beginnings are compared, for a tokenizer may write a run
    another way where it stands alone."""
    spans, before = [], ""
    place = 0
    for is_trained, run in itertools.groupby(trained.tolist()):
        place += len(list(run))
        text = tokenizer.decode(ids[:place], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        spans.append((text[len(before) :], is_trained))
        before = text
    return spans
