"""Greedy answers to a run's prompts, and the model's next likeliest tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig
from trl.data_utils import _tokenize

from qtarget.data.messages import RowReader
from qtarget.errors import ConfigError, DataError
from qtarget.evaluation.sampling import end_tokens
from qtarget.models.forward import accepted
from qtarget.models.frozen import evaluation_mode

if TYPE_CHECKING:
    from qtarget.training.trainer import QTargetTrainer


class Greedy:
    """The trainer's model, decoding greedily in the precision of its weights.

    Only the real vocabulary is decoded, and nothing of the model's own generation settings is used but its end tokens:
    a repetition penalty, say, would make the likeliest token another.

    Args:
        trainer: a QTargetTrainer. max_new_tokens: of one call.
    """

    def __init__(self, trainer: QTargetTrainer, max_new_tokens: int):
        self._trainer, self._tokenizer = trainer, trainer.tokenizer
        self._reader = RowReader.of(trainer.processing_class, trainer.chat_template, checked=True)
        self._model = trainer.accelerator.unwrap_model(trainer.model)
        self._base = trainer.student.base
        self._vocab = trainer.vocab_size
        self.max_new_tokens = max_new_tokens
        self.ends = end_tokens(self._tokenizer, self._base.generation_config)
        pad = self._tokenizer.pad_token_id
        self._pad = min(self.ends) if pad is None else pad
        width = self._base.get_output_embeddings().weight.shape[0]
        self._settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(self.ends),
            pad_token_id=self._pad,
            suppress_tokens=list(range(self._vocab, width)) or None,
        )

    # -- prompts -------------------------------------------------------------------------------------------------

    def prompt(self, row: Mapping[str, Any], number: int) -> list[int]:
        """Token ids of a row's prompt as the trainer would form them; of messages, all before the last answer.

        Raises:
            ConfigError: the row has none, or it leaves no room for an answer and another rest of it.
        """
        processing_class, template = self._trainer.processing_class, self._trainer.chat_template
        try:
            read, _ = self._reader.read(row)
        except ConfigError as error:
            error.during(f"row {number} of the train split")
            raise
        given = read["prompt"] if "prompt" in read else _before_the_answer(read.get("messages"))
        if isinstance(given, list):
            how = {"tools": read.get("tools"), **(read.get("chat_template_kwargs") or {})}
            ids = _tokenize(processing_class, given, add_generation_prompt=True, chat_template=template, **how)[
                "input_ids"
            ]
        else:
            ids = _tokenize(processing_class, given)["input_ids"] if given else []
        if not len(ids):
            raise DataError(f"row {number} of the train split has an empty prompt; remove the row")
        longest = getattr(self._base.config.get_text_config(), "max_position_embeddings", None)
        if longest and len(ids) + 2 * self.max_new_tokens > longest:
            raise ConfigError(
                f"max_new_tokens is {self.max_new_tokens}: the prompt of row {number} has {len(ids)} tokens, its "
                f"answer and the rest after an alternative up to {self.max_new_tokens} each, and the model has "
                f"{longest} positions; lower max_new_tokens, or remove the row"
            )
        return list(ids)

    def text(self, ids: Sequence[int]) -> str:
        """What a verifier reads."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    # -- decoding ------------------------------------------------------------------------------------------------

    def __call__(self, beginnings: Sequence[Sequence[int]]) -> list[list[int]]:
        """How each goes on, its end token included; without one at the end where max_new_tokens were not enough."""
        lines = [torch.tensor(beginning) for beginning in beginnings]
        ids = pad_sequence(lines, batch_first=True, padding_value=self._pad, padding_side="left")
        mask = pad_sequence([torch.ones_like(line) for line in lines], batch_first=True, padding_side="left")
        device = self._trainer.args.device
        # generate() fills what it is not given from the model's settings; so those are replaced
        before, self._base.generation_config = self._base.generation_config, self._settings
        try:
            with evaluation_mode(self._model):
                out = self._model.generate(input_ids=ids.to(device), attention_mask=mask.to(device))
        finally:
            self._base.generation_config = before
        rests = []
        for line in out[:, ids.shape[1] :].tolist():
            end = next((place for place, index in enumerate(line) if index in self.ends), len(line))
            rests.append(line[: end + 1])
        return rests

    @torch.no_grad()
    def alternatives(self, prompt: Sequence[int], answer: Sequence[int], count: int) -> list[list[int]]:
        """[len(answer)][count] ids: at each token of the answer the likeliest ones beside it, the likeliest first."""
        ids = torch.tensor([[*prompt, *answer]], device=self._trainer.args.device)
        inputs = {"input_ids": ids, "logits_to_keep": len(answer) + 1}
        with evaluation_mode(self._model):
            logits = self._model(**accepted(self._base, inputs)).logits[0, -len(answer) - 1 : -1, : self._vocab]
        top = logits.float().topk(count + 1, dim=-1).indices.tolist()
        return [[index for index in line if index != token][:count] for line, token in zip(top, answer, strict=True)]


def _before_the_answer(messages: list[dict] | None) -> list[dict] | None:
    if not messages:
        return None
    last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
    return messages[:last]
