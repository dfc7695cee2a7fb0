"""Asks a vLLM server for its top-k log-probabilities of prompt tokens.

Tokens travel as ids both ways. Text is never decoded or encoded again, for one text has many spellings in ids: an answer
whose tokens are text is refused.

Every answer is checked against what was sent before any of it is used: a cache is read for months, and a server that
adds a token or serves another model answers as readily as the right one.

Tested against a server with the same wire format, which answers from a real model (tests/helpers/fake_server.py), and not
against vLLM itself.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from qtarget import files
from qtarget.errors import ConfigError, raise_together
from qtarget.teachers.server.answers import NotSpoken, Reader, Scored, is_whole

logger = logging.getLogger(__name__)

# What may be different a moment later; every other status but 2xx is an answer, and asking again would not change it.
_RETRIED = frozenset({429, 500, 502, 503, 504})
_FIRST_RETRIES = 2  # of a server that has not answered yet: most often its address is wrong
_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more is reported instead of waited for
# Any vocabulary of two has these ids; two lengths, to see that the server takes several prompts in a request.
_PROBE = [[0, 1], [1, 0, 1]]
_LIMIT = re.compile(
    r"logprobs?\b.*(greater than|less than|more than|at most|max[ _]?(imum|allowed|logprobs)|exceed|<=)", re.I
)


@dataclass(eq=False)
class _Refused(Exception):
    """A status that is not worth a second try, with the server's own words."""

    status: int
    message: str

    def __str__(self) -> str:
        return f'{self.status}, "{self.message}"' if self.message else str(self.status)


