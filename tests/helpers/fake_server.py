"""A completions server with vLLM's wire format on a free port, which answers from a real model and can misbehave.

with FakeServer(model) as server:
    server.faults = iter([status(503)])  # what the next requests for completions get instead of an answer
    server.tamper = list.reverse  # changes the choices of every true answer before it is sent
"""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

import tiny_models

Fault = Callable[["_Handler"], None]


class FakeServer:
    """Serves ``model`` under ``names``; use it as a context manager.

    Args:
        max_logprobs: the limit on k, as vLLM's --max-logprobs.
        speaks: whether it knows prompt_logprobs; a field it does not know is ignored.
        strict: an unknown field is refused with 400 instead.
        key: asked for as a bearer token.
        root: the folder that it says its models were loaded from. max_model_len: tokens of a prompt and its answer.
        most: answers are cut after so many tokens, as by a generation_config's max_new_tokens.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        names: Iterable[str] = ("teacher",),
        max_logprobs: int = 20,
        speaks: bool = True,
        strict: bool = False,
        key: str | None = None,
        root: str | None = None,
        max_model_len: int | None = None,
        most: int = 10**6,
    ):
        self.model, self.names, self.max_logprobs = model, list(names), max_logprobs
        self.speaks, self.strict, self.key = speaks, strict, key
        self.root, self.max_model_len, self.most = root, max_model_len, most
        self.faults: Iterator[Fault] = iter(())
        self.tamper: Callable[[list[dict[str, Any]]], object] = lambda choices: None
        self.asked: list[dict[str, Any]] = []
        """The bodies of all requests for completions, those that were not answered included."""
        self.closed = threading.Event()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"fake": self}))
        self._http.daemon_threads = True  # a client keeps its connection, and with it a thread, open
        self.url = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> FakeServer:
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()
        self._http.shutdown()
        self._http.server_close()

    def refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        """The status and the words for a request this server does not take."""
        if body["model"] not in self.names:
            return 404, f"no model {body['model']} here"
        if self.strict and not self.speaks:
            return 400, "unknown field prompt_logprobs"
        if self.max_model_len and any(len(ids) > self.max_model_len for ids in body["prompt"]):
            return 400, f"This model's maximum context length is {self.max_model_len} tokens."
        if (k := body.get("prompt_logprobs", 0)) > self.max_logprobs:
            return 400, f"prompt logprobs of {k}, which is greater than max allowed: {self.max_logprobs}."
        return None

    def complete(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        answer = self.scores if "prompt_logprobs" in body else self.sample
        return [{"index": index, "text": "", **answer(ids, body)} for index, ids in enumerate(body["prompt"])]

    @torch.no_grad()
    def scores(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        logp_nv = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        if not self.speaks:
            return {"logprobs": None}
        k = body["prompt_logprobs"]
        return {"prompt_logprobs": [None, *(_mapping(row, own, k) for row, own in zip(logp_nv, ids[1:], strict=False))]}

    @torch.no_grad()
    def sample(self, ids: list[int], body: dict[str, Any]) -> dict[str, Any]:
        """A token at a time, without a cache; drawn from a generator of the request's seed, whatever else is asked."""
        dice = None if body["seed"] is None else torch.Generator().manual_seed(body["seed"])
        drawn: list[int] = []
        ended = False
        while not ended and len(drawn) < min(body["max_tokens"], self.most):
            logits = self.model(torch.tensor([[*ids, *drawn]])).logits[0, -1].double()
            token = logits.argmax() if body["temperature"] == 0 else _draw(logits, body, dice)
            drawn.append(int(token))
            ended = drawn[-1] in body["stop_token_ids"]
        answer = {"finish_reason": "stop" if ended else "length"}
        if self.speaks and body.get("return_token_ids"):
            answer |= {"token_ids": drawn, "prompt_token_ids": ids}
        return answer


def _draw(logits_v: torch.Tensor, body: dict[str, Any], dice: torch.Generator | None) -> torch.Tensor:
    p, order = (logits_v / body["temperature"]).softmax(-1).sort(descending=True)
    p = torch.where(p.cumsum(-1) - p < body["top_p"], p, 0.0)
    return order[torch.multinomial(p, 1, generator=dice)[0]]


def _mapping(logp_v: torch.Tensor, own: int, k: int) -> dict[str, dict[str, Any]]:
    """The own token, then the k likeliest: k or k + 1 entries."""
    tokens = [own, *(int(token) for token in logp_v.topk(k).indices)]
    return {
        str(token): {
            "logprob": float(logp_v[token]),
            "rank": int((logp_v >= logp_v[token]).sum()),
            "decoded_token": _as_text(token),
        }
        for token in tokens
    }


def _as_text(token: int) -> str:
    return tiny_models.tokenizer().decode([token])


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.refused_key():
            return
        if self.path == "/version":
            return self.send(200, {"version": "0.0.fake"})
        if self.path != "/v1/models":
            return self.send(404, {"detail": "Not Found"})
        more = {"object": "model", "root": self.fake.root, "max_model_len": self.fake.max_model_len}
        self.send(200, {"object": "list", "data": [{"id": name, **more} for name in self.fake.names]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/v1/completions":
            return self.send(404, {"detail": "Not Found"})
        self.fake.asked.append(body)
        if self.refused_key():
            return
        fault = next(self.fake.faults, None)
        if fault is not None:
            return fault(self)
        refusal = self.fake.refusal(body)
        if refusal is not None:
            return self.send(refusal[0], {"error": {"message": refusal[1], "code": refusal[0]}})
        choices = self.fake.complete(body)
        self.fake.tamper(choices)
        self.send(200, {"object": "text_completion", "model": body["model"], "choices": choices})

    def refused_key(self) -> bool:
        sent = self.headers.get("Authorization")
        if self.fake.key is None or sent == f"Bearer {self.fake.key}":
            return False
        self.send(401, {"error": {"message": f"wrong key: {sent}"}})
        return True

    def send(self, status: int, answer: Any, **headers: str) -> None:
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


def status(code: int, said: str = "not now", **headers: str) -> Fault:
    """Answers with a status, as in ``status(429, Retry_After="1")``."""
    return lambda handler: handler.send(code, {"error": {"message": said}}, **headers)


def answer(content: bytes) -> Fault:
    """Answers with 200 and these bytes."""
    return lambda handler: handler.send(200, content)


def hang(handler: _Handler) -> None:
    """Gives no answer until the server is closed."""
    handler.fake.closed.wait()
    handler.close_connection = True


def reset(handler: _Handler) -> None:
    """Breaks the connection off without an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.close_connection = True


def cut(handler: _Handler) -> None:
    """Promises more bytes than it sends."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
