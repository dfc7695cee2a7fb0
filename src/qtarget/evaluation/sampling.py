"""Samples completions that depend on each sample's own seed, never on the batch.

The number that decides a token is the t-th of a counter-based generator (Philox) keyed by a hash of (run seed, task,
problem, sample). The token is read off the cumulative distribution over the real vocabulary in the order of the ids,
in float64. What is left of the batch is the rounding of the model's own logits: where that differs, a token differs only
if its uniform number lies within about that rounding of a boundary (float32: about one token in 1e5; bfloat16: one in
100, so there other batch sizes give other, equally valid samples). Greedy tokens differ at ties within rounding only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from qtarget.errors import ConfigError, loading
from qtarget.models import loading as models
from qtarget.models.frozen import load_frozen


def seed_of(run_seed: int, task: str, problem: str, sample: int) -> int:
    """63 bits that belong to one sample."""
    key = json.dumps([run_seed, task, problem, sample]).encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 1


class Uniforms:
    """The numbers in [0, 1) of one sample, by position."""

    def __init__(self, seed: int):
        self._generator = np.random.Generator(np.random.Philox(key=seed))
        self._drawn = np.empty(0)

    def __getitem__(self, position: int) -> float:
        while position >= len(self._drawn):
            self._drawn = np.concatenate([self._drawn, self._generator.random(256)])
        return float(self._drawn[position])


def choose(
    logits_bv: torch.Tensor, uniforms_b: Sequence[float | None], temperature: float, top_p: float
) -> torch.Tensor:
    """[b] ids: by inverse CDF where there is a uniform number, the likeliest where there is none.

    Args:
        logits_bv: [b, v] float. top_p: the smallest set of likeliest tokens whose probabilities reach it is kept.
    """
    greedy = logits_bv.argmax(-1)
    if all(u is None for u in uniforms_b):
        return greedy
    p_bv = (logits_bv / temperature).softmax(-1)
    if top_p < 1:
        ordered, order = p_bv.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < top_p  # the mass before a token; the first is always kept
        p_bv = torch.zeros_like(p_bv).scatter(-1, order, ordered * kept)
    cdf = p_bv.cumsum(-1)
    u_b = torch.tensor([0.0 if u is None else u for u in uniforms_b], dtype=cdf.dtype, device=cdf.device)
    # right=True: u = 0 must skip leading tokens of probability 0.
    ids = torch.searchsorted(cdf, (u_b * cdf[:, -1])[:, None], right=True)[:, 0]
    last = cdf.shape[-1] - 1 - (p_bv.flip(-1) > 0).int().argmax(-1)  # rounding may end above the last one
    drawn = torch.minimum(ids, last)
    is_greedy = torch.tensor([u is None for u in uniforms_b], device=cdf.device)
    return torch.where(is_greedy, greedy, drawn)


@dataclass(frozen=True)
class Request:
    """prompt: token ids. seed: of ``seed_of``; None decodes greedily."""

    prompt: tuple[int, ...]
    seed: int | None


@dataclass(frozen=True)
class Completion:
    """text: without special tokens. tokens: its ids' number, the end token included. finish: "stop" or "length".

    entropy: mean over its tokens of the entropy of the model's own distribution (temperature 1, real vocabulary), nats;
    None where it is unknown.
    """

    text: str
    tokens: int
    finish: str
    entropy: float | None


class _Choose(LogitsProcessor):
    """Leaves one token possible, ours; so generate() keeps every architecture's cache and we keep the choice."""

    def __init__(self, requests: Sequence[Request], vocab: int, temperature: float, top_p: float):
        self._streams = [None if request.seed is None else Uniforms(request.seed) for request in requests]
        self._vocab, self._temperature, self._top_p = vocab, temperature, top_p
        self.entropies: list[torch.Tensor] = []  # a step each: [b]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        exact = torch.float32 if scores.device.type == "mps" else torch.float64
        logits = scores[:, : self._vocab].to(exact)
        if bool(logits.isnan().any()) or bool((logits == torch.inf).any()):
            raise ConfigError("the model's logits are NaN or infinite; check its weights, or use --dtype float32")
        log_p = logits.log_softmax(-1)
        self.entropies.append(-torch.where(log_p.isinf(), 0.0, log_p.exp() * log_p).sum(-1).cpu())
        position = len(self.entropies) - 1
        uniforms = [None if stream is None else stream[position] for stream in self._streams]
        ids = choose(logits, uniforms, self._temperature, self._top_p)
        return torch.full_like(scores, -torch.inf).scatter(-1, ids[:, None], 0.0)


