"""A model behind an inference server: which it serves, and retries where they help.

What is asked and what an answer must hold is the callers': a teacher's log-probabilities
(``teachers/server/client.py``), samples (``evaluation/served.py``).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader
from urllib3.util import Retry

from qtarget import files
from qtarget.errors import ConfigError, raise_together

logger = logging.getLogger(__name__)

# What may be different a moment later; every other status but 2xx is an answer, and asking again would not change it.
_RETRIED = frozenset({429, 500, 502, 503, 504})
_FIRST_RETRIES = 2  # of a server that has not answered yet: most often its address is wrong
_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more is reported instead of waited for


@dataclass(eq=False)
class Refused(Exception):
    """A status that is not worth a second try, with the server's own words."""

    status: int
    message: str

    def __str__(self) -> str:
        return f'{self.status}, "{self.message}"' if self.message else str(self.status)


@dataclass(frozen=True)
class Served:
    """An entry of /v1/models.

    Attributes:
        name: what requests call the model. root: the folder or hub id it was loaded from, where the server tells it.
        max_model_len: the most tokens of a prompt and its answer; None where that is unknown.
    """

    name: str
    root: str | None
    max_model_len: int | None


class Server:
    """A completions server with OpenAI's interface.

    A request that fails for a reason that may pass (429, 500, 502, 503, 504, a connection refused or reset, no answer in
    time, an answer that is not JSON) is sent again after 1, 2, 4, ... seconds, or later where the server asks for it
    with Retry-After. Several threads may ask at once.

    Args:
        url: the server's address, with or without /v1 at its end.
        model: the served model's name; None where the server has only one.
        api_key: sent as a bearer token; None reads OPENAI_API_KEY. It is in no message and no log.
        timeout: seconds the server may take to connect, and then between two pieces of an answer.
        retries: how often a failed request is sent again.
        connections: requests at once.

    Raises:
        ConfigError: for settings that cannot work; nothing is sent yet.
    """

    backoff = 1.0  # seconds before the first retry; doubled for each one after it

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        retries: int = 6,
        connections: int = 1,
    ):
        key = (os.environ.get("OPENAI_API_KEY", "") if api_key is None else api_key).strip()
        faults = _url_faults(url)
        if not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
            faults.append(f"server_timeout is {timeout!r}; use a number of seconds above 0")
        if not is_whole(retries) or retries < 0:
            faults.append(f"retries is {retries!r}; use a whole number from 0")
        if not all("!" <= letter <= "~" for letter in key):
            # the value stays out of the message: most of it may be a key
            faults.append(
                "api_key holds a space or another character that an HTTP header cannot carry; copy the key again"
            )
        raise_together(faults)
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/") + "/v1"
        self._model = model
        self._timeout, self._retries = timeout, retries
        self._key = key
        self._warned = ""
        self._session = requests.Session()
        # As a callable and not a header: requests would replace a header by what ~/.netrc has for the host.
        self._session.auth = self._sign
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=connections))

    def served(self) -> Served:
        """The model to ask for, as the server lists it.

        Raises:
            ConfigError: the server does not serve it, or serves several and none is named.
        """
        try:
            listed = self._request(f"{self.url}/models", retries=min(self._retries, _FIRST_RETRIES))
        except Refused as refusal:
            raise self.refusal(refusal, None) from None
        data = listed.get("data") if isinstance(listed, dict) else None
        entries = {
            entry["id"]: entry
            for entry in (data if isinstance(data, list) else [])
            if isinstance(entry, dict) and isinstance(entry.get("id"), str)
        }
        names = ", ".join(entries)
        if not entries:
            raise ConfigError(
                f"server is {self.url!r}, which lists no model at /models; give the address of a vLLM server"
            )
        if self._model is None and len(entries) > 1:
            raise ConfigError(f"server_model is not set and {self.url} serves {names}; name one of them")
        name = self._model or next(iter(entries))
        if name not in entries:
            raise ConfigError(f"server_model is {name!r}, which {self.url} does not serve; name one of: {names}")
        root, longest, parent = (entries[name].get(field) for field in ("root", "max_model_len", "parent"))
        if longest is None and parent in entries:  # an adapter, which has its base's
            longest = entries[parent].get("max_model_len")
        return Served(name, root if isinstance(root, str) else None, longest if is_whole(longest) else None)

    def version(self) -> str | None:
        """Of the server's program; None where it does not tell."""
        with contextlib.suppress(Refused, ConfigError):
            answer = self._request(f"{self.url.removesuffix('/v1')}/version", retries=0)
            if isinstance(answer, dict) and isinstance(answer.get("version"), str):
                return answer["version"]
        return None

    def completions(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The choices of an answer, in the order of the prompts, which the answer need not keep.

        Args:
            body: of the request; ``prompt`` is a list of prompts in token ids.

        Raises:
            Refused: see ``refusal``. ConfigError: every try failed, or the choices are not those of the prompts.
        """
        answer, sent = self._request(f"{self.url}/completions", body), len(body["prompt"])
        choices = answer.get("choices") if isinstance(answer, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise ConfigError(
                f"choices is missing from the answer of {self.url} ({self._shown(json.dumps(answer))}); give the "
                "address of a vLLM server"
            )
        indices = [choice.get("index") for choice in choices]
        order = {index: choice for index, choice in zip(indices, choices, strict=True) if is_whole(index)}
        if len(choices) != sent or order.keys() != set(range(sent)):
            raise ConfigError(
                f"choices has index {indices} in the answer of {self.url} where {sent} prompts were sent; use a server "
                "that takes several prompts of token ids in a request"
            )
        return [order[index] for index in range(sent)]

    def _request(self, address: str, body: dict[str, Any] | None = None, retries: int | None = None) -> Any:
        """The JSON of an answer; a GET without ``body``. ``retries``: in place of the client's own number.

        Raises:
            Refused: the server has answered, and would answer the same again.
            ConfigError: every try failed.
        """
        happened = mend = ""
        retries = self._retries if retries is None else retries
        for attempt in range(1, retries + 2):
            pause = 0.0
            try:
                response = self._session.request(
                    "GET" if body is None else "POST",
                    address,
                    json=body,
                    timeout=self._timeout,
                    # a redirected POST becomes a GET, and a proxy's log-in page an answer
                    allow_redirects=False,
                )
            except requests.exceptions.SSLError as error:
                raise ConfigError(
                    f"server is {self.url!r}, whose certificate is refused ({self._shown(_root(error))}); fix the "
                    "address, or name the authority's file in REQUESTS_CA_BUNDLE"
                ) from None
            except requests.exceptions.Timeout:
                happened = f"gives no answer within {self._timeout:g} s"
                mend = "raise server_timeout, use a smaller batch_size, or check whether the server hangs"
            except (
                requests.exceptions.ConnectionError,
                requests.exceptions.ChunkedEncodingError,
                requests.exceptions.ContentDecodingError,
            ) as error:
                happened = f"cannot be reached ({self._shown(_root(error))})"
                mend = "start the server, or fix the address"
            except requests.exceptions.RequestException as error:
                raise ConfigError(
                    f"server is {self.url!r}, which cannot be asked ({self._shown(str(error))}); fix the address"
                ) from None
            else:
                if response.status_code in _RETRIED:
                    happened = f"answers {Refused(response.status_code, self._said(response))}"
                    mend = "check the server's log"
                    if response.status_code == 429:
                        mend = "wait, or use a smaller batch_size"
                    pause = _retry_after(response.headers.get("Retry-After"))
                elif not 200 <= response.status_code < 300:
                    raise Refused(response.status_code, self._said(response))
                else:
                    try:
                        return files.loads(response.content)
                    except ValueError:
                        happened = "answers with what is not JSON"
                        mend = "give the address of the server itself and not of a page in front of it"
            if pause > _LONGEST_RETRY_AFTER:
                raise ConfigError(
                    f"server is {self.url!r}, which {happened} and asks to wait {pause:.0f} s; try again later"
                )
            if attempt <= retries:
                wait = max(pause, min(self.backoff * 2 ** (attempt - 1), _LONGEST_BACKOFF))
                told = f"{self.url} {happened}; retrying in {wait:.1f} s (retry {attempt} of {retries})"
                if told != self._warned:  # threads that wait for the same server say it once
                    logger.warning("%s", told)
                self._warned = told
                time.sleep(wait)
        tries = "1 try" if not retries else f"{retries + 1} tries"
        raise ConfigError(f"server is {self.url!r}, which {happened} after {tries}; {mend}")

    def refusal(self, refusal: Refused, served: str | None) -> ConfigError:
        """What to do about a status that no retry would change; ``served``: the model's name, once it is known."""
        if refusal.status in (401, 403):
            got = f"is refused by {self.url}" if self._key else f"is not set and {self.url} requires one"
            return ConfigError(f"api_key {got} ({refusal}); pass the server's key as api_key or in OPENAI_API_KEY")
        if refusal.status == 404 and served is not None:
            return ConfigError(
                f"server_model is {served!r}, for which {self.url} has no completions ({refusal}); serve it with "
                "vLLM, or name another model"
            )
        if refusal.status == 404 or 300 <= refusal.status < 400:
            return ConfigError(
                f"server is {self.url!r}, where no completions server answers ({refusal}); give the address of a vLLM "
                "server"
            )
        return ConfigError(
            f"server is {self.url!r}, which refuses the request ({refusal}); fix what it names, such as sequences "
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
        return [f"server is {url!r}; {mend}"]
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    else:
        if parts.username is not None or parts.query or parts.fragment:
            # not shown: what follows is often a secret
            return ["server holds a user name or a query; give only the address, and the key as api_key"]
    return [] if usable else [f"server is {url!r}; {mend}"]


def _root(error: BaseException) -> str:
    """What the system said, under the layers of two libraries that wrap it."""
    cause = error.__cause__ or error.__context__
    return (_root(cause) if cause else "") or getattr(error, "strerror", None) or str(error)


def _retry_after(value: str | None) -> float:
    """Seconds a server asks to wait: a number or a date; 0 where it asks for nothing readable."""
    with contextlib.suppress(InvalidHeader):
        return 0.0 if value is None else Retry().parse_retry_after(value)
    return 0.0


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
