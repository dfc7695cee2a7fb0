"""Samples completions from a vLLM server, each request with its own seed.

Prompts and answers travel as token ids of the model's own tokenizer, so that a model reads the same and ends its turn at
the same tokens as in the process (``sampling.py``), and greedy answers are the same in float32. vLLM draws from a seed in
its own way: its samples are other ones, equally valid, and depend on its version. Entropies are unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

from qtarget.errors import ConfigError
from qtarget.evaluation.sampling import Completion, Request, decoded, end_tokens
from qtarget.models.server import Refused, Server
from qtarget.teachers.fingerprints import Model, weights_hash

LEAST_TEMPERATURE = 0.01  # vLLM puts it in place of a smaller one
# A model's generation settings are a vLLM server's defaults; a sample is drawn from the model itself.
_OFF = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


class ServedModel:
    """A server's model, before anything is asked of it.

    Args:
        url, model: see ``models.server.Server``. timeout: seconds for an answer. connections: requests at once.

    Raises:
        ConfigError: the server cannot be reached or does not serve the model.
    """

    def __init__(self, url: str, model: str | None, *, timeout: float, connections: int):
        self.server = Server(url, model, timeout=timeout, connections=connections)
        self.entry = self.server.served()

    @property
    def folder(self) -> str | None:
        """Where the server loaded the model from, if that is a folder here."""
        root = self.entry.root
        return root if root is not None and Path(root).is_dir() else None

    @property
    def name(self) -> str:
        """Of the model whose tokenizer makes the prompts, where the user names none."""
        if self.folder is None:
            raise ConfigError(
                f"model is not set, and {self.server.url} serves {self.entry.name!r}, which is not a folder here; name "
                "the folder or hub id of that model, whose tokenizer makes the prompts, as --model NAME"
            )
        return self.folder

    @property
    def room(self) -> dict[str, Any]:
        """Of ``tasks.prompts``, where the server tells it."""
        longest = self.entry.max_model_len
        return {"positions": longest, "has": "the server has --max-model-len {}"} if longest else {}

    def record(self, model: Model) -> dict[str, Any]:
        """``model`` and ``server`` of a manifest.

        Raises:
            ConfigError: the server has loaded another folder, with other weights than the named one.
        """
        weights = None if self.folder is None else weights_hash(self.folder)
        if weights is not None and weights != (model["weights"] or weights):
            raise ConfigError(
                f"model is {model['name']!r}, and {self.server.url} serves {self.folder!r}, which has other weights; "
                "serve the named model, or name the served one"
            )
        server = {"model": self.entry.name, "root": self.entry.root, "version": self.server.version()}
        return {"model": {**model, "weights": weights}, "server": server}


class ServedSampler:
    """See ``sampling.Sampler``, whose interface it has.

    Args:
        served: whom to ask. tokenizer: the model's. generation_config: its end tokens are the model's.
        max_new_tokens, temperature, top_p: of every completion.
    """

    def __init__(
        self,
        served: ServedModel,
        tokenizer: Any,
        generation_config: Any,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ):
        self._server, self._name = served.server, served.entry.name
        self.tokenizer, self.ends = tokenizer, end_tokens(tokenizer, generation_config)
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion a request, in their order; all are asked at once."""
        # A pool whose threads end with the process: no Ctrl-C waits for an answer.
        with ThreadPool(len(requests)) as pool:
            return list(pool.imap(lambda request: self._one(request, self.max_new_tokens), requests))

    def check(self, prompt: Sequence[int]) -> None:
        """Ask for one token: what would be refused later is refused before a run is begun."""
        self._one(Request(tuple(prompt), None), 1)

    def _one(self, request: Request, most: int) -> Completion:
        drawn = request.seed is not None
        body = {
            "model": self._name,
            "prompt": [list(request.prompt)],
            "max_tokens": most,
            "temperature": self.temperature if drawn else 0.0,
            "top_p": self.top_p if drawn else 1.0,
            "seed": request.seed,
            **_OFF,
            "stop_token_ids": sorted(self.ends),
            "add_special_tokens": False,
            "return_token_ids": True,
        }
        try:
            choice = self._server.completions(body)[0]
        except Refused as refusal:
            raise self._server.refusal(refusal, self._name) from None
        return self._read(choice, request, most)

    def _read(self, choice: dict[str, Any], request: Request, most: int) -> Completion:
        """The checked answer."""
        url, ids, finish = self._server.url, choice.get("token_ids"), choice.get("finish_reason")
        if not isinstance(ids, list) or not ids or not all(type(token) is int and token >= 0 for token in ids):
            raise ConfigError(
                f"server is {url!r}, which answers without token_ids; serve the model with vLLM, which gives them for "
                "return_token_ids"
            )
        if choice.get("prompt_token_ids", list(request.prompt)) != list(request.prompt):
            raise ConfigError(
                f"prompt_token_ids of the answer of {url} are not the {len(request.prompt)} tokens that were sent; start "
                "it so that it neither truncates prompts nor adds special tokens"
            )
        if finish not in ("stop", "length"):
            raise ConfigError(f"finish_reason is {finish!r} in the answer of {url}; check the server's log")
        completion = decoded(self.tokenizer, self.ends, ids)
        if finish == "stop" and completion.finish == "length":
            raise ConfigError(
                f"finish_reason is 'stop' in the answer of {url}, and its last token {ids[-1]} does not end a turn of "
                "--model; serve the model that --model names"
            )
        if completion.finish == "length" and len(ids) < most:
            raise ConfigError(
                f"max_new_tokens is {most}, and {url} cuts answers after {len(ids)} tokens; start vLLM with "
                "--generation-config vllm, or with a larger --max-model-len"
            )
        return completion
