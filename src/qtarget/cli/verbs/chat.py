"""``qtarget chat``: chat with a model or an adapter in the terminal.

Each answer is shown as it is generated; Ctrl-D ends. The model reads the whole conversation through its chat template;
a model without a template continues each text on its own. With --prompt, or with lines from a pipe, only answers are
printed. Answers are generated as ``qtarget eval`` does: greedy, or sampled at a --temperature.
"""

# The prompt is this project's own thirty lines: ``transformers chat`` talks to a server that has to be started first, and
# its options are not those of ``qtarget eval``. The stream is Transformers' TextStreamer; its TextIteratorStreamer would
# need a thread, in which Ctrl-C stops nothing.

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from qtarget.cli import terminal
from qtarget.cli.arguments import NAME, TEXT, Option, Verb, number, one_of, only, whole
from qtarget.errors import ConfigError, reason

VERB = Verb("chat", __doc__)


@VERB.command(
    Option("prompt", "answer this and exit", TEXT),
    Option("system", "the system message", TEXT),
    Option("max_new_tokens", "the longest answer, in tokens", whole(1), 512),
    Option("temperature", "sampling temperature; 0: greedy", number(0), 0),
    Option("seed", "seed of the sampling", whole(0), 0),
    Option("dtype", "precision of the weights", one_of("float32", "bfloat16", "float16", "auto")),
    Option("revision", "branch, tag or commit of the model", NAME),
    takes="MODEL",
)
def chat(options: Any) -> int:
    name = only(options.words, "one model, as in: qtarget chat runs/quickstart")
    if options.prompt is not None and not options.prompt.strip():
        raise ConfigError(f"prompt is {options.prompt!r}; write what the model should answer")
    terminal.refuse_processes("qtarget chat")
    talk = Talk(name, options)
    if options.prompt is not None:
        talk.answer(options.prompt)
        return 0
    shown = sys.stdin.isatty()
    if shown:
        print(f"{name}: {talk.manner}; Ctrl-D ends")
    with contextlib.suppress(KeyboardInterrupt):
        for text in _typed("> " if shown else ""):
            talk.answer(text)
    return 0


def _typed(mark: str) -> Iterator[str]:
    """Lines that say something, to the end of input."""
    if mark:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  arrow keys and history
    with contextlib.suppress(EOFError):
        while True:
            if text := input(mark).strip():
                yield text
    if mark:
        print()


class Talk:
    """A conversation with a model.

    Args:
        name: of the model. options: of the verb.

    Raises:
        ConfigError: the model cannot be loaded, or a system message is given that no template would show it.
    """

    def __init__(self, name: str, options: Any):
        from transformers.utils import logging

        from qtarget.evaluation.sampling import Sampler, load_tokenizer

        has_template = bool(load_tokenizer(name, options.revision).chat_template)
        if options.system is not None and not has_template:
            raise ConfigError(f"system is {options.system!r}, but {name} has no chat template; put it into the prompt")
        logging.disable_progress_bar()
        more = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature or 1.0, "top_p": 1.0}
        self.sampler = Sampler(name, options.revision, options.dtype, **more)
        self.positions = getattr(self.sampler.model.config.get_text_config(), "max_position_embeddings", None)
        self.has_template, self.options = has_template, options
        self.start = [] if options.system is None else [{"role": "system", "content": options.system}]
        self.turns: list[dict[str, str]] = []

    @property
    def manner(self) -> str:
        """How it answers, in words."""
        drawn = f"sampled at temperature {self.options.temperature:g}" if self.options.temperature else "greedy"
        return f"{drawn}, {'chat template' if self.has_template else 'no chat template, so it continues each text'}"

    def answer(self, text: str) -> str:
        """Print the answer as it comes, and keep it in the conversation. Raises ConfigError where there is no room."""
        from transformers import TextStreamer

        from qtarget.evaluation.sampling import Request, seed_of

        self.turns.append({"role": "user", "content": text})
        ids = self._fitting()
        drawn = seed_of(self.options.seed, "chat", text, len(self.turns)) if self.options.temperature else None
        streamer = TextStreamer(self.sampler.tokenizer, skip_prompt=True, skip_special_tokens=True)
        said: str = self.sampler([Request(tuple(ids), drawn)], streamer)[0].text
        self.turns.append({"role": "assistant", "content": said})
        return said

    def _fitting(self) -> list[int]:
        """Ids of the conversation, of which the oldest turns are left out where it is too long."""
        room = None if self.positions is None else self.positions - self.options.max_new_tokens
        while room is not None and len(self._ids()) > room and len(self.turns) > 1 and self.has_template:
            del self.turns[:2]
            print("note: the conversation is too long; its first turn is dropped", file=sys.stderr)
        ids = self._ids()
        if not ids:
            raise ConfigError(f"prompt is {self.turns[-1]['content']!r}, which has no tokens; write more")
        if room is not None and len(ids) > room:
            raise ConfigError(
                f"max_new_tokens is {self.options.max_new_tokens}, and the prompt has {len(ids)} tokens; the model has "
                f"{self.positions} positions: shorten the prompt or lower max_new_tokens"
            )
        return ids

    def _ids(self) -> list[int]:
        tokenizer = self.sampler.tokenizer
        if not self.has_template:
            return list(tokenizer(self.turns[-1]["content"])["input_ids"])
        try:
            made = tokenizer.apply_chat_template(self.start + self.turns, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # templates raise many kinds
            raise ConfigError(f"the chat template cannot be applied to this conversation: {reason(error)}") from error
        return list(made["input_ids"])
