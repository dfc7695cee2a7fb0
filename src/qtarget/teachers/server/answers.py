"""Checks a server's answers about prompt tokens against the ids that were sent.

For each position the answer has a mapping from token id to log-probability and rank; nothing precedes position 0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtarget.errors import ConfigError
from qtarget.models.server import is_whole

# A log-probability is computed in the server's precision, so that 0 and a sum of 1 may be passed by a little.
_MOST_LOGPROB, _MOST_MASS = 1e-3, 1.01
_LEAST_LOGPROB = -3e38  # below it float32 is infinite
# No softmax of a model's own logits gives less: vLLM writes -9999 for a token that a temperature of 0, top-k or top-p
# ruled out, others -1e4 or the dtype's least number.
_MASKED = -1000.0
_RAW = "start vLLM with --logprobs-mode raw_logprobs"
_ID = re.compile(r"-?[0-9]{1,18}", re.ASCII)
_SAME_MODEL = "serve a model with the student's tokenizer"


@dataclass(frozen=True)
class Scored:
    """What a server thinks of one sequence: entry i is about token i + 1, given the tokens before it.

    Nothing precedes token 0, so n = len(sequence) - 1.
    """

    ids: np.ndarray
    """[n, k] int32: the k likeliest tokens of each position, most likely first."""
    logprobs: np.ndarray
    """[n, k] float32: theirs."""
    label_logprobs: np.ndarray
    """[n] float32: of the sequence's own token, whether or not it is among the k."""


class NotSpoken(Exception):
    """The answer does not have the form that was asked for; the text says what it has.

    ``cached``: positions are missing, as they are where vLLM took the beginning of a prompt from its cache.
    """

    def __init__(self, lacking: str, cached: bool = False):
        super().__init__(lacking)
        self.cached = cached


class Reader:
    """Turns a choice of the answer into a ``Scored``, and refuses what does not fit the tokens that were sent."""

    def __init__(self, url: str, k: int, vocab_size: int):
        self.url, self.k, self.vocab_size = url, k, vocab_size

    def read(self, choice: dict[str, Any], ids: list[int], sequence: int) -> Scored:
        """The checked answer to the prompt ``ids``, which has the number ``sequence`` in the request."""
        positions, what = choice.get("prompt_logprobs"), f"prompt_logprobs of sequence {sequence}"
        if not isinstance(positions, list):
            raise NotSpoken("the answer has no such list", cached="prompt_logprobs" in choice)
        if len(positions) != len(ids):
            raise ConfigError(
                f"{what} has {len(positions)} positions where {len(ids)} tokens were sent; start {self.url} so that it "
                "neither truncates prompts nor adds special tokens, with --no-enable-prefix-caching"
            )
        if positions[0]:
            raise self._other_tokens(f"{what} has entries at position 0, which nothing precedes,")
        n = len(ids) - 1
        scored = Scored(np.empty((n, self.k), np.int32), np.empty((n, self.k), np.float32), np.empty(n, np.float32))
        for position in range(1, len(ids)):
            entries = self._entries(positions[position], what, position)
            label = ids[position]
            if label not in entries:
                raise self._other_tokens(
                    f"{what} has no such entry at position {position} where token {label} was sent,"
                )
            best = sorted(entries, key=lambda token: (-entries[token][0], entries[token][1], token))[: self.k]
            scored.ids[position - 1] = best
            scored.logprobs[position - 1] = [entries[token][0] for token in best]
            scored.label_logprobs[position - 1] = entries[label][0]
        masses = np.exp(scored.logprobs.astype(np.float64)).sum(1)
        for i in np.flatnonzero(masses > _MOST_MASS)[:1]:
            raise ConfigError(
                f"{what} gives the {self.k} likeliest tokens at position {i + 1} a probability of {masses[i]:.4g} "
                f"together, more than 1; {_RAW}"
            )
        return scored

    def _entries(self, given: Any, what: str, position: int) -> dict[int, tuple[float, int]]:
        """Log-probability and rank of each token of a position."""
        if not isinstance(given, dict):
            raise NotSpoken(f"position {position} has no mapping", cached=given is None)
        if len(given) < self.k:
            raise ConfigError(
                f"{what} has {len(given)} entries at position {position} where k is {self.k}; use a server that gives "
                f"that many (vLLM: --max-logprobs {self.k}), or ask for a smaller k"
            )
        found = {}
        for key, entry in given.items():
            if _ID.fullmatch(key) is None:
                raise NotSpoken(f"position {position} has {key!r}, which is text, not a token id")
            token = int(key)
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"{what} names token {token} at position {position}, outside the vocabulary of {self.vocab_size}; "
                    f"{_SAME_MODEL}"
                )
            fields: Any = entry if isinstance(entry, dict) else {}
            value, rank = fields.get("logprob"), fields.get("rank")
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not _LEAST_LOGPROB <= value <= _MOST_LOGPROB:  # false for NaN
                raise ConfigError(
                    f"{what} gives token {token} the log-probability {value!r} at position {position}, which is not a "
                    f"finite number of at most 0; check the served weights and their dtype, and {_RAW}"
                )
            if value <= _MASKED:
                raise ConfigError(
                    f"{what} gives token {token} the log-probability {value:g} at position {position}, which marks a "
                    f"token that was ruled out: the rest is no longer the teacher's own distribution; {_RAW}, without "
                    "a temperature, top-k or top-p of its own (--generation-config vllm)"
                )
            found[token] = (float(value), rank if is_whole(rank) else self.vocab_size)
        return found

    def _other_tokens(self, why: str) -> ConfigError:
        return ConfigError(
            f"{why} so {self.url} answers with other tokens; {_SAME_MODEL}, and let it add no special tokens"
        )