class Sampler:
    """A model and its tokenizer, sampling with Transformers' cached generation.

    Nothing of the model's own generation settings is used but its end tokens.

    Args:
        name, revision, dtype: the model. max_new_tokens, temperature, top_p: of every completion.
        device: where it runs.

    Raises:
        ConfigError: it cannot be loaded, or it has no end token.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        dtype: str | None = None,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        device: torch.device | None = None,
    ):
        self.tokenizer: Any = load_tokenizer(name, revision)
        self.device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        with loading("model", name):
            model: Any = load_frozen(name, revision, {"dtype": dtype} if dtype else None, self.device)
        self.model = model
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens
        self.ends = end_tokens(self.tokenizer, self.model.generation_config)
        pad = self.tokenizer.pad_token_id
        self._pad = min(self.ends) if pad is None else pad
        head: Any = self.model.get_output_embeddings()
        self._vocab = min(len(self.tokenizer), head.weight.shape[0])  # the rest of a padded head is no token
        self._settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=self._pad,
        )

    def __call__(self, requests: Sequence[Request], streamer: Any = None) -> list[Completion]:
        """One completion a request, in their order. ``streamer``: Transformers', shown the answer to a single request."""
        longest = max(len(request.prompt) for request in requests)
        ids = torch.full((len(requests), longest), self._pad)
        mask = torch.zeros_like(ids)
        for line, request in enumerate(requests):
            ids[line, longest - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[line, longest - len(request.prompt) :] = 1
        chooser = _Choose(requests, self._vocab, self.temperature, self.top_p)
        with torch.no_grad(), self._own_settings():
            out = self.model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                logits_processor=LogitsProcessorList([chooser]),
                streamer=streamer,
            )
        entropies = torch.stack(chooser.entropies, 1).tolist()  # [b][steps]
        return [
            decoded(self.tokenizer, self.ends, *line) for line in zip(out[:, longest:].tolist(), entropies, strict=True)
        ]

    @contextlib.contextmanager
    def _own_settings(self) -> Iterator[None]:
        """generate() fills what it is not given from the model's settings; so those are replaced."""
        plain = getattr(self.model, "get_base_model", lambda: self.model)()  # of an adapter
        before, plain.generation_config = plain.generation_config, self._settings
        try:
            yield
        finally:
            plain.generation_config = before


def decoded(
    tokenizer: Any, ends: frozenset[int], ids: list[int], entropies: Sequence[float] | None = None
) -> Completion:
    """A completion of its ids up to the first end token; entropies: of each id's distribution, where they are known."""
    end = next((place for place, index in enumerate(ids) if index in ends), None)
    kept = ids[: len(ids) if end is None else end + 1]
    text = tokenizer.decode(kept, skip_special_tokens=True)
    mean = None if entropies is None else round(sum(entropies[: len(kept)]) / len(kept), 6)
    return Completion(text, len(kept), "length" if end is None else "stop", mean)


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of a model, or ConfigError."""
    with loading("model", name, "tokenizer"):
        return models.load_tokenizer(name, revision)


def positions(name: str, revision: str | None = None) -> int | None:
    """How many positions a model has, told without its weights; None where that is unlimited. Raises ConfigError."""
    with loading("model", name):
        config = models.load_config(name, revision)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def generation_config(name: str, revision: str | None = None) -> Any:
    """The generation settings that a model has once it is loaded, without its weights. Raises ConfigError."""
    with loading("model", name):
        found = models.find_adapter(name, revision)
        for place, at in [(name, revision), *([] if found is None else [(found.base, found.base_revision)])]:
            with contextlib.suppress(OSError):  # it has none
                return GenerationConfig.from_pretrained(place, revision=at or "main")
        return GenerationConfig.from_model_config(models.load_config(name, revision))


def end_tokens(tokenizer: Any, generation_config: Any = None) -> frozenset[int]:
    """The tokenizer's and the model's end tokens, its padding, and what ends a turn in the chat template."""
    own = getattr(generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id, turn_end(tokenizer)}
    ends = (ends | {*(own if isinstance(own, list) else [own])}) - {None}
    if not ends:
        raise ConfigError("the tokenizer has no end token, so no answer would end; set its eos_token")
    return frozenset(ends)


def turn_end(tokenizer: Any) -> int | None:
    """The first special token that the chat template writes behind an assistant's words; None without one.

    A model that learned the template ends its answers with it, whatever its settings name: <|im_end|>, <|eot_id|>,
    <|end|>, or the next turn's <|user|>.
    """
    answer, question = "7b4e1c", "c1e4b7"  # no template writes these
    turns = [("user", question), ("assistant", answer), ("user", question)]
    try:
        text = tokenizer.apply_chat_template([{"role": r, "content": c} for r, c in turns], tokenize=False)
    except Exception:  # there is none, or it takes no such conversation, which ``tasks.prompt_ids`` says
        return None
    behind = text.rpartition(answer)[2].partition(question)[0]
    special = {word: behind.find(word) for word in {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}}
    first = min((word for word, place in special.items() if place >= 0), key=lambda word: special[word], default=None)
    return None if first is None else tokenizer.convert_tokens_to_ids(first)