class TeacherServer:
    """Asks a completions server for the top-k log-probabilities of prompt tokens.

    A request that fails for a reason that may pass (429, 500, 502, 503, 504, a connection refused or reset, no answer in
    time, an answer that is not JSON) is sent again after 1, 2, 4, ... seconds, or later where the server asks for it
    with Retry-After.

    Args:
        url: the server's address, with or without /v1 at its end.
        model: the served model's name; None where the server has only one.
        k: log-probabilities per position; vLLM allows 20 unless it was started with --max-logprobs.
        api_key: sent as a bearer token; None reads OPENAI_API_KEY. It is in no message and no log.
        timeout: seconds the server may take to connect, and then between two pieces of an answer.
        retries: how often a failed request is sent again.
        vocab_size: the ids a token may have, 0 to vocab_size - 1.

    Raises:
        ConfigError: for settings that cannot work; nothing is sent yet.
    """

    _backoff = 1.0  # seconds before the first retry; doubled for each one after it

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        k: int,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        vocab_size: int,
    ):
        key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
        faults = _url_faults(url)
        if not is_whole(vocab_size) or vocab_size < 2:
            faults.append(f"vocab_size is {vocab_size!r}; use the number of tokens that student and teacher share")
        elif not is_whole(k) or not 1 <= k <= vocab_size:
            faults.append(f"k is {k!r}; use a whole number from 1 to the vocabulary's {vocab_size}")
        if not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            faults.append(f"timeout is {timeout!r}; use a number of seconds above 0")
        if not is_whole(retries) or retries < 0:
            faults.append(f"retries is {retries!r}; use a whole number from 0")
        if not all("!" <= letter <= "~" for letter in key):
            # the value stays out of the message: most of it may be a key
            faults.append("api_key holds a space or a letter that no HTTP header can carry; copy the key again")
        raise_together(faults)
        self._url = url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"
        self._model = model
        self._k, self._vocab_size = k, vocab_size
        self._timeout, self._retries = timeout, retries
        self._key = key
        self._served: str | None = None  # the model's name, once a probe was answered as it must be
        self._session = requests.Session()
        # As a callable and not a header: requests would replace a header by what ~/.netrc has for the host.
        self._session.auth = self._sign

    def check(self) -> str:
        """Ask which models are served, and by a tiny request whether the server gives log-probabilities.

        Returns:
            the served model's name.

        Raises:
            ConfigError: the server cannot be reached, does not serve the model, gives no prompt_logprobs with token ids,
                or allows less than k.
        """
        served = self._served = None
        try:
            served = self._choose(self._request("/models", retries=min(self._retries, _FIRST_RETRIES)))
            self._probe(served)
        except _Refused as refusal:
            raise self._refusal(refusal, served) from None
        self._served = served
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
        served = self._served or self.check()
        try:
            return self._ask(served, sequences)
        except _Refused as refusal:
            raise self._refusal(refusal, served) from None
        except NotSpoken as lacking:
            mend = "let no other server answer at that address"
            if lacking.cached:
                mend = f"start vLLM with --no-enable-prefix-caching, which answers whole prompts, and {mend}"
            raise ConfigError(f"prompt_logprobs was answered by {self._url} before and now {lacking}; {mend}") from None

    def _choose(self, listed: Any) -> str:
        """The name to ask for, from the answer of /v1/models."""
        data = listed.get("data") if isinstance(listed, dict) else None
        entries = data if isinstance(data, list) else []
        names = [entry["id"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
        if not names:
            raise ConfigError(
                f"url is {self._url!r}, which lists no model at /models; give the address of a vLLM server"
            )
        if self._model is None:
            if len(names) > 1:
                raise ConfigError(f"model is not set and {self._url} serves {', '.join(names)}; name one of them")
            return names[0]
        if self._model not in names:
            raise ConfigError(
                f"model is {self._model!r}, which {self._url} does not serve; name one of: {', '.join(names)}"
            )
        return self._model

    def _probe(self, served: str) -> None:
        """A tiny request whose answer must pass every check."""
        mend = "serve the teacher with vLLM"
        try:
            self._ask(served, _PROBE)
        except NotSpoken as lacking:
            why = str(lacking)
            mend += ", started with --no-enable-prefix-caching" if lacking.cached else ""
        except _Refused as refusal:  # a strict server refuses a field it does not know
            if refusal.status not in (400, 422) or _LIMIT.search(refusal.message):
                raise
            why = f"it refuses with {refusal}"
        else:
            return
        raise ConfigError(f"url is {self._url!r}, which gives no prompt_logprobs with token ids ({why}); {mend}")

    def _ask(self, served: str, sequences: list[list[int]]) -> list[Scored]:
        prompt = [[int(token) for token in ids] for ids in sequences]
        body = {"model": served, "prompt": prompt, "max_tokens": 1, "temperature": 0}
        body |= {"prompt_logprobs": self._k, "add_special_tokens": False}
        choices = self._in_order(self._request("/completions", body), len(prompt))
        reader = Reader(self._url, self._k, self._vocab_size)
        return [reader.read(choice, prompt[number], number) for number, choice in enumerate(choices)]

    def _in_order(self, answer: Any, sent: int) -> list[dict[str, Any]]:
        """The choices in the order of the prompts, which an answer need not keep."""
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise ConfigError(
                f"choices is missing from the answer of {self._url} ({self._shown(json.dumps(answer))}); give the "
                "address of a vLLM server"
            )
        indices = [choice.get("index") for choice in choices]
        order = {index: choice for index, choice in zip(indices, choices, strict=True) if is_whole(index)}
        if len(choices) != sent or order.keys() != set(range(sent)):
            raise ConfigError(
                f"choices has index {indices} in the answer of {self._url} where {sent} prompts were sent; use a server "
                "that takes several prompts of token ids in a request"
            )
        return [order[index] for index in range(sent)]

    def _request(self, path: str, body: dict[str, Any] | None = None, retries: int | None = None) -> Any:
        """The JSON of an answer; a GET without ``body``. ``retries``: in place of the client's own number.

        Raises:
            _Refused: the server has answered, and would answer the same again.
            ConfigError: every try failed.
        """
        happened = mend = ""
        retries = self._retries if retries is None else retries
        for attempt in range(1, retries + 2):
            pause = 0.0
            try:
                response = self._session.request(
                    "GET" if body is None else "POST",
                    self._url + path,
                    json=body,
                    timeout=self._timeout,
                    # a redirected POST becomes a GET, and a proxy's log-in page an answer
                    allow_redirects=False,
                )
            except requests.exceptions.SSLError as error:
                raise ConfigError(
                    f"url is {self._url!r}, whose certificate is refused ({self._shown(_root(error))}); mend the "
                    "address, or name the authority's file in REQUESTS_CA_BUNDLE"
                ) from None
            except requests.exceptions.Timeout:
                happened = f"gives no answer within {self._timeout:g} s"
                mend = "raise timeout, send fewer sequences at a time, or look whether the server hangs"
            except (
                requests.exceptions.ConnectionError,
                requests.exceptions.ChunkedEncodingError,
                requests.exceptions.ContentDecodingError,
            ) as error:
                happened = f"cannot be reached ({self._shown(_root(error))})"
                mend = "start the server, or mend the address"
            except requests.exceptions.RequestException as error:
                raise ConfigError(
                    f"url is {self._url!r}, which cannot be asked ({self._shown(str(error))}); mend the address"
                ) from None
            else:
                if response.status_code in _RETRIED:
                    happened = f"answers {_Refused(response.status_code, self._said(response))}"
                    mend = "look into the server's log"
                    if response.status_code == 429:
                        mend = "wait, or send fewer sequences at a time"
                    pause = _retry_after(response.headers.get("Retry-After"))
                elif not 200 <= response.status_code < 300:
                    raise _Refused(response.status_code, self._said(response))
                else:
                    try:
                        return files.loads(response.content)
                    except ValueError:
                        happened = "answers with what is not JSON"
                        mend = "give the address of the server itself and not of a page in front of it"
            if pause > _LONGEST_RETRY_AFTER:
                raise ConfigError(f"url is {self._url!r}, which {happened} and asks to wait {pause:.0f} s; start later")
            if attempt <= retries:
                wait = max(pause, min(self._backoff * 2 ** (attempt - 1), _LONGEST_BACKOFF))
                logger.warning(
                    "%s %s; asking again in %.1f s (retry %d of %d)", self._url, happened, wait, attempt, retries
                )
                time.sleep(wait)
        tries = "1 try" if not retries else f"{retries + 1} tries"
        raise ConfigError(f"url is {self._url!r}, which {happened} after {tries}; {mend}")

    def _refusal(self, refusal: _Refused, served: str | None) -> ConfigError:
        """What to do about a status that no retry would change; ``served``: the model's name, once it is known."""
        if refusal.status in (400, 422) and _LIMIT.search(refusal.message):
            return ConfigError(
                f"k is {self._k}, and {self._url} was started with a smaller --max-logprobs ({refusal}); start it with "
                f"--max-logprobs {self._k}, or ask for a smaller k"
            )
        if refusal.status in (401, 403):
            got = f"is refused by {self._url}" if self._key else f"is not set and {self._url} asks for one"
            return ConfigError(f"api_key {got} ({refusal}); pass the server's key as api_key or in OPENAI_API_KEY")
        if refusal.status == 404 and served is not None:
            return ConfigError(
                f"model is {served!r}, for which {self._url} has no completions ({refusal}); serve it with "
                "vLLM, or name another model"
            )
        if refusal.status == 404 or 300 <= refusal.status < 400:
            return ConfigError(
                f"url is {self._url!r}, where no completions server answers ({refusal}); give the address of a vLLM "
                "server"
            )
        return ConfigError(
            f"url is {self._url!r}, which refuses the request ({refusal}); mend what it names, as sequences that are "
            "longer than its --max-model-len allows"
        )

    def _said(self, response: requests.Response) -> str:
        """The server's own message, on one line."""
        message: Any = response.text
        with contextlib.suppress(ValueError):
            answer = files.loads(response.content)
            if isinstance(answer, dict):
                error = answer.get("error")
                nested = error.get("message") if isinstance(error, dict) else error
                message = nested or answer.get("message") or answer.get("detail") or message
        return self._shown(message if isinstance(message, str) else json.dumps(message))

    def _shown(self, text: str) -> str:
        """On one line, short, and without the key, which some servers repeat."""
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split()).rstrip(".")
        return text if len(text) <= 300 else text[:300] + " ..."

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request


def _url_faults(url: Any) -> list[str]:
    mend = "write it as http://localhost:8000"
    if not isinstance(url, str):
        return [f"url is {url!r}; {mend}"]
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    else:
        if parts.username is not None or parts.query or parts.fragment:
            # not shown: what follows is often a secret
            return ["url holds a user name or a query; give the address alone, and a key as api_key"]
    return [] if usable else [f"url is {url!r}; {mend}"]


def _root(error: BaseException) -> str:
    """What the system said, under the layers of two libraries that wrap it."""
    cause = error.__cause__ or error.__context__
    return (_root(cause) if cause else "") or getattr(error, "strerror", None) or str(error)


def _retry_after(value: str | None) -> float:
    """Seconds a server asks to wait: a number or a date; 0 where it asks for nothing readable."""
    with contextlib.suppress(InvalidHeader):
        return 0.0 if value is None else Retry().parse_retry_after(value)
    return 0.0
