"""What a completions server answers about prompt tokens, in two forms, checked against the ids that were sent.

prompt_logprobs   vLLM's extension: for each position a mapping from token id to log-probability
echo              the prompt comes back with its log-probabilities, its tokens written as "token_id:123"
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qtarget.errors import ConfigError

# A log-probability is computed in the server's precision, so that 0 and a sum of 1 may be passed by a little.
_MOST_LOGPROB, _MOST_MASS = 1e-3, 1.01
_LEAST_LOGPROB = -3e38  # below it float32 is infinite; vLLM writes -9999 for a token that cannot be
_TOKEN_ID = re.compile(r"token_id:(-?[0-9]{1,18})", re.ASCII)
_BARE_ID = re.compile(r"(-?[0-9]{1,18})", re.ASCII)
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
    """The answer does not have the form that was asked for; the text says what it has."""


class Reader(ABC):
    """Turns a choice of the answer into a ``Scored``, and refuses what does not fit the tokens that were sent."""

    name: str

    @staticmethod
    @abstractmethod
    def fields(k: int) -> dict[str, Any]:
        """Of the request."""

    @abstractmethod
    def read(self, choice: dict[str, Any], ids: list[int], sequence: int) -> Scored:
        """The checked answer to the prompt ``ids``, which has the number ``sequence`` in the request."""

    def __init__(self, url: str, k: int, vocab_size: int):
        self.url, self.k, self.vocab_size = url, k, vocab_size

    def count(self, got: int, wanted: int, sequence: int, field: str) -> None:
        if got != wanted:
            raise ConfigError(
                f"{field} of sequence {sequence} has {got} positions where {wanted} tokens were sent; start {self.url} "
                "so that it neither truncates prompts nor adds special tokens"
            )

    def other_token(self, got: str, wanted: int, sequence: int, position: int) -> ConfigError:
        return ConfigError(
            f"{self.name} of sequence {sequence} {got} at position {position} where token {wanted} was sent, so "
            f"{self.url} answers with other tokens; {_SAME_MODEL}, and let it add no special tokens"
        )

    def token(self, matched: re.Match[str], sequence: int, position: int) -> int:
        token = int(matched[1])
        if not 0 <= token < self.vocab_size:
            raise ConfigError(
                f"{self.name} of sequence {sequence} names token {token} at position {position}, outside the vocabulary "
                f"of {self.vocab_size}; {_SAME_MODEL}"
            )
        return token

    def logprob(self, value: Any, token: int, sequence: int, position: int) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not _LEAST_LOGPROB <= value <= _MOST_LOGPROB:  # false for NaN
            raise ConfigError(
                f"{self.name} of sequence {sequence} gives token {token} the log-probability {value!r} at position "
                f"{position}, which is no finite number of at most 0; look into the served weights and their dtype, and "
                "start vLLM with --logprobs-mode raw_logprobs"
            )
        return float(value)

    def scored(self, found: list[dict[int, tuple[float, int]]], own: list[int], sequence: int) -> Scored:
        """From log-probability and rank of each token at positions 1, 2, ...; the own tokens are among them."""
        n, k = len(found), self.k
        ids = np.empty((n, k), np.int32)
        logprobs = np.empty((n, k), np.float32)
        labels = np.empty(n, np.float32)
        for i, (entries, label) in enumerate(zip(found, own, strict=True)):
            best = sorted(entries, key=lambda token: (-entries[token][0], entries[token][1], token))[:k]
            ids[i] = best
            logprobs[i] = [entries[token][0] for token in best]
            labels[i] = entries[label][0]
        masses = np.exp(logprobs.astype(np.float64)).sum(1)
        for i in np.flatnonzero(masses > _MOST_MASS)[:1]:
            raise ConfigError(
                f"{self.name} of sequence {sequence} gives the {k} likeliest tokens at position {i + 1} a probability of "
                f"{masses[i]:.4g} together, more than 1; start vLLM with --logprobs-mode raw_logprobs"
            )
        return Scored(ids, logprobs, labels)

    def enough(self, entries: Mapping[Any, Any], sequence: int, position: int) -> None:
        if len(entries) < self.k:
            raise ConfigError(
                f"{self.name} of sequence {sequence} has {len(entries)} entries at position {position} where k is "
                f"{self.k}; use a server that gives so many (vLLM: --max-logprobs {self.k}), or ask for a smaller k"
            )


class _PromptLogprobs(Reader):
    name = "prompt_logprobs"

    @staticmethod
    def fields(k: int) -> dict[str, Any]:
        return {"prompt_logprobs": k, "add_special_tokens": False}

    def read(self, choice: dict[str, Any], ids: list[int], sequence: int) -> Scored:
        positions = choice.get("prompt_logprobs")
        if not isinstance(positions, list):
            raise NotSpoken("the answer has no such list")
        self.count(len(positions), len(ids), sequence, self.name)
        if positions[0]:
            raise ConfigError(
                f"{self.name} of sequence {sequence} has entries at position 0, which nothing precedes, so {self.url} "
                f"answers with other tokens; {_SAME_MODEL}, and let it add no special tokens"
            )
        found = []
        for position in range(1, len(ids)):
            entries = positions[position]
            if not isinstance(entries, dict):
                raise NotSpoken(f"position {position} has no mapping")
            self.enough(entries, sequence, position)
            found.append(self._position(entries, sequence, position))
            if ids[position] not in found[-1]:
                raise self.other_token("has no such entry", ids[position], sequence, position)
        return self.scored(found, ids[1:], sequence)

    def _position(self, entries: dict[str, Any], sequence: int, position: int) -> dict[int, tuple[float, int]]:
        """Log-probability and rank of each token."""
        found = {}
        for key, entry in entries.items():
            matched = _BARE_ID.fullmatch(key)
            if matched is None:
                raise NotSpoken(f"position {position} has {key!r}, which is text and no token id")
            token = self.token(matched, sequence, position)
            given = entry if isinstance(entry, dict) else {}
            rank = given["rank"] if is_whole(given.get("rank")) else self.vocab_size
            found[token] = (
                self.logprob(given.get("logprob"), token, sequence, position),
                rank,
            )
        return found


class _Echo(Reader):
    name = "echo"

    @staticmethod
    def fields(k: int) -> dict[str, Any]:
        return {"echo": True, "logprobs": k, "return_tokens_as_token_ids": True, "add_special_tokens": False}

    def read(self, choice: dict[str, Any], ids: list[int], sequence: int) -> Scored:
        given = choice.get("logprobs")
        if not isinstance(given, dict):
            raise NotSpoken("the answer has no logprobs")
        lists = {field: given.get(field) for field in ("tokens", "token_logprobs", "top_logprobs")}
        for field, values in lists.items():
            if not isinstance(values, list):
                raise NotSpoken(f"logprobs has no list of {field}")
            # One more is the token generated after the prompt; a server may leave it out.
            wanted = len(ids) + (len(values) == len(ids) + 1)
            self.count(len(values), wanted, sequence, f"{field} of {self.name}")
        tokens, own, top = lists.values()
        assert tokens is not None and own is not None and top is not None
        for position, wanted in enumerate(ids):
            token = self.token(_as_id(tokens[position]), sequence, position)
            if token != wanted:
                raise self.other_token(f"has token {token}", wanted, sequence, position)
        found = []
        for position in range(1, len(ids)):
            if not isinstance(top[position], dict):
                raise NotSpoken(f"top_logprobs has no mapping at position {position}")
            self.enough(top[position], sequence, position)
            entries = {}
            for key, value in top[position].items():
                token = self.token(_as_id(key), sequence, position)
                entries[token] = (self.logprob(value, token, sequence, position), 0)
            label = ids[position]
            mine = self.logprob(own[position], label, sequence, position)
            if abs(entries.setdefault(label, (mine, 0))[0] - mine) > 1e-3:
                raise ConfigError(
                    f"{self.name} of sequence {sequence} gives token {label} the log-probabilities {mine:.6g} and "
                    f"{entries[label][0]:.6g} at position {position}; use a server whose two lists agree, such as vLLM"
                )
            found.append(entries)
        return self.scored(found, ids[1:], sequence)


FORMS: tuple[type[Reader], ...] = (_PromptLogprobs, _Echo)


def _as_id(token: Any) -> re.Match[str]:
    """A token written as token_id:123. A bare number may be the text of a digit."""
    matched = _TOKEN_ID.fullmatch(token) if isinstance(token, str) else None
    if matched is None:
        raise NotSpoken(f"tokens are text and no token ids, as {token!r}")
    return matched


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
