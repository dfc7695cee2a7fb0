"""Asks a vLLM server for its top-k log-probabilities of prompt tokens.

Tokens travel as ids both ways. Text is never decoded or encoded again, for one text has many spellings in ids: an answer
whose tokens are text is refused.

Every answer is checked against what was sent before any of it is used: a cache is read for months, and a server that
adds a token or serves another model answers as readily as the right one.

Tested against a server with the same wire format, which answers from a real model (tests/helpers/fake_server.py), and
against vLLM by `make vllm-check`.
"""

from __future__ import annotations

import re
from typing import Any

from qtarget.errors import ConfigError, raise_together
from qtarget.models.server import Refused, Served, Server, is_whole
from qtarget.teachers.server.answers import NotSpoken, Reader, Scored

# Any vocabulary of two has these ids; two lengths, to see that the server takes several prompts in a request.
_PROBE = [[0, 1], [1, 0, 1]]
_LIMIT = re.compile(
    r"logprobs?\b.*(greater than|less than|more than|at most|max[ _]?(imum|allowed|logprobs)|exceed|<=)", re.I
)


class TeacherServer:
    """Asks a completions server for the top-k log-probabilities of prompt tokens.

    Args:
        url, model, more: of ``models.server.Server``.
        k: log-probabilities per position; vLLM allows 20 unless it was started with --max-logprobs.
        vocab_size: the ids a token may have, 0 to vocab_size - 1.

    Raises:
        ConfigError: for settings that cannot work; nothing is sent yet.
    """

    def __init__(self, url: str, model: str | None = None, *, k: int, vocab_size: int, **more: Any):
        self.server = Server(url, model, **more)
        faults = []
        if not is_whole(vocab_size) or vocab_size < 2:
            faults.append(f"vocab_size is {vocab_size!r}; use the number of tokens that student and teacher share")
        elif not is_whole(k) or not 1 <= k <= vocab_size:
            faults.append(f"k is {k!r}; use a whole number from 1 to the vocabulary's {vocab_size}")
        raise_together(faults)
        self._k, self._vocab_size = k, vocab_size
        self._served: str | None = None  # the model's name, once a probe was answered as it must be

    def check(self) -> Served:
        """Ask which models are served, and by a tiny request whether the server gives log-probabilities.

        Returns:
            the served model.

        Raises:
            ConfigError: the server cannot be reached, does not serve the model, gives no prompt_logprobs with token ids,
                or allows less than k.
        """
        self._served = None
        served = self.server.served()
        try:
            self._probe(served.name)
        except Refused as refusal:
            raise self._refusal(refusal, served.name) from None
        self._served = served.name
        return served

    def score(self, sequences: list[list[int]]) -> list[Scored]:
        """Ask for all ``sequences`` in one request; the first call asks what ``check`` asks before it.

        Args:
            sequences: token ids, each sequence at least one long.

        Returns:
            a ``Scored`` for each sequence, in their order.

        Raises:
            ConfigError: the request failed for good, or the answer does not fit what was sent.
        """
        for number, ids in enumerate(sequences):
            if not len(ids):
                raise ConfigError(f"sequences[{number}] is empty; give each sequence one token or more")
            for position, token in enumerate(ids):
                if not 0 <= token < self._vocab_size:
                    raise ConfigError(
                        f"sequences[{number}] has token {token} at position {position}, outside the vocabulary of "
                        f"{self._vocab_size}; encode it with the student's tokenizer"
                    )
        if not sequences:
            return []
        served = self._served or self.check().name
        try:
            return self._ask(served, sequences)
        except Refused as refusal:
            raise self._refusal(refusal, served) from None
        except NotSpoken as lacking:
            mend = "make sure that only one server answers at that address"
            if lacking.cached:
                mend = f"start vLLM with --no-enable-prefix-caching, which answers whole prompts, and {mend}"
            raise ConfigError(
                f"prompt_logprobs was answered by {self.server.url} before and now {lacking}; {mend}"
            ) from None

    def _probe(self, served: str) -> None:
        """A tiny request whose answer must pass every check."""
        mend = "serve the teacher with vLLM"
        try:
            self._ask(served, _PROBE)
        except NotSpoken as lacking:
            why = str(lacking)
            mend += ", started with --no-enable-prefix-caching" if lacking.cached else ""
        except Refused as refusal:  # a strict server refuses a field it does not know
            if refusal.status not in (400, 422) or _LIMIT.search(refusal.message):
                raise
            why = f"it refuses with {refusal}"
        else:
            return
        raise ConfigError(
            f"server is {self.server.url!r}, which gives no prompt_logprobs with token ids ({why}); {mend}"
        )

    def _ask(self, served: str, sequences: list[list[int]]) -> list[Scored]:
        prompt = [[int(token) for token in ids] for ids in sequences]
        body = {"model": served, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        body |= {"prompt_logprobs": self._k, "add_special_tokens": False}
        choices = self.server.completions(body)
        reader = Reader(self.server.url, self._k, self._vocab_size)
        return [reader.read(choice, prompt[number], number) for number, choice in enumerate(choices)]

    def _refusal(self, refusal: Refused, served: str) -> ConfigError:
        """What to do about a status that no retry would change."""
        if refusal.status in (400, 422) and _LIMIT.search(refusal.message):
            return ConfigError(
                f"k is {self._k}, and {self.server.url} was started with a smaller --max-logprobs ({refusal}); start "
                f"it with --max-logprobs {self._k}, or ask for a smaller k"
            )
        return self.server.refusal(refusal, served)
