"""The same requests answered by vLLM, where it is installed; not run so far.

vLLM takes a seed per request but draws from it in its own way: its samples are other ones than Transformers', and depend
on its version. Entropies are unknown: vLLM gives log-probabilities of likely tokens only.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

from qtarget.errors import ConfigError, reason
from qtarget.evaluation.sampling import Completion, Request, end_tokens, load_tokenizer


def check() -> None:
    """Raise ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            "backend is 'vllm', but vllm is not installed; pip install 'qtarget[vllm]', or use transformers"
        )


class VllmSampler:
    """See ``sampling.Sampler``, whose interface it has."""

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        dtype: str | None = None,
        *,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ):
        check()
        from transformers import GenerationConfig
        from vllm import LLM

        self.tokenizer = load_tokenizer(name, revision)
        try:
            self._llm: Any = LLM(model=name, revision=revision, dtype=dtype or "auto")
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(f"model is {name!r}, which vLLM cannot load: {reason(error)}") from error
        try:
            own = GenerationConfig.from_pretrained(name, revision=revision or "main")
        except OSError:  # it has none
            own = None
        self.ends = end_tokens(self.tokenizer, own)
        self.temperature, self.top_p, self.max_new_tokens = temperature, top_p, max_new_tokens

    def __call__(self, requests: Sequence[Request]) -> list[Completion]:
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                temperature=0.0 if request.seed is None else self.temperature,
                top_p=1.0 if request.seed is None else self.top_p,
                seed=request.seed,
                max_tokens=self.max_new_tokens,
                stop_token_ids=sorted(self.ends),
            )
            for request in requests
        ]
        prompts = [{"prompt_token_ids": list(request.prompt)} for request in requests]
        outputs = self._llm.generate(prompts, settings, use_tqdm=False)
        return [self._completion(output.outputs[0]) for output in outputs]

    def _completion(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(text, len(ids), "stop" if output.finish_reason == "stop" else "length", None)
